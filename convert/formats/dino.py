"""facebookresearch DINO, and bytedance iBOT, which has its network.

Sources: `vision_transformer.py` and `eval_linear.py` of facebookresearch/dino;
`models/vision_transformer.py` and `models/head.py` of bytedance/ibot.
"""

from __future__ import annotations

from functools import partial

from vit_convert.formats.format import Clue, Format
from vit_convert.formats.timm import EPS, PARTS, REFUSES, RULES, cut_out

_PROJECTION = r"head\.(mlp|last_layer|last_norm|mlp2|last_layer2|last_norm2)\..*"
_MASKED = "masked_embed"

FORMATS = (
    Format(
        name="dino",
        rules=RULES,
        describes="facebookresearch DINO",
        ignored=(
            (_PROJECTION, "the projection head of DINO's training"),
            (_MASKED, "the mask token of iBOT's training, which no image uses"),
        ),
        settings={"layer_norm_eps": EPS, "position_resize": "bicubic_offset"},
        clues=(
            Clue(20, lambda found: found.root.startswith(("teacher", "student"))),
            # With its last layer: a classifier of one's own may be called "head.mlp".
            Clue(30, lambda found: found.has(rf"head\.last_layer\d?\..*|{_MASKED}")),
        ),
        candidate=True,
        refuses=REFUSES,
        parts=PARTS,
        imagenet=True,
        preprocessing=partial(cut_out, name="dino"),
    ),
)
