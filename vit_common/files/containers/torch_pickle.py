"""torch's `.bin`, `.pt` and `.pth`: a pickle of tensors, of which only the tensors are read.

torch's weights-only unpickler (2.6 or newer; earlier ones could be fooled, CVE-2025-32434) knows
a closed list of instructions and of types, and calls nothing a file names. torch is imported here
and nowhere else in this package, when such a file is opened or written.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from vit_common.errors import InputError
from vit_common.files.containers.tensor import (
    DTYPES,
    DataFile,
    Progress,
    Tensor,
    little_endian_bytes,
    no_progress,
)
from vit_common.files.texts import reason

LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""First bytes of files from before torch 1.6: a pickled long, 0x1950a86a20f9469cfc6c."""

_MINIMUM = (2, 6)
_ASKS_FOR_CODE = re.compile(
    r"GLOBAL ([\w.]+)|unrecognized function (\S*)|Can only (?:build|create)|must be imported"
)
# A pickle can hold one mapping many times over, so a small file can have names without end.
_MAX_DEPTH = 32
MAX_NAME = 1024
_MAX_ENTRIES = 100_000


def read(file: DataFile) -> dict[str, Tensor]:
    """The tensors of the file. A plain state dict keeps its names; what lies deeper, as in
    {"model": {...}}, has its path before it: "model/blocks.0.attn.qkv.weight".

    What is neither a tensor nor a mapping (an epoch, the training arguments) is left out.

    Raises:
        CheckpointError: it asks for code (nothing was run), is corrupt, or torch is not there.
    """
    torch = _torch(file)
    loaded = _load(file, torch)
    if not isinstance(loaded, Mapping):
        raise file.fail(f"holds a {type(loaded).__name__}; wanted a mapping of names to tensors.")
    tensors: dict[str, Tensor] = {}
    try:
        for visited, (name, value) in enumerate(_entries(loaded, "", 0)):
            if visited >= _MAX_ENTRIES or len(name) > MAX_NAME:
                raise file.fail(f"holds more than {_MAX_ENTRIES} entries, or names without end.")
            if not isinstance(value, torch.Tensor):
                continue
            if name in tensors:
                raise file.fail(f"two of its tensors are both named {name!r}.")
            array = _array(file, torch, name, value)
            tensors[name] = Tensor(name, array.shape, array.dtype, array.view)
    except RecursionError as error:
        raise file.fail(f"{reason(error)}.") from error
    return tensors


def _torch(file: DataFile) -> Any:
    try:
        import torch
    except ImportError as error:
        raise file.fail(
            "reading a torch pickle needs torch; run `pip install torch`, or give the weights as "
            "safetensors."
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _MINIMUM:
        raise file.fail(
            f"torch {torch.__version__} is installed; its unpickler is not safe. Wanted 2.6 or "
            "newer, or the weights as safetensors."
        )
    return torch


def _load(file: DataFile, torch: Any) -> Any:
    zipped = file.read(0, 4) == b"PK\x03\x04"
    if zipped:
        _check_archive(file)
    # A namespace of training arguments, which many published checkpoints carry, holds attributes
    # and does nothing.
    known = torch.serialization.safe_globals([argparse.Namespace])
    try:
        with warnings.catch_warnings(), known, contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")
            source: Any = str(file.path)
            if file.path.suffix == ".safetensors":  # by that name, torch would not read a pickle
                source, zipped = stack.enter_context(file.path.open("rb")), False
            return torch.load(source, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        asked = _ASKS_FOR_CODE.search(str(error))
        if asked:
            what = f" ({asked[asked.lastindex]})" if asked.lastindex else ""
            raise file.fail(
                f"its pickle asks for code or objects{what}, not only tensors; it was refused and "
                "nothing in it was run. Wanted a file of plain weights, such as safetensors."
            ) from error
        # torch's own text goes on to recommend switching the check off; it is not passed on.
        raise file.fail("corrupt: not a pickle that torch can have written.") from error
    except Exception as error:  # torch raises a dozen classes for a broken file
        raise file.fail(f"not a readable torch file ({reason(error)[:200]}).") from error


def _check_archive(file: DataFile) -> None:
    """Refuse an archive whose members do not lie in it, before torch's C++ reader maps it."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            members = archive.infolist()
    except Exception as error:  # zipfile has no one class for a broken archive
        raise file.fail(f"truncated or corrupt zip archive ({reason(error)}).") from error
    names = {info.filename.rpartition("/")[2] for info in members}
    if "constants.pkl" in names:
        raise file.fail("a TorchScript program, not weights; save its state_dict() instead.")
    if sum(info.compress_size for info in members) > file.size:
        raise file.fail("its members overlap, or are larger than the archive; refused.")
    for info in members:
        end = info.header_offset + info.compress_size
        if info.compress_type != zipfile.ZIP_STORED or end > file.size:
            raise file.fail(f"member {info.filename!r} is compressed or reaches past the end.")


def _entries(table: Mapping[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    """(name, value) of everything in nested mappings that is no mapping itself."""
    if depth > _MAX_DEPTH:
        raise RecursionError(
            f"its mappings are nested more than {_MAX_DEPTH} deep, or hold themselves"
        )
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield f"{prefix}{key}", None  # counts towards the limit, empty or not
            yield from _entries(value, f"{prefix}{key}/", depth + 1)
        else:
            yield f"{prefix}{key}", value


def _array(file: DataFile, torch: Any, name: str, tensor: Any) -> np.ndarray:
    """A read-only view of the tensor's memory, which is the file's where it could be mapped."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise file.fail(f"tensor {name!r} is sparse, quantized or without numbers; wanted dense.")
    # Strides of 0 can make a few bytes into an array larger than memory.
    if tensor.numel() * tensor.element_size() > file.size:
        raise file.fail(f"tensor {name!r} states shape {list(tensor.shape)}, more than the file.")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise file.fail(f"tensor {name!r} has dtype {dtype}; wanted a dtype numpy can hold.")
    try:
        tensor = tensor.detach().resolve_conj().resolve_neg()
        if DTYPES[dtype].isbuiltin == 1:
            array = tensor.numpy()
        else:  # bfloat16 and float8: the same bits under the name of an integer type
            bits = {1: torch.uint8, 2: torch.int16}[tensor.element_size()]
            array = tensor.view(bits).numpy().view(DTYPES[dtype])
    except (RuntimeError, TypeError) as error:
        raise file.fail(f"tensor {name!r} is not a dense array ({reason(error)}).") from error
    array.flags.writeable = False
    return array


def is_torch_archive(file: DataFile) -> bool:
    """Whether a zip archive is torch's rather than numpy's; told by the extension if broken."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except Exception:
        return file.path.suffix != ".npz"


class _Sink:
    """The stream, for torch to write to; keeps the error that torch's C++ would replace."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        try:
            return self._stream.write(data)
        except BaseException as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._stream.flush()


def write(
    stream: BinaryIO,
    tensors: Sequence[Tensor],
    wrapper: str | None = None,
    progress: Progress = no_progress,
) -> None:
    """Write a state dict, or {wrapper: state dict}, with `torch.save`.

    All tensors are in memory at once, as `torch.save` wants them: one copy of everything, and one
    tensor more while it is read. Each has memory of its own in the file.

    Args:
        stream: where to.
        tensors: in the order the dict has them.
        wrapper: key of the one entry that holds the state dict, such as "model".
        progress: told each tensor when it is in memory; `torch.save` follows the last one.

    Raises:
        InputError: torch is not installed, or does not know a dtype.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "writing a torch pickle needs torch; run `pip install torch`, or write safetensors, "
            "msgpack or npz."
        ) from error
    for tensor in tensors:
        if not isinstance(getattr(torch, tensor.dtype.name, None), torch.dtype):
            raise InputError(
                f"tensor {tensor.name!r}: torch {torch.__version__} has no dtype "
                f"{tensor.dtype.name}."
            )
    state: dict[str, Any] = {}
    for tensor in tensors:
        own = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype.name))
        own.reshape(-1).view(torch.uint8).numpy()[:] = little_endian_bytes(tensor)
        state[tensor.name] = own
        progress(tensor.nbytes)
    sink: Any = _Sink(stream)
    try:
        torch.save({wrapper: state} if wrapper is not None else state, sink)
    except BaseException as error:
        if sink.error is None or sink.error is error:
            raise
        raise sink.error from error
