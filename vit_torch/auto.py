"""`AutoModel` and its like: the model's class by the family of the checkpoint."""

from __future__ import annotations

from typing import ClassVar

from vit_convert.auto import AutoClassifierBase, AutoModelBase
from vit_torch.families import (
    BeitForImageClassification,
    BeitModel,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTForMaskedImageModeling,
    DeiTModel,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTForImageClassification,
    DINOv3ViTModel,
)
from vit_torch.pretrained import ViTForImageClassification, ViTForMaskedImageModeling, ViTModel


class AutoModel(AutoModelBase):
    """The base network of any family; see `ViTModel`."""

    classes: ClassVar = {
        "vit": ViTModel,
        "deit": DeiTModel,
        "beit": BeitModel,
        "dinov2": Dinov2Model,
        "dinov2_with_registers": Dinov2WithRegistersModel,
        "dinov3_vit": DINOv3ViTModel,
    }


class AutoModelForImageClassification(AutoClassifierBase):
    """The classifier of any family; see `ViTForImageClassification`."""

    classes: ClassVar = {
        "vit": ViTForImageClassification,
        "deit": DeiTForImageClassification,
        "beit": BeitForImageClassification,
        "dinov2": Dinov2ForImageClassification,
        "dinov2_with_registers": Dinov2WithRegistersForImageClassification,
        "dinov3_vit": DINOv3ViTForImageClassification,
    }
    teacher: ClassVar = DeiTForImageClassificationWithTeacher


class AutoModelForMaskedImageModeling(AutoModelBase):
    """The masked autoencoder back to pixels of a ViT or DeiT; see `ViTForMaskedImageModeling`.
    (BEiT predicts visual tokens: `BeitForMaskedImageModeling`.)"""

    classes: ClassVar = {
        "vit": ViTForMaskedImageModeling,
        "deit": DeiTForMaskedImageModeling,
    }
