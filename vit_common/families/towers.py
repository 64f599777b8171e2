"""The configurations of networks of images and texts: CLIP and SigLIP, each a tower for images, one
for texts, and both."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from vit_common.config import FamilyConfig, PoolerType, ViTConfig, config_classes
from vit_common.config_fields import EXTENSIONS, ROWS, VIT_FIELDS, Pooling, fields_of
from vit_common.errors import ConfigError, shown

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


def refuse_changes(table: Mapping[str, Any]) -> None:
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


def _has_field(table: Mapping[str, Any], name: str) -> bool:
    """Whether a file's family has a field of that name, and the file means that field by it: of
    those that Transformers lacks only a file of our own kind can."""
    model_type = table.get("model_type")
    cls = config_classes().get(model_type) if isinstance(model_type, str) else None
    row = cls.fields.get(name) if cls else None
    return bool(row and cls and (not row.if_set or model_type == cls.extended_type))


class _Tower(FamilyConfig):
    """What the towers of a network of images and texts have in common, and its own configuration
    has with that of its image tower."""

    whole_type: ClassVar[str]
    """`model_type` of the configuration that has both towers in it."""
    stem: ClassVar[str]
    """Prefix of the names of the family's classes."""

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
        return cls.stem

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **overrides: Any) -> Any:
        """As `ViTConfig.from_dict`; of the configuration of both towers it takes this one's."""
        return super().from_dict(_tower_of(cls, config_dict), **overrides)

    @classmethod
    def from_related(cls, config: ViTConfig) -> ViTConfig | None:
        """This tower's configuration out of that of both."""
        whole = isinstance(config, _WholeConfig) and config.base_family == cls.whole_type
        return config._tower(cls.base_config_key) if whole else None


class _TextTower(_Tower):
    """What text towers have in common."""

    base_config_key = "text_config"
    is_text = True
    drop_path_rate = 0.0

    max_position_embeddings: int
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


def _tower_of(cls: type[_Tower], table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the configuration of both towers for one; any other table as it is."""
    whole = isinstance(table, Mapping) and table.get("model_type") == cls.whole_type
    if not whole or issubclass(cls, _WholeConfig):
        return table
    key = cls.base_config_key
    part = _joined(cls, table.get(key), table.get(f"{key}_dict"))
    name = {"_name_or_path": table["_name_or_path"]} if "_name_or_path" in table else {}
    return {**part, **name}


def _as_named(made: Any, config: ViTConfig) -> Any:
    """A configuration made of another, with that one's name and kind of attention."""
    made.name_or_path = config.name_or_path
    made._attn_implementation = config._attn_implementation
    return made


def _joined(cls: type[_Tower], part: Any, legacy: Any) -> dict[str, Any]:
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
    refuse_changes(part)
    kind = part.pop("model_type", "")
    if kind not in ("", None, cls.model_type, cls.whole_type):
        raise ConfigError(
            f"config: `model_type` of `{cls.base_config_key}` must be {cls.model_type!r}; given "
            f"{shown(kind)}."
        )
    return {**part, "model_type": cls.model_type}


class _WholeConfig(_Tower):
    """The configuration of both towers. What it has no field for is read from `vision_config`, and
    set there."""

    vision_config: Any
    text_config: Any

    pooling: Pooling = "mean"  # of a classifier on the image tower

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names = list(type(self).fields)
        kwargs = self._by_name(args, kwargs)
        for key, cls in self.sub_configs.items():
            given, legacy = kwargs.get(key), kwargs.pop(f"{key}_dict", None)
            if not isinstance(given, cls) or legacy is not None:
                kwargs[key] = cls.from_dict(_joined(cls, given, legacy))
        inner = {
            name: kwargs.pop(name)
            for name in [*kwargs]
            if name in self.sub_configs["vision_config"].keywords() and name not in names
        }
        if inner:  # in a copy: the caller's own configuration stays as it is
            kwargs["vision_config"] = copy.copy(kwargs["vision_config"])
        for name, value in inner.items():
            setattr(kwargs["vision_config"], name, value)
        super().__init__(**kwargs)

    @classmethod
    def keywords(cls) -> tuple[str, ...]:
        """Names of the keywords that a configuration is made of, those of the image tower too."""
        return (*super().keywords(), *cls.sub_configs["vision_config"].keywords())

    @classmethod
    def from_text_vision_configs(
        cls, text_config: ViTConfig, vision_config: ViTConfig, **kwargs: Any
    ) -> Any:
        """A configuration of two towers, as Transformers makes it."""
        return cls(text_config=text_config, vision_config=vision_config, **kwargs)

    @classmethod
    def from_related(cls, config: ViTConfig) -> ViTConfig | None:
        """A configuration of an image tower's, with its labels."""
        if not isinstance(config, cls.sub_configs["vision_config"]):
            return None
        own = {name: getattr(config, name) for name in cls.fields if name in config.fields}
        return _as_named(cls(vision_config=config, **own), config)

    def _tower(self, key: str) -> Any:
        """A copy of a tower's configuration, for a model of that tower alone."""
        return _as_named(copy.copy(getattr(self, key)), self)

    def __getattr__(self, name: str) -> Any:
        if name in self.sub_configs["vision_config"].fields and "vision_config" in vars(self):
            return getattr(self.vision_config, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.sub_configs["vision_config"].fields and name not in self.fields:
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


class _CLIPTower(_Tower):
    """What both towers of CLIP have in common, and a `CLIPConfig` has with its image tower."""

    whole_type = "clip"
    use_pre_norm = True
    use_patch_bias = False
    norm_after_pooling = True
    stem = "CLIP"


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


class CLIPTextConfig(
    _CLIPTower,
    _TextTower,
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

    projection_dim: int


class CLIPConfig(
    _CLIPTower,
    _WholeConfig,
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

    sub_configs = {"text_config": CLIPTextConfig, "vision_config": CLIPVisionConfig}  # noqa: RUF012


class _SiglipTower(_Tower):
    """What both towers of SigLIP have in common, and a `SiglipConfig` has with its image tower."""

    whole_type = "siglip"
    stem = "Siglip"
    use_cls_token = False

    vision_use_head: bool

    @property
    def keeps_pooler(self) -> bool:  # type: ignore[override]
        """Whether there is attention pooling, in models with a head too."""
        return self.vision_use_head

    @property
    def pooler_type(self) -> PoolerType:
        """Kind of the pooler."""
        return "map" if self.vision_use_head else None


_SIGLIP_IMAGE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)
_SIGLIP_TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "projection_size",
)


class SiglipVisionConfig(
    _SiglipTower, fields=fields_of("siglip_vision_model", order=_SIGLIP_IMAGE)
):
    """The image tower of SigLIP (Zhai et al. 2023, arXiv:2303.15343), and of SigLIP 2 (Tschannen et
    al. 2025, arXiv:2502.14786) at a fixed size: no class token; the pooled output is that of
    attention pooling.

    Args:
        {fields}
        **kwargs: `num_labels` and unknown keys, as for `ViTConfig`.

    Source: `models/siglip/configuration_siglip.py` of Transformers 4.57.6.
    """

    model_type = "siglip_vision_model"
    extended_type = "siglip_vision_model"
    base_config_key = "vision_config"

    @property
    def pooling(self) -> Pooling:  # type: ignore[override]
        """What stands for the image."""
        return "map" if self.vision_use_head else "mean"

    @classmethod
    def from_related(cls, config: ViTConfig) -> ViTConfig | None:
        """This tower's configuration out of that of both, or of a ViT that is one, as timm's and
        big_vision's files of SigLIP are read."""
        found = super().from_related(config)
        if found is not None or not _is_siglip(config):
            return found
        own = {name: getattr(config, name) for name in cls.fields if name in config.fields}
        made = cls(**own, attention_dropout=config.attention_probs_dropout_prob)
        return _as_named(made, config)


_OF_SIGLIP = ("pooling", "use_cls_token", "position_tokens", "drop_path_rate")
_OF_POOLER = ("pooler_num_heads", "pooler_intermediate_size")


def _is_siglip(config: ViTConfig) -> bool:
    """Whether a ViT's network is that of SigLIP's image tower."""
    if type(config).fields is not VIT_FIELDS or config.pooling != "map" or config.use_cls_token:
        return False
    same = all(
        getattr(config, name) == VIT_FIELDS[name].default
        for name in EXTENSIONS
        if name in VIT_FIELDS and name not in (*_OF_SIGLIP, *_OF_POOLER)
    )
    pooler = (config.pooler_heads, config.pooler_inner)
    usual = pooler == (config.num_attention_heads, config.intermediate_size)
    return same and usual and config.qkv_bias and config.hidden_dropout_prob == 0.0


class SiglipTextConfig(
    _SiglipTower, _TextTower, fields=fields_of("siglip_text_model", order=_SIGLIP_TEXT)
):
    """The text tower of SigLIP (Zhai et al. 2023, arXiv:2303.15343).

    Args:
        {fields}
        **kwargs: unknown keys, as for `ViTConfig`.

    Source: `models/siglip/configuration_siglip.py` of Transformers 4.57.6.
    """

    model_type = "siglip_text_model"
    extended_type = "siglip_text_model"

    vision_use_head = False  # of images
    projection_size: int

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "projection_size" and value is None:
            value = self.hidden_size
        super().__setattr__(name, value)


class SiglipConfig(
    _SiglipTower, _WholeConfig, fields=fields_of("siglip", order=("text_config", "vision_config"))
):
    """A whole SigLIP (Zhai et al. 2023, arXiv:2303.15343), or its image tower with a classifier on
    the mean of the patches.

    What it has no field for is read from `vision_config`, and set there: `config.hidden_size` is
    that of the image tower.

    Args:
        {fields}
        **kwargs: `num_labels` and unknown keys, as for `ViTConfig`; fields of `SiglipVisionConfig`
            are set in `vision_config`.

    Source: `models/siglip/configuration_siglip.py` of Transformers 4.57.6.

    Example:
        >>> config = SiglipConfig(vision_config={"image_size": 256}, num_labels=10)
        >>> config.vision_config.num_patches, config.text_config.vocab_size
        (256, 32000)
    """

    model_type = "siglip"
    extended_type = "siglip"

    sub_configs = {"text_config": SiglipTextConfig, "vision_config": SiglipVisionConfig}  # noqa: RUF012


_SIGLIP2_IMAGE = tuple("num_patches" if n == "image_size" else n for n in _SIGLIP_IMAGE)


class Siglip2VisionConfig(
    _SiglipTower, fields=fields_of("siglip2_vision_model", order=_SIGLIP2_IMAGE)
):
    """The image tower of SigLIP 2 for images of any size (NaFlex; Tschannen et al. 2025,
    arXiv:2502.14786), here for images of one size at a time: positions are resampled to it.

    Args:
        {fields}
        **kwargs: `num_labels` and unknown keys, as for `ViTConfig`.

    Source: `models/siglip2/configuration_siglip2.py` of Transformers 4.57.6.
    """

    model_type = "siglip2_vision_model"
    extended_type = "siglip2_vision_model"
    base_config_key = "vision_config"
    whole_type = "siglip2"
    stem = "Siglip2"
    any_image_size = True
    settable = ("image_size",)

    num_patches: int = 256

    pooling = SiglipVisionConfig.pooling

    @property
    def image_size(self) -> int | tuple[int, int]:
        """The size whose patches are as many as there are position embeddings; setting it sets
        `num_patches`."""
        side = math.isqrt(self.num_patches)
        height, width = self.patch_height_width
        return side * height if height == width else (side * height, side * width)

    @image_size.setter
    def image_size(self, size: Any) -> None:
        size = ROWS["image_size"].check("image_size", size)
        H, W = size if isinstance(size, tuple) else (size, size)
        height, width = self.patch_height_width
        if H % height or W % width:
            raise ConfigError(
                "config: `image_size` of a SigLIP 2 must be a multiple of `patch_size`, "
                f"{self.patch_size!r}; given {shown(size)}."
            )
        rows, columns = H // height, W // width
        if rows != columns:
            raise ConfigError(
                "config: `image_size` of a SigLIP 2 must have as many patches down as across: its "
                f"positions are those of a square; given {shown(size)}. Images of other sizes are "
                "taken as they are."
            )
        self.num_patches = rows * columns


class Siglip2TextConfig(
    SiglipTextConfig, fields=fields_of("siglip2_text_model", order=_SIGLIP_TEXT)
):
    """The text tower of SigLIP 2 (Tschannen et al. 2025, arXiv:2502.14786).

    Args:
        {fields}
        **kwargs: unknown keys, as for `ViTConfig`.

    Source: `models/siglip2/configuration_siglip2.py` of Transformers 4.57.6.
    """

    model_type = "siglip2_text_model"
    extended_type = "siglip2_text_model"
    whole_type = "siglip2"
    stem = "Siglip2"


class Siglip2Config(
    _SiglipTower, _WholeConfig, fields=fields_of("siglip2", order=("text_config", "vision_config"))
):
    """A whole SigLIP 2 for images of any size (Tschannen et al. 2025, arXiv:2502.14786), or its
    image tower with a classifier on the mean of the patches; see `SiglipConfig`.

    Args:
        {fields}
        **kwargs: as for `SiglipConfig`.

    Source: `models/siglip2/configuration_siglip2.py` of Transformers 4.57.6.
    """

    model_type = "siglip2"
    extended_type = "siglip2"
    whole_type = "siglip2"
    stem = "Siglip2"
    any_image_size = True

    sub_configs = {"text_config": Siglip2TextConfig, "vision_config": Siglip2VisionConfig}  # noqa: RUF012

    @property
    def image_size(self) -> int | tuple[int, int]:
        """That of the image tower."""
        return self.vision_config.image_size

    @image_size.setter
    def image_size(self, size: Any) -> None:
        self.vision_config.image_size = size
