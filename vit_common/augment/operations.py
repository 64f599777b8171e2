"""The operations of AutoAugment, RandAugment, AugMix and 3-Augment, by timm's names.

Each has a strength from a magnitude, which is 10 at the usual most. What timm 1.0.31 does for the
same random numbers (`timm/data/auto_augment.py`), these do to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import PIL.Image
from PIL import ImageEnhance, ImageFilter, ImageOps

from vit_common.augment.draws import Draws, uniform

FULL = 10.0
"""Magnitude at which an operation has its usual full strength."""

Fill = int | tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """What operations need besides their strength.

    Attributes:
        fill: colour of what a shear, shift or rotation leaves empty.
        resample: filter of these, or None for bilinear or bicubic at random.
        translate_pixels, translate_share: largest shift of `TranslateX` in pixels, and of
            `TranslateXRel` by the image's side.
    """

    fill: Fill = (128, 128, 128)
    resample: PIL.Image.Resampling | None = None
    translate_pixels: float = 250.0
    translate_share: float = 0.45


Level = Callable[[float, Setting, Draws], Any]
Change = Callable[[PIL.Image.Image, Any, Setting, Draws], PIL.Image.Image]


# -- from a magnitude to a strength


def _sign(value: float, source: Draws) -> float:
    return -value if source.random() > 0.5 else value


def _either_way(most: float) -> Level:
    return lambda magnitude, setting, source: _sign(magnitude / FULL * most, source)


def _shift(magnitude: float, setting: Setting, source: Draws) -> float:
    return _sign(magnitude / FULL * float(setting.translate_pixels), source)


def _relative_shift(magnitude: float, setting: Setting, source: Draws) -> float:
    return _sign(magnitude / FULL * setting.translate_share, source)


def _enhance(magnitude: float, setting: Setting, source: Draws) -> float:
    return magnitude / FULL * 1.8 + 0.1


def _enhance_increasing(magnitude: float, setting: Setting, source: Draws) -> float:
    return max(0.1, 1.0 + _sign(magnitude / FULL * 0.9, source))


def _between(low: float, high: float) -> Level:
    return lambda magnitude, setting, source: max(
        low, min(high, low + (high - low) * (magnitude / FULL))
    )


def _whole(most: int, *, start: int = 0, less: bool = False, limit: int | None = None) -> Level:
    def level(magnitude: float, setting: Setting, source: Draws) -> int:
        steps = int(magnitude / FULL * most)
        steps = steps if limit is None else min(limit, steps)
        return start - steps if less else start + steps

    return level


# -- from a strength to an image


def _affine(matrix: Callable[[float, tuple[int, int]], tuple[float, ...]]) -> Change:
    def change(
        image: PIL.Image.Image, strength: float, setting: Setting, source: Draws
    ) -> PIL.Image.Image:
        return image.transform(
            image.size,
            PIL.Image.Transform.AFFINE,
            matrix(strength, image.size),
            resample=_filter(setting, source),
            fillcolor=setting.fill,
        )

    return change


def _filter(setting: Setting, source: Draws) -> PIL.Image.Resampling:
    if setting.resample is not None:
        return setting.resample
    return (PIL.Image.Resampling.BILINEAR, PIL.Image.Resampling.BICUBIC)[int(source.random() * 2)]


def _rotate(
    image: PIL.Image.Image, degrees: float, setting: Setting, source: Draws
) -> PIL.Image.Image:
    return image.rotate(degrees, resample=_filter(setting, source), fillcolor=setting.fill)


def _plain(change: Callable[..., PIL.Image.Image]) -> Change:
    return lambda image, strength, setting, source: change(image, strength)


def _enhanced(kind: Any) -> Change:
    return lambda image, factor, setting, source: kind(image).enhance(factor)


def _posterize(image: PIL.Image.Image, bits: int) -> PIL.Image.Image:
    if bits >= 8:
        return image
    if bits < 1:  # black, as in timm with a Pillow before 13, which refuses to keep no bit
        return image.point([0] * 256 * len(image.getbands()))
    return ImageOps.posterize(image, bits)


def _solarize_add(image: PIL.Image.Image, add: int) -> PIL.Image.Image:
    table = [min(255, value + add) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _desaturate(image: PIL.Image.Image, share: float) -> PIL.Image.Image:
    return ImageEnhance.Color(image).enhance(min(1.0, max(0.0, 1.0 - share)))


def _blur(image: PIL.Image.Image, radius: float) -> PIL.Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius=radius))


def _random_blur(
    image: PIL.Image.Image, strength: float, setting: Setting, source: Draws
) -> PIL.Image.Image:
    return _blur(image, uniform(source, 0.1, 2.0 * strength))


_SHEAR_X = _affine(lambda strength, size: (1, strength, 0, 0, 1, 0))
_SHEAR_Y = _affine(lambda strength, size: (1, 0, 0, strength, 1, 0))
_SHIFT_X = _affine(lambda strength, size: (1, 0, strength, 0, 1, 0))
_SHIFT_Y = _affine(lambda strength, size: (1, 0, 0, 0, 1, strength))
_SHIFT_X_REL = _affine(lambda strength, size: (1, 0, strength * size[0], 0, 1, 0))
_SHIFT_Y_REL = _affine(lambda strength, size: (1, 0, 0, 0, 1, strength * size[1]))
_COLOR, _CONTRAST = _enhanced(ImageEnhance.Color), _enhanced(ImageEnhance.Contrast)
_BRIGHTNESS, _SHARPNESS = _enhanced(ImageEnhance.Brightness), _enhanced(ImageEnhance.Sharpness)
_POSTERIZE, _SOLARIZE = _plain(_posterize), _plain(ImageOps.solarize)

OPERATIONS: Mapping[str, tuple[Level | None, Change]] = MappingProxyType(
    {
        "AutoContrast": (None, lambda image, *_: ImageOps.autocontrast(image)),
        "Equalize": (None, lambda image, *_: ImageOps.equalize(image)),
        "Invert": (None, lambda image, *_: ImageOps.invert(image)),
        "Rotate": (_either_way(30.0), _rotate),
        "Posterize": (_whole(4), _POSTERIZE),
        "PosterizeIncreasing": (_whole(4, start=4, less=True), _POSTERIZE),
        "PosterizeOriginal": (_whole(4, start=4), _POSTERIZE),
        "Solarize": (_whole(256, limit=256), _SOLARIZE),
        "SolarizeIncreasing": (_whole(256, start=256, less=True, limit=256), _SOLARIZE),
        "SolarizeAdd": (_whole(110, limit=128), _plain(_solarize_add)),
        "Color": (_enhance, _COLOR),
        "ColorIncreasing": (_enhance_increasing, _COLOR),
        "Contrast": (_enhance, _CONTRAST),
        "ContrastIncreasing": (_enhance_increasing, _CONTRAST),
        "Brightness": (_enhance, _BRIGHTNESS),
        "BrightnessIncreasing": (_enhance_increasing, _BRIGHTNESS),
        "Sharpness": (_enhance, _SHARPNESS),
        "SharpnessIncreasing": (_enhance_increasing, _SHARPNESS),
        "ShearX": (_either_way(0.3), _SHEAR_X),
        "ShearY": (_either_way(0.3), _SHEAR_Y),
        "TranslateX": (_shift, _SHIFT_X),
        "TranslateY": (_shift, _SHIFT_Y),
        "TranslateXRel": (_relative_shift, _SHIFT_X_REL),
        "TranslateYRel": (_relative_shift, _SHIFT_Y_REL),
        "Desaturate": (_between(0.5, 1.0), _plain(_desaturate)),
        "GaussianBlur": (_between(0.1, 2.0), _plain(_blur)),
        "GaussianBlurRand": (_between(0.0, 1.0), _random_blur),
    }
)
"""Name -> what makes a strength of a magnitude (None: there is none), and what changes an image."""
