"""`ViTConfig`: the one schema both twins, the converter and the commands are built from.

Field names and defaults are those of Transformers 4.57.6 (`models/vit/configuration_vit.py`), so a
Hub `config.json` reads as it is. Every value is checked where it is set. Keys this project does
not know are kept as attributes and written back.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from vit_common.config_fields import (
    ACTIVATIONS,
    CHECKS,
    EXTENSIONS,
    FIELDS,
    FLOATS,
    MOST_LABELS,
    SIZES,
    VIT,
    VIT_FIELDS,
    WRITTEN_IF_SET,
    Fields,
    Pooling,
    PositionTokens,
    fields_of,
    integer,
    refusal,
)
from vit_common.errors import ConfigError
from vit_common.positions import ResizeRule

__all__ = [
    "ACTIVATIONS",
    "CONFIG_CLASSES",
    "CONFIG_NAME",
    "FIELDS",
    "FLOATS",
    "OURS",
    "AutoConfig",
    "BeitConfig",
    "DeiTConfig",
    "Dinov2Config",
    "Dinov2WithRegistersConfig",
    "FamilyConfig",
    "Flags",
    "ViTConfig",
    "as_config",
    "config_class",
    "is_timm",
]

CONFIG_NAME = "config.json"


class Flags(NamedTuple):
    """What a call returns."""

    output_attentions: bool
    output_hidden_states: bool
    return_dict: bool


class ViTConfig:
    """Sizes, rates and labels of a Vision Transformer.

    Args:
        hidden_size: width D of the residual stream.
        num_hidden_layers: number L of encoder blocks.
        num_attention_heads: number A of heads; must divide `hidden_size`.
        intermediate_size: width I of the MLP.
        hidden_act: activation of the MLP, one of `ACTIVATIONS` or a callable. "gelu" is the exact
            (erf) one, "gelu_new" and "gelu_pytorch_tanh" the tanh approximation.
        hidden_dropout_prob: rate of dropout after the embeddings, attention output and MLP.
        attention_probs_dropout_prob: rate of dropout on the attention probabilities.
        initializer_range: standard deviation of the truncated normal that new weights are drawn
            from.
        layer_norm_eps: epsilon of every layer norm (Hub ViT 1e-12; timm and Google 1e-6).
        image_size: side of the square input in pixels, or (height, width).
        patch_size: side of a square patch in pixels, or (height, width).
        num_channels: channels C of the input.
        qkv_bias: whether query, key and value have a bias.
        encoder_stride: side of the pixel block that a token is decoded to in masked image
            modelling.
        pooler_output_size: width of the pooler; None means `hidden_size`.
        pooler_act: activation of the pooler.
        gradient_checkpointing: recompute each block in the backward pass instead of storing it.
        position_resize: how position embeddings are resampled to another grid; the families
            differ, see `vit_common.positions.resize_matrix`.
        layer_scale_init_value: what the per-channel factors on both residual branches start as
            (Touvron et al. 2021, arXiv:2103.17239); 0 means that there are none.
        use_swiglu_ffn: the MLP is `silu(x1) * x2` of a first layer of width 2 I (Shazeer 2020,
            arXiv:2002.05202) instead of `hidden_act` of one of width I.
        num_register_tokens: learned tokens after the class token (Darcet et al. 2023,
            arXiv:2309.16588).
        use_cls_token: whether there is a class token; without it `pooling` must be "mean".
        position_tokens: which tokens in front of the patches have position embeddings: "all",
            "cls" (the class token alone) or "patches" (none of them).
        use_absolute_position_embeddings: whether position embeddings are added to the tokens.
        use_relative_position_bias, use_shared_relative_position_bias: a learned bias on the
            attention scores for each offset between patches (Bao et al. 2021, arXiv:2106.08254),
            one table a block, or one for all blocks.
        pooling: what the classifier looks at: the class token, or the mean of the patches.
        norm_after_pooling: the final norm is applied to the mean of the patches, not to the tokens.
        use_representation_layer: a dense layer of `pooler_output_size` with `pooler_act` stands
            before the classifier (pre-logits, Dosovitskiy et al. 2021).
        drop_path_rate: rate of stochastic depth (Huang et al. 2016, arXiv:1603.09382) at the last
            block; it grows evenly from zero at the first.
        output_hidden_states, output_attentions, return_dict: what calls return when not told.
        num_labels: number K of classes; rebuilds `id2label` and `label2id`.
        id2label, label2id: class index to label and back.
        problem_type: which loss labels mean; None decides from `num_labels` and the labels' dtype.
        architectures: class names recorded in the file.
        dtype (or the older `torch_dtype`): dtype the weights were saved in, as a string.
        **unknown: kept as attributes and written back.

    Raises:
        ConfigError: a value is not what the field holds, or two fields contradict each other.
    """

    model_type: ClassVar[str] = "vit"
    fields: ClassVar[Fields] = VIT_FIELDS

    extended_type: ClassVar[str] = "vit_extended"
    """`model_type` in files of networks that Transformers' ViT cannot hold, so that it refuses them
    instead of running another network."""
    written_if_set: ClassVar[tuple[str, ...]] = (*EXTENSIONS, "drop_path_rate")

    use_mask_token: bool = False
    use_distillation_token: ClassVar[bool] = False
    any_image_size: ClassVar[bool] = False

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
    pooling: Pooling
    norm_after_pooling: bool
    use_representation_layer: bool
    drop_path_rate: float
    gradient_checkpointing: bool
    position_resize: ResizeRule
    output_hidden_states: bool
    output_attentions: bool
    return_dict: bool
    id2label: dict[int, str]
    label2id: dict[str, Any]
    problem_type: str | None
    architectures: list[str] | None
    dtype: str | None
    _name_or_path: str
    _attn_implementation: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if len(args) > len(self.fields):
            raise ConfigError(
                f"{type(self).__name__} takes at most {len(self.fields)} positional arguments."
            )
        for name, value in zip(self.fields, args, strict=False):
            if name in kwargs:
                raise ConfigError(f"config: `{name}` was given twice.")
            kwargs[name] = value

        model_type = kwargs.pop("model_type", None)
        if model_type not in (None, "", self.model_type, self.extended_type):
            known = CONFIG_CLASSES.get(model_type)
            raise ConfigError(
                f"config: `model_type` must be {self.model_type!r} for {type(self).__name__}; "
                f"given {model_type!r}. "
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
        for name, (default, _) in self.fields.items():
            if name not in ("id2label", "label2id"):
                setattr(self, name, kwargs.pop(name, default))
        self._set_labels(num_labels, kwargs.pop("id2label", None), kwargs.pop("label2id", None))
        object.__setattr__(self, "_name_or_path", kwargs.pop("_name_or_path", ""))
        for name, value in kwargs.items():
            taken = getattr(type(self), name, None)
            if isinstance(taken, property):  # derived here; a file may store it too
                if (name in CHECKS or name == "head_dim") and value != getattr(self, name):
                    raise refusal(
                        name, f"{getattr(self, name)!r}, which follows from the rest", value
                    )
                continue
            if isinstance(taken, (bool, int, float, str)):  # the same for the whole family
                if value != taken:
                    raise refusal(name, f"{taken!r} for {type(self).__name__}", value)
                continue
            if taken is not None:
                raise ConfigError(
                    f"config: `{name}` must not be a key; {type(self).__name__} has a method or "
                    f"attribute of that name; given {value!r}."
                )
            object.__setattr__(self, name, value)
        self.validate()

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
                f"config: `num_labels` is {num_labels!r} but `id2label` names "
                f"{len(self.id2label)} classes; give one of the two, or make them agree."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "torch_dtype":
            name = "dtype"
        if name == "pooler_output_size" and value is None:
            value = self.hidden_size
        if name in self.fields:
            value = self.fields[name][1](name, value)
        elif isinstance(getattr(type(self), name, None), property) and name != "num_labels":
            raise refusal(name, f"left alone: {type(self).__name__} derives it", value)
        super().__setattr__(name, value)

    def validate(self) -> None:
        """Check the rules that tie fields together; both twins call it before they build.

        Raises:
            ConfigError: `hidden_size` is not a multiple of `num_attention_heads`, the image holds
                no whole patch, or there is nothing to pool.
        """
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"config: `hidden_size` must be a multiple of `num_attention_heads`; given "
                f"{self.hidden_size} and {self.num_attention_heads}."
            )
        if min(self.grid_size) < 1:
            raise ConfigError(
                f"config: `image_size` must be at least `patch_size`; given {self.image_size!r} "
                f"and {self.patch_size!r}."
            )
        if not self.use_cls_token and self.pooling != "mean":
            raise ConfigError(
                "config: `pooling` must be 'mean' where `use_cls_token` is False; given "
                f"{self.pooling!r}."
            )
        if self.norm_after_pooling and self.pooling != "mean":
            raise ConfigError(
                "config: `pooling` must be 'mean' where `norm_after_pooling` is True; given "
                f"{self.pooling!r}."
            )
        if self.norm_after_pooling and self.use_representation_layer:
            raise ConfigError(
                "config: `norm_after_pooling` and `use_representation_layer` must not both be True."
            )

    # -- what the network is made of; the same names for every family

    @classmethod
    def class_stem(cls) -> str:
        """What the names of the family's classes begin with: "ViT", "DeiT", ...."""
        return cls.__name__.removesuffix("Config")

    @classmethod
    def use_instead(cls) -> str:
        """What to say to who loads this family into another's class."""
        stem = cls.class_stem()
        return (
            f"These are weights of the family {cls.model_type!r}: use {stem}Model or "
            f"{stem}ForImageClassification (in JAX Flax{stem}Model ...), or the Auto classes, "
            "which choose them."
        )

    @property
    def is_extended(self) -> bool:
        """Whether a field says what Transformers' network of this `model_type` cannot do."""
        return any(
            name in EXTENSIONS and getattr(self, name) != default
            for name, (default, _) in self.fields.items()
            if name in self.written_if_set
        )

    @property
    def base_model_prefix(self) -> str:
        """What a model with a head calls the network under it; the start of its weights' names."""
        return self.model_type

    @property
    def use_key_bias(self) -> bool:
        """Whether the key has a bias, as query and value do with `qkv_bias`."""
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

    @property
    def has_layer_scale(self) -> bool:
        """Whether both residual branches are multiplied by learned factors, one a channel."""
        return self.layer_scale_init_value > 0

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Rate of stochastic depth of each block."""
        last = max(self.num_hidden_layers - 1, 1)
        return tuple(self.drop_path_rate * i / last for i in range(self.num_hidden_layers))

    @property
    def pooler_type(self) -> Literal["dense", "norm", "token"]:
        """What the pooler does with the class token or the mean of the patches: a dense layer with
        `pooler_act`, a norm, or nothing."""
        return "norm" if self.norm_after_pooling else "dense"

    @property
    def classifier_has_pooler(self) -> bool:
        """Whether the classifier looks at the pooler's output."""
        return self.norm_after_pooling or self.use_representation_layer

    @property
    def classifier_width(self) -> int:
        """Inputs of the classifier."""
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
        """The name Transformers gives to `return_dict` where models read it."""
        return self.return_dict

    @property
    def name_or_path(self) -> str:
        """Where the configuration was read from."""
        return self._name_or_path

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
        own = (self.output_attentions, self.output_hidden_states, self.return_dict)
        return Flags(*(bool(o if g is None else g) for g, o in zip(given, own, strict=True)))

    # -- files

    def to_dict(self) -> dict[str, Any]:
        """A dict of every field as JSON holds it, unknown keys included; `id2label` keyed by int.

        Raises:
            ConfigError: an activation is a callable, which no file can hold.
        """
        out: dict[str, Any] = {
            "model_type": self.extended_type if self.is_extended else self.model_type
        }
        for name, value in vars(self).items():
            if name in ("_name_or_path", "_attn_implementation"):
                continue
            if name in ("hidden_act", "pooler_act") and not isinstance(value, str):
                raise refusal(name, "the name of an activation, to be written to a file", value)
            optional = name in WRITTEN_IF_SET or name in self.written_if_set
            if optional and name in self.fields and value == self.fields[name][0]:
                continue
            out[name] = list(value) if isinstance(value, tuple) else copy.deepcopy(value)
        return out

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of `config.json`: sorted keys, two spaces of indent, a newline at the end.

        `use_diff` is accepted for Transformers' sake; every field of the network is written.
        """
        table = self.to_dict()
        # JSON would sort the string keys 0, 1, 10, ...; the label tables keep their own order.
        table["id2label"] = {str(index): label for index, label in table["id2label"].items()}
        ordered = {name: table[name] for name in sorted(table)}
        try:
            return json.dumps(ordered, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config: a value cannot be written as JSON ({error}).") from error

    def to_json_file(self, path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write `to_json_string()` to `path`; the old file survives a failure."""
        from vit_common.files.checkpoint import write_text

        write_text(path, self.to_json_string())

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write `config.json` into a directory, made if it is not there.

        `push_to_hub=True` (with `repo_id`, `token`, ...) uploads the directory afterwards.

        Raises:
            MissingFileError: the directory cannot be made or written.
        """
        from vit_common.files.checkpoint import make_directory
        from vit_common.files.hub import push_if_asked

        directory = make_directory(save_directory)
        self.to_json_file(directory / CONFIG_NAME)
        push_if_asked(directory, kwargs, files=[CONFIG_NAME])

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **overrides: Any) -> Any:
        """Build from a dict such as `to_dict()` gives; `overrides` win over it.

        With `return_unused_kwargs=True` the result is `(config, unused)`, where `unused` holds
        the overrides that name no field and no key of the dict.
        """
        if not isinstance(config_dict, Mapping):
            raise ConfigError(f"config: expected a mapping of fields; given {config_dict!r}.")
        return_unused = overrides.pop("return_unused_kwargs", False)
        table = _without_timm(config_dict)
        known = {*cls.fields, *table, "num_labels", "torch_dtype", "model_type", "_name_or_path"}
        unused = {k: v for k, v in overrides.items() if k not in known} if return_unused else {}
        used = {k: v for k, v in overrides.items() if k not in unused}
        if "num_labels" in used and used["num_labels"] is None:
            del used["num_labels"]
        if "num_labels" in used and "id2label" not in used:
            # A new number of classes replaces the file's label tables, as it always did.
            if len(table.get("id2label") or ()) != used["num_labels"]:
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
        return (config, unused) if return_unused else config

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Any:
        """Read one JSON file.

        Raises:
            MissingFileError: it cannot be read.
            ConfigError: it is not a JSON object, or a value in it is refused.
        """
        from vit_common.files.checkpoint import read_json

        return cls._named(json_file, cls.from_dict, read_json(json_file))

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
    def _read(cls, place: str | os.PathLike, build: Callable, kwargs: Mapping[str, Any]):
        """What `build` makes of the `config.json` of a model."""
        from vit_common.files.checkpoint import read_json
        from vit_common.files.hub import find_file, split_hub_options

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

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ViTConfig):
            return NotImplemented
        mine, theirs = dict(vars(self)), dict(vars(other))
        mine.pop("_name_or_path"), theirs.pop("_name_or_path")
        return type(self) is type(other) and mine == theirs

    __hash__ = None  # type: ignore[assignment]  # fields can be set

    def __repr__(self) -> str:
        try:
            return f"{type(self).__name__} {self.to_json_string()}"
        except ConfigError:
            return f"{type(self).__name__}({vars(self)!r})"


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


OURS = "vit_flax"
"""Key of timm's `config.json` under which a conversion puts the whole configuration."""


def is_timm(table: Mapping[str, Any] | None) -> bool:
    """Whether a `config.json` is timm's own."""
    return table is not None and "architecture" in table and "model_type" not in table


def _without_timm(table: Mapping[str, Any]) -> dict[str, Any]:
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
        f"config: this is timm's own file, of {table['architecture']!r}; the network's sizes are "
        "in its weights. Load the model with an Auto class and take its `config`, or convert it "
        "with `vit convert`."
    )


class FamilyConfig(ViTConfig):
    """Base of the other families: what `ViTConfig` has as fields is fixed, or has another name."""

    use_distillation_token = False
    layer_scale_init_value = 0.0
    use_swiglu_ffn = False
    num_register_tokens = 0
    use_cls_token = True
    position_tokens: PositionTokens = "all"
    use_absolute_position_embeddings = True
    use_relative_position_bias = False
    use_shared_relative_position_bias = False
    norm_after_pooling = False
    use_representation_layer = False
    pooling: Pooling = "cls"


class DeiTConfig(FamilyConfig):
    """A distilled DeiT (Touvron et al. 2021, arXiv:2012.12877): a distillation token after the
    class token, both with positions. Arguments as `ViTConfig`.
    (DeiT without distillation is a ViT.)

    Source: `models/deit/configuration_deit.py` of Transformers 4.57.6.
    """

    model_type = "deit"
    extended_type = "deit"
    fields = fields_of(f"{VIT} drop_path_rate")
    written_if_set = ("drop_path_rate",)

    use_distillation_token = True


class BeitConfig(FamilyConfig):
    """BEiT (Bao et al. 2021, arXiv:2106.08254). Arguments as `ViTConfig`, and

    Args:
        vocab_size: number of visual tokens that masked image modelling predicts.
        use_mask_token: whether there is a mask token.
        use_mean_pooling: pool the mean of the patches through a norm, instead of the class token.

    Any other key of a Hub file (`pool_scales`, `out_indices`, ...) is kept; segmentation heads are
    not built here.

    Source: `models/beit/configuration_beit.py` of Transformers 4.57.6.
    """

    model_type = "beit"
    extended_type = "beit"
    fields = fields_of(
        f"""vocab_size {SIZES} use_mask_token use_absolute_position_embeddings
        use_relative_position_bias use_shared_relative_position_bias layer_scale_init_value
        drop_path_rate use_mean_pooling""",
        use_absolute_position_embeddings=False,
        layer_scale_init_value=0.1,
        drop_path_rate=0.1,
    )
    written_if_set: ClassVar[tuple[str, ...]] = ()

    use_mean_pooling: bool

    any_image_size = True
    qkv_bias = True
    use_key_bias = False
    pooler_act = "linear"
    classifier_has_pooler = True

    @property
    def pooling(self) -> Pooling:  # type: ignore[override]
        """What the classifier looks at."""
        return "mean" if self.use_mean_pooling else "cls"

    @property
    def norm_after_pooling(self) -> bool:  # type: ignore[override]
        """Whether the final norm is applied to the mean of the patches."""
        return self.use_mean_pooling

    @property
    def pooler_type(self) -> Literal["dense", "norm", "token"]:
        """What the pooler does."""
        return "norm" if self.use_mean_pooling else "token"

    @property
    def pooler_output_size(self) -> int:  # type: ignore[override]
        """Width of the pooled output."""
        return self.hidden_size


class Dinov2Config(FamilyConfig):
    """DINOv2 (Oquab et al. 2023, arXiv:2304.07193). Arguments as `ViTConfig`, and

    Args:
        mlp_ratio: width of the MLP over `hidden_size`; with `use_swiglu_ffn` two thirds of that,
            rounded up to a multiple of eight.
        layerscale_value: what the per-channel factors on both residual branches start as.
        use_mask_token: whether there is a mask token.
        drop_path_rate: rate of stochastic depth, the same for every block.

    Source: `models/dinov2/configuration_dinov2.py` of Transformers 4.57.6.
    """

    model_type = "dinov2"
    extended_type = "dinov2"
    fields = fields_of(
        """hidden_size num_hidden_layers num_attention_heads mlp_ratio hidden_act
        hidden_dropout_prob attention_probs_dropout_prob initializer_range layer_norm_eps
        image_size patch_size num_channels qkv_bias layerscale_value drop_path_rate use_swiglu_ffn
        use_mask_token""",
        layer_norm_eps=1e-6,
        patch_size=14,
        use_mask_token=True,
    )
    written_if_set: ClassVar[tuple[str, ...]] = ()

    mlp_ratio: float
    layerscale_value: float

    any_image_size = True
    pooler_act = "linear"
    pooling: Pooling = "cls_mean"
    position_tokens: PositionTokens = "cls"

    @property
    def intermediate_size(self) -> int:  # type: ignore[override]
        """Width I of the MLP."""
        width = int(self.hidden_size * self.mlp_ratio)
        return (int(width * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else width

    @property
    def layer_scale_init_value(self) -> float:  # type: ignore[override]
        """What the per-channel factors start as."""
        return self.layerscale_value

    @property
    def has_layer_scale(self) -> bool:
        """Always: also where `layerscale_value` is zero."""
        return True

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Rate of stochastic depth of each block."""
        return (self.drop_path_rate,) * self.num_hidden_layers

    @property
    def pooler_type(self) -> Literal["dense", "norm", "token"]:
        """What the pooler does."""
        return "token"

    @property
    def pooler_output_size(self) -> int:  # type: ignore[override]
        """Width of the pooled output."""
        return self.hidden_size


class Dinov2WithRegistersConfig(Dinov2Config):
    """DINOv2 with register tokens (Darcet et al. 2023, arXiv:2309.16588). Arguments as
    `Dinov2Config`, and `num_register_tokens`.

    Source: `models/dinov2_with_registers/configuration_dinov2_with_registers.py` of Transformers
    4.57.6.
    """

    model_type = "dinov2_with_registers"
    extended_type = "dinov2_with_registers"
    fields = fields_of(
        """hidden_size num_hidden_layers num_attention_heads mlp_ratio hidden_act
        hidden_dropout_prob attention_probs_dropout_prob initializer_range layer_norm_eps
        image_size patch_size num_channels qkv_bias layerscale_value drop_path_rate use_swiglu_ffn
        num_register_tokens use_mask_token""",
        layer_norm_eps=1e-6,
        num_register_tokens=4,
        position_resize="bicubic_antialias",
        use_mask_token=True,
    )
    written_if_set = ("use_mask_token",)


CONFIG_CLASSES: dict[str, type[ViTConfig]] = {
    "vit": ViTConfig,
    "vit_extended": ViTConfig,
    "deit": DeiTConfig,
    "beit": BeitConfig,
    "dinov2": Dinov2Config,
    "dinov2_with_registers": Dinov2WithRegistersConfig,
}
"""`model_type` -> class."""


# Keys of `vit_mae` for its decoder and its training, which an encoder does not have.
_MAE_ONLY = (
    "decoder_num_attention_heads",
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_intermediate_size",
    "mask_ratio",
    "norm_pix_loss",
)

# Keys of configurations that change what the network computes, and that no family here has; the
# values that leave it as it is.
_CHANGES_NETWORK: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": (None, "absolute"),
    "add_cross_attention": (False,),
    "is_decoder": (False,),
    "pruned_heads": ({}, None),
    "use_qk_norm": (False, None),
    "qk_norm": (False, None),
    "qk_layernorm": (False, None),
    "rope_theta": (None,),
    "rope_scaling": (None,),
    "use_pre_norm": (False, None),
    "norm_type": (None, "layernorm", "layer_norm"),
}


def config_class(model_type: Any) -> type[ViTConfig]:
    """The class of a `model_type`; ConfigError if there is none here."""
    if not isinstance(model_type, str) or model_type not in CONFIG_CLASSES:
        raise ConfigError(
            f"config: `model_type` must be one of {', '.join(CONFIG_CLASSES)}; given "
            f"{model_type!r}."
        )
    return CONFIG_CLASSES[model_type]


class AutoConfig:
    """Picks the configuration's class by its `model_type`; it cannot be instantiated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ConfigError(
            "AutoConfig is not a configuration itself; call AutoConfig.from_pretrained(name)."
        )

    @classmethod
    def for_model(cls, model_type: str, *args: Any, **kwargs: Any) -> ViTConfig:
        """A configuration of that family."""
        return config_class(model_type)(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **overrides: Any) -> Any:
        """As `ViTConfig.from_dict`, of the family that `model_type` names; the encoder of a
        `vit_mae` is a ViT.

        Raises:
            ConfigError: it is of no family known here, a value is refused, or a key changes the
                network in a way that is not known here.
        """
        if not isinstance(config_dict, Mapping):
            raise ConfigError(f"config: expected a mapping of fields; given {config_dict!r}.")
        table = _without_timm(config_dict)
        odd = [
            f"{key}={table[key]!r}"
            for key, harmless in _CHANGES_NETWORK.items()
            if key in table and table[key] not in harmless
        ]
        if odd:
            raise ConfigError(
                f"config: {', '.join(odd)} changes what the network computes, which no network "
                "here can do; this model cannot be used."
            )
        if table.get("model_type") == "vit_mae":
            table = {key: value for key, value in table.items() if key not in _MAE_ONLY}
            table.update(model_type=ViTConfig.model_type, architectures=None)
        return config_class(table.get("model_type")).from_dict(table, **overrides)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """As `ViTConfig.from_pretrained`, of the family that `model_type` names.

        Raises:
            MissingFileError: nothing is there.
            ConfigError: the file is not a configuration of a family known here.
        """
        return ViTConfig._read(pretrained_model_name_or_path, cls.from_dict, kwargs)


def as_config(config: Any, wanted: type[ViTConfig] = ViTConfig) -> Any:
    """A configuration of the wanted family: itself, or made from Transformers' own (anything with
    `to_dict`).

    Raises:
        ConfigError: it is neither, or of another architecture.
    """
    if isinstance(config, ViTConfig):
        if config.model_type != wanted.model_type:
            raise ConfigError(
                f"`config` must be a {wanted.__name__}; given {type(config).__name__}. "
                + config.use_instead()
            )
        return config
    if hasattr(config, "to_dict"):
        return wanted.from_dict(config.to_dict())
    raise ConfigError(f"`config` must be a {wanted.__name__}; given {type(config).__name__}.")
