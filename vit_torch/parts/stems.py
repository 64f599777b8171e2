"""A ResNet in front of the patches: the stem of a hybrid (Dosovitskiy et al. 2021,
arXiv:2010.11929, section 3.1).

It is BiT's ResNet with the activation after each sum: convolutions whose kernels are standardised
(Qiao et al. 2019, arXiv:1903.10520) and group norms. A convolution or a pooling of stride 2 pads as
TensorFlow's "SAME" does, the odd pixel at the end. Sources: `vit_jax/models_resnet.py` of
google-research/vision_transformer; `timm/models/resnetv2.py` of timm 1.0.31.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vit_common.config import ViTConfig
from vit_common.config_fields import STEM_GROUPS, STEM_KERNELS, STEM_NARROWING
from vit_torch.layers import convolution, initialize, uninitialized
from vit_torch.parts.part import ViTPart, options


def pad_same(x: torch.Tensor, size: int, stride: int, value: float = 0.0) -> torch.Tensor:
    """(B, C, H, W), padded so that windows of that size and stride give (H/stride, W/stride),
    rounded up."""
    pads: list[int] = []
    for side in (x.shape[3], x.shape[2]):
        total = max((-(-side // stride) - 1) * stride + size - side, 0)
        pads += (total // 2, total - total // 2)
    return F.pad(x, pads, value=value) if any(pads) else x


class ViTStandardizedConv(nn.Conv2d):
    """A convolution without bias, whose kernel has mean zero and variance one for each output."""

    rule = "variance"

    def forward(self, hidden_states):
        kernel = self.weight  # (out, in, k, k)
        kernel = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
        kernel = kernel - kernel.mean((1, 2, 3), keepdim=True)
        variance = kernel.square().mean((1, 2, 3), keepdim=True)  # (out, 1, 1, 1)
        if self.rule == "deviation":
            kernel = kernel / (variance.sqrt() + 1e-5)
        else:
            kernel = kernel * torch.rsqrt(variance + 1e-8)
        padded = pad_same(hidden_states, self.kernel_size[0], self.stride[0])
        return F.conv2d(padded, kernel.to(self.weight.dtype), stride=self.stride)


def standardized_convolution(
    part: ViTPart, inputs: int, features: int, size: int = 1, stride: int = 1
) -> ViTStandardizedConv:
    layer = uninitialized(
        ViTStandardizedConv, inputs, features, kernel_size=size, stride=stride, bias=False
    )
    layer.rule = part.config.stem_standardization
    initialize(layer.weight, part.config)
    return layer


def group_norm(config: ViTConfig, channels: int) -> nn.GroupNorm:
    norm = nn.GroupNorm(STEM_GROUPS, channels, eps=config.stem_norm_eps, affine=True)
    norm._is_hf_initialized = True  # type: ignore[assignment]
    return norm


class ViTBottleneck(ViTPart):
    """Three convolutions beside a shortcut, which the first block of a stage projects."""

    def __init__(self, inputs: int, features: int, stride: int, projects: bool, **kwargs):
        super().__init__(**kwargs)
        inner = features // STEM_NARROWING
        self.projects = projects
        if projects:
            self.conv_shortcut = standardized_convolution(self, inputs, features, stride=stride)
            self.norm_shortcut = group_norm(self.config, features)
        self.conv1 = standardized_convolution(self, inputs, inner)
        self.norm1 = group_norm(self.config, inner)
        self.conv2 = standardized_convolution(self, inner, inner, size=3, stride=stride)
        self.norm2 = group_norm(self.config, inner)
        self.conv3 = standardized_convolution(self, inner, features)
        self.norm3 = group_norm(self.config, features)

    def forward(self, hidden_states):
        shortcut = hidden_states
        if self.projects:
            shortcut = self.norm_shortcut(self.conv_shortcut(hidden_states))
        x = F.relu(self.norm1(self.conv1(hidden_states)))
        x = F.relu(self.norm2(self.conv2(x)))
        return F.relu(self.norm3(self.conv3(x)) + shortcut)


def stage(part: ViTPart, index: int) -> nn.Sequential:
    """Blocks of one width; all but the first stage halve the sides of the image."""
    config, blocks = part.config, []
    inputs = config.stem_widths[index - 1] if index else config.stem_width
    for i in range(config.stem_depths[index]):
        blocks.append(
            ViTBottleneck(
                inputs if i == 0 else config.stem_widths[index],
                config.stem_widths[index],
                stride=2 if index > 0 and i == 0 else 1,
                projects=i == 0,
                **options(part),
            )
        )
    return nn.Sequential(*blocks)


class ViTConvolutionStem(ViTPart):
    """(B, C, H, W) -> (B, `stem_channels`, H/s, W/s), s being `stem_stride`: the stem of a
    MobileCLIP (Vasu et al. 2024, arXiv:2311.17049), two convolutions that neither overlap nor leave
    gaps, each with a GELU after it. Its batch norms are folded into their kernels and biases.

    Source: `ConvStem` of `timm/models/vision_transformer_hybrid.py` of timm 1.0.31.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        (first, second), width = STEM_KERNELS, self.config.stem_width
        self.convolution = convolution(self, self.config.num_channels, width, (first, first))
        self.convolution2 = convolution(self, width, width, (second, second))

    def forward(self, pixel_values):
        x = F.gelu(self.convolution(pixel_values))
        return F.gelu(self.convolution2(x))


class ViTStem(ViTPart):
    """(B, C, H, W) -> (B, `stem_channels`, H/s, W/s), where s is `stem_stride`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        config = self.config
        self.convolution = standardized_convolution(
            self, config.num_channels, config.stem_width, size=7, stride=2
        )
        self.norm = group_norm(config, config.stem_width)
        for i in range(len(config.stem_depths)):
            self.add_module(f"stage{i}", stage(self, i))

    def forward(self, pixel_values):
        x = F.relu(self.norm(self.convolution(pixel_values)))
        padded = pad_same(x, 3, 2, value=float("-inf"))
        x = F.max_pool2d(padded, 3, stride=2)  # (B, width, H/4, W/4)
        for i in range(len(self.config.stem_depths)):
            x = self.get_submodule(f"stage{i}")(x)
        return x
