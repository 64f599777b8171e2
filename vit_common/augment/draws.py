"""Random numbers for one image: a function of seed, epoch and image, and of nothing else."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from vit_common.datasets.order import check_seed

_AUGMENT = 16  # apart from the purposes of `vit_common.datasets.order`


class Draws(Protocol):
    """What gives random numbers: a `numpy.random.Generator`. Only this method is used."""

    def random(self) -> float:
        """A number from 0 up to 1, which is not reached."""
        ...


def draws(seed: int, epoch: int, index: int, repeat: int = 0) -> np.random.Generator:
    """The random numbers for one image in one epoch.

    They come from Philox, whose stream is chosen by the arguments alone, so that augmentation is
    the same for any number of threads, processes and machines, and for a run that was resumed.

    Args:
        seed: of the run.
        epoch: counted from 0.
        index: of the image in its data set.
        repeat: 0 the first time that the image comes in this epoch, then 1 and so on.

    Example:
        >>> draws(0, 3, 17).random() == draws(0, 3, 17).random()
        True
    """
    names = ("seed", "epoch", "index", "repeat")
    seed, epoch, index, repeat = map(check_seed, names, (seed, epoch, index, repeat))
    key = np.array([seed, _AUGMENT], np.uint64)
    counter = np.array([0, index, epoch, repeat], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def uniform(source: Draws, low: float, high: float) -> float:
    """A number from `low` to `high`, by the formula of Python's `random.uniform`."""
    return low + (high - low) * source.random()


def integer(source: Draws, low: int, high: int) -> int:
    """An integer from `low` to `high`, both included."""
    return low + int(source.random() * (high - low + 1))


def gauss(source: Draws, mean: float, deviation: float) -> float:
    """A normal number, by the formula of Box and Muller (1958) from two uniform ones."""
    angle = source.random() * 2 * math.pi
    radius = math.sqrt(-2.0 * math.log(1.0 - source.random()))
    return mean + math.cos(angle) * radius * deviation
