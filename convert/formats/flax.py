"""Flax files as Transformers 4.57.6 wrote them: `flax_model.msgpack` and Flax safetensors.

The tree has the names of the Hub's PyTorch files with `kernel` and `scale` leaves and JAX layouts.
In msgpack files and in memory its levels are joined by "/", in Flax safetensors by ".".

Sources: `models/{vit,beit,dinov2}/modeling_flax_*.py` of Transformers 4.57.6.
"""

from vit_convert.formats.format import Files, Format, Rule
from vit_convert.formats.huggingface import (
    BEIT_HEAD,
    BLOCK,
    DINOV2_BLOCK,
    DINOV2_SWIGLU_BLOCK,
    EXTENDED_BLOCK,
    extended,
    gated,
    plain,
)
from vit_convert.layouts import HWIO, KEEP, TOKEN, TRANSPOSE, Layout

_TOKENS = (
    "embeddings.cls_token",
    "embeddings.distillation_token",
    "embeddings.register_tokens",
    "embeddings.position_embeddings",
    "encoder.relative_position_bias.relative_position_bias_table",
)
_DENSE = (
    "pooler.dense",
    "classifier",
    "cls_classifier",
    "distillation_classifier",
    "lm_head",
)
_CONVOLUTIONS = ("embeddings.patch_embeddings.projection", "decoder.0")
_NORMS = ("pre_layernorm", "layernorm", "pooler.layernorm", "lm_layernorm")


def _leaves(theirs: str, ours: str, separator: str) -> list[Rule]:
    """The rules of one module; what kind it is, its name says."""
    if ours.endswith(("lambda_1", "lambda_2", "_table", "_token", "_tokens", "_embeddings")):
        pairs: list[tuple[str, str, Layout]] = [("", "", KEEP)]
    elif "norm" in ours.rpartition(".")[2]:
        pairs = [(".scale", ".weight", KEEP), (".bias", ".bias", KEEP)]
    else:
        layout = HWIO if ours in _CONVOLUTIONS else TRANSPOSE
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
    for ours, theirs in block.items():
        for start in ("encoder.layer.{i}.", "encoder.layer.{i}.branch.{j}."):
            rules += _leaves(start + theirs, start + ours, separator)
    return tuple(rules)


_SAME = {name: name for name in (*BLOCK, *EXTENDED_BLOCK)}

TREE = Format(
    name="tree",
    describes="parameter tree of vit_flax joined by '/'",
    families=("vit", "deit", "beit", "dinov2", "dinov2_with_registers"),
    rules=_rules(_SAME, "/"),
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

    beit = tuple((a.replace(".", separator), b.replace(".", separator)) for a, b in BEIT_HEAD)
    dinov2 = ("dinov2", "dinov2_with_registers")
    return (
        table(("vit", "deit"), _rules(_SAME, separator)),
        table(("beit",), _rules(_SAME, separator), only_with_prefix=beit),
        table(dinov2, _rules(DINOV2_BLOCK, separator, TOKEN), fits=plain),
        table(dinov2, _rules(DINOV2_SWIGLU_BLOCK, separator, TOKEN), fits=gated),
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
