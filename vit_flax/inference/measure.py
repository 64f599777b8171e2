"""The speed of an `ImageClassifier`, beside that of bare matrix products on the same device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from vit_flax.cpu.half import half_product, operand_dtype
from vit_flax.inference.classifier import ImageClassifier
from vit_flax.inference.stream import Timings


@dataclass(frozen=True)
class Rate:
    """Images per second of the network alone, from pixels in the host's memory to probabilities.

    Attributes:
        batch_size: images at once.
        samples: images per second of each round.
        limit: images per second if there were nothing but the matrix products, at the rate that
            was measured between the same rounds.
    """

    batch_size: int
    samples: tuple[float, ...]
    limit: tuple[float, ...]

    @property
    def images_per_second(self) -> float:
        """The median."""
        return float(np.median(self.samples))

    @property
    def share(self) -> float:
        """Share of `limit`, median of the rounds."""
        return float(np.median(np.asarray(self.samples) / np.asarray(self.limit)))


class Products:
    """Matrix products as wide as the network's MLP: the most that the device can do.

    Args:
        config: the sizes.
        rows: of the left operand; tokens times images.
        dtype: of both operands.
    """

    def __init__(self, config: Any, rows: int, dtype: Any) -> None:
        D, inner = config.hidden_size, config.intermediate_size
        left, right = jax.random.split(jax.random.key(0))
        self._left = jax.random.normal(left, (rows, D), dtype)
        self._right = jax.random.normal(right, (D, inner), dtype)
        back = jax.random.normal(right, (inner, D), dtype)
        self._flops = 4.0 * rows * D * inner

        @jax.jit
        def run(x: jax.Array, there: jax.Array, back: jax.Array) -> jax.Array:
            if operand_dtype(dtype) is None:
                return (x @ there) @ back
            return half_product(half_product(x, there, dtype), back, dtype)

        self._run = lambda: jax.block_until_ready(run(self._left, self._right, back))
        self._run()

    def rate(self, seconds: float) -> float:
        """Floating point operations per second, the best measured within `seconds`."""
        best, end = 0.0, time.perf_counter() + seconds
        while not best or time.perf_counter() < end:
            start = time.perf_counter()
            self._run()
            best = max(best, self._flops / (time.perf_counter() - start))
        return best


def network_rate(
    classify: ImageClassifier, batch_size: int, rounds: int = 5, seconds: float = 1.0
) -> Rate:
    """Measure the network at one batch size, alternating with matrix products.

    Args:
        classify: the classifier; the size is compiled first.
        batch_size: images at once.
        rounds: number of rounds; each takes at least `seconds`.
    """
    config = classify.config
    run = classify.runner(batch_size)
    pixels = random_pixels(classify, batch_size)
    run(pixels)
    # As many rows as are worked on at once, but enough to fill any device, and not without end.
    rows = int(np.clip(batch_size * classify.engine.tokens, 512, 16_384))
    products = Products(config, rows, classify.model.dtype)
    flops = classify.flops
    samples, limits = [], []
    for _ in range(rounds):
        limits.append(products.rate(seconds / 4) / flops)
        start, count = time.perf_counter(), 0
        while not count or time.perf_counter() - start < seconds:
            run(pixels)
            count += batch_size
        samples.append(count / (time.perf_counter() - start))
    return Rate(batch_size, tuple(samples), tuple(limits))


def random_pixels(classify: ImageClassifier, batch_size: int) -> np.ndarray:
    """Random pixels (B, C, H, W) as `run` takes them."""
    shape = (batch_size, classify.config.num_channels, *classify.image_size)
    rng = np.random.default_rng(0)
    if classify.engine.dtype == np.uint8:
        return rng.integers(0, 256, shape, np.uint8)
    return rng.standard_normal(shape, np.float32)


def stream_rate(
    classify: ImageClassifier, names: Sequence[Any], batch_size: int, images: int
) -> Timings:
    """Classify a number of images from files, going through the names again and again."""

    def endless() -> Iterator[Any]:
        for i in range(images):
            yield names[i % len(names)]

    for result in classify.stream(endless(), batch_size=batch_size):
        result.predictions  # noqa: B018  # a file that cannot be read ends the measurement
    return classify.timings


def host_rate(classify: ImageClassifier, names: Sequence[Any], seconds: float = 2.0) -> float:
    """Images per second that one thread reads and prepares."""
    start, count = time.perf_counter(), 0
    while not count or time.perf_counter() - start < seconds:
        classify.preparer.one(names[count % len(names)])
        count += 1
    return count / (time.perf_counter() - start)
