"""The L blocks: how they are built and, with `scan_layers=True`, run as one; and their parameters
in one array each, as that takes them, and back.

`encoder/layer/{i}/X`, one array for each of the L blocks, is `encoder/layer/stacked/X` with an axis
of L in front. Nothing else is touched, and both directions are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_common.errors import InputError
from vit_flax.outputs import FlaxBaseModelOutput

if TYPE_CHECKING:
    from vit_flax.model import FlaxViTLayer

Path = tuple[str, ...]

REMAT_POLICIES = (
    "nothing_saveable",
    "dots_with_no_batch_dims_saveable",
    "dots_saveable",
    "everything_saveable",
)
"""What a block keeps for its gradient under gradient checkpointing, from the least to the most, by
the names of `jax.checkpoint_policies`."""

STACKED = "stacked"
"""The name that takes the place of a block's number where all are in one array each."""


def make_blocks(layer: type[FlaxViTLayer], options: dict[str, Any]) -> list[FlaxViTLayer]:
    """The L blocks, for the `setup` of the module that holds them; one, with `scan_layers`.

    Under `config.gradient_checkpointing` each is computed anew in the backward pass. The last one
    computes only `front_tokens`, unless it is all the others too.

    Args:
        layer: class of a block.
        options: its arguments.
    """
    config, scanned = options["config"], options["scan_layers"]
    L = config.num_hidden_layers
    if config.gradient_checkpointing:
        layer = nn.remat(
            layer,
            static_argnums=(2, 3, 7),  # self is 0
            prevent_cse=not scanned,  # a loop's body is not merged with another's
            policy=getattr(jax.checkpoint_policies, options["remat_policy"]),
        )
    names = [STACKED] if scanned and L else [str(i) for i in range(L)]
    whole, last = options | {"front_tokens": None}, options
    return [layer(**(last if name == str(L - 1) else whole), name=name) for name in names]


def scan_blocks(
    run: Callable[..., tuple[jax.Array, jax.Array | None]],
    layer: FlaxViTLayer,
    hidden_states: jax.Array,
    owned: Any,
    rates: tuple[float, ...],
    output_attentions: bool,
    output_hidden_states: bool,
) -> FlaxBaseModelOutput:
    """One block, compiled once and run L times, over stacked parameters.

    Args:
        run: function of the block, hidden states, what the block alone has of `owned` and a rate of
            stochastic depth, that returns hidden states and attention probabilities or None.
        layer: the block.
        hidden_states: (B, S, D).
        owned: arrays (L, ...), or any tree of them: head masks, rotations.
        rates: of stochastic depth, one for each block.
        output_attentions, output_hidden_states: return those of every block too.

    Returns:
        As `FlaxViTLayerCollection`.
    """

    def step(layer, hidden_states, own, rate):
        hidden_states, probabilities = run(layer, hidden_states, own, rate)
        return hidden_states, (hidden_states if output_hidden_states else None, probabilities)

    scan = nn.scan(
        step,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        length=len(rates),
    )
    layer_rates = jnp.asarray(rates) if any(rates) else None
    last, (states, probabilities) = scan(layer, hidden_states, owned, layer_rates)
    return FlaxBaseModelOutput(
        last_hidden_state=last,
        hidden_states=None if states is None else (hidden_states, *jnp.unstack(states)),
        attentions=tuple(jnp.unstack(probabilities)) if output_attentions else None,
    )


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Put the parameters of all blocks into one array each.

    Args:
        params: a nested dict as a model holds it, with or without a head, or another of the same
            names: gradients, moments. NumPy arrays stay on the host.

    Returns:
        A new nested dict; blocks that are stacked already stay so.

    Raises:
        InputError: a block lacks a parameter that another has, or has it of another shape or dtype.
    """
    flat, blocks = _divided(_flat(params))
    for path, found in blocks.items():
        faults = [i for i in range(max(found) + 1) if i not in found]
        if faults:
            raise InputError(
                f"`params`: {'/'.join(path)} is stacked over blocks from 0 on; there is none of "
                f"{', '.join(map(str, faults))}."
            )
        kinds = {(np.shape(array), jnp.result_type(array)) for array in found.values()}
        if len(kinds) > 1:
            wanted = "; ".join(sorted(f"{dtype} {shape}" for shape, dtype in kinds))
            raise InputError(
                f"`params`: {'/'.join(path)} must be alike in all blocks to be stacked; given "
                f"{wanted}."
            )
        host = all(isinstance(array, np.ndarray) for array in found.values())
        flat[path] = (np if host else jnp).stack([found.pop(i) for i in sorted(found)])
    counts = {path: np.shape(flat[path])[0] for path in blocks}
    if len(set(counts.values())) > 1:
        raise InputError(
            "`params`: blocks must have the same parameters to be stacked; given "
            + ", ".join(f"{'/'.join(path)} of {count} blocks" for path, count in counts.items())
            + "."
        )
    return unflatten_dict(flat)


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `stack_layers`: parameters of each block by itself, `encoder/layer/{i}/X`.

    Returns:
        A new nested dict; of NumPy arrays the parts are views.
    """
    flat = {}
    for path, array in _flat(params).items():
        if STACKED not in path:
            flat[path] = array
            continue
        place = path.index(STACKED)
        for i, part in enumerate(array if isinstance(array, np.ndarray) else jnp.unstack(array)):
            flat[(*path[:place], str(i), *path[place + 1 :])] = part
    return unflatten_dict(flat)


def stacked_shapes(shapes: Mapping[Path, tuple[int, ...]]) -> dict[Path, tuple[int, ...]]:
    """The shapes of a network's parameters when its blocks are stacked."""
    flat, blocks = _divided(shapes)
    return flat | {path: (len(found), *found[0]) for path, found in blocks.items()}


def is_stacked(paths: Iterable[Path]) -> bool:
    """Whether these are the paths of stacked parameters."""
    return any(STACKED in path for path in paths)


def _flat(params: Mapping[str, Any]) -> dict[Path, Any]:
    return flatten_dict(unfreeze(params) if isinstance(params, FrozenDict) else dict(params))


def _divided(flat: Mapping[Path, Any]) -> tuple[dict[Path, Any], dict[Path, dict[int, Any]]]:
    """What is of no block; and what is, by its stacked path and the block's number."""
    rest: dict[Path, Any] = {}
    blocks: dict[Path, dict[int, Any]] = {}
    for path, value in flat.items():
        place = _number(path)
        if place is None:
            rest[path] = value
        else:
            stacked = (*path[:place], STACKED, *path[place + 1 :])
            blocks.setdefault(stacked, {})[int(path[place])] = value
    return rest, blocks


def _number(path: Path) -> int | None:
    """Where in the path the block's number is."""
    for i in range(2, len(path)):
        if path[i - 2 : i] == ("encoder", "layer") and path[i].isdecimal():
            return i
    return None
