"""Features in a file: one array for all images, with their names.

While images come, the vectors go end to end into `FILE.partial.rows` and the names into
`FILE.partial` (see `vit_cli.journal`); neither is ever in memory as a whole. A run that is resumed
first cuts both to what they agree on. At the end the file is made of them:

- `.npz`: `features` (count, ...), `files` (count,); `failed` and `errors`, the images without
  features and why; `made_with`, the settings as JSON.
- `.safetensors`: a tensor `features`; in the metadata `files`, `failed`, `errors` and `made_with`,
  each as JSON.
- `.parquet`: a row an image: `file`, `features` (a list of fixed size, null for an image without),
  `error`; in the schema's metadata `shape`, that of each vector, and `made_with`.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, BinaryIO, ClassVar

import numpy as np

from vit_cli.journal import Journal, utf8
from vit_common.containers.safetensors_file import CODES
from vit_common.errors import ImageError, InputError, MissingFileError, ViTError
from vit_common.files import MAX_JSON_BYTES, reason

_CHUNK_BYTES = 8 << 20
_NAMES_AT_ONCE = 1000
_GROUP_BYTES = 64 << 20
"""Of a row group of a parquet file."""


class FeatureFile(Journal):
    """The vectors of one output file.

    Args:
        path: the file; its suffix is its format.
        dtype: of the numbers in it, "float32" or "float16".
        resume, force, run: as `Journal`.

    Attributes:
        shape: of a vector; (0,) where there is none yet.
        count: how many there are.

    Raises:
        InputError: no such format, or parquet without pyarrow; or an earlier run was another.
        MissingFileError: the file is there already, or cannot be written.
    """

    suffixes: ClassVar = (".npz", ".parquet", ".safetensors")

    def __init__(
        self,
        path: str,
        *,
        dtype: str = "float32",
        resume: bool = False,
        force: bool = False,
        run: dict[str, Any] | None = None,
    ) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.shape: tuple[int, ...] = (0,)
        self.count = 0
        self._rows_path = f"{path}.partial.rows"
        super().__init__(path, resume=resume, force=force, run=run)
        try:
            self._rows_stream = open(  # noqa: SIM115  # until `finish`
                self._rows_path, "r+b" if self.count else "wb"
            )
            self._rows_stream.truncate(self.count * self._row_bytes)
            self._rows_stream.seek(0, os.SEEK_END)
        except OSError as error:
            super().close()
            raise MissingFileError(
                f"{self._rows_path}: cannot be written ({reason(error)})."
            ) from error

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def _is_whole(self, row: dict[str, Any]) -> bool:
        if "shape" not in row:
            return True
        shape = tuple(row["shape"])
        size = os.path.getsize(self._rows_path) if os.path.exists(self._rows_path) else 0
        end = (self.count + 1) * math.prod(shape) * self.dtype.itemsize
        if (self.count and shape != self.shape) or end > size:
            return False
        self.shape, self.count = shape, self.count + 1
        return True

    def write(self, file: str, features: np.ndarray) -> ViTError | None:  # type: ignore[override]
        """The vector of an image.

        Returns:
            Why it has none, if the file's dtype cannot hold it; then that is its row.
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
        self._rows_stream.write(row.data)
        self._row({"file": file, "shape": list(row.shape)})
        return None

    def flush(self) -> None:
        self._rows_stream.flush()  # before the names: a name without a row is cut off
        super().flush()

    def close(self) -> None:
        self._rows_stream.close()
        super().close()

    def _discard(self) -> None:
        super()._discard()
        if os.path.exists(self._rows_path):
            os.unlink(self._rows_path)

    def finish(self) -> None:
        """Make the file.

        Raises:
            MissingFileError: it cannot be written; what there is is kept.
            InputError: safetensors, and the names are more than its header may hold.
        """
        self._rows_stream.close()
        super().finish()

    # -- formats

    def _ways(self) -> dict[str, Callable[[BinaryIO], object]]:
        return {".npz": self._npz, ".parquet": self._parquet, ".safetensors": self._safetensors}

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
        with open(self._rows_path, "rb") as stream:
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
                names = _batches(self._names(which), _NAMES_AT_ONCE)
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
                f"{self._rows_path} to X.npz.partial and X.npz.partial.rows, and pass --output "
                "X.npz --resume."
            )
        stream.write(len(text).to_bytes(8, "little") + text)
        for chunk in self._chunks():
            stream.write(chunk)

    def _parquet(self, stream: BinaryIO) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        length = math.prod(self.shape)
        vector = pa.list_(pa.from_numpy_dtype(self.dtype), length)
        fields = [("file", pa.string()), ("features", vector), ("error", pa.string())]
        metadata = {"shape": json.dumps(self.shape), "made_with": json.dumps(self._run)}
        schema = pa.schema(fields, metadata=metadata)
        at_once = max(1, min(10_000, _GROUP_BYTES // max(1, self._row_bytes)))
        with (
            pq.ParquetWriter(stream, schema) as writer,
            open(self._rows_path, "rb") as rows,
        ):
            for records in _batches(self._records(), at_once):
                missing = np.array(["error" in record for record in records])
                values = np.zeros((len(records), length), self.dtype)
                found = rows.read(int((~missing).sum()) * self._row_bytes)
                values[~missing] = np.frombuffer(found, self.dtype).reshape(-1, length)
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


_LISTS = ("files", "failed", "errors")


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


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last of fewer."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some
