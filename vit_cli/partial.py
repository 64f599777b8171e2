"""What output files that grow row by row have in common: rows are JSON lines in a partial file,
which one process writes at a time and which a later run can go on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_common.errors import ExistingFileError, InputError, MissingFileError

try:
    import fcntl
except ImportError:  # no Unix
    fcntl = None  # type: ignore[assignment]


def check_output(path: str, suffixes: Sequence[str], instead: str) -> None:
    """Refuse a name whose suffix is no format, or one whose package is missing.

    Args:
        path: the file.
        suffixes: of the formats there are.
        instead: the suffix to write where pyarrow is missing.

    Raises:
        InputError: no such format, or parquet without pyarrow.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes:
        raise InputError(f"--output must end in {', '.join(suffixes)}; given {path!r}.")
    if suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise InputError(
                f'parquet needs pyarrow; run: pip install "vit-flax[parquet]", or write {instead}'
            ) from error


def check_begin(path: str, left: Sequence[Path], *, resume: bool, force: bool) -> None:
    """See that an output can be begun, or gone on with.

    Args:
        path: the file.
        left: partial files of it that are there.
        resume, force: what the user allows.

    Raises:
        ExistingFileError: the file is there, or a partial one.
    """
    if Path(path).exists() and not force:
        raise ExistingFileError(f"{path}: already there, and whole; pass --force to do it again.")
    if left and not (resume or force):
        raise ExistingFileError(
            f"{left[0]}: left by a run that did not end; pass --resume to go on, or --force to "
            "begin anew."
        )


def lock(stream: Any, path: Path, hint: str = "") -> None:
    """Keep other processes out until the file is closed, or this process ends.

    Raises:
        MissingFileError: one is at it; `hint` is put behind what is said of that.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise MissingFileError(
            f"{path}: another process is writing this; end it first, or name another "
            f"--output.{hint}"
        ) from error
    except OSError:  # a file system without locks
        pass


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line that was written to its end, or None."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def utf8(text: str) -> str:
    """Text that UTF-8 can hold; bytes that are none are escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
