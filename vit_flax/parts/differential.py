"""Differential attention (Ye et al. 2024, arXiv:2410.05258): each head takes two maps of attention
from halves of its query and key, and what it returns is the value by the first less a learned share
of the second.

B batch, F tokens that attend, S tokens, A heads, D/A width of a head.

Source: `timm/layers/diff_attention.py` of timm 1.0.31.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vit_common.parameters import DIFFERENTIAL, DIFFERENTIAL_STD
from vit_flax.attention import attention
from vit_flax.layers import RMSNorm, initializer
from vit_flax.parts.part import FlaxViTPart

EPS = 1e-5
"""Epsilon of the norm of each head's result."""


class FlaxViTDifferentialAttention(FlaxViTPart):
    """The share of the second map, and the attention itself."""

    def setup(self):
        shape, draw = (self.config.head_dim // 2,), initializer(DIFFERENTIAL_STD)
        for name in DIFFERENTIAL:
            setattr(self, name, self.param(name, draw, shape, self.param_dtype))
        self.norm = RMSNorm(epsilon=EPS, dtype=self.array_dtype, param_dtype=self.param_dtype)

    def __call__(self, query, key, value, share, *, bias=None, head_mask=None, **options):
        """The context (B, F, A, D/A), and the differences of the maps (B, A, F, S) if asked for.

        Args:
            query: (B, F, A, D/A).
            key, value: (B, S, A, D/A).
            share: of the second map at the start of training, a number of the block.
            bias: added to the scores of both maps; broadcasts against (B, A, F, S).
            head_mask: multiplies the maps; broadcasts against (B, A, F, S).
            **options: as `attention` takes them.
        """
        (B, F, A, width), S = query.shape, key.shape[1]
        exact = jnp.promote_types(self.array_dtype, jnp.float32)
        q1, k1, q2, k2 = (
            getattr(self, f"lambda_{name}").astype(exact) for name in ("q1", "k1", "q2", "k2")
        )
        share = jnp.asarray(share, exact)
        full = jnp.exp(jnp.sum(q1 * k1)) - jnp.exp(jnp.sum(q2 * k2)) + share
        full = full.astype(self.array_dtype)
        context, maps = attention(
            query.reshape(B, F, 2 * A, width // 2),
            key.reshape(B, S, 2 * A, width // 2),
            jnp.repeat(value, 2, axis=2),  # (B, S, 2A, D/A)
            bias=None if bias is None else _twice(bias),
            head_mask=None if head_mask is None else _twice(head_mask),
            **options,
        )
        x = context[:, :, 0::2] - full * context[:, :, 1::2]  # (B, F, A, D/A)
        x = self.norm(x) * (1 - share).astype(self.array_dtype)
        return x, None if maps is None else maps[:, 0::2] - full * maps[:, 1::2]


def _twice(x: jax.Array) -> jax.Array:
    """What every head has, for both of its maps: (..., A, S, S) -> (..., 2A, S, S)."""
    return x if x.shape[-3] == 1 else jnp.repeat(x, 2, axis=-3)
