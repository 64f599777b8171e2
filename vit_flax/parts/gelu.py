"""GELU with a derivative of its own, which keeps nothing but its input.

What JAX makes of the derivative keeps two more arrays as large as the MLP's activations: at 12
layers of DeiT-Tiny a quarter of what a training step holds.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp

_ROOT_HALF, _DENSITY = 0.5**0.5, 0.3989422804014327  # 1 / sqrt(2 pi)


@jax.custom_jvp
def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


@_gelu.defjvp
def _derivative(primals, tangents):
    (x,), (dx,) = primals, tangents
    below = 0.5 * (1.0 + jax.lax.erf(x * _ROOT_HALF))  # the normal distribution, as PyTorch has it
    return _gelu(x), (below + x * (_DENSITY * jnp.exp(-0.5 * x * x))) * dx


def gelu(x: jax.Array) -> jax.Array:
    """`x` times the normal distribution function of `x`; any shape, floating point.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.

    Example:
        >>> gelu(jnp.array([-1.0, 0.0, 1.0]))
        Array([-0.15865526,  0.        ,  0.8413447 ], dtype=float32)
    """
    # `jax.experimental.jet` (JAX 0.10) fails on custom derivatives, as in `vit_flax.layers`.
    if "jax.experimental.jet" in sys.modules:
        return jax.nn.gelu(x, approximate=False)
    return _gelu(x)
