"""What is wrong with a data set, found before a network is trained on it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from vit_common.datasets.labelled import LabelledImages
from vit_common.errors import MissingFileError, ViTError
from vit_common.files.texts import reason
from vit_common.images.pictures import load_image, usual_workers
from vit_common.images.predictions import naming


class Survey(NamedTuple):
    """What `survey` found.

    Attributes:
        unreadable: (name, what is wrong) of each image that cannot be read, by part.
        same: groups of (part, name), each of images of one content that are in several parts, or
            in one with different labels. A picture that is trained on and judged by makes the
            result look better than it is.
    """

    unreadable: dict[str, list[tuple[str, str]]]
    same: list[list[tuple[str, str]]]


def survey(
    parts: Mapping[str, LabelledImages],
    *,
    workers: int | None = None,
    done: Callable[[], object] = lambda: None,
) -> Survey:
    """Read and decode every image once, and compare their contents.

    Files are compared by their bytes, so a picture that was saved again is not found.

    Args:
        parts: the images by part, such as `open_images` gives.
        workers: threads that decode; None means the processor's cores, at most 16.
        done: called after each image.

    Example:
        >>> found = survey(open_images("photos"))
        >>> found.unreadable["train"], found.same
        ([], [[('train', 'photos/train/cat/7.jpg'), ('val', 'photos/val/cat/2.jpg')]])
    """
    unreadable: dict[str, list[tuple[str, str]]] = {}
    groups: dict[bytes, list[tuple[str, str, str]]] = {}
    with ThreadPoolExecutor(workers or usual_workers()) as pool:
        for part, dataset in parts.items():
            unreadable[part] = []
            looked = pool.map(lambda i, images=dataset: _look(images, i), range(len(dataset)))
            for name, label, (digest, fault) in zip(
                dataset.names, dataset.labels, looked, strict=True
            ):
                if fault is not None:
                    unreadable[part].append((name, fault))
                if digest is not None:
                    groups.setdefault(digest, []).append((part, name, str(label)))
                done()
    same = [
        [(part, name) for part, name, _ in group]
        for group in groups.values()
        if len({part for part, _, _ in group}) > 1 or len({label for *_, label in group}) > 1
    ]
    return Survey(unreadable, same)


def check_images(dataset: LabelledImages, *, workers: int | None = None) -> list[tuple[str, str]]:
    """Decode every image, and name those that cannot be read.

    Returns:
        (name, what is wrong) of each, in order; empty if all can be read.

    Example:
        >>> for name, message in check_images(ImageFolder("photos")):
        ...     print(message)
    """
    return survey({"images": dataset}, workers=workers).unreadable["images"]


def _look(dataset: LabelledImages, index: int) -> tuple[bytes | None, str | None]:
    """An image's digest, or None, and what is wrong with it, or None."""
    source: Any = None
    try:
        source = dataset.image(index)
        digest = _digest(source)
        if not isinstance(source, np.ndarray):
            load_image(source)
    except ViTError as error:
        return None, naming(dataset.names[index], str(error))
    except MemoryError:
        return None, naming(dataset.names[index], "not enough memory to decode it.")
    return digest, None


def _digest(source: Any) -> bytes:
    if isinstance(source, (str, os.PathLike)):
        try:
            with open(source, "rb") as stream:
                return hashlib.file_digest(stream, "sha256").digest()
        except (OSError, ValueError) as error:
            name = os.fsdecode(source)
            raise MissingFileError(f"{name}: cannot be opened ({reason(error)}).") from error
    if isinstance(source, (bytes, bytearray, memoryview)):
        return hashlib.sha256(source).digest()
    if isinstance(source, PIL.Image.Image):
        source = np.asarray(load_image(source))
    array = np.ascontiguousarray(source)
    head = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(head + array.tobytes()).digest()
