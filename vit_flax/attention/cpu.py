"""Attention as XLA's CPU compiler runs it best: heads in front, scores a few megabytes at a time.

Products of many small matrices are what it is slow at. With the heads as the batch axis, and with
the division of the softmax left until after the second product, it makes one kernel of both
products and of the exponential between them, which reads and writes no score twice.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from vit_flax.cpu.half import array_dtype, half_product, operand_dtype, traced_for

_MOST_SCORES = 8 * 2**20  # numbers, 32 MB of float32: what a processor's cache may hold


def attention_cpu(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Scaled dot-product attention of (B, S, A, D/A); `bias` is (1, A, S, S) or (B, A, S, S).

    Returns:
        The context (B, S, A, D/A).
    """
    B, S, A, width = query.shape
    statistics = jnp.promote_types(query.dtype, jnp.float32)
    between = array_dtype(value.dtype)
    product = partial(_product, precision=precision)
    query = query * jnp.asarray(width**-0.5, query.dtype)
    if bias is not None:
        bias = jnp.broadcast_to(bias, (B, A, S, S)).reshape(B * A, S, S)

    def heads(x: jax.Array) -> jax.Array:
        return x.transpose(0, 2, 1, 3).reshape(B * A, S, width)  # (B A, S, D/A)

    def some(operands: tuple[jax.Array, ...]) -> jax.Array:
        query, key, value, *bias = operands  # (n, S, D/A), (n, S, S)
        scores = product(query, key.transpose(0, 2, 1))  # (n, S, S)
        if bias:
            scores = scores + bias[0].astype(statistics)
        largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
        exponentials = jnp.exp(scores - largest)
        context = product(exponentials.astype(between), value)  # (n, S, D/A)
        total = exponentials.sum(axis=-1, keepdims=True)  # (n, S, 1)
        return (context / total).astype(value.dtype)

    operands = (heads(query), heads(key), heads(value)) + (() if bias is None else (bias,))
    groups = _groups(B * A, S)
    if groups == 1:
        context = some(operands)
    else:
        parts = tuple(x.reshape(groups, B * A // groups, *x.shape[1:]) for x in operands)
        context = jax.lax.map(some, parts)
    return context.reshape(B, A, S, width).transpose(0, 2, 1, 3)


def _product(x: jax.Array, y: jax.Array, *, precision: jax.lax.PrecisionLike) -> jax.Array:
    """(n, a, b) by (n, b, c), in float32 or wider."""
    if operand_dtype(y.dtype) is not None:
        dimensions = (((2,), (1,)), ((0,), (0,)))
        return half_product(x, y, y.dtype, precision, dimensions)
    wide = jnp.promote_types(y.dtype, jnp.float32)
    return jnp.matmul(x, y, precision=precision, preferred_element_type=wide)


def attention_cpu_inline(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *bias: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """`attention_cpu` as a part of a program that holds nothing but JAX's own operations, which
    JAX differentiates as it does any other."""
    return _traced_once(query, key, value, *bias, precision=precision, traced=traced_for())


@partial(jax.jit, static_argnames=("precision", "traced"))  # once for all blocks
def _traced_once(query, key, value, *bias, precision, traced):
    return attention_cpu(query, key, value, bias=(*bias, None)[0], precision=precision)


def _groups(heads: int, tokens: int) -> int:
    """The fewest equal groups of heads whose scores stay below the limit."""
    if not isinstance(heads, int):  # exported for any number of images
        return 1
    least = -(-heads * tokens * tokens // _MOST_SCORES)
    return next(count for count in range(min(least, heads), heads + 1) if heads % count == 0)
