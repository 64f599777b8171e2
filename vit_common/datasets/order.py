"""The order of images, as pure functions of a seed: what is shuffled, split and left out.

Only the raw numbers of Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")
are used, whose stream numpy promises to keep; so a run that goes on with another version of numpy
meets its images in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vit_common.checks import as_integer, check_positive
from vit_common.errors import InputError, shown

if TYPE_CHECKING:
    from vit_common.datasets.labelled import LabelledImages

_ORDER, _SPLIT, _LIMIT = 1, 2, 3  # one stream of random numbers for each purpose
_MOST = 1 << 64


def check_seed(name: str, value: object) -> int:
    """The value as an int; raises InputError unless it is an integer from 0 to 2^64 - 1."""
    number = as_integer(value)
    if number is None or not 0 <= number < _MOST:
        raise InputError(f"`{name}` must be an integer from 0 to 2^64 - 1; given {shown(value)}.")
    return number


def _raw(n: int, seed: int, purpose: int, *place: int) -> np.ndarray:
    counter = np.array([0, *place, *[0] * (3 - len(place))], np.uint64)
    key = np.array([seed, purpose], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(n)


def _permutation(n: int, seed: int, purpose: int, *place: int) -> np.ndarray:
    return np.argsort(_raw(n, seed, purpose, *place), kind="stable")


def epoch_order(
    n: int,
    seed: int,
    epoch: int,
    *,
    repeats: int = 1,
    labels: np.ndarray | None = None,
) -> np.ndarray:
    """The images of an epoch, in order; always `n` of them.

    Args:
        n: images in the data set.
        seed: of the run.
        epoch: counted from 0.
        repeats: how often each image comes, one right after the other (repeated augmentation,
            Hoffer et al. 2020, arXiv:1901.09335). The epoch then has 1 / `repeats` of the images,
            as with DeiT's `RASampler` and timm's `RepeatAugSampler`.
        labels: (n,) class indices. If given, every class comes equally often, whatever its number
            of images; those of a small class come again and again, all equally often.

    Returns:
        (n,) int64 indices. A pure function of the arguments.

    Example:
        >>> sorted(epoch_order(5, seed=0, epoch=3).tolist())
        [0, 1, 2, 3, 4]
    """
    n, repeats = check_positive("n", n), check_positive("repeats", repeats)
    seed, epoch = check_seed("seed", seed), check_seed("epoch", epoch)
    if labels is None:
        order = _permutation(n, seed, _ORDER, epoch)
    else:
        order = _balanced(np.asarray(labels), seed, epoch)
    if repeats > 1:
        order = np.repeat(order[: -(-n // repeats)], repeats)[:n]
    return order.astype(np.int64)


def _balanced(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    n = len(labels)
    present = np.unique(labels)
    share = np.full(len(present), n // len(present))
    # Which classes get one more changes from epoch to epoch.
    extra = _permutation(len(present), seed, _ORDER, epoch, 1)[: n % len(present)]
    share[extra] += 1
    chosen = []
    for i, (label, count) in enumerate(zip(present, share, strict=True)):
        members = np.flatnonzero(labels == label)
        rounds = -(-int(count) // len(members))
        again = [
            members[_permutation(len(members), seed, _ORDER, epoch, 2 + i, turn)]
            for turn in range(rounds)
        ]
        chosen.append(np.concatenate([members[:0], *again])[:count])
    order = np.concatenate(chosen)
    return order[_permutation(n, seed, _ORDER, epoch)]


def occurrences(order: np.ndarray) -> np.ndarray:
    """How often each item of an order came before: 0 the first time, 1 the second."""
    places = np.argsort(order, kind="stable")
    in_order = order[places]
    starts = np.concatenate([[True], in_order[1:] != in_order[:-1]])[: len(order)]
    begin = np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))
    counts = np.empty(len(order), np.int64)
    counts[places] = np.arange(len(order)) - begin
    return counts


def split(
    dataset: LabelledImages, share: float, seed: int = 0
) -> tuple[LabelledImages, LabelledImages]:
    """Split images into training and validation, each class by its share.

    A class keeps at least one image for training. Images of several classes are split by iterative
    stratification (Sechidis et al. 2011, "On the stratification of multi-label data"), so that rare
    classes are in both sides; those with numbers for labels are split at random.

    Args:
        dataset: the images.
        share: part of the images for validation, between 0 and 1.
        seed: of the choice.

    Returns:
        (training, validation), each in the order of `dataset`.

    Raises:
        InputError: `share` is no such number, or leaves one side without images.

    Example:
        >>> train, validation = split(ImageFolder("photos"), 0.1, seed=0)
    """
    n = len(dataset)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise InputError(
            "the share of images for validation must lie between 0 and 1, such as 0.1; given "
            f"{shown(share)}."
        )
    wanted = int(n * share + 0.5)
    held = np.zeros(n, bool)
    if dataset.problem_type == "multi_label_classification":
        held = _iterative(dataset.labels > 0, share, check_seed("seed", seed))
    if not held.any():
        held = _stratified(dataset, wanted, check_seed("seed", seed), _SPLIT, keep=1)
    if not 0 < held.sum() < n:
        raise InputError(
            f"a share of {share} of {n} images leaves {int(held.sum())} for validation; wanted at "
            "least one there and one per class for training. Add images, or give a larger share "
            "or validation images of their own."
        )
    return dataset.select(~held), dataset.select(held)


def limited(dataset: LabelledImages, limit: int) -> LabelledImages:
    """At most `limit` images, each class by its share and with one at least if that is possible;
    always the same ones, in their order."""
    limit = check_positive("limit", limit)
    if limit >= len(dataset):
        return dataset
    return dataset.select(_stratified(dataset, limit, 0, _LIMIT, least=1))


def _stratified(
    dataset: LabelledImages, wanted: int, seed: int, purpose: int, *, least: int = 0, keep: int = 0
) -> np.ndarray:
    """(N,) bool: `wanted` images, each class by its share, rounded so that the sum is right.

    Args:
        least: of each class, where it has them and `wanted` allows it.
        keep: of each class that are not taken.
    """
    n = len(dataset)
    taken = np.zeros(n, bool)
    groups = dataset.labels if dataset.labels.dtype == np.int64 else np.zeros(n, np.int64)
    _, groups, counts = np.unique(groups, return_inverse=True, return_counts=True)
    most = np.maximum(counts - keep, 0)
    wanted = min(wanted, int(most.sum()))
    exact = counts * (wanted / n)
    numbers = np.minimum(np.floor(exact).astype(np.int64), most)
    if least and wanted >= len(counts):
        numbers = np.maximum(numbers, np.minimum(least, most))
    while (missing := wanted - int(numbers.sum())) != 0:  # the largest remainders first
        step = 1 if missing > 0 else -1
        room = numbers < most if step > 0 else numbers > least
        gap = np.where(room, (exact - numbers) * step, -np.inf)
        numbers[np.argsort(-gap, kind="stable")[: abs(missing)][: int(room.sum())]] += step
    for i, number in enumerate(numbers):
        members = np.flatnonzero(groups == i)
        taken[members[_permutation(len(members), seed, purpose, i)[:number]]] = True
    return taken


def _iterative(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """(N,) bool: a share of the images, and nearly that share of each class.

    The rarest class that is left goes first, and each of its images to the side that lacks most of
    it; then, of equal sides, to the one that lacks most images.

    Args:
        labels: (N, K) bool.
    """
    n = len(labels)
    shares = np.array([1 - share, share])
    lacks = shares[:, None] * labels.sum(axis=0)  # (2, K) of each class
    lacks_images = shares * n
    side = np.full(n, -1)
    order = _permutation(n, seed, _SPLIT)

    def put(images: np.ndarray, lack: np.ndarray) -> None:  # which changes with each image
        for image in images:
            best = np.flatnonzero(lack >= lack.max() - 1e-9)
            to = int(best[np.argmax(lacks_images[best])])
            side[image] = to
            lacks[to] -= labels[image]
            lacks_images[to] -= 1

    while True:
        left = labels[side < 0].sum(axis=0)
        if not left.any():
            break
        rarest = int(np.argmin(np.where(left > 0, left, n + 1)))
        put(order[(side[order] < 0) & labels[order, rarest]], lacks[:, rarest])
    put(order[side[order] < 0], lacks_images)
    return side == 1
