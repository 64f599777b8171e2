"""Random changes of colour: torchvision's `ColorJitter`."""

from __future__ import annotations

import PIL.Image
from PIL import ImageEnhance

from vit_common.augment.draws import Draws, uniform

_KINDS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def color_jitter(image: PIL.Image.Image, strength: float, source: Draws) -> PIL.Image.Image:
    """Brightness, contrast and saturation by factors from 1 - strength (0 at least) to 1 +
    strength, one after the other in random order; as torchvision's `ColorJitter(s, s, s)`.

    Args:
        image: of mode L, RGB or RGBA.
        strength: 0 changes nothing.
        source: of random numbers: three for the order, then three for the factors.
    """
    ranks = [source.random() for _ in _KINDS]
    factors = [uniform(source, max(0.0, 1.0 - strength), 1.0 + strength) for _ in _KINDS]
    for place in sorted(range(len(_KINDS)), key=ranks.__getitem__):
        image = _KINDS[place](image).enhance(factors[place])
    return image
