"""All augmentation of one image that happens before it is part of a batch."""

from __future__ import annotations

import PIL.Image

from vit_common.augment.draws import Draws
from vit_common.augment.geometry import EITHER, RESAMPLING, crop_box
from vit_common.checks import check_positive
from vit_common.errors import InputError, shown
from vit_common.recipes import Recipe


class Augment:
    """Random crop, flip and change of colours of one image, as timm's training transforms.

    Args:
        recipe: its `crop_scale`, `crop_ratio`, `interpolation`, `flip`, `auto_augment` and
            `color_jitter` are used.
        size: of the result: (height, width), or the side of a square.
        channels: of the network's images: 1, 3 or 4.
        mean: of the network's images, by channel and from 0 to 1: the colour that shears, shifts
            and rotations leave behind. None is grey (128).

    Raises:
        InputError: a setting is out of its range.

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
        mean: tuple[float, ...] | None = None,
    ) -> None:
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        self.size = (check_positive("size", height), check_positive("size", width))
        self.channels = channels
        self.recipe = recipe
        if recipe.interpolation != "random" and recipe.interpolation not in RESAMPLING:
            raise InputError(
                f"`interpolation` must be random or one of {', '.join(RESAMPLING)}; given "
                f"{shown(recipe.interpolation)}."
            )

    def __call__(self, image: PIL.Image.Image, source: Draws) -> PIL.Image.Image:
        """The augmented image, of `size`.

        Args:
            image: of mode L, RGB or RGBA, as `channels` says.
            source: of random numbers; see `draws`.
        """
        image = self._cropped(image, source)
        if self.recipe.flip > 0 and source.random() < self.recipe.flip:
            image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        return image

    def _cropped(self, image: PIL.Image.Image, source: Draws) -> PIL.Image.Image:
        box = None
        if self.recipe.crop_scale is not None:
            top, left, height, width = crop_box(
                (image.height, image.width),
                self.recipe.crop_scale,
                self.recipe.crop_ratio,
                source,
            )
            box = (left, top, left + width, top + height)
        if self.recipe.interpolation == "random":
            resample = EITHER[int(source.random() * 2)]
        else:
            resample = RESAMPLING[self.recipe.interpolation]
        if box is not None:
            image = image.crop(box)
        return image.resize((self.size[1], self.size[0]), resample)
