"""torchvision's Vision Transformers: `vit_b_16`, `vit_b_32`, `vit_l_16`, `vit_l_32`, `vit_h_14`.

Source: `torchvision/models/vision_transformer.py` of torchvision 0.29: norms of epsilon 1e-6, exact
GELU, and positions resampled by `interpolate_embeddings` (bicubic with aligned corners).
"""

from __future__ import annotations

from PIL.Image import Resampling

from vit_common.config import ViTConfig
from vit_common.images.options import HALF_TO_EVEN  # torchvision crops so
from vit_common.images.processors import BitImageProcessor
from vit_convert.formats.format import Format, Implied, Rule
from vit_convert.formats.timm import EPS, IMAGENET, LAYER, dense, keep
from vit_convert.layouts import FUSED_QKV

_BLOCK = "encoder.layers.encoder_layer_{i}."
_EVALUATED_AT = 224
_ENLARGED = {(1024, 16): 242}
"""(width, patch) -> shorter side before the crop to 224, where it is not 256."""


def _rules() -> tuple[Rule, ...]:
    rules = keep(
        {
            "class_token": "embeddings.cls_token",
            "encoder.pos_embedding": "embeddings.position_embeddings",
        }
    )
    modules = {
        "conv_proj": "embeddings.patch_embeddings.projection",
        "encoder.ln": "layernorm",
        "heads.pre_logits": "pooler.dense",
        "heads.head": "classifier",
        f"{_BLOCK}ln_1": f"{LAYER}layernorm_before",
        f"{_BLOCK}self_attention.out_proj": f"{LAYER}attention.output.dense",
        f"{_BLOCK}ln_2": f"{LAYER}layernorm_after",
        f"{_BLOCK}mlp.0": f"{LAYER}intermediate.dense",
        f"{_BLOCK}mlp.3": f"{LAYER}output.dense",
        # Before torchvision 0.13 the MLP was no `nn.Sequential`; its newer code reads both.
        f"{_BLOCK}mlp.linear_1": f"{LAYER}intermediate.dense",
        f"{_BLOCK}mlp.linear_2": f"{LAYER}output.dense",
    }
    for theirs, ours in modules.items():
        rules += dense(theirs, ours)
    for leaf in ("weight", "bias"):
        names = tuple(f"{LAYER}attention.attention.{n}.{leaf}" for n in ("query", "key", "value"))
        rules += (Rule(f"{_BLOCK}self_attention.in_proj_{leaf}", names, FUSED_QKV),)
    return rules


def _preprocessing(config: ViTConfig) -> Implied | None:
    height, width = config.image_height_width
    if height != width:
        return None
    crop = {"height": height, "width": width}
    if height != _EVALUATED_AT:  # weights trained end to end from SWAG
        processor = BitImageProcessor(
            size={"shortest_edge": height},
            crop_size=crop,
            resample=Resampling.BICUBIC,
            crop_rounding=HALF_TO_EVEN,
            **IMAGENET,
        )
        return processor, "torchvision's IMAGENET1K_SWAG_E2E_V1"
    patch, _ = config.patch_height_width
    processor = BitImageProcessor(
        size={"shortest_edge": _ENLARGED.get((config.hidden_size, patch), 256)},
        crop_size=crop,
        resample=Resampling.BILINEAR,
        crop_rounding=HALF_TO_EVEN,
        **IMAGENET,
    )
    return processor, (
        "torchvision's IMAGENET1K_V1 (IMAGENET1K_SWAG_LINEAR_V1 resizes to 224, bicubic)"
    )


FORMATS = (
    Format(
        name="torchvision",
        rules=_rules(),
        describes="torchvision Vision Transformer",
        settings={"layer_norm_eps": EPS, "position_resize": "bicubic_align_corners"},
        refuses=(
            (r"conv_proj\.\d+\..*", "convolutions before its patches (a convolutional stem)"),
        ),
        imagenet=True,
        preprocessing=_preprocessing,
    ),
)
