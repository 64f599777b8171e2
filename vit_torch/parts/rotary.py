"""Rotary position embeddings: pairs of channels of queries and keys are turned by the position of
their patch (Su et al. 2021, arXiv:2104.09864); tokens in front of the patches are not.

B batch, T tokens in front of the patches, N patches, S = T + N, A heads, D/A width of a head.
"""

from __future__ import annotations

import numpy as np
import torch

from vit_common.config import ViTConfig
from vit_common.positions import rotary_angles, rotary_coordinates

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, (1, S, 1, D/A/2) for all heads alike or (1, S, A, D/A/2); where they are not
alike in all blocks, with an axis of L in front."""


def rotation(
    config: ViTConfig,
    grid: tuple[int, int],
    like: torch.Tensor,
    frequencies: torch.Tensor | None = None,
) -> Rotation:
    """By what each token is rotated, in float32 or a wider dtype.

    Args:
        config: with a `rope_type`.
        grid: (rows, columns) of patches.
        like: of the dtype and on the device of the network.
        frequencies: (2, L, A, D/A/2), of "mixed".
    """
    exact = torch.promote_types(like.dtype, torch.float32)
    front = ((config.num_prefix_tokens, 0), (0, 0))  # by no angle

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array, dtype=exact, device=like.device)

    if frequencies is None:
        kind, theta = config.rope_type, config.rope_theta
        angles = rotary_angles(kind, config.head_dim, theta, **config.rotary_grid(grid))
        angles = np.pad(angles, front)[None, :, None]  # (1, S, 1, D/A/2)
        return tensor(np.cos(angles)), tensor(np.sin(angles))
    places = np.pad(rotary_coordinates(config.rope_type, **config.rotary_grid(grid)), front)
    first, second = tensor(places).T[:, None, None, :, None, None]  # (1, 1, S, 1, 1)
    along, across = frequencies.to(exact)[:, :, None, None]  # (L, 1, 1, A, D/A/2)
    turned = first * along + second * across  # (L, 1, S, A, D/A/2)
    return torch.cos(turned), torch.sin(turned)


def rotate(x: torch.Tensor, by: Rotation, halves: bool) -> torch.Tensor:
    """Queries or keys (B, F, A, D/A) of the first F tokens, rotated; products are in the dtype of
    `by`.

    Args:
        x: queries or keys.
        by: of one block.
        halves: whether the channels of a pair are half a head apart, not neighbours.
    """
    cos, sin = (part[:, : x.shape[1]] for part in by)
    wide = x.to(cos.dtype)
    if halves:
        a, b = wide.chunk(2, dim=-1)  # (B, F, A, D/A/2)
    else:
        a, b = wide[..., 0::2], wide[..., 1::2]
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.cat(pair, dim=-1) if halves else torch.stack(pair, -1).reshape(x.shape)
    return turned.to(x.dtype)
