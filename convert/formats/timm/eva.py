"""The names of timm's class `Eva`: EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT, LingBot.

Source: `timm/models/eva.py` of timm 1.0.31. Query, key and value are one layer, whose bias has its
own names or lacks that of the key, or three; a gated MLP's first layer is one, or two.
"""

from __future__ import annotations

import numpy as np

from vit_common.config import ViTConfig
from vit_convert.formats.format import Rule
from vit_convert.formats.timm.models import ARCHITECTURES
from vit_convert.formats.timm.nearest import class_of
from vit_convert.formats.timm.pool import ATTENTION_POOL
from vit_convert.layouts import FUSED_QKV, GATE_AND_UP, KEEP, Arrays, Layout

_LAYER = "encoder.layer.{i}."
_BLOCK = "blocks.{i}."
_QKV = tuple(f"{_LAYER}attention.attention.{name}" for name in ("query", "key", "value"))

_TOP = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "rope.freqs": "encoder.rope_frequencies",
    f"{_BLOCK}gamma_1": f"{_LAYER}lambda_1",
    f"{_BLOCK}gamma_2": f"{_LAYER}lambda_2",
    f"{_BLOCK}attn.q_bias": f"{_QKV[0]}.bias",
    f"{_BLOCK}attn.v_bias": f"{_QKV[2]}.bias",
}
_MODULES = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm_pre": "pre_layernorm",
    "norm": "layernorm",
    "fc_norm": "pooler.layernorm",
    "head": "classifier",
    f"{_BLOCK}norm1": f"{_LAYER}layernorm_before",
    f"{_BLOCK}norm2": f"{_LAYER}layernorm_after",
    f"{_BLOCK}attn.q_norm": f"{_LAYER}attention.attention.query_norm",
    f"{_BLOCK}attn.k_norm": f"{_LAYER}attention.attention.key_norm",
    f"{_BLOCK}attn.norm": f"{_LAYER}attention.output.layernorm",
    f"{_BLOCK}attn.proj": f"{_LAYER}attention.output.dense",
    f"{_BLOCK}mlp.fc1": f"{_LAYER}intermediate.dense",
    f"{_BLOCK}mlp.norm": f"{_LAYER}output.layernorm",
    f"{_BLOCK}mlp.fc2": f"{_LAYER}output.dense",
    f"{_BLOCK}attn.q_proj": _QKV[0],
    f"{_BLOCK}attn.k_proj": _QKV[1],
    f"{_BLOCK}attn.v_proj": _QKV[2],
}


def _rules() -> tuple[Rule, ...]:
    rules = []
    for leaf in ("weight", "bias"):
        fused = f"{_BLOCK}attn.qkv.{leaf}"
        joined: tuple[tuple[str | tuple[str, ...], str | tuple[str, ...], Layout], ...] = (
            (fused, tuple(f"{name}.{leaf}" for name in _QKV), FUSED_QKV),
            (
                (f"{_BLOCK}mlp.fc1_g.{leaf}", f"{_BLOCK}mlp.fc1_x.{leaf}"),
                f"{_LAYER}intermediate.dense.{leaf}",
                GATE_AND_UP,
            ),
            *((f"{a}.{leaf}", f"{b}.{leaf}", KEEP) for a, b in _MODULES.items()),
        )
        rules += [Rule(*row) for row in joined]
    return tuple(rules) + tuple(Rule(a, b) for a, b in _TOP.items())


RULES = _rules() + ATTENTION_POOL


def _repeat(arrays: Arrays) -> Arrays:
    query, norm = arrays[0], arrays[-1]
    width = norm.size  # of a head
    if norm.ndim != 1 or not width or any(not a.ndim or a.shape[0] % width for a in arrays):
        raise ValueError(f"no whole number of heads of width {width} in {query.shape}")
    repeated = []
    for array in arrays[1:-1]:
        groups, odd = divmod(query.shape[0], max(array.shape[0], 1))
        if odd or not groups:
            raise ValueError(f"{array.shape[0]} rows for {query.shape[0]} of the query")
        heads = array.reshape(array.shape[0] // width, width, *array.shape[1:])
        repeated.append(np.repeat(heads, groups, axis=0).reshape(query.shape[0], *array.shape[1:]))
    return [query, *repeated, norm]


_GROUPED = (
    "q_proj.weight", "k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias",
    "k_norm.weight",
)  # fmt: skip
_OURS = {
    "q_proj": _QKV[0], "k_proj": _QKV[1], "v_proj": _QKV[2],
    "k_norm": f"{_LAYER}attention.attention.key_norm",
}  # fmt: skip
GROUPED_SIGNS = tuple(f"blocks.0.attn.{name}" for name in _GROUPED)
GROUPED = (
    Rule(
        tuple(f"{_BLOCK}attn.{name}" for name in _GROUPED),
        tuple(f"{_OURS[module]}.{leaf}" for module, leaf in (n.split(".") for n in _GROUPED)),
        Layout("heads of key and value, repeated", _repeat, list),
    ),
    *RULES,
)
"""Where several heads of the query share one of key and value (grouped-query attention), in some
blocks or all: here each has a copy of its own, which computes the same. The norm of the key says
how wide a head is."""


SIGNS = (
    r"rope\.freqs",
    r"blocks\.\d+\.(gamma_1|attn\.q_bias|attn\.q_proj\.weight|mlp\.fc1_g\.weight)",
)
"""Names that timm's `VisionTransformer` has not."""


def fits(config: ViTConfig, head: object = None) -> bool:
    """Whether a network is written with these names."""
    return class_of(config) == "Eva"


def rules_for(config: ViTConfig) -> tuple[Rule, ...]:
    """The rules that write a network: query, key and value as one layer; and the first layer of a
    gated MLP as two where a norm follows it, as timm has it.

    Args:
        config: the network.
    """
    left = [f"{_BLOCK}attn.{x}_proj.{leaf}" for x in "qkv" for leaf in ("weight", "bias")]
    if not config.has_key_bias:
        left.append(f"{_BLOCK}attn.qkv.bias")
    if not (config.use_swiglu_ffn and config.use_mlp_norm):
        left += [f"{_BLOCK}mlp.fc1_{part}.{leaf}" for part in "gx" for leaf in ("weight", "bias")]
    return tuple(rule for rule in RULES if rule.foreign_names[0] not in left)


def named(architecture: str) -> bool:
    """Whether timm's name is of a network that this table alone holds: of the class `Eva`, and no
    BEiT."""
    row = ARCHITECTURES.get(architecture)
    if row is None or row.cls != "Eva":
        return False
    return any(
        row.arguments.get(name)
        for name in ("use_rot_pos_emb", "use_post_norm", "swiglu_mlp", "scale_mlp")
    )
