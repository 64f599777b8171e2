"""Optimizers, schedules and rates of a recipe, as optax transformations.

Each definition is that of a named peer: AdamW, SGD and gradient clipping as torch's, layer-wise
decay as MAE's or timm's, and what is spared weight decay as timm's or Transformers'. Schedules are
tables computed in float64 on the host, since optax's warm-up computes in float32 even where
everything else is float64.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict

from vit_common.errors import InputError
from vit_common.recipes import Recipe, learning_rates
from vit_flax.training.step import Trainable

with contextlib.suppress(ModuleNotFoundError):  # evaluation and probes do without
    import optax

__all__ = ["explain", "make_optimizer", "schedule_of", "trainable_of"]

Path = tuple[str, ...]

_TOKENS = ("cls_token", "distillation_token", "mask_token", "register_tokens")
_POSITIONS = ("position_embeddings", "relative_position_bias_table", "rope_frequencies")
_HEADS = ("classifier", "cls_classifier", "distillation_classifier", "lm_head", "decoder")
_HEAD = re.compile(rf"(^|/)({'|'.join(_HEADS)}|lm_layernorm)(/|$)")


# -- learning rate


def schedule_of(recipe: Recipe, steps: int) -> Callable[[Any], jax.Array]:
    """The learning rate by step, counted from 0: a table in float64 that is looked up.

    Args:
        recipe: its `schedule`, warm-up and rates.
        steps: updates of the whole run. Later ones have the last rate.

    Raises:
        InputError: the warm-up is not shorter than the run, or a rate is not a positive number.

    Example:
        >>> rate = schedule_of(recipe("fine-tune"), steps=100)
        >>> float(rate(0))
    """
    table = learning_rates(recipe, steps)

    def schedule(step: Any) -> jax.Array:
        rates = jnp.asarray(table, jnp.result_type(float))
        return rates[jnp.clip(jnp.asarray(step), 0, steps - 1)]

    return schedule


# -- which parameters


def depth_of(params: Any) -> int:
    """The number of blocks."""
    found = 0
    for path, leaf in flatten_dict(_plain(params)).items():
        if "layer" in path[:-1]:
            block = path[path.index("layer") + 1]
            found = max(found, leaf.shape[0] if block == "stacked" else int(block) + 1)
    return found


def rate_multiplier(recipe: Recipe, path: Path, blocks: int) -> float | np.ndarray:
    """The factor of a parameter's learning rate under layer-wise decay: decay ** (blocks + 1 -
    layer), where tokens, positions, patches and a norm before the blocks are layer 0, block i is
    layer i + 1, and heads are layer blocks + 1. For blocks that lie in one array, an array
    (blocks,).

    The final norm is a part of the head by MAE's and BEiT's rule, and of the last block by timm's;
    relative positions that all blocks share are a part of the head by BEiT's and of layer 0 by
    timm's.
    """
    if recipe.layer_decay is None:
        return 1.0
    timm, top = recipe.layer_decay_rule == "timm", blocks + 1
    layer: Any = top
    if "layer" in path[:-1]:
        block = path[path.index("layer") + 1]
        layer = np.arange(1, blocks + 1) if block == "stacked" else int(block) + 1
    elif "embeddings" in path or "pre_layernorm" in path:
        layer = 0
    elif "relative_position_bias" in path:
        layer = 0 if timm else top
    elif "layernorm" in path and "pooler" not in path:
        layer = blocks if timm else top
    return recipe.layer_decay ** np.asarray(top - layer, np.float64)


def decays(rule: str, path: Path, ndim: int) -> bool:
    """Whether a parameter has weight decay.

    Args:
        rule: "timm", "transformers", "kernels" or "none", as `Recipe.no_decay` has them.
        path: of the parameter.
        ndim: its number of axes.
    """
    name, ndim = path[-1], ndim - ("stacked" in path)
    if rule == "none":
        return True
    if rule == "transformers":
        # A table of relative positions has "bias" in its name, and LayerScale's vectors have not.
        norms = any(re.search(r"layernorm|norm$", part) for part in path)
        return not norms and not any("bias" in part for part in path)
    if rule == "kernels":
        return ndim >= 2 and name not in (*_TOKENS, *_POSITIONS)
    if rule == "timm":
        return ndim >= 2 and name not in (*_TOKENS, *_POSITIONS)
    raise InputError(
        f"`no_decay` must be 'timm', 'transformers', 'kernels' or 'none'; given {rule!r}."
    )


def trainable_of(recipe: Recipe, model: Any = None) -> Trainable | None:
    """Whether a parameter trains, by its path, as `recipe.train` says; None if all do.

    "head" are classifiers and the head of masked modelling. Otherwise regular expressions,
    separated by commas: a parameter trains if one of them is found in its name, written as a path
    ("vit/layernorm/scale"), with dots, or as in PyTorch ("vit.layernorm.weight").

    Args:
        recipe: the run's.
        model: a model or its parameters; if given, each expression must match one of them.

    Raises:
        InputError: not a regular expression, or one that matches nothing.

    Example:
        >>> trains = trainable_of(recipe(train=r"classifier,layer\\.(10|11)\\."))
        >>> trains("vit/encoder/layer/11/output/dense/kernel")
        True
    """
    frozen = _patterns("freeze", recipe.freeze, model)
    chosen: Trainable | None
    if recipe.train == "all":
        chosen = None
    elif recipe.train == "head":
        chosen = lambda name: bool(_HEAD.search(name))  # noqa: E731
    else:
        patterns = _patterns("train", recipe.train, model)
        if not patterns:
            raise InputError("`train` must be 'all', 'head' or regular expressions; given nothing.")
        chosen = lambda name: any(_found(each, name) for each in patterns)  # noqa: E731
    if not frozen:
        return chosen
    return lambda name: (
        (chosen is None or chosen(name)) and not any(_found(each, name) for each in frozen)
    )


def _patterns(setting: str, given: str, model: Any) -> list[re.Pattern[str]]:
    """The regular expressions of a setting; of a model, each must match a parameter."""
    known = None if model is None else paths(model)
    patterns = []
    for text in filter(None, map(str.strip, given.split(","))):
        try:
            patterns.append(re.compile(text))
        except re.error as error:
            raise InputError(
                f"`{setting}`: {text!r} is not a regular expression: {error}."
            ) from error
        if known is not None and not any(_found(patterns[-1], name) for name in known):
            raise InputError(f"`{setting}`: no parameter matches {text!r}; one is {known[0]}.")
    return patterns


def _found(pattern: re.Pattern[str], name: str) -> bool:
    """Whether a name has what a pattern looks for, in any of the three ways to write it."""
    dotted = name.replace("/", ".")
    torch = re.sub(r"\.(kernel|scale)$", ".weight", dotted)
    return any(pattern.search(text) for text in (name, dotted, torch))


class Row(NamedTuple):
    """How a parameter trains.

    Attributes:
        name: its path.
        shape: its shape.
        rate: factor of the learning rate; of blocks in one array, a factor for each block.
        decay: its weight decay; 0.0 if it is spared.
        trained: whether it trains at all.
    """

    name: str
    shape: tuple[int, ...]
    rate: float | tuple[float, ...]
    decay: float
    trained: bool


def explain(recipe: Recipe, params: Any, trainable: Trainable | None = None) -> list[Row]:
    """How each parameter trains: factor of its learning rate, weight decay, whether it trains.

    Args:
        recipe: the run's.
        params: nested dict of arrays or of their shapes; or a model.
        trainable: as `make_step` has it; None is what `recipe.train` says.
    """
    params = _params_of(params)
    trainable = trainable_of(recipe) if trainable is None else trainable
    blocks = depth_of(params)
    rows = []
    for path, leaf in flatten_dict(_plain(params)).items():
        name = "/".join(path)
        rate = np.asarray(rate_multiplier(recipe, path, blocks))
        rows.append(
            Row(
                name,
                tuple(leaf.shape),
                tuple(rate.tolist()) if rate.ndim else float(rate),
                recipe.weight_decay if decays(recipe.no_decay, path, len(leaf.shape)) else 0.0,
                trainable is None or trainable(name),
            )
        )
    return rows


# -- optimizers


def make_optimizer(
    recipe: Recipe,
    model: Any,
    *,
    steps: int,
    trainable: Trainable | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a recipe: clipping, AdamW, SGD, Lion or Muon, decoupled weight decay,
    layer-wise rates and the schedule.

    A parameter p with the optimizer's direction u moves by -rate * factor * (u + decay * p).

    Args:
        recipe: the settings.
        model: a model, or its parameters (or their shapes), for the number of blocks.
        steps: updates of the whole run.
        trainable: of the path of a parameter: whether it trains; others stay as they are, without
            moments. (`make_step` gives the optimizer only what trains, and needs no such thing.)

    Raises:
        InputError: a setting is out of range; or optax is not installed.

    Example:
        >>> optimizer = make_optimizer(recipe("mae-finetune"), model, steps=1000)
    """
    if "optax" not in globals():
        raise InputError(
            "training needs optax; run: pip install optax orbax-checkpoint (the extra `train`)"
        )
    blocks = depth_of(_params_of(model))
    moment = None if recipe.momentum_dtype == "float32" else jnp.dtype(recipe.momentum_dtype)
    parts = []
    lars = recipe.optimizer == "lars"
    if recipe.clip is not None:
        parts.append(_clip(recipe.clip, recipe.clip_rule))
    if recipe.optimizer == "adamw":
        parts.append(_adam(recipe.b1, recipe.b2, recipe.eps, moment))
    elif recipe.optimizer == "sgd":
        if recipe.momentum:
            parts.append(_momentum(recipe.momentum, recipe.nesterov, moment))
    elif recipe.optimizer == "lion":
        parts.append(optax.scale_by_lion(recipe.b1, recipe.b2, mu_dtype=moment))
    elif recipe.optimizer == "muon":
        parts.append(_muon(recipe, moment))
    elif recipe.optimizer == "lamb":
        parts.append(_adam(recipe.b1, recipe.b2, recipe.eps, moment))
    elif not lars:
        raise InputError(
            "`optimizer` must be 'adamw', 'sgd', 'lion', 'muon', 'lamb' or 'lars'; given "
            f"{recipe.optimizer!r}."
        )

    def spared(path: Path, leaf: Any) -> bool:
        return not decays(recipe.no_decay, path, leaf.ndim)

    if recipe.weight_decay:
        mask = lambda tree: _by_path(lambda *each: not spared(*each), tree)  # noqa: E731
        parts.append(optax.add_decayed_weights(recipe.weight_decay, mask))
    if recipe.optimizer == "lamb" and recipe.weight_decay:
        # As timm's: parameters that are spared weight decay are spared this too.
        parts.append(_trust(1.0, spared))
    elif lars:
        parts.append(_trust(1e-3, lambda path, leaf: leaf.ndim - ("stacked" in path) < 2))
        parts.append(_momentum(recipe.momentum, recipe.nesterov, moment))
    if recipe.layer_decay is not None:
        parts.append(_layer_rates(recipe, blocks))
    parts.append(optax.scale_by_learning_rate(schedule_of(recipe, steps)))
    chained = optax.chain(*parts)
    if trainable is None:
        return chained
    labels = lambda tree: _by_path(  # noqa: E731
        lambda path, _: "train" if trainable("/".join(path)) else "freeze", tree
    )
    return optax.partition({"train": chained, "freeze": optax.set_to_zero()}, labels)


def _clip(limit: float, rule: str) -> optax.GradientTransformation:
    """Scale all gradients so that their norm together is at most `limit`: by limit / norm, or by
    limit / (norm + 1e-6) as torch's `clip_grad_norm_`."""
    extra = 1e-6 if rule == "torch" else 0.0

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(updates)))
        # Not divided by 0, whose gradient would be NaN for a batch without any.
        tiny = jnp.finfo(norm.dtype).tiny
        scale = jnp.minimum(1.0, limit / jnp.maximum(norm + extra, tiny))
        return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _adam(b1: float, b2: float, eps: float, moment: Any) -> optax.GradientTransformation:
    """Adam's direction, as `optax.scale_by_adam`, which computes the bias correction as 1 - b ** n:
    of the first steps' 1 - 0.999, float32 leaves 4 digits. Here it is -expm1(n log b)."""

    def init(params: Any) -> Any:
        first = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, moment), params)
        return optax.ScaleByAdamState(
            jnp.zeros((), jnp.int32), first, jax.tree.map(jnp.zeros_like, params)
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: b1 * m.astype(g.dtype) + (1.0 - b1) * g, updates, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1.0 - b2) * (g * g), updates, state.nu)

        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            n = count.astype(m.dtype)
            first, second = (-jnp.expm1(n * math.log(b)) if b else 1.0 for b in (b1, b2))
            return (m / first) / (jnp.sqrt(v / second) + eps)

        found = jax.tree.map(direction, mu, nu)
        mu = jax.tree.map(lambda m, old: m.astype(old.dtype), mu, state.mu)
        return found, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _momentum(decay: float, nesterov: bool, moment: Any) -> optax.GradientTransformation:
    """The momentum of torch's SGD (`optax.trace`), which may be held in bfloat16; its sum is in the
    gradients' dtype."""

    def init(params: Any) -> Any:
        return optax.TraceState(jax.tree.map(lambda leaf: jnp.zeros_like(leaf, moment), params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        add = lambda g, t: g + decay * t.astype(g.dtype)  # noqa: E731
        summed = jax.tree.map(add, updates, state.trace)
        found = jax.tree.map(add, updates, summed) if nesterov else summed
        kept = jax.tree.map(lambda new, old: new.astype(old.dtype), summed, state.trace)
        return found, optax.TraceState(kept)

    return optax.GradientTransformation(init, update)


def _layer_rates(recipe: Recipe, blocks: int) -> optax.GradientTransformation:
    def scaled(path: Path, leaf: jax.Array) -> jax.Array:
        factor = np.asarray(rate_multiplier(recipe, path, blocks))
        if factor.ndim:  # one for each block of an array
            factor = factor.reshape(-1, *(1,) * (leaf.ndim - 1))
        return leaf * jnp.asarray(factor, leaf.dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return _by_path(scaled, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _trust(factor: float, spared: Callable[[Path, Any], bool]) -> optax.GradientTransformation:
    """Scale the update of each parameter by factor * its norm / the update's norm (LARS, You et al.
    2017, arXiv:1708.03888; LAMB, You et al. 2019, arXiv:1904.00962); by 1 where one is 0."""

    def scaled(path: Path, update: jax.Array, parameter: jax.Array) -> jax.Array:
        if spared(path, update):
            return update
        # Blocks that lie in one array have a norm each.
        axes = tuple(range(int("stacked" in path), update.ndim))
        norms = [
            jnp.sqrt(jnp.sum(jnp.square(each), axes, keepdims=True)) for each in (parameter, update)
        ]
        both = (norms[0] > 0) & (norms[1] > 0)
        ratio = factor * norms[0] / jnp.where(both, norms[1], 1.0)
        return update * jnp.where(both, ratio, 1.0)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return _by_path(scaled, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _muon(recipe: Recipe, moment: Any) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, AdamW for everything else (Jordan et al. 2024)."""
    numbers = optax.contrib.MuonDimensionNumbers

    def dimensions(path: Path, leaf: jax.Array) -> Any:
        if "layer" not in path or path[-1] != "kernel":
            return None
        return numbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)

    def shaped(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        """Wider outputs move more, as in optax and in the author's code."""
        del params
        scale = lambda leaf: leaf * max(1.0, leaf.shape[-1] / leaf.shape[-2]) ** 0.5  # noqa: E731
        return jax.tree.map(scale, updates), state

    labels = lambda tree: _by_path(  # noqa: E731
        lambda path, leaf: "adam" if dimensions(path, leaf) is None else "muon", tree
    )
    muon = optax.contrib.scale_by_muon(
        beta=recipe.momentum,
        eps=recipe.eps,
        mu_dtype=moment,
        nesterov=True,
        weight_dimension_numbers=lambda tree: _by_path(dimensions, tree),
    )
    adam = _adam(recipe.b1, recipe.b2, recipe.eps, moment)
    shape = optax.GradientTransformation(lambda params: optax.EmptyState(), shaped)
    return optax.partition({"muon": optax.chain(muon, shape), "adam": adam}, labels)


# -- trees


def _by_path(function: Callable[..., Any], tree: Any, *more: Any) -> Any:
    """A tree of the same form, from paths and the leaves of one or more trees."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(
            tuple(str(getattr(key, "key", key)) for key in path), *leaves
        ),
        tree,
        *more,
    )


def _params_of(model: Any) -> Any:
    """Parameters of a model or of itself."""
    if isinstance(model, dict | FrozenDict):
        return model
    if hasattr(model, "params_shape_tree"):
        return model.params_shape_tree
    params = getattr(model, "params", None)
    if params is None:
        raise InputError(
            f"wanted a model or its parameters (a nested dict); given a {type(model).__name__}."
        )
    return params


def _plain(params: Any) -> dict[str, Any]:
    return unfreeze(params) if isinstance(params, FrozenDict) else dict(params)


def paths(params: Any) -> Sequence[str]:
    """Paths of all parameters, as `trainable` is given them."""
    return ["/".join(path) for path in flatten_dict(_plain(_params_of(params)))]
