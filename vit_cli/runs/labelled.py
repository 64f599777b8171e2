"""Labelled images as commands are given them: folders of classes, folders of parts, or tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vit_cli.terminal.messages import say
from vit_common.datasets import ImageFolder, LabelledImages, open_images
from vit_common.datasets.folder import class_name, entries, is_split, part_of
from vit_common.errors import InputError, some

_PREFERRED = ("test", "val", "train")


def open_part(
    source: str,
    *,
    part: str | None = None,
    image: str | None = None,
    label: str | None = None,
    limit: int | None = None,
    problem_type: str | None = None,
) -> tuple[LabelledImages, str | None]:
    """The images to judge a model on, with the classes that they have there.

    Unlike for training, one class is enough, and a class may have no images.

    Args:
        source: folder or table.
        part: "train", "val" or "test" of a folder that has parts; None takes the test images, or
            the validation images, and says so.
        image, label: columns of a table.
        limit: use this many images only.
        problem_type: what the labels of a table are, if the model says so.

    Returns:
        The images, and the part that they are of a folder with parts.

    Raises:
        ViTError: there is no such part, or the images are not laid out like this.
    """
    path = Path(source)
    if not path.is_dir():
        return _table(path, part, image, label, limit, problem_type), None
    if image or label:
        raise InputError("--image-column and --label-column are for a table; SOURCE is a folder.")
    parts = _parts(path)
    if not parts:
        if part is not None:
            raise InputError(
                f"{path}: no part {part!r}; --split is for a folder with {part}/CLASS."
            )
        return open_folder(path, limit), None
    if part is None:
        part = next(name for name in _PREFERRED if name in parts)
        say(f"{path}: evaluating the {part} images (--split takes another part)")
    if part not in parts:
        raise InputError(f"{path}: no part {part!r}; given {some(parts, 3)}. Wanted {path / part}.")
    return open_folder(parts[part], limit), part


def open_folder(path: Path, limit: int | None = None) -> LabelledImages:
    """A folder of class folders, of any number of classes."""
    names = [class_name(folder.name) for folder in entries(path)[0]]
    return ImageFolder(path, classes=names or None, limit=limit)


def open_both(
    source: str,
    *,
    image: str | None = None,
    label: str | None = None,
    limit: int | None = None,
) -> dict[str, LabelledImages]:
    """All parts of a source, with the classes of its training images."""
    path = Path(source)
    if path.is_dir():
        if image or label:
            raise InputError(
                "--image-column and --label-column are for a table; SOURCE is a folder."
            )
        return open_images(path, limit=limit)
    return {"train": _table(path, None, image, label, limit, None)}


def _parts(path: Path) -> dict[str, Path]:
    """The parts of a data set in a folder: those of one with training images, and those of one with
    the others alone."""
    folders, loose = entries(path)
    named = {part_of(folder.name): folder for folder in folders}
    named.pop(None, None)
    whole = bool(named) and len(named) == len(folders) and not loose
    inner = whole and all(entries(folder)[0] for folder in named.values())
    return {str(name): folder for name, folder in named.items()} if is_split(path) or inner else {}


def _table(
    path: Path,
    part: str | None,
    image: str | None,
    label: str | None,
    limit: int | None,
    problem_type: str | None,
) -> LabelledImages:
    from vit_common.datasets import ImageTable

    if part is not None:
        raise InputError(f"{path}: --split is for a folder with train, val and test folders.")
    options: dict[str, Any] = {"limit": limit} if limit is not None else {}
    if label is not None:
        options["label"] = label.split(",") if "," in label else label
    if problem_type is not None:
        options["problem_type"] = problem_type
    return ImageTable(path, image=image or "file", **options)
