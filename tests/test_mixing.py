"""Mixup, cutmix and random erasing inside the step, beside timm's."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from timm_models import timm  # noqa: F401

from vit_common.errors import InputError
from vit_common.images.processor import ViTImageProcessor
from vit_common.recipes import recipe
from vit_flax.training import mixing
from vit_flax.training.mixing import cutmix_box, erasing_boxes, mix, soft_labels

B, K, H, W = 6, 5, 12, 16
IMAGES = np.random.default_rng(0).normal(size=(B, 3, H, W)).astype(np.float32)
LABELS = np.array([0, 4, 1, 2, 2, 3])
OFF = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "label_smoothing": 0.1}


@pytest.mark.parametrize("center", [(6, 8), (0, 15), (11, 0)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("cuts", [False, True])
def test_mixed_batches_are_those_of_timm(monkeypatch, share, center, cuts):
    """With its draws: the share, corrected where the box is cut off, and the box's center."""
    module = importlib.import_module("timm.data.mixup")
    theirs = module.Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=K)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (share, cuts))
    draws = iter(center)
    monkeypatch.setattr(module.np.random, "randint", lambda *_, **__: next(draws))
    wanted, targets = theirs(torch.tensor(IMAGES), torch.tensor(LABELS))

    soft = soft_labels(jnp.asarray(LABELS), K, 0.1, jnp.float32)
    kept, box = jnp.float32(share), None
    if cuts:
        box, kept = cutmix_box(kept, center, H, W)
    images, labels = mix(jnp.asarray(IMAGES), soft, kept, box)
    np.testing.assert_allclose(images, wanted.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(labels, targets.numpy(), rtol=0, atol=1e-7)


@pytest.mark.slow
def test_shares_are_drawn_as_timm_draws_them():
    """Beta(alpha, alpha), one for a batch; cutmix with its probability."""
    # Ones and zeros in turn: what is left of the first image is the share.
    images = jnp.asarray(np.stack([np.ones((1, 8, 8)), np.zeros((1, 8, 8))]), jnp.float32)
    batch = {"pixel_values": images, "labels": jnp.arange(2)}

    def shares(**settings):
        prepare = mixing(recipe(**{**OFF, **settings, "label_smoothing": 0.0}), 2)

        @jax.jit
        @jax.vmap
        def run(key):
            found = prepare(dict(batch), key)
            whole = jnp.isin(found["pixel_values"][0], jnp.array([0.0, 1.0])).all()
            return found["pixel_values"][0].mean(), found["labels"][0, 0], whole

        return map(np.asarray, run(jax.random.split(jax.random.key(0), 2000)))

    found, labels, _ = shares(mixup=0.8)
    np.testing.assert_allclose(found, labels, atol=1e-6)
    assert scipy.stats.kstest(found, "beta", (0.8, 0.8)).pvalue > 1e-3
    found, labels, cut = shares(mixup=0.8, cutmix=1.0, mixup_switch_prob=0.3, mixup_prob=0.6)
    np.testing.assert_allclose(found, labels, atol=1e-6)  # cutmix's corrected share too
    untouched = found == 1.0
    assert 0.36 < untouched.mean() < 0.46  # some cut boxes are empty
    assert 0.14 < (cut & ~untouched).mean() < 0.20


def test_an_image_whose_partner_does_not_count_stays():
    """One that could not be read, and one without a label."""
    labels = np.array([0, 4, -100, 2, 2, 3])  # the partner of row 3
    weights = np.array([0, 1, 1, 1, 1, 1], np.float32)  # ... of row 5
    batch = {"pixel_values": IMAGES, "labels": labels, "weights": weights}
    prepare = jax.jit(mixing(recipe(**{**OFF, "mixup": 0.8}), K))
    found = prepare(batch, jax.random.key(1))
    assert found["weights"].tolist() == [0, 1, 0, 1, 1, 1]
    same = [np.array_equal(found["pixel_values"][i], IMAGES[i]) for i in range(B)]
    assert same == [False, False, False, True, False, True]
    np.testing.assert_allclose(found["labels"].sum(axis=1)[np.array([1, 3, 4, 5])], 1, atol=1e-6)
    np.testing.assert_allclose(
        found["labels"][3], soft_labels(jnp.array([2]), K, 0.1, jnp.float32)[0]
    )
    wrong = prepare({**batch, "labels": np.array([0, 1, 2, 7, 1, 0])}, jax.random.key(1))
    assert np.isnan(wrong["weights"][3])


def test_labels_stay_class_indices_where_nothing_is_mixed():
    batch = {"pixel_values": IMAGES, "labels": LABELS}
    found = mixing(recipe(**OFF), K)(batch, jax.random.key(0))
    assert found["labels"] is LABELS
    assert np.array_equal(found["pixel_values"], IMAGES)
    # Several labels of an image, and numbers, are mixed as they are.
    several = (np.random.default_rng(2).random((B, K)) < 0.5).astype(np.float32)
    prepare = jax.jit(mixing(recipe(**{**OFF, "mixup": 1.0}), K))
    found = prepare({"pixel_values": IMAGES, "labels": several}, jax.random.key(0))
    found = jax.tree.map(np.asarray, found)
    assert found["labels"].shape == (B, K)
    assert set(np.unique(found["labels"][several == several[::-1]])) <= {0.0, 1.0}


def test_eight_bit_pixels_are_prepared_as_the_processor_does():
    processor = ViTImageProcessor(do_resize=False, image_mean=[0.5, 0.4, 0.3], image_std=[0.2] * 3)
    pixels = np.random.default_rng(0).integers(0, 256, (2, H, W, 3)).astype(np.uint8)
    wanted = processor(list(pixels), return_tensors="np")["pixel_values"]
    prepare = mixing(recipe(**OFF), K, processor.image_mean, processor.image_std, 1 / 255)
    found = prepare({"pixel_values": jnp.asarray(pixels)}, jax.random.key(0))["pixel_values"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="must be uint8 or floating; given int32"):
        prepare({"pixel_values": jnp.zeros((1, 2, 2, 3), int)}, jax.random.key(0))


def timm_boxes(count, size):
    """Boxes that timm erases in images of ones."""
    module = importlib.import_module("timm.data.random_erasing")
    module.random.seed(0)
    erase = module.RandomErasing(1.0, mode="const", device="cpu")
    found = []
    for _ in range(count):
        holes = np.argwhere(erase(torch.ones(1, *size))[0].numpy() == 0)
        if len(holes):
            found.append((*holes.min(0), *(holes.max(0) + 1)))
    return np.array(found)


@pytest.mark.parametrize("size", [(32, 32), (12, 40)])
def test_erased_boxes_are_spread_as_those_of_timm(size):
    wanted = timm_boxes(1500, size)
    top, bottom, left, right = map(np.asarray, erasing_boxes(jax.random.key(0), 6000, *size, 1.0))
    erased = bottom > top
    assert erased.mean() == pytest.approx(len(wanted) / 1500, abs=0.02)
    ours = np.stack([top, left, bottom, right], axis=1)[erased]
    assert (ours[:, 2:] <= size).all()
    for what in (
        lambda box: box[:, 2] - box[:, 0],
        lambda box: box[:, 3] - box[:, 1],
        lambda box: (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]),
        lambda box: box[:, 0],
        lambda box: box[:, 1],
    ):
        assert scipy.stats.ks_2samp(what(ours), what(wanted)).pvalue > 1e-3


def test_erasing_fills_boxes_with_noise():
    images = jnp.full((400, 2, 16, 16), 7.0)
    prepare = jax.jit(mixing(recipe(**{**OFF, "erasing": 0.25}), None))
    found = prepare({"pixel_values": images}, jax.random.key(3))["pixel_values"]
    changed = np.asarray(found != 7.0)
    assert np.array_equal(changed[:, 0], changed[:, 1])
    assert changed[:, 0].any(axis=(1, 2)).mean() == pytest.approx(0.25, abs=0.06)
    noise = np.asarray(found)[changed]
    assert scipy.stats.kstest(noise[:5000], "norm").pvalue > 1e-3
    assert len(np.unique(noise)) > 0.99 * noise.size  # one draw for each pixel and channel
