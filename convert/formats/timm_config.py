"""timm's own `config.json`: written for `timm.create_model("local-dir:...")`, read by `source`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from PIL.Image import Resampling

from vit_common.config import OURS, ViTConfig
from vit_common.presets import PRESETS
from vit_convert.formats.timm_models import HEADS

_FAMILIES = {"vit": "vit", "deit": "deit", "beit": "beit"}


def timm_config(config: ViTConfig, timm: Mapping[str, Any] | None, processor: Any) -> str:
    """The text of timm's `config.json` for a network.

    Args:
        config: the network.
        timm: timm's file of the source, which is kept but for what a conversion changes.
        processor: what prepares images, if that is known.
    """
    height, width = config.image_height_width
    table: dict[str, Any] = dict(timm or {})
    args = dict(table.get("model_args") or {})
    if timm is None:
        table["architecture"], args = _architecture(config)
    elif "img_size" in args or (cfg_size(table) not in (None, (height, width))):
        args["img_size"] = [height, width]
    table["num_classes"] = config.num_labels if "For" in str(config.architectures) else 0
    table["num_features"] = config.hidden_size
    table["global_pool"] = "avg" if config.pooling == "mean" else "token"
    if args:
        table["model_args"] = args
    cfg = dict(table.get("pretrained_cfg") or {})
    cfg["input_size"] = [config.num_channels, height, width]
    cfg["num_classes"] = table["num_classes"]
    cfg.setdefault("first_conv", "patch_embed.proj")
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
    family = _FAMILIES.get(config.model_type, "vit")
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
    if family == "beit":
        args.pop("fc_norm", None)
        args["global_pool"] = "avg" if config.pooling == "mean" else "token"
        args["use_abs_pos_emb"] = config.use_absolute_position_embeddings
        args["use_rel_pos_bias"] = config.use_relative_position_bias
        args["use_shared_rel_pos_bias"] = config.use_shared_relative_position_bias
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
