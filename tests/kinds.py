"""The kinds of networks: for each a small configuration, for tests of what every network can do."""

from __future__ import annotations

from typing import Any

import pytest

from vit_common.config import ViTConfig

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
    "layer_norm_eps": 1e-6,
}
_RELATIVE = {
    "use_absolute_position_embeddings": False,
    "relative_position_type": "mlp",
    "relative_position_width": 16,
    "use_cls_token": False,
    "pooling": "mean",
}
_HYBRID = {"stem_type": "resnetv2", "stem_width": 32, "image_size": 32}

# name -> fields of a ViT
KINDS: dict[str, dict[str, Any]] = {
    "axial rotary": {  # EVA-02, Perception Encoder
        "rope_type": "axial",
        "rope_theta": 100.0,
        "rope_grid_offset": 1.0,
        "rope_grid_indexing": "xy",
        "use_swiglu_ffn": True,
        "use_attention_norm": True,
        "use_mlp_norm": True,
        "use_key_bias": False,
    },
    "DINOv3's rotary": {
        "rope_type": "dinov3",
        "rope_theta": 100.0,
        "rope_rotate_half": True,
        "num_register_tokens": 2,
        "position_tokens": "patches",
        "use_absolute_position_embeddings": False,
        "layer_scale_init_value": 0.1,
        "use_key_bias": False,
    },
    "mixed rotary": {"rope_type": "mixed", "rope_theta": 10.0},
    "norms of query and key": {"use_qk_norm": True},
    "rms norms": {"norm_type": "rmsnorm", "use_qk_norm": True},
    "parallel": {"block_type": "parallel", "layer_scale_init_value": 0.5},
    "norms after": {"block_type": "post_norm"},
    "two branches": {"num_parallel_branches": 2},
    "attention pooling": {"pooling": "map", "use_cls_token": False},
    "relative MLP": {**_RELATIVE, "use_relative_position_bias": True},
    "shared relative MLP": {**_RELATIVE, "use_shared_relative_position_bias": True},
    "differential": {"attention_type": "differential", "num_register_tokens": 1},
    "hybrid": {**_HYBRID, "stem_depths": (1, 1), "patch_size": 8, "image_size": 32},
    "stem's root": {**_HYBRID, "stem_depths": (), "patch_size": 8, "image_size": 32},
    "ViTamin's stem": {
        "stem_type": "mbconv",
        "stem_width": 32,
        "stem_depths": (1, 2),
        "patch_size": 16,
        "image_size": 32,
        "use_swiglu_ffn": True,
        "gate_act": "gelu",
        "use_mlp_input_norm": True,
    },
    "MobileCLIP's stem": {
        "stem_type": "convolutions",
        "stem_width": 32,
        "patch_size": 16,
        "image_size": 32,
    },
    "ResNet-D": {
        "stem_type": "resnetd",
        "stem_width": 32,
        "stem_depths": (1, 1),
        "patch_size": 8,
        "image_size": 32,
    },
    "factors of attention alone": {  # Sapiens 2
        "layer_scale_init_value": 0.5,
        "use_mlp_layer_scale": False,
    },
    "CLIP's tower": {"use_pre_norm": True, "use_patch_bias": False, "hidden_act": "quick_gelu"},
}


def config_of(kind: str, **overrides: Any) -> ViTConfig:
    """The configuration of a kind."""
    return ViTConfig(**{**SIZES, **KINDS[kind], **overrides})


def kinds(*quick: str) -> Any:
    """A decorator: a test of every kind, under the name `kind`; all but these are slow."""
    assert set(quick) <= KINDS.keys()
    return pytest.mark.parametrize(
        "kind",
        [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in KINDS],
    )
