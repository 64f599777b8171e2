"""`ViTImageProcessor`: from images to the `pixel_values` both twins take.

The arithmetic, the option names and the files are those of Transformers 4.57.6's processor on PIL
and numpy (`models/vit/image_processing_vit.py`), to the bit wherever that one works. Where it fails
with an unrelated error, or guesses, this one does what the caller meant or says what to pass.
One pipeline (`pipeline.py`) serves every processor of the family; a processor is its defaults.

Numpy and Pillow only; a framework is imported where `return_tensors` asks for it.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
from PIL.Image import Resampling

from vit_common.config_fields import check_depth
from vit_common.errors import ConfigError, ImageError, InputError, ViTError, shown, warn
from vit_common.files.hub import (
    AbsentFileError,
    find_file,
    push_file,
    push_if_asked,
    split_hub_options,
)
from vit_common.files.replace import make_directory, write_text
from vit_common.files.texts import read_json, reason
from vit_common.images.options import (
    FIRST,
    FRAMEWORKS,
    OPTIONS,
    PAIRS,
    Recipe,
    check_framework,
    refuse_unsupported,
    rescale,
)
from vit_common.images.pictures import convert_mode, load_image
from vit_common.images.pipeline import (
    as_array,
    center_crop,
    channels_last,
    layout_of,
    resize_array,
    run,
    three_axes,
    with_layout,
)

__all__ = [
    "BaseImageProcessor",
    "BatchFeature",
    "MissingFrameworkError",
    "ViTFeatureExtractor",
    "ViTImageProcessor",
    "ViTImageProcessorFast",
    "convert_mode",
    "load_image",
]

PROCESSOR_NAME = "preprocessor_config.json"

# Keys that files carry about the class that wrote them.
_SERVICE_KEYS = ("image_processor_type", "feature_extractor_type", "_valid_processor_keys")
_MODULES = {"np": "numpy", "pt": "torch", "jax": "jax", "tf": "tensorflow"}


class MissingFrameworkError(InputError, ImportError):
    """`return_tensors` names a framework that is not installed.

    Transformers raises `ImportError` here, so this is one.
    """


# -- the result


def _converter(framework: str) -> Callable[[Any], Any]:
    """The function that makes a tensor of an array; imports the framework."""
    try:
        if framework == "pt":
            import torch

            return torch.from_numpy
        if framework == "jax":
            import jax.numpy as jnp

            return jnp.asarray
        if framework == "tf":
            import tensorflow as tf

            return tf.constant
    except ImportError as error:
        raise MissingFrameworkError(
            f"`return_tensors={framework!r}` needs {FRAMEWORKS[framework]}, which cannot be "
            f"imported here ({reason(error)}). Install it, or pass another of "
            + ", ".join(map(repr, FRAMEWORKS))
            + "."
        ) from error
    return np.asarray


class BatchFeature(UserDict):
    """Result of a processor: a mapping with `pixel_values`, which are attributes too.

    Args:
        data: the mapping.
        tensor_type: "np", "pt", "jax" or "tf" to convert every value at once; None leaves them.
    """

    def __init__(self, data: Mapping[str, Any] | None = None, tensor_type: Any = None) -> None:
        super().__init__(data)
        self.convert_to_tensors(tensor_type)

    def __getattr__(self, name: str) -> Any:
        # `data` itself is asked for before it is there when one of these is unpickled or copied.
        if name == "data" or name not in self.data:
            raise AttributeError(f"{type(self).__name__} has no attribute or key {name!r}")
        return self.data[name]

    def convert_to_tensors(self, tensor_type: Any = None) -> BatchFeature:
        """Convert every value to the tensors of a framework, in place.

        Raises:
            InputError: images of several sizes cannot be one tensor, or the framework is missing.
        """
        tensor_type = check_framework("tensor_type", tensor_type)
        if tensor_type is None:
            return self
        to_tensor = _converter(tensor_type)
        for name, value in self.data.items():
            if type(value).__module__.startswith(_MODULES[tensor_type]):  # jaxlib too
                continue
            try:
                self.data[name] = to_tensor(np.asarray(value))
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"`{name}` cannot be made one {FRAMEWORKS[tensor_type]} tensor: "
                    f"{reason(error)}."
                ) from error
        return self

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Move torch tensors to a device or, those of floats, to a dtype; other values stay.

        Takes what `torch.Tensor.to` takes, in place.
        """
        device = kwargs.get("device")
        if device is None and args and not str(args[0]).startswith("torch."):
            device = args[0]
        for name, value in self.data.items():
            if not hasattr(value, "is_floating_point"):
                continue
            if value.is_floating_point():
                self.data[name] = value.to(*args, **kwargs)
            elif device is not None:
                waiting = kwargs.get("non_blocking", False)
                self.data[name] = value.to(device=device, non_blocking=waiting)
        return self


# -- the processors


def _signature(first: Sequence[str], names: Mapping[str, Any]) -> inspect.Signature:
    """The signature with these arguments, the first ones without default."""
    usual = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            *(inspect.Parameter(name, usual) for name in first),
            *(inspect.Parameter(name, usual, default=value) for name, value in names.items()),
            inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD),
        ]
    )


def _by_name(what: str, order: Sequence[str], args: tuple, options: dict[str, Any]) -> dict:
    """The arguments of a call, those given by place too, by name."""
    if len(args) > len(order):
        raise TypeError(f"{what} takes at most {len(order)} options by place; given {len(args)}")
    for name, value in zip(order, args, strict=False):
        if name in options:
            raise TypeError(f"{what} got multiple values for argument {name!r}")
        options[name] = value
    return options


class BaseImageProcessor:
    """Options that are kept, checked where they are set, and written to a file; and the pipeline.

    A subclass is two rows: `_defaults`, its options with their defaults in the order of its
    constructor, and `_call_order`, the options of a call in their order. The signatures are made
    from them.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]
    _auto_class: ClassVar[None] = None
    _defaults: ClassVar[dict[str, Any]] = {
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "resample": Resampling.BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": None,
    }
    _call_order: ClassVar[tuple[str, ...]] = ()
    _pairs_are_width_height: ClassVar[bool] = False
    _int_is_shortest_edge: ClassVar[bool] = False  # as `size`; else it is a square
    _rescales_first: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "_call_order" in own:
            # Lists and dicts are made anew for each processor, so the signature says None.
            plain = {
                name: None if isinstance(value, (list, dict)) else value
                for name, value in cls._defaults.items()
            }
            cls.__signature__ = _signature((), plain)  # type: ignore[attr-defined]
            if "preprocess" not in own:
                cls.preprocess = _preprocess_of(cls._call_order)  # type: ignore[method-assign]
        elif "__init__" in own:
            cls.__signature__ = None  # type: ignore[attr-defined]  # its own

    # Options that are written only if they were given.
    do_center_crop: bool | None = None
    crop_size: dict[str, int] | None = None
    crop_rounding: str | None = None
    do_convert_rgb: bool | None = None
    data_format: str | None = None
    input_data_format: str | None = None
    return_tensors: str | None = None

    _processor_class: str | None

    def __init__(self, *args: Any, **options: Any) -> None:
        options = _by_name(type(self).__name__, tuple(self._defaults), args, options)
        refuse_unsupported({k: v for k, v in options.items() if k not in OPTIONS})
        # Files that name a feature extractor and hold a pair are older than the order
        # (height, width).
        old = options.get("feature_extractor_type") is not None
        if old and not self._pairs_are_width_height:
            for name in PAIRS:
                if isinstance(options.get(name), (list, tuple)):
                    options[name] = options[name][::-1]
        self._processor_class = options.pop("processor_class", None)
        for name, value in {**self._defaults, **options}.items():
            if name not in _SERVICE_KEYS:
                self._set(name, value)

    def _set(self, name: str, value: Any) -> None:
        """Set an option, or keep a key that is none."""
        check_depth(name, value, InputError)
        if name in OPTIONS:
            setattr(self, name, value)
            return
        taken = getattr(type(self), name, None)
        if name.startswith("__") or callable(taken) or name in vars(BaseImageProcessor):
            if isinstance(taken, property):
                self.__dict__[name] = value  # kept for the file; the property stays what it is
                return
            if name != "model_input_names":
                kind = "a method" if callable(taken) else "an attribute"
                raise InputError(
                    f"`{shown(name)[1:-1]}` is {kind} of {type(self).__name__}, not an option."
                )
        setattr(self, name, copy.deepcopy(value))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self._checked(name, value))

    def _checked(self, name: str, value: Any) -> Any:
        check = OPTIONS.get(name)
        if check is None:
            return value
        if value is None and not name.startswith("do_"):  # a flag that is None counts as off
            value = copy.deepcopy(self._defaults.get(name))
            if value is None:
                return None
        elif self._pairs_are_width_height and name in PAIRS and isinstance(value, (list, tuple)):
            value = value[::-1]
        elif (
            self._int_is_shortest_edge
            and name == "size"
            and not isinstance(value, (Mapping, list, tuple))
        ):
            value = {"shortest_edge": value}
        return check(name, value)

    @property
    def is_fast(self) -> bool:
        """False: the arithmetic is that of Transformers' processor on PIL and numpy."""
        return False

    def __call__(self, images: Any, **options: Any) -> BatchFeature:
        """The same as `preprocess`."""
        return self.preprocess(images, **options)

    def preprocess(self, images: Any, *args: Any, **options: Any) -> BatchFeature:
        """Make `pixel_values` of images.

        Args:
            images: one image or several, nested or not in lists. An image is a PIL image, an array
                or tensor (H, W), (H, W, C) or (C, H, W), or an image file: its bytes, or the file
                open for reading. A batch of arrays with 4 axes is several images. Values from 0 to
                255.
            **options: any option of the constructor, for this call; None means the processor's.

        Returns:
            A mapping with `pixel_values`: float32 (B, C, H, W), or a list of (C, H, W) if
            `return_tensors` is None; channels last if `data_format` says so.

        Raises:
            ImageError: an image cannot be taken; says which one and what to pass.
            InputError: an option is wrong, or the images cannot be stacked.

        Example:
            >>> processor(load_image("photo.jpg"), return_tensors="np")["pixel_values"].shape
            (1, 3, 224, 224)
        """
        options = self._checked_call(_by_name("preprocess", self._call_order, args, options))
        unknown = [name for name in options if name not in OPTIONS]
        if unknown:
            warn(
                f"{type(self).__name__} does not know these options of a call and ignores them: "
                f"{', '.join(unknown)}."
            )
        table: dict[str, Any] = {}
        for name, check in OPTIONS.items():
            if options.get(name) is not None:
                table[name] = self._checked(name, options[name])
            else:  # checked again, as a dict or a list can be changed from outside
                kept = getattr(self, name, None)
                table[name] = None if kept is None else check(name, kept)
        table["data_format"] = table["data_format"] or FIRST
        recipe = Recipe(**table, rescales_first=self._rescales_first)
        if recipe.return_tensors is None:
            return BatchFeature({"pixel_values": run(images, recipe, stack=False)})
        to_tensor = _converter(recipe.return_tensors)  # before the work, as it may not be there
        return BatchFeature({"pixel_values": to_tensor(run(images, recipe, stack=True))})

    def _checked_call(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a call, without those that are not the pipeline's."""
        return options

    # -- single steps, as methods; each takes and gives an array of either layout

    def resize(
        self,
        image: Any,
        size: int | Sequence[int] | Mapping[str, int],
        resample: int | None = None,
        data_format: str | None = None,
        input_data_format: str | None = None,
        reducing_gap: float | None = None,
        return_numpy: bool = True,
    ) -> Any:
        """An image at another size.

        Args:
            image: (H, W, C) or (C, H, W), or a PIL image.
            size: the size, as the option `size` has it, in pixels.
            resample: one of Pillow's filters; by default the one that the class has by default.
            data_format: layout of the result; by default that of the image.
            input_data_format: layout of the image; by default found in its shape.
            reducing_gap: as in `PIL.Image.Image.resize`.
            return_numpy: whether to give an array; else a PIL image.

        Returns:
            The resized image: uint8, or float32 from 0 to 1 if the image held such numbers.

        Raises:
            ImageError: the image or its layout cannot be taken.
            InputError: an option is wrong.
        """
        image, layout, wanted = self._one(image, data_format, input_data_format)
        chosen = self._checked("size", size)
        filter_ = self._checked(
            "resample", self._defaults["resample"] if resample is None else resample
        )
        picture, was_scaled = resize_array(image, chosen, filter_, layout, reducing_gap)
        if not return_numpy:
            return picture
        values = with_layout(three_axes(np.array(picture)), wanted)
        return rescale(values, 1 / 255) if was_scaled else values

    def rescale(
        self,
        image: Any,
        scale: float,
        data_format: str | None = None,
        input_data_format: str | None = None,
        dtype: Any = np.float32,
    ) -> np.ndarray:
        """An image times a number, multiplied in float64.

        Args:
            image: an array of any shape; (H, W, C) or (C, H, W) if `data_format` is given.
            scale: the factor.
            data_format: layout of the result; by default that of the image.
            input_data_format: layout of the image; by default found in its shape.
            dtype: dtype of the result.

        Raises:
            ImageError: the image or its layout cannot be taken.
            InputError: an option is wrong.
        """
        factor = self._checked("rescale_factor", scale)
        values = _as_image_array(image).astype(np.float64) * factor
        if data_format is not None:
            values, layout, wanted = self._one(values, data_format, input_data_format)
            values = with_layout(channels_last(values, layout), wanted)
        return values.astype(dtype)

    def normalize(
        self,
        image: Any,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        data_format: str | None = None,
        input_data_format: str | None = None,
    ) -> np.ndarray:
        """An image minus the mean, divided by the standard deviation, channel by channel.

        Args:
            image: (H, W, C) or (C, H, W), or a batch of these.
            mean, std: one number per channel, or one for all.
            data_format: layout of the result; by default that of the image.
            input_data_format: layout of the image; by default found in its shape.

        Returns:
            The result, of the image's dtype if that is a float, else float32.

        Raises:
            ImageError: the image or its layout cannot be taken.
            InputError: an option is wrong, or not one number per channel.
        """
        values, layout, wanted = self._one(_as_image_array(image), data_format, input_data_format)
        values = channels_last(values, layout)
        if not np.issubdtype(values.dtype, np.floating):
            values = values.astype(np.float32)
        count = values.shape[-1]
        numbers = []
        for name, value in (("image_mean", mean), ("image_std", std)):
            each = self._checked(name, value)
            if isinstance(each, list) and len(each) != count:
                raise InputError(
                    f"`{name.removeprefix('image_')}` must have {count} values, one per channel; "
                    f"given {len(each)}."
                )
            numbers.append(np.array(each, dtype=values.dtype))
        return with_layout((values - numbers[0]) / numbers[1], wanted)

    def center_crop(
        self,
        image: Any,
        size: int | Sequence[int] | Mapping[str, int],
        data_format: str | None = None,
        input_data_format: str | None = None,
    ) -> np.ndarray:
        """The middle of an image, padded with zeros where it is too small.

        Args:
            image: (H, W, C) or (C, H, W).
            size: height and width of the crop, as the option `crop_size` has them, in pixels.
            data_format: layout of the result; by default that of the image.
            input_data_format: layout of the image; by default found in its shape.

        Raises:
            ImageError: the image or its layout cannot be taken.
            InputError: an option is wrong.
        """
        values, layout, wanted = self._one(_as_image_array(image), data_format, input_data_format)
        if values.ndim != 3:
            raise ImageError(f"`image` must be one image with 3 axes; given shape {values.shape}.")
        crop = self._checked("crop_size", size)
        values = channels_last(values, layout)
        values = center_crop(values, crop["height"], crop["width"], self.crop_rounding)
        return with_layout(values, wanted)

    def _one(self, image: Any, data_format: Any, input_data_format: Any) -> tuple[Any, str, str]:
        """An image, its layout, and the layout of the result."""
        given = self._checked("input_data_format", input_data_format)
        wanted = self._checked("data_format", data_format)
        if isinstance(image, PIL.Image.Image):
            layout = given or "channels_last"
        else:
            image = as_array(image)
            layout = layout_of(image, given)
        return image, layout, wanted or layout

    # -- files

    def to_dict(self) -> dict[str, Any]:
        """Every option as JSON holds it, unknown keys included."""
        out = {k: copy.deepcopy(v) for k, v in vars(self).items() if k != "_processor_class"}
        out["resample"] = int(out["resample"])
        out["image_processor_type"] = self._written_type()
        if self._processor_class is not None:
            out["processor_class"] = self._processor_class
        return out

    @classmethod
    def _written_type(cls) -> str:
        return cls.__name__

    def to_json_string(self) -> str:
        """The text of `preprocessor_config.json`: sorted keys, two spaces of indent.

        Raises:
            InputError: an unknown key holds what JSON cannot.
        """
        table = {
            k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in self.to_dict().items()
        }
        try:
            json.dumps(table, ensure_ascii=False).encode()  # half a surrogate pair is no text
            return json.dumps(table, indent=2, sort_keys=True, allow_nan=False) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"an option of the image processor cannot be written as JSON ({reason(error)})."
            ) from error

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write `to_json_string()`; the old file survives a failure."""
        write_text(json_file_path, self.to_json_string())

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> list[str]:
        """Write `preprocessor_config.json` into a directory, made if it is not there.

        `push_to_hub=True` (with `repo_id`, `token`, ...) uploads the directory afterwards.

        Returns:
            The path of the file, in a list, as Transformers does.

        Raises:
            MissingFileError: the directory cannot be made or written.
        """
        directory = make_directory(save_directory)
        self.to_json_file(directory / PROCESSOR_NAME)
        push_if_asked(directory, kwargs, files=[PROCESSOR_NAME])
        return [str(directory / PROCESSOR_NAME)]

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str | None:
        """Upload `preprocessor_config.json` to a Hub repository, made if it is not there.

        Args:
            repo_id: "owner/name".
            **kwargs: `token`, `private`, `revision`, `commit_message` and `create_pr`.

        Returns:
            The address of the commit.

        Raises:
            MissingFileError: the Hub cannot be reached or refuses.
        """
        return push_file(self.to_json_file, PROCESSOR_NAME, repo_id, **kwargs)

    @classmethod
    def from_dict(cls, image_processor_dict: Mapping[str, Any], **overrides: Any) -> Any:
        """Build from a dict such as `to_dict()` gives; `overrides` win over it.

        Overrides that are no option and no key of the dict are ignored with a warning; with
        `return_unused_kwargs=True` the result is `(processor, unused)` and holds them.
        """
        if not isinstance(image_processor_dict, Mapping):
            raise InputError(
                "expected a mapping of image processor options; given "
                f"{shown(image_processor_dict)}."
            )
        return cls(**image_processor_dict)._override(image_processor_dict, overrides)

    def _override(self, table: Mapping[str, Any], overrides: dict[str, Any]) -> Any:
        return_unused = overrides.pop("return_unused_kwargs", False)
        known = {*OPTIONS, *self._defaults, *table}
        unused = {k: v for k, v in overrides.items() if k not in known}
        used = {k: v for k, v in overrides.items() if k not in unused}
        refuse_unsupported({k: v for k, v in used.items() if k not in OPTIONS})
        for name, value in used.items():
            if value is not None or name not in self._defaults or name.startswith("do_"):
                self._set(name, value)
        if return_unused:
            return self, unused
        # Choices between Transformers' own classes, which there is no second of here.
        named = [name for name in unused if name not in ("use_fast", "trust_remote_code")]
        if named:
            warn(
                f"{type(self).__name__} does not know these options and ignores them: "
                f"{', '.join(named)}."
            )
        return self

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Any:
        """Read one JSON file.

        Raises:
            MissingFileError: it cannot be read.
            ConfigError: an option in it is refused.
        """
        return cls._from_file(Path(json_file), read_json(json_file), {})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Any:
        """Read the `preprocessor_config.json` of a directory, a file or a Hub repository.

        Args:
            pretrained_model_name_or_path: directory, JSON file, or "owner/name".
            **kwargs: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only` and
                `force_download` go to the Hub; others override options, as in `from_dict`.

        Raises:
            MissingFileError: nothing is there.
            ConfigError: an option in the file is refused.
        """
        hub, overrides = split_hub_options(kwargs)
        try:
            path = find_file(pretrained_model_name_or_path, PROCESSOR_NAME, **hub)
        except AbsentFileError as error:
            if not _is_timm(pretrained_model_name_or_path, hub):
                raise
            raise AbsentFileError(
                f"{error} timm's config.json is there and says how images are prepared: "
                "`AutoImageProcessor.from_pretrained` reads it."
            ) from error
        return cls._from_file(path, read_json(path), overrides)

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The keys of a `preprocessor_config.json`, and the keywords that do not say where it is.

        Args:
            pretrained_model_name_or_path: directory, JSON file, or "owner/name".
            **kwargs: as in `from_pretrained`.

        Raises:
            MissingFileError: nothing is there.
            CheckpointError: the file is not a JSON object.
        """
        hub, rest = split_hub_options(kwargs)
        return read_json(find_file(pretrained_model_name_or_path, PROCESSOR_NAME, **hub)), rest

    def _set_processor_class(self, processor_class: str | None) -> None:
        # Transformers' own processors of several kinds of input call it.
        self._processor_class = processor_class

    @classmethod
    def _from_file(cls, path: Path, table: dict[str, Any], overrides: dict[str, Any]) -> Any:
        # The file of a processor for several kinds of input holds this one's options as a part.
        part = table.get("image_processor")
        table = part if isinstance(part, dict) else table
        try:
            processor = cls(**table)
        except InputError as error:
            raise ConfigError(f"{path}: {error}") from error
        return processor._override(table, overrides)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BaseImageProcessor):
            return NotImplemented
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # options can be set

    def __repr__(self) -> str:
        try:
            return f"{type(self).__name__} {self.to_json_string()}"
        except InputError:
            return f"{type(self).__name__}({vars(self)!r})"


def _as_image_array(image: Any) -> np.ndarray:
    return np.asarray(image) if isinstance(image, PIL.Image.Image) else as_array(image)


def _preprocess_of(order: tuple[str, ...]) -> Callable[..., BatchFeature]:
    """`preprocess` with the signature of a class."""

    def preprocess(self: Any, images: Any, *args: Any, **options: Any) -> BatchFeature:
        return BaseImageProcessor.preprocess(
            self, images, **_by_name("preprocess", order, args, options)
        )

    preprocess.__doc__ = BaseImageProcessor.preprocess.__doc__
    preprocess.__signature__ = _signature(  # type: ignore[attr-defined]
        ("self", "images"), dict.fromkeys(order)
    )
    return preprocess


class ViTImageProcessor(BaseImageProcessor):
    """Images to the `pixel_values` of a ViT.

    Args:
        do_resize: resize to `size`.
        size: {"height", "width"}, {"shortest_edge"}, an int (square) or a pair (height, width), in
            pixels.
        resample: one of Pillow's filters, as its number or `PIL.Image.Resampling`.
        do_rescale: multiply by `rescale_factor`.
        rescale_factor: 1/255 by default.
        do_normalize: subtract `image_mean` and divide by `image_std`.
        image_mean, image_std: one number per channel (their count says what the model takes: 1 is
            grey, 3 RGB, 4 RGBA), or one for all; 0.5 by default.
        do_convert_rgb: True makes every PIL image RGB; None makes them, and arrays that can only
            be grey or RGBA, what the means say; False changes no number of channels.
        **options: `do_center_crop` with `crop_size` crop after the resize, padding with zeros;
            `data_format` and `input_data_format` ("channels_first" or "channels_last") are the
            layouts of the result and of arrays given; `return_tensors` is None, "np", "pt", "jax"
            or "tf". Unknown keys are kept as attributes and written back.

    Raises:
        InputError: a value is not what the option holds, or an unknown key would change pixels.
    """

    _call_order = (
        *("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize"),
        *("image_mean", "image_std", "return_tensors", "data_format", "input_data_format"),
        "do_convert_rgb",
    )


class ViTFeatureExtractor(ViTImageProcessor):
    """The older name of `ViTImageProcessor`: the same, but a pair as `size` is (width, height).

    What it saves names `ViTImageProcessor`, which every version of Transformers can read.
    """

    _pairs_are_width_height = True

    @classmethod
    def _written_type(cls) -> str:
        return "ViTImageProcessor"


ViTImageProcessorFast = ViTImageProcessor
"""The name of Transformers' processor on torchvision, whose pixels differ slightly: for code that
imports it. The pixels are those of `ViTImageProcessor`."""


def _is_timm(name_or_path: str | os.PathLike, hub: Mapping[str, Any]) -> bool:
    """Whether a model's `config.json` is timm's, with what it says about images."""
    try:
        return "pretrained_cfg" in read_json(find_file(name_or_path, "config.json", **hub))
    except ViTError:
        return False
