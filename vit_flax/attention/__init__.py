"""`attention`: one signature for every kernel.

B batch, S tokens, A heads, D/A width of a head.

"eager" is written in JAX operations and does everything. Of the others, `choose` says which takes
what. README.md beside this file says which file holds what, and what may be touched.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from vit_flax.attention.choice import (
    IMPLEMENTATIONS,
    Choice,
    check_implementation,
    choose,
    needs_no_kernel,
)
from vit_flax.attention.cpu import attention_cpu_inline
from vit_flax.attention.cudnn import CUDNN_HEAD, cudnn_missing
from vit_flax.attention.eager import attention_probabilities, eager
from vit_flax.attention.primitive import HEAD_AXES, alike, attention_p
from vit_flax.cpu.targets import compiled_for, targets

__all__ = [
    "CUDNN_HEAD",
    "HEAD_AXES",
    "IMPLEMENTATIONS",
    "Choice",
    "attention",
    "check_implementation",
    "choose",
    "compiled_for",
    "cudnn_missing",
    "eager",
    "needs_no_kernel",
    "targets",
]


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
    inline: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1).

    Args:
        query, key, value: (B, S, A, D/A).
        bias: added to the scores; broadcasts against (B, A, S, S).
        head_mask: multiplies the probabilities; broadcasts against (B, A, S, S).
        dropout: applied to the probabilities, element by element; None where none is active.
        output_attentions: whether to return the probabilities. With a kernel that has none they
            are computed beside it, and those that nobody looks at are not computed at all: of the
            maps of all blocks a program may use one, and the other blocks cost nothing.
        implementation: one of `IMPLEMENTATIONS`; what it does not take falls back, see `choose`.
        precision: of both matrix products.
        inline: write the CPU's kernel into the program as JAX's own operations, not as one
            operation that each platform compiles in its own way. For programs that run on one CPU
            only, see `needs_no_kernel`. (With `jax.disable_jit` it is always JAX's operations.)

    Returns:
        The context (B, S, A, D/A), and the probabilities (B, A, S, S) after dropout and head mask
        if asked for, else None.
    """
    check_implementation(implementation)
    same = all((x.shape, x.dtype) == (query.shape, query.dtype) for x in (key, value))
    plain = implementation == "eager" or head_mask is not None or dropout is not None
    plain = plain or jax.config.jax_disable_jit  # type: ignore[attr-defined]
    if plain or not same or 0 in query.shape:  # of nothing, kernels cannot be made
        context, probabilities = eager(query, key, value, bias, head_mask, dropout, precision)
        return context, probabilities if output_attentions else None
    if precision is None:  # what is set now, not what will be when the program is lowered
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if isinstance(precision, list):  # as flax takes it; what an operation is bound with is hashed
        precision = tuple(precision)
    operands = alike(query, key, value, *(() if bias is None else (bias,)))
    if inline and implementation in ("auto", "cpu"):
        context = attention_cpu_inline(*operands, precision=precision)
    else:
        context = attention_p.bind(*operands, implementation=implementation, precision=precision)
    if not output_attentions:
        return context, None
    return context, attention_probabilities(query, key, bias, precision)
