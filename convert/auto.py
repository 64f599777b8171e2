"""What the `Auto` classes of both twins share: the class for a family.

Here and not in `vit_common`, because a checkpoint without a configuration has to be looked at.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

from vit_common.config import ViTConfig
from vit_common.errors import ConfigError, InputError
from vit_common.families import BUILT_IN
from vit_common.families import config_class as class_of
from vit_convert.load import Loadable
from vit_convert.source import Source


class AutoModelBase:
    """Base of the `Auto` classes; it cannot be instantiated.

    Attributes:
        classes: `model_type` -> class.
        registered: class of a configuration -> class, by `register`.
        mapping: the same for all, where it is public under a name of its own.
    """

    classes: ClassVar[Mapping[str, Any]] = {}
    registered: ClassVar[dict[type[ViTConfig], Any]] = {}
    mapping: ClassVar[dict[type[ViTConfig], Any] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.registered = {}

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
        if type(config) in cls.registered:
            return cls.registered[type(config)]
        family = config.model_type
        if family not in cls.classes:
            known = [*cls.classes, *(own.model_type for own in cls.registered)]
            raise ConfigError(
                f"{cls.__name__} has no class for the family {family!r}; wanted one of "
                f"{', '.join(dict.fromkeys(known))}."
            )
        return cls.classes[family]

    @classmethod
    def register(
        cls, config_class: type[ViTConfig], model_class: Any, exist_ok: bool = False
    ) -> None:
        """Give configurations of a class a model class of one's own.

        Args:
            config_class: known to `AutoConfig.register`, for `from_pretrained` to meet it.
            model_class: a subclass of one of the models here, with that `config_class`.
            exist_ok: True lets it take the place of a class that is built in.

        Raises:
            InputError: the classes do not fit together, or the family is built in.

        Source: `register` of Transformers 4.57.6, `models/auto/auto_factory.py`.

        Example:
            >>> class MyModel(ViTModel):
            ...     config_class = MyConfig
            >>> AutoModel.register(MyConfig, MyModel)
        """
        if not (isinstance(config_class, type) and issubclass(config_class, ViTConfig)):
            raise InputError(
                "`config_class` must be a subclass of ViTConfig or of another configuration here; "
                f"given {config_class!r}."
            )
        if not (isinstance(model_class, type) and issubclass(model_class, Loadable)):
            raise InputError(
                "`model_class` must be a subclass of one of the models here; given "
                f"{model_class!r}."
            )
        own = getattr(model_class, "config_class", config_class)
        if own.__name__ != config_class.__name__:
            raise InputError(
                f"`config_class` must be that of {model_class.__name__}, {own.__name__}; given "
                f"{config_class.__name__}. Set `config_class` in the model's class to change it."
            )
        family = config_class.model_type
        if not exist_ok and family in cls.classes and BUILT_IN.get(family) is config_class:
            raise InputError(
                f"{cls.__name__} has a class for {config_class.__name__} already; pass "
                "`exist_ok=True` to put yours in its place."
            )
        cls.registered[config_class] = model_class
        if cls.mapping is not None:
            cls.mapping[config_class] = model_class

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A model with random weights of the family of `config`."""
        if not isinstance(config, ViTConfig):
            if not hasattr(config, "to_dict"):
                raise ConfigError(
                    f"`config` must be a configuration; given a {type(config).__name__}."
                )
            table = config.to_dict()
            config = class_of(table.get("model_type")).from_dict(table)
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
