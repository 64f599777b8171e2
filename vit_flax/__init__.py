"""Vision Transformers in JAX/Flax, a drop-in for the Flax classes of Transformers 4.57.6.

A name is imported when it is asked for: `vit_flax.export.load` runs without Flax, and without the
second that importing it takes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_common.config import ViTConfig
    from vit_common.families import (
        CONFIG_MAPPING,
        AutoConfig,
        BeitConfig,
        CLIPConfig,
        CLIPTextConfig,
        CLIPVisionConfig,
        DeiTConfig,
        Dinov2Config,
        Dinov2WithRegistersConfig,
        DINOv3ViTConfig,
        Dinov3ViTConfig,
    )
    from vit_common.images.auto import AutoFeatureExtractor, AutoImageProcessor
    from vit_common.images.pictures import load_image
    from vit_common.images.processor import (
        BatchFeature,
        ViTFeatureExtractor,
        ViTImageProcessor,
        ViTImageProcessorFast,
    )
    from vit_common.images.processors import (
        BeitFeatureExtractor,
        BeitImageProcessor,
        BeitImageProcessorFast,
        BitImageProcessor,
        BitImageProcessorFast,
        CLIPFeatureExtractor,
        CLIPImageProcessor,
        CLIPImageProcessorFast,
        DeiTFeatureExtractor,
        DeiTImageProcessor,
        DeiTImageProcessorFast,
    )
    from vit_flax.auto import (
        FLAX_MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        FLAX_MODEL_MAPPING,
        FlaxAutoModel,
        FlaxAutoModelForImageClassification,
        FlaxAutoModelForMaskedImageModeling,
    )
    from vit_flax.families import (
        FlaxBeitForImageClassification,
        FlaxBeitForImageClassificationModule,
        FlaxBeitForMaskedImageModeling,
        FlaxBeitModel,
        FlaxBeitModule,
        FlaxBeitPreTrainedModel,
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
        FlaxDeiTForImageClassification,
        FlaxDeiTForImageClassificationWithTeacher,
        FlaxDeiTForMaskedImageModeling,
        FlaxDeiTModel,
        FlaxDeiTPreTrainedModel,
        FlaxDinov2ForImageClassification,
        FlaxDinov2ForImageClassificationModule,
        FlaxDinov2Model,
        FlaxDinov2Module,
        FlaxDinov2PreTrainedModel,
        FlaxDinov2WithRegistersForImageClassification,
        FlaxDinov2WithRegistersModel,
        FlaxDinov2WithRegistersPreTrainedModel,
        FlaxDINOv3ViTForImageClassification,
        FlaxDinov3ViTForImageClassification,
        FlaxDINOv3ViTModel,
        FlaxDinov3ViTModel,
        FlaxDINOv3ViTPreTrainedModel,
        FlaxDinov3ViTPreTrainedModel,
    )
    from vit_flax.model import (
        FlaxBeitForMaskedImageModelingModule,
        FlaxDeiTForImageClassificationWithTeacherModule,
        FlaxViTForImageClassificationModule,
        FlaxViTForMaskedImageModelingModule,
        FlaxViTModule,
    )
    from vit_flax.outputs import (
        FlaxBaseModelOutput,
        FlaxBaseModelOutputWithPooling,
        FlaxBeitModelOutputWithPooling,
        FlaxCLIPOutput,
        FlaxCLIPTextModelOutput,
        FlaxCLIPVisionModelOutput,
        FlaxDeiTForImageClassificationWithTeacherOutput,
        FlaxMaskedImageModelingOutput,
        FlaxMaskedLMOutput,
        FlaxSequenceClassifierOutput,
    )
    from vit_flax.params import from_transformers_tree, to_transformers_tree
    from vit_flax.pretrained import (
        FlaxPreTrainedModel,
        FlaxViTForImageClassification,
        FlaxViTForMaskedImageModeling,
        FlaxViTModel,
        FlaxViTPreTrainedModel,
    )
    from vit_flax.stacked import stack_layers, unstack_layers

__all__ = [
    "CONFIG_MAPPING",
    "FLAX_MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "FLAX_MODEL_MAPPING",
    "AutoConfig",
    "AutoFeatureExtractor",
    "AutoImageProcessor",
    "BatchFeature",
    "BeitConfig",
    "BeitFeatureExtractor",
    "BeitImageProcessor",
    "BeitImageProcessorFast",
    "BitImageProcessor",
    "BitImageProcessorFast",
    "CLIPConfig",
    "CLIPFeatureExtractor",
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "DINOv3ViTConfig",
    "DeiTConfig",
    "DeiTFeatureExtractor",
    "DeiTImageProcessor",
    "DeiTImageProcessorFast",
    "Dinov2Config",
    "Dinov2WithRegistersConfig",
    "Dinov3ViTConfig",
    "FlaxAutoModel",
    "FlaxAutoModelForImageClassification",
    "FlaxAutoModelForMaskedImageModeling",
    "FlaxBaseModelOutput",
    "FlaxBaseModelOutputWithPooling",
    "FlaxBeitForImageClassification",
    "FlaxBeitForImageClassificationModule",
    "FlaxBeitForMaskedImageModeling",
    "FlaxBeitForMaskedImageModelingModule",
    "FlaxBeitModel",
    "FlaxBeitModelOutputWithPooling",
    "FlaxBeitModule",
    "FlaxBeitPreTrainedModel",
    "FlaxCLIPForImageClassification",
    "FlaxCLIPForImageClassificationModule",
    "FlaxCLIPModel",
    "FlaxCLIPModule",
    "FlaxCLIPOutput",
    "FlaxCLIPPreTrainedModel",
    "FlaxCLIPTextModel",
    "FlaxCLIPTextModelOutput",
    "FlaxCLIPTextModelWithProjection",
    "FlaxCLIPTextModelWithProjectionModule",
    "FlaxCLIPTextModule",
    "FlaxCLIPTextPreTrainedModel",
    "FlaxCLIPVisionModel",
    "FlaxCLIPVisionModelOutput",
    "FlaxCLIPVisionModelWithProjection",
    "FlaxCLIPVisionModelWithProjectionModule",
    "FlaxCLIPVisionModule",
    "FlaxCLIPVisionPreTrainedModel",
    "FlaxDINOv3ViTForImageClassification",
    "FlaxDINOv3ViTModel",
    "FlaxDINOv3ViTPreTrainedModel",
    "FlaxDeiTForImageClassification",
    "FlaxDeiTForImageClassificationWithTeacher",
    "FlaxDeiTForImageClassificationWithTeacherModule",
    "FlaxDeiTForImageClassificationWithTeacherOutput",
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
    "FlaxMaskedImageModelingOutput",
    "FlaxMaskedLMOutput",
    "FlaxPreTrainedModel",
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
    "ViTImageProcessorFast",
    "from_transformers_tree",
    "load_image",
    "stack_layers",
    "to_transformers_tree",
    "unstack_layers",
]

_HOMES = (
    "vit_common.config",
    "vit_common.families",
    "vit_common.images.processor",
    "vit_common.images.processors",
    "vit_common.images.auto",
    "vit_common.images.pictures",
    "vit_flax.outputs",
    "vit_flax.model",
    "vit_flax.pretrained",
    "vit_flax.families",
    "vit_flax.auto",
    "vit_flax.stacked",
    "vit_flax.params",
)
_MODULES = ("attention", "auto", "families", "model", "nnx", "outputs", "pretrained")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"vit_flax.{name}")
    if name in __all__:
        for home in _HOMES:
            module = importlib.import_module(home)
            if name in vars(module):
                globals()[name] = value = vars(module)[name]
                return value
    if name.startswith("FlaxViT"):  # the parts of a network, for scripts that build their own
        part = vars(importlib.import_module("vit_flax.model")).get(name)
        if part is not None:
            return part
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
