"""What of a checkpoint may be left over: one rule, for `from_pretrained` and for `convert`.

No load is silently wrong or partly random. What is left over of a file, when every parameter of the
model has been looked for, is of one of these kinds:

| kind      | what it is                                                 | base model | head of another kind | classifier                 | `convert`  |
|-----------|------------------------------------------------------------|------------|----------------------|----------------------------|------------|
| "buffer"  | integers and booleans: counters, indices; nothing trained  | named      | named                | named                      | refused    |
| "task"    | a pooler, mask token, decoder or head of pretraining       | named      | named                | named                      | named      |
| "head"    | a trained classifier, under a known name or another        | named      | named                | refused if one is drawn, or if its name is not known | refused if its name is not known |
| "network" | anything else that was trained: blocks, norms, poolings    | refused    | refused              | refused                    | refused    |

"Named" is one warning that lists them. What is refused is let pass where the caller says so:

- `ignore=` with a regular expression that matches the name: any kind;
- `ignore_mismatched_sizes=True` or `allow_missing=True`: a head that is drawn anew;
- `num_labels=` (or `id2label=`) of another number of classes than a head of a name of its own has: likewise
  (a classifier that was found and has another shape needs `ignore_mismatched_sizes=True`);
- `num_hidden_layers=` or `config=`: the blocks that a model of fewer layers does not have.

What may be missing of a file is the head (a checkpoint of the base network into a model with a
head, as Transformers has it), the pooler and the mask token: drawn anew, and named. Anything else
is drawn only with `allow_missing=True`; pooling by attention is missing as a whole or not at all.
"""  # noqa: E501  # a table

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from vit_common.config import FLOATS, PoolerType
from vit_common.errors import InputError
from vit_common.parameters import HEAD_PARAMETERS
from vit_convert.rules import unprefixed

Kind = Literal["buffer", "task", "head", "network"]

CLASSIFIERS = ("classifier.", "cls_classifier.", "distillation_classifier.")
"""Starts of the names of classifiers."""

ATTENTION_POOLING = ("pooler.probe", "pooler.attention.", "pooler.intermediate.", "pooler.output.")
"""Starts of the names of pooling by attention."""

# A part of a name that says that what is under it stands on the network: what people call a head.
_HEAD = re.compile(
    r"(.*_)?(heads?|fc|classif\w*|linear|logits?|score|probe|out|output|cls|predict\w*|mlp_head)"
    r"(_.*)?\d*",
    re.IGNORECASE,
)
# A part of a name that says that what is under it is the network.
_NETWORK = re.compile(
    r"(blocks?|layers?|resblocks|transformer|encoder|embeddings?|encoderblock_\d+|norm\w*"
    r"|maphead_\d+|attn_pool\w*|patch_embed\w*|\w*_token)",
    re.IGNORECASE,
)


def kind_of(
    name: str,
    tensor: Any,
    *,
    canonical: bool = False,
    outside: bool = False,
    pooler: PoolerType | None = None,
) -> Kind:
    """What a tensor is that no parameter of the model was filled from.

    Args:
        name: as the file has it, or its canonical name.
        tensor: with `shape` and `dtype`.
        canonical: whether the name is one of `parameter_shapes`.
        outside: whether it lies beside the network, not under the prefix that the network has.
        pooler: the pooler of the model's configuration.
    """
    if canonical:
        bare = unprefixed(name)
        if pooler != "map" and bare.startswith(ATTENTION_POOLING):
            return "network"  # no layer on top of a token, but another way to pool
        if bare.startswith(CLASSIFIERS):
            return "head"
        return "task" if bare.startswith(HEAD_PARAMETERS) else "network"
    if tensor.dtype.name not in FLOATS or math.prod(tensor.shape) == 0:
        return "buffer"
    if outside:  # one number is a temperature or a counter, not a layer
        return "head" if math.prod(tensor.shape) > 1 else "buffer"
    *parts, _ = re.split(r"[./]", unprefixed(name))
    for part in parts:
        if _NETWORK.fullmatch(part):
            return "network"
        if _HEAD.fullmatch(part):
            return "head"
    return "network"


def check_patterns(ignore: Iterable[str]) -> tuple[str, ...]:
    """The regular expressions of names to leave aside; InputError if one is none."""
    if isinstance(ignore, str):
        ignore = (ignore,)
    patterns = tuple(ignore)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise InputError(
                f"`ignore` must hold regular expressions; given {pattern!r} ({error})."
            ) from error
    return patterns


def is_ignored(patterns: Iterable[str], *names: str) -> bool:
    """Whether a pattern matches one of a tensor's names, all of it."""
    return any(re.fullmatch(pattern, name) for pattern in patterns for name in names)


def classes_of(tensors: Mapping[str, Any]) -> set[int]:
    """Numbers of classes that these heads may have: the lengths of their sides."""
    return {side for tensor in tensors.values() for side in tensor.shape}
