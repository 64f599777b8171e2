"""Folders of images: the name of the folder is the class."""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vit_common.datasets.labelled import LabelledImages
from vit_common.datasets.order import limited
from vit_common.errors import InputError, MissingFileError, some, warn
from vit_common.files.texts import reason
from vit_common.images import kinds
from vit_common.images.find import find_images

_SHOWN = 5  # names in a message

PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
"""Part of a data set -> the names that a folder or table of it may have."""


def part_of(name: str) -> str | None:
    """The part ("train", "val", "test") that a folder's name stands for, or None."""
    lower = name.lower()
    return next((part for part, names in PARTS.items() if lower in names), None)


class ImageFolder(LabelledImages):
    """Images in one folder per class: `path/CLASS/*.jpg`, at any depth below the class.

    Classes are in the order of their names, as in torchvision. Hidden files and folders, and what
    desktops leave behind, are left out; links to files are followed, and links to class folders.

    Args:
        path: the folder of class folders.
        classes: class names in the order of the labels. Training gives them to validation, and a
            model to its evaluation, so that both count alike; a class of them may have no folder
            here. None takes those of the folders.
        limit: use this many images only, each class by its share.

    Raises:
        MissingFileError: no such folder.
        InputError: no class folders, no images, a class that `classes` lacks or has no image, or
            names that are easily confused.

    Example:
        >>> train = ImageFolder("photos/train")
        >>> validation = ImageFolder("photos/val", classes=train.classes)
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        classes: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> None:
        root = Path(path)
        folders, loose = entries(root)
        if not folders:
            raise InputError(_no_folders(root, loose))
        if is_split(root):
            raise InputError(
                f"{root}: wanted one folder per class; given the parts of a data set "
                f"({some((folder.name for folder in folders), _SHOWN)}). Open one of them, such as "
                f"{folders[0]}, or all with `open_images`."
            )
        if loose:
            warn(
                f"{root}: {_number(len(loose), 'image')} beside the class folders left out "
                f"({some((os.path.basename(name) for name in loose), _SHOWN)}), as no class is "
                "known for them; move each into the folder of its class."
            )
        for folder in folders:
            if not folder.name.isprintable():
                raise InputError(
                    f"{root}: the name of a class folder must be UTF-8; given {folder.name!r}. "
                    "Rename the folder."
                )
        _check_links(root, folders)
        names = [class_name(folder.name) for folder in folders]
        check_alike(root, names)
        known = check_classes(root, names, classes)
        index = {name: i for i, name in enumerate(known)}
        paths: list[str] = []
        labels: list[int] = []
        empty = []
        left_out: list[str] = []
        for name, folder in zip(names, folders, strict=True):
            found = list(files(folder, left_out.append))
            paths += found
            labels += [index[name]] * len(found)
            if not found:
                empty.append(name)
        if not paths:
            raise InputError(
                f"{root}: no images in its {len(folders)} class folders; looked for "
                f"{' '.join(sorted(kinds.EXTENSIONS))}{_also(left_out)}."
            )
        if empty and classes is None:
            raise InputError(
                f"{root}: no images for {_number(len(empty), 'class')} ({some(empty, _SHOWN)}); "
                "every class needs at least one. Add images or remove the folder"
                f"{_also(left_out)}."
            )
        if left_out:
            warn(f"{root}: not all files are images{_also(left_out)}.")
        if classes is None and len(known) < 2:
            raise InputError(
                f"{root}: wanted at least two classes; given one ({known[0]}). Add a folder for "
                "the images of another class."
            )
        everything = LabelledImages(paths, labels, classes=known)
        chosen = everything if limit is None else limited(everything, limit)
        super().__init__(
            [chosen.image(i) for i in range(len(chosen))], chosen.labels, classes=known
        )


class ImageFiles(LabelledImages):
    """All images of a folder, at any depth, without labels: for training that needs none.

    Raises:
        MissingFileError: no such folder.
        InputError: it holds no images.

    Example:
        >>> ImageFiles("photos").labelled
        False
    """

    def __init__(self, path: str | os.PathLike, *, limit: int | None = None) -> None:
        root = Path(path)
        _check_folder(root)
        left_out: list[str] = []
        paths = list(files(root, left_out.append))
        if not paths:
            raise InputError(
                f"{root}: no images in this folder; looked for "
                f"{' '.join(sorted(kinds.EXTENSIONS))}{_also(left_out)}."
            )
        if left_out:
            warn(f"{root}: not all files are images{_also(left_out)}.")
        everything = LabelledImages(paths, [0] * len(paths), labelled=False)
        chosen = everything if limit is None else limited(everything, limit)
        super().__init__(
            [chosen.image(i) for i in range(len(chosen))], chosen.labels, labelled=False
        )


# -- what lies in a folder


def _check_folder(root: Path) -> None:
    if not root.is_dir():
        what = "a file, not a folder" if root.exists() else "no such folder"
        raise MissingFileError(f"{root}: {what}; wanted a folder of images.")


def _hidden(name: str) -> bool:
    return name.startswith(".") or kinds.is_dropping(name)


def entries(root: Path) -> tuple[list[Path], list[str]]:
    """The folders in a folder, and the images that lie in it directly; both sorted."""
    _check_folder(root)
    try:
        with os.scandir(root) as scan:
            found = sorted((e for e in scan if not _hidden(e.name)), key=lambda e: e.name)
    except OSError as error:
        raise MissingFileError(f"{root}: this folder cannot be read ({reason(error)}).") from error
    folders, loose = [], []
    for entry in found:
        suffix = os.path.splitext(entry.name)[1].lower()
        if os.path.isdir(entry.path):
            folders.append(root / entry.name)
        elif suffix in kinds.EXTENSIONS:
            loose.append(entry.path)
    return folders, loose


def files(folder: Path, note: Callable[[str], None]) -> Iterator[str]:
    """Paths of the images in a folder, at any depth and sorted, hidden ones left out.

    Args:
        folder: the folder.
        note: called with a line about files of other kinds, such as photos of phones that Pillow
            needs more for.
    """
    faults: list[str] = []
    prefix = len(folder.parts)
    for name in find_images([str(folder)], faults.append, note):
        if not any(_hidden(part) for part in Path(name).parts[prefix:]):
            yield name
    for fault in faults:
        if "cannot be read" in fault:
            raise MissingFileError(fault)
        others = fault.partition("; looked for ")[2].partition("; ")[2]
        if others:
            note(f"{folder}: {others.rstrip('.')}")


def _also(left_out: list[str]) -> str:
    return f"; {some(left_out, 3, '; ')}" if left_out else ""


def is_split(root: Path) -> bool:
    """Whether a folder holds the parts of a data set, and not its classes: `train/CLASS/...`."""
    folders, _ = entries(root)
    parts = [folder for folder in folders if part_of(folder.name)]
    train = [folder for folder in parts if part_of(folder.name) == "train"]
    if not parts or (len(parts) < len(folders) and (not train or len(parts) == 1)):
        return False
    # A class may well be called "train" (and another "boat"): its images lie in it directly.
    inside = [entries(folder) for folder in train or parts]
    return all(folders and not loose for folders, loose in inside)


def _no_folders(root: Path, loose: list[str]) -> str:
    if loose:
        return (
            f"{root}: {_number(len(loose), 'image')} in the folder itself, and no class folders; "
            f"wanted one folder per class, such as {root / 'cat' / os.path.basename(loose[0])}, or "
            "a table that names the files and their labels."
        )
    return (
        f"{root}: the folder holds no class folders; wanted one folder of images per class, such "
        f"as {root / 'cat' / '1.jpg'}."
    )


def _number(count: int, what: str) -> str:
    many = {"class": "classes"}.get(what, f"{what}s")
    return f"1 {what}" if count == 1 else f"{count} {many}"


def _check_links(root: Path, folders: list[Path]) -> None:
    real: dict[Path, Path] = {}
    home = root.resolve()
    for folder in folders:
        target = folder.resolve()
        if target == home or target in home.parents:
            raise InputError(
                f"{folder}: a link to a folder that contains it; wanted a folder of images of one "
                "class. Remove the link."
            )
        if target in real:
            raise InputError(
                f"{folder} and {real[target]} are links to one folder, so that its images would "
                "have two classes; remove one of them."
            )
        real[target] = folder


# -- class names


def class_name(name: str) -> str:
    """A class name in one Unicode form: macOS writes an accent apart from its letter."""
    return unicodedata.normalize("NFC", name)


def _loosely(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def check_alike(where: object, names: Sequence[str]) -> None:
    """Raise InputError if two class names differ only in case, Unicode form or white space."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(_loosely(name), name)
        if other is not name:
            how = "in Unicode form" if other == name else "in case, Unicode form or white space"
            raise InputError(
                f"{where}: the classes {other!r} and {name!r} differ only {how}; wanted "
                "one folder or name for each class. Merge them or rename one."
            )


def check_classes(
    where: object, names: Sequence[str], classes: Sequence[str] | None
) -> tuple[str, ...]:
    """The classes that count: `classes`, or the names found.

    Raises:
        InputError: a name found is not among `classes`.
    """
    if classes is None:
        return tuple(names)
    known = tuple(class_name(str(name)) for name in classes)
    among = set(known)
    unknown = [name for name in names if name not in among]
    if unknown:
        hints = []
        loosely = {_loosely(name): name for name in known}
        for name in unknown[:1]:
            close = loosely.get(_loosely(name))
            near = [close] if close else difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            hints += [f" Did you mean {near[0]!r}?" for _ in near[:1]]
        raise InputError(
            f"{where}: {_number(len(unknown), 'class')} not among the {len(known)} that training "
            f"or the model knows: {some(map(repr, unknown), _SHOWN)}; known are "
            f"{some(known, _SHOWN)}.{''.join(hints)} Rename or remove what does not belong."
        )
    twice = [name for name, count in Counter(known).items() if count > 1]
    doubtful = [name for name in names if name in twice]
    if doubtful:
        raise InputError(
            f"{where}: the name {doubtful[0]!r} stands for {known.count(doubtful[0])} of the "
            f"{len(known)} classes; wanted names that differ. Rename the model's labels, or give "
            "the index of the class in a table."
        )
    return known
