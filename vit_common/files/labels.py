"""Files of class names, in the ways that they are written down."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_common.errors import InputError, MissingFileError
from vit_common.files.texts import reason

_PLACE = "{}"
_WORDNET = re.compile(r"n\d{8}")


def read_labels(path: str | os.PathLike) -> list[str]:
    """Names of classes, in their order.

    The file holds one name per line; or JSON: a list of names, an object of index to name (also
    with Keras's pairs, `{"0": ["n01440764", "tench"]}`), or an object of name to index. UTF-8, with
    or without a byte order mark, or UTF-16 with one.

    Raises:
        MissingFileError: it cannot be read.
        InputError: it does not hold names of classes; the message says where.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("labels.txt").write_text("cat\\ndog\\n")
        >>> read_labels("labels.txt")
        ['cat', 'dog']
    """
    name = os.fsdecode(path)
    try:
        text = _decoded(Path(name).read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise MissingFileError(f"{name}: cannot be read ({reason(error)}).") from error
    is_json = name.lower().endswith(".json")
    if is_json or text.lstrip().startswith(("{", "[")):
        try:
            return _from_json(json.loads(text), name)
        except (ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            if is_json:
                raise _wanted(name) from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").rstrip().split("\n")
    return _checked([line.strip() for line in lines], name, "line")


def texts_of(labels: Any, template: Any = _PLACE, *, least: int = 1) -> tuple[list[str], list[str]]:
    """Labels to choose among, and the same in a template, as a text tower reads them.

    Args:
        labels: texts, or the name of a file that `read_labels` takes.
        template: what each is put into, at its `{}`.
        least: how many there must be, 1 or 2.

    Raises:
        MissingFileError: the file cannot be read.
        InputError: fewer labels, one that is empty, one twice; or no template.

    Example:
        >>> texts_of(["cat", "dog"], "a photo of a {}")
        (['cat', 'dog'], ['a photo of a cat', 'a photo of a dog'])
    """
    if isinstance(labels, (str, os.PathLike)):
        labels = read_labels(labels)
    if not isinstance(labels, Sequence) or not all(isinstance(each, str) for each in labels):
        raise InputError(f"`labels` must be a list of texts; given {labels!r}.")
    labels = [each.strip() for each in labels]
    if "" in labels:
        raise InputError(
            f"`labels`: label {labels.index('') + 1} of {len(labels)} is empty; every class needs "
            "a name."
        )
    if not labels:
        raise InputError("`labels` must hold texts to choose among; given none.")
    if len(labels) < least:
        raise InputError(
            "`labels` must hold at least two texts, as this model's probabilities are shared out "
            f"among them; given {labels[0]!r}."
        )
    seen: set[str] = set()
    for each in labels:
        if each in seen:
            raise InputError(f"`labels` must hold each text once; given {each!r} twice.")
        seen.add(each)
    if not isinstance(template, str) or template.count(_PLACE) != 1:
        raise InputError(
            "`template` must be a text with one {} in it, where the label goes, such as 'a photo "
            f"of a {{}}'; given {template!r}."
        )
    return labels, [template.replace(_PLACE, each) for each in labels]


def _decoded(data: bytes) -> str:
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if utf16 else "utf-8-sig")


def _wanted(name: str) -> InputError:
    return InputError(
        f"{name}: must hold a JSON list of labels, or an object of index to label without gaps."
    )


def _from_json(table: Any, name: str) -> list[str]:
    if isinstance(table, Mapping):
        table = _in_order(table, name)
    if not isinstance(table, list):
        raise _wanted(name)
    return _checked([_label(value, name, i) for i, value in enumerate(table)], name, "label")


def _in_order(table: Mapping[str, Any], name: str) -> list[Any]:
    """The values of an object of index to label, or the keys of one of label to index."""
    try:
        numbered = {int(key): value for key, value in table.items()}
    except ValueError:
        if not all(type(value) is int for value in table.values()):
            raise _wanted(name) from None
        numbered = {index: label for label, index in table.items()}
    if len(numbered) != len(table) or sorted(numbered) != list(range(len(numbered))):
        raise _wanted(name)
    return [numbered[i] for i in range(len(numbered))]


def _label(value: Any, name: str, index: int) -> str:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value):
        if _WORDNET.fullmatch(value[0]):
            return value[1]
    elif isinstance(value, (str, int, float)):
        return str(value)
    raise InputError(
        f"{name}: label {index} must be a text, or a pair of WordNet ID and text; given "
        f"{json.dumps(value)[:60]}."
    )


def _checked(labels: list[str], name: str, what: str) -> list[str]:
    """The labels, if none is empty."""
    empty = [i for i, label in enumerate(labels) if not label.strip()]
    if empty:
        number = empty[0] + (what == "line")
        raise InputError(f"{name}: {what} {number} is empty; every class needs a name.")
    return labels
