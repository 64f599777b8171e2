"""CLIP: the network of `vit_torch.model` as its image tower, and its blocks as the text tower.

Names, calls and outputs are those of Transformers 4.57.6; see `vit_torch.families.towers`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vit_common.checks import Interpolate
from vit_common.config import ViTConfig
from vit_common.families import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from vit_torch.families.towers import (
    ImageTower,
    ImageTowerClassifier,
    TextNetwork,
    TextTower,
    TextTowerBase,
    TwoTowers,
    check_pairs,
)
from vit_torch.layers import dense
from vit_torch.model import ViTModule, add_network, finish, run_network
from vit_torch.outputs import CLIPOutput, CLIPTextModelOutput, CLIPVisionModelOutput
from vit_torch.parts.part import options
from vit_torch.pretrained import ViTPreTrainedModel


class CLIPPreTrainedModel(ViTPreTrainedModel):
    """Base of CLIP's models; see `ViTPreTrainedModel`."""

    config_class = CLIPConfig
    base_model_prefix = "vision_model"
    network_class = ViTModule


class CLIPVisionModel(ImageTower, CLIPPreTrainedModel):
    """CLIP's image tower. The pooled output is the class token through the last norm, which
    `last_hidden_state` has not gone through.

    Args:
        config: sizes.
        add_pooling_layer: whether there is a pooled output.
        attn_implementation: see `vit_torch.attention`.
    """

    config_class = CLIPVisionConfig  # type: ignore[assignment]


class CLIPVisionModelWithProjection(CLIPPreTrainedModel):
    """CLIP's image tower with the projection of its pooled output to where images and texts are
    compared: `image_embeds`.

    Args:
        config: sizes.
        attn_implementation: see `vit_torch.attention`.
    """

    config_class = CLIPVisionConfig  # type: ignore[assignment]
    head = "projection"

    def __init__(self, config: CLIPVisionConfig, *, attn_implementation: str = "auto"):
        super().__init__(config, attn_implementation=attn_implementation)
        add_network(self, add_pooling_layer=True)
        self.visual_projection = dense(
            self, self.config.hidden_size, self.config.projection_dim, use_bias=False
        )

    def forward(
        self,
        pixel_values=None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: Interpolate = None,
        return_dict: bool | None = None,
        *,
        head_mask=None,
    ):
        """Run the network; arguments as `ViTModel`.

        Returns:
            `CLIPVisionModelOutput`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        outputs = run_network(
            self,
            flags,
            pixel_values,
            head_mask=head_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        return finish(
            CLIPVisionModelOutput,
            outputs,
            flags,
            image_embeds=self.visual_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
        )


class CLIPForImageClassification(ImageTowerClassifier, CLIPPreTrainedModel):
    """CLIP's image tower with a linear classifier on the mean of the patches, which the last norm
    does not change; see `ViTForImageClassification`."""

    config_class = CLIPConfig


# -- texts


class CLIPTextNetwork(TextNetwork):
    """CLIP's text tower: a token attends to itself and those before it. The pooled output is that
    of the token that ends the text."""

    def pool(self, last_hidden_state, input_ids):
        """(B, S, D) and (B, S) -> (B, D)."""
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return last_hidden_state[rows, last_tokens(input_ids, self.config)]

    def attends(self, hidden_states):
        """Which token attends to which, (1, 1, S, S) of truth values."""
        tokens, device = hidden_states.shape[1], hidden_states.device
        return torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device).tril()


def last_tokens(input_ids, config: ViTConfig):
    """The place of the token that ends each text, (B, S) -> (B,).

    It is the first `eos_token_id`. Files of before 2023 say 2 there, whatever the vocabulary: with
    them it is the largest id, as OpenAI's own code has it.
    """
    ids = input_ids.int()
    if config.eos_token_id in (2, None):
        return ids.argmax(dim=-1)
    return (ids == config.eos_token_id).int().argmax(dim=-1)


class CLIPTextModel(TextTower, CLIPPreTrainedModel):
    """CLIP's text tower. The pooled output is that of the token that ends the text.

    Args:
        config: sizes.
        attn_implementation: see `vit_torch.attention`.
    """

    config_class = CLIPTextConfig  # type: ignore[assignment]
    text_network = CLIPTextNetwork


class CLIPTextModelWithProjection(TextTowerBase, CLIPPreTrainedModel):
    """CLIP's text tower with the projection of its pooled output to where images and texts are
    compared: `text_embeds`.

    Args:
        config: sizes.
        attn_implementation: see `vit_torch.attention`.
    """

    config_class = CLIPTextConfig  # type: ignore[assignment]
    head = "projection"

    def __init__(self, config: CLIPTextConfig, *, attn_implementation: str = "auto"):
        super().__init__(config, attn_implementation=attn_implementation)
        self.text_model = CLIPTextNetwork(**options(self))
        self.text_projection = dense(
            self, self.config.hidden_size, self.config.projection_dim, use_bias=False
        )

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ):
        """Run the network; arguments as `CLIPTextModel`.

        Returns:
            `CLIPTextModelOutput`, or its tuple with `return_dict=False`.

        Raises:
            InputError: an argument does not fit the model.
        """
        flags = self.config.resolve_flags(output_attentions, output_hidden_states, return_dict)
        outputs = self.text_model(
            input_ids,
            attention_mask,
            position_ids,
            flags.output_attentions,
            flags.output_hidden_states,
            True,
        )
        return finish(
            CLIPTextModelOutput,
            outputs,
            flags,
            text_embeds=self.text_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
        )


# -- both


class CLIPModel(TwoTowers, CLIPPreTrainedModel):
    """A whole CLIP: how alike each image is to each text.

    Args:
        config: sizes of both towers.
        attn_implementation: see `vit_torch.attention`.

    Example:
        >>> model = CLIPModel.from_pretrained("openai/clip-vit-base-patch32")
        >>> output = model(**processor(text=["a cat", "a dog"], images=image, return_tensors="pt"))
        >>> output.logits_per_image.softmax(dim=1)
    """

    text_network = CLIPTextNetwork
    output_class = CLIPOutput

    def __init__(self, config: CLIPConfig, *, attn_implementation: str = "auto"):
        super().__init__(config, attn_implementation=attn_implementation)
        config = self.config
        P, vision, text = config.projection_dim, config.vision_config, config.text_config
        self.visual_projection = dense(self, vision.hidden_size, P, use_bias=False)
        self.text_projection = dense(self, text.hidden_size, P, use_bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))

    def project_image(self, pooled):
        """(images, D) -> (images, P)."""
        return self.visual_projection(pooled)

    def project_text(self, pooled):
        """(texts, D) -> (texts, P)."""
        return self.text_projection(pooled)

    def scaled(self, product):
        """The logits (texts, images), of similarities."""
        return product * self.logit_scale.exp()

    def contrast(self, logits_per_text):
        """See `contrastive_loss`."""
        return contrastive_loss(logits_per_text)


def contrastive_loss(logits_per_text):
    """The mean cross entropy of texts among images and of images among texts, where text i belongs
    to image i (Radford et al. 2021, figure 3): similarities (texts, images)."""
    check_pairs(logits_per_text)
    logits = logits_per_text.to(torch.promote_types(logits_per_text.dtype, torch.float32))
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2
