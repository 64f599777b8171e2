"""One training step: loss, gradients, optimizer, new parameters, as one compiled program."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from vit_common.errors import InputError
from vit_common.recipes import Recipe
from vit_flax.cpu.targets import targets
from vit_flax.sharding import DATA, FSDP, batch_sharding, lay_out, tree_shardings

__all__ = ["Ema", "Optimizer", "Total", "TrainState", "ema_of", "init_state", "make_step"]

Params = Any
Batch = Mapping[str, Any]
Trainable = Callable[[str], bool]
"""Whether a parameter trains, by its path, such as "vit/encoder/layer/0/output/dense/kernel"."""


class Total(NamedTuple):
    """A loss as a sum and the number of what was summed, so that parts of a batch add up to it.

    Attributes:
        sum: scalar, over what counts.
        count: scalar, how many that is (or their total weight); constant in the parameters.
        metrics: more sums by name, each divided by `count`; or (sum, count) pairs with a count of
            their own.
    """

    sum: jax.Array
    count: jax.Array  # type: ignore[assignment]
    metrics: Mapping[str, Any] = {}


Loss = Callable[[Any, Batch], Any]
"""From the model's output and the batch to a `Total`; or to a scalar, the mean over the batch, or
to a scalar and a dict of more such means."""
Prepare = Callable[[dict[str, Any], jax.Array], Mapping[str, Any]]
"""From a batch and a key to the batch that the model and the loss see."""
CONSTANTS = "constants"
"""Entry of a batch that has no rows: a tree of arrays that `prepare` reads, such as the parameters
of a teacher. It is neither divided nor laid out anew."""
Step = Callable[["TrainState", Batch], tuple["TrainState", dict[str, jax.Array]]]


class Optimizer(Protocol):
    """An optimizer as optax has them (`optax.GradientTransformation`)."""

    init: Callable[..., Any]
    update: Callable[..., tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Ema:
    """Exponential moving average of the parameters.

    Attributes:
        decay: share of the average that stays at each step, 0 to 1.
        rule: "plain" (DeiT): the same decay from the first step; "warmup" (timm's `ModelEmaV3`
            with `use_warmup`): min(decay, 1 - (1 + t) ** (-2 / 3)) at step t, counted from 0.
    """

    decay: float
    rule: str = "plain"

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay <= 1.0:
            raise InputError(f"`ema` must be a decay from 0 to 1; given {self.decay!r}.")
        if self.rule not in ("plain", "warmup"):
            raise InputError(f"`rule` must be 'plain' or 'warmup'; given {self.rule!r}.")

    def weight(self, step: jax.Array) -> jax.Array | float:
        """Weight of the new parameters in the average, 1 - decay, at a step counted from 0."""
        if self.rule == "plain":
            return 1.0 - self.decay
        t = step.astype(jnp.result_type(float))
        return jnp.maximum((1.0 + t) ** (-2.0 / 3.0), 1.0 - self.decay)


def ema_of(recipe: Recipe) -> Ema | None:
    """The moving average that a recipe asks for."""
    return None if recipe.ema is None else Ema(recipe.ema, recipe.ema_rule)


class TrainState(flax.struct.PyTreeNode):
    """All that changes in training. A pytree; `make_step` maps one to the next.

    Attributes:
        step: int32 scalar, steps taken so far.
        params: nested dict, float32 (or float64).
        opt_state: the optimizer's, for the parameters that train.
        ema: moving average of the parameters that train, or None. `averaged` has all of them.
        key: typed key of random numbers; it never changes. Step i draws from `fold_in(key, i)`.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    key: jax.Array

    @classmethod
    def create(
        cls,
        model: Any,
        optimizer: Optimizer,
        *,
        key: jax.Array | None = None,
        params: Params | None = None,
        ema: float | Ema | None = None,
        trainable: Trainable | None = None,
        mesh: Mesh | None = None,
        copy: bool = True,
    ) -> TrainState:
        """The state before the first step.

        Args:
            model: whose `params` training begins with, widened to float32 where they are narrower
                (small updates are lost in bfloat16).
            optimizer: optax's, or anything with `init` and `update`.
            key: of dropout, mixing and the like; `jax.random.key(0)` if None.
            params: to begin with instead of the model's own.
            ema: keep a moving average of the parameters (`make_step` has its decay).
            trainable: of the path of a parameter: whether it trains. None trains all. Others have
                no moments and no average.
            mesh: devices to lay everything on, by the table in `vit_flax.sharding`.
            copy: leave the parameters that are given as they are. False saves their memory: the
                first step takes it, and the model has none until `model.params` is set again.
                (Not of those that are widened, or laid out on other devices: those are copies.)

        Raises:
            InputError: a parameter is an integer; nothing trains; the model has no parameters.

        Example:
            >>> state = TrainState.create(model, optax.adamw(1e-3), key=jax.random.key(0))
        """
        if params is None:
            params = getattr(model, "params", None)
        if params is None:
            raise InputError("`params`: the model has none of its own; pass them.")
        if isinstance(params, FrozenDict):
            params = unfreeze(params)
        check_floats(params)
        taken: set[int] = set()

        def own(leaf: Any) -> jax.Array:
            """An array for the first step to take; none can be taken twice."""
            wide = jnp.asarray(_wide(leaf))
            if copy or id(wide) in taken:
                return jnp.array(wide)
            taken.add(id(wide))
            return wide

        params = jax.tree.map(own, params)
        if mesh is not None:
            params = lay_out(params, tree_shardings(mesh, params))
        chosen = trained(params, trainable)
        key = jax.random.key(0) if key is None else key
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        key = jax.random.clone(key) if typed else jax.random.wrap_key_data(jnp.array(key))
        state = cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(chosen),
            ema=None if ema is None else jax.tree.map(jnp.array, chosen),
            key=key,
        )
        if mesh is not None:
            state = lay_out(state, tree_shardings(mesh, state))
        return state

    @property
    def averaged(self) -> Params:
        """All parameters, those that train by their moving average if there is one."""
        return self.params if self.ema is None else join(self.params, self.ema)


def trained(params: Params, trainable: Trainable | None) -> Params:
    """The parameters that train, as a tree without the others.

    Raises:
        InputError: none does.
    """
    if trainable is None:
        return params
    flat = {path: leaf for path, leaf in flatten_dict(params).items() if trainable("/".join(path))}
    if not flat:
        raise InputError("`trainable`: no parameter of the model trains; wanted at least one.")
    return unflatten_dict(flat)


def join(params: Params, chosen: Params) -> Params:
    """All parameters, with those of a part of the tree in the place of their namesakes."""
    flat = flatten_dict(chosen)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: flat.get(tuple(getattr(key, "key", key) for key in path), leaf), params
    )


def init_state(optimizer: Optimizer, params: Params) -> Any:
    """The optimizer's state before the first step. Its moments are float32 at least, whatever the
    dtype of the parameters."""
    return optimizer.init(jax.tree.map(_wide, params))


def make_step(
    model: Any,
    loss: Loss,
    optimizer: Optimizer,
    *,
    accumulate: int = 1,
    ema: float | Ema | None = None,
    trainable: Trainable | None = None,
    materialize: Callable[[Params], Params] | None = None,
    prepare: Prepare | None = None,
    mesh: Mesh | None = None,
    donate: bool = True,
    update_norm: bool = False,
) -> Step:
    """One step of training, compiled: (state, batch) -> (state, metrics).

    The step is pure. Gradients and the optimizer's arithmetic are float32 at least. For mixed
    precision give the model `dtype="bfloat16"`; the state holds float32 parameters.

    Args:
        model: a Flax model of this package; a `flax.linen.Module` (whose images are (B, H, W, C)
            and which takes `deterministic`); or a function (params, batch, key) -> outputs. Its
            own parameters are not used.
        loss: called with the model's output and the batch; gives a `Total`, a scalar, or a scalar
            and a dict of more scalars.
        optimizer: optax's, or anything with `init` and `update`.
        accumulate: parts that a batch is run in, one after the other, to save memory. The step is
            that of the whole batch: sum over all counted labels, divided by their number.
        ema: decay of the moving average in `state.ema`.
        trainable: of the path of a parameter: whether it trains; as given to `TrainState.create`.
            Others cost no gradient.
        materialize: from `state.params` to the parameters of the model, if they differ (adapters).
        prepare: (batch, key) -> batch, inside the program, on the whole batch: `mixing` makes one.
        mesh: devices that the state and batches lie on (`vit_flax.sharding`). None leaves it to
            the arrays.
        donate: let the new state take the memory of the old one, which cannot be used afterwards.
        update_norm: also measure the norm of the update; XLA's CPU compiler computes the update
            again for it (5% more memory traffic for DeiT-Tiny).

    Returns:
        The jitted step. Its batch has "pixel_values" (B, C, H, W) and what `loss` looks at; rows
        with "weights" (B,) of 0 do not count. Its metrics are scalars: "loss", "gradient_norm"
        (over all that trains, before clipping), "finite" (bool), "update_norm" if asked for, and
        those of `loss`. Where the loss or a gradient is not finite, or nothing in the batch counts,
        parameters, moments and average stay as they were, and "update_norm" is 0; only `state.step`
        goes on.

    Raises:
        InputError: `accumulate` is not positive. At the first call: parameters are integers, the
            loss is no scalar, or the batch cannot be divided as asked.

    Example:
        >>> optimizer = optax.adamw(1e-3)
        >>> state = TrainState.create(model, optimizer, key=jax.random.key(0))
        >>> step = make_step(model, cross_entropy(), optimizer)
        >>> for batch in batches:
        ...     state, metrics = step(state, batch)
        >>> model.params = state.params
    """
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise InputError(f"`accumulate` must be a positive integer; given {accumulate!r}.")
    if ema is not None and not isinstance(ema, Ema):
        ema = Ema(ema)
    apply = _outputs_of(model)

    def part_gradients(
        params: Params, chosen: Params, batch: Batch, key: jax.Array, rows: int
    ) -> tuple[Params, Total]:
        """Gradients of the sum over a part, divided by the rows of the whole batch (a constant, so
        that half precision neither overflows nor vanishes), and the sums."""

        def objective(chosen: Params) -> tuple[jax.Array, Total]:
            whole = chosen if trainable is None else join(params, chosen)
            whole = whole if materialize is None else materialize(whole)
            total = _total(loss(apply(whole, batch, key), batch), batch)
            return total.sum / rows, jax.tree.map(jax.lax.stop_gradient, total)

        gradients, total = jax.grad(objective, has_aux=True)(chosen)
        return jax.tree.map(_wide, gradients), total

    def sharded(tree: Any) -> Any:
        if mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, tree_shardings(mesh, tree))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        check_floats(state.params)
        if ema is not None and state.ema is None:
            raise InputError(
                "`ema`: this state keeps no average; give TrainState.create `ema` too."
            )
        now = jax.random.fold_in(state.key, state.step)
        constants = {name: batch[name] for name in (CONSTANTS,) if name in batch}
        batch = {name: value for name, value in batch.items() if name not in constants}
        if mesh is not None:
            batch = jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))
        if prepare is not None:
            batch = dict(prepare({**batch, **constants}, jax.random.fold_in(now, 0)))
            batch.pop(CONSTANTS, None)
        rows = batch["pixel_values"].shape[0]
        _check_divides(rows, accumulate, mesh)
        params = state.params
        chosen = jax.tree.map(_wide, trained(params, trainable))
        if accumulate == 1:
            gradients, total = part_gradients(
                params, chosen, batch, jax.random.fold_in(now, 1), rows
            )
        else:

            def part(i: jax.Array) -> tuple[Params, Total]:
                key = jax.random.fold_in(now, 1 + i)
                return part_gradients(params, chosen, _part(batch, i, accumulate), key, rows)

            def add(gradients: Params, i: jax.Array) -> tuple[Params, Total]:
                more, total = part(i)
                return sharded(jax.tree.map(jnp.add, gradients, more)), total

            if accumulate == 2 and targets() == ("cpu",):
                gradients, total = _halves(part)
                gradients = sharded(gradients)
            else:
                zeros = sharded(jax.tree.map(jnp.zeros_like, chosen))
                gradients, totals = jax.lax.scan(add, zeros, jnp.arange(accumulate))
                total = jax.tree.map(lambda leaf: leaf.sum(axis=0), totals)

        counted = total.count > 0
        divide = jnp.where(counted, total.count, jnp.ones_like(total.count))
        scale = rows / divide
        gradients = jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), gradients)
        value = total.sum / divide
        norm = _norm(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)

        before = trained(params, trainable), state.opt_state, state.ema

        def move() -> tuple[Any, ...]:
            updates, opt_state = optimizer.update(gradients, state.opt_state, chosen)
            moved = jax.tree.map(jnp.add, chosen, updates)
            average = state.ema
            if ema is not None:
                weight = ema.weight(state.step)
                # As torch's lerp: exact where the two are equal.
                average = jax.tree.map(
                    lambda old, new: old + jnp.asarray(weight, old.dtype) * (new - old),
                    state.ema,
                    moved,
                )
            found = jax.tree.map(
                lambda new, old: jnp.asarray(new).astype(old.dtype),
                (moved, opt_state, average),
                before,
            )
            return *found, _norm(updates).astype(norm.dtype) if update_norm else None

        def stay() -> tuple[Any, ...]:
            return *before, jnp.zeros_like(norm) if update_norm else None

        good = finite & counted
        if targets() == ("cpu",):
            # Not a choice for every array: XLA's CPU compiler then copies all moments, which the
            # choice and the parameters' update both read.
            found = jax.lax.cond(good, move, stay)
        else:
            found = jax.tree.map(lambda new, old: jnp.where(good, new, old), move(), stay())
        moved, opt_state, average, moved_by = found
        after = TrainState(
            step=state.step + 1,
            params=moved if trainable is None else join(params, moved),
            opt_state=opt_state,
            ema=average,
            key=state.key,
        )
        metrics = {
            name: _ratio(*(found if isinstance(found, tuple) else (found, total.count)))
            for name, found in total.metrics.items()
        }
        metrics |= {"loss": value, "gradient_norm": norm}
        if update_norm:
            metrics["update_norm"] = moved_by
        return sharded(after), {**metrics, "finite": finite}

    return jax.jit(step, donate_argnums=(0,) if donate else ())


def _outputs_of(model: Any) -> Callable[[Params, Batch, jax.Array], Any]:
    """(params, batch, key) -> outputs in training, of any kind of model."""
    if inspect.isfunction(model) or inspect.ismethod(model):
        return model

    def apply(params: Params, batch: Batch, key: jax.Array) -> Any:
        pixel_values = batch["pixel_values"]
        if isinstance(model, nn.Module):
            rngs = {"dropout": key}
            return model.apply({"params": params}, pixel_values, deterministic=False, rngs=rngs)
        # Which patches are hidden, for masked image modelling.
        more = {name: batch[name] for name in ("bool_masked_pos",) if name in batch}
        return model(
            pixel_values, params=params, dropout_rng=key, train=True, return_dict=True, **more
        )

    return apply


def _total(found: Any, batch: Batch) -> Total:
    """What a loss returned, as sums. A mean counts as one number for each row of its part."""
    if not isinstance(found, Total):
        value, metrics = found if isinstance(found, tuple) else (found, {})
        if jnp.shape(value):
            raise InputError(
                f"`loss` must give one number for the batch; given shape {jnp.shape(value)}. Take "
                "its mean."
            )
        rows = batch["pixel_values"].shape[0]
        value = jnp.asarray(value)
        count = jnp.asarray(rows, _wide(value).dtype)
        scaled = {name: (_wide(jnp.asarray(m)) * rows, count) for name, m in metrics.items()}
        found = Total(value * rows, count, scaled)
    pairs = {
        name: tuple(map(_wide, map(jnp.asarray, m))) if isinstance(m, tuple) else _wide(m)
        for name, m in found.metrics.items()
    }
    for part in (found.sum, found.count):
        if jnp.shape(part):
            raise InputError(
                "`loss` must give one number for the batch; given a `Total` of shape "
                f"{jnp.shape(part)}. Take its sum."
            )
    total = _wide(found.sum)
    return Total(total, jnp.asarray(found.count).astype(total.dtype), pairs)


def _ratio(total: jax.Array, count: jax.Array) -> jax.Array:
    """Their quotient; 0 where nothing was counted."""
    count = jnp.where(count > 0, count, jnp.ones_like(count)).astype(total.dtype)
    return total / count


def _halves(part: Callable[[jax.Array], tuple[Params, Total]]) -> tuple[Params, Total]:
    """The sums over two parts, written out. In a loop XLA's CPU compiler makes a step up to a third
    slower; with four parts written out it needs more memory than for the whole batch.

    The second waits for the gradients of the first, so that only one has its activations in memory.
    That compiler drops barriers; so the number of the second, which its rows are taken by, is made
    of those gradients: 1, or 2 if one is NaN, when the step is not taken anyway.
    """
    first = part(jnp.int32(0))
    some = sum(leaf[(0,) * leaf.ndim] for leaf in jax.tree.leaves(first[0]))
    second = part(1 + jnp.isnan(some).astype(jnp.int32))
    return jax.tree.map(jnp.add, first, second)


def _part(batch: Batch, index: jax.Array, parts: int) -> dict[str, Any]:
    """One part of a batch: every `parts`-th row. (So each device of a mesh has its share of each
    part where it has its share of the batch.)"""
    rows = batch["pixel_values"].shape[0]

    def take(array: Any) -> Any:
        if jnp.ndim(array) == 0 or array.shape[0] != rows:
            return array
        split = array.reshape(rows // parts, parts, *array.shape[1:])
        return jax.lax.dynamic_index_in_dim(split, index, axis=1, keepdims=False)

    return {name: jax.tree.map(take, value) for name, value in batch.items()}


def _check_divides(rows: int, parts: int, mesh: Mesh | None) -> None:
    devices = 1 if mesh is None else mesh.shape.get(DATA, 1) * mesh.shape.get(FSDP, 1)
    if rows % (parts * devices):
        whole = f"`accumulate`={parts}" + (f" times {devices} devices" if devices > 1 else "")
        raise InputError(
            f"a batch of {rows} images cannot be divided by {whole}; wanted a multiple of "
            f"{parts * devices}."
        )


def _wide(array: Any) -> jax.Array:
    """In float32 at least; float64 stays. Integers and booleans become float32."""
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.float32)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves together."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def check_floats(params: Params) -> None:
    """Raise InputError where a parameter has no gradient."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            name = "/".join(str(getattr(key, "key", key)) for key in path)
            raise InputError(
                f"`params`: {name} is {leaf.dtype}, which cannot be trained; wanted floating point "
                "(8-bit weights are for inference)."
            )
