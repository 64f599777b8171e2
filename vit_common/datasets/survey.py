"""What is wrong with a data set, found before a network is trained on it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import PIL.Image

from vit_common.datasets.labelled import LabelledImages
from vit_common.errors import ImageError, ViTError
from vit_common.images.pictures import load_image
from vit_common.images.predictions import naming
from vit_common.threads import usual_workers


def check_images(dataset: LabelledImages, *, workers: int | None = None) -> list[tuple[str, str]]:
    """Decode every image, and name those that cannot be read.

    Returns:
        (name, what is wrong) of each, in order; empty if all can be read.

    Example:
        >>> for name, message in check_images(ImageFolder("photos")):
        ...     print(message)
    """

    def fault(index: int) -> str | None:
        source: Any = None
        try:
            source = dataset.image(index)
            if not isinstance(source, np.ndarray):
                load_image(source)
        except ViTError as error:
            return str(error)
        except MemoryError:
            return naming(source, "not enough memory to decode it.")
        return None

    with ThreadPoolExecutor(workers or usual_workers()) as pool:
        found = list(pool.map(fault, range(len(dataset))))
    return [
        (name, message)
        for name, message in zip(dataset.names, found, strict=True)
        if message is not None
    ]


def same_images(
    parts: Mapping[str, LabelledImages], *, workers: int | None = None
) -> list[list[tuple[str, str]]]:
    """Images of the same content that are in several parts, or in one with different labels.

    A picture that is trained on and judged by makes the result look better than it is. Files are
    compared by their bytes, so a picture that was saved again is not found.

    Args:
        parts: the images by part, such as `open_images` gives.

    Returns:
        Groups of (part, name), each of one content; empty if there are none.

    Example:
        >>> same_images({"train": train, "val": validation})
        [[('train', 'photos/train/cat/7.jpg'), ('val', 'photos/val/cat/2.jpg')]]
    """
    groups: dict[bytes, list[tuple[str, str, Any]]] = {}
    with ThreadPoolExecutor(workers or usual_workers()) as pool:
        for part, dataset in parts.items():
            digests = pool.map(lambda i, images=dataset: _digest(images, i), range(len(dataset)))
            for i, digest in enumerate(digests):
                if digest is not None:
                    label = dataset.labels[i].tolist() if dataset.labelled else None
                    groups.setdefault(digest, []).append((part, dataset.names[i], label))
    return [
        [(part, name) for part, name, _ in group]
        for group in groups.values()
        if len({part for part, _, _ in group}) > 1 or len({str(label) for *_, label in group}) > 1
    ]


def _digest(dataset: LabelledImages, index: int) -> bytes | None:
    """Of an image's content; None if it cannot be read, which `check_images` reports."""
    try:
        source = dataset.image(index)
        if isinstance(source, (str, os.PathLike)):
            with open(source, "rb") as stream:
                return hashlib.file_digest(stream, "sha256").digest()
        if isinstance(source, (bytes, bytearray, memoryview)):
            return hashlib.sha256(source).digest()
        if isinstance(source, PIL.Image.Image):
            source = np.asarray(load_image(source))
        if isinstance(source, np.ndarray):
            head = f"{source.dtype} {source.shape} ".encode()
            return hashlib.sha256(head + np.ascontiguousarray(source).tobytes()).digest()
    except (OSError, ImageError):
        return None
    return None
