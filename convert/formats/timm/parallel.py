"""The names of timm's blocks whose parts run side by side.

Source: `ParallelScalingBlock`, `DiffParallelScalingBlock` and `ParallelThingsBlock` of
`timm/models/vision_transformer.py` of timm 1.0.31. In the first two the MLP's first layer and
query, key and value are one layer; in the second so are the layers after both. The third adds up
several attentions, and then several MLPs, each with a norm of its own.
"""

from __future__ import annotations

from vit_common.config import ViTConfig
from vit_common.parameters import DIFFERENTIAL
from vit_convert.formats.format import Rule
from vit_convert.layouts import ATTENTION_AND_MLP, FUSED_QKV, MLP_AND_QKV

_BLOCK = "blocks.{i}."
_LAYER = "encoder.layer.{i}."
_ATTENTION = f"{_LAYER}attention.attention."

MOST_BRANCHES = 8
"""Of a block; timm's networks have two."""


def _dense(theirs: str, ours: str) -> tuple[Rule, ...]:
    return tuple(
        Rule(f"{_BLOCK}{theirs}.{leaf}", f"{_LAYER}{ours}.{leaf}") for leaf in ("weight", "bias")
    )


def _in_proj(leaf: str) -> tuple[str, ...]:
    qkv = (f"{_ATTENTION}{name}.{leaf}" for name in ("query", "key", "value"))
    return (f"{_LAYER}intermediate.dense.{leaf}", *qkv)


_WEIGHT, _BIAS = f"{_BLOCK}in_proj.weight", f"{_BLOCK}in_proj.bias"
_JOINED = (Rule((_WEIGHT, _BIAS), (*_in_proj("weight"), *_in_proj("bias")), MLP_AND_QKV),)
_APART = (
    Rule(_WEIGHT, _in_proj("weight"), MLP_AND_QKV),
    Rule(f"{_BLOCK}mlp_bias", f"{_LAYER}intermediate.dense.bias"),
)
_SCALED = (
    *_dense("in_norm", "layernorm_before"),
    *_dense("q_norm", "attention.attention.query_norm"),
    *_dense("k_norm", "attention.attention.key_norm"),
    Rule(f"{_BLOCK}ls.gamma", f"{_LAYER}lambda_1"),
)
_TWO_OUTPUTS = (
    *_dense("attn_out_proj", "attention.output.dense"),
    *_dense("mlp_out_proj", "output.dense"),
)

SCALING = _JOINED + _SCALED + _TWO_OUTPUTS
"""Blocks whose query, key and value have a bias."""
SCALING_SIGN = "blocks.0.attn_out_proj.weight"
"""A name that no other block has."""

SCALING_WITHOUT_BIAS = _APART + _SCALED + _TWO_OUTPUTS
"""Blocks whose query, key and value have none."""
WITHOUT_BIAS_SIGN = "blocks.0.mlp_bias"

DIFFERENTIAL_SCALING = (
    *_JOINED,
    *_SCALED,
    Rule(
        f"{_BLOCK}out_proj.weight",
        (f"{_LAYER}attention.output.dense.weight", f"{_LAYER}output.dense.weight"),
        ATTENTION_AND_MLP,
    ),
    Rule(f"{_BLOCK}out_proj.bias", f"{_LAYER}output.dense.bias"),
    Rule(f"{_BLOCK}sub_norm.weight", f"{_ATTENTION}differential.norm.weight"),
    *(Rule(_BLOCK + name, f"{_ATTENTION}differential.{name}") for name in DIFFERENTIAL),
)
"""Blocks of differential attention, whose outputs are one layer: that of the MLP has its bias."""
DIFFERENTIAL_SIGN = "blocks.0.out_proj.weight"


_DIFFERENTIAL = (*((name, name) for name in DIFFERENTIAL), ("sub_norm.weight", "norm.weight"))


def _branch(j: int) -> tuple[Rule, ...]:
    """One attention and one MLP of a block."""
    ours = "" if j == 0 else f"branch.{j}."
    attention, mlp = f"attns.{j}.", f"ffns.{j}."
    qkv = tuple(f"{ours}attention.attention.{name}" for name in ("query", "key", "value"))
    return (
        *(
            Rule(
                f"{_BLOCK}{attention}attn.qkv.{leaf}",
                tuple(f"{_LAYER}{name}.{leaf}" for name in qkv),
                FUSED_QKV,
            )
            for leaf in ("weight", "bias")
        ),
        *_dense(f"{attention}norm", f"{ours}layernorm_before"),
        *_dense(f"{attention}attn.q_norm", f"{ours}attention.attention.query_norm"),
        *_dense(f"{attention}attn.k_norm", f"{ours}attention.attention.key_norm"),
        *_dense(f"{attention}attn.norm", f"{ours}attention.output.layernorm"),
        *_dense(f"{attention}attn.proj", f"{ours}attention.output.dense"),
        *_dense(f"{mlp}norm", f"{ours}layernorm_after"),
        *_dense(f"{mlp}mlp.fc1", f"{ours}intermediate.dense"),
        *_dense(f"{mlp}mlp.norm", f"{ours}output.layernorm"),
        *_dense(f"{mlp}mlp.fc2", f"{ours}output.dense"),
        *(
            Rule(
                f"{_BLOCK}{attention}attn.{theirs}",
                f"{_LAYER}{ours}attention.attention.differential.{name}",
            )
            for theirs, name in _DIFFERENTIAL
        ),
        Rule(f"{_BLOCK}{attention}ls.gamma", f"{_LAYER}{ours}lambda_1"),
        Rule(f"{_BLOCK}{mlp}ls.gamma", f"{_LAYER}{ours}lambda_2"),
    )


THINGS = tuple(rule for j in range(MOST_BRANCHES) for rule in _branch(j))
"""Blocks of several branches."""
THINGS_SIGN = "blocks.0.attns.0.norm.weight"


def fits_scaling(config: ViTConfig, head: object = None) -> bool:
    return config.block_type == "parallel" and config.qkv_bias


def fits_scaling_without_bias(config: ViTConfig, head: object = None) -> bool:
    return config.block_type == "parallel" and not config.qkv_bias


def fits_differential_scaling(config: ViTConfig, head: object = None) -> bool:
    return config.block_type == "parallel" and config.attention_type == "differential"


def fits_things(config: ViTConfig, head: object = None) -> bool:
    return config.num_parallel_branches > 1
