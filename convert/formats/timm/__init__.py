"""timm's state dicts, and the rows that projects with timm's names share: DeiT, DINO, MAE, ...

Source: `timm/models/vision_transformer.py`, `deit.py` and `beit.py` of timm 1.0.31. What the
projects differ in are settings that no weight shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vit_common.config import ViTConfig
from vit_common.images.options import HALF_TO_EVEN  # torchvision crops so
from vit_common.images.processors import BitImageProcessor
from vit_convert.formats import stems
from vit_convert.formats.format import Clue, Files, Format, Implied, Rule
from vit_convert.formats.timm.config import timm_config
from vit_convert.layouts import FUSED_QKV

EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
}
NORMS = {
    f"{theirs}.{leaf}": f"{ours}.{leaf}"
    for theirs, ours in (("norm", "layernorm"), ("fc_norm", "pooler.layernorm"))
    for leaf in ("weight", "bias")
}
BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
LAYER = "encoder.layer.{i}."


def keep(table: dict[str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(theirs, ours) for theirs, ours in table.items())


def dense(theirs: str, ours: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{theirs}.{leaf}", f"{ours}.{leaf}") for leaf in ("weight", "bias"))


def blocks(table: dict[str, str]) -> tuple[Rule, ...]:
    return tuple(
        rule
        for theirs, ours in table.items()
        for rule in dense(f"blocks.{{i}}.{theirs}", LAYER + ours)
    )


def qkv(*leaves: str) -> tuple[Rule, ...]:
    return tuple(
        Rule(
            f"blocks.{{i}}.attn.qkv.{leaf}",
            tuple(
                f"{LAYER}attention.attention.{name}.{leaf}" for name in ("query", "key", "value")
            ),
            FUSED_QKV,
        )
        for leaf in leaves
    )


SCALES = keep({f"blocks.{{i}}.ls{n}.gamma": f"{LAYER}lambda_{n}" for n in (1, 2)})
PLAIN = (
    keep({**EMBEDDINGS, **NORMS, "reg_token": "embeddings.register_tokens"})
    + dense("pre_logits.fc", "pooler.dense")
    + blocks(BLOCK)
    + qkv("weight", "bias")
    + SCALES
    + stems.TIMM
)
RULES = PLAIN + dense("head", "classifier")
DISTILLED = (
    PLAIN
    + dense("head", "cls_classifier")
    + dense("head_dist", "distillation_classifier")
    + keep({"dist_token": "embeddings.distillation_token"})
)
_TABLE = "relative_position_bias_table"
BEIT = (
    keep({**EMBEDDINGS, **NORMS, "mask_token": "embeddings.mask_token"})
    + dense("head", "classifier")
    + blocks(BLOCK)
    + qkv("weight")
    + keep(
        {
            "blocks.{i}.attn.q_bias": f"{LAYER}attention.attention.query.bias",
            "blocks.{i}.attn.v_bias": f"{LAYER}attention.attention.value.bias",
            f"blocks.{{i}}.attn.{_TABLE}": (
                f"{LAYER}attention.attention.relative_position_bias.{_TABLE}"
            ),
            f"rel_pos_bias.{_TABLE}": f"encoder.relative_position_bias.{_TABLE}",
            "blocks.{i}.gamma_1": f"{LAYER}lambda_1",
            "blocks.{i}.gamma_2": f"{LAYER}lambda_2",
        }
    )
)
BEIT_IGNORED = (
    (r".*relative_position_index", "an index computed from the grid, no weight"),
    (r"blocks\.\d+\.attn\.k_bias", "BEiT's key has no bias; timm keeps zeros in its place"),
)

IMAGENET: dict[str, Any] = {
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""Means and deviations of ImageNet's channels, which most projects subtract and divide by."""

REFUSES = (
    (
        r"patch_embed\.backbone\.(conv1|bn1|layer\d|\d)\..*",
        "a convolutional stem before its patches (a hybrid with batch norms)",
    ),
    (
        r"patch_embed\.(conv\d*|stem)\..*",
        "a convolutional stem before its patches (a hybrid)",
    ),
    (r"patch_embed\.proj\.\d+\..*", "a convolutional stem before its patches"),
)
PARTS = (
    (r"attn_pool\..*", "attention pooling"),
    (r"norm_pre\..*", "a norm before the blocks"),
    (r"blocks\.\d+\.attn\.(q_norm|k_norm)\..*", "norms of query and key"),
    (r"blocks\.\d+\.(attn|mlp)\.norm\..*", "a norm inside attention or MLP"),
)
"""Parts of timm's networks that no model here has."""

EPS = 1e-6
"""Epsilon of the norms in timm and in every project with its names."""
HEAD_OF_TIMM = 90
"""Rank of timm's weakest clue, a classifier: other projects have better ones."""


def cut_out(config: ViTConfig, name: str, enlarged: int | None = None) -> Implied | None:
    """The evaluation most projects published: the shorter side enlarged, to 256 for images of 224,
    then a centre crop."""
    height, width = config.image_height_width
    if height != width or config.num_channels != 3:
        return None
    processor = BitImageProcessor(
        size={"shortest_edge": enlarged or int(height * 256 / 224)},
        crop_size={"height": height, "width": width},
        crop_rounding=HALF_TO_EVEN,
        **IMAGENET,
    )
    return processor, f"the published evaluation of {name}"


def _cannot_hold(config: ViTConfig) -> str | None:
    if config.use_representation_layer:
        return "timm drops the layer before the classifier (pre-logits) when it loads"
    return stems.timm_cannot_hold(config)


def _loses(config: ViTConfig, own_config: bool) -> Iterator[str]:
    yield from stems.timm_loses(config)
    if config.use_swiglu_ffn and not own_config:
        yield (
            "timm's config.json cannot say that the MLP is a SwiGLU: give timm a model that has "
            "one, such as vit_giant_patch14_dinov2, the sizes."
        )


def _format(families: tuple[str, ...], rules, describes: str, **more: Any) -> Format:
    return Format(
        name="timm",
        families=families,
        rules=rules,
        describes=describes,
        files=Files(container="safetensors", tag="pt", config=timm_config),
        settings={"layer_norm_eps": EPS, "position_resize": "bicubic_antialias"},
        clues=(
            Clue(10, lambda found: bool(found.architecture)),
            # The projects themselves publish pickles.
            Clue(60, lambda found: found.suffix == ".safetensors"),
            Clue(HEAD_OF_TIMM, lambda found: found.has(r"head\..*")),
        ),
        candidate=True,
        refuses=REFUSES,
        parts=PARTS,
        cannot_hold=_cannot_hold,
        loses=_loses,
        **more,
    )


FORMATS = (
    _format(("vit",), RULES, "timm state dict of a Vision Transformer", fits=stems.has_stages),
    _format(
        ("vit",),
        stems.TIMM_ROOT + RULES,
        "timm state dict of a Vision Transformer whose stem is one convolution",
        requires=("patch_embed.backbone.conv.weight",),
        fits=stems.has_root_alone,
    ),
    _format(("deit",), DISTILLED, "timm state dict of a distilled DeiT", requires=("dist_token",)),
    _format(
        ("beit",),
        BEIT,
        "timm state dict of a BEiT",
        ignored=BEIT_IGNORED,
        relative_resize="geometric",
    ),
)
