"""The dense layer of the blocks, with the kernel in floating point or in 8-bit integers."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_common.errors import InputError
from vit_flax.int8.product import integer_product
from vit_flax.int8.weights import LARGEST, SCALE, SUMS


class Dense(nn.Dense):
    """`flax.linen.Dense` whose kernel may be 8-bit integers, with `kernel_scale` beside it.

    With `kernel_sums` beside them, the inputs are quantised too and integers are multiplied.
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        if not self.has_variable("params", SCALE):
            self._check_kernel()
            return super().__call__(inputs)
        dtype = self.dtype or inputs.dtype
        kernel: jax.Array = self.get_variable("params", "kernel")  # (in, out)
        scale: jax.Array = self.get_variable("params", SCALE)  # (out,)
        # Sums are scaled before they are rounded to the dtype of the computation.
        exact = jnp.promote_types(dtype, jnp.float32)
        if self.has_variable("params", SUMS):
            sums: jax.Array = self.get_variable("params", SUMS)  # (out,)
            outputs = quantized_product(inputs, kernel, scale, sums).astype(exact)
        else:
            outputs = float_product(inputs.astype(dtype), kernel, scale, self.precision)
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


def float_product(
    inputs: jax.Array,
    kernel: jax.Array,
    scale: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Inputs (..., in) in floating point by a kernel (in, out) of integers, times the factors
    (out,): (..., out), in float32 or wider."""
    exact = jnp.promote_types(inputs.dtype, jnp.float32)
    outputs = jax.lax.dot_general(
        inputs,
        kernel.astype(inputs.dtype),
        (((inputs.ndim - 1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=exact,
    )  # (..., out)
    return outputs * scale.astype(exact)


def quantize_rows(inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row in integers of its own step: symmetric, the largest magnitude is 127.

    Args:
        inputs: (..., in), any floating dtype; taken in float32.

    Returns:
        int8 (..., in), and the steps, float32 (..., 1). A row that is not finite has a step that is
        not; a row of zeros has a step of 0.

    Example:
        >>> quantize_rows(jnp.array([[1.0, -2.0]]))[0]
        Array([[  64, -127]], dtype=int8)
    """
    inputs = inputs.astype(jnp.float32)
    largest = jnp.max(jnp.abs(inputs), axis=-1, keepdims=True)
    # Below that, 127 / largest is no finite number: such a row is a row of zeros.
    inverse = jnp.where(largest < 1e-36, 0.0, LARGEST / largest)
    # By way of int32: XLA's CPU compiler guards each conversion of a float to int8.
    return jnp.round(inputs * inverse).astype(jnp.int32).astype(jnp.int8), largest / LARGEST


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
    integers, steps = quantize_rows(inputs)
    products = integer_product(integers, kernel, sums)
    return products.astype(jnp.float32) * (steps * scale.astype(jnp.float32))


@quantized_product.defjvp
def _derivative(primals, tangents):
    inputs, kernel, scale, sums = primals
    found = quantized_product(inputs, kernel, scale, sums)
    change, _, scale_change, _ = tangents
    moved = float_product(change, kernel, scale).astype(found.dtype)
    # What the products are without their factors is not worth another product.
    return found, moved + found / scale * scale_change
