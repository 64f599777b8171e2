"""SigLIP and SigLIP 2: the network of `vit_flax.model` with attention pooling as the image tower,
and its blocks as the text tower.

Names, calls and outputs are those of Transformers 4.57.6, whose models are in PyTorch alone; so are
the names in `params`, but for query, key and value of attention pooling, which are in three arrays
(`head/attention/q_proj`, ...). SigLIP 2 for images of any size takes images (B, C, H, W), or
patches as Transformers' image processor makes them, of one size in a batch.
"""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_common.checks import Interpolate, patch_grid
from vit_common.config import ViTConfig
from vit_common.errors import InputError
from vit_common.families import (
    Siglip2Config,
    Siglip2TextConfig,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
)
from vit_flax.arguments import as_array, values_of
from vit_flax.families.towers import (
    FlaxImageTowerClassifierModule,
    FlaxImageTowerModule,
    FlaxTextNetwork,
    FlaxTextTowerModule,
    FlaxTwoTowersModule,
    ImageTowerModel,
    TextTowerModel,
    TransformersTree,
    TwoTowersBase,
    TwoTowersModel,
    check_pairs,
)
from vit_flax.layers import dense
from vit_flax.outputs import FlaxSiglip2Output, FlaxSiglipOutput
from vit_flax.params import Params
from vit_flax.pretrained import FlaxViTForImageClassification

# -- modules


class FlaxSiglipVisionModule(FlaxImageTowerModule):
    """SigLIP's image tower; see `FlaxViTModule`. `pooler_output` is that of attention pooling."""


class FlaxSiglipForImageClassificationModule(FlaxImageTowerClassifierModule):
    """SigLIP's image tower and a linear classifier on the mean of the patches, which attention
    pooling has no part in; see `FlaxViTForImageClassificationModule`."""


class FlaxSiglipTextNetwork(FlaxTextNetwork):
    """SigLIP's text tower. The pooled output is a projection of the last token, padding or not: it
    was trained on texts padded to `max_position_embeddings`."""

    def setup(self):
        super().setup()
        self.head = dense(self, self.config.projection_size)

    def pool(self, last_hidden_state, input_ids):
        """(B, S, D) and (B, S) -> (B, projection_size)."""
        return self.head(last_hidden_state[:, -1])


class FlaxSiglipTextModule(FlaxTextTowerModule):
    """SigLIP's text tower."""

    text_network = FlaxSiglipTextNetwork


class FlaxSiglipModule(FlaxTwoTowersModule):
    """Both towers of SigLIP, and how alike each image is to each text, each pair by itself."""

    text_network = FlaxSiglipTextNetwork
    output_class = FlaxSiglipOutput

    def setup(self):
        super().setup()
        zeros = nn.initializers.zeros_init()
        self.logit_scale = self.param("logit_scale", zeros, (1,), self.param_dtype)
        self.logit_bias = self.param("logit_bias", zeros, (1,), self.param_dtype)

    def scaled(self, product):
        """The logits (texts, images), of similarities."""
        scale = jnp.exp(self.logit_scale).astype(product.dtype)
        return product * scale + self.logit_bias.astype(product.dtype)

    def loss(self, logits_per_text):
        """See `sigmoid_loss`."""
        return sigmoid_loss(logits_per_text)


class FlaxSiglip2Module(FlaxSiglipModule):
    """Both towers of SigLIP 2; see `FlaxSiglipModule`."""

    output_class = FlaxSiglip2Output  # type: ignore[assignment]


def sigmoid_loss(logits_per_text):
    """The sum over the images of the binary cross entropies of a text with each, its mean over the
    texts; text i belongs to image i (Zhai et al. 2023, algorithm 1): logits (texts, images)."""
    check_pairs(logits_per_text)
    logits = logits_per_text.astype(jnp.promote_types(logits_per_text.dtype, jnp.float32))
    own = 2 * jnp.eye(len(logits), dtype=logits.dtype) - 1
    return -jax.nn.log_sigmoid(own * logits).sum(axis=-1).mean()


# -- models


class FlaxSiglipVisionPreTrainedModel(TransformersTree):
    """Base of the models of SigLIP's image tower; see `FlaxViTPreTrainedModel`."""

    config_class = SiglipVisionConfig
    base_model_prefix = "vision_model"


class FlaxSiglipVisionModel(ImageTowerModel, FlaxSiglipVisionPreTrainedModel):
    """SigLIP's image tower. The pooled output is that of attention pooling; there is none where
    `config.vision_use_head` is False.

    Example:
        >>> model = FlaxSiglipVisionModel.from_pretrained("google/siglip-base-patch16-224")
        >>> model(pixel_values).pooler_output.shape
    """

    module_class = FlaxSiglipVisionModule


class FlaxSiglipForImageClassification(TransformersTree, FlaxViTForImageClassification):
    """SigLIP's image tower with a linear classifier on the mean of the patches; see
    `FlaxViTForImageClassification`."""

    config_class = cast("Any", SiglipConfig)
    base_model_prefix = "vision_model"
    module_class = FlaxSiglipForImageClassificationModule


class FlaxSiglipTextPreTrainedModel(TextTowerModel):
    """Base of the models of SigLIP's text tower; see `FlaxViTPreTrainedModel`. `input_shape` is
    (batch, tokens)."""

    config_class = SiglipTextConfig


class FlaxSiglipTextModel(FlaxSiglipTextPreTrainedModel):
    """SigLIP's text tower. The pooled output is a projection of the last token."""

    module_class = FlaxSiglipTextModule


class FlaxSiglipPreTrainedModel(TwoTowersBase):
    """Base of the models of a whole SigLIP; see `FlaxViTPreTrainedModel`. `input_shape` is a pair:
    (batch, tokens) and (batch, height, width, channels)."""

    config_class = SiglipConfig


class FlaxSiglipModel(TwoTowersModel, FlaxSiglipPreTrainedModel):
    """A whole SigLIP: how alike each image is to each text, each pair by itself.

    Example:
        >>> model = FlaxSiglipModel.from_pretrained("google/siglip-base-patch16-224")
        >>> texts = processor(text=["a cat", "a dog"], padding="max_length", images=image, ...)
        >>> jax.nn.sigmoid(model(**texts).logits_per_image)
    """

    module_class = FlaxSiglipModule


# -- SigLIP 2 for images of any size


def images_of(pixel_values: Any, spatial_shapes: Any, config: ViTConfig) -> Any:
    """Images (B, C, H, W), where patches are given (B, N, P P C), channels last, as Transformers'
    image processor makes them; what pads them is left out. Images come back as they are.

    Raises:
        InputError: the patches are not those of images of one size.
    """
    if pixel_values is None or getattr(pixel_values, "ndim", None) != 3:
        return pixel_values
    pixel_values = as_array("pixel_values", pixel_values)
    shapes = None
    if spatial_shapes is not None:
        values = values_of("spatial_shapes", as_array("spatial_shapes", spatial_shapes))
        if values is None:
            raise InputError("`spatial_shapes` must have values: they say the shapes of arrays.")
        shapes = values.tolist()
    rows, columns = patch_grid(pixel_values.shape, shapes, config)
    (P, Q), C = config.patch_height_width, config.num_channels
    patches = pixel_values[:, : rows * columns].reshape(-1, rows, columns, P, Q, C)
    return patches.transpose(0, 5, 1, 3, 2, 4).reshape(-1, C, rows * P, columns * Q)


class FlaxSiglip2VisionPreTrainedModel(TransformersTree):
    """Base of the models of SigLIP 2's image tower; see `FlaxViTPreTrainedModel`."""

    config_class = Siglip2VisionConfig
    base_model_prefix = "vision_model"


class FlaxSiglip2VisionModel(ImageTowerModel, FlaxSiglip2VisionPreTrainedModel):
    """SigLIP 2's image tower; see `FlaxSiglipVisionModel`. Positions are resampled to images."""

    module_class = FlaxSiglipVisionModule

    def __call__(  # type: ignore[override]
        self,
        pixel_values: Any,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        pixel_attention_mask: Any = None,
        spatial_shapes: Any = None,
        head_mask: Any = None,
        interpolate_pos_encoding: Interpolate = None,
    ) -> Any:
        """Run the network; arguments as `FlaxViTModel`, and

        Args:
            pixel_values: images (B, C, H, W), or patches (B, N, P P C).
            pixel_attention_mask: of patches, as Transformers' image processor makes it; where the
                images lie, `spatial_shapes` says.
            spatial_shapes: (B, 2), rows and columns of the patches of each image; needed for
                patches, and the same for all images.

        Returns:
            `FlaxBaseModelOutputWithPooling`, or its tuple with `return_dict=False`. Padding has no
            hidden states.

        Raises:
            InputError: an argument does not fit the model.
        """
        return super().__call__(
            images_of(pixel_values, spatial_shapes, self.config),
            params,
            dropout_rng,
            train,
            output_attentions,
            output_hidden_states,
            return_dict,
            head_mask=head_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )


class FlaxSiglip2ForImageClassification(FlaxSiglipForImageClassification):
    """SigLIP 2's image tower with a linear classifier on the mean of the patches; see
    `FlaxViTForImageClassification`."""

    config_class = Siglip2Config

    def __call__(
        self,
        pixel_values: Any,
        *args: Any,
        pixel_attention_mask: Any = None,
        spatial_shapes: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run the network; arguments as `FlaxViTForImageClassification` and
        `FlaxSiglip2VisionModel`."""
        images = images_of(pixel_values, spatial_shapes, self.config)
        return super().__call__(images, *args, **kwargs)


class FlaxSiglip2TextModel(FlaxSiglipTextModel):
    """SigLIP 2's text tower; see `FlaxSiglipTextModel`."""

    config_class = Siglip2TextConfig


class FlaxSiglip2PreTrainedModel(TwoTowersBase):
    """Base of the models of a whole SigLIP 2; see `FlaxSiglipPreTrainedModel`."""

    config_class = Siglip2Config


class FlaxSiglip2Model(TwoTowersModel, FlaxSiglip2PreTrainedModel):
    """A whole SigLIP 2; see `FlaxSiglipModel`."""

    module_class = FlaxSiglip2Module

    def __call__(  # type: ignore[override]
        self,
        input_ids: Any,
        pixel_values: Any,
        *args: Any,
        pixel_attention_mask: Any = None,
        spatial_shapes: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run both towers; arguments as `FlaxSiglipModel` and `FlaxSiglip2VisionModel`."""
        images = images_of(pixel_values, spatial_shapes, self.config)
        return super().__call__(input_ids, images, *args, **kwargs)

    def get_image_features(
        self,
        pixel_values: Any,
        *args: Any,
        pixel_attention_mask: Any = None,
        spatial_shapes: Any = None,
        **kwargs: Any,
    ) -> jax.Array:
        """The pooled output of images, (images, P), not normalised; arguments as a call's."""
        images = images_of(pixel_values, spatial_shapes, self.config)
        return super().get_image_features(images, *args, **kwargs)
