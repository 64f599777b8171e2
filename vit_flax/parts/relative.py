"""Relative positions by an MLP: the bias on the scores of each head is computed from the offset
between two patches, on a logarithmic scale (Liu et al. 2022, arXiv:2111.09883, section 3.3), so
that it exists for any grid.

Source: `RelPosMlp` of `timm/layers/pos_embed_rel.py`, timm 1.0.31, its mode "cr".
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vit_common.positions import log_offsets, relative_position_index
from vit_flax.layers import add_parameter
from vit_flax.parts.part import FlaxViTPart


class FlaxViTRelativePositionMLP(FlaxViTPart):
    """(1, A, S, S) for a grid of patches; tokens in front of them have no bias."""

    def setup(self):
        inner, A = self.config.relative_position_width, self.config.num_attention_heads
        add_parameter(self, "in_kernel", (2, inner), "normal")
        add_parameter(self, "in_bias", (inner,), 0.0)
        add_parameter(self, "out_kernel", (inner, A), "normal")
        add_parameter(self, "out_bias", (A,), 0.0)

    def __call__(self, grid: tuple[int, int]):
        exact = jnp.promote_types(self.param_dtype, jnp.promote_types(self.dtype, jnp.float32))
        w1, b1, w2, b2 = (
            getattr(self, name).astype(exact)
            for name in ("in_kernel", "in_bias", "out_kernel", "out_bias")
        )
        offsets = jnp.asarray(log_offsets(grid), exact)  # ((2h - 1) (2w - 1), 2)
        inner = jax.nn.relu(jnp.matmul(offsets, w1, precision="highest") + b1)
        table = jnp.matmul(inner, w2, precision="highest") + b2  # (..., A)
        bias = table[relative_position_index(grid)[1:, 1:]].transpose(2, 0, 1)  # (A, N, N)
        T = self.config.num_prefix_tokens
        return jnp.pad(bias, ((0, 0), (T, 0), (T, 0)))[None]  # (1, A, S, S)
