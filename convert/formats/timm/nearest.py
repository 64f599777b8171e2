"""The nearest of timm's names to a network here, and the arguments that make it that network.

What timm takes only as a Python class (its norms with their epsilon, its blocks and MLPs) no file
can say, so a name that has it is looked for; everything else is said in `model_args`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vit_common.config import ViTConfig
from vit_common.presets import PRESETS
from vit_convert.formats import stems
from vit_convert.formats.timm.arguments import ACTIVATIONS, fields_of_class
from vit_convert.formats.timm.models import ARCHITECTURES, Architecture

_ACTIVATIONS = {
    **{ours: theirs for theirs, ours in [*ACTIVATIONS.items()][::-1]},  # the first name of each
    "gelu_new": "gelu_tanh",
    "swish": "silu",
}
_ROTARY = {"axial": "cat", "dinov3": "dinov3", "mixed": "mixed"}
_CLASSES = {"vit": "VisionTransformer", "deit": "VisionTransformerDistilled", "beit": "Beit"}


def class_of(config: ViTConfig) -> str:
    """timm's class that holds a network."""
    if config.base_family != "vit":
        return _CLASSES.get(config.base_family, "VisionTransformer")
    if config.has_relative_mlp:
        return "VisionTransformerRelPos"
    biases = config.has_query_bias, config.has_key_bias
    gated = config.use_swiglu_ffn and (config.use_mlp_norm or config.use_attention_norm)
    attention_alone = config.has_layer_scale and not config.use_mlp_layer_scale
    if config.rope_type is not None or biases == (True, False) or gated or attention_alone:
        return "Eva"
    return "VisionTransformer"


def why_not(config: ViTConfig) -> str | None:
    """What keeps timm from building a network, or None."""
    if config.base_family != "vit":
        exact = config.base_family != "beit" or config.hidden_act == "gelu"
        return _no_activation(config) or (None if exact else "timm's BEiTs have exact GELU")
    cls = class_of(config)
    reasons = {"Eva": _not_eva, "VisionTransformerRelPos": _not_relative}
    why = _no_activation(config) or _not_any(config) or reasons.get(cls, _not_vit)(config)
    if why is None and config.stem_type is not None:
        return stems.timm_cannot_hold(config)
    if why is None and _name(config, cls) is None:
        return f"timm has no name with such norms, blocks and MLPs together in {cls}"
    return why


def _no_activation(config: ViTConfig) -> str | None:
    if config.hidden_act in _ACTIVATIONS or config.use_swiglu_ffn:
        return None
    return f"timm has no activation {config.hidden_act!r}"


_Checks = tuple[tuple[bool, str], ...]


def _first(checks: _Checks) -> str | None:
    return next((why for odd, why in checks if odd), None)


def _not_any(config: ViTConfig) -> str | None:
    """What no class of timm can hold."""
    biased = config.has_query_bias, config.has_key_bias, config.has_value_bias
    parallel = config.block_type == "parallel"
    vitamin = config.stem_type == "mbconv"
    gated = config.use_swiglu_ffn
    its_mlp = gated and config.gate_act == "gelu" and config.use_mlp_input_norm
    inside = config.use_attention_norm or config.use_mlp_norm or config.use_swiglu_ffn
    return _first(
        (
            (
                config.use_representation_layer,
                "timm drops the layer before the classifier (pre-logits) when it loads",
            ),
            (
                config.use_patch_bias == config.use_pre_norm,
                "timm's patches have a bias where no norm stands before the blocks, and only there",
            ),
            (
                config.num_prefix_positions not in (0, config.num_prefix_tokens),
                "timm's registers have positions where its class token has one",
            ),
            (
                biased not in ((True, True, True), (True, False, True), (False, False, False)),
                "timm has a bias of the key only where query and value have one",
            ),
            (
                not config.mlp_bias or config.proj_bias == _fused_outputs(config),
                "timm's projections and MLPs have biases, one for both in parallel blocks of "
                "differential attention",
            ),
            (
                vitamin and not (its_mlp and config.norm_type == "layernorm"),
                "timm's ViTamins have MLPs gated by a GELU, with a norm of their own before them",
            ),
            (
                vitamin and (parallel or config.block_type == "post_norm"),
                "timm's ViTamins have norms before attention and MLP",
            ),
            (
                not vitamin and gated and config.gate_act not in ("silu", "swish"),
                "timm's MLPs are gated by a SiLU, but for those of ViTamins",
            ),
            (
                not vitamin and config.use_mlp_input_norm,
                "timm's MLPs have no second norm before them, but for those of ViTamins",
            ),
            (
                config.block_type == "post_norm" and config.has_layer_scale,
                "timm's blocks with norms after attention and MLP have no layer scale",
            ),
            (
                config.num_parallel_branches not in (1, 2),
                "timm's names have blocks of one or two branches only",
            ),
            (
                parallel and inside,
                "timm's parallel blocks have no other norms inside and no gated MLP",
            ),
        )
    )


def _not_relative(config: ViTConfig) -> str | None:
    """What `VisionTransformerRelPos` cannot hold."""
    both = config.use_relative_position_bias and config.use_shared_relative_position_bias
    inside = config.use_attention_norm or config.use_mlp_norm or config.use_swiglu_ffn
    has = _first(
        (
            (
                config.use_absolute_position_embeddings or config.num_register_tokens > 0 or both,
                "only in networks without absolute positions and registers, of each block or "
                "shared by all",
            ),
            (config.has_query_bias != config.has_key_bias, "with a bias of the key"),
            (config.pooling == "map", "without attention pooling"),
            (config.hidden_act != "gelu", "with exact GELU"),
            (config.pool_prefix_tokens, "with means of patches alone"),
            (config.use_pre_norm, "without a norm before the blocks"),
            (not config.use_final_norm, "with a norm after the blocks"),
            (inside, "without other norms inside, and without a gated MLP"),
            (config.attention_type != "softmax", "with attention by a softmax"),
            (config.rope_type is not None, "without rotary positions"),
            (config.stem_type is not None, "without a stem"),
            (config.norm_after_pooling and config.pooling != "mean", "with a norm of the mean"),
        )
    )
    return has and f"timm has relative positions by an MLP {has}"


def _not_eva(config: ViTConfig) -> str | None:
    """What `Eva` cannot hold."""
    pool = config.pooling == "map"
    has = _first(
        (
            (config.hidden_act != "gelu" and not config.use_swiglu_ffn, "exact GELU"),
            (pool and config.hidden_act != "gelu", "exact GELU"),
            (config.block_type == "parallel", "blocks one after the other"),
            (config.block_type == "post_norm" and config.use_qk_norm, "no norms of query and key"),
            (config.num_parallel_branches > 1, "one attention for each block"),
            (config.attention_type != "softmax", "attention by a softmax"),
            (config.stem_type is not None, "no stem"),
            (config.has_relative_positions, "no relative positions"),
            (
                config.pool_prefix_tokens != pool and config.num_prefix_tokens > 0,
                "attention pooling of all tokens, means of patches",
            ),
        )
    )
    return has and f"timm's class for its rotary positions or biases (Eva) has {has}"


def _not_vit(config: ViTConfig) -> str | None:
    """What `VisionTransformer` cannot hold."""
    own = (config.num_attention_heads, config.intermediate_size)
    pool = config.pooling == "map"
    return _first(
        (
            (config.has_relative_positions, "timm has tables of relative positions only in BEiTs"),
            (
                pool and (config.pooler_heads, config.pooler_inner) != own,
                "timm's VisionTransformer has attention pooling of its blocks' heads and width",
            ),
            (
                pool and config.use_swiglu_ffn,
                "timm's VisionTransformer has no attention pooling beside gated MLPs",
            ),
            (
                config.use_swiglu_ffn and (config.use_mlp_norm or config.use_attention_norm),
                "timm's VisionTransformer has gated MLPs without other norms inside",
            ),
            (
                config.norm_after_pooling and not config.use_final_norm,
                "timm has no norm after the blocks to apply to the mean",
            ),
        )
    )


def _fused_outputs(config: ViTConfig) -> bool:
    return config.block_type == "parallel" and config.attention_type == "differential"


def architecture(config: ViTConfig) -> tuple[str, dict[str, Any]]:
    """A name, and arguments of its class (`model_args`)."""
    cls = class_of(config)
    name = _name(config, cls)
    assert name is not None  # `why_not` is asked first
    make = {"Eva": _of_eva, "Beit": _of_beit, "VisionTransformerRelPos": _of_relative}
    args = {**_sizes(config), **make.get(cls, _of_vit)(config)}
    if cls == "Beit":
        del args["class_token"]  # always there
    return name, args


def _name(config: ViTConfig, cls: str) -> str | None:
    """The name with all that no argument can say, of the nearest sizes."""
    if config.stem_type == "mbconv":
        return stems.VITAMINS.get((config.stem_width, config.hidden_size))
    if config.stem_type is not None:
        return stems.TIMM_NAMES.get(config.stem_depths)
    rows = {name: row for name, row in ARCHITECTURES.items() if row.cls == cls}
    fitting = {name: row for name, row in rows.items() if _same_classes(config, row)}
    if not fitting:
        return None

    def distance(name: str) -> tuple[Any, ...]:
        row = fitting[name]
        eps = fields_of_class(cls, row.arguments)["layer_norm_eps"]
        said = str(row.arguments.get("act_layer"))
        return (
            abs(math.log(max(config.layer_norm_eps, 1e-30) / eps)),
            not name.startswith(_published(config)),
            said not in ("None", _activation(config)),
            len(row.arguments),
            row.heads != config.num_attention_heads,
            name != f"{name.split('_patch')[0]}_patch16_224",
            name,
        )

    return min(fitting, key=distance)


def _published(config: ViTConfig) -> str:
    """How timm's name of a network of these sizes begins."""
    sizes = (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
    )
    named = {tuple(row[:4]): name for name, row in PRESETS.items()}
    family = {"deit": "deit", "beit": "beit"}.get(config.base_family, "vit")
    return f"{family}_{named.get(sizes, 'base')}_"


def _same_classes(config: ViTConfig, row: Architecture) -> bool:
    """Whether a name has the network's norms, blocks and MLPs."""
    said, args = fields_of_class(row.cls, row.arguments), row.arguments
    block = str(args.get("block_fn", ""))
    branches = 2 if block == "ParallelThingsBlock" else 1
    differs = block.startswith("Diff") == _fused_outputs(config)
    if row.cls == "VisionTransformer":
        gated = "mlp_layer" in args
        odd = args.get("mlp_layer") not in (None, "GluMlp") or gated != config.use_swiglu_ffn
        if odd or args.get("embed_layer") or not differs:
            return False
    if config.base_family != "vit":
        return True
    return (
        said["norm_type"] == config.norm_type
        and (row.cls == "Eva" or said["block_type"] == config.block_type)
        and branches == config.num_parallel_branches
    )


def _activation(config: ViTConfig) -> str:
    return _ACTIVATIONS.get(str(config.hidden_act), "")


def _sizes(config: ViTConfig) -> dict[str, Any]:
    rows, columns = config.patch_height_width
    patch: Any = rows if rows == columns else [rows, columns]
    if config.stem_type == "mbconv":
        patch = 1
    elif config.stem_type is not None:
        patch = list(config.patch_projection_size)
    channels = {} if config.num_channels == 3 else {"in_chans": config.num_channels}
    return {
        **channels,
        "img_size": list(config.image_height_width),
        "patch_size": patch,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": ratio(config.intermediate_size, config.hidden_size),
        "qkv_bias": config.has_query_bias,
        "class_token": config.use_cls_token,
        "init_values": config.layer_scale_init_value if config.has_layer_scale else None,
    }


def pooling(config: ViTConfig) -> str:
    """What a classifier looks at, in timm's word."""
    return {"mean": "avg", "map": "map"}.get(config.pooling, "token")


def _of_vit(config: ViTConfig) -> dict[str, Any]:
    args: dict[str, Any] = {
        "act_layer": _activation(config),
        "reg_tokens": config.num_register_tokens,
        "no_embed_class": config.num_prefix_positions == 0,
        "global_pool": pooling(config),
        "fc_norm": config.norm_after_pooling,
    }
    if config.stem_type == "mbconv":  # its class of MLPs has the halves apart
        args["act_layer"] = "gelu"
    elif config.use_swiglu_ffn:
        args["act_layer"] = "silu"
        args["mlp_ratio"] = ratio(2 * config.intermediate_size, config.hidden_size)
    if config.base_family == "deit":
        del args["reg_tokens"], args["no_embed_class"], args["global_pool"], args["fc_norm"]
        return args
    return args | {
        "pre_norm": config.use_pre_norm,
        "final_norm": config.use_final_norm,
        "qk_norm": config.use_qk_norm,
        "scale_attn_norm": config.use_attention_norm,
        "scale_mlp_norm": config.use_mlp_norm,
        "pool_include_prefix": config.pool_prefix_tokens,
        "pos_embed": "learn" if config.use_absolute_position_embeddings else "none",
        "attn_layer": "diff" if config.attention_type == "differential" else "attn",
    }


def _of_relative(config: ViTConfig) -> dict[str, Any]:
    return {
        "qk_norm": config.use_qk_norm,
        "global_pool": pooling(config),
        "fc_norm": config.norm_after_pooling,
        "rel_pos_dim": config.relative_position_width,
        "shared_rel_pos": config.use_shared_relative_position_bias,
    }


def _of_beit(config: ViTConfig) -> dict[str, Any]:
    return {
        "global_pool": pooling(config),
        "use_abs_pos_emb": config.use_absolute_position_embeddings,
        "use_rel_pos_bias": config.use_relative_position_bias,
        "use_shared_rel_pos_bias": config.use_shared_relative_position_bias,
    }


def _of_eva(config: ViTConfig) -> dict[str, Any]:
    args: dict[str, Any] = {
        "attn_type": "rope" if config.has_key_bias else "eva",
        "qkv_fused": True,
        "num_kv_heads": None,
        "qk_norm": config.use_qk_norm,
        "swiglu_mlp": config.use_swiglu_ffn,
        "swiglu_align_to": 0,
        "scale_mlp": config.use_mlp_norm,
        "scale_attn_inner": config.use_attention_norm,
        "num_reg_tokens": config.num_register_tokens,
        "no_embed_class": config.num_prefix_positions == 0,
        "use_abs_pos_emb": config.use_absolute_position_embeddings,
        "use_rot_pos_emb": config.rope_type is not None,
        "attn_only_layer_scale": config.has_layer_scale and not config.use_mlp_layer_scale,
        "use_post_norm": config.block_type == "post_norm",
        "use_pre_transformer_norm": config.use_pre_norm,
        "use_post_transformer_norm": config.use_final_norm and not config.norm_after_pooling,
        "use_fc_norm": config.norm_after_pooling,
        "global_pool": pooling(config),
    }
    if config.pooling == "map":
        args["attn_pool_num_heads"] = config.pooler_heads
        args["attn_pool_mlp_ratio"] = ratio(config.pooler_inner, config.hidden_size)
    if config.rope_type is not None:
        args |= {
            "rope_type": _ROTARY[config.rope_type],
            "rope_temperature": config.rope_theta,
            "rope_grid_offset": config.rope_grid_offset,
            "rope_grid_indexing": config.rope_grid_indexing,
            "rope_rotate_half": config.rope_rotate_half,
            "ref_feat_shape": config.rope_grid_size,
        }
    return args


def ratio(inner: int, width: int) -> float:
    """The ratio from which timm, which cuts off, derives that width of the MLP."""
    exact = inner / width
    return exact if int(width * exact) == inner else math.nextafter(exact, math.inf)


def for_eva(config: ViTConfig, args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a source's own file, with those that say how the weights written here are named.

    Args:
        config: the network, of timm's class `Eva`.
        args: what the file has (`model_args`).
    """
    names = ("attn_type", "qkv_fused", "num_kv_heads", "swiglu_align_to")
    own = _of_eva(config)
    sizes = {"mlp_ratio": ratio(config.intermediate_size, config.hidden_size)}
    return {**args, **sizes, **{name: own[name] for name in names}}
