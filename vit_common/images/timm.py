"""timm's evaluation transform as a `BitImageProcessor`.

Source: `resolve_data_config` and `transforms_imagenet_eval` of timm 1.0.31 (`data/config.py`,
`data/transforms_factory.py`). timm makes the resized sides floor(side / crop_pct) and crops the
middle; torchvision resizes PIL images by Pillow, so the pixels are equal. Where half of what the
crop cuts off is no whole number, torchvision rounds it to the even number and Transformers down;
the option `crop_rounding`, which Transformers keeps and does not know, says which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from PIL.Image import Resampling

from vit_common.errors import ConfigError, InputError, shown
from vit_common.images.options import HALF_TO_EVEN, MOST_SIDE
from vit_common.images.processors import BitImageProcessor

__all__ = ["processor_from_timm"]

# Defaults of timm 1.0.31 (`data/constants.py`).
_CROP_PCT = 0.875
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

_FILTERS = {each.name.lower(): each for each in Resampling}


def processor_from_timm(pretrained_cfg: Mapping[str, Any]) -> BitImageProcessor:
    """The processor that does what timm's transform for evaluation does.

    Args:
        pretrained_cfg: the dict of that name in a timm model's `config.json`, or
            `model.pretrained_cfg`. Of it `input_size` (channels, height, width), `crop_pct`,
            `interpolation`, `mean`, `std` and `crop_mode` count; those that are absent, None or
            empty are timm's defaults, but `input_size` must be there. Sizes for tests
            (`test_input_size`, `test_crop_pct`) do not count, as they do not by default in timm.

    Raises:
        ConfigError: a value is not one that timm can mean, or is one that a processor cannot hold:
            a filter drawn at random, the `crop_mode` "border", or an input that is not square
            unless `crop_mode` is "squash".
    """
    if not isinstance(pretrained_cfg, Mapping):
        _fail("", "a mapping", pretrained_cfg)
    channels, height, width = _input_size(pretrained_cfg.get("input_size"))
    crop_pct = pretrained_cfg.get("crop_pct") or _CROP_PCT
    if isinstance(crop_pct, bool) or not isinstance(crop_pct, (int, float)):
        _fail("crop_pct", "a number over 0, and 1 at most", crop_pct)
    if not 0 < crop_pct <= 1:
        _fail("crop_pct", "over 0, and 1 at most", crop_pct)
    if max(height, width) / crop_pct > MOST_SIDE:
        _fail(
            "crop_pct",
            f"such that the image is resized to at most {MOST_SIDE} pixels per side",
            crop_pct,
        )

    crop_mode = pretrained_cfg.get("crop_mode") or "center"
    if crop_mode not in ("center", "squash"):
        _fail("crop_mode", "'center' or 'squash' ('border' cannot be done here)", crop_mode)
    scaled = [math.floor(side / crop_pct) for side in (height, width)]
    if crop_mode == "squash":
        size = {"height": scaled[0], "width": scaled[1]}
    elif height == width:
        size = {"shortest_edge": scaled[0]}
    else:
        raise ConfigError(
            f"`pretrained_cfg`: an `input_size` of {height} x {width} needs a resize that covers "
            "both sides, which image processors do not have. Resize and crop the images "
            "before, or set `crop_mode` to 'squash'."
        )

    interpolation = pretrained_cfg.get("interpolation") or "bicubic"
    if not isinstance(interpolation, str) or interpolation not in _FILTERS:
        hint = "; 'random' is for training" if interpolation == "random" else ""
        _fail("interpolation", f"one of {', '.join(_FILTERS)}{hint}", interpolation)
    try:
        return BitImageProcessor(
            size=size,
            resample=_FILTERS[interpolation],
            crop_size={"height": height, "width": width},
            crop_rounding=HALF_TO_EVEN,
            image_mean=_per_channel(pretrained_cfg, "mean", _IMAGENET_MEAN, channels),
            image_std=_per_channel(pretrained_cfg, "std", _IMAGENET_STD, channels),
            do_convert_rgb=True if channels == 3 else None,
        )
    except InputError as error:
        raise ConfigError(f"`pretrained_cfg`: {error}") from error


def _fail(key: str, wanted: str, given: Any) -> NoReturn:
    name = f"`pretrained_cfg`: `{key}`" if key else "`pretrained_cfg`"
    raise ConfigError(f"{name} must be {wanted}; given {shown(given)}.")


def _input_size(value: Any) -> tuple[int, int, int]:
    wanted = "three integers (channels, height, width)"
    if value is None:
        raise ConfigError(
            f"`pretrained_cfg` has no `input_size`; wanted {wanted}. In a config.json of timm it "
            "stands under the key `pretrained_cfg`; pass the dict that is there."
        )
    whole = isinstance(value, (list, tuple)) and all(type(each) is int for each in value)
    if not whole or len(value) != 3 or min(value) < 1:
        _fail("input_size", wanted, value)
    channels, height, width = value
    if max(height, width) > MOST_SIDE:
        _fail("input_size", f"of at most {MOST_SIDE} pixels per side", value)
    if channels not in (1, 3, 4):
        _fail("input_size", "of 1, 3 or 4 channels, as those of images are", value)
    return channels, height, width


def _per_channel(
    table: Mapping[str, Any], key: str, default: tuple[float, ...], channels: int
) -> list[float]:
    value = table.get(key)
    if value is None or (isinstance(value, (list, tuple)) and not value):
        value = default
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    values = values * channels if len(values) == 1 else values
    if len(values) != channels:
        _fail(key, f"one number for each of {channels} channels", value)
    return values
