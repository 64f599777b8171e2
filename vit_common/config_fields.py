"""Every field of every configuration, one row each: default, check, documentation, families.

To add a field, add a row to `ROWS`, and its name and type to the annotations of `ViTConfig`. A
check takes a field's name and a value and returns the value as it is kept, or raises ConfigError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from vit_common.errors import ConfigError, shown
from vit_common.positions import NaFlexRule, ResizeRule, RotaryType

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

Check = Callable[[str, Any], Any]

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def refusal(name: str, wanted: str, given: Any) -> ConfigError:
    return ConfigError(f"config: `{name}` must be {wanted}; given {shown(given)}.")


_DEEPEST = 100
"""Levels of lists and mappings that a value may have; far fewer than Python's recursion bears."""


def check_depth(name: str, value: Any, error: type[ValueError] = ConfigError) -> None:
    """Refuse a value nested so deep that copying, comparing or writing it would fail."""
    level, depth = [value], 0
    while level:
        level = [
            inner
            for each in level
            if isinstance(each, (Mapping, list, tuple))
            for inner in (each.values() if isinstance(each, Mapping) else each)
        ]
        depth += 1
        if depth > _DEEPEST:
            raise error(
                f"`{shown(name)[1:-1]}` must be nested at most {_DEEPEST} levels deep; given "
                f"{shown(value)}."
            )


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))


# What a file may claim: far above any network, and far below what would fill the memory.
_MOST_LAYERS, MOST_LABELS, _MOST_TOKENS = 10_000, 1_000_000, 1_000_000
_MOST = 2**31 - 1


def integer(minimum: int, most: int = _MOST) -> Check:
    def check(name: str, value: Any) -> int:
        if not _is_int(value) or value < minimum:
            raise refusal(name, f"an integer of at least {minimum}", value)
        if value > most:
            raise refusal(name, f"at most {most}", value)
        return int(value)

    return check


def _optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _side(name: str, value: Any) -> int | tuple[int, int]:
    """An int (square) or (height, width)."""
    if _is_int(value) and 0 < value <= _MOST:
        return int(value)
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    if pair and all(_is_int(side) and 0 < side <= _MOST for side in value):
        return int(value[0]), int(value[1])
    if isinstance(value, (list, tuple)) or not (_is_int(value) and value > _MOST):
        raise refusal(name, "a positive integer or a pair (height, width) of them", value)
    raise refusal(name, f"at most {_MOST}", value)


def _square(name: str, value: Any) -> int:
    count = integer(1)(name, value)
    if math.isqrt(count) ** 2 != count:
        raise refusal(name, "the square of an integer", value)
    return count


def _number(wanted: str, inside: Callable[[float], bool]) -> Check:
    def check(name: str, value: Any) -> float:
        if isinstance(value, (bool, np.bool_)) or not isinstance(
            value, (int, float, np.integer, np.floating)
        ):
            raise refusal(name, wanted, value)
        try:
            number = float(value)
        except OverflowError:  # an integer beyond every float
            raise refusal(name, wanted, value) from None
        if not (math.isfinite(number) and inside(number)):
            raise refusal(name, wanted, value)
        return number

    return check


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise refusal(name, "True or False", value)
    return bool(value)


def _choice(options: tuple[str, ...]) -> Check:
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
    except (TypeError, ValueError, OverflowError) as error:
        raise refusal(name, "a mapping whose keys are integers", value) from error
    for label in table.values():
        if isinstance(label, str):
            _encodable(name, label)
        elif label is not None and not isinstance(label, (int, float)):
            raise refusal(name, "a mapping of class index to label, which is text", label)
    if sorted(table) != list(range(len(table))):
        raise refusal(name, f"keyed by 0 to {len(table) - 1} without gaps", sorted(table))
    return table


def _encodable(name: str, text: str) -> None:
    """Refuse half of a surrogate pair, which JSON can spell and no output can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise refusal(name, "of valid Unicode text", text) from error


def _label2id(name: str, value: Any) -> dict[str, Any]:
    # Values are left as they are: some fine-tuned checkpoints hold them as strings.
    if not isinstance(value, Mapping):
        raise refusal(name, "a mapping of label to class index", value)
    for index in value.values():
        if isinstance(index, (Mapping, list, tuple)):
            raise refusal(name, "a mapping of label to class index, which is a number", index)
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
        wanted = "a floating dtype such as 'float32' or 'bfloat16'"
        # numpy reads a list, a tuple or a dict as the fields of a record.
        if isinstance(value, (list, tuple, dict)):
            raise refusal(name, wanted, value)
        try:
            text = np.dtype(value).name
        except (TypeError, ValueError) as error:
            raise refusal(name, wanted, value) from error
    text = text.removeprefix("torch.")
    if text not in FLOATS:
        raise refusal(name, "one of " + ", ".join(map(repr, FLOATS)), value)
    return text


def _ratio(name: str, value: Any) -> int | float:
    # An integer stays one: FlaxDinov2 of Transformers 4.57.6 takes a layer's width from it.
    checked = _number("a number above 0 (at most 1000000)", lambda x: 0 < x <= 1e6)(name, value)
    return int(value) if _is_int(value) else checked


_rate = _number("a number from 0 to 1", lambda x: 0.0 <= x <= 1.0)
_size = integer(1)

_fraction = _number("a number of at least 0", lambda x: x >= 0)
_factor = _number("a number of at least 1", lambda x: x >= 1)


def _depths(name: str, value: Any) -> tuple[int, ...]:
    """Numbers of blocks, of at most four stages."""
    listed = isinstance(value, (list, tuple)) and len(value) <= 4
    if not listed or not all(_is_int(count) and 0 < count <= 1000 for count in value):
        raise refusal(name, "a list of at most four numbers of blocks", value)
    return tuple(int(count) for count in value)


STEM_GROUPS = 32
"""Groups of channels that the norms of a ResNet before the patches have (`stem_type`)."""
STEM_NARROWING = 4
"""By how much its blocks are narrower inside."""


STEM_KERNELS = (4, 2)
"""Sides of the kernels of convolutions before the patches, which neither overlap nor leave gaps."""
STEM_WIDENING = 4
"""By how much MBConv blocks before the patches are wider inside."""


def stem_stride(depths: Sequence[int], kind: str | None = "resnetv2") -> int:
    """Pixels of the image, down and across, for one after a stem with stages of so many blocks."""
    if kind == "convolutions":
        return math.prod(STEM_KERNELS)
    if kind == "mbconv":
        return 2 * 2 ** len(depths)
    return 4 * 2 ** max(len(depths) - 1, 0)


PositionTokens = Literal["all", "cls", "patches"]
AttentionType = Literal["softmax", "differential"]
RelativePositionType = Literal["table", "mlp"]
StemType = Literal["resnetv2", "mbconv", "convolutions", "resnetd"]
StemStandardization = Literal["variance", "deviation"]
Pooling = Literal["cls", "mean", "cls_mean", "map"]
NormType = Literal["layernorm", "rmsnorm"]
BlockType = Literal["pre_norm", "post_norm", "parallel"]

VIT, DEIT, BEIT, DINOV2, REGISTERS = "vit", "deit", "beit", "dinov2", "dinov2_with_registers"
CLIP, CLIP_VISION, CLIP_TEXT = "clip", "clip_vision_model", "clip_text_model"
SIGLIP, SIGLIP_VISION, SIGLIP_TEXT = "siglip", "siglip_vision_model", "siglip_text_model"
SIGLIP2, SIGLIP2_VISION, SIGLIP2_TEXT = "siglip2", "siglip2_vision_model", "siglip2_text_model"
DINOV3 = "dinov3_vit"
_DINOS = (DINOV2, REGISTERS)
_VITS = (VIT, DEIT)
_CLIP_TOWERS = (CLIP_VISION, CLIP_TEXT)
_SIGLIP_IMAGES, _SIGLIP_TEXTS = (SIGLIP_VISION, SIGLIP2_VISION), (SIGLIP_TEXT, SIGLIP2_TEXT)
_TEXTS = (CLIP_TEXT, *_SIGLIP_TEXTS)
_PAIRED = (*_CLIP_TOWERS, *_SIGLIP_IMAGES, *_SIGLIP_TEXTS)
_WHOLE = (CLIP, SIGLIP, SIGLIP2)
_OLDER = (VIT, DEIT, BEIT, *_DINOS)  # those with a dropout rate of the hidden states
_TOWERS = (*_OLDER, DINOV3, *_PAIRED)
_IMAGES = (*_OLDER, DINOV3, CLIP_VISION, *_SIGLIP_IMAGES)
_ALL = (*_TOWERS, *_WHOLE)


class Field(NamedTuple):
    """All that is known of one field of the configurations.

    Attributes:
        default: value where none is given.
        check: function of name and value; returns the value as it is kept, or raises.
        doc: description for the docstrings of the families.
        families: `model_type`s that have the field.
        defaults: the families' own defaults, by `model_type`.
        if_set: families whose files hold the field only where it differs from the default, because
            their classes in Transformers do not know it or do not write it.
        extends: whether another value than the default makes a network that the class of that
            `model_type` in Transformers cannot hold.
    """

    default: Any
    check: Check
    doc: str
    families: tuple[str, ...] = _TOWERS
    defaults: Mapping[str, Any] = {}
    if_set: tuple[str, ...] = ()
    extends: bool = False


def _extension(default: Any, check: Check, doc: str, *more: str, **defaults: Any) -> Field:
    """A field that Transformers' ViT lacks and `more` families have: what timm, Google and
    big_vision vary."""
    return Field(default, check, doc, (VIT, *more), defaults, if_set=(VIT,), extends=True)


def _everywhere(default: Any, check: Check, doc: str) -> Field:
    return Field(default, check, doc, _ALL, if_set=_ALL)


def _token_id(default: int, what: str) -> Field:
    return Field(default, _optional(integer(0)), f"id of the token that {what}", _TEXTS)


def _part_of(name: str, value: Any) -> Any:
    """The configuration of a tower; `vit_common.families` makes it of a mapping."""
    if value is not None and not isinstance(value, Mapping) and not hasattr(value, "to_dict"):
        raise refusal(name, "a configuration or a mapping of its fields", value)
    return value


ROWS: dict[str, Field] = {
    "text_config": Field(
        None, _part_of, "the text tower's configuration, or a mapping of its fields", _WHOLE
    ),
    "vision_config": Field(
        None, _part_of, "the image tower's configuration, or a mapping of its fields", _WHOLE
    ),
    "vocab_size": Field(
        8192,
        _size,
        "number of visual tokens that masked image modelling predicts; in a text tower, of tokens "
        "of the text",
        (BEIT, *_TEXTS),
        {CLIP_TEXT: 49408, **dict.fromkeys(_SIGLIP_TEXTS, 32000)},
    ),
    "hidden_size": Field(
        768, _size, "width D of the residual stream", defaults={CLIP_TEXT: 512, DINOV3: 384}
    ),
    "num_hidden_layers": Field(12, integer(0, _MOST_LAYERS), "number L of encoder blocks"),
    "num_attention_heads": Field(
        12, _size, "number A of heads; divides `hidden_size`", defaults={CLIP_TEXT: 8, DINOV3: 6}
    ),
    "intermediate_size": Field(
        3072,
        _size,
        "width I of the MLP",
        (*_VITS, BEIT, DINOV3, *_PAIRED),
        {CLIP_TEXT: 2048, DINOV3: 1536},
    ),
    "projection_dim": Field(
        512,
        _size,
        "width of the space that images and texts are compared in",
        (*_CLIP_TOWERS, CLIP),
    ),
    "max_position_embeddings": Field(
        77,
        integer(1, _MOST_TOKENS),
        "largest number of tokens of a text",
        _TEXTS,
        dict.fromkeys(_SIGLIP_TEXTS, 64),
    ),
    "projection_size": Field(
        None, _optional(_size), "width of a text's output; None means `hidden_size`", _SIGLIP_TEXTS
    ),
    "mlp_ratio": Field(
        4,
        _ratio,
        "width of the MLP over `hidden_size`; with `use_swiglu_ffn` two thirds of that, rounded up "
        "to a multiple of eight",
        _DINOS,
    ),
    "hidden_act": Field(
        "gelu",
        _activation,
        'activation of the MLP, one of `ACTIVATIONS` or a callable: "gelu" is the exact (erf) '
        'one, "gelu_new" and "gelu_pytorch_tanh" the tanh approximation',
        defaults={
            **dict.fromkeys(_CLIP_TOWERS, "quick_gelu"),
            **dict.fromkeys((*_SIGLIP_IMAGES, *_SIGLIP_TEXTS), "gelu_pytorch_tanh"),
        },
    ),
    "hidden_dropout_prob": Field(
        0.0, _rate, "dropout rate after the embeddings, the attention output and the MLP", _OLDER
    ),
    "attention_probs_dropout_prob": Field(
        0.0, _rate, "dropout rate of the attention probabilities", _OLDER
    ),
    "attention_dropout": Field(
        0.0, _rate, "dropout rate of the attention probabilities", (*_PAIRED, DINOV3)
    ),
    "initializer_range": Field(
        0.02,
        _fraction,
        "standard deviation of the truncated normal that draws new weights",
        if_set=(*_SIGLIP_IMAGES, *_SIGLIP_TEXTS),
    ),
    "initializer_factor": Field(
        1.0, _fraction, "as in Transformers, which scales new weights by it; unused", _CLIP_TOWERS
    ),
    "logit_scale_init_value": Field(
        2.6592,
        _number("a number", lambda x: True),
        "first value of the logarithm of what similarities are multiplied by",
        (CLIP,),
    ),
    "pad_token_id": _token_id(1, "fills up a text"),
    "bos_token_id": _token_id(49406, "begins a text"),
    "eos_token_id": _token_id(
        49407,
        "ends a text, whose output stands for the whole; with 2, as in older files, that is the "
        "largest id of the text",
    ),
    "layer_norm_eps": Field(
        1e-12,
        _fraction,
        "epsilon of every layer norm (Hub ViT 1e-12; timm, Google, DINOv2 and SigLIP 1e-6)",
        defaults={
            **dict.fromkeys((*_DINOS, *_SIGLIP_IMAGES, *_SIGLIP_TEXTS), 1e-6),
            **dict.fromkeys((*_CLIP_TOWERS, DINOV3), 1e-5),
        },
    ),
    "image_size": Field(
        224,
        _side,
        "side of the square input in pixels, or (height, width)",
        (*_OLDER, DINOV3, CLIP_VISION, SIGLIP_VISION),
    ),
    "num_patches": Field(
        256, _square, "number of position embeddings: those of a square grid", (SIGLIP2_VISION,)
    ),
    "patch_size": Field(
        16,
        _side,
        "side of a square patch in pixels, or (height, width)",
        _IMAGES,
        {DINOV2: 14, CLIP_VISION: 32},
    ),
    "num_channels": Field(3, _size, "number C of channels of the input", _IMAGES),
    "qkv_bias": Field(
        True, _boolean, "whether query, key and value have a bias", (*_VITS, *_DINOS)
    ),
    "query_bias": Field(True, _boolean, "whether the query has a bias", (DINOV3,)),
    "key_bias": Field(False, _boolean, "whether the key has a bias", (DINOV3,)),
    "value_bias": Field(True, _boolean, "whether the value has a bias", (DINOV3,)),
    "use_gated_mlp": Field(
        False,
        _boolean,
        "whether the MLP is `hidden_act(x1) * x2` of a first layer of width 2 I",
        (DINOV3,),
    ),
    "pos_embed_shift": Field(
        None,
        _optional(_fraction),
        "largest shift of rotary coordinates in training; as in Transformers",
        (DINOV3,),
    ),
    "pos_embed_jitter": Field(
        None,
        _optional(_factor),
        "largest factor that each axis of rotary coordinates is stretched by in training",
        (DINOV3,),
    ),
    "pos_embed_rescale": Field(
        2.0,
        _optional(_factor),
        "largest factor that rotary coordinates are stretched by in training",
        (DINOV3,),
    ),
    "encoder_stride": Field(
        16,
        _size,
        "side of the pixel block that a token is decoded to in masked image modelling",
        _VITS,
    ),
    "pooler_output_size": Field(
        None, _optional(_size), "width of the pooler; None means `hidden_size`", _VITS
    ),
    "pooler_act": Field("tanh", _activation, "activation of the pooler", _VITS),
    "use_mask_token": Field(
        False,
        _boolean,
        "whether there is a mask token",
        (BEIT, *_DINOS),
        {DINOV2: True, REGISTERS: True},
        if_set=(REGISTERS,),
    ),
    "use_absolute_position_embeddings": _extension(
        True, _boolean, "whether position embeddings are added to the tokens", BEIT, beit=False
    ),
    "use_relative_position_bias": _extension(
        False,
        _boolean,
        "whether attention scores have a learned bias for each offset between patches, one table "
        "per block (Bao et al. 2021, arXiv:2106.08254)",
        BEIT,
    ),
    "use_shared_relative_position_bias": _extension(
        False, _boolean, "the same bias, one table for all blocks", BEIT
    ),
    "rope_type": _extension(
        None,
        _optional(_choice(get_args(RotaryType))),
        "how queries and keys of patches are rotated by their positions (rotary position "
        'embeddings): "axial", "dinov3" or "mixed", see `vit_common.positions.RotaryType`; None '
        "rotates nothing",
    ),
    "rope_theta": _extension(
        10000.0,
        _number("a number above 0", lambda x: x > 0),
        'base of the frequencies of rotary position embeddings; with "mixed", of new ones',
        DINOV3,
        dinov3_vit=100.0,
    ),
    "rope_grid_size": _extension(
        None,
        _optional(_side),
        'grid of patches, a side or (rows, columns), that "axial" coordinates of any grid are '
        "stretched over; None stretches nothing",
    ),
    "rope_grid_offset": _extension(
        0.0,
        _number("a number", lambda x: True),
        "added to the row and column of a patch before it is rotated",
    ),
    "rope_grid_indexing": _extension(
        "ij",
        _choice(("ij", "xy")),
        'coordinate that the first half of the angles belongs to: "ij" the row, "xy" the column',
    ),
    "rope_rotate_half": _extension(
        False,
        _boolean,
        "whether a channel is rotated together with the one half a head further on, not with its "
        "neighbour",
    ),
    "attention_type": _extension(
        "softmax",
        _choice(get_args(AttentionType)),
        'attention of a head: "softmax", or "differential", the difference of two maps (Ye et al. '
        "2024, arXiv:2410.05258)",
    ),
    "relative_position_type": _extension(
        "table",
        _choice(get_args(RelativePositionType)),
        'where biases of offsets come from: "table" (one for each offset of the grid) or "mlp" '
        "(computed from its logarithm, for any grid, Liu et al. 2022, arXiv:2111.09883)",
    ),
    "relative_position_width": _extension(
        128, _size, "width of the MLP that computes them, inside"
    ),
    "layer_scale_init_value": _extension(
        0.0,
        _fraction,
        "initial value of the per-channel factors on both residual branches (Touvron et al. 2021, "
        "arXiv:2103.17239); 0 means no factors",
        BEIT,
        beit=0.1,
    ),
    "gate_act": _extension(
        "silu", _activation, "activation of the gate of a gated MLP (`use_swiglu_ffn`)"
    ),
    "use_mlp_input_norm": _extension(
        False,
        _boolean,
        "whether the MLP normalises its input by itself too, after the block's own norm (ViTamin)",
    ),
    "use_mlp_layer_scale": _extension(
        True,
        _boolean,
        "whether the MLP's branch has such factors too; without them only attention's has (Sapiens "
        "2)",
    ),
    "layerscale_value": Field(
        1.0,
        _fraction,
        "initial value of the per-channel factors on both residual branches",
        (*_DINOS, DINOV3),
    ),
    "drop_path_rate": Field(
        0.0,
        _number("a number from 0 to below 1", lambda x: 0.0 <= x < 1.0),
        "rate of stochastic depth (Huang et al. 2016, arXiv:1603.09382) at the last block, growing "
        "evenly from zero at the first; in DINOv2 the same for every block",
        _IMAGES,
        {BEIT: 0.1},
        if_set=(*_VITS, CLIP_VISION, *_SIGLIP_IMAGES),
    ),
    "use_mean_pooling": Field(
        True,
        _boolean,
        "whether the mean of the patches is pooled through a norm, instead of the class token",
        (BEIT,),
    ),
    "use_swiglu_ffn": _extension(
        False,
        _boolean,
        "whether the MLP is `silu(x1) * x2` of a first layer of width 2 I (Shazeer 2020, "
        "arXiv:2002.05202) instead of `hidden_act` of one of width I",
        *_DINOS,
    ),
    "num_register_tokens": _extension(
        0,
        integer(0, _MOST_TOKENS),
        "number of learned tokens after the class token (Darcet et al. 2023, arXiv:2309.16588)",
        REGISTERS,
        DINOV3,
        dinov2_with_registers=4,
    ),
    "use_cls_token": _extension(
        True,
        _boolean,
        'whether there is a class token; without it `pooling` must be "mean" or "map"',
    ),
    "position_tokens": _extension(
        "all",
        _choice(get_args(PositionTokens)),
        'tokens in front of the patches that have position embeddings: "all", "cls" (the class '
        'token alone) or "patches" (none of them)',
    ),
    "stem_type": _extension(
        None,
        _optional(_choice(get_args(StemType))),
        'network before the patch projection: None, or "resnetv2", the ResNet of a hybrid '
        '(Dosovitskiy et al. 2021, arXiv:2010.11929), "mbconv", the inverted bottlenecks of a '
        'ViTamin (Chen et al. 2024, arXiv:2404.02132), whose patches overlap, "convolutions", the '
        'two of a MobileCLIP (Vasu et al. 2024, arXiv:2311.17049), or "resnetd", a ResNet-D (He et '
        "al. 2018, arXiv:1812.01187) with folded norms; `patch_size` stays the side of a patch in "
        "pixels of the image",
    ),
    "stem_depths": _extension(
        (),
        _depths,
        "numbers of blocks of the stem's stages, such as (3, 4, 9); none leaves its root alone",
    ),
    "stem_width": _extension(
        64, integer(STEM_GROUPS), "number of channels after the stem's first convolution"
    ),
    "stem_standardization": _extension(
        "variance",
        _choice(get_args(StemStandardization)),
        'what the stem\'s kernels are divided by: "variance", the root of their variance and 1e-8 '
        '(timm, Transformers), or "deviation", their standard deviation and 1e-5 (Google)',
    ),
    "stem_norm_eps": _extension(
        1e-5, _fraction, "epsilon of the stem's norms (timm 1e-5; Google 1e-6)"
    ),
    "pooling": _extension(
        "cls",
        _choice(get_args(Pooling)),
        'input of the classifier: "cls" (the class token), "mean" (the mean of the patches), '
        '"cls_mean" (both joined, as in DINOv2) or "map" (attention pooling: a learned probe '
        "attends to the patches and an MLP follows, as in SigLIP; Zhai et al. 2022, "
        "arXiv:2106.04560)",
    ),
    "pooler_num_heads": _extension(
        None,
        _optional(_size),
        "number of heads of attention pooling; None means `num_attention_heads`",
    ),
    "pooler_intermediate_size": _extension(
        None,
        _optional(_size),
        "width of the MLP in attention pooling; None means `intermediate_size`",
    ),
    "pool_prefix_tokens": _extension(
        False,
        _boolean,
        'whether the pooling "mean" or "map" takes the tokens in front of the patches too, as in '
        "the Perception Encoder",
    ),
    "norm_after_pooling": _extension(
        False,
        _boolean,
        "whether the final norm is applied to the pooled mean, not to the tokens",
    ),
    "use_representation_layer": _extension(
        False,
        _boolean,
        "whether a dense layer of `pooler_output_size` with `pooler_act` stands before the "
        "classifier (pre-logits, Dosovitskiy et al. 2021, arXiv:2010.11929)",
    ),
    "use_patch_bias": _extension(True, _boolean, "whether the patch projection has a bias"),
    "use_pre_norm": _extension(
        False,
        _boolean,
        "whether the tokens are normalised before the first block (Radford et al. 2021, "
        "arXiv:2103.00020)",
    ),
    "vision_use_head": Field(
        True,
        _boolean,
        "whether there is attention pooling at the end of the image tower",
        _SIGLIP_IMAGES,
        if_set=_SIGLIP_IMAGES,
    ),
    "use_final_norm": _extension(
        True,
        _boolean,
        "whether the tokens, or the pooled mean, are normalised after the last block",
    ),
    "norm_type": _extension(
        "layernorm",
        _choice(get_args(NormType)),
        'every norm: "layernorm", or "rmsnorm", which subtracts no mean and has no bias (Zhang and '
        "Sennrich 2019, arXiv:1910.07467)",
    ),
    "use_qk_norm": _extension(
        False,
        _boolean,
        "whether query and key of each head are normalised (Dehghani et al. 2023, "
        "arXiv:2302.05442)",
    ),
    "use_key_bias": _extension(
        None, _optional(_boolean), "whether the key has a bias; None means as `qkv_bias`"
    ),
    "use_attention_norm": _extension(
        False,
        _boolean,
        "whether the joined outputs of the heads are normalised before they are projected (Wang et "
        "al. 2022, arXiv:2210.06423)",
    ),
    "use_mlp_norm": _extension(
        False,
        _boolean,
        "whether the MLP is normalised between its two layers, after the activation (Wang et al. "
        "2022, arXiv:2210.06423)",
    ),
    "block_type": _extension(
        "pre_norm",
        _choice(get_args(BlockType)),
        'how a block is put together: "pre_norm" (a norm before attention and one before the MLP), '
        '"post_norm" (a norm after each, before it is added) or "parallel" (one norm, then '
        "attention and MLP beside each other; Dehghani et al. 2023, arXiv:2302.05442)",
    ),
    "num_parallel_branches": _extension(
        1,
        integer(1, _MOST_LAYERS),
        "number of attentions that a block adds up, and of MLPs after them (Touvron et al. 2022, "
        "arXiv:2203.09795)",
    ),
    "proj_bias": _extension(
        True, _boolean, "whether the projection after attention has a bias", DINOV3
    ),
    "mlp_bias": _extension(True, _boolean, "whether both layers of the MLP have a bias", DINOV3),
    "gradient_checkpointing": _everywhere(
        False, _boolean, "whether each block is recomputed in the backward pass instead of stored"
    ),
    "position_resize": _everywhere(
        "bicubic",
        _choice((*get_args(ResizeRule), *get_args(NaFlexRule))),
        "how position embeddings are resampled to another grid; the families differ, see "
        "`vit_common.positions.resize_matrix`",
    )._replace(
        families=_TOWERS,
        defaults={REGISTERS: "bicubic_antialias", SIGLIP2_VISION: "bilinear_antialias"},
    ),
    "output_hidden_states": _everywhere(
        False, _boolean, "whether calls return the hidden states unless told otherwise"
    ),
    "output_attentions": _everywhere(
        False, _boolean, "whether calls return the attentions unless told otherwise"
    ),
    "return_dict": _everywhere(
        True, _boolean, "whether calls return a mapping unless told otherwise; else a tuple"
    ),
    "id2label": Field(None, _id2label, "label of each class, by its index", _ALL),
    "label2id": Field(None, _label2id, "index of each class, by its label", _ALL),
    "problem_type": _everywhere(
        None,
        _optional(_choice(PROBLEM_TYPES)),
        "loss that labels mean; None decides from `num_labels` and the dtype of the labels",
    ),
    "architectures": _everywhere(None, _optional(_names), "class names recorded in the file"),
    "dtype": _everywhere(
        None,
        _optional(_dtype_name),
        "dtype of the saved weights, as text (or `torch_dtype`)",
    ),
}
"""Name -> row, for every field of every family, in the order of the constructors."""

Fields = dict[str, Field]


def fields_of(
    family: str, last_before_common: str | None = None, *, order: Sequence[str] = ()
) -> Fields:
    """The rows of one family, each with the family's default, in the order of its constructor.

    Args:
        family: its `model_type`.
        last_before_common: the one field that the family's constructor has later than `ROWS`: after
            all that are not in every family.
        order: the fields that the family's constructor begins with, where it is not as in `ROWS`.
    """
    rows = {
        name: row._replace(
            default=row.defaults.get(family, row.default),
            if_set=row.if_set if family in row.if_set else (),
        )
        for name, row in ROWS.items()
        if family in row.families
    }
    if last_before_common is not None:
        late = [last_before_common, *_COMMON_FIELDS]
        rows = {name: rows[name] for name in [*(n for n in rows if n not in late), *late]}
    return {name: rows[name] for name in dict.fromkeys((*order, *rows))}


_COMMON_FIELDS = tuple(ROWS)[tuple(ROWS).index("gradient_checkpointing") :]

EXTENSIONS = tuple(name for name, row in ROWS.items() if row.extends)
"""Fields of `ViTConfig` that Transformers' ViT lacks."""

VIT_FIELDS = fields_of(VIT)

FIELDS = tuple(VIT_FIELDS)
"""Names of the fields of `ViTConfig`, in the order of the constructor."""

# Attributes that every configuration of Transformers 4.57.6 has (`PretrainedConfig.__init__`) and
# no network here reads. They are there for code that does; a file holds those that were given.
INHERITED: dict[str, Any] = {
    "torchscript": False,
    "pruned_heads": {},
    "tie_word_embeddings": True,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "cross_attention_hidden_size": None,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "finetuning_task": None,
    "task_specific_params": None,
    "tokenizer_class": None,
    "prefix": None,
    "bos_token_id": None,
    "pad_token_id": None,
    "eos_token_id": None,
    "sep_token_id": None,
    "decoder_start_token_id": None,
    "transformers_version": None,
    "tf_legacy_loss": False,
    "use_bfloat16": False,
}
