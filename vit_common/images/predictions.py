"""Before and after a classifier, whichever program runs it: one image as the array it takes, and
the likeliest classes of its output."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

from vit_common.config import ViTConfig
from vit_common.errors import ConfigError, ImageError, ViTError
from vit_common.images.pictures import convert_mode, is_image_file, load_image, upright
from vit_common.images.processor import BaseImageProcessor, ViTImageProcessor

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Number of channels -> the mode of a PIL image that has as many."""

AS_IN_A_PICTURE: dict[str, Any] = {"do_rescale": False, "do_normalize": False}
"""Options of an image processor that keep the pixels of the picture: the last two steps are left
out, and nothing else changes."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class: its label, its index and its probability, from 0 to 1."""

    label: str
    index: int
    probability: float


def are_many(images: Any) -> bool:
    """Whether a call was given several images, and not one."""
    return isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4


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
    *,
    at_least: tuple[int, int] | None = None,
    **options: Any,
) -> np.ndarray:
    """Prepare one image for a network.

    Args:
        source: image file (its name, its bytes, or open for reading), PIL image, or array as the
            processor takes it.
        image_processor: processor of the image.
        shape: (C, H, W) that the network takes.
        at_least: see `load_image`.
        **options: of the processor, for this call.

    Raises:
        ImageError, MissingFileError: it cannot be read or taken, or comes out in another shape;
            names the file.
    """
    try:
        named = isinstance(source, (str, os.PathLike)) or is_image_file(source)
        image = load_image(source, at_least=at_least) if named else source
        if isinstance(image, PIL.Image.Image):
            image = upright(image)  # the same photo, the same answer, however it was opened
            if shape[0] in PIL_MODES:
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


def image_size(config: ViTConfig, image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of a network's input: the configuration's, or for a family that takes any
    size the processor's."""
    options = image_processor.to_dict()
    size = options.get("size") or {}
    if options.get("do_center_crop") and options.get("crop_size"):
        size = options["crop_size"]
    height, width = size.get("height"), size.get("width")
    if config.any_image_size and height and width:
        patch = config.patch_height_width
        if height % patch[0] == 0 and width % patch[1] == 0:
            return height, width
    return config.image_height_width


def check_processor(image_processor: BaseImageProcessor, shape: tuple[int, int, int]) -> None:
    """Raise ConfigError if the processor cannot make what the network takes from any image.

    Args:
        image_processor: processor of the images.
        shape: (C, H, W) that the network takes.
    """
    C, height, width = shape
    if C not in PIL_MODES:
        return  # no image file has so many channels, but an array may
    # A portrait and a landscape, as a size given by the shortest edge alone may fit neither.
    for size in ((width, height + 16), (width + 16, height)):
        try:
            prepare_image(PIL.Image.new(PIL_MODES[C], size), image_processor, shape)
        except ImageError as error:
            raise ConfigError(
                "preprocessor_config.json and config.json contradict each other: for an image "
                f"of {size[1]} x {size[0]} pixels (height x width) {error}"
            ) from error


def has_several_labels(config: ViTConfig) -> bool:
    """Whether an image may have several of the classes: probabilities are then the sigmoid of the
    logits, and else their softmax."""
    return config.problem_type == "multi_label_classification" or config.num_labels == 1


def default_image_processor(config: ViTConfig) -> ViTImageProcessor:
    """The Hub's defaults for a ViT, at the model's own image size and number of channels."""
    height, width = config.image_height_width
    return ViTImageProcessor(
        size={"height": height, "width": width},
        image_mean=[0.5] * config.num_channels,
        image_std=[0.5] * config.num_channels,
    )


def naming(source: Any, text: str) -> str:
    """The text of an error, with the name of the file in front if there is one."""
    name = os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else ""
    if len(name) >= 4096:  # longer than any path
        return text
    return text if not name or text.startswith(f"{name}: ") else f"{name}: {text}"
