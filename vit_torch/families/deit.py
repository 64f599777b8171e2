"""DeiT: the network of `vit_torch.model` with two tokens in front, and its heads.

Names, calls and outputs are those of Transformers 4.57.6.
"""

from __future__ import annotations

from vit_common.families import DeiTConfig
from vit_torch.model import (
    DeiTForImageClassificationWithTeacherModule,
)
from vit_torch.pretrained import (
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
    ViTPreTrainedModel,
)


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
