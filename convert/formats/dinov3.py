"""facebookresearch DINOv3, with either MLP.

Source: `dinov3/models/vision_transformer.py`, `dinov3/layers/{attention,ffn_layers}.py` and
`dinov3/hub/backbones.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vit_common.config import ViTConfig
from vit_common.errors import CheckpointError
from vit_convert.formats.format import Clue, Format, Rule
from vit_convert.formats.timm import PARTS, REFUSES, blocks, keep, qkv
from vit_convert.layouts import GATE_AND_UP, TOKEN, Layout

_LAYER = "encoder.layer.{i}."
_TOP = {
    "cls_token": "embeddings.cls_token",
    "storage_tokens": "embeddings.register_tokens",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
}
PERIODS = "rope_embed.periods"


def _without_key(arrays: list[np.ndarray]) -> list[np.ndarray]:
    bias, mask = arrays
    if bias.shape != mask.shape or bias.shape[0] % 3:
        raise ValueError(f"a bias of {bias.shape} cannot have a mask of {mask.shape}")
    wanted = np.repeat([1, 0, 1], len(mask) // 3)
    # Where shapes alone are asked for, there are no numbers.
    if mask.dtype != np.int8 and not np.array_equal(mask.astype(np.float32), wanted):
        raise CheckpointError(
            "`attn.qkv.bias_mask` must be 1 over query and value and 0 over the key; that of this "
            "file is not, so its network is another."
        )
    query, _, value = np.split(bias, 3)
    return [query, value]


def _with_key(arrays: list[np.ndarray]) -> list[np.ndarray]:
    query, value = arrays
    zeros, ones = np.zeros_like(query), np.ones_like(query)
    return [np.concatenate([query, zeros, value]), np.concatenate([ones, zeros, ones])]


MASKED_BIAS = Layout("bias with a masked key", _without_key, _with_key, 1, 1)
"""A bias (3 D,) of query, key and value and its mask, which is zero over the key <-> the biases of
query and value; what lies under the mask is left out."""

_PLAIN_BIAS = qkv("bias")
_MASKED_BIAS = (
    Rule(
        ("blocks.{i}.attn.qkv.bias", "blocks.{i}.attn.qkv.bias_mask"),
        tuple(f"{_LAYER}attention.attention.{name}.bias" for name in ("query", "value")),
        MASKED_BIAS,
    ),
)
_GATED = tuple(
    rule
    for leaf in ("weight", "bias")
    for rule in (
        Rule(
            (f"blocks.{{i}}.mlp.w1.{leaf}", f"blocks.{{i}}.mlp.w2.{leaf}"),
            f"{_LAYER}intermediate.dense.{leaf}",
            GATE_AND_UP,
        ),
        Rule(f"blocks.{{i}}.mlp.w3.{leaf}", f"{_LAYER}output.dense.{leaf}"),
    )
)
_UNGATED = blocks({"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"})
_SCALES = keep({f"blocks.{{i}}.ls{n}.gamma": f"{_LAYER}lambda_{n}" for n in (1, 2)})
_IGNORED = (
    (r"rope_embed\.periods", "the periods of the rotary positions, which `rope_theta` says"),
    (r"local_cls_norm\..*", "a norm of the class token of small crops, used in pretraining alone"),
)


def theta_of(periods: np.ndarray) -> float:
    """The `rope_theta` of a file's periods, theta^(k / n), which some files hold in bfloat16.

    Raises:
        CheckpointError: they are not of that form.
    """
    periods = np.asarray(periods, np.float64)
    exponents = np.arange(len(periods)) / len(periods)
    found = periods[-1] ** (1.0 / exponents[-1]) if len(periods) > 1 else 100.0
    for theta, error in ((100.0, 2.0**-8), (found, 1e-5)):
        if np.allclose(periods, theta**exponents, rtol=error, atol=0.0):
            return float(theta)
    raise CheckpointError(
        f"the periods of the rotary positions in {PERIODS!r} must be powers of one base; given "
        f"{', '.join(f'{period:g}' for period in periods[:6])}, ...: this network is another."
    )


def _rotary(source: Mapping[str, Any]) -> dict[str, Any]:
    """What the periods of a file say: the base, and the width of a head."""
    if PERIODS not in source:
        return {}
    width = source["patch_embed.proj.weight"].shape[0]
    tensor = source[PERIODS]  # four channels of a head share a period
    heads = width // (4 * tensor.shape[0])
    return {"num_attention_heads": heads, "rope_theta": theta_of(tensor.read())}


def _fits(gated: bool, masked: bool):
    def fits(config: ViTConfig, head: object) -> bool:
        key = config.has_key_bias
        return config.use_swiglu_ffn == gated and masked == (config.has_query_bias and not key)

    return fits


def _loses(config: ViTConfig, own_config: bool) -> Iterator[str]:
    yield (
        f"the authors' code asks for {PERIODS!r}, which follow from `rope_theta` and are not "
        "written: load the file with `strict=False`."
    )


FORMATS = tuple(
    Format(
        name="dinov3",
        families=("dinov3_vit",),
        rules=(
            keep(_TOP)
            + (Rule("mask_token", "embeddings.mask_token", TOKEN),)
            + blocks(_BLOCK)
            + qkv("weight")
            + bias
            + mlp
            + _SCALES
        ),
        describes="facebookresearch DINOv3",
        ignored=_IGNORED,
        requires=("storage_tokens",),
        settings={
            "layer_norm_eps": 1e-5,
            "hidden_act": "silu" if gated else "gelu",
        },
        image_size=224,
        says=_rotary,
        refuses=REFUSES,
        parts=(
            *PARTS,
            (r"cls_norm\..*", "a final norm of the class and register tokens of their own"),
        ),
        clues=(Clue(30, lambda found: found.has("storage_tokens")),),
        fits=_fits(gated, masked),
        loses=_loses,
    )
    for gated, mlp in ((False, _UNGATED), (True, _GATED))
    for masked, bias in ((True, _MASKED_BIAS), (False, _PLAIN_BIAS))
)
