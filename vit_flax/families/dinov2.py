"""DINOv2, with and without registers: the network of `vit_flax.model` with the fields of its
configurations.

Names, calls and outputs are those of Transformers 4.57.6: its Flax classes, and for registers its
PyTorch ones, as it had none in Flax.
"""

from __future__ import annotations

from vit_common.families import Dinov2Config, Dinov2WithRegistersConfig
from vit_flax.model import (
    FlaxViTForImageClassificationModule,
    FlaxViTModule,
)
from vit_flax.pretrained import (
    FlaxViTForImageClassification,
    FlaxViTModel,
    FlaxViTPreTrainedModel,
)


class FlaxDinov2PreTrainedModel(FlaxViTPreTrainedModel):
    """Base of DINOv2's models; see `FlaxViTPreTrainedModel`. Images of any size are taken:
    positions are resampled."""

    config_class = Dinov2Config
    base_model_prefix = "dinov2"


class FlaxDinov2Module(FlaxViTModule):
    """The base network of DINOv2; see `FlaxViTModule`."""


class FlaxDinov2ForImageClassificationModule(FlaxViTForImageClassificationModule):
    """DINOv2 and a classifier; see `FlaxViTForImageClassificationModule`."""


class FlaxDinov2Model(FlaxDinov2PreTrainedModel, FlaxViTModel):
    """The base network of DINOv2; its pooled output is the class token. See `FlaxViTModel`."""

    module_class = FlaxDinov2Module


class FlaxDinov2ForImageClassification(FlaxDinov2PreTrainedModel, FlaxViTForImageClassification):
    """DINOv2 with a linear classifier on the class token joined with the mean of the patches; see
    `FlaxViTForImageClassification`."""

    module_class = FlaxDinov2ForImageClassificationModule


class FlaxDinov2WithRegistersPreTrainedModel(FlaxViTPreTrainedModel):
    """Base of the models of DINOv2 with registers; see `FlaxDinov2PreTrainedModel`."""

    config_class = Dinov2WithRegistersConfig
    base_model_prefix = "dinov2_with_registers"


class FlaxDinov2WithRegistersModel(FlaxDinov2WithRegistersPreTrainedModel, FlaxViTModel):
    """The base network of DINOv2 with registers; see `FlaxDinov2Model`."""


class FlaxDinov2WithRegistersForImageClassification(
    FlaxDinov2WithRegistersPreTrainedModel, FlaxViTForImageClassification
):
    """DINOv2 with registers and a classifier; see `FlaxDinov2ForImageClassification`."""
