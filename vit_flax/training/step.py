"""One training step: loss, gradients, optimizer, new parameters, as one compiled program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vit_common.errors import InputError
from vit_flax.sharding import batch_sharding, tree_shardings

Params = Any
Batch = Mapping[str, Any]
Loss = Callable[[Any, Batch], Any]
"""From the model's output and the batch to a scalar, or to a scalar and a dict of more metrics."""
Step = Callable[[Params, Any, Batch, Any], tuple[Params, Any, dict[str, jax.Array]]]


class Optimizer(Protocol):
    """An optimizer as optax has them (`optax.GradientTransformation`)."""

    init: Callable[..., Any]
    update: Callable[..., tuple[Any, Any]]


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """The mean cross entropy between an output's `logits` (B, K) and the batch's "labels": (B,)
    class indices, or (B, K) probabilities. Computed in float32 at least.

    Args:
        label_smoothing: share of each label that is spread over all classes (Szegedy et al. 2016,
            arXiv:1512.00567, section 7).
    """

    def loss(outputs: Any, batch: Batch) -> jax.Array:
        logits = _wide(outputs.logits)  # (B, K)
        labels = jnp.asarray(batch["labels"])
        K = logits.shape[-1]
        if labels.ndim == 1:
            labels = jax.nn.one_hot(labels, K, dtype=logits.dtype)
        targets = (1.0 - label_smoothing) * labels.astype(logits.dtype) + label_smoothing / K
        return -(targets * jax.nn.log_softmax(logits, axis=-1)).sum(axis=-1).mean()

    return loss


def init_state(optimizer: Optimizer, params: Params) -> Any:
    """The optimizer's state before the first step. Its moments are float32 at least, whatever the
    dtype of the parameters."""
    return optimizer.init(jax.tree.map(_wide, params))


def make_step(
    model: Any,
    loss: Loss,
    optimizer: Optimizer,
    *,
    mesh: Mesh | None = None,
    donate: bool = True,
) -> Step:
    """One step of training, compiled: (params, opt_state, batch, rng) -> (params, opt_state,
    metrics).

    The step is pure. Gradients and the optimizer's arithmetic are float32 at least, and the new
    parameters have the dtype of the old ones. (Small updates are lost in bfloat16 parameters: for
    mixed precision hold the parameters in float32, and give the model `dtype="bfloat16"`.)

    Args:
        model: a Flax model of this package, or a `flax.linen.Module` (whose images are (B, H, W, C)
            and which takes `deterministic`). Its own parameters are not used.
        loss: called with the model's output and the batch; gives a scalar, or a scalar and a dict
            of more metrics.
        optimizer: optax's, or anything with `init` and `update`. Its state comes from `init_state`.
        mesh: devices that the parameters and batches lie on (`vit_flax.sharding`); what comes out
            lies as the table there says. None leaves it to the arrays.
        donate: let the new parameters and state take the memory of the old ones, which cannot be
            used afterwards (nor can `model.params`, if the first step was given those).

    Returns:
        The jitted step. Its batch has "pixel_values" (B, C, H, W) and what `loss` looks at; `rng`
        is the key of this step's dropout, a new one for each step (`jax.random.fold_in(key, i)`),
        or None for a model without dropout. Its metrics are scalars: "loss", "gradient_norm" (over
        all parameters together), and those of `loss`.

    Raises:
        InputError: at the first call: parameters are integers, or the loss is no scalar.

    Example:
        >>> optimizer = optax.adamw(1e-3)
        >>> step = make_step(model, cross_entropy(), optimizer)
        >>> params, state = model.params, init_state(optimizer, model.params)
        >>> for i, batch in enumerate(batches):
        ...     key = jax.random.fold_in(jax.random.key(0), i)
        ...     params, state, metrics = step(params, state, batch, key)
        >>> model.params = params
    """

    def outputs_of(params: Params, batch: Batch, rng: Any) -> Any:
        pixel_values = batch["pixel_values"]
        if isinstance(model, nn.Module):
            rngs = None if rng is None else {"dropout": rng}
            return model.apply({"params": params}, pixel_values, deterministic=False, rngs=rngs)
        return model(pixel_values, params=params, dropout_rng=rng, train=True, return_dict=True)

    def objective(params: Params, batch: Batch, rng: Any) -> tuple[jax.Array, dict[str, Any]]:
        found = loss(outputs_of(params, batch, rng), batch)
        value, metrics = found if isinstance(found, tuple) else (found, {})
        if jnp.shape(value):
            raise InputError(
                f"`loss` must give one number for the batch; given shape {jnp.shape(value)}. Take "
                "its mean."
            )
        return value, {**metrics, "loss": value}

    def step(
        params: Params, opt_state: Any, batch: Batch, rng: Any
    ) -> tuple[Params, Any, dict[str, jax.Array]]:
        _check_floats(params)
        if mesh is not None:
            batch = jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))
        gradients, metrics = jax.grad(objective, has_aux=True)(params, batch, rng)
        gradients = jax.tree.map(_wide, gradients)
        wide = jax.tree.map(_wide, params)
        updates, opt_state = optimizer.update(gradients, opt_state, wide)
        params = jax.tree.map(lambda p, w, u: (w + u).astype(p.dtype), params, wide, updates)
        if mesh is not None:
            params, opt_state = (
                jax.lax.with_sharding_constraint(tree, tree_shardings(mesh, tree))
                for tree in (params, opt_state)
            )
        return params, opt_state, {**metrics, "gradient_norm": _norm(gradients)}

    return jax.jit(step, donate_argnums=(0, 1) if donate else ())


def _wide(array: Any) -> jax.Array:
    """In float32 at least; float64 stays."""
    return jnp.asarray(array).astype(jnp.promote_types(array.dtype, jnp.float32))


def _norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves together."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def _check_floats(params: Params) -> None:
    """Raise InputError where a parameter has no gradient."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            name = "/".join(str(getattr(key, "key", key)) for key in path)
            raise InputError(
                f"`params`: {name} is {leaf.dtype}, which cannot be trained; wanted floating point "
                "(8-bit weights are for inference)."
            )
