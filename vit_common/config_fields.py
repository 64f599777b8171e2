"""The fields of every configuration: defaults, what each may hold, and which are in every family.

A check takes a field's name and a value and returns the value as it is kept, or raises ConfigError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np

from vit_common.errors import ConfigError
from vit_common.positions import ResizeRule

ACTIVATIONS = (
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "relu",
    "selu",
    "silu",
    "swish",
    "quick_gelu",
    "tanh",
    "sigmoid",
    "linear",
)
"""Names that `hidden_act` and `pooler_act` may have; both twins implement each (see `model.py`)."""

FLOATS = ("float64", "float32", "float16", "bfloat16")
"""Names of the dtypes that weights of a network may have."""

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def refusal(name: str, wanted: str, given: Any) -> ConfigError:
    return ConfigError(f"config: `{name}` must be {wanted}; given {given!r}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))


# What a file may claim: far above any network, and far below what would fill the memory.
_MOST_LAYERS, MOST_LABELS, _MOST_TOKENS = 10_000, 1_000_000, 1_000_000


def integer(minimum: int, most: int | None = None) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if not _is_int(value) or value < minimum:
            raise refusal(name, f"an integer of at least {minimum}", value)
        if most is not None and value > most:
            raise refusal(name, f"at most {most}", value)
        return int(value)

    return check


def _optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _side(name: str, value: Any) -> int | tuple[int, int]:
    """An int (square) or (height, width)."""
    if _is_int(value) and value > 0:
        return int(value)
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    if pair and all(_is_int(side) and side > 0 for side in value):
        return int(value[0]), int(value[1])
    raise refusal(name, "a positive integer or a pair (height, width) of them", value)


def _number(wanted: str, inside: Callable[[float], bool]) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        if isinstance(value, (bool, np.bool_)) or not isinstance(
            value, (int, float, np.integer, np.floating)
        ):
            raise refusal(name, wanted, value)
        if not (math.isfinite(value) and inside(float(value))):
            raise refusal(name, wanted, value)
        return float(value)

    return check


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise refusal(name, "True or False", value)
    return bool(value)


def _choice(options: tuple[str, ...]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in options:
            raise refusal(name, "one of " + ", ".join(map(repr, options)), value)
        return value

    return check


def _activation(name: str, value: Any) -> str | Callable:
    if callable(value):
        return value
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise refusal(name, "a callable or one of " + ", ".join(map(repr, ACTIVATIONS)), value)
    return value


def _id2label(name: str, value: Any) -> dict[int, str]:
    if not isinstance(value, Mapping) or not value:
        raise refusal(name, "a non-empty mapping of class index to label", value)
    try:
        table = {int(key): label for key, label in value.items()}
    except (TypeError, ValueError) as error:
        raise refusal(name, "a mapping whose keys are integers", value) from error
    if sorted(table) != list(range(len(table))):
        raise refusal(name, f"keyed by 0 to {len(table) - 1} without gaps", sorted(table))
    return table


def _label2id(name: str, value: Any) -> dict[str, Any]:
    # Values are left as they are: some fine-tuned checkpoints hold them as strings.
    if not isinstance(value, Mapping):
        raise refusal(name, "a mapping of label to class index", value)
    return dict(value)


def _names(name: str, value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise refusal(name, "a list of class names", value)
    return list(value)


def _dtype_name(name: str, value: Any) -> str:
    """`jnp.float32`, `torch.float32`, `np.dtype("float32")` and "float32" are all "float32"."""
    text = value if isinstance(value, str) else None
    if text is None and type(value).__module__ == "torch":
        text = str(value)
    if text is None:
        try:
            text = np.dtype(value).name
        except TypeError as error:
            raise refusal(
                name, "a floating dtype such as 'float32' or 'bfloat16'", value
            ) from error
    text = text.removeprefix("torch.")
    if text not in FLOATS:
        raise refusal(name, "one of " + ", ".join(map(repr, FLOATS)), value)
    return text


def _ratio(name: str, value: Any) -> int | float:
    # An integer stays one: FlaxDinov2 of Transformers 4.57.6 takes a layer's width from it.
    checked = _number("a number above 0", lambda x: x > 0)(name, value)
    return int(value) if _is_int(value) else checked


_rate = _number("a number from 0 to 1", lambda x: 0.0 <= x <= 1.0)
_size = integer(1)

_fraction = _number("a number of at least 0", lambda x: x >= 0)

PositionTokens = Literal["all", "cls", "patches"]
Pooling = Literal["cls", "mean", "cls_mean"]

# name -> (default, check), for every field of every family. Each family takes its own from here.
CHECKS: dict[str, tuple[Any, Callable[[str, Any], Any]]] = {
    "vocab_size": (8192, _size),
    "hidden_size": (768, _size),
    "num_hidden_layers": (12, integer(0, _MOST_LAYERS)),
    "num_attention_heads": (12, _size),
    "intermediate_size": (3072, _size),
    "mlp_ratio": (4, _ratio),
    "hidden_act": ("gelu", _activation),
    "hidden_dropout_prob": (0.0, _rate),
    "attention_probs_dropout_prob": (0.0, _rate),
    "initializer_range": (0.02, _fraction),
    "layer_norm_eps": (1e-12, _fraction),
    "image_size": (224, _side),
    "patch_size": (16, _side),
    "num_channels": (3, _size),
    "qkv_bias": (True, _boolean),
    "encoder_stride": (16, _size),
    "pooler_output_size": (None, _optional(_size)),
    "pooler_act": ("tanh", _activation),
    "use_mask_token": (False, _boolean),
    "use_absolute_position_embeddings": (True, _boolean),
    "use_relative_position_bias": (False, _boolean),
    "use_shared_relative_position_bias": (False, _boolean),
    "layer_scale_init_value": (0.0, _fraction),
    "layerscale_value": (1.0, _fraction),
    "drop_path_rate": (0.0, _number("a number from 0 to below 1", lambda x: 0.0 <= x < 1.0)),
    "use_mean_pooling": (True, _boolean),
    "use_swiglu_ffn": (False, _boolean),
    "num_register_tokens": (0, integer(0, _MOST_TOKENS)),
    "use_cls_token": (True, _boolean),
    "position_tokens": ("all", _choice(get_args(PositionTokens))),
    "pooling": ("cls", _choice(("cls", "mean"))),
    "norm_after_pooling": (False, _boolean),
    "use_representation_layer": (False, _boolean),
    "gradient_checkpointing": (False, _boolean),
    "position_resize": ("bicubic", _choice(get_args(ResizeRule))),
    "output_hidden_states": (False, _boolean),
    "output_attentions": (False, _boolean),
    "return_dict": (True, _boolean),
    "id2label": (None, _id2label),
    "label2id": (None, _label2id),
    "problem_type": (None, _optional(_choice(PROBLEM_TYPES))),
    "architectures": (None, _optional(_names)),
    "dtype": (None, _optional(_dtype_name)),
}

# Written only when they differ from the default: Transformers does not know or does not write them.
WRITTEN_IF_SET = (
    "gradient_checkpointing",
    "position_resize",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "problem_type",
    "architectures",
    "dtype",
)
_EVERYWHERE = (*WRITTEN_IF_SET[:5], "id2label", "label2id", *WRITTEN_IF_SET[5:])

# Fields of ViTConfig that Transformers' ViT does not have: what timm, Google and big_vision vary.
EXTENSIONS = (
    "layer_scale_init_value",
    "use_swiglu_ffn",
    "num_register_tokens",
    "use_cls_token",
    "position_tokens",
    "use_absolute_position_embeddings",
    "use_relative_position_bias",
    "use_shared_relative_position_bias",
    "pooling",
    "norm_after_pooling",
    "use_representation_layer",
)

Fields = dict[str, tuple[Any, Callable[[str, Any], Any]]]


def fields_of(names: str, **defaults: Any) -> Fields:
    """The table of a family: its fields in the order of its constructor, with its defaults."""
    table = {name: CHECKS[name] for name in (*names.split(), *_EVERYWHERE)}
    return {name: (defaults.get(name, default), check) for name, (default, check) in table.items()}


SIZES = """hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act
    hidden_dropout_prob attention_probs_dropout_prob initializer_range layer_norm_eps image_size
    patch_size num_channels"""
VIT = f"{SIZES} qkv_bias encoder_stride pooler_output_size pooler_act"

VIT_FIELDS = fields_of(f"{VIT} {' '.join(EXTENSIONS)} drop_path_rate")

FIELDS = tuple(VIT_FIELDS)
"""Names of the fields of `ViTConfig`, in the order of the constructor."""
