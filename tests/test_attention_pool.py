"""Attention pooling, beside timm's `AttentionPoolLatent`."""

from __future__ import annotations

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from networks import flax_twin, images, make_config, random_weights, randomize, torch_twin
from safetensors.torch import save_file
from timm_models import timm
from tolerances import BOUNDS

import vit_flax
import vit_torch
from vit_common.errors import ConfigError, InputError
from vit_convert import convert

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


def test_its_norm_is_the_networks():
    """An RMS norm has no bias: the table of parameters, and both twins that load by it, agree."""
    config = make_config(**SIZES, pooling="map", norm_type="rmsnorm")
    weights, x = random_weights(config, "classifier"), images(config)
    assert "vit.pooler.layernorm.bias" not in weights
    ours = flax_twin(vit_flax.FlaxViTForImageClassification, config, weights)
    twin = torch_twin(vit_torch.ViTForImageClassification, config, weights)
    with torch.no_grad():
        want = twin(torch.tensor(x)).logits.numpy()
    np.testing.assert_allclose(ours(x).logits, want, atol=2e-5)


TIMM = {"embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 1.5, "img_size": (8, 12)}
TIMM |= {"patch_size": 4, "num_classes": 3}
NETWORKS = {
    "vit_base_patch16_siglip_224": {},
    "vit_so150m_patch16_reg4_map_256": {"init_values": 0.5},
    "vit_base_patch16_224": {"global_pool": "map", "pool_include_prefix": True},
}


def a_checkpoint_of_timm(folder, name):
    """A model of timm, and the folder with its weights and configuration."""
    arguments = {**TIMM, **NETWORKS[name]}
    theirs = randomize(timm.create_model(name, **arguments))
    folder.mkdir()
    save_file(dict(theirs.state_dict()), folder / "model.safetensors")
    height, width = arguments["img_size"]
    config = {
        "architecture": name,
        "num_classes": 3,
        "global_pool": "map",
        "model_args": arguments,
        "pretrained_cfg": {"input_size": [3, height, width]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return theirs, folder


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_timm_in_both_twins_and_back(name, tmp_path):
    theirs, folder = a_checkpoint_of_timm(tmp_path / "timm", name)
    x = torch.tensor(np.random.default_rng(0).normal(size=(2, 3, 8, 12)), dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(x).numpy()
        twin = vit_torch.AutoModelForImageClassification.from_pretrained(folder)
        found = twin(x).logits.numpy()
    bound = BOUNDS["reference float32"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound)
    ours = vit_flax.FlaxAutoModelForImageClassification.from_pretrained(folder)
    assert ours.config.pooling == "map"
    np.testing.assert_allclose(np.asarray(ours(x.numpy()).logits), expected, rtol=0, atol=bound)

    twin.save_pretrained(tmp_path / "hub")  # their configuration is gone, ours makes another
    convert(tmp_path / "hub", tmp_path / "back", to="timm")
    back = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
    with torch.no_grad():
        np.testing.assert_allclose(back(x).numpy(), expected, rtol=0, atol=bound)


def test_big_visions_file_as_timm_reads_it(tmp_path):
    """Written from timm's weights; timm's own reader of `.npz` must find them again."""
    name = "vit_base_patch16_siglip_224"
    arguments = {**TIMM, "img_size": 8, "act_layer": "gelu_tanh"}
    theirs = randomize(timm.create_model(name, **arguments))
    save_file(dict(theirs.state_dict()), tmp_path / "model.safetensors")
    config = {"architecture": name, "global_pool": "map", "model_args": arguments}
    config |= {"num_classes": 3, "pretrained_cfg": {"input_size": [3, 8, 8]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "google" / "siglip.npz"
    path.parent.mkdir()
    convert(tmp_path, path, to="google")
    with np.load(path) as file:
        assert "params/MAPHead_0/probe" in file
    again = timm.create_model(name, **arguments)
    again.load_pretrained(str(path))
    for parameter, value in again.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[parameter]), parameter
    read = vit_torch.AutoModelForImageClassification.from_pretrained(path)
    x = torch.tensor(np.random.default_rng(0).normal(size=(2, 3, 8, 8)), dtype=torch.float32)
    with torch.no_grad():
        found, expected = read(x).logits.numpy(), theirs.eval()(x).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=BOUNDS["reference float32"])


def test_timm_cannot_hold_other_heads(tmp_path):
    config = make_config(**SIZES, pooling="map", pooler_num_heads=4)
    twin = torch_twin(
        vit_torch.ViTForImageClassification, config, random_weights(config, "classifier")
    )
    twin.save_pretrained(tmp_path / "hub")
    with pytest.raises(InputError, match="attention pooling of its blocks' heads"):
        convert(tmp_path / "hub", tmp_path / "timm", to="timm")
