"""timm's own `config.json`: written for `timm.create_model("local-dir:...")`, and what one says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from PIL.Image import Resampling

from vit_common.config import OURS, ViTConfig
from vit_common.errors import ConfigError
from vit_common.presets import PRESETS
from vit_convert.formats import stems
from vit_convert.formats.timm import arguments, blocks
from vit_convert.formats.timm.models import HEADS

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

_FAMILIES = {"vit": "vit", "deit": "deit", "beit": "beit"}


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
    if timm is None:
        table["architecture"], args = _architecture(config)
    elif "img_size" in args or (cfg_size(table) not in (None, (height, width))):
        args["img_size"] = [height, width]
    table["num_classes"] = config.num_labels if "For" in str(config.architectures) else 0
    table["num_features"] = config.hidden_size
    table["global_pool"] = _POOLS.get(config.pooling, "token")
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


def _architecture(config: ViTConfig) -> tuple[str, dict[str, Any]]:
    """The nearest of timm's names, and the arguments that make it this network."""
    rows, columns = config.patch_height_width
    patch: Any = rows if rows == columns else [rows, columns]
    family = _FAMILIES.get(config.base_family, "vit")
    sizes = (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
    )
    named = {tuple(row[:4]): name for name, row in PRESETS.items()}
    middle = "_distilled" if family == "deit" else ""
    names = [f"{family}_{size}{middle}_patch16_224" for size in (named.get(sizes), "base")]
    name = next(each for each in names if each in HEADS)
    args: dict[str, Any] = {
        "img_size": list(config.image_height_width),
        "patch_size": patch,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": _ratio(config.intermediate_size, config.hidden_size),
        "qkv_bias": config.qkv_bias,
    }
    if config.stem_type is not None:
        name = stems.TIMM_NAMES[config.stem_depths]
        args["patch_size"] = config.patch_projection_size
    if config.has_layer_scale:
        args["init_values"] = config.layer_scale_init_value
    if config.num_register_tokens:
        args["reg_tokens"] = config.num_register_tokens
    if config.position_tokens != "all":
        args["no_embed_class"] = True
    if not config.use_cls_token:
        args["class_token"] = False
    activation = {"gelu": None, "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
    act = activation.get(str(config.hidden_act), str(config.hidden_act))
    if act:
        args["act_layer"] = act
    if config.pooling == "mean":
        args["global_pool"] = "avg"
        args["fc_norm"] = config.norm_after_pooling
    if config.pooling == "map":
        args["global_pool"] = "map"
    if config.pool_prefix_tokens:
        args["pool_include_prefix"] = True
    if family == "beit":
        args.pop("fc_norm", None)
        args["global_pool"] = "avg" if config.pooling == "mean" else "token"
        args["use_abs_pos_emb"] = config.use_absolute_position_embeddings
        args["use_rel_pos_bias"] = config.use_relative_position_bias
        args["use_shared_rel_pos_bias"] = config.use_shared_relative_position_bias
    for keyword, value in (
        ("pre_norm", config.use_pre_norm),
        ("qk_norm", config.use_qk_norm),
        ("scale_attn_norm", config.use_attention_norm),
        ("scale_mlp_norm", config.use_mlp_norm),
    ):
        if value:
            args[keyword] = True
    if not config.use_final_norm:
        args["final_norm"] = False
    if config.norm_type == "rmsnorm":
        args["norm_layer"] = "rmsnorm"
    if other := blocks.timm_name(config):
        name = other
        args["class_token"] = config.use_cls_token
        args["no_embed_class"] = config.position_tokens != "all"
        args["pre_norm"] = config.use_pre_norm
        args["global_pool"] = "avg" if config.pooling == "mean" else "token"
        args["fc_norm"] = config.norm_after_pooling
        args["init_values"] = config.layer_scale_init_value or None
    if config.attention_type == "differential":
        args["attn_layer"] = "diff"
    if config.has_relative_mlp:
        post_norm = "rpn_" if config.block_type == "post_norm" else ""
        name = f"vit_relpos_small_patch16_{post_norm}224"
        args["class_token"] = config.use_cls_token
        args["global_pool"] = "avg" if config.pooling == "mean" else "token"
        args["fc_norm"] = config.norm_after_pooling
        args["init_values"] = config.layer_scale_init_value or None
        args["rel_pos_dim"] = config.relative_position_width
        args["shared_rel_pos"] = config.use_shared_relative_position_bias
    return name, args


def _ratio(inner: int, width: int) -> float:
    """The ratio from which timm, which cuts off, derives that width of the MLP."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else math.nextafter(ratio, math.inf)


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
