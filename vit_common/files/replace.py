"""The one way files are written: whole, or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from vit_common.errors import ExistingFileError, MissingFileError, ViTError
from vit_common.files.folders import change_folder, flush_directory
from vit_common.files.staging import delete_leftovers, stage, staged_files, turn
from vit_common.files.texts import reason


def make_directory(path: str | os.PathLike) -> Path:
    """Make a directory and its parents where they are not there yet.

    Raises:
        MissingFileError: something else has that name, or it cannot be made or written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise MissingFileError(f"{path}: wanted a directory; a file has that name.") from error
    except (OSError, ValueError) as error:
        raise MissingFileError(f"{path}: cannot be made a directory ({reason(error)}).") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise MissingFileError(f"{path}: this directory cannot be written (permission denied).")
    return path


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8; the file that was there survives a failure.

    Raises:
        MissingFileError: it cannot be written.
    """
    path = Path(path)
    replace_files(path.parent, {path.name: lambda stream: stream.write(text.encode())})


def replace_files(
    directory: Path,
    contents: Mapping[str, Callable[[BinaryIO], object]],
    stale: Iterable[str] = (),
) -> list[Path]:
    """Write a set of files so that either all of them are new or all are as they were.

    Every file is written in a hidden folder beside its target and flushed to the disk; only
    then do they all get their names, in one step where `change_folder` can do that, else one after
    the other (who is killed there leaves some new and some old), and then the `stale` ones are
    deleted. Permissions are those that the umask gives any new file.

    Args:
        directory: where the files go; must exist.
        contents: file name -> a function that writes its bytes to the stream it is given.
        stale: names of files that the new ones make obsolete; they need not exist.

    Raises:
        MissingFileError: a file cannot be written; nothing was replaced.
    """
    staged: list[tuple[Path, Path]] = []
    stale = [*stale]
    final = directory / next(iter(contents), "")
    try:
        with stage(directory, *_staged_as(directory, [*contents])) as staging:
            for name, write in contents.items():
                final = directory / name
                if final.is_dir():
                    raise IsADirectoryError("a directory has that name")
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
                with turn(directory):
                    descriptor = os.open(staging / name, flags, 0o666)
                staged.append((staging / name, final))
                with open(descriptor, "wb") as stream:
                    write(stream)
                    stream.flush()
                    os.fsync(stream.fileno())
            stale = _publish(directory, staged, stale)
    except ViTError:  # from reading what was to be written; says its own piece
        raise
    except OSError as error:
        kept = "the file that was there is kept" if final.exists() else "nothing was written"
        raise MissingFileError(f"{final}: cannot be written ({reason(error)}); {kept}.") from error
    for name in stale:
        try:
            (directory / name).unlink(missing_ok=True)
        except OSError as error:
            raise MissingFileError(
                f"{directory / name}: this file of an earlier save cannot be deleted "
                f"({reason(error)}); delete it, or it may be read instead of the new one."
            ) from error
    flush_directory(directory)
    return [final for _, final in staged]


def _staged_as(directory: Path, names: list[str]) -> tuple[str, list[str]]:
    """The name that these files are staged under, and others that leftovers of theirs may have."""
    folder = directory.resolve().name
    return (names[0] if len(names) == 1 or not folder else folder), [*names, folder]


def delete_strays(target: Path) -> None:
    """Delete the temporary files that `replace_files` left beside a file when it was killed.

    Only for callers who know that no other process is writing the file.
    """
    delete_leftovers(target.parent, [target.name], alone=True)


def check_target(target: Path, *, force: bool) -> None:
    """Refuse a file that cannot be written, before the work that it is for.

    Raises:
        ExistingFileError: it is there and `force` is not set.
        MissingFileError: it is a directory, or has none to be in.
    """
    if target.is_dir():
        raise MissingFileError(f"{target}: wanted the name of a file; this is a directory.")
    if target.exists() and not force:
        raise ExistingFileError(
            f"{target}: already there; nothing was written. Pass --force (in Python `force=True`) "
            "to overwrite."
        )
    if not target.parent.is_dir():
        raise MissingFileError(f"{target.parent}: no such directory; make it first.")


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A place for a file to be written to, and looked at, before it takes its name.

    It is in a folder of its own beside the target. Where the block raises, nothing is left and what
    had the name keeps it. What a killed process leaves, the next one deletes.

    Raises:
        MissingFileError: it cannot be written.
    """
    try:
        with stage(target.parent, target.name) as staging:
            yield staging / target.name
            with (staging / target.name).open("rb+") as stream:
                os.fsync(stream.fileno())
            for other in staged_files(staging):
                if other.name != target.name:
                    other.unlink()
            move_files(staging, target.parent)
    except OSError as error:
        if isinstance(error, ViTError):
            raise
        raise MissingFileError(f"{target}: cannot be written ({reason(error)}).") from error


def move_files(source: Path, directory: Path, stale: Iterable[str] = ()) -> list[Path]:
    """Move the files of a folder into the one it is in: all of them or none, as `replace_files`.

    Args:
        source: the folder, without folders in it; its files are already flushed to the disk.
        directory: where they go: the folder it is in.
        stale: names of files there that the new ones make obsolete; they need not exist.

    Raises:
        MissingFileError: a file cannot be moved; nothing was replaced.
    """
    staged = [(file, directory / file.name) for file in staged_files(source)]
    try:
        for name in _publish(directory, staged, [*stale]):
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise MissingFileError(f"{directory}: cannot be written ({reason(error)}).") from error
    flush_directory(directory)
    return [final for _, final in staged]


def _publish(directory: Path, staged: list[tuple[Path, Path]], stale: list[str]) -> list[str]:
    """Give every temporary file its name, and the `stale` ones that are left to be deleted."""
    with turn(directory):
        return _publish_now(directory, staged, stale)


def _publish_now(directory: Path, staged: list[tuple[Path, Path]], stale: list[str]) -> list[str]:
    if len(staged) == 1 and not stale:
        os.replace(*staged[0])  # atomic by itself
        return []
    temporary = {path.relative_to(directory).parts[0] for path, _ in staged}
    files = [(path, final.name) for path, final in staged]
    if change_folder(directory, files, {*temporary, *stale}):
        return []
    _rename_all(staged)
    return stale


def _rename_all(staged: list[tuple[Path, Path]]) -> None:
    """Give every temporary file its name; should one fail, put back what was there."""
    done: list[tuple[Path, Path, bool]] = []
    try:
        for temporary, final in staged:
            old = temporary.with_name(f"{final.name}.old")
            existed = os.path.lexists(final)
            if existed and len(staged) > 1:  # one rename alone is atomic
                # Not every file system has hard links; without them there is no way back.
                with contextlib.suppress(OSError, NotImplementedError):
                    os.link(final, old, follow_symlinks=False)
            os.replace(temporary, final)
            done.append((final, old, existed))
    except BaseException:
        for final, old, existed in done:
            if not existed:
                final.unlink()
            elif os.path.lexists(old):
                os.replace(old, final)
        raise
