"""facebookresearch DeiT, distilled or not, and DeiT-III.

Sources: `models.py`, `models_v2.py`, `datasets.py` and `main.py` of facebookresearch/deit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from vit_common.config import ViTConfig
from vit_convert.formats.format import Clue, Files, Format
from vit_convert.formats.timm import (
    DISTILLED,
    EPS,
    LAYER,
    PARTS,
    REFUSES,
    RULES,
    SCALES,
    cut_out,
    keep,
)


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


# DeiT-III (Touvron et al. 2022, arXiv:2204.07118): layer scale under another name than timm's, and
# a class token that has no position.
_DEIT_III = tuple(rule for rule in RULES if rule not in SCALES) + keep(
    {f"blocks.{{i}}.gamma_{n}": f"{LAYER}lambda_{n}" for n in (1, 2)}
)


def _is_deit_iii(config: ViTConfig, head: object) -> bool:
    return config.has_layer_scale and config.position_tokens == "patches"


FORMATS = (
    _format(
        ("vit",),
        RULES,
        "facebookresearch DeiT",
        fits=lambda config, head: not _is_deit_iii(config, head),
    ),
    _format(
        ("vit",),
        _DEIT_III,
        "facebookresearch DeiT-III",
        requires=("blocks.0.gamma_1",),
        fits=_is_deit_iii,
    ),
    _format(("deit",), DISTILLED, "facebookresearch distilled DeiT", requires=("dist_token",)),
)
