"""timm's state dicts, and the rows that projects with timm's names share: DeiT, DINO, MAE, ...

Source: `timm/models/vision_transformer.py`, `deit.py` and `beit.py` of timm 1.0.31. What the
projects differ in are settings that no weight shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from vit_common.config import ViTConfig
from vit_common.images.options import HALF_TO_EVEN  # torchvision crops so
from vit_common.images.processors import BitImageProcessor
from vit_common.parameters import DIFFERENTIAL as DIFFERENTIAL_NAMES
from vit_convert.formats import stems
from vit_convert.formats.format import Clue, Files, Format, Implied, Rule
from vit_convert.formats.timm import eva, naflex, nearest, parallel
from vit_convert.formats.timm.arguments import EPS
from vit_convert.formats.timm.config import timm_config
from vit_convert.formats.timm.pool import ATTENTION_POOL
from vit_convert.layouts import FUSED_QKV, GATE_AND_UP, KEEP, TRANSPOSE

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
INNER_NORMS = {
    "attn.q_norm": "attention.attention.query_norm",
    "attn.k_norm": "attention.attention.key_norm",
    "attn.norm": "attention.output.layernorm",
    "mlp.norm": "output.layernorm",
}
RELATIVE = tuple(
    Rule(f"{theirs}.mlp.{layer}.{leaf}", f"{ours}.relative_position_bias.{name}", layout)
    for theirs, ours in (
        ("blocks.{i}.attn.rel_pos", f"{LAYER}attention.attention"),
        ("shared_rel_pos", "encoder"),
    )
    for layer, leaf, name, layout in (
        ("fc1", "weight", "in_kernel", TRANSPOSE),
        ("fc1", "bias", "in_bias", KEEP),
        ("fc2", "weight", "out_kernel", TRANSPOSE),
        ("fc2", "bias", "out_bias", KEEP),
    )
)
_OF_ATTENTION = f"{LAYER}attention.attention.differential."
DIFFERENTIAL = keep(
    {f"blocks.{{i}}.attn.{name}": _OF_ATTENTION + name for name in DIFFERENTIAL_NAMES}
    | {"blocks.{i}.attn.sub_norm.weight": f"{_OF_ATTENTION}norm.weight"}
)
PLAIN = (
    keep({**EMBEDDINGS, **NORMS, "reg_token": "embeddings.register_tokens"})
    + dense("pre_logits.fc", "pooler.dense")
    + blocks(BLOCK)
    + qkv("weight", "bias")
    + SCALES
    + stems.TIMM
    + RELATIVE
    + DIFFERENTIAL
)
RULES = PLAIN + dense("head", "classifier")
"""What other projects have of timm's names too."""
MORE = dense("norm_pre", "pre_layernorm") + ATTENTION_POOL
OWN = RULES + MORE + blocks(INNER_NORMS)
_OUTSIDE = (
    keep({**EMBEDDINGS, **NORMS, "reg_token": "embeddings.register_tokens"})
    + dense("head", "classifier")
    + MORE
)
"""What lies outside the blocks."""
_NAFLEX = naflex.RULES + tuple(
    rule for rule in OWN if rule.canonical not in [other.canonical for other in naflex.RULES]
)
_VITAMIN = (
    stems.VITAMIN
    + tuple(rule for rule in _OUTSIDE if "projection" not in rule.canonical_names[0])
    + blocks({theirs: ours for theirs, ours in BLOCK.items() if not theirs.startswith("mlp")})
    + blocks({"mlp.norm": "intermediate.layernorm", "mlp.w2": "output.dense"})
    + blocks({n: INNER_NORMS[n] for n in ("attn.q_norm", "attn.k_norm", "attn.norm")})
    + qkv("weight", "bias")
    + SCALES
    + tuple(
        Rule(
            (f"blocks.{{i}}.mlp.w0.{leaf}", f"blocks.{{i}}.mlp.w1.{leaf}"),
            f"{LAYER}intermediate.dense.{leaf}",
            GATE_AND_UP,
        )
        for leaf in ("weight", "bias")
    )
)
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
        r"blocks\.\d+\.attn\.rel_pos_[hw]",
        "windows and decomposed relative positions (SAM's encoder)",
    ),
    (
        r"patch_embed\.(conv\d*|stem)\..*",
        "a convolutional stem before its patches (a hybrid)",
    ),
    (r"patch_embed\.proj\.\d+\..*", "a convolutional stem before its patches"),
)
STEM_PARTS = ((r"patch_embed\.backbone\..*", "a convolutional stem before its patches"),)
PARTS = (
    *STEM_PARTS,
    (r"attn_pool\..*", "attention pooling"),
    (r"norm_pre\..*", "a norm before the blocks"),
    (r"blocks\.\d+\.attn\.(q_norm|k_norm)\..*", "norms of query and key"),
    (r"blocks\.\d+\.(attn|mlp)\.norm\..*", "a norm inside attention or MLP"),
)
"""Parts of timm's networks that no model here has."""

_SETTINGS = {"layer_norm_eps": EPS, "position_resize": "bicubic_antialias"}
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


def _loses(config: ViTConfig, own_config: bool) -> Iterator[str]:
    yield from stems.timm_loses(config)


def _is_vitamin(config: ViTConfig, head: object = None) -> bool:
    return config.stem_type == "mbconv"


def _is_plain(config: ViTConfig, head: object = None) -> bool:
    """Whether blocks have timm's usual names."""
    if _is_vitamin(config):
        return False
    parallel_ = config.block_type == "parallel" or config.num_parallel_branches > 1
    return stems.has_stages(config) and not parallel_ and not eva.fits(config)


def _for_writing(table: Format, config: ViTConfig) -> Format:
    """The norm of attention pooling has the canonical name of `fc_norm`; what is first is
    written."""
    return table if config.pooling != "map" else replace(table, rules=ATTENTION_POOL + table.rules)


def _format(families: tuple[str, ...], rules, describes: str, **more: Any) -> Format:
    return Format(
        name="timm",
        families=families,
        rules=rules,
        describes=describes,
        files=Files(container="safetensors", tag="pt", config=timm_config),
        clues=(
            Clue(10, lambda found: bool(found.architecture)),
            # The projects themselves publish pickles.
            Clue(60, lambda found: found.suffix == ".safetensors"),
            Clue(HEAD_OF_TIMM, lambda found: found.has(r"head\..*")),
        ),
        candidate=True,
        refuses=REFUSES,
        cannot_hold=nearest.why_not,
        structured=True,
        loses=_loses,
        **{
            "parts": PARTS,
            "settings": _SETTINGS,
            "for_writing": _for_writing,
            **more,
        },
    )


def _unsaid(shapes: Mapping[str, Any]) -> tuple[str, ...]:
    """Perception Encoders, which rotate, have the names of others with both of these parts."""
    both = "pre_layernorm.weight" in shapes and "pooler.probe" in shapes
    return ("rope_type",) if both else ()


FORMATS = (
    _format(
        ("vit",),
        # The norm of the pooling has the canonical name of `fc_norm`; the first rule names it.
        ATTENTION_POOL + OWN,
        "timm state dict of a Vision Transformer with attention pooling",
        requires=("attn_pool.latent", "patch_embed.proj.weight"),
        fits=lambda config, head: config.pooling == "map" and _is_plain(config),
        parts=STEM_PARTS,
        unsaid=_unsaid,
        named=lambda architecture: not eva.named(architecture),
    ),
    _format(
        ("vit",),
        OWN,
        "timm state dict of a Vision Transformer",
        fits=_is_plain,
        parts=STEM_PARTS,
        unsaid=_unsaid,
        named=lambda architecture: not eva.named(architecture),
    ),
    _format(
        ("vit",),
        stems.TIMM_ROOT + OWN,
        "timm state dict of a Vision Transformer whose stem is one convolution",
        requires=("patch_embed.backbone.conv.weight",),
        fits=stems.has_root_alone,
        parts=STEM_PARTS,
    ),
    _format(
        ("vit",),
        stems.MOBILECLIP
        + tuple(rule for rule in OWN if "projection" not in rule.canonical_names[0]),
        "timm state dict of a MobileCLIP",
        requires=("patch_embed.backbone.2.conv.weight",),
        ignored=stems.COUNTERS,
        parts=STEM_PARTS,
        written=False,
    ),
    _format(
        ("vit",),
        stems.RESNETD + OWN,
        "timm state dict of a hybrid with a ResNet-D",
        requires=(stems.RESNETD_SIGN,),
        ignored=stems.COUNTERS,
        parts=STEM_PARTS,
        written=False,
    ),
    _format(
        ("vit",),
        _VITAMIN,
        "timm state dict of a ViTamin",
        requires=("patch_embed.backbone.pool.proj.weight",),
        fits=_is_vitamin,
        parts=STEM_PARTS,
        stem={"stem_norm_eps": 1e-6},
        settings={**_SETTINGS, "gate_act": "gelu"},
    ),
    *(
        _format(
            ("vit",),
            _OUTSIDE + rules,
            f"timm state dict of a Vision Transformer {describes}",
            requires=(sign,),
            lacks=lacks,
            fits=fits,
            parts=STEM_PARTS,
            settings={**_SETTINGS, **more},
        )
        for rules, describes, sign, lacks, fits, more in (
            (
                parallel.DIFFERENTIAL_SCALING,
                "whose differential attention and MLP are parallel",
                parallel.DIFFERENTIAL_SIGN,
                (),
                parallel.fits_differential_scaling,
                {"block_type": "parallel", "proj_bias": False},
            ),
            (
                parallel.SCALING_WITHOUT_BIAS,
                "whose attention and MLP are parallel, and query, key and value without a bias",
                parallel.WITHOUT_BIAS_SIGN,
                (),
                parallel.fits_scaling_without_bias,
                {"block_type": "parallel"},
            ),
            (
                parallel.SCALING,
                "whose attention and MLP are parallel",
                parallel.SCALING_SIGN,
                (parallel.WITHOUT_BIAS_SIGN,),
                parallel.fits_scaling,
                {"block_type": "parallel"},
            ),
            (
                parallel.THINGS,
                "of several attentions and MLPs in a block",
                parallel.THINGS_SIGN,
                (),
                parallel.fits_things,
                {},
            ),
        )
    ),
    _format(
        ("vit",),
        _NAFLEX,
        "timm state dict of a NaFlexVit",
        requires=(naflex.PROJECTION,),
        parts=STEM_PARTS,
        unsaid=_unsaid,
        says=naflex.says,
        written=False,
    ),
    _format(("deit",), DISTILLED, "timm state dict of a distilled DeiT", requires=("dist_token",)),
    _format(
        ("beit",),
        BEIT,
        "timm state dict of a BEiT",
        ignored=BEIT_IGNORED,
        relative_resize="geometric",
        named=lambda architecture: not eva.named(architecture),
    ),
    _format(
        ("vit",),
        eva.GROUPED,
        "timm state dict of a network whose heads share those of key and value",
        requires=eva.GROUPED_SIGNS,
        settings={"position_resize": "bicubic_antialias"},
        unsaid=lambda shapes: ("rope_type", "layer_norm_eps"),
        written=False,
    ),
    _format(
        ("vit",),
        eva.RULES,
        "timm state dict of an EVA, a DINOv3 or another with rotary positions",
        ignored=BEIT_IGNORED,
        named=eva.named,
        signs=eva.SIGNS,
        settings={"position_resize": "bicubic_antialias"},
        unsaid=lambda shapes: ("rope_type", "layer_norm_eps"),
        fits=eva.fits,
        for_writing=lambda table, config: _for_writing(
            replace(table, rules=eva.rules_for(config)), config
        ),
    ),
)
