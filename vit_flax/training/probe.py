"""Probes: how well frozen features tell the classes apart, without training the network.

- `knn`: k nearest neighbours by cosine, each with one vote ("uniform") or, as DINO and its
  successors report it, with exp(cosine / 0.07) votes ("temperature"; Wu et al. 2018,
  arXiv:1805.01978; facebookresearch/dino `eval_knn.py`).
- `logistic_regression`: a linear classifier on standardised features, with L2 regularisation
  (scikit-learn's, by L-BFGS), whose strength is chosen on validation images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vit_common.errors import InputError, shown
from vit_common.metrics import classification

TEMPERATURE = 0.07
"""Of DINO's votes."""

CHOICES = tuple(float(f"{10.0**power:.2g}") for power in np.arange(-4, 2.01, 0.5))
"""Values of C that are tried, the strongest regularisation first."""

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Features:
    """Features of labelled images.

    Attributes:
        values: (N, D) float32.
        labels: (N,) int64 class indices.
    """

    values: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or len(self.values) != len(self.labels) or not len(self.labels):
            raise InputError(
                "features must be (N, D) with a label each, of at least one image; given "
                f"{self.values.shape} and {len(self.labels)} labels."
            )
        if not np.isfinite(self.values).all():
            raise InputError("features must be finite; some are NaN or infinite.")


@dataclass(frozen=True)
class Probe:
    """The result of one probe.

    Attributes:
        name: such as "20-NN".
        metrics: of `vit_common.metrics.classification`, on the test images.
        settings: what it was made with, `C` for one.
        scores: (N, K), the votes or logits of the test images.
    """

    name: str
    metrics: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    scores: np.ndarray | None = None


def knn(
    train: Features,
    test: Features,
    k: int,
    num_classes: int,
    *,
    votes: str = "uniform",
    temperature: float = TEMPERATURE,
) -> np.ndarray:
    """Votes of the k nearest training images by cosine: (N, K) float64, the class of the highest is
    the prediction. Of classes with equally many votes that with the nearest neighbour wins.

    Args:
        train, test: features.
        k: neighbours; all if there are fewer.
        num_classes: K.
        votes: "uniform", or "temperature" for exp(cosine / temperature) each.
        temperature: of these.

    Raises:
        InputError: no such `votes`, or `k` is not positive.
    """
    if votes not in ("uniform", "temperature"):
        raise InputError(f"`votes` must be 'uniform' or 'temperature'; given {shown(votes)}.")
    if k < 1:
        raise InputError(f"`k` must be a positive integer; given {shown(k)}.")
    if not temperature > 0:
        raise InputError(f"`temperature` must be positive; given {shown(temperature)}.")
    k = min(k, len(train.labels))
    reference = _unit(train.values)
    found = np.zeros((len(test.values), num_classes))
    for start in range(0, len(found), _ROWS_AT_ONCE):
        cosines = _unit(test.values[start : start + _ROWS_AT_ONCE]) @ reference.T  # (n, N)
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        near = np.take_along_axis(cosines, nearest, axis=1)
        weights = np.ones_like(near) if votes == "uniform" else np.exp(near / temperature)
        rows = np.repeat(np.arange(len(near)), k)
        labels = train.labels[nearest].ravel()
        part = found[start : start + len(near)]
        np.add.at(part, (rows, labels), weights.ravel())
        if votes == "uniform":  # less than a vote, in the order of the nearest of each class
            best = np.full(part.shape, -1.0)
            np.maximum.at(best, (rows, labels), near.ravel())
            part += 0.1 * best
    return found


def logistic_regression(
    train: Features,
    test: Features,
    num_classes: int,
    *,
    validation: Features | None = None,
    C: float | Sequence[float] = CHOICES,
    max_iterations: int = 1000,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits of a linear classifier that was trained on frozen features.

    Features are standardised with the mean and the deviation of the training images.

    Args:
        train, test: features.
        num_classes: K; classes without training images get the logit -50.
        validation: features to choose C on; None holds out a fifth of the training images, and
            trains on all of them again with the best C.
        C: inverse of the regularisation's strength, as scikit-learn's; of several the one with the
            least log loss on the validation images is taken.
        max_iterations: of L-BFGS.

    Returns:
        (N, K) float64 logits of the test images; a dict with "C", and, where it was chosen,
        "validation": log loss by C.

    Raises:
        InputError: scikit-learn is not installed; one class only; or C is not positive.
    """
    values = [float(C)] if isinstance(C, (int, float)) else [float(value) for value in C]
    if not values or not all(np.isfinite(value) and value > 0 for value in values):
        raise InputError(f"`C` must be positive; given {shown(C)}.")
    if len(np.unique(train.labels)) < 2:
        raise InputError(
            "logistic regression needs training images of two classes at least; given one."
        )
    settings: dict[str, Any] = {}
    if len(values) > 1:
        fit, judge = (train, validation) if validation is not None else _held_out(train)
        # Accuracy jumps on a hundred images; the log loss does not.
        losses = {}
        for value in values:
            scores = _fit(fit, value, max_iterations, num_classes)(judge.values)
            losses[value] = classification(scores, judge.labels)["log_loss"]
        best = min(sorted(losses), key=lambda value: losses[value])
        settings["validation"] = losses
        values = [best]
    settings = {"C": values[0], **settings}
    return _fit(train, values[0], max_iterations, num_classes)(test.values), settings


def probe(
    train: Features,
    test: Features,
    classes: Sequence[str],
    *,
    validation: Features | None = None,
    neighbours: Iterable[int] = (5, 20),
    C: float | Sequence[float] = CHOICES,
    temperature: float = TEMPERATURE,
) -> list[Probe]:
    """All probes of one kind of features.

    Args:
        train, test, validation: features of images of each part.
        classes: names.
        neighbours: each k of `knn`, with both kinds of votes.
        C, temperature: see `logistic_regression` and `knn`.

    Raises:
        InputError: see there.

    Example:
        >>> train = Features(encode.features(paths), labels)
        >>> [(each.name, each.metrics["top1"]) for each in probe(train, test, classes)]
        [('5-NN', 0.77), ('5-NN, weighted', 0.78), ('logistic regression', 0.83)]
    """
    K = len(classes)
    found = []
    for k in neighbours:
        for votes, name in (("uniform", f"{k}-NN"), ("temperature", f"{k}-NN, weighted")):
            scores = knn(train, test, k, K, votes=votes, temperature=temperature)
            settings = {"k": k, "votes": votes}
            if votes == "temperature":
                settings["temperature"] = temperature
            found.append(_result(name, scores, test, classes, settings))
    scores, settings = logistic_regression(train, test, K, validation=validation, C=C)
    found.append(_result("logistic regression", scores, test, classes, settings))
    return found


def _result(
    name: str, scores: np.ndarray, test: Features, classes: Sequence[str], settings: dict[str, Any]
) -> Probe:
    metrics = classification(scores, test.labels, classes=classes)
    return Probe(name, metrics, settings, scores)


def _unit(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float32)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def _fit(train: Features, C: float, max_iterations: int, num_classes: int) -> Any:
    """A function from features to logits (N, K)."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise InputError(
            "logistic regression needs scikit-learn; run: pip install scikit-learn (the extra "
            "`probe`)"
        ) from error
    values = train.values.astype(np.float64)
    mean, deviation = values.mean(axis=0), values.std(axis=0)
    deviation[deviation == 0] = 1.0
    model = LogisticRegression(C=C, max_iter=max_iterations)
    model.fit((values - mean) / deviation, train.labels)

    def logits(features: np.ndarray) -> np.ndarray:
        scores = model.decision_function((features.astype(np.float64) - mean) / deviation)
        if scores.ndim == 1:  # of two classes there is one score
            scores = np.stack([np.zeros_like(scores), scores], axis=1)
        every = np.full((len(features), num_classes), -50.0)
        every[:, model.classes_] = scores
        return every

    return logits


def _held_out(train: Features) -> tuple[Features, Features]:
    """Four fifths and one fifth of the images, of each class by its share; always the same."""
    draws = np.random.Generator(np.random.Philox(0))
    held = np.zeros(len(train.labels), bool)
    for label in np.unique(train.labels):
        members = draws.permutation(np.flatnonzero(train.labels == label))
        held[members[: len(members) // 5]] = True
    if not held.any():
        held[:] = True  # so few images that C is chosen on those it is trained on
        return train, train
    return Features(train.values[~held], train.labels[~held]), Features(
        train.values[held], train.labels[held]
    )
