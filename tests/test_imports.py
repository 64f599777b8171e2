"""Who may import whom, and what each package hands out.

What an import loads is checked in a fresh interpreter; what a file may import at all is read from
its source, so that an import inside a function counts too.
"""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

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


def test_evaluation_and_probes_do_without_optax():
    """They are commands of the extra `cli` alone."""
    loaded = loaded_by(
        "import sys\nsys.modules['optax'] = None\nimport vit_flax.training as training\n"
        "from vit_common.errors import InputError\n"
        "try: training.make_optimizer(training.recipe(), {}, steps=1)\n"
        "except InputError as error: assert 'optax' in str(error)"
    )
    assert "vit_flax" in loaded


ROOT = Path(__file__).parents[1]
PRODUCT = ("vit_common", "convert", "vit_flax", "vit_torch", "vit_cli")
PEERS = {"jax", "jaxlib", "flax", "transformers"}


def module_of(path: Path) -> str:
    """The dotted name of a product file; the folder convert/ is imported as vit_convert."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("vit_convert", *parts[1:]) if parts[0] == "convert" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_of(path): path for folder in PRODUCT for path in sorted((ROOT / folder).rglob("*.py"))
}


def test_no_module_of_vit_torch_loads_jax():
    names = [name for name in FILES if name.partition(".")[0] == "vit_torch"]
    assert {"vit_torch.model", "vit_torch.verify.compare", "vit_torch.parity"} <= {*names}
    assert not loaded_by(f"import {', '.join(names)}") & {*PEERS, "vit_flax"}


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


@functools.cache
def imports_of(module: str) -> dict[str, int]:
    """Dotted names that a file imports, wherever in it, with their lines; what is only for type
    checkers aside. `from a.b import c` is a.b.c where that is a module, a.b where not."""
    found: dict[str, int] = {}

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.setdefault(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.setdefault(name if name in FILES else str(node.module), node.lineno)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree_of(module))
    return found


def inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


# who -> (what it must not import, what of that it may)
NEVER = {
    "vit_common": (("vit_convert", "vit_flax", "vit_torch", "vit_cli"), ()),
    "vit_convert": (("vit_flax", "vit_torch", "vit_cli"), ()),
    "vit_convert.formats": (("vit_convert",), ("vit_convert.formats", "vit_convert.layouts")),
    "vit_flax": (("vit_torch", "vit_cli", "torch"), ()),
    "vit_flax.training": (("vit_flax.inference",), ()),
    "vit_torch": (("vit_cli",), ()),
    "vit_torch outside verify": (("vit_flax", "jax", "jaxlib", "flax"), ()),
    "vit_cli.terminal": (("vit_cli",), ("vit_cli.terminal",)),
}

# What breaks a rule today: to be emptied, never to grow.
_NOT_YET: set[str] = set()


def members(who: str) -> list[str]:
    package, _, but = who.partition(" outside ")
    names = [name for name in FILES if inside(name, (package,))]
    return [name for name in names if not but or not inside(name, (f"{package}.{but}",))]


@pytest.mark.parametrize("who", NEVER)
def test_who_never_imports_whom(who):
    if who == "vit_flax.training" and not members(who):
        pytest.skip("there is no vit_flax/training yet")
    forbidden, but = NEVER[who]
    assert members(who)
    odd = {
        f"{module} -> {name}"
        for module in members(who)
        for name in imports_of(module)
        if inside(name, forbidden) and not inside(name, but)
    }
    assert odd - _NOT_YET == set()


def test_no_import_circles():
    """Imports inside functions count. That a package's face imports its own modules, and they
    their siblings, is no circle; that a module imports the face of the package it is in is one."""
    below = {
        module: {name for name in imports_of(module) if name in FILES and name != module}
        for module in FILES
    }
    circles, done = [], set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            circles.append(" -> ".join((*path[path.index(module) :], module)))
        elif module not in done:
            for name in sorted(below[module]):
                walk(name, (*path, module))
            done.add(module)

    for module in FILES:
        walk(module, ())
    assert {*circles} - _NOT_YET == set()


def test_no_folder_has_more_than_16_files():
    """Files that a reader must choose from, so a package's face does not count."""
    counts = Counter(path.parent for path in FILES.values() if path.name != "__init__.py")
    crowded = {str(folder.relative_to(ROOT)): n for folder, n in counts.items() if n > 16}
    assert crowded == {}


def test_stacklevel_is_never_counted_by_hand():
    """One more frame on the way and a warning names the wrong line."""
    odd = {
        f"{module}: {ast.unparse(keyword)}"
        for module in FILES
        for call in ast.walk(tree_of(module))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "stacklevel"
        and isinstance(keyword.value, ast.Constant)
        and keyword.value.value not in (1, 2)
    }
    assert odd - _NOT_YET == set()


def test_public_names_of_vit_flax():
    assert vit_flax.__all__ == [
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
        "DINOv3ViTImageProcessorFast",
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
        "FlaxSiglip2ForImageClassification",
        "FlaxSiglip2Model",
        "FlaxSiglip2Module",
        "FlaxSiglip2Output",
        "FlaxSiglip2PreTrainedModel",
        "FlaxSiglip2TextModel",
        "FlaxSiglip2VisionModel",
        "FlaxSiglip2VisionPreTrainedModel",
        "FlaxSiglipForImageClassification",
        "FlaxSiglipForImageClassificationModule",
        "FlaxSiglipModel",
        "FlaxSiglipModule",
        "FlaxSiglipOutput",
        "FlaxSiglipPreTrainedModel",
        "FlaxSiglipTextModel",
        "FlaxSiglipTextModule",
        "FlaxSiglipTextPreTrainedModel",
        "FlaxSiglipVisionModel",
        "FlaxSiglipVisionModule",
        "FlaxSiglipVisionPreTrainedModel",
        "FlaxViTForImageClassification",
        "FlaxViTForImageClassificationModule",
        "FlaxViTForMaskedImageModeling",
        "FlaxViTForMaskedImageModelingModule",
        "FlaxViTModel",
        "FlaxViTModule",
        "FlaxViTPreTrainedModel",
        "Siglip2Config",
        "Siglip2TextConfig",
        "Siglip2VisionConfig",
        "SiglipConfig",
        "SiglipImageProcessor",
        "SiglipImageProcessorFast",
        "SiglipTextConfig",
        "SiglipVisionConfig",
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
        "CLIPConfig",
        "CLIPFeatureExtractor",
        "CLIPForImageClassification",
        "CLIPImageProcessor",
        "CLIPImageProcessorFast",
        "CLIPModel",
        "CLIPOutput",
        "CLIPPreTrainedModel",
        "CLIPTextConfig",
        "CLIPTextModel",
        "CLIPTextModelOutput",
        "CLIPTextModelWithProjection",
        "CLIPVisionConfig",
        "CLIPVisionModel",
        "CLIPVisionModelOutput",
        "CLIPVisionModelWithProjection",
        "DINOv3ViTConfig",
        "DINOv3ViTForImageClassification",
        "DINOv3ViTImageProcessorFast",
        "DINOv3ViTModel",
        "DINOv3ViTPreTrainedModel",
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
        "Dinov3ViTConfig",
        "Dinov3ViTForImageClassification",
        "Dinov3ViTModel",
        "Dinov3ViTPreTrainedModel",
        "ImageClassifierOutput",
        "MaskedImageModelingOutput",
        "MaskedLMOutput",
        "Siglip2Config",
        "Siglip2ForImageClassification",
        "Siglip2Model",
        "Siglip2Output",
        "Siglip2PreTrainedModel",
        "Siglip2TextConfig",
        "Siglip2TextModel",
        "Siglip2VisionConfig",
        "Siglip2VisionModel",
        "SiglipConfig",
        "SiglipForImageClassification",
        "SiglipImageProcessor",
        "SiglipImageProcessorFast",
        "SiglipModel",
        "SiglipOutput",
        "SiglipPreTrainedModel",
        "SiglipTextConfig",
        "SiglipTextModel",
        "SiglipVisionConfig",
        "SiglipVisionModel",
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
