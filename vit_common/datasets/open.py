"""A folder of parts, a folder of classes or a table, by its path alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vit_common.datasets.folder import PARTS, ImageFiles, ImageFolder, entries, is_split, part_of
from vit_common.datasets.labelled import LabelledImages
from vit_common.errors import InputError, some


def open_images(
    path: str | os.PathLike,
    *,
    part: str | None = None,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    labelled: bool = True,
) -> dict[str, LabelledImages]:
    """The parts of a data set.

    Args:
        path: `photos` with `photos/{train,val,test}/CLASS/*.jpg`, or with `photos/CLASS/*.jpg`,
            which is all "train".
        part: open this part alone: "train", "val" or "test".
        classes: see `ImageFolder`; None takes those of the training images, for every part.
        limit: use this many images of each part only.
        labelled: False takes every image of the folder, without labels.

    Returns:
        Images by part: "train", and "val" and "test" where there are such.

    Raises:
        MissingFileError: no such folder.
        InputError: not laid out like this, or the part is not there.

    Example:
        >>> parts = open_images("photos")
        >>> train, validation = parts["train"], parts.get("val")
    """
    root = Path(path)
    if part is not None and part not in PARTS:
        raise InputError(f"`part` must be one of {', '.join(PARTS)}; given {part!r}.")
    folders = {"train": root}
    if is_split(root):
        folders = {}
        for folder in entries(root)[0]:
            name = part_of(folder.name)
            if name is not None and name in folders:
                raise InputError(
                    f"{root}: two folders for the same part, {folders[name].name} and "
                    f"{folder.name}; keep one."
                )
            if name is not None:
                folders[name] = folder
    if part is not None and part not in folders:
        raise InputError(
            f"{root}: no folder for the part {part!r}; given {some(folders, 3)}. Wanted "
            f"{root / part}."
        )
    if not labelled:
        wanted = [part] if part else [name for name in PARTS if name in folders]
        return {name: ImageFiles(folders[name], limit=limit) for name in wanted}
    parts: dict[str, LabelledImages] = {}
    if classes is None and part not in (None, "train"):
        classes = ImageFolder(folders["train"]).classes
    for name in PARTS:
        if name in folders and part in (None, name):
            parts[name] = ImageFolder(folders[name], classes=classes, limit=limit)
            classes = parts[name].classes
    return parts
