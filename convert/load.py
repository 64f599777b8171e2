"""From a name to canonical tensors that fit a model: what `from_pretrained` of both twins does."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_common.checks import check_keywords
from vit_common.config import CONFIG_NAME, FIELDS, FLOATS, ViTConfig, as_config, is_timm
from vit_common.errors import CheckpointError, ConfigError, some
from vit_common.families import CONFIG_CLASSES, DeiTConfig
from vit_common.files.checkpoint import Checkpoint
from vit_common.files.hub import HUB_OPTIONS, find_file
from vit_common.parameters import HEAD_PARAMETERS
from vit_convert.rules import Format, MappedTensor, unprefixed
from vit_convert.source import Source, config_from_dict, find_config, open_source

_SHOWN = 40
"""Names said in a message; the rest are counted."""


@dataclass
class Loaded:
    """Weights for a model, still in their file.

    Attributes:
        tensors: canonical name -> tensor, with the model's own `vit.` prefix, in the model's order.
        missing: names the file does not have; the caller draws them anew.
        path: the file they come from.
        format: its format.
    """

    tensors: dict[str, MappedTensor]
    missing: list[str]
    path: Path
    format: Format
    checkpoint: Checkpoint

    def close(self) -> None:
        """Close the file; tensors not read by now cannot be read any more."""
        self.checkpoint.close()


def read_config(
    name_or_path: Any,
    config: Any,
    hub: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    wanted: type[ViTConfig] | None = ViTConfig,
    format: str | None = None,
) -> tuple[Any, dict[str, Any], dict[str, Any] | None]:
    """The configuration of a model to load; the options that are not fields of it; and the
    `config.json` beside the weights, empty where there is none, None where it was not looked for.

    Args:
        name_or_path: where the weights are; `config.json` is looked for there, or beside a file.
            Where there is none, or timm's own, the weights say what the network is.
        config: a configuration (all options are then left over), or where to read it, or None.
        hub: options of the Hub.
        options: overrides of fields, mixed with others.
        wanted: the configuration's class; None takes any.
        format: of the weights, where it cannot be told.

    Raises:
        MissingFileError, ConfigError: as `ViTConfig.from_pretrained`.
        CheckpointError: the weights had to be looked at, and are refused.
    """
    if config is not None and not isinstance(config, (str, os.PathLike)):
        return (config if wanted is None else as_config(config, wanted)), dict(options), None
    place = name_or_path if config is None else config
    path, table = find_config(place, **hub)
    beside = (table or {}) if config is None else None
    if table is None and (config is not None or not _is_weights(place)):
        find_file(place, CONFIG_NAME, **hub)  # raises, saying where it looked
    if table is None or is_timm(table):
        fields = {name for cls in CONFIG_CLASSES.values() for name in cls.fields} | {"num_labels"}
        ours = {name: value for name, value in options.items() if name in fields}
        unused = {name: value for name, value in options.items() if name not in fields}
        with open_source(
            name_or_path, format=format, overrides=ours, beside=beside, **hub
        ) as source:
            settled = source.config
    else:
        table = {**table, "_name_or_path": str(place)}
        try:
            settled, unused = config_from_dict(table, return_unused_kwargs=True, **options)
            if "attn_implementation" in options:  # the model's own argument too
                unused["attn_implementation"] = options["attn_implementation"]
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    if wanted is not None:
        try:
            settled = as_config(settled, wanted)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
    return settled, unused, beside


def _is_weights(place: str | os.PathLike) -> bool:
    """Whether a place is a file that may hold weights, which say what they are."""
    return Path(place).is_file() and not str(place).endswith(".json")


def check_leftovers(
    cls: Any, leftovers: Mapping[str, Any], constructor: Iterable[str], config: Any
) -> None:
    """Raise InputError if keywords of `cls.from_pretrained` are for nothing it knows.

    Args:
        cls: the model's class.
        leftovers: what `read_config` left over.
        constructor: keywords of the constructor.
        config: the argument of that name; the fields of an object given there are not overridden.
    """
    parameters = inspect.signature(cls.from_pretrained).parameters.values()
    own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    constructor = list(constructor)
    unknown = [name for name in leftovers if name not in constructor]
    what, known = f"{cls.__name__}.from_pretrained", [*own, *constructor, *HUB_OPTIONS]
    if config is None or isinstance(config, (str, os.PathLike)):
        known += ["num_labels", *FIELDS]
    else:
        what += " (with a `config` object, whose fields it does not change)"
    check_keywords(what, unknown, [name for name in dict.fromkeys(known) if name not in unknown])


def load_parameters(
    name_or_path: Any,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    model: str,
    prefer: tuple[str, ...] | None = None,
    config: ViTConfig,
    beside: Mapping[str, Any] | None = None,
    allow_missing: bool = False,
    ignore_mismatched_sizes: bool = False,
    format: str | None = None,
    **hub: Any,
) -> Loaded:
    """Open the weights of a directory, file or Hub repository and fit them to a model.

    Args:
        name_or_path: directory, weights file, index of shards, or "owner/name".
        shapes: what the model needs, canonical name -> shape (`parameter_shapes`).
        model: name of the model's class, for messages.
        prefer: file names to look for before the others.
        config: the model's, held against what the format implies.
        beside: what `read_config` gave.
        allow_missing: take a file that lacks parameters of the network itself.
        ignore_mismatched_sizes: leave out parameters whose shape differs, as if missing.
        format: of the weights, where it cannot be told.
        **hub: options of the Hub.

    Warns:
        UserWarning: once, naming what is newly drawn, left aside or not matching, and fields of
            the config that networks in this format do not have.

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: it is corrupt or of another architecture; parameters of the network are
            missing; shapes do not match; weights are not floating point.
    """
    source = open_source(
        name_or_path, format=format, config=config, prefer=prefer, beside=beside, **hub
    )
    path = source.path
    try:
        loaded = _fit(source, shapes, model, allow_missing, ignore_mismatched_sizes)
    except CheckpointError as error:
        source.close()
        raise CheckpointError(f"{path}: {error}") from error
    odd = {
        field: value
        for field, value in loaded.format.settings.items()
        if getattr(config, field) != value
    }
    # A configuration beside the weights knows better than their format.
    if odd and not source.described:
        warnings.warn(
            f"{model} from {path}: networks in {loaded.format.name} layout have "
            + ", ".join(f"{field}={value!r}" for field, value in odd.items())
            + "; the config says "
            + ", ".join(f"{field}={getattr(config, field)!r}" for field in odd)
            + ". If this one is no exception, its outputs are slightly wrong.",
            UserWarning,
            stacklevel=4,
        )
    return loaded


def _fit(
    source: Source,
    shapes: Mapping[str, tuple[int, ...]],
    model: str,
    allow_missing: bool,
    ignore_mismatched_sizes: bool,
) -> Loaded:
    found = dict(source.mapped.tensors)
    if "embeddings.distillation_token" in found and not source.config.use_distillation_token:
        raise CheckpointError(
            f"these weights have a distillation token, which {model} does not. "
            + DeiTConfig.use_instead()
        )
    tensors: dict[str, MappedTensor] = {}
    missing, mismatched = [], []
    for name, shape in shapes.items():
        tensor = found.pop(unprefixed(name), None)
        if tensor is None:
            missing.append(name)
        elif tensor.shape != tuple(shape):
            mismatched.append(
                f"- {name}: found shape {tensor.shape} in the checkpoint and "
                f"{tuple(shape)} in the model"
            )
            missing.append(name)
        else:
            tensors[name] = tensor

    wrong = sorted({str(t.dtype) for t in tensors.values() if t.dtype.name not in FLOATS})
    if wrong:
        names = [name for name, t in tensors.items() if t.dtype.name not in FLOATS]
        raise CheckpointError(
            f"weights must be of dtype {', '.join(FLOATS)}; {some(names, _SHOWN)} are "
            f"{', '.join(wrong)}."
        )
    if mismatched and not ignore_mismatched_sizes:
        raise CheckpointError(
            f"the shapes did not match {model}:\n" + "\n".join(mismatched) + "\nGive the "
            "configuration these weights were made with, or pass `ignore_mismatched_sizes=True` "
            "to draw these parameters anew."
        )
    network = [
        name
        for name in missing
        if not unprefixed(name).startswith(HEAD_PARAMETERS)
        and not any(line.startswith(f"- {name}:") for line in mismatched)
    ]
    if network and not allow_missing:
        raise CheckpointError(
            f"{len(network)} of the {len(shapes)} parameters that {model} needs are missing: "
            f"{some(network, 12)}. Pass `allow_missing=True` to draw them at random."
        )
    _say(source.path, model, missing, sorted([*found, *source.unexplained]), mismatched)
    return Loaded(tensors, missing, source.path, source.table, source.checkpoint)


def _say(path, model, missing, unexpected, mismatched) -> None:
    parts = []
    if mismatched:
        parts.append(
            "newly initialized because the shapes did not match:\n" + "\n".join(mismatched)
        )
    fresh = [name for name in missing if not any(m.startswith(f"- {name}:") for m in mismatched)]
    if fresh:
        parts.append(
            f"not in the checkpoint and newly initialized, so train them: {some(fresh, _SHOWN)}"
        )
    if unexpected:
        parts.append(f"in the checkpoint and not used: {some(unexpected, _SHOWN)}")
    if parts:
        warnings.warn(f"{model} from {path}: " + ". ".join(parts) + ".", UserWarning, stacklevel=5)


def warn_if_not_finite(path: Path, bad: list[str]) -> None:
    """Name the parameters that hold NaN or infinity, in one warning."""
    if bad:
        warnings.warn(
            f"{path}: weights hold NaN or infinity, so outputs will too: {some(bad, _SHOWN)}.",
            UserWarning,
            stacklevel=4,
        )


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite; one cheap pass when all is well."""
    # A sum is NaN or infinite if any element is; the exact test runs only when it is not finite,
    # since a sum can also overflow. Half precision is summed in float32.
    accumulate = (
        np.promote_types(array.dtype, np.float32) if array.dtype.kind == "f" else np.float32
    )
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.add.reduce(array, axis=None, dtype=accumulate)):
            return True
        return bool(np.isfinite(array).all())
