"""The families beside ViT: each one's classes, around the one network of `vit_flax.model`.

One file per family; everything public is importable from here.
"""

from vit_flax.families.beit import (
    FlaxBeitForImageClassification,
    FlaxBeitForImageClassificationModule,
    FlaxBeitForMaskedImageModeling,
    FlaxBeitModel,
    FlaxBeitModule,
    FlaxBeitPreTrainedModel,
)
from vit_flax.families.clip import (
    FlaxCLIPForImageClassification,
    FlaxCLIPForImageClassificationModule,
    FlaxCLIPModel,
    FlaxCLIPModule,
    FlaxCLIPPreTrainedModel,
    FlaxCLIPTextModel,
    FlaxCLIPTextModelWithProjection,
    FlaxCLIPTextModelWithProjectionModule,
    FlaxCLIPTextModule,
    FlaxCLIPTextPreTrainedModel,
    FlaxCLIPVisionModel,
    FlaxCLIPVisionModelWithProjection,
    FlaxCLIPVisionModelWithProjectionModule,
    FlaxCLIPVisionModule,
    FlaxCLIPVisionPreTrainedModel,
)
from vit_flax.families.deit import (
    FlaxDeiTForImageClassification,
    FlaxDeiTForImageClassificationWithTeacher,
    FlaxDeiTForMaskedImageModeling,
    FlaxDeiTModel,
    FlaxDeiTPreTrainedModel,
)
from vit_flax.families.dinov2 import (
    FlaxDinov2ForImageClassification,
    FlaxDinov2ForImageClassificationModule,
    FlaxDinov2Model,
    FlaxDinov2Module,
    FlaxDinov2PreTrainedModel,
    FlaxDinov2WithRegistersForImageClassification,
    FlaxDinov2WithRegistersModel,
    FlaxDinov2WithRegistersPreTrainedModel,
)

__all__ = [
    "FlaxBeitForImageClassification",
    "FlaxBeitForImageClassificationModule",
    "FlaxBeitForMaskedImageModeling",
    "FlaxBeitModel",
    "FlaxBeitModule",
    "FlaxBeitPreTrainedModel",
    "FlaxCLIPForImageClassification",
    "FlaxCLIPForImageClassificationModule",
    "FlaxCLIPModel",
    "FlaxCLIPModule",
    "FlaxCLIPPreTrainedModel",
    "FlaxCLIPTextModel",
    "FlaxCLIPTextModelWithProjection",
    "FlaxCLIPTextModelWithProjectionModule",
    "FlaxCLIPTextModule",
    "FlaxCLIPTextPreTrainedModel",
    "FlaxCLIPVisionModel",
    "FlaxCLIPVisionModelWithProjection",
    "FlaxCLIPVisionModelWithProjectionModule",
    "FlaxCLIPVisionModule",
    "FlaxCLIPVisionPreTrainedModel",
    "FlaxDeiTForImageClassification",
    "FlaxDeiTForImageClassificationWithTeacher",
    "FlaxDeiTForMaskedImageModeling",
    "FlaxDeiTModel",
    "FlaxDeiTPreTrainedModel",
    "FlaxDinov2ForImageClassification",
    "FlaxDinov2ForImageClassificationModule",
    "FlaxDinov2Model",
    "FlaxDinov2Module",
    "FlaxDinov2PreTrainedModel",
    "FlaxDinov2WithRegistersForImageClassification",
    "FlaxDinov2WithRegistersModel",
    "FlaxDinov2WithRegistersPreTrainedModel",
]
