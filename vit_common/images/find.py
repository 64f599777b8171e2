"""Names and folders given to a command -> names of image files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

from vit_common.files.texts import reason

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
_NETPBM = (".ppm", ".pgm", ".pbm", ".pnm")
_OTHERS = (
    ".png",
    ".webp",
    ".avif",
    ".gif",
    ".bmp",
    ".dib",
    ".tif",
    ".tiff",
    ".jp2",
    ".j2k",
    ".tga",
)
EXTENSIONS = frozenset((*_JPEG, *_NETPBM, *_OTHERS))
"""What counts as an image file in a folder. A file that is named is always tried."""


def find_images(names: Iterable[str], report: Callable[[str], None]) -> Iterator[str]:
    """The image files that the names stand for, in order.

    A folder stands for the image files in it at any depth, sorted by name, folder by folder;
    links to folders are not followed. Anything else stands for itself.

    Args:
        names: files and folders.
        report: told, in a line each, of folders without images and folders that cannot be read.
    """
    for name in names:
        if not os.path.isdir(name):
            yield name
            continue
        faults: list[str] = []
        found = False
        for path in _walk(name, faults.append):
            found = True
            yield path
        for fault in faults:
            report(fault)
        if not found and not faults:
            report(f"{name}: no images in this folder; looked for {' '.join(sorted(EXTENSIONS))}.")


def _walk(folder: str, report: Callable[[str], None]) -> Iterator[str]:
    pending = [folder]  # a stack, as folders can be nested deeper than Python's calls
    while pending:
        path = pending.pop()
        try:
            with os.scandir(path) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            report(f"{path}: this folder cannot be read ({reason(error)}).")
            continue
        folders = []
        for entry in entries:
            if _is_image(entry):
                yield entry.path
            elif _is_folder(entry):
                folders.append(entry.path)
        pending.extend(reversed(folders))


def _is_image(entry: os.DirEntry[str]) -> bool:
    if os.path.splitext(entry.name)[1].lower() not in EXTENSIONS:
        return False
    # What leads nowhere, or cannot be looked at, counts too: it was meant to be an image, and
    # reading it says what is wrong.
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:  # so does reading it
        return True
