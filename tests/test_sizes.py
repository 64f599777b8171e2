"""Full-size models, none of them made: names, shapes, parameters and cost against what others
published and against timm's own models on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from networks import InMemory
from timm_models import timm

import vit_flax
import vit_torch
from vit_common.config import ViTConfig
from vit_common.flops import multiply_adds
from vit_common.parameters import parameter_shapes
from vit_common.presets import PRESETS, preset
from vit_convert.formats import TREE
from vit_convert.rules import to_foreign

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "data" / "published.json"


class Model(NamedTuple):
    """A published network: its class, its configuration, and how others know it.

    Attributes:
        name: of our class, without "Flax".
        size: a preset.
        fields: of the configuration, besides the preset's.
        timm: timm's name for the same network.
        classes: of its classifier; 0 is the bare network.
        more: parameters that ours has and timm's has not, in multiples of the width.
    """

    name: str
    size: str
    fields: dict[str, Any]
    timm: str
    classes: int = 1000
    more: int = 0


BEIT = {"use_relative_position_bias": True}
DINO = {"image_size": 518, "patch_size": 14, "use_mask_token": False}
# With registers timm's class token has no position of its own; a checkpoint's is added to it.
REGISTERS = {**DINO, "num_register_tokens": 4}
GIANT = {"hidden_size": 1536, "num_attention_heads": 24, "use_swiglu_ffn": True}

MODELS = {
    "vit tiny": Model("ViTForImageClassification", "tiny", {}, "vit_tiny_patch16_224"),
    "vit small": Model("ViTForImageClassification", "small", {}, "vit_small_patch16_224"),
    "vit base": Model("ViTForImageClassification", "base", {}, "vit_base_patch16_224"),
    "vit large": Model("ViTForImageClassification", "large", {}, "vit_large_patch16_224"),
    "vit huge": Model("ViTModel", "huge", {}, "vit_huge_patch14_224", 0),
    "vit giant": Model("ViTForImageClassification", "giant", {}, "vit_giant_patch14_224"),
    "vit large 384": Model(
        "ViTForImageClassification", "large", {"image_size": 384}, "vit_large_patch16_384"
    ),
    "vit base 32": Model(
        "ViTForImageClassification", "base", {"patch_size": 32}, "vit_base_patch32_224"
    ),
    **{
        f"deit {size}": Model(
            "DeiTForImageClassificationWithTeacher",
            size,
            {},
            f"deit_{size}_distilled_patch16_224",
        )
        for size in ("tiny", "small", "base")
    },
    "beit base": Model("BeitForImageClassification", "base", BEIT, "beit_base_patch16_224"),
    "beit large": Model("BeitForImageClassification", "large", BEIT, "beit_large_patch16_224"),
    "beit large 512": Model(
        "BeitForImageClassification",
        "large",
        {**BEIT, "image_size": 512},
        "beit_large_patch16_512",
    ),
    **{
        f"dinov2 {size}": Model("Dinov2Model", size, DINO, f"vit_{size}_patch14_dinov2", 0)
        for size in ("small", "base", "large")
    },
    "dinov2 giant": Model("Dinov2Model", "giant", {**DINO, **GIANT}, "vit_giant_patch14_dinov2", 0),
    **{
        f"registers {size}": Model(
            "Dinov2WithRegistersModel", size, REGISTERS, f"vit_{size}_patch14_reg4_dinov2", 0, 1
        )
        for size in ("small", "base", "large")
    },
    "registers giant": Model(
        "Dinov2WithRegistersModel",
        "giant",
        {**REGISTERS, **GIANT},
        "vit_giant_patch14_reg4_dinov2",
        0,
        1,
    ),
}


def family_of(name: str) -> str:
    return name.split("For")[0].removesuffix("Model")


def config_of(model: Model) -> ViTConfig:
    """The configuration, of the family's class, with a preset's sizes."""
    width, depth, heads, inner, patch = PRESETS[model.size]
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "patch_size": patch,
        "num_labels": model.classes or 2,
    }
    family = family_of(model.name)
    if not family.startswith("Dinov2"):  # its MLP is four times as wide
        fields["intermediate_size"] = inner
    return getattr(vit_torch, f"{family}Config")(**{**fields, **model.fields})


def count(shapes) -> int:
    return sum(int(np.prod(shape)) for shape in shapes)


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    head = getattr(vit_torch, model.name).head
    return parameter_shapes(config_of(model), head)


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    if not PUBLISHED.is_file():
        pytest.skip("the shared published.json is not beside this clone")
    return json.loads(PUBLISHED.read_text())


def test_every_preset_is_here():
    assert {model.size for model in MODELS.values()} == set(PRESETS)
    for name in PRESETS:
        config, own = config_of(MODELS[f"vit {name}"]), preset(name)
        for field in ("hidden_size", "num_hidden_layers", "intermediate_size", "patch_size"):
            assert getattr(config, field) == getattr(own, field)


# Tracing a deep network takes seconds: each preset, each family, and what only a size changes.
TRACED = (
    *(f"vit {name}" for name in PRESETS),
    "deit tiny",
    "beit base",
    "dinov2 small",
    "dinov2 giant",
    "registers base",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.endswith(("huge", "giant")) else [])
        for name in TRACED
    ],
)
def test_the_flax_modules_parameters(name):
    """What `init` would make is what `parameter_shapes` says, in Flax's names and layouts."""
    model = MODELS[name]
    config, cls = config_of(model), getattr(vit_flax, f"Flax{model.name}")
    module = cls(config, _do_init=False).module
    height, width = config.image_height_width
    made = jax.eval_shape(
        module.init,
        jax.ShapeDtypeStruct((2,), jnp.uint32),
        jax.ShapeDtypeStruct((1, height, width, config.num_channels), jnp.float32),
    )["params"]
    got = {path: leaf.shape for path, leaf in flatten_dict(made, sep="/").items()}
    # One zero, read as if it filled the array.
    tensors = {
        path: InMemory(np.broadcast_to(np.float32(0), shape))
        for path, shape in shapes_of(model).items()
    }
    mapped = to_foreign(tensors, TREE)
    assert not mapped.unused
    assert got == {path: tensor.shape for path, tensor in mapped.tensors.items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_torch_twins_parameters(name):
    model = MODELS[name]
    with torch.device("meta"):
        twin = getattr(vit_torch, model.name)(config_of(model))
    got = {path: tuple(p.shape) for path, p in twin.named_parameters()}
    assert got == shapes_of(model)
    assert all(p.device.type == "meta" for p in twin.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_counts_of_timms_models(name):
    model = MODELS[name]
    with torch.device("meta"):
        theirs = timm.create_model(model.timm, pretrained=False, num_classes=model.classes)
    wanted = count(p.shape for p in theirs.parameters())
    config = config_of(model)
    ours = parameter_shapes(
        config, getattr(vit_torch, model.name).head, add_pooling_layer=model.classes > 0
    )
    assert count(ours.values()) - wanted == model.more * config.hidden_size


@pytest.mark.parametrize("name", MODELS)
def test_published_counts_and_cost(name, published):
    """timm's tables: millions of parameters and GMACs, each to two digits after the point."""
    model = MODELS[name]
    config = config_of(model)
    row = published["timm_gmacs_params"][f"{model.timm}@{config.image_height_width[0]}"]
    head = getattr(vit_torch, model.name).head
    shapes = parameter_shapes(config, head, add_pooling_layer=model.classes > 0)
    parameters = count(shapes.values()) - model.more * config.hidden_size
    assert parameters / 1e6 == pytest.approx(row["param_m"], abs=0.0051)
    # fvcore counts five operations for each entry of a norm.
    tokens = config.num_prefix_tokens + config.num_patches
    norms = 2 * config.num_hidden_layers + (0 if config.norm_after_pooling else 1)
    total = multiply_adds(config, head) + 5 * norms * tokens * config.hidden_size
    assert total / 1e9 == pytest.approx(row["gmacs"], abs=0.0051)


VIT_JAX = {
    "ViT-Ti_16": ("tiny", 16),
    "ViT-S_16": ("small", 16),
    "ViT-S_32": ("small", 32),
    "ViT-B_8": ("base", 8),
    "ViT-B_16": ("base", 16),
    "ViT-B_32": ("base", 32),
    "ViT-L_16": ("large", 16),
    "ViT-L_32": ("large", 32),
    "ViT-H_14": ("huge", 14),
}


@pytest.mark.parametrize("name", VIT_JAX)
def test_counts_of_googles_models(name, published):
    size, patch = VIT_JAX[name]
    config = preset(size, patch_size=patch, num_labels=1000)
    ours = count(parameter_shapes(config, "classifier").values())
    assert ours == published["vit_jax_param_counts_1000cls"][name]


# preset -> the head of the published network, and its parameters: of OpenAI's and LAION's whole
# CLIPs, and of timm 1.0.31's models (sum of `numel` over `parameters()`).
COUNTS: dict[str, tuple[Any, int]] = {
    "clip-base-32": ("towers", 151_277_313),
    "clip-base-16": ("towers", 149_620_737),
    "clip-large-14": ("towers", 427_616_513),
    "clip-large-14-336": ("towers", 427_944_193),
    "clip-huge-14": ("towers", 986_109_441),
    "eva02-tiny": (None, 5_502_144),
    "eva02-small": (None, 21_621_120),
    "eva02-base": (None, 85_758_720),
    "eva02-large": (None, 303_268_800),
    "pe-core-base": ("classifier", 93_673_984),
    "pe-core-large": ("classifier", 317_152_256),
    "r-tiny-32": ("classifier", 6_337_704),
    "r26-small-32": ("classifier", 36_431_912),
    "r50-base-16": (None, 97_890_112),
    "r50-large-32": ("classifier", 328_994_856),
    "parallel-small-18x2": ("classifier", 64_665_448),
}


@pytest.mark.parametrize("name", COUNTS)
def test_presets_have_the_published_number_of_parameters(name):
    head, published = COUNTS[name]
    classes = {} if head != "classifier" or name.startswith("pe-") else {"num_labels": 1000}
    config = preset(name, **classes)
    shapes = parameter_shapes(config, head, add_pooling_layer=config.norm_after_pooling)
    assert count(shapes.values()) == published
