"""BEiT: the network of `vit_torch.model` with the fields of its configuration.

Names, calls and outputs are those of Transformers 4.57.6.
"""

from __future__ import annotations

from vit_common.families import BeitConfig
from vit_torch.model import (
    BeitForMaskedImageModelingModule,
    ViTModule,
)
from vit_torch.pretrained import (
    ViTForImageClassification,
    ViTPreTrainedModel,
)


class BeitPreTrainedModel(ViTPreTrainedModel):
    """Base of BEiT's models; see `ViTPreTrainedModel`. Images of any size are taken: positions and
    position biases are resampled."""

    config_class = BeitConfig
    base_model_prefix = "beit"


class BeitModel(BeitPreTrainedModel, ViTModule):
    """The base network of BEiT; its pooled output is the mean of the patches through a norm, or the
    class token.

    Args:
        config: sizes.
        add_pooling_layer: whether there is a pooler.
        attn_implementation: see `vit_torch.attention`.
    """

    def __init__(
        self,
        config: BeitConfig,
        add_pooling_layer: bool = True,
        *,
        attn_implementation: str = "auto",
    ):
        super().__init__(
            config, add_pooling_layer=add_pooling_layer, attn_implementation=attn_implementation
        )


BeitPreTrainedModel.network_class = BeitModel


class BeitForImageClassification(BeitPreTrainedModel, ViTForImageClassification):
    """BEiT with a linear classifier on the pooled output; see `ViTForImageClassification`."""


class BeitForMaskedImageModeling(BeitPreTrainedModel, BeitForMaskedImageModelingModule):
    """BEiT with the prediction of a visual token for each patch.

    Args:
        config: sizes.
        attn_implementation: see `vit_torch.attention`.
    """

    head = "tokens"

    def __init__(self, config: BeitConfig, *, attn_implementation: str = "auto"):
        super().__init__(config, attn_implementation=attn_implementation)
