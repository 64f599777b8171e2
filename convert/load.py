"""From a name to canonical tensors that fit a model: what `from_pretrained` of both twins does."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vit_common.checks import check_keywords
from vit_common.config import FIELDS, FLOATS, ViTConfig
from vit_common.errors import CheckpointError, some, warn
from vit_common.families import DeiTConfig
from vit_common.files.hub import HUB_OPTIONS, split_hub_options
from vit_common.parameters import HEAD_PARAMETERS
from vit_convert.rules import MappedTensor, unprefixed
from vit_convert.source import Source, open_source

_SHOWN = 40
"""Names said in a message; the rest are counted."""


@dataclass
class Loaded:
    """Weights for a model, still in their file.

    Attributes:
        tensors: canonical name -> tensor, with the model's own `vit.` prefix, in the model's order.
        missing: names the file does not have; the caller draws them anew.
    """

    tensors: dict[str, MappedTensor]
    missing: list[str]


class Loadable:
    """What the models and the `Auto` classes of both twins have in common: a checkpoint is opened
    once, by `from_pretrained`, and `from_source` makes a model of it.

    Attributes:
        _preferred_files: keyword of `from_pretrained` that prefers weights in another layout where
            there are several, and the names of their files.
        _without_effect: keywords of Transformers 4.57.6 -> values that ask for what happens anyway.
    """

    _preferred_files: ClassVar[tuple[str, tuple[str, ...]]] = ("", ())
    _without_effect: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @classmethod
    def _loading_keywords(cls) -> list[str]:
        """Keywords of `from_source`, less those of the constructor."""
        kinds = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = inspect.signature(cls.from_source).parameters.values()
        return [p.name for p in parameters if p.kind in kinds and p.name != "source"]

    @classmethod
    def _constructor_keywords(cls) -> list[str]:
        """Keywords of the constructor."""
        return list(inspect.signature(cls).parameters)[1:]

    @classmethod
    def open_pretrained(
        cls,
        name_or_path: Any,
        options: Mapping[str, Any],
        *,
        wanted: type[ViTConfig] | None = None,
        choose: Callable[[ViTConfig], Any] | None = None,
    ) -> tuple[Source, dict[str, Any]]:
        """Open the checkpoint of a `from_pretrained` call.

        Args:
            name_or_path: directory, weights file, or "owner/name".
            options: all keywords of the call.
            wanted: class of the configuration; None takes any family's.
            choose: the model's class for a configuration; None means this class.

        Returns:
            The source, to be closed by the caller, and the keywords of `from_source`.

        Raises:
            InputError: a keyword is not known.
            MissingFileError, ConfigError, CheckpointError: as `open_source`.
        """
        hub, rest = split_hub_options(options)
        for name, same in cls._without_effect.items():
            if name in rest and rest[name] in same:
                del rest[name]
        flag, files = cls._preferred_files
        prefer = files if rest.pop(flag, False) else None
        config, format = rest.pop("config", None), rest.pop("format", None)
        loading = {name: rest.pop(name) for name in cls._loading_keywords() if name in rest}

        def accept(settled: ViTConfig, left_over: Mapping[str, Any]) -> None:
            check_left_over(cls if choose is None else choose(settled), left_over, config)

        source = open_source(
            name_or_path,
            format=format,
            config=config,
            overrides=rest,
            wanted=wanted,
            prefer=prefer,
            accept=accept,
            **hub,
        )
        return source, loading

    @classmethod
    def from_source(cls, source: Source, **kwargs: Any) -> Any:
        """A model of an opened checkpoint, which stays open."""
        raise NotImplementedError


def check_left_over(model: Any, left_over: Mapping[str, Any], config: Any) -> None:
    """Raise InputError if keywords of `model.from_pretrained` are nothing that it knows.

    Args:
        model: the model's class.
        left_over: keywords that are no fields of the configuration.
        config: the argument of that name; the fields of an object given there are not overridden.
    """
    constructor = model._constructor_keywords()
    unknown = [name for name in left_over if name not in constructor]
    parameters = inspect.signature(model.from_pretrained).parameters.values()
    own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    what, known = f"{model.__name__}.from_pretrained", [*own, *constructor, *HUB_OPTIONS]
    if config is None or isinstance(config, (str, os.PathLike)):
        known += ["num_labels", *FIELDS]
    else:
        what += " (with a `config` object, whose fields it does not change)"
    check_keywords(what, unknown, [name for name in dict.fromkeys(known) if name not in unknown])


def load_parameters(
    source: Source,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    model: str,
    config: ViTConfig,
    allow_missing: bool = False,
    ignore_mismatched_sizes: bool = False,
) -> Loaded:
    """Fit the weights of a source to a model.

    Args:
        source: the opened checkpoint.
        shapes: what the model needs, canonical name -> shape (`parameter_shapes`).
        model: name of the model's class, for messages.
        config: the model's, held against what the format implies.
        allow_missing: take a file that lacks parameters of the network itself.
        ignore_mismatched_sizes: leave out parameters whose shape differs, as if missing.

    Warns:
        UserWarning: once, naming what is newly drawn, left aside or not matching, and fields of
            the config that networks in this format do not have.

    Raises:
        CheckpointError: the weights are of another architecture; parameters of the network are
            missing; shapes do not match; weights are not floating point.
    """
    path = source.path
    try:
        loaded = _fit(source, shapes, model, allow_missing, ignore_mismatched_sizes)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    settings = source.table.settings
    odd = {field: value for field, value in settings.items() if getattr(config, field) != value}
    # A configuration beside the weights knows better than their format.
    if odd and not source.described:
        warn(
            f"{model} from {path}: networks in {source.table.name} layout have "
            + ", ".join(f"{field}={value!r}" for field, value in odd.items())
            + "; the config says "
            + ", ".join(f"{field}={getattr(config, field)!r}" for field in odd)
            + ". Unless this network is an exception, its outputs are slightly wrong."
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
    return Loaded(tensors, missing)


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
        warn(f"{model} from {path}: " + ". ".join(parts) + ".")


def warn_if_not_finite(path: Path, bad: list[str]) -> None:
    """Name the parameters that hold NaN or infinity, in one warning."""
    if bad:
        warn(f"{path}: weights hold NaN or infinity, so outputs will too: {some(bad, _SHOWN)}.")


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
