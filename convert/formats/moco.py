"""facebookresearch MoCo v3: the base encoder of a pretraining.

Source: `vits.py`, `moco/builder.py` and `main_lincls.py` of facebookresearch/moco-v3. The positions
are fixed sines and cosines, and the ViT-S has 12 heads, where other networks of its sizes have 6.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from vit_convert.formats.format import Clue, Format, Published
from vit_convert.formats.timm import EPS, PARTS, REFUSES, RULES, cut_out


def sines_and_cosines(grid: tuple[int, int], width: int) -> np.ndarray:
    """MoCo v3's fixed positions: sines and cosines of each patch's row, then of its column.

    Args:
        grid: (rows, columns) of patches.
        width: D, a multiple of 4.

    Returns:
        (rows * columns, D), float32.

    Source: `build_2d_sincos_position_embedding` of `vits.py`, whose "w" runs along the rows.
    """
    y, x = (axis.reshape(-1, 1) for axis in np.indices(grid))
    quarter = width // 4
    omega = 1.0 / 10_000.0 ** (np.arange(quarter) / quarter)
    parts = (np.sin(y * omega), np.cos(y * omega), np.sin(x * omega), np.cos(x * omega))
    return np.concatenate(parts, axis=1).astype(np.float32)


FORMATS = (
    Format(
        name="mocov3",
        rules=RULES,
        describes="facebookresearch MoCo v3 base encoder",
        ignored=((r"head\.\d+\..*", "the projection head of MoCo v3's training"),),
        settings={"layer_norm_eps": EPS},
        clues=(Clue(15, lambda found: "base_encoder" in found.root),),
        refuses=REFUSES,
        parts=PARTS,
        published=(
            Published("MoCo v3 ViT-S", 384, 12, 1536, 12, sines_and_cosines),
            Published("MoCo v3 ViT-B", 768, 12, 3072, 12, sines_and_cosines),
        ),
        imagenet=True,
        preprocessing=partial(cut_out, name="mocov3"),
        written=False,
    ),
)
