"""Who may import whom, and what each package hands out. Every check runs a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import vit_flax
import vit_torch

FRAMEWORKS = {"jax", "jaxlib", "flax", "torch", "transformers"}
HEAVY = {*FRAMEWORKS, "numpy", "PIL", "safetensors", "huggingface_hub"}

# statement -> packages that it must not load
FORBIDDEN = {
    "import vit_common.files.checkpoint, vit_common.checks, vit_common.config, "
    "vit_common.embedded, vit_common.files.hub, vit_common.images.processor, vit_common.outputs, "
    "vit_common.parameters, "
    "vit_common.positions, vit_common.presets": {*FRAMEWORKS, "huggingface_hub"},
    "import vit_convert.detect, vit_convert.formats, vit_convert.layouts, vit_convert.load, "
    "vit_convert.rules, vit_convert.save": {*FRAMEWORKS, "huggingface_hub"},
    "from vit_flax import *": {"torch", "transformers", "huggingface_hub"},
    "import vit_flax.export": {"flax", "torch", "transformers", "huggingface_hub"},
    "import vit_flax.inference": {"torch", "transformers", "huggingface_hub"},
    "import vit_torch.auto, vit_torch.verify.diagnose, vit_torch.families, vit_torch.parity, "
    "vit_torch.verify.stages, vit_torch.verify": {
        "jax",
        "jaxlib",
        "flax",
        "vit_flax",
        "transformers",
    },
    "import vit_torch": {"jax", "jaxlib", "flax", "transformers", "huggingface_hub"},
    "import vit_cli.main": HEAVY,
}


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter has after a statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps([*sys.modules]))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in json.loads(result.stdout)}


@pytest.mark.parametrize("statement", FORBIDDEN, ids=lambda s: s.split()[1].rstrip(","))
def test_forbidden_imports(statement):
    loaded = loaded_by(statement)
    assert statement.split()[1].partition(".")[0].rstrip(",") in loaded
    assert not loaded & FORBIDDEN[statement]


def test_public_names_of_vit_flax():
    assert vit_flax.__all__ == [
        "CONFIG_MAPPING",
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
        "DeiTConfig",
        "DeiTFeatureExtractor",
        "DeiTImageProcessor",
        "DeiTImageProcessorFast",
        "Dinov2Config",
        "Dinov2WithRegistersConfig",
        "FlaxAutoModel",
        "FlaxAutoModelForImageClassification",
        "FlaxAutoModelForMaskedImageModeling",
        "FlaxBaseModelOutput",
        "FlaxBaseModelOutputWithPooling",
        "FlaxBeitForImageClassification",
        "FlaxBeitForMaskedImageModeling",
        "FlaxBeitForMaskedImageModelingModule",
        "FlaxBeitModel",
        "FlaxBeitPreTrainedModel",
        "FlaxDeiTForImageClassification",
        "FlaxDeiTForImageClassificationWithTeacher",
        "FlaxDeiTForImageClassificationWithTeacherModule",
        "FlaxDeiTForImageClassificationWithTeacherOutput",
        "FlaxDeiTForMaskedImageModeling",
        "FlaxDeiTModel",
        "FlaxDeiTPreTrainedModel",
        "FlaxDinov2ForImageClassification",
        "FlaxDinov2Model",
        "FlaxDinov2PreTrainedModel",
        "FlaxDinov2WithRegistersForImageClassification",
        "FlaxDinov2WithRegistersModel",
        "FlaxDinov2WithRegistersPreTrainedModel",
        "FlaxMaskedImageModelingOutput",
        "FlaxMaskedLMOutput",
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
        "load_image",
        "stack_layers",
        "unstack_layers",
    ]
    assert all(hasattr(vit_flax, name) for name in vit_flax.__all__)


def test_public_names_of_vit_torch():
    assert vit_torch.__all__ == [
        "CONFIG_MAPPING",
        "AutoConfig",
        "AutoFeatureExtractor",
        "AutoImageProcessor",
        "AutoModel",
        "AutoModelForImageClassification",
        "AutoModelForMaskedImageModeling",
        "BaseModelOutput",
        "BaseModelOutputWithPooling",
        "BatchFeature",
        "BeitConfig",
        "BeitFeatureExtractor",
        "BeitForImageClassification",
        "BeitForMaskedImageModeling",
        "BeitImageProcessor",
        "BeitImageProcessorFast",
        "BeitModel",
        "BeitPreTrainedModel",
        "BitImageProcessor",
        "BitImageProcessorFast",
        "DeiTConfig",
        "DeiTFeatureExtractor",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
        "DeiTForImageClassificationWithTeacherOutput",
        "DeiTForMaskedImageModeling",
        "DeiTImageProcessor",
        "DeiTImageProcessorFast",
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
        "ViTImageProcessorFast",
        "ViTModel",
        "ViTPreTrainedModel",
        "load_image",
    ]
    assert all(hasattr(vit_torch, name) for name in vit_torch.__all__)
