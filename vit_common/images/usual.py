"""The ways of preparing images that most published networks were trained with, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vit_common.errors import InputError
from vit_common.images.processors import BitImageProcessor
from vit_common.images.timm import processor_from_timm

USUAL: Mapping[str, Mapping[str, Any]] = {
    "imagenet": {
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": 0.875,
    },
    "inception": {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.9},
    "clip": {
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
        "crop_pct": 1.0,
    },
}
"""Name -> means and deviations of the channels, and how much of the resized image the crop keeps.

Sources: `IMAGENET_DEFAULT_MEAN`, `IMAGENET_INCEPTION_MEAN` and `OPENAI_CLIP_MEAN` of
`timm/data/constants.py`; the crops are those of timm's DeiT, AugReg ViT and CLIP models."""


def is_usual(text: object) -> bool:
    """Whether a text names one of `USUAL`, alone or with a crop ("imagenet:0.95")."""
    return isinstance(text, str) and text.partition(":")[0] in USUAL


def usual_processor(text: str, image_size: tuple[int, int]) -> BitImageProcessor:
    """The image processor of that name: the shorter side to `image_size / crop` by bicubic
    interpolation, the middle, then mean and deviation.

    Args:
        text: a name of `USUAL`; after a colon, the part of the resized image that the crop keeps.
        image_size: (height, width) of what the network takes; where they differ, images are
            resized to them instead of being cropped.

    Raises:
        InputError: there is no such name, or the crop is not over 0 and at most 1.

    Example:
        >>> usual_processor("imagenet:0.9", (224, 224)).size
        {'shortest_edge': 248}
    """
    name, colon, crop = text.partition(":")
    if name not in USUAL:
        raise InputError(f"preprocessing must be one of {', '.join(USUAL)}; given {name!r}.")
    table: dict[str, Any] = {**USUAL[name], "interpolation": "bicubic"}
    table["input_size"] = (3, *image_size)
    height, width = image_size
    if height != width:
        table |= {"crop_mode": "squash", "crop_pct": 1.0}
    if colon:
        try:
            table["crop_pct"] = float(crop)
        except ValueError:
            table["crop_pct"] = 0.0
    if not 0 < table["crop_pct"] <= 1:
        raise InputError(
            f"preprocessing {text!r}: the crop must be a number over 0, and 1 at most."
        )
    return processor_from_timm(table)
