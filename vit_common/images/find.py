"""Names and folders given to a command -> names of image files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from vit_common.files.texts import reason
from vit_common.images import kinds


def find_images(
    names: Iterable[str],
    report: Callable[[str], None],
    note: Callable[[str], None] | None = None,
) -> Iterator[str]:
    """The image files that the names stand for, in order.

    A folder stands for the image files in it at any depth, sorted by name, folder by folder;
    links to folders are not followed. Where the suffix does not say whether a file is an image,
    its first bytes do. What desktops leave in folders (`._a.png`, `__MACOSX`, `Thumbs.db`) is no
    image. Anything else stands for itself.

    Args:
        names: files and folders.
        report: called with a line about each folder that has no images or cannot be read.
        note: called with a line about the files of a folder that were left out; texts and hidden
            files are not mentioned.
    """
    for name in names:
        if not os.path.isdir(name):
            yield name
            continue
        faults: list[str] = []
        left_out: Counter[str] = Counter()
        found = False
        for path in _walk(name, faults.append, left_out):
            found = True
            yield path
        for fault in faults:
            report(fault)
        if not found and not faults:
            looked = " ".join(sorted(kinds.EXTENSIONS))
            also = f"; {_others(left_out)}" if left_out else ""
            report(f"{name}: no images in this folder; looked for {looked}{also}.")
        elif left_out and note is not None:
            note(f"{name}: {_others(left_out)}")


def _others(left_out: Counter[str]) -> str:
    """Such as "2 files of other kinds left out (.heic 1, no suffix 1)"."""
    count = sum(left_out.values())
    files = "1 file of another kind" if count == 1 else f"{count} files of other kinds"
    most = sorted(left_out.items(), key=lambda item: (-item[1], not item[0], item[0]))
    shown = [f"{suffix or 'no suffix'} {number}" for suffix, number in most[:8]]
    if len(most) > len(shown):
        shown.append(f"others {count - sum(number for _, number in most[:8])}")
    hint = ""
    if any(suffix in kinds.HEIF for suffix in left_out) and not kinds.can_read_heif():
        hint = "; HEIC photos need pillow-heif (pip install pillow-heif)"
    return f"{files} left out ({', '.join(shown)}){hint}"


def _walk(folder: str, report: Callable[[str], None], left_out: Counter[str]) -> Iterator[str]:
    pending = [(folder, False)]  # a stack, as folders can be nested deeper than Python's calls
    while pending:
        path, hidden = pending.pop()
        try:
            with os.scandir(path) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            report(f"{path}: this folder cannot be read ({reason(error)}).")
            continue
        folders = []
        for entry in entries:
            if kinds.is_dropping(entry.name):
                continue
            quiet = hidden or entry.name.startswith(".")
            if _is_image(entry, quiet, left_out):
                yield entry.path
            elif _is_folder(entry):
                folders.append((entry.path, quiet))
        pending.extend(reversed(folders))


def _is_image(entry: os.DirEntry[str], quiet: bool, left_out: Counter[str]) -> bool:
    """Whether an entry is an image; one that is a file of another kind is counted, unless it is
    hidden."""
    suffix = os.path.splitext(entry.name)[1].lower()
    known = suffix in kinds.EXTENSIONS or (suffix in kinds.HEIF and kinds.can_read_heif())
    # What leads nowhere, or cannot be looked at, counts too: it was meant to be an image, and
    # reading it says what is wrong.
    try:
        if not entry.is_file():
            return known and entry.is_symlink() and not os.path.exists(entry.path)
    except OSError:
        return known
    if known:
        return not (entry.name.startswith("._") and _is_apple_double(entry))
    if quiet or suffix in kinds.BESIDE:
        return False
    if kinds.by_content(suffix) and kinds.is_image(_head(entry)):
        return True
    left_out[suffix] += 1
    return False


def _is_apple_double(entry: os.DirEntry[str]) -> bool:
    return kinds.is_apple_double(entry.name, _head(entry))


def _head(entry: os.DirEntry[str]) -> bytes:
    """The first bytes of a file; none where it cannot be read."""
    try:
        with open(entry.path, "rb", buffering=0) as stream:
            return stream.read(kinds.HEAD)
    except OSError:
        return b""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:  # so does reading it
        return True
