"""`verify`: which comparisons to run, and all of them in order."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vit_common.errors import InputError
from vit_common.versions import PACKAGE, versions
from vit_torch.verify.bounds import BOUNDS
from vit_torch.verify.compare import HALF, compare_models
from vit_torch.verify.pixels import compare_pixels, model_inputs
from vit_torch.verify.results import Row, Verification
from vit_torch.verify.subject import Subject

DTYPES = ("float64", "float32", "bfloat16", "float16")
PRECISIONS = ("highest", "default")

PACKAGES = ("python", PACKAGE, "jax", "jaxlib", "flax", "torch", "numpy", "transformers")


def verify(
    first: str | os.PathLike,
    second: str | os.PathLike | None = None,
    *,
    images: Sequence[Any] | None = None,
    devices: Sequence[str] = ("cpu",),
    dtypes: Sequence[str] = ("float32",),
    image_size: tuple[int, int] | None = None,
    batch: int = 2,
    gradients: bool = False,
    format: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    ignore: Iterable[str] = (),
    bounds: Mapping[str, float] | None = None,
    **hub: Any,
) -> Verification:
    """Compare a checkpoint's Flax and PyTorch twins, or two checkpoints.

    Args:
        first, second: directory, weights file or Hub name; in any format.
        images: PIL images or arrays; None means random numbers.
        devices: "cpu", "gpu", "tpu": where the Flax models run. The PyTorch twin runs on the CPU.
        dtypes: names from `DTYPES`. float64 and float32 have an absolute bound; half precision is
            compared with the PyTorch twin's own error.
        image_size: (height, width) other than the model's; positions are resampled.
        batch: number of random images; given `images`, left at 2.
        gradients: compare the gradient of every parameter as well, in float64 and float32.
        format: format of both checkpoints, if it cannot be detected.
        overrides: fields of both configurations that win over what the files say.
        ignore: regular expressions of names of tensors that may be left out.
        bounds: bounds by name, in place of those in `vit_torch.verify.bounds.BOUNDS`.
        **hub: options of the Hub.

    Returns:
        The rows; `passed` says whether all stages were within their bounds.

    Raises:
        ViTError: a model cannot be loaded, the two cannot be compared, or an option is wrong.
    """
    for name, given, known in (
        ("dtypes", dtypes, DTYPES),
        ("devices", devices, ("cpu", "gpu", "tpu")),
    ):
        wrong = [value for value in given if value not in known]
        if wrong or not given:
            odd = repr(wrong[0]) if wrong else "none"
            raise InputError(f"`{name}` must be of {', '.join(known)}; given {odd}.")
    if images and batch != 2:
        raise InputError(f"`batch` is of random images; given {batch!r} beside `images`.")
    table = {**BOUNDS, **(bounds or {})}
    runs, notes = plan(places(devices), dtypes, gradients)
    subject = Subject(first, format, hub, overrides, ignore)
    other = None if second is None else Subject(second, format, hub, overrides, ignore)
    if other is not None:
        subject.check_like(other, but=("image_size",) if image_size is not None else ())
    pixels, size = model_inputs(subject, images, image_size, batch)
    inputs: dict[str, Any] = {}
    if size != subject.config.image_height_width:
        inputs["interpolate_pos_encoding"] = True
    inputs |= subject.extra_inputs(len(pixels), size)
    rows: list[Row] = []
    if other is not None:
        notes = subject.differences(other) + notes
        prepared = compare_pixels(subject, other, images)
        if isinstance(prepared, Row):
            rows.append(prepared)
        else:
            notes.append(prepared)
    for place, dtype, precision in runs:
        rows.append(
            compare_models(
                subject, other, pixels, inputs, place, dtype, precision, table, gradients
            )
        )
        gc.collect()
    return Verification(
        first=str(first),
        second=None if second is None else str(second),
        family=subject.config.model_type,
        head=subject.head,
        image_size=size,
        batch=len(pixels),
        rows=rows,
        versions=versions(*PACKAGES),
        notes=notes,
    )


def places(devices: Sequence[str]) -> list[Any]:
    """The JAX devices, one of each kind."""
    import jax

    places = []
    for name in dict.fromkeys(devices):
        try:
            places.append(jax.local_devices(backend=name)[0])
        except RuntimeError as error:
            here = ", ".join(sorted({d.platform for d in jax.devices()}))
            raise InputError(f"there is no {name} for JAX here; there is {here}.") from error
    return places


def plan(
    places: Sequence[Any], dtypes: Sequence[str], gradients: bool
) -> tuple[list[tuple[Any, str, str]], list[str]]:
    """(device, dtype, precision) of every row, and notes on what was asked for and is left out.

    Where float32 can mean less than float32, both precisions are run.

    Raises:
        InputError: nothing is left.
    """
    runs, notes = [], []
    for dtype in dtypes:
        for place in places:
            if place.platform == "tpu" and dtype == "float64":
                notes.append("float64 was left out on the tpu, which has none")
            elif dtype == "float32" and place.platform != "cpu":
                runs += [(place, dtype, precision) for precision in PRECISIONS]
            else:
                runs.append((place, dtype, "highest"))
    exact = [dtype for _, dtype, _ in runs if dtype not in HALF]
    half = [dtype for dtype in dtypes if dtype in HALF]
    if gradients and half:
        notes.append(f"gradients were left out in {', '.join(half)}: only of float64 and float32")
    if not runs or (gradients and not exact):
        raise InputError(
            f"nothing of what was asked for can be compared: {'; '.join(notes)}; name another of "
            "`dtypes`."
        )
    return runs, notes
