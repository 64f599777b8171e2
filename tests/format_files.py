"""What the tests of several formats share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import (
    randomise,
)
from timm_models import timm

SMALL = {
    "depth": 2,
    "embed_dim": 48,
    "num_heads": 4,  # not what the architecture's name says
    "img_size": 32,
    "patch_size": 8,
    "num_classes": 7,
}
VIT, BEIT, DISTILLED = (
    "vit_tiny_patch16_224",
    "beit_base_patch16_224",
    "deit_tiny_distilled_patch16_224",
)
AVERAGE = {"global_pool": "avg"}
SHARED = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}
TIMM = {
    "plain": (VIT, {}),
    "registers": (VIT, {"reg_tokens": 3}),
    "registers, no_embed_class": (VIT, {"reg_tokens": 3, "no_embed_class": True}),
    "no_embed_class": (VIT, {"no_embed_class": True}),
    "no class token": (VIT, {"class_token": False, **AVERAGE}),
    "no class token, fc_norm off": (VIT, {"class_token": False, "fc_norm": False, **AVERAGE}),
    "registers only": (
        VIT,
        {"class_token": False, "reg_tokens": 2, "no_embed_class": True} | AVERAGE,
    ),
    "fc_norm": (VIT, AVERAGE),
    "mean, no fc_norm": (VIT, {"fc_norm": False, **AVERAGE}),
    "layer scale": (VIT, {"init_values": 1e-5}),
    "tanh": (VIT, {"act_layer": "gelu_tanh"}),
    "quick": (VIT, {"act_layer": "quick_gelu"}),
    "relu": (VIT, {"act_layer": "relu"}),
    "tanh by name": ("vit_so400m_patch16_siglip_gap_256", {}),
    "gated": ("vit_giant_patch14_dinov2", {"mlp_ratio": 3.0}),
    "no qkv bias": (VIT, {"qkv_bias": False}),
    "narrow mlp": (VIT, {"mlp_ratio": 1.5}),
    "wide image": (VIT, {"img_size": (32, 48)}),
    "deit3": ("deit3_small_patch16_224", {}),
    "distilled": (DISTILLED, {}),
    "beit": (BEIT, {}),
    "beit, no layer scale": (BEIT, {"init_values": None}),
    "beit, shared": (BEIT, SHARED),
    "beit, positions": (BEIT, {"use_abs_pos_emb": True, "use_rel_pos_bias": False}),
    "beit, all": (BEIT, {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": True}),
    "beit, class token": (BEIT, {"global_pool": "token"}),
}


def make_timm(name: str, **more: Any) -> Any:
    architecture, differing = TIMM[name]
    return randomise(timm.create_model(architecture, **{**SMALL, **differing, **more}))


def save_timm(model: Any, place: Path) -> Path:
    """As timm's `push_to_hub` writes it."""
    place.mkdir(parents=True, exist_ok=True)
    timm.models.save_for_hf(model, place, safe_serialization=True)
    return place


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def save_pickle(table: Any, path: Path) -> Path:
    torch.save(table, path)
    return path
