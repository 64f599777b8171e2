"""DINOv3: the network of `vit_flax.model` with the fields of its configuration.

Names, calls and outputs are those of Transformers 4.57.6, whose model is in PyTorch alone; the
classes are known as `FlaxDinov3ViT...` too.
"""

from __future__ import annotations

from vit_common.families import DINOv3ViTConfig
from vit_flax.pretrained import (
    FlaxViTForImageClassification,
    FlaxViTModel,
    FlaxViTPreTrainedModel,
)


class FlaxDINOv3ViTPreTrainedModel(FlaxViTPreTrainedModel):
    """Base of DINOv3's models; see `FlaxViTPreTrainedModel`. Images of any size are taken."""

    config_class = DINOv3ViTConfig
    base_model_prefix = "dinov3_vit"


class FlaxDINOv3ViTModel(FlaxDINOv3ViTPreTrainedModel, FlaxViTModel):
    """The base network of DINOv3; its pooled output is the class token. See `FlaxViTModel`."""


class FlaxDINOv3ViTForImageClassification(
    FlaxDINOv3ViTPreTrainedModel, FlaxViTForImageClassification
):
    """DINOv3 with a linear classifier on the class token joined with the mean of the patches, as in
    its authors' linear evaluation; see `FlaxViTForImageClassification`."""


FlaxDinov3ViTPreTrainedModel = FlaxDINOv3ViTPreTrainedModel
FlaxDinov3ViTModel = FlaxDINOv3ViTModel
FlaxDinov3ViTForImageClassification = FlaxDINOv3ViTForImageClassification
