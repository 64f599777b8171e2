"""Choice of the image processor by a model's files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_common.errors import ConfigError, InputError, ViTError, shown
from vit_common.files.hub import AbsentFileError, find_file, split_hub_options
from vit_common.files.texts import read_json
from vit_common.images.processor import PROCESSOR_NAME, BaseImageProcessor, ViTImageProcessor
from vit_common.images.processors import (
    BeitImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    DeiTImageProcessor,
    DINOv3ViTImageProcessorFast,
    SiglipImageProcessor,
    ViTHybridImageProcessor,
)
from vit_common.images.timm import processor_from_timm

_CLASSES: dict[str, type[BaseImageProcessor]] = {
    "ViTImageProcessor": ViTImageProcessor,
    "DeiTImageProcessor": DeiTImageProcessor,
    "BeitImageProcessor": BeitImageProcessor,
    "BitImageProcessor": BitImageProcessor,
    "CLIPImageProcessor": CLIPImageProcessor,
    "DINOv3ViTImageProcessor": DINOv3ViTImageProcessorFast,
    "SiglipImageProcessor": SiglipImageProcessor,
    "ViTHybridImageProcessor": ViTHybridImageProcessor,
}

# Source: `IMAGE_PROCESSOR_MAPPING_NAMES` of Transformers 4.57.6; DINOv2 with registers is not in
# that table, and its files name the class of DINOv2.
_CLASS_OF_MODEL: dict[str, type[BaseImageProcessor]] = {
    "vit": ViTImageProcessor,
    "vit_mae": ViTImageProcessor,
    "vit_msn": ViTImageProcessor,
    "vit-hybrid": ViTHybridImageProcessor,
    "deit": DeiTImageProcessor,
    "beit": BeitImageProcessor,
    "data2vec-vision": BeitImageProcessor,
    "bit": BitImageProcessor,
    "dinov2": BitImageProcessor,
    "dinov2_with_registers": BitImageProcessor,
    "clip": CLIPImageProcessor,
    "clip_vision_model": CLIPImageProcessor,
    "dinov3_vit": DINOv3ViTImageProcessorFast,
    "siglip": SiglipImageProcessor,
    "siglip_vision_model": SiglipImageProcessor,
}


class AutoImageProcessor:
    """The processor that a model's files name; only `from_pretrained` makes one."""

    def __init__(self) -> None:
        name = type(self).__name__
        raise InputError(f"`{name}` is not made itself; call `{name}.from_pretrained`.")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Any:
        """Read a `preprocessor_config.json` as the processor it is for.

        The class is what `image_processor_type`, or `feature_extractor_type` in older files,
        names: that of ViT, DeiT, BEiT, BiT, CLIP, SigLIP or DINOv3. A "...Fast" name counts as the
        one without, and the arithmetic is that of PIL and numpy, but for DINOv3, whose processor
        has no other version: its arithmetic is that of torchvision. Where the file names none,
        `config.json` decides, by the same keys or by its `model_type`; where there is only timm's
        `config.json`, its `pretrained_cfg` decides.

        Args:
            pretrained_model_name_or_path: directory, JSON file, or "owner/name".
            **kwargs: as in `ViTImageProcessor.from_pretrained`.

        Raises:
            MissingFileError: nothing is there.
            ConfigError: no class, or one that is not known here; or an option is refused.
        """
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


class AutoFeatureExtractor(AutoImageProcessor):
    """The older name of `AutoImageProcessor`."""


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
        plain = name if isinstance(name, str) else ""
        plain = plain.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
        if plain not in _CLASSES:
            raise ConfigError(
                f"{path}: `{key}` must be one of {', '.join(_CLASSES)}, or its older or fast name; "
                f"given {shown(name)}. Process such images with the library that wrote the file."
            )
        return _CLASSES[plain]
    return None


def _timm_table(name_or_path: str | os.PathLike, hub: Any) -> dict[str, Any] | None:
    """timm's `pretrained_cfg` in the `config.json` of a model; None where there is none."""
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
    """The class that follows from the `config.json` of the same model."""
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
        raise ConfigError(f"{wanted}; its `model_type` is {shown(config.get('model_type'))}.")
    return chosen
