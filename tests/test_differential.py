"""Differential attention, against timm 1.0.31 (`vit_dwee_*`, `vit_dlittle_*`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch
from format_files import save_timm
from networks import flax_twin, random_weights
from peers import RESIZED, assert_close, load_flax, pixels, randomise, run_torch
from safetensors.numpy import load_file
from timm_models import timm

import vit_flax
from vit_common.config import ViTConfig
from vit_convert.convert import convert
from vit_flax.stacked import stack_layers

SIZES = {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 8,
         "num_classes": 5, "mlp_ratio": 2.0, "dynamic_img_size": True}  # fmt: skip


def exact_share(self) -> torch.Tensor:
    """The share of the second map, which timm computes in float32 in any network."""
    first, second = (self.lambda_q1 * self.lambda_k1).sum(), (self.lambda_q2 * self.lambda_k2).sum()
    return torch.exp(first) - torch.exp(second) + self.lambda_init


def test_both_twins_and_the_numpy_network_are_timms(tmp_path, monkeypatch):
    monkeypatch.setattr(timm.layers.DiffAttention, "_compute_lambda", exact_share)
    peer = randomise(timm.create_model("vit_dwee_patch16_reg1_gap_256", **SIZES))
    source = save_timm(peer, tmp_path / "timm")
    x, other = pixels((32, 32)), pixels((24, 48), 1)
    peer = peer.double()
    with torch.no_grad():
        want, resized = (peer(torch.tensor(images)).numpy() for images in (x, other))
    assert_close(run_torch(source, x), want, 1e-12)
    assert_close(run_torch(source, other), resized, RESIZED)
    with jax.enable_x64(True):
        model = load_flax(source, dtype=jnp.float64, param_dtype=jnp.float64)
        assert_close(np.asarray(model(x).logits), want, 1e-12)
    report = convert(source, tmp_path / "flax", to="flax")
    assert report.verification is not None  # by the network in numpy
    assert not report.ignored
    assert ViTConfig.from_pretrained(tmp_path / "flax").attention_type == "differential"
    convert(tmp_path / "flax", tmp_path / "back", to="timm")
    first, again = (load_file(p / "model.safetensors") for p in (source, tmp_path / "back"))
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[name], again[name]) for name in first)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).double().eval()
    with torch.no_grad():
        assert_close(loaded(torch.tensor(x)).numpy(), want, 1e-12)


def test_each_block_has_its_share_in_a_scan():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        image_size=16, patch_size=8, attention_type="differential",
    )  # fmt: skip
    weights = random_weights(config, "classifier")
    cls, x = vit_flax.FlaxViTForImageClassification, pixels((16, 16)).astype(np.float32)
    model = flax_twin(cls, config, weights)
    scanned = cls(config, _do_init=False, scan_layers=True, precision="highest")
    got = scanned(x, params=stack_layers(model.params), output_attentions=True)
    want = model(x, output_attentions=True)
    np.testing.assert_allclose(got.logits, want.logits, atol=2e-6)
    np.testing.assert_allclose(got.attentions[2], want.attentions[2], atol=2e-6)
