"""numpy's `.npz`: a zip archive of `.npy` arrays, one member at a time, never unpickled."""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import IO, Any, BinaryIO

import numpy as np

from vit_common.errors import CheckpointError
from vit_common.files.containers.tensor import (
    DTYPES,
    DataFile,
    Progress,
    Tensor,
    aligned_empty,
    bad_shape,
    little_endian_bytes,
    no_progress,
)
from vit_common.files.containers.zips import data_offset, open_zip
from vit_common.files.texts import reason

# Deflate shrinks nothing to less than 1/1032. A member that claims to reach that is a constant,
# which a checkpoint may hold (a head that starts at zero), but not a gigabyte of it.
MAX_RATIO = 1000
MAX_CONSTANT = 10**9

MAX_NAME = 2**16 - 1 - len(".npy")
"""Bytes of a name: a zip archive has 16 bits for their number."""

_PIECE = 1 << 20
"""Bytes asked of zipfile at once; it makes a second copy of each piece."""


def read(file: DataFile) -> dict[str, Tensor]:
    """The tensors of the archive, named as its members are, without ".npy".

    Nothing is decompressed but the headers. Arrays of texts and dates are left out, and
    named in `file.left_out`. The dtype "|V2" is read as bfloat16, which numpy
    stores so; numpy has no other dtype of that kind.

    Raises:
        CheckpointError: not such an archive; holds Python objects; states sizes that its bytes
            cannot have.
    """
    archive = file.resources.enter_context(open_zip(file))
    try:
        return _members(file, archive)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile has no one class for a broken archive
        raise file.fail(f"truncated or corrupt zip archive ({reason(error)}).") from error


def _members(file: DataFile, archive: zipfile.ZipFile) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name == info.filename:
            raise file.fail(f"member {info.filename!r} is not a .npy array.")
        if name in tensors:
            raise file.fail(f"has the member {info.filename!r} twice.")
        _check_sizes(file, info)
        with archive.open(info) as stream:
            dtype, fortran, shape, start = _header(file, name, stream)
        if dtype.hasobject:
            raise file.fail(
                f"array {name!r} holds Python objects, which are never unpickled here; wanted "
                "numbers."
            )
        if dtype.name not in DTYPES and dtype != np.dtype("V2"):
            file.left_out[name] = f"is an array of {str(dtype)[:40]}; its dtype must be of numbers"
            continue
        itemsize = dtype.itemsize
        problem = bad_shape(shape, itemsize)
        if problem:
            raise file.fail(f"array {name!r}: shape {problem}.")
        wanted = start + math.prod(shape) * itemsize
        if info.file_size != wanted:
            raise file.fail(
                f"array {name!r}: {dtype} of shape {list(shape)} takes {wanted} bytes with its "
                f"header; the archive states {info.file_size}."
            )
        native = DTYPES["bfloat16"] if dtype.kind == "V" else DTYPES[dtype.name]
        load = partial(_load, file, archive, info, start, dtype, native, shape, fortran)
        rows = None
        if info.compress_type == zipfile.ZIP_STORED and not fortran and dtype.byteorder != ">":
            rows = partial(_load_row, file, info, start, native, shape)
        tensors[name] = Tensor(name, shape, native, load, rows)
    return tensors


def _check_sizes(file: DataFile, info: zipfile.ZipInfo) -> None:
    """Refuse what would make reading allocate more than the archive's bytes can fill."""
    name, packed, size = info.filename, info.compress_size, info.file_size
    if info.flag_bits & 1:
        raise file.fail(f"member {name!r} is encrypted.")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise file.fail(f"member {name!r} is compressed in a way numpy does not write.")
    stored = info.compress_type == zipfile.ZIP_STORED
    if packed > file.size or (stored and packed != size):
        raise file.fail(f"member {name!r} states {size} bytes ({packed} packed); it cannot.")
    if size > MAX_RATIO * packed and size > min(MAX_CONSTANT, 1100 * packed + 1100):
        raise file.fail(
            f"member {name!r} states {size} bytes from {packed} packed ones: a zip bomb; refused."
        )


def _header(
    file: DataFile, name: str, stream: IO[bytes]
) -> tuple[np.dtype, bool, tuple[int, ...], int]:
    """dtype, whether in Fortran order, shape, and where the numbers start."""
    form = np.lib.format
    try:
        # Version 3 is for field names outside Latin-1, so for structured arrays only.
        parsers = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
        parse = parsers.get(form.read_magic(stream))
        if parse is None:
            raise file.fail(f"array {name!r}: its version of .npy is not one of numbers.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser: Python 2, or a hostile literal
            shape, fortran, dtype = parse(stream)
    except CheckpointError:
        raise
    except Exception as error:  # what zlib, ast and numpy raise for a broken header
        raise file.fail(f"member {name!r} is not a .npy array ({reason(error)}).") from error
    return dtype, fortran, shape, stream.tell()


def _load(
    file: DataFile,
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo,
    start: int,
    dtype: np.dtype,
    native: np.dtype,
    shape: tuple[int, ...],
    fortran: bool,
) -> np.ndarray:
    raw = aligned_empty(math.prod(shape) * dtype.itemsize)
    try:
        with archive.open(info) as stream:
            stream.read(start)
            view, done = raw.data, 0
            while count := stream.readinto(view[done : done + _PIECE]):  # type: ignore[attr-defined]
                done += count
            if done == len(raw) and stream.read(1):
                done += 1
    except Exception as error:  # zlib, zipfile, struct and the system each raise their own
        raise file.fail(f"array {info.filename!r} cannot be read ({reason(error)}).") from error
    if done != len(raw):
        raise file.fail(f"array {info.filename!r} is not as long as the archive states.")
    array = raw.view(native if dtype.kind == "V" else dtype)
    array = array.reshape(shape, order="F" if fortran else "C")
    return array.astype(native, copy=False)


def _load_row(
    file: DataFile,
    info: zipfile.ZipInfo,
    start: int,
    native: np.dtype,
    shape: tuple[int, ...],
    index: int | slice,
) -> np.ndarray:
    """One entry of the first axis of an array that is not compressed, or several in a row."""
    size = math.prod(shape[1:]) * native.itemsize
    data = data_offset(file, info) + start
    if isinstance(index, slice):
        first, last, _ = index.indices(shape[0])
        return file.array(data + first * size, native, (max(0, last - first), *shape[1:]))
    return file.array(data + index * size, native, shape[1:])


class Texts(Sequence[str]):
    """An array of texts that stays in the file: one is read when it is asked for.

    Args:
        count: how many there are.
        itemsize: bytes of each, 4 for a character.
        load: `count` bytes from a place in the array.
        fail: makes the error of a text that is not Unicode.

    Raises:
        CheckpointError: when it is read, a text is not Unicode.
    """

    def __init__(
        self,
        count: int,
        itemsize: int,
        load: Callable[[int, int], bytes],
        fail: Callable[[str], Exception],
    ) -> None:
        self._count, self._itemsize, self._load, self._fail = count, itemsize, load, fail

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        data = self._load(index % self._count * self._itemsize, self._itemsize)
        try:
            return data.decode("utf-32-le", "surrogatepass").rstrip("\0")
        except UnicodeDecodeError as error:
            raise self._fail(f"text {index % self._count} is not Unicode.") from error


def texts(file: DataFile) -> dict[str, Texts]:
    """The arrays of texts in an archive, of one axis or none; those that are stored as they are
    stay in the file.

    Raises:
        CheckpointError: the archive is corrupt.
    """
    archive = file.resources.enter_context(open_zip(file))
    found: dict[str, Texts] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        _check_sizes(file, info)
        with archive.open(info) as stream:
            dtype, _, shape, start = _header(file, name, stream)
            if dtype.kind != "U" or len(shape) > 1 or dtype.byteorder == ">":
                continue
            count, itemsize = math.prod(shape), dtype.itemsize
            if start + count * itemsize != info.file_size:
                raise file.fail(f"array {name!r} is not as long as the archive states.")
            if info.compress_type == zipfile.ZIP_STORED:
                begin = data_offset(file, info) + start
                load = lambda place, size, begin=begin: file.read(begin + place, size)  # noqa: E731
            else:
                try:
                    data = stream.read()
                except Exception as error:  # as in _load
                    raise file.fail(f"array {name!r} cannot be read ({reason(error)}).") from error
                load = lambda place, size, data=data: data[place : place + size]  # noqa: E731
        found[name] = Texts(count, itemsize, load, file.fail)
    return found


def holds(dtype: np.dtype) -> bool:
    """Whether the container can say that an array has this dtype.

    Of the dtypes that numpy does not have itself only bfloat16 can be told from the two bytes that
    numpy makes of it; the float8s are all one byte.
    """
    return _is_standard(dtype) or dtype.name == "bfloat16"


def _is_standard(dtype: np.dtype) -> bool:
    return DTYPES[dtype.name].isbuiltin == 1  # a copy of such a dtype need not say so itself


def write(stream: BinaryIO, tensors: Sequence[Tensor], progress: Progress = no_progress) -> None:
    """Write the container, uncompressed, one tensor in memory at a time.

    Byte for byte what `numpy.savez` writes for C-contiguous arrays, with bfloat16 as the dtype
    "|V2": the time of every member is that of numpy, 1980-01-01, and every member has the zip64
    fields that one over 4 GB needs. `stream` must be seekable, as checksums go before the data.
    """
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for tensor in tensors:
            _write_member(archive, tensor)
            progress(tensor.nbytes)


def _write_member(archive: zipfile.ZipFile, tensor: Tensor) -> None:
    raw = little_endian_bytes(tensor)  # before the member is begun, as it may fail
    info = zipfile.ZipInfo(tensor.name + ".npy")
    info.create_system = 3  # the same bytes on Windows
    header = {
        "descr": tensor.dtype.newbyteorder("<").str if _is_standard(tensor.dtype) else "|V2",
        "fortran_order": False,
        "shape": tensor.shape,
    }
    with archive.open(info, "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        member.write(raw)
