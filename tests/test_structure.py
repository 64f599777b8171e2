"""The fields that say what a block and the network around it are made of, against timm 1.0.31's
networks: both twins, and the numpy network that proves conversions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from networks import InMemory, flax_twin, images, random_weights, torch_twin
from timm_models import timm

import vit_flax
import vit_torch
from vit_common.config import ViTConfig
from vit_convert.forward import forward

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 36,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 5,
    "layer_norm_eps": 1e-6,
}
TIMM = {
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 1.5,
    "img_size": 16,
    "patch_size": 8,
    "num_classes": 5,
}
CLOSE = 1e-11
"""Largest difference of two networks in float64, whose logits are about one."""

# name -> fields of ours, arguments of timm's VisionTransformer
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pre norm": ({"use_patch_bias": False, "use_pre_norm": True}, {"pre_norm": True}),
}


def to_timm(name: str) -> str:
    """timm's name of one of our modules or parameters."""
    table = (
        ("vit.", ""),
        ("embeddings.cls_token", "cls_token"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("encoder.layer.", "blocks."),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("attention.output.dense", "attn.proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
        ("pre_layernorm", "norm_pre"),
        ("layernorm", "norm"),
        ("classifier", "head"),
    )
    for ours, theirs in table:
        name = name.replace(ours, theirs)
    return name


def peer_state(weights: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Our weights under timm's names."""
    state, parts = {}, ("query", "key", "value")
    for name, value in weights.items():
        if ".attention.attention.query." in name:
            value = np.concatenate([weights[name.replace("query", part)] for part in parts])
            name = name.replace("attention.attention.query", "attn.qkv")
        elif any(f".attention.attention.{part}." in name for part in parts):
            continue
        state[to_timm(name)] = torch.tensor(value)
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_both_twins_and_the_numpy_network_are_timms(kind):
    fields, arguments = KINDS[kind]
    config = ViTConfig(**{**SIZES, **fields})
    weights = random_weights(config, "classifier")
    x = images(config)
    peer = timm.models.VisionTransformer(**{**TIMM, **arguments}).double().eval()
    peer.load_state_dict(peer_state(weights))
    with torch.no_grad():
        want = peer(torch.tensor(x)).numpy()
        twin = torch_twin(vit_torch.ViTForImageClassification, config, weights, torch.float64)
        got = twin(torch.tensor(x)).logits.numpy()
    assert np.abs(got - want).max() < CLOSE
    with jax.enable_x64(True):
        cls = vit_flax.FlaxViTForImageClassification
        model = flax_twin(cls, config, weights, jnp.float64).with_front_tokens(1)
        got = np.asarray(model(x).logits)
    assert np.abs(got - want).max() < CLOSE
    tensors = {name.removeprefix("vit."): InMemory(value) for name, value in weights.items()}
    assert np.abs(forward(config, tensors, x[0]) - want[0]).max() < 1e-5  # its erf has 3e-7
