"""The processors of ViT's relatives, DeiT, BEiT and DINOv2, and the choice of one by its file.

Each is `BaseImageProcessor` with the defaults, and the order of arguments, of the class of that
name in Transformers 4.57.6 (`models/deit`, `models/beit` and `models/bit`; DINOv2 repositories name
the processor of BiT), which works on PIL and numpy; its pixels are the same to the bit. Options
mean what `ViTImageProcessor` says of them; all of these crop as well.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL.Image import Resampling

from vit_common.errors import ConfigError, InputError, ViTError
from vit_common.image_processor import (
    PROCESSOR_NAME,
    BaseImageProcessor,
    BatchFeature,
    ViTImageProcessor,
)

__all__ = [
    "AutoImageProcessor",
    "BeitFeatureExtractor",
    "BeitImageProcessor",
    "BitImageProcessor",
    "DeiTFeatureExtractor",
    "DeiTImageProcessor",
]

Size = int | Sequence[int] | Mapping[str, int] | None
Values = float | Sequence[float] | None

_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": {"height": 256, "width": 256},
    "resample": Resampling.BICUBIC,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


class DeiTImageProcessor(BaseImageProcessor):
    """Images to the `pixel_values` of a DeiT: resize to 256 x 256, crop the middle 224 x 224.

    The means and deviations are 0.5 by default; files on the Hub carry those of ImageNet.

    Raises:
        InputError: a value is not what the option holds, or an unknown key would change pixels.
    """

    _defaults: ClassVar[dict[str, Any]] = _DEFAULTS

    def __init__(
        self,
        do_resize: bool | None = True,
        size: Size = None,
        resample: int | None = Resampling.BICUBIC,
        do_center_crop: bool | None = True,
        crop_size: Size = None,
        rescale_factor: float | None = 1 / 255,
        do_rescale: bool | None = True,
        do_normalize: bool | None = True,
        image_mean: Values = None,
        image_std: Values = None,
        **options: Any,
    ) -> None:
        super().__init__(
            do_resize=do_resize,
            size=size,
            resample=resample,
            do_center_crop=do_center_crop,
            crop_size=crop_size,
            rescale_factor=rescale_factor,
            do_rescale=do_rescale,
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
            **options,
        )

    def preprocess(
        self,
        images: Any,
        do_resize: bool | None = None,
        size: Size = None,
        resample: int | None = None,
        do_center_crop: bool | None = None,
        crop_size: Size = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: Values = None,
        image_std: Values = None,
        return_tensors: str | None = None,
        data_format: str | None = None,
        input_data_format: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Make `pixel_values` of images; see `BaseImageProcessor.preprocess`."""
        return super().preprocess(
            images,
            do_resize=do_resize,
            size=size,
            resample=resample,
            do_center_crop=do_center_crop,
            crop_size=crop_size,
            do_rescale=do_rescale,
            rescale_factor=rescale_factor,
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
            return_tensors=return_tensors,
            data_format=data_format,
            input_data_format=input_data_format,
            **options,
        )


class DeiTFeatureExtractor(DeiTImageProcessor):
    """The older face of `DeiTImageProcessor`: the same, but a pair as a size is (width, height)."""

    _pairs_are_width_height = True

    @classmethod
    def _written_type(cls) -> str:
        return "DeiTImageProcessor"


class BeitImageProcessor(BaseImageProcessor):
    """Images to the `pixel_values` of a BEiT: resize to 256 x 256, crop the middle 224 x 224.

    Files on the Hub say 224 without a crop, or 256 with one. `do_reduce_labels` (`reduce_labels`
    in older files) is about maps for segmentation, which are not made here: it is kept and written
    back, and must be False.

    Raises:
        InputError: a value is not what the option holds, or an unknown key would change pixels.
    """

    _defaults: ClassVar[dict[str, Any]] = {**_DEFAULTS, "do_reduce_labels": False}

    def __init__(
        self,
        do_resize: bool | None = True,
        size: Size = None,
        resample: int | None = Resampling.BICUBIC,
        do_center_crop: bool | None = True,
        crop_size: Size = None,
        rescale_factor: float | None = 1 / 255,
        do_rescale: bool | None = True,
        do_normalize: bool | None = True,
        image_mean: Values = None,
        image_std: Values = None,
        do_reduce_labels: bool | None = False,
        **options: Any,
    ) -> None:
        super().__init__(
            do_resize=do_resize,
            size=size,
            resample=resample,
            do_center_crop=do_center_crop,
            crop_size=crop_size,
            rescale_factor=rescale_factor,
            do_rescale=do_rescale,
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
            do_reduce_labels=do_reduce_labels,
            **options,
        )

    def _checked(self, name: str, value: Any) -> Any:
        if name not in ("do_reduce_labels", "reduce_labels"):
            return super()._checked(name, value)
        if value is not None and value is not False:
            raise InputError(
                f"`{name}` must be False: it is for the maps of a segmentation, which are not made "
                f"here; given {value!r}. Set it to False to process images alone."
            )
        return value

    def __call__(self, images: Any, segmentation_maps: None = None, **options: Any) -> BatchFeature:
        """The same as `preprocess`."""
        return self.preprocess(images, segmentation_maps, **options)

    def preprocess(
        self,
        images: Any,
        segmentation_maps: None = None,
        do_resize: bool | None = None,
        size: Size = None,
        resample: int | None = None,
        do_center_crop: bool | None = None,
        crop_size: Size = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: Values = None,
        image_std: Values = None,
        do_reduce_labels: bool | None = None,
        return_tensors: str | None = None,
        data_format: str | None = None,
        input_data_format: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Make `pixel_values` of images; see `BaseImageProcessor.preprocess`.

        `segmentation_maps` has the place it has in Transformers, and must be None.
        """
        if segmentation_maps is not None:
            raise InputError(
                "`segmentation_maps` must be None, as maps are not made here; given "
                f"{type(segmentation_maps).__name__}. Pass options by name, and images alone."
            )
        self._checked("do_reduce_labels", do_reduce_labels)
        return super().preprocess(
            images,
            do_resize=do_resize,
            size=size,
            resample=resample,
            do_center_crop=do_center_crop,
            crop_size=crop_size,
            do_rescale=do_rescale,
            rescale_factor=rescale_factor,
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
            return_tensors=return_tensors,
            data_format=data_format,
            input_data_format=input_data_format,
            **options,
        )


class BeitFeatureExtractor(BeitImageProcessor):
    """The older face of `BeitImageProcessor`: the same, but a pair as a size is (width, height)."""

    _pairs_are_width_height = True

    @classmethod
    def _written_type(cls) -> str:
        return "BeitImageProcessor"


class BitImageProcessor(BaseImageProcessor):
    """Images to the `pixel_values` of a DINOv2: resize the shorter edge to 224, crop the middle.

    An int as `size` is the shorter edge, in pixels; the other keeps the proportions. Images are
    made RGB by default. The means and deviations are those of CLIP by default; the files of DINOv2
    carry those of ImageNet, and 256 for the shorter edge.

    Raises:
        InputError: a value is not what the option holds, or an unknown key would change pixels.
    """

    _defaults: ClassVar[dict[str, Any]] = {
        **_DEFAULTS,
        "size": {"shortest_edge": 224},
        # `OPENAI_CLIP_MEAN` and `OPENAI_CLIP_STD` of Transformers 4.57.6's `image_utils.py`.
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }
    _int_is_shortest_edge = True

    def __init__(
        self,
        do_resize: bool | None = True,
        size: Size = None,
        resample: int | None = Resampling.BICUBIC,
        do_center_crop: bool | None = True,
        crop_size: Size = None,
        do_rescale: bool | None = True,
        rescale_factor: float | None = 1 / 255,
        do_normalize: bool | None = True,
        image_mean: Values = None,
        image_std: Values = None,
        do_convert_rgb: bool | None = True,
        **options: Any,
    ) -> None:
        super().__init__(
            do_resize=do_resize,
            size=size,
            resample=resample,
            do_center_crop=do_center_crop,
            crop_size=crop_size,
            do_rescale=do_rescale,
            rescale_factor=rescale_factor,
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
            do_convert_rgb=do_convert_rgb,
            **options,
        )

    def preprocess(
        self,
        images: Any,
        do_resize: bool | None = None,
        size: Size = None,
        resample: int | None = None,
        do_center_crop: bool | None = None,
        crop_size: Size = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: Values = None,
        image_std: Values = None,
        do_convert_rgb: bool | None = None,
        return_tensors: str | None = None,
        data_format: str | None = None,
        input_data_format: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Make `pixel_values` of images; see `BaseImageProcessor.preprocess`."""
        return super().preprocess(
            images,
            do_resize=do_resize,
            size=size,
            resample=resample,
            do_center_crop=do_center_crop,
            crop_size=crop_size,
            do_rescale=do_rescale,
            rescale_factor=rescale_factor,
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
            do_convert_rgb=do_convert_rgb,
            return_tensors=return_tensors,
            data_format=data_format,
            input_data_format=input_data_format,
            **options,
        )


# -- the choice by a file

_CLASSES: dict[str, type[BaseImageProcessor]] = {
    "ViTImageProcessor": ViTImageProcessor,
    "DeiTImageProcessor": DeiTImageProcessor,
    "BeitImageProcessor": BeitImageProcessor,
    "BitImageProcessor": BitImageProcessor,
}

# Source: `IMAGE_PROCESSOR_MAPPING_NAMES` of Transformers 4.57.6; DINOv2 with registers is not in
# that table, and its files name the class of DINOv2.
_CLASS_OF_MODEL: dict[str, type[BaseImageProcessor]] = {
    "vit": ViTImageProcessor,
    "vit_mae": ViTImageProcessor,
    "vit_msn": ViTImageProcessor,
    "deit": DeiTImageProcessor,
    "beit": BeitImageProcessor,
    "data2vec-vision": BeitImageProcessor,
    "bit": BitImageProcessor,
    "dinov2": BitImageProcessor,
    "dinov2_with_registers": BitImageProcessor,
}


class AutoImageProcessor:
    """The processor that a model's files name; made by `from_pretrained` alone."""

    def __init__(self) -> None:
        raise InputError(
            "`AutoImageProcessor` is not made itself; call `AutoImageProcessor.from_pretrained`."
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Any:
        """Read a `preprocessor_config.json` as the processor it is for.

        The class is what `image_processor_type`, or `feature_extractor_type` in older files,
        names: that of ViT, DeiT, BEiT or BiT. A "...Fast" name counts as the one without, and the
        arithmetic is always that of PIL and numpy. Where the file names none, `config.json` tells,
        by the same keys or by its `model_type`; where there is only timm's `config.json`, its
        `pretrained_cfg` does.

        Args:
            pretrained_model_name_or_path: directory, JSON file, or "owner/name".
            **kwargs: as in `ViTImageProcessor.from_pretrained`.

        Raises:
            MissingFileError: nothing is there.
            ConfigError: no class, or one that is not known here; or an option is refused.
        """
        from vit_common.checkpoint import read_json
        from vit_common.hub import AbsentFileError, find_file, split_hub_options
        from vit_common.timm_preprocessing import processor_from_timm

        hub, overrides = split_hub_options(kwargs)
        try:
            path = find_file(pretrained_model_name_or_path, PROCESSOR_NAME, **hub)
        except AbsentFileError:
            own = _timm_table(pretrained_model_name_or_path, hub)
            if own is None:
                raise
            processor = processor_from_timm(own)
            return processor.from_dict(processor.to_dict(), **overrides)
        table = read_json(path)
        part = table.get("image_processor")
        chosen = _named_class(part if isinstance(part, dict) else table, path)
        if chosen is None:
            chosen = _class_by_config(pretrained_model_name_or_path, path, hub)
        return chosen._from_file(path, table, overrides)


def processor_from_dict(table: Mapping[str, Any], path: Path) -> BaseImageProcessor:
    """The processor whose `to_dict` gave a table; it names its class.

    Args:
        table: of a `preprocessor_config.json`.
        path: where it stands, for errors.

    Raises:
        ConfigError: no class, or one that is not known here; or an option is refused.
    """
    chosen = _named_class(table, path)
    if chosen is None:
        raise ConfigError(
            f"{path}: names no `image_processor_type`; wanted one of {', '.join(_CLASSES)}."
        )
    try:
        return chosen.from_dict(table)
    except ViTError as error:
        raise ConfigError(f"{path}: {error}") from error


def _named_class(table: Mapping[str, Any], path: Path) -> type[BaseImageProcessor] | None:
    """The class that a file names, or None where it names none."""
    for key in ("image_processor_type", "feature_extractor_type"):
        name = table.get(key)
        if name is None:
            continue
        plain = str(name).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
        if plain not in _CLASSES:
            raise ConfigError(
                f"{path}: `{key}` must be one of {', '.join(_CLASSES)}, or its older or fast face; "
                f"given {name!r}. Process such images with the library that wrote the file."
            )
        return _CLASSES[plain]
    return None


def _timm_table(name_or_path: str | os.PathLike, hub: Any) -> dict[str, Any] | None:
    """timm's `pretrained_cfg` in the `config.json` of a model; None where there is none."""
    from vit_common.checkpoint import read_json
    from vit_common.hub import AbsentFileError, find_file

    try:
        table = read_json(find_file(name_or_path, "config.json", **hub))
    except AbsentFileError:
        return None
    found = table.get("pretrained_cfg")
    # Without a mean it says nothing about images: a conversion that knew nothing wrote it.
    known = isinstance(found, dict) and "mean" in found and "architecture" in table
    return found if known else None


def _class_by_config(
    name_or_path: str | os.PathLike, path: Path, hub: Mapping[str, Any]
) -> type[BaseImageProcessor]:
    """The class that the `config.json` of the same model tells."""
    from vit_common.checkpoint import read_json
    from vit_common.hub import AbsentFileError, find_file

    wanted = (
        f"{path}: names no `image_processor_type`; wanted one of {', '.join(_CLASSES)} there, or a "
        f"`model_type` in config.json out of {', '.join(_CLASS_OF_MODEL)}"
    )
    try:
        if Path(name_or_path).is_file():
            config_path = find_file(path.parent, "config.json")
        else:
            config_path = find_file(name_or_path, "config.json", **hub)
    except AbsentFileError as error:
        raise ConfigError(f"{wanted}; there is no config.json. Add the key to the file.") from error
    config = read_json(config_path)
    chosen = _named_class(config, config_path)
    if chosen is None and isinstance(config.get("model_type"), str):
        chosen = _CLASS_OF_MODEL.get(config["model_type"])
    if chosen is None:
        raise ConfigError(f"{wanted}; its `model_type` is {config.get('model_type')!r}.")
    return chosen
