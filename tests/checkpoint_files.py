"""Weights files for the tests of checkpoints, and what is compared of them."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import flax.serialization
import flax.traverse_util
import ml_dtypes
import numpy as np
import torch

from vit_common.files.checkpoint import (
    Checkpoint,
)

DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "complex64", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
]


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Random bits: NaNs, infinities and subnormals are numbers to a file."""
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    size = int(np.prod(shape)) * _dtype(dtype).itemsize
    return np.frombuffer(rng.bytes(size), _dtype(dtype)).reshape(shape)


def _arrays(dtypes: list[str] = DTYPES, seed: int = 0) -> dict[str, np.ndarray]:
    """Every dtype, and every way an array can lie in memory."""
    rng = np.random.default_rng(seed)
    table = {f"layer/{name}/w": _random(rng, (3, 5), name) for name in dtypes}
    return table | {
        "layer/scalar": np.array(2.5, np.float32),
        "layer/empty": np.zeros((0, 4), np.float32),
        "layer/one": np.ones((1, 1, 1), np.float16),
        "strided": rng.standard_normal((6, 8)).astype(np.float32)[::2, 1::3],
        "transposed": rng.standard_normal((4, 7)).T,
        "fortran": np.asfortranarray(rng.standard_normal((3, 4)).astype(np.float32)),
        "big_endian": rng.standard_normal((3, 2)).astype(">f4"),
        "reversed": np.arange(12, dtype=np.int64)[::-1],
    }


def _plain(array: np.ndarray) -> np.ndarray:
    """The same numbers, as the libraries want them: contiguous and little-endian."""
    return np.array(array, array.dtype.newbyteorder("<"), order="C")


def _tree(flat: dict[str, np.ndarray]) -> dict:
    return flax.traverse_util.unflatten_dict(
        {tuple(name.split("/")): _plain(array) for name, array in flat.items()}
    )


def _assert_same(checkpoint: Checkpoint, expected: dict[str, np.ndarray]) -> None:
    assert set(checkpoint) == set(expected)
    for name, array in expected.items():
        tensor = checkpoint[name]
        got, want = tensor.read(), _plain(np.asarray(array))
        assert (tensor.name, tensor.shape, tensor.nbytes) == (name, want.shape, want.nbytes)
        assert got.shape == want.shape
        assert tensor.dtype == got.dtype == want.dtype
        assert got.tobytes() == want.tobytes(), name


def _peak(action: Callable[[], object]) -> int:
    """Bytes allocated at the highest, by Python and numpy."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _torch_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    return {
        "blocks.0.attn.qkv.weight": base,
        "half": base.half(),
        "brain": base.bfloat16(),
        "brain_strided": base.bfloat16()[::2, 1::3],
        "double": base.double().T,
        "ints": torch.arange(5),
        "bools": base > 0,
        "complex": torch.randn(3, dtype=torch.complex64, generator=generator).conj(),
        "scalar": torch.tensor(3.5),
        "brain_scalar": torch.tensor(3.5).bfloat16(),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "shared": base[2:],
    }
