"""Label values, as tables and other libraries have them, to the labels of a data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np

from vit_common.datasets.folder import check_alike, check_classes, class_name
from vit_common.datasets.labelled import MULTI, PROBLEM_TYPES, REGRESSION, SINGLE
from vit_common.errors import InputError, shown, some

SEPARATORS = ("|", ";", ",")
"""What stands between several labels in one text, by rank; a comma counts only if several labels
were asked for, as class names may have one."""

_SHOWN = 5
_KNOWN = (str, Real)
_LARGEST = float(np.finfo(np.float32).max)


def labels_of(
    values: Sequence[Any],
    where: str,
    row: Callable[[int], str],
    *,
    problem_type: str | None = None,
    classes: Sequence[str] | None = None,
    declared: Sequence[str] | None = None,
) -> tuple[np.ndarray, tuple[str, ...] | None, str]:
    """Labels, class names and problem type for the label values of a table.

    Without `problem_type`, lists and texts with `|` or `;` are several classes, numbers with a
    decimal point are regression, and all else is one class. Whole numbers are class indices if
    `classes` or `declared` has the names, unless these are the very names; else they are names,
    in the order of the numbers.

    Args:
        values: one value for each image: a name, a number, or a list of these.
        where: the table, for messages.
        row: what to call the image of an index, for messages.
        problem_type: what the values are; None finds out.
        classes: class names in the order of the labels, of training or of a model.
        declared: names of the class indices that the table itself declares.

    Returns:
        (labels, classes, problem type), as `LabelledImages` takes them.

    Raises:
        InputError: a label is missing, out of range, or of another kind than the others.
    """
    if problem_type is not None and problem_type not in PROBLEM_TYPES:
        raise InputError(
            f"`problem_type` must be one of {', '.join(PROBLEM_TYPES)}; given "
            f"{shown(problem_type)}."
        )
    if not len(values):
        raise InputError(f"{where}: no rows; wanted at least one image with its label.")
    values = [_plain(value) for value in values]
    _refuse(
        [i for i, value in enumerate(values) if _missing(value, problem_type)],
        row,
        f"{where}: {{count}} without a label ({{names}}); wanted one in every row. Fill it in or "
        "remove the row.",
    )
    _refuse(
        [
            i
            for i, value in enumerate(values)
            if not all(isinstance(part, _KNOWN) for part in _parts(value))
        ],
        lambda i: f"{row(i)}, {shown(values[i], 40)}",
        f"{where}: {{count}} whose label is of no kind that is known ({{names}}); wanted a name, a "
        "number, or a list of these.",
    )
    problem_type = problem_type or _problem_type(values)
    if problem_type == REGRESSION:
        return _numbers(values, where, row), None, REGRESSION
    several = problem_type == MULTI
    lists = _split(values) if several else [[value] for value in values]
    names, known = _names(lists, where, row, classes, declared)
    index = {name: i for i, name in enumerate(known)}
    if several:
        labels = np.zeros((len(values), len(known)), np.float32)
        for i, row_names in enumerate(names):
            for name in row_names:
                labels[i, index[name]] = 1
        return labels, known, MULTI
    if len(known) < 2 and classes is None:
        raise InputError(
            f"{where}: wanted at least two classes; given one ({known[0]}). Add images of another."
        )
    return np.array([index[one] for (one,) in names], np.int64), known, SINGLE


def _plain(value: Any) -> Any:
    """A value of numpy as Python's, a tuple or array as a list."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _parts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _missing(value: Any, problem_type: str | None) -> bool:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    # Several classes may be none at all.
    return isinstance(value, str) and not value.strip() and problem_type != MULTI


def _refuse(rows: list[int], row: Callable[[int], str], message: str) -> None:
    if rows:
        count = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
        raise InputError(
            message.replace("{count}", count).replace("{names}", some(map(row, rows), _SHOWN))
        )


def _as_number(value: Any) -> int | float | None:
    """A number, or a text that is one; a bool is 0 or 1. None for anything else."""
    if isinstance(value, Real):
        return int(value) if isinstance(value, (bool, int)) else float(value)
    if not isinstance(value, str):
        return None
    text = value.strip()
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        # "1_000" is a name, and so are "nan" and "infinity".
        return number if "_" not in text and math.isfinite(number) else None
    return None


def _problem_type(values: list[Any]) -> str:
    if any(isinstance(value, list) for value in values):
        parts = [part for value in values if isinstance(value, list) for part in value]
        return REGRESSION if any(isinstance(part, float) for part in parts) else MULTI
    numbers = [_as_number(value) for value in values]
    if all(number is not None for number in numbers):
        return REGRESSION if any(isinstance(number, float) for number in numbers) else SINGLE
    texts = [value for value in values if isinstance(value, str)]
    return MULTI if any(mark in text for text in texts for mark in SEPARATORS[:2]) else SINGLE


def _split(values: list[Any]) -> list[list[Any]]:
    texts = [value for value in values if isinstance(value, str)]
    mark = next((mark for mark in SEPARATORS if any(mark in text for text in texts)), None)

    def parts(value: Any) -> list[Any]:
        if isinstance(value, list):
            return value
        if not isinstance(value, str):
            return [value]
        found = value.split(mark) if mark else [value]
        return [part.strip() for part in found if part.strip()]

    return [parts(value) for value in values]


def _numbers(values: list[Any], where: str, row: Callable[[int], str]) -> np.ndarray:
    lists = [_parts(value) for value in values]
    numbers = [[_as_number(part) for part in value] for value in lists]
    _refuse(
        [
            i
            for i, value in enumerate(numbers)
            if any(part is None or not abs(part) <= _LARGEST for part in value)
        ],
        row,
        f"{where}: {{count}} whose label is no finite number ({{names}}); wanted numbers for "
        "regression.",
    )
    _refuse(
        [i for i, value in enumerate(numbers) if len(value) != len(numbers[0])],
        row,
        f"{where}: {{count}} with another number of values than the first row ({{names}}); wanted "
        f"{len(numbers[0])} in every row.",
    )
    labels = np.array(numbers, np.float32)
    return labels if any(isinstance(value, list) for value in values) else labels[:, 0]


def _names(
    lists: list[list[Any]],
    where: str,
    row: Callable[[int], str],
    classes: Sequence[str] | None,
    declared: Sequence[str] | None,
) -> tuple[list[list[str]], tuple[str, ...]]:
    """The class names of each image, and all classes in order."""
    numbers = [[_as_number(part) for part in value] for value in lists]
    _refuse(
        [i for i, value in enumerate(numbers) if any(n is not None and n % 1 for n in value)],
        row,
        f"{where}: {{count}} whose label is a fraction ({{names}}); wanted the name or the index "
        "of a class, or `problem_type` regression.",
    )
    if any(number is None for value in numbers for number in value):  # some are names, so all are
        found = [[class_name(str(part).strip()) for part in value] for value in lists]
        present = sorted({name for value in found for name in value})
        check_alike(where, present)
        return found, check_classes(where, present, declared if classes is None else classes)
    indices = [[int(number or 0) for number in value] for value in numbers]
    _refuse(
        [i for i, value in enumerate(indices) if any(index < 0 for index in value)],
        row,
        f"{where}: {{count}} with a negative label ({{names}}); wanted class indices from 0. "
        "Remove images that have no label.",
    )
    present = [str(index) for index in sorted({index for value in indices for index in value})]
    names = declared if declared is not None else classes
    if names is None or (declared is None and set(present) <= set(map(str, names))):
        found = [[str(index) for index in value] for value in indices]
        return found, check_classes(where, present, classes)
    _refuse(
        [i for i, value in enumerate(indices) if any(index >= len(names) for index in value)],
        row,
        f"{where}: {{count}} whose label is out of range ({{names}}); wanted class indices from 0 "
        f"to {len(names) - 1} for {len(names)} classes.",
    )
    found = [[class_name(str(names[index])) for index in value] for value in indices]
    present = list(dict.fromkeys(name for value in found for name in value))
    return found, check_classes(where, present, names if classes is None else classes)
