"""Labelled images as commands are given them: folders of classes, folders of parts, or tables."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from vit_cli.terminal.messages import say
from vit_common.datasets import ImageFolder, LabelledImages, open_images, part_names
from vit_common.datasets.class_names import labels_of, match_classes
from vit_common.datasets.folder import class_name, entries, is_split, part_of
from vit_common.datasets.open import is_table
from vit_common.datasets.table import SUFFIXES
from vit_common.errors import InputError, MissingFileError, some

_PREFERRED = ("test", "val", "train")


def open_for(
    config: Any,
    source: str,
    *,
    part: str | None = None,
    image: str | None = None,
    label: str | None = None,
    limit: int | None = None,
) -> tuple[LabelledImages, str | None]:
    """The images to judge a model on. Unlike for training, one class is enough, and a class may
    have no images.

    Args:
        config: of the model, whose labels class names and whole numbers in a table are.
        source: folder or table.
        part: "train", "val" or "test" of a source that has parts; None takes the test images, or
            the validation images, and says so.
        image, label: columns of a table.
        limit: use this many images only.

    Returns:
        The images, and the part that they are; None where there are no parts. Their `classes` are
        None where they are counted as the model counts them.

    Raises:
        ViTError: there is no such part, or the images are not laid out like this.
    """
    path = Path(source)
    parts = _folder_parts(path) if path.is_dir() else {}
    names = (*parts,) if parts else part_names(path)
    several = bool(parts) or names != ("train",)
    if not several and part not in (None, "train"):
        raise InputError(
            f"{path}: no part {part!r}; --split is for a folder of parts ({path / part}), or a "
            "table with a column `split`."
        )
    if several and part is None:
        part = next(name for name in _PREFERRED if name in names)
        say(f"{path}: evaluating the {part} images (--split takes another part)")
    if several and part not in names:
        raise InputError(f"{path}: no part {part!r}; there are {some(names, 3)}.")
    chosen = part if several else None
    tables = not parts and (not path.is_dir() or is_table(path))
    if (image or label) and not tables:
        raise InputError(
            f"{path}: a folder of class folders; --image-column and --label-column are for a table."
        )
    if parts:
        return open_folder(parts[str(chosen)], limit), chosen
    if not tables:
        return open_folder(path, limit), None
    return _table(config, path, chosen or "train", image, label, limit), chosen


def open_folder(path: Path, limit: int | None = None) -> LabelledImages:
    """A folder of class folders, of any number of classes."""
    names = [class_name(folder.name) for folder in entries(path)[0]]
    return ImageFolder(path, classes=names or None, limit=limit)


def columns(image: str | None, label: str | None) -> dict[str, Any]:
    """The columns of a table, as `ImageTable` takes them."""
    several = label is not None and "," in label
    return {"image": image, "label": label.split(",") if label and several else label}


def check_source(source: str) -> None:
    """Refuse a name that is no folder or table, before a model is loaded.

    Raises:
        MissingFileError: there is nothing of that name.
        InputError: it is another kind of file.
    """
    path = Path(source)
    if not path.exists():
        raise MissingFileError(f"{source}: no such folder or table of images.")
    if not path.is_dir() and path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"{source}: wanted a folder of class folders, or a table ({', '.join(SUFFIXES)})."
        )


def _folder_parts(path: Path) -> dict[str, Path]:
    """The folders of the parts in a folder: with training images among them, or without."""
    folders, loose = entries(path)
    named = {part_of(folder.name): folder for folder in folders}
    named.pop(None, None)
    only = bool(named) and len(named) == len(folders) and not loose
    inner = only and all(entries(folder)[0] for folder in named.values())
    return {str(name): folder for name, folder in named.items()} if is_split(path) or inner else {}


def _table(
    config: Any, path: Path, part: str, image: str | None, label: str | None, limit: int | None
) -> LabelledImages:
    """A table, whose classes are the model's."""
    problem = config.problem_type or ("regression" if config.num_labels == 1 else None)
    options = {**columns(image, label), "problem_type": problem, "limit": limit, "part": part}
    labels = labels_of(config.id2label)
    count = Counter(labels)
    unlike = [name if count[name] == 1 else f"{name} [{i}]" for i, name in enumerate(labels)]
    try:
        opened = open_images(path, classes=None if problem == "regression" else unlike, **options)
    except InputError as error:
        # Names that are the model's in another form, such as WordNet's.
        try:
            opened = open_images(path, **options)
            match_classes(opened[part].classes or (), labels)
        except InputError:
            raise error from None
        return opened[part]
    opened[part].classes = None
    return opened[part]
