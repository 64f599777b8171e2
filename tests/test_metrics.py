"""Measures: scikit-learn's numbers on the same outputs, and torch's and timm's top-k."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import sklearn.calibration
import sklearn.metrics
import torch

from vit_common import metrics
from vit_common.datasets.class_names import match_classes
from vit_common.errors import InputError
from vit_common.images.imagenet import imagenet_labels, imagenet_synsets

CLOSE = {"rtol": 0, "atol": 1e-12}


def outputs(N: int = 400, K: int = 7, seed: int = 0, scale: float = 2.0):
    """Logits that are right more often than not, and labels; class 5 has no image, and class 6 is
    never predicted."""
    draws = np.random.default_rng(seed)
    labels = draws.choice([0, 1, 2, 3, 4, 6], N, p=[0.4, 0.2, 0.2, 0.1, 0.05, 0.05])
    logits = draws.normal(size=(N, K)) * scale
    logits[np.arange(N), labels] += scale
    logits[:, 6] = -20.0
    return logits.astype(np.float32), labels


def numbers(values) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], float)


@pytest.mark.parametrize("scale", [0.1, 2.0, 40.0])
def test_classification_is_scikit_learn_s(scale):
    logits, labels = outputs(scale=scale)
    found = metrics.classification(logits, labels, top_k=(1, 3, 5))
    wide = torch.tensor(logits).double()
    probabilities = torch.softmax(wide, 1).numpy()
    predicted = probabilities.argmax(1)
    every = range(logits.shape[1])

    assert found["top1"] == sklearn.metrics.accuracy_score(labels, predicted)
    for k in (3, 5):
        want = sklearn.metrics.top_k_accuracy_score(labels, logits, k=k, labels=every)
        assert found[f"top{k}"] == want
        assert found[f"top{k}"] == pytest.approx(
            np.mean((wide.topk(k).indices.numpy() == labels[:, None]).any(1)), abs=1e-12
        )
    np.testing.assert_array_equal(
        found["confusion"], sklearn.metrics.confusion_matrix(labels, predicted, labels=every)
    )
    scores = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, labels=every, zero_division=np.nan
    )
    for name, want in zip(("precision", "recall", "f1", "images"), scores, strict=True):
        np.testing.assert_allclose(
            numbers(row[name] for row in found["per_class"]), want, err_msg=name, **CLOSE
        )
    with warnings.catch_warnings(action="ignore"):
        want = sklearn.metrics.balanced_accuracy_score(labels, predicted)
    np.testing.assert_allclose(found["balanced_accuracy"], want, **CLOSE)
    want = sklearn.metrics.f1_score(labels, predicted, average="macro")
    np.testing.assert_allclose(found["f1"], want, **CLOSE)
    want = torch.nn.functional.cross_entropy(wide, torch.tensor(labels)).item()
    np.testing.assert_allclose(found["log_loss"], want, rtol=1e-12)
    one_hot = np.eye(logits.shape[1])[labels]
    np.testing.assert_allclose(
        found["brier"], np.square(probabilities - one_hot).sum(1).mean(), **CLOSE
    )


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_is_scikit_learn_s_curve_and_guo_s_formula(bins):
    logits, labels = outputs()
    found = metrics.classification(logits, labels, bins=bins)
    probabilities = torch.softmax(torch.tensor(logits).double(), 1).numpy()
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    accuracy, mean = sklearn.calibration.calibration_curve(right, confidence, n_bins=bins)
    full = [row for row in found["calibration"] if row["images"]]
    np.testing.assert_allclose([row["accuracy"] for row in full], accuracy, **CLOSE)
    np.testing.assert_allclose([row["confidence"] for row in full], mean, **CLOSE)

    ece, mce = 0.0, 0.0
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            ece, mce = ece + inside.mean() * gap, max(mce, gap)
    np.testing.assert_allclose([found["ece"], found["mce"]], [ece, mce], **CLOSE)


def test_a_confidence_on_an_edge_is_in_the_bin_below():
    table = metrics.reliability([0.0, 0.5, 1.0], [False, True, True], 2)
    assert [row["images"] for row in table] == [2, 1]


def test_of_equal_logits_the_first_class_is_taken():
    logits, labels = np.zeros((3, 3)), np.array([0, 1, 2])
    assert metrics.ranks(logits, labels).tolist() == [0, 1, 2]
    found = metrics.classification(logits, labels, top_k=(1, 2, 5))
    assert [found["top1"], found["top2"], found["top5"]] == [1 / 3, 2 / 3, 1.0]


def test_many_rows_are_measured_in_parts(monkeypatch):
    logits, labels = outputs()
    whole = metrics.classification(logits, labels)
    monkeypatch.setattr(metrics.measures, "_ROWS_AT_ONCE", 7)
    parts = metrics.classification(logits, labels)
    np.testing.assert_array_equal(parts.pop("confusion"), whole.pop("confusion"))
    assert parts == whole
    json.dumps(whole, allow_nan=False)


def test_several_labels_are_scikit_learn_s():
    draws = np.random.default_rng(1)
    labels = (draws.random((200, 6)) < [0.5, 0.3, 0.1, 0.05, 0.02, 0.0]).astype(np.float32)
    logits = np.round(draws.normal(size=labels.shape) + 2 * labels - 0.7, 1)  # some are equal
    logits[:, 4] = -3.0
    found = metrics.multi_label(logits, labels)
    taken = logits >= 0
    options = {"zero_division": np.nan}
    score = sklearn.metrics.f1_score
    np.testing.assert_allclose(found["f1_micro"], score(labels, taken, average="micro"), **CLOSE)
    want = score(labels, taken, average="macro", **options)
    np.testing.assert_allclose(found["f1_macro"], want, **CLOSE)
    assert found["exact_match"] == sklearn.metrics.accuracy_score(labels, taken)
    there = labels.any(0)
    want = sklearn.metrics.average_precision_score(labels[:, there], logits[:, there])
    np.testing.assert_allclose(found["map"], want, **CLOSE)
    for name in ("precision", "recall"):
        of = getattr(sklearn.metrics, f"{name}_score")
        want = of(labels, taken, average=None, **options)
        np.testing.assert_allclose(numbers(row[name] for row in found["per_class"]), want, **CLOSE)
    want = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(logits), torch.tensor(labels).double()
    )
    np.testing.assert_allclose(found["log_loss"], want.item(), rtol=1e-12)
    assert found["per_class"][5]["average_precision"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("targets", [1, 3])
def test_quantities_are_scikit_learn_s(targets):
    draws = np.random.default_rng(2)
    wanted = draws.normal(size=(50, targets)) * 10 + 100
    given = wanted + draws.normal(size=wanted.shape)
    found = metrics.regression(given, wanted if targets > 1 else wanted[:, 0])
    for name, score in (
        ("mse", "mean_squared_error"),
        ("mae", "mean_absolute_error"),
        ("r2", "r2_score"),
        ("rmse", "root_mean_squared_error"),
    ):
        of = getattr(sklearn.metrics, score)
        want = of(wanted, given) if name != "rmse" else of(wanted.ravel(), given.ravel())
        np.testing.assert_allclose(found[name], want, rtol=1e-12, err_msg=name)
    assert metrics.regression([1.0, 2.0], [3.0, 3.0])["r2"] is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.measure([[0.0, 1.0]], [2]), "must be from 0 to 1; 1 are not"),
        (lambda: metrics.measure([[0.0, 1.0]], [-100]), "the first is -100 in row 0"),
        (lambda: metrics.measure([[0.0, np.nan]], [1]), "must be finite"),
        (lambda: metrics.measure([[0.0, 1.0]], [1.0]), "class indices.*float64"),
        (lambda: metrics.measure(np.zeros((0, 2)), np.zeros(0, int)), "at least one image"),
        (lambda: metrics.measure([[0.0, 1.0]], [1], "ranking"), "must be one of.*'ranking'"),
        (lambda: metrics.multi_label([[0.0, 1.0]], [[0, 2]]), "must be 0 or 1"),
        (lambda: metrics.multi_label([[0.0, 1.0]], [0]), "shape of `logits`"),
        (lambda: metrics.regression([1.0], [np.inf]), "`targets` must be finite"),
        (lambda: metrics.regression([[1.0, 2.0]], [1.0]), "one shape"),
    ],
)
def test_what_does_not_go_together_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_better_is_lower_for_losses_and_higher_for_scores():
    assert metrics.is_better("top1", 0.9, 0.8)
    assert not metrics.is_better("top1", 0.8, 0.8)
    assert metrics.is_better("mse", 0.1, 0.2)
    assert metrics.is_better("ece", 0.5, None)
    assert not metrics.is_better("top1", float("nan"), None)


def test_classes_are_found_by_name():
    labels = ["cat", "Dog", "guinea pig", "tench, Tinca tinca", "crane, bird", "crane, machine"]
    given = ["dog", "Guinea_pig", "CAT", "tench", "crane, machine"]
    assert match_classes(given, labels).tolist() == [1, 2, 0, 3, 5]
    for wrong, message in (
        (["crane"], "1 of 1 classes is unknown to the model: 'crane'"),
        (["cat", "dgo"], r"'dgo' \(did you mean 'Dog'\?\)"),
        (["cat", "Cat"], "'cat' and 'Cat' are both the model's label 'cat'"),
        (["0"], "unknown"),
    ):
        with pytest.raises(InputError, match=message):
            match_classes(wrong, labels, what="photos")
    assert match_classes(["2", "label_0"], ["LABEL_0", "LABEL_1", "LABEL_2"]).tolist() == [2, 0]


def test_imagenet_s_folders_are_found_by_their_wordnet_ids():
    from timm_models import timm

    info = timm.data.ImageNetInfo("imagenet-1k")
    assert list(imagenet_synsets()) == info.label_names()
    folders = [imagenet_synsets()[i] for i in (5, 0, 999)]
    assert match_classes(folders, imagenet_labels()).tolist() == [5, 0, 999]
    shorter = [label.split(", ")[0] for label in imagenet_labels()]
    assert match_classes(folders, shorter).tolist() == [5, 0, 999]
    with pytest.raises(InputError, match="unknown"):
        match_classes(folders, imagenet_labels()[:10])
