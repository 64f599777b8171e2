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
    }


class FlaxAutoImageModel(AutoModelBase):
    """The network that images go through, of any family: that of `FlaxAutoModel`, and of a model of
    images and texts its image tower. (Not a class of Transformers.)"""

    classes: ClassVar = {**FlaxAutoModel.classes, "clip": FlaxCLIPVisionModel}


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
