"""microsoft BEiT and BEiT v2 (`unilm/beit`, `unilm/beit2`): pretrained and fine-tuned state dicts.

Source: `beit/modeling_finetune.py`, `modeling_pretrain.py` and `run_class_finetuning.py`.
"""

from __future__ import annotations

from typing import Any

from vit_common.config import ViTConfig
from vit_common.images.processors import BeitImageProcessor
from vit_convert.formats.format import Clue, Files, Format, Implied
from vit_convert.formats.timm import BEIT, BEIT_IGNORED, EPS, PARTS, REFUSES, dense

# Pretraining: what comes after the blocks belongs to the head there, and pools nothing.
_PRETRAINED = (
    tuple(rule for rule in BEIT if not str(rule.foreign).startswith(("norm.", "fc_norm", "head")))
    + dense("norm", "lm_layernorm")
    + dense("lm_head", "lm_head")
)


def _preprocessing(config: ViTConfig) -> Implied | None:
    if config.num_channels != 3:
        return None
    height, width = config.image_height_width
    processor = BeitImageProcessor(
        size={"height": height, "width": width},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return processor, "the Hub's files of microsoft's BEiT"


def _format(rules, describes: str, **more: Any) -> Format:
    return Format(
        name="beit",
        families=("beit",),
        rules=rules,
        describes=describes,
        files=Files(wrapper="model"),
        settings={"layer_norm_eps": EPS},
        relative_resize="geometric_cubic",
        ignored=BEIT_IGNORED,
        clues=(
            Clue(51, lambda found: found.has(r"decoder_.*|mask_token")),
            Clue(81, lambda found: found.root.startswith("model")),
        ),
        candidate=True,
        refuses=REFUSES,
        parts=PARTS,
        imagenet=True,
        preprocessing=_preprocessing,
        **more,
    )


FORMATS = (
    _format(BEIT, "microsoft BEiT, fine-tuned", fits=lambda config, head: head != "tokens"),
    _format(
        _PRETRAINED,
        "microsoft BEiT, pretrained",
        requires=("lm_head.weight",),
        fits=lambda config, head: head == "tokens",
    ),
)
