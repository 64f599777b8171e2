"""SigLIP and SigLIP 2: the network of `vit_torch.model` with attention pooling as the image tower,
and its blocks as the text tower.

Names, calls and outputs are those of Transformers 4.57.6. SigLIP 2 for images of any size takes
images (B, C, H, W), or patches as Transformers' image processor makes them, of one size in a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vit_common.checks import Interpolate, patch_grid
from vit_common.config import ViTConfig
from vit_common.families import (
    Siglip2Config,
    Siglip2TextConfig,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
)
from vit_torch.arguments import check_tensors
from vit_torch.families.towers import (
    ImageTower,
    ImageTowerClassifier,
    TextNetwork,
    TextTower,
    TwoTowers,
    check_pairs,
)
from vit_torch.layers import dense
from vit_torch.model import ViTModule
from vit_torch.outputs import Siglip2Output, SiglipOutput
from vit_torch.pretrained import ViTPreTrainedModel


class SiglipPreTrainedModel(ViTPreTrainedModel):
    """Base of SigLIP's models; see `ViTPreTrainedModel`."""

    config_class = SiglipConfig
    base_model_prefix = "vision_model"
    network_class = ViTModule


class SiglipVisionModel(ImageTower, SiglipPreTrainedModel):
    """SigLIP's image tower. The pooled output is that of attention pooling; there is none where
    `config.vision_use_head` is False.

    Args:
        config: sizes.
        add_pooling_layer: whether there is a pooled output.
        attn_implementation: see `vit_torch.attention`.

    Example:
        >>> model = SiglipVisionModel.from_pretrained("google/siglip-base-patch16-224")
        >>> model(pixel_values).pooler_output.shape
    """

    config_class = SiglipVisionConfig  # type: ignore[assignment]


class SiglipForImageClassification(ImageTowerClassifier, SiglipPreTrainedModel):
    """SigLIP's image tower with a linear classifier on the mean of the patches, which attention
    pooling has no part in; see `ViTForImageClassification`."""

    config_class = SiglipConfig


class SiglipTextNetwork(TextNetwork):
    """SigLIP's text tower. The pooled output is a projection of the last token, padding or not: it
    was trained on texts padded to `max_position_embeddings`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.head = dense(self, self.config.hidden_size, self.config.projection_size)

    def pool(self, last_hidden_state, input_ids):
        """(B, S, D) and (B, S) -> (B, projection_size)."""
        return self.head(last_hidden_state[:, -1])


class SiglipTextModel(TextTower, SiglipPreTrainedModel):
    """SigLIP's text tower. The pooled output is a projection of the last token.

    Args:
        config: sizes.
        attn_implementation: see `vit_torch.attention`.
    """

    config_class = SiglipTextConfig  # type: ignore[assignment]
    text_network = SiglipTextNetwork


class SiglipModel(TwoTowers, SiglipPreTrainedModel):
    """A whole SigLIP: how alike each image is to each text, each pair by itself.

    Args:
        config: sizes of both towers.
        attn_implementation: see `vit_torch.attention`.

    Example:
        >>> model = SiglipModel.from_pretrained("google/siglip-base-patch16-224")
        >>> texts = processor(text=["a cat", "a dog"], padding="max_length", images=image, ...)
        >>> model(**texts).logits_per_image.sigmoid()
    """

    text_network = SiglipTextNetwork
    output_class = SiglipOutput

    def __init__(self, config: SiglipConfig, *, attn_implementation: str = "auto"):
        super().__init__(config, attn_implementation=attn_implementation)
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.logit_bias = nn.Parameter(torch.zeros(1))

    def scaled(self, product):
        """The logits (texts, images), of similarities."""
        return product * self.logit_scale.exp() + self.logit_bias

    def contrast(self, logits_per_text):
        """See `sigmoid_loss`."""
        return sigmoid_loss(logits_per_text)


def sigmoid_loss(logits_per_text):
    """The sum over the images of the binary cross entropies of a text with each, its mean over the
    texts; text i belongs to image i (Zhai et al. 2023, algorithm 1): logits (texts, images)."""
    check_pairs(logits_per_text)
    logits = logits_per_text.to(torch.promote_types(logits_per_text.dtype, torch.float32))
    own = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(own * logits).sum(dim=-1).mean()


# -- SigLIP 2 for images of any size


def images_of(pixel_values, spatial_shapes, config: ViTConfig):
    """Images (B, C, H, W), where patches are given (B, N, P P C), channels last, as `unfold` of an
    image processor makes them; what pads them is left out. Images come back as they are.

    Raises:
        InputError: the patches are not those of images of one size.
    """
    if pixel_values is None or pixel_values.ndim != 3:
        return pixel_values
    check_tensors(pixel_values=pixel_values, spatial_shapes=spatial_shapes)
    shapes = None if spatial_shapes is None else spatial_shapes.tolist()
    rows, columns = patch_grid(tuple(pixel_values.shape), shapes, config)
    (P, Q), C = config.patch_height_width, config.num_channels
    patches = pixel_values[:, : rows * columns].reshape(-1, rows, columns, P, Q, C)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, C, rows * P, columns * Q)


class Siglip2PreTrainedModel(ViTPreTrainedModel):
    """Base of SigLIP 2's models; see `ViTPreTrainedModel`."""

    config_class = Siglip2Config
    base_model_prefix = "vision_model"
    network_class = ViTModule


class Siglip2VisionModel(ImageTower, Siglip2PreTrainedModel):
    """SigLIP 2's image tower; see `SiglipVisionModel`. Positions are resampled to the images.

    Args:
        config: sizes.
        add_pooling_layer: whether there is a pooled output.
        attn_implementation: see `vit_torch.attention`.
    """

    config_class = Siglip2VisionConfig  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self,
        pixel_values=None,
        pixel_attention_mask=None,
        spatial_shapes=None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        head_mask=None,
        interpolate_pos_encoding: Interpolate = None,
    ):
        """Run the network; arguments as `ViTModel`, and

        Args:
            pixel_values: images (B, C, H, W), or patches (B, N, P P C).
            pixel_attention_mask: of patches, as Transformers' image processor makes it; where the
                images lie, `spatial_shapes` says.
            spatial_shapes: (B, 2), rows and columns of the patches of each image; needed for
                patches, and the same for all images.

        Returns:
            `BaseModelOutputWithPooling`, or its tuple with `return_dict=False`. Padding has no
            hidden states.

        Raises:
            InputError: an argument does not fit the model.
        """
        return super().forward(
            images_of(pixel_values, spatial_shapes, self.config),
            output_attentions,
            output_hidden_states,
            interpolate_pos_encoding,
            return_dict,
            head_mask=head_mask,
        )


class Siglip2ForImageClassification(ImageTowerClassifier, Siglip2PreTrainedModel):
    """SigLIP 2's image tower with a linear classifier on the mean of the patches; see
    `SiglipForImageClassification`."""

    config_class = Siglip2Config

    def forward(  # type: ignore[override]
        self,
        pixel_values=None,
        pixel_attention_mask=None,
        spatial_shapes=None,
        labels=None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        head_mask=None,
        interpolate_pos_encoding: Interpolate = None,
    ):
        """Run the network; arguments as `ViTForImageClassification` and `Siglip2VisionModel`, in
        the order of Transformers' class."""
        return super().forward(
            images_of(pixel_values, spatial_shapes, self.config),
            labels,
            output_attentions,
            output_hidden_states,
            return_dict,
            head_mask=head_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )


class Siglip2TextModel(TextTower, Siglip2PreTrainedModel):
    """SigLIP 2's text tower; see `SiglipTextModel`.

    Args:
        config: sizes.
        attn_implementation: see `vit_torch.attention`.
    """

    config_class = Siglip2TextConfig  # type: ignore[assignment]
    text_network = SiglipTextNetwork


class Siglip2Model(SiglipModel, Siglip2PreTrainedModel):
    """A whole SigLIP 2; see `SiglipModel`.

    Args:
        config: sizes of both towers.
        attn_implementation: see `vit_torch.attention`.
    """

    config_class = Siglip2Config  # type: ignore[assignment]
    output_class = Siglip2Output

    def forward(  # type: ignore[override]
        self,
        input_ids=None,
        pixel_values=None,
        pixel_attention_mask=None,
        spatial_shapes=None,
        attention_mask=None,
        position_ids=None,
        return_loss: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ):
        """Run both towers; arguments as `SiglipModel` and `Siglip2VisionModel`."""
        return super().forward(
            input_ids,
            images_of(pixel_values, spatial_shapes, self.config),
            attention_mask,
            position_ids,
            return_loss,
            output_attentions,
            output_hidden_states,
            return_dict=return_dict,
            **kwargs,
        )

    def get_image_features(  # type: ignore[override]
        self,
        pixel_values,
        pixel_attention_mask=None,
        spatial_shapes=None,
        *,
        interpolate_pos_encoding: Interpolate = None,
    ):
        """The pooled output of images, (images, P), not normalised; arguments as a call's."""
        images = images_of(pixel_values, spatial_shapes, self.config)
        return super().get_image_features(images, interpolate_pos_encoding)
