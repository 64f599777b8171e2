"""DINOv2, with and without registers: the network of `vit_torch.model` with the fields of its
configurations.

Names, calls and outputs are those of Transformers 4.57.6.
"""

from __future__ import annotations

from vit_common.families import Dinov2Config, Dinov2WithRegistersConfig
from vit_torch.model import (
    ViTModule,
)
from vit_torch.pretrained import (
    ViTForImageClassification,
    ViTPreTrainedModel,
)


class Dinov2PreTrainedModel(ViTPreTrainedModel):
    """Base of DINOv2's models; see `ViTPreTrainedModel`. Images of any size are taken: positions
    are resampled."""

    config_class = Dinov2Config
    base_model_prefix = "dinov2"


class Dinov2Model(Dinov2PreTrainedModel, ViTModule):
    """The base network of DINOv2; its pooled output is the class token.

    Args:
        config: sizes.
        add_pooling_layer: whether there is a pooled output; it has no parameters.
        attn_implementation: see `vit_torch.attention`.
    """

    def __init__(
        self,
        config: Dinov2Config,
        *,
        add_pooling_layer: bool = True,
        attn_implementation: str = "auto",
    ):
        super().__init__(
            config, add_pooling_layer=add_pooling_layer, attn_implementation=attn_implementation
        )


Dinov2PreTrainedModel.network_class = Dinov2Model


class Dinov2ForImageClassification(Dinov2PreTrainedModel, ViTForImageClassification):
    """DINOv2 with a linear classifier on the class token joined with the mean of the patches; see
    `ViTForImageClassification`."""


class Dinov2WithRegistersPreTrainedModel(Dinov2PreTrainedModel):
    """Base of the models of DINOv2 with registers; see `Dinov2PreTrainedModel`."""

    config_class = Dinov2WithRegistersConfig
    base_model_prefix = "dinov2_with_registers"


class Dinov2WithRegistersModel(Dinov2WithRegistersPreTrainedModel, Dinov2Model):
    """The base network of DINOv2 with registers; see `Dinov2Model`."""


Dinov2WithRegistersPreTrainedModel.network_class = Dinov2WithRegistersModel


class Dinov2WithRegistersForImageClassification(
    Dinov2WithRegistersPreTrainedModel, ViTForImageClassification
):
    """DINOv2 with registers and a classifier; see `Dinov2ForImageClassification`."""
