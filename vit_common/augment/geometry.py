"""Random crops and their resize; turns, shears, scalings and shifts."""

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


def affine(
    image: PIL.Image.Image,
    angle: float,
    shift: tuple[float, float],
    scale: float,
    shear: float,
) -> PIL.Image.Image:
    """An image turned, scaled, sheared and shifted about its middle, as torchvision's
    `functional.affine` of a PIL image; bilinear, and black where nothing is left.

    Args:
        image: of any mode.
        angle: degrees, clockwise.
        shift: pixels to the right and down.
        scale: factor of the size of what is seen.
        shear: degrees, along the width.
    """
    turn, lean = math.radians(angle), math.tan(math.radians(shear))
    a, b = math.cos(turn), -math.cos(turn) * lean - math.sin(turn)
    c, d = math.sin(turn), -math.sin(turn) * lean + math.cos(turn)
    # Pillow wants the way back, and the determinant is 1 but for the scale.
    a, b, c, d = (value / scale for value in (d, -b, -c, a))
    x, y = image.width * 0.5, image.height * 0.5
    left, up = -x - shift[0], -y - shift[1]
    matrix = (a, b, a * left + b * up + x, c, d, c * left + d * up + y)
    return image.transform(
        image.size, PIL.Image.Transform.AFFINE, matrix, PIL.Image.Resampling.BILINEAR
    )


def affine_draw(
    most: tuple[float, float, float, float], size: tuple[int, int], source: Draws
) -> tuple[float, tuple[float, float], float, float]:
    """Arguments of `affine`, each uniform, in the order in which torchvision's `RandomAffine` draws
    them. (It rounds shifts to whole pixels.)

    Args:
        most: degrees to turn by, shares of the sides to shift by, share to scale by, and degrees
            to shear by; each in both directions.
        size: (height, width) of the image.
        source: of random numbers.
    """
    degrees, share, scale, shear = most
    angle = uniform(source, -degrees, degrees)
    shift = tuple(uniform(source, -share * side, share * side) for side in size[::-1])
    return (
        angle,
        (shift[0], shift[1]),
        uniform(source, 1 - scale, 1 + scale),
        uniform(source, -shear, shear),
    )
