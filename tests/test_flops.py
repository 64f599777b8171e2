"""Analytic cost against what timm measured and what XLA counts."""

import jax
import jax.numpy as jnp
import pytest

from vit_common.flops import forward_flops, multiply_adds
from vit_common.presets import preset
from vit_flax import FlaxCLIPModel, FlaxViTForImageClassification

# GMACs of timm's published benchmarks (results/ in huggingface/pytorch-image-models), by fvcore:
# matrix products and convolutions, and five operations an element for each norm.
PUBLISHED = {
    ("tiny", 16, 224): 1.26,
    ("small", 16, 224): 4.61,
    ("small", 32, 384): 3.45,
    ("base", 16, 224): 17.58,
    ("base", 8, 224): 78.22,
    ("base", 16, 384): 55.54,
    ("large", 16, 384): 191.21,
    ("huge", 14, 224): 167.40,
    ("giant", 14, 224): 267.18,
}


@pytest.mark.parametrize(("name", "patch", "size"), PUBLISHED)
def test_published_gmacs(name, patch, size):
    config = preset(name, patch_size=patch, image_size=size, num_labels=1000)
    norms = 2 * config.num_hidden_layers + 1
    of_norms = 5 * norms * (config.num_patches + 1) * config.hidden_size
    total = (multiply_adds(config) + of_norms) / 1e9
    assert total == pytest.approx(PUBLISHED[name, patch, size], abs=0.005)


@pytest.mark.parametrize("shape", [(224, 224), (96, 160)], ids=str)
def test_xla_counts_little_more(shape):
    # XLA also counts softmax, norms and activations: 1.6% of ViT-B/16 at 224 pixels.
    config = preset("base", image_size=shape, num_labels=1000)
    model = FlaxViTForImageClassification(config, _do_init=False)
    images = jax.ShapeDtypeStruct((1, 3, *shape), jnp.float32)
    lowered = jax.jit(lambda p, x: model(x, params=p).logits).lower(model.params_shape_tree, images)
    assert 1.0 <= lowered.cost_analysis()["flops"] / forward_flops(config) <= 1.02


def test_xla_counts_little_more_of_another_size():
    config = preset("base", num_labels=1000)
    model = FlaxViTForImageClassification(config, _do_init=False)
    images = jax.ShapeDtypeStruct((1, 3, 96, 160), jnp.float32)
    lowered = jax.jit(lambda p, x: model(x, params=p, interpolate_pos_encoding=True).logits).lower(
        model.params_shape_tree, images
    )
    flops = forward_flops(config, image_size=(96, 160))
    assert 1.0 <= lowered.cost_analysis()["flops"] / flops <= 1.02


def test_heads():
    config = preset("base", num_labels=10)
    network = multiply_adds(config, None)
    assert multiply_adds(config) == network + 10 * 768
    assert multiply_adds(config, "decoder") == network + 196 * 768 * 16 * 16 * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip-base-32", "clip-base-16"])
def test_xla_counts_little_more_of_both_towers(name):
    config = preset(name)
    model = FlaxCLIPModel(config, _do_init=False)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    texts = jax.ShapeDtypeStruct((1, 77), jnp.int32)

    def run(params, texts, images):
        return model.module.apply({"params": params}, texts, images).logits_per_image

    lowered = jax.jit(run).lower(model.params_shape_tree, texts, images)
    counted = lowered.cost_analysis()["flops"]
    assert 1.0 <= counted / forward_flops(config, "towers") <= 1.03
