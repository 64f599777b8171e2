"""Images for the network, read ahead of it: decoded and prepared by threads, in order, a bounded
number of batches at a time."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from vit_common.errors import ViTError

_AHEAD = 1  # batches in the queue; the feeding thread holds another, and the caller may


class _End:
    """There are no more images."""


@dataclass
class Batch:
    """Images that go through the network together.

    Attributes:
        sources: the images or names, as they were given.
        pixel_values: (B, C, H, W); rows of images with an error are zero.
        errors: for each image why it could not be read, or None; whole after `wait`.
    """

    sources: list[Any]
    pixel_values: np.ndarray
    _rows: list[Future[ViTError | None]] = field(default_factory=list)
    errors: list[ViTError | None] = field(default_factory=list)

    def wait(self) -> Batch:
        """Itself, once every image is there; raises what is not an image's own fault."""
        self.errors = [row.result() for row in self._rows]
        return self

    @property
    def ready(self) -> bool:
        return all(row.done() for row in self._rows)


class Reader:
    """Batches of an iterable of images.

    One thread asks the iterable for images, so that nothing waits for it that need not; `workers`
    threads decode and prepare them (Pillow lets go of Python's lock while it decodes).

    Args:
        images: what is read, asked for no further than three batches ahead of the caller.
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
        """Seconds that the threads spent on images, added up over them."""
        self._lock = threading.Lock()
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="vit-decode")
        self._feeder = threading.Thread(target=self._feed, name="vit-read", daemon=True)
        self._feeder.start()

    def _feed(self) -> None:
        end: BaseException | _End = _End()
        try:
            while not self._stop.is_set() and isinstance(end, _End):
                sources: list[Any] = []
                try:
                    sources.extend(islice(self._images, self._batch_size))
                except BaseException as error:  # whatever it is, the caller gets it back, after
                    end = error  # the images that came before it
                if not sources:
                    break
                pixel_values = np.zeros((len(sources), *self._shape), self._dtype)
                rows = [
                    self._workers.submit(self._row, source, pixel_values, i)
                    for i, source in enumerate(sources)
                ]
                if not self._put(Batch(sources, pixel_values, rows)):
                    return
        except RuntimeError as error:  # no more images are taken: the reader was closed
            end = error
        self._put(end)

    def _put(self, item: Batch | BaseException | _End) -> bool:
        """Whether anyone still wanted it."""
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
        """The next batch, to be waited for; None at the end. What the iterable raised is raised
        here."""
        item, self._next = self._next, None
        if item is None:
            item = self._batches.get()
        if isinstance(item, BaseException):
            raise item
        return item if isinstance(item, Batch) else None

    def close(self) -> None:
        """Stop reading; images that are being decoded are finished first."""
        self._stop.set()
        self._workers.shutdown(cancel_futures=True)
