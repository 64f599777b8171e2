"""facebookresearch DINO.

Source: `vision_transformer.py` and `eval_linear.py` of facebookresearch/dino.
"""

from __future__ import annotations

from functools import partial

from vit_convert.formats.format import Clue, Format
from vit_convert.formats.timm import EPS, PARTS, REFUSES, RULES, cut_out

_PROJECTION = r"head\.(mlp|last_layer)\..*"

FORMATS = (
    Format(
        name="dino",
        rules=RULES,
        describes="facebookresearch DINO",
        ignored=((_PROJECTION, "the projection head of DINO's training"),),
        settings={"layer_norm_eps": EPS, "position_resize": "bicubic_offset"},
        clues=(
            Clue(20, lambda found: found.root.startswith(("teacher", "student"))),
            Clue(30, lambda found: found.has(_PROJECTION)),
        ),
        candidate=True,
        refuses=REFUSES,
        parts=PARTS,
        imagenet=True,
        preprocessing=partial(cut_out, name="dino"),
    ),
)
