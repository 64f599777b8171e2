"""The arithmetic of one adapted layer: W + scale B A, and DoRA's norm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vit_common.errors import CheckpointError
from vit_convert.adapters.settings import scale


@dataclass(frozen=True)
class LowRank:
    """The change of one layer's weight, in PEFT's layouts.

    Attributes:
        a: (r, in) of a dense layer; (r, C, P, P) of a convolution.
        b: (out, r); (out, r, 1, 1).
        alpha: the scale is alpha / r, or with `rslora` alpha / sqrt(r).
        rslora: which of the two.
        magnitude: DoRA's norms, (out,) or (1, out, 1, 1); None without.
        bias: what is added to the layer's bias before scaling, (out,); None without.
    """

    a: np.ndarray
    b: np.ndarray
    alpha: float
    rslora: bool = False
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """r."""
        return int(self.a.shape[0])

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return scale(self.rank, self.alpha, self.rslora)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this changes."""
        return (self.b.shape[0], *self.a.shape[1:])

    def fault(self, weight: tuple[int, ...]) -> str | None:
        """Why this cannot change a weight of that shape, or None."""
        a, b, r = self.a.shape, self.b.shape, self.rank
        ones = (1,) * (len(weight) - 2)
        if len(a) != len(weight) or len(b) != len(weight) or b[1:] != (r, *ones):
            return f"A {a} and B {b} are not of one rank and of a weight {weight}"
        if self.shape != tuple(weight):
            return f"it is for a weight {self.shape}; the base model's is {tuple(weight)}"
        for what, array in (("magnitude", self.magnitude), ("bias", self.bias)):
            if array is not None and array.size != weight[0]:
                return f"its {what} has {array.size} values; the layer has {weight[0]} outputs"
        return None

    def apply(self, weight: np.ndarray) -> np.ndarray:
        """The layer's new weight, in its dtype; computed in float64 and rounded once.

        Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; Liu et al. 2024
        (arXiv:2402.09353), equation 5.
        """
        r = self.rank
        delta = self.b.reshape(-1, r).astype(np.float64) @ self.a.reshape(r, -1).astype(np.float64)
        out = weight.astype(np.float64) + self.scale * delta.reshape(weight.shape)
        if self.magnitude is not None:
            rows = out.reshape(len(out), -1)
            norm = np.sqrt(np.square(rows).sum(axis=1))
            factor = self.magnitude.reshape(-1).astype(np.float64) / norm
            out = (rows * factor[:, None]).reshape(weight.shape)
        return out.astype(weight.dtype)

    def apply_bias(self, bias: np.ndarray) -> np.ndarray:
        """The layer's new bias, in its dtype."""
        assert self.bias is not None
        added = self.scale * self.bias.astype(np.float64)
        if self.magnitude is not None:
            raise CheckpointError("`lora_bias` together with `use_dora` cannot be merged.")
        return (bias.astype(np.float64) + added).astype(bias.dtype)


def join(first: LowRank | None, second: LowRank | None, rows: int) -> LowRank:
    """One change of a weight (2 I, in) from those of its halves, (I, in) each; None is no change.

    Halves with the same A share it; others get one each, in a rank that is the sum of theirs.

    Args:
        first, second: the changes, of which one at least is not None.
        rows: I.
    """
    some = first if first is not None else second
    assert some is not None
    if first is None or second is None:
        nothing = np.zeros((rows, some.rank), some.b.dtype)
        parts = (nothing, some.b) if first is None else (some.b, nothing)
        if some.magnitude is not None or some.bias is not None:
            raise CheckpointError(
                "DoRA on one half of a SwiGLU's first layer cannot be merged: wanted both of "
                "gate_proj and up_proj, or none."
            )
        return LowRank(some.a, np.concatenate(parts), some.alpha, some.rslora)
    magnitude, bias = (
        None if x is None or y is None else np.concatenate([x.reshape(-1), y.reshape(-1)])
        for x, y in ((first.magnitude, second.magnitude), (first.bias, second.bias))
    )
    shared = first.alpha == second.alpha and np.array_equal(first.a, second.a)
    if shared:
        b = np.concatenate([first.b, second.b])
        return LowRank(first.a, b, first.alpha, first.rslora, magnitude, bias)
    r, q = first.rank, second.rank
    b = np.zeros((2 * rows, r + q), first.b.dtype)
    b[:rows, :r] = first.b
    b[rows:, r:] = second.b * np.asarray(second.scale / first.scale, second.b.dtype)
    if bias is not None:
        bias[rows:] *= second.scale / first.scale
    size = (r + q) ** (0.5 if first.rslora else 1)
    a = np.concatenate([first.a, second.a])
    return LowRank(a, b, first.scale * size, first.rslora, magnitude, bias)


def split(both: LowRank) -> tuple[LowRank, LowRank]:
    """Undo `join` for halves that share A: those of a weight (2 I, in)."""

    def half(array: np.ndarray | None, i: int) -> np.ndarray | None:
        return None if array is None else np.split(array.reshape(-1), 2)[i]

    b = np.split(both.b, 2)
    gate, up = (
        LowRank(both.a, b[i], both.alpha, both.rslora, half(both.magnitude, i), half(both.bias, i))
        for i in (0, 1)
    )
    return gate, up
