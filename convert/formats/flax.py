"""Flax files as Transformers 4.57.6 wrote them: `flax_model.msgpack` and Flax safetensors.

The tree has the canonical names with `kernel` and `scale` leaves and JAX layouts. In msgpack
files and in memory its levels are joined by "/", in Flax safetensors by ".".
"""

from convert.layouts import HWIO, TRANSPOSE
from convert.rules import Format, Rule

_DENSE = (
    "encoder.layer.{i}.attention.attention.query",
    "encoder.layer.{i}.attention.attention.key",
    "encoder.layer.{i}.attention.attention.value",
    "encoder.layer.{i}.attention.output.dense",
    "encoder.layer.{i}.intermediate.dense",
    "encoder.layer.{i}.output.dense",
    "pooler.dense",
    "classifier",
)
_CONVOLUTIONS = ("embeddings.patch_embeddings.projection", "decoder.0")
_NORMS = (
    "encoder.layer.{i}.layernorm_before",
    "encoder.layer.{i}.layernorm_after",
    "layernorm",
)
_TOKENS = ("embeddings.cls_token", "embeddings.mask_token", "embeddings.position_embeddings")


def _rules(separator: str) -> tuple[Rule, ...]:
    rules = [Rule(name, name) for name in _TOKENS]
    for name in _DENSE:
        rules.append(Rule(f"{name}.kernel", f"{name}.weight", TRANSPOSE))
        rules.append(Rule(f"{name}.bias", f"{name}.bias"))
    for name in _CONVOLUTIONS:
        rules.append(Rule(f"{name}.kernel", f"{name}.weight", HWIO))
        rules.append(Rule(f"{name}.bias", f"{name}.bias"))
    for name in _NORMS:
        rules.append(Rule(f"{name}.scale", f"{name}.weight"))
        rules.append(Rule(f"{name}.bias", f"{name}.bias"))
    return tuple(
        Rule(str(rule.foreign).replace(".", separator), rule.canonical, rule.layout)
        for rule in rules
    )


FLAX = Format(
    name="flax",
    describes="Flax tree joined by '/', as in flax_model.msgpack",
    rules=_rules("/"),
    separator="/",
    prefix="vit/",
    wrappers=("params/",),
)

FLAX_SAFETENSORS = Format(
    name="flax-safetensors",
    describes="Flax tree joined by '.', as Transformers 4.57.6 wrote safetensors from Flax",
    rules=_rules("."),
    prefix="vit.",
    wrappers=("params.",),
)
