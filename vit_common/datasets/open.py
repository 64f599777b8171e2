"""A folder of parts, a folder of classes or a table, by its path alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vit_common.datasets.folder import (
    PARTS,
    ImageFiles,
    ImageFolder,
    class_name,
    entries,
    is_split,
    part_of,
)
from vit_common.datasets.labelled import LabelledImages
from vit_common.datasets.table import SUFFIXES, ImageTable, has_labels, parts_of
from vit_common.errors import InputError, some

Opener = Callable[..., LabelledImages]


def open_images(
    path: str | os.PathLike,
    *,
    part: str | None = None,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    labelled: bool = True,
    **options: Any,
) -> dict[str, LabelledImages]:
    """The parts of a data set.

    Args:
        path: one of

            - a folder `photos` with `photos/{train,val,test}/CLASS/*.jpg`, or with
              `photos/CLASS/*.jpg`, which is all "train";
            - a table (see `ImageTable`), whose column "split" names the part of each row; without
              one, all rows are "train";
            - a folder with a table of each part: `train.csv` and `val.csv`, or as the Hub has
              them, `data/train-00000-of-00002.parquet` and so on; or with a table `metadata.csv`
              beside the images, in it or in the folder of each part.
        part: open this part alone: "train", "val" or "test".
        classes: see `ImageFolder`; None takes those of the training images, for every part, or of
            all parts if none is for training.
        limit: use this many images of each part only.
        labelled: False takes every image of the folder, without labels.
        **options: `image`, `label`, `problem_type` and `root` of `ImageTable`.

    Returns:
        Images by part: "train", and "val" and "test" where there are such.

    Raises:
        MissingFileError: no such folder or table.
        InputError: not laid out like this, or the part is not there.

    Example:
        >>> parts = open_images("photos")
        >>> train, validation = parts["train"], parts.get("val")
    """
    root = Path(path)
    if part is not None and part not in PARTS:
        raise InputError(f"`part` must be one of {', '.join(PARTS)}; given {part!r}.")
    openers = _openers(root, labelled, {k: v for k, v in options.items() if v is not None})
    if part is not None and part not in openers:
        raise InputError(
            f"{root}: no images for the part {part!r}; there are {some(openers, 3)}. Wanted "
            f"{root / part}, or rows of that part."
        )
    table = is_table(root)
    known = {} if not (labelled or table) else {"classes": classes}
    if known and classes is None and "train" not in openers and not table:
        known = {"classes": _all_classes(root)}
    elif known and classes is None and part not in (None, "train") and "train" in openers:
        known = _known(openers["train"](), table)
    parts: dict[str, LabelledImages] = {}
    for name in PARTS:
        if name in openers and part in (None, name):
            parts[name] = openers[name](limit=limit, **known)
            known = _known(parts[name], table)
    return parts


def part_names(path: str | os.PathLike) -> tuple[str, ...]:
    """The parts that `open_images` finds at a path: some of "train", "val" and "test".

    Raises:
        MissingFileError, InputError: as there.
    """
    found = _openers(Path(path), True, {})
    return tuple(name for name in PARTS if name in found)


def _openers(root: Path, labelled: bool, options: dict[str, Any]) -> dict[str, Opener]:
    """What opens each part there is."""
    if is_table(root) and not root.is_dir():
        return {
            part: _bind(ImageTable, root, part=part if several else None, **options)
            for part, several in parts_of(root)
        }
    if is_table(root):
        return {part: _bind(ImageTable, paths, **options) for part, paths in _tables(root).items()}
    if options:
        raise InputError(
            f"{root}: `{next(iter(options))}` is an option of tables ({', '.join(SUFFIXES)}); a "
            "folder of class folders takes none."
        )
    return {
        part: _bind(ImageFolder if labelled else ImageFiles, folder)
        for part, folder in _folders(root).items()
    }


def _all_classes(root: Path) -> list[str]:
    """Of all parts: there are no training images, which would say."""
    folders = [entries(folder)[0] for folder in _folders(root).values()]
    return sorted({class_name(folder.name) for part in folders for folder in part})


def is_table(root: Path) -> bool:
    """Whether `open_images` reads a table here, or a folder of tables, and no class folders."""
    if root.is_dir():
        return bool(_tables(root))
    return root.suffix.lower() in SUFFIXES


def _known(first: LabelledImages, table: bool) -> dict[str, Any]:
    """What the parts after the first take from it: labels must mean the same in all."""
    if not first.labelled:
        return {}
    return {"classes": first.classes} | ({"problem_type": first.problem_type} if table else {})


def _bind(kind: Any, *given: Any, **options: Any) -> Opener:
    return lambda **more: kind(*given, **{**options, **more})


def _folders(root: Path) -> dict[str, Path]:
    """The folder of each part."""
    if not root.is_dir() or not is_split(root):
        return {"train": root}
    folders: dict[str, Path] = {}
    for folder in entries(root)[0]:
        name = part_of(folder.name)
        if name is not None and name in folders:
            raise InputError(
                f"{root}: two folders for the same part, {folders[name].name} and {folder.name}; "
                "keep one."
            )
        if name is not None:
            folders[name] = folder
    return folders


def _tables(root: Path) -> dict[str, list[Path]]:
    """The tables of each part in a folder, or in its folder `data`, as the Hub lays them out; or
    the table beside the images that Hugging Face's `imagefolder` reads."""
    for folder in (root, root / "data"):
        found: dict[str, list[Path]] = {}
        if not folder.is_dir():
            continue
        for path in sorted(folder.iterdir()):
            part = part_of(path.name.split("-")[0].split(".")[0])
            if part is not None and path.suffix.lower() in SUFFIXES and path.is_file():
                found.setdefault(part, []).append(path)
        if "train" in found:
            return found
    whole = _metadata(root)
    if whole is not None:
        return {"train": [whole]}
    beside = {
        part_of(folder.name): _metadata(folder)
        for folder in entries(root)[0]
        if part_of(folder.name)
    }
    return {str(part): [path] for part, path in beside.items() if path is not None}


def _metadata(folder: Path) -> Path | None:
    """The table `metadata` of a folder, if it has labels; one of captions says nothing of them."""
    for suffix in SUFFIXES:
        path = folder / f"metadata{suffix}"
        if path.is_file() and has_labels(path):
            return path
    return None
