"""Measures of a model's output against labels, in numpy and float64.

`measure` takes logits and labels of any of Transformers' three problem types; the functions below
it do one type each. Every definition is the one scikit-learn has, where it has one:

- top-k: the share of images whose true class is among the k highest logits; of equal logits the
  class with the lower index is the higher.
- precision, recall and F1 of a class: TP / (TP + FP), TP / (TP + FN), 2 TP / (2 TP + FP + FN). One
  whose denominator is 0 does not exist: it is None, and means leave it out.
- balanced accuracy: the mean recall of the classes that have images.
- log loss: the mean of -log of the true class's probability (natural logarithm).
- expected calibration error (Guo et al. 2017, arXiv:1706.04599, equation 5): the predicted class's
  probability (its confidence) falls into one of M bins of equal width, (i/M, (i+1)/M]; the sum over
  bins of (images in the bin / images) * |accuracy - mean confidence|. The maximum calibration error
  is the largest of these differences.
- average precision of a class: the sum over thresholds of (recall - recall before) * precision,
  without interpolation; mAP is its mean over the classes that have images.
- R2: 1 - sum of squared errors / sum of squared deviations of the targets from their mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vit_common.errors import InputError, shown

BINS = 15
"""Bins of the calibration error, as Guo et al. use them."""

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
"""As `problem_type` of a Transformers configuration has them."""

USUAL = {
    "single_label_classification": "top1",
    "multi_label_classification": "map",
    "regression": "mse",
}
"""The measure that decides which model is best, unless another is asked for."""

LOWER_IS_BETTER = frozenset({"loss", "log_loss", "ece", "mce", "brier", "mse", "rmse", "mae"})
"""Measures that are better the lower they are; all others are better the higher they are."""

MOST_CLASSES = 4096
"""Classes up to which there is a confusion matrix."""

_ROWS_AT_ONCE = 4096


def measure(
    logits: Any,
    labels: Any,
    problem_type: str = "single_label_classification",
    *,
    classes: Sequence[str] | None = None,
    top_k: Sequence[int] = (1, 5),
    bins: int = BINS,
) -> dict[str, Any]:
    """Everything known of a model's output: `classification`, `multi_label` or `regression`.

    Args:
        logits: (N, K), the model's output before softmax or sigmoid; of a regression the predicted
            quantities, (N,) or (N, K).
        labels: (N,) class indices; (N, K) of 0 and 1; or quantities shaped as `logits`.
        problem_type: Transformers' name of the problem.
        classes: names of the K classes, for the rows of "per_class".
        top_k, bins: of `classification`.

    Raises:
        InputError: shapes or values that do not go together.

    Example:
        >>> measure([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]], [0, 1, 1])["top1"]
        0.6666666666666666
    """
    if problem_type == "single_label_classification":
        return classification(logits, labels, classes=classes, top_k=top_k, bins=bins)
    if problem_type == "multi_label_classification":
        return multi_label(logits, labels, classes=classes)
    if problem_type == "regression":
        return regression(logits, labels)
    raise InputError(
        f"`problem_type` must be one of {', '.join(PROBLEM_TYPES)}; given {shown(problem_type)}."
    )


def is_better(name: str, value: float, than: float | None) -> bool:
    """Whether a value of the measure `name` is better than another; any is better than None, and
    NaN is better than nothing."""
    if value is None or np.isnan(value):
        return False
    if than is None or np.isnan(than):
        return True
    return value < than if name in LOWER_IS_BETTER else value > than


def softmax(logits: Any) -> np.ndarray:
    """Probabilities of classes that exclude each other, (N, K) float64."""
    values = np.asarray(logits, np.float64)
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def sigmoid(logits: Any) -> np.ndarray:
    """Probabilities of classes that do not exclude each other, in float64."""
    values = np.asarray(logits, np.float64)
    small = np.exp(-np.abs(values))
    return np.where(values >= 0, 1.0, small) / (1.0 + small)


# -- one class per image


def ranks(logits: Any, labels: Any) -> np.ndarray:
    """Place of the true class among all, best first and from 0, (N,) int64: an image counts as
    right in the top k if its rank is below k. Of equal logits the lower index comes first."""
    logits, labels = _single(logits, labels)
    found = np.zeros(len(labels), np.int64)
    for part in _parts(len(labels)):
        rows, true = logits[part], labels[part]
        own = np.take_along_axis(rows, true[:, None], axis=1)  # (n, 1)
        before = np.arange(rows.shape[1]) < true[:, None]
        found[part] = (rows > own).sum(axis=1) + ((rows == own) & before).sum(axis=1)
    return found


def classification(
    logits: Any,
    labels: Any,
    *,
    classes: Sequence[str] | None = None,
    top_k: Sequence[int] = (1, 5),
    bins: int = BINS,
) -> dict[str, Any]:
    """Measures of a classifier whose classes exclude each other.

    Args:
        logits: (N, K).
        labels: (N,) indices from 0 to K - 1.
        classes: names of the classes.
        top_k: each k gives a key "top{k}"; one beyond K is 1.0.
        bins: of the calibration error.

    Returns:
        "images" (N), "top1", "top5", "balanced_accuracy", "precision", "recall", "f1" (means over
        classes where they exist), "log_loss", "brier" (mean squared distance of the probabilities
        from the label's), "ece", "mce"; "per_class": a dict per class with "class", "index",
        "images", "predicted", "precision", "recall", "f1"; "confusion": (K, K) int64, true classes
        down, predicted classes across, or None with more than 4096 classes; "calibration": a dict
        per bin with "low", "high", "images", "confidence", "accuracy" (None in an empty bin).
        Everything but "confusion" is plain Python.

    Raises:
        InputError: no images, other shapes, labels that are no classes, or logits with NaN.
    """
    logits, labels = _single(logits, labels)
    N, K = logits.shape
    names = _names(classes, K)
    place = ranks(logits, labels)
    predicted, confidence = np.zeros(N, np.int64), np.zeros(N)
    losses, squares = np.zeros(N), np.zeros(N)
    for part in _parts(N):
        rows, true = logits[part].astype(np.float64), labels[part]
        rows = rows - rows.max(axis=1, keepdims=True)
        powers = np.exp(rows)
        total = powers.sum(axis=1)
        probabilities = powers / total[:, None]
        index = np.arange(len(true))
        predicted[part] = rows.argmax(axis=1)
        confidence[part] = probabilities[index, predicted[part]]
        losses[part] = np.log(total) - rows[index, true]
        probabilities[index, true] -= 1.0
        squares[part] = np.square(probabilities).sum(axis=1)
    rows_of_classes = per_class(labels, predicted, names)
    table = reliability(confidence, place == 0, bins)
    return {
        "images": N,
        **{f"top{k}": float((place < k).mean()) for k in top_k},
        "balanced_accuracy": _mean(row["recall"] for row in rows_of_classes),
        **{name: _mean(row[name] for row in rows_of_classes) for name in _OF_A_CLASS},
        "log_loss": float(losses.mean()),
        "brier": float(squares.mean()),
        **calibration_error(table),
        "per_class": rows_of_classes,
        "confusion": confusion_matrix(labels, predicted, K) if K <= MOST_CLASSES else None,
        "calibration": table,
    }


_OF_A_CLASS = ("precision", "recall", "f1")


def confusion_matrix(labels: Any, predicted: Any, num_classes: int) -> np.ndarray:
    """How many images of each true class (down) were taken for each class (across): (K, K)."""
    cells = np.asarray(labels, np.int64) * num_classes + np.asarray(predicted, np.int64)
    counts = np.bincount(cells, minlength=num_classes * num_classes)
    return counts.reshape(num_classes, num_classes)


def per_class(labels: Any, predicted: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each class; None where undefined.

    Args:
        labels, predicted: (N,) class indices.
        names: of all classes.
    """
    labels, predicted = np.asarray(labels, np.int64), np.asarray(predicted, np.int64)
    of = [labels, predicted, labels[labels == predicted]]
    true, taken, right = (np.bincount(each, minlength=len(names)).tolist() for each in of)
    return [
        {
            "class": name,
            "index": i,
            "images": true[i],
            "predicted": taken[i],
            **_scores(right[i], taken[i], true[i]),
        }
        for i, name in enumerate(names)
    ]


def reliability(confidence: Any, right: Any, bins: int = BINS) -> list[dict[str, Any]]:
    """How often predictions of about one confidence are right: a dict per bin of equal width.

    Args:
        confidence: (N,), the probability of each predicted class.
        right: (N,), whether the prediction is right.
        bins: M; bin i holds i/M < confidence <= (i+1)/M (and the first bin holds 0).
    """
    if bins < 1:
        raise InputError(f"`bins` must be a positive integer; given {shown(bins)}.")
    confidence, right = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    edges = np.linspace(0.0, 1.0, bins + 1)
    at = np.searchsorted(edges[1:-1], confidence)
    images = np.bincount(at, minlength=bins)
    sums = [np.bincount(at, weights=each, minlength=bins) for each in (confidence, right)]
    return [
        {
            "low": float(edges[i]),
            "high": float(edges[i + 1]),
            "images": int(n),
            "confidence": float(sums[0][i] / n) if n else None,
            "accuracy": float(sums[1][i] / n) if n else None,
        }
        for i, n in enumerate(images)
    ]


def calibration_error(table: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """ "ece" and "mce", the expected and the maximum calibration error, of `reliability`'s bins."""
    full = [row for row in table if row["images"]]
    if not full:
        return {"ece": None, "mce": None}
    gaps = [abs(row["accuracy"] - row["confidence"]) for row in full]
    images = sum(row["images"] for row in full)
    ece = sum(row["images"] * gap for row, gap in zip(full, gaps, strict=True)) / images
    return {"ece": ece, "mce": max(gaps)}


# -- several classes per image


def multi_label(
    logits: Any, labels: Any, *, classes: Sequence[str] | None = None, threshold: float = 0.5
) -> dict[str, Any]:
    """Measures of a classifier whose classes do not exclude each other.

    Args:
        logits: (N, K).
        labels: (N, K) of 0 and 1; a row may be all 0.
        classes: names of the classes.
        threshold: of the sigmoid, from which a class is predicted.

    Returns:
        "images", "map", "f1_micro" (of all labels together), "f1_macro" (mean over classes where
        it exists), "exact_match" (images with every label right), "log_loss" (mean binary cross
        entropy over images and classes), and "per_class": a dict per class with "class", "index",
        "images", "predicted", "precision", "recall", "f1", "average_precision".

    Raises:
        InputError: no images, other shapes, labels other than 0 and 1, or logits with NaN.
    """
    logits = _logits(logits)
    labels = np.asarray(labels)
    if labels.shape != logits.shape:
        raise InputError(
            f"`labels` must have the shape of `logits`, {logits.shape}; given {labels.shape}."
        )
    if not np.isin(labels, (0, 1)).all():
        raise InputError("`labels` of several classes per image must be 0 or 1.")
    N, K = logits.shape
    names = _names(classes, K)
    true = labels.astype(bool)
    predicted = logits >= np.log(threshold / (1 - threshold))
    right, positive, taken = (true & predicted).sum(0), true.sum(0), predicted.sum(0)
    rows = [
        {
            "class": names[k],
            "index": k,
            "images": int(positive[k]),
            "predicted": int(taken[k]),
            **_scores(int(right[k]), int(taken[k]), int(positive[k])),
            "average_precision": average_precision(logits[:, k], true[:, k]),
        }
        for k in range(K)
    ]
    # -log sigmoid(x) = log(1 + exp(-x)), and of 1 - sigmoid(x) with the sign turned
    signed = np.where(true, -logits, logits).astype(np.float64)
    return {
        "images": N,
        "map": _mean(row["average_precision"] for row in rows),
        "f1_micro": _scores(int(right.sum()), int(taken.sum()), int(positive.sum()))["f1"],
        "f1_macro": _mean(row["f1"] for row in rows),
        "exact_match": float((true == predicted).all(axis=1).mean()),
        "log_loss": float(np.logaddexp(0.0, signed).mean()),
        "per_class": rows,
    }


def average_precision(scores: Any, positive: Any) -> float | None:
    """The average precision of one class; None where no image has it.

    Args:
        scores: (N,), higher for images that are taken to have the class; equal ones count together.
        positive: (N,), whether the image has it.
    """
    scores, positive = np.asarray(scores), np.asarray(positive, bool)
    total = int(positive.sum())
    if not total:
        return None
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # of each threshold
    found = np.cumsum(positive[order])[last]
    precision, recall = found / (last + 1), found / total
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


# -- quantities


def regression(predictions: Any, targets: Any) -> dict[str, Any]:
    """Measures of predicted quantities.

    Args:
        predictions: (N,) or (N, K).
        targets: of the same shape; (N,) and (N, 1) go together.

    Returns:
        "images", "mse", "rmse", "mae", "r2" (the mean over quantities; None if the targets of one
        are all the same), and with several quantities "per_target": a dict each with "mse", "mae"
        and "r2".

    Raises:
        InputError: no images, shapes that differ, or values that are not finite.
    """
    found = np.asarray(predictions, np.float64)
    wanted = np.asarray(targets, np.float64)
    found, wanted = (each[:, None] if each.ndim == 1 else each for each in (found, wanted))
    if found.ndim != 2 or found.shape != wanted.shape or not len(found):
        raise InputError(
            "`predictions` and `targets` must have one shape, (N,) or (N, K) with N of at least 1; "
            f"given {np.shape(predictions)} and {np.shape(targets)}."
        )
    for name, values in (("predictions", found), ("targets", wanted)):
        rows = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(rows):
            raise InputError(
                f"`{name}` must be finite; {len(rows)} of {len(values)} rows are not, the first is "
                f"row {rows[0]}."
            )
    squares = np.square(found - wanted)
    spread = np.square(wanted - wanted.mean(axis=0)).sum(axis=0)
    rows_of_targets = [
        {
            "mse": float(squares[:, k].mean()),
            "mae": float(np.abs(found - wanted)[:, k].mean()),
            "r2": float(1 - squares[:, k].sum() / spread[k]) if spread[k] > 0 else None,
        }
        for k in range(found.shape[1])
    ]
    r2 = [row["r2"] for row in rows_of_targets]
    mse = float(squares.mean())
    return {
        "images": len(found),
        "mse": mse,
        "rmse": mse**0.5,
        "mae": float(np.abs(found - wanted).mean()),
        "r2": None if None in r2 else _mean(r2),
        **({"per_target": rows_of_targets} if len(rows_of_targets) > 1 else {}),
    }


# -- what they share


def _scores(right: int, predicted: int, true: int) -> dict[str, float | None]:
    return {
        "precision": right / predicted if predicted else None,
        "recall": right / true if true else None,
        "f1": 2 * right / (predicted + true) if predicted + true else None,
    }


def _mean(values: Any) -> float | None:
    """The mean of those that exist."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def _parts(count: int) -> Iterator[slice]:
    """Slices of so many rows that their float64 numbers need little memory."""
    for start in range(0, count, _ROWS_AT_ONCE):
        yield slice(start, start + _ROWS_AT_ONCE)


def _logits(logits: Any) -> np.ndarray:
    values = np.asarray(logits)
    if values.ndim != 2 or not values.size:
        raise InputError(
            f"`logits` must be (N, K), of at least one image and class; given {values.shape}."
        )
    if not np.issubdtype(values.dtype, np.floating):  # bfloat16 too
        values = values.astype(np.float32 if values.dtype.kind == "V" else np.float64)
    rows = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(rows):
        raise InputError(
            f"`logits` must be finite; {len(rows)} of {len(values)} rows are not, the first is row "
            f"{rows[0]}."
        )
    return values


def _single(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    values, indices = _logits(logits), np.asarray(labels)
    N, K = values.shape
    if indices.shape != (N,) or not np.issubdtype(indices.dtype, np.integer):
        raise InputError(
            f"`labels` must be {N} class indices, one for each row of `logits`; given "
            f"{indices.dtype} of shape {indices.shape}."
        )
    wrong = np.flatnonzero((indices < 0) | (indices >= K))
    if len(wrong):
        raise InputError(
            f"`labels` must be from 0 to {K - 1}; {len(wrong)} are not, the first is "
            f"{indices[wrong[0]]} in row {wrong[0]}."
        )
    return values, indices.astype(np.int64)


def _names(classes: Sequence[str] | None, num_classes: int) -> list[str]:
    if classes is None:
        return [str(i) for i in range(num_classes)]
    if len(classes) != num_classes:
        raise InputError(
            f"`classes` must be {num_classes} names, one for each logit; given {len(classes)}."
        )
    return [str(name) for name in classes]
