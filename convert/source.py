"""A checkpoint that was found, opened and understood: names, family, configuration, preprocessing.

What `from_pretrained`, `convert` and `vit inspect` have in common. No weight is read yet.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vit_common.config import CONFIG_NAME, OURS, ViTConfig, is_timm
from vit_common.errors import CheckpointError, ConfigError
from vit_common.families import AutoConfig
from vit_common.files.checkpoint import Checkpoint, Tensor, open_checkpoint
from vit_common.files.hub import AbsentFileError, find_file, find_weights
from vit_common.files.texts import parse_json, read_json
from vit_common.images.auto import AutoImageProcessor
from vit_common.images.options import HALF_TO_EVEN
from vit_common.images.processor import PROCESSOR_NAME, BaseImageProcessor, ViTImageProcessor
from vit_common.images.processors import BeitImageProcessor, BitImageProcessor
from vit_common.parameters import Head
from vit_convert.detect import Root, detect_format, find_root
from vit_convert.formats.google import unstacked
from vit_convert.infer import Note, infer_config
from vit_convert.rules import Format, Mapped, to_canonical

METADATA_KEY = "vit_config"
"""Where a safetensors file that stands alone holds its configuration."""

# Formats whose files are never without a config.json.
_DESCRIBED = ("hub", "flax", "flax-safetensors")

_IMAGENET: dict[str, Any] = {
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


@dataclass
class Source:
    """An opened checkpoint.

    Attributes:
        path: the weights file or its index.
        checkpoint: the tensors under the names of the file, still in it.
        table: the format's table.
        root: where in the file the network lies.
        mapped: the tensors under canonical names, without the prefix of a model with a head.
        ignored: name in the file -> why it is left aside.
        unexplained: names in the file that nothing here knows.
        config: what the network is.
        notes: what was set that no configuration said, and what says it.
        timm: timm's own `config.json`, if there was one.
        described: whether a file beside the weights says all of the configuration.
    """

    path: Path
    checkpoint: Checkpoint
    table: Format
    root: Root
    mapped: Mapped
    ignored: dict[str, str]
    unexplained: list[str]
    config: ViTConfig
    notes: list[Note] = field(default_factory=list)
    timm: Mapping[str, Any] | None = None
    described: bool = False

    @property
    def head(self) -> Head | None:
        """What stands on the base network in this file."""
        found = self.mapped.tensors
        if "cls_classifier.weight" in found and "distillation_classifier.weight" in found:
            return "teacher"
        heads: dict[str, Head] = {
            "classifier.weight": "classifier",
            "decoder.0.weight": "decoder",
            "lm_head.weight": "tokens",
        }
        return next((heads[name] for name in heads if name in found), None)

    def close(self) -> None:
        """Close the file; tensors not read by now cannot be read any more."""
        self.checkpoint.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_config_file(name_or_path: str | os.PathLike, **hub: Any) -> dict[str, Any] | None:
    """The `config.json` of a model as it is, or None where there is none.

    Raises:
        MissingFileError: it cannot be reached. ConfigError, CheckpointError: it is not JSON.
    """
    return find_config(name_or_path, **hub)[1]


def find_config(
    name_or_path: str | os.PathLike, **hub: Any
) -> tuple[Path | None, dict[str, Any] | None]:
    """As `read_config_file`, with the path it was read from."""
    try:
        path = find_file(name_or_path, CONFIG_NAME, **hub)
    except AbsentFileError:
        return None, None
    return path, read_json(path)


def config_from_dict(table: Mapping[str, Any], **overrides: Any) -> Any:
    """The configuration of a Hub `config.json`, of whichever family it is; of ViT where it names
    none.

    Raises:
        ConfigError: as `AutoConfig.from_dict`.
    """
    if table.get("model_type") in (None, ""):
        table = {**table, "model_type": ViTConfig.model_type}
    family = table.get("model_type", "")
    if not isinstance(family, str | None):
        raise ConfigError(f"config: `model_type` must be a string; given {family!r}.")
    return AutoConfig.from_dict(table, **overrides)


def open_source(
    name_or_path: str | os.PathLike,
    *,
    format: str | None = None,
    config: ViTConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
    prefer: tuple[str, ...] | None = None,
    beside: Mapping[str, Any] | None = None,
    **hub: Any,
) -> Source:
    """Find, open and understand a checkpoint.

    Args:
        name_or_path: directory, weights file, index of shards, or "owner/name".
        format: its format, where it cannot be told.
        config: its configuration, if not read from beside it or inferred.
        overrides: fields of the configuration that the caller knows better.
        prefer: names of weights files to look for before the others.
        beside: the `config.json` beside the weights, where it has been read before; empty where
            there is none.
        **hub: options of the Hub.

    Raises:
        MissingFileError: it is not there.
        CheckpointError: it is corrupt, of no format known here, or of several.
        ConfigError: its configuration is refused.
    """
    path = find_weights(name_or_path, prefer=prefer, **hub)
    found = read_config_file(name_or_path, **hub) if beside is None else dict(beside) or None
    timm = found if is_timm(found) else None
    if timm is not None and isinstance(timm.get(OURS), Mapping):
        found = dict(timm[OURS])  # the whole configuration, not what timm has room for
    described = found is not None and found is not timm
    said_by = path.parent / CONFIG_NAME
    checkpoint = open_checkpoint(path)
    try:
        if found is None and config is None and METADATA_KEY in checkpoint.metadata:
            found = parse_json(checkpoint.metadata[METADATA_KEY].encode(), path, "configuration")
            said_by = path
        hints = {"suffix": path.suffix}
        family = config.model_type if config is not None else (found or {}).get("model_type")
        if isinstance(family, str):
            hints["model_type"] = family
        if timm is not None:
            hints["architecture"] = str(timm["architecture"])
        read = read_tensors(checkpoint, format=format, hints=hints)
        table, mapped, unexplained = read.table, read.mapped, read.unexplained
        notes: list[Note] = []
        if config is not None:
            settled = config
        elif found is not None and found is not timm:
            settled = _named(said_by, config_from_dict, found, **dict(overrides or {}))
            unknown = [
                name
                for name in overrides or {}
                if name not in (*settled.fields, "num_labels") and name not in found
            ]
            if unknown:
                raise ConfigError(
                    f"config: {type(settled).__name__} has no field "
                    f"{', '.join(map(repr, unknown))}; wanted some of {', '.join(settled.fields)}."
                )
            notes = [Note(name, value, "given") for name, value in (overrides or {}).items()]
        elif table.name in _DESCRIBED:
            find_file(name_or_path, CONFIG_NAME, **hub)  # raises, saying where it looked
            raise CheckpointError("there is no config.json, which this format needs.")
        else:
            try:
                settled, notes = infer_config(table, mapped, read.tensors, timm, overrides)
            except (CheckpointError, ConfigError) as error:
                if not unexplained:
                    raise
                names = ", ".join(unexplained[:60])
                raise type(error)(f"{error} Names that nothing here knows: {names}.") from error
        if config is None:
            object.__setattr__(settled, "_name_or_path", str(name_or_path))
    except (CheckpointError, ConfigError) as error:
        checkpoint.close()
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
    except BaseException:
        checkpoint.close()
        raise
    return Source(
        path=path,
        checkpoint=checkpoint,
        table=table,
        root=read.root,
        mapped=mapped,
        ignored=read.ignored,
        unexplained=unexplained,
        config=settled,
        notes=notes,
        timm=timm,
        described=described,
    )


def _named(path: Path, build: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return build(*args, **kwargs)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


class Read(NamedTuple):
    """What `read_tensors` finds: where the network lies in a file, its tensors under the names of
    its format, the format, the canonical tensors, what is left aside and why, and names that
    nothing here knows."""

    root: Root
    tensors: dict[str, Tensor]
    table: Format
    mapped: Mapped
    ignored: dict[str, str]
    unexplained: list[str]


def read_tensors(
    checkpoint: Mapping[str, Any],
    *,
    format: str | None = None,
    hints: Mapping[str, str] | None = None,
) -> Read:
    """Find the network in a file.

    Raises:
        CheckpointError: no network is in it, or it fits no format, or several.
        InputError: there is no format of that name.
    """
    root = find_root(checkpoint)
    parts = unstacked({bare: checkpoint[full] for bare, full in root.keys.items()})
    tensors = {name: tensor for name, (_, tensor) in parts.items()}
    hints = {**dict(hints or {}), "root": root.path}
    table = detect_format(tensors, name=format, hints=hints, shapes=tensors)
    mapped = to_canonical(tensors, table)
    # Transformers saves a parameter of no entries where there are no registers.
    mapped.tensors = {
        name: tensor for name, tensor in mapped.tensors.items() if 0 not in tensor.shape
    }
    bare = table.strip(tensors)
    original = {full: key for key, full in bare.items()}
    ignored, unexplained = dict(root.ignored), []
    for name in mapped.unused:
        why = table.why_ignored(original.get(name, name))
        full = root.keys[parts[name][0]]
        if why:
            ignored[full] = why
        elif full not in unexplained:
            unexplained.append(full)
    return Read(root, tensors, table, mapped, ignored, unexplained)


def find_processor(
    source: Source, name_or_path: str | os.PathLike, **hub: Any
) -> tuple[BaseImageProcessor, str] | None:
    """What prepares images for a source, and what says so; None where nothing does."""
    try:
        find_file(name_or_path, PROCESSOR_NAME, **hub)
        origin = PROCESSOR_NAME
    except AbsentFileError:
        origin = "timm's pretrained_cfg"
    try:
        return AutoImageProcessor.from_pretrained(name_or_path, **hub), origin
    except AbsentFileError:
        return implied_processor(source)
    except ConfigError:
        # What timm does and no processor here can do leaves the images to whoever has the network.
        if origin == PROCESSOR_NAME or source.timm is None:
            raise
        return implied_processor(source)


def implied_processor(source: Source) -> tuple[BaseImageProcessor, str] | None:
    """What networks of a source's format were trained on, and what says so."""
    config, name = source.config, source.table.name
    if config.num_channels != 3:
        return None
    height, width = config.image_height_width
    size = {"height": height, "width": width}
    if name == "google":
        return (
            ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3),
            "Google's (x - 127.5) / 127.5",
        )
    if name == "beit":
        return (
            BeitImageProcessor(
                size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
            ),
            "the Hub's files of microsoft's BEiT",
        )
    if height != width:
        return None
    if name in ("deit", "dino", "mae", "dinov2"):
        # The shorter side to 256 for 224, then a centre crop; MAE's images above 224 are not cut.
        enlarged = height if name == "mae" and height > 224 else int(height * 256 / 224)
        if name == "dinov2":
            size, enlarged = {"height": 224, "width": 224}, 256
        return (
            BitImageProcessor(
                size={"shortest_edge": enlarged},
                crop_size=size,
                crop_rounding=HALF_TO_EVEN,  # their authors crop with torchvision
                **_IMAGENET,
            ),
            f"the published evaluation of {name}",
        )
    return None
