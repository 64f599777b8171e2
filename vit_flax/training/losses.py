"""Losses: sums over what counts, and how much that is, so that parts of a batch add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_common.config import ViTConfig
from vit_common.errors import InputError
from vit_common.recipes import Recipe
from vit_flax.training.step import Batch, Loss, Total

IGNORED = -100
"""Label of an image that does not count, as in torch."""


def cross_entropy(
    label_smoothing: float = 0.0, class_weights: Sequence[float] | np.ndarray | None = None
) -> Loss:
    """The cross entropy between an output's `logits` (B, K) and the batch's "labels": (B,) class
    indices, or (B, K) probabilities. Computed in float32 at least; as
    `torch.nn.CrossEntropyLoss(weight, label_smoothing=...)` defines it.

    Rows whose label is -100 or whose "weights" entry is 0 do not count. Any other label out of
    range makes the loss NaN. Its metric is "accuracy".

    Args:
        label_smoothing: share of each label that is spread over all classes (Szegedy et al. 2016,
            arXiv:1512.00567, section 7).
        class_weights: (K,), weight of each class. With class indices the mean is a weighted one;
            with probabilities it is over the rows, as in torch.
    """
    _check_smoothing(label_smoothing)

    def loss(outputs: Any, batch: Batch) -> Total:
        logits = _wide(outputs.logits)  # (B, K)
        dtype = logits.dtype
        labels, rows = jnp.asarray(batch["labels"]), _row_weights(batch, logits)
        K = logits.shape[-1]
        classes = _class_weights(class_weights, K, dtype)
        if labels.ndim == 1:
            rows, labels = _counted(labels, rows, K)
            targets = jax.nn.one_hot(labels, K, dtype=dtype)
            count = rows if classes is None else rows * classes[labels]
        else:
            _check_shape(labels, logits)
            targets, count = labels.astype(dtype), rows
        right = jnp.argmax(logits, axis=-1) == jnp.argmax(targets, axis=-1)
        targets = (1.0 - label_smoothing) * targets + label_smoothing / K
        if classes is not None:
            targets = targets * classes
        each = -(targets * jax.nn.log_softmax(logits, axis=-1)).sum(axis=-1)  # (B,)
        accuracy = (_sum(rows, right.astype(dtype)), _positive(rows).sum())
        return Total(_sum(rows, each), count.sum(), {"accuracy": accuracy})

    return loss


def binary_cross_entropy(
    label_smoothing: float = 0.0, class_weights: Sequence[float] | np.ndarray | None = None
) -> Loss:
    """The binary cross entropy of every class by itself, the mean over images and classes
    (`torch.nn.BCEWithLogitsLoss`; timm's `BinaryCrossEntropy` for class indices).

    Args:
        label_smoothing: share of a class index that is spread over all classes; labels (B, K), 0
            to 1, are taken as they are.
        class_weights: (K,), weight of each class, as `weight` of torch's.
    """
    _check_smoothing(label_smoothing)

    def loss(outputs: Any, batch: Batch) -> Total:
        logits = _wide(outputs.logits)  # (B, K)
        dtype = logits.dtype
        labels, rows = jnp.asarray(batch["labels"]), _row_weights(batch, logits)
        K = logits.shape[-1]
        classes = _class_weights(class_weights, K, dtype)
        if labels.ndim == 1:
            rows, labels = _counted(labels, rows, K)
            targets = jax.nn.one_hot(labels, K, dtype=dtype)
            right = (jnp.argmax(logits, axis=-1) == labels).astype(dtype)
            targets = (1.0 - label_smoothing) * targets + label_smoothing / K
        else:
            _check_shape(labels, logits)
            targets = labels.astype(dtype)
            right = ((logits > 0) == (targets > 0.5)).astype(dtype).mean(axis=-1)
        # log(1 + exp(-|x|)) + max(x, 0) - x y, which does not overflow.
        each = jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))
        if classes is not None:
            each = each * classes
        accuracy = (_sum(rows, right), _positive(rows).sum())
        return Total(_sum(rows, each.sum(axis=-1)), rows.sum() * K, {"accuracy": accuracy})

    return loss


def regression() -> Loss:
    """The mean squared error between an output's `logits` (B, K) and the batch's "labels" (B, K),
    or (B,) where K is 1 (`torch.nn.MSELoss`)."""

    def loss(outputs: Any, batch: Batch) -> Total:
        logits = _wide(outputs.logits)  # (B, K)
        labels, rows = jnp.asarray(batch["labels"]), _row_weights(batch, logits)
        K = logits.shape[-1]
        if labels.ndim == 1:
            labels = labels[:, None]
        _check_shape(labels, logits)
        each = jnp.square(logits - labels.astype(logits.dtype)).sum(axis=-1)
        return Total(_sum(rows, each), rows.sum() * K)

    return loss


def loss_of(
    recipe: Recipe,
    config: ViTConfig,
    class_weights: Sequence[float] | np.ndarray | None = None,
) -> Loss:
    """The loss that a recipe asks for, by the task of the configuration: `problem_type`, or where
    there is none, regression for one label and classification for several (as Transformers does).

    Where the recipe mixes images, `mixing` smooths the labels, and the loss does not.
    """
    problem = getattr(config, "problem_type", None)
    if problem is None:
        problem = "regression" if config.num_labels == 1 else "single_label_classification"
    if problem == "regression":
        return regression()
    if problem == "multi_label_classification":
        return binary_cross_entropy(0.0, class_weights)
    mixed = recipe.mixup > 0 or recipe.cutmix > 0
    smoothing = 0.0 if mixed else recipe.label_smoothing
    kind = binary_cross_entropy if recipe.loss == "bce" else cross_entropy
    return kind(smoothing, class_weights)


def check_labels(labels: Any, num_labels: int, *, problem_type: str | None = None) -> None:
    """Raise InputError unless labels can be learnt: a check before training, on the host.

    Args:
        labels: (N,) class indices (-100 does not count); (N, K) of 0 to 1 for several labels; (N,)
            or (N, K) numbers for regression.
        num_labels: K.
        problem_type: Transformers' word for the task; None is "single_label_classification".
    """
    labels = np.asarray(labels)
    if labels.size == 0:
        raise InputError("labels: wanted at least one; given none.")
    if problem_type in ("regression", "multi_label_classification"):
        wanted = "numbers" if problem_type == "regression" else "numbers from 0 to 1"
        good = np.issubdtype(labels.dtype, np.number) or labels.dtype == bool
        wide = labels.astype(np.float64) if good else np.full(1, np.nan)
        good = good and bool(np.isfinite(wide).all())
        if good and problem_type != "regression":
            good = bool((wide >= 0).all() and (wide <= 1).all())
        if not good:
            raise InputError(f"labels: wanted {wanted}; given {_example(labels)}.")
        columns = labels.shape[1] if labels.ndim == 2 else 1
        if labels.ndim > 2 or columns != num_labels:
            raise InputError(
                f"labels: wanted {num_labels} for each image; given shape {labels.shape}."
            )
        return
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"labels: wanted one class index (an integer) for each image; given {labels.dtype} of "
            f"shape {labels.shape}."
        )
    counted = labels != IGNORED
    wrong = labels[counted & ((labels < 0) | (labels >= num_labels))]
    if wrong.size:
        raise InputError(
            f"labels: wanted class indices from 0 to {num_labels - 1} (or {IGNORED} for an image "
            f"that does not count); given {wrong[0]} ({wrong.size} of {labels.size} out of range)."
        )
    if not counted.any():
        raise InputError(f"labels: all are {IGNORED}, so nothing can be learnt.")


def balanced_weights(labels: Any, num_labels: int) -> np.ndarray:
    """(K,) weights n / (K * images of the class), as scikit-learn's `class_weight="balanced"`; 0
    for a class without images."""
    labels = np.asarray(labels)
    counts = np.bincount(labels[labels >= 0], minlength=num_labels).astype(np.float64)
    return np.divide(counts.sum(), num_labels * counts, out=np.zeros(num_labels), where=counts > 0)


def _example(labels: np.ndarray) -> str:
    return f"{labels.ravel()[0]!r} ({labels.dtype})"


def _wide(array: Any) -> jax.Array:
    array = jnp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _row_weights(batch: Batch, logits: jax.Array) -> jax.Array:
    """(B,), 1 for a row that counts and 0 for one that does not."""
    if "weights" not in batch:
        return jnp.ones(logits.shape[0], logits.dtype)
    return jnp.asarray(batch["weights"]).astype(logits.dtype)


def _counted(labels: jax.Array, rows: jax.Array, K: int) -> tuple[jax.Array, jax.Array]:
    """Weights of the rows and labels within range: a row that is ignored weighs 0; a label that
    no class has makes the weight, and so the loss, NaN: never another class in silence."""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(
            f"labels (B,) must be class indices, integers; given {labels.dtype}. Probabilities "
            "have shape (B, K)."
        )
    ignored = labels == IGNORED
    wrong = ~ignored & ((labels < 0) | (labels >= K)) & (rows > 0)
    rows = jnp.where(ignored, jnp.zeros_like(rows), rows)
    rows = jnp.where(wrong, jnp.full_like(rows, jnp.nan), rows)
    return rows, jnp.clip(labels, 0, K - 1)


def _sum(rows: jax.Array, each: jax.Array) -> jax.Array:
    """The weighted sum over rows; one of weight 0 does not count, even where it is not finite."""
    return jnp.where(rows == 0, jnp.zeros_like(each), rows * each).sum()


def _positive(rows: jax.Array) -> jax.Array:
    return (rows != 0).astype(rows.dtype)


def _check_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise InputError(f"`label_smoothing` must be from 0 to 1; given {label_smoothing!r}.")


def _check_shape(labels: jax.Array, logits: jax.Array) -> None:
    if labels.shape != logits.shape:
        raise InputError(
            f"labels must have the shape of the logits, {logits.shape}; given {labels.shape}."
        )


def _class_weights(weights: Any, K: int, dtype: Any) -> jax.Array | None:
    if weights is None:
        return None
    array = np.asarray(weights, np.float64)
    if array.shape != (K,) or not np.isfinite(array).all() or (array < 0).any():
        raise InputError(
            f"`class_weights` must be {K} numbers, one for each class, none negative; given shape "
            f"{array.shape}."
        )
    return jnp.asarray(array, dtype)
