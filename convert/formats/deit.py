"""facebookresearch DeiT, distilled or not.

Source: `models.py`, `datasets.py` and `main.py` of facebookresearch/deit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from vit_convert.formats.format import Clue, Files, Format
from vit_convert.formats.timm import DISTILLED, EPS, PARTS, REFUSES, RULES, cut_out


def _format(families: tuple[str, ...], rules, describes: str, **more: Any) -> Format:
    return Format(
        name="deit",
        families=families,
        rules=rules,
        describes=describes,
        files=Files(wrapper="model"),
        settings={"layer_norm_eps": EPS},
        clues=(Clue(80, lambda found: found.root.startswith("model")),),
        refuses=REFUSES,
        parts=PARTS,
        imagenet=True,
        preprocessing=partial(cut_out, name="deit"),
        **more,
    )


FORMATS = (
    _format(("vit",), RULES, "facebookresearch DeiT"),
    _format(("deit",), DISTILLED, "facebookresearch distilled DeiT", requires=("dist_token",)),
)
