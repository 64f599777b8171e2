"""Where files are written before they get their names: a hidden folder beside their target.

The folder is `.{name}.{8 characters}.tmp`, and holds a file `.lock` that its process has locked
until it ends, however it ends. So the next run on the same target can tell a folder that a killed
process left from that of a living one, and deletes the former. The lock is on a file in the folder
and not on the folder: `change_folder` may put another folder with links to the same files in its
place. Where the file system has no locks, as NFS may, nothing is deleted.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # no Unix
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_TRIES = 100
_PATIENCE = 10.0
"""Seconds that others are waited for."""


@contextlib.contextmanager
def stage(directory: Path, name: str, also: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write to, which is gone after the block; before, what killed processes left.

    Args:
        directory: where it is made; must exist.
        name: of the file or folder that is to be written.
        also: other names whose leftovers in `directory` are deleted.

    Raises:
        OSError: the folder cannot be made.
    """
    delete_leftovers(directory, {name, *also})
    with turn(directory):
        path, lock = _make(directory, name)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError), turn(directory):
            _delete(path)
        os.close(lock)


def staged_files(path: Path) -> list[Path]:
    """What was written to such a folder, by name."""
    return [file for file in sorted(path.iterdir()) if file.name != LOCK]


def _make(directory: Path, name: str) -> tuple[Path, int]:
    for _ in range(_TRIES):
        path = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=directory))
        try:
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileNotFoundError:  # taken for a leftover: it was still empty
            continue
        if take_lock(lock) is not False and _is(path / LOCK, lock):
            return path, lock
        os.close(lock)
    raise OSError(f"other processes delete what is written to {directory}")


def take_lock(descriptor: int) -> bool | None:
    """Lock an open file or folder until it is closed: whether that was done; None where there are
    no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def turn(directory: Path) -> Iterator[None]:
    """Wait until nobody else gives files in a folder their names; then keep others from it.

    To do that, `change_folder` puts another folder in its place: what is made or looked up in it
    meanwhile could be missed. After a few seconds, and where there are no locks, the block runs
    all the same.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        descriptor = None
        with contextlib.suppress(OSError):
            descriptor = os.open(directory, os.O_RDONLY)
        if descriptor is None:
            break
        taken = take_lock(descriptor)
        if (taken is not False and _is(directory, descriptor)) or time.monotonic() > end:
            break
        os.close(descriptor)
        time.sleep(0.002)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _is(path: Path, descriptor: int) -> bool:
    """Whether the file of that name is still this one."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def delete_leftovers(directory: Path, names: Iterable[str], *, alone: bool = False) -> None:
    """Delete what processes that are gone left in a folder while they wrote these files.

    Args:
        directory: the folder.
        names: of the files and folders that were to be written.
        alone: no other process writes them; files that nothing tells of may go too.
    """
    names = [re.escape(name) for name in names if name]
    if not names:
        return
    token = r"\.[a-z0-9_]{8}\.(tmp|old)"
    pattern = re.compile(rf"\.+({'|'.join(names)})({token})+")
    with contextlib.suppress(OSError):  # they are in nobody's way
        for path in [Path(directory, n) for n in os.listdir(directory) if pattern.fullmatch(n)]:
            with contextlib.suppress(OSError):
                mode = path.lstat().st_mode
                if stat.S_ISDIR(mode):
                    _delete_unheld(path)
                elif alone and stat.S_ISREG(mode):
                    path.unlink()


def _delete_unheld(path: Path) -> None:
    """Delete a folder if no process holds it."""
    lock = path / LOCK
    try:
        held = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        names = os.listdir(path)
        if not names:
            os.rmdir(path)  # made just now, or its files were deleted and it was not
        if not names or LOCK in names:  # that came just now: its process is alive
            return
        lock = path  # one that `change_folder` makes: it locks the folder itself
        held = os.open(path, os.O_RDONLY)
    try:
        if take_lock(held) and _is(lock, held):
            _delete(path)
    finally:
        os.close(held)


def _delete(path: Path) -> None:
    """Delete a folder, its lock last: until then it can be told from one that is being made."""
    for each in staged_files(path):
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each, ignore_errors=True)
        else:
            each.unlink()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path / LOCK)
    os.rmdir(path)
