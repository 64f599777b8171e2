"""DeiT, BEiT and DINOv2: the network of `vit_torch.model` with the fields of their configurations.

Names, calls and outputs are those of Transformers 4.57.6.
"""

from __future__ import annotations

from vit_common.families import BeitConfig, DeiTConfig, Dinov2Config, Dinov2WithRegistersConfig
from vit_torch.model import (
    BeitForMaskedImageModelingModule,
    DeiTForImageClassificationWithTeacherModule,
    ViTModule,
)
from vit_torch.pretrained import (
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
    ViTPreTrainedModel,
)

# -- DeiT


class DeiTPreTrainedModel(ViTPreTrainedModel):
    """Base of the distilled DeiT's models; see `ViTPreTrainedModel`."""

    config_class = DeiTConfig
    base_model_prefix = "deit"


class DeiTModel(DeiTPreTrainedModel, ViTModel):
    """The base network of a distilled DeiT; see `ViTModel`."""


DeiTPreTrainedModel.network_class = DeiTModel


class DeiTForImageClassification(DeiTPreTrainedModel, ViTForImageClassification):
    """A distilled DeiT with one classifier, on the class token; see `ViTForImageClassification`.
    Published checkpoints have two: use `DeiTForImageClassificationWithTeacher` for them."""


class DeiTForMaskedImageModeling(DeiTPreTrainedModel, ViTForMaskedImageModeling):
    """A distilled DeiT with a decoder back to pixels; see `ViTForMaskedImageModeling`."""


class DeiTForImageClassificationWithTeacher(
    DeiTPreTrainedModel, DeiTForImageClassificationWithTeacherModule
):
    """A distilled DeiT with two classifiers, on the class and on the distillation token; the logits
    are their mean.

    Args:
        config: sizes.
        attn_implementation: see `vit_torch.attention`.
    """

    head = "teacher"

    def __init__(self, config: DeiTConfig, *, attn_implementation: str = "auto"):
        super().__init__(config, attn_implementation=attn_implementation)


# -- BEiT


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


# -- DINOv2


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
