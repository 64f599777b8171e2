"""facebookresearch DINOv2, with and without registers, with either MLP.

Source: `dinov2/models/vision_transformer.py` and `dinov2/data/transforms.py`.
"""

from __future__ import annotations

from vit_common.config import ViTConfig
from vit_common.images.options import HALF_TO_EVEN  # torchvision crops so
from vit_common.images.processors import BitImageProcessor
from vit_convert.formats.format import Clue, Format, Implied, Rule
from vit_convert.formats.huggingface import gated, plain
from vit_convert.formats.timm import (
    BLOCK,
    EMBEDDINGS,
    EPS,
    IMAGENET,
    NORMS,
    PARTS,
    REFUSES,
    SCALES,
    blocks,
    keep,
    qkv,
)
from vit_convert.layouts import TOKEN

_REGISTERS = {"register_tokens": "embeddings.register_tokens"}


def _rules(registers: dict[str, str], first: str, second: str) -> tuple[Rule, ...]:
    block = {name: ours for name, ours in BLOCK.items() if not name.startswith("mlp.")}
    return (
        keep({**EMBEDDINGS, **NORMS, **registers})
        + (Rule("mask_token", "embeddings.mask_token", TOKEN),)
        + blocks({**block, first: "intermediate.dense", second: "output.dense"})
        + qkv("weight", "bias")
        + SCALES
    )


def _preprocessing(config: ViTConfig) -> Implied | None:
    height, width = config.image_height_width
    if height != width or config.num_channels != 3:
        return None
    # Evaluated at 224, whatever size the positions are of.
    processor = BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        crop_rounding=HALF_TO_EVEN,
        **IMAGENET,
    )
    return processor, "the published evaluation of dinov2"


FORMATS = tuple(
    Format(
        name="dinov2",
        families=(family,),
        rules=_rules(registers, *names),
        describes=f"facebookresearch DINOv2{' with registers' * bool(registers)}",
        respelled=((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),),
        requires=tuple(registers),
        settings={"layer_norm_eps": EPS, "position_resize": resize},
        # A mask token of the shape it has here, unlike MAE's.
        refuses=REFUSES,
        parts=PARTS,
        clues=(Clue(40, lambda found: found.has("mask_token")),),
        preprocessing=_preprocessing,
        fits=fits,
    )
    for family, registers, resize in (
        ("dinov2", {}, "bicubic_offset"),
        ("dinov2_with_registers", _REGISTERS, "bicubic_antialias"),
    )
    for names, fits in ((("mlp.fc1", "mlp.fc2"), plain), (("mlp.w12", "mlp.w3"), gated))
)
