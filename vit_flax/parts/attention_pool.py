"""Attention pooling: a learned probe attends to the tokens, and an MLP follows (Zhai et al. 2022,
arXiv:2106.04560, section 3.3), as in SigLIP, big_vision (`MAPHead`) and timm
(`AttentionPoolLatent`).

B batch, S tokens, D width, A heads, I MLP width; all of the pooling, which may differ from those of
the blocks.
"""

from __future__ import annotations

import jax.numpy as jnp

from vit_flax.attention import attention
from vit_flax.layers import add_parameter, dense, layer_norm
from vit_flax.parts.part import FlaxViTPart, activation, options


class FlaxViTPoolerDense(FlaxViTPart):
    """A dense layer of its own name."""

    features: int = 0

    def setup(self):
        self.dense = dense(self, self.features)

    def __call__(self, hidden_states):
        return self.dense(hidden_states)


class FlaxViTPoolerAttention(FlaxViTPart):
    """Attention of the probe to the tokens, and the projection after it."""

    def setup(self):
        D = self.config.hidden_size
        self.query, self.key, self.value = (dense(self, D) for _ in range(3))
        self.output = FlaxViTPoolerDense(**options(self), features=D)

    def __call__(self, probe, hidden_states):
        """(B, 1, D), of a probe (1, 1, D) and tokens (B, S, D)."""
        (B, S, D), A = hidden_states.shape, self.config.pooler_heads
        query = jnp.broadcast_to(self.query(probe), (B, 1, D)).reshape(B, 1, A, D // A)
        key = self.key(hidden_states).reshape(B, S, A, D // A)  # (B, S, A, D/A)
        value = self.value(hidden_states).reshape(B, S, A, D // A)  # (B, S, A, D/A)
        # One query has no scores worth a kernel that does without them.
        context, _ = attention(
            query, key, value, implementation="eager", precision=self.precision
        )  # (B, 1, A, D/A)
        return self.output(context.reshape(B, 1, D))


class FlaxViTAttentionPooler(FlaxViTPart):
    """One vector per image: what a learned probe finds in the tokens."""

    def setup(self):
        config = self.config
        add_parameter(self, "probe", (1, 1, config.hidden_size), "normal")
        self.attention = FlaxViTPoolerAttention(**options(self))
        self.layernorm = layer_norm(self)
        self.intermediate = FlaxViTPoolerDense(**options(self), features=config.pooler_inner)
        self.output = FlaxViTPoolerDense(**options(self), features=config.hidden_size)

    def __call__(self, hidden_states):
        """(B, S, D) -> (B, D)."""
        tokens = hidden_states[:, self.config.first_pooled_token :]
        pooled = self.attention(self.probe.astype(self.array_dtype), tokens)  # (B, 1, D)
        inner = self.intermediate(self.layernorm(pooled))  # (B, 1, I)
        pooled = pooled + self.output(activation(self.config.hidden_act)(inner))
        return pooled[:, 0]
