"""Batches of images for training and evaluation, decoded ahead by threads.

What a batch holds is a function of (data set, seed, epoch, step), whatever the number of threads
and processes; so the position in the data is two integers.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import PIL.Image

from vit_common.augment import draws
from vit_common.checks import as_integer, check_positive
from vit_common.datasets.labelled import SINGLE, LabelledImages
from vit_common.datasets.order import check_seed, epoch_order, occurrences
from vit_common.errors import ImageError, InputError, ViTError, shown
from vit_common.images.pictures import convert_mode, load_image, usual_workers
from vit_common.images.predictions import PIL_MODES, naming

Batch = dict[str, np.ndarray]

_AHEAD = 2  # batches that are decoded while one is trained on


class Loader:
    """Batches of augmented images, in an order that is a function of seed and epoch.

    Args:
        dataset: the images.
        batch_size: images in a batch, over all processes.
        transform: called with a PIL image and random numbers (`vit_common.augment.Augment`); gives
            a PIL image or an array (H, W, C), always of one size. Its `channels` (3 if it has no
            such attribute) decides the mode of the images that it is given.
        seed: of the order and of the random numbers.
        workers: threads that decode; None means the processor's cores, at most 16.
        repeats: how often each image comes in a batch; see `epoch_order`.
        sampling: "balanced" draws every class equally often.
        drop_last: leave out the images that do not fill a batch, other ones in each epoch. If
            there are fewer images than one batch, they fill it in part.
        process_index, process_count: this process and how many there are; each reads its part of
            every batch: `process_count` equal parts, one after the other.
        on_error: "skip" an image that cannot be read, or "raise".
        fast_decode: decode JPEGs that are much larger than what is cropped from them at a fraction
            of their size; several times as fast for photos of many megapixels, and pixels and
            crops differ slightly.

    Attributes:
        skipped: (name, message) of each image that could not be read, once.
        steps_per_epoch: batches in an epoch.

    Raises:
        InputError: the batch does not divide by the processes, or another setting is not possible.

    Example:
        >>> loader = Loader(ImageFolder("photos"), 32, Augment(recipe(), 224), seed=0)
        >>> for batch in loader.batches(epoch=0):
        ...     batch["pixel_values"].shape, batch["labels"].shape
    """

    def __init__(
        self,
        dataset: LabelledImages,
        batch_size: int,
        transform: Callable[[PIL.Image.Image, Any], Any],
        *,
        seed: int = 0,
        workers: int | None = None,
        repeats: int = 1,
        sampling: Literal["balanced"] | None = None,
        drop_last: bool = True,
        process_index: int = 0,
        process_count: int = 1,
        on_error: Literal["skip", "raise"] = "skip",
        fast_decode: bool = False,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = check_seed("seed", seed)
        self.repeats = check_positive("repeats", repeats)
        self.drop_last = drop_last
        self.rows = _rows_of(batch_size, process_index, process_count)
        self.batch_size = batch_size
        self.workers = usual_workers() if workers is None else check_positive("workers", workers)
        _check_choice("on_error", on_error, ("skip", "raise"))
        _check_choice("sampling", sampling, (None, "balanced"))
        self.on_error = on_error
        self.sampling = sampling
        if sampling and dataset.problem_type != SINGLE:
            raise InputError(
                "balanced sampling needs one class per image; given labels for "
                f"{dataset.problem_type}. Use no sampling."
            )
        if not len(dataset):
            raise InputError("a data set of no images; wanted at least one.")
        self._at_least = _at_least(transform) if fast_decode else None
        size, channels = getattr(transform, "size", None), getattr(transform, "channels", 3)
        self._shape: tuple[int, ...] | None = (*size, channels) if size else None
        self.skipped: list[tuple[str, str]] = []
        whole, rest = divmod(len(dataset), batch_size)
        self.steps_per_epoch = whole + (rest > 0 and (not drop_last or whole == 0))

    def order(self, epoch: int) -> np.ndarray:
        """(N,) indices of the images of an epoch, in order."""
        labels = self.dataset.labels if self.sampling else None
        return epoch_order(len(self.dataset), self.seed, epoch, repeats=self.repeats, labels=labels)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on, all of one shape.

        Yields:
            "pixel_values" (B, H, W, C) uint8; "labels" (B,) int32, or (B, K) or (B,) float32;
            "weights" (B,) float32, 0 for what does not count: an image that could not be read (its
            pixels are zero), or one that fills a batch up; "index" (B,) int32 of the images, -1
            for those that fill up. B is this process's part.
        """
        epoch = check_seed("epoch", epoch)
        first = as_integer(start)
        if first is None or not 0 <= first <= self.steps_per_epoch:
            raise InputError(
                f"`start` must be a step from 0 to {self.steps_per_epoch}; given {shown(start)}."
            )
        order = self.order(epoch)
        count = occurrences(order)
        n = len(order)

        def read(place: int) -> np.ndarray:
            index = int(order[place % n])
            return self._one(index, draws(self.seed, epoch, index, int(count[place % n])))

        steps = [
            step * self.batch_size + np.arange(self.rows.start, self.rows.stop)
            for step in range(first, self.steps_per_epoch)
        ]
        any_good = False
        with contextlib.closing(read_ahead(steps, read, self.workers)) as rows:
            for places, found in zip(steps, rows, strict=False):
                batch = self._batch(order[places % n], places < n, found)
                any_good = any_good or bool(batch["weights"].any())
                yield batch
        alone = len(self.rows) == self.batch_size
        if steps and not any_good and first == 0 and alone:
            raise none_read(self.skipped)

    def _one(self, index: int, source: Any) -> np.ndarray:
        """One augmented image (H, W, C)."""
        given = self.dataset.image(index)
        channels = getattr(self.transform, "channels", 3)
        image = self.transform(_picture(given, channels, self._at_least), source)
        pixels = np.asarray(image)
        return pixels[..., None] if pixels.ndim == 2 else pixels

    def _batch(self, index: np.ndarray, real: np.ndarray, found: list[Any]) -> Batch:
        good = _note(self.dataset, index, found, self.skipped, self.on_error)
        if self._shape is None:
            self._shape = next((row.shape for row in found if isinstance(row, np.ndarray)), None)
        if self._shape is None:
            raise none_read(self.skipped)
        return as_batch(self.dataset, index, real, good, _stack(found, self._shape, np.uint8))


def evaluation_batches(
    dataset: LabelledImages,
    batch_size: int,
    prepare: Callable[[Any], np.ndarray],
    *,
    workers: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    on_error: Literal["skip", "raise"] = "skip",
    skipped: list[tuple[str, str]] | None = None,
) -> Iterator[Batch]:
    """Batches of every image once, in order and without augmentation; all of one shape.

    Args:
        dataset: the images.
        batch_size: images in a batch, over all processes.
        prepare: from an image as the data set has it to an array (C, H, W) of one shape.
        workers, process_index, process_count, on_error: as for `Loader`.
        skipped: a list that takes (name, message) of each image that could not be read.

    Yields:
        "pixel_values" (B, C, H, W) of `prepare`'s dtype, and "labels", "weights" and "index" as
        `Loader.batches` has them. The last batch is filled up with zeros of weight 0.

    Raises:
        ImageError: none of the images can be read; or one, if `on_error` is "raise".

    Example:
        >>> for batch in evaluation_batches(ImageFolder("photos/val"), 32, preparer.one):
        ...     counted = batch["weights"].sum()
    """
    _check_choice("on_error", on_error, ("skip", "raise"))
    rows = _rows_of(batch_size, process_index, process_count)
    workers = usual_workers() if workers is None else check_positive("workers", workers)
    skipped = [] if skipped is None else skipped
    n = len(dataset)
    steps = [start + np.arange(rows.start, rows.stop) for start in range(0, n, batch_size)]

    def read(place: int) -> np.ndarray | None:
        return np.asarray(prepare(dataset.image(place))) if place < n else None

    shape: tuple[int, ...] | None = None
    dtype: Any = None
    waiting: list[tuple[np.ndarray, list[Any]]] = []  # until the shape is known
    with contextlib.closing(read_ahead(steps, read, workers)) as found_rows:
        for places, found in zip(steps, found_rows, strict=False):
            waiting.append((places, found))
            first = next((row for row in found if isinstance(row, np.ndarray)), None)
            if shape is None and first is not None:
                shape, dtype = first.shape, first.dtype
            if shape is None:
                continue
            for places, found in waiting:
                index = np.minimum(places, n - 1)
                good = _note(dataset, index, found, skipped, on_error)
                yield as_batch(dataset, index, places < n, good, _stack(found, shape, dtype))
            waiting = []
    if waiting:  # none of this process's images, if it has any, can be read
        noted = [
            _note(dataset, np.minimum(places, n - 1), found, skipped, on_error)
            for places, found in waiting
        ]
        example = _any_image(dataset, prepare)
        if example is None:
            raise none_read(skipped)
        for (places, found), good in zip(waiting, noted, strict=True):
            pixel_values = _stack(found, example.shape, example.dtype)
            yield as_batch(dataset, np.minimum(places, n - 1), places < n, good, pixel_values)


def _any_image(dataset: LabelledImages, prepare: Callable[[Any], np.ndarray]) -> np.ndarray | None:
    for i in range(len(dataset)):
        with contextlib.suppress(ViTError):
            return np.asarray(prepare(dataset.image(i)))
    return None


# -- parts of both


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise InputError(
            f"`{name}` must be one of {', '.join(map(str, choices))}; given {shown(value)}."
        )


def _rows_of(batch_size: Any, process_index: Any, process_count: Any) -> range:
    """The rows of every batch that a process reads."""
    batch_size = check_positive("batch_size", batch_size)
    process_count = check_positive("process_count", process_count)
    index = as_integer(process_index)
    if index is None or not 0 <= index < process_count:
        raise InputError(
            f"`process_index` must be an integer from 0 to {process_count - 1}; given "
            f"{shown(process_index)}."
        )
    if batch_size % process_count:
        raise InputError(
            f"a batch of {batch_size} images cannot be shared equally by {process_count} "
            f"processes; give a multiple of {process_count}."
        )
    share = batch_size // process_count
    return range(index * share, (index + 1) * share)


def none_read(skipped: list[tuple[str, str]]) -> ImageError:
    """The error where none of the images can be read."""
    count = "the one image" if len(skipped) == 1 else f"none of the {len(skipped)} images"
    verb = "could not" if len(skipped) == 1 else "could"
    return ImageError(f"{count} {verb} be read. The first: {skipped[0][1]}")


def _at_least(transform: Any) -> tuple[int, int] | None:
    """The smallest size of a picture whose smallest crop still has twice the pixels it is resized
    to; see `load_image`."""
    size = getattr(transform, "size", None)
    if size is None:
        return None
    scale = getattr(getattr(transform, "recipe", None), "crop_scale", None)
    side = 2 / math.sqrt(scale[0] if scale else 1.0)
    return math.ceil(size[0] * side), math.ceil(size[1] * side)


def _picture(given: Any, channels: int, at_least: tuple[int, int] | None = None) -> Any:
    """An image of a data set as a PIL image with so many channels; as an array (H, W, C) if no PIL
    image has as many."""
    try:
        if isinstance(given, np.ndarray):
            pixels = given[..., 0] if given.ndim == 3 and given.shape[-1] == 1 else given
            if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
                raise ImageError(
                    "an array as an image must be uint8 and (height, width) or (height, width, "
                    f"channels); given {given.dtype} of shape {given.shape}."
                )
            if channels not in PIL_MODES and pixels.shape[2:] == (channels,):
                return pixels
            if pixels.ndim == 3 and pixels.shape[2] not in (3, 4):
                raise ImageError(
                    f"an array as an image must have 1, 3, 4 or the model's {channels} channels, "
                    f"and they come last; given shape {given.shape}."
                )
            given = PIL.Image.fromarray(pixels)
        return convert_mode(load_image(given, at_least=at_least), channels)
    except MemoryError as error:
        raise ImageError(naming(given, "not enough memory to decode it.")) from error


def read_ahead(
    steps: Sequence[np.ndarray], read: Callable[[int], Any], workers: int
) -> Generator[list[Any], None, None]:
    """For each step, what `read` made of its places, or the error that it raised for one; threads
    read a few steps ahead."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="vit-decode")
    # Held here: a program that ends in the middle of an epoch takes modules apart before this.
    ending = sys.is_finalizing
    pending: deque[list[Future[Any]]] = deque()

    def one(place: int) -> Any:
        try:
            return read(place)
        except ViTError as error:
            return error

    def done(futures: list[Future[Any]]) -> list[Any]:
        return [future.result() for future in futures]

    try:
        for places in steps:
            pending.append([pool.submit(one, int(place)) for place in places])
            if len(pending) > _AHEAD:
                yield done(pending.popleft())
        while pending:
            yield done(pending.popleft())
    finally:
        if not ending():
            pool.shutdown(wait=False, cancel_futures=True)


def _note(
    dataset: LabelledImages,
    index: np.ndarray,
    found: list[Any],
    skipped: list[tuple[str, str]],
    on_error: str,
) -> np.ndarray:
    """(B,) bool: which rows are images; the errors of the others are noted once, or raised."""
    known = {name for name, _ in skipped}
    for i, row in zip(index, found, strict=True):
        if isinstance(row, ViTError):
            if on_error == "raise":
                raise row
            name = dataset.names[i]
            if name not in known:
                known.add(name)
                skipped.append((name, str(row)))
    return np.array([isinstance(row, np.ndarray) for row in found], bool)


def _stack(found: list[Any], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    pixels = np.zeros((len(found), *shape), dtype)
    for i, row in enumerate(found):
        if isinstance(row, np.ndarray):
            if row.shape != shape:
                raise InputError(
                    f"all images of a batch must have one shape; given {shape} and {row.shape}."
                )
            pixels[i] = row
    return pixels


def as_batch(
    dataset: LabelledImages,
    index: np.ndarray,
    real: np.ndarray,
    good: np.ndarray,
    pixel_values: np.ndarray,
) -> Batch:
    """A batch as `Loader.batches` gives it.

    Args:
        dataset: the images.
        index: (B,) of the images.
        real: (B,) bool, False for rows that fill the batch up.
        good: (B,) bool, False for images that could not be read.
        pixel_values: (B, ...), what is known of each.
    """
    labels = dataset.labels[index]
    return {
        "pixel_values": pixel_values,
        "labels": labels.astype(np.int32) if dataset.problem_type == SINGLE else labels,
        "weights": (real & good).astype(np.float32),
        "index": np.where(real, index, -1).astype(np.int32),
    }
