"""Attention pooling, beside timm's `AttentionPoolLatent`."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from networks import flax_twin, images, make_config, random_weights, torch_twin
from timm_models import timm
from tolerances import BOUNDS

import vit_flax
import vit_torch
from vit_common.errors import ConfigError

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
SIZES |= {"intermediate_size": 24, "image_size": (8, 12), "patch_size": 4}
CASES = {
    "no class token": {"use_cls_token": False, "hidden_act": "gelu_new"},
    "class token": {},
    "with the tokens in front": {"num_register_tokens": 2, "pool_prefix_tokens": True},
    "heads and width of its own": {"pooler_num_heads": 4, "pooler_intermediate_size": 40},
}
ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh"}


def the_peers_pooler(config, weights, prefix=""):
    """timm's, with the same weights, in float64."""
    pooler = timm.layers.AttentionPoolLatent(
        config.hidden_size,
        num_heads=config.pooler_heads,
        mlp_ratio=config.pooler_inner / config.hidden_size,
        norm_layer=partial(torch.nn.LayerNorm, eps=config.layer_norm_eps),
        act_layer=partial(torch.nn.GELU, ACTIVATIONS[config.hidden_act]),
    ).double()
    ours = {
        name.removeprefix(f"{prefix}pooler."): torch.tensor(value)
        for name, value in weights.items()
        if name.startswith(f"{prefix}pooler.")
    }
    table = {"q": ["attention.query"], "kv": ["attention.key", "attention.value"]}
    table |= {"proj": ["attention.output.dense"], "norm": ["layernorm"]}
    table |= {"mlp.fc1": ["intermediate.dense"], "mlp.fc2": ["output.dense"]}
    state = {"latent": ours.pop("probe")}
    for theirs, names in table.items():
        for leaf in ("weight", "bias"):
            state[f"{theirs}.{leaf}"] = torch.cat([ours.pop(f"{name}.{leaf}") for name in names])
    assert not ours
    pooler.load_state_dict(state)
    return pooler.eval()


@pytest.mark.parametrize("case", CASES)
def test_pooled_output_is_that_of_timm(case):
    config = make_config(**SIZES, **CASES[case], pooling="map")
    weights = random_weights(config)
    x = images(config, 3)
    twin = torch_twin(vit_torch.ViTModel, config, weights, torch.float64)
    with torch.no_grad():
        found = twin(torch.tensor(x))
        first = 0 if config.pool_prefix_tokens else config.num_prefix_tokens
        states = found.last_hidden_state[:, first:]
        expected = the_peers_pooler(config, weights)(states).numpy()
    bound = BOUNDS["reference float64"]
    np.testing.assert_allclose(found.pooler_output.numpy(), expected, rtol=0, atol=bound)
    with jax.enable_x64(True):
        ours = flax_twin(vit_flax.FlaxViTModel, config, weights, jnp.float64)(x)
    np.testing.assert_allclose(np.asarray(ours.pooler_output), expected, rtol=0, atol=bound)


def test_a_classifier_stands_on_it():
    config = make_config(**SIZES, pooling="map")
    weights = random_weights(config, "classifier")
    x = images(config, 2)
    twin = torch_twin(vit_torch.ViTForImageClassification, config, weights, torch.float64)
    with torch.no_grad():
        found = twin(torch.tensor(x), output_hidden_states=True)
        states = twin.vit.layernorm(found.hidden_states[-1])[:, 1:]
        pooled = the_peers_pooler(config, weights, "vit.")(states).numpy()
    expected = pooled @ weights["classifier.weight"].T + weights["classifier.bias"]
    np.testing.assert_allclose(
        found.logits.numpy(), expected, rtol=0, atol=BOUNDS["reference float64"]
    )


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"pooler_num_heads": 3}, "pooler_num_heads"),
        ({"use_representation_layer": True}, "use_representation_layer"),
        ({"norm_after_pooling": True}, "norm_after_pooling"),
    ],
)
def test_what_does_not_go_with_it(fields, name):
    with pytest.raises(ConfigError, match=name):
        make_config(**SIZES, pooling="map", **fields)
