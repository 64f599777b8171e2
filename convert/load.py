"""From a name to canonical tensors that fit a model: what `from_pretrained` of both twins does."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
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
from vit_convert.leftovers import (
    ATTENTION_POOLING,
    CLASSIFIERS,
    Kind,
    check_patterns,
    classes_of,
    is_ignored,
    kind_of,
)
from vit_convert.rules import MappedTensor, unprefixed
from vit_convert.source import Source, open_source

_SHOWN = 40
"""Names said in a message; the rest are counted."""
_LISTED = 10
"""Shapes listed in an error, a line each; the rest are counted."""


@dataclass
class Loaded:
    """Weights for a model, still in their file.

    Attributes:
        tensors: canonical name -> tensor, with the model's own `vit.` prefix, in the model's order.
        missing: names the file does not have, or in another shape; the caller draws them anew.
        unexpected: names in the file that the model has no place for.
        mismatched: names of other shapes, with that in the file and that in the model.
    """

    tensors: dict[str, MappedTensor]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]

    @property
    def info(self) -> dict[str, list]:
        """What `output_loading_info=True` gives, as Transformers 4.57.6 names it."""
        other = [name for name, *_ in self.mismatched]
        return {
            "missing_keys": [name for name in self.missing if name not in other],
            "unexpected_keys": self.unexpected,
            "mismatched_keys": other,
            "error_msgs": [],
        }


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
        adapter = rest.pop("adapter", None)
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
            adapter=adapter,
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
    what, known = f"{model.__name__}.from_pretrained", [*own, *constructor, "adapter", *HUB_OPTIONS]
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
    ignore: Iterable[str] = (),
    own: Iterable[str] = (),
) -> Loaded:
    """Fit the weights of a source to a model; see `vit_convert.leftovers` for what may be left
    over and what may be missing.

    Args:
        source: the opened checkpoint.
        shapes: what the model needs, canonical name -> shape (`parameter_shapes`).
        model: name of the model's class, for messages.
        config: the model's, held against what the format implies.
        allow_missing: take a file that lacks parameters of the network itself.
        ignore_mismatched_sizes: draw parameters anew that have another shape in the file.
        ignore: regular expressions of names in the file that may be left over.
        own: names of `shapes` that are of a subclass's own parts: they are read under the same
            names, and may be missing.

    Warns:
        UserWarning: once, naming what is newly drawn, left aside or not matching, and fields of
            the config that networks in this format do not have.

    Raises:
        CheckpointError: the weights are of another architecture; parameters of the network are
            missing, or some of the file's would be left over; shapes do not match; weights are
            not floating point.
        InputError: `ignore` holds what is no regular expression.
    """
    path = source.path
    fit = _Fit(source, shapes, model, allow_missing, ignore_mismatched_sizes, ignore, own)
    try:
        loaded = fit.check()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    fit.warn()
    settings = source.table.settings
    odd = {field: value for field, value in settings.items() if getattr(config, field) != value}
    # A configuration beside the weights knows better than their format.
    if source.timm is not None:  # its name of the network says these
        odd = {n: v for n, v in odd.items() if n not in ("layer_norm_eps", "position_resize")}
    if odd and not source.described:
        warn(
            f"{model} from {path}: networks in {source.table.name} layout have "
            + ", ".join(f"{field}={value!r}" for field, value in odd.items())
            + "; the config says "
            + ", ".join(f"{field}={getattr(config, field)!r}" for field in odd)
            + ". Unless this network is an exception, its outputs are slightly wrong."
        )
    return loaded


class _Fit:
    """The tensors of a source beside the parameters of a model."""

    def __init__(
        self,
        source: Source,
        shapes: Mapping[str, tuple[int, ...]],
        model: str,
        allow_missing: bool,
        ignore_mismatched_sizes: bool,
        ignore: Iterable[str],
        own: Iterable[str] = (),
    ) -> None:
        self.source, self.shapes, self.model = source, shapes, model
        self.own = frozenset(own)
        self.allow_missing = allow_missing
        self.ignore_mismatched_sizes = ignore_mismatched_sizes
        self.ignore = check_patterns(ignore)
        found = dict(source.mapped.tensors)
        by_itself = {name for name in self.own if name in source.checkpoint}
        if by_itself:  # what the format makes of such a name is not meant
            names = {n: source.names_in_file(n) for n in found}
            found = {
                n: tensor
                for n, tensor in found.items()
                if by_itself.isdisjoint(names[n])
                and (names[n] or not n.startswith("classifier."))  # found under another name
            }
        self.tensors: dict[str, Any] = {}
        self.missing: list[str] = []
        self.mismatched: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            tensor: Any
            if name in self.own:
                tensor = source.checkpoint[name] if name in by_itself else None
            else:
                tensor = found.pop(unprefixed(name), None)
            if tensor is not None and tuple(tensor.shape) == tuple(shape):
                self.tensors[name] = tensor
                continue
            self.missing.append(name)
            if tensor is not None:
                self.mismatched[name] = tuple(tensor.shape)
        pooler = source.config.pooler_type
        # To a model of texts alone, the image tower is what a text tower is to one of images.
        texts = all(name.startswith(("text_model.", "text_projection.")) for name in shapes)
        self.left: dict[str, Kind] = {
            name: "task" if texts else kind_of(name, tensor, canonical=True, pooler=pooler)
            for name, tensor in found.items()
        }
        unexplained = [name for name in source.unexplained if name not in by_itself]
        for name in unexplained:
            outside = not name.startswith(source.prefix)
            self.left[name] = kind_of(name, source.checkpoint[name], outside=outside)
        self.names = {name: (name, *source.names_in_file(name)) for name in found}
        self.left_tensors: dict[str, Any] = {
            **found,
            **{n: source.checkpoint[n] for n in unexplained},
        }

    def _is_ignored(self, name: str) -> bool:
        return is_ignored(self.ignore, *self.names.get(name, (name,)))

    def _in_file(self, name: str) -> str:
        """What the file calls a tensor that is left over."""
        return " and ".join(self.names.get(name, (name, name))[1:])

    def check(self) -> Loaded:
        """What fits; CheckpointError if the rest is not what the caller can want."""
        self._check_kinds()
        if self.mismatched and not self.ignore_mismatched_sizes:
            raise CheckpointError(
                f"the shapes did not match {self.model}. Give the configuration these weights were "
                "made with, or in Python pass `ignore_mismatched_sizes=True` to draw these "
                f"parameters anew:\n{self._mismatches()}"
            )
        may_lack: tuple[str, ...] = HEAD_PARAMETERS
        if any(unprefixed(name).startswith(ATTENTION_POOLING) for name in self.tensors):
            may_lack = tuple(start for start in may_lack if start != "pooler.")
        network = [
            name
            for name in self.missing
            if not unprefixed(name).startswith(may_lack)
            and name not in self.mismatched
            and (name not in self.own or not self.tensors)
        ]
        if network and not self.allow_missing:
            raise CheckpointError(
                f"{len(network)} of the {len(self.shapes)} parameters that {self.model} needs are "
                f"missing: {some(network, 12)}. Pass `allow_missing=True` to draw them at random."
            )
        self._check_network()
        self._check_heads()
        return Loaded(
            self.tensors,
            self.missing,
            sorted(file for name in self.left for file in self.names.get(name, (name, name))[1:]),
            [(name, shape, tuple(self.shapes[name])) for name, shape in self.mismatched.items()],
        )

    def _check_kinds(self) -> None:
        config = self.source.config
        token = "embeddings.distillation_token" in self.source.mapped.tensors
        if token and not config.use_distillation_token:
            raise CheckpointError(
                f"these weights have a distillation token, which {self.model} does not. "
                + DeiTConfig.use_instead()
            )
        wrong = [
            name
            for name, tensor in self.tensors.items()
            if tensor.dtype.name not in FLOATS and name not in self.own  # buffers can hold counts
        ]
        if wrong:
            dtypes = sorted({str(self.tensors[name].dtype) for name in wrong})
            raise CheckpointError(
                f"weights must be of dtype {', '.join(FLOATS)}; {some(wrong, _SHOWN)} are "
                f"{', '.join(dtypes)}."
            )

    def _check_network(self) -> None:
        """Raise CheckpointError if something is left over that changes what the network gives."""
        source, depth = self.source, self.source.config.num_hidden_layers
        fewer = "num_hidden_layers" in source.given or source.config_given
        over = []
        for name, kind in self.left.items():
            block = re.match(r"encoder\.layer\.(\d+)\.", name)
            cut = fewer and block is not None and int(block[1]) >= depth
            if kind == "network" and not cut and not self._is_ignored(name):
                over.append(name)
        if over:
            count, have = f"{len(over)} tensors", "have"
            if len(over) == 1:
                count, have = "1 tensor", "has"
            over = [
                f"{name} ({source.parts[name]})" if name in source.parts else self._in_file(name)
                for name in sorted(over)
            ]
            raise CheckpointError(
                f"{count} of the network in this file {have} no place in {self.model}, "
                f"so its outputs would be wrong: {some(over, 12)}. If they may be left "
                "out, pass `ignore=` (in a command, --ignore) with regular expressions of their "
                "names; if the "
                "configuration is not that of these weights, give the right one."
            )

    def _check_heads(self) -> None:
        """Raise CheckpointError if a trained head is left over where a classifier is wanted."""
        wanted = [n for n in self.shapes if n.startswith(CLASSIFIERS) and n not in self.own]
        drawn = [name for name in wanted if name in self.missing and name not in self.mismatched]
        heads = {
            name: self.left_tensors[name]
            for name, kind in self.left.items()
            # Next to a classifier that was found, another one of a known name does no harm.
            if kind == "head" and (drawn or name in self.source.unexplained)
            if not self._is_ignored(name)
        }
        if not wanted or not heads or self.ignore_mismatched_sizes or self.allow_missing:
            return
        labels = self.source.given.get("num_labels") or len(self.source.given.get("id2label") or ())
        if labels and labels not in classes_of(heads):
            return  # another task
        names = ", ".join(
            f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(heads.items())[:12]
        )
        if {"cls_classifier.weight", "distillation_classifier.weight"} <= heads.keys():
            hint = "These are the two heads of a distilled DeiT: load it with an Auto class, or "
            hint += "`...ForImageClassificationWithTeacher`."
        elif drawn:
            hint = "Rename the head's tensors to `head.weight` and `head.bias` if it is one linear "
            hint += "layer."
        else:
            hint = "A head of several layers cannot be loaded."
        what = f"would draw {some(drawn, 4)} at random, though" if drawn else "has no place for all"
        joined = "this file holds what looks like a trained head" if drawn else "of the head here"
        raise CheckpointError(
            f"{self.model} {what} {joined}: {names}. {hint} To leave it aside, pass "
            "`num_labels=` of a new task, `ignore_mismatched_sizes=True`, or `ignore=` (in a "
            "command, --ignore) with regular expressions of these names."
        )

    def _mismatches(self) -> str:
        """The first parameters of another shape, a line for each, and how many more there are."""
        lines = [
            f"- {name}: found shape {shape} in the checkpoint and {tuple(self.shapes[name])} in "
            "the model"
            for name, shape in self.mismatched.items()
        ]
        if more := len(lines[_LISTED:]):
            lines[_LISTED:] = [f"- and {more} more"]
        return "\n".join(lines)

    def warn(self) -> None:
        """One warning of what is drawn anew and what is left aside."""
        parts = []
        fresh = [name for name in self.missing if name not in self.mismatched]
        if fresh:
            parts.append(
                f"not in the checkpoint and newly initialized, so train them: {some(fresh, _SHOWN)}"
            )
        if self.source.classifier and "classifier.weight" in self.tensors:
            parts.append(f"taken as the classifier: {self.source.classifier}")
        left = [name for name in sorted(self.left) if not self._is_ignored(name)]
        if left:
            parts.append(f"in the checkpoint and not used: {some(left, _SHOWN)}")
        if self.mismatched:  # a list of lines, so it comes last
            parts.append(
                "newly initialized because the shapes did not match:\n" + self._mismatches()
            )
        if parts:
            warn(
                f"{self.model} from {self.source.path}: "
                + ". ".join(parts)
                + ("" if self.mismatched else ".")
            )


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
