"""A ResNet-D in front of the patches (He et al. 2018, arXiv:1812.01187): three small convolutions
for its first, and means of pixels where a shortcut halves the sides of the image.

Its batch norms are folded into kernels and biases. Source: `timm/models/resnet.py` of timm 1.0.31
(`stem_type="deep"`, `avg_down=True`).
"""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from vit_common.config_fields import STEM_NARROWING
from vit_torch.parts.mbconv import padded_convolution
from vit_torch.parts.part import ViTPart, options


class ViTFoldedBottleneck(ViTPart):
    """Three convolutions beside a shortcut, which the first block of a stage projects."""

    def __init__(self, inputs: int, features: int, stride: int, **kwargs):
        super().__init__(**kwargs)
        inner = features // STEM_NARROWING
        self.stride = stride
        if inputs != features:
            self.conv_shortcut = padded_convolution(self, inputs, features, 1)
        self.conv1 = padded_convolution(self, inputs, inner, 1)
        self.conv2 = padded_convolution(self, inner, inner, stride=stride)
        self.conv3 = padded_convolution(self, inner, features, 1)

    def forward(self, hidden_states):
        shortcut = hidden_states
        if self.stride == 2:
            shortcut = F.avg_pool2d(shortcut, 2)
        if hasattr(self, "conv_shortcut"):
            shortcut = self.conv_shortcut(shortcut)
        x = F.relu(self.conv2(F.relu(self.conv1(hidden_states))))
        return F.relu(self.conv3(x) + shortcut)


class ViTResNetDStem(ViTPart):
    """(B, C, H, W) -> (B, `stem_channels`, H/s, W/s), where s is `stem_stride`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        config, inputs = self.config, self.config.stem_width
        half = inputs // 2
        self.convolution = padded_convolution(self, config.num_channels, half, stride=2)
        self.convolution2 = padded_convolution(self, half, half)
        self.convolution3 = padded_convolution(self, half, inputs)
        for i, (features, depth) in enumerate(
            zip(config.stem_widths, config.stem_depths, strict=True)
        ):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(ViTFoldedBottleneck(inputs, features, stride, **options(self)))
                inputs = features
            self.add_module(f"stage{i}", nn.Sequential(*blocks))

    def forward(self, pixel_values):
        x = F.relu(self.convolution2(F.relu(self.convolution(pixel_values))))
        x = F.max_pool2d(F.relu(self.convolution3(x)), 3, stride=2, padding=1)
        for i in range(len(self.config.stem_depths)):
            x = self.get_submodule(f"stage{i}")(x)
        return x
