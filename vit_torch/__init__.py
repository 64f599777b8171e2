"""The PyTorch twins: the same networks, the same parameters, the same numbers."""

from vit_common.config import ViTConfig
from vit_common.families import (
    AutoConfig,
    BeitConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
)
from vit_common.images.auto import AutoImageProcessor
from vit_common.images.processor import ViTFeatureExtractor, ViTImageProcessor
from vit_common.images.processors import (
    BeitFeatureExtractor,
    BeitImageProcessor,
    BitImageProcessor,
    DeiTFeatureExtractor,
    DeiTImageProcessor,
)
from vit_torch.auto import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
)
from vit_torch.families import (
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitModel,
    BeitPreTrainedModel,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTForMaskedImageModeling,
    DeiTModel,
    DeiTPreTrainedModel,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2PreTrainedModel,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    Dinov2WithRegistersPreTrainedModel,
)
from vit_torch.outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    DeiTForImageClassificationWithTeacherOutput,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
    MaskedLMOutput,
)
from vit_torch.pretrained import (
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
    ViTPreTrainedModel,
)

__all__ = [
    "AutoConfig",
    "AutoImageProcessor",
    "AutoModel",
    "AutoModelForImageClassification",
    "AutoModelForMaskedImageModeling",
    "BaseModelOutput",
    "BaseModelOutputWithPooling",
    "BeitConfig",
    "BeitFeatureExtractor",
    "BeitForImageClassification",
    "BeitForMaskedImageModeling",
    "BeitImageProcessor",
    "BeitModel",
    "BeitPreTrainedModel",
    "BitImageProcessor",
    "DeiTConfig",
    "DeiTFeatureExtractor",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "DeiTForImageClassificationWithTeacherOutput",
    "DeiTForMaskedImageModeling",
    "DeiTImageProcessor",
    "DeiTModel",
    "DeiTPreTrainedModel",
    "Dinov2Config",
    "Dinov2ForImageClassification",
    "Dinov2Model",
    "Dinov2PreTrainedModel",
    "Dinov2WithRegistersConfig",
    "Dinov2WithRegistersForImageClassification",
    "Dinov2WithRegistersModel",
    "Dinov2WithRegistersPreTrainedModel",
    "ImageClassifierOutput",
    "MaskedImageModelingOutput",
    "MaskedLMOutput",
    "ViTConfig",
    "ViTFeatureExtractor",
    "ViTForImageClassification",
    "ViTForMaskedImageModeling",
    "ViTImageProcessor",
    "ViTModel",
    "ViTPreTrainedModel",
]
