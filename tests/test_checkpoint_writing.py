"""Writing one weights file: every container, by any reader, whole or not at all.

The readers that decide are numpy, torch and Flax; bytes of `.npz` are numpy's own.
"""

from __future__ import annotations

import argparse
import collections
import resource
import signal
import subprocess
import sys
import tracemalloc
import weakref
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vit_common.errors import CheckpointError, InputError, MissingFileError, ViTError
from vit_common.files.checkpoint import open_checkpoint, save_checkpoint, write_checkpoint
from vit_common.files.containers import flax_msgpack, torch_pickle

SUFFIXES = [".safetensors", ".msgpack", ".npz", ".pth"]
DTYPES = ["float64", "float32", "float16", "bfloat16", "int8", "int64", "uint16", "bool"]
FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]

Arrays = Mapping[str, np.ndarray]


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _random(seed: int, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """Random bits: NaNs, infinities and subnormals are numbers to a file."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    count = int(np.prod(shape)) * _dtype(dtype).itemsize
    return np.frombuffer(rng.bytes(count), _dtype(dtype)).reshape(shape)


def _weights(dtypes: list[str] = DTYPES) -> dict[str, np.ndarray]:
    return {f"layer/{name}": _random(i, (3, 4), name) for i, name in enumerate(dtypes)}


def _numbers(array: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    """Shape, and the numbers in row-major order and little-endian."""
    return array.shape, np.array(array, array.dtype.newbyteorder("<"), order="C").tobytes()


def _assert_holds(path: Path, expected: Arrays) -> None:
    with open_checkpoint(path) as checkpoint:
        assert set(checkpoint) == set(expected)
        for name, array in expected.items():
            got = checkpoint[name].read()
            assert got.dtype.name == array.dtype.name, name
            assert _numbers(got) == _numbers(array), name


def _torch_numbers(tensor: torch.Tensor) -> tuple[tuple[int, ...], bytes]:
    assert tensor.is_contiguous()
    return tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _read_by_others(path: Path) -> dict[str, tuple[tuple[int, ...], bytes, str]]:
    """Shape, numbers and dtype of each tensor, as the container's own library reads them."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    elif path.suffix == ".msgpack":
        tree = flax.serialization.msgpack_restore(path.read_bytes())
        arrays = flax.traverse_util.flatten_dict(tree, sep="/")
    else:
        state = torch.load(path, weights_only=True)
        names = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()}
        return {name: (*_torch_numbers(tensor), names[name]) for name, tensor in state.items()}
    return {name: (*_numbers(array), array.dtype.name) for name, array in arrays.items()}


class Lazy:
    """A tensor that makes its array when it is asked, as one in a file does."""

    def __init__(self, array: np.ndarray, then: Callable[[], object] = lambda: None) -> None:
        self.shape, self.dtype = array.shape, array.dtype
        self._array, self._then = array, then

    def read(self) -> np.ndarray:
        self._then()
        return self._array.copy()


def _state(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# -- what is written is what was given


def _lay(array: np.ndarray, how: str) -> np.ndarray:
    """The same numbers, lying in memory in another way."""
    if how == "fortran":
        return np.asfortranarray(array)
    if how == "strided":
        wide = np.zeros((*array.shape, 3), array.dtype)
        wide[..., 1] = array
        return wide[..., 1]
    if how == "reversed":
        return np.array(array[..., ::-1])[..., ::-1] if array.ndim else array
    if how == "rolled":  # the first axis is the fastest, as where a kernel is transposed
        return np.array(np.moveaxis(array, 0, -1), order="C").transpose(-1, *range(array.ndim - 1))
    if how == "big_endian" and array.dtype.isbuiltin == 1:
        return array.astype(array.dtype.newbyteorder(">"))
    return array


@st.composite
def _any_arrays(draw: st.DrawFn) -> dict[str, np.ndarray]:
    letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0#")
    arrays = {}
    for number in range(draw(st.integers(0, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
        array = _random(draw(st.integers(0, 99)), shape, draw(st.sampled_from(DTYPES)))
        ways = ["plain", "fortran", "strided", "reversed", "big_endian"]
        if len(shape) > 1:
            ways.append("rolled")
        name = draw(st.text(letters | st.sampled_from("/."), max_size=12))
        arrays[f"{name}#{number}"] = _lay(array, draw(st.sampled_from(ways)))
    return arrays


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(
    max_examples=30,
    deadline=10_000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(arrays=_any_arrays())
def test_any_arrays_come_back_bit_for_bit(
    tmp_path: Path, suffix: str, arrays: dict[str, np.ndarray]
) -> None:
    path = tmp_path / f"x{suffix}"
    write_checkpoint(path, arrays)
    _assert_holds(path, arrays)
    if suffix == ".safetensors":  # its bytes are the library's in test_checkpoint.py
        assert path.read_bytes() == save_checkpoint(tmp_path, arrays, separator="/")[0].read_bytes()
        return
    found = _read_by_others(path)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        # numpy has no name for bfloat16; what it reads are two bytes without meaning.
        void = suffix == ".npz" and array.dtype.name == "bfloat16"
        dtype = "void16" if void else array.dtype.name
        assert found[name] == (*_numbers(array), dtype), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["fortran", "rolled", "strided", "reversed"])
@pytest.mark.parametrize("shape", [(1100, 600), (16, 9, 3, 1030), (300, 12, 170), (2, 1 << 18, 1)])
def test_large_arrays_laid_out_otherwise(
    tmp_path: Path, shape: tuple[int, ...], how: str, dtype: str
) -> None:
    """Over 1 MB, where they are copied in tiles; sides that are no multiple of a tile's."""
    array = _lay(_random(0, shape, dtype), how)
    write_checkpoint(tmp_path / "x.npz", {"a": array})
    with np.load(tmp_path / "x.npz") as file:
        assert file["a"].tobytes() == array.tobytes()


def test_heads_of_a_transposed_matrix(tmp_path: Path) -> None:
    """Google's query kernel (D, A, D / A): a transposed matrix with its second side split."""
    weight = _random(0, (768, 768))
    write_checkpoint(tmp_path / "x.npz", {"kernel": weight.T.reshape(768, 12, 64)})
    with np.load(tmp_path / "x.npz") as file:
        assert _numbers(file["kernel"]) == ((768, 12, 64), weight.tobytes(order="F"))


# -- each container


def test_npz_bytes_are_those_of_numpy(tmp_path: Path) -> None:
    arrays = _weights([name for name in DTYPES if name != "bfloat16"]) | {
        "scalar": np.float32(2.5).reshape(()),
        "empty": np.zeros((0, 4), np.float32),
        "ünï/cødé.npy": np.ones(3, np.complex64),
        **{f"many/{i}": np.full((i, 1, 2), i, np.int16) for i in range(40)},
    }
    brain = _random(1, (2, 3), "bfloat16")
    write_checkpoint(tmp_path / "x.npz", {**arrays, "brain": brain})
    np.savez(tmp_path / "expected.npz", **arrays, brain=brain.view("V2"))
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "expected.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert b"'|V2'" in archive.read("brain.npy")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_tensors_give_the_same_bytes(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / f"a{suffix}", _weights())
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)
    write_checkpoint(
        tmp_path / "b", _weights(), container=open_checkpoint(tmp_path / f"a{suffix}").container
    )
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("wrapper", [None, "model"])
def test_torch_reads_its_state_dict(tmp_path: Path, suffix: str, wrapper: str | None) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    state = {name.replace(".", "/"): t.numpy() for name, t in module.state_dict().items()}
    path = tmp_path / f"x{suffix}"
    write_checkpoint(path, state, wrapper=wrapper, separator=".")
    loaded = torch.load(path, weights_only=True)
    assert type(loaded) is dict
    if wrapper:
        assert list(loaded) == [wrapper]
        loaded = loaded[wrapper]
    assert list(loaded) == list(module.state_dict())
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4))
    other.load_state_dict(loaded)
    prefix = f"{wrapper}/" if wrapper else ""
    _assert_holds(path, {prefix + n.replace("/", "."): array for n, array in state.items()})


def test_tensors_in_a_torch_file_share_no_memory(tmp_path: Path) -> None:
    """Views of one array, as one matrix split into query and key, each get their own storage."""
    base = _random(0, (6, 4))
    parts = {"all": base, "query": base[:3], "bits": base.view(np.int32), "same": base}
    write_checkpoint(tmp_path / "x.pth", parts)
    loaded = torch.load(tmp_path / "x.pth", weights_only=True)
    for name, array in parts.items():
        assert _torch_numbers(loaded[name]) == _numbers(array)
        assert loaded[name].untyped_storage().nbytes() == array.nbytes
    assert len({tensor.data_ptr() for tensor in loaded.values()}) == 4


def test_the_suffix_tells_the_container_unless_it_is_given(tmp_path: Path) -> None:
    kinds = {".safetensors": "safetensors", ".MSGPACK": "msgpack", ".npz": "npz", ".bin": "torch"}
    arrays = {"a/b": np.arange(3.0)}
    for suffix, kind in kinds.items():
        write_checkpoint(str(tmp_path / "new" / f"x{suffix}"), arrays)  # as text; a new directory
        assert open_checkpoint(tmp_path / "new" / f"x{suffix}").container == kind
        write_checkpoint(tmp_path / "plain", arrays, container=kind)  # type: ignore[arg-type]
        with open_checkpoint(tmp_path / "plain") as checkpoint:
            assert (checkpoint.container, list(checkpoint)) == (kind, ["a/b"])


def test_metadata_and_separator(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_checkpoint(path, {"a/b": np.ones(2)}, metadata={"format": "pt"}, separator=".")
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.metadata, list(checkpoint)) == ({"format": "pt"}, ["a.b"])
    write_checkpoint(tmp_path / "x.npz", {"a/b": np.ones(2)}, separator=".")
    assert list(open_checkpoint(tmp_path / "x.npz")) == ["a.b"]
    write_checkpoint(tmp_path / "x.msgpack", {"a/b": np.ones(2)}, separator=".")
    assert list(open_checkpoint(tmp_path / "x.msgpack")) == ["a/b"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_is_written_from_itself_and_from_any_other(tmp_path: Path, suffix: str) -> None:
    """Into the very file it is read from: the old one stays open until it is replaced."""
    arrays = _weights()
    path = tmp_path / f"x{suffix}"
    for source in SUFFIXES:
        write_checkpoint(tmp_path / f"source{source}", arrays)
        with open_checkpoint(tmp_path / f"source{source}") as checkpoint:
            write_checkpoint(path, checkpoint)
        _assert_holds(path, arrays)
    with open_checkpoint(path) as checkpoint:
        write_checkpoint(path, checkpoint)
    _assert_holds(path, arrays)
    write_checkpoint(path, {"a": jnp.arange(3.0), "b": jnp.ones((2, 3), jnp.bfloat16)})
    _assert_holds(path, {"a": np.arange(3, dtype="f4"), "b": np.ones((2, 3), ml_dtypes.bfloat16)})


def test_numbers_that_are_no_weights_keep_their_dtype(tmp_path: Path) -> None:
    """A converter refuses float8 and integers by the dtype it sees; no container hides it."""
    arrays = _weights([*FLOAT8, "uint8", "int32", "int64"])
    for suffix in (".safetensors", ".msgpack", ".pth"):
        write_checkpoint(tmp_path / f"x{suffix}", arrays)
        _assert_holds(tmp_path / f"x{suffix}", arrays)
    for name in FLOAT8:
        with pytest.raises(InputError, match=f"'layer/{name}': npz has no dtype {name}"):
            write_checkpoint(tmp_path / "x.npz", {f"layer/{name}": arrays[f"layer/{name}"]})
    assert not (tmp_path / "x.npz").exists()


def test_tied_and_strided_tensors_of_torch_are_read_and_written(tmp_path: Path) -> None:
    base = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    tensors = {"tied": base, "also": base, "turned": base.T, "part": base[1::2, ::3]}
    tensors |= {"row": base[3], "wide": base[:1].expand(4, 6), "brain": base.bfloat16().T}
    torch.save({"model": tensors}, tmp_path / "x.pth")
    with open_checkpoint(tmp_path / "x.pth") as checkpoint:
        assert list(checkpoint) == [f"model/{name}" for name in tensors]
        for suffix in SUFFIXES:
            path = tmp_path / f"out{suffix}"
            write_checkpoint(path, checkpoint)
            with open_checkpoint(path) as written:
                for name, tensor in tensors.items():
                    plain = tensor.clone(memory_format=torch.contiguous_format)
                    got = written[f"model/{name}"].read()
                    assert _numbers(got) == _torch_numbers(plain), name


# -- progress and memory


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_progress_is_told_of_every_tensor(tmp_path: Path, suffix: str) -> None:
    arrays = {"a/w": np.ones((3, 4)), "a/b": np.ones(5, np.float16), "c": np.zeros((0, 2))}
    told: list[int] = []
    write_checkpoint(tmp_path / f"x{suffix}", arrays, progress=told.append)
    assert sorted(told) == [0, 10, 96]


@pytest.mark.parametrize("container", ["safetensors", "msgpack"])
def test_progress_of_a_sharded_save(
    tmp_path: Path, container: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flax_msgpack, "MAX_CHUNK_SIZE", 300)  # the largest is split, and told once
    arrays = {f"w{i}": np.ones(10 * i) for i in range(6)}
    told: list[int] = []
    save_checkpoint(tmp_path, arrays, container=container, max_shard_size=500, progress=told.append)
    assert sorted(told) == [80 * i for i in range(6)]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (".safetensors", ".safetensors"),
        (".safetensors", ".msgpack"),
        (".safetensors", ".npz"),
        (".npz", ".safetensors"),
        (".msgpack", ".npz"),
    ],
)
def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path, source: str, target: str) -> None:
    """Whatever the size of the file; transposed on the way, which takes a second copy."""
    arrays = {f"w{i:02}": np.full((500, 500), i, np.float32) for i in range(24)}
    write_checkpoint(tmp_path / f"a{source}", arrays)
    read: list[weakref.ref[np.ndarray]] = []

    class Turned:
        def __init__(self, tensor: Any) -> None:
            self.shape, self.dtype, self._tensor = tensor.shape, tensor.dtype, tensor

        def read(self) -> np.ndarray:
            assert [array() for array in read] == [None] * len(read)
            array = self._tensor.read().T
            read.append(weakref.ref(array))
            return array

    with open_checkpoint(tmp_path / f"a{source}") as checkpoint:
        turned = {name: Turned(tensor) for name, tensor in checkpoint.items()}
        tracemalloc.start()
        try:
            write_checkpoint(tmp_path / f"b{target}", turned)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert len(read) == 24
    assert peak < 10_000_000  # two of 1 MB, pieces of zipfile's, and what others allocate


def test_only_torch_files_need_a_framework(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from vit_common.files.checkpoint import open_checkpoint, write_checkpoint\n"
        "for kind in ('safetensors', 'msgpack', 'npz'):\n"
        "    write_checkpoint(f'{sys.argv[1]}/x.{kind}', {'a': np.ones(2)})\n"
        "heavy = {'torch', 'jax', 'flax', 'huggingface_hub', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.modules['torch'] = None\n"
        "try:\n"
        "    write_checkpoint(f'{sys.argv[1]}/x.pth', {'a': np.ones(2)})\n"
        "except ValueError as error:\n"
        "    assert 'pip install torch' in str(error), error\n"
        "else:\n"
        "    sys.exit('was written')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    assert {path.name for path in tmp_path.iterdir()} == {*("x.safetensors", "x.msgpack", "x.npz")}


# -- what cannot be written


@pytest.mark.parametrize(
    ("name", "tensors", "options", "message"),
    [
        ("x.h5", {}, {}, r"x\.h5: the suffix .* \.safetensors, \.msgpack, \.npz, .*given '\.h5'"),
        ("x", {}, {}, "given ''"),
        ("x.npz", {}, {"container": "zip"}, "must be one of 'safetensors', .*; given 'zip'"),
        ("x.npz", {}, {"metadata": {"a": "b"}}, r"for safetensors files; .*x\.npz is to be npz"),
        ("x.safetensors", {}, {"metadata": {"a": 1}}, "`metadata` must map strings to strings"),
        ("x.npz", {}, {"wrapper": "model"}, "`wrapper` .* is for torch pickles; given 'model'"),
        ("x.pth", {}, {"wrapper": 3}, "`wrapper` must be a string, .*given 3"),
        ("x.npz", {"a\0b": np.ones(1)}, {}, "no names with a NUL"),
        (
            "x.npz",
            {"ü" * 33000: np.ones(1)},
            {},
            "takes 66000 bytes; npz files hold at most 65531",
        ),
        ("x.msgpack", {"a/" * 600: np.ones(1)}, {}, "takes 1200 bytes; msgpack .* at most 1024"),
        ("x.pth", {"a" * 2000: np.ones(1)}, {}, "takes 2000 bytes; torch files hold at most 1024"),
        ("x.pth", {"a/b": np.ones(1), "a.b": np.ones(1)}, {"separator": "."}, "'a.b' is taken"),
        ("x.npz", {"\udcff": np.ones(1)}, {}, "not valid Unicode"),
        ("x.npz", {"a": np.array([None])}, {}, "'a' has dtype object"),
        ("x.msgpack", {"a": np.ones(1), "a/b": np.ones(1)}, {}, "through the tensor 'a'"),
    ],
)
def test_what_cannot_be_written_is_named_before_anything_is(
    tmp_path: Path, name: str, tensors: dict, options: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write_checkpoint(tmp_path / "new" / name, tensors, **options)
    assert not (tmp_path / "new").exists()


def test_a_dtype_that_torch_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "float8_e5m2")
    with pytest.raises(InputError, match=r"'layer/float8_e5m2': torch .* has no dtype"):
        write_checkpoint(tmp_path / "x.pth", _weights(FLOAT8))
    assert _state(tmp_path) == {}


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(MissingFileError, match=r"x\.npz: .*a directory has that name"):
        write_checkpoint(tmp_path / "x.npz", _weights())
    (tmp_path / "file").write_text("")
    with pytest.raises(MissingFileError, match="file: wanted a directory"):
        write_checkpoint(tmp_path / "file" / "x.npz", _weights())
    assert {path.name for path in tmp_path.iterdir()} == {"x.npz", "file"}


# -- interruption


class _Stop(BaseException):
    pass


def _failing(at: int, error: BaseException, last: int = 4) -> dict[str, Lazy]:
    """Tensors of which one raises; the names are in the order every container writes them."""

    def fail() -> None:
        raise error

    ones = np.ones(3000)
    return {f"w{i}": Lazy(ones, fail) if i == at else Lazy(ones) for i in range(last + 1)}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (_Stop(), _Stop),
        (CheckpointError("was truncated"), CheckpointError),
        (OSError(5, "Input/output error"), MissingFileError),
        (RuntimeError("anything"), RuntimeError),
    ],
    ids=["stop", "refusal", "system", "other"],
)
def test_a_tensor_that_cannot_be_read_leaves_the_old_file(
    tmp_path: Path, suffix: str, at: int, error: BaseException, raised: type[BaseException]
) -> None:
    path = tmp_path / f"x{suffix}"
    with pytest.raises(raised, match=str(error.args[-1]) if error.args else None):
        write_checkpoint(path, _failing(at, error))
    assert _state(tmp_path) == {}
    write_checkpoint(path, _weights())
    old = _state(tmp_path)
    with pytest.raises(raised, match=str(error.args[-1]) if error.args else None):
        write_checkpoint(path, _failing(at, error))
    assert _state(tmp_path) == old


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_progress_can_stop_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    write_checkpoint(path, _weights())
    old = _state(tmp_path)

    def stop(nbytes: int) -> None:
        raise _Stop

    with pytest.raises(_Stop):
        write_checkpoint(path, {"a": np.ones(3)}, progress=stop)
    assert _state(tmp_path) == old


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_tensor_that_is_not_what_it_said(tmp_path: Path, suffix: str) -> None:
    class Liar:
        shape, dtype = (0, 3), np.dtype(np.float32)

        def read(self) -> np.ndarray:
            return np.zeros((0, 4), np.float32)

    with pytest.raises(InputError, match=r"'b' said float32 of shape \(0, 3\); reading it gave"):
        write_checkpoint(tmp_path / f"x{suffix}", {"a": np.ones(2), "b": Liar()})
    assert _state(tmp_path) == {}


def test_torch_cannot_hide_why_writing_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's C++ goes on after an error of the stream, and raises one of its own."""
    path = tmp_path / "x.pth"
    write_checkpoint(path, _weights())
    old = _state(tmp_path)
    write, state = torch_pickle._Sink.write, {"calls": 0, "fail": -1}

    def interrupted(self: Any, data: Any) -> int:
        state["calls"] += 1
        if state["calls"] > state["fail"] >= 0:
            self.error = self.error or KeyboardInterrupt()
            raise self.error
        return write(self, data)

    monkeypatch.setattr(torch_pickle._Sink, "write", interrupted)
    write_checkpoint(tmp_path / "y.pth", {"a": np.ones(5000)})
    (tmp_path / "y.pth").unlink()
    assert state["calls"] > 5
    for fail in range(state["calls"]):
        state.update(calls=0, fail=fail)
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(path, {"a": np.ones(5000)})
        assert _state(tmp_path) == old


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_real_limit_on_file_size_leaves_the_old_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    write_checkpoint(path, _weights())
    old = _state(tmp_path)
    many = {f"w{i}": np.zeros(10) for i in range(1000)}
    for tensors in ({"a": np.ones(9), "b": np.ones(100_000)}, {"a": np.ones(6240)}, many):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (49_930, hard))
        try:
            with pytest.raises(
                MissingFileError, match=r"File too large\); the file that was there"
            ):
                write_checkpoint(path, tensors)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert _state(tmp_path) == old


KILLED = """
import os, signal, sys
import numpy as np
from vit_common.files.checkpoint import write_checkpoint

path, when = sys.argv[1:]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

class Tensor:
    shape, dtype = (50_000,), np.dtype(np.float32)
    def __init__(self, last):
        self.last = last
    def read(self):
        if self.last and when == "reading":
            die()
        return np.ones(self.shape, self.dtype)

if when == "flushing":
    os.fsync = die
write_checkpoint(path, {f"w{i}": Tensor(i == 3) for i in range(4)})
"""


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    # Not of torch, which takes seconds to start; the file is flushed and renamed as the others.
    runs = [(suffix, when) for suffix in SUFFIXES[:3] for when in ("reading", "flushing")]
    children = []
    for suffix, when in runs:
        path = tmp_path / when / f"x{suffix}"
        write_checkpoint(path, _weights())
        command = [sys.executable, "-c", KILLED, str(path), when]
        children.append(subprocess.Popen(command))
    for child in children:
        assert child.wait(timeout=60) == -signal.SIGKILL
    for suffix, when in runs:
        path = tmp_path / when / f"x{suffix}"
        (left,) = path.parent.glob(f".{path.name}.*.tmp")
        # What was read when the process died may still have waited for the thread that writes.
        size = sum(file.stat().st_size for file in left.iterdir())
        assert size > (400_000 if when == "flushing" else -1)
        _assert_holds(path, _weights())
        write_checkpoint(path, {"new": np.ones(3)})
        _assert_holds(path, {"new": np.ones(3)})
        assert not list(path.parent.glob(f".{path.name}.*"))


# -- files that nobody should read


def _read_or_refuse(path: Path) -> bool:
    refusal: ViTError | None = None
    try:
        with open_checkpoint(path) as checkpoint:
            for tensor in checkpoint.values():
                array = tensor.read()
                assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
    except ViTError as error:
        refusal = error
    assert refusal is None or str(path) in str(refusal)
    return refusal is None


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_cut_and_every_flipped_byte_is_read_or_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    write_checkpoint(path, {"a/b": _random(0, (2, 3), "bfloat16"), "c": np.float32([1, 2])})
    whole = path.read_bytes()
    for end in range(0, len(whole), 5):
        path.write_bytes(whole[:end])
        assert not _read_or_refuse(path), end
    step = max(1, len(whole) // 400)
    for place in range(0, len(whole), step):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        _read_or_refuse(path)


def _shared_archive(path: Path, size: int) -> None:
    """Two members of `size` bytes in an archive of hardly more: one lies inside the other."""
    header = b"\x93NUMPY\x01\x00"
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,)}\n"

    def npy(data: bytes) -> bytes:
        line = text % len(data)
        return header + len(line).to_bytes(2, "little") + line + data

    inner = path.with_suffix(".inner")
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("b.npy", npy(bytes(size)))
        info = archive.infolist()[0]
        end = archive.start_dir
    data = inner.read_bytes()[:end]
    inner.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", npy(data))
        info.header_offset = archive.start_dir - len(data)
        archive.filelist.append(info)
        archive.NameToInfo[info.filename] = info


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """So an archive could hold its own size a thousand times over."""
    _shared_archive(tmp_path / "x.npz", 5000)
    with np.load(tmp_path / "x.npz") as file:  # which is what numpy thinks of it
        assert sorted(file.files) == ["a", "b"]
    with pytest.raises(CheckpointError, match=r"x\.npz: its members overlap"):
        open_checkpoint(tmp_path / "x.npz")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (collections.UserList("x"), "collections.UserList"),
        (argparse.Action([], "x"), "argparse.Action"),
        (Lazy, rf"{__name__}\.Lazy"),
    ],
)
def test_a_class_in_a_torch_file_is_refused_by_its_name(
    tmp_path: Path, zipped: bool, value: object, named: str
) -> None:
    path = tmp_path / "x.pth"
    torch.save(
        {"model": {"w": torch.ones(2)}, "args": value}, path, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(CheckpointError, match=rf"\({named}\).*nothing in it was run"):
        open_checkpoint(path)


def test_an_old_torch_file_that_claims_gigabytes(tmp_path: Path) -> None:
    """The format from before torch 1.6 makes its storages before it reads them."""
    torch.save(
        {"a": torch.arange(7777.0)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False
    )
    data = (tmp_path / "x.bin").read_bytes()
    count = b"M" + (7777).to_bytes(2, "little")  # as pickles write a small number
    assert data.count(count) == 2  # of the storage, and the shape
    for claim in (b"J" + (2**31 - 1).to_bytes(4, "little"), b"\x8a\x06" + bytes(5) + b"\x01"):
        (tmp_path / "x.bin").write_bytes(data.replace(count, claim))
        resident = _resident()
        with pytest.raises(CheckpointError, match=r"x\.bin: not a readable torch file"):
            open_checkpoint(tmp_path / "x.bin")
        assert _resident() - resident < 50_000_000


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
