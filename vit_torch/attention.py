"""`attention`: one signature for every kernel.

B batch, S tokens, A heads, D/A width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from vit_common.errors import InputError

IMPLEMENTATIONS = ("auto", "eager", "sdpa")
"""Kernels by name; "auto" is "sdpa". What "sdpa" cannot do, "eager" does: returning the
probabilities, a head mask, dropout on the probabilities."""


def check_implementation(name: str) -> str:
    """The name itself; InputError if there is no such kernel."""
    if name not in IMPLEMENTATIONS:
        wanted = ", ".join(map(repr, IMPLEMENTATIONS))
        raise InputError(f"`attn_implementation` must be one of {wanted}; given {name!r}.")
    return name


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    head_mask: torch.Tensor | None = None,
    dropout: Callable[[torch.Tensor], torch.Tensor] | None = None,
    output_attentions: bool = False,
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1).

    Args:
        query, key, value: (B, S, A, D/A).
        bias: added to the scores; broadcasts against (B, A, S, S).
        head_mask: multiplies the probabilities; broadcasts against (B, A, S, S).
        dropout: applied to the probabilities, element by element; None where none is active.
        output_attentions: whether the probabilities are needed.
        implementation: one of `IMPLEMENTATIONS`.

    Returns:
        The context (B, S, A, D/A), and the probabilities (B, A, S, S) after dropout and head mask;
        None where "sdpa" ran, which never forms them.
    """
    check_implementation(implementation)
    plain = head_mask is None and dropout is None and not output_attentions
    if plain and implementation != "eager":
        context = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=None if bias is None else bias.to(query.dtype),
        )
        return context.transpose(1, 2), None
    # The query is scaled, not the scores: the same number, S / (D/A) times fewer products, and
    # float16 scores do not overflow.
    query = query * query.shape[-1] ** -0.5
    scores = torch.einsum("bqad,bkad->baqk", query, key)  # (B, A, S, S)
    statistics = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(statistics)
    if bias is not None:
        scores = scores + bias.to(statistics)
    probabilities = torch.softmax(scores, dim=-1).to(query.dtype)
    if dropout is not None:
        probabilities = dropout(probabilities)
    if head_mask is not None:
        probabilities = probabilities * head_mask.to(probabilities.dtype)
    context = torch.einsum("baqk,bkad->bqad", probabilities, value)
    return context, probabilities
