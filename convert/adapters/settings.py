"""`adapter_config.json`: what a LoRA adapter changes, and how strongly.

Only what gives the same numbers as PEFT is taken. Other methods, and fields that change numbers in
ways unknown here, are refused by name.

Source: `tuners/lora/config.py`, `tuners/tuners_utils.py` and `utils/other.py` of PEFT 0.21.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vit_common.errors import ConfigError, shown

ALL_LINEAR = "all-linear"
"""`target_modules` that stands for every dense layer."""

# Fields of PEFT 0.21.2 without effect on the numbers of a trained adapter.
_HARMLESS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
        "fan_in_fan_out", "inference_mode", "lora_dropout", "megatron_core", "peft_type",
        "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
        "velora_config",
    }
)  # fmt: skip
_READ = frozenset(
    {
        "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save", "r", "rank_pattern",
        "target_modules", "use_dora", "use_rslora",
    }
)  # fmt: skip
# What fields that are refused when they are set stand for.
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA, which depends on tokens of a text",
    "arrow_config": "Arrow, which mixes several adapters",
    "kasa_config": "KaSA, which changes the base model's weights",
    "layer_replication": "blocks that are used several times",
    "loftq_config": "LoftQ, which quantizes the base model",
    "megatron_config": "layers of Megatron",
    "monteclora_config": "Monteclora, which draws samples",
    "target_parameters": "LoRA on parameters that belong to no layer",
    "trainable_token_indices": "trained rows of an embedding table",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA, which pools the inputs",
}
# Beginnings of A and B that subtract something from the base model's own weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_MOST = 1e9  # alpha

Names = str | tuple[str, ...]


@dataclass(frozen=True)
class LoraSettings:
    """The fields of an `adapter_config.json` that decide numbers.

    Attributes:
        rank, alpha: r and alpha of layers that no pattern names.
        rslora: whether the scale is alpha / sqrt(r) instead of alpha / r.
        dora: whether each output's weights are rescaled to a learned norm.
        bias: which biases are in the file: "none", "all" or "lora_only".
        targets: layers with an adapter: ends of their names, or a regular expression of the whole
            name, or "all-linear".
        excluded: layers without one, in the same way.
        layers: numbers of the blocks that have adapters; None is all.
        layers_pattern: names of the list of blocks; empty takes any.
        saved: modules that are in the file whole, such as the classifier.
        rank_pattern, alpha_pattern: end of a layer's name, as a regular expression -> its r or
            alpha.
        base: name of the base model, or None.
        revision: which commit of it, or None.
        table: all fields, as they are in the file.
    """

    rank: int = 8
    alpha: float = 8
    rslora: bool = False
    dora: bool = False
    bias: str = "none"
    targets: Names = ()
    excluded: Names = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base: str | None = None
    revision: str | None = None
    table: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> LoraSettings:
        """The settings in an `adapter_config.json`.

        Raises:
            ConfigError: the adapter is of another method; a field changes numbers in a way that is
                not known here, or has a wrong value.
        """
        kind = table.get("peft_type")
        if kind != "LORA":
            raise ConfigError(
                "adapter_config.json: `peft_type` must be 'LORA'; given "
                f"{'none' if kind is None else shown(kind)}. Adapters of other methods cannot be "
                "read here: merge them with PEFT (`merge_and_unload`), and load the whole model."
            )
        for name, value in table.items():
            empty = value is None or value is False or value in ({}, [], "")
            if empty or name in _READ or name in _HARMLESS:
                continue
            what = f" ({_REFUSED[name]})" if name in _REFUSED else ""
            raise ConfigError(
                f"adapter_config.json: `{name}`{what} is {shown(value)}, which changes the numbers "
                "in a way that is not known here. Merge the adapter with PEFT "
                "(`merge_and_unload`), and load the whole model."
            )
        begun = table.get("init_lora_weights", True)
        if isinstance(begun, str) and begun.lower().startswith(_CHANGES_BASE):
            raise ConfigError(
                f"adapter_config.json: `init_lora_weights` is {shown(begun)}, which changes the "
                "base model's own weights. Save the adapter with PEFT's "
                "`path_initial_model_for_weight_conversion` to make an ordinary one of it."
            )
        layers = table.get("layers_to_transform")
        if isinstance(layers, int) and not isinstance(layers, bool):
            layers = [layers]
        if layers is not None and not (
            isinstance(layers, list) and all(type(i) is int and i >= 0 for i in layers)
        ):
            raise _wrong("layers_to_transform", "a list of block numbers", layers)
        bias = table.get("bias", "none")
        if bias not in ("none", "all", "lora_only"):
            raise _wrong("bias", "'none', 'all' or 'lora_only'", bias)
        base, revision = table.get("base_model_name_or_path"), table.get("revision")
        for name, value in (("base_model_name_or_path", base), ("revision", revision)):
            if not isinstance(value, str | None):
                raise _wrong(name, "a string", value)
        return cls(
            rank=_rank("r", table.get("r", 8)),
            alpha=_alpha("lora_alpha", table.get("lora_alpha", 8)),
            rslora=_flag(table, "use_rslora"),
            dora=_flag(table, "use_dora"),
            bias=bias,
            targets=_names(table, "target_modules"),
            excluded=_names(table, "exclude_modules"),
            layers=tuple(layers) if layers else None,
            layers_pattern=_list(table, "layers_pattern"),
            saved=_list(table, "modules_to_save"),
            rank_pattern=_pattern(table, "rank_pattern", _rank),
            alpha_pattern=_pattern(table, "alpha_pattern", _alpha),
            base=base or None,
            revision=revision or None,
            table=dict(table),
        )

    def rank_of(self, layer: str) -> int:
        """r of a layer, by its name in the model."""
        return _matched(self.rank_pattern, layer, self.rank)

    def alpha_of(self, layer: str) -> float:
        """alpha of a layer, by its name in the model."""
        return _matched(self.alpha_pattern, layer, self.alpha)

    def targets_layer(self, layer: str, *, dense: bool = True) -> bool:
        """Whether a layer has an adapter, by its name in the model ("vit.encoder.layer.0.attention.
        attention.query"). "all-linear" stands for those that are `dense`."""
        if _names_one(self.excluded, layer):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", layer) for name in self.saved):
            return False
        if isinstance(self.targets, str):
            if self.targets.lower() == ALL_LINEAR:
                return dense
            return re.fullmatch(self.targets, layer) is not None
        if layer in self.targets:
            return True
        if not _names_one(self.targets, layer):
            return False
        if self.layers is None:
            return True
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern]
        found = [re.match(pattern, layer) for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]]
        number = next((match[1] for match in found if match), None)
        return number is not None and int(number) in self.layers


def scale(rank: int, alpha: float, rslora: bool) -> float:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023,
    arXiv:2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def _matched(pattern: Mapping[str, Any], layer: str, default: Any) -> Any:
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", layer):
            return value
    return default


def _names_one(names: Names, layer: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, layer) is not None
    return any(layer == name or layer.endswith(f".{name}") for name in names)


def _wrong(name: str, wanted: str, given: Any) -> ConfigError:
    return ConfigError(f"adapter_config.json: `{name}` must be {wanted}; given {shown(given)}.")


def _rank(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise _wrong(name, "a positive integer", value)
    return value


def _alpha(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < _MOST:
        raise _wrong(name, f"a number below {_MOST:g}", value)
    return value


def _flag(table: Mapping[str, Any], name: str) -> bool:
    value = table.get(name)
    if not isinstance(value, bool | None):
        raise _wrong(name, "true or false", value)
    return bool(value)


def _list(table: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = table.get(name)
    value = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise _wrong(name, "a list of names", value)
    for part in value:
        _check_regular(name, part)
    return tuple(value)


def _names(table: Mapping[str, Any], name: str) -> Names:
    value = table.get(name)
    if isinstance(value, str):
        _check_regular(name, value)
        return value
    return _list(table, name)


def _pattern(table: Mapping[str, Any], name: str, check: Any) -> dict[str, Any]:
    value = table.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _wrong(name, "an object of names and numbers", value)
    for key in value:
        _check_regular(name, key)
    return {key: check(f"{name}.{key}", number) for key, number in value.items()}


def _check_regular(name: str, text: str) -> None:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise _wrong(name, f"made of regular expressions ({error})", text) from error


def plain_table(
    base: str | None,
    *,
    rank: int,
    alpha: float,
    targets: str | Iterable[str],
    saved: Iterable[str] = (),
    rslora: bool = False,
    dora: bool = False,
) -> dict[str, Any]:
    """An `adapter_config.json` of a new adapter, with the fields that PEFT writes."""
    alpha = int(alpha) if float(alpha).is_integer() else alpha
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "task_type": None,
        "use_dora": dora,
        "use_rslora": rslora,
    }
