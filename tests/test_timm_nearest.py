"""Networks written for timm, which builds them by the nearest of its names and reads them back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from networks import SMALL, images, random_weights, torch_twin
from timm_models import timm
from tolerances import BOUNDS

import vit_torch
from vit_common.config import ViTConfig
from vit_common.errors import InputError
from vit_common.families import BeitConfig, DeiTConfig
from vit_convert import convert
from vit_convert.formats.timm import nearest

AS_TIMM = {"layer_norm_eps": 1e-6, "image_size": (16, 24), "num_labels": 5}
MEAN = {"pooling": "mean", "norm_after_pooling": True}
PRE = {"use_pre_norm": True, "use_patch_bias": False}

# name -> timm's class, what differs from `SMALL`
WRITTEN = {
    "rotary positions, registers, gated": (
        "Eva",
        {
            "rope_type": "dinov3",
            "rope_theta": 100.0,
            "rope_rotate_half": True,
            "num_register_tokens": 2,
            "use_swiglu_ffn": True,
            "layer_scale_init_value": 0.1,
            "use_mlp_layer_scale": False,
            "use_absolute_position_embeddings": False,
            "norm_type": "rmsnorm",
            "use_qk_norm": True,
        },
    ),
    "parallel, attention pooling": (
        "VisionTransformer",
        {"block_type": "parallel", "norm_type": "rmsnorm", "use_qk_norm": True, "pooling": "map"},
    ),
    "relative positions by an MLP": (
        "VisionTransformerRelPos",
        {
            "use_relative_position_bias": True,
            "relative_position_type": "mlp",
            "use_absolute_position_embeddings": False,
            "use_cls_token": False,
            **MEAN,
        },
    ),
    "mixed rotary positions, attention pooling of all tokens": (
        "Eva",
        {
            "rope_type": "mixed",
            "rope_theta": 10.0,
            "rope_grid_indexing": "xy",
            "pooling": "map",
            "pooler_num_heads": 2,
            "pooler_intermediate_size": 40,
            "pool_prefix_tokens": True,
            **PRE,
        },
    ),
    "EVA-02": (
        "Eva",
        {
            "rope_type": "axial",
            "rope_grid_size": (3, 5),
            "rope_grid_offset": 1.0,
            "use_key_bias": False,
            "use_swiglu_ffn": True,
            "use_mlp_norm": True,
            "use_attention_norm": True,
            **MEAN,
        },
    ),
    "no bias of the key": ("Eva", {"use_key_bias": False, "block_type": "post_norm"}),
    "parallel, differential": (
        "VisionTransformer",
        {"block_type": "parallel", "attention_type": "differential", "proj_bias": False},
    ),
    "branches, differential": (
        "VisionTransformer",
        {"num_parallel_branches": 2, "attention_type": "differential", "num_channels": 1},
    ),
    "CLIP's": ("VisionTransformer", {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, **PRE}),
    "a gated MLP, no norm at the end": (
        "VisionTransformer",
        {"use_swiglu_ffn": True, "use_final_norm": False, "hidden_act": "relu"},
    ),
    "no positions": ("VisionTransformer", {"use_absolute_position_embeddings": False}),
    "norms inside": (
        "VisionTransformer",
        {"use_qk_norm": True, "use_attention_norm": True, "use_mlp_norm": True},
    ),
    "norms after": ("VisionTransformer", {"block_type": "post_norm", "hidden_act": "selu"}),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_timm_builds_what_is_written_for_it(name, tmp_path):
    """And its file alone says what the network is."""
    cls, fields = WRITTEN[name]
    config = ViTConfig(**{**SMALL, **AS_TIMM, **fields})
    weights = random_weights(config, "classifier")
    twin = torch_twin(vit_torch.ViTForImageClassification, config, weights)
    twin.save_pretrained(tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "timm", to="timm")
    peer = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert type(peer).__name__ == cls
    path = tmp_path / "timm" / "config.json"
    table = json.loads(path.read_text())
    del table["vit_flax"]
    path.write_text(json.dumps(table))
    again = vit_torch.AutoModelForImageClassification.from_pretrained(tmp_path / "timm")
    x = torch.tensor(images(config, 2), dtype=torch.float32)
    with torch.no_grad():
        want, got, read = peer(x).numpy(), twin(x).logits.numpy(), again(x).logits.numpy()
    bound = BOUNDS["reference float32"]
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)
    np.testing.assert_allclose(read, want, rtol=0, atol=bound)


REFUSED = {
    "exact GELU": (ViTConfig, {"rope_type": "axial", "hidden_act": "relu"}),
    "blocks one after the other": (ViTConfig, {"rope_type": "axial", "block_type": "parallel"}),
    "no layer scale": (ViTConfig, {"block_type": "post_norm", "layer_scale_init_value": 0.1}),
    "one or two branches": (ViTConfig, {"num_parallel_branches": 3}),
    "projections and MLPs have biases": (ViTConfig, {"mlp_bias": False}),
    "no norm stands before": (ViTConfig, {"use_pre_norm": True}),
    "registers have positions": (ViTConfig, {"num_register_tokens": 2, "position_tokens": "cls"}),
    "only in BEiTs": (ViTConfig, {"use_relative_position_bias": True}),
    "beside gated MLPs": (ViTConfig, {"use_swiglu_ffn": True, "pooling": "map"}),
    "norms, blocks and MLPs together": (
        ViTConfig,
        {"block_type": "post_norm", "norm_type": "rmsnorm"},
    ),
    "BEiTs have exact GELU": (BeitConfig, {"hidden_act": "relu"}),
    "no activation 'linear'": (DeiTConfig, {"hidden_act": "linear"}),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_timm_cannot_build(why):
    family, fields = REFUSED[why]
    said = nearest.why_not(family(**{**SMALL, **AS_TIMM, **fields}))
    assert said is not None
    assert why in said


def test_a_refusal_leaves_nothing(tmp_path):
    config = ViTConfig(**{**SMALL, **AS_TIMM, "mlp_bias": False})
    weights = random_weights(config, "classifier")
    twin = torch_twin(vit_torch.ViTForImageClassification, config, weights)
    twin.save_pretrained(tmp_path / "hub")
    with pytest.raises(InputError, match="timm's projections and MLPs have biases"):
        convert(tmp_path / "hub", tmp_path / "timm", to="timm")
    assert not (tmp_path / "timm").exists()


SHARED = "vit_large_patch16_sapiens2"


def test_heads_that_share_those_of_key_and_value(tmp_path):
    """Sapiens 2: fewer heads of key and value in some blocks, layer scale on attention alone."""
    peer = timm.create_model(
        SHARED, depth=2, embed_dim=64, num_heads=4, num_kv_heads=(4, 2), img_size=(32, 48)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    timm.models.save_for_hf(peer, tmp_path / "timm", safe_serialization=True)
    twin = vit_torch.AutoModel.from_pretrained(tmp_path / "timm", add_pooling_layer=False)
    assert twin.config.is_extended
    assert not twin.config.use_mlp_layer_scale
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        want = peer.eval().forward_features(x)
        got = twin(x).last_hidden_state
    scale = float(want.abs().max())
    np.testing.assert_allclose(got.numpy() / scale, want.numpy() / scale, rtol=0, atol=2e-5)
