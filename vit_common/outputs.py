"""What models return: dataclasses that also read as mappings and as tuples.

`output.logits`, `output["logits"]`, `output[0]` and `output[:2]` all work. Fields that are None
are not there for `keys()`, indices and `to_tuple()`, as in Transformers. Each framework's package
registers its own subclasses as pytrees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any


class ModelOutput:
    """Base of the output dataclasses."""

    def keys(self) -> list[str]:
        """Names of the fields that are not None, in order."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]  # type: ignore[arg-type]

    def values(self) -> list[Any]:
        """The fields that are not None, in order."""
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """Pairs of name and value of the fields that are not None."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def get(self, name: str, default: Any = None) -> Any:
        """The field of that name, or `default` where it is None or unknown."""
        return getattr(self, name) if name in self else default

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None."""
        return tuple(self.values())

    def replace(self, **changes: Any):
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[type-var]

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(f"{type(self).__name__} has {', '.join(self.keys())}; not {key!r}")
            return getattr(self, key)
        return self.to_tuple()[key]

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


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
