"""MBConv stages in front of the patches: the stem of a ViTamin (Chen et al. 2024, arXiv:2404.02132,
section 3.2).

Each block is an inverted bottleneck: a norm over the channels of each pixel, a convolution that
widens, one of each channel by itself, and one that narrows, beside a shortcut. Convolutions see one
pixel beyond the border, zeros. Source: `timm/models/vitamin.py` of timm 1.0.31.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F

from vit_common.config_fields import STEM_WIDENING
from vit_torch.layers import initialize, uninitialized
from vit_torch.parts.part import ViTPart, options


def padded_convolution(
    part: ViTPart, inputs: int, features: int, size: int = 3, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """A convolution with a bias, over zeros beyond the border."""
    shape: dict[str, Any] = {"kernel_size": size, "stride": stride, "padding": size // 2}
    layer = uninitialized(nn.Conv2d, inputs, features, groups=groups, bias=True, **shape)
    initialize(layer.weight, part.config)
    nn.init.zeros_(layer.bias)
    return layer


class ViTChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel, (B, C, H, W)."""

    def __init__(self, part: ViTPart, channels: int):
        super().__init__(channels, eps=part.config.stem_norm_eps)
        self._is_hf_initialized = True

    def forward(self, hidden_states):
        normed = super().forward(hidden_states.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


class ViTMBConv(ViTPart):
    """An inverted bottleneck; with a stride of 2 its shortcut is the mean of 3 x 3 pixels."""

    def __init__(self, inputs: int, features: int, stride: int, **kwargs):
        super().__init__(**kwargs)
        inner = STEM_WIDENING * features
        self.stride = stride
        if inputs != features:
            self.conv_shortcut = padded_convolution(self, inputs, features, 1)
        self.norm = ViTChannelNorm(self, inputs)
        self.conv1 = padded_convolution(self, inputs, inner, 1)
        self.conv2 = padded_convolution(self, inner, inner, stride=stride, groups=inner)
        self.conv3 = padded_convolution(self, inner, features, 1)

    def forward(self, hidden_states):
        shortcut = hidden_states
        if self.stride == 2:
            shortcut = F.avg_pool2d(shortcut, 3, 2, padding=1, count_include_pad=False)
        if hasattr(self, "conv_shortcut"):
            shortcut = self.conv_shortcut(shortcut)
        x = F.gelu(self.conv1(self.norm(hidden_states)))
        x = F.gelu(self.conv2(x))
        return self.conv3(x) + shortcut


class ViTMBConvStem(ViTPart):
    """(B, C, H, W) -> (B, `stem_channels`, H/s, W/s), where s is `stem_stride`; normalised for the
    patch projection."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        config, width = self.config, self.config.stem_width
        self.convolution = padded_convolution(self, config.num_channels, width, stride=2)
        self.norm = ViTChannelNorm(self, width)
        self.convolution2 = padded_convolution(self, width, width)
        inputs = width
        for i, (features, depth) in enumerate(
            zip(config.stem_widths, config.stem_depths, strict=True)
        ):
            blocks = []
            for j in range(depth):
                blocks.append(
                    ViTMBConv(inputs, features, stride=2 if j == 0 else 1, **options(self))
                )
                inputs = features
            self.add_module(f"stage{i}", nn.Sequential(*blocks))
        self.norm_out = ViTChannelNorm(self, inputs)

    def forward(self, pixel_values):
        x = self.convolution2(F.gelu(self.norm(self.convolution(pixel_values))))
        for i in range(len(self.config.stem_depths)):
            x = self.get_submodule(f"stage{i}")(x)
        return self.norm_out(x)
