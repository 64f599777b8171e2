"""timm's state dicts, and those of projects that share its names: DeiT, DINO, DINOv2, MAE, BEiT.

Sources: `timm/models/vision_transformer.py`, `deit.py` and `beit.py` of timm 1.0.31;
facebookresearch `deit`, `dino`, `dinov2` and `mae`; microsoft `unilm/beit`. The names are timm's;
what the projects differ in are settings that no weight shows.
"""

from __future__ import annotations

from typing import Any

from vit_convert.layouts import FUSED_QKV, TOKEN
from vit_convert.rules import Format, Rule

_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
}
_NORMS = {
    f"{theirs}.{leaf}": f"{ours}.{leaf}"
    for theirs, ours in (("norm", "layernorm"), ("fc_norm", "pooler.layernorm"))
    for leaf in ("weight", "bias")
}
_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_LAYER = "encoder.layer.{i}."


def _keep(table: dict[str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(theirs, ours) for theirs, ours in table.items())


def _dense(theirs: str, ours: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{theirs}.{leaf}", f"{ours}.{leaf}") for leaf in ("weight", "bias"))


def _blocks(table: dict[str, str]) -> tuple[Rule, ...]:
    return tuple(
        rule
        for theirs, ours in table.items()
        for rule in _dense(f"blocks.{{i}}.{theirs}", _LAYER + ours)
    )


def _qkv(*leaves: str) -> tuple[Rule, ...]:
    return tuple(
        Rule(
            f"blocks.{{i}}.attn.qkv.{leaf}",
            tuple(
                f"{_LAYER}attention.attention.{name}.{leaf}" for name in ("query", "key", "value")
            ),
            FUSED_QKV,
        )
        for leaf in leaves
    )


_SCALES = _keep({f"blocks.{{i}}.ls{n}.gamma": f"{_LAYER}lambda_{n}" for n in (1, 2)})
_PLAIN = (
    _keep({**_EMBEDDINGS, **_NORMS, "reg_token": "embeddings.register_tokens"})
    + _dense("pre_logits.fc", "pooler.dense")
    + _blocks(_BLOCK)
    + _qkv("weight", "bias")
    + _SCALES
)
_RULES = _PLAIN + _dense("head", "classifier")
_DISTILLED = (
    _PLAIN
    + _dense("head", "cls_classifier")
    + _dense("head_dist", "distillation_classifier")
    + _keep({"dist_token": "embeddings.distillation_token"})
)
_TABLE = "relative_position_bias_table"
_BEIT = (
    _keep({**_EMBEDDINGS, **_NORMS, "mask_token": "embeddings.mask_token"})
    + _dense("head", "classifier")
    + _blocks(_BLOCK)
    + _qkv("weight")
    + _keep(
        {
            "blocks.{i}.attn.q_bias": f"{_LAYER}attention.attention.query.bias",
            "blocks.{i}.attn.v_bias": f"{_LAYER}attention.attention.value.bias",
            f"blocks.{{i}}.attn.{_TABLE}": (
                f"{_LAYER}attention.attention.relative_position_bias.{_TABLE}"
            ),
            f"rel_pos_bias.{_TABLE}": f"encoder.relative_position_bias.{_TABLE}",
            "blocks.{i}.gamma_1": f"{_LAYER}lambda_1",
            "blocks.{i}.gamma_2": f"{_LAYER}lambda_2",
        }
    )
)
# Pretraining: what comes after the blocks belongs to the head there, and pools nothing.
_BEIT_PRETRAINED = (
    tuple(rule for rule in _BEIT if not str(rule.foreign).startswith(("norm.", "fc_norm", "head")))
    + _dense("norm", "lm_layernorm")
    + _dense("lm_head", "lm_head")
)
_BEIT_IGNORED = (
    (r".*relative_position_index", "an index computed from the grid, no weight"),
    (r"blocks\.\d+\.attn\.k_bias", "BEiT's key has no bias; timm keeps zeros in its place"),
)


_REGISTERS = {"register_tokens": "embeddings.register_tokens"}


def _dinov2(registers: dict[str, str], first: str, second: str) -> tuple[Rule, ...]:
    block = {name: ours for name, ours in _BLOCK.items() if not name.startswith("mlp.")}
    return (
        _keep({**_EMBEDDINGS, **_NORMS, **registers})
        + (Rule("mask_token", "embeddings.mask_token", TOKEN),)
        + _blocks({**block, first: "intermediate.dense", second: "output.dense"})
        + _qkv("weight", "bias")
        + _SCALES
    )


_EPS: dict[str, Any] = {"layer_norm_eps": 1e-6}


def _format(name: str, families: tuple[str, ...], rules, describes: str, **more: Any) -> Format:
    settings = {**_EPS, **more.pop("settings", {})}
    return Format(
        name=name, families=families, rules=rules, describes=describes, settings=settings, **more
    )


_DIST = ("dist_token",)
_ANTIALIAS = {"settings": {"position_resize": "bicubic_antialias"}}
_OFFSET = {"settings": {"position_resize": "bicubic_offset"}}

TIMM = _format("timm", ("vit",), _RULES, "timm state dict of a Vision Transformer", **_ANTIALIAS)

FORMATS = (
    TIMM,
    _format(
        "timm",
        ("deit",),
        _DISTILLED,
        "timm state dict of a distilled DeiT",
        requires=_DIST,
        **_ANTIALIAS,
    ),
    _format(
        "timm",
        ("beit",),
        _BEIT,
        "timm state dict of a BEiT",
        ignored=_BEIT_IGNORED,
        relative_resize="geometric",
        **_ANTIALIAS,
    ),
    _format("deit", ("vit",), _RULES, "facebookresearch DeiT"),
    _format("deit", ("deit",), _DISTILLED, "facebookresearch distilled DeiT", requires=_DIST),
    _format(
        "dino",
        ("vit",),
        _RULES,
        "facebookresearch DINO",
        ignored=((r"head\.(mlp|last_layer)\..*", "the projection head of DINO's training"),),
        **_OFFSET,
    ),
    _format(
        "mae",
        ("vit",),
        _RULES,
        "facebookresearch MAE encoder",
        ignored=(
            (r"decoder_.*|mask_token", "the decoder of masked autoencoding, not of the encoder"),
        ),
        written=False,
    ),
    _format(
        "beit",
        ("beit",),
        _BEIT,
        "microsoft BEiT, fine-tuned",
        ignored=_BEIT_IGNORED,
        relative_resize="geometric_cubic",
    ),
    _format(
        "beit",
        ("beit",),
        _BEIT_PRETRAINED,
        "microsoft BEiT, pretrained",
        ignored=_BEIT_IGNORED,
        requires=("lm_head.weight",),
        relative_resize="geometric_cubic",
    ),
    *(
        _format(
            "dinov2",
            (family,),
            _dinov2(registers, *names),
            f"facebookresearch DINOv2{' with registers' * bool(registers)}",
            respelled=((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),),
            requires=tuple(registers),
            **settings,
        )
        for family, registers, settings in (
            ("dinov2", {}, _OFFSET),
            ("dinov2_with_registers", _REGISTERS, _ANTIALIAS),
        )
        for names in (("mlp.fc1", "mlp.fc2"), ("mlp.w12", "mlp.w3"))
    ),
)
