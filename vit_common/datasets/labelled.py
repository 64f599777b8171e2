"""Images with labels: what is trained and judged on, whatever it was read from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vit_common.errors import InputError, shown

SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
PROBLEM_TYPES = (SINGLE, MULTI, REGRESSION)
"""Transformers' names for what a label is: one class, any number of classes, or numbers."""


class LabelledImages:
    """Images with labels, by index. It holds names, not pictures, and can be pickled.

    Args:
        sources: the images: paths, bytes, PIL images or arrays; anything with `len` and indices.
        labels: (N,) class indices, (N, K) zeros and ones, or (N,) or (N, K) numbers.
        classes: class names, whose order is the labels' indices; None for regression.
        names: what to call each image in messages and reports; None uses the paths.
        problem_type: "single_label_classification", "multi_label_classification" or "regression".

    Attributes:
        classes: tuple of class names; None for regression, and where there are no labels.
        labels: (N,) int64, (N, K) float32 zeros and ones, or (N,) or (N, K) float32.
        names: name of each image.
        problem_type: as given.
        labelled: False if the images have no labels; `labels` is then all zeros.

    Raises:
        InputError: the numbers of images, labels and names differ, or a label is out of range.

    Example:
        >>> pets = LabelledImages(["a.jpg", "b.jpg"], [0, 1], classes=("cat", "dog"))
        >>> len(pets), pets.image(1), pets.classes[pets.labels[1]]
        (2, 'b.jpg', 'dog')
    """

    def __init__(
        self,
        sources: Sequence[Any],
        labels: Any,
        *,
        classes: Sequence[str] | None = None,
        names: Iterable[str] | None = None,
        problem_type: str = SINGLE,
        labelled: bool = True,
    ) -> None:
        if problem_type not in PROBLEM_TYPES:
            raise InputError(
                f"`problem_type` must be one of {', '.join(PROBLEM_TYPES)}; given "
                f"{shown(problem_type)}."
            )
        self._sources = sources
        self.classes = None if classes is None else tuple(map(str, classes))
        self.problem_type = problem_type
        self.labelled = labelled
        self.labels = _checked(labels, problem_type, self.classes)
        if names is None:
            names = [_name(sources, i) for i in range(len(sources))]
        self.names = list(names)
        if not len(sources) == len(self.labels) == len(self.names):
            raise InputError(
                "every image needs a label and a name; given "
                f"{len(sources)} images, {len(self.labels)} labels and {len(self.names)} names."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        what = "no labels" if not self.labelled else self.problem_type
        if self.classes is not None:
            what = f"{len(self.classes)} classes" + (", several at once" * (what == MULTI))
        return f"{type(self).__name__}({len(self)} images, {what})"

    def image(self, index: int) -> Any:
        """The image as `vit_common.images.pictures.load_image` takes it, or an array."""
        return self._sources[index]

    def select(self, indices: Any) -> LabelledImages:
        """The images with these indices, in this order, as images of their own."""
        indices = np.asarray(indices)
        if indices.dtype == bool:
            indices = np.flatnonzero(indices)
        indices = indices.astype(np.int64)
        return LabelledImages(
            _Picked(self._sources, indices),
            self.labels[indices],
            classes=self.classes,
            names=[self.names[i] for i in indices],
            problem_type=self.problem_type,
            labelled=self.labelled,
        )

    @property
    def counts(self) -> np.ndarray:
        """(K,) images of each class; an image of several classes counts in each."""
        if self.classes is None:
            raise InputError("images without classes have no counts; wanted classification.")
        if self.problem_type == SINGLE:
            return np.bincount(self.labels, minlength=len(self.classes))
        return np.count_nonzero(self.labels, axis=0)


def _name(sources: Sequence[Any], index: int) -> str:
    """A path as it is; what is no list may read an image for each of its items, so is not asked."""
    source = sources[index] if isinstance(sources, (list, tuple)) else None
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else f"image {index}"


def _checked(labels: Any, problem_type: str, classes: tuple[str, ...] | None) -> np.ndarray:
    """Labels as an array of the dtype and shape of their problem type."""
    given = np.asarray(labels)
    if given.dtype.kind not in "biuf":
        raise InputError(
            f"labels must be numbers; given {given.dtype} ({shown(labels, 80)}). Give the index of "
            "each class, and class names as `classes`."
        )
    if problem_type == SINGLE:
        if given.ndim != 1 or (given.dtype.kind == "f" and (given % 1).any()):
            raise InputError(
                f"labels of one class per image must be whole numbers, one for each image; given "
                f"{given.dtype} of shape {given.shape}."
            )
        most = None if classes is None else len(classes)
        wrong = np.flatnonzero((given < 0) | (given >= (np.inf if most is None else most)))
        if len(wrong):
            wanted = (
                "class indices from 0" if most is None else f"0 to {most - 1} for {most} classes"
            )
            count = "1 label is" if len(wrong) == 1 else f"{len(wrong)} labels are"
            raise InputError(
                f"{count} out of range, the first {given[wrong[0]]} (image {wrong[0]}); wanted "
                f"class indices {wanted}. Leave out images that have no label."
            )
        return given.astype(np.int64)
    found = given.astype(np.float32)
    if problem_type == MULTI:
        shape = (len(found), found.shape[-1] if classes is None else len(classes))
        if found.shape != shape or not ((found >= 0) & (found <= 1)).all():
            raise InputError(
                "labels of several classes per image must be one row of zeros and ones for each "
                f"image, {shape[-1]} long; given shape {found.shape}."
            )
    elif found.ndim not in (1, 2) or not np.isfinite(found).all():
        raise InputError(
            "labels for regression must be finite numbers, one or one row for each image; given "
            f"shape {found.shape}."
        )
    return found


class _Picked(Sequence):
    """Some items of a sequence, in another order; nothing is copied."""

    def __init__(self, items: Any, indices: np.ndarray) -> None:
        if isinstance(items, _Picked):
            items, indices = items.items, items.indices[indices]
        self.items: Any = items
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.items[int(self.indices[index])]
