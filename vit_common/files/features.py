"""Features of many images in a file, as `vit features` writes it, read a block at a time.

Blocks are read into fresh memory at their place in the file, not viewed through a memory map: see
`containers.tensor.DataFile` for what that costs (little) and saves (a crash).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_common.errors import CheckpointError, InputError, MissingFileError, ViTError
from vit_common.files.checkpoint import open_checkpoint
from vit_common.files.containers import numpy_zip
from vit_common.files.containers.tensor import DataFile, Tensor
from vit_common.files.texts import parse_json, reason

SUFFIXES = (".npz", ".parquet", ".safetensors")
_FEW = 64  # rows
FLOATS = ("float16", "float32", "float64", "bfloat16")


class FeatureStore:
    """The vectors of a file and the names of their images.

    Images without features (they could not be read when the file was written) are left out here.

    Args:
        path: .npz, .safetensors or .parquet file with `features` (N, ...) and `files`.

    Attributes:
        files: names of the images, in the order of the vectors.
        shape: (N, ...) of all vectors.
        made_with: the settings of `vit features`; empty where the file does not say.

    Raises:
        MissingFileError: it is not there, or cannot be read.
        InputError: it is not such a file.
        CheckpointError: it is corrupt.

    Example:
        >>> with FeatureStore("features.npz") as store:
        ...     print(store.shape, store.files[0])
    """

    files: Sequence[str]
    shape: tuple[int, ...]
    made_with: Mapping[str, Any]

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._resources = contextlib.ExitStack()
        self._tensor: Tensor | None = None  # of formats that have all vectors in one
        suffix = self.path.suffix.lower()
        if suffix not in SUFFIXES:
            raise InputError(
                f"{self.path}: a file of features ends in {', '.join(SUFFIXES)}; `vit features "
                "--output` writes one."
            )
        if not self.path.is_file():
            wanted = "wanted a file" if self.path.exists() else "no such file"
            raise MissingFileError(f"{self.path}: {wanted}; `vit features --output` writes one.")
        try:
            {".npz": self._npz, ".safetensors": self._safetensors, ".parquet": self._parquet}[
                suffix
            ]()
            self._check()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.shape[0]

    def close(self) -> None:
        """Close the file; what was read stays."""
        self._resources.close()

    def blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """The vectors in order, at most `rows` at a time, each with the index of its first.

        Raises:
            CheckpointError: the file has become shorter, or is corrupt.
        """
        return self._blocks(max(1, rows))

    def vector(self, index: int) -> np.ndarray:
        """One of the vectors."""
        if self._tensor is not None:
            return self._tensor.read_rows(index, index + 1)[0]
        for start, block in self.blocks(_FEW):  # Parquet finds no row by its number
            if index < start + len(block):
                return block[index - start]
        raise CheckpointError(f"{self.path}: has no vector {index}.")

    _blocks: Callable[[int], Iterator[tuple[int, np.ndarray]]]

    # -- what is checked in every format

    def _fail(self, text: str) -> InputError:
        return InputError(f"{self.path}: {text}")

    def _check(self) -> None:
        if len(self.shape) < 2 or 0 in self.shape[1:]:
            if self.shape[:1] == (0,):
                return  # no vector: then their length is not known
            raise self._fail(f"`features` must be of shape (images, ...); given {self.shape}.")
        if len(self.files) != self.shape[0]:
            raise self._fail(f"holds {self.shape[0]} vectors, but names {len(self.files)} images.")

    def _settings(self, text: str | None) -> Mapping[str, Any]:
        if text is None:
            return {}
        found = parse_json(text.encode("utf-8", "replace"), self.path, "`made_with`")
        if not isinstance(found, dict):
            raise self._fail("`made_with` must be a JSON object.")
        return found

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        found = tensors.get("features")
        if found is None:
            some = ", ".join(list(tensors)[:4]) or "nothing"
            raise self._fail(
                f"holds no `features`; it holds {some}. `vit features` writes such a file."
            )
        if found.dtype.name not in FLOATS:
            raise self._fail(f"`features` must be of floats; given {found.dtype.name}.")
        self.shape, self._tensor = found.shape, found
        self._blocks = lambda rows: (
            (i, found.read_rows(i, min(i + rows, self.shape[0])))
            for i in range(0, self.shape[0], rows)
        )

    # -- formats

    def _npz(self) -> None:
        checkpoint = self._resources.enter_context(open_checkpoint(self.path))
        self._take(checkpoint)
        file = DataFile(self.path)
        self._resources.callback(file.close)
        texts = numpy_zip.texts(file)
        if "files" not in texts:
            raise self._fail("holds no `files`, the names of the images.")
        self.files = texts["files"]
        self.made_with = self._settings(texts["made_with"][0] if texts.get("made_with") else None)

    def _safetensors(self) -> None:
        checkpoint = self._resources.enter_context(open_checkpoint(self.path))
        self._take(checkpoint)
        metadata = checkpoint.metadata
        if "files" not in metadata:
            raise self._fail("holds no `files`, the names of the images, in its metadata.")
        try:
            files = json.loads(metadata["files"])
        except (ValueError, RecursionError) as error:
            raise self._fail(f"`files` is not JSON ({reason(error)}).") from error
        if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
            raise self._fail("`files` must be a list of names.")
        self.files = files
        self.made_with = self._settings(metadata.get("made_with"))

    def _parquet(self) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise self._fail("reading it needs pyarrow; run: pip install pyarrow.") from error
        try:
            file = pq.ParquetFile(self.path)
            self._resources.callback(file.close)
            schema = file.schema_arrow
            if not {"file", "features"} <= {*schema.names}:
                raise self._fail(f"wanted columns `file` and `features`; given {schema.names}.")
            kind = schema.field("features").type
            if not pa.types.is_fixed_size_list(kind) or not pa.types.is_floating(kind.value_type):
                raise self._fail(f"`features` must be lists of floats of one length; given {kind}.")
            metadata = schema.metadata or {}
            names: list[str] = []
            rows = 0
            for batch in file.iter_batches(10_000, columns=["file", "features"]):
                whole = batch.filter(batch.column("features").is_valid())
                names += map(str, whole.column("file").to_pylist())
                rows += len(whole)
        except (ViTError, MemoryError):
            raise
        except Exception as error:  # of pyarrow, for a file that is damaged
            raise CheckpointError(f"{self.path}: cannot be read ({reason(error)}).") from error
        try:
            shape = [int(n) for n in json.loads(metadata.get(b"shape", b""))]
        except (ValueError, TypeError, RecursionError):
            shape = []
        if not shape or min(shape) < 1 or math.prod(shape) != kind.list_size:
            shape = [kind.list_size]  # what is there, whatever the metadata say
        self.files, self.shape = names, (rows, *shape)
        text = metadata.get(b"made_with")
        self.made_with = self._settings(None if text is None else text.decode("utf-8", "replace"))

        def blocks(rows: int) -> Iterator[tuple[int, np.ndarray]]:
            first = 0
            try:
                for batch in file.iter_batches(rows, columns=["features"]):
                    column = batch.column("features").drop_null()
                    if len(column):
                        values = column.flatten().to_numpy(zero_copy_only=False)
                        yield first, values.reshape(len(column), *self.shape[1:])
                        first += len(column)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read ({reason(error)}).") from error

        self._blocks = blocks
