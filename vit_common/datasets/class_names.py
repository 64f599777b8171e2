"""Names of classes in a data set, found among those that a model has."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vit_common.errors import InputError, some
from vit_common.images.imagenet import imagenet_labels, imagenet_synsets

_NUMBERED = re.compile(r"label_(\d+)", re.IGNORECASE)


def labels_of(id2label: Mapping[int, Any]) -> tuple[str, ...]:
    """The names of a configuration's `id2label`, in the order of their indices."""
    return tuple(str(id2label[i]) for i in sorted(id2label))


def match_classes(names: Sequence[str], labels: Sequence[str], *, what: str = "") -> np.ndarray:
    """The index that each class of a data set has in a model, found by its name.

    A name is looked for as it is; without regard to case, Unicode form, and spaces, underscores
    and hyphens; as one of a label's names parted by ", " (ImageNet's, "tench, Tinca tinca"); as a
    WordNet ID (`n01440764`) of a model with ImageNet's classes; and as a number, where the model's
    labels are only numbered (`LABEL_3`). What fits two labels fits none.

    Args:
        names: of the data set's classes.
        labels: of the model, in its order.
        what: the data set, for messages.

    Returns:
        (len(names),) int64.

    Raises:
        InputError: names that are no label of the model, or two that are the same one.

    Example:
        >>> match_classes(["dog", "Cat"], ["cat", "dog", "bird"])
        array([1, 0])
    """
    tables = _tables(labels)
    found = [_find(name, tables) for name in names]
    start = f"{what}: " if what else ""
    unknown = [name for name, index in zip(names, found, strict=True) if index is None]
    if unknown:
        plain = {_plain(label): label for label in labels}
        close = difflib.get_close_matches(_plain(unknown[0]), plain, n=1, cutoff=0.6)
        meant = f" (did you mean {plain[close[0]]!r}?)" if close else ""
        many = len(unknown) > 1
        raise InputError(
            f"{start}{len(unknown)} of {len(names)} classes {'are' if many else 'is'} unknown to "
            f"the model: {some(map(repr, unknown), 3)}{meant}. Its {len(labels)} labels are "
            f"{some(map(repr, labels), 4)}; name the classes as the model does, or take a model "
            "that was trained on them."
        )
    owner: dict[int, str] = {}
    for name, index in zip(names, found, strict=True):
        assert index is not None
        if index in owner:
            raise InputError(
                f"{start}the classes {owner[index]!r} and {name!r} are both the model's label "
                f"{labels[index]!r}; put them together."
            )
        owner[index] = name
    return np.array(found, np.int64).reshape(len(names))


_Table = Mapping[str, int | None]


def _tables(labels: Sequence[str]) -> list[tuple[Any, _Table]]:
    """Ways to look a name up, the strictest first: how it is changed, and what is found under it
    (None where that is two labels)."""
    tables: list[tuple[Any, _Table]] = [
        (str, _unique(_listed([label] for label in labels))),
        (_plain, _unique(_listed([_plain(label)] for label in labels))),
        (_plain, _unique(_listed(map(_plain, label.split(", ")) for label in labels))),
    ]
    if tuple(labels) == imagenet_labels() or _is_imagenet(labels):
        tables.append((str, {name: i for i, name in enumerate(imagenet_synsets())}))
    if all(_NUMBERED.fullmatch(label) for label in labels):
        numbers = ([match[1]] for match in map(_NUMBERED.fullmatch, labels) if match)
        tables.append((lambda name: name.lstrip("0") or "0", _unique(_listed(numbers))))
    return tables


def _is_imagenet(labels: Sequence[str]) -> bool:
    """Whether these are ImageNet's 1000 classes in their order, in whatever words: the first name
    of most is the same."""
    wanted = imagenet_labels()
    if len(labels) != len(wanted):
        return False
    same = (
        bool(set(map(_plain, one.split(", "))) & set(map(_plain, other.split(", "))))
        for one, other in zip(labels, wanted, strict=True)
    )
    return sum(same) > 0.8 * len(wanted)


def _listed(groups: Iterable[Iterable[str]]) -> Iterable[tuple[str, int]]:
    """Each name of each label, with the label's index."""
    for index, names in enumerate(groups):
        for name in names:
            yield name, index


def _unique(pairs: Iterable[tuple[str, int]]) -> dict[str, int | None]:
    table: dict[str, int | None] = {}
    for name, index in pairs:
        table[name] = index if table.get(name, index) == index else None
    return table


def _find(name: str, tables: list[tuple[Any, _Table]]) -> int | None:
    for change, table in tables:
        index = table.get(change(name))
        if index is not None:
            return index
    return None


def _plain(name: str) -> str:
    """A name without what is written in several ways."""
    text = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"[\s_-]+", " ", text).strip()
