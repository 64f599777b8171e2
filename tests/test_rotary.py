"""Rotary position embeddings: timm's modules are the reference; the twins in calls of all kinds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from networks import SMALL, flax_tree, flax_twin, images, random_weights, randomize, torch_twin
from timm_models import timm

import vit_flax
import vit_flax.parts.rotary as flax_rotary
import vit_torch
import vit_torch.parts.rotary as torch_rotary
from vit_common.config import ViTConfig
from vit_common.errors import CheckpointError, ConfigError, InputError
from vit_convert.convert import convert
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
        assert np.unique(angles).size == angles.size


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


# timm's names, two blocks of little width; of each kind, what no other has.
TIMM = {
    "vit_small_patch16_dinov3_qkvb": {},
    "vit_7b_patch16_dinov3": {"embed_dim": 64, "num_heads": 2},
    "vit_pe_core_small_patch16_384": {"attn_pool_num_heads": 2},
    "vit_pe_lang_large_patch14_448": {},
    "eva02_base_patch16_clip_224": {},
    "eva02_tiny_patch14_224": {},
    "eva02_enormous_patch14_clip_224": {"mlp_ratio": 2.0},
    "vit_small_patch16_rope_mixed_ape_224": {},
    "vit_medium_patch16_rope_reg1_gap_256": {},
}


@pytest.mark.parametrize(
    "name",
    [name if i < 3 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(TIMM)],
)
def test_timms_networks_with_rotary_positions(name, tmp_path):
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 4, "img_size": (32, 64), "patch_size": 16}
    sizes |= TIMM[name]
    theirs = randomize(timm.create_model(name, num_classes=5, **sizes)).eval()
    timm.models.save_for_hf(theirs, tmp_path, model_args=sizes, safe_serialization=True)
    x = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        want = theirs(x).numpy()
        twin = vit_torch.AutoModelForImageClassification.from_pretrained(tmp_path)
        np.testing.assert_allclose(twin(x).logits, want, atol=2e-5)
    ours = vit_flax.FlaxAutoModelForImageClassification.from_pretrained(
        tmp_path, precision="highest"
    )
    np.testing.assert_allclose(ours(x.numpy()).logits, want, atol=2e-5)


def test_names_of_eva_do_not_say_whether_they_rotate(tmp_path):
    model = timm.create_model(
        "eva02_base_patch14_224", img_size=28, embed_dim=24, depth=1, num_heads=2
    )
    torch.save(model.state_dict(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="`rope_type` is not in these weights"):
        vit_torch.AutoModel.from_pretrained(tmp_path / "model.pth", num_attention_heads=2)


@pytest.mark.parametrize(
    ("name", "prefix"), [("eva02_base_patch16_clip_224", "visual."), ("eva02_tiny_patch14_224", "")]
)
def test_evas_own_files(name, prefix, tmp_path):
    """The same network under the names that timm reads such files by."""
    sizes = {"embed_dim": 48, "depth": 1, "num_heads": 4, "img_size": 96, "patch_size": 16}
    theirs = randomize(timm.create_model(name, num_classes=5, **sizes)).eval()
    swaps = {
        "q_proj.bias": "q_bias",
        "v_proj.bias": "v_bias",
        "mlp.fc1_g": "mlp.w1",
        "mlp.fc1_x": "mlp.w2",
        "mlp.fc1": "mlp.w12",
        "mlp.fc2": "mlp.w3",
        "mlp.norm": "mlp.ffn_ln",
        "attn.norm": "attn.inner_attn_ln",
    }
    state = {}
    for key, value in theirs.state_dict().items():
        for old, new in swaps.items():
            key = key.replace(old, new)
        state[prefix + key] = value
    sin, cos = theirs.rope.get_embed().chunk(2, -1)
    state[f"{prefix}rope.freqs_cos"], state[f"{prefix}rope.freqs_sin"] = cos, sin
    if prefix:
        state["text.token_embedding.weight"] = torch.zeros(3, 2)
    torch.save({"module": state} if not prefix else state, tmp_path / "eva.pt")
    x = torch.randn(2, 3, 96, 96)
    twin = vit_torch.AutoModelForImageClassification.from_pretrained(tmp_path / "eva.pt")
    assert (twin.config.rope_grid_size, twin.config.num_attention_heads) == (16, 4)
    with torch.no_grad():
        np.testing.assert_allclose(twin(x).logits, theirs(x), atol=2e-5)
    state[f"{prefix}rope.freqs_cos"] = cos.flip(0)
    torch.save(state, tmp_path / "eva.pt")
    with pytest.raises(CheckpointError, match="tables of rotary positions"):
        vit_torch.AutoModel.from_pretrained(tmp_path / "eva.pt")


@pytest.mark.parametrize("to", ["dino", "torchvision"])
def test_formats_that_would_not_rotate_are_refused(to, tmp_path):
    config = ViTConfig(**SMALL | KINDS["axial"][0])
    torch_twin(TORCH, config, random_weights(config, "classifier")).save_pretrained(
        tmp_path / "hub"
    )
    with pytest.raises(InputError, match="rotated by their positions"):
        convert(tmp_path / "hub", tmp_path / "other", to=to)
