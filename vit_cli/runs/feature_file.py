"""Features in a file: one array for all images, with their names.

While images come, the vectors go end to end into `FILE.partial.rows` and the names into
`FILE.partial`, one JSON object a line. No array is ever in memory as a whole. A run that is resumed
first cuts both files to what they agree on. At the end the file is made of them:

- `.npz`: `features` (count, ...), `files` (count,); `failed` and `errors`, the images without
  features and why; `made_with`, the settings as JSON.
- `.safetensors`: a tensor `features`; in the metadata `files`, `failed`, `errors` and `made_with`,
  each as JSON.
- `.parquet`: one row per image: `file`, `features` (a list of fixed size, null for an image
  without), `error`; in the schema's metadata `shape`, that of each vector, and `made_with`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, BinaryIO

import numpy as np

from vit_cli.runs.partial import batches, utf8
from vit_cli.runs.rows import RowFile
from vit_common.errors import ImageError, InputError, ViTError
from vit_common.files.containers.safetensors_file import CODES
from vit_common.files.texts import MAX_JSON_BYTES

_LISTS = ("files", "failed", "errors")
_NAMES_AT_ONCE = 1000
_GROUP_BYTES = 16 << 20
"""Of a row group of a parquet file."""


class FeatureFile(RowFile):
    """The vectors of one output file.

    Args:
        path: the file; its suffix is its format.
        dtype: of the numbers in it, "float32" or "float16".
        options: as `RowFile`.

    Attributes:
        shape: of a vector; (0,) where there is none yet.
    """

    suffixes = (".npz", ".parquet", ".safetensors")
    what = "vectors"
    beside = (".rows",)

    def __init__(self, path: str, *, dtype: str = "float32", **options: Any) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.shape: tuple[int, ...] = (0,)
        super().__init__(path, **options)

    @property
    def count(self) -> int:
        """How many vectors there are."""
        return len(self.done) - self.failed

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def _whole(self) -> Callable[[dict[str, Any]], bool]:
        """A name is whole where its vector is."""
        # Opened, as a shared file system may remember the size that another host's file had.
        with open(self._beside[0].path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
        count = 0

        def whole(row: dict[str, Any]) -> bool:
            nonlocal count
            if [*row] != ["file", "shape", "row"] or type(row["row"]) is not int:
                return False
            shape = row["shape"]
            if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
                return False
            one = math.prod(shape) * self.dtype.itemsize
            known = self.shape in ((0,), tuple(shape))
            if row["row"] != count or not known or (count + 1) * one > size:
                return False
            self.shape, count = tuple(shape), count + 1
            return True

        return whole

    def _cut(self, end: int) -> None:
        super()._cut(end)
        self._beside[0].cut(self.count * self._row_bytes)

    def write(self, file: str, value: np.ndarray) -> ViTError | None:
        """The vector of an image.

        Returns:
            Why it has none, if the file's dtype cannot hold it; that is its row then.
        """
        if file in self.done:
            return None
        with np.errstate(over="ignore"):
            vector = np.ascontiguousarray(value, self.dtype)
        if not np.isfinite(vector).all():
            error = ImageError(
                f"{file}: {self.dtype.name} cannot hold its features (up to "
                f"{np.abs(value).max():.3g}); store float32."
            )
            self.fail(file, str(error))
            return error
        if self.shape not in ((0,), vector.shape):
            raise InputError(
                f"{self._partial}: its vectors are of shape {self.shape}, and this model's of "
                f"{vector.shape}. Pass --force to begin anew."
            )
        self.shape = vector.shape
        self._beside[0].write(vector.data)
        self._row({"file": file, "shape": vector.shape, "row": self.count})
        return None

    def summary(self, images: int, done: int) -> str:
        return f"{' x '.join(map(str, (self.count, *self.shape)))} {self.dtype.name}"

    # -- formats

    def _ways(self) -> Mapping[str, Callable[[BinaryIO], object]]:
        return {".npz": self._npz, ".parquet": self._parquet, ".safetensors": self._safetensors}

    def _records(self) -> Iterator[dict[str, Any]]:
        yield from map(json.loads, self._lines())

    def _names(self, which: str) -> Iterator[str]:
        """`files`, `failed` or `errors`."""
        for record in self._records():
            if ("error" in record) == (which != "files"):
                yield record["error" if which == "errors" else "file"]

    def _vectors(self) -> Generator[bytes, None, None]:
        """The vectors, in the order of the names."""
        with open(self._beside[0].path, "rb") as stream:
            for _ in range(self.count):
                yield stream.read(self._row_bytes)

    def _npz(self, stream: BinaryIO) -> None:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            _member(archive, "features", self.dtype, (self.count, *self.shape), self._vectors())
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
                f"file may hold ({MAX_JSON_BYTES} bytes). Rename {self.path}.partial and "
                f"{self.path}.partial.rows so that they have .npz for .safetensors, and pass "
                "--resume and an --output that ends in .npz."
            )
        stream.write(len(text).to_bytes(8, "little") + text)
        for vector in self._vectors():
            stream.write(vector)

    def _parquet(self, stream: BinaryIO) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        length = max(1, math.prod(self.shape))  # pyarrow divides by it
        vector = pa.list_(pa.from_numpy_dtype(self.dtype), length)
        fields = [("file", pa.string()), ("features", vector), ("error", pa.string())]
        metadata = {"shape": json.dumps(self.shape), "made_with": json.dumps(self._run)}
        schema = pa.schema(fields, metadata=metadata)
        at_once = max(1, min(10_000, _GROUP_BYTES // max(1, self._row_bytes)))
        vectors = self._vectors()
        # Neither would find anything in features: no two numbers are the same.
        with (
            contextlib.closing(vectors),
            pq.ParquetWriter(
                stream, schema, use_dictionary=False, write_statistics=["file"]
            ) as writer,
        ):
            for records in batches(self._records(), at_once):
                missing = np.array(["error" in record for record in records])
                values = np.zeros((len(records), length), self.dtype)
                count = int((~missing).sum())
                found = b"".join(islice(vectors, count))
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
