"""Parameters of all blocks in one array each, as `scan_layers=True` takes them, and back.

`encoder/layer/{i}/X`, one array for each of the L blocks, is `encoder/layer/stacked/X` with an axis
of L in front. Nothing else is touched, and both directions are exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_common.errors import InputError
from vit_flax.model import STACKED

Path = tuple[str, ...]


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
