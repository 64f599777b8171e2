"""`Tensor`, an array that is still in its file, and `DataFile`, the file it is in."""

from __future__ import annotations

import contextlib
import math
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from vit_common.errors import CheckpointError, InputError, MissingFileError
from vit_common.files.texts import cut, reason

_TILE = 256
"""Side of the tiles a transposed array is copied in: 256 kB of float32, which a cache holds."""

_FEW_BYTES = 1 << 20
"""An array up to here is read whole where only some of it is wanted."""

Index = tuple[slice, ...]
"""A slice with a step of one for each axis; `slice(None)` is all of it."""

Progress = Callable[[int], object]
"""Told the bytes of each tensor when it has been written."""

MAX_AXES = 32
"""Axes an array may have; torch and numpy stop at 64, real weights at 5."""

_FLOATS = (
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)

DTYPES: dict[str, np.dtype] = {
    **{
        name: np.dtype(name)
        for name in (
            *("float64", "float32", "float16", "complex64", "complex128", "bool"),
            *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
        )
    },
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in _FLOATS},
}
"""Every dtype a weights file may hold, by numpy's name for it."""


class Tensor:
    """One array of a file, with its name, shape and dtype; `read()` fetches the numbers.

    Nothing of the array is in memory before `read()`, and no copy is kept after it.
    """

    __slots__ = ("_load", "_load_part", "_load_row", "dtype", "name", "shape")

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        load: Callable[[], np.ndarray],
        load_row: Callable[[int | slice], np.ndarray] | None = None,
        load_part: Callable[[Index], np.ndarray] | None = None,
    ) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self._load = load
        self._load_row = load_row
        self._load_part = load_part

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The array, C-contiguous unless the file holds it otherwise; may be read-only.

        Raises:
            CheckpointError: the file has become shorter, or its checksum does not match.
            MissingFileError: the file cannot be read any more.
        """
        return self._load()

    @property
    def has_parts(self) -> bool:
        """Whether `read_part` reads less than the whole."""
        return self._load_part is not None

    def read_part(self, index: Index) -> np.ndarray:
        """`read()[index]`, without the rest in memory where the file allows it."""
        if self._load_part is not None and self.nbytes > _FEW_BYTES:
            return self._load_part(index)
        return self._load()[index]

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """`read()[start:stop]`: entries of the first axis, and only they are read where the
        container allows it (`read_part` of a small array reads it whole)."""
        rows = slice(start, stop)
        if self._load_part is not None:
            return self._load_part((rows, *[slice(None)] * (len(self.shape) - 1)))
        return self._load()[rows] if self._load_row is None else self._load_row(rows)

    def row(self, index: int, name: str) -> Tensor:
        """Entry `index` of the first axis, as a tensor of that name.

        Only that part of the file is read where the container allows it (and then without the
        checksum that a zip archive has of the whole).
        """

        def load() -> np.ndarray:
            return self._load()[index] if self._load_row is None else self._load_row(index)

        return Tensor(name, self.shape[1:], self.dtype, load)

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, shape={self.shape}, dtype={self.dtype.name})"


class DataFile:
    """A file opened for reads at given places, from any thread.

    Arrays are read into fresh memory rather than viewed through a memory map. Measured on a
    ViT-B/16 (345 MB, page cache warm, 2 cores, median of 10): into JAX 0.07 s either way;
    transposed on the way, 0.23 s against 0.19 s for a map whose pages are dropped after use;
    the peak is one copy plus one tensor for both, two copies for a plain map and for
    `safetensors.safe_open`. For those 0.04 s, a file that another program truncates in place is
    an error here instead of a SIGBUS, and an array never changes because its file did.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_out: dict[str, str] = {}
        """What a reader found that is no array of numbers: its name -> what it is."""
        self.resources = contextlib.ExitStack()
        """What else is to be closed with the file."""
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        try:
            # Asked before it is opened: to open a pipe is to wait for its other end.
            if not stat.S_ISREG(path.stat().st_mode):
                raise MissingFileError(f"{path}: wanted a file; this is a directory or a device.")
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self.size = os.fstat(self._descriptor).st_size
        except MissingFileError:
            raise
        except OSError as error:
            raise MissingFileError(f"{path}: cannot be read ({reason(error)}).") from error

    def close(self, _close: Callable[[int], None] = os.close) -> None:
        # `os.close` is bound here: when the interpreter ends, the module may be gone before this.
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            _close(descriptor)
        self.resources.close()

    def __del__(self) -> None:
        # A checkpoint need not be closed: tensors taken out of it may be read long after.
        self.close()

    def fail(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {cut(text)}")

    def read(self, offset: int, count: int) -> bytes:
        """At most `count` bytes from `offset`; fewer only at the end of the file."""
        buffer = bytearray(max(0, min(count, self.size - offset)))
        return bytes(buffer[: self._read_into(memoryview(buffer), offset)])

    def array(self, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """The array of little-endian numbers that starts at `offset`.

        Raises:
            CheckpointError: the file ends before the array does.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        if offset + nbytes > self.size:
            raise self.fail(f"ends at byte {self.size}; an array reaches to {offset + nbytes}.")
        raw = aligned_empty(nbytes)
        count = self._read_into(raw.data, offset)
        if count < nbytes:
            raise self.fail(f"was truncated while it was read: ends at byte {offset + count}.")
        if dtype == np.bool_ and nbytes and raw.max() > 1:
            raise self.fail(f"a boolean array at byte {offset} holds bytes other than 0 and 1.")
        return raw.view(dtype).reshape(shape)

    def part(
        self, offset: int, dtype: np.dtype, shape: tuple[int, ...], index: Index
    ) -> np.ndarray:
        """`array(offset, dtype, shape)[index]`; only that is read, one run of bytes at a time.

        Raises:
            CheckpointError: the file ends before the array does.
        """
        bounds = [each.indices(length)[:2] for each, length in zip(index, shape, strict=True)]
        whole = [bound == (0, length) for bound, length in zip(bounds, shape, strict=True)]
        if all(whole):
            return self.array(offset, dtype, shape)
        # The last axis that is cut: from there on a row of the part is one run in the file.
        last = max(axis for axis, full in enumerate(whole) if not full)
        run = math.prod(shape[last + 1 :]) * dtype.itemsize  # bytes of one entry of that axis
        start, stop = bounds[last]
        wanted = tuple(max(0, end - begin) for begin, end in bounds)
        rows = wanted[:last]
        strides = [math.prod(shape[axis + 1 : last + 1]) * run for axis in range(last)]
        raw = aligned_empty(math.prod(wanted) * dtype.itemsize)
        length, filled = max(0, stop - start) * run, 0
        for row in np.ndindex(*rows):
            begin = sum((bounds[axis][0] + i) * strides[axis] for axis, i in enumerate(row))
            place = offset + begin + start * run
            count = self._read_into(raw[filled : filled + length].data, place)
            if count < length:
                raise self.fail(f"was truncated while it was read: ends at byte {place + count}.")
            filled += length
        return raw.view(dtype).reshape(wanted)

    def _read_into(self, buffer: memoryview, offset: int) -> int:
        if self._descriptor is None:
            raise self.fail("this checkpoint was closed; open it again to read from it.")
        done = 0
        try:
            while done < len(buffer):
                if hasattr(os, "preadv"):
                    count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
                else:
                    with self._lock:
                        os.lseek(self._descriptor, offset + done, os.SEEK_SET)
                        piece = os.read(self._descriptor, min(len(buffer) - done, 1 << 24))
                    count = len(piece)
                    buffer[done : done + count] = piece
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise MissingFileError(f"{self.path}: cannot be read ({reason(error)}).") from error
        return done


def aligned_empty(nbytes: int) -> np.ndarray:
    """Uninitialised bytes at an address that is a multiple of 64.

    JAX takes such an array on the CPU as it is, and copies any other.
    """
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


def bad_shape(shape: object, itemsize: int) -> str | None:
    """What is wrong with a shape a file states, or None.

    The bound on the product is numpy's, which ignores axes of length 0 for it.
    """
    if not isinstance(shape, (list, tuple)) or not all(
        isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape
    ):
        return f"must be a list of integers of at least 0; given {str(shape)[:80]}"
    if len(shape) > MAX_AXES:
        return f"must have at most {MAX_AXES} axes; given {len(shape)}"
    if math.prod(n for n in shape if n) * itemsize >= 2**63:
        return f"is larger than any memory; given {str(list(shape))[:80]}"
    return None


def as_tensor(name: str, value: object) -> Tensor:
    """A `Tensor` for anything with a shape, a dtype and numbers: numpy or JAX array, or a Tensor.

    Raises:
        InputError: it is no array, or has a dtype that no weights file holds.
    """
    read = getattr(value, "read", None)
    try:
        shape = tuple(int(n) for n in value.shape)  # type: ignore[attr-defined]
        dtype = np.dtype(value.dtype)  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"tensor {name!r} must be a numpy or JAX array; given a {type(value).__name__}."
        ) from error
    if dtype.name not in DTYPES:
        raise InputError(
            f"tensor {name!r} has dtype {dtype}; wanted one of {', '.join(sorted(DTYPES))}."
        )
    return Tensor(name, shape, dtype, read if callable(read) else lambda: np.asarray(value))


def no_progress(nbytes: int) -> None:
    """The `Progress` of a writer that nobody watches."""


Write = Callable[[bytes | memoryview], object]

_WAITING = 3
"""Pieces that wait to be written: a tensor, with its header before and behind it."""


@contextlib.contextmanager
def written_behind(stream: BinaryIO) -> Iterator[Write]:
    """A function that hands bytes to a thread, which writes them while the next tensor is read.

    All is written when the block is left; what a write raised is raised by a later one, or there.
    """
    waiting: deque[Future] = deque()

    def write(data: bytes | memoryview) -> None:
        waiting.append(thread.submit(stream.write, data))
        del data
        while len(waiting) > _WAITING:
            waiting.popleft().result()

    with ThreadPoolExecutor(1, "vit-write") as thread:
        try:
            yield write
            while waiting:
                waiting.popleft().result()
        except BaseException:
            thread.shutdown(wait=True, cancel_futures=True)
            raise


def little_endian_bytes(tensor: Tensor) -> memoryview:
    """The numbers as bytes, in row-major order; a copy only where the array is laid out otherwise.

    Raises:
        InputError: what was read is not what the tensor said it is.
    """
    array = np.asarray(tensor.read())
    if array.shape != tensor.shape or array.dtype.name != tensor.dtype.name:
        raise InputError(
            f"tensor {tensor.name!r} said {tensor.dtype.name} of shape {tensor.shape}; reading it "
            f"gave {array.dtype.name} of shape {array.shape}."
        )
    array = _row_major(array).astype(tensor.dtype.newbyteorder("<"), copy=False)
    return array.reshape(-1).view(np.uint8).data


def _row_major(array: np.ndarray) -> np.ndarray:
    """The array in row-major order, copied where it is not, tile by tile where that is faster.

    numpy copies a transposed matrix row by row, and each row fetches every cache line of the
    source. In tiles the lines are still there for the next row: 4096 x 1024 floats take 17 ms
    instead of 33, 3072 x 768 take 4.6 instead of 7.4 (2 cores of a server, numpy 2.4).
    """
    if array.flags.c_contiguous:
        return array
    last = array.ndim - 1
    axes = [axis for axis in range(array.ndim) if array.shape[axis] > 1]
    fast = min(axes, key=lambda axis: abs(array.strides[axis]), default=last)
    if fast == last or array.nbytes < 1 << 20:
        return np.ascontiguousarray(array)
    out = aligned_empty(array.nbytes).view(array.dtype).reshape(array.shape)
    where = [slice(None)] * array.ndim
    for i in range(0, array.shape[fast], _TILE):
        where[fast] = slice(i, i + _TILE)
        for j in range(0, array.shape[last], _TILE):
            where[last] = slice(j, j + _TILE)
            out[tuple(where)] = array[tuple(where)]
    return out
