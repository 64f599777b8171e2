"""Options of the image processors: what each may be, and the checked set that one call uses.

Names, defaults and arithmetic are those of Transformers 4.57.6
(`models/vit/image_processing_vit.py`, `image_transforms.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from PIL.Image import Resampling

from vit_common.errors import ImageError, InputError, shown, some

FIRST, LAST = "channels_first", "channels_last"
FRAMEWORKS = {"np": "NumPy", "pt": "PyTorch", "jax": "JAX", "tf": "TensorFlow"}
"""Values of `return_tensors`, beside None."""


_LARGEST = float(np.finfo(np.float32).max)
MOST_SIDE = 65_535  # of a JPEG; a side beyond it is a slip, and its pixels fill any memory
MOST_PIXELS = 2**28
"""Most pixels that a resize or a crop may make: those of 16384 x 16384."""


def check_pixels(height: int, width: int, what: str) -> None:
    """Raise ImageError where an image would be too large for any memory.

    Args:
        height, width: its size in pixels.
        what: name of the step that would make it.
    """
    if height * width > MOST_PIXELS:
        raise ImageError(
            f"the {what} would make an image of {height} x {width} pixels (height x width); at "
            f"most {MOST_PIXELS} pixels are made."
        )


def _fail(name: str, wanted: str, given: Any) -> NoReturn:
    raise InputError(f"`{name}` must be {wanted}; given {shown(given)}.")


def _plain_number(value: Any) -> int | float | None:
    """A Python number of the same value, or None where it is no number that float32 holds."""
    if isinstance(value, (np.integer, np.floating)):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if -_LARGEST <= value <= _LARGEST else None  # neither NaN is


def _flag(name: str, value: Any) -> bool | None:
    if value is not None and not isinstance(value, (bool, np.bool_)):
        _fail(name, "True or False", value)
    return None if value is None else bool(value)


def _pixels(name: str, value: Any) -> int:
    number = _plain_number(value)
    if not isinstance(number, int) or number < 1:
        _fail(name, "made of positive integers", value)
    if number > MOST_SIDE:
        _fail(name, f"at most {MOST_SIDE} pixels per side", value)
    return number


def _size(name: str, value: Any) -> dict[str, int]:
    """{"height", "width"} or {"shortest_edge"}; an int is a square, a pair (height, width)."""
    if isinstance(value, Mapping):
        if set(value) not in ({"height", "width"}, {"shortest_edge"}):
            _fail(name, "a dict with `height` and `width`, or with `shortest_edge`", dict(value))
        return {key: _pixels(name, side) for key, side in value.items()}
    if isinstance(value, (list, tuple)):
        if len(value) != 2:
            _fail(name, "an int, a pair or a dict", value)
        height, width = value
    else:
        height = width = value
    return {"height": _pixels(name, height), "width": _pixels(name, width)}


def _crop_size(name: str, value: Any) -> dict[str, int]:
    size = _size(name, value)
    if "shortest_edge" in size:
        _fail(name, "an int, a pair or a dict with `height` and `width`", value)
    return size


def _resample(name: str, value: Any) -> Resampling:
    with contextlib.suppress(ValueError, OverflowError):
        if isinstance(value, (int, float, np.integer)) and not isinstance(value, bool):
            return Resampling(int(value) if value == int(value) else -1)
    filters = ", ".join(f"{each.value} ({each.name})" for each in sorted(Resampling))
    _fail(name, f"one of Pillow's filters {filters}", value)


def _factor(name: str, value: Any) -> int | float:
    number = _plain_number(value)
    return _fail(name, "a finite number", value) if number is None else number


def _channel_values(name: str, value: Any) -> int | float | list[int | float]:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (list, tuple, np.ndarray)):
        numbers = [_plain_number(each) for each in value]
        if not numbers or None in numbers:
            _fail(name, "a finite number, or a list with one per channel", value)
        return numbers  # type: ignore[return-value]  # None was refused
    number = _plain_number(value)
    if number is None:
        _fail(name, "a finite number, or a list with one per channel", value)
    return number


def _std(name: str, value: Any) -> int | float | list[int | float]:
    values = _channel_values(name, value)
    if 0 in np.atleast_1d(np.asarray(values, np.float32)):
        _fail(name, "free of zeros, as pixels are divided by it", value)
    return values


def _crop_rounding(name: str, value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or value not in CROP_ROUNDINGS):
        _fail(name, "None or one of " + ", ".join(map(repr, CROP_ROUNDINGS)), value)
    return value


def _layout_name(name: str, value: Any) -> str | None:
    value = getattr(value, "value", value)  # Transformers' enumeration is taken too
    if value is not None and (not isinstance(value, str) or value not in (FIRST, LAST)):
        _fail(name, f"{FIRST!r} or {LAST!r}", value)
    return value


def check_framework(name: str, value: Any) -> str | None:
    """One of `FRAMEWORKS`, or None."""
    value = getattr(value, "value", value)
    if value is not None and (not isinstance(value, str) or value not in FRAMEWORKS):
        _fail(name, "None, " + ", ".join(map(repr, FRAMEWORKS)), value)
    return value


HALF_TO_EVEN = "half_to_even"
TO_ZERO = "to_zero"  # no option: of processors that rescale first
CROP_ROUNDINGS = ("floor", HALF_TO_EVEN)
"""Where a crop starts if half of what is cut off is no whole number: rounded down, as Transformers
does it, or to the even number, as torchvision and so timm do it."""

OPTIONS: dict[str, Callable[[str, Any], Any]] = {
    "do_resize": _flag,
    "size": _size,
    "resample": _resample,
    "do_center_crop": _flag,
    "crop_size": _crop_size,
    "crop_rounding": _crop_rounding,
    "do_rescale": _flag,
    "rescale_factor": _factor,
    "do_normalize": _flag,
    "image_mean": _channel_values,
    "image_std": _std,
    "do_convert_rgb": _flag,
    "data_format": _layout_name,
    "input_data_format": _layout_name,
    "return_tensors": check_framework,
}

PAIRS = ("size", "crop_size")
"""Options that may be given as a pair of sides."""

# Keys of other families' processors in Transformers 4.57.6 that change pixels in a way the pipeline
# does not; beside them, any `do_...` that is true and that nobody listed as harmless.
_CHANGES_PIXELS = (
    "crop_pct",  # ConvNeXT, PoolFormer
    "size_divisor",  # DPT, GLPN, Swin2SR
    "keep_aspect_ratio",  # DPT
    "ensure_multiple_of",  # DPT
    "rescale_offset",  # EfficientNet
    "include_top",  # EfficientNet
    "offset",  # ViViT
    "rescale_value",  # LayoutLMv3
    "clusters",  # ImageGPT
    "pretrained_cfg",  # timm's own pipeline
)
_HARMLESS = ("do_reduce_labels", "do_convert_annotations")  # labels only, not pixels


def refuse_unsupported(keys: Mapping[str, Any]) -> None:
    """Raise InputError if an unknown key asks for something that the pipeline does not do."""
    named = [
        f"`{shown(key)[1:-1]}` ({shown(value)})"
        for key, value in keys.items()
        if not (value is None or value is False or value is np.False_)
        and (key in _CHANGES_PIXELS or (key.startswith("do_") and key not in _HARMLESS))
    ]
    if named:
        raise InputError(
            f"options that change pixels and are not supported here: {some(named, 5)}. Set them "
            "to None or False if the model can do without."
        )


@dataclass(frozen=True)
class Recipe:
    """The options of one call, checked and complete."""

    do_resize: bool
    size: dict[str, int]
    resample: Resampling
    do_center_crop: bool
    crop_size: dict[str, int] | None
    crop_rounding: str | None
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: float | list[float]
    image_std: float | list[float]
    do_convert_rgb: bool | None
    data_format: str
    input_data_format: str | None
    return_tensors: str | None
    rescales_first: bool = False
    """Whether pixels are rescaled before they are resized, and never rounded to 8 bits."""

    def __post_init__(self) -> None:
        counts = self._counts
        if self.do_normalize and len(counts) == 2 and counts[0] != counts[1]:
            raise InputError(
                f"`image_mean` and `image_std` must be of one length; given {counts[0]} and "
                f"{counts[1]} values."
            )
        if self.do_center_crop and self.crop_size is None:
            raise InputError("`do_center_crop` needs `crop_size`, an int or a dict; given None.")

    @property
    def _counts(self) -> list[int]:
        return [len(v) for v in (self.image_mean, self.image_std) if isinstance(v, list)]

    @property
    def channels(self) -> int | None:
        """Number of channels that the arithmetic needs; None where any number will do."""
        return self._counts[0] if self.do_normalize and self._counts else None

    @property
    def usual_channels(self) -> int:
        """Number of channels of the model, as far as the options show."""
        return self._counts[0] if self._counts else 3

    @property
    def changes_values(self) -> bool:
        return self.do_rescale or self.do_normalize

    def arithmetic(self, values: np.ndarray, was_scaled: bool = False) -> np.ndarray:
        """Rescale and normalise an array whose last axis is the channel.

        Source: `rescale` and `normalize` of Transformers 4.57.6's `image_transforms.py`: rescaling
        multiplies in float64 and keeps float32; normalising subtracts and divides in the dtype of
        the image if that is a float, else in float32.
        """
        if was_scaled:
            values = rescale(values, 1 / 255)
        if self.do_rescale:
            values = rescale(values, self.rescale_factor)
        if self.do_normalize:
            if not np.issubdtype(values.dtype, np.floating):
                values = values.astype(np.float32)
            mean = np.array(self.image_mean, dtype=values.dtype)
            std = np.array(self.image_std, dtype=values.dtype)
            values = values - mean
            values /= std
        return values


def rescale(values: np.ndarray, factor: float) -> np.ndarray:
    """`values * factor`, multiplied in float64 and kept as float32."""
    return np.multiply(values, factor, dtype=np.float64).astype(np.float32)
