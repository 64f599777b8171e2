"""The families beside ViT, and the choice among all by `model_type`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from vit_common.config import FamilyConfig, PoolerType, ViTConfig, config_classes, without_timm
from vit_common.config_fields import Pooling, PositionTokens, fields_of
from vit_common.errors import ConfigError, shown
from vit_common.families.towers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    Siglip2Config,
    Siglip2TextConfig,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
    refuse_changes,
)

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
    "Siglip2Config",
    "Siglip2TextConfig",
    "Siglip2VisionConfig",
    "SiglipConfig",
    "SiglipTextConfig",
    "SiglipVisionConfig",
    "config_class",
]


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
    def gate_act(self) -> Any:  # type: ignore[override]
        """Activation of the gate."""
        return self.hidden_act


Dinov3ViTConfig = DINOv3ViTConfig


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


def config_class(model_type: Any) -> type[ViTConfig]:
    """The class of a `model_type`; ConfigError if there is none here."""
    if not isinstance(model_type, str) or model_type not in CONFIG_CLASSES:
        raise ConfigError(
            f"config: `model_type` must be one of {', '.join(CONFIG_CLASSES)}; given "
            f"{shown(model_type)}."
        )
    return CONFIG_CLASSES[model_type]


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
        refuse_changes(table)
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
