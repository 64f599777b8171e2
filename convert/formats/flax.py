"""Flax files as Transformers 4.57.6 wrote them: `flax_model.msgpack` and Flax safetensors.

The tree has the names of the Hub's PyTorch files with `kernel` and `scale` leaves and JAX layouts.
In msgpack files and in memory its levels are joined by "/", in Flax safetensors by ".".

Sources: `models/{vit,beit,dinov2}/modeling_flax_*.py` of Transformers 4.57.6.
"""

from vit_convert.formats.huggingface import BEIT_HEAD, BLOCK, DINOV2_BLOCK, DINOV2_SWIGLU_BLOCK
from vit_convert.layouts import HWIO, KEEP, TOKEN, TRANSPOSE, Layout
from vit_convert.rules import Format, Rule

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
_NORMS = ("layernorm", "pooler.layernorm", "lm_layernorm")


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
        rules += _leaves(f"encoder.layer.{{i}}.{theirs}", f"encoder.layer.{{i}}.{ours}", separator)
    return tuple(rules)


_SAME = {name: name for name in BLOCK}

TREE = Format(
    name="tree",
    describes="parameter tree of vit_flax joined by '/'",
    families=("vit", "deit", "beit", "dinov2", "dinov2_with_registers"),
    rules=_rules(_SAME, "/"),
    separator="/",
    prefixed=True,
)
"""What the models of `vit_flax` hold in memory; the same names for every family."""


def _formats(name: str, separator: str, describes: str) -> tuple[Format, ...]:
    beit = tuple((a.replace(".", separator), b.replace(".", separator)) for a, b in BEIT_HEAD)
    return (
        Format(
            name=name,
            describes=describes,
            families=("vit", "deit"),
            rules=_rules(_SAME, separator),
            separator=separator,
            prefixed=True,
        ),
        Format(
            name=name,
            describes=describes,
            families=("beit",),
            rules=_rules(_SAME, separator),
            separator=separator,
            prefixed=True,
            only_with_prefix=beit,
        ),
        *(
            Format(
                name=name,
                describes=describes,
                families=("dinov2", "dinov2_with_registers"),
                rules=_rules(block, separator, TOKEN),
                separator=separator,
                prefixed=True,
            )
            for block in (DINOV2_BLOCK, DINOV2_SWIGLU_BLOCK)
        ),
    )


FORMATS = _formats("flax", "/", "Flax tree joined by '/', as in flax_model.msgpack") + _formats(
    "flax-safetensors",
    ".",
    "Flax tree joined by '.', as Transformers 4.57.6 wrote safetensors from Flax",
)
