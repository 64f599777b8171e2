"""One comparison of two models, stage by stage, on one device in one dtype and precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit_torch.verify.bounds import HALF_PRECISION
from vit_torch.verify.diagnose import Cause, diagnose
from vit_torch.verify.gradients import flax_gradients, torch_gradients
from vit_torch.verify.parity import difference
from vit_torch.verify.results import Checked, Row
from vit_torch.verify.stages import as_dtype, flax_stages, torch_stages
from vit_torch.verify.subject import Subject

HALF = ("bfloat16", "float16")


@contextlib.contextmanager
def _on(place: Any, dtype: str) -> Iterator[None]:
    import jax

    with jax.enable_x64(dtype == "float64"), jax.default_device(place):
        yield


def compare_models(
    subject: Subject,
    other: Subject | None,
    pixels: np.ndarray,
    inputs: Mapping[str, Any],
    place: Any,
    dtype: str,
    precision: str,
    table: Mapping[str, float],
    gradients: bool,
) -> Row:
    """One row: the stages of `subject`'s Flax model against its PyTorch twin's, or against those of
    `other`'s Flax model.

    Args:
        subject, other: the checkpoints; `other` is None where twins are compared.
        pixels: (B, C, H, W).
        inputs: further arguments of the calls; numpy arrays or flags.
        place: JAX device of the Flax models.
        dtype, precision: of `DTYPES` and `PRECISIONS`.
        table: bounds by name, as `BOUNDS`.
        gradients: whether to compare the gradient of every parameter too.
    """
    half = dtype in HALF
    gradients = gradients and not half
    label = place.platform if place.platform == "cpu" else f"{place.platform} {place.device_kind}"

    def of_flax(which: Subject) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        with _on(place, dtype):
            model = which.flax(dtype, precision)
            stages = flax_stages(model, as_dtype(pixels, dtype), **inputs)
            return stages, flax_gradients(model, pixels, inputs, dtype) if gradients else {}

    ours, own = of_flax(subject)
    if other is not None:
        theirs, their_own = of_flax(other)
        against, sides = str(other.name), (str(subject.name), str(other.name))
    else:
        twin = subject.torch(dtype)
        theirs = torch_stages(twin, as_dtype(pixels, "float32" if half else dtype), **inputs)
        their_own = torch_gradients(twin, pixels, inputs, dtype) if gradients else {}
        del twin
        against, sides = f"PyTorch twin, cpu, {dtype}", ("the Flax twin", "the PyTorch twin")
    names, unmatched = _match(ours, theirs, sides)
    if half and other is None:
        exact = torch_stages(subject.torch("float32"), as_dtype(pixels, "float32"), **inputs)
        # A loss is one number: its rounding says nothing.
        stages = [_half(n, ours[n], theirs[n], exact[n]) for n in names if n != "loss"]
        return Row(label, dtype, precision, against, "error ratio", stages, unmatched)
    kind = "float32" if half else dtype
    bound, gradient_bound = table[f"twins {kind}"], table[f"gradients {kind}"]
    # float32 at an accelerator's default precision: TF32 and bfloat16 keep 10 and 7 bits.
    if half or precision == "default":
        bound = gradient_bound = 2.0**-6
    if other is not None:  # the twins' stages are in the order of the PyTorch twin's calls
        names.sort(key=_depth)
    stages = []
    for name in names:
        stage = difference(name, ours[name], theirs[name])
        scale = max(1.0, stage.scale) if np.isfinite(stage.scale) else 1.0
        stages.append(Checked(stage, bound * scale, stage.max_abs))
    names, odd = _match(own, their_own, sides, "gradient of ")
    row = Row(label, dtype, precision, against, "absolute", stages, unmatched + odd)
    # The gradient of a key's bias is zero but for rounding, so one that is tiny beside the others
    # is held against them.
    largest = max((float(np.abs(g).max(initial=0.0)) for g in their_own.values()), default=0)
    for name in names:
        stage = difference(f"gradient of {name}", own[name], their_own[name])
        scale = max(stage.scale, 1e-2 * largest, 1e-300)
        row.stages.append(Checked(stage, gradient_bound, stage.max_abs / scale))
    if row.first_over is not None and precision != "default":
        row.causes = _causes(row, subject, other, ours, pixels, dtype)
    return row


def _match(
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    sides: tuple[str, str],
    prefix: str = "",
) -> tuple[list[str], list[str]]:
    """The names that can be compared, in the order of `theirs`; and what cannot, in words."""
    unmatched = []
    for here, there, who in ((ours, theirs, sides[0]), (theirs, ours, sides[1])):
        alone = [prefix + name for name in here if name not in there]
        if alone:
            unmatched.append(f"{who} alone has {_few(alone)}")
    both = [name for name in theirs if name in ours]
    odd = {name for name in both if ours[name].shape != theirs[name].shape}
    if odd:
        pairs = [f"{prefix}{n} {ours[n].shape} and {theirs[n].shape}" for n in both if n in odd]
        unmatched.append(f"the shapes differ: {_few(pairs)}")
    return [name for name in both if name not in odd], unmatched


def _few(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _depth(name: str) -> tuple[int, int, str]:
    """Where a stage stands in the network."""
    parts = name.split()
    if parts[0] == "block":
        return 1, int(parts[1]) * 10 + ("attention", "MLP", "").index(" ".join(parts[2:])), name
    order = ("patches", "embeddings")
    if name in order:
        return 0, order.index(name), name
    last = ("final norm", "pooled", "head norm")
    return 2, last.index(name) if name in last else len(last), name


def _half(name: str, ours: np.ndarray, theirs: np.ndarray, exact: np.ndarray) -> Checked:
    """In half precision: the Flax twin's error over that of the PyTorch twin."""

    def rms(array: np.ndarray) -> float:
        with np.errstate(invalid="ignore"):
            return float(np.sqrt(np.mean((array - exact) ** 2)))

    stage = difference(name, ours, exact)
    reference = rms(theirs)
    scale = float(np.abs(exact).max(initial=0.0))
    # Below a rounding of the largest value there is nothing to compare.
    floor = 2.0**-12 * scale / max(exact.size, 1) ** 0.5
    # Any error is small beside that of a twin that overflowed.
    ratio = rms(ours) / max(reference, floor, 1e-30) if np.isfinite(reference) else np.nan
    return Checked(stage, HALF_PRECISION, ratio)


def _causes(row, subject, other, ours, pixels, dtype) -> list[Cause] | None:
    over = row.first_over
    if over.stage.name.startswith("gradient"):
        return None
    changed = subject if other is None else other
    # The twin that is changed has the second model's weights; it is to agree with the first.
    model = changed.torch(dtype)
    name = over.stage.name
    number = name.split()[1] if name.startswith("block") else None
    if name in ("patches", "embeddings"):
        fed = as_dtype(pixels, dtype)
    elif number is not None:
        fed = ours["embeddings"] if number == "0" else ours[f"block {int(number) - 1}"]
    elif name == "final norm":
        last = subject.config.num_hidden_layers - 1
        fed = ours[f"block {last}"] if last >= 0 else ours["embeddings"]
    else:
        fed = ours.get("final norm", ours.get("embeddings"))
    height, width = subject.config.patch_height_width
    grid = (pixels.shape[2] // height, pixels.shape[3] // width)
    return diagnose(name, model, fed, ours, over.bound, grid)
