"""Products of a network's tokens, as XLA's CPU compiler differentiates them best.

The gradient of a kernel adds up over images and tokens. Where these are two axes, the compiler
copies one of its operands, transposed, before the product (a fifth to a third of such a gradient's
time); where they are one axis, it needs no copy.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from vit_flax.cpu.targets import targets


def by_rows(product: Callable[[jax.Array], jax.Array], inputs: jax.Array) -> jax.Array:
    """`product`, which takes (N, in), of inputs (..., in): on a CPU with all axes before the last
    as one. The numbers are the same, and so are programs for anything else.

    Args:
        product: from (N, in), or from (..., in), to (N, out) or (..., out).
        inputs: (..., in).

    Returns:
        (..., out).

    Example:
        >>> by_rows(lambda rows: rows @ kernel, tokens).shape  # (8, 197, 192), (192, 768)
        (8, 197, 768)
    """
    if inputs.ndim <= 2 or targets() != ("cpu",):
        return product(inputs)
    *front, width = inputs.shape
    outputs = product(inputs.reshape(-1, width))
    return outputs.reshape(*front, outputs.shape[-1])
