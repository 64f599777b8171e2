"""The images that both models are run on, and whether two processors prepare them alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_common.errors import ImageError, InputError
from vit_torch.verify.diagnose import diagnose_pixels
from vit_torch.verify.parity import difference
from vit_torch.verify.results import Checked, Row
from vit_torch.verify.subject import Subject

_PIXELS = 1e-6  # on what processors make of an image: they are the same numpy, or differ at once


def model_inputs(
    subject: Subject, images: Sequence[Any] | None, image_size: Any, batch: int
) -> tuple[np.ndarray, tuple[int, int]]:
    config = subject.config
    size = tuple(image_size or config.image_height_width)
    if images:
        if subject.processor is None:
            raise InputError(
                f"{subject.name}: nothing says how images are prepared; leave `images` out to use "
                "random numbers."
            )
        pixels = prepared(subject.processor, images)
        if image_size is not None and pixels.shape[2:] != size:
            raise InputError(
                f"the images are prepared at {pixels.shape[2]} x {pixels.shape[3]}; `image_size` "
                "is for random numbers."
            )
        return pixels, (pixels.shape[2], pixels.shape[3])
    if batch < 1:
        raise InputError(f"`batch` must be a positive integer; given {batch!r}.")
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch, config.num_channels, *size)), size


def prepared(processor: Any, images: Sequence[Any]) -> np.ndarray:
    """What a processor makes of images, (B, C, H, W)."""
    pixels = processor(list(images), return_tensors="np")["pixel_values"]
    return np.asarray(pixels).astype(np.float64)


def compare_pixels(subject: Subject, other: Subject, images: Sequence[Any] | None) -> Row | str:
    """What both make of the images, or of a test picture; or why that cannot be compared."""
    silent = [str(each.name) for each in (subject, other) if each.processor is None]
    if silent:
        who = " and ".join(silent)
        return f"how images are prepared was not compared: nothing says how for {who}"
    pictures = list(images or [_picture(subject.config.num_channels)])
    pixels, refused = [], []
    for each in (subject, other):
        try:
            pixels.append(prepared(each.processor, pictures))
        except (ImageError, InputError) as error:
            refused.append(f"pixels: {each.name} prepares no such images: {error}")
    if len(refused) == 2:
        return f"how images are prepared was not compared: {refused[0]}"
    row = Row("cpu", "float32", "highest", str(other.name), "absolute", [], refused)
    if refused:
        return row
    ours, theirs = pixels
    if ours.shape != theirs.shape:
        row.unmatched = [
            f"pixels: prepared as {ours.shape[1:]} and {theirs.shape[1:]} (channels, height, width)"
        ]
        return row
    stage = difference("pixels", ours, theirs)
    row.stages.append(Checked(stage, _PIXELS, stage.max_abs))
    if not row.passed:
        worst = stage.where[0]
        row.causes = diagnose_pixels(
            other.processor, pictures[worst], ours[worst : worst + 1], _PIXELS
        )
    return row


def _picture(channels: int) -> np.ndarray:
    """Smooth noise, (480, 640) or (480, 640, C)."""
    import PIL.Image

    coarse = np.random.default_rng(2).integers(0, 256, (channels, 12, 16), np.uint8)
    bands = [
        np.asarray(PIL.Image.fromarray(band).resize((640, 480), PIL.Image.Resampling.BICUBIC))
        for band in coarse
    ]
    return bands[0] if channels == 1 else np.stack(bands, axis=-1)
