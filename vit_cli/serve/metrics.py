"""Numbers for Prometheus, in its text format (version 0.0.4)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping

TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Histogram:
    """Counts of values up to each of some bounds."""

    def __init__(self, bounds: Iterable[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        place = next((i for i, bound in enumerate(self._bounds) if value <= bound), -1)
        self._counts[place] += 1
        self._sum += value

    def lines(self, name: str) -> list[str]:
        found, total = [], 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            found.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*found, f"{name}_sum {self._sum}", f"{name}_count {total}"]


class Metrics:
    """What a server has done so far.

    Attributes:
        images: (work, outcome) -> images; outcomes are ok, refused and failed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds = Histogram(_SECONDS)
        self.images: Counter[tuple[str, str]] = Counter()

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request was answered."""
        with self._lock:
            self._requests[path, status] += 1
            self._seconds.observe(seconds)

    def image(self, work: str, outcome: str) -> None:
        """An image was answered."""
        with self._lock:
            self.images[work, outcome] += 1

    def text(self, batches: Mapping[int, int], gauges: Mapping[str, tuple[str, float]]) -> str:
        """All of it.

        Args:
            batches: number of images -> batches that had so many.
            gauges: name -> (what it is, value now).
        """
        with self._lock:
            lines = _head("vit_requests_total", "counter", "Requests answered.")
            lines += [
                f'vit_requests_total{{path="{path}",status="{status}"}} {count}'
                for (path, status), count in sorted(self._requests.items())
            ]
            lines += _head("vit_images_total", "counter", "Images, by what became of them.")
            lines += [
                f'vit_images_total{{work="{work}",outcome="{outcome}"}} {count}'
                for (work, outcome), count in sorted(self.images.items())
            ]
            lines += _head("vit_request_seconds", "histogram", "Seconds from request to answer.")
            lines += self._seconds.lines("vit_request_seconds")
        lines += _head("vit_batch_images", "histogram", "Images that were run together.")
        lines += _of_counts(batches)
        for name, (what, value) in gauges.items():
            lines += [*_head(name, "gauge", what), f"{name} {value}"]
        return "\n".join(lines) + "\n"


def _of_counts(batches: Mapping[int, int]) -> list[str]:
    """A histogram of numbers that were counted already."""
    bounds = [1 << i for i in range(11)]
    counts = dict(batches)
    lines = []
    for bound in bounds:
        total = sum(count for size, count in counts.items() if size <= bound)
        lines.append(f'vit_batch_images_bucket{{le="{bound}"}} {total}')
    every = sum(counts.values())
    return [
        *lines,
        f'vit_batch_images_bucket{{le="+Inf"}} {every}',
        f"vit_batch_images_sum {sum(size * count for size, count in counts.items())}",
        f"vit_batch_images_count {every}",
    ]


def _head(name: str, kind: str, what: str) -> list[str]:
    return [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
