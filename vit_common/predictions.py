"""What comes before and after a classifier, whichever program runs it: one image as the array it
takes, and the likeliest classes of what it gives."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

from vit_common.errors import ImageError, ViTError
from vit_common.image_processor import BaseImageProcessor
from vit_common.images import convert_mode, load_image

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Number of channels -> the mode of a PIL image that has as many."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class: its label, its index and its probability, from 0 to 1."""

    label: str
    index: int
    probability: float


def likeliest(
    probabilities: np.ndarray, labels: Mapping[int, Any] | Sequence[str], top_k: int
) -> tuple[Prediction, ...]:
    """The `top_k` likeliest of one image's classes, best first; of equals the lower index first."""
    order = np.argsort(-probabilities, kind="stable")[:top_k].tolist()
    return tuple(Prediction(str(labels[i]), i, float(probabilities[i])) for i in order)


def prepare_image(
    source: Any,
    image_processor: BaseImageProcessor,
    shape: tuple[int, int, int],
    **options: Any,
) -> np.ndarray:
    """One image as a network takes it.

    Args:
        source: name of a file, PIL image, or array as the processor takes it.
        image_processor: what prepares it.
        shape: (C, H, W) that the network takes.
        **options: of the processor, for this call.

    Raises:
        ImageError, MissingFileError: it cannot be read or taken, or comes out in another shape;
            names the file.
    """
    try:
        image = load_image(source) if isinstance(source, (str, os.PathLike)) else source
        if isinstance(image, PIL.Image.Image) and shape[0] in PIL_MODES:
            image = convert_mode(image, shape[0])
        found = image_processor(image, return_tensors="np", **options)["pixel_values"]
        if found.shape != (1, *shape):
            raise ImageError(
                "the image processor gives (batch, channels, height, width) = "
                f"{found.shape}; the model takes {(1, *shape)}."
            )
        return found[0]
    except MemoryError as error:
        raise ImageError(naming(source, "not enough memory to decode it.")) from error
    except ViTError as error:
        if naming(source, str(error)) == str(error):
            raise
        raise ImageError(naming(source, str(error))) from error


def naming(source: Any, text: str) -> str:
    """The text of an error, with the name of the file, if there is one, in it."""
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
    return text if name in text else f"{name}: {text}"
