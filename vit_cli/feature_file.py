"""Features in a file: one array for all images, with their names.

While images come, the vectors go end to end into `FILE.partial.rows` and the names into
`FILE.partial`, one JSON object a line; neither is ever in memory as a whole. A run that is resumed
first cuts both to what they agree on. At the end the file is made of them:

- `.npz`: `features` (count, ...), `files` (count,); `failed` and `errors`, the images without
  features and why; `made_with`, the settings as JSON.
- `.safetensors`: a tensor `features`; in the metadata `files`, `failed`, `errors` and `made_with`,
  each as JSON.
- `.parquet`: a row an image: `file`, `features` (a list of fixed size, null for an image without),
  `error`; in the schema's metadata `shape`, that of each vector, and `made_with`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vit_cli.partial import (
    PartialFile,
    batches,
    check_begin,
    check_output,
    check_run,
    json_line,
    made_of,
    parse_line,
    told,
    utf8,
)
from vit_common.containers.safetensors_file import CODES
from vit_common.errors import ImageError, InputError, ViTError
from vit_common.files import MAX_JSON_BYTES, delete_strays, replace_files

SUFFIXES = (".npz", ".parquet", ".safetensors")
_LISTS = ("files", "failed", "errors")
_CHUNK_BYTES = 8 << 20
_NAMES_AT_ONCE = 1000
_GROUP_BYTES = 16 << 20
"""Of a row group of a parquet file."""


class FeatureFile:
    """The vectors of one output file.

    Args:
        path: the file; its suffix is its format.
        dtype: of the numbers in it, "float32" or "float16".
        resume: go on with what an earlier run left.
        force: begin anew, and overwrite.
        run: what the vectors are made with; a run with another cannot be resumed with this.

    Attributes:
        done: images that have a vector or an error.
        failed: how many, from an earlier run, have an error.
        shape: of a vector; (0,) where there is none yet.
        count: how many vectors there are.

    Raises:
        InputError: no such format, or parquet without pyarrow; or an earlier run was another.
        ExistingFileError: the file is there already, or a part of it without `resume` or `force`.
        MissingFileError: it cannot be written, or another process is writing it.
    """

    def __init__(
        self,
        path: str,
        *,
        dtype: str = "float32",
        resume: bool = False,
        force: bool = False,
        run: dict[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.shape: tuple[int, ...] = (0,)
        self.count = self.failed = 0
        self.done: set[str] = set()
        self._run = run or {}
        self._partial, self._rows = Path(f"{path}.partial"), Path(f"{path}.partial.rows")
        check_output(path, SUFFIXES, ".npz")
        header = json_line({"run": self._run})
        self._names_file = PartialFile(self._partial, header=header)
        with contextlib.ExitStack() as undo:
            undo.callback(self._names_file.close)
            check_begin(path, [self._partial], resume=resume, force=force)
            delete_strays(self.path)
            self._rows_file = PartialFile(self._rows, alone=False)
            undo.callback(self._rows_file.close)
            end = self._recover() if resume else 0
            self._names_file.cut(end if self.done else 0)
            self._rows_file.cut(self.count * self._row_bytes)
            undo.pop_all()

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def _recover(self) -> int:
        """Read the names whose vectors are whole; returns the bytes that they take."""
        end, size = 0, os.path.getsize(self._rows)
        with told(self._partial, "read"), open(self._partial, "rb") as stream:
            for line in stream:
                row = _parse(line)
                if row is None or (end == 0) != ("run" in row):
                    break
                if "shape" in row:
                    shape = tuple(row["shape"])
                    whole = (self.count + 1) * math.prod(shape) * self.dtype.itemsize <= size
                    if not whole or (self.count and shape != self.shape):
                        break
                    self.shape, self.count = shape, self.count + 1
                elif end == 0:
                    check_run(self._partial, row["run"], self._run, "vectors")
                else:
                    self.failed += 1
                if end:
                    self.done.add(row["file"])
                end += len(line)
        return end

    def write(self, file: str, features: np.ndarray) -> ViTError | None:
        """The vector of an image.

        Returns:
            Why it has none, if the file's dtype cannot hold it; that is its row then.
        """
        if file in self.done:
            return None
        with np.errstate(over="ignore"):
            row = np.ascontiguousarray(features, self.dtype)
        if not np.isfinite(row).all():
            error = ImageError(
                f"{file}: {self.dtype.name} cannot hold its features (up to "
                f"{np.abs(features).max():.3g}); store float32."
            )
            self.fail(file, str(error))
            return error
        self.shape, self.count = row.shape, self.count + 1
        self._rows_file.write(row.data)
        self.done.add(file)
        self._names_file.write(json_line({"file": file, "shape": row.shape}))
        return None

    def fail(self, file: str, error: str) -> None:
        """An image without features."""
        if file not in self.done:
            self.done.add(file)
            self._names_file.write(json_line({"file": file, "error": error}))

    def flush(self) -> None:
        """Hand what there is to the system; it survives the end of this process."""
        self._rows_file.flush()  # before the names: a name without a vector is cut off
        self._names_file.flush()

    def close(self) -> None:
        """Keep what there is for `resume`; nothing where there is nothing."""
        try:
            self._rows_file.close()
        finally:
            self._names_file.close()  # the last: until then it keeps other runs out

    def finish(self) -> None:
        """Make the file.

        Raises:
            MissingFileError: it cannot be written; what there is is kept.
            InputError: safetensors, and the names are more than its header may hold.
        """
        ways = {".npz": self._npz, ".parquet": self._parquet, ".safetensors": self._safetensors}
        try:
            self._rows_file.sync()
            self._names_file.sync()
            with made_of(self._partial):
                replace_files(self.path.parent, {self.path.name: ways[self.path.suffix.lower()]})
            self._rows_file.discard()
            self._names_file.discard()
        finally:
            self.close()

    # -- formats

    def _records(self) -> Iterator[dict[str, Any]]:
        with open(self._partial, "rb") as stream:
            next(stream, None)  # what the run was
            for line in stream:
                yield json.loads(line)

    def _names(self, which: str) -> Iterator[str]:
        """`files`, `failed` or `errors`."""
        for record in self._records():
            if ("error" in record) == (which != "files"):
                yield record["error" if which == "errors" else "file"]

    def _chunks(self) -> Iterator[bytes]:
        with open(self._rows, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk

    def _npz(self, stream: BinaryIO) -> None:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            _member(archive, "features", self.dtype, (self.count, *self.shape), self._chunks())
            for which in _LISTS:
                count = longest = 0
                for name in self._names(which):
                    count, longest = count + 1, max(longest, len(name))
                dtype = np.dtype(f"<U{max(1, longest)}")
                names = batches(self._names(which), _NAMES_AT_ONCE)
                chunks = (np.array(some, dtype).tobytes() for some in names)
                _member(archive, which, dtype, (count,), chunks)
            made_with = np.array(json.dumps(self._run))
            _member(archive, "made_with", made_with.dtype, (), [made_with.tobytes()])

    def _safetensors(self, stream: BinaryIO) -> None:
        shape = [self.count, *self.shape]
        entry = {
            "dtype": CODES[self.dtype.name],
            "shape": shape,
            "data_offsets": [0, self.count * self._row_bytes],
        }
        metadata = {which: json.dumps(list(self._names(which))) for which in _LISTS}
        metadata["made_with"] = json.dumps(self._run)
        text = json.dumps({"__metadata__": metadata, "features": entry}).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > MAX_JSON_BYTES:
            raise InputError(
                f"{self.path}: the names of the images are more than the header of a safetensors "
                f"file may hold ({MAX_JSON_BYTES} bytes). Rename {self._partial} and "
                f"{self._rows} to X.npz.partial and X.npz.partial.rows, and pass --output "
                "X.npz --resume."
            )
        stream.write(len(text).to_bytes(8, "little") + text)
        for chunk in self._chunks():
            stream.write(chunk)

    def _parquet(self, stream: BinaryIO) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        length = max(1, math.prod(self.shape))  # pyarrow divides by it
        vector = pa.list_(pa.from_numpy_dtype(self.dtype), length)
        fields = [("file", pa.string()), ("features", vector), ("error", pa.string())]
        metadata = {"shape": json.dumps(self.shape), "made_with": json.dumps(self._run)}
        schema = pa.schema(fields, metadata=metadata)
        at_once = max(1, min(10_000, _GROUP_BYTES // max(1, self._row_bytes)))
        with (
            # Neither would find anything in features: no two numbers are the same.
            pq.ParquetWriter(
                stream, schema, use_dictionary=False, write_statistics=["file"]
            ) as writer,
            open(self._rows, "rb") as rows,
        ):
            for records in batches(self._records(), at_once):
                missing = np.array(["error" in record for record in records])
                values = np.zeros((len(records), length), self.dtype)
                count = int((~missing).sum())
                found = rows.read(count * self._row_bytes)
                values[~missing] = np.frombuffer(found, self.dtype).reshape(count, length)
                columns = [
                    pa.array([utf8(record["file"]) for record in records], pa.string()),
                    pa.FixedSizeListArray.from_arrays(
                        values.reshape(-1), type=vector, mask=pa.array(missing)
                    ),
                    pa.array(
                        [utf8(r["error"]) if "error" in r else None for r in records], pa.string()
                    ),
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _parse(line: bytes) -> dict[str, Any] | None:
    """A whole row, or None."""
    row = parse_line(line)
    if row is None:
        return None
    if isinstance(row.get("run"), dict):
        return row
    shape = row.get("shape")
    numbers = isinstance(shape, list) and all(isinstance(n, int) and n > 0 for n in shape)
    whole = isinstance(row.get("file"), str) and (numbers or isinstance(row.get("error"), str))
    return row if whole else None


def _member(
    archive: zipfile.ZipFile,
    name: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    chunks: Iterable[bytes],
) -> None:
    """One array of an .npz file, as `numpy.lib.format` has it."""
    # A date of its own would make two files of the same arrays differ.
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_2_0(stream, header)
        for chunk in chunks:
            stream.write(chunk)
