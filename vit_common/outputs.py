"""What models return: dictionaries whose fields are also attributes and places of a tuple.

`output.logits`, `output["logits"]`, `output[0]` and `output[:2]` all work, and an output is a
`dict`, as `ModelOutput` of Transformers is. Fields that are None are attributes only: `keys()`,
`len()`, indices and `to_tuple()` leave them out. No framework is needed here; each framework's
package registers the classes as pytrees of its own.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, KeysView, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Self

_MISSING = object()


class _Keys(KeysView):
    """The names of the fields that are not None; also equal to the list of them."""

    def __eq__(self, other: object) -> bool:
        return list(self) == other if isinstance(other, list) else KeysView.__eq__(self, other)

    __hash__ = None  # type: ignore[assignment]


class _Given(dict):
    """Fields by name, given as one mapping or as pairs."""


def field_names(output: Any) -> tuple[str, ...]:
    """Names of the fields of an output class, in order."""
    return tuple(getattr(output, "__dataclass_fields__", ()))


class ModelOutput(OrderedDict):
    """Base of the output classes, which are dataclasses whose fields default to None.

    A field is set by attribute or by key, and None takes it out of the dictionary. Nothing else
    removes one: `del`, `pop`, `popitem`, `clear`, `setdefault` and `update` raise TypeError. A
    mapping, or pairs of name and value, may be given instead of the fields, as libraries do that
    rebuild a dictionary by `type(output)(...)`.

    Example:
        >>> output = ImageClassifierOutput(logits=[[0.1, 0.9]])
        >>> output.logits is output["logits"] is output[0]
        True
        >>> dict(output)
        {'logits': [[0.1, 0.9]]}
    """

    def __post_init__(self) -> None:
        names = field_names(type(self))
        first, *rest = (getattr(self, name) for name in names)
        given = _given_fields(first, names) if all(value is None for value in rest) else first
        if isinstance(given, _Given):
            self._set(names[0], None)
            for name, value in given.items():
                self._set(name, value)
            return
        for name, value in zip(names, (given, *rest), strict=True):
            self._set(name, value)

    @classmethod
    def from_fields(cls, values: Iterable[Any]) -> Self:
        """An output of one value for each field, in order, each taken as it is: the first is never
        read as a mapping of all of them. For pytrees, whose leaves may be anything."""
        output = cls.__new__(cls)
        for name, value in zip(field_names(cls), values, strict=True):
            object.__setattr__(output, name, value)
            if value is not None:
                OrderedDict.__setitem__(output, name, value)
        return output

    # -- as a dictionary and as a tuple

    def keys(self) -> KeysView:  # type: ignore[override]
        """Names of the fields that are not None, in order."""
        return _Keys(self)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(self.values())

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        new = copy.copy(self)
        for name, value in changes.items():
            if name not in field_names(type(self)):
                raise TypeError(
                    f"{type(self).__name__} has the fields {', '.join(field_names(type(self)))}; "
                    f"not {name!r}."
                )
            new._set(name, value)
        return new

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        value = self.get(key, _MISSING)
        if value is _MISSING:
            raise KeyError(f"{type(self).__name__} has {', '.join(self)}; not {key!r}")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in field_names(type(self)) or name in self:
            self._set(name, value)
        else:
            object.__setattr__(self, name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(key, str):
            raise TypeError(f"A field is set by its name; given {key!r}.")
        self._set(key, value)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if value is None:
            if name in self:
                OrderedDict.__delitem__(self, name)
            return
        new = name not in self
        OrderedDict.__setitem__(self, name, value)
        names = field_names(type(self))
        if new and name in names:  # fields keep their order, so that indices mean the same
            own = names[names.index(name) + 1 :]
            for later in [each for each in self if each in own or each not in names]:
                OrderedDict.move_to_end(self, later)

    def __delattr__(self, name: str) -> None:
        if name in field_names(type(self)):
            self._refuse()
        object.__delattr__(self, name)
        if name in self:
            OrderedDict.__delitem__(self, name)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"Fields of {type(self).__name__} cannot be removed or updated together: set one "
            "(`output.loss = None` takes it out), or make a copy by `output.replace(...)`."
        )

    __delitem__ = pop = popitem = clear = setdefault = update = move_to_end = _refuse
    __ior__ = _refuse

    def __or__(self, other: Any) -> Any:
        return dict(self.items()) | dict(other) if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other: Any) -> Any:
        return dict(other) | dict(self.items()) if isinstance(other, Mapping) else NotImplemented

    # -- copies

    def copy(self) -> Self:
        """A copy that shares the values."""
        return copy.copy(self)

    def __reduce__(self) -> Any:
        names = field_names(type(self))
        values = [getattr(self, name) for name in names]
        further = {name: value for name, value in vars(self).items() if name not in names}
        keys = [name for name in self if name not in names]
        return _rebuild, (type(self), values, further, keys)


def _rebuild(cls: Any, values: list[Any], further: dict[str, Any], keys: list[str]) -> Any:
    output = cls.from_fields(values)
    for name, value in further.items():
        object.__setattr__(output, name, value)
    for name in keys:
        OrderedDict.__setitem__(output, name, further[name])
    return output


def _given_fields(first: Any, names: tuple[str, ...]) -> Any:
    """`_Given` where `first`, the only value given, holds fields by name; else `first` itself (or,
    for an iterator, the list of its items)."""
    if isinstance(first, Mapping):
        pairs = [*first.items()]
        return _Given(pairs) if all(name in names for name, _ in pairs) else first
    if not isinstance(first, (list, tuple)) and not hasattr(first, "__next__"):
        return first
    given = first if isinstance(first, (list, tuple)) else list(first)
    named = [
        isinstance(each, (list, tuple)) and len(each) == 2 and isinstance(each[0], str)
        for each in given
    ]
    if not given and given is not first:
        return _Given()
    if not given or not named[0]:
        return given
    if not all(named):
        faulty = given[named.index(False)]
        raise ValueError(f"Fields must be given as pairs of name and value; given {faulty!r}.")
    return _Given(given)


@dataclass(eq=False)
class BaseModelOutput(ModelOutput):
    """`last_hidden_state` (B, S, D); `hidden_states` L+1 of (B, S, D); `attentions` L of
    (B, A, S, S), after the softmax."""

    last_hidden_state: Any = None
    hidden_states: Any = None
    attentions: Any = None


@dataclass(eq=False)
class BaseModelOutputWithPooling(ModelOutput):
    """`last_hidden_state` (B, S, D) after the final norm; `pooler_output` (B, pooler_output_size);
    `hidden_states` L+1 of (B, S, D), the last one before the final norm; `attentions` L of
    (B, A, S, S), after the softmax."""

    last_hidden_state: Any = None
    pooler_output: Any = None
    hidden_states: Any = None
    attentions: Any = None


@dataclass(eq=False)
class ImageClassifierOutput(ModelOutput):
    """`loss` () if labels were given; `logits` (B, K); the rest as `BaseModelOutput`."""

    loss: Any = None
    logits: Any = None
    hidden_states: Any = None
    attentions: Any = None


@dataclass(eq=False)
class CLIPVisionModelOutput(ModelOutput):
    """`image_embeds` (B, projection_dim), not normalised; the rest as `BaseModelOutput`."""

    image_embeds: Any = None
    last_hidden_state: Any = None
    hidden_states: Any = None
    attentions: Any = None


@dataclass(eq=False)
class CLIPTextModelOutput(ModelOutput):
    """`text_embeds` (B, projection_dim), not normalised; the rest as `BaseModelOutput`."""

    text_embeds: Any = None
    last_hidden_state: Any = None
    hidden_states: Any = None
    attentions: Any = None


@dataclass(eq=False)
class CLIPOutput(ModelOutput):
    """`loss` () if it was asked for; `logits_per_image` (images, texts), the scaled similarities,
    and `logits_per_text`, the same transposed; `text_embeds` and `image_embeds`, of length one;
    and what each tower returned."""

    loss: Any = None
    logits_per_image: Any = None
    logits_per_text: Any = None
    text_embeds: Any = None
    image_embeds: Any = None
    text_model_output: Any = None
    vision_model_output: Any = None

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order; the towers' outputs as tuples."""
        return tuple(
            value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values()
        )


@dataclass(eq=False)
class SiglipOutput(CLIPOutput):
    """As `CLIPOutput`; the logits are those of each pair by itself, for a sigmoid."""


@dataclass(eq=False)
class Siglip2Output(SiglipOutput):
    """As `SiglipOutput`."""


@dataclass(eq=False)
class MaskedImageModelingOutput(ModelOutput):
    """`loss` () if a mask was given; `reconstruction` (B, C, H, W); the rest as
    `BaseModelOutput`."""

    loss: Any = None
    reconstruction: Any = None
    hidden_states: Any = None
    attentions: Any = None


@dataclass(eq=False)
class DeiTForImageClassificationWithTeacherOutput(ModelOutput):
    """`logits` (B, K), the mean of `cls_logits` and `distillation_logits`, (B, K) each; the rest as
    `BaseModelOutput`."""

    logits: Any = None
    cls_logits: Any = None
    distillation_logits: Any = None
    hidden_states: Any = None
    attentions: Any = None


@dataclass(eq=False)
class MaskedLMOutput(ModelOutput):
    """`loss` () if labels were given; `logits` (B, N, vocab_size) of the patches; the rest as
    `BaseModelOutput`."""

    loss: Any = None
    logits: Any = None
    hidden_states: Any = None
    attentions: Any = None
