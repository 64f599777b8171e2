"""Attention in JAX's operations: it does everything, and every kernel is measured against it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vit_flax.cpu.half import half_product, operand_dtype


def eager(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    head_mask: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[jax.Array, jax.Array]:
    """`attention` in JAX operations: the context, and the probabilities."""
    probabilities = attention_probabilities(query, key, bias, precision)
    if dropout is not None:
        probabilities = dropout(probabilities)
    if head_mask is not None:
        probabilities = probabilities * head_mask.astype(probabilities.dtype)
    if operand_dtype(value.dtype) is not None:
        dimensions = (((3,), (1,)), ((0, 1), (0, 2)))
        context = half_product(probabilities, value, value.dtype, precision, dimensions)
        context = context.transpose(0, 2, 1, 3).astype(value.dtype)  # (B, S, A, D/A)
    else:
        context = jnp.einsum("baqk,bkad->bqad", probabilities, value, precision=precision)
    return context, probabilities


def attention_probabilities(
    query: jax.Array, key: jax.Array, bias: jax.Array | None, precision: jax.lax.PrecisionLike
) -> jax.Array:
    """Softmax of the scaled scores, (B, A, S, S), in the dtype of the query."""
    # The query is scaled, not the scores: the same number, S / (D/A) times fewer products, and
    # float16 scores do not overflow.
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    if operand_dtype(key.dtype) is not None:
        dimensions = (((3,), (3,)), ((0, 2), (0, 2)))
        scores = half_product(query, key, key.dtype, precision, dimensions)
    else:
        scores = jnp.einsum("bqad,bkad->baqk", query, key, precision=precision)  # (B, A, S, S)
    statistics = jnp.promote_types(scores.dtype, jnp.float32)
    scores = scores.astype(statistics)
    if bias is not None:
        scores = scores + bias.astype(statistics)
    return jax.nn.softmax(scores, axis=-1).astype(query.dtype)
