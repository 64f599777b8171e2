"""facebookresearch MAE: the encoder of a pretraining, and what was fine-tuned from it.

Source: `models_mae.py`, `models_vit.py` and `util/datasets.py` of facebookresearch/mae.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from vit_common.config import ViTConfig
from vit_common.files.containers.tensor import Tensor
from vit_convert.formats.format import Clue, Format, Implied, Published
from vit_convert.formats.timm import EPS, PARTS, REFUSES, RULES, cut_out

_DECODER = r"decoder_.*|mask_token"


def _preprocessing(config: ViTConfig) -> Implied | None:
    # Images above 224 are not cut.
    height, _ = config.image_height_width
    return cut_out(config, "mae", height if height > 224 else None)


def sines_and_cosines(grid: tuple[int, int], width: int) -> np.ndarray:
    """MAE's fixed positions: sines and cosines of each patch's column, then of its row.

    Args:
        grid: (rows, columns) of patches.
        width: D, a multiple of 4.

    Returns:
        (rows * columns, D), float32.

    Source: `get_2d_sincos_pos_embed` of `util/pos_embed.py`.
    """
    y, x = (axis.reshape(-1, 1) for axis in np.indices(grid))
    quarter = width // 4
    omega = 1.0 / 10_000.0 ** (np.arange(quarter) / quarter)
    parts = (np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega))
    return np.concatenate(parts, axis=1).astype(np.float32)


_PROBE_EPS = 1e-6
"""Epsilon of the batch norm of a linear probe."""
_STATISTICS = re.compile(r"(head\.)(\d+)\.running_mean")


def folded(
    tensors: Mapping[str, tuple[str, Tensor]],
) -> tuple[dict[str, tuple[str, Tensor]], tuple[str, str, str] | None]:
    """One linear layer for the batch norm and the linear layer of a linear probe.

    In evaluation the norm, which has no weights of its own, is a scale and a shift of each feature,
    so it goes into the layer after it: computed in float64, rounded once to the layer's dtype.

    Args:
        tensors: name -> (name in the file, tensor).

    Returns:
        The same with `head.weight` and `head.bias` in the place of both layers; and for the report
        what was done, to what, and why, or None.

    Source: `main_linprobe.py` of facebookresearch/mae: `BatchNorm1d(affine=False, eps=1e-6)`.
    """
    found = next((match for name in tensors if (match := _STATISTICS.fullmatch(name))), None)
    # Only under MAE's own names is that epsilon known.
    if found is None or "patch_embed.proj.weight" not in tensors:
        return dict(tensors), None
    stem, place = found[1], int(found[2])
    norm, layer = f"{stem}{place}.", f"{stem}{place + 1}."
    names = [f"{norm}running_mean", f"{norm}running_var", f"{layer}weight", f"{layer}bias"]
    own = {f"{norm}weight", f"{norm}bias"} & set(tensors)
    if own or any(name not in tensors for name in names):
        return dict(tensors), None
    mean, variance, weight, bias = (tensors[name][1] for name in names)
    width = weight.shape[-1]
    if len(weight.shape) != 2 or mean.shape != (width,) or variance.shape != (width,):
        return dict(tensors), None

    def scale() -> np.ndarray:
        return 1.0 / np.sqrt(variance.read().astype(np.float64) + _PROBE_EPS)

    def scaled() -> np.ndarray:
        return (weight.read().astype(np.float64) * scale()).astype(weight.dtype)

    def shifted() -> np.ndarray:
        moved = weight.read().astype(np.float64) @ (mean.read().astype(np.float64) * scale())
        return (bias.read().astype(np.float64) - moved).astype(bias.dtype)

    gone = {*names, f"{norm}num_batches_tracked"}
    out = {name: entry for name, entry in tensors.items() if name not in gone}
    for leaf, tensor, load in (("weight", weight, scaled), ("bias", bias, shifted)):
        name = f"{stem}{leaf}"
        made = Tensor(name, tensor.shape, tensor.dtype, load)
        out[name] = (tensors[f"{layer}{leaf}"][0], made)
    folded = f"{norm}* folded into {layer}*"
    return out, ("classifier", folded, "a batch norm without weights is a scale and a shift")


FORMATS = (
    Format(
        name="mae",
        rules=RULES,
        describes="facebookresearch MAE encoder",
        ignored=((_DECODER, "the decoder of masked autoencoding, not of the encoder"),),
        settings={"layer_norm_eps": EPS},
        clues=(
            Clue(45, lambda found: found.has(_STATISTICS.pattern)),
            Clue(50, lambda found: found.has(_DECODER)),
            Clue(70, lambda found: found.root.startswith("model") and found.has(r"fc_norm\..*")),
        ),
        refuses=REFUSES,
        parts=PARTS,
        published=(
            Published("MAE ViT-B", 768, 12, 3072, 12, sines_and_cosines),
            Published("MAE ViT-L", 1024, 24, 4096, 16, sines_and_cosines),
            Published("MAE ViT-H", 1280, 32, 5120, 16, sines_and_cosines),
            # Wang et al. 2023, arXiv:2205.14443.
            Published("MAE-Lite ViT-Tiny", 192, 12, 768, 12, sines_and_cosines),
        ),
        imagenet=True,
        preprocessing=_preprocessing,
        written=False,
    ),
)
