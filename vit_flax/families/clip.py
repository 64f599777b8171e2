"""CLIP: the network of `vit_flax.model` as its image tower, and its blocks as the text tower.

Names, calls, outputs and parameter trees are those of the Flax classes of Transformers 4.57.6, and
of its PyTorch ones where it had none in Flax; see `vit_flax.families.towers`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_common.checks import Interpolate
from vit_common.config import ViTConfig
from vit_common.families import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
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
    named,
)
from vit_flax.layers import dense
from vit_flax.model import FlaxViTModule, finish
from vit_flax.outputs import FlaxCLIPTextModelOutput, FlaxCLIPVisionModelOutput
from vit_flax.parts.part import FlaxViTPart, options
from vit_flax.pretrained import FlaxViTForImageClassification

# -- modules


class FlaxCLIPVisionModule(FlaxImageTowerModule):
    """CLIP's image tower; see `FlaxViTModule`. `last_hidden_state` is that of the last block, and
    `pooler_output` its class token through the last norm."""


class FlaxCLIPVisionModelWithProjectionModule(FlaxViTPart):
    """CLIP's image tower, and the projection of its pooled output to where images and texts are
    compared."""

    def setup(self):
        network = named(self, FlaxViTModule, self.config)
        self.vision_model = network(**options(self), add_pooling_layer=True)
        self.visual_projection = dense(self, self.config.projection_dim, use_bias=False)

    def __call__(
        self,
        pixel_values,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        head_mask=None,
        interpolate_pos_encoding: Interpolate = None,
    ):
        """Run the network; arguments as `FlaxViTModule`.

        Returns:
            `FlaxCLIPVisionModelOutput`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        outputs = self.vision_model(
            pixel_values,
            deterministic,
            flags.output_attentions,
            flags.output_hidden_states,
            True,
            head_mask=head_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        return finish(
            FlaxCLIPVisionModelOutput,
            outputs,
            flags,
            image_embeds=self.rounded(self.visual_projection(outputs.pooler_output)),
            last_hidden_state=outputs.last_hidden_state,
        )


class FlaxCLIPForImageClassificationModule(FlaxImageTowerClassifierModule):
    """CLIP's image tower and a linear classifier on the mean of the patches, which the last norm
    does not change; see `FlaxViTForImageClassificationModule`."""


class FlaxCLIPTextNetwork(FlaxTextNetwork):
    """CLIP's text tower: a token attends to itself and those before it. The pooled output is that
    of the token that ends the text."""

    def pool(self, last_hidden_state, input_ids):
        """(B, S, D) and (B, S) -> (B, D)."""
        place = last_tokens(input_ids, self.config)  # (B,)
        return jnp.take_along_axis(last_hidden_state, place[:, None, None], axis=1)[:, 0]

    def attends(self, tokens: int):
        """Which token attends to which, (1, 1, S, S) of truth values."""
        return jnp.tril(jnp.ones((1, 1, tokens, tokens), bool))


def last_tokens(input_ids, config: ViTConfig):
    """The place of the token that ends each text, (B, S) -> (B,).

    It is the first `eos_token_id`. Files of before 2023 say 2 there, whatever the vocabulary: with
    them it is the largest id, as OpenAI's own code has it.
    """
    if config.eos_token_id in (2, None):
        return jnp.argmax(input_ids, axis=-1)
    return jnp.argmax(input_ids == config.eos_token_id, axis=-1)


class FlaxCLIPTextModule(FlaxTextTowerModule):
    """CLIP's text tower."""

    text_network = FlaxCLIPTextNetwork


class FlaxCLIPTextModelWithProjectionModule(FlaxViTPart):
    """CLIP's text tower, and the projection of its pooled output to where images and texts are
    compared."""

    def setup(self):
        self.text_model = named(self, FlaxCLIPTextNetwork, self.config)(**options(self))
        self.text_projection = dense(self, self.config.projection_dim, use_bias=False)

    def __call__(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        deterministic: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ):
        """Run the network; arguments as `FlaxCLIPTextModule`.

        Returns:
            `FlaxCLIPTextModelOutput`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        outputs = self.text_model(
            input_ids,
            attention_mask,
            position_ids,
            deterministic,
            flags.output_attentions,
            flags.output_hidden_states,
            True,
        )
        return finish(
            FlaxCLIPTextModelOutput,
            outputs,
            flags,
            text_embeds=self.rounded(self.text_projection(outputs.pooler_output)),
            last_hidden_state=outputs.last_hidden_state,
        )


class FlaxCLIPModule(FlaxTwoTowersModule):
    """Both towers of CLIP, and how alike each image is to each text."""

    text_network = FlaxCLIPTextNetwork

    def setup(self):
        super().setup()
        self.visual_projection = dense(self, self.config.projection_dim, use_bias=False)
        self.text_projection = dense(self, self.config.projection_dim, use_bias=False)
        scale = nn.initializers.constant(self.config.logit_scale_init_value)
        self.logit_scale = self.param("logit_scale", scale, (), self.param_dtype)

    def project_image(self, pooled):
        """(images, D) -> (images, P)."""
        return self.visual_projection(pooled)

    def project_text(self, pooled):
        """(texts, D) -> (texts, P)."""
        return self.text_projection(pooled)

    def scaled(self, product):
        """The logits (texts, images), of similarities."""
        return product * jnp.exp(self.logit_scale).astype(product.dtype)

    def loss(self, logits_per_text):
        """See `contrastive_loss`."""
        return contrastive_loss(logits_per_text)


def contrastive_loss(logits_per_text):
    """The mean cross entropy of texts among images and of images among texts, where text i belongs
    to image i (Radford et al. 2021, figure 3): similarities (texts, images)."""
    check_pairs(logits_per_text)
    logits = logits_per_text.astype(jnp.promote_types(logits_per_text.dtype, jnp.float32))
    texts = jnp.diagonal(jax.nn.log_softmax(logits, axis=1))
    images = jnp.diagonal(jax.nn.log_softmax(logits, axis=0))
    return -(texts.mean() + images.mean()) / 2


# -- models


class FlaxCLIPVisionPreTrainedModel(TransformersTree):
    """Base of the models of CLIP's image tower; see `FlaxViTPreTrainedModel`."""

    config_class = CLIPVisionConfig
    base_model_prefix = "vision_model"


class FlaxCLIPVisionModel(ImageTowerModel, FlaxCLIPVisionPreTrainedModel):
    """CLIP's image tower. The pooled output is the class token through the last norm, which
    `last_hidden_state` has not gone through."""

    module_class = FlaxCLIPVisionModule


class FlaxCLIPVisionModelWithProjection(ImageTowerModel, FlaxCLIPVisionPreTrainedModel):
    """CLIP's image tower with the projection of its pooled output: `image_embeds`."""

    module_class = FlaxCLIPVisionModelWithProjectionModule
    head = "projection"


class FlaxCLIPForImageClassification(TransformersTree, FlaxViTForImageClassification):
    """CLIP's image tower with a linear classifier on the mean of the patches; see
    `FlaxViTForImageClassification`."""

    config_class = CLIPConfig
    base_model_prefix = "vision_model"
    module_class = FlaxCLIPForImageClassificationModule


class FlaxCLIPTextPreTrainedModel(TextTowerModel):
    """Base of the models of CLIP's text tower; see `FlaxViTPreTrainedModel`. `input_shape` is
    (batch, tokens)."""

    config_class = CLIPTextConfig


class FlaxCLIPTextModel(FlaxCLIPTextPreTrainedModel):
    """CLIP's text tower. The pooled output is that of the token that ends the text."""

    module_class = FlaxCLIPTextModule


class FlaxCLIPTextModelWithProjection(FlaxCLIPTextPreTrainedModel):
    """CLIP's text tower with the projection of its pooled output: `text_embeds`."""

    module_class = FlaxCLIPTextModelWithProjectionModule
    head = "projection"


class FlaxCLIPPreTrainedModel(TwoTowersBase):
    """Base of the models of a whole CLIP; see `FlaxViTPreTrainedModel`. `input_shape` is a pair:
    (batch, tokens) and (batch, height, width, channels)."""

    config_class = CLIPConfig


class FlaxCLIPModel(TwoTowersModel, FlaxCLIPPreTrainedModel):
    """A whole CLIP: how alike each image is to each text.

    Example:
        >>> model = FlaxCLIPModel.from_pretrained("openai/clip-vit-base-patch32")
        >>> output = model(**processor(text=["a cat", "a dog"], images=image, return_tensors="np"))
        >>> jax.nn.softmax(output.logits_per_image, axis=1)
    """

    module_class = FlaxCLIPModule
