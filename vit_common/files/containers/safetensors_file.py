"""The safetensors container: 8 bytes of header length, a JSON header, the arrays end to end.

Format: https://huggingface.co/docs/safetensors, and the checks of `safetensors/src/tensor.rs`.
The library itself reads it too, but copies each array it maps (two copies at the peak), knows
no float8 in numpy, and lets a key that is given twice through; so the header is read here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vit_common.files.containers.tensor import (
    DTYPES,
    DataFile,
    Progress,
    Tensor,
    bad_shape,
    little_endian_bytes,
    no_progress,
    written_behind,
)
from vit_common.files.texts import MAX_JSON_BYTES, parse_json

_NAMES = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
CODES = {name: code for code, name in _NAMES.items()}
"""numpy's name of a dtype -> the container's, in the order the library (0.8) stores arrays in."""

_RANK = {name: rank for rank, name in enumerate(CODES)}
_FIELDS = {"dtype", "shape", "data_offsets"}
_WHITE_SPACE = b" \t\n\r"
"""What JSON lets stand before its first brace, and the library too since it lets JSON decide."""


def recognises(head: bytes) -> bool:
    """Whether the first bytes of a file are those of this container."""
    length = int.from_bytes(head[:8], "little")
    text = head[8 : 8 + length].lstrip(_WHITE_SPACE)
    return length <= MAX_JSON_BYTES and text.startswith(b"{")


class _Extent(NamedTuple):
    begin: int
    end: int
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


def read(file: DataFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, in the order they lie in the file, and the metadata.

    Raises:
        CheckpointError: the header or any extent in it is not what the format allows.
    """
    if file.size < 8:
        raise file.fail(f"truncated: {file.size} bytes long; a safetensors file has at least 8.")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_JSON_BYTES or 8 + length > file.size:
        raise file.fail(
            f"not a safetensors file, or truncated: it states a header of {length} bytes; the "
            f"file has {file.size} and the limit is {MAX_JSON_BYTES}."
        )
    text = file.read(8, length)
    if not text.lstrip(_WHITE_SPACE).startswith(b"{"):  # so no byte order mark either
        raise file.fail("not a safetensors file: its header does not begin with '{'.")
    header = parse_json(text, file.path, "safetensors header", unique=True)

    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise file.fail("`__metadata__` must map strings to strings.")
    extents = sorted(_extent(file, name, entry) for name, entry in header.items())
    position, available = 0, file.size - 8 - length
    for extent in extents:
        if extent.begin != position:
            what = "overlaps the tensor before it" if extent.begin < position else "leaves a gap"
            raise file.fail(f"tensor {extent.name!r} {what} (begins at {extent.begin}).")
        position = extent.end
    if position != available:
        what = "truncated" if position > available else "more bytes than its header describes"
        raise file.fail(f"{what}: the tensors take {position} bytes; there are {available}.")
    tensors = {
        extent.name: Tensor(
            extent.name,
            extent.shape,
            extent.dtype,
            partial(file.array, 8 + length + extent.begin, extent.dtype, extent.shape),
            load_part=partial(file.part, 8 + length + extent.begin, extent.dtype, extent.shape),
        )
        for extent in extents
    }
    return tensors, metadata


def _extent(file: DataFile, name: str, entry: Any) -> _Extent:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise file.fail(f"tensor {name!r} must have exactly dtype, shape and data_offsets.")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _NAMES:
        raise file.fail(f"tensor {name!r}: dtype {code!r} is not one of {', '.join(_NAMES)}.")
    dtype = DTYPES[_NAMES[code]]
    problem = bad_shape(shape, dtype.itemsize)
    if problem:
        raise file.fail(f"tensor {name!r}: shape {problem}.")
    # Each is a place in the file and no axis of a shape: their product says nothing.
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in offsets)
    ):
        raise file.fail(f"tensor {name!r}: data_offsets must be [begin, end]; given {offsets}.")
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise file.fail(
            f"tensor {name!r}: {code} of shape {shape} takes {nbytes} bytes; "
            f"data_offsets {offsets} hold {offsets[1] - offsets[0]}."
        )
    return _Extent(offsets[0], offsets[1], name, tuple(shape), dtype)


def write(
    stream: BinaryIO,
    tensors: Sequence[Tensor],
    metadata: Mapping[str, str] | None,
    progress: Progress = no_progress,
) -> None:
    """Write the container, a few tensors in memory at a time.

    Byte for byte what `safetensors.numpy.save_file` writes: header padded with spaces to 8 bytes,
    arrays in descending order of alignment and then by name.
    """
    ordered = sorted(tensors, key=lambda tensor: (_RANK[tensor.dtype.name], tensor.name.encode()))
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
    position = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": CODES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    with written_behind(stream) as write_on:
        for tensor in ordered:
            write_on(little_endian_bytes(tensor))
            progress(tensor.nbytes)
