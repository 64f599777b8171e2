"""The engine: a format is a table of rules, and this is the only code that reads such a table.

Strict accounting holds in both directions: every key of the source is used once or named as
unused, every target is filled once, every shape is equal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from vit_common.errors import CheckpointError
from vit_common.parameters import TOP_PARAMETERS
from vit_common.positions import RelativeRule
from vit_convert.layouts import KEEP, Arrays, Layout, result_shapes

PREFIXES = ("vit", "deit", "beit", "dinov2", "dinov2_with_registers")
"""What models with a head put before the names of the network under it, one for each family."""


class TensorLike(Protocol):
    """What the engine needs of an array that may still lie in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def read(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Rule:
    """One row of a format's table: which foreign keys hold which canonical parameters.

    `{i}` in a name stands for the index of a block. Several names on either side belong together
    through the layout.
    """

    foreign: str | tuple[str, ...]
    canonical: str | tuple[str, ...]
    layout: Layout = KEEP

    @property
    def foreign_names(self) -> tuple[str, ...]:
        return (self.foreign,) if isinstance(self.foreign, str) else self.foreign

    @property
    def canonical_names(self) -> tuple[str, ...]:
        return (self.canonical,) if isinstance(self.canonical, str) else self.canonical


def _fill(name: str, index: str | None) -> str:
    return name if index is None else name.replace("{i}", index)


@dataclass(frozen=True)
class Format:
    """A checkpoint layout of one family.

    Attributes:
        name: how users call the layout; several families can have one of that name.
        rules: the table. Canonical names are without what a model with a head puts before the
            names of the network under it ("vit.", "deit.", ...).
        families: `model_type` of the configurations whose weights it holds.
        separator: what stands between the parts of a foreign key.
        prefixed: whether foreign files of a model with a head put the family's prefix before the
            names of the network under it; read with and without.
        only_with_prefix: (start of a key, its replacement) for keys of a head that have the name of
            a parameter of the network, and differ by having no prefix.
        respelled: (pattern, replacement) for keys with a part that says nothing.
        ignored: (pattern, reason) of keys that hold no weights of the network.
        requires: foreign names without which a file is not in this format.
        settings: fields of the config that networks in this format have, where they differ from
            the defaults of the family.
        relative_resize: how relative positions of networks in this format are resampled.
        root: what files in this format have before every name.
        written: whether files in this format can be written.
        describes: one line for messages.
    """

    name: str
    rules: tuple[Rule, ...]
    families: tuple[str, ...] = ("vit",)
    separator: str = "."
    prefixed: bool = False
    only_with_prefix: tuple[tuple[str, str], ...] = ()
    respelled: tuple[tuple[str, str], ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()
    requires: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    relative_resize: RelativeRule = "bilinear"
    root: str = ""
    written: bool = True
    describes: str = ""

    @cached_property
    def _by_foreign(self) -> dict[str, Rule]:
        return {name: rule for rule in self.rules[::-1] for name in rule.foreign_names}

    @cached_property
    def _by_canonical(self) -> dict[str, Rule]:
        return {name: rule for rule in self.rules[::-1] for name in rule.canonical_names}

    def rule_for_foreign(self, key: str) -> tuple[Rule, str | None] | None:
        """The rule and the block index for a foreign key without wrapper and prefix."""
        return _lookup(self._by_foreign, key)

    def rule_for_canonical(self, name: str) -> tuple[Rule, str | None] | None:
        """The rule and the block index for a canonical name without prefix."""
        return _lookup(self._by_canonical, name)

    def why_ignored(self, key: str) -> str | None:
        """Why a foreign key without prefix is left aside, or None."""
        return next((why for pattern, why in self.ignored if re.fullmatch(pattern, key)), None)

    def strip(self, keys: Iterable[str]) -> dict[str, str]:
        """Key as the table has it -> key as the file has it.

        Raises:
            CheckpointError: two keys of the file become the same.
        """
        keys = list(keys)
        prefix = _family_prefix(keys, self.separator) if self.prefixed else ""
        out: dict[str, str] = {}
        twice: list[str] = []
        for key in keys:
            bare = key.removeprefix(prefix)
            if prefix and bare == key:
                for start, replacement in self.only_with_prefix:
                    if bare.startswith(start):
                        bare = replacement + bare[len(start) :]
            for pattern, replacement in self.respelled:
                bare = re.sub(pattern, replacement, bare)
            if bare in out:
                twice.append(f"{out[bare]!r} and {key!r}")
            out[bare] = key
        if twice:
            raise CheckpointError(f"two keys name the same parameter: {'; '.join(twice)}.")
        return out


def _family_prefix(keys: Iterable[str], separator: str) -> str:
    """What a model with a head put before its network's names: "vit.", "deit.", ...; or ""."""
    for key in keys:
        start = key.partition(separator)[0]
        if start in PREFIXES:
            return start + separator
    return ""


def unprefixed(name: str) -> str:
    """A canonical name without what a model with a head puts before it."""
    start, dot, rest = name.partition(".")
    return rest if dot and start in PREFIXES else name


# A part of a name that is the index of a block.
_INDEX = re.compile(r"(?<![^./_])(0|[1-9]\d{0,4})(?![^./])")


def _lookup(table: Mapping[str, Rule], key: str) -> tuple[Rule, str | None] | None:
    """The rule for a name, and the index that stands at its `{i}`."""
    if key in table:
        return (table[key], None) if "{i}" not in key else None
    for match in _INDEX.finditer(key):
        rule = table.get(f"{key[: match.start()]}{{i}}{key[match.end() :]}")
        if rule is not None:
            return rule, match[1]
    return None


class _Group:
    """The arrays one rule makes; those of a fused one are read once and handed out one by one."""

    def __init__(
        self,
        apply: Callable[[Arrays], Arrays],
        sources: tuple[TensorLike, ...],
        axes: tuple[int, ...] | None = None,
    ) -> None:
        self._apply = apply
        self._sources = sources
        self._axes = axes if len(sources) == 1 else None
        self._ready: dict[int, np.ndarray] = {}

    @property
    def has_parts(self) -> bool:
        """Whether a part of the one array it makes is a part of the one it is made of."""
        return self._axes is not None and getattr(self._sources[0], "has_parts", False)

    def take_part(self, index: tuple[slice, ...]) -> np.ndarray:
        """A part of that array."""
        (source,) = self._sources
        there = list(index)
        for axis, origin in enumerate(self._axes or ()):
            there[origin] = index[axis]
        part: np.ndarray = source.read_part(tuple(there))  # type: ignore[attr-defined]
        return self._apply([part])[0]

    def take(self, position: int) -> np.ndarray:
        if position not in self._ready:
            self._ready = dict(enumerate(self._apply([s.read() for s in self._sources])))
        return self._ready.pop(position)


class MappedTensor:
    """One array of the target, not yet read: a place in the result of a rule's layout."""

    __slots__ = ("_group", "_position", "dtype", "shape")

    def __init__(
        self, group: _Group, position: int, shape: tuple[int, ...], dtype: np.dtype
    ) -> None:
        self._group = group
        self._position = position
        self.shape = shape
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The array; a view of what the source read where the layout allows it."""
        return self._group.take(self._position)

    @property
    def has_parts(self) -> bool:
        """Whether `read_part` reads less than the whole."""
        return self._group.has_parts

    def read_part(self, index: tuple[slice, ...]) -> np.ndarray:
        """`read()[index]`, for a slice with a step of one for each axis; without the rest in memory
        where the file and the layout allow it."""
        return self._group.take_part(index) if self.has_parts else self.read()[index]


@dataclass
class Mapped:
    """What a table made of a file: the mapped tensors, and the source keys that no rule took."""

    tensors: dict[str, MappedTensor]
    unused: list[str]


def to_canonical(source: Mapping[str, TensorLike], table: Format) -> Mapped:
    """Map a foreign file onto canonical names (without the `vit.` prefix).

    Raises:
        CheckpointError: part of a fused group is missing, two keys claim one parameter, or an
            array does not have the shape its rule asks for; all of them in one message.
    """
    bare = table.strip(source)
    return _map(
        {name: source[key] for name, key in bare.items()},
        bare,
        table.rule_for_foreign,
        lambda rule: (rule.foreign_names, rule.canonical_names),
        lambda layout: (layout.to_canonical, layout.foreign_rank, layout.axes),
    )


def to_foreign(source: Mapping[str, TensorLike], table: Format) -> Mapped:
    """Map canonical names (with or without their prefix) onto the keys of a format.

    Where the source has a prefix and the format knows one, the result has the same.

    Raises:
        CheckpointError: as `to_canonical`.
    """
    bare = {unprefixed(name): name for name in source}
    result = _map(
        {name: source[full] for name, full in bare.items()},
        bare,
        table.rule_for_canonical,
        lambda rule: (rule.canonical_names, rule.foreign_names),
        lambda layout: (layout.to_foreign, layout.canonical_rank, layout.inverse_axes),
    )
    prefix = _family_prefix(source, ".")
    if not (prefix and table.prefixed):
        return result
    separator = table.separator
    tensors = {}
    for name, tensor in result.tensors.items():
        parts = name.replace(separator, ".")
        if parts.startswith(TOP_PARAMETERS):
            for theirs, ours in table.only_with_prefix:
                if name.startswith(ours):
                    name = theirs + name[len(ours) :]
        else:
            name = prefix[:-1] + separator + name
        tensors[name] = tensor
    return Mapped(tensors, result.unused)


def _map(source, original, find, sides, direction) -> Mapped:
    tensors: dict[str, MappedTensor] = {}
    unused: list[str] = []
    faults: list[str] = []
    done: set[tuple[int, str | None]] = set()
    for name in source:
        found = find(name)
        if found is None:
            unused.append(original[name])
            continue
        rule, index = found
        if (id(rule), index) in done:
            continue
        done.add((id(rule), index))
        inputs, outputs = sides(rule)
        inputs = [_fill(n, index) for n in inputs]
        absent = [n for n in inputs if n not in source]
        if absent:
            faults.append(f"{original[name]!r} is there but {', '.join(absent)} is not")
            continue
        sources = tuple(source[n] for n in inputs)
        function, rank, axes = direction(rule.layout)
        shapes = [tuple(s.shape) for s in sources]
        if rank is not None and any(len(shape) != rank for shape in shapes):
            given = " and ".join(map(str, shapes))
            faults.append(f"{original[name]!r} must have {rank} dimensions; its shape is {given}")
            continue
        try:
            made = result_shapes(function, shapes)
        except ValueError as error:
            faults.append(f"{original[name]!r}: {error}")
            continue
        if len({s.dtype for s in sources}) > 1:
            faults.append(f"{', '.join(inputs)} must have one dtype")
            continue
        group = _Group(function, sources, axes)
        for position, (output, shape) in enumerate(zip(outputs, made, strict=True)):
            target = _fill(output, index)
            if target in tensors:
                faults.append(f"{target} is filled twice, the second time by {original[name]!r}")
            tensors[target] = MappedTensor(group, position, shape, sources[0].dtype)
    if faults:
        raise CheckpointError("the file does not fit its format: " + "; ".join(faults) + ".")
    return Mapped(tensors, unused)
