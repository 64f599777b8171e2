"""Rotary position embeddings: timm's modules are the reference; the twins in calls of all kinds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from networks import SMALL, flax_tree, flax_twin, images, random_weights, torch_twin
from timm_models import timm

import vit_flax
import vit_flax.parts.rotary as flax_rotary
import vit_torch
import vit_torch.parts.rotary as torch_rotary
from vit_common.config import ViTConfig
from vit_common.errors import ConfigError
from vit_flax.stacked import stack_layers

rope = timm.layers.pos_embed_sincos

# Fields of a configuration -> timm's module for a grid.
KINDS = {
    "axial": (
        {"rope_type": "axial"},
        lambda grid: rope.RotaryEmbeddingCat(12, in_pixels=False, feat_shape=grid),
    ),
    "EVA-02, Perception Encoder": (
        {
            "rope_type": "axial",
            "rope_theta": 100.0,
            "rope_grid_size": (3, 5),
            "rope_grid_offset": 1.0,
            "rope_grid_indexing": "xy",
        },
        lambda grid: rope.RotaryEmbeddingCat(
            12,
            in_pixels=False,
            temperature=100.0,
            feat_shape=grid,
            ref_feat_shape=[3, 5],
            grid_offset=1.0,
            grid_indexing="xy",
        ),
    ),
    "DINOv3": (
        {"rope_type": "dinov3", "rope_theta": 100.0, "rope_rotate_half": True},
        lambda grid: rope.RotaryEmbeddingDinoV3(12, feat_shape=grid),
    ),
    "mixed": (
        {"rope_type": "mixed", "rope_theta": 10.0, "rope_grid_indexing": "xy"},
        lambda grid: rope.RotaryEmbeddingMixed(48, 2, 4, feat_shape=grid),
    ),
}
GRID = (4, 6)


@pytest.mark.parametrize("name", KINDS)
def test_both_twins_rotate_as_timm_does(name):
    """Patches alone, those of the first tokens too, and nothing in front of them."""
    fields, make = KINDS[name]
    config = ViTConfig(**SMALL | fields, num_register_tokens=2)
    theirs, T = make([*GRID]), config.num_prefix_tokens
    frequencies = [p.detach() for p in theirs.parameters()]
    x = np.random.default_rng(0).normal(size=(2, T + GRID[0] * GRID[1], 4, 12)).astype(np.float32)
    like, half = torch.tensor(x), config.rope_rotate_half

    want = like.clone().transpose(1, 2)  # (B, A, S, D/A)
    embedding = theirs.get_embed().detach()
    embedding = embedding[1] if frequencies else embedding
    want[:, :, T:] = rope.apply_rot_embed_cat(want[:, :, T:], embedding, half=half)
    want = want.transpose(1, 2).numpy()

    turn = torch_rotary.rotation(config, GRID, like, *frequencies)
    turn = tuple(part[1] for part in turn) if frequencies else turn
    got = torch_rotary.rotate(like, turn, half)
    np.testing.assert_allclose(got, want, atol=3e-6)
    np.testing.assert_array_equal(got[:, :T], x[:, :T])
    np.testing.assert_array_equal(
        torch_rotary.rotate(like[:, : T + 3], turn, half), got[:, : T + 3]
    )

    by = flax_rotary.rotation(config, GRID, jnp.bfloat16, *map(jnp.asarray, frequencies))
    by = tuple(part[1] for part in by) if frequencies else by
    assert by[0].dtype == jnp.float32, "in half precision too"
    np.testing.assert_allclose(flax_rotary.rotate(jnp.asarray(x), by, half), got, atol=1e-6)
    np.testing.assert_array_equal(flax_rotary.rotate(jnp.asarray(x[:, :2]), by, half), x[:, :2])


def test_the_grid_of_another_size_is_not_that_of_the_configuration():
    config = ViTConfig(**SMALL | KINDS["EVA-02, Perception Encoder"][0])
    (cos, _), theirs = flax_rotary.rotation(config, (2, 7), jnp.float32), KINDS
    want = theirs["EVA-02, Perception Encoder"][1]([2, 7]).get_embed()[:, 12::2].detach().numpy()
    np.testing.assert_allclose(cos[0, 1:, 0], want, atol=1e-6)


MIXED = ViTConfig(**SMALL | KINDS["mixed"][0] | {"image_size": (16, 24)})
FLAX, TORCH = vit_flax.FlaxViTForImageClassification, vit_torch.ViTForImageClassification


def test_frequencies_of_each_block_in_a_scan_and_under_a_mask():
    """The twins agree elsewhere; here with blocks run as one, with a head mask, with attentions
    and with a last block that computes the class token alone."""
    weights = random_weights(MIXED, "classifier")
    x, mask = images(MIXED).astype(np.float32), np.array([[1, 0, 0.5, 1], [0, 1, 1, 2]], np.float32)
    twin = torch_twin(TORCH, MIXED, weights)
    with torch.no_grad():
        want = twin(torch.tensor(x), head_mask=torch.tensor(mask), output_attentions=True)
    model = FLAX(MIXED, _do_init=False, precision="highest", scan_layers=True)
    model._is_initialized = True
    model.params = stack_layers(flax_tree(weights))
    got = model(x, head_mask=mask, output_attentions=True)
    np.testing.assert_allclose(got.logits, want.logits, atol=2e-6)
    for ours, theirs in zip(got.attentions, want.attentions, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    front = flax_twin(FLAX, MIXED, weights, attn_implementation="pallas").with_front_tokens(1)
    with torch.no_grad():
        np.testing.assert_allclose(front(x).logits, twin(torch.tensor(x)).logits, atol=2e-6)


def test_new_frequencies_are_those_of_theta_along_axes_at_random():
    """The sizes are timm's; of a pair of axes, the second is the first turned by 90 degrees."""
    ours = [
        np.asarray(FLAX(MIXED).params["vit"]["encoder"]["rope_frequencies"]),
        TORCH(MIXED).vit.encoder.rope_frequencies.detach().numpy(),
    ]
    want = rope.RotaryEmbeddingMixed(48, 2, 4, feat_shape=[2, 3]).freqs.detach().numpy()
    for frequencies in ours:
        assert frequencies.shape == want.shape
        sizes = np.hypot(*frequencies)
        np.testing.assert_allclose(sizes, np.hypot(*want), rtol=1e-5)
        x, y = frequencies
        np.testing.assert_allclose(x[..., :3] * x[..., 3:] + y[..., :3] * y[..., 3:], 0, atol=1e-6)
        angles = np.arctan2(y, x)[..., 0]
        assert np.unique(angles.round(3)).size == angles.size


def test_half_precision_is_as_near_as_torchs():
    config = ViTConfig(**SMALL | KINDS["axial"][0] | {"num_hidden_layers": 1})
    weights, x = random_weights(config), images(config, 4).astype(np.float32)
    with torch.no_grad():
        exact, low = (
            torch_twin(vit_torch.ViTModel, config, weights, dtype)(torch.tensor(x))[0].double()
            for dtype in (torch.float32, torch.bfloat16)
        )
    model = flax_twin(vit_flax.FlaxViTModel, config, weights, jnp.bfloat16, precision=None)
    got = np.asarray(model(x).last_hidden_state, np.float64)
    assert np.std(got - exact.numpy()) <= 1.1 * np.std((low - exact).numpy())


def test_heads_must_have_pairs_of_pairs():
    with pytest.raises(ConfigError, match=r"multiple of 4 where `rope_type` is 'axial'; given 6"):
        ViTConfig(**SMALL | {"num_attention_heads": 8, "rope_type": "axial"})
    with pytest.raises(ConfigError, match="'axial', 'dinov3', 'mixed'"):
        ViTConfig(rope_type="cat")


def test_programs_hold_tables_of_float32_under_jit():
    config = ViTConfig(**SMALL | KINDS["DINOv3"][0])
    model = vit_flax.FlaxViTModel(config, dtype=jnp.bfloat16)
    x = jnp.zeros((1, 32, 32, 3))
    text = str(jax.make_jaxpr(lambda p, x: model.module.apply({"params": p}, x))(model.params, x))
    assert "cos" not in text, "angles are computed before the program runs"
