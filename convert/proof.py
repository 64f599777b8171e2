"""The proof of a conversion: what was written is read again and compared."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import numpy as np

from vit_common.config import ViTConfig
from vit_common.errors import CheckpointError, some
from vit_common.files.checkpoint import open_checkpoint
from vit_common.files.containers.tensor import DTYPES
from vit_convert.forward import forward
from vit_convert.plan import Plan
from vit_convert.report import Verification
from vit_convert.source import Source, open_source, read_tensors

_RELATIVE = 1e-9
"""Bound on differences of outputs over the largest. Both passes are float64, whose rounding leaves
1e-15 to 1e-13; a wrong epsilon of 1e-12 instead of 1e-6 leaves over 1e-7."""

_MOST_PATCHES = 2_600
"""Of an image to verify with: a configuration without positions can claim any size."""


def verify_result(plan: Plan, written: Path) -> Verification:
    """Read the result again: every tensor equal to the bit, and the same outputs.

    Raises:
        CheckpointError: it is not so.
    """
    with _open_result(plan, written) as (config, tensors):
        missing = sorted(set(plan.tensors) ^ set(tensors))
        if missing:
            raise CheckpointError(
                f"verification failed: {', '.join(missing[:12])} are not in both source and result."
            )
        for name, tensor in plan.tensors.items():
            wanted, given = tensor.read(), tensors[name].read()
            if wanted.dtype != given.dtype or wanted.shape != given.shape:
                raise CheckpointError(
                    f"verification failed: {name} is {given.dtype} {given.shape} in the result; "
                    f"wanted {wanted.dtype} {wanted.shape}."
                )
            if not _same_bits(wanted, given):
                raise CheckpointError(f"verification failed: {name} differs in the result.")
            del wanted, given
        verification = Verification(len(plan.tensors))
        small = not config.is_text and plan.config.num_patches <= _MOST_PATCHES
        if isinstance(config.hidden_act, str) and small:
            _compare_outputs(plan, config, tensors, verification)
    return verification


@contextlib.contextmanager
def _open_result(plan: Plan, written: Path):
    """Configuration and canonical tensors of what was written, read as anyone would."""
    if written.is_dir() or written.suffix == ".safetensors":
        with open_source(written, format=plan.to) as source:
            yield source.config, source.mapped.tensors
        return
    with open_checkpoint(written) as checkpoint:
        hints = {"model_type": plan.config.base_family}
        read = read_tensors(checkpoint, format=plan.to, hints=hints)
        yield plan.config, read.mapped.tensors


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    bits = {8: np.uint64, 4: np.uint32, 2: np.uint16}[a.dtype.itemsize]
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return bool(np.array_equal(a.view(bits), b.view(bits)))


def _compare_outputs(plan, config, tensors, verification) -> None:
    """Run source and result on one random image.

    What was written holds the plan's weights to the bit, so its outputs must be the plan's,
    whatever the dtype. How far a narrower dtype moves the outputs of the source is reported, not
    judged.
    """
    resampled = plan.config.grid_size != plan.source.config.grid_size
    rounded = plan.dtype != _widest(plan.source)
    rng = np.random.default_rng(0)
    height, width = plan.config.image_height_width
    image = rng.standard_normal((plan.config.num_channels, height, width))
    with np.errstate(all="ignore"):
        planned = forward(plan.config, plan.tensors, image)
        given = forward(config, tensors, image)
        wanted = planned
        if rounded and not resampled:
            wanted = forward(plan.source.config, plan.source.mapped.tensors, image)
    scale = float(np.abs(planned).max(initial=0.0))
    difference = float(np.abs(planned - given).max(initial=0.0))
    bound = _RELATIVE * max(scale, 1e-3)
    if not difference <= bound and math.isfinite(scale):
        raise CheckpointError(
            f"verification failed: with equal weights, the outputs of source and result differ by "
            f"{difference:.3g} (largest output {scale:.3g}, bound {bound:.3g}). "
            + _other_fields(plan.config, config)
            + " Nothing was written."
        )
    verification.logits_max_abs = float(np.abs(wanted - given).max(initial=0.0))
    verification.logits_scale = float(np.abs(wanted).max(initial=0.0))


def _other_fields(wanted: ViTConfig, given: ViTConfig) -> str:
    """Which fields of the configuration read back are not those of the plan."""
    a, b = wanted.to_dict(), given.to_dict()
    names = sorted(set(a) | set(b))
    other = [f"{n} ({b.get(n)!r} instead of {a.get(n)!r})" for n in names if a.get(n) != b.get(n)]
    if not other:
        return "The configuration read back is the same in every field."
    return f"The configuration read back differs in {some(other, 12)}."


def _widest(source: Source) -> str:
    names = {t.dtype.name for t in source.mapped.tensors.values()}
    return max(names, key=lambda name: DTYPES[name].itemsize)
