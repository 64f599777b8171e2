"""Probes: scikit-learn's neighbours and logistic regression, DINO's weighted votes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vit_cli.main import main
from vit_common.embedded import embedded_checkpoint
from vit_common.errors import InputError
from vit_flax.inference import ImageEncoder
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


# -- the command


@pytest.fixture(name="photos", scope="module")
def photos_fixture(tmp_path_factory):
    """Scikit-learn's digits in class folders, of three classes, and one file that is no image."""
    root = tmp_path_factory.mktemp("digits")
    digits = load_digits(n_class=3)
    for i in range(48):
        folder = root / ("train" if i < 30 else "test") / str(digits.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.rint(digits.images[i] * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (root / "test" / "0" / "broken.png").write_bytes(b"no image")
    return root


@pytest.mark.slow
def test_the_command_reports_what_scikit_learn_finds_in_the_same_features(photos, capsys):
    options = ["--pool", "cls+mean", "--layers", "-2,-1", "--batch-size", "16", "--C", "0.1"]
    assert main(["probe", str(photos), *options, "--neighbours", "3", "--json"]) == 1
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert said.err.count("broken.png: not an image") == 1
    assert found["images"] == {"train": 30, "test": 18}
    assert found["features"] == 2 * 2 * 48

    encode = ImageEncoder.from_pretrained(embedded_checkpoint())
    values, labels = {}, {}
    for part in ("train", "test"):
        files = [p for p in sorted((photos / part).glob("*/*.png")) if p.name != "broken.png"]
        tokens = encode.features(files, layers=(-2, -1), pool=None)  # (N, 2, S, D)
        pooled = [tokens[:, :, 0], tokens[:, :, 1:].mean(2)]
        values[part] = np.stack(pooled, 2).reshape(len(files), -1).astype(float)
        labels[part] = [int(file.parent.name) for file in files]
    peers = {
        "3-NN": KNeighborsClassifier(3, metric="cosine"),
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression(C=0.1)),
    }
    scores = {each["probe"]: each["top1"] for each in found["probes"]}
    for name, peer in peers.items():
        want = peer.fit(values["train"], labels["train"]).score(values["test"], labels["test"])
        assert scores[name] == pytest.approx(want), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{tmp}/none"], "none: no such folder or table"),
        (["{photos}", "--pool", "max"], "invalid choice: 'max'"),
        (["{photos}", "--C", "0"], "must be positive numbers"),
        (["{photos}", "--neighbours", "0"], "positive integer"),
        (["{photos}", "--test-share", "1"], "between 0 and 1"),
        (["{photos}", "--layers", "x"], "must be numbers of blocks"),
        (["{photos}", "--layers", "9"], "`layers` must hold blocks"),
        (["{photos}", "--label-column", "x"], "option of tables"),
        (["{tmp}/one"], "at least two classes"),
    ],
)
def test_options_that_are_wrong(options, message, photos, tmp_path, capsys):
    shutil.copytree(photos / "train" / "1", tmp_path / "one" / "1")
    given = [option.format(tmp=tmp_path, photos=photos) for option in options]
    assert main(["probe", *given]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
