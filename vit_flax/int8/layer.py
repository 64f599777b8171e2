"""The dense layer of the blocks, with the kernel in floating point or in 8-bit integers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_common.errors import InputError
from vit_flax.cpu.half import half_product, operand_dtype
from vit_flax.cpu.rows import by_rows
from vit_flax.int8.product import integer_product
from vit_flax.int8.weights import SCALE, SUMS

STEPS = 255  # from the least to the largest integer of 8 bits


class Dense(nn.Dense):
    """`flax.linen.Dense` whose kernel may be 8-bit integers, with `kernel_scale` beside it.

    With `kernel_sums` beside them, the inputs are quantised too and integers are multiplied.

    Attributes:
        result_dtype: dtype of the result; None means `dtype`.
    """

    result_dtype: Any = None

    def __call__(self, inputs: jax.Array) -> jax.Array:
        if not self.has_variable("params", SCALE):
            self._check_kernel()
            return by_rows(self._half, inputs)
        dtype = self.dtype or inputs.dtype
        operands = operand_dtype(dtype) or dtype
        kernel: jax.Array = self.get_variable("params", "kernel")  # (in, out)
        scale: jax.Array = self.get_variable("params", SCALE)  # (out,)
        # Sums are scaled before they are rounded to the dtype of the computation.
        exact = jnp.promote_types(dtype, jnp.float32)
        if self.has_variable("params", SUMS):
            sums: jax.Array = self.get_variable("params", SUMS)  # (out,)
            outputs = quantized_product(inputs, kernel, scale, sums).astype(exact)
        else:
            outputs = float_product(inputs.astype(operands), kernel, scale, self.precision)
        if self.use_bias:
            outputs = outputs + self.get_variable("params", "bias").astype(exact)
        return outputs.astype(self.result_dtype or dtype)

    def _half(self, inputs: jax.Array) -> jax.Array:
        """The layer in floating point; in half precision on a CPU, by the policy of
        `vit_flax.cpu`."""
        dtype = self.dtype or inputs.dtype
        if self.is_initializing() or operand_dtype(dtype) is None:
            return super().__call__(inputs).astype(self.result_dtype or dtype)
        kernel: jax.Array = self.get_variable("params", "kernel")  # (in, out)
        outputs = half_product(inputs, kernel, dtype, self.precision)  # (..., out)
        if self.use_bias:
            bias: jax.Array = self.get_variable("params", "bias")
            outputs = outputs + bias.astype(jnp.float32)
        return outputs.astype(self.result_dtype or dtype)

    def _check_kernel(self) -> None:
        """Raise InputError if the kernel is integers whose factors are missing."""
        if self.has_variable("params", "kernel"):
            kernel: jax.Array = self.get_variable("params", "kernel")
            if jnp.issubdtype(kernel.dtype, jnp.integer):
                raise InputError(
                    f"`params`: {'/'.join(self.path)}/kernel is {kernel.dtype}; integers need "
                    f"`{SCALE}` beside them, as `vit_flax.int8.quantize` makes it."
                )


def float_product(
    inputs: jax.Array,
    kernel: jax.Array,
    scale: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Inputs (..., in) in floating point by a kernel (in, out) of integers, times the factors
    (out,): (..., out), in float32 or wider."""
    exact = jnp.promote_types(inputs.dtype, jnp.float32)
    if operand_dtype(inputs.dtype) is not None:
        kernel = kernel.astype(inputs.dtype)
        return half_product(inputs, kernel, inputs.dtype) * scale.astype(exact)
    outputs = jax.lax.dot_general(
        inputs,
        kernel.astype(inputs.dtype),
        (((inputs.ndim - 1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=exact,
    )  # (..., out)
    return outputs * scale.astype(exact)


def quantize_rows(inputs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each row in 256 steps from its least to its largest value, or 0 where all are on one side.

    Row = step * (integers - zero), as in Jacob et al. 2018 (arXiv:1712.05877), equation 1. What
    comes out of a GELU is hardly ever below 0, and what comes out of a norm has its outliers on one
    side: a range of its own halves the error of the symmetric one.

    Args:
        inputs: (..., in), any floating dtype; taken in float32.

    Returns:
        int8 (..., in); steps, float32 (..., 1); zeros, int32 (..., 1). A row that is not finite
        has a step that is not; a row of zeros has a step of 0.

    Example:
        >>> integers, step, zero = quantize_rows(jnp.array([[0.0, 1.0, 255.0]]))
        >>> integers, step * (integers - zero)
        (Array([[-128, -127,  127]], dtype=int8), Array([[  0.,   1., 255.]], dtype=float32))
    """
    inputs = inputs.astype(jnp.float32)
    least = jnp.minimum(jnp.min(inputs, axis=-1, keepdims=True), 0.0)
    largest = jnp.maximum(jnp.max(inputs, axis=-1, keepdims=True), 0.0)
    # Halves, since the range of finite numbers may be none. Below 1e-36 its inverse is none: such
    # a row is a row of zeros.
    step = (largest / 2 - least / 2) / (STEPS / 2)
    inverse = jnp.where(step < 1e-36, 0.0, 1.0 / step)
    zero = -128.0 - jnp.round(least * inverse)
    # Ends may round to one step beyond. By way of int32: XLA's CPU compiler guards each conversion
    # of a float to int8.
    integers = jnp.clip(jnp.round(inputs * inverse) + zero, -128.0, 127.0)
    return integers.astype(jnp.int32).astype(jnp.int8), step, zero.astype(jnp.int32)


@jax.custom_jvp
def quantized_product(
    inputs: jax.Array, kernel: jax.Array, scale: jax.Array, sums: jax.Array
) -> jax.Array:
    """Inputs quantised by rows, by a kernel of integers, in int32, rescaled in float32.

    Its derivative is that of the product without the rounding (a straight-through estimate; Bengio
    et al. 2013, arXiv:1308.3432, section 4): the rounding's own is 0 wherever it exists.

    Args:
        inputs: (..., in), any floating dtype.
        kernel: (in, out) of int8.
        scale: (out,) of float32, the kernel's factors.
        sums: (out,) of int32, of the kernel's columns.

    Returns:
        (..., out) of float32.
    """
    integers, steps, zeros = quantize_rows(inputs)
    products = integer_product(integers, kernel, sums) - zeros * sums
    return products.astype(jnp.float32) * (steps * scale.astype(jnp.float32))


@quantized_product.defjvp
def _derivative(primals, tangents):
    inputs, kernel, scale, sums = primals
    found = quantized_product(inputs, kernel, scale, sums)
    change, _, scale_change, _ = tangents
    moved = float_product(change, kernel, scale).astype(found.dtype)
    # What the products are without their factors is not worth another product.
    return found, moved + found / scale * scale_change
