"""baaivision EVA-02 and EVA-02-CLIP: rotary positions and gated MLPs. (EVA's own first version has
BEiT's names.)

Source: `EVA-02/asuka/modeling_finetune.py` and `rope.py` of baaivision/EVA, and `eva_vit_model.py`
of its EVA-CLIP. The tables of sines and cosines lie in the file, and say for which grid they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_common.errors import CheckpointError
from vit_common.positions import rotary_angles
from vit_convert.formats.format import Clue, Format, Rule
from vit_convert.formats.timm import EPS, blocks, dense, keep, qkv
from vit_convert.layouts import GATE_AND_UP

_LAYER = "encoder.layer.{i}."
_BLOCK = "blocks.{i}."
_COSINES, _SINES = "rope.freqs_cos", "rope.freqs_sin"

_RULES = (
    keep(
        {
            "cls_token": "embeddings.cls_token",
            "pos_embed": "embeddings.position_embeddings",
            f"{_BLOCK}attn.q_proj.weight": f"{_LAYER}attention.attention.query.weight",
            f"{_BLOCK}attn.k_proj.weight": f"{_LAYER}attention.attention.key.weight",
            f"{_BLOCK}attn.v_proj.weight": f"{_LAYER}attention.attention.value.weight",
            f"{_BLOCK}attn.q_bias": f"{_LAYER}attention.attention.query.bias",
            f"{_BLOCK}attn.v_bias": f"{_LAYER}attention.attention.value.bias",
            f"{_BLOCK}gamma_1": f"{_LAYER}lambda_1",
            f"{_BLOCK}gamma_2": f"{_LAYER}lambda_2",
        }
    )
    + dense("patch_embed.proj", "embeddings.patch_embeddings.projection")
    + dense("norm", "layernorm")
    + dense("fc_norm", "pooler.layernorm")
    + dense("head", "classifier")
    + qkv("weight")
    + blocks(
        {
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
            "attn.inner_attn_ln": "attention.output.layernorm",
            "attn.proj": "attention.output.dense",
            "mlp.w12": "intermediate.dense",
            "mlp.ffn_ln": "output.layernorm",
            "mlp.w3": "output.dense",
        }
    )
    + tuple(
        Rule(
            (f"{_BLOCK}mlp.w1.{leaf}", f"{_BLOCK}mlp.w2.{leaf}"),
            f"{_LAYER}intermediate.dense.{leaf}",
            GATE_AND_UP,
        )
        for leaf in ("weight", "bias")
    )
)


def _rotary(source: Mapping[str, Any]) -> dict[str, Any]:
    """What the tables of a file say: the width of a head, the grid, and that it is stretched over.

    Raises:
        CheckpointError: they are not those of EVA-02's rotary positions.
    """
    if _COSINES not in source or _SINES not in source:
        return {}
    cos, sin = (np.asarray(source[name].read(), np.float64) for name in (_COSINES, _SINES))
    side = math.isqrt(len(cos))
    # The first frequency is 1, so the second row's angle is the distance between two rows.
    reference = round(side * float(np.arctan2(sin[side, 0], cos[side, 0]))) if side > 1 else side
    if side * side == len(cos) and reference > 0 and cos.shape[1] % 4 == 0:
        size = {"grid": (side, side), "reference": (reference, reference)}
        angles = rotary_angles("axial", cos.shape[1], 10000.0, **size).repeat(2, axis=1)
        if max(np.abs(np.cos(angles) - cos).max(), np.abs(np.sin(angles) - sin).max()) < 1e-2:
            width = source["patch_embed.proj.weight"].shape[0]
            heads = width // cos.shape[1]
            return {"rope_type": "axial", "rope_grid_size": reference, "num_attention_heads": heads}
    raise CheckpointError(
        f"the tables of rotary positions in {_COSINES!r} must be those of EVA-02: angles of rows "
        f"and columns by powers of 10000; those of this file, of shape {cos.shape}, are not."
    )


FORMATS = (
    Format(
        name="eva",
        rules=_RULES,
        describes="baaivision EVA-02",
        ignored=(
            (r"(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)", "a table computed from the grid"),
            (r"mask_token|lm_head\..*", "of pretraining, which predicts features of CLIP"),
        ),
        settings={"layer_norm_eps": EPS, "position_resize": "bicubic"},
        clues=(Clue(30, lambda found: found.has(r"rope\.freqs_cos")),),
        says=_rotary,
        unsaid=lambda shapes: ("rope_type",),
        written=False,
    ),
)
