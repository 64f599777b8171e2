"""facebookresearch MAE: the encoder of a pretraining, and what was fine-tuned from it.

Source: `models_mae.py`, `models_vit.py` and `util/datasets.py` of facebookresearch/mae.
"""

from __future__ import annotations

from vit_common.config import ViTConfig
from vit_convert.formats.format import Clue, Format, Implied
from vit_convert.formats.timm import EPS, PARTS, REFUSES, RULES, cut_out

_DECODER = r"decoder_.*|mask_token"


def _preprocessing(config: ViTConfig) -> Implied | None:
    # Images above 224 are not cut.
    height, _ = config.image_height_width
    return cut_out(config, "mae", height if height > 224 else None)


FORMATS = (
    Format(
        name="mae",
        rules=RULES,
        describes="facebookresearch MAE encoder",
        ignored=((_DECODER, "the decoder of masked autoencoding, not of the encoder"),),
        settings={"layer_norm_eps": EPS},
        clues=(
            Clue(50, lambda found: found.has(_DECODER)),
            Clue(70, lambda found: found.root.startswith("model") and found.has(r"fc_norm\..*")),
        ),
        refuses=REFUSES,
        parts=PARTS,
        imagenet=True,
        preprocessing=_preprocessing,
        written=False,
    ),
)
