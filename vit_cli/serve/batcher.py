"""Gathers images of many requests into batches: a batch is what came while the device was busy."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Slot:
    """The place of one image.

    Attributes:
        work: what is to be made of it.
        settle: called once, from any thread, with the value, an exception, or None where nobody
            waits any more.
        gone: set where nobody waits any more.
    """

    work: Hashable
    settle: Callable[[Any], object]
    gone: threading.Event = field(default_factory=threading.Event)
    pixels: np.ndarray | None = None


class Batcher:
    """Runs images of one kind of work together, oldest first. The device never waits for a batch
    to be full, nor an image for another once the device is free.

    Args:
        run: work and pixels (B, C, H, W) -> an array with a row for each image.
        sizes: work -> images that are run together at most.
        runners: batches at a time.
    """

    def __init__(
        self,
        run: Callable[[Hashable, np.ndarray], np.ndarray],
        sizes: dict[Hashable, int],
        runners: int = 1,
    ) -> None:
        self._run, self._sizes = run, sizes
        self._waiting: deque[Slot] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self.batches: Counter[int] = Counter()
        """Number of images -> batches that had so many."""
        self.rate = 0.0
        """Images per second while there is work, of late."""
        self._threads = [
            threading.Thread(target=self._work, name=f"vit-run-{i}", daemon=True)
            for i in range(runners)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, slot: Slot) -> None:
        """Have an image's turn come."""
        with self._changed:
            if not self._closing:
                self._waiting.append(slot)
                self._changed.notify()
                return
        slot.settle(None)

    def close(self) -> None:
        """Finish what is running; what waits is settled with None."""
        with self._changed:
            self._closing = True
            left, self._waiting = list(self._waiting), deque()
            self._changed.notify_all()
        for slot in left:
            slot.settle(None)
        for thread in self._threads:
            thread.join()

    def _take(self) -> list[Slot]:
        """The next batch; none at the end."""
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            if not self._waiting:
                return []
            work = self._waiting[0].work
            taken: list[Slot] = []
            rest: deque[Slot] = deque()
            while self._waiting and len(taken) < self._sizes[work]:
                slot = self._waiting.popleft()
                (taken if slot.work == work else rest).append(slot)
            self._waiting.extendleft(reversed(rest))
            return taken

    def _batches(self) -> Iterator[list[Slot]]:
        while batch := self._take():
            yield batch

    def _work(self) -> None:
        for batch in self._batches():
            there = [slot for slot in batch if not slot.gone.is_set()]
            for slot in batch:
                if slot.gone.is_set() and slot not in there:
                    slot.settle(None)
            if there:
                self._one(there)

    def _one(self, batch: Sequence[Slot]) -> None:
        start = time.perf_counter()
        try:
            pixels = np.stack([slot.pixels for slot in batch if slot.pixels is not None])
            rows: Any = self._run(batch[0].work, pixels)
        except BaseException as error:  # whoever waits must hear of it
            rows = [error] * len(batch)
        rate = len(batch) / max(1e-6, time.perf_counter() - start)
        with self._changed:
            self.batches[len(batch)] += 1
            self.rate = 0.8 * self.rate + 0.2 * rate if self.rate else rate
        for slot, row in zip(batch, rows, strict=True):
            slot.pixels = None
            slot.settle(row)
