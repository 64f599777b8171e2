"""A stream of images through a network: while it works on one batch the next are decoded, and its
results are fetched when the next has been set off."""

from __future__ import annotations

import atexit
import contextlib
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_common.errors import ImageError, ViTError
from vit_common.images.predictions import Prediction, naming
from vit_flax.inference.engine import Engine, Running
from vit_flax.inference.reader import Batch, Reader

_RUNNING = 2  # batches on the device: one that is computed, one that waits for it
_streams: weakref.WeakSet[Generator[Result, None, None]] = weakref.WeakSet()


@dataclass(frozen=True)
class Result:
    """The result for one image of a stream.

    Attributes:
        source: the image or the name, as it was given.
        error: why there is no value, or None.
    """

    source: Any
    _value: Any = ()
    error: ViTError | None = None

    @property
    def value(self) -> Any:
        """Predictions, features or attention, whichever was asked for; raises `error` if there is
        one."""
        if self.error is not None:
            raise self.error
        return self._value

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """The likeliest classes, best first; raises `error` if there is one."""
        return self.value


@dataclass
class Timings:
    """Where the time of a stream went, in seconds of wall time unless stated otherwise.

    Attributes:
        images: number of images that came out.
        total: from the first image asked for to the last result handed on, less `caller`.
        caller: time the caller spent with results in hand.
        compiling: time spent compiling.
        waiting_for_images: time with nothing left to run: the host could not keep up.
        waiting_for_device: time spent waiting for results.
        decoding: reading and preparing images, added up over the threads that do it.
    """

    images: int = 0
    total: float = 0.0
    caller: float = 0.0
    compiling: float = 0.0
    waiting_for_images: float = 0.0
    waiting_for_device: float = 0.0
    decoding: float = 0.0


def stream(
    open_reader: Callable[[], Reader],
    engine: Engine,
    work: Hashable,
    batch_size: int,
    finish: Callable[[list[np.ndarray]], Any],
    timings: Timings,
    dtype: Any,
) -> Generator[Result, None, None]:
    """Results in the order of the images, as they are ready.

    Args:
        open_reader: begins to read, when the first result is asked for.
        engine: runs the batches.
        work: the program to run, as `engine` knows it.
        batch_size: images in a batch.
        finish: makes a result's value of an image's rows, one row of each array of the program.
        timings: filled in as the stream goes.
        dtype: compute dtype, for the error of an image whose output is not finite.
    """
    found = _stream(open_reader, engine, work, batch_size, finish, timings, dtype)
    _streams.add(found)
    return found


def _stream(
    open_reader: Callable[[], Reader],
    engine: Engine,
    work: Hashable,
    batch_size: int,
    finish: Callable[[list[np.ndarray]], Any],
    timings: Timings,
    dtype: Any,
) -> Generator[Result, None, None]:
    start = time.perf_counter()
    reader = open_reader()
    size = 0
    running: deque[tuple[Batch, Running | None]] = deque()

    def results() -> Iterator[Result]:
        batch, run = running.popleft()
        with _clock(timings, "waiting_for_device"):
            arrays = () if run is None else run.rows()
        for result in _results(batch, arrays, finish, dtype):
            timings.images += 1
            with _clock(timings, "caller"):
                yield result

    try:
        while True:
            # What is ready is set off before results are fetched; the device does not wait. A
            # caller whose images come slowly does not wait for the next batch either.
            if running and (len(running) == _RUNNING or not reader.ready()):
                yield from results()
                continue
            try:
                with _clock(timings, "waiting_for_images"):
                    batch = reader.next()
                if batch is None:
                    break
                if not size:
                    size = engine.bucket(len(batch.sources), batch_size)
                    with _clock(timings, "compiling"):  # while the first batch is decoded
                        engine.compile_ahead(work, size)
                with _clock(timings, "waiting_for_images"):
                    fault = batch.wait()
                nothing = all(batch.errors)  # to run
                run = None if nothing else engine.start(work, batch.pixel_values, size)
                running.append((batch, run))
                if fault is not None:
                    raise fault
            except BaseException:
                while running:  # what came before the fault comes out before it
                    yield from results()
                raise
        while running:
            yield from results()
    finally:
        reader.close()
        timings.decoding = reader.decoding
        timings.total = time.perf_counter() - start - timings.caller


def _results(
    batch: Batch,
    arrays: Sequence[np.ndarray],
    finish: Callable[[list[np.ndarray]], Any],
    dtype: Any,
) -> Iterator[Result]:
    for i, (source, error) in enumerate(zip(batch.sources, batch.errors, strict=True)):
        if error is None and not all(np.isfinite(array[i]).all() for array in arrays):
            error = not_finite(source, dtype)
        if error is not None:
            yield Result(source, error=error)
        else:
            yield Result(source, finish([array[i] for array in arrays]))


def not_finite(source: Any, dtype: Any) -> ImageError:
    """The error of an image whose output is not finite."""
    text = (
        "the model's output is not finite (NaN or infinity): its weights hold such values, or "
        f"{dtype} cannot hold what it computes."
    )
    return ImageError(naming(source, text))


def values_of(results: Generator[Result, None, None]) -> list[Any]:
    """The values of all results; the stream is closed at the first error, which is raised."""
    with contextlib.closing(results):
        return [result.value for result in results]


@atexit.register
def _close_streams() -> None:
    """Close what a script left open, while the modules that closing needs are still there."""
    for each in list(_streams):
        with contextlib.suppress(ValueError):  # a thread is running it
            each.close()


@contextlib.contextmanager
def _clock(timings: Timings, name: str) -> Iterator[None]:
    """Add the time that the block takes."""
    start = time.perf_counter()
    try:
        yield
    finally:
        setattr(timings, name, getattr(timings, name) + time.perf_counter() - start)
