"""`FlaxAutoModel` and its like: the model's class by the family of the checkpoint."""

from __future__ import annotations

from typing import Any, ClassVar

from vit_common.config import ViTConfig
from vit_common.families import CONFIG_MAPPING
from vit_convert.auto import AutoClassifierBase, AutoModelBase
from vit_flax.families import (
    FlaxBeitForImageClassification,
    FlaxBeitModel,
    FlaxCLIPForImageClassification,
    FlaxCLIPModel,
    FlaxCLIPTextModel,
    FlaxCLIPVisionModel,
    FlaxDeiTForImageClassification,
    FlaxDeiTForImageClassificationWithTeacher,
    FlaxDeiTForMaskedImageModeling,
    FlaxDeiTModel,
    FlaxDinov2ForImageClassification,
    FlaxDinov2Model,
    FlaxDinov2WithRegistersForImageClassification,
    FlaxDinov2WithRegistersModel,
    FlaxDINOv3ViTForImageClassification,
    FlaxDINOv3ViTModel,
    FlaxSiglip2ForImageClassification,
    FlaxSiglip2Model,
    FlaxSiglip2TextModel,
    FlaxSiglip2VisionModel,
    FlaxSiglipForImageClassification,
    FlaxSiglipModel,
    FlaxSiglipTextModel,
    FlaxSiglipVisionModel,
)
from vit_flax.pretrained import (
    FlaxViTForImageClassification,
    FlaxViTForMaskedImageModeling,
    FlaxViTModel,
)


class FlaxAutoModel(AutoModelBase):
    """The base network of any family; see `FlaxViTModel`."""

    classes: ClassVar = {
        "vit": FlaxViTModel,
        "deit": FlaxDeiTModel,
        "beit": FlaxBeitModel,
        "dinov2": FlaxDinov2Model,
        "dinov2_with_registers": FlaxDinov2WithRegistersModel,
        "clip": FlaxCLIPModel,
        "clip_vision_model": FlaxCLIPVisionModel,
        "clip_text_model": FlaxCLIPTextModel,
        "dinov3_vit": FlaxDINOv3ViTModel,
        "siglip": FlaxSiglipModel,
        "siglip_vision_model": FlaxSiglipVisionModel,
        "siglip_text_model": FlaxSiglipTextModel,
        "siglip2": FlaxSiglip2Model,
        "siglip2_vision_model": FlaxSiglip2VisionModel,
        "siglip2_text_model": FlaxSiglip2TextModel,
    }


class FlaxAutoImageModel(AutoModelBase):
    """The network that images go through, of any family: that of `FlaxAutoModel`, and of a model of
    images and texts its image tower. (Not a class of Transformers.)"""

    classes: ClassVar = {
        **{name: cls for name, cls in FlaxAutoModel.classes.items() if "_text_" not in name},
        "clip": FlaxCLIPVisionModel,
        "siglip": FlaxSiglipVisionModel,
        "siglip2": FlaxSiglip2VisionModel,
    }


class FlaxAutoModelForImageClassification(AutoClassifierBase):
    """The classifier of any family; see `FlaxViTForImageClassification`."""

    classes: ClassVar = {
        "vit": FlaxViTForImageClassification,
        "deit": FlaxDeiTForImageClassification,
        "beit": FlaxBeitForImageClassification,
        "dinov2": FlaxDinov2ForImageClassification,
        "dinov2_with_registers": FlaxDinov2WithRegistersForImageClassification,
        "clip": FlaxCLIPForImageClassification,
        "clip_vision_model": FlaxCLIPForImageClassification,
        "dinov3_vit": FlaxDINOv3ViTForImageClassification,
        "siglip": FlaxSiglipForImageClassification,
        "siglip_vision_model": FlaxSiglipForImageClassification,
        "siglip2": FlaxSiglip2ForImageClassification,
        "siglip2_vision_model": FlaxSiglip2ForImageClassification,
    }
    teacher: ClassVar = FlaxDeiTForImageClassificationWithTeacher


class FlaxAutoModelForMaskedImageModeling(AutoModelBase):
    """The masked autoencoder back to pixels of a ViT or DeiT; see `FlaxViTForMaskedImageModeling`.
    (BEiT predicts visual tokens: `FlaxBeitForMaskedImageModeling`.)"""

    classes: ClassVar = {
        "vit": FlaxViTForMaskedImageModeling,
        "deit": FlaxDeiTForMaskedImageModeling,
    }


def _by_config(auto: type[AutoModelBase]) -> dict[type[ViTConfig], Any]:
    return {CONFIG_MAPPING[family]: model for family, model in auto.classes.items()}


FLAX_MODEL_MAPPING = _by_config(FlaxAutoModel)
"""Class of a configuration -> class of its base network."""

FLAX_MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING = _by_config(FlaxAutoModelForImageClassification)
"""Class of a configuration -> class of its classifier."""

FlaxAutoModel.mapping = FLAX_MODEL_MAPPING
FlaxAutoModelForImageClassification.mapping = FLAX_MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
