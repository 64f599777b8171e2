"""What the `Auto` classes of both twins share: the class for a family.

Here and not in `vit_common`, because a checkpoint without a configuration has to be looked at.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

from vit_common.config import ViTConfig
from vit_common.errors import ConfigError, InputError
from vit_common.families import config_class
from vit_convert.source import Source


class AutoModelBase:
    """Base of the `Auto` classes; it cannot be instantiated.

    Attributes:
        classes: `model_type` -> class.
    """

    classes: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise InputError(
            f"{name} is not a model itself; call {name}.from_pretrained(name) or "
            f"{name}.from_config(config)."
        )

    @classmethod
    def class_for(cls, config: ViTConfig) -> Any:
        """The model's class for a configuration.

        Raises:
            ConfigError: that family has none.
        """
        family = config.model_type
        if family not in cls.classes:
            raise ConfigError(
                f"{cls.__name__} has no class for the family {family!r}; wanted one of "
                f"{', '.join(cls.classes)}."
            )
        return cls.classes[family]

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A model with random weights of the family of `config`."""
        if not isinstance(config, ViTConfig):
            if not hasattr(config, "to_dict"):
                raise ConfigError(
                    f"`config` must be a configuration; given a {type(config).__name__}."
                )
            table = config.to_dict()
            config = config_class(table.get("model_type")).from_dict(table)
        kwargs.pop("trust_remote_code", None)  # no code of a repository is ever run
        model = cls.class_for(config)
        return getattr(model, "_from_config", model)(config, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a model of the family that its configuration, or else its weights, name.

        Arguments as `from_pretrained` of the models; the checkpoint is opened once.

        Raises:
            MissingFileError: there is nothing of that name, or it cannot be reached.
            ConfigError: the configuration is of no family known here.
            CheckpointError: the weights are corrupt, incomplete or do not fit.
        """
        source, loading = cls.open_pretrained(pretrained_model_name_or_path, kwargs)
        with source:
            return cls.from_source(source, *args, **loading)

    @classmethod
    def open_pretrained(
        cls, name_or_path: Any, options: Mapping[str, Any]
    ) -> tuple[Source, dict[str, Any]]:
        """As `Loadable.open_pretrained` of the models."""
        # The keywords are those of any of the models.
        model = next(iter(cls.classes.values()))
        return model.open_pretrained(name_or_path, options, choose=cls.class_for)

    @classmethod
    def from_source(cls, source: Source, *args: Any, **kwargs: Any) -> Any:
        """Load a model of an opened checkpoint, as `from_source` of the models."""
        return cls.choose(source).from_source(source, *args, **kwargs)

    @classmethod
    def choose(cls, source: Source) -> Any:
        """The class for a checkpoint; overridden where more than the family decides."""
        return cls.class_for(source.config)


class AutoClassifierBase(AutoModelBase):
    """Base of the `Auto` classes for classification: a distilled DeiT with both its heads is loaded
    with both.

    Attributes:
        teacher: class for those.
    """

    teacher: ClassVar[Any] = None

    @classmethod
    def choose(cls, source: Source) -> Any:
        """The class for a checkpoint."""
        if source.config.model_type == "deit" and source.head == "teacher":
            return cls.teacher
        return cls.class_for(source.config)
