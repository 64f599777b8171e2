"""Vision Transformers in JAX/Flax, a drop-in for the Flax classes of Transformers 4.57.6."""

from vit_common.config import ViTConfig
from vit_common.image_processor import ViTFeatureExtractor, ViTImageProcessor
from vit_flax.model import (
    FlaxViTForImageClassificationModule,
    FlaxViTForMaskedImageModelingModule,
    FlaxViTModule,
)
from vit_flax.outputs import (
    FlaxBaseModelOutput,
    FlaxBaseModelOutputWithPooling,
    FlaxMaskedImageModelingOutput,
    FlaxSequenceClassifierOutput,
)
from vit_flax.pretrained import (
    FlaxViTForImageClassification,
    FlaxViTForMaskedImageModeling,
    FlaxViTModel,
    FlaxViTPreTrainedModel,
)

__all__ = [
    "FlaxBaseModelOutput",
    "FlaxBaseModelOutputWithPooling",
    "FlaxMaskedImageModelingOutput",
    "FlaxSequenceClassifierOutput",
    "FlaxViTForImageClassification",
    "FlaxViTForImageClassificationModule",
    "FlaxViTForMaskedImageModeling",
    "FlaxViTForMaskedImageModelingModule",
    "FlaxViTModel",
    "FlaxViTModule",
    "FlaxViTPreTrainedModel",
    "ViTConfig",
    "ViTFeatureExtractor",
    "ViTImageProcessor",
]
