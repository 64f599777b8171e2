"""PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors`, read and written.

Names inside an `Adapter` are the canonical ones, so either generation's file can be read, and
either be written from it, without the base model.

Source: `utils/save_and_load.py` of PEFT 0.21.2.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vit_common.config import CONFIG_NAME as MODEL_CONFIG
from vit_common.errors import CheckpointError, ConfigError, MissingFileError, some
from vit_common.files.checkpoint import open_checkpoint, save_checkpoint
from vit_common.files.containers.tensor import Tensor
from vit_common.files.hub import ModelFiles
from vit_common.files.texts import read_json
from vit_convert.adapters.lowrank import LowRank, join, split
from vit_convert.adapters.names import (
    Understood,
    check_generation,
    foreign_names,
    is_gated,
    table_of,
    understand,
)
from vit_convert.adapters.settings import LoraSettings
from vit_convert.formats.format import Format, Rule, fill, unprefixed

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
"""Files of an adapter folder, in the order they are looked for."""

_START = "base_model.model."
_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B)\.(?:default\.)?(weight|bias)")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
_OTHER = re.compile(r"(.+)\.(?:lora_|hada_|lokr_|ia3_|boft_|oft_|vera_|adalora_)\w*(?:\..*)?")
# What stands in the name of a parameter that is in the file whole.
_WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)\.(?=\w+$)")
_ORIGINAL = re.compile(r"\.original_module\.")
_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
_DENSE = 2  # axes of a dense layer's weight
_SHOWN = 8


@dataclass
class Adapter:
    """A LoRA adapter, under canonical names.

    Attributes:
        settings: what its `adapter_config.json` says.
        layers: canonical name of a layer, without ".weight" -> its change.
        saved: canonical name -> parameter that is in the file whole, in PyTorch's layouts.
        family: the base model's, by the names; None for an adapter of a base network, whose
            names do not say it.
        generation: whose names the file has, one of `names.GENERATIONS`.
        gated: whether the names are those of a network with a SwiGLU.
        place: folder or name, for messages.
    """

    settings: LoraSettings
    layers: dict[str, LowRank]
    saved: dict[str, np.ndarray] = field(default_factory=dict)
    family: str | None = None
    generation: str = "transformers-4"
    gated: bool = False
    place: str = ""

    @property
    def parameters(self) -> int:
        """Numbers that were trained."""
        arrays: list[np.ndarray] = [*self.saved.values()]
        for layer in self.layers.values():
            arrays += [x for x in (layer.a, layer.b, layer.magnitude, layer.bias) if x is not None]
        return sum(array.size for array in arrays)

    def describe(self) -> str:
        """Rank, layers and what else is in it, in a line."""
        ranks = sorted({layer.rank for layer in self.layers.values()})
        kinds = sorted({kind_of(name) for name in self.layers})
        what = "DoRA" if any(x.magnitude is not None for x in self.layers.values()) else "LoRA"
        text = f"{what} of rank {', '.join(map(str, ranks))}" if ranks else "no LoRA layers"
        text += f" on {len(self.layers)} layers ({', '.join(kinds)})" if kinds else ""
        owners = sorted({kind_of(name.rpartition(".")[0]) for name in self.saved})
        return text + (f", and {', '.join(owners)} whole" if owners else "")


def kind_of(layer: str) -> str:
    """A layer's canonical name, short and without the number of its block: "query",
    "attention.output.dense", "classifier"."""
    name = re.sub(r"^encoder\.layer\.\d+\.", "", unprefixed(layer))
    return name.removeprefix("attention.attention.").removeprefix("embeddings.patch_embeddings.")


def is_adapter(files: ModelFiles, *, described: bool) -> bool:
    """Whether files are those of an adapter and of no whole model.

    Args:
        files: of a folder or a repository.
        described: whether they have a `config.json`. A repository that has one is not asked: that
            would cost every model another request.
    """
    place = files.local
    if place is None:
        return not described and files.find(CONFIG_NAME) is not None
    if place.is_file():
        return place.name in (CONFIG_NAME, *WEIGHTS_NAMES)
    return (place / CONFIG_NAME).is_file() and not files.has_weights()


def has_adapter(files: ModelFiles) -> bool:
    """Whether an adapter is among the files, whatever else is."""
    with contextlib.suppress(MissingFileError):
        return files.find(CONFIG_NAME) is not None
    return False


def find_adapter(files: ModelFiles) -> Path | None:
    """The weights file of an adapter; None where the files are those of a model.

    Raises:
        MissingFileError: `adapter_config.json` is there, and no weights.
    """
    local = files.local
    described = local is None and files.find(MODEL_CONFIG) is not None
    if not is_adapter(files, described=described):
        if not described or not has_adapter(files):
            return None
        with contextlib.suppress(MissingFileError):
            files.weights()
            return None
    if local is not None and local.is_file():
        files = ModelFiles(local.parent)
    return _weights(files)


def _weights(files: ModelFiles) -> Path:
    path = next((p for name in WEIGHTS_NAMES if (p := files.find(name)) is not None), None)
    if path is None:
        raise MissingFileError(
            f"{files.name}: no weights of an adapter there; looked for {', '.join(WEIGHTS_NAMES)}."
        )
    return path


def read_adapter(name_or_path: Any, *, family: str | None = None, **hub: Any) -> Adapter:
    """Read an adapter folder.

    Args:
        name_or_path: a folder, or "owner/name" on the Hub.
        family: `model_type` of the base model, where it is known.
        **hub: options of the Hub.

    Raises:
        MissingFileError: a file is not there.
        ConfigError: another method than LoRA, or a field that is not known.
        CheckpointError: the file is corrupt; its names are those of no layer known here, or not
            those that the settings ask for.

    Example:
        >>> adapter = read_adapter("my-adapter")
        >>> adapter.describe()
        'LoRA of rank 16 on 24 layers (query, value), and classifier whole'
    """
    files = (
        name_or_path if isinstance(name_or_path, ModelFiles) else ModelFiles(name_or_path, **hub)
    )
    if files.local is not None and files.local.is_file():
        files = ModelFiles(files.local.parent)
    place = str(files.name)
    try:
        settings = LoraSettings.from_dict(read_json(files.need(CONFIG_NAME)))
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    path = _weights(files)
    with open_checkpoint(path) as checkpoint:
        try:
            return understood(checkpoint, settings, family, place)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error


def understood(
    checkpoint: Mapping[str, Tensor], settings: LoraSettings, family: str | None, place: str
) -> Adapter:
    """The adapter that a file's tensors and the settings beside it are.

    Args:
        checkpoint: tensors by their names in the file.
        settings: of `adapter_config.json`.
        family: `model_type` of the base model, where it is known.
        place: for messages.

    Raises:
        CheckpointError: as `read_adapter`.
    """
    parts: dict[str, dict[str, str]] = {}  # layer's name in the model -> what -> name in the file
    plain: dict[str, str] = {}  # parameter's name in the model -> name in the file
    other: list[str] = []
    for key in checkpoint:
        bare = key.removeprefix(_START)
        if match := _FACTOR.fullmatch(bare):
            layer, factor, leaf = match.groups()
            what = factor if leaf == "weight" else f"{factor}.bias"
            parts.setdefault(layer, {})[what] = key
        elif match := _MAGNITUDE.fullmatch(bare):
            parts.setdefault(match[1], {})["magnitude"] = key
        elif _OTHER.fullmatch(bare):
            other.append(key)
        elif not _ORIGINAL.search(bare):
            name = _WRAPPED.sub(".", bare)
            if name == bare or name not in plain:
                plain[name] = key
    if other:
        raise CheckpointError(
            f"{some(other, _SHOWN)}: no tensors of LoRA on dense or convolutional layers, which is "
            "all that can be read here."
        )
    if not parts and not plain:
        raise CheckpointError("the file holds no tensors.")
    names = understand([*(f"{layer}.weight" for layer in parts), *plain], family)
    if names.unknown:
        whose = f"a {names.family or family} model" if names.family or family else "a model"
        raise CheckpointError(
            f"no layer of {whose} is called {some(names.unknown, _SHOWN)}, by the names of "
            "Transformers 4 or 5. Adapters of other architectures cannot be read here."
        )
    layers = _layers(checkpoint, parts, settings, names)
    saved = _saved(checkpoint, plain, names)
    return Adapter(
        settings, layers, saved, names.family, names.generation, is_gated(names.table), place
    )


def _layers(
    checkpoint: Mapping[str, Tensor],
    parts: Mapping[str, Mapping[str, str]],
    settings: LoraSettings,
    names: Understood,
) -> dict[str, LowRank]:
    """The changes under canonical names."""
    halves: dict[str, dict[str, LowRank]] = {}
    layers: dict[str, LowRank] = {}
    for name, found in parts.items():
        change = _change(checkpoint, name, found, settings)
        rule, index, bare = names.rules[f"{name}.weight"]
        canonical = fill(rule.canonical_names[0], index).removesuffix(".weight")
        if len(rule.foreign_names) == 1:
            layers[canonical] = change
        else:  # the halves of a SwiGLU's first layer
            halves.setdefault(canonical, {})[fill_position(rule, index, bare)] = change
    for canonical, pair in halves.items():
        rows = next(iter(pair.values())).b.shape[0]
        layers[canonical] = join(pair.get("0"), pair.get("1"), rows)
    return layers


def _saved(
    checkpoint: Mapping[str, Tensor], plain: Mapping[str, str], names: Understood
) -> dict[str, np.ndarray]:
    """The parameters that are in the file whole, under canonical names."""
    groups: dict[str, tuple[Rule, dict[str, np.ndarray]]] = {}
    for name, key in plain.items():
        rule, index, bare = names.rules[name]
        canonical = fill(rule.canonical_names[0], index)
        group = groups.setdefault(canonical, (rule, {}))[1]
        group[fill_position(rule, index, bare)] = checkpoint[key].read()
    saved = {}
    for canonical, (rule, found) in groups.items():
        arrays = [found[str(i)] for i in range(len(rule.foreign_names)) if str(i) in found]
        rank = rule.layout.foreign_rank
        if len(arrays) < len(rule.foreign_names):
            raise CheckpointError(f"{canonical}: only one of its two halves is in the file.")
        if rank is not None and any(array.ndim != rank for array in arrays):
            raise CheckpointError(
                f"{canonical}: it must have {rank} axes; given {[x.shape for x in arrays]}."
            )
        saved[canonical] = rule.layout.to_canonical(arrays)[0]
    return saved


def fill_position(rule: Rule, index: str | None, bare: str) -> str:
    """Which of a rule's names a bare name is: "0" or "1"."""
    return str([fill(name, index) for name in rule.foreign_names].index(bare))


def _change(
    checkpoint: Mapping[str, Tensor], name: str, found: Mapping[str, str], settings: LoraSettings
) -> LowRank:
    """The change of one layer, checked against the settings."""
    absent = [what for what in ("lora_A", "lora_B") if what not in found]
    if absent:
        raise CheckpointError(f"{name}: {' and '.join(absent)} is missing.")
    a, b, magnitude, bias = (
        checkpoint[found[what]].read() if what in found else None
        for what in ("lora_A", "lora_B", "magnitude", "lora_B.bias")
    )
    assert a is not None
    assert b is not None
    if a.ndim not in (2, 4) or b.ndim != a.ndim or b.shape[1] != a.shape[0]:
        raise CheckpointError(
            f"{name}: lora_A {a.shape} and lora_B {b.shape} must be (r, in) and (out, r), or those "
            "of a convolution."
        )
    for what, array in (("lora_A", a), ("lora_B", b), ("magnitude", magnitude), ("bias", bias)):
        if array is not None and array.dtype.kind not in "fV":
            raise CheckpointError(f"{name}: {what} must be floating point; given {array.dtype}.")
    rank = settings.rank_of(name)
    if a.shape[0] != rank:
        raise CheckpointError(
            f"{name}: its rank is {a.shape[0]}; {CONFIG_NAME} says {rank} (`r`, `rank_pattern`)."
        )
    if not settings.targets_layer(name, dense=a.ndim == _DENSE):
        raise CheckpointError(
            f"{name}: the file has an adapter for this layer, which `target_modules` of "
            f"{CONFIG_NAME} does not name."
        )
    if (magnitude is not None) != settings.dora:
        what = "no DoRA magnitude" if magnitude is None else "a DoRA magnitude"
        raise CheckpointError(
            f"{name}: the file has {what}, and `use_dora` of {CONFIG_NAME} is "
            f"{str(settings.dora).lower()}."
        )
    return LowRank(a, b, settings.alpha_of(name), settings.rslora, magnitude, bias)


# -- writing


def adapter_tensors(
    adapter: Adapter, names: str, *, family: str | None = None, head: bool | None = None
) -> tuple[dict[str, np.ndarray], dict[str, LowRank]]:
    """The tensors of an adapter's file, and the changes by the names of the layers in the model.

    Args:
        adapter: what to write.
        names: one of `names.GENERATIONS`.
        family: the base model's, where the adapter does not say it.
        head: whether the base model has a head; None takes what the adapter's names say.

    Raises:
        InputError: there is no such generation.
        CheckpointError: the family is not known, or it has no such layer.
    """
    table, prefix = _table(adapter, names, family, head)
    changes: dict[str, LowRank] = {}
    for layer, change in adapter.layers.items():
        names_here = foreign_names(table, f"{layer}.weight", prefix)
        if not names_here:
            raise CheckpointError(f"{layer}: {table.describes}: there is no such layer.")
        named = [name.removesuffix(".weight") for name in names_here]
        pair = (change,) if len(named) == 1 else split(change)
        changes.update(zip(named, pair, strict=True))
    tensors: dict[str, np.ndarray] = {}
    for name, change in changes.items():
        tensors[f"{name}.lora_A.weight"] = change.a
        tensors[f"{name}.lora_B.weight"] = change.b
        if change.bias is not None:
            tensors[f"{name}.lora_B.bias"] = change.bias
        if change.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = change.magnitude
    for canonical, array in adapter.saved.items():
        found = table.rule_for_canonical(canonical)
        if found is None:
            raise CheckpointError(f"{canonical}: {table.describes}: there is no such parameter.")
        arrays = found[0].layout.to_foreign([array])
        for name, part in zip(foreign_names(table, canonical, prefix), arrays, strict=True):
            layer, _, leaf = name.rpartition(".")
            tensors[f"{layer}.base_layer.{leaf}" if layer in changes else name] = part
    return {_START + name: np.ascontiguousarray(x) for name, x in tensors.items()}, changes


def _table(
    adapter: Adapter, names: str, family: str | None, head: bool | None
) -> tuple[Format, str]:
    check_generation(names)
    family = adapter.family or family
    if family is None:
        raise CheckpointError(
            f"{adapter.place}: the names of this adapter do not say of which family its base model "
            "is. Name the base model (in a command, --base)."
        )
    with_head = adapter.family is not None if head is None else head
    return table_of(family, names, adapter.gated), family if with_head else ""


def adapter_table(
    adapter: Adapter, names: str, changes: Mapping[str, LowRank], layers: int | None = None
) -> dict[str, Any]:
    """The `adapter_config.json` for these names of the layers.

    Args:
        adapter: what is written.
        names: one of `names.GENERATIONS`.
        changes: name of a layer in the model -> its change.
        layers: number of blocks of the base model, where it is known.
    """
    settings, table = adapter.settings, dict(adapter.settings.table)
    if names == adapter.generation and all(
        (settings.rank_of(layer), settings.alpha_of(layer)) == (change.rank, change.alpha)
        for layer, change in changes.items()
    ):
        return table
    table["target_modules"] = _targets(settings, changes, layers)
    table["exclude_modules"] = table["layers_to_transform"] = table["layers_pattern"] = None
    for name, usual, own in (
        ("rank_pattern", settings.rank, {layer: c.rank for layer, c in changes.items()}),
        ("alpha_pattern", settings.alpha, {layer: c.alpha for layer, c in changes.items()}),
    ):
        table[name] = {layer: _whole(n) for layer, n in own.items() if n != usual}
    return table


def _whole(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def _targets(
    settings: LoraSettings, changes: Mapping[str, LowRank], layers: int | None
) -> list[str]:
    """Ends of names that mean exactly these layers, or their whole names."""
    blocks: dict[str, set[int]] = {}
    for name in changes:
        match = _NUMBER.search(name)
        kind = name if match is None else name[match.end() :]
        blocks.setdefault(kind, set()).update([] if match is None else [int(match[1])])
    bare = isinstance(settings.targets, tuple) and not any("." in t for t in settings.targets)
    numbers: set[int] = set().union(*blocks.values())
    every = set(range(layers if layers is not None else max(numbers, default=-1) + 1))
    all_blocks = (layers is not None or (bare and settings.layers is None)) and all(
        found in (set(), every) for found in blocks.values()
    )
    ends = {kind.rpartition(".")[2] for kind in blocks}
    # Three layers of a block end in "dense" in version 4.
    clear = len(ends) == len(blocks) and "dense" not in ends
    return sorted(ends) if all_blocks and clear else sorted(changes)


def write_adapter(
    folder: Any,
    adapter: Adapter,
    names: str = "transformers-4",
    *,
    family: str | None = None,
    head: bool | None = None,
    layers: int | None = None,
    base: str | None = None,
    beside: Mapping[str, str] | None = None,
    dtype: Any = None,
) -> list[Path]:
    """Write an adapter folder that PEFT loads.

    Args:
        folder: made if it is not there.
        adapter: what to write.
        names: "transformers-4" or "transformers-5": whose models it is to load into.
        family: `model_type` of the base model, where the adapter does not say it.
        head: whether the base model has a head; None takes what the adapter's names say.
        layers: number of blocks of the base model, where it is known.
        base: name of the base model; None keeps what the adapter says.
        beside: other files of the folder: name -> text.
        dtype: of the numbers; None keeps each.

    Raises:
        InputError: there is no such generation.
        CheckpointError: the base model has no such layer.
        MissingFileError: it cannot be written.
    """
    tensors, changes = adapter_tensors(adapter, names, family=family, head=head)
    table = adapter_table(adapter, names, changes, layers)
    if base is not None:
        table["base_model_name_or_path"] = base
    if dtype is not None:
        tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    text = json.dumps(table, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return save_checkpoint(
        folder,
        dict(sorted(tensors.items())),
        stem=WEIGHTS_NAMES[0].partition(".")[0],
        max_shard_size="1000GB",  # PEFT reads one file
        metadata={"format": "pt"},
        separator=".",
        replaces=WEIGHTS_NAMES[1:],
        beside={CONFIG_NAME: text, **(beside or {})},
    )


def same_adapters(a: Adapter, b: Adapter) -> Iterable[str]:
    """Names of what differs between two adapters, to the bit."""
    for name in sorted({*a.layers, *b.layers}):
        x, y = a.layers.get(name), b.layers.get(name)
        alike = x is not None and y is not None and x.scale == y.scale and x.rslora == y.rslora
        for part in ("a", "b", "magnitude", "bias"):
            alike = alike and _same(getattr(x, part), getattr(y, part))
        if not alike:
            yield name
    for name in sorted({*a.saved, *b.saved}):
        if not _same(a.saved.get(name), b.saved.get(name)):
            yield name


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    a, b = np.ascontiguousarray(a).reshape(-1), np.ascontiguousarray(b).reshape(-1)
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()
