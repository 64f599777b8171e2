"""JSON that is read: bounded, one object, and named where it is wrong."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from vit_common.errors import CheckpointError, MissingFileError, shown

MAX_JSON_BYTES = 100_000_000
"""Longest JSON text that is read: the bound safetensors sets for its header."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of the stand-in that `git clone` leaves where git-lfs is not installed."""
_WEB_PAGE = (b"<!doctype html", b"<html")


_LONGEST = 600
"""Characters of a message: a file can have names and values of any length."""


def cut(text: str) -> str:
    """A message as it is, or without its middle where it is long."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 150]} [...] {text[-150:]}"


def reason(error: BaseException) -> str:
    """What went wrong, as a few words on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return cut(" ".join(str(text).split()))


def lfs_pointer(path: Path) -> CheckpointError:
    """The refusal of a git-lfs pointer that stands where a file should be."""
    return CheckpointError(
        f"{path}: this is a git-lfs pointer, not the file it stands for; run `git lfs pull` in "
        "that folder, or download the file itself."
    )


def not_the_file(head: bytes, path: Path, wanted: str) -> CheckpointError | None:
    """The refusal of what often stands where a file should be: a git-lfs pointer, or a web page
    that was saved instead. None for anything else.

    Args:
        head: the first bytes of the file.
        path: the file.
        wanted: what it should be, in the error: "a weights file".
    """
    if head.startswith(LFS_POINTER):
        return lfs_pointer(path)
    if head[:64].lstrip().lower().startswith(_WEB_PAGE):
        return CheckpointError(
            f"{path}: not {wanted}: this is a web page (HTML). Download the file itself; on the "
            "Hub, its link has `resolve` in it, not `blob`."
        )
    return None


def parse_json(data: bytes, path: Path, what: str = "JSON", *, unique: bool = False) -> dict:
    """The JSON object in `data`; with `unique`, a key given twice is refused.

    Raises:
        CheckpointError: not UTF-8, not JSON, or not an object; names `path` and the line.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(items)
        if unique and len(table) < len(items):
            twice = Counter(key for key, _ in items).most_common(1)[0][0]
            raise CheckpointError(
                f"{path}: {what} has the key {shown(twice)} twice; wanted it once."
            )
        return table

    if (other := not_the_file(data[:64], path, f"valid {what}")) is not None:
        raise other
    try:
        table = json.loads(data.decode("utf-8-sig"), object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path}: not valid {what}: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CheckpointError(f"{path}: not valid {what}: not UTF-8 at line {line}.") from error
    except CheckpointError:
        raise
    except RecursionError as error:
        raise CheckpointError(
            f"{path}: not valid {what}: a value must be nested at most 100 levels deep; this one "
            "has many more."
        ) from error
    except ValueError as error:  # a number without end
        raise CheckpointError(f"{path}: not valid {what}: {reason(error)}.") from error
    if not isinstance(table, dict):
        raise CheckpointError(
            f"{path}: {what} must be an object {{...}}; given a {type(table).__name__}."
        )
    # Half of a surrogate pair is no character: no file can be named so, nor text be written.
    if b"\\ud" in data or b"\\uD" in data:
        try:
            json.dumps(table, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: not valid {what}: a text in it holds half of a surrogate pair."
            ) from error
    return table


def read_json(path: str | os.PathLike, *, unique: bool = False) -> dict[str, Any]:
    """Read a file that holds one JSON object; with `unique`, refuse a key given twice.

    Raises:
        MissingFileError: it cannot be read.
        CheckpointError: it is not JSON, not an object, or a git-lfs pointer or a web page.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read ({reason(error)}).") from error
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: larger than any JSON file read here (100 MB).")
    return parse_json(data, path, unique=unique)
