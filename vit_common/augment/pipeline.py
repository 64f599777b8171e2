"""All augmentation of one image that happens before it is part of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import PIL.Image

from vit_common.augment.auto import auto_augment
from vit_common.augment.colour import color_jitter
from vit_common.augment.draws import Draws
from vit_common.augment.geometry import EITHER, RESAMPLING, affine, affine_draw, crop_box
from vit_common.checks import check_positive
from vit_common.errors import InputError
from vit_common.recipes import Recipe

Picture = TypeVar("Picture", PIL.Image.Image, np.ndarray)


class Augment:
    """Random crop, flip and change of colours of one image, as timm's training transforms.

    In this order: crop and resize, flip, `affine`, `auto_augment`, colour jitter. As in timm, there
    is no colour jitter beside an automatic augmentation, unless that is 3-Augment.

    Args:
        recipe: its `crop_scale`, `crop_ratio`, `interpolation`, `flip`, `affine`, `auto_augment`
            and `color_jitter` are used.
        size: of the result: (height, width), or the side of a square.
        channels: of the network's images. Changes of colour need 1 or 3 of them.
        mean: of the network's images, by channel and from 0 to 1: the colour that shears, shifts
            and rotations leave behind, as in timm. None is grey (128).

    Raises:
        InputError: there is no such augmentation, or it does not suit the number of channels.

    Example:
        >>> augment = Augment(recipe("fine-tune"), 224)
        >>> augment(load_image("photo.jpg"), draws(seed=0, epoch=3, index=17)).size
        (224, 224)
    """

    def __init__(
        self,
        recipe: Recipe,
        size: int | tuple[int, int],
        *,
        channels: int = 3,
        mean: Sequence[float] | None = None,
    ) -> None:
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        self.size = (check_positive("size", height), check_positive("size", width))
        self.channels = check_positive("channels", channels)
        self.recipe = recipe
        self.mean = None if mean is None else tuple(mean)
        self._auto = None
        if recipe.auto_augment:
            self._check_colours("auto_augment", (1, 3))
            grey = (0.5,) * channels  # 128 after rounding
            colour = tuple(min(255, round(255 * value)) for value in self.mean or grey)
            self._auto = auto_augment(
                recipe.auto_augment,
                size=self.size,
                fill=colour[0] if channels == 1 else colour,
                resample=RESAMPLING.get(recipe.interpolation),
            )
        self._jitter = recipe.color_jitter
        if self._jitter:
            self._check_colours("color_jitter", (1, 3, 4))
        if recipe.auto_augment and "3a" not in recipe.auto_augment:
            self._jitter = 0.0

    def __getstate__(self) -> dict[str, Any]:
        keywords = {"channels": self.channels, "mean": self.mean}
        return {"given": (self.recipe, self.size), "keywords": keywords}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["given"], **state["keywords"])  # type: ignore[misc]

    def _check_colours(self, name: str, channels: tuple[int, ...]) -> None:
        if self.channels not in channels:
            raise InputError(
                f"`{name}` changes colours, so it needs images with "
                f"{' or '.join(map(str, channels))} channels; the model's have {self.channels}. "
                "Use a recipe without it."
            )

    def __call__(self, image: Picture, source: Draws) -> Picture:
        """The augmented image, of `size`.

        Args:
            image: of mode L, RGB or RGBA, or an array (H, W, C) of another number of channels.
            source: of random numbers; see `draws`.
        """
        if isinstance(image, np.ndarray):
            move = self._moves((image.shape[0], image.shape[1]), source)
            turn = self._turn(source)
            bands = [PIL.Image.fromarray(image[..., i]) for i in range(image.shape[2])]
            return np.stack(
                [np.asarray(turn(_moved(band, self.size, *move))) for band in bands], -1
            )
        image = _moved(image, self.size, *self._moves((image.height, image.width), source))
        image = self._turn(source)(image)
        if self._auto is not None:
            image = self._auto(image, source)
        if self._jitter:
            image = color_jitter(image, self._jitter, source)
        return image

    def _turn(self, source: Draws) -> Callable[[PIL.Image.Image], PIL.Image.Image]:
        """What turns, shears, scales and shifts an image, or leaves it."""
        most = self.recipe.affine
        if most is None:
            return lambda image: image
        drawn = affine_draw(most, self.size, source)
        return lambda image: affine(image, *drawn)

    def _moves(
        self, size: tuple[int, int], source: Draws
    ) -> tuple[tuple[int, int, int, int] | None, PIL.Image.Resampling, bool]:
        """What is cropped, how it is resized, and whether it is flipped."""
        recipe = self.recipe
        box = None
        if recipe.crop_scale is not None:
            top, left, height, width = crop_box(size, recipe.crop_scale, recipe.crop_ratio, source)
            box = (left, top, left + width, top + height)
        if recipe.interpolation == "random":
            resample = EITHER[int(source.random() * 2)]
        else:
            resample = RESAMPLING[recipe.interpolation]
        return box, resample, recipe.flip > 0 and source.random() < recipe.flip


def _moved(
    image: PIL.Image.Image,
    size: tuple[int, int],
    box: tuple[int, int, int, int] | None,
    resample: PIL.Image.Resampling,
    flip: bool,
) -> PIL.Image.Image:
    if box is not None:
        image = image.crop(box)
    image = image.resize((size[1], size[0]), resample)
    return image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
