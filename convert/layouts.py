"""The closed set of array layouts, each with its exact inverse.

A layout is a pure rearrangement: no arithmetic, so there and back is bit-equal. It works on the
arrays of one rule at once, because some formats fuse several parameters into one array. Where it
can be, the result is a view: nothing is copied until a framework takes the array.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Arrays = list[np.ndarray]


@dataclass(frozen=True)
class Layout:
    """How the arrays of a foreign format become canonical ones, and back.

    `to_canonical` takes the foreign arrays of one rule in the rule's order and returns the
    canonical ones; `to_foreign` is its inverse. `ranks` are the numbers of dimensions that the
    foreign and the canonical arrays have, or None where any will do. `axes` are those of the
    foreign array in the order of the canonical one, where all the layout does is to order them
    (an empty tuple leaves them as they are), so that a part of an array can be read by itself.
    """

    name: str
    to_canonical: Callable[[Arrays], Arrays]
    to_foreign: Callable[[Arrays], Arrays]
    foreign_rank: int | None = None
    canonical_rank: int | None = None
    axes: tuple[int, ...] | None = None

    @property
    def inverse_axes(self) -> tuple[int, ...] | None:
        """Axes of the canonical array in the order of the foreign one."""
        return self.axes and tuple(int(axis) for axis in np.argsort(self.axes))


def _each(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: [function(array) for array in arrays]


KEEP = Layout("keep", _each(lambda x: x), _each(lambda x: x), axes=())

TRANSPOSE = Layout("transpose", _each(lambda x: x.T), _each(lambda x: x.T), 2, 2, (1, 0))
"""Dense kernel (in, out) of JAX <-> dense weight (out, in) of PyTorch."""

HWIO = Layout(
    "hwio",
    _each(lambda x: x.transpose(3, 2, 0, 1)),
    _each(lambda x: x.transpose(2, 3, 1, 0)),
    4,
    4,
    (3, 2, 0, 1),
)
"""Convolution kernel (H, W, in, out) of JAX <-> convolution weight (out, in, H, W) of PyTorch."""


def _split3(arrays: Arrays) -> Arrays:
    if arrays[0].shape[0] % 3:
        raise ValueError(f"the first side of {arrays[0].shape} must be a multiple of 3")
    return np.split(arrays[0], 3, axis=0)


def _split_in_proj(arrays: Arrays) -> Arrays:
    rows, width = arrays[0].shape
    if rows <= 3 * width:
        raise ValueError(f"the first side of {arrays[0].shape} must be over 3 times the second")
    ends = [rows - count * width for count in (3, 2, 1)]
    return [part for array in arrays for part in np.split(array, ends, axis=0)]


def _join_in_proj(arrays: Arrays) -> Arrays:
    return [np.concatenate(arrays[i : i + 4]) for i in range(0, len(arrays), 4)]


MLP_AND_QKV = Layout("fused MLP, query, key, value", _split_in_proj, _join_in_proj)
"""One array (I + 3 D, D) <-> the MLP's first layer (I, D) and query, key and value (D, D); where a
bias (I + 3 D,) is given too, its parts (I,) and (D,) after those."""


def _joined_columns(arrays: Arrays) -> Arrays:
    return [np.concatenate(arrays, axis=1)]


ATTENTION_AND_MLP = Layout(
    "fused outputs of attention and MLP",
    lambda arrays: np.split(arrays[0], [arrays[0].shape[0]], axis=1),
    _joined_columns,
    2,
)
"""One array (D, D + I) <-> the projection after attention (D, D) and the MLP's second layer
(D, I)."""

FUSED_QKV = Layout("fused query, key, value", _split3, lambda arrays: [np.concatenate(arrays)])
"""One array (3 D, ...) <-> query, key and value (D, ...) in this order, as timm stores them."""


FUSED_KV = Layout(
    "fused key, value",
    lambda arrays: np.split(arrays[0], 2),
    lambda arrays: [np.concatenate(arrays)],
)
"""One array (2 D, ...) <-> key and value (D, ...) in this order, as timm stores them."""


def _joined_heads(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2])


TOKEN = Layout("token", _each(lambda x: x[None]), _each(lambda x: x[0]), 2, 3)
"""One token as (1, D) <-> (1, 1, D); or positions as (S, D) <-> (1, S, D)."""

VECTOR = Layout("vector", _each(lambda x: x[None, None]), _each(lambda x: x[0, 0]), 1, 3)
"""One token as (D,) <-> (1, 1, D)."""

GATE_AND_UP = Layout(
    "gate and up", lambda arrays: [np.concatenate(arrays)], lambda arrays: np.split(arrays[0], 2)
)
"""The two halves of a SwiGLU's first layer, each (I, ...) <-> one array (2 I, ...)."""


def _square_patches(arrays: Arrays) -> Arrays:
    (width, size) = arrays[0].shape
    for channels in (3, 1):  # 3 P^2 is never a square
        side = math.isqrt(size // channels)
        if side * side * channels == size:
            patches = arrays[0].reshape(width, side, side, channels)
            return [patches.swapaxes(1, 3).swapaxes(2, 3)]
    raise ValueError(f"{size} numbers are no square patch of three channels or one")


PATCHES = Layout(
    "patches, channels last",
    _square_patches,
    _each(lambda x: x.swapaxes(2, 3).swapaxes(1, 3).reshape(x.shape[0], -1)),
    2,
    4,
)
"""Dense weight (D, P P C) for flattened patches <-> convolution weight (D, C, P, P)."""


def heads_apart(heads: int) -> tuple[Layout, Layout, Layout]:
    """Layouts of Flax's `MultiHeadDotProductAttention`, which keeps heads on an axis of their own:
    kernel (D, A, D/A) of query, key and value, their bias (A, D/A), and kernel (A, D/A, D) of the
    output <-> (D, D), (D,), (D, D) of PyTorch's dense layers.

    Args:
        heads: number A of heads; only writing needs it, reading finds it in the arrays.
    """

    def kernel(x: np.ndarray) -> np.ndarray:
        return x.T.reshape(x.shape[1], heads, x.shape[0] // heads)

    def output(x: np.ndarray) -> np.ndarray:
        return x.T.reshape(heads, x.shape[1] // heads, x.shape[0])

    return (
        Layout("heads in", _each(lambda x: _joined_heads(x).T), _each(kernel), 3, 2),
        Layout(
            "heads bias",
            _each(lambda x: x.reshape(x.shape[0] * x.shape[1])),
            _each(lambda x: x.reshape(heads, x.shape[0] // heads)),
            2,
            1,
        ),
        Layout(
            "heads out",
            _each(lambda x: x.reshape(x.shape[0] * x.shape[1], x.shape[2]).T),
            _each(output),
            3,
            2,
        ),
    )


def result_shapes(
    function: Callable[[Arrays], Arrays], shapes: Sequence[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """The shapes a layout function gives, without touching any data."""
    nothing = [np.broadcast_to(np.zeros((), np.int8), shape) for shape in shapes]
    return [array.shape for array in function(nothing)]
