"""The engine: maps tensors by the rules of a format's table, in either direction.

Strict accounting holds in both directions: every key of the source is used once or named as
unused, every target is filled once, every shape is equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vit_common.errors import CheckpointError
from vit_common.parameters import TOP_PARAMETERS
from vit_convert.formats.format import PREFIXES, Format, Rule, family_prefix, fill, unprefixed
from vit_convert.layouts import Arrays, result_shapes

__all__ = [
    "PREFIXES",
    "Format",
    "Mapped",
    "MappedTensor",
    "Rule",
    "TensorLike",
    "as_mapped",
    "to_canonical",
    "to_foreign",
    "unprefixed",
]


class TensorLike(Protocol):
    """What the engine needs of an array that may still lie in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def read(self) -> np.ndarray: ...


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


def as_mapped(tensor: TensorLike) -> MappedTensor:
    """A tensor as it is, among those that a table mapped."""
    group = _Group(lambda arrays: arrays, (tensor,), ())
    return MappedTensor(group, 0, tuple(tensor.shape), tensor.dtype)


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
    prefix = family_prefix(source, ".")
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
        inputs = [fill(n, index) for n in inputs]
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
            target = fill(output, index)
            if target in tensors:
                faults.append(f"{target} is filled twice, the second time by {original[name]!r}")
            tensors[target] = MappedTensor(group, position, shape, sources[0].dtype)
    if faults:
        raise CheckpointError("the file does not fit its format: " + "; ".join(faults) + ".")
    return Mapped(tensors, unused)
