"""What output files that grow row by row have in common: rows are JSON lines in a partial file,
which one process writes at a time and which a later run can go on with."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from vit_cli.terminal import interrupt
from vit_cli.terminal.messages import say
from vit_common.checks import differences
from vit_common.errors import ExistingFileError, InputError, MissingFileError, ViTError, shown, some
from vit_common.files.replace import check_target
from vit_common.files.texts import reason

try:
    import fcntl
except ImportError:  # no Unix
    fcntl = None  # type: ignore[assignment]

KEPT = "What was done is kept; --resume goes on from there."


def check_output(path: str, suffixes: Sequence[str], instead: str) -> None:
    """Refuse a name that no file can have, or whose suffix is no format, or one whose package is
    missing.

    Args:
        path: the file.
        suffixes: of the formats there are.
        instead: the suffix to write where pyarrow is missing.

    Raises:
        InputError: no such format, or parquet without pyarrow.
        MissingFileError: it is a directory, or has none to be in.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes:
        raise InputError(f"--output must end in {', '.join(suffixes)}; given {path!r}.")
    if suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"parquet needs pyarrow; run: pip install pyarrow, or write {instead}"
            ) from error
    check_target(Path(path), force=True)


def is_whole(path: str) -> bool:
    """Whether the file is there, without rows beside it that a run may go on with."""
    partial = Path(f"{path}.partial")
    return Path(path).exists() and not (partial.exists() and partial.stat().st_size)


def check_free(path: str) -> None:
    """See that no other process writes the file.

    Raises:
        MissingFileError: one does.
    """
    partial = Path(f"{path}.partial")
    # To write, although nothing is: NFS gives no lock otherwise.
    with told(partial), contextlib.suppress(FileNotFoundError), open(partial, "r+b") as stream:
        lock(stream, partial)


def check_begin(path: str, partial: Path, *, resume: bool, force: bool) -> None:
    """Refuse an output that must not be begun or continued; the caller holds its lock.

    Args:
        path: the file.
        partial: its partial file, which is there; without rows it counts as none.
        resume, force: what the user allows.

    Raises:
        ExistingFileError: the file is there, or a partial one.
    """
    if force:
        return
    rows = partial.stat().st_size > 0
    if rows and not resume:
        raise ExistingFileError(
            f"{partial}: left by a run that did not end; pass --resume to go on, or --force to "
            "begin anew."
        )
    if is_whole(path):  # with rows, --force was passed when they were begun
        raise ExistingFileError(f"{path}: already there, and whole; pass --force to do it again.")


_LISTED = 12  # settings named in a message; the rest are counted


def check_run(path: Path, made: Mapping[str, Any], run: Mapping[str, Any], what: str) -> None:
    """Refuse to go on with what was made otherwise.

    Args:
        path: the partial file.
        made: what that was made with.
        run: what it would go on with.
        what: is in it: "rows".

    Raises:
        InputError: it was made otherwise.
    """
    odd = [
        f"{shown(name)[1:-1]} {_shown(old)}, now {_shown(new)}"
        for name, old, new in differences(made, run)
    ]
    if odd:
        raise InputError(
            f"{path}: its {what} were made with {some(odd, _LISTED, '; ')}. Run it as it "
            "was, or pass --force to begin anew."
        )


def _shown(value: Any) -> str:
    return "not given" if value is None else shown(value)


class PartialFile:
    """A file to append to, which a later run can go on with.

    Args:
        path: the file; it is made if it is not there.
        header: what an empty one begins with; it is written with the first bytes, so that a file
            that is not empty holds something to go on with.
        alone: keep other processes out until it is closed, or this process ends.

    Raises:
        MissingFileError: it cannot be written, or another process is at it.
    """

    def __init__(self, path: Path, *, header: bytes = b"", alone: bool = True) -> None:
        self.path = path
        self._header = header
        self._owed = header
        while True:
            with told(path):
                # To append, whatever becomes of what is there: another process may be at it.
                self._stream = open(path, "ab")  # noqa: SIM115  # until `close`
            try:
                if alone:
                    lock(self._stream, path)
            except BaseException:
                self._stream.close()
                raise
            if self._has_name():
                return
            self._stream.close()  # deleted by who had it, before this process had the lock

    def _has_name(self) -> bool:
        """Whether the file of that name is still this one."""
        try:
            return os.path.samestat(os.fstat(self._stream.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def cut(self, end: int) -> None:
        """Keep the first `end` bytes of what was there."""
        with told(self.path):
            self._stream.truncate(end)
        self._owed = b"" if end else self._header

    def write(self, data: Any) -> None:
        """Append bytes, or what has a buffer of them."""
        with told(self.path, then=f" {KEPT}"):
            if self._owed:
                self._stream.write(self._owed)
                self._owed = b""
            self._stream.write(data)

    def flush(self) -> None:
        """Hand it to the system; it survives the end of this process."""
        with told(self.path, then=f" {KEPT}"):
            self._stream.flush()

    def sync(self) -> None:
        """Hand it to the disk."""
        with told(self.path, then=f" {KEPT}"):
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Let others have it; an empty one is deleted."""
        if self._stream.closed:
            return
        with told(self.path, then=f" {KEPT}"):
            try:
                self._stream.flush()
                if not os.fstat(self._stream.fileno()).st_size:
                    self._delete()
            finally:
                self._stream.close()

    def discard(self) -> None:
        """Delete it."""
        with told(self.path, "deleted"):
            try:
                self._delete()
            finally:
                self._stream.close()

    def _delete(self) -> None:
        if self._has_name():  # not what another process has begun under this name since
            if fcntl is None:  # Windows deletes no file that is open
                self._stream.close()
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def told(path: Path, what: str = "written", then: str = "") -> Iterator[None]:
    """Errors of the system in the block name the file, and end in `then`.

    Raises:
        MissingFileError: there was one.
    """
    try:
        yield
    except ViTError:  # says its own piece
        raise
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be {what} ({reason(error)}).{then}") from error


@contextlib.contextmanager
def made_of(path: Path) -> Iterator[None]:
    """In the block the output is made of its rows; who is told that it was not, by an error or
    after a Ctrl-C, is told that they are kept.

    Raises:
        MissingFileError: it cannot be written.
        KeyboardInterrupt: it was interrupted; that is said.
    """
    try:
        with interrupt.raises():
            yield
    except MissingFileError as error:
        raise MissingFileError(
            f"{error} What was done is in {path}; --resume makes the file of it."
        ) from error
    except KeyboardInterrupt:
        say(f"interrupted: what was done is in {path}; --resume makes the file of it")
        raise


def lock(stream: Any, path: Path) -> None:
    """Keep other processes out until the file is closed, or this process ends.

    Raises:
        MissingFileError: one is at it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise MissingFileError(
            f"{path}: another process is writing this; end it first, or name another --output."
        ) from error
    except OSError:  # a file system without locks
        pass


def json_line(row: Mapping[str, Any]) -> bytes:
    """A row as `parse_line` takes it."""
    return json.dumps(row).encode() + b"\n"


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The row of a line, or None if it is not byte for byte what `json_line` writes."""
    try:
        row = json.loads(line)
        return row if isinstance(row, dict) and json_line(row) == line else None
    except (ValueError, RecursionError):
        return None


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last of fewer."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


def utf8(text: str) -> str:
    """Text that UTF-8 can hold; bytes that are none are escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
