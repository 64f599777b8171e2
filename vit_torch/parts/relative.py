"""Relative positions by an MLP: the bias on the scores of each head is computed from the offset
between two patches, on a logarithmic scale (Liu et al. 2022, arXiv:2111.09883, section 3.3), so
that it exists for any grid.

Source: `RelPosMlp` of `timm/layers/pos_embed_rel.py`, timm 1.0.31, its mode "cr".
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from vit_common.positions import log_offsets, relative_position_index
from vit_torch.layers import add_parameter
from vit_torch.parts.part import ViTPart


class ViTRelativePositionMLP(ViTPart):
    """(1, A, S, S) for a grid of patches; tokens in front of them have no bias."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        inner, A = self.config.relative_position_width, self.config.num_attention_heads
        add_parameter(self, "in_kernel", (2, inner), "normal")
        add_parameter(self, "in_bias", (inner,), 0.0)
        add_parameter(self, "out_kernel", (inner, A), "normal")
        add_parameter(self, "out_bias", (A,), 0.0)

    def forward(self, grid: tuple[int, int]):
        names = ("in_kernel", "in_bias", "out_kernel", "out_bias")
        parameters: list[torch.Tensor] = [getattr(self, name) for name in names]
        exact = torch.promote_types(parameters[0].dtype, torch.float32)
        w1, b1, w2, b2 = (parameter.to(exact) for parameter in parameters)
        offsets = torch.tensor(log_offsets(grid), dtype=exact, device=w1.device)
        table = F.relu(offsets @ w1 + b1) @ w2 + b2  # ((2h - 1) (2w - 1), A)
        index = torch.tensor(relative_position_index(grid)[1:, 1:], device=w1.device)
        T = self.config.num_prefix_tokens
        bias = table[index].permute(2, 0, 1)  # (A, N, N)
        return F.pad(bias, (T, 0, T, 0))[None]  # (1, A, S, S)
