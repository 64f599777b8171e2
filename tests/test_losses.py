"""Losses beside torch's and timm's: values, gradients, and what does not count."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from timm_models import timm  # noqa: F401

from vit_common.config import ViTConfig
from vit_common.errors import InputError
from vit_common.recipes import recipe
from vit_flax.training import (
    balanced_weights,
    binary_cross_entropy,
    check_labels,
    cross_entropy,
    loss_of,
    regression,
)

B, K = 8, 5
rng = np.random.default_rng(0)
LOGITS = 2 * rng.normal(size=(B, K))
LABELS = np.array([0, 4, -100, 2, 2, 1, -100, 3])
CLASSES = np.array([0.2, 1.0, 3.0, 0.5, 2.0])
SOFT = rng.dirichlet(np.ones(K), B)
SEVERAL = (rng.random((B, K)) < 0.4).astype(np.float64)
NUMBERS = rng.normal(size=(B, K))


def value_and_gradient(loss, labels, **batch):
    """The mean and its gradient by the logits, and the metrics' sums."""
    batch = {"labels": labels, **batch}

    @jax.jit
    def mean(logits):
        total = loss(SimpleNamespace(logits=logits), batch)
        return total.sum / total.count, total

    with jax.enable_x64(True):
        (value, total), gradient = jax.value_and_grad(mean, has_aux=True)(jnp.asarray(LOGITS))
        return float(value), np.asarray(gradient), jax.tree.map(float, total)


def by_torch(loss, labels):
    logits = torch.tensor(LOGITS, requires_grad=True)
    value = loss(logits, torch.tensor(labels))
    value.backward()
    return value.item(), logits.grad.numpy()


CASES = {
    "cross entropy": (
        cross_entropy(),
        LABELS,
        torch.nn.CrossEntropyLoss(),
    ),
    "smoothing": (
        cross_entropy(0.1),
        LABELS,
        torch.nn.CrossEntropyLoss(label_smoothing=0.1),
    ),
    "class weights": (
        cross_entropy(0.0, CLASSES),
        LABELS,
        torch.nn.CrossEntropyLoss(torch.tensor(CLASSES)),
    ),
    "class weights and smoothing": (
        cross_entropy(0.2, CLASSES),
        LABELS,
        torch.nn.CrossEntropyLoss(torch.tensor(CLASSES), label_smoothing=0.2),
    ),
    "probabilities": (
        cross_entropy(0.1, CLASSES),
        SOFT,
        torch.nn.CrossEntropyLoss(torch.tensor(CLASSES), label_smoothing=0.1),
    ),
    "several labels": (
        binary_cross_entropy(0.0, CLASSES),
        SEVERAL,
        torch.nn.BCEWithLogitsLoss(torch.tensor(CLASSES)),
    ),
    "bce of class indices": (
        binary_cross_entropy(0.1),
        np.maximum(LABELS, 0),
        lambda x, y: importlib.import_module("timm.loss").BinaryCrossEntropy(0.1)(x, y),
    ),
    "regression": (regression(), NUMBERS, torch.nn.MSELoss()),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_torch_and_timm(name):
    loss, labels, reference = CASES[name]
    value, gradient, _ = value_and_gradient(loss, labels)
    wanted, slope = by_torch(reference, labels)
    assert value == pytest.approx(wanted, rel=1e-13)
    np.testing.assert_allclose(gradient, slope, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", CASES)
def test_rows_of_weight_zero_do_not_count(name):
    loss, labels, reference = CASES[name]
    weights = np.array([1, 0, 1, 1, 0, 1, 1, 0], np.float32)
    value, gradient, total = value_and_gradient(loss, labels, weights=weights)
    kept = weights > 0
    logits = torch.tensor(LOGITS[kept])
    wanted = reference(logits, torch.tensor(labels[kept])).item()
    assert value == pytest.approx(wanted, rel=1e-13)
    assert not gradient[~kept].any()
    if name == "cross entropy":
        right = (LOGITS.argmax(-1) == LABELS)[kept & (LABELS >= 0)]
        assert total.metrics["accuracy"] == (right.sum(), right.size)


@pytest.mark.parametrize("label", [K, -1, 1000, -101])
def test_a_label_out_of_range_is_never_silent(label):
    """optax trains the last class for -1, without a word."""
    labels = np.array([0, 4, label, 2, 2, 1, 0, 3])
    for loss in (cross_entropy(), binary_cross_entropy(), cross_entropy(0.1, CLASSES)):
        assert np.isnan(value_and_gradient(loss, labels)[0])
    with pytest.raises(InputError, match=f"from 0 to 4 .*; given {label} .1 of 8 out of range"):
        check_labels(labels, K)


def test_labels_that_cannot_be_learnt():
    check_labels([0, 1, -100], 2)
    check_labels([[0, 1], [1, 0.5]], 2, problem_type="multi_label_classification")
    check_labels([0.5, -3], 1, problem_type="regression")
    several = {"problem_type": "multi_label_classification"}
    for labels, options, message in (
        ([], {}, "at least one"),
        ([-100, -100], {}, "all are -100"),
        ([0.5, 1.0], {}, r"an integer\) for each image; given float64"),
        (["cat", "dog"], {}, "given <U3"),
        ([[0, 1]], {}, r"of shape \(1, 2\)"),
        ([[0, 2.0]], several, "numbers from 0 to 1"),
        ([[0, 1, 1]], several, r"wanted 2 for each image; given shape \(1, 3\)"),
        ([float("nan")], {"problem_type": "regression"}, "wanted numbers"),
        (["a"], {"problem_type": "regression"}, "wanted numbers"),
    ):
        with pytest.raises(InputError, match=message):
            check_labels(np.array(labels), 2, **options)


def test_balanced_weights_are_those_of_scikit_learn():
    labels = np.array([0, 0, 0, 1, 2, 2, 2, 2])
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(balanced_weights(labels, 3), wanted)
    # Labels that do not count, and a class without images.
    found = balanced_weights(np.array([0, -100, 2]), 3)
    np.testing.assert_allclose(found, [2 / 3, 0, 2 / 3])


def test_the_loss_of_a_recipe():
    """By the task of the configuration, as Transformers chooses it; mixed labels are smooth."""
    plain, mixed = recipe(label_smoothing=0.1), recipe(label_smoothing=0.1, mixup=0.8)
    several = {"num_labels": K, "problem_type": "multi_label_classification"}
    for settings, config, labels, reference in (
        (plain, {"num_labels": K}, LABELS, torch.nn.CrossEntropyLoss(label_smoothing=0.1)),
        (mixed, {"num_labels": K}, SOFT, torch.nn.CrossEntropyLoss()),
        (plain, several, SEVERAL, torch.nn.BCEWithLogitsLoss()),
        (mixed.replace(loss="bce"), {"num_labels": K}, SOFT, torch.nn.BCEWithLogitsLoss()),
        (plain, {"num_labels": K, "problem_type": "regression"}, NUMBERS, torch.nn.MSELoss()),
    ):
        value, _, _ = value_and_gradient(loss_of(settings, ViTConfig(**config)), labels)
        assert value == pytest.approx(by_torch(reference, labels)[0], rel=1e-13)
    one = loss_of(plain, ViTConfig(num_labels=1))
    batch = {"labels": jnp.asarray(NUMBERS[:, 0])}
    total = one(SimpleNamespace(logits=jnp.asarray(LOGITS[:, :1])), batch)
    wanted = np.mean((LOGITS[:, 0] - NUMBERS[:, 0]) ** 2)
    assert float(total.sum / total.count) == pytest.approx(wanted, rel=1e-5)


def test_arguments_of_losses():
    with pytest.raises(InputError, match=r"from 0 to 1; given 1\.5"):
        cross_entropy(1.5)
    with pytest.raises(InputError, match="must be 5 numbers, one for each class"):
        value_and_gradient(cross_entropy(0.0, [1.0, 2.0]), LABELS)
    with pytest.raises(InputError, match="must have the shape of the logits"):
        value_and_gradient(cross_entropy(), SOFT[:, :2])
    with pytest.raises(InputError, match="class indices, integers; given float64"):
        value_and_gradient(cross_entropy(), LABELS.astype(float))
