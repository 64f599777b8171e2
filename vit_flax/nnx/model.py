"""A whole model as an NNX module: from a checkpoint or a linen model, and back."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from flax import nnx
from flax.traverse_util import flatten_dict

from vit_common.config import ViTConfig
from vit_common.errors import InputError
from vit_flax.int8 import SCALE, SUMS
from vit_flax.nnx.parts import Network, NNXPart, dropout_key
from vit_flax.params import Params, check_params
from vit_flax.pretrained import FlaxPreTrainedModel

_OURS = ("params", "dropout_rng", "train")  # of a linen model's call, that NNX has its own way for
_METHODS = ("get_image_features", "get_text_features")  # of CLIP


class NNXModel(NNXPart):
    """A model as an NNX module; `from_pretrained` and `from_linen` make one.

    It is called as the linen model is, images as (B, C, H, W), without `params`, `dropout_rng` and
    `train`: it holds its parameters, and `train()` and `eval()` switch dropout. It starts in
    evaluation mode.

    Attributes:
        rngs: the `nnx.Rngs` that dropout draws from, or None.

    Example:
        >>> model = from_pretrained(FlaxViTForImageClassification, "vit_common/digits")
        >>> model(pixel_values).logits.shape
        >>> model.classifier.kernel.shape
        >>> graphdef, state = nnx.split(model)
        >>> optimizer = nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.Param)
    """

    def __init__(self, network: Network, params: Mapping[str, Any], rngs: Any = None) -> None:
        super().__init__(network, (), params)
        key = dropout_key(rngs)
        self.rngs = None if key is None else nnx.Rngs(dropout=key)

    @property
    def config(self) -> ViTConfig:
        """The configuration."""
        return self._network.model.config

    @property
    def linen(self) -> FlaxPreTrainedModel:
        """The linen model, which holds no parameters; `to_linen` gives one that does."""
        return self._network.model

    @property
    def module(self) -> Any:
        """The linen module; it takes images as (B, H, W, C)."""
        return self._network.model.module

    def __call__(
        self, *inputs: Any, rngs: Any = None, deterministic: bool | None = None, **kwargs: Any
    ) -> Any:
        """Run the network.

        Args:
            *inputs: images (B, C, H, W); of a model with texts what its linen class takes first.
            rngs: `nnx.Rngs` or a JAX random key for dropout; None means the model's own.
            deterministic: no dropout in this call; None means as `train()` and `eval()` say.
            **kwargs: further arguments of the linen model: `output_attentions`, `labels`,
                `interpolate_pos_encoding`, ....

        Returns:
            What the linen model returns.

        Raises:
            InputError: an argument does not fit the model; dropout has no random key.
        """
        return self._run("__call__", *inputs, rngs=rngs, deterministic=deterministic, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in _METHODS and hasattr(type(self._network.model), name):
            return partial(self._run, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")

    def _run(
        self,
        method: str,
        *inputs: Any,
        rngs: Any = None,
        deterministic: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        model = self._network.model
        names = _by_position(getattr(type(model), method))
        count = len(names)
        if len(inputs) > count:
            raise InputError(
                f"the call takes {count} argument{'s' if count > 1 else ''} by position "
                f"({', '.join(names)}) and the others by name; given {len(inputs)}."
            )
        if taken := [name for name in _OURS if name in kwargs]:
            raise InputError(
                f"`{taken[0]}` is an argument of the linen models: an NNX model holds its "
                "parameters (`nnx.update` sets them), takes keys as `rngs=`, and is switched by "
                "`train()` and `eval()`."
            )
        with self._intercepted(deterministic) as odd:
            parts = [part for _, part in self._parts() if isinstance(part, NNXPart)]
            train = any(not part.deterministic for part in parts)
            if deterministic is not None:
                train = not deterministic
            key = dropout_key(self.rngs if rngs is None else rngs) if train else None
            if odd:  # what is compiled knows nothing of other parts
                jitted = model._forward()
                model = copy.copy(model)
                model._jitted = jitted.__wrapped__
            try:
                return getattr(model, method)(
                    *inputs, params=self._tree(), dropout_rng=key, train=train, **kwargs
                )
            except InputError as error:
                if key is None and "dropout_rng" in str(error):
                    raise InputError(
                        "dropout in training mode needs random keys: give the model `rngs="
                        "nnx.Rngs(dropout=0)` when it is made or called, or call `model.eval()`."
                    ) from None
                raise

    # -- files

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write `config.json` and the weights, as the linen model does.

        Args:
            save_directory: made if it is not there.
            **kwargs: as `FlaxPreTrainedModel.save_pretrained`.

        Raises:
            MissingFileError: the directory or a file cannot be written.
            InputError: a bad option; a part was replaced by another NNX module.
        """
        self._network.model.save_pretrained(save_directory, params=self.params, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save into a temporary directory and upload it, as the linen model does."""
        return self._network.model.push_to_hub(repo_id, params=self.params, **kwargs)


def _by_position(method: Any) -> list[str]:
    """Names of the arguments of a linen model's method that come before its parameters."""
    names: list[str] = []
    for parameter in [*inspect.signature(method).parameters.values()][1:]:
        if parameter.name == "params" or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            break
        names.append(parameter.name)
    return names


def from_linen(model: Any, params: Params | None = None, *, rngs: Any = None) -> NNXModel:
    """A linen model as an NNX module. The arrays are shared, not copied.

    Args:
        model: any model of this package, or a class of one's own on `FlaxPreTrainedModel`.
        params: its parameters; None means those it holds. Trees with the names of Transformers'
            Flax models are taken too.
        rngs: `nnx.Rngs` or a JAX random key, for dropout; one key is taken from it.

    Returns:
        The NNX module, in evaluation mode. The linen model stays as it is.

    Raises:
        InputError: it is no linen model of this package; `params` lack something, have something
            that it does not know, or do not fit.

    Example:
        >>> model = from_linen(FlaxViTModel(ViTConfig()), rngs=nnx.Rngs(dropout=0))
    """
    if not isinstance(model, FlaxPreTrainedModel):
        raise InputError(
            "`model` must be a Flax model of this package, such as FlaxViTModel; given a "
            f"{type(model).__name__}."
        )
    tree = check_params(model._renamed(model.params if params is None else params), model._shapes)
    _check_nothing_left(tree, model)
    empty = copy.copy(model)
    empty._is_initialized, empty._params = False, None
    return NNXModel(Network(empty), tree, rngs)


def _check_nothing_left(tree: Mapping[str, Any], model: FlaxPreTrainedModel) -> None:
    flat = flatten_dict(dict(tree))
    known = {*model._shapes}
    known |= {(*path[:-1], name) for path in known for name in (SCALE, SUMS) if path in flat}
    if left := ["/".join(path) for path in flat if path not in known]:
        raise InputError(
            f"`params` must be the tree of {type(model).__name__}, which has no "
            f"{', '.join(left[:4])}" + (", ...." if len(left) > 4 else ".")
        )


def from_pretrained(
    model_class: Any,
    pretrained_model_name_or_path: str | os.PathLike,
    *args: Any,
    rngs: Any = None,
    **kwargs: Any,
) -> Any:
    """Load a model as an NNX module.

    The checkpoint is read as by the linen class, straight into the parameters: no initialiser
    runs for a parameter that the file has.

    Args:
        model_class: a Flax model class: `FlaxViTForImageClassification`,
            `FlaxAutoModelForImageClassification`, `FlaxCLIPModel`, a class of one's own.
        pretrained_model_name_or_path, *args, **kwargs: as `model_class.from_pretrained`
            (`dtype`, `param_dtype`, `weights="int8"`, `shardings`, `ignore_mismatched_sizes`, ...).
        rngs: `nnx.Rngs` or a JAX random key, for dropout; one key is taken from it.

    Returns:
        The NNX module, in evaluation mode; with `output_loading_info=True`, `(model, info)`.

    Raises:
        InputError: the class is none of these, or an option does not fit.
        MissingFileError, ConfigError, CheckpointError: as `model_class.from_pretrained`.

    Example:
        >>> model = from_pretrained(
        ...     FlaxViTForImageClassification, "google/vit-base-patch16-224", dtype=jnp.bfloat16
        ... )
    """
    load = getattr(model_class, "from_pretrained", None)
    if not isinstance(model_class, type) or load is None:
        raise InputError(
            "`model_class` must be a Flax model class of this package, such as "
            f"FlaxViTForImageClassification; given {model_class!r}."
        )
    if "_do_init" in kwargs:
        raise InputError("`_do_init` has no meaning here: an NNX model holds its parameters.")
    loaded = load(pretrained_model_name_or_path, *args, **kwargs)
    info = loaded[1:] if isinstance(loaded, tuple) else ()
    model = from_linen(loaded[0] if info else loaded, rngs=rngs)
    return (model, *info) if info else model


def to_linen(model: NNXModel) -> Any:
    """The linen model with the parameters that the NNX module holds now. The arrays are shared.

    Args:
        model: what `from_pretrained` or `from_linen` gave.

    Returns:
        A model of the class that it came from.

    Raises:
        InputError: it is no such model; parts were taken out, or replaced by other NNX modules;
            parameters have other shapes.

    Example:
        >>> to_linen(model).save_pretrained("fine-tuned")
    """
    if not isinstance(model, NNXModel):
        raise InputError(
            "`model` must be an NNX model of this package, as `vit_flax.nnx.from_linen` gives it; "
            f"given a {type(model).__name__}."
        )
    empty = model._network.model
    linen = copy.copy(empty)
    linen._jitted = empty._forward()  # one compiled function for both
    linen._is_initialized = True
    linen.params = model.params
    return linen
