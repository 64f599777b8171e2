"""A folder that changes in one step: readers see all old files or all new ones.

The new folder is made beside the old one, out of hard links, and the two exchange their names:
`renameat2` with RENAME_EXCHANGE on Linux, `renamex_np` with RENAME_SWAP on macOS.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from vit_common.files.staging import delete_leftovers, take_lock

_AT_FDCWD = -100
_RENAME_EXCHANGE = _RENAME_SWAP = 2

# What says that a system or a file system cannot do it.
_CANNOT = (OSError, NotImplementedError, AttributeError)


def change_folder(
    directory: Path, files: Iterable[tuple[Path, str]], leave_out: Iterable[str]
) -> bool:
    """Give a folder further files, and take some from it, in one step.

    What else is in the folder stays in it, also what comes while this runs. The folder becomes
    another one (another inode) of the same name, owner and permissions.

    Args:
        directory: the folder.
        files: (path, name) of each new file: where it is, on the same disk and flushed, and what
            it is to be called. It stays where it is too, unless `leave_out` names that.
        leave_out: names in the folder that it is not to have any more.

    Returns:
        Whether it was done; if not, nothing was. It is not where the system has no such step, the
        file system no hard links, the folder above cannot be written, or this process works in
        the folder.
    """
    directory = directory.resolve()
    with contextlib.suppress(OSError):  # a process in a folder would stay in the old one
        if Path.cwd().is_relative_to(directory):
            return False
    files = list(files)
    gone = {*leave_out, *(name for _, name in files)}
    delete_leftovers(directory.parent, [directory.name])
    other = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.tmp")
    with contextlib.ExitStack() as locks:
        try:
            other.mkdir()
            # So that nobody takes it for a leftover. Of the folder itself, which has that name once
            # it is replaced, the caller has the `turn`.
            descriptor = os.open(other, os.O_RDONLY)
            locks.callback(os.close, descriptor)
            take_lock(descriptor)
        except _CANNOT:
            with contextlib.suppress(OSError):
                other.rmdir()
            return False
        return _change(directory, other, files, gone)


def _change(directory: Path, other: Path, files: list[tuple[Path, str]], gone: set[str]) -> bool:
    try:
        _link_all(directory, other, gone)
        for path, name in files:
            os.link(path, other / name, follow_symlinks=False)
        os.utime(other)
        flush_directory(other)
        exchange(other, directory)
    except _CANNOT:
        shutil.rmtree(other, ignore_errors=True)
        return False
    except BaseException:
        shutil.rmtree(other, ignore_errors=True)
        raise
    flush_directory(directory.parent)
    with contextlib.suppress(OSError):
        _move_late(other, directory, gone)
        shutil.rmtree(other, ignore_errors=True)
    return True


def exchange(a: Path, b: Path) -> None:
    """Exchange the names of two files or folders in one step.

    Raises:
        OSError, AttributeError: the system or the file system cannot.
    """
    if os.name != "posix":
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(a), os.fsencode(b)
    if sys.platform == "darwin":
        failed = library.renamex_np(*names, ctypes.c_uint(_RENAME_SWAP))
    else:
        here = ctypes.c_int(_AT_FDCWD)
        failed = library.renameat2(here, names[0], here, names[1], ctypes.c_uint(_RENAME_EXCHANGE))
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(a), None, str(b))


def flush_directory(directory: Path) -> None:
    """Flush the names in a directory, which a power cut could lose, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _link_all(source: Path, target: Path, leave_out: Iterable[str] = ()) -> None:
    """Fill an empty folder with links to all that is in another one; owner and mode too."""
    for entry in os.scandir(source):
        if entry.name in leave_out:
            continue
        if entry.is_dir(follow_symlinks=False):
            (target / entry.name).mkdir()
            _link_all(source / entry.name, target / entry.name)
            flush_directory(target / entry.name)
        else:
            os.link(entry.path, target / entry.name, follow_symlinks=False)
    wanted, given = source.stat(), target.stat()
    if (wanted.st_uid, wanted.st_gid) != (given.st_uid, given.st_gid):
        os.chown(target, wanted.st_uid, wanted.st_gid)
    shutil.copystat(source, target)


def _move_late(source: Path, target: Path, leave_out: Iterable[str] = ()) -> None:
    """Move what came into a folder, or was replaced in it, after it was linked."""
    for entry in list(os.scandir(source)):
        moved = target / entry.name
        if entry.name in leave_out:
            continue
        if entry.is_dir(follow_symlinks=False) and moved.is_dir():
            _move_late(source / entry.name, moved)
        elif not os.path.lexists(moved) or entry.inode() != moved.lstat().st_ino:
            os.replace(entry.path, moved)
