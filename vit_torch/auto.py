"""`AutoModel` and its like: the model's class by the family of the checkpoint."""

from __future__ import annotations

from typing import ClassVar

from vit_convert.auto import AutoClassifierBase, AutoModelBase
from vit_torch.families import (
    BeitForImageClassification,
    BeitModel,
    CLIPForImageClassification,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModel,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTForMaskedImageModeling,
    DeiTModel,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
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
        "clip": CLIPModel,
        "clip_vision_model": CLIPVisionModel,
        "clip_text_model": CLIPTextModel,
    }


class AutoImageModel(AutoModelBase):
    """The network that images go through, of any family: that of `AutoModel`, and of a model of
    images and texts its image tower. (Not a class of Transformers.)"""

    classes: ClassVar = {**AutoModel.classes, "clip": CLIPVisionModel}


class AutoModelForImageClassification(AutoClassifierBase):
    """The classifier of any family; see `ViTForImageClassification`."""

    classes: ClassVar = {
        "vit": ViTForImageClassification,
        "deit": DeiTForImageClassification,
        "beit": BeitForImageClassification,
        "dinov2": Dinov2ForImageClassification,
        "dinov2_with_registers": Dinov2WithRegistersForImageClassification,
        "clip": CLIPForImageClassification,
        "clip_vision_model": CLIPForImageClassification,
    }
    teacher: ClassVar = DeiTForImageClassificationWithTeacher


class AutoModelForMaskedImageModeling(AutoModelBase):
    """The masked autoencoder back to pixels of a ViT or DeiT; see `ViTForMaskedImageModeling`.
    (BEiT predicts visual tokens: `BeitForMaskedImageModeling`.)"""

    classes: ClassVar = {
        "vit": ViTForMaskedImageModeling,
        "deit": DeiTForMaskedImageModeling,
    }
