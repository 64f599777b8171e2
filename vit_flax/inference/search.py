"""Nearest neighbours among features: cosine similarity, exact, a block of the index at a time."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_common.checks import check_positive
from vit_common.errors import InputError, shown, warn
from vit_common.files.features import FeatureStore

_BLOCK_BYTES = 32 << 20  # of float32 vectors, and of the similarities of a block to the queries
_QUERIES_AT_ONCE = 1024
_SPARE = 32  # neighbours more than asked for, of faiss
_CHUNK = 4096  # rows that are computed in float64 at once


class Neighbour(NamedTuple):
    """One image near another.

    Attributes:
        file: name of the image, as it was when its features were written.
        index: its place among the images of the index.
        similarity: the cosine of the angle between the features, from -1 to 1.
    """

    file: str
    index: int  # type: ignore[assignment]  # as a tuple it has a method of that name
    similarity: float


class ImageIndex:
    """Features of many images, to find the nearest of.

    The similarity is the cosine, computed in float64 for all that may be among the nearest, so the
    answer is exact: that of a sort of all similarities, of equal ones the earlier image first. The
    index is read a block at a time, and neither it nor a matrix of similarities is ever in memory
    as a whole. faiss, where it is installed, finds the candidates; the answer is the same.

    Args:
        features: (N, ...) of floats; what is behind the first axis is one vector.
        files: a name for each of them; None numbers them.
        made_with: settings that the features were made with, if known.
        name: of the index, in messages.

    Raises:
        InputError: the features are not such an array, or the names are not as many.

    Example:
        >>> with ImageIndex.open("features.npz") as index:
        ...     for near in index.search(encode.features(["query.jpg"]), top=3)[0]:
        ...         print(f"{near.similarity:.3f}  {near.file}")
    """

    def __init__(
        self,
        features: Any,
        files: Sequence[str] | None = None,
        *,
        made_with: Mapping[str, Any] | None = None,
        name: str = "the index",
    ) -> None:
        array = _array("features", features)
        if array.ndim < 2 or not _is_float(array.dtype):
            raise InputError(
                "`features` must be an array (images, ...) of floats; given "
                f"{array.dtype} of shape {array.shape}."
            )
        files = list(map(str, range(len(array)))) if files is None else files
        files = files.tolist() if isinstance(files, np.ndarray) else files
        if isinstance(files, str) or not isinstance(files, Sequence):
            raise InputError(f"`files` must be a list of names; given {shown(files)}.")
        if len(files) != len(array):
            raise InputError(
                f"`files` must name each of {len(array)} images; given {len(files)} names."
            )
        self._store: Any = _InMemory(array, files, made_with or {})
        self._name = name

    @classmethod
    def open(cls, path: str | os.PathLike) -> ImageIndex:
        """The features in a file of `vit features`: .npz, .safetensors or .parquet. To be closed,
        or used in a `with` block.

        Raises:
            MissingFileError: it is not there. InputError, CheckpointError: it is not such a file,
                or corrupt.
        """
        index = cls.__new__(cls)
        index._store = FeatureStore(path)
        index._name = str(path)
        return index

    def __enter__(self) -> ImageIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._store.close()

    def __len__(self) -> int:
        return len(self._store)

    @property
    def files(self) -> Sequence[str]:
        """Names of the images."""
        return self._store.files

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, ...) of the features."""
        return self._store.shape

    @property
    def made_with(self) -> Mapping[str, Any]:
        """The settings of `vit features`; empty where they are not known."""
        return self._store.made_with

    def vector(self, index: int) -> np.ndarray:
        """The features of one image, in the dtype that they are held in.

        Raises:
            InputError: there is none of that number.
        """
        whole = isinstance(index, (int, np.integer)) and not isinstance(index, bool)
        if not whole or not 0 <= index < len(self):
            raise InputError(
                f"`index` must be an integer from 0 to {len(self) - 1}; given {shown(index)}."
            )
        return self._store.vector(index)

    def search(
        self, queries: Any, top: int = 10, *, faiss: bool | None = None
    ) -> list[list[Neighbour]]:
        """The nearest images of each query.

        Rows of the index that hold no direction (NaN, infinity or zeros alone) are passed over.

        Args:
            queries: (Q, ...) of floats, each of the shape of the index's vectors.
            top: how many neighbours of each; all if there are fewer.
            faiss: whether faiss finds the candidates; None is where it is installed.

        Returns:
            For each query, its neighbours, the nearest first; of equally near ones the earlier.

        Warns:
            UserWarning: rows of the index were passed over.

        Raises:
            InputError: the queries do not fit the index or are not finite, the index is empty,
                `top` is not a positive integer, or faiss is asked for and not installed.
            CheckpointError: the file of the index is corrupt.
        """
        top = check_positive("top", top)
        array = _array("queries", queries)
        if not len(self):
            raise InputError(f"{self._name}: holds no features, so there is nothing to find.")
        wanted = self.shape[1:]
        if array.ndim < 2 or array.shape[1:] != wanted or not _is_float(array.dtype):
            raise InputError(
                f"{self._name}: each of its images has features {_size(wanted)}; given queries "
                f"of {_size(array.shape[1:])} ({array.dtype}). Both must be of the same model, "
                "layers and pooling."
            )
        units, valid = _units(array.reshape(len(array), -1))
        if not valid.all():
            raise InputError(
                f"query {int(np.argmin(valid))} holds no direction: NaN, infinity, or zeros alone."
            )
        knn = _faiss_knn(faiss)
        passed: list[int] = []  # rows without a direction
        found: list[list[Neighbour]] = []
        for start in range(0, len(units), _QUERIES_AT_ONCE):
            some = units[start : start + _QUERIES_AT_ONCE]
            found += self._search(some, top, knn, passed if start == 0 else [])
        if passed:
            warn(
                f"{self._name}: {len(passed)} of {len(self)} rows hold no direction (NaN, infinity "
                f"or zeros alone) and were passed over; the first is {self.files[passed[0]]}."
            )
        return found

    def _search(
        self, units: np.ndarray, top: int, knn: Any, passed: list[int]
    ) -> list[list[Neighbour]]:
        """`search` for unit vectors (Q, D) of float64; adds to `passed`."""
        Q, D = units.shape
        best = [_Best(top) for _ in units]
        queries = units.astype(np.float32)
        # How far a similarity computed in float32 may be off: D products and sums, twice over.
        margin = (D + 8) * float(np.finfo(np.float32).eps)
        for start, block in self._store.blocks(max(1, _BLOCK_BYTES // (4 * max(D, Q)))):
            rows = block.reshape(len(block), D)
            single, valid = _screened(rows)
            indices = np.arange(start, start + len(rows))
            if not valid.all():
                passed += indices[~valid].tolist()
                rows, single, indices = rows[valid], single[valid], indices[valid]
            if not len(rows):
                continue
            for q, places in _candidates(queries, single, best, margin, knn):
                for begin in range(0, len(places), _CHUNK):
                    some = places[begin : begin + _CHUNK]
                    # Each row by itself: the same bits whatever else is in the block.
                    exact = (_units(rows[some])[0] * units[q]).sum(axis=1)
                    best[q].add(exact, indices[some])
        files = self.files
        return [
            [
                Neighbour(files[i], i, min(1.0, max(-1.0, similarity)))
                for similarity, i in zip(
                    each.similarities.tolist(), each.indices.tolist(), strict=True
                )
            ]
            for each in best
        ]


class _InMemory:
    """The store of an array."""

    def __init__(
        self, array: np.ndarray, files: Sequence[str], made_with: Mapping[str, Any]
    ) -> None:
        self._array, self.files, self.made_with = array, files, made_with
        self.shape = array.shape

    def __len__(self) -> int:
        return len(self._array)

    def blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        for i in range(0, len(self._array), rows):
            yield i, self._array[i : i + rows]

    def vector(self, index: int) -> np.ndarray:
        return self._array[index]

    def close(self) -> None:
        pass


class _Best:
    """The most similar so far, best first; of equals the lower index first."""

    def __init__(self, top: int) -> None:
        self._top = top
        self.similarities = np.zeros(0)
        self.indices = np.zeros(0, np.int64)

    @property
    def least(self) -> float:
        """What a similarity must reach to be among them."""
        full = len(self.similarities) == self._top
        return float(self.similarities[-1]) if full else -math.inf

    def add(self, similarities: np.ndarray, indices: np.ndarray) -> None:
        every = np.concatenate([self.similarities, similarities])
        places = np.concatenate([self.indices, indices])
        order = np.lexsort((places, -every))[: self._top]
        self.similarities, self.indices = every[order], places[order]


def _candidates(
    queries: np.ndarray, rows: np.ndarray, best: Sequence[_Best], margin: float, knn: Any
) -> Iterator[tuple[int, np.ndarray]]:
    """For each query, the rows of a block that may be among its nearest.

    Args:
        queries, rows: unit vectors of float32, (Q, D) and (N, D).
        margin: how far the similarities of these may be off.
        knn: faiss's function, or None.
    """
    top = min(best[0]._top, len(rows))
    near = places = None
    if knn is not None and top + _SPARE < len(rows):
        near, places = knn(queries, rows, top + _SPARE)
    similarities = None
    for q, each in enumerate(best):
        least = each.least - margin
        if near is not None and places is not None:
            bound = max(least, float(near[q, top - 1]) - 2 * margin)
            if near[q, -1] < bound:  # else there may be more than were asked for
                yield q, np.sort(places[q][near[q] >= bound])
                continue
        if similarities is None:
            similarities = queries @ rows.T  # (Q, N)
        row = similarities[q]
        if top < len(row):
            least = max(least, float(np.partition(row, -top)[-top]) - 2 * margin)
        yield q, np.flatnonzero(row >= least)


def _faiss_knn(wanted: bool | None) -> Any:
    """faiss's search of one block, or None to do without."""
    if wanted is False:
        return None
    if importlib.util.find_spec("faiss") is None:
        if wanted:
            raise InputError(
                "`faiss` was asked for and is not installed; run: pip install faiss-cpu"
            )
        return None
    import faiss

    def knn(queries: np.ndarray, rows: np.ndarray, count: int) -> Any:
        return faiss.knn(queries, rows, count, metric=faiss.METRIC_INNER_PRODUCT)

    return knn


def _units(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, D) as unit vectors of float64, and which of them have a direction."""
    wide = rows.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        wide /= np.abs(wide).max(axis=1, keepdims=True)  # or squares may overflow
        wide /= np.sqrt((wide * wide).sum(axis=1, keepdims=True))
    return wide, np.asarray(np.isfinite(wide).all(axis=1))


def _screened(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same in float32, for what is near enough; rows without a direction are zero."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        single = rows.astype(np.float32)
        lengths = np.sqrt(np.einsum("nd,nd->n", single, single))
    valid = np.ones(len(rows), bool)
    odd = np.flatnonzero(~((lengths > 1e-15) & (lengths < 1e15)))  # NaN too
    lengths[odd] = 1.0
    if len(odd):
        exact, valid[odd] = _units(rows[odd])
        single[odd] = np.where(valid[odd, None], exact, 0.0)
    single /= lengths[:, None]
    return single, valid


def _array(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:  # rows of several lengths
        raise InputError(f"`{name}` must be an array of floats; given {shown(value)}.") from error


def _is_float(dtype: np.dtype) -> bool:
    return dtype.name in ("float16", "float32", "float64", "bfloat16")


def _size(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "one number"
