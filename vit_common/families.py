"""The families beside ViT, and the choice among all by `model_type`."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

from vit_common.config import PoolerType, ViTConfig, config_classes, without_timm
from vit_common.config_fields import Pooling, PositionTokens, fields_of
from vit_common.errors import ConfigError, shown

__all__ = [
    "CONFIG_CLASSES",
    "CONFIG_MAPPING",
    "AutoConfig",
    "BeitConfig",
    "CLIPConfig",
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "DINOv3ViTConfig",
    "DeiTConfig",
    "Dinov2Config",
    "Dinov2WithRegistersConfig",
    "Dinov3ViTConfig",
    "FamilyConfig",
    "config_class",
]


class FamilyConfig(ViTConfig):
    """Base of the other families: what `ViTConfig` has as fields and a family has not is fixed, at
    the field's default unless the family says otherwise, or has another name."""


class DeiTConfig(FamilyConfig, fields=fields_of("deit")):
    """A distilled DeiT (Touvron et al. 2021, arXiv:2012.12877): a distillation token after the
    class token, both with positions. (DeiT without distillation is a ViT.)

    Args:
        {fields}
        **kwargs: `num_labels` and unknown keys, as for `ViTConfig`.

    Source: `models/deit/configuration_deit.py` of Transformers 4.57.6.
    """

    model_type = "deit"
    extended_type = "deit"

    use_distillation_token = True


class BeitConfig(FamilyConfig, fields=fields_of("beit")):
    """BEiT (Bao et al. 2021, arXiv:2106.08254).

    Args:
        {fields}
        **kwargs: `num_labels` and unknown keys, as for `ViTConfig`. Keys for segmentation
            (`pool_scales`, `out_indices`, ...) are kept; its heads are not built here.

    Source: `models/beit/configuration_beit.py` of Transformers 4.57.6.
    """

    model_type = "beit"
    extended_type = "beit"

    use_mean_pooling: bool

    any_image_size = True
    qkv_bias = True
    use_key_bias = False
    pooler_act = "linear"
    classifier_has_pooler = True

    @property
    def pooling(self) -> Pooling:  # type: ignore[override]
        """Input of the classifier."""
        return "mean" if self.use_mean_pooling else "cls"

    @property
    def norm_after_pooling(self) -> bool:  # type: ignore[override]
        """Whether the final norm is applied to the mean of the patches."""
        return self.use_mean_pooling

    @property
    def pooler_type(self) -> PoolerType:
        """Kind of the pooler."""
        return "norm" if self.use_mean_pooling else "token"

    @property
    def pooler_output_size(self) -> int:  # type: ignore[override]
        """Width of the pooled output."""
        return self.hidden_size


class Dinov2Config(FamilyConfig, fields=fields_of("dinov2", "use_mask_token")):
    """DINOv2 (Oquab et al. 2023, arXiv:2304.07193).

    Args:
        {fields}
        **kwargs: `num_labels` and unknown keys, as for `ViTConfig`. `intermediate_size` is one of
            them, as in Transformers: the width of the MLP follows from `mlp_ratio`.

    Source: `models/dinov2/configuration_dinov2.py` of Transformers 4.57.6.
    """

    model_type = "dinov2"
    extended_type = "dinov2"

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
        """Initial value of the per-channel factors."""
        return self.layerscale_value

    @property
    def has_layer_scale(self) -> bool:
        """Always True: also where `layerscale_value` is zero."""
        return True

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Rate of stochastic depth of each block."""
        return (self.drop_path_rate,) * self.num_hidden_layers

    @property
    def pooler_type(self) -> PoolerType:
        """Kind of the pooler."""
        return "token"

    @property
    def pooler_output_size(self) -> int:  # type: ignore[override]
        """Width of the pooled output."""
        return self.hidden_size


class Dinov2WithRegistersConfig(
    Dinov2Config, fields=fields_of("dinov2_with_registers", "use_mask_token")
):
    """DINOv2 with register tokens (Darcet et al. 2023, arXiv:2309.16588).

    Args:
        {fields}
        **kwargs: as for `Dinov2Config`.

    Source: `models/dinov2_with_registers/configuration_dinov2_with_registers.py` of Transformers
    4.57.6.
    """

    model_type = "dinov2_with_registers"
    extended_type = "dinov2_with_registers"


class DINOv3ViTConfig(
    FamilyConfig,
    fields=fields_of(
        "dinov3_vit",
        order=(
            "patch_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "hidden_act",
            "attention_dropout",
            "initializer_range",
            "layer_norm_eps",
            "rope_theta",
            "image_size",
            "num_channels",
            "query_bias",
            "key_bias",
            "value_bias",
            "proj_bias",
            "mlp_bias",
            "layerscale_value",
            "drop_path_rate",
            "use_gated_mlp",
            "num_register_tokens",
            "pos_embed_shift",
            "pos_embed_jitter",
            "pos_embed_rescale",
        ),
    ),
):
    """DINOv3 (Simeoni et al. 2025, arXiv:2508.10104): rotary positions by coordinates from -1 to 1,
    so that images of any size and shape are taken as they are, and registers (`storage tokens`).

    Args:
        {fields}
        **kwargs: `num_labels` and unknown keys, as for `ViTConfig`.

    Source: `models/dinov3_vit/configuration_dinov3_vit.py` of Transformers 4.57.6.
    """

    model_type = "dinov3_vit"
    extended_type = "dinov3_vit"

    attention_dropout: float
    layerscale_value: float
    query_bias: bool
    key_bias: bool
    value_bias: bool
    use_gated_mlp: bool
    pos_embed_shift: float | None
    pos_embed_jitter: float | None
    pos_embed_rescale: float | None

    any_image_size = True
    use_mask_token = True
    hidden_dropout_prob = 0.0
    pooler_act = "linear"
    pooling: Pooling = "cls_mean"
    use_absolute_position_embeddings = False
    rope_type = "dinov3"
    rope_rotate_half = True

    has_layer_scale = Dinov2Config.has_layer_scale
    layer_scale_init_value = Dinov2Config.layer_scale_init_value
    drop_path_rates = Dinov2Config.drop_path_rates
    pooler_type = Dinov2Config.pooler_type
    pooler_output_size = Dinov2Config.pooler_output_size

    @property
    def attention_probs_dropout_prob(self) -> float:  # type: ignore[override]
        """Dropout rate of the attention probabilities."""
        return self.attention_dropout

    @property
    def qkv_bias(self) -> bool:  # type: ignore[override]
        """Whether query, key and value all have a bias."""
        return self.query_bias and self.key_bias and self.value_bias

    @property
    def has_query_bias(self) -> bool:
        """Whether the query has a bias."""
        return self.query_bias

    @property
    def has_key_bias(self) -> bool:
        """Whether the key has a bias."""
        return self.key_bias

    @property
    def has_value_bias(self) -> bool:
        """Whether the value has a bias."""
        return self.value_bias

    @property
    def use_swiglu_ffn(self) -> bool:  # type: ignore[override]
        """Whether the MLP is gated."""
        return self.use_gated_mlp

    @property
    def gate_act(self) -> Any:
        """Activation of the gate."""
        return self.hidden_act


Dinov3ViTConfig = DINOv3ViTConfig


class _CLIPTower(FamilyConfig):
    """What both towers of CLIP have in common, and a `CLIPConfig` has with its image tower."""

    use_pre_norm = True
    use_patch_bias = False
    norm_after_pooling = True
    qkv_bias = True
    hidden_dropout_prob = 0.0
    is_part = True
    keeps_pooler = True
    classifier_has_pooler = False

    attention_dropout: float

    @property
    def attention_probs_dropout_prob(self) -> float:  # type: ignore[override]
        """Dropout rate of the attention probabilities."""
        return self.attention_dropout

    @property
    def pooler_output_size(self) -> int:  # type: ignore[override]
        """Width of the pooled output."""
        return self.hidden_size

    @property
    def base_model_prefix(self) -> str:
        """Name of the network inside every model of it; the prefix of its weights' names."""
        return "vision_model"

    @classmethod
    def class_stem(cls) -> str:
        """Prefix of the names of the family's classes."""
        return "CLIP"


class CLIPVisionConfig(
    _CLIPTower,
    fields=fields_of(
        "clip_vision_model",
        order=(
            "hidden_size",
            "intermediate_size",
            "projection_dim",
            "num_hidden_layers",
            "num_attention_heads",
            "num_channels",
            "image_size",
            "patch_size",
            "hidden_act",
            "layer_norm_eps",
            "attention_dropout",
            "initializer_range",
            "initializer_factor",
        ),
    ),
):
    """The image tower of CLIP (Radford et al. 2021, arXiv:2103.00020): a norm before the first
    block, no bias in the patch projection; the pooled output is the class token through a norm.

    Args:
        {fields}
        **kwargs: `num_labels` and unknown keys, as for `ViTConfig`.

    Source: `models/clip/configuration_clip.py` of Transformers 4.57.6.
    """

    model_type = "clip_vision_model"
    extended_type = "clip_vision_model"
    base_config_key = "vision_config"

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **overrides: Any) -> Any:
        """As `ViTConfig.from_dict`; of a whole CLIP's configuration it takes the image tower's."""
        return super().from_dict(_tower_of(cls, config_dict), **overrides)

    @classmethod
    def from_related(cls, config: ViTConfig) -> ViTConfig | None:
        """The image tower of a whole CLIP's configuration."""
        return config._tower("vision_config") if isinstance(config, CLIPConfig) else None


class CLIPTextConfig(
    _CLIPTower,
    fields=fields_of(
        "clip_text_model",
        order=(
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "projection_dim",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "hidden_act",
            "layer_norm_eps",
            "attention_dropout",
            "initializer_range",
            "initializer_factor",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
        ),
    ),
):
    """The text tower of CLIP (Radford et al. 2021, arXiv:2103.00020): the same blocks, in which a
    token attends to itself and those before it.

    Args:
        {fields}
        **kwargs: unknown keys, as for `ViTConfig`.

    Source: `models/clip/configuration_clip.py` of Transformers 4.57.6.
    """

    model_type = "clip_text_model"
    extended_type = "clip_text_model"
    base_config_key = "text_config"

    drop_path_rate = 0.0

    max_position_embeddings: int
    projection_dim: int
    eos_token_id: int | None

    @property
    def base_model_prefix(self) -> str:
        """Name of the network inside every model of it; the prefix of its weights' names."""
        return "text_model"

    def validate(self) -> None:
        """Check the rules that tie fields together.

        Raises:
            ConfigError: `hidden_size` is not a multiple of `num_attention_heads`.
        """
        self._check_heads()

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **overrides: Any) -> Any:
        """As `ViTConfig.from_dict`; of a whole CLIP's configuration it takes the text tower's."""
        return super().from_dict(_tower_of(cls, config_dict), **overrides)

    @classmethod
    def from_related(cls, config: ViTConfig) -> ViTConfig | None:
        """The text tower of a whole CLIP's configuration."""
        return config._tower("text_config") if isinstance(config, CLIPConfig) else None


def _tower_of(cls: type[_CLIPTower], table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a whole CLIP's configuration for one tower; any other table as it is."""
    if not isinstance(table, Mapping) or table.get("model_type") != "clip":
        return table
    key = cls.base_config_key
    part = _joined(cls, table.get(key), table.get(f"{key}_dict"))
    name = {"_name_or_path": table["_name_or_path"]} if "_name_or_path" in table else {}
    return {**part, **name}


def _joined(cls: type[_CLIPTower], part: Any, legacy: Any) -> dict[str, Any]:
    """The fields of a tower, as mappings say them; those of older files' second mapping win, its
    defaults too, as in Transformers."""
    tables = []
    for name, table in ((cls.base_config_key, part), (f"{cls.base_config_key}_dict", legacy)):
        table = table.to_dict() if hasattr(table, "to_dict") else table
        if table is not None and not isinstance(table, Mapping):
            raise ConfigError(
                f"config: `{name}` must be a mapping of fields; given {shown(table)}."
            )
        tables.append(dict(table or {}))
    part, legacy = tables
    if legacy:
        part.update(cls.from_dict({**legacy, "model_type": cls.model_type}).to_dict())
    _refuse_changes(part)
    kind = part.pop("model_type", "")
    if kind not in ("", None, cls.model_type, "clip"):
        raise ConfigError(
            f"config: `model_type` of `{cls.base_config_key}` must be {cls.model_type!r}; given "
            f"{shown(kind)}."
        )
    return {**part, "model_type": cls.model_type}


class CLIPConfig(
    _CLIPTower,
    fields=fields_of(
        "clip", order=("text_config", "vision_config", "projection_dim", "logit_scale_init_value")
    ),
):
    """A whole CLIP (Radford et al. 2021, arXiv:2103.00020), or its image tower with a classifier.

    What it has no field for is read from `vision_config`, and set there: `config.hidden_size` is
    that of the image tower.

    Args:
        {fields}
        **kwargs: `num_labels` and unknown keys, as for `ViTConfig`; fields of `CLIPVisionConfig`
            are set in `vision_config`.

    Source: `models/clip/configuration_clip.py` of Transformers 4.57.6.

    Example:
        >>> config = CLIPConfig(vision_config={"patch_size": 16}, projection_dim=640)
        >>> config.vision_config.num_patches, config.text_config.vocab_size
        (196, 49408)
    """

    model_type = "clip"
    extended_type = "clip"

    vision_config: CLIPVisionConfig
    text_config: CLIPTextConfig
    projection_dim: int
    logit_scale_init_value: float

    pooling: Pooling = "mean"
    sub_configs = {"text_config": CLIPTextConfig, "vision_config": CLIPVisionConfig}  # noqa: RUF012

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names = list(type(self).fields)
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        for key, cls in self.sub_configs.items():
            given, legacy = kwargs.get(key), kwargs.pop(f"{key}_dict", None)
            if not isinstance(given, cls) or legacy is not None:
                kwargs[key] = cls.from_dict(_joined(cls, given, legacy))
        inner = {
            name: kwargs.pop(name)
            for name in [*kwargs]
            if name in CLIPVisionConfig.fields and name not in names
        }
        for name, value in inner.items():
            setattr(kwargs["vision_config"], name, value)
        super().__init__(**kwargs)

    @classmethod
    def from_text_vision_configs(
        cls, text_config: CLIPTextConfig, vision_config: CLIPVisionConfig, **kwargs: Any
    ) -> CLIPConfig:
        """A configuration of two towers, as Transformers makes it."""
        return cls(text_config=text_config, vision_config=vision_config, **kwargs)

    @classmethod
    def from_related(cls, config: ViTConfig) -> ViTConfig | None:
        """A configuration of an image tower's, with its labels."""
        if not isinstance(config, CLIPVisionConfig):
            return None
        own = {name: getattr(config, name) for name in cls.fields if name in config.fields}
        made = cls(vision_config=config, **own)
        object.__setattr__(made, "_name_or_path", config._name_or_path)
        made._attn_implementation = config._attn_implementation
        return made

    def _tower(self, key: str) -> Any:
        """A copy of a tower's configuration, for a model of that tower alone."""
        tower = copy.copy(getattr(self, key))
        tower.name_or_path = self.name_or_path
        tower._attn_implementation = self._attn_implementation
        return tower

    def __getattr__(self, name: str) -> Any:
        if name in CLIPVisionConfig.fields and "vision_config" in vars(self):
            return getattr(self.vision_config, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in CLIPVisionConfig.fields and name not in self.fields:
            setattr(self.vision_config, name, value)
            return
        cls = self.sub_configs.get(name)
        if cls is not None and not isinstance(value, cls):
            value = cls.from_dict(_joined(cls, value, None))
        super().__setattr__(name, value)

    def validate(self) -> None:
        """Check the rules that tie fields together.

        Raises:
            ConfigError: a tower's configuration cannot be built.
        """
        self.vision_config.validate()
        self.text_config.validate()

    def to_dict(self) -> dict[str, Any]:
        """As `ViTConfig.to_dict`, the towers' configurations as mappings."""
        table = super().to_dict()
        for key in self.sub_configs:
            table[key] = getattr(self, key).to_dict()
        return table

    def get_text_config(self, *args: Any, **kwargs: Any) -> ViTConfig:
        """The text tower's."""
        return self.text_config


CONFIG_CLASSES = config_classes()
"""`model_type` -> class."""

CONFIG_MAPPING = {cls.model_type: cls for cls in CONFIG_CLASSES.values()}
"""The same by Transformers' names alone, for code that imports its `CONFIG_MAPPING`."""

BUILT_IN: Mapping[str, type[ViTConfig]] = dict(CONFIG_CLASSES)
"""As `CONFIG_CLASSES`, without what `AutoConfig.register` adds."""


# Keys of `vit_mae` for its decoder and its training, which an encoder does not have.
_MAE_ONLY = (
    "decoder_num_attention_heads",
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_intermediate_size",
    "mask_ratio",
    "norm_pix_loss",
)

# Keys of configurations that change what the network computes, in families that have no such field;
# the values that leave it as it is.
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


# What the configuration of a ViTHybrid's ResNet must be, after Transformers' defaults.
_RESNET: dict[str, Any] = {
    "model_type": "bit",
    "layer_type": "bottleneck",
    "global_padding": "SAME",
    "embedding_dynamic_padding": True,
    "hidden_act": "relu",
    "num_groups": 32,
    "width_factor": 1,
}
_BIT_DEFAULTS: dict[str, Any] = {
    "model_type": "bit",
    "layer_type": "preactivation",
    "hidden_act": "relu",
    "num_groups": 32,
    "width_factor": 1,
    "output_stride": 32,
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024, 2048],
    "depths": [3, 4, 6, 3],
}
_RESNET_OF_DEFAULTS: dict[str, Any] = {
    "global_padding": "same",
    "layer_type": "bottleneck",
    "depths": [3, 4, 9],
    "out_features": ["stage3"],
    "embedding_dynamic_padding": True,
}
_HYBRID_ONLY = (
    "backbone",
    "backbone_config",
    "backbone_featmap_shape",
    "backbone_kwargs",
    "use_pretrained_backbone",
    "use_timm_backbone",
)


def _without_backbone(table: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ViT with a stem, from those of a ViTHybrid.

    Args:
        table: as its `config.json` has them.

    Raises:
        ConfigError: its ResNet is not the one known here.

    Source: `models/deprecated/vit_hybrid` and `models/bit` of Transformers 4.57.6.
    """
    given = table.get("backbone_config")
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"config: `backbone_config` must be a mapping; given {shown(given)}.")
    backbone = {**_BIT_DEFAULTS, **(_RESNET_OF_DEFAULTS if given is None else given)}
    odd = {
        name: backbone.get(name)
        for name, wanted in _RESNET.items()
        if (str(backbone.get(name)).upper() if name == "global_padding" else backbone.get(name))
        != wanted
    }
    odd |= {name: table[name] for name in ("backbone", "use_timm_backbone") if table.get(name)}
    depths, widths = backbone["depths"], backbone["hidden_sizes"]
    listed = all(isinstance(value, (list, tuple)) for value in (depths, widths))
    width = backbone["embedding_size"]
    if not listed or not isinstance(width, int):
        odd |= {"depths": depths, "hidden_sizes": widths, "embedding_size": width}
    else:
        stages = len(depths)
        if list(widths[:stages]) != [4 * width * 2**i for i in range(stages)]:
            odd["hidden_sizes"] = widths
        if (backbone.get("out_features") or [f"stage{stages}"]) != [f"stage{stages}"]:
            odd["out_features"] = backbone["out_features"]
        if backbone["output_stride"] != 32 or not depths:
            odd |= {"depths": depths, "output_stride": backbone["output_stride"]}
    if odd:
        named = ", ".join(f"{name}={shown(value)}" for name, value in odd.items())
        raise ConfigError(
            f"config: the ResNet of this hybrid has {named}, which no network here has."
        )
    side, stride = table.get("patch_size", 1), 2 ** (1 + len(depths))
    patch = [s * stride for s in side] if isinstance(side, (list, tuple)) else side * stride
    fields = {name: value for name, value in table.items() if name not in _HYBRID_ONLY}
    return fields | {
        "model_type": "vit_extended",
        "architectures": None,
        "patch_size": patch,
        "stem_type": "resnetv2",
        "stem_depths": list(depths),
        "stem_width": width,
    }


def _refuse_changes(table: Mapping[str, Any]) -> None:
    """Raise ConfigError if a key of a file changes the network in a way that is not known here."""
    odd = [
        f"{key}={shown(table[key])}"
        for key, harmless in _CHANGES_NETWORK.items()
        if key in table and table[key] not in harmless and not _has_field(table, key)
    ]
    if odd:
        raise ConfigError(
            f"config: {', '.join(odd)} changes what the network computes, which no network "
            "here can do; this model cannot be used."
        )


def config_class(model_type: Any) -> type[ViTConfig]:
    """The class of a `model_type`; ConfigError if there is none here."""
    if not isinstance(model_type, str) or model_type not in CONFIG_CLASSES:
        raise ConfigError(
            f"config: `model_type` must be one of {', '.join(CONFIG_CLASSES)}; given "
            f"{shown(model_type)}."
        )
    return CONFIG_CLASSES[model_type]


def _has_field(table: Mapping[str, Any], name: str) -> bool:
    """Whether a file's family has a field of that name, and the file means that field by it: of
    those that Transformers lacks only a file of our own kind can."""
    model_type = table.get("model_type")
    cls = CONFIG_CLASSES.get(model_type) if isinstance(model_type, str) else None
    row = cls.fields.get(name) if cls else None
    return bool(row and cls and (not row.if_set or model_type == cls.extended_type))


class AutoConfig:
    """Picks the configuration's class by its `model_type`; it cannot be instantiated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ConfigError(
            "AutoConfig is not a configuration itself; call AutoConfig.from_pretrained(name)."
        )

    @staticmethod
    def register(model_type: str, config: type[ViTConfig], exist_ok: bool = False) -> None:
        """Make a configuration class of one's own known by its `model_type`.

        Args:
            model_type: as in `config.json`.
            config: a subclass of one of the configurations here, with that `model_type`.
            exist_ok: True lets it take the place of a family that is built in.

        Raises:
            ConfigError: the class is none that can be registered, or the family is built in.

        Source: `AutoConfig.register` of Transformers 4.57.6, `models/auto/configuration_auto.py`.

        Example:
            >>> class MyConfig(ViTConfig):
            ...     model_type = "my_vit"
            >>> AutoConfig.register("my_vit", MyConfig)
        """
        if not (isinstance(config, type) and issubclass(config, ViTConfig)):
            raise ConfigError(
                "`config` must be a subclass of ViTConfig or of another configuration here; given "
                f"{shown(config)}."
            )
        if config.model_type != model_type:
            raise ConfigError(
                f"`model_type` must be that of {config.__name__}, {config.model_type!r}; given "
                f"{shown(model_type)}. Set `model_type` in the class to change it."
            )
        if model_type in BUILT_IN and not exist_ok:
            raise ConfigError(
                f"the family {model_type!r} is built in; use another `model_type`, or pass "
                "`exist_ok=True` to put your class in its place."
            )
        config_classes()[model_type] = config
        CONFIG_MAPPING[model_type] = config

    @classmethod
    def for_model(cls, model_type: str, *args: Any, **kwargs: Any) -> ViTConfig:
        """A configuration of that family."""
        return config_class(model_type)(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **overrides: Any) -> Any:
        """As `ViTConfig.from_dict`, of the family that `model_type` names; the encoder of a
        `vit_mae` is a ViT, and so is a `vit-hybrid`.

        Raises:
            ConfigError: it is of no family known here, a value is refused, or a key changes the
                network in a way that is not known here.
        """
        if not isinstance(config_dict, Mapping):
            raise ConfigError(f"config: expected a mapping of fields; given {shown(config_dict)}.")
        table = without_timm(config_dict)
        _refuse_changes(table)
        if table.get("model_type") == "vit_mae":
            table = {key: value for key, value in table.items() if key not in _MAE_ONLY}
            table.update(model_type=ViTConfig.model_type, architectures=None)
        if table.get("model_type") == "vit-hybrid":
            table = _without_backbone(table)
        return config_class(table.get("model_type")).from_dict(table, **overrides)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Any:
        """As `ViTConfig.from_json_file`, of the family that `model_type` names."""
        return ViTConfig._from_file(json_file, cls.from_dict)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """As `ViTConfig.from_pretrained`, of the family that `model_type` names.

        Raises:
            MissingFileError: nothing is there.
            ConfigError: the file is not a configuration of a family known here.
        """
        return ViTConfig._read(pretrained_model_name_or_path, cls.from_dict, kwargs)
