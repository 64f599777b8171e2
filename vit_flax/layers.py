"""The layers that the network is built of, with nothing left to Flax's defaults: a dense layer, a
convolution and the norms, the first values of their parameters, and how an array lies in a TPU's
memory.

A norm's derivative is in closed form. Layer norm's statistics are those of
`flax.linen.LayerNorm(use_fast_variance=False)`: two passes, in float32 or wider. What JAX makes of
their derivative by itself is three reductions, each of which needs the one before, and XLA's CPU
compiler feeds each of them by computing anew all that is above it in the network: at 12 layers
4,788 additions in the compiled gradient where 834 do, and twice the time. The closed form has two
reductions side by side.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from vit_flax.attention import targets
from vit_flax.cpu.half import half_product, operand_dtype
from vit_flax.int8 import Dense

if TYPE_CHECKING:
    from vit_flax.parts.part import FlaxViTPart


def initializer(std: float) -> Callable[..., jax.Array]:
    """Truncated normal of standard deviation `initializer_range`, cut at -2 and 2."""
    if std == 0.0:
        return nn.initializers.zeros
    # At most five deviations and at least float32: where the bound's probability rounds to zero,
    # JAX gives the bound itself for one number in 2^23, a hundred deviations off at std 0.02.
    bound = min(2.0 / std, 5.0)
    normal = nn.initializers.truncated_normal(std, lower=-bound, upper=bound)

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return normal(key, shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)

    return draw


def frequencies(theta: float) -> Callable[..., jax.Array]:
    """New frequencies of rotary position embeddings, of two coordinates: those of `rope_theta`,
    along axes turned at random in each head of each block (Heo et al. 2024, arXiv:2403.13298)."""

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        _, L, A, half = shape
        exact = jnp.promote_types(dtype, jnp.float32)
        size = jnp.asarray(theta ** -(np.arange(half // 2) / (half // 2)), exact)
        angle = 2 * np.pi * jax.random.uniform(key, (L, A, 1), exact)
        angle = jnp.broadcast_to(angle, (L, A, half // 2))
        parts = [(jnp.cos(angle + turn), jnp.sin(angle + turn)) for turn in (0.0, np.pi / 2)]
        both = [
            jnp.concatenate([size * part for part in axis], -1) for axis in zip(*parts, strict=True)
        ]
        return jnp.stack(both).astype(dtype)  # (2, L, A, D/A/2)

    return draw


def _plain(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    mean, _, factor = _statistics(x, epsilon)
    return (x - mean) * (factor * scale) + bias


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def normalized(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """`(x - mean) / sqrt(variance + epsilon) * scale + bias` over the last axis.

    Args:
        x: (..., D).
        scale, bias: (D,).
        epsilon: added to the variance.

    Returns:
        (..., D), in float32 or the widest dtype of the arguments.
    """
    return _plain(x, scale, bias, epsilon)


def _statistics(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean, x as the statistics take it, and 1 / sqrt(variance + epsilon)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    return mean, wide, jax.lax.rsqrt(variance + epsilon)


@normalized.defjvp
def _derivative(epsilon, primals, tangents):
    x, scale, bias = primals
    dx, dscale, dbias = tangents
    mean, wide, factor = _statistics(x, epsilon)
    unit = (wide - mean) * factor
    y = (x - mean) * (factor * scale) + bias
    dx = dx.astype(wide.dtype)
    along = (unit * dx).mean(-1, keepdims=True)
    dunit = factor * (dx - dx.mean(-1, keepdims=True) - unit * along)
    return y, dunit * scale + unit * dscale + dbias


class LayerNorm(nn.Module):
    """Layer norm over the last axis; parameters `scale` and `bias` as in `flax.linen.LayerNorm`.

    Attributes:
        epsilon: added to the variance.
        dtype: dtype of the result.
        param_dtype: dtype of new parameters.
    """

    epsilon: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        # `jax.experimental.jet` (JAX 0.10) fails on custom derivatives, so a process that has
        # imported it gets JAX's own: the same numbers, more slowly in training.
        run = _plain if "jax.experimental.jet" in sys.modules else normalized
        return run(x, scale, bias, self.epsilon).astype(self.dtype)


def _plain_rms(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    return x * (_rms_factor(x, epsilon)[1] * scale)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def rms_normalized(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """`x / sqrt(mean of x^2 + epsilon) * scale` over the last axis.

    Args:
        x: (..., D).
        scale: (D,).
        epsilon: added to the mean.

    Returns:
        (..., D), in float32 or the widest dtype of the arguments.
    """
    return _plain_rms(x, scale, epsilon)


def _rms_factor(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """x as the mean takes it, and 1 / sqrt(mean + epsilon)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide, jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + epsilon)


@rms_normalized.defjvp
def _rms_derivative(epsilon, primals, tangents):
    x, scale = primals
    dx, dscale = tangents
    wide, factor = _rms_factor(x, epsilon)
    unit = wide * factor
    dx = dx.astype(wide.dtype)
    dunit = factor * (dx - unit * (unit * dx).mean(-1, keepdims=True))
    return x * (factor * scale), dunit * scale + unit * dscale


class RMSNorm(nn.Module):
    """RMS norm over the last axis; parameter `scale` as in `flax.linen.RMSNorm`.

    Attributes:
        epsilon: added to the mean of squares.
        dtype: dtype of the result.
        param_dtype: dtype of new parameters.
    """

    epsilon: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        run = _plain_rms if "jax.experimental.jet" in sys.modules else rms_normalized  # as above
        return run(x, scale, self.epsilon).astype(self.dtype)


def add_parameter(
    part: FlaxViTPart,
    name: str,
    shape: tuple[int, ...],
    value: float | Literal["normal", "frequencies"],
) -> None:
    """Give a part, in its `setup`, a parameter of that name, filled with `value` or drawn from the
    normal distribution of `initializer` or as `frequencies` are."""
    if value == "normal":
        draw = initializer(part.config.initializer_range)
    elif value == "frequencies":
        draw = frequencies(part.config.rope_theta)
    else:
        draw = nn.initializers.constant(value)
    setattr(part, name, part.param(name, draw, shape, part.param_dtype))


def dense(part: FlaxViTPart, features: int, use_bias: bool = True) -> Dense:
    return Dense(
        features,
        use_bias=use_bias,
        dtype=part.dtype,
        result_dtype=part.array_dtype,
        param_dtype=part.param_dtype,
        precision=part.precision,
        kernel_init=initializer(part.config.initializer_range),
        bias_init=nn.initializers.zeros,
    )


class Convolution(nn.Conv):
    """`flax.linen.Conv`; in half precision on a CPU, by the policy of `vit_flax.cpu`, and then its
    result is float32."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        dtype = self.dtype or inputs.dtype
        operands = operand_dtype(dtype)
        if operands is None:
            return super().__call__(inputs)
        if self.is_initializing():
            return super().__call__(inputs).astype(jnp.float32)
        strides: Any = self.strides
        padding: Any = self.padding
        if operands == jnp.bfloat16 and self._sides() == tuple(strides):
            outputs = self._of_patches(inputs, dtype)
        else:  # XLA's library has no such convolution of bfloat16
            outputs = jax.lax.conv_general_dilated(
                inputs.astype(jnp.float32),
                self._parameter("kernel"),
                window_strides=strides,
                padding=padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=self.feature_group_count,
                precision=self.precision,
            )
        return outputs + self._parameter("bias") if self.use_bias else outputs

    def _sides(self) -> tuple[int, int]:
        """Rows and columns of the kernel."""
        rows, columns = cast("tuple[int, int]", self.kernel_size)
        return rows, columns

    def _of_patches(self, inputs: jax.Array, dtype: Any) -> jax.Array:
        """Where patches neither overlap nor leave gaps: one product."""
        (B, H, W, C), (h, w) = inputs.shape, self._sides()
        rows, columns = H // h, W // w
        patches = inputs[:, : rows * h, : columns * w].reshape(B, rows, h, columns, w, C)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(B, rows, columns, h * w * C)
        kernel = self._parameter("kernel").reshape(h * w * C, self.features)
        return half_product(patches, kernel, dtype, self.precision)

    def _parameter(self, name: str) -> jax.Array:
        value: jax.Array = self.get_variable("params", name)
        return value.astype(jnp.float32)


def convolution(
    part: FlaxViTPart,
    features: int,
    size: tuple[int, int],
    use_bias: bool = True,
    name: str | None = None,
) -> nn.Conv:
    return Convolution(
        features,
        kernel_size=size,
        strides=size,
        padding="VALID",
        use_bias=use_bias,
        dtype=part.dtype,
        param_dtype=part.param_dtype,
        precision=part.precision,
        kernel_init=initializer(part.config.initializer_range),
        bias_init=nn.initializers.zeros,
        name=name,
    )


def layer_norm(part: FlaxViTPart) -> LayerNorm | RMSNorm:
    """A norm over the last axis, of the config's `norm_type`."""
    cls = RMSNorm if part.config.norm_type == "rmsnorm" else LayerNorm
    return cls(
        epsilon=part.config.layer_norm_eps,
        dtype=part.array_dtype,
        param_dtype=part.param_dtype,
    )


def row_major(x: jax.Array) -> jax.Array:
    """The same array; on a TPU, the compiler is told to keep its last axis contiguous.

    By itself, the compiler puts the batch last through most of a block, and must transpose that
    for the attention kernel, which takes the width last: a copy of every activation on its way in.
    Told so at the network's input and in the middle of the MLP, it keeps the layout in between, and
    both halves of the MLP become one operation: two thirds of the traffic of ViT-B (docs/tpu.md).
    Programs that no TPU will run hold no trace of it.
    """
    if "tpu" not in targets():
        return x
    layout = Layout(major_to_minor=tuple(range(x.ndim)))
    return jax.lax.platform_dependent(
        x, tpu=lambda x: with_layout_constraint(x, layout), default=lambda x: x
    )
