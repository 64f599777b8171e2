"""Flax's msgpack container, read without Flax: nested maps whose leaves are extension types.

Layout, from `flax/serialization.py` (0.12): extension 1 is an array and 3 a numpy scalar, both a
packed (shape, dtype name, bytes); 2 is a complex number, a packed pair; an array of more than
2**30 bytes is a map of a flag, its shape and its flattened pieces. Names here are the keys of the
maps joined with "/".
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import msgpack
import numpy as np

from vit_common.errors import InputError
from vit_common.files.containers.tensor import (
    DTYPES,
    MAX_AXES,
    DataFile,
    Progress,
    Tensor,
    Write,
    aligned_empty,
    bad_shape,
    little_endian_bytes,
    no_progress,
    written_behind,
)

MAX_CHUNK_SIZE = 2**30
"""Bytes above which Flax splits an array."""

# A file can make Python work and allocate in proportion to its own size, and no more: these bound
# what its nesting and its names can multiply.
MAX_DEPTH = 64
MAX_NAME = 1024
MAX_ENTRIES = 1_000_000

# numpy's names of dtypes that Flax writes as it writes all others: of texts, bytes and dates.
_NO_NUMBERS = re.compile(r"(str|bytes|datetime64|timedelta64)(\d+|\[\w+\])?")

_CHUNKED = "__msgpack_chunked_array__"
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3

# First byte -> kind, and struct format of the number that follows. Table of formats in
# https://github.com/msgpack/msgpack/blob/master/spec.md
_SIZED = {
    first + step: (kind, ">" + form)
    for first, kind, forms in (
        (0xC4, "bin", "BHI"),
        (0xC7, "ext", "BHI"),
        (0xCA, "number", "fd"),
        (0xCC, "number", "BHIQ"),
        (0xD0, "number", "bhiq"),
        (0xD9, "str", "BHI"),
        (0xDC, "array", "HI"),
        (0xDE, "map", "HI"),
    )
    for step, form in enumerate(forms)
}
_FIXED = {0xC0: ("nil", None), 0xC2: ("number", False), 0xC3: ("number", True)}


def recognises(head: bytes) -> bool:
    """Whether the first bytes of a file are those of this container: those of a map."""
    # 0x80, an empty map, also begins every pickle; alone it is no pickle.
    return head == b"\x80" or (bool(head) and head[0] in (*range(0x81, 0x90), 0xDE, 0xDF))


class _Leaf(NamedTuple):
    """Where the bytes of one array lie."""

    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


class _NotNumbers(NamedTuple):
    """A leaf that is read past."""

    what: str


class _Cursor:
    """A position in a stretch of the file, and the msgpack tokens from there on."""

    _WINDOW = 1 << 12

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self.position = 0
        self.end = file.size
        self.entries = 0
        self._start, self._bytes = 0, b""

    def take(self, count: int) -> bytes:
        if self.position + count > self.end:
            raise self.file.fail(
                f"truncated or corrupt: {count} bytes wanted at byte {self.position}; "
                f"{self.end - self.position} are left there."
            )
        begin = self.position - self._start
        if begin < 0 or begin + count > len(self._bytes):
            self._start = self.position
            self._bytes = self.file.read(self._start, max(count, self._WINDOW))
            begin = 0
        self.position += count
        return self._bytes[begin : begin + count]

    def skip(self, count: int) -> None:
        if self.position + count > self.end:
            raise self.file.fail(f"truncated or corrupt: ends within {count} bytes wanted there.")
        self.position += count

    def token(self) -> tuple[str, Any]:
        """(kind, value): a number, or the length of a map, array, str, bin or ext."""
        at = self.position
        first = self.take(1)[0]
        if first < 0x80:
            return "number", first
        if first >= 0xE0:
            return "number", first - 0x100
        if first < 0x90:
            kind, value = "map", first & 0x0F
        elif first < 0xA0:
            kind, value = "array", first & 0x0F
        elif first < 0xC0:
            kind, value = "str", first & 0x1F
        elif 0xD4 <= first <= 0xD8:
            kind, value = "ext", 1 << (first - 0xD4)
        elif first in _FIXED:
            return _FIXED[first]
        elif first in _SIZED:
            kind, form = _SIZED[first]
            value = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        else:
            raise self.file.fail(f"corrupt: byte {at} is 0x{first:02x}, which msgpack never uses.")
        # Every entry of a map takes at least two bytes, every other thing at least its length.
        least = {"map": 2 * value, "ext": value + 1}.get(kind, value)
        if kind != "number" and self.position + least > self.end:
            raise self.file.fail(
                f"truncated or corrupt: a {kind} of length {value} at byte {at} does not fit in "
                f"the {self.end - self.position} bytes left there."
            )
        return kind, value

    def text(self, limit: int, kinds: tuple[str, ...] = ("str",)) -> str | None:
        """The next string; None where something else comes, or it is too long."""
        kind, length = self.token()
        if kind not in kinds or length > limit:
            return None
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            return None


def read(file: DataFile) -> dict[str, Tensor]:
    """The tensors of the file, in its order.

    Raises:
        CheckpointError: the file is not such a tree of maps; says at which byte or name.
    """
    cursor = _Cursor(file)
    kind, count = cursor.token()
    if kind != "map":
        raise file.fail(f"a Flax msgpack file holds a map; this one holds a {kind}.")
    tensors: dict[str, Tensor] = {}
    _collect(file, _tree(cursor, count, 0), "", tensors)
    if cursor.position != file.size:
        raise file.fail(f"has {file.size - cursor.position} bytes after the end of its map.")
    return tensors


def _tree(cursor: _Cursor, count: int, depth: int) -> dict[str, Any]:
    """`count` entries of a map, nested maps as dicts, arrays as `_Leaf`."""
    fail = cursor.file.fail
    if depth > MAX_DEPTH:
        raise fail(f"its maps are nested more than {MAX_DEPTH} deep.")
    table: dict[str, Any] = {}
    cursor.entries += count
    if cursor.entries > MAX_ENTRIES:
        raise fail(f"holds more than {MAX_ENTRIES} entries.")
    for _ in range(count):
        at = cursor.position
        key = cursor.text(MAX_NAME)
        if key is None:
            raise fail(f"the key at byte {at} must be a string of at most {MAX_NAME} bytes.")
        if key in table:
            raise fail(f"has the key {key!r} twice in one map, at byte {at}.")
        kind, value = cursor.token()
        if kind == "map":
            table[key] = _tree(cursor, value, depth + 1)
        elif kind == "ext":
            table[key] = _extension(cursor, value, key)
        elif kind in ("number", "nil"):
            table[key] = value
        else:
            _pass(cursor, kind, value, depth)
            table[key] = _NotNumbers(f"at byte {at} must be an array or a map; it is a {kind}")
    return table


def _pass(cursor: _Cursor, kind: str, value: Any, depth: int) -> None:
    """Go past what a text, bytes or a list holds, whose token has been read."""
    if depth > MAX_DEPTH:
        raise cursor.file.fail(f"its lists are nested more than {MAX_DEPTH} deep.")
    if kind in ("str", "bin"):
        cursor.skip(value)
    elif kind == "ext":
        cursor.skip(value + 1)
    elif kind in ("array", "map"):
        count = value if kind == "array" else 2 * value
        cursor.entries += count
        if cursor.entries > MAX_ENTRIES:
            raise cursor.file.fail(f"holds more than {MAX_ENTRIES} entries.")
        for _ in range(count):
            _pass(cursor, *cursor.token(), depth + 1)


def _extension(cursor: _Cursor, length: int, key: str) -> Any:
    fail = cursor.file.fail
    code = cursor.take(1)[0]
    begin = cursor.position
    outer, cursor.end = cursor.end, begin + length
    if code in (_ARRAY, _SCALAR):
        value: Any = _array(cursor, key)
    elif code == _COMPLEX:
        parts = [cursor.token() for _ in range(3)]
        if parts[0] != ("array", 2) or {kind for kind, _ in parts[1:]} != {"number"}:
            raise fail(f"{key!r} at byte {begin}: a complex number must be a pair of numbers.")
        value = complex(parts[1][1], parts[2][1])
    else:
        raise fail(f"{key!r} at byte {begin} has extension type {code}; Flax writes 1, 2 and 3.")
    if cursor.position != cursor.end:
        raise fail(f"{key!r} at byte {begin}: {cursor.end - cursor.position} bytes too many.")
    cursor.end = outer
    return value


def _array(cursor: _Cursor, key: str) -> _Leaf | _NotNumbers:
    fail = cursor.file.fail
    if cursor.token() != ("array", 3):
        raise fail(f"{key!r}: an array must be packed as (shape, dtype, bytes).")
    kind, axes = cursor.token()
    if kind != "array" or axes > MAX_AXES:
        raise fail(f"{key!r}: its shape must be a list of at most {MAX_AXES} integers.")
    shape = [cursor.token() for _ in range(axes)]
    name = cursor.text(32, ("str", "bin"))
    if name is not None and _NO_NUMBERS.fullmatch(name):
        cursor.position = cursor.end
        return _NotNumbers(f"is an array of {name}; its dtype must be of numbers")
    if name not in DTYPES:
        raise fail(f"{key!r}: dtype {name!r} is not one of {', '.join(sorted(DTYPES))}.")
    dtype = DTYPES[name]
    sizes: list[Any] = [value if kind == "number" else kind for kind, value in shape]
    problem = bad_shape(sizes, dtype.itemsize)
    if problem:
        raise fail(f"{key!r}: shape {problem}.")
    kind, length = cursor.token()
    wanted = math.prod(sizes) * dtype.itemsize
    if kind not in ("bin", "str") or length != wanted:
        raise fail(f"{key!r}: {name} of shape {sizes} takes {wanted} bytes; given {kind} {length}.")
    leaf = _Leaf(cursor.position, dtype, tuple(sizes))
    cursor.position += length
    return leaf


def _collect(file: DataFile, tree: dict[str, Any], prefix: str, out: dict[str, Tensor]) -> None:
    """Flatten the nested dicts into `out`; None is an empty subtree, as it is in JAX."""
    for key, value in tree.items():
        name = prefix + key
        if len(name) > MAX_NAME:
            raise file.fail(f"a name is longer than {MAX_NAME} characters: {name[:80]!r}...")
        if isinstance(value, dict) and _CHUNKED not in value:
            _collect(file, value, name + "/", out)
            continue
        if value is None:
            continue
        if name in out or name in file.left_out:
            raise file.fail(f"two of its entries are both named {name!r}.")
        if isinstance(value, _NotNumbers):
            file.left_out[name] = value.what
            continue
        if isinstance(value, _Leaf):
            out[name] = _tensor(file, name, value)
        elif isinstance(value, dict):
            out[name] = _chunked(file, name, value)
        else:
            array = np.asarray(value)
            out[name] = Tensor(name, (), array.dtype, array.copy)


def _tensor(file: DataFile, name: str, leaf: _Leaf) -> Tensor:
    load = partial(file.array, leaf.offset, leaf.dtype, leaf.shape)
    return Tensor(name, leaf.shape, leaf.dtype, load)


def _chunked(file: DataFile, name: str, table: dict[str, Any]) -> Tensor:
    sizes, pieces = _numbered(table.get("shape")), _numbered(table.get("chunks"))
    if (
        table.keys() != {_CHUNKED, "shape", "chunks"}
        or sizes is None
        or not pieces
        or not all(isinstance(piece, _Leaf) for piece in pieces)
    ):
        raise file.fail(f"{name!r}: a split array must have a shape and its numbered chunks.")
    dtype = pieces[0].dtype
    problem = bad_shape(sizes, dtype.itemsize)
    if problem:
        raise file.fail(f"{name!r}: shape {problem}.")
    counts = [math.prod(piece.shape) for piece in pieces]
    if {piece.dtype for piece in pieces} != {dtype} or sum(counts) != math.prod(sizes):
        raise file.fail(f"{name!r}: its {len(pieces)} chunks do not make up its shape {sizes}.")
    shape = tuple(sizes)

    def load() -> np.ndarray:
        out = aligned_empty(sum(counts) * dtype.itemsize).view(dtype)
        position = 0
        for piece, count in zip(pieces, counts, strict=True):
            out[position : position + count] = file.array(piece.offset, dtype, (count,))
            position += count
        return out.reshape(shape)

    return Tensor(name, shape, dtype, load)


def _numbered(table: Any) -> list[Any] | None:
    """The values of a map whose keys are "0", "1", ... without gaps."""
    if not isinstance(table, dict) or table.keys() != {str(i) for i in range(len(table))}:
        return None
    return [table[str(i)] for i in range(len(table))]


def nest(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """The tree that the names, split at "/", describe, in the order they come.

    Raises:
        InputError: one name is both a tensor and the beginning of another's path.
    """
    root: dict[str, Any] = {}
    for tensor in tensors:
        *path, last = tensor.name.split("/")
        table = root
        for part in path:
            table = table.setdefault(part, {})
            if isinstance(table, Tensor):
                raise InputError(
                    f"tensor {tensor.name!r}: its path leads through the tensor {table.name!r}."
                )
        if last in table:
            raise InputError(f"tensor {tensor.name!r}: other tensors' paths lead through it.")
        table[last] = tensor
    return root


def write(stream: BinaryIO, tree: dict[str, Any], progress: Progress = no_progress) -> None:
    """Write the container, a few tensors in memory at a time.

    Byte for byte what `flax.serialization.to_bytes` gives for the same tree.
    """
    with written_behind(stream) as write_on:
        _write_map(write_on, tree, msgpack.Packer(), progress)


def _write_map(
    write: Write, table: dict[str, Any], packer: msgpack.Packer, progress: Progress
) -> None:
    write(packer.pack_map_header(len(table)))
    for key, value in table.items():
        write(packer.pack(key))
        if isinstance(value, dict):
            _write_map(write, value, packer, progress)
            continue
        if value.nbytes > MAX_CHUNK_SIZE:
            _write_chunked(write, value, packer)
        else:
            _write_array(write, value.shape, value.dtype, little_endian_bytes(value), packer)
        progress(value.nbytes)


def _write_chunked(write: Write, tensor: Tensor, packer: msgpack.Packer) -> None:
    count = max(1, MAX_CHUNK_SIZE // tensor.dtype.itemsize)
    raw = little_endian_bytes(tensor)
    pieces = range(0, math.prod(tensor.shape), count)
    write(packer.pack_map_header(3) + packer.pack(_CHUNKED) + packer.pack(True))
    shape = {str(axis): size for axis, size in enumerate(tensor.shape)}
    write(packer.pack("shape") + packer.pack(shape))
    write(packer.pack("chunks") + packer.pack_map_header(len(pieces)))
    for number, start in enumerate(pieces):
        piece = raw[start * tensor.dtype.itemsize : (start + count) * tensor.dtype.itemsize]
        write(packer.pack(str(number)))
        shape_of_piece = (len(piece) // tensor.dtype.itemsize,)
        _write_array(write, shape_of_piece, tensor.dtype, piece, packer)


def _write_array(
    write: Write,
    shape: tuple[int, ...],
    dtype: np.dtype,
    raw: memoryview,
    packer: msgpack.Packer,
) -> None:
    head = packer.pack_array_header(3) + packer.pack(shape) + packer.pack(dtype.name)
    head += _length(len(raw), {1: 0xC4, 2: 0xC5, 4: 0xC6})
    total = len(head) + len(raw)
    fixed = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}
    prefix = (
        bytes([fixed[total]]) if total in fixed else _length(total, {1: 0xC7, 2: 0xC8, 4: 0xC9})
    )
    write(prefix + bytes([_ARRAY]) + head)
    write(raw)


def _length(count: int, codes: dict[int, int]) -> bytes:
    """The code and the length of a bin or an extension, in the fewest bytes."""
    width = 1 if count < 1 << 8 else 2 if count < 1 << 16 else 4
    return bytes([codes[width]]) + count.to_bytes(width, "big")
