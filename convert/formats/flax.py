"""Flax files as Transformers 4.57.6 wrote them: `flax_model.msgpack` and Flax safetensors.

The tree has the names of the Hub's PyTorch files with `kernel` and `scale` leaves and JAX layouts.
In msgpack files and in memory its levels are joined by "/", in Flax safetensors by ".".

Sources: `models/{vit,beit,dinov2}/modeling_flax_*.py` of Transformers 4.57.6.
"""

from dataclasses import replace

from vit_common.parameters import DIFFERENTIAL
from vit_convert.formats.format import Files, Format, Rule
from vit_convert.formats.huggingface import (
    ATTENTION_POOLER_DENSE,
    BEIT_HEAD,
    BLOCK,
    CLIP,
    CLIP_BLOCK,
    CLIP_TOP,
    DINOV2_BLOCK,
    DINOV2_SWIGLU_BLOCK,
    EXTENDED_BLOCK,
    RELATIVE_MLP,
    SIGLIP,
    SIGLIP2,
    SIGLIP_TOP,
    STEM,
    extended,
    gated,
    plain,
)
from vit_convert.layouts import HWIO, KEEP, TOKEN, TRANSPOSE, VECTOR, Layout

_TOKENS = (
    "embeddings.cls_token",
    "embeddings.distillation_token",
    "embeddings.register_tokens",
    "embeddings.position_embeddings",
    "encoder.relative_position_bias.relative_position_bias_table",
    *(f"encoder.{name}" for name in RELATIVE_MLP),
    "encoder.rope_frequencies",
    "pooler.probe",
)
_DENSE = (
    "pooler.dense",
    *ATTENTION_POOLER_DENSE,
    "classifier",
    "cls_classifier",
    "distillation_classifier",
    "lm_head",
    "visual_projection",
    "text_projection",
)
_CONVOLUTIONS = ("embeddings.patch_embeddings.projection", "decoder.0")
_NORMS = ("pre_layernorm", "layernorm", "pooler.layernorm", "lm_layernorm")


_ALONE = (
    "lambda_1", "lambda_2", "_table", "_token", "_tokens", "_embeddings", "_frequencies",
    "probe",
    *RELATIVE_MLP,
    *DIFFERENTIAL,
)  # fmt: skip
"""What names of parameters end with that are no leaves of a module."""


SIGLIP_POOLER = {
    f"head.attention.{name[0]}_proj": f"pooler.attention.{name}"
    for name in ("query", "key", "value")
}
"""Name in the tree -> canonical name, of what SigLIP's own files have in one array."""


def _leaves(theirs: str, ours: str, separator: str) -> list[Rule]:
    """The rules of one module; what kind it is, its name says."""
    if ours.endswith(_ALONE):
        pairs: list[tuple[str, str, Layout]] = [("", "", KEEP)]
    elif "norm" in ours.rpartition(".")[2]:
        pairs = [(".scale", ".weight", KEEP), (".bias", ".bias", KEEP)]
    else:
        layout = HWIO if ours in (*_CONVOLUTIONS, *STEM) else TRANSPOSE
        pairs = [(".kernel", ".weight", layout), (".bias", ".bias", KEEP)]
    return [
        Rule((theirs + leaf).replace(".", separator), ours + own, layout)
        for leaf, own, layout in pairs
    ]


def _rules(block: dict[str, str], separator: str, mask_token: Layout = KEEP) -> tuple[Rule, ...]:
    rules = [
        Rule(f"embeddings{separator}mask_token", "embeddings.mask_token", mask_token),
    ]
    for name in (*_TOKENS, *_DENSE, *_CONVOLUTIONS, *_NORMS):
        rules += _leaves(name, name, separator)
    for name in STEM:
        rules += _leaves(name, name, separator)
    for ours, theirs in block.items():
        for start in ("encoder.layer.{i}.", "encoder.layer.{i}.branch.{j}."):
            rules += _leaves(start + theirs, start + ours, separator)
    return tuple(rules)


_SAME = {name: name for name in (*BLOCK, *EXTENDED_BLOCK)}


def text_rules(block: dict[str, str], separator: str, start: str, norm: str) -> tuple[Rule, ...]:
    """The rules of a text tower, and of what stands beside both towers.

    Args:
        block: canonical module of a block -> its name in the tree.
        separator: between the parts of a name in the tree.
        start: of the names of a block in the tree, with `{i}` for its index.
        norm: name of the last norm in the tree.
    """
    rules = [Rule(name, name) for name in ("logit_scale", "logit_bias")]
    for name in ("token_embedding", "position_embedding"):
        ours = f"text_model.embeddings.{name}"
        rules.append(Rule(f"{ours}.embedding".replace(".", separator), f"{ours}.weight"))
    for ours, theirs in block.items():
        rules += _leaves(
            f"text_model.{start}{theirs}", f"text_model.encoder.layer.{{i}}.{ours}", separator
        )
    rules += _leaves(f"text_model.{norm}", "text_model.final_layernorm", separator)
    rules += _leaves("text_model.head", "text_model.head", separator)
    return tuple(rules)


TREE = Format(
    name="tree",
    describes="parameter tree of vit_flax joined by '/'",
    families=(
        *("vit", "deit", "beit", "dinov2", "dinov2_with_registers", "dinov3_vit"),
        *(*CLIP, *SIGLIP, *SIGLIP2),
    ),
    rules=_rules(_SAME, "/") + text_rules(_SAME, "/", "encoder.layer.{i}.", "final_layernorm"),
    separator="/",
    prefixed=True,
)
"""What the models of `vit_flax` hold in memory; the same names for every family."""


_SAFETENSORS = "flax-safetensors"


def _formats(name: str, separator: str, describes: str, files: Files) -> tuple[Format, ...]:
    def table(families, rules, **more) -> Format:
        return Format(
            name=name,
            describes=describes,
            families=families,
            files=files,
            rules=rules,
            separator=separator,
            prefixed=True,
            loses=extended,
            **more,
        )

    def towers(top: dict[str, str], *more: Rule) -> tuple[Rule, ...]:
        place = ("embeddings.position_embedding.embedding", "embeddings.position_embeddings")
        rules = [*more, Rule(*place, TOKEN)]
        for theirs, ours in top.items():
            rules += _leaves(theirs, ours, ".")
        for ours, theirs in CLIP_BLOCK.items():
            rules += _leaves(f"encoder.layers.{{i}}.{theirs}", f"encoder.layer.{{i}}.{ours}", ".")
        rules = [replace(rule, foreign=str(rule.foreign).replace(".", separator)) for rule in rules]
        text = text_rules(CLIP_BLOCK, separator, "encoder.layers.{i}.", "final_layer_norm")
        return (*rules, *text)

    token = Rule("embeddings.class_embedding", "embeddings.cls_token", VECTOR)
    siglip = towers(SIGLIP_TOP | SIGLIP_POOLER, Rule("head.probe", "pooler.probe"))
    beit = tuple((a.replace(".", separator), b.replace(".", separator)) for a, b in BEIT_HEAD)
    dinov2 = ("dinov2", "dinov2_with_registers")
    return (
        table(("vit", "deit", "dinov3_vit"), _rules(_SAME, separator)),
        table(("beit",), _rules(_SAME, separator), only_with_prefix=beit),
        table(dinov2, _rules(DINOV2_BLOCK, separator, TOKEN), fits=plain),
        table(dinov2, _rules(DINOV2_SWIGLU_BLOCK, separator, TOKEN), fits=gated),
        table(CLIP, towers(CLIP_TOP, token)),
        table(SIGLIP, siglip),
        table(SIGLIP2, siglip),
    )


FORMATS = _formats(
    "flax",
    "/",
    "Flax tree joined by '/', as in flax_model.msgpack",
    Files(
        container="msgpack",
        stem="flax_model",
        tag="flax",
        suffix=".msgpack",
        for_suffix={".safetensors": _SAFETENSORS},
        described=True,
    ),
) + _formats(
    _SAFETENSORS,
    ".",
    "Flax tree joined by '.', as Transformers 4.57.6 wrote safetensors from Flax",
    Files(container="safetensors", tag="flax", described=True),
)
