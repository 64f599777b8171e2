"""The models people import: a linen module with its parameters beside it, files in and out.

Constructor, call and methods are those of `FlaxPreTrainedModel` of Transformers 4.57.6
(`modeling_flax_utils.py`, `models/vit/modeling_flax_vit.py`), so its users change an import.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_common.checks import (
    Interpolate,
    auto_class_name,
    check_keywords,
    check_labels,
    check_positive,
    check_rank,
    resolve_problem_type,
)
from vit_common.config import ViTConfig, as_config
from vit_common.errors import InputError
from vit_common.files.containers.tensor import as_tensor
from vit_common.parameters import (
    DIFFERENTIAL_STD,
    Head,
    head_tokens,
    initial_value,
    parameter_shapes,
)
from vit_convert.formats import TREE
from vit_convert.load import Loadable, is_finite, load_parameters, warn_if_not_finite
from vit_convert.rules import as_mapped, to_foreign, unprefixed
from vit_convert.save import Savable, SaveFormat
from vit_convert.source import Source
from vit_flax.arguments import (
    as_array,
    check_flag,
    check_key,
    check_precision,
    float_dtype,
    values_of,
)
from vit_flax.attention import check_implementation
from vit_flax.cpu.half import traced_for
from vit_flax.int8 import SCALE, SUMS, check_activations, check_weights, quantize
from vit_flax.layers import frequencies
from vit_flax.model import (
    FlaxViTForImageClassificationModule,
    FlaxViTForMaskedImageModelingModule,
    FlaxViTModule,
    FlaxViTPart,
)
from vit_flax.params import (
    Parameter,
    Params,
    canonical,
    check_params,
    custom_parameters,
    draw_normal,
    read_path,
    rename,
    to_device,
    to_devices,
    transformers_paths,
    tree_shapes,
)
from vit_flax.stacked import (
    REMAT_POLICIES,
    flat_params,
    stack_layers,
    stacked_shapes,
    unstack_layers,
)

# Weights in Flax's layout load as fast as those in PyTorch's; `from_pt=True` asks for the latter
# where a directory has both.
_TORCH_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class FlaxPreTrainedModel(Loadable, Savable):
    """Base of every model: a linen module, its parameters, and their files.

    Classes of one's own are written as for Transformers' base class of the same name: their
    constructor builds the module and hands it on. They may replace `init_weights` and `__call__`.
    `FlaxViTPreTrainedModel` is the shorter way: it builds `module_class` itself.

    Args:
        config: sizes; changes made to it later do not reach the network (flags such as
            `output_attentions` are read at every call).
        module: the network; it takes images as (B, H, W, C).
        input_shape: (B, H, W, C) of the images that parameters are drawn for; None means the
            config's.
        seed: of the random parameters.
        dtype: compute dtype.
        _do_init: False leaves the model without parameters; pass them to each call.
        param_dtype: dtype of parameters that are drawn anew.

    Raises:
        ConfigError: the configuration cannot be built.
        InputError: another argument does not fit.

    Example:
        >>> class MyModel(FlaxPreTrainedModel):
        ...     config_class = ViTConfig
        ...     base_model_prefix = "vit"
        ...     module_class = MyModule
        ...
        ...     def __init__(self, config, input_shape=None, seed=0, dtype=jnp.float32, **kwargs):
        ...         _do_init = kwargs.pop("_do_init", True)
        ...         module = self.module_class(config=config, dtype=dtype, **kwargs)
        ...         super().__init__(config, module, input_shape, seed, dtype, _do_init)
    """

    config_class: ClassVar[type] = ViTConfig
    base_model_prefix: ClassVar[str] = "vit"
    main_input_name: ClassVar[str] = "pixel_values"
    module_class: ClassVar[type[nn.Module] | None] = None
    head: ClassVar[Head | None] = None
    generation_config: ClassVar[None] = None
    model_tags: list[str] | None = None
    _auto_class: str | None = None
    _saving_keywords: ClassVar = ("params", *Savable._saving_keywords)
    _preferred_files: ClassVar = ("from_pt", _TORCH_FILES)

    def __init__(
        self,
        config: ViTConfig,
        module: nn.Module,
        input_shape: tuple[int, ...] | None = None,
        seed: int = 0,
        dtype: Any = jnp.float32,
        _do_init: bool = True,
        *,
        param_dtype: Any = jnp.float32,
    ) -> None:
        self._config = as_config(config, self.config_class)
        self._config.validate()
        if not isinstance(module, nn.Module):
            raise InputError(
                f"`module` must be a linen module, the network of {type(self).__name__}; given a "
                f"{type(module).__name__}."
            )
        self._module = module
        self.dtype = float_dtype("dtype", dtype)
        self.param_dtype = float_dtype("param_dtype", param_dtype)
        self.input_shape = self._checked_input_shape(input_shape)
        self.seed = seed
        self.key = jax.random.PRNGKey(seed)
        self._single_shapes = self._flax_shapes()  # each block's own
        shapes = self._single_shapes
        self._shapes = stacked_shapes(shapes) if self.scan_layers else shapes
        self._missing_keys: set[tuple[str, ...]] = set()  # for an `init_weights` of a subclass
        self._is_initialized = _do_init
        self._params: dict[str, Any] | None = None
        if _do_init:
            self._params = plain(self.init_weights(self.key, self.input_shape))

    def _checked_input_shape(self, input_shape: Any) -> tuple[Any, ...]:
        """The shape of the inputs that parameters are drawn for; InputError if it is another than
        the config's."""
        C, (H, W) = self._config.num_channels, self._config.image_height_width
        shape = (1, H, W, C) if input_shape is None else tuple(input_shape)
        if len(shape) != 4 or shape[1:] != (H, W, C):
            raise InputError(
                f"`input_shape` must be (batch, height, width, channels) = (batch, {H}, {W}, {C}), "
                f"as the config has them; given {shape}."
            )
        return shape

    @classmethod
    def _constructor_keywords(cls) -> list[str]:
        """Keywords of the constructor: its own, and the fields only this network has."""
        own = [*inspect.signature(cls).parameters.values()]
        if issubclass(cls, FlaxViTPreTrainedModel):
            own += inspect.signature(FlaxViTPreTrainedModel).parameters.values()
        names = [p.name for p in own if p.name != "config" and p.kind is not p.VAR_KEYWORD]
        common = {field.name for field in fields(FlaxViTPart)}
        if not issubclass(cls.module_class or FlaxViTPart, FlaxViTPart):
            common = {"parent", "name", "config"}
        names += [f.name for f in fields(cls.module_class or FlaxViTPart) if f.name not in common]
        return list(dict.fromkeys(names))

    def _is_custom(self) -> bool:
        """Whether the module is a subclass's own, or one with a head that the class does not say:
        then its parameters are found by tracing it."""
        module = type(self._module)
        return not module.__module__.startswith("vit_flax.") or (
            self.head is None and not issubclass(module, FlaxViTModule)
        )

    # -- what the model is

    @property
    def config(self) -> ViTConfig:
        """The configuration."""
        return self._config

    @property
    def module(self) -> nn.Module:
        """The linen module; it takes images as (B, H, W, C)."""
        return self._module

    @property
    def scan_layers(self) -> bool:
        """Whether the blocks' parameters are stacked and one block is run for all of them."""
        return getattr(self._module, "scan_layers", False)

    @property
    def framework(self) -> str:
        """ "flax"."""
        return "flax"

    @property
    def params(self) -> dict[str, Any]:
        """The parameters, a nested dict. Setting them checks names and shapes.

        Raises:
            InputError: the model was made with `_do_init=False`; or, on setting, parameters are
                missing or have another shape.
        """
        if not self._is_initialized:
            raise InputError(
                "`params` cannot be accessed: the model was made with `_do_init=False`. Draw them "
                "with `init_weights(rng, input_shape)`, keep them yourself, and pass `params=`."
            )
        assert self._params is not None
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        if not self._is_initialized:
            raise InputError(
                "`params` cannot be set: the model was made with `_do_init=False`. Keep them "
                "yourself and pass `params=` to each call."
            )
        self._params = self._shown(check_params(self._renamed(params), self._shapes))

    @property
    def network_params(self) -> dict[str, Any]:
        """The parameters under the names that all networks here have in common; those of `params`
        in most families. `params` can be set to such a tree, and every call takes one."""
        return self._renamed(self.params)

    def _shown(self, params: dict[str, Any]) -> dict[str, Any]:
        """A tree of `network_params` as `params` gives it."""
        return params

    @property
    def required_params(self) -> set[tuple[str, ...]]:
        """Paths of the parameters the model needs."""
        return set(flatten_dict(self.params_shape_tree))

    @property
    def params_shape_tree(self) -> dict[str, Any]:
        """The parameters as shapes and dtypes, a nested dict of `jax.ShapeDtypeStruct`."""
        tree = {
            path: jax.ShapeDtypeStruct(shape, self.param_dtype)
            for path, shape in self._shapes.items()
        }
        return self._shown(unflatten_dict(tree))

    @property
    def _params_shape_tree(self) -> dict[str, Any]:
        """`params_shape_tree`, as Transformers 4.57.6 names it inside its models."""
        return self.params_shape_tree

    @property
    def name_or_path(self) -> str:
        """Where the weights came from, or ""."""
        return getattr(self._config, "name_or_path", "")

    def _canonical_shapes(self) -> dict[str, tuple[int, ...]]:
        module = self._module
        if self._is_custom():
            return {name: each.canonical for name, each in self._custom_parameters.items()}
        return parameter_shapes(
            self._config,
            self.head,
            add_pooling_layer=getattr(module, "add_pooling_layer", False),
            use_mask_token=getattr(module, "use_mask_token", False),
        )

    def _flax_shapes(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        if self._is_custom():
            return {each.path: each.shape for each in self._custom_parameters.values()}
        return tree_shapes(self._canonical_shapes(), TREE)

    @cached_property
    def _custom_parameters(self) -> dict[str, Parameter]:
        """Parameters of a subclass's own module by their names in files: what it shares with the
        networks here has the canonical name; parts of its own are named by their path."""
        variables = jax.eval_shape(self._init_module, jax.random.PRNGKey(0))
        shapes = {path: leaf.shape for path, leaf in flatten_dict(unfreeze(variables)).items()}
        return custom_parameters(shapes, self._config, self.base_model_prefix)

    def _own_parts(self) -> dict[str, tuple[str, ...]]:
        """Name in files -> path, of parameters that only a subclass's own module has."""
        if not self._is_custom():
            return {}
        return {name: each.path for name, each in self._custom_parameters.items() if each.own}

    @cached_property
    def _their_paths(self) -> dict[tuple[str, ...], tuple[str, ...]]:
        """Path in Transformers' tree of this model -> path here."""
        if self._is_custom():
            return {}
        return transformers_paths(self._config, self._canonical_shapes())

    def _renamed(self, params: Any) -> Any:
        """`params` under the names of this model, if they have those of Transformers 4.57.6."""
        if not isinstance(params, Mapping) or not self._their_paths:
            return params
        flat = flat_params(params)
        beside = {path: flat.pop(path) for path in [*flat] if path[-1] in (SCALE, SUMS)}
        if flat.keys() == self._their_paths.keys() and flat.keys() != self._single_shapes.keys():
            params = rename(flat, self._their_paths, self._single_shapes)
            if beside:  # what goes with an integer kernel
                ours = {(*self._their_paths[*p[:-1], "kernel"][:-1], p[-1]): p for p in beside}
                moved = {path: beside[theirs] for path, theirs in ours.items()}
                params = unflatten_dict(flatten_dict(params) | moved)
            return stack_layers(params) if self.scan_layers else params
        return params

    def _init_module(self, rng: jax.Array) -> Any:
        """Parameters as the module itself draws them."""
        rngs = dict(zip(("params", "dropout", "droppath"), jax.random.split(rng, 3), strict=True))
        pixel_values = jnp.zeros(self.input_shape, self.dtype)
        return self._module.init(rngs, pixel_values)["params"]

    # -- random parameters

    def init_weights(
        self,
        rng: jax.Array,
        input_shape: tuple[int, ...] | None = None,
        params: Params | None = None,
    ) -> dict[str, Any]:
        """Draw parameters; with `params`, only those it lacks.

        Args:
            rng: a JAX random key.
            input_shape: accepted for Transformers' sake; the config decides the shapes.
            params: a nested dict to complete, its blocks stacked or not.

        Returns:
            A nested dict of arrays of `param_dtype`: weights, class token and positions from a
            truncated normal of standard deviation `initializer_range` (Transformers' PyTorch
            model; its Flax model drew them 28 times smaller), norms one, all else zero.
        """
        flat = {} if params is None else flatten_dict(unstack_layers(self._renamed(params)))
        if self._is_custom():
            drawn = flatten_dict(unfreeze(jax.jit(self._init_module)(rng)))
            return unflatten_dict({path: flat.get(path, array) for path, array in drawn.items()})
        missing = [path for path in self._single_shapes if path not in flat]
        flat.update(self._draw(rng, missing))
        drawn = unflatten_dict({path: flat[path] for path in self._single_shapes})
        return stack_layers(drawn) if self.scan_layers else self._shown(drawn)

    def _draw(self, rng: jax.Array, paths: list[tuple[str, ...]]) -> dict[tuple[str, ...], Any]:
        drawn = {}
        canonical = dict(zip(self._single_shapes, self._canonical_shapes(), strict=True))
        config = self._config
        constants = {
            "zero": 0.0,
            "one": 1.0,
            "layer scale": config.layer_scale_init_value,
            "logit scale": getattr(config, "logit_scale_init_value", 0.0),
        }
        for path in paths:
            shape = self._single_shapes[path]
            kind = initial_value(canonical[path])
            if kind in constants:
                drawn[path] = jnp.full(shape, constants[kind], self.param_dtype)
                continue
            # The key depends on the name only, so a parameter is the same in every model.
            key = jax.random.fold_in(rng, zlib.crc32("/".join(path).encode()))
            if kind == "frequencies":
                drawn[path] = frequencies(config.rope_theta)(key, shape, self.param_dtype)
            else:
                std = DIFFERENTIAL_STD if kind == "differential" else config.initializer_range
                drawn[path] = draw_normal(key, std, shape, self.param_dtype)
        return drawn

    # -- calls

    @property
    def head_tokens(self) -> int | None:
        """Number of tokens, from the first, that the head or a base network's pooler uses; None if
        patches are among them. Read from the configuration that the network was built with."""
        module = self._module
        pooler = getattr(module, "add_pooling_layer", False)
        return head_tokens(module.config, self.head, add_pooling_layer=pooler)

    def with_front_tokens(self, tokens: int | None) -> Self:
        """This model with a last block that computes only its first tokens.

        A classifier on the class token needs no others, so it gives the same logits with fewer
        operations (7% fewer for ViT-B). The last of the `hidden_states` and
        `last_hidden_state` are (B, `tokens`, D) then, the last of the `attentions` (B, A, `tokens`,
        S). With `scan_layers` the model stays as it is: one program runs all blocks.

        Args:
            tokens: from the first; None means all.

        Returns:
            A model that shares the configuration and parameters of this one, which stays as it is.

        Raises:
            InputError: it is no positive number; or the head, or a base network's pooler, looks at
                more tokens.
        """
        if tokens is not None:
            tokens = check_positive("tokens", tokens)
            needed = self.head_tokens
            if needed is None or tokens < needed:
                what = "pooler" if self.head is None else "head"
                raise InputError(
                    f"`tokens` must be {'None' if needed is None else f'{needed} or more'}, as the "
                    f"{what} of {type(self).__name__} looks at {needed or 'all of them'}; given "
                    f"{tokens}."
                )
        model = copy.copy(self)  # without the compiled function, see `__getstate__`
        model._module = self._module.clone(front_tokens=tokens)
        return model

    def __getstate__(self) -> dict[str, Any]:
        unpickled = ("_jitted", "_their_paths", "_custom_parameters")  # made again when asked for
        return {name: value for name, value in vars(self).items() if name not in unpickled}

    def _forward(self):
        """The jitted network; compiled once for each shape, dtype and set of flags."""
        if "_jitted" not in vars(self):
            module, shapes, custom = self._module, self._shapes, self._is_custom()
            renamed = self._renamed

            def run(
                params, pixel_values, dropout_rng, arrays, deterministic, flags, interpolate, _
            ):
                if not custom or interpolate:  # a subclass's own module may not know it
                    arrays = {**arrays, "interpolate_pos_encoding": interpolate}
                return module.apply(
                    # Names and shapes are known while tracing: later calls do not pay for this.
                    {"params": check_params(renamed(params), shapes)},
                    pixel_values.transpose(0, 2, 3, 1),  # (B, H, W, C)
                    deterministic,
                    *flags,
                    rngs=None if dropout_rng is None else {"dropout": dropout_rng},
                    **arrays,
                )

            self._jitted = jax.jit(run, static_argnums=(4, 5, 6, 7))
        return self._jitted

    def __call__(
        self,
        pixel_values: Any,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **arrays: Any,
    ) -> Any:
        """Run a subclass's own module.

        Args:
            pixel_values: (B, C, H, W); the module gets (B, H, W, C).
            params, dropout_rng, train, output_attentions, output_hidden_states, return_dict: as
                `FlaxViTModel`; the module gets `deterministic` (not `train`) and the three flags.
            **arrays: further arguments of the module, by name.

        Returns:
            What the module returns.
        """
        flags = (output_attentions, output_hidden_states, return_dict)
        return self._call(pixel_values, params, dropout_rng, train, flags, None, arrays)

    def _call(self, pixel_values, params, dropout_rng, train, flags, interpolate, arrays) -> Any:
        pixel_values = as_array("pixel_values", pixel_values)
        check_rank(pixel_values, "(batch, channels, height, width)")
        config = self.config
        rates = (
            config.hidden_dropout_prob,
            config.attention_probs_dropout_prob,
            *config.drop_path_rates,
        )
        if train and max(rates) > 0.0 and dropout_rng is None and not self._is_custom():
            raise InputError("`train=True` with dropout needs `dropout_rng`, a JAX random key.")
        if dropout_rng is not None:
            check_key("dropout_rng", dropout_rng)
        return self._forward()(
            params or self.params,
            pixel_values,
            dropout_rng if train else None,
            {name: as_array(name, value) for name, value in arrays.items() if value is not None},
            not train,
            self.config.resolve_flags(*flags),
            interpolate or False,
            traced_for(),  # a program for another platform is traced anew
        )

    # -- files

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        dtype: Any = jnp.float32,
        *model_args: Any,
        config: ViTConfig | str | os.PathLike | None = None,
        ignore_mismatched_sizes: bool = False,
        allow_missing: bool = False,
        ignore: Iterable[str] = (),
        output_loading_info: bool = False,
        format: str | None = None,
        from_pt: bool = False,
        _do_init: bool = True,
        param_dtype: Any = None,
        weights: Literal["int8"] | None = None,
        activations: Literal["int8"] | None = None,
        shardings: Callable[[tuple[str, ...]], jax.sharding.Sharding] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a model.

        Args:
            pretrained_model_name_or_path: directory, weights file (with `config.json` beside it
                or `config=`), or "owner/name" on the Hub; or an adapter folder of PEFT, which is
                merged into the base model that it names.
            dtype: compute dtype.
            *model_args: further positional arguments of the constructor (`input_shape`, `seed`).
            config: configuration, or where to read it, if not beside the weights.
            ignore_mismatched_sizes: draw parameters anew if the file has them in another shape.
            allow_missing: draw parameters of the network anew that the file lacks; without it only
                those of a head may be missing.
            ignore: regular expressions of names in the file that may be left over. Without it,
                tensors of the network that the model has no place for are an error, and so is a
                trained head while one is drawn anew: see `vit_convert.leftovers`.
            output_loading_info: return `(model, info)`, `info` with the lists of names
                `missing_keys`, `unexpected_keys`, `mismatched_keys`, and with `error_msgs`.
            format: the weights' format ("timm", "google", ...; see docs/convert.md), if it cannot
                be detected.
            from_pt: prefer weights in PyTorch's layout where there are both. (Both are read
                without it.)
            _do_init: False returns `(model, params)`, the model without parameters.
            param_dtype: dtype of the parameters; None keeps the file's.
            weights: "int8" holds the kernels of the blocks as 8-bit integers, for inference; see
                `vit_flax.int8.quantize`.
            activations: "int8", with `weights="int8"`, multiplies these integers by activations
                that are quantised as well, each token by itself.
            shardings: function from the path of a parameter, such as ("vit", "layernorm", "bias"),
                to its sharding; each device reads only its own part if the file allows it. None is
                JAX's default device.
            **kwargs: `adapter`, an adapter folder to merge into this model, whatever base model it
                names; options of the Hub (`revision`, `subfolder`, `token`, `cache_dir`,
                `local_files_only`, `force_download`), fields of the config, arguments of the
                constructor. With another `image_size` than the checkpoint's, positions are
                resampled by its own rule.

        Returns:
            The model; with `_do_init=False`, `(model, params)`. With `output_loading_info=True`
            the information comes last: `(model, info)` or `(model, params, info)`.

        Warns:
            UserWarning: parameters are newly drawn or left aside, or hold NaN.

        Raises:
            MissingFileError: there is nothing of that name, or it cannot be reached.
            ConfigError: the configuration is not of this architecture.
            CheckpointError: the weights are corrupt, incomplete or do not fit.

        Example:
            >>> model = FlaxViTForImageClassification.from_pretrained("google/vit-base-patch16-224")
            >>> model(pixel_values).logits.shape
        """
        check_weights(weights)
        check_activations(activations, weights)
        options = {**kwargs, "config": config, "format": format, "from_pt": from_pt}
        source, _ = cls.open_pretrained(
            pretrained_model_name_or_path, options, wanted=cls.config_class
        )
        with source:
            return cls.from_source(
                source,
                dtype,
                *model_args,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                allow_missing=allow_missing,
                ignore=ignore,
                output_loading_info=output_loading_info,
                _do_init=_do_init,
                param_dtype=param_dtype,
                weights=weights,
                activations=activations,
                shardings=shardings,
            )

    @classmethod
    def from_source(
        cls,
        source: Source,
        dtype: Any = jnp.float32,
        *model_args: Any,
        ignore_mismatched_sizes: bool = False,
        allow_missing: bool = False,
        ignore: Iterable[str] = (),
        output_loading_info: bool = False,
        _do_init: bool = True,
        param_dtype: Any = None,
        weights: Literal["int8"] | None = None,
        activations: Literal["int8"] | None = None,
        shardings: Callable[[tuple[str, ...]], jax.sharding.Sharding] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a model of an opened checkpoint, which stays open.

        Args:
            source: what `vit_convert.source.open_source` gives.
            dtype, *model_args, ignore_mismatched_sizes, allow_missing, ignore,
                output_loading_info, _do_init, param_dtype, weights, activations, shardings: as
                `from_pretrained`.
            **kwargs: arguments of the constructor, beside those that `source` holds.

        Returns, Warns, Raises: as `from_pretrained`.
        """
        check_weights(weights)
        check_activations(activations, weights)
        make: Any = cls
        model = make(
            as_config(source.config, cls.config_class),
            *model_args,
            dtype=dtype,
            _do_init=False,
            **({} if param_dtype is None else {"param_dtype": param_dtype}),
            **{**source.left_over, **kwargs},
        )
        loaded = load_parameters(
            source,
            model._canonical_shapes(),
            model=cls.__name__,
            config=model.config,
            allow_missing=allow_missing,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            ignore=ignore,
            own=model._own_parts(),
        )
        flat, not_finite = {}, []
        own = model._own_parts()
        read = [(own[name], x) for name, x in loaded.tensors.items() if name in own]
        known = {name: x for name, x in loaded.tensors.items() if name not in own}
        for name, tensor in to_foreign(known, TREE).tensors.items():
            read.append((tuple(name.split("/")), tensor))
        for path, tensor in read:
            name = "/".join(path)
            cast = None if param_dtype is None else model.param_dtype
            if shardings is None:
                array = tensor.read()
                finite = is_finite(array)
                flat[path] = to_device(array if cast is None else array.astype(cast))
            else:
                flat[path], finite = to_devices(tensor, shardings(path), cast)
            if not finite:
                not_finite.append(name)
        warn_if_not_finite(source.path, not_finite)
        model._missing_keys = set(model._shapes) - flat.keys()
        params = plain(
            model.init_weights(model.key, model.input_shape, params=unflatten_dict(flat))
        )
        if weights is not None:
            params = model._shown(quantize(model._renamed(params), activations))
        info = (loaded.info,) if output_loading_info else ()
        if not _do_init:
            return model, params, *info
        model._is_initialized = True
        model._params = params
        return (model, *info) if info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        params: Params | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "10GB",
        token: str | bool | None = None,
        safe_serialization: bool = True,
        *,
        to: SaveFormat | None = None,
        **kwargs: Any,
    ) -> None:
        """Write `config.json` and the weights into a directory; an earlier save survives a failure.

        Args:
            save_directory: made if it is not there.
            params: parameters to write; None means the model's own. Stacked blocks are written one
                by one.
            push_to_hub: upload the directory too (`repo_id`, `commit_message`, `private`, ...).
            max_shard_size: largest file, in bytes or as "5GB".
            token: of the Hub.
            safe_serialization: True writes `model.safetensors` in the Hub's PyTorch layout, which
                everything reads; False writes `flax_model.msgpack`.
            to: the format by name instead: "hub", "flax" or "flax-safetensors".

        Raises:
            MissingFileError: the directory or a file cannot be written.
            InputError: `params` do not fit, or a bad option.
        """
        given = self.network_params if params is None else self._renamed(params)
        params = check_params(given, self._shapes)
        if self.scan_layers:  # on the host, where a block's part is a view
            params = unstack_layers(jax.device_get(params))
        own = {name: read_path(params, path) for name, path in self._own_parts().items()}
        if own:
            flat = flatten_dict(params)
            params = unflatten_dict(
                {path: flat[path] for path in flat if path not in {*self._own_parts().values()}}
            )
        mapped = canonical(params)
        further = {name: as_mapped(as_tensor(name, array)) for name, array in own.items()}
        mapped.tensors.update(further)
        if mapped.unused:
            raise InputError(f"`params` hold what no file can: {', '.join(mapped.unused)}.")
        self._check_save_keywords(kwargs)
        self._save(
            save_directory,
            {
                name: mapped.tensors[name if name in own else unprefixed(name)]
                for name in self._canonical_shapes()
            },
            own=own,
            to=to or ("hub" if safe_serialization else "flax"),
            max_shard_size=max_shard_size,
            upload={**kwargs, "push_to_hub": push_to_hub, "token": token},
        )

    def push_to_hub(self, repo_id: str, params: Params | None = None, **kwargs: Any) -> str:
        """Save into a temporary directory and upload it to the Hub.

        Args:
            repo_id: "owner/name"; made if it is not there.
            params: parameters to write; None means the model's own.
            **kwargs: as `vit_convert.save.Savable.push_to_hub`.

        Returns, Raises: as there.
        """
        return super().push_to_hub(repo_id, params=params, **kwargs)

    # -- what scripts ask of a model of Transformers

    @classmethod
    def can_generate(cls) -> bool:
        """False: there is no text to generate."""
        return False

    @classmethod
    def _from_config(cls, config: ViTConfig, **kwargs: Any) -> Self:
        """A model with new weights; `kwargs` as the constructor."""
        make: Any = cls
        return make(config, **kwargs)

    @classmethod
    def from_config(cls, config: ViTConfig, **kwargs: Any) -> Self:
        """A model with new weights; `kwargs` as the constructor. `trust_remote_code` is accepted
        and has no effect."""
        kwargs.pop("trust_remote_code", None)
        return cls._from_config(config, **kwargs)

    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self._shapes.values())

    def get_memory_footprint(self) -> int:
        """Bytes of the parameters; of `param_dtype` where the model holds none."""
        tree = self.params if self._is_initialized else self.params_shape_tree
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "FlaxAutoModel") -> None:
        """Record an Auto class's name in `_auto_class`. Nothing else follows: no code is written
        beside weights or run from there. `FlaxAutoModel.register` makes a class load through Auto.

        Raises:
            InputError: it is not an Auto class.
        """
        cls._auto_class = auto_class_name(auto_class)

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Add tags for the model card; those that are there already are left."""
        tags = [tags] if isinstance(tags, str) else tags
        known = self.model_tags or []
        self.model_tags = [*known, *dict.fromkeys(tag for tag in tags if tag not in known)]

    # -- dtypes and memory

    def _cast(self, params: Params, dtype: Any, mask: Any) -> Any:
        def cast(x, chosen=True):
            floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
            return jnp.asarray(x).astype(dtype) if floating and chosen else x

        if mask is None:
            return jax.tree.map(cast, params)
        return jax.tree.map(cast, params, mask)

    def to_bf16(self, params: Params, mask: Any = None) -> Any:
        """Floating parameters as bfloat16, a new tree; where `mask` (a tree of bools) is True."""
        return self._cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Params, mask: Any = None) -> Any:
        """Floating parameters as float16, a new tree; where `mask` (a tree of bools) is True."""
        return self._cast(params, jnp.float16, mask)

    def to_fp32(self, params: Params, mask: Any = None) -> Any:
        """Floating parameters as float32, a new tree; where `mask` (a tree of bools) is True."""
        return self._cast(params, jnp.float32, mask)

    def enable_gradient_checkpointing(self, policy: str = "nothing_saveable") -> None:
        """Recompute each block in the backward pass instead of storing what is inside it.

        Args:
            policy: what is stored all the same, as `jax.checkpoint_policies` names it:
                "nothing_saveable"; "dots_with_no_batch_dims_saveable", the products with weights;
                "dots_saveable", every matrix product; "everything_saveable". Attention by a kernel
                is one operation and no product: but for the last of these it is computed anew.

        Raises:
            InputError: there is no such policy.
        """
        if policy not in REMAT_POLICIES:
            wanted = ", ".join(map(repr, REMAT_POLICIES))
            raise InputError(f"`policy` must be one of {wanted}; given {policy!r}.")
        self._set_gradient_checkpointing(True, policy)

    def disable_gradient_checkpointing(self) -> None:
        """Undo `enable_gradient_checkpointing`."""
        self._set_gradient_checkpointing(False, self._module.remat_policy)

    def _set_gradient_checkpointing(self, value: bool, policy: str) -> None:
        config = copy.deepcopy(self._module.config)
        config.gradient_checkpointing = value
        self._module = self._module.clone(config=config, remat_policy=policy)
        vars(self).pop("_jitted", None)


class FlaxViTPreTrainedModel(FlaxPreTrainedModel):
    """Base of the models of ViT: builds `module_class`, see `FlaxPreTrainedModel`.

    Args:
        config, input_shape, seed, dtype, _do_init, param_dtype: as `FlaxPreTrainedModel`.
        precision: precision of matrix products, as JAX names it ("highest", "high", "default",
            None).
        attn_implementation: see `vit_flax.attention`.
        scan_layers: compile one block and run it for all of them, over parameters stacked along a
            first axis (`vit_flax.stack_layers`): deep networks compile several times as fast. What
            is saved is as ever.
        **kwargs: fields of the module (`add_pooling_layer`, `use_mask_token`).

    Raises:
        ConfigError: the configuration cannot be built.
        InputError: another argument does not fit.
    """

    def __init__(
        self,
        config: ViTConfig,
        input_shape: tuple[int, ...] | None = None,
        seed: int = 0,
        dtype: Any = jnp.float32,
        _do_init: bool = True,
        *,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        attn_implementation: str = "auto",
        scan_layers: bool = False,
        **kwargs: Any,
    ) -> None:
        if self.module_class is None:
            raise InputError(
                f"{type(self).__name__} has no network of its own; use FlaxViTModel or one of the "
                "FlaxViTFor... classes."
            )
        check_keywords(type(self).__name__, kwargs, self._constructor_keywords())
        config = as_config(config, self.config_class)
        config.validate()
        settings = {
            "dtype": float_dtype("dtype", dtype),
            "param_dtype": float_dtype("param_dtype", param_dtype),
            "precision": check_precision(precision),
            "attn_implementation": check_implementation(attn_implementation),
            "scan_layers": check_flag("scan_layers", scan_layers),
        }
        if not issubclass(self.module_class, FlaxViTPart):  # it has the fields that it declares
            declared = {field.name for field in fields(self.module_class)}
            settings = {name: value for name, value in settings.items() if name in declared}
        module = self.module_class(config=copy.deepcopy(config), **settings, **kwargs)
        super().__init__(
            config, module, input_shape, seed, dtype, _do_init, param_dtype=param_dtype
        )


class FlaxViTModel(FlaxViTPreTrainedModel):
    """The base network: hidden states, and a pooled output unless `add_pooling_layer=False`."""

    module_class = FlaxViTModule

    def __call__(  # type: ignore[override]
        self,
        pixel_values: Any,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        head_mask: Any = None,
        bool_masked_pos: Any = None,
        interpolate_pos_encoding: Interpolate = None,
    ) -> Any:
        """Run the network.

        Args:
            pixel_values: (B, C, H, W).
            params: parameters to use; None or empty means the model's own.
            dropout_rng: random key of dropout, needed with `train=True` and a rate above zero.
            train: whether dropout is active.
            output_attentions, output_hidden_states, return_dict: None means the config's.
            head_mask: (A,) or (L, A), multiplies the attention probabilities.
            bool_masked_pos: (B, N), 1 where a patch is replaced by the mask token.
            interpolate_pos_encoding: accept other image sizes, resampling the positions; with
                "crop" also sizes that hold no whole number of patches: the last rows and columns
                of pixels are left out.

        Returns:
            `FlaxBaseModelOutputWithPooling`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        return self._call(
            pixel_values,
            params,
            dropout_rng,
            train,
            (output_attentions, output_hidden_states, return_dict),
            interpolate_pos_encoding,
            {"head_mask": head_mask, "bool_masked_pos": bool_masked_pos},
        )


class FlaxViTForImageClassification(FlaxViTPreTrainedModel):
    """The base network with a linear classifier on the class token."""

    module_class = FlaxViTForImageClassificationModule
    head = "classifier"

    def __call__(  # type: ignore[override]
        self,
        pixel_values: Any,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        head_mask: Any = None,
        labels: Any = None,
        interpolate_pos_encoding: Interpolate = None,
    ) -> Any:
        """Run the network; arguments as `FlaxViTModel`, and

        Args:
            labels: (B,) class indices (-100 is ignored), (B,) numbers for one label, or (B, K)
                for several labels; then `loss` is in the output. `config.problem_type` decides,
                or, where it is None, the number of labels and the dtype.

        Returns:
            `FlaxSequenceClassifierOutput`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model; a label is out of range.
        """
        pixel_values = as_array("pixel_values", pixel_values)
        check_rank(pixel_values, "(batch, channels, height, width)")
        values = None if labels is None else values_of("labels", labels)
        if values is not None:
            config = self._module.config  # what the network was built with
            problem_type = resolve_problem_type(config, values.dtype.kind in "iu")
            check_labels(values, problem_type, pixel_values.shape[0], config.num_labels)
        return self._call(
            pixel_values,
            params,
            dropout_rng,
            train,
            (output_attentions, output_hidden_states, return_dict),
            interpolate_pos_encoding,
            {"head_mask": head_mask, "labels": labels},
        )


class FlaxViTForMaskedImageModeling(FlaxViTPreTrainedModel):
    """The base network with a mask token and a decoder back to pixels."""

    module_class = FlaxViTForMaskedImageModelingModule
    head = "decoder"

    def __call__(  # type: ignore[override]
        self,
        pixel_values: Any,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        head_mask: Any = None,
        bool_masked_pos: Any = None,
        interpolate_pos_encoding: Interpolate = None,
    ) -> Any:
        """Run the network; arguments as `FlaxViTModel`. With `bool_masked_pos`, `loss` is in the
        output.

        Returns:
            `FlaxMaskedImageModelingOutput` with `reconstruction` (B, C, H, W), or its tuple with
            `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model, `encoder_stride` not the patch side.
        """
        return self._call(
            pixel_values,
            params,
            dropout_rng,
            train,
            (output_attentions, output_hidden_states, return_dict),
            interpolate_pos_encoding,
            {"head_mask": head_mask, "bool_masked_pos": bool_masked_pos},
        )


def plain(params: Any) -> Any:
    """A frozen tree as the nested dict it holds."""
    return unfreeze(params) if isinstance(params, FrozenDict) else params
