"""A ResNet in front of the patches: the stem of a hybrid (Dosovitskiy et al. 2021,
arXiv:2010.11929, section 3.1).

It is BiT's ResNet with the activation after each sum: convolutions whose kernels are standardised
(Qiao et al. 2019, arXiv:1903.10520) and group norms. A convolution or a pooling of stride 2 pads as
TensorFlow's "SAME" does, the odd pixel at the end. Sources: `vit_jax/models_resnet.py` of
google-research/vision_transformer; `timm/models/resnetv2.py` of timm 1.0.31.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_common.config_fields import STEM_GROUPS, STEM_KERNELS, STEM_NARROWING
from vit_flax.layers import convolution, initializer
from vit_flax.parts.part import FlaxViTPart, activation, options


class FlaxViTStandardizedConv(FlaxViTPart):
    """A convolution without bias, whose kernel has mean zero and variance one for each output."""

    features: int = 0
    size: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, hidden_states):
        shape = (self.size, self.size, hidden_states.shape[-1], self.features)
        draw = initializer(self.config.initializer_range)
        kernel: jax.Array = self.param("kernel", draw, shape, self.param_dtype)  # (k, k, in, out)
        kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
        kernel = kernel - kernel.mean((0, 1, 2))
        variance = jnp.square(kernel).mean((0, 1, 2))  # (out,)
        if self.config.stem_standardization == "deviation":
            kernel = kernel / (jnp.sqrt(variance) + 1e-5)
        else:
            kernel = kernel * jax.lax.rsqrt(variance + 1e-8)
        return jax.lax.conv_general_dilated(
            hidden_states,
            kernel.astype(self.array_dtype),
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=self.precision,
        )


class FlaxViTGroupNorm(FlaxViTPart):
    """Norm over the pixels and the channels of each group of them; statistics in float32."""

    @nn.compact
    def __call__(self, hidden_states):
        B, H, W, C = hidden_states.shape
        scale = self.param("scale", nn.initializers.ones, (C,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (C,), self.param_dtype)
        x = hidden_states.astype(jnp.promote_types(hidden_states.dtype, jnp.float32))
        x = x.reshape(B, H, W, STEM_GROUPS, C // STEM_GROUPS)
        x = x - x.mean((1, 2, 4), keepdims=True)
        variance = jnp.square(x).mean((1, 2, 4), keepdims=True)
        x = x * jax.lax.rsqrt(variance + self.config.stem_norm_eps)
        return (x.reshape(B, H, W, C) * scale + bias).astype(self.array_dtype)


class FlaxViTBottleneck(FlaxViTPart):
    """Three convolutions beside a shortcut, which the first block of a stage projects."""

    features: int = 0
    stride: int = 1
    projects: bool = False

    @nn.compact
    def __call__(self, hidden_states):
        def convolve(x, name: str, features: int, size: int = 1, stride: int = 1):
            shape: dict[str, Any] = {"features": features, "size": size, "stride": stride}
            x = FlaxViTStandardizedConv(**options(self), **shape, name=f"conv{name}")(x)
            return FlaxViTGroupNorm(**options(self), name=f"norm{name}")(x)

        shortcut = hidden_states
        if self.projects:
            shortcut = convolve(hidden_states, "_shortcut", self.features, stride=self.stride)
        inner = self.features // STEM_NARROWING
        x = jax.nn.relu(convolve(hidden_states, "1", inner))
        x = jax.nn.relu(convolve(x, "2", inner, size=3, stride=self.stride))
        return jax.nn.relu(convolve(x, "3", self.features) + shortcut)


class FlaxViTStage(FlaxViTPart):
    """Blocks of one width; all but the first stage halve the sides of the image."""

    stage: int = 0

    @nn.compact
    def __call__(self, hidden_states):
        for i in range(self.config.stem_depths[self.stage]):
            hidden_states = FlaxViTBottleneck(
                **options(self),
                features=self.config.stem_widths[self.stage],
                stride=2 if self.stage > 0 and i == 0 else 1,
                projects=i == 0,
                name=str(i),
            )(hidden_states)
        return hidden_states


class FlaxViTConvolutionStem(FlaxViTPart):
    """(B, H, W, C) -> (B, H/s, W/s, `stem_channels`), s being `stem_stride`: the stem of a
    MobileCLIP (Vasu et al. 2024, arXiv:2311.17049), two convolutions that neither overlap nor leave
    gaps, each with a GELU after it. Its batch norms are folded into their kernels and biases.

    Source: `ConvStem` of `timm/models/vision_transformer_hybrid.py` of timm 1.0.31.
    """

    def setup(self):
        (first, second), width = STEM_KERNELS, self.config.stem_width
        self.convolution = convolution(self, width, (first, first))
        self.convolution2 = convolution(self, width, (second, second))

    def __call__(self, pixel_values):
        x = activation("gelu")(self.convolution(pixel_values))
        return activation("gelu")(self.convolution2(x))


class FlaxViTStem(FlaxViTPart):
    """(B, H, W, C) -> (B, H/s, W/s, `stem_channels`), where s is `stem_stride`."""

    @nn.compact
    def __call__(self, pixel_values):
        shape: dict[str, Any] = {"features": self.config.stem_width, "size": 7, "stride": 2}
        x = FlaxViTStandardizedConv(**options(self), **shape, name="convolution")(pixel_values)
        x = jax.nn.relu(FlaxViTGroupNorm(**options(self), name="norm")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")  # (B, H/4, W/4, width)
        for i in range(len(self.config.stem_depths)):
            x = FlaxViTStage(**options(self), stage=i, name=f"stage{i}")(x)
        return x
