"""What timm's names and the arguments of its classes mean for a network here.

`models.py` says for each name which class timm builds, with which arguments; a `config.json` may
have others under `model_args`. Both are read here, and what is not understood is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vit_common.errors import ConfigError
from vit_convert.formats.timm.models import ARCHITECTURES, Architecture

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "quickgelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "selu": "selu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
"""timm's name of an activation -> `hidden_act`."""

EPS = 1e-6
"""Epsilon of timm's norms where its name binds no other, and in every project with its names."""

# Keywords that weights show by themselves, or that change nothing in inference.
_SHOWN = {
    "embed_dim", "depth", "patch_size", "in_chans", "num_classes", "mlp_ratio", "qkv_bias",
    "class_token", "no_embed_class", "distilled", "drop_rate", "pos_drop_rate", "patch_drop_rate",
    "proj_drop_rate", "attn_drop_rate", "dynamic_img_size", "dynamic_img_pad", "weight_init",
    "fix_init", "strict_img_size", "use_abs_pos_emb", "use_rel_pos_bias",
    "use_shared_rel_pos_bias", "head_init_scale", "qkv_fused", "swiglu_align_to", "mlp_hidden_dim",
    "rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords", "num_heads", "img_size",
    "drop_path_rate", "embed_proj_type", "patchify_channels_last", "use_key_only_attn_mask",
    "enable_patch_interpolator", "pos_embed_grid_size", "attn_pool_mlp_ratio", "attn_type",
    "swiglu_mlp", "num_kv_heads", "cache_dir", "use_naflex", "rel_pos_dim", "shared_rel_pos",
}  # fmt: skip

# timm's classes spell the same thing differently: keyword of a class -> that of VisionTransformer.
_SPELLED = {
    "num_reg_tokens": "reg_tokens",
    "use_pre_transformer_norm": "pre_norm",
    "scale_attn_inner": "scale_attn_norm",
    "scale_attn_inner_norm": "scale_attn_norm",
    "scale_mlp": "scale_mlp_norm",
    "rope_ref_feat_shape": "ref_feat_shape",
    "use_fc_norm": "fc_norm",
    "attn_gated": "gated",
}

# What each keyword may be, with what the field says of it; a value that is not here is refused.
_BLOCKS = {
    "Block": "pre_norm",
    "EvaBlock": "pre_norm",
    "ResPostBlock": "post_norm",
    "RelPosBlock": "pre_norm",
    "ResPostRelPosBlock": "post_norm",
    "ParallelScalingBlock": "parallel",
    "DiffParallelScalingBlock": "parallel",
    "ParallelThingsBlock": "pre_norm",
}
_NORMS = {"layernorm": "layernorm", "rmsnorm": "rmsnorm"}
POOLINGS = ("token", "avg", "map", "")
"""What a classifier may look at, in timm's words."""
_ROTARY = {"cat": "axial", "axial": "axial", "dinov3": "dinov3", "mixed": "mixed"}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "proj_bias": (True,),
    "use_rot_pos_emb": (True, False),
    "pos_embed": ("learn", "learned", "factorized", "none", ""),
    "embed_norm_layer": (None,),
    "input_norm_layer": (None,),
    "attn_layer": ("", "attn", "Attention", "diff", None),
    "mlp_layer": ("Mlp", "GluMlp", None),
    "gated": (False,),
    "attn_only_layer_scale": (True, False),
    "rope_mrope_section": (None,),
    "global_pool": POOLINGS,
    "rope_type": (*_ROTARY, "none", "", None),
    "norm_layer": (*_NORMS, None),
    "act_layer": (*ACTIVATIONS, None),
    "block_fn": (*_BLOCKS, None),
    "embed_layer": ("PatchEmbed", None),
    "pos_embed_use_grid_sample": (False,),
    "rel_pos_type": ("mlp",),
}
_TAKEN = {
    *_ALLOWED, *_SPELLED, *_SPELLED.values(), "final_norm", "qk_norm", "norm_eps", "init_values",
    "pool_include_prefix", "rope_temperature", "rope_grid_offset", "rope_grid_indexing",
    "rope_rotate_half", "use_post_norm", "use_post_transformer_norm", "attn_pool_num_heads",
    "pos_embed_interp_mode", "pos_embed_antialias", "pos_embed_align_corners",
    "pos_embed_ar_preserving",
}  # fmt: skip

# Class of a name -> what its networks have that none here has.
_UNKNOWN_CLASSES = {
    "VisionTransformerSAM": "windows and decomposed relative positions (SAM's encoder)",
}


def architecture(name: str) -> Architecture:
    """What timm builds for a name.

    Raises:
        ConfigError: it is none of the names known here.
    """
    if name not in ARCHITECTURES:
        # Other networks can have the same names: vit_base_patch16_rpn_224 has its norms elsewhere.
        raise ConfigError(
            f"timm's config.json: `architecture` is {name!r}, which is not one of the networks "
            "known here: timm's ViT, DeiT, BEiT, EVA and their kin. If it computes the same as one "
            "of them, read the weights from a folder without this config.json, and give what they "
            "do not say as options."
        )
    return ARCHITECTURES[name]


def fields_of(name: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields that a name and the arguments beside it say.

    Args:
        name: timm's name of a network.
        given: keywords that the file has for it (`model_args`).

    Returns:
        The fields that the name says, and those that `given` says otherwise.

    Raises:
        ConfigError: the name is not known, or a keyword or value changes the network in a way that
            is not understood.
    """
    row = architecture(name)
    if row.cls in _UNKNOWN_CLASSES:
        raise ConfigError(
            f"timm's {name} has {_UNKNOWN_CLASSES[row.cls]}, which no network here has."
        )
    odd = [
        f"{keyword}={value!r}"
        for keyword, value in given.items()
        if keyword not in _SHOWN and not _understood(keyword, value)
    ]
    if odd:
        raise ConfigError(
            f"timm's config.json: `model_args` has {', '.join(odd)}, which changes the network and "
            "is not supported; this model cannot be converted."
        )
    named = fields_of_class(row.cls, row.arguments)
    with_given = fields_of_class(row.cls, {**row.arguments, **given})
    return named, {key: value for key, value in with_given.items() if named.get(key) != value}


def _understood(keyword: str, value: Any) -> bool:
    if isinstance(value, (list, dict)) and keyword in _ALLOWED:
        return False
    spelled = _SPELLED.get(keyword, keyword)
    return keyword in _TAKEN and value in _ALLOWED.get(spelled, (value,))


def fields_of_class(cls: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that arguments of a class mean, those of its defaults included."""
    args = {_SPELLED.get(keyword, keyword): value for keyword, value in arguments.items()}
    norm = args.get("norm_layer") or "layernorm"
    fields: dict[str, Any] = {
        "hidden_act": ACTIVATIONS[args.get("act_layer") or "gelu"],
        "layer_norm_eps": args.get("norm_eps", EPS),
        "norm_type": _NORMS[norm],
        "block_type": _BLOCKS[args.get("block_fn") or "Block"],
        "pool_prefix_tokens": bool(args.get("pool_include_prefix", False)),
        "pooler_num_heads": args.get("attn_pool_num_heads"),
        "rope_type": None,
        "use_final_norm": bool(args.get("final_norm", True)),
    }
    if args.get("mlp_layer") == "GeGluMlp":
        fields |= {"gate_act": "gelu", "use_mlp_input_norm": True}
    if args.get("mlp_layer") in ("GluMlp", "GeGluMlp"):
        fields["hidden_act"] = "gelu"  # the gate's is silu, and no other function is there
    if cls == "Eva":
        fields["use_mlp_layer_scale"] = not args.get("attn_only_layer_scale", False)
        fields["pool_prefix_tokens"] = args.get("global_pool") == "map"
        if args.get("use_post_norm"):
            fields["block_type"] = "post_norm"
        positions = args.get("use_abs_pos_emb", True)
        fields["use_absolute_position_embeddings"] = bool(positions)
        fields["use_patch_bias"] = not args.get("pre_norm", False)
        after = args.get("use_post_transformer_norm")
        fields["use_final_norm"] = after is not False or args.get("fc_norm") is not False
    if args.get("pos_embed", "learn") in ("none", ""):
        fields["use_absolute_position_embeddings"] = False
    fields["layer_scale_init_value"] = float(args.get("init_values") or 0.0)
    kind = args.get("rope_type", "cat" if cls == "Eva" else None)
    rotates = args.get("use_rot_pos_emb", False) if cls == "Eva" else bool(kind)
    if rotates and kind not in ("none", "", None):
        reference = args.get("ref_feat_shape")
        fields |= {
            "rope_type": _ROTARY[kind],
            "rope_theta": float(args.get("rope_temperature", 10000.0)),
            "rope_grid_size": _grid(reference) if _ROTARY[kind] == "axial" else None,
            "rope_grid_offset": float(args.get("rope_grid_offset", 0.0)),
            "rope_grid_indexing": args.get("rope_grid_indexing", "ij"),
            "rope_rotate_half": bool(args.get("rope_rotate_half", False)),
        }
    if cls == "NaFlexVit":
        fields["position_resize"] = _resize_rule(args)
    return fields


def _grid(reference: Any) -> Any:
    if isinstance(reference, (list, tuple)):
        rows, columns = reference
        return rows if rows == columns else (rows, columns)
    return reference


def _resize_rule(args: Mapping[str, Any]) -> str:
    """How a NaFlexVit resamples its positions."""
    if args.get("pos_embed") == "factorized":  # of rows and of columns, which add up
        return "bilinear_square" if args.get("pos_embed_ar_preserving", False) else "bilinear"
    rule = args.get("pos_embed_interp_mode", "bicubic")
    if args.get("pos_embed_align_corners", False):
        rule += "_align_corners"
    if args.get("pos_embed_antialias", True):
        rule += "_antialias"
    return f"{rule}_square" if args.get("pos_embed_ar_preserving", False) else rule


# Keyword, as `VisionTransformer` has it -> the parameter that is there if it is set.
_SHOWN_BY = {
    "pre_norm": "pre_layernorm.weight",
    "qk_norm": "encoder.layer.0.attention.attention.query_norm.weight",
    "scale_attn_norm": "encoder.layer.0.attention.output.layernorm.weight",
    "scale_mlp_norm": "encoder.layer.0.output.layernorm.weight",
}


def check_shown(given: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    """Refuse keywords that say of the network what its weights deny.

    Args:
        given: keywords beside a name (`model_args`).
        shapes: of the weights, by canonical name.

    Raises:
        ConfigError: a part that a keyword asks for is not among the weights, or the reverse.
    """
    for keyword, value in given.items():
        name = _SHOWN_BY.get(_SPELLED.get(keyword, keyword))
        denied = name is not None and bool(value) != (name in shapes)
        if keyword == "norm_layer":
            name = "encoder.layer.0.layernorm_before.bias"
            denied = f"{name[:-4]}weight" in shapes and (value == "rmsnorm") == (name in shapes)
        if denied:
            raise ConfigError(
                f"timm's config.json: `model_args` has {keyword}={value!r}, which changes the "
                f"network, and {name} is {'' if name in shapes else 'not '}among these weights."
            )
