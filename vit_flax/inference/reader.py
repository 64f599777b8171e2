"""Reads images ahead of the network: threads decode and prepare them, in order, with a bounded
number of batches in memory."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vit_common.errors import InputError, ViTError

_AHEAD = 1  # batches in the queue; the feeding thread holds another, and the caller may
_PATIENCE = 1.0  # seconds that `close` waits for an iterable that takes its time


class _End:
    """Marks the end of the images."""


@dataclass
class Batch:
    """Images that are run together.

    Attributes:
        sources: the images or names, as they were given.
        pixel_values: (B, C, H, W); rows of images with an error are zero.
        errors: for each image why it could not be read, or None; filled in by `wait`.
    """

    sources: list[Any]
    pixel_values: np.ndarray
    _rows: list[Future[ViTError | None]] = field(default_factory=list)
    errors: list[ViTError | None] = field(default_factory=list)

    def wait(self) -> BaseException | None:
        """Wait until every image is prepared.

        Returns:
            An exception that is no fault of an image, or None; with one, the batch ends before the
            image at which it was raised.
        """
        for i, row in enumerate(self._rows):
            fault = row.exception()
            if fault is not None:
                del self.sources[i:]
                self.pixel_values = self.pixel_values[:i]
                return fault
            self.errors.append(row.result())
        return None

    @property
    def ready(self) -> bool:
        return all(row.done() for row in self._rows)


class Reader:
    """Batches of an iterable of images.

    One thread iterates over the images, so that a slow iterable delays nothing else; `workers`
    threads decode and prepare them (Pillow releases Python's lock while it decodes).

    Args:
        images: images or names, read no further than three batches ahead of the caller.
        batch_size: images in a batch; the last may have fewer.
        prepare: from an image or a name to an array (C, H, W); a ViTError is that image's own.
        shape, dtype: of what it gives.
        workers: threads that decode.
    """

    def __init__(
        self,
        images: Iterator[Any],
        batch_size: int,
        prepare: Callable[[Any], np.ndarray],
        shape: tuple[int, ...],
        dtype: Any,
        workers: int,
    ) -> None:
        self._images = images
        self._batch_size = batch_size
        self._prepare = prepare
        self._shape, self._dtype = shape, dtype
        self._stop = threading.Event()
        self._batches: queue.Queue[Batch | BaseException | _End] = queue.Queue(maxsize=_AHEAD)
        self._next: Batch | BaseException | _End | None = None
        self.decoding = 0.0
        """Seconds spent on images, added up over the threads."""
        self._lock = threading.Lock()
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="vit-decode")
        self._feeder = threading.Thread(target=self._feed, name="vit-read", daemon=True)
        self._feeder.start()

    def _feed(self) -> None:
        end: BaseException | _End | None = None
        try:
            while end is None:
                sources, end = self._take()
                if sources and not self._put(self._batch(sources)):
                    return
        except BaseException as error:  # whatever it is: the caller waits, and must hear of it
            end = error
        self._put(end)

    def _take(self) -> tuple[list[Any], BaseException | _End | None]:
        """The images of a batch, and what came instead of the next: the end, or an exception."""
        sources: list[Any] = []
        try:
            while len(sources) < self._batch_size:
                if self._stop.is_set():
                    return [], _End()
                sources.append(next(self._images))
        except StopIteration:
            return sources, _End()
        except BaseException as error:  # of the iterable; the caller gets it back
            return sources, error
        return sources, None

    def _batch(self, sources: list[Any]) -> Batch:
        shape = (len(sources), *self._shape)
        try:
            pixel_values = np.zeros(shape, self._dtype)
        except MemoryError as error:
            size = math.prod(shape) * np.dtype(self._dtype).itemsize
            raise InputError(
                f"a batch of {shape[0]} images of {' x '.join(map(str, self._shape))} needs "
                f"{size / 1e9:.1f} GB of memory, more than there is; use a smaller batch size."
            ) from error
        rows = [
            self._workers.submit(self._row, source, pixel_values, i)
            for i, source in enumerate(sources)
        ]
        return Batch(sources, pixel_values, rows)

    def _put(self, item: Batch | BaseException | _End) -> bool:
        """Whether the item was taken; not if the reader was closed."""
        while not self._stop.is_set():
            try:
                self._batches.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _row(self, source: Any, pixel_values: np.ndarray, i: int) -> ViTError | None:
        if self._stop.is_set():
            return None
        start = time.perf_counter()
        try:
            pixel_values[i] = self._prepare(source)
            return None
        except ViTError as error:
            return error
        finally:
            seconds = time.perf_counter() - start
            with self._lock:
                self.decoding += seconds

    def ready(self) -> bool:
        """Whether `next` would give a batch, or the end, without waiting."""
        if self._next is None:
            try:
                self._next = self._batches.get_nowait()
            except queue.Empty:
                return False
        return not isinstance(self._next, Batch) or self._next.ready

    def next(self) -> Batch | None:
        """The next batch, to be waited for; None at the end. Exceptions of the iterable are raised
        here."""
        item, self._next = self._next, None
        if item is None:
            item = self._batches.get()
        if isinstance(item, BaseException):
            raise item
        return item if isinstance(item, Batch) else None

    def close(self) -> None:
        """Stop reading. Images that are being decoded are finished; an iterable that is slow to
        give its next image is waited for a second at most."""
        self._stop.set()
        self._workers.shutdown(cancel_futures=True)
        with contextlib.suppress(queue.Empty):  # the feeding thread may wait for room
            self._batches.get_nowait()
        self._feeder.join(timeout=_PATIENCE)
