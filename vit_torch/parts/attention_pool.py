"""Attention pooling: a learned probe attends to the tokens, and an MLP follows (Zhai et al. 2022,
arXiv:2106.04560, section 3.3), as in SigLIP, big_vision (`MAPHead`) and timm
(`AttentionPoolLatent`).

B batch, S tokens, D width, A heads, I MLP width; all of the pooling, which may differ from those of
the blocks.
"""

from __future__ import annotations

from vit_torch.attention import attention
from vit_torch.layers import add_parameter, dense, layer_norm
from vit_torch.parts.part import ViTPart, activation, options


class ViTPoolerDense(ViTPart):
    """A dense layer of its own name."""

    def __init__(self, inputs: int, features: int, **kwargs):
        super().__init__(**kwargs)
        self.dense = dense(self, inputs, features)

    def forward(self, hidden_states):
        return self.dense(hidden_states)


class ViTPoolerAttention(ViTPart):
    """Attention of the probe to the tokens, and the projection after it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        D = self.config.hidden_size
        self.query, self.key, self.value = (dense(self, D, D) for _ in range(3))
        self.output = ViTPoolerDense(D, D, **options(self))

    def forward(self, probe, hidden_states):
        """(B, 1, D), of a probe (1, 1, D) and tokens (B, S, D)."""
        (B, S, D), A = hidden_states.shape, self.config.pooler_heads
        query = self.query(probe).expand(B, 1, D).reshape(B, 1, A, D // A)
        key = self.key(hidden_states).reshape(B, S, A, D // A)  # (B, S, A, D/A)
        value = self.value(hidden_states).reshape(B, S, A, D // A)  # (B, S, A, D/A)
        context, _ = attention(
            query, key, value, implementation=self.attn_implementation
        )  # (B, 1, A, D/A)
        return self.output(context.reshape(B, 1, D))


class ViTAttentionPooler(ViTPart):
    """One vector per image: what a learned probe finds in the tokens."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        D, inner = self.config.hidden_size, self.config.pooler_inner
        add_parameter(self, "probe", (1, 1, D), "normal")
        self.attention = ViTPoolerAttention(**options(self))
        self.layernorm = layer_norm(self)
        self.intermediate = ViTPoolerDense(D, inner, **options(self))
        self.output = ViTPoolerDense(inner, D, **options(self))

    def forward(self, hidden_states):
        """(B, S, D) -> (B, D)."""
        tokens = hidden_states[:, self.config.first_pooled_token :]
        pooled = self.attention(self.probe, tokens)  # (B, 1, D)
        inner = self.intermediate(self.layernorm(pooled))  # (B, 1, I)
        pooled = pooled + self.output(activation(self.config.hidden_act)(inner))
        return pooled[:, 0]
