"""Images of any kind to one array: convert, resize, centre crop, rescale, normalise.

Bit-equal to Transformers 4.57.6's processor on PIL and numpy wherever that works. After a resize
pixels are 8-bit, so rescaling and normalising are done on the 256 values a channel can have and
looked up.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image

from vit_common.errors import ImageError, InputError, shown, warn
from vit_common.files.texts import reason
from vit_common.images.floats import resize_floats
from vit_common.images.options import (
    FIRST,
    HALF_TO_EVEN,
    LAST,
    TO_ZERO,
    Recipe,
    check_pixels,
    rescale,
)
from vit_common.images.pictures import (
    PLAIN_MODES,
    convert_mode,
    eight_bit,
    is_image_file,
    load_image,
    value_range,
)


def _flatten(images: Any) -> Iterator[PIL.Image.Image | np.ndarray]:
    """Every image in nested lists and 4-D batches, in order; arrays of any framework as numpy."""
    if isinstance(images, (list, tuple)):
        for each in images:
            yield from _flatten(each)
    elif isinstance(images, PIL.Image.Image):
        yield images
    elif is_image_file(images):
        yield load_image(images)
    else:
        array = as_array(images)
        if array.ndim == 4:
            yield from array
        elif array.ndim in (2, 3):
            yield array
        else:
            raise ImageError(
                "an image array must have 2 dimensions (height, width), 3 with channels first or "
                f"last, or 4 as a batch of the latter; given shape {array.shape}."
            )


def as_array(image: Any) -> np.ndarray:
    if not isinstance(image, np.ndarray):
        if isinstance(image, (str, os.PathLike)):
            raise ImageError(
                f"an image must be a PIL image or an array; given the name {shown(image)}. Open it "
                "with `load_image` first."
            )
        if not hasattr(image, "__array__") or isinstance(image, (type, np.generic)):
            raise ImageError(
                "an image must be a PIL image, a numpy array, a torch, jax or tensorflow tensor, "
                f"or a list of these; given {type(image).__name__}."
            )
        try:
            if hasattr(image, "detach"):  # torch
                image = image.detach().cpu()
                if str(image.dtype) == "torch.bfloat16":  # numpy has none; float32 holds it exactly
                    image = image.float()
            image = np.asarray(image)
        except Exception as error:
            raise ImageError(
                f"a {type(image).__name__} cannot be read as an array ({reason(error)})."
            ) from error
    if image.dtype.kind not in "buif" and image.dtype.name != "bfloat16":
        raise ImageError(
            f"an image array must hold numbers (uint8 or float); given dtype {image.dtype}."
        )
    return image


def _find_layout(shape: tuple[int, ...], recipe: Recipe) -> str | None:
    """The axis of a 3-D array that is the channel; None if both ends could be.

    Transformers looks for 1 or 3 channels. The number of means, where it counts, is asked first,
    and 4 channels come last: four in front may as well be four grey images, as may three in front
    where the model is for grey ones, which Transformers refuses too.
    """
    wanted = () if recipe.channels is None else (recipe.channels,)
    for counts in (wanted, (1, 3), (4,)):
        first, last = shape[0] in counts, shape[2] in counts
        if first and not last and counts is not wanted and shape[0] > 1:
            grey = recipe.channels == 1
            if counts == (4,) or (grey and shape[0] == 3):
                raise ImageError(
                    f"an array of shape {shape} may be {shape[0]} grey images or one image with "
                    f"{shape[0]} channels. Give several images as a list, or with an axis of "
                    f"length 1 for the channel; for one image pass `input_data_format={FIRST!r}`."
                )
        if first and last:
            return None
        if first or last:
            return FIRST if first else LAST
    raise ImageError(
        f"no axis of an array of shape {shape} looks like the channel; wanted "
        f"{recipe.usual_channels} channels, first or last. Pass `input_data_format` "
        f"{FIRST!r} or {LAST!r} for another number of channels; give a batch of greyscale images "
        "as a list, or with an axis of length 1 for the channel."
    )


def _layouts(images: Sequence[PIL.Image.Image | np.ndarray], recipe: Recipe) -> list[str]:
    """The layout of each image. PIL images and 2-D arrays count as channels last."""
    layouts: list[str] = []
    unsure: list[int] = []
    sure: set[str] = set()
    for index, image in enumerate(images):
        layout: str | None = LAST
        if isinstance(image, np.ndarray) and image.ndim == 3:
            with _naming(index):
                layout = recipe.input_data_format or _find_layout(image.shape, recipe)
            unsure.append(index) if layout is None else sure.add(layout)
        layouts.append(layout or FIRST)
    if unsure and len(sure) == 1:  # the other arrays of the batch tell
        for index in unsure:
            layouts[index] = next(iter(sure))
    elif unsure:
        shape = getattr(images[unsure[0]], "shape", None)
        warn(
            f"{_indices(unsure)} of shape {shape} can be read with channels "
            f"first or last; taken as {FIRST}. Pass `input_data_format` to say which."
        )
    return layouts


def _indices(numbers: list[int]) -> str:
    more = f" (and {len(numbers) - 1} more)" if len(numbers) > 1 else ""
    return f"image {numbers[0]}{more}"


@contextlib.contextmanager
def _naming(index: int) -> Iterator[None]:
    """Say in a refusal which image it is about."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"image {index}: {error}") from error


# -- the pipeline


@dataclass
class _Prepared:
    """Pixels that are resized and cropped, with the arithmetic still to do.

    Attributes:
        values: (H, W, C), of any dtype; uint8 after a resize.
        was_scaled: the values went from 0 to 1 before they were made uint8 to be resized.
        looks_scaled: the image given had no value outside 0 to 1, and was not uint8.
    """

    values: np.ndarray
    recipe: Recipe
    was_scaled: bool = False
    looks_scaled: bool = False

    def __post_init__(self) -> None:
        self.table: np.ndarray | None = None
        if self.values.dtype == np.uint8 and (self.was_scaled or self.recipe.changes_values):
            every = np.arange(256, dtype=np.uint8)[:, None]
            every = np.broadcast_to(every, (256, self.values.shape[2]))
            self.table = self.recipe.arithmetic(every, self.was_scaled)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the result, in the layout asked for."""
        height, width, channels = self.values.shape
        if self.recipe.data_format == LAST:
            return height, width, channels
        return channels, height, width

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the result."""
        if self.table is not None:
            return self.table.dtype
        return self.recipe.arithmetic(np.zeros((1, self.values.shape[2]), self.values.dtype)).dtype

    def write(self, out: np.ndarray) -> np.ndarray:
        """Do the arithmetic into `out`, which has `shape` and a dtype that holds `dtype`."""
        last = out.transpose(1, 2, 0) if self.recipe.data_format == FIRST else out  # (H, W, C)
        if self.table is None:
            last[...] = self.recipe.arithmetic(self.values)
        else:
            for channel in range(last.shape[2]):
                column = np.ascontiguousarray(self.table[:, channel], dtype=out.dtype)
                # `clip` changes nothing (there are 256 rows) but spares a copy that `raise` makes.
                np.take(column, self.values[..., channel], out=last[..., channel], mode="clip")
        return out


def _prepare(image: PIL.Image.Image | np.ndarray, layout: str, recipe: Recipe) -> _Prepared:
    """Convert, resize and crop one image."""
    extent = image.size if isinstance(image, PIL.Image.Image) else image.shape
    if 0 in extent:
        raise ImageError(f"there are no pixels in an image of size {extent}.")
    looks_scaled = was_scaled = False
    source: PIL.Image.Image | np.ndarray
    if isinstance(image, PIL.Image.Image):
        source = _choose_mode(_decoded(image), recipe)
        target = None
        if source.mode not in PLAIN_MODES:
            source = three_axes(np.asarray(source))
    else:
        source = image.transpose(1, 2, 0) if layout == FIRST else three_axes(image)  # (H, W, C)
        target = _target_channels(image, source.shape[2], recipe)
    if isinstance(source, np.ndarray):
        looks_scaled = _check_values(source)
        if target is not None and target != source.shape[2]:
            source, was_scaled = _convert_channels(source, target, recipe)

    count = source.shape[2] if isinstance(source, np.ndarray) else len(source.getbands())
    if recipe.channels not in (None, count):
        hint = ""
        if recipe.do_convert_rgb is not None:
            hint = f"`do_convert_rgb=None` (it is {recipe.do_convert_rgb}), or "
        elif recipe.input_data_format and isinstance(image, np.ndarray) and image.ndim == 3:
            hint = f"an `input_data_format` that fits its shape {image.shape}, or "
        raise ImageError(
            f"has {count} channel{'s' * (count > 1)}, but `image_mean` and `image_std` are for "
            f"{recipe.channels}. Pass an image with {recipe.channels}, or {hint}a mean and a std "
            f"for {count}."
        )

    if recipe.do_rescale and recipe.rescales_first:
        source = three_axes(np.asarray(source)).astype(np.float32)
        source = source * np.float32(recipe.rescale_factor)
        if recipe.do_resize:
            height, width = output_size(source.shape[0], source.shape[1], recipe.size)
            check_pixels(height, width, "resize")
            source = resize_floats(source, height, width)
        recipe = replace(recipe, do_rescale=False)
    elif recipe.do_resize:
        if isinstance(source, np.ndarray):
            height, width = output_size(source.shape[0], source.shape[1], recipe.size)
            if source.dtype != np.uint8 or source.shape[:2] != (height, width):
                source, was_scaled = to_picture(source)
        else:
            height, width = output_size(source.height, source.width, recipe.size)
        if not isinstance(source, np.ndarray):
            source = resize(source, height, width, recipe.resample)
    values = source if isinstance(source, np.ndarray) else three_axes(np.asarray(source))
    if recipe.do_center_crop and recipe.crop_size is not None:
        height, width = recipe.crop_size["height"], recipe.crop_size["width"]
        usual = TO_ZERO if recipe.rescales_first else None
        values = center_crop(values, height, width, recipe.crop_rounding or usual)
    return _Prepared(values, recipe, was_scaled, looks_scaled)


def three_axes(values: np.ndarray) -> np.ndarray:
    return values[..., None] if values.ndim == 2 else values


def _decoded(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        name = getattr(image, "filename", "") or "of unknown origin"
        raise ImageError(f"the file {name} cannot be decoded: {reason(error)}.") from error
    return image


def _choose_mode(image: PIL.Image.Image, recipe: Recipe) -> PIL.Image.Image:
    """The image in a mode that the model can take.

    Transformers takes images with three bands as they are, and others as they are where it is
    given the layout and the means allow it; so those stay.
    """
    bands = len(image.getbands())
    if recipe.do_convert_rgb:
        return convert_mode(image, 3)
    told = recipe.input_data_format is not None and recipe.channels in (None, bands)
    if recipe.do_convert_rgb is False or told:
        return image if image.mode in ("I", "F") else eight_bit(image)
    if bands == 3 and recipe.channels in (None, 3):
        return image
    return convert_mode(image, recipe.channels or recipe.usual_channels)


def _target_channels(image: np.ndarray, count: int, recipe: Recipe) -> int | None:
    """Number of channels to give an array, or None to keep those it has."""
    if recipe.do_convert_rgb is False:
        return None
    if recipe.channels is not None:
        return recipe.channels
    # No means to fit: what Transformers takes stays as it is.
    if image.ndim == 2 or (recipe.input_data_format is None and count not in (1, 3)):
        return recipe.usual_channels
    return None


def _check_values(values: np.ndarray) -> bool:
    """Refuse NaN and infinity; whether the values look rescaled already, by the test of 4.57.6."""
    if values.dtype == np.uint8:
        return False
    low, high = value_range(values)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError("holds NaN or infinity; wanted finite numbers.")
    return low >= 0 and high <= 1


def _convert_channels(
    values: np.ndarray, target: int, recipe: Recipe
) -> tuple[PIL.Image.Image | np.ndarray, bool]:
    """Grey, RGB or RGBA to another of these, as `convert_mode` does it, where that can be."""
    count = values.shape[2]
    if count in (1, 3, 4) and target in (1, 3, 4):
        if values.dtype == np.uint8 or recipe.do_resize:
            picture, was_scaled = to_picture(values)
            return convert_mode(picture, target), was_scaled
        if target == 3:
            return (values[..., :3] if count == 4 else np.repeat(values, 3, axis=2)), False
    return values, False


def to_picture(values: np.ndarray) -> tuple[PIL.Image.Image, bool]:
    """(H, W, C) as a PIL image of 8 bits, and whether it was scaled by 255 for that.

    Source: `_rescale_for_pil_conversion` and `to_pil_image` of Transformers 4.57.6, which cut
    the fraction off.
    """
    if values.shape[2] > 4:
        raise ImageError(
            f"Pillow resizes images with 1 to 4 channels; given {values.shape[2]}. Resize it "
            "before and pass `do_resize=False`."
        )
    was_scaled = False
    if values.dtype != np.uint8:
        low, high = value_range(values)
        within = low >= 0 and high <= 255
        whole = within and bool(np.allclose(values, values.astype(int)))
        was_scaled = not whole and low >= 0 and high <= 1
        if not (whole or was_scaled):
            raise ImageError(
                f"to be resized, an array must hold whole numbers from 0 to 255, or numbers from 0 "
                f"to 1; given dtype {values.dtype} with values from {low:g} to {high:g}. Scale and "
                "round it to uint8; or, if it was resized and normalised before, pass "
                "`do_resize=False, do_rescale=False, do_normalize=False`."
            )
        values = (rescale(values, 255) if was_scaled else values).astype(np.uint8)
    return PIL.Image.fromarray(values[..., 0] if values.shape[2] == 1 else values), was_scaled


def resize(
    picture: PIL.Image.Image, height: int, width: int, resample: int, reducing_gap: Any = None
) -> PIL.Image.Image:
    """A picture of another size in pixels, by Pillow."""
    check_pixels(height, width, "resize")
    try:
        return picture.resize((width, height), resample=resample, reducing_gap=reducing_gap)
    except (MemoryError, OverflowError, ValueError) as error:
        raise ImageError(
            f"the image cannot be resized to {height} x {width} pixels (height x width): "
            f"{reason(error)}."
        ) from error


def output_size(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    """Height and width after the resize.

    Source for the shortest edge: `get_resize_output_image_size` of Transformers 4.57.6 with
    `default_to_square=False`.
    """
    if "shortest_edge" not in size:
        return size["height"], size["width"]
    short, long = min(height, width), max(height, width)
    new_short = size["shortest_edge"]
    new_long = int(new_short * long / short)
    return (new_long, new_short) if width <= height else (new_short, new_long)


def center_crop(
    values: np.ndarray, height: int, width: int, rounding: str | None = None
) -> np.ndarray:
    """The middle of (H, W, C), padded with zeros where a side is too short.

    Source: `center_crop` of Transformers 4.57.6's `image_transforms.py`; with `HALF_TO_EVEN`
    `torchvision.transforms.functional.center_crop`, with `TO_ZERO` the one of fast processors in
    Transformers' `image_processing_utils_fast.py`.
    """
    check_pixels(height, width, "crop")
    # How many rows and columns to cut off before the middle; those below zero are to be added.
    excess = [have - want for have, want in zip(values.shape, (height, width), strict=False)]
    if rounding == HALF_TO_EVEN:
        starts = [round(more / 2) if more >= 0 else -(-more // 2) for more in excess]
    elif rounding == TO_ZERO:
        starts = [int(more / 2) for more in excess]
    else:
        starts = [more // 2 for more in excess]
    top, left = (max(start, 0) for start in starts)
    values = values[top : top + height, left : left + width]
    if values.shape[:2] == (height, width):
        return values
    padded = np.zeros((height, width, values.shape[2]), values.dtype)
    top, left = (max(-start, 0) for start in starts)
    padded[top : top + values.shape[0], left : left + values.shape[1]] = values
    return padded


# -- single steps, for arrays of either layout


def layout_of(image: np.ndarray, given: str | None = None) -> str:
    """Which end of an array the channel is at: as given, or where there are 1 or 3 of them.

    Source: `infer_channel_dimension_format` of Transformers 4.57.6's `image_utils.py`.

    Raises:
        ImageError: the array has not 3 or 4 axes, or neither end looks like the channel.
    """
    if image.ndim not in (3, 4):
        raise ImageError(
            "an image array must have 3 dimensions, the channel first or last, or 4 as a batch; "
            f"given shape {image.shape}."
        )
    if given is not None:
        return given
    first, last = image.shape[-3] in (1, 3), image.shape[-1] in (1, 3)
    if not (first or last):
        raise ImageError(
            f"no axis of an array of shape {image.shape} looks like the channel; wanted 1 or 3 "
            f"channels, first or last. Pass `input_data_format` {FIRST!r} or {LAST!r}."
        )
    if first and last:
        warn(
            f"an image of shape {image.shape} can be read with channels first or last; taken as "
            f"{FIRST}. Pass `input_data_format` to say which."
        )
    return FIRST if first else LAST


def channels_last(image: np.ndarray, layout: str) -> np.ndarray:
    """An array of a layout as (..., H, W, C)."""
    return np.moveaxis(image, -3, -1) if layout == FIRST else image


def with_layout(values: np.ndarray, layout: str) -> np.ndarray:
    """(..., H, W, C) in a layout."""
    return np.moveaxis(values, -1, -3) if layout == FIRST else values


def resize_array(
    image: PIL.Image.Image | np.ndarray,
    size: Mapping[str, int],
    resample: int,
    layout: str,
    reducing_gap: Any = None,
) -> tuple[PIL.Image.Image, bool]:
    """An image at another size, as a PIL image, and whether it was scaled by 255 for that."""
    picture, was_scaled = image, False
    if isinstance(picture, np.ndarray):
        picture, was_scaled = to_picture(channels_last(picture, layout))
    height, width = output_size(picture.height, picture.width, size)
    return resize(picture, height, width, resample, reducing_gap), was_scaled


# -- all steps, for images of any kind


def run(images: Any, recipe: Recipe, stack: bool) -> list[np.ndarray] | np.ndarray:
    """Process images: a list of arrays in the layout asked for, or, with `stack`, one array.

    Args:
        images: a PIL image, an array or tensor, or lists of these, nested or not.
        recipe: what to do.
        stack: put all into one array, in one allocation.

    Raises:
        ImageError: there is no image, or one cannot be taken; says which.
        InputError: `stack` is asked for and the results differ in size.
    """
    flat: list[PIL.Image.Image | np.ndarray] = []
    unread = _flatten(images)
    while True:
        with _naming(len(flat)):
            image = next(unread, None)
        if image is None:
            break
        flat.append(image)
    if not flat:
        raise ImageError("`images` holds no image; wanted one at least.")

    prepared: list[_Prepared] = []
    for index, (image, layout) in enumerate(zip(flat, _layouts(flat, recipe), strict=True)):
        with _naming(index):
            prepared.append(_prepare(image, layout, recipe))
    scaled = [index for index, each in enumerate(prepared) if each.looks_scaled]
    if scaled and recipe.do_rescale:
        warn(
            f"{_indices(scaled)}: the values are between 0 and 1 already, and are rescaled again. "
            "Pass `do_rescale=False` to leave them so."
        )

    if not stack:
        return [each.write(np.empty(each.shape, each.dtype)) for each in prepared]
    shape = prepared[0].shape
    for index, each in enumerate(prepared):
        if each.shape != shape:
            raise InputError(
                f"`return_tensors` needs images of one shape; image 0 has {shape} and image "
                f"{index} has {each.shape} after processing. Pass `do_resize=True`, or "
                "`return_tensors=None` for a list."
            )
    batch = np.empty((len(prepared), *shape), np.result_type(*{each.dtype for each in prepared}))
    for out, each in zip(batch, prepared, strict=True):
        each.write(out)
    return batch
