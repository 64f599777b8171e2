"""Images of other libraries: anything with a length and items by index."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_common.datasets.labelled import LabelledImages
from vit_common.datasets.open import is_table, open_images
from vit_common.datasets.order import limited
from vit_common.datasets.table import IMAGE_COLUMNS, LABEL_COLUMNS
from vit_common.datasets.values import labels_of
from vit_common.errors import ImageError, InputError, ViTError, shown, some
from vit_common.files.texts import reason

_FACE = ("image", "labels", "names", "classes", "problem_type")
_MOST = 10**10  # items; `grain.MapDataset.repeat()` says 2^63 - 1


class ImageObjects(LabelledImages):
    """Images of any object with `len` and indices, read when they are asked for.

    Its items are (image, label), or mappings with an image and a label, such as those of Hugging
    Face's `datasets.Dataset`, of torchvision's data sets, or of `grain.MapDataset`. Labels come
    from a column or an attribute (`targets`, `labels`) if it has one; else every item is read once.

    Args:
        items: the object. An image is a PIL image, a uint8 array (H, W, C), a path or bytes.
        image, label: keys of an item that is a mapping; None looks for usual ones.
        classes: see `ImageFolder`; None takes `items.features[label].names` or `items.classes`.
        problem_type: see `ImageTable`.
        limit: use this many images only, each class by its share.

    Raises:
        InputError: the object has no items by index, or a label is missing or out of range.

    Example:
        >>> ImageObjects(datasets.load_dataset("beans", split="train"), label="labels")
    """

    def __init__(
        self,
        items: Any,
        *,
        image: str | None = None,
        label: str | None = None,
        classes: Sequence[str] | None = None,
        problem_type: str | None = None,
        limit: int | None = None,
    ) -> None:
        kind = type(items).__name__
        if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
            raise InputError(
                f"images must come from an object with a length and items by index; given {kind}. "
                "A stream has no order to shuffle: read it into a list or a table."
            )
        if not len(items):
            raise InputError(f"{kind} has no items; wanted at least one image.")
        if len(items) > _MOST:
            raise InputError(
                f"{kind} has {len(items)} items, so it repeats without end; give one pass of it, "
                "as the epochs are counted here."
            )
        keys = _keys(items)
        if keys is not None:
            image = _key(kind, keys, image, ("image", "img", *IMAGE_COLUMNS), "image")
            label = _key(kind, keys, label, LABEL_COLUMNS, "label")
        values = _values(items, keys, label)
        labels, known, problem_type = labels_of(
            values,
            kind,
            lambda i: f"item {i}",
            problem_type=problem_type,
            classes=classes,
            declared=_declared(items, label),
        )
        everything = LabelledImages(
            _Items(items, image if keys is not None else None),
            labels,
            classes=known,
            names=[f"{kind} item {i}" for i in range(len(items))],
            problem_type=problem_type,
        )
        chosen = everything if limit is None else limited(everything, limit)
        super().__init__(
            chosen._sources,
            chosen.labels,
            classes=known,
            names=chosen.names,
            problem_type=problem_type,
        )


def as_images(data: Any, *, like: LabelledImages | None = None, **options: Any) -> LabelledImages:
    """Anything that a data set can be made of as `LabelledImages`; one is returned as it is.

    Args:
        data: `LabelledImages`, or an object with its attributes; the path of a folder or table
            (whose training images are taken, if it has parts); or an object with items by index.
        like: images whose classes and problem type these have, too: those of training for those
            of validation.
        **options: of `open_images` or `ImageObjects`.

    Raises:
        MissingFileError, InputError: as those say.
    """
    if isinstance(data, LabelledImages) or all(hasattr(data, name) for name in _FACE):
        return data
    path = isinstance(data, (str, os.PathLike))
    if like is not None:
        options["classes"] = like.classes
        if not path or is_table(Path(data)):
            options["problem_type"] = like.problem_type
    if not path:
        return ImageObjects(data, **options)
    parts = open_images(data, **options)
    return next(iter(parts.values()))


class _Items(Sequence):
    """The image of each item."""

    def __init__(self, items: Any, image: str | None) -> None:
        self._items, self._image = items, image

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        try:
            item = self._items[int(index)]
            image = item[0] if self._image is None else item[self._image]
        except (ViTError, MemoryError):
            raise
        except (OSError, ValueError, SyntaxError) as error:  # what broken image files raise
            raise ImageError(f"item {index}: cannot be read ({reason(error)}).") from error
        if isinstance(image, Mapping) and "bytes" in image:
            return image["bytes"] if image["bytes"] is not None else image.get("path")
        return image


def _keys(items: Any) -> list[str] | None:
    """Keys of the items; None if they are pairs."""
    columns = getattr(items, "column_names", None)
    if isinstance(columns, (list, tuple)):
        return [str(column) for column in columns]
    if isinstance(columns, Mapping):
        raise InputError(
            f"{type(items).__name__} holds several parts ({some(columns, 5)}); give one of them, "
            "such as data['train']."
        )
    first = items[0]
    if isinstance(first, Mapping):
        return [str(key) for key in first]
    if isinstance(first, (tuple, list)) and len(first) >= 2:
        return None
    raise InputError(
        f"items must be (image, label), or mappings with an image and a label; given "
        f"{type(first).__name__} in {type(items).__name__}."
    )


def _key(kind: str, keys: list[str], wanted: str | None, usual: Sequence[str], what: str) -> str:
    if wanted is None:
        wanted = next((key for key in usual if key in keys), None)
    if wanted not in keys or wanted is None:
        given = f"no key {shown(wanted)} for" if wanted is not None else "no key for"
        raise InputError(
            f"{kind}: {given} the {what}; the items have {some(keys, 12)}. Name it with `{what}`."
        )
    return wanted


def _values(items: Any, keys: list[str] | None, label: str | None) -> Sequence[Any]:
    if keys is not None and hasattr(items, "column_names"):
        return list(items[label])
    for name in ("targets", "labels", "_labels"):
        found = getattr(items, name, None)
        if found is not None and hasattr(found, "__len__") and len(found) == len(items):
            return list(np.asarray(found))
    values = []
    for i in range(len(items)):
        item = items[i]
        if item is None:  # what a filter of grain leaves
            raise InputError(
                f"{type(items).__name__}: item {i} is None; wanted an image and a label for every "
                "index. Filter the images before they become a data set by index."
            )
        values.append(item[1] if keys is None else item[label])
    return values


def _declared(items: Any, label: str | None) -> list[str] | None:
    """Class names that the object itself has."""
    features = getattr(items, "features", None)
    if isinstance(features, Mapping) and label in features:
        feature = features[label]
        feature = getattr(feature, "feature", feature)
        names = getattr(feature, "names", None)
        return list(map(str, names)) if names else None
    names = getattr(items, "classes", None)
    return list(map(str, names)) if isinstance(names, (list, tuple)) else None
