"""MBConv stages in front of the patches: the stem of a ViTamin (Chen et al. 2024, arXiv:2404.02132,
section 3.2).

Each block is an inverted bottleneck: a norm over the channels of each pixel, a convolution that
widens, one of each channel by itself, and one that narrows, beside a shortcut. Convolutions see one
pixel beyond the border, zeros. Source: `timm/models/vitamin.py` of timm 1.0.31.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from vit_common.config_fields import STEM_WIDENING
from vit_flax.layers import Convolution, LayerNorm, initializer
from vit_flax.parts.part import FlaxViTPart, activation, options

_AROUND = ((1, 1), (1, 1))


def padded_convolution(
    part: FlaxViTPart,
    features: int,
    size: int = 3,
    stride: int = 1,
    groups: int = 1,
    name: str = "",
) -> nn.Conv:
    """A convolution with a bias, over zeros beyond the border."""
    return Convolution(
        features,
        kernel_size=(size, size),
        strides=(stride, stride),
        padding=_AROUND if size == 3 else "VALID",
        feature_group_count=groups,
        dtype=part.dtype,
        param_dtype=part.param_dtype,
        precision=part.precision,
        kernel_init=initializer(part.config.initializer_range),
        bias_init=nn.initializers.zeros,
        name=name or None,
    )


def channel_norm(part: FlaxViTPart, name: str) -> LayerNorm:
    """Layer norm over the channels of each pixel, (B, H, W, C)."""
    return LayerNorm(
        epsilon=part.config.stem_norm_eps,
        dtype=part.array_dtype,
        param_dtype=part.param_dtype,
        name=name,
    )


class FlaxViTMBConv(FlaxViTPart):
    """An inverted bottleneck; with a stride of 2 its shortcut is the mean of 3 x 3 pixels."""

    features: int = 0
    stride: int = 1

    @nn.compact
    def __call__(self, hidden_states):
        features, gelu, inner = self.features, activation("gelu"), STEM_WIDENING * self.features
        shortcut = hidden_states
        if self.stride == 2:
            window, exact = (3, 3), jnp.promote_types(self.dtype, jnp.float32)
            shortcut = nn.avg_pool(
                shortcut.astype(exact), window, (2, 2), _AROUND, count_include_pad=False
            ).astype(self.array_dtype)
        if hidden_states.shape[-1] != features:
            shortcut = padded_convolution(self, features, 1, name="conv_shortcut")(shortcut)
        x = channel_norm(self, "norm")(hidden_states)
        x = gelu(padded_convolution(self, inner, 1, name="conv1")(x))
        x = padded_convolution(self, inner, stride=self.stride, groups=inner, name="conv2")(x)
        return padded_convolution(self, features, 1, name="conv3")(gelu(x)) + shortcut


class FlaxViTMBConvStage(FlaxViTPart):
    """Blocks of one width, of which the first halves the sides of the image."""

    stage: int = 0

    @nn.compact
    def __call__(self, hidden_states):
        for j in range(self.config.stem_depths[self.stage]):
            hidden_states = FlaxViTMBConv(
                **options(self),
                features=self.config.stem_widths[self.stage],
                stride=2 if j == 0 else 1,
                name=str(j),
            )(hidden_states)
        return hidden_states


class FlaxViTMBConvStem(FlaxViTPart):
    """(B, H, W, C) -> (B, H/s, W/s, `stem_channels`), where s is `stem_stride`; normalised for the
    patch projection."""

    @nn.compact
    def __call__(self, pixel_values):
        width = self.config.stem_width
        x = padded_convolution(self, width, stride=2, name="convolution")(pixel_values)
        x = activation("gelu")(channel_norm(self, "norm")(x))
        x = padded_convolution(self, width, name="convolution2")(x)
        for i in range(len(self.config.stem_depths)):
            x = FlaxViTMBConvStage(**options(self), stage=i, name=f"stage{i}")(x)
        return channel_norm(self, "norm_out")(x)
