"""`ViTConfig`: the one schema for both twins, the converter and the commands.

Field names and defaults are those of Transformers 4.57.6 (`models/vit/configuration_vit.py`), so a
Hub `config.json` reads as it is. Every value is checked where it is set. Keys this project does
not know are kept as attributes and written back.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from vit_common.config_fields import (
    ACTIVATIONS,
    EXTENSIONS,
    FIELDS,
    FLOATS,
    INHERITED,
    MOST_LABELS,
    ROWS,
    STEM_GROUPS,
    STEM_NARROWING,
    VIT_FIELDS,
    AttentionType,
    BlockType,
    Fields,
    NormType,
    Pooling,
    PositionTokens,
    RelativePositionType,
    StemStandardization,
    StemType,
    check_depth,
    integer,
    refusal,
    stem_stride,
)
from vit_common.errors import ConfigError, shown
from vit_common.files.hub import find_file, push_file, push_if_asked, split_hub_options
from vit_common.files.replace import make_directory, write_text
from vit_common.files.texts import read_json
from vit_common.positions import NaFlexRule, ResizeRule, RotaryType

__all__ = [
    "ACTIVATIONS",
    "CONFIG_NAME",
    "FIELDS",
    "FLOATS",
    "OURS",
    "FamilyConfig",
    "Flags",
    "ViTConfig",
    "as_config",
    "config_classes",
    "is_timm",
    "without_timm",
]

CONFIG_NAME = "config.json"


PoolerType = Literal["dense", "norm", "token", "map", None]


class Flags(NamedTuple):
    """Flags of a call: what it returns."""

    output_attentions: bool
    output_hidden_states: bool
    return_dict: bool


class ViTConfig:
    """Sizes, rates and labels of a Vision Transformer.

    Args:
        {fields}
        num_labels: number K of classes; rebuilds `id2label` and `label2id`.
        attn_implementation: name of an attention kernel, for models that are built without one of
            their own; kept as `_attn_implementation` and not written to files.
        **kwargs: unknown keys, kept as attributes and written back.

    Raises:
        ConfigError: a value is not what the field holds, or two fields contradict each other.

    Example:
        >>> config = ViTConfig(hidden_size=192, num_attention_heads=3, num_labels=10)
        >>> config.num_patches, config.head_dim
        (196, 64)
    """

    model_type: ClassVar[str] = "vit"
    fields: ClassVar[Fields] = VIT_FIELDS
    __signature__: ClassVar[Any]  # of the constructor, made from the fields

    extended_type: ClassVar[str] = "vit_extended"
    """`model_type` in files of networks that Transformers' ViT cannot hold, so that it refuses them
    instead of running another network."""

    base_family: ClassVar[str] = "vit"
    """`model_type` of the family whose network this is; a subclass with a `model_type` of its own
    keeps that of the class it is made from."""

    # As in Transformers, for code that asks.
    attribute_map: ClassVar[dict[str, str]] = {}
    sub_configs: ClassVar[dict[str, Any]] = {}
    base_config_key: ClassVar[str] = ""
    has_no_defaults_at_init: ClassVar[bool] = False

    use_mask_token: bool = False
    use_distillation_token: ClassVar[bool] = False
    any_image_size: ClassVar[bool] = False

    is_part: ClassVar[bool] = False
    """Whether the base network lies under `base_model_prefix` in every model, also in the one that
    has nothing on it."""

    is_text: ClassVar[bool] = False
    """Whether the network is one of texts."""

    settable: ClassVar[tuple[str, ...]] = ()
    """Names of sizes that follow from fields and that a caller may give instead of those."""

    keeps_pooler: ClassVar[bool] = False
    """Whether models with a head have the pooler's parameters even where the head does not look at
    it."""

    # Fields are set by name below; these are for readers and type checkers.
    vocab_size: int  # of BEiT alone
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str | Callable
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    initializer_range: float
    layer_norm_eps: float
    image_size: int | tuple[int, int]
    patch_size: int | tuple[int, int]
    num_channels: int
    qkv_bias: bool
    encoder_stride: int
    pooler_output_size: int
    pooler_act: str | Callable
    layer_scale_init_value: float
    use_swiglu_ffn: bool
    num_register_tokens: int
    use_cls_token: bool
    position_tokens: PositionTokens
    use_absolute_position_embeddings: bool
    use_relative_position_bias: bool
    use_shared_relative_position_bias: bool
    attention_type: AttentionType
    relative_position_type: RelativePositionType
    relative_position_width: int
    rope_type: RotaryType | None
    rope_theta: float
    rope_grid_size: int | tuple[int, int] | None
    rope_grid_offset: float
    rope_grid_indexing: Literal["ij", "xy"]
    rope_rotate_half: bool
    stem_type: StemType | None
    stem_depths: tuple[int, ...]
    stem_width: int
    stem_standardization: StemStandardization
    stem_norm_eps: float
    pooling: Pooling
    pooler_num_heads: int | None
    pooler_intermediate_size: int | None
    pool_prefix_tokens: bool
    norm_after_pooling: bool
    use_representation_layer: bool
    use_patch_bias: bool
    use_pre_norm: bool
    use_final_norm: bool
    norm_type: NormType
    use_qk_norm: bool
    use_key_bias: bool | None
    use_attention_norm: bool
    use_mlp_norm: bool
    use_mlp_layer_scale: bool
    use_mlp_input_norm: bool
    gate_act: str | Callable
    block_type: BlockType
    num_parallel_branches: int
    proj_bias: bool
    mlp_bias: bool
    drop_path_rate: float
    gradient_checkpointing: bool
    position_resize: ResizeRule | NaFlexRule
    output_hidden_states: bool
    output_attentions: bool
    return_dict: bool
    id2label: dict[int, str]
    label2id: dict[str, Any]
    problem_type: str | None
    architectures: list[str] | None
    dtype: str | None
    _name_or_path: str
    _attn_implementation: str | None
    _ignored: dict[str, Any]

    def __init_subclass__(cls, fields: Fields | None = None, **kwargs: Any) -> None:
        """A subclass that is given `fields` is a family, and known by its `model_type`."""
        super().__init_subclass__(**kwargs)
        if fields is not None:
            cls.fields = fields
            cls.base_family = cls.model_type
            for name in EXTENSIONS:  # what ViT varies and this family does not
                if name not in fields and not hasattr(cls, name):
                    setattr(cls, name, ROWS[name].default)
            _FAMILIES[cls.model_type] = cls
            _describe(cls)
        elif "__init__" in vars(cls):
            cls.__signature__ = None  # its own
        if "model_type" in vars(cls) and "extended_type" not in vars(cls):
            cls.extended_type = cls.model_type  # or its files would be read as another class

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs = self._by_name(args, kwargs)
        for name, value in kwargs.items():
            check_depth(name, value)
        model_type = kwargs.pop("model_type", None)
        if model_type not in (None, "", self.model_type, self.extended_type):
            known = config_classes().get(model_type) if isinstance(model_type, str) else None
            raise ConfigError(
                f"config: `model_type` must be {self.model_type!r} for {type(self).__name__}; "
                f"given {shown(model_type)}. "
                + (
                    known.use_instead()
                    if known
                    else "This is the configuration of another architecture."
                )
            )
        torch_dtype = kwargs.pop("torch_dtype", None)
        if kwargs.get("dtype") is None:
            kwargs["dtype"] = torch_dtype

        num_labels = kwargs.pop("num_labels", None)
        instead = {name: kwargs.pop(name) for name in self.settable if name in kwargs}
        for name, row in self.fields.items():
            if name not in ("id2label", "label2id"):
                setattr(self, name, kwargs.pop(name, row.default))
        self._set_labels(num_labels, kwargs.pop("id2label", None), kwargs.pop("label2id", None))
        plain = kwargs.pop("name_or_path", "")
        self.name_or_path = kwargs.pop("_name_or_path", "") or plain
        object.__setattr__(self, "_commit_hash", kwargs.pop("_commit_hash", None))
        object.__setattr__(self, "_attn_implementation", None)
        self._attn_implementation = kwargs.pop("attn_implementation", None)
        object.__setattr__(self, "_ignored", {})
        for name, value in kwargs.items():
            self._set_unknown(name, value)
        for name, value in instead.items():
            setattr(self, name, value)
        self.validate()

    @classmethod
    def _by_name(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords of positional arguments, by the order of the fields, and those given as such."""
        if len(args) > len(cls.fields):
            raise ConfigError(
                f"{cls.__name__} takes at most {len(cls.fields)} positional arguments."
            )
        positional = dict(zip(cls.fields, args, strict=False))
        for name in positional:
            if name in kwargs:
                raise ConfigError(f"config: `{name}` was given twice.")
        return {**kwargs, **positional}

    def _set_unknown(self, name: str, value: Any) -> None:
        """Keep a key that is no field of this family."""
        taken = getattr(type(self), name, None)
        if isinstance(taken, property) or name in _RUNTIME or name.startswith("_attn_impl"):
            # The network has it from other fields, or it was about one process; a file may say it.
            if name != "num_labels":
                self._ignored[name] = value
        elif name in EXTENSIONS or isinstance(taken, (bool, int, float, str)):
            # The same for the whole family.
            if value != taken and (name in EXTENSIONS or name == "qkv_bias"):
                raise refusal(name, f"{taken!r} for {type(self).__name__}", value)
            self._ignored[name] = value
        elif taken is not None:
            raise ConfigError(
                f"config: `{shown(name)[1:-1]}` must not be a key; "
                f"{type(self).__name__} has a method or attribute of that name; given "
                f"{shown(value)}."
            )
        else:
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        # Only what `__init__` has not set comes here.
        if name in INHERITED:
            return copy.copy(INHERITED[name])
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def _set_labels(self, num_labels: Any, id2label: Any, label2id: Any) -> None:
        if id2label is None:
            self.num_labels = 2 if num_labels is None else num_labels
            if label2id is not None:
                self.label2id = label2id
            return
        self.id2label = id2label
        if label2id is None:
            label2id = {label: index for index, label in self.id2label.items()}
        self.label2id = label2id
        if num_labels is not None and num_labels != len(self.id2label):
            raise ConfigError(
                f"config: `num_labels` is {shown(num_labels)} but `id2label` names "
                f"{len(self.id2label)} classes; give one of the two, or make them agree."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "torch_dtype":
            name = "dtype"
        if name == "pooler_output_size" and value is None:
            value = self.hidden_size
        taken = getattr(type(self), name, None)
        if name in self.fields:
            value = self.fields[name].check(name, value)
        elif name == "_attn_implementation":
            value = _kernel_name(value, self._attn_implementation)
        elif isinstance(taken, property) and taken.fset is None:
            raise refusal(name, f"left alone: {type(self).__name__} derives it", value)
        super().__setattr__(name, value)

    def validate(self) -> None:
        """Check the rules that tie fields together; both twins call it before they build.

        Raises:
            ConfigError: `hidden_size` is not a multiple of `num_attention_heads`, the image holds
                no whole patch, or there is nothing to pool.
        """
        self._check_heads()
        if self.rope_type is not None and self.head_dim % 4:
            raise ConfigError(
                "config: the width of a head, `hidden_size` / `num_attention_heads`, must be a "
                f"multiple of 4 where `rope_type` is {self.rope_type!r}; given {self.head_dim}."
            )
        if min(self.grid_size) < 1:
            raise ConfigError(
                f"config: `image_size` must be at least `patch_size`; given {self.image_size!r} "
                f"and {self.patch_size!r}."
            )
        self._check_stem()
        differs = self.attention_type == "differential"
        if differs and (self.head_dim % 2 or self.use_qk_norm or self.rope_type is not None):
            raise ConfigError(
                "config: `attention_type` 'differential' must be of heads of even width, without "
                "`use_qk_norm` and `rope_type`."
            )
        if not self.use_cls_token and self.pooling not in ("mean", "map"):
            raise ConfigError(
                "config: `pooling` must be 'mean' or 'map' where `use_cls_token` is False; given "
                f"{self.pooling!r}."
            )
        if (
            self.norm_after_pooling
            and self.pooling != "mean"
            and "norm_after_pooling" in self.fields
        ):
            raise ConfigError(
                "config: `pooling` must be 'mean' where `norm_after_pooling` is True; given "
                f"{self.pooling!r}."
            )
        if self.pooling in ("cls_mean", "map") and self.use_representation_layer:
            raise ConfigError(
                "config: `pooling` must be 'cls' or 'mean' where `use_representation_layer` is "
                f"True; given {self.pooling!r}."
            )
        if self.pooler_type == "map" and self.hidden_size % self.pooler_heads:
            raise ConfigError(
                "config: `hidden_size` must be a multiple of `pooler_num_heads`; given "
                f"{self.hidden_size} and {self.pooler_heads}."
            )
        if self.norm_after_pooling and self.use_representation_layer:
            raise ConfigError(
                "config: `norm_after_pooling` and `use_representation_layer` must not both be True."
            )
        if self.norm_after_pooling and not self.use_final_norm:
            raise ConfigError(
                "config: `norm_after_pooling` must be False where `use_final_norm` is False: there "
                "is no norm to apply."
            )
        if self.num_parallel_branches > 1 and self.block_type != "pre_norm":
            raise ConfigError(
                "config: `block_type` must be 'pre_norm' where `num_parallel_branches` is above 1; "
                f"given {self.block_type!r}."
            )

    def _check_stem(self) -> None:
        """Check that a stem's widths and stride fit the norms and the patches."""
        if self.stem_type is None:
            return
        if self.stem_width % STEM_GROUPS:
            raise ConfigError(
                f"config: `stem_width` must be a multiple of {STEM_GROUPS}; given "
                f"{self.stem_width}."
            )
        sides = (*self.patch_height_width, *self.image_height_width)
        stride = self.stem_stride
        if self.stem_type == "mbconv" and self.patch_height_width != (2 * stride, 2 * stride):
            raise ConfigError(
                f"config: `patch_size` must be {2 * stride} after {len(self.stem_depths)} stages "
                f"of MBConv blocks; given {self.patch_size!r}."
            )
        if self.stem_type == "mbconv" and not self.use_patch_bias:
            raise ConfigError(
                "config: `use_patch_bias` must be True after MBConv blocks (`stem_type`)."
            )
        for side, patch in zip(sides, self.patch_height_width * 2, strict=True):
            if side % stride or side % patch:
                raise ConfigError(
                    "config: `patch_size` must be a multiple of the stem's stride, and "
                    f"`image_size` one of `patch_size`; given {self.patch_size!r}, {stride} and "
                    f"{self.image_size!r}."
                )

    def _check_heads(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"config: `hidden_size` must be a multiple of `num_attention_heads`; given "
                f"{self.hidden_size} and {self.num_attention_heads}."
            )

    # -- what the network is made of; the same names for every family

    @classmethod
    def class_stem(cls) -> str:
        """Prefix of the names of the family's classes: "ViT", "DeiT", ...."""
        return cls.__name__.removesuffix("Config")

    @classmethod
    def use_instead(cls) -> str:
        """Advice for anyone who loads this family into another family's class."""
        stem = cls.class_stem()
        return (
            f"These are weights of the family {cls.model_type!r}: use {stem}Model or "
            f"{stem}ForImageClassification (in JAX Flax{stem}Model ...), or the Auto classes, "
            "which choose them."
        )

    @classmethod
    def from_related(cls, config: ViTConfig) -> ViTConfig | None:
        """This family's configuration out of another's that holds it; None where it does not."""
        return None

    @property
    def is_extended(self) -> bool:
        """Whether the network is one that Transformers' class of this `model_type` cannot hold."""
        return any(
            row.extends and row.if_set and getattr(self, name) != row.default
            for name, row in self.fields.items()
        )

    @property
    def base_model_prefix(self) -> str:
        """Name of the network inside a model with a head; the prefix of its weights' names."""
        return self.base_family

    @property
    def has_key_bias(self) -> bool:
        """Whether the key has a bias: `use_key_bias`, or as query and value."""
        return self.qkv_bias if self.use_key_bias is None else self.use_key_bias

    @property
    def has_final_norm(self) -> bool:
        """Whether the tokens are normalised after the last block."""
        return self.use_final_norm and not self.norm_after_pooling

    @property
    def has_query_bias(self) -> bool:
        """Whether the query has a bias."""
        return self.qkv_bias

    @property
    def has_value_bias(self) -> bool:
        """Whether the value has a bias."""
        return self.qkv_bias

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens in front of the patches: class, distillation and register tokens."""
        return self.use_cls_token + self.use_distillation_token + self.num_register_tokens

    @property
    def num_prefix_positions(self) -> int:
        """How many of the tokens in front of the patches have a position embedding."""
        if self.position_tokens == "all":
            return self.num_prefix_tokens
        return int(self.position_tokens == "cls" and self.use_cls_token)

    @property
    def has_relative_positions(self) -> bool:
        """Whether attention scores have a relative position bias, per block or shared."""
        return self.use_relative_position_bias or self.use_shared_relative_position_bias

    def rotary_grid(self, grid: tuple[int, int]) -> dict[str, Any]:
        """Arguments of `rotary_coordinates` for a grid (rows, columns) of patches."""
        return {
            "grid": grid,
            "reference": self.rope_grid_size and _pair(self.rope_grid_size),
            "offset": self.rope_grid_offset,
            "columns_first": self.rope_grid_indexing == "xy",
        }

    @property
    def has_relative_mlp(self) -> bool:
        """Whether that bias is computed by an MLP."""
        return self.has_relative_positions and self.relative_position_type == "mlp"

    @property
    def differential_shares(self) -> tuple[float, ...]:
        """Of each block, the share of the second map at the start (Ye et al. 2024, section 2.1)."""
        return tuple(0.8 - 0.6 * math.exp(-0.3 * i) for i in range(self.num_hidden_layers))

    @property
    def has_layer_scale(self) -> bool:
        """Whether residual branches are multiplied by learned factors, one per channel: both, or
        attention's alone, see `has_mlp_layer_scale`."""
        return self.layer_scale_init_value > 0

    @property
    def has_mlp_layer_scale(self) -> bool:
        """Whether the MLP's branch is multiplied by factors of its own."""
        own = self.use_mlp_layer_scale and self.block_type != "parallel"
        return self.has_layer_scale and own

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Rate of stochastic depth of each block."""
        last = max(self.num_hidden_layers - 1, 1)
        return tuple(self.drop_path_rate * i / last for i in range(self.num_hidden_layers))

    @property
    def pooler_type(self) -> PoolerType:
        """Kind of the pooler: on the class token or the mean of the patches a dense layer with
        `pooler_act`, a norm, or neither; or attention pooling, "map"."""
        if self.pooling == "map":
            return "map"
        return "norm" if self.norm_after_pooling else "dense"

    @property
    def pooler_heads(self) -> int:
        """Number of heads of attention pooling."""
        return self.pooler_num_heads or self.num_attention_heads

    @property
    def pooler_inner(self) -> int:
        """Width of the MLP in attention pooling."""
        return self.pooler_intermediate_size or self.intermediate_size

    @property
    def first_pooled_token(self) -> int:
        """The token from which on the pooling "mean" or "map" takes all."""
        return 0 if self.pool_prefix_tokens else self.num_prefix_tokens

    @property
    def classifier_has_pooler(self) -> bool:
        """Whether the input of the classifier is the pooler's output."""
        return self.norm_after_pooling or self.use_representation_layer or self.pooling == "map"

    @property
    def classifier_width(self) -> int:
        """Number of inputs of the classifier."""
        if self.pooling == "cls_mean":
            return 2 * self.hidden_size
        return self.pooler_output_size if self.use_representation_layer else self.hidden_size

    # -- derived sizes

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Input size (H, W) in pixels."""
        return _pair(self.image_size)

    @property
    def patch_height_width(self) -> tuple[int, int]:
        """Patch size in pixels, (height, width)."""
        return _pair(self.patch_size)

    @property
    def stem_widths(self) -> tuple[int, ...]:
        """Number of channels after each stage of the stem."""
        first = self.stem_width * (1 if self.stem_type == "mbconv" else STEM_NARROWING)
        return tuple(first * 2**i for i in range(len(self.stem_depths)))

    @property
    def stem_channels(self) -> int:
        """Number of channels that the patch projection takes: the stem's, or the image's."""
        if self.stem_type is None:
            return self.num_channels
        return (self.stem_width, *self.stem_widths)[-1]

    @property
    def stem_stride(self) -> int:
        """Pixels of the image, down and across, for one of what the patch projection takes."""
        return 1 if self.stem_type is None else stem_stride(self.stem_depths, self.stem_type)

    @property
    def patch_projection_size(self) -> tuple[int, int]:
        """Size (height, width) of the patch projection: the patch's, over the stem's stride."""
        height, width = self.patch_height_width
        return height // self.stem_stride, width // self.stem_stride

    @property
    def patch_kernel_size(self) -> tuple[int, int]:
        """Size (height, width) of the kernel of the patch projection: that of a patch, or after
        MBConv blocks one more, as patches overlap."""
        height, width = self.patch_projection_size
        more = int(self.stem_type == "mbconv")
        return height + more, width + more

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches down and across at the native image size."""
        (height, width), (patch_height, patch_width) = (
            _pair(self.image_size),
            _pair(self.patch_size),
        )
        return height // patch_height, width // patch_width

    @property
    def num_patches(self) -> int:
        """Number N of patches at the native image size."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def head_dim(self) -> int:
        """Width D/A of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def use_return_dict(self) -> bool:
        """Whether calls return a mapping: `return_dict`, unless `torchscript` is set."""
        return self.return_dict and not self.torchscript

    @property
    def name_or_path(self) -> str:
        """Where the configuration was read from."""
        return self._name_or_path

    @name_or_path.setter
    def name_or_path(self, value: Any) -> None:
        object.__setattr__(self, "_name_or_path", value if isinstance(value, str) else str(value))

    @property
    def torch_dtype(self) -> str | None:
        """The older name of `dtype`."""
        return self.dtype

    @property
    def num_labels(self) -> int:
        """Number K of classes; setting it renames them LABEL_0 to LABEL_{K-1} if K changes."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        count = integer(1, MOST_LABELS)("num_labels", value)
        if len(getattr(self, "id2label", ())) != count:
            self.id2label = {i: f"LABEL_{i}" for i in range(count)}
            self.label2id = {label: i for i, label in self.id2label.items()}

    def resolve_flags(
        self,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        return_dict: bool | None,
    ) -> Flags:
        """What a call returns: each flag as given, or as configured where it is None."""
        given = (output_attentions, output_hidden_states, return_dict)
        own = (self.output_attentions, self.output_hidden_states, self.use_return_dict)
        return Flags(*(bool(o if g is None else g) for g, o in zip(given, own, strict=True)))

    # -- files

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON holds it, unknown keys included; `id2label` keyed by int.

        Raises:
            ConfigError: an activation is a callable, which no file can hold.
        """
        out: dict[str, Any] = {
            "model_type": self.extended_type if self.is_extended else self.model_type
        }
        for name, value in vars(self).items():
            if name in _RUNTIME:
                continue
            if name in ("hidden_act", "pooler_act", "gate_act") and not isinstance(value, str):
                raise refusal(name, "the name of an activation, to be written to a file", value)
            row = self.fields.get(name)
            if row is not None and row.if_set and value == row.default:
                continue
            out[name] = list(value) if isinstance(value, tuple) else copy.deepcopy(value)
        return {**copy.deepcopy(self._ignored), **out}

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict()` without what every configuration of Transformers has by default: two labels
        without names, and `INHERITED` values."""
        table = self.to_dict()
        plain = {0: "LABEL_0", 1: "LABEL_1"}
        defaults = {
            **INHERITED,
            "id2label": plain,
            "label2id": {label: index for index, label in plain.items()},
        }
        return {
            name: value
            for name, value in table.items()
            if name not in defaults or value != defaults[name]
        }

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of `config.json`: sorted keys, two spaces of indent, a newline at the end.

        `use_diff` is accepted for Transformers' sake; every field of the network is written.
        """
        table = self.to_dict()
        # JSON would sort the string keys 0, 1, 10, ...; the label tables keep their own order.
        if "id2label" in table:
            table["id2label"] = {str(index): label for index, label in table["id2label"].items()}
        ordered = {name: table[name] for name in sorted(table)}
        try:
            json.dumps(ordered, ensure_ascii=False).encode()  # half a surrogate pair is no text
            return json.dumps(ordered, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"config: a value cannot be written as JSON ({error}).") from error

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write `to_json_string()` to a file; the old file survives a failure."""
        write_text(json_file_path, self.to_json_string())

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write `config.json` into a directory, made if it is not there.

        Args:
            save_directory: the directory.
            push_to_hub: upload the file afterwards.
            **kwargs: `repo_id` (by default the directory's name), `token` and the other options of
                `push_to_hub`.

        Raises:
            MissingFileError: the directory cannot be made or written.
        """
        directory = make_directory(save_directory)
        self.to_json_file(directory / CONFIG_NAME)
        push_if_asked(directory, {**kwargs, "push_to_hub": push_to_hub}, files=[CONFIG_NAME])

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str | None:
        """Upload `config.json` to a Hub repository, made if it is not there.

        Args:
            repo_id: "owner/name".
            **kwargs: `token`, `private`, `revision`, `commit_message` and `create_pr`.

        Returns:
            The address of the commit.

        Raises:
            MissingFileError: the Hub cannot be reached or refuses.
        """
        return push_file(self.to_json_file, CONFIG_NAME, repo_id, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **overrides: Any) -> Any:
        """Build from a dict such as `to_dict()` gives; `overrides` win over it.

        With `return_unused_kwargs=True` the result is `(config, unused)`, where `unused` holds
        the overrides that name no field and no key of the dict.
        """
        if not isinstance(config_dict, Mapping):
            raise ConfigError(f"config: expected a mapping of fields; given {shown(config_dict)}.")
        return_unused = overrides.pop("return_unused_kwargs", False)
        table = without_timm(config_dict)
        # A kernel is this process's choice, not the file's, in Transformers too.
        table.pop("attn_implementation", None)
        # A key of the file that no network of this family reads says nothing, whatever it holds.
        ignored = {
            name: table.pop(name)
            for name in [*table]
            if name not in ("model_type", *cls.fields, *overrides)
            and (name in cls.settable or isinstance(getattr(cls, name, None), _PLAIN))
        }
        known = {*cls.keywords(), *table, *INHERITED, *_KNOWN}
        unused = {k: v for k, v in overrides.items() if k not in known} if return_unused else {}
        used = {k: v for k, v in overrides.items() if k not in unused}
        if "num_labels" in used and used["num_labels"] is None:
            del used["num_labels"]
        if "num_labels" in used and "id2label" not in used:
            # A new number of classes replaces the file's label tables, as it always did.
            labels = table.get("id2label")
            if not isinstance(labels, Mapping) or len(labels) != used["num_labels"]:
                table.pop("id2label", None), table.pop("label2id", None)
        elif "id2label" in used:
            table.pop("num_labels", None)
            if "label2id" not in used:
                table.pop("label2id", None)
        if "id2label" in table:
            table.pop("num_labels", None)
        if "torch_dtype" in used:
            used.setdefault("dtype", used.pop("torch_dtype"))
        config = cls(**{**table, **used})
        for name, value in ignored.items():
            check_depth(name, value)
            config._ignored[name] = value
        return (config, unused) if return_unused else config

    @classmethod
    def keywords(cls) -> tuple[str, ...]:
        """Names of the keywords that a configuration is made of."""
        return (*cls.fields, *cls.settable)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Any:
        """Read one JSON file.

        Raises:
            MissingFileError: it cannot be read.
            ConfigError: it is not a JSON object, or a value in it is refused.
        """
        return cls._from_file(json_file, cls.from_dict)

    @classmethod
    def _from_file(cls, json_file: str | os.PathLike, build: Callable) -> Any:
        return cls._named(json_file, build, read_json(json_file))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """Read the `config.json` of a directory, a file or a Hub repository.

        Args:
            pretrained_model_name_or_path: directory, JSON file, or "owner/name".
            **kwargs: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only` and
                `force_download` go to the Hub; every other key overrides a field.

        Raises:
            MissingFileError: nothing is there.
            ConfigError: the file is not a configuration of this architecture.
        """
        return cls._read(pretrained_model_name_or_path, cls.from_dict, kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The keys of a `config.json`, and the keywords that do not say where it is.

        Args:
            pretrained_model_name_or_path: directory, JSON file, or "owner/name".
            **kwargs: as in `from_pretrained`.

        Raises:
            MissingFileError: nothing is there.
            CheckpointError: the file is not a JSON object.
        """
        hub, rest = split_hub_options(kwargs)
        return read_json(find_file(pretrained_model_name_or_path, CONFIG_NAME, **hub)), rest

    @classmethod
    def _read(cls, place: str | os.PathLike, build: Callable, kwargs: Mapping[str, Any]):
        """The result of `build` for the `config.json` of a model."""
        hub, overrides = split_hub_options(kwargs)
        path = find_file(place, CONFIG_NAME, **hub)
        table = {**read_json(path), "_name_or_path": str(place)}
        return cls._named(path, build, table, **overrides)

    @classmethod
    def _named(cls, path: str | os.PathLike, build: Callable, *args: Any, **kwargs: Any):
        """Run `build`, naming the file in a refusal."""
        try:
            return build(*args, **kwargs)
        except ConfigError as error:
            raise ConfigError(f"{Path(path)}: {error}") from error

    def update(self, config_dict: Mapping[str, Any]) -> None:
        """Set several fields."""
        for name, value in config_dict.items():
            setattr(self, name, value)

    def update_from_string(self, update_str: str) -> None:
        """Set several fields from text such as "hidden_size=96,qkv_bias=false".

        Args:
            update_str: pairs `name=value`, separated by commas. Values are read as the type that
                the field has now: an integer, a number, true or false, or text.

        Raises:
            ConfigError: a pair is none, names no attribute, or its value is not of that type.
        """
        for pair in update_str.split(","):
            name, equals, text = pair.partition("=")
            if not equals or "=" in text:
                raise ConfigError(
                    "config: expected pairs `name=value`, separated by commas; given "
                    f"{shown(pair)}."
                )
            if not hasattr(self, name):
                raise ConfigError(
                    f"config: {type(self).__name__} has no attribute {shown(name)} to set."
                )
            setattr(self, name, _read_as(getattr(self, name), name, text))

    def get_text_config(self, *args: Any, **kwargs: Any) -> ViTConfig:
        """The configuration itself: there is no part of it for text."""
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ViTConfig):
            return NotImplemented
        runtime = {name: None for name in _RUNTIME if name != "_ignored"}
        return type(self) is type(other) and {**vars(self), **runtime} == {**vars(other), **runtime}

    __hash__ = None  # type: ignore[assignment]  # fields can be set

    def __repr__(self) -> str:
        try:
            return f"{type(self).__name__} {self.to_json_string()}"
        except ConfigError:
            return f"{type(self).__name__}({vars(self)!r})"


# Attributes that are about this process; `_ignored` holds keys of a file that the family has no use
# for, which are written back.
_RUNTIME = ("_name_or_path", "_attn_implementation", "_commit_hash", "_ignored")

_PLAIN = (bool, int, float, str)

# Keywords of `from_dict` that are no fields.
_KNOWN = (
    *("num_labels", "torch_dtype", "model_type", "_name_or_path", "name_or_path"),
    "attn_implementation",
)


def _kernel_name(value: Any, before: str | None) -> str | None:
    """The name of an attention kernel; Transformers' mapping has that of the whole model as ""."""
    if isinstance(value, Mapping):
        value = value.get("", before)
    if value is not None and not isinstance(value, str):
        raise refusal("attn_implementation", "the name of an attention kernel, or None", value)
    return value


def _read_as(old: Any, name: str, text: str) -> Any:
    """Text as the type of the old value.

    Source: `update_from_string` of Transformers 4.57.6's `configuration_utils.py`.
    """
    if isinstance(old, bool):
        if text.lower() in ("true", "1", "y", "yes"):
            return True
        if text.lower() in ("false", "0", "n", "no"):
            return False
        raise refusal(name, "true or false", text)
    if isinstance(old, (int, float)):
        try:
            return type(old)(text)
        except ValueError as error:
            kind = "an integer" if isinstance(old, int) else "a number"
            raise refusal(name, kind, text) from error
    if isinstance(old, str):
        return text
    raise ConfigError(
        f"config: `{name}` cannot be set from text, as it is neither a number, true or false, nor "
        f"text; set the attribute. Given {shown(text)}."
    )


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _describe(cls: type[ViTConfig]) -> None:
    """Give a family the documentation and the signature that its rows make."""
    lines = [f"{name}: {row.doc}." for name, row in cls.fields.items()]
    if cls.__doc__ is not None:  # as under `python -OO`
        cls.__doc__ = cls.__doc__.replace("{fields}", "\n        ".join(lines))
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=row.default)
        for name, row in cls.fields.items()
    ]
    unknown = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    cls.__signature__ = inspect.Signature([*parameters, unknown])


class FamilyConfig(ViTConfig):
    """Base of the other families: what `ViTConfig` has as fields and a family has not is fixed, at
    the field's default unless the family says otherwise, or has another name."""


_FAMILIES: dict[str, type[ViTConfig]] = {
    ViTConfig.model_type: ViTConfig,
    ViTConfig.extended_type: ViTConfig,
}
_describe(ViTConfig)


def config_classes() -> dict[str, type[ViTConfig]]:
    """`model_type` -> class, for every family."""
    importlib.import_module("vit_common.families")  # they announce themselves, see ViTConfig
    return _FAMILIES


def __getattr__(name: str) -> Any:
    # The families were in this module, and are importable from it still.
    families = importlib.import_module("vit_common.families")
    if name in families.__all__:
        return getattr(families, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


OURS = "vit_flax"
"""Key of timm's `config.json` under which a conversion puts the whole configuration."""


def is_timm(table: Mapping[str, Any] | None) -> bool:
    """Whether a `config.json` is timm's own, also as Transformers wraps it (`timm_wrapper`)."""
    wrapped = (None, "timm_wrapper")
    return table is not None and "architecture" in table and table.get("model_type") in wrapped


def without_timm(table: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration out of a file of timm's own kind; any other as it is.

    Raises:
        ConfigError: timm's file holds none.
    """
    if not is_timm(table):
        return dict(table)
    if isinstance(table.get(OURS), Mapping):
        name = {"_name_or_path": table["_name_or_path"]} if "_name_or_path" in table else {}
        return {**table[OURS], **name}
    raise ConfigError(
        f"config: this is timm's own file, of {shown(table['architecture'])}; the network's sizes "
        "are in its weights. Load the model with an Auto class and take its `config`, or convert "
        "it with `vit convert`."
    )


def as_config(config: Any, wanted: type[ViTConfig] = ViTConfig) -> Any:
    """A configuration of the wanted family: itself, or made from Transformers' own (anything with
    `to_dict`).

    Raises:
        ConfigError: it is neither, or of another architecture.
    """
    if isinstance(config, ViTConfig):
        own = isinstance(config, wanted) and config.base_family == wanted.base_family
        if config.model_type != wanted.model_type and not own:
            related = wanted.from_related(config)
            if related is not None:
                return related
            raise ConfigError(
                f"`config` must be a {wanted.__name__}; given {type(config).__name__}. "
                + config.use_instead()
            )
        return config
    if hasattr(config, "to_dict"):
        # Transformers sets "sdpa" by itself, so that says nothing of what its user wants.
        kernel = getattr(config, "_attn_implementation", None)
        chosen = {"attn_implementation": kernel} if kernel == "eager" else {}
        return wanted.from_dict(config.to_dict(), **chosen)
    raise ConfigError(f"`config` must be a {wanted.__name__}; given {type(config).__name__}.")
