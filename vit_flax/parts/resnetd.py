"""A ResNet-D in front of the patches (He et al. 2018, arXiv:1812.01187): three small convolutions
for its first, and means of pixels where a shortcut halves the sides of the image.

Its batch norms are folded into kernels and biases. Source: `timm/models/resnet.py` of timm 1.0.31
(`stem_type="deep"`, `avg_down=True`).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_common.config_fields import STEM_NARROWING
from vit_flax.parts.mbconv import padded_convolution
from vit_flax.parts.part import FlaxViTPart, options


class FlaxViTFoldedBottleneck(FlaxViTPart):
    """Three convolutions beside a shortcut, which the first block of a stage projects."""

    features: int = 0
    stride: int = 1

    @nn.compact
    def __call__(self, hidden_states):
        features, inner = self.features, self.features // STEM_NARROWING
        shortcut = hidden_states
        if self.stride == 2:
            exact = jnp.promote_types(self.dtype, jnp.float32)
            shortcut = nn.avg_pool(shortcut.astype(exact), (2, 2), (2, 2)).astype(self.array_dtype)
        if hidden_states.shape[-1] != features:
            shortcut = padded_convolution(self, features, 1, name="conv_shortcut")(shortcut)
        x = jax.nn.relu(padded_convolution(self, inner, 1, name="conv1")(hidden_states))
        x = jax.nn.relu(padded_convolution(self, inner, stride=self.stride, name="conv2")(x))
        return jax.nn.relu(padded_convolution(self, features, 1, name="conv3")(x) + shortcut)


class FlaxViTFoldedStage(FlaxViTPart):
    """Blocks of one width; all but the first stage halve the sides of the image."""

    stage: int = 0

    @nn.compact
    def __call__(self, hidden_states):
        for j in range(self.config.stem_depths[self.stage]):
            hidden_states = FlaxViTFoldedBottleneck(
                **options(self),
                features=self.config.stem_widths[self.stage],
                stride=2 if self.stage > 0 and j == 0 else 1,
                name=str(j),
            )(hidden_states)
        return hidden_states


class FlaxViTResNetDStem(FlaxViTPart):
    """(B, H, W, C) -> (B, H/s, W/s, `stem_channels`), where s is `stem_stride`."""

    @nn.compact
    def __call__(self, pixel_values):
        width = self.config.stem_width
        x = padded_convolution(self, width // 2, stride=2, name="convolution")(pixel_values)
        x = padded_convolution(self, width // 2, name="convolution2")(jax.nn.relu(x))
        x = jax.nn.relu(padded_convolution(self, width, name="convolution3")(jax.nn.relu(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for i in range(len(self.config.stem_depths)):
            x = FlaxViTFoldedStage(**options(self), stage=i, name=f"stage{i}")(x)
        return x
