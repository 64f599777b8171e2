"""Differential attention (Ye et al. 2024, arXiv:2410.05258): each head takes two maps of attention
from halves of its query and key, and what it returns is the value by the first less a learned share
of the second.

B batch, S tokens, A heads, D/A width of a head.

Source: `timm/layers/diff_attention.py` of timm 1.0.31.
"""

from __future__ import annotations

import torch
from torch import nn

from vit_common.parameters import DIFFERENTIAL
from vit_torch.attention import attention
from vit_torch.layers import fill
from vit_torch.parts.part import ViTPart

EPS = 1e-5
"""Epsilon of the norm of each head's result."""


class ViTDifferentialAttention(ViTPart):
    """The share of the second map, and the attention itself.

    Attributes:
        share: of the second map at the start of training, one number for each block.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        width = self.config.head_dim
        self.share = 0.0  # set by the encoder
        for name in DIFFERENTIAL:
            self.register_parameter(name, nn.Parameter(torch.empty(width // 2)))
            fill(getattr(self, name), name, self.config)
        self.norm = nn.RMSNorm(width, eps=EPS, elementwise_affine=True)
        self.norm._is_hf_initialized = True  # type: ignore[assignment]

    def forward(self, query, key, value, bias=None, head_mask=None, **options):
        """The context (B, S, A, D/A), and the differences of the maps (B, A, S, S) if asked for.

        Args:
            query, key, value: (B, S, A, D/A).
            bias: added to the scores of both maps; broadcasts against (B, A, S, S).
            head_mask: multiplies the maps; broadcasts against (B, A, S, S).
            **options: as `attention` takes them.
        """
        B, S, A, width = query.shape
        exact = torch.promote_types(query.dtype, torch.float32)
        q1, k1, q2, k2 = (
            getattr(self, f"lambda_{name}").to(exact) for name in ("q1", "k1", "q2", "k2")
        )
        full = torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + self.share
        full = full.to(query.dtype)
        context, maps = attention(
            query.reshape(B, S, 2 * A, width // 2),
            key.reshape(B, S, 2 * A, width // 2),
            value.repeat_interleave(2, dim=2),  # (B, S, 2A, D/A)
            bias=None if bias is None else _twice(bias),
            head_mask=None if head_mask is None else _twice(head_mask),
            **options,
        )
        x = context[:, :, 0::2] - full * context[:, :, 1::2]  # (B, S, A, D/A)
        x = self.norm(x) * (1 - self.share)
        return x, None if maps is None else maps[:, 0::2] - full * maps[:, 1::2]


def _twice(x: torch.Tensor) -> torch.Tensor:
    """What every head has, for both of its maps: (..., A, S, S) -> (..., 2A, S, S)."""
    return x if x.shape[-3] == 1 else x.repeat_interleave(2, dim=-3)
