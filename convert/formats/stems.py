"""What projects call the ResNet before the patches of a hybrid.

Sources: `timm/models/resnetv2.py` and `vision_transformer_hybrid.py` of timm 1.0.31;
`vit_jax/models_resnet.py` and `models_vit.py` of google-research/vision_transformer;
`models/bit/modeling_bit.py` and `models/deprecated/vit_hybrid` of Transformers 4.57.6.
"""

from __future__ import annotations

import numpy as np

from vit_common.config import ViTConfig
from vit_convert.formats.format import Rule
from vit_convert.layouts import HWIO, KEEP, Arrays, Layout

STAGES = 4
UNITS = 24
"""Of Google's names, which count the blocks of a stage without a dot before the number; its largest
ResNet, of 101 layers, has 23 in one stage."""

_STEM = "embeddings.stem."
_PARTS = ("1", "2", "3", "_shortcut")


def _rules(module: str, ours: str) -> tuple[Rule, ...]:
    leaves = ("weight", "bias") if "norm" in ours.rpartition(".")[2] else ("weight",)
    return tuple(Rule(f"{module}.{leaf}", f"{ours}.{leaf}") for leaf in leaves)


def _torch_rules(root: tuple[str, ...], block: str, downsample: str) -> tuple[Rule, ...]:
    rules = [*_rules(root[0], f"{_STEM}convolution"), *_rules(root[1], f"{_STEM}norm")]
    for stage in range(STAGES):
        for part in _PARTS:
            for kind in ("conv", "norm"):
                name = downsample.format(kind) if part == "_shortcut" else f"{kind}{part}"
                theirs = f"{block.format(stage=stage)}.{name}"
                rules += _rules(theirs, f"{_STEM}stage{stage}.{{i}}.{kind}{part}")
    return tuple(rules)


_TIMM = "patch_embed.backbone."
TIMM = _torch_rules(
    (f"{_TIMM}stem.conv", f"{_TIMM}stem.norm"),
    _TIMM + "stages.{stage}.blocks.{{i}}",
    "downsample.{}",
)
"""timm's names, where the ResNet has stages."""
TIMM_ROOT = _rules(f"{_TIMM}conv", f"{_STEM}convolution") + _rules(f"{_TIMM}norm", f"{_STEM}norm")
"""timm's names, where it is a root alone."""


def _biased(module: str, ours: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{module}.{leaf}", f"{ours}.{leaf}") for leaf in ("weight", "bias"))


_BLOCK_OF_VITAMIN = {
    "pre_norm": "norm",
    "conv1_1x1": "conv1",
    "conv2_kxk": "conv2",
    "conv3_1x1": "conv3",
    "shortcut.expand": "conv_shortcut",
}
VITAMIN = (
    *_biased(f"{_TIMM}stem.conv1", f"{_STEM}convolution"),
    *_biased(f"{_TIMM}stem.norm1", f"{_STEM}norm"),
    *_biased(f"{_TIMM}stem.conv2", f"{_STEM}convolution2"),
    *_biased(f"{_TIMM}pool.norm", f"{_STEM}norm_out"),
    *_biased(f"{_TIMM}pool.proj", "embeddings.patch_embeddings.projection"),
    *(
        rule
        for stage in range(STAGES)
        for theirs, ours in _BLOCK_OF_VITAMIN.items()
        for rule in _biased(
            f"{_TIMM}stages.{stage}.{{i}}.{theirs}", f"{_STEM}stage{stage}.{{i}}.{ours}"
        )
    ),
)
"""timm's names of the MBConv blocks before a ViTamin's own."""

TRANSFORMERS = _torch_rules(
    (
        "embeddings.patch_embeddings.backbone.bit.embedder.convolution",
        "embeddings.patch_embeddings.backbone.bit.embedder.norm",
    ),
    "embeddings.patch_embeddings.backbone.bit.encoder.stages.{stage}.layers.{{i}}",
    "downsample.{}",
)
"""The names of Transformers' ViTHybrid."""


def has_stages(config: ViTConfig, head: object = None) -> bool:
    """Whether it is no network whose stem is a root alone."""
    return config.stem_type is None or bool(config.stem_depths)


def has_root_alone(config: ViTConfig, head: object = None) -> bool:
    """Whether it is one."""
    return not has_stages(config)


_CHANNELS = Layout(
    "channels",
    lambda arrays: [array.reshape(np.prod(array.shape, dtype=int)) for array in arrays],
    lambda arrays: [array.reshape(1, 1, 1, -1) for array in arrays],
    None,
    1,
)
"""A vector of channels as (1, 1, 1, C), or as (C,), <-> (C,): Flax before linen had group norms of
four axes, as the published files do."""


def google_rules(norms: Layout = _CHANNELS) -> tuple[Rule, ...]:
    """Google's names.

    Args:
        norms: layout of a norm's vectors.
    """

    def unit(conv: str, norm: str, ours: tuple[str, ...]) -> list[Rule]:
        rules = [Rule(f"{conv}/kernel", f"{_STEM}{ours[0]}.weight", HWIO)]
        for theirs, leaf in (("scale", "weight"), ("bias", "bias")):
            rules.append(Rule(f"{norm}/{theirs}", f"{_STEM}{ours[1]}.{leaf}", norms))
        return rules

    rules = unit("conv_root", "gn_root", ("convolution", "norm"))
    for stage in range(STAGES):
        for i in range(UNITS):
            place = f"block{stage + 1}/unit{i + 1}/"
            for part in _PARTS:
                name = "_proj" if part == "_shortcut" else part
                ours = f"stage{stage}.{i}.conv{part}", f"stage{stage}.{i}.norm{part}"
                rules += unit(f"{place}conv{name}", f"{place}gn{name}", ours)
    return tuple(rules)


GOOGLE = google_rules()
GOOGLE_LINEN = google_rules(KEEP)

TIMM_NAMES: dict[tuple[int, ...], str] = {
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
    (2, 2, 2, 2): "vit_base_r26_s32_224",
    (): "vit_tiny_r_s16_p8_224",
}
"""Depths of a stem -> a network of timm that has it, for its `config.json`."""


VITAMINS: dict[tuple[int, int], str] = {
    (64, 384): "vitamin_small_224",
    (128, 768): "vitamin_base_224",
    (160, 1024): "vitamin_large_224",
    (192, 1152): "vitamin_xlarge_256",
}
"""Width of a stem and of the blocks -> a ViTamin of timm that has them."""


def _folded(arrays: Arrays) -> Arrays:
    kernel, *norm = arrays
    scale, bias, mean, variance = (array.astype(np.float64) for array in norm)
    with np.errstate(invalid="ignore"):  # a variance below zero gives what is no number
        factor = scale / np.sqrt(variance + _BATCH_EPS)
    wide = kernel * factor.reshape(-1, *(1 for _ in kernel.shape[1:]))
    return [wide.astype(kernel.dtype), (bias - mean * factor).astype(kernel.dtype)]


def _kept(arrays: Arrays) -> Arrays:
    raise ValueError("batch norms that were folded into convolutions are not taken out again")


_BATCH_EPS = 1e-5
FOLDED = Layout("a convolution and its batch norm", _folded, _kept)
"""A kernel (out, in, k, k), and the scale, bias, mean and variance (out,) of the norm after it ->
a kernel and a bias that compute the same."""


def _fold(conv: str, norm: str, ours: str) -> Rule:
    statistics = ("weight", "bias", "running_mean", "running_var")
    return Rule(
        (f"{_TIMM}{conv}.weight", *(f"{_TIMM}{norm}.{name}" for name in statistics)),
        (f"{_STEM}{ours}.weight", f"{_STEM}{ours}.bias"),
        FOLDED,
    )


_OF_A_BLOCK = {"1": ("conv1", "bn1"), "2": ("conv2", "bn2"), "3": ("conv3", "bn3")}
_OF_A_BLOCK["_shortcut"] = ("downsample.1", "downsample.2")
RESNETD = (
    _fold("conv1.0", "conv1.1", "convolution"),
    _fold("conv1.3", "conv1.4", "convolution2"),
    _fold("conv1.6", "bn1", "convolution3"),
    *(
        _fold(
            f"layer{stage + 1}.{{i}}.{conv}",
            f"layer{stage + 1}.{{i}}.{norm}",
            f"stage{stage}.{{i}}.conv{part}",
        )
        for stage in range(STAGES)
        for part, (conv, norm) in _OF_A_BLOCK.items()
    ),
)
"""timm's names of a ResNet-D before the patches, as its lists of features have them."""
RESNETD_SIGN = f"{_TIMM}layer1.0.conv1.weight"

MOBILECLIP = (
    *(
        _fold(f"{i}.conv", f"{i}.bn", ours)
        for i, ours in enumerate(("convolution", "convolution2"))
    ),
    *_biased(f"{_TIMM}2.conv", "embeddings.patch_embeddings.projection"),
)
"""timm's names of the two convolutions of a MobileCLIP, and of the third, the patch projection."""
COUNTERS = ((r".*\.num_batches_tracked", "a counter of the training of a batch norm"),)


def timm_first_convolution(config: ViTConfig) -> str:
    """What timm calls the first convolution of a network."""
    if config.stem_type == "mbconv":
        return "patch_embed.backbone.stem.conv1"
    if config.stem_type is None:
        return "patch_embed.proj"
    return f"patch_embed.backbone.{'stem.' if config.stem_depths else ''}conv"


def timm_cannot_hold(config: ViTConfig) -> str | None:
    """What keeps timm from building a hybrid, or None."""
    if config.stem_type is None:
        return None
    if config.stem_type in ("convolutions", "resnetd"):
        return "timm's convolutions before the patches have batch norms, which are folded here"
    if config.stem_type == "mbconv":
        if (config.stem_width, config.hidden_size) in VITAMINS and config.stem_depths == (2, 4):
            return None
        return "timm builds ViTamins of the published widths only"
    if config.stem_depths not in TIMM_NAMES or config.stem_width != 64:
        return (
            "timm builds hybrids only with ResNets of "
            f"{', '.join(map(str, TIMM_NAMES))} blocks and 64 channels after the first "
            f"convolution; this one has {config.stem_depths} and {config.stem_width}"
        )
    return None


def timm_loses(config: ViTConfig) -> list[str]:
    """What timm computes otherwise."""
    if config.stem_type != "resnetv2":
        return []
    if config.stem_standardization == "variance" and config.stem_norm_eps == 1e-5:
        return []
    return [
        "timm adds 1e-8 to the variance of the stem's kernels and 1e-5 to that of its norms, where "
        "these weights were trained with other constants (Google: 1e-5 to the deviation, 1e-6): "
        "its outputs differ slightly. vit_flax and vit_torch use those of the training."
    ]
