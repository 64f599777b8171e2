"""Relative positions by an MLP, against timm 1.0.31 (`vit_relpos_*`, `vit_srelpos_*`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from format_files import save_timm
from peers import assert_close, load_flax, pixels, randomise, run_torch
from safetensors.numpy import load_file
from timm_models import timm

from vit_common.config import ViTConfig
from vit_convert.convert import convert

SIZES = {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 8,
         "num_classes": 5, "mlp_ratio": 2.0}  # fmt: skip
KINDS = {
    "of a block": ("vit_relpos_small_patch16_224", {}),
    # Two blocks: the bias reaches a class token, which has none, through the patches alone.
    "class token": ("vit_relpos_base_patch16_cls_224", {"depth": 2}),
    "class token, mean": ("vit_relpos_base_patch16_clsgap_224", {}),
    "shared": ("vit_srelpos_small_patch16_224", {"rel_pos_dim": 24, "depth": 2}),
    "post norm": ("vit_relpos_small_patch16_rpn_224", {}),
    "wide image": ("vit_relpos_base_patch16_plus_240", {"img_size": (16, 40)}),
}


def exact(model: torch.nn.Module) -> torch.nn.Module:
    """timm's model in float64, its constants too, which it computes in float32."""
    model = model.double()
    for module in model.modules():
        if hasattr(module, "rel_coords_log"):
            h, w = module.window_size
            axes = [torch.arange(1 - side, side, dtype=torch.float64) for side in (h, w)]
            offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
            module.rel_coords_log = torch.sign(offsets) * torch.log(1.0 + offsets.abs())
    return model


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(name, marks=[] if name in ("class token", "shared") else pytest.mark.slow)
        for name in KINDS
    ],
)
def test_both_twins_and_the_numpy_network_are_timms(kind, tmp_path):
    name, differing = KINDS[kind]
    make = timm.create_model(name, **{**SIZES, **differing})
    source = save_timm(randomise(make), tmp_path / "timm")
    x = pixels((16, 40) if kind == "wide image" else (32, 32))
    peer = exact(make)
    with torch.no_grad():
        want = peer(torch.tensor(x)).numpy()
    assert_close(run_torch(source, x), want, 1e-12)
    with jax.enable_x64(True):
        model = load_flax(source, dtype=jnp.float64, param_dtype=jnp.float64)
        assert_close(np.asarray(model(x).logits), want, 1e-12)
    # Another size, not square: the offsets of any grid are there.
    other = pixels((24, 48), 1)
    peer.set_input_size(img_size=(24, 48))
    with torch.no_grad():
        resized = exact(peer)(torch.tensor(other)).numpy()
    assert_close(run_torch(source, other), resized, 1e-12)

    report = convert(source, tmp_path / "flax", to="flax")
    assert report.verification is not None  # by the network in numpy
    assert not report.ignored
    assert_close(run_torch(tmp_path / "flax", x), want, 1e-12)
    config = ViTConfig.from_pretrained(tmp_path / "flax")
    assert config.relative_position_type == "mlp"
    assert not config.use_absolute_position_embeddings
    convert(tmp_path / "flax", tmp_path / "back", to="timm")
    first, again = (load_file(p / "model.safetensors") for p in (source, tmp_path / "back"))
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[name], again[name]) for name in first)
    if kind in ("shared", "post norm"):
        loaded = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True)
        with torch.no_grad():
            assert_close(exact(loaded.eval())(torch.tensor(x)).numpy(), want, 1e-12)
