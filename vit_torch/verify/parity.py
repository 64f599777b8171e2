"""Runs both twins on the same weights and images and compares them stage by stage.

To compare is the one work here that needs JAX: this module, `stages` and `verify` run Flax models,
and what they need of JAX they import where they do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vit_common.errors import InputError
from vit_torch.pretrained import ViTPreTrainedModel, to_numpy
from vit_torch.verify.stages import as_tensors


@dataclass(frozen=True)
class Stage:
    """How far the twins are apart after one stage.

    Attributes:
        name: "embeddings", "block 0" ..., "final norm", "pooler", "logits", "loss" ....
        max_abs: largest absolute difference.
        scale: largest absolute value of the PyTorch twin's result.
        where: index of the largest difference.
    """

    name: str
    max_abs: float
    scale: float
    where: tuple[int, ...]

    @property
    def relative(self) -> float:
        """`max_abs` over `scale`."""
        return self.max_abs / self.scale if self.scale else self.max_abs


@dataclass(frozen=True)
class ParityReport:
    """The stages, in the order of the network."""

    stages: tuple[Stage, ...]

    @property
    def largest(self) -> Stage:
        """The stage with the largest absolute difference; NaN counts as largest."""
        return max(self.stages, key=lambda s: np.inf if np.isnan(s.max_abs) else s.max_abs)

    def first_over(self, bound: float) -> Stage | None:
        """The first stage whose absolute difference is over `bound` (or NaN), or None."""
        return next((s for s in self.stages if not s.max_abs <= bound), None)


def difference(name: str, ours: Any, theirs: Any) -> Stage:
    """One stage from two arrays of the same shape.

    Raises:
        InputError: the shapes differ.
    """
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape:
        raise InputError(f"{name}: the shapes differ, {a.shape} and {b.shape}.")
    with np.errstate(invalid="ignore"):  # infinity less infinity is NaN, and is told as that
        error = np.abs(a - b)
    where = np.unravel_index(int(np.argmax(error)), error.shape) if error.size else ()
    return Stage(
        name,
        float(error.max(initial=0.0)),
        float(np.abs(b).max(initial=0.0)),
        tuple(int(i) for i in where),
    )


def compare(flax_model: Any, torch_model: ViTPreTrainedModel, pixel_values: Any, **inputs: Any):
    """Compare a Flax model and its PyTorch twin that hold the same weights.

    Args:
        flax_model: a model of `vit_flax` with its parameters.
        torch_model: its twin; run in evaluation mode, without gradients, and left as it was.
        pixel_values: numpy array (B, C, H, W).
        **inputs: further arguments of both calls, as numpy arrays (`labels`, `head_mask`,
            `bool_masked_pos`) or flags (`interpolate_pos_encoding`).

    Returns:
        ParityReport over embeddings, every block, every attention, and each field of the output.

    Raises:
        InputError: the two are not twins.
    """
    wanted = type(flax_model).__name__.removeprefix("Flax")
    if wanted != type(torch_model).__name__:
        raise InputError(f"`torch_model` must be a {wanted}; given {type(torch_model).__name__}.")
    flags = {"output_hidden_states": True, "output_attentions": True, "return_dict": True}
    ours = flax_model(pixel_values, **inputs, **flags)
    device = torch_model.device

    training = torch_model.training
    try:
        with torch.no_grad():
            theirs = torch_model.eval()(
                torch.as_tensor(np.asarray(pixel_values), device=device),
                **as_tensors(inputs, device),
                **flags,
            )
    finally:
        torch_model.train(training)

    names = ["embeddings"] + [f"block {i}" for i in range(len(ours.hidden_states) - 1)]
    pairs = list(zip(names, ours.hidden_states, theirs.hidden_states, strict=True))
    pairs += [
        (f"attention {i}", a, b)
        for i, (a, b) in enumerate(zip(ours.attentions, theirs.attentions, strict=True))
    ]
    titles = {"last_hidden_state": "final norm", "pooler_output": "pooler"}
    for name in theirs:
        if name not in ("hidden_states", "attentions"):
            pairs.append((titles.get(name, name), ours[name], theirs[name]))
    return ParityReport(tuple(difference(name, np.asarray(a), to_numpy(b)) for name, a, b in pairs))
