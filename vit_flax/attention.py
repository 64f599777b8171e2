"""`attention`: one signature for every kernel.

B batch, S tokens, A heads, D/A width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vit_common.errors import InputError

IMPLEMENTATIONS = ("auto", "eager")
"""Kernels by name; "auto" is "eager" until there is a choice to make."""


def check_implementation(name: str) -> str:
    """The name itself; InputError if there is no such kernel."""
    if name not in IMPLEMENTATIONS:
        wanted = ", ".join(map(repr, IMPLEMENTATIONS))
        raise InputError(f"`attn_implementation` must be one of {wanted}; given {name!r}.")
    return name


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    head_mask: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
    output_attentions: bool = False,
    implementation: str = "auto",
    precision: jax.lax.PrecisionLike = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1).

    Args:
        query, key, value: (B, S, A, D/A).
        bias: added to the scores; broadcasts against (B, A, S, S).
        head_mask: multiplies the probabilities; broadcasts against (B, A, S, S).
        dropout: applied to the probabilities, element by element; None where none is active.
        output_attentions: whether to return the probabilities.
        implementation: one of `IMPLEMENTATIONS`.
        precision: of both matrix products.

    Returns:
        The context (B, S, A, D/A), and the probabilities (B, A, S, S) after dropout and head mask
        if asked for, else None.
    """
    check_implementation(implementation)
    # The query is scaled, not the scores: the same number, S / (D/A) times fewer products, and
    # float16 scores do not overflow.
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    scores = jnp.einsum("bqad,bkad->baqk", query, key, precision=precision)  # (B, A, S, S)
    statistics = jnp.promote_types(scores.dtype, jnp.float32)
    scores = scores.astype(statistics)
    if bias is not None:
        scores = scores + bias.astype(statistics)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    if dropout is not None:
        probabilities = dropout(probabilities)
    if head_mask is not None:
        probabilities = probabilities * head_mask.astype(probabilities.dtype)
    context = jnp.einsum("baqk,bkad->bqad", probabilities, value, precision=precision)
    return context, probabilities if output_attentions else None
