"""Weights held as 8-bit integers: a quarter of float32's bytes, half of bfloat16's.

The kernel of a dense layer of the blocks, (in, out), becomes integers from -127 to 127 and one
float32 factor for each output channel, the largest magnitude of its column over 127 (symmetric, by
channel, as in Jacob et al. 2018, arXiv:1712.05877, section 3, and Wu et al. 2020, arXiv:2004.09602,
section 3). Activations stay in the compute dtype: the layer multiplies them by the integers, which
that dtype holds exactly (bfloat16 up to 256), and the sums by the factors. So nothing is
calibrated, and the only error is the rounding of the weights.

Embeddings, norms, biases and heads stay as they are; together they are a few percent of the bytes
(docs/memory.md has measurements).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_common.errors import InputError

SCALE = "kernel_scale"
"""Name of the factors, (out,), beside the "kernel" that they belong to."""

_BLOCKS = re.compile(r"(?:.*/)?encoder/layer/(?:\d+|stacked)/.*/kernel")
_LARGEST = 127


class Dense(nn.Dense):
    """`flax.linen.Dense` whose kernel may be 8-bit integers with `kernel_scale` beside it."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        if not self.has_variable("params", SCALE):
            self._check_kernel()
            return super().__call__(inputs)
        dtype = self.dtype or inputs.dtype
        kernel: jax.Array = self.get_variable("params", "kernel")  # (in, out)
        scale: jax.Array = self.get_variable("params", SCALE)  # (out,)
        # Sums are scaled before they are rounded to the dtype of the computation.
        exact = jnp.promote_types(dtype, jnp.float32)
        outputs = jax.lax.dot_general(
            inputs.astype(dtype),
            kernel.astype(dtype),
            (((inputs.ndim - 1,), (0,)), ((), ())),
            precision=self.precision,
            preferred_element_type=exact,
        )  # (..., out)
        outputs = outputs * scale.astype(exact)
        if self.use_bias:
            outputs = outputs + self.get_variable("params", "bias").astype(exact)
        return outputs.astype(dtype)

    def _check_kernel(self) -> None:
        """Raise InputError if the kernel is integers whose factors are missing."""
        if self.has_variable("params", "kernel"):
            kernel: jax.Array = self.get_variable("params", "kernel")
            if jnp.issubdtype(kernel.dtype, jnp.integer):
                raise InputError(
                    f"`params`: {'/'.join(self.path)}/kernel is {kernel.dtype}; integers need "
                    f"`{SCALE}` beside them, as `vit_flax.int8.quantize` makes it."
                )


def quantize(params: Mapping[str, Any]) -> dict[str, Any]:
    """A model's parameters with the kernels of its blocks as 8-bit integers.

    Models take them like any other parameters; they cannot be trained, saved, or quantized again.

    Args:
        params: nested dict of arrays; blocks may be stacked.

    Returns:
        A new tree, with `kernel_scale` beside each kernel that is int8 now, (out,) in float32;
        other parameters are the same arrays.

    Raises:
        InputError: the parameters are quantized already, or hold no block.

    Example:
        >>> model.params = quantize(model.params)
    """
    flat: dict[tuple[str, ...], Any] = {}
    found = False
    for path, array in flatten_dict(dict(params)).items():
        if path[-1] == SCALE:
            raise InputError(f"`params` are 8-bit integers already: there is {'/'.join(path)}.")
        if _BLOCKS.fullmatch("/".join(path)):
            flat[path], flat[*path[:-1], SCALE] = _quantize(array)
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
def _quantize(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(..., in, out) -> integers of that shape, factors (..., out). A column with a value that is
    not finite has a factor that is not."""
    kernel = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(kernel), axis=-2) / _LARGEST  # (..., out)
    # A column of zeros has any factor; 1 keeps it from being 0 / 0.
    scale = jnp.where(scale == 0.0, 1.0, scale)
    rounded = jnp.round(kernel / scale[..., None, :])
    return jnp.where(jnp.isfinite(rounded), rounded, 0.0).astype(jnp.int8), scale


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
