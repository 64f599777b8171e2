"""Weights held as 8-bit integers: a quarter of float32's bytes, half of bfloat16's.

The kernel of a dense layer of the blocks, (in, out), becomes integers from -127 to 127 and one
float32 factor for each output channel, the largest magnitude of its column over 127 (symmetric, by
channel, as in Jacob et al. 2018, arXiv:1712.05877, section 3, and Wu et al. 2020, arXiv:2004.09602,
section 3). Activations stay in the compute dtype: the layer multiplies them by the integers, which
that dtype holds exactly (bfloat16 up to 256), and the sums by the factors. So nothing is
calibrated, and the only error is the rounding of the weights.

Or the layer quantises its inputs too, which takes the sums of the integers' columns as well: see
`vit_flax.int8.layer`.

Embeddings, norms, biases and heads stay as they are; together they are a few percent of the bytes
(docs/memory.md has measurements).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_common.errors import InputError

SCALE = "kernel_scale"
"""Name of the factors, (out,), beside the "kernel" that they belong to."""

SUMS = "kernel_sums"
"""Name of the sums of a kernel's columns, (out,) in int32: the layer multiplies integers by
integers if they are there."""

_BLOCKS = re.compile(r"(?:.*/)?encoder/layers?/(?:\d+|stacked)/.*/kernel")
LARGEST = 127


def quantize(
    params: Mapping[str, Any], activations: Literal["int8"] | None = None
) -> dict[str, Any]:
    """A model's parameters with the kernels of its blocks as 8-bit integers.

    Models take them like any other parameters; they cannot be trained, saved, or quantized again.

    Args:
        params: nested dict of arrays; blocks may be stacked.
        activations: "int8" quantises the inputs of these kernels too, each token by itself, and
            multiplies integers by integers; None multiplies in the model's dtype.

    Returns:
        A new tree, with `kernel_scale` beside each kernel that is int8 now, (out,) in float32, and
        for `activations` "int8" `kernel_sums`, (out,) in int32; other parameters are the same
        arrays.

    Raises:
        InputError: the parameters are quantized already, or hold no block.

    Example:
        >>> model.params = quantize(model.params)
        >>> model.params = quantize(model.params, activations="int8")  # or this
    """
    check_activations(activations, "int8")
    flat: dict[tuple[str, ...], Any] = {}
    found = False
    for path, array in flatten_dict(dict(params)).items():
        if path[-1] == SCALE:
            raise InputError(f"`params` are 8-bit integers already: there is {'/'.join(path)}.")
        if _BLOCKS.fullmatch("/".join(path)):
            flat[path], flat[*path[:-1], SCALE], sums = _quantize(array)
            if activations is not None:
                flat[*path[:-1], SUMS] = sums
            found = True
        else:
            flat[path] = array
    if not found:
        raise InputError(
            "`params` must be a model's, a nested dict with the kernels of blocks in it; there "
            "are none."
        )
    return unflatten_dict(flat)


@jax.jit
def _quantize(kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(..., in, out) -> integers of that shape, factors and sums (..., out).

    A column with a value that is not finite has a factor that is not.
    """
    kernel = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(kernel), axis=-2) / LARGEST  # (..., out)
    # A column of zeros has any factor; 1 keeps it from being 0 / 0.
    scale = jnp.where(scale == 0.0, 1.0, scale)
    rounded = jnp.round(kernel / scale[..., None, :])
    integers = jnp.where(jnp.isfinite(rounded), rounded, 0.0).astype(jnp.int8)
    return integers, scale, integers.sum(axis=-2, dtype=jnp.int32)


def is_quantized(params: Mapping[str, Any]) -> bool:
    """Whether the parameters hold kernels of 8-bit integers."""
    return any(path[-1] == SCALE for path in flatten_dict(dict(params)))


def parameter_bytes(params: Mapping[str, Any]) -> int:
    """Bytes that the parameters take on the device."""
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(params))


def check_weights(weights: Any) -> None:
    """Raise InputError unless `weights` is 'int8' or None."""
    if weights not in (None, "int8"):
        raise InputError(f"`weights` must be 'int8' or None; given {weights!r}.")


def check_activations(activations: Any, weights: Any) -> None:
    """Raise InputError unless `activations` is None, or 'int8' with weights of 'int8'."""
    if activations not in (None, "int8"):
        raise InputError(f"`activations` must be 'int8' or None; given {activations!r}.")
    if activations is not None and weights is None:
        raise InputError(
            "`activations='int8'` needs weights in 8-bit integers to multiply by; add "
            "`weights='int8'`."
        )
