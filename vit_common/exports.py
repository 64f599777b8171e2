"""What exports of both twins have in common: options, what is measured on, what is reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vit_common.errors import CheckpointError, InputError, shown
from vit_common.images.processor import BaseImageProcessor
from vit_common.parameters import Head
from vit_common.versions import versions as installed

DYNAMIC = "dynamic"
"""As `batch`: any number of images."""

Reference = Callable[[np.ndarray], np.ndarray]
"""From `pixel_values` (B, C, H, W), float32 and normalised, to logits or features."""

BOUNDS = {"float32": 2e-5, "bfloat16": 0.05, "float16": 0.01}
"""Largest difference from the model itself, by what it computes in, that an export may have;
multiplied by the largest output where that is above one."""


@dataclass
class Export:
    """What was written.

    Attributes:
        path: the file.
        bytes: its size.
        metadata: what is in it about the program.
        check: what was measured; None if nothing was.
        seconds: name of a step -> how long it took.
        program: a Python program beside the file that runs it; None if there is none.
    """

    path: Path
    bytes: int
    metadata: dict[str, Any]
    check: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    program: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; of the labels their number."""
        metadata = {k: v for k, v in self.metadata.items() if k != "labels"}
        metadata["num_labels"] = len(self.metadata["labels"])
        found = {**asdict(self), "path": str(self.path), "metadata": metadata}
        if self.program is None:
            del found["program"]
        else:
            found["program"] = str(self.program)
        return found


def check_batch(batch: Any) -> None:
    """Raise InputError unless it is a positive integer or `DYNAMIC`."""
    if batch != DYNAMIC and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise InputError(
            f"`batch` must be a positive integer or {DYNAMIC!r}; given {shown(batch)}."
        )


def check_output(model: str, head: Head | None, output: str) -> None:
    """Raise InputError unless a model with that head gives that output."""
    if output not in ("logits", "features"):
        raise InputError(f"`output` must be 'logits' or 'features'; given {shown(output)}.")
    if output == "logits" and head not in ("classifier", "teacher"):
        raise InputError(
            f"{model} has no classifier, so there are no logits to export; export its features "
            'with --output features (in Python a base network and `output="features"`).'
        )
    if output == "features" and head is not None:
        raise InputError(
            f"`output` 'features' is for a base network, such as `FlaxAutoModel` or `AutoModel`; "
            f"given a {model}."
        )


def versions(*names: str) -> dict[str, str]:
    """Version by name; "unknown" for what is not installed."""
    return {name: found or "unknown" for name, found in installed(*names).items()}


def random_pixels(
    processor: BaseImageProcessor, shape: tuple[int, int, int], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Random pictures (B, C, H, W), uint8, and the same as the processor makes of them, float32."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)
    prepared = processor(
        pixels,
        do_resize=False,
        do_center_crop=False,
        do_convert_rgb=False,
        input_data_format="channels_first",
        return_tensors="np",
    )["pixel_values"]
    return pixels, prepared.astype(np.float32)


def measure(found: np.ndarray, references: Mapping[str, np.ndarray], dtype: str) -> dict[str, Any]:
    """The largest difference of an export from each reference, and the largest output.

    Args:
        found: what the export gives.
        references: name -> what it should give; the first is the model itself.
        dtype: what that computes in.

    Raises:
        CheckpointError: a shape differs, an output is not finite, or the difference from the model
            itself, or in float32 from any reference, is out of bounds.
    """
    own = next(iter(references))
    largest = float(np.abs(references[own]).max())
    bound = BOUNDS.get(dtype, BOUNDS["float32"]) * max(1.0, largest)
    errors = {}
    for name, wanted in references.items():
        if found.shape != wanted.shape:
            raise CheckpointError(
                f"the exported program gives an array of shape {found.shape}, {name} one of "
                f"{wanted.shape}; nothing was written."
            )
        if not np.isfinite(wanted).all():
            raise CheckpointError(
                f"the output of the model ({name}) is not finite (NaN or infinity): its weights "
                f"hold such values, or {dtype} cannot hold what it computes; nothing was written."
            )
        errors[name] = float(np.abs(found - wanted).max())
        # A half-precision network is as far from a float32 reference as its dtype has it.
        if (name == own or dtype == "float32") and not errors[name] <= bound:  # NaN neither
            raise CheckpointError(
                f"the exported program differs from the model ({name}) by {errors[name]:.3g}, and "
                f"may by {bound:.3g}; nothing was written. Report it; --no-check (in Python "
                "`check=False`) writes it all the same."
            )
    return {"images": len(found), "largest": largest, "max_abs_error": errors}
