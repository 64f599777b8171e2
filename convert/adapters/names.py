"""Layers by their names in adapter files, of both generations of Transformers, and by the canonical
ones.

Transformers 5 renamed the layers of every family, and an adapter made under one generation does not
load under the other. Both sets of names stand in the tables of the Hub's format.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vit_common.config import ViTConfig
from vit_common.errors import InputError
from vit_common.parameters import TOP_PARAMETERS
from vit_convert.formats import huggingface
from vit_convert.formats.format import Format, Rule, family_prefix, fill, unprefixed

GENERATIONS: Mapping[str, str] = {
    "transformers-4": huggingface.V4_NAMES,
    "transformers-5": huggingface.V5_NAMES,
}
"""Generation of names -> what its tables say of themselves."""

_FIRST = "encoder.layer.{i}.intermediate.dense.weight"
_GATED = (
    "encoder.layer.{i}.mlp.weights_in.weight",
    *(f"{start}layer.{{i}}.mlp.gate_proj.weight" for start in ("encoder.", "", "model.")),
)


def check_generation(names: str) -> str:
    """The name itself.

    Raises:
        InputError: there is no such generation.
    """
    if names not in GENERATIONS:
        raise InputError(f"`names` must be one of {', '.join(GENERATIONS)}; given {names!r}.")
    return names


def is_gated(table: Format) -> bool:
    """Whether a table is that of networks with a SwiGLU, whose MLP has other names."""
    rule = table.rule_for_canonical(_FIRST.replace("{i}", "0"))
    return rule is not None and rule[0].foreign_names[0] in _GATED


def tables(family: str | None = None, generation: str | None = None) -> list[tuple[str, Format]]:
    """(generation, table) of a family, or of all; the older generation first."""
    return [
        (name, table)
        for name, describes in GENERATIONS.items()
        for table in huggingface.FORMATS
        if table.describes == describes
        and (family is None or family in table.families)
        and generation in (None, name)
    ]


def table_of(family: str, generation: str, gated: bool) -> Format:
    """The table of a family's names."""
    found = [table for _, table in tables(family, generation)]
    if not found:
        known = {name for _, table in tables() for name in table.families}
        raise InputError(
            f"adapters cannot be made for a network of model_type {family!r}; wanted one of "
            f"{', '.join(sorted(known))}. Train the layers themselves instead."
        )
    return next(table for table in found if len(found) == 1 or is_gated(table) == gated)


class Understood(NamedTuple):
    """What the names in an adapter's file are.

    Attributes:
        generation: one of `GENERATIONS`; the older one where both have these names.
        table: that explains them.
        family: by what stands before the names; None for adapters of a base network.
        rules: parameter's name in the model -> its rule, the number of its block, and the name
            as the table has it.
        unknown: names that no table explains; of the table that explains most.
    """

    generation: str
    table: Format
    family: str | None
    rules: dict[str, tuple[Rule, str | None, str]]
    unknown: list[str]


def understand(names: Iterable[str], family: str | None = None) -> Understood:
    """Find out which generation's names these are.

    Args:
        names: of parameters, as the model of Transformers has them ("vit.layers.0.attention.
            q_proj.weight").
        family: of the base model, where it is known.
    """
    names = list(names)
    prefix = family_prefix(names, ".")[:-1]
    best: Understood | None = None
    for generation, table in tables(prefix or family):
        rules, unknown = {}, []
        for bare, name in table.strip(names).items():
            if (found := table.rule_for_foreign(bare)) is not None:
                rules[name] = (*found, bare)
            else:
                unknown.append(name)
        if best is None or len(unknown) < len(best.unknown):
            best = Understood(generation, table, prefix or None, rules, unknown)
    assert best is not None  # every family has tables
    return best


def foreign_names(table: Format, canonical: str, prefix: str) -> list[str]:
    """What a table calls a canonical parameter: one name, or two of a SwiGLU's first layer; none
    where it has no such parameter.

    Args:
        table: of a family and a generation.
        canonical: without prefix.
        prefix: of the base network in a model with a head, such as "vit"; or "".
    """
    found = table.rule_for_canonical(canonical)
    if found is None:
        return []
    rule, index = found
    names = [fill(name, index) for name in rule.foreign_names]
    return [with_prefix(table, name, prefix) for name in names]


def layer_names(config: ViTConfig, layer: str) -> list[str]:
    """What models of both generations call a layer, by its canonical name with prefix."""
    bare = unprefixed(layer)
    prefix = layer.removesuffix(bare)[:-1]
    found: list[str] = []
    for generation in GENERATIONS:
        table = table_of(config.base_family, generation, config.use_swiglu_ffn)
        found += foreign_names(table, f"{bare}.weight", prefix)
    return list(dict.fromkeys(name.removesuffix(".weight") for name in found))


def with_prefix(table: Format, name: str, prefix: str) -> str:
    """A parameter's name with what a model with a head puts before it."""
    if not prefix:
        return name
    if not name.startswith(TOP_PARAMETERS):
        return f"{prefix}.{name}"
    for theirs, ours in table.only_with_prefix:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name
