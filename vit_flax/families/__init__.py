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
from vit_flax.families.dinov3 import (
    FlaxDINOv3ViTForImageClassification,
    FlaxDinov3ViTForImageClassification,
    FlaxDINOv3ViTModel,
    FlaxDinov3ViTModel,
    FlaxDINOv3ViTPreTrainedModel,
    FlaxDinov3ViTPreTrainedModel,
)

__all__ = [
    "FlaxBeitForImageClassification",
    "FlaxBeitForImageClassificationModule",
    "FlaxBeitForMaskedImageModeling",
    "FlaxBeitModel",
    "FlaxBeitModule",
    "FlaxBeitPreTrainedModel",
    "FlaxDINOv3ViTForImageClassification",
    "FlaxDINOv3ViTModel",
    "FlaxDINOv3ViTPreTrainedModel",
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
    "FlaxDinov3ViTForImageClassification",
    "FlaxDinov3ViTModel",
    "FlaxDinov3ViTPreTrainedModel",
]
