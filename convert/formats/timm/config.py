"""timm's own `config.json`: written for `timm.create_model("local-dir:...")`, and what one says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from PIL.Image import Resampling

from vit_common.config import OURS, ViTConfig
from vit_common.errors import ConfigError
from vit_convert.formats import stems
from vit_convert.formats.timm import arguments, nearest
from vit_convert.formats.timm.models import ARCHITECTURES, HEADS

LABELS = "timm's label_names"
POOLING = "timm's global_pool"
_POOLS = {"mean": "avg", "map": "map"}
TRANSFORM = "timm's pretrained_cfg"
"""What says a field, in a report."""

# Keys of Transformers' `timm_wrapper` around timm's file.
_OF_WRAPPER = (
    "model_type", "architectures", "do_pooling", "dtype", "torch_dtype", "initializer_range",
    "transformers_version",
)  # fmt: skip


def timm_config(config: ViTConfig, timm: Mapping[str, Any] | None, processor: Any) -> str:
    """The text of timm's `config.json` for a network.

    Args:
        config: the network.
        timm: timm's file of the source, which is kept but for what a conversion changes.
        processor: what prepares images, if that is known.
    """
    height, width = config.image_height_width
    table = {name: value for name, value in (timm or {}).items() if name not in _OF_WRAPPER}
    args = dict(table.get("model_args") or {})
    row = ARCHITECTURES.get(str(table.get("architecture")))
    if row is None or row.cls != nearest.class_of(config):
        table["architecture"], args = nearest.architecture(config)
    elif row.cls == "Eva":
        args = nearest.for_eva(config, args)
    if (row is not None and "img_size" in args) or (cfg_size(table) not in (None, (height, width))):
        args["img_size"] = [height, width]
    table["num_classes"] = config.num_labels if "For" in str(config.architectures) else 0
    table["num_features"] = config.hidden_size
    table["global_pool"] = nearest.pooling(config)
    if args:
        table["model_args"] = args
    cfg = dict(table.get("pretrained_cfg") or {})
    cfg["input_size"] = [config.num_channels, height, width]
    cfg["num_classes"] = table["num_classes"]
    cfg.setdefault("first_conv", stems.timm_first_convolution(config))
    cfg.setdefault("classifier", ["head", "head_dist"] if config.use_distillation_token else "head")
    if processor is not None and timm is None:
        cfg.update(_transform(processor, height))
    table["pretrained_cfg"] = cfg
    if "label_names" in table or "label_names" in cfg:
        cfg.pop("label_names", None)
        table["label_names"] = [str(label) for label in config.id2label.values()]
    table[OURS] = json.loads(config.to_json_string())
    return json.dumps(table, indent=2) + "\n"


def cfg_size(table: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) that timm's `pretrained_cfg` names."""
    size = (table.get("pretrained_cfg") or {}).get("input_size")
    return None if not size else (size[1], size[2])


def _transform(processor: Any, height: int) -> dict[str, Any]:
    table = processor.to_dict()
    size = table.get("size") or {}
    edge = size.get("shortest_edge") or size.get("height")
    crop = edge if table.get("do_center_crop") else None
    return {
        "mean": table.get("image_mean"),
        "std": table.get("image_std"),
        "interpolation": Resampling(table.get("resample", 2)).name.lower(),
        "crop_pct": height / crop if crop else 1.0,
        "crop_mode": "center" if size.get("shortest_edge") else "squash",
    }


# -- reading


_SAME = {
    "num_heads": "num_attention_heads",
    "img_size": "image_size",
    "drop_path_rate": "drop_path_rate",
}
"""Keyword of timm's model -> field here, of which the keyword is the value."""


def read_timm_config(
    timm: Mapping[str, Any], shapes: Mapping[str, Any], note: Callable[..., None]
) -> None:
    """Note the fields of the configuration that timm's file says: `note(origin, field=value)`.

    Args:
        timm: the file.
        shapes: of the weights beside it, by canonical name.
        note: takes what says a field, and the field.

    Raises:
        ConfigError: it names a network, or has a keyword that changes one, not understood here.
    """
    for key in ("pretrained_cfg", "model_args"):
        part = timm.get(key)
        if part is not None and not isinstance(part, Mapping):
            raise ConfigError(f"timm's config.json: `{key}` must be a mapping; given {part!r}.")
    architecture = str(timm.get("architecture", ""))
    cfg, args = (timm.get(name) or {} for name in ("pretrained_cfg", "model_args"))
    size, given_size = cfg.get("input_size"), args.get("img_size", 1)
    if (size and not _whole(size, 3)) or not (_whole([given_size], 1) or _whole(given_size, 2)):
        arguments.architecture(architecture)
        raise ConfigError(
            "timm's config.json: `input_size` must be three integers (channels, height, width), "
            f"and `img_size` one or two; given {size!r} and {given_size!r}."
        )
    named, given = arguments.fields_of(architecture, args)
    for origin, fields in ((f"timm's {architecture}", named), ("timm's model_args", given)):
        if "encoder.layer.0.lambda_1" not in shapes or not fields.get("layer_scale_init_value"):
            fields.pop("layer_scale_init_value", None)
        note(origin, **fields)
    if size:
        note(TRANSFORM, image_size=size[1] if size[1] == size[2] else tuple(size[1:]))
    for keyword, field in _SAME.items():
        if keyword in args:
            note("timm's model_args", **{field: args[keyword]})
    arguments.check_shown(args, shapes)


def _whole(values: Any, count: int) -> bool:
    """Whether that many positive integers are given."""
    listed = isinstance(values, (list, tuple)) and len(values) == count
    return listed and all(type(value) is int and value > 0 for value in values)


def heads_of(timm: Mapping[str, Any] | None) -> tuple[int, str] | None:
    """The number of attention heads that timm's name of a network says, and what says it."""
    architecture = (timm or {}).get("architecture")
    if architecture not in HEADS:
        return None
    return HEADS[str(architecture)], f"timm's {architecture}"


def pooling_of(timm: Mapping[str, Any] | None) -> str | None:
    """ "avg", "token" or "" where timm's file says what a classifier looks at; or None.

    Raises:
        ConfigError: it says something else.
    """
    table = timm or {}
    pool = table.get("global_pool") or (table.get("model_args") or {}).get("global_pool")
    if pool is not None and pool not in arguments.POOLINGS:
        raise ConfigError(
            "timm's config.json: `global_pool` must be one of "
            f"{', '.join(map(repr, arguments.POOLINGS))}; given {pool!r}."
        )
    return pool


def label_names(timm: Mapping[str, Any] | None) -> list[str] | None:
    """The names of classes in timm's `config.json`, in order."""
    for place in (timm or {}), ((timm or {}).get("pretrained_cfg") or {}):
        names = place.get("label_names") if isinstance(place, Mapping) else None
        if isinstance(names, Mapping):
            names = [names[key] for key in sorted(names, key=str)] if names else None
        if isinstance(names, list) and names:
            return [str(name) for name in names]
    return None
