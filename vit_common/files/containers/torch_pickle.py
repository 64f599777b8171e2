"""torch's `.bin`, `.pt` and `.pth`: a pickle of tensors, of which only the tensors are read.

The pickle is read by `pickles`, which runs nothing, and the numbers straight from the file when
they are asked for. torch itself writes such files, and has to be there to read them.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from vit_common.errors import CheckpointError, InputError
from vit_common.files.containers.pickles import OddTensor, Reader, Storage, TensorAt, kind_of
from vit_common.files.containers.tensor import (
    DTYPES,
    DataFile,
    Progress,
    Tensor,
    bad_shape,
    little_endian_bytes,
    no_progress,
)
from vit_common.files.containers.zips import data_offset, open_zip
from vit_common.files.texts import reason

LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""First bytes of files from before torch 1.6: a pickled long, 0x1950a86a20f9469cfc6c."""

_MINIMUM = (2, 6)
# A pickle can hold one mapping many times over, so a small file can have names without end.
_MAX_DEPTH = 32
MAX_NAME = 1024
_MAX_ENTRIES = 100_000

_TYPES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "Untyped": "uint8",
}
"""Name of a storage's class, without "Storage" -> dtype."""

_LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def read(file: DataFile) -> dict[str, Tensor]:
    """The tensors of the file. A plain state dict keeps its names; what lies deeper, as in
    {"model": {...}}, has its path before it: "model/blocks.0.attn.qkv.weight".

    What is neither a tensor nor a mapping (an epoch, the training arguments) is left out, and
    named in `file.left_out`.

    Raises:
        CheckpointError: it asks for code (nothing was run), is corrupt, names data that is not in
            the file, or torch is not there.
    """
    _torch(file)
    zipped = file.read(0, 4) == b"PK\x03\x04"
    loaded, places, swapped = _read_archive(file) if zipped else _read_legacy(file)
    if not isinstance(loaded, Mapping):
        raise file.fail(f"holds a {kind_of(loaded)}; wanted a mapping of names to tensors.")
    tensors: dict[str, Tensor] = {}
    try:
        for visited, (name, value) in enumerate(_entries(loaded, "", 0)):
            if visited >= _MAX_ENTRIES or len(name) > MAX_NAME:
                raise file.fail(f"holds more than {_MAX_ENTRIES} entries, or names without end.")
            if isinstance(value, OddTensor):
                raise _odd(file, name)
            if not isinstance(value, TensorAt):
                if value is not None:
                    file.left_out[name] = kind_of(value)
                continue
            if name in tensors:
                raise file.fail(f"two of its tensors are both named {name!r}.")
            tensors[name] = _tensor(file, name, value, places, swapped)
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


def _read_archive(file: DataFile) -> tuple[Any, dict[str, tuple[int, int]], bool]:
    """What is in a zip archive, where in it each storage lies, and whether its bytes are swapped.

    The checksums of the members are not looked at: torch can be told to write none.
    """
    members: dict[str, zipfile.ZipInfo] = {}
    with open_zip(file) as archive:
        for info in archive.infolist():
            if info.filename in members:
                raise file.fail(f"has the member {info.filename!r} twice.")
            members[info.filename] = info
    if any(name.rpartition("/")[2] == "constants.pkl" for name in members):
        raise file.fail("a TorchScript program, not weights; save its state_dict() instead.")
    for info in members.values():
        end = info.header_offset + info.compress_size
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or end > file.size:
            raise file.fail(f"member {info.filename!r} is compressed or reaches past the end.")
        if info.compress_size != info.file_size:
            raise file.fail(f"member {info.filename!r} states two sizes.")
    pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise file.fail(f"holds {len(pickles)} pickles named data.pkl; torch writes one.")
    root = pickles[0].removesuffix("data.pkl")
    begin = data_offset(file, members[pickles[0]])
    reader = Reader(file, begin, begin + members[pickles[0]].file_size)
    loaded = reader.load()
    places: dict[str, tuple[int, int]] = {}
    for key in reader.storages:
        member = members.get(f"{root}data/{key}") or members.get(f"{root}tensors/{key}")
        if member is None:
            raise file.fail(f"names the storage {key[:40]!r}, which is not in the archive.")
        places[key] = data_offset(file, member), member.file_size
    _check_places(file, reader, {**places, "data.pkl": (begin, members[pickles[0]].file_size)})
    order = members.get(f"{root}byteorder")
    swapped = order is not None and file.read(data_offset(file, order), 3) == b"big"
    return loaded, places, swapped


def _read_legacy(file: DataFile) -> tuple[Any, dict[str, tuple[int, int]], bool]:
    """The same of a file from before torch 1.6: five pickles, then each storage behind its size."""
    reader = Reader(file, 0, file.size)
    if reader.load() != _LEGACY_MAGIC_NUMBER or reader.load() != _LEGACY_PROTOCOL:
        raise file.fail("corrupt: not a pickle that torch can have written.")
    system = reader.load()
    swapped = isinstance(system, dict) and system.get("little_endian") is False
    loaded = reader.load()
    keys = reader.load()
    if not isinstance(keys, list) or not all(isinstance(key, (str, bytes)) for key in keys):
        raise file.fail("corrupt: it has no list of its storages.")
    places: dict[str, tuple[int, int]] = {}
    position = reader.position
    for each in keys:
        key = each.decode("ascii", "replace") if isinstance(each, bytes) else each
        storage = reader.storages.get(key)
        if storage is None or key in places:
            raise file.fail(f"corrupt: storage {key[:40]!r} is there twice, or no tensor's.")
        stated = int.from_bytes(file.read(position, 8), "big" if swapped else "little")
        size = storage.length * _item_size(file, storage)
        if stated != storage.length or position + 8 + size > file.size:
            raise file.fail(
                f"not a readable torch file, or truncated: storage {key[:40]!r} holds "
                f"{storage.length} numbers; the file has {stated} at byte {position}, and ends at "
                f"byte {file.size}."
            )
        places[key] = position + 8, size
        position += 8 + size
    absent = sorted(set(reader.storages) - set(places))
    if absent:
        raise file.fail(
            f"corrupt: its tensors are to lie in {len(absent)} storages that the file does not "
            f"hold, such as {absent[0][:40]!r}."
        )
    return loaded, places, swapped


def _item_size(file: DataFile, storage: Storage) -> int:
    name = _TYPES.get(storage.type)
    if name is None:
        # Quantized numbers: their tensors are refused by name, so any size will do.
        return {"QInt32": 4}.get(storage.type, 1)
    return DTYPES[name].itemsize


def _check_places(file: DataFile, reader: Reader, places: dict[str, tuple[int, int]]) -> None:
    """Raise unless every storage is as long as the pickle says, and none overlaps another."""
    for key, storage in reader.storages.items():
        size = storage.length * _item_size(file, storage)
        if size > places[key][1]:
            raise file.fail(
                f"truncated or corrupt: storage {key[:40]!r} is to hold {size} bytes; it has "
                f"{places[key][1]}."
            )
    reached = 0
    for begin, size in sorted(places.values()):
        if begin < reached:
            raise file.fail("its members overlap, or are larger than the archive; refused.")
        reached = begin + size


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


def _odd(file: DataFile, name: str) -> CheckpointError:
    return file.fail(f"tensor {name!r} is sparse, quantized or without numbers; wanted dense.")


def _tensor(
    file: DataFile, name: str, view: TensorAt, places: dict[str, tuple[int, int]], swapped: bool
) -> Tensor:
    """The tensor, read when it is asked for; what it states is checked against the file now."""
    storage = view.storage
    dtype_name = view.dtype or _TYPES.get(storage.type)
    if dtype_name is None:
        raise _odd(file, name)
    if dtype_name not in DTYPES:
        raise file.fail(f"tensor {name!r} has dtype {dtype_name}; wanted a dtype numpy can hold.")
    dtype = DTYPES[dtype_name]
    count = math.prod(view.shape)
    # Strides of 0 can make a few bytes into an array larger than memory.
    problem = bad_shape(view.shape, dtype.itemsize)
    if problem or count * dtype.itemsize > file.size:
        raise file.fail(f"tensor {name!r} states shape {list(view.shape)}, more than the file.")
    begin, size = places[storage.key]
    item = _item_size(file, storage)
    begin, size = begin + storage.begin * item, min(size, storage.length * item)
    begin += view.offset * dtype.itemsize
    reach = 1 + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
    reach = reach if count else 0
    if (view.offset + reach) * dtype.itemsize > size:
        raise file.fail(
            f"corrupt: tensor {name!r} reaches to byte {(view.offset + reach) * dtype.itemsize} of "
            f"a storage of {size}."
        )
    if view.conjugate and dtype.kind != "c":
        raise file.fail(f"corrupt: tensor {name!r} is the conjugate of numbers that have none.")
    plain = not (swapped or view.conjugate or view.negative)
    if plain and _is_contiguous(view.shape, view.strides):
        load = partial(file.array, begin, dtype, view.shape)
        part = partial(file.part, begin, dtype, view.shape)
        return Tensor(name, view.shape, dtype, load, load_part=part)
    return Tensor(name, view.shape, dtype, partial(_load, file, begin, dtype, reach, view, swapped))


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    wanted = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != wanted:
            return 0 in shape
        wanted *= n
    return True


def _load(
    file: DataFile, begin: int, dtype: np.dtype, reach: int, view: TensorAt, swapped: bool
) -> np.ndarray:
    """A tensor that is a view: strided, of swapped bytes, conjugated or negated."""
    flat = file.array(begin, dtype, (reach,))
    if swapped:
        part = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
        flat = flat.view(np.uint8).reshape(-1, part)[:, ::-1].reshape(-1).view(dtype)
    strides = [stride * dtype.itemsize for stride in view.strides]
    array = np.lib.stride_tricks.as_strided(flat, view.shape, strides, writeable=False)
    array = array.conj() if view.conjugate else array
    return -array if view.negative else array


def is_torch_archive(file: DataFile) -> bool:
    """Whether a zip archive is torch's and not numpy's; a broken one is judged by its extension."""
    try:
        with open_zip(file) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except CheckpointError:
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
