"""Probes: scikit-learn's neighbours and logistic regression, DINO's weighted votes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vit_common.errors import InputError
from vit_flax.training.probe import CHOICES, Features, knn, logistic_regression, probe


def features(N: int, seed: int, K: int = 4, D: int = 12) -> Features:
    centres = np.random.default_rng(7).normal(size=(K, D))
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, K, N)
    values = centres[labels] + draws.normal(size=(N, D)) * 1.2 + 3.0
    return Features(values.astype(np.float32), labels)


TRAIN, TEST, VAL = features(120, 0), features(60, 1), features(40, 2)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_neighbours_are_scikit_learn_s(k):
    peer = KNeighborsClassifier(k, metric="cosine", algorithm="brute")
    peer.fit(TRAIN.values, TRAIN.labels)
    votes = knn(TRAIN, TEST, k, 4)
    want = peer.predict_proba(TEST.values) * k
    # What is left of a vote is below one, and orders classes with equally many.
    np.testing.assert_array_equal(np.round(votes), np.round(want))
    top = want.max(1, keepdims=True)
    clear = (want == top).sum(1) == 1
    assert clear.sum() > 20
    np.testing.assert_array_equal(votes.argmax(1)[clear], peer.predict(TEST.values)[clear])


def test_of_equally_many_votes_the_nearest_neighbour_decides():
    train = Features(
        np.array([[1.0, 0.0], [0.9, 0.5], [0.0, 1.0]], np.float32), np.array([2, 0, 1])
    )
    test = Features(np.array([[1.0, 0.1], [0.1, 1.0]], np.float32), np.array([2, 1]))
    assert knn(train, test, 2, 3).argmax(1).tolist() == [2, 1]
    assert knn(train, test, 99, 3).argmax(1).tolist() == [2, 1]


@pytest.mark.parametrize("k", [5, 20])
def test_weighted_neighbours_are_dino_s(k):
    """`knn_classifier` of facebookresearch/dino `eval_knn.py`, written out."""
    train, test = (
        torch.nn.functional.normalize(torch.tensor(each.values), dim=1) for each in (TRAIN, TEST)
    )
    distances, indices = (test @ train.T).topk(k, largest=True, sorted=True)
    neighbours = torch.tensor(TRAIN.labels)[indices]
    one_hot = torch.nn.functional.one_hot(neighbours, 4).float()
    want = (one_hot * distances.div(0.07).exp()[..., None]).sum(1).numpy()
    found = knn(TRAIN, TEST, k, 4, votes="temperature")
    np.testing.assert_allclose(found, want, rtol=1e-4)


@pytest.mark.parametrize("K", [2, 4])
def test_logistic_regression_is_scikit_learn_s(K):
    train, test = features(100, 3, K), features(50, 4, K)
    peer = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    peer.fit(train.values.astype(float), train.labels)
    logits, settings = logistic_regression(train, test, K, C=0.1)
    odds = np.exp(logits - logits.max(1, keepdims=True))
    want = peer.predict_proba(test.values.astype(float))
    np.testing.assert_allclose(odds / odds.sum(1, keepdims=True), want, atol=1e-4)
    assert settings == {"C": 0.1}


def test_the_best_c_is_that_of_the_least_loss_on_validation_images():
    losses = {}
    for C in CHOICES:
        peer = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
        peer.fit(TRAIN.values.astype(float), TRAIN.labels)
        losses[C] = log_loss(VAL.labels, peer.predict_proba(VAL.values.astype(float)))
    _, settings = logistic_regression(TRAIN, TEST, 4, validation=VAL)
    assert settings["C"] == min(losses, key=losses.get)
    for C, loss in losses.items():
        assert settings["validation"][C] == pytest.approx(loss, abs=1e-3)


def test_a_class_without_training_images_is_never_taken():
    train = Features(TRAIN.values, np.where(TRAIN.labels == 3, 4, TRAIN.labels))
    logits, _ = logistic_regression(train, TEST, 5)
    assert not (logits.argmax(1) == 3).any()
    assert len({each.name for each in probe(train, TEST, "abcde", validation=VAL)}) == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: knn(TRAIN, TEST, 0, 4), "`k` must be a positive integer"),
        (lambda: knn(TRAIN, TEST, 5, 4, votes="all"), "`votes` must be"),
        (lambda: knn(TRAIN, TEST, 5, 4, votes="temperature", temperature=0.0), "`temperature`"),
        (lambda: logistic_regression(TRAIN, TEST, 4, C=0.0), "`C` must be positive"),
        (lambda: logistic_regression(TRAIN, TEST, 4, C=float("nan")), "`C` must be positive"),
        (
            lambda: logistic_regression(Features(TRAIN.values, TRAIN.labels * 0), TEST, 4),
            "two classes",
        ),
        (lambda: Features(np.zeros((2, 3)), np.zeros(3, int)), "a label each"),
        (lambda: Features(np.full((1, 3), np.nan), np.zeros(1, int)), "must be finite"),
    ],
)
def test_what_no_probe_can_use_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
