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
    DINOv3ViTForImageClassification,
    DINOv3ViTModel,
    Siglip2ForImageClassification,
    Siglip2Model,
    Siglip2TextModel,
    Siglip2VisionModel,
    SiglipForImageClassification,
    SiglipModel,
    SiglipTextModel,
    SiglipVisionModel,
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
        "dinov3_vit": DINOv3ViTModel,
        "siglip": SiglipModel,
        "siglip_vision_model": SiglipVisionModel,
        "siglip_text_model": SiglipTextModel,
        "siglip2": Siglip2Model,
        "siglip2_vision_model": Siglip2VisionModel,
        "siglip2_text_model": Siglip2TextModel,
    }


class AutoImageModel(AutoModelBase):
    """The network that images go through, of any family: that of `AutoModel`, and of a model of
    images and texts its image tower. (Not a class of Transformers.)"""

    classes: ClassVar = {
        **{name: cls for name, cls in AutoModel.classes.items() if "_text_" not in name},
        "clip": CLIPVisionModel,
        "siglip": SiglipVisionModel,
        "siglip2": Siglip2VisionModel,
    }


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
        "dinov3_vit": DINOv3ViTForImageClassification,
        "siglip": SiglipForImageClassification,
        "siglip_vision_model": SiglipForImageClassification,
        "siglip2": Siglip2ForImageClassification,
        "siglip2_vision_model": Siglip2ForImageClassification,
    }
    teacher: ClassVar = DeiTForImageClassificationWithTeacher


class AutoModelForMaskedImageModeling(AutoModelBase):
    """The masked autoencoder back to pixels of a ViT or DeiT; see `ViTForMaskedImageModeling`.
    (BEiT predicts visual tokens: `BeitForMaskedImageModeling`.)"""

    classes: ClassVar = {
        "vit": ViTForMaskedImageModeling,
        "deit": DeiTForMaskedImageModeling,
    }
