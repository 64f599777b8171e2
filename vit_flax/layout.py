"""How an array lies in a TPU's memory."""

from __future__ import annotations

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from vit_flax.attention import targets


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
