"""DINOv3: the network of `vit_torch.model` with the fields of its configuration.

Names, calls and outputs are those of Transformers 4.57.6; the classes are known as `Dinov3ViT...`
too.
"""

from __future__ import annotations

from vit_common.families import DINOv3ViTConfig
from vit_torch.model import ViTModule
from vit_torch.pretrained import (
    ViTForImageClassification,
    ViTPreTrainedModel,
)


class DINOv3ViTPreTrainedModel(ViTPreTrainedModel):
    """Base of DINOv3's models; see `ViTPreTrainedModel`. Images of any size are taken."""

    config_class = DINOv3ViTConfig
    base_model_prefix = "dinov3_vit"


class DINOv3ViTModel(DINOv3ViTPreTrainedModel, ViTModule):
    """The base network of DINOv3; its pooled output is the class token.

    Args:
        config: sizes.
        add_pooling_layer: whether there is a pooled output; it has no parameters.
        attn_implementation: see `vit_torch.attention`.
    """

    def __init__(
        self,
        config: DINOv3ViTConfig,
        *,
        add_pooling_layer: bool = True,
        attn_implementation: str = "auto",
    ):
        super().__init__(
            config, add_pooling_layer=add_pooling_layer, attn_implementation=attn_implementation
        )


DINOv3ViTPreTrainedModel.network_class = DINOv3ViTModel


class DINOv3ViTForImageClassification(DINOv3ViTPreTrainedModel, ViTForImageClassification):
    """DINOv3 with a linear classifier on the class token joined with the mean of the patches, as in
    its authors' linear evaluation; see `ViTForImageClassification`."""


Dinov3ViTPreTrainedModel = DINOv3ViTPreTrainedModel
Dinov3ViTModel = DINOv3ViTModel
Dinov3ViTForImageClassification = DINOv3ViTForImageClassification
