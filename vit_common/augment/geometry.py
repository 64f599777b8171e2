"""Random crops and their resize."""

from __future__ import annotations

import math

import PIL.Image

from vit_common.augment.draws import Draws, integer, uniform

RESAMPLING = {
    "nearest": PIL.Image.Resampling.NEAREST,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "box": PIL.Image.Resampling.BOX,
    "hamming": PIL.Image.Resampling.HAMMING,
    "lanczos": PIL.Image.Resampling.LANCZOS,
}
"""Names of `interpolation` besides "random", which is bilinear or bicubic."""

EITHER = (PIL.Image.Resampling.BILINEAR, PIL.Image.Resampling.BICUBIC)


def crop_box(
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    source: Draws,
) -> tuple[int, int, int, int]:
    """A random part of an image by area and aspect, as timm's `RandomResizedCropAndInterpolation`.

    Args:
        size: (height, width) of the image.
        scale: range of the part's area, of the image's.
        ratio: range of its width by its height; its logarithm is uniform.
        source: of random numbers.

    Returns:
        (top, left, height, width). Ten tries that do not fit lead to the largest part in the middle
        whose aspect is allowed.
    """
    image_height, image_width = size
    area = image_width * image_height
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        target = uniform(source, *scale) * area
        aspect = math.exp(uniform(source, low, high))
        width = round(math.sqrt(target * aspect))
        height = round(math.sqrt(target / aspect))
        if width <= image_width and height <= image_height:
            top = integer(source, 0, image_height - height)
            left = integer(source, 0, image_width - width)
            return top, left, height, width
    given = image_width / image_height
    width, height = image_width, image_height
    if given < min(ratio):
        height = round(width / min(ratio))
    elif given > max(ratio):
        width = round(height * max(ratio))
    return (image_height - height) // 2, (image_width - width) // 2, height, width
