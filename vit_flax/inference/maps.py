"""Pictures of attention: which patches a token looks at, over the photo."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from vit_common.errors import InputError

# Anchors of matplotlib's "viridis" (Smith and van der Walt 2015, CC0), every eighth of its range.
_VIRIDIS = np.array(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ],
    np.float64,
)


def rollout(attentions: Sequence[np.ndarray]) -> np.ndarray:
    """How much of each token of the input is in each token of the output (Abnar and Zuidema 2020,
    arXiv:2005.00928): heads averaged, half of it the residual, multiplied over the blocks.

    Args:
        attentions: of every block in order, (B, A, S, S), after the softmax.

    Returns:
        (B, S, S); rows sum to 1.
    """
    total: np.ndarray | None = None
    for attention in attentions:
        mean = np.asarray(attention, np.float64).mean(axis=1)  # (B, S, S)
        mixed = 0.5 * mean + 0.5 * np.eye(mean.shape[-1])
        mixed /= mixed.sum(axis=-1, keepdims=True)
        total = mixed if total is None else mixed @ total
    if total is None:
        raise InputError("`attentions` must hold at least one block's.")
    return total


def patch_map(attention: np.ndarray, grid: tuple[int, int], prefix: int, token: int = 0):
    """What one token looks at, over the patches.

    Args:
        attention: (..., S, S).
        grid: (rows, columns) of patches.
        prefix: tokens in front of them.
        token: whose attention; 0 is the class token. Without a class token, the mean of all.

    Returns:
        (..., rows, columns).
    """
    rows = attention[..., token, :] if prefix else attention.mean(axis=-2)
    return rows[..., prefix:].reshape(*attention.shape[:-2], *grid)


def heat(values: np.ndarray) -> np.ndarray:
    """Values (H, W) from the smallest to the largest as colours (H, W, 3) of uint8; "viridis"."""
    values = np.asarray(values, np.float64)
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    places = np.linspace(0.0, 1.0, len(_VIRIDIS))
    channels = [np.interp(scaled, places, _VIRIDIS[:, c]) for c in range(3)]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


def overlay(image: PIL.Image.Image, values: np.ndarray, strength: float = 0.55) -> PIL.Image.Image:
    """A map (rows, columns) of patches over the picture they were cut from."""
    image = image.convert("RGB")
    smooth = PIL.Image.fromarray(np.asarray(values, np.float32))  # mode F
    smooth = smooth.resize(image.size, PIL.Image.Resampling.BICUBIC)
    colours = PIL.Image.fromarray(heat(np.clip(np.asarray(smooth), 0.0, None)))
    return PIL.Image.blend(image, colours, strength)


def contact_sheet(
    images: Sequence[PIL.Image.Image],
    columns: int,
    captions: Sequence[str] = (),
    gap: int = 4,
) -> PIL.Image.Image:
    """Pictures of one size side by side, row by row, on white, each over its caption."""
    width, height = images[0].size
    size = max(10, width // 16) if captions else 0  # of the letters
    band = height + 2 * size  # what a row takes
    rows = -(-len(images) // columns)
    sheet = PIL.Image.new(
        "RGB", (columns * (width + gap) - gap, rows * (band + gap) - gap), "white"
    )
    places = [divmod(place, columns) for place in range(len(images))]
    for image, (row, column) in zip(images, places, strict=True):
        sheet.paste(image, (column * (width + gap), row * (band + gap)))
    if captions:
        draw, font = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default(size)
        for caption, (row, column) in zip(captions, places, strict=True):
            middle = (column * (width + gap) + width // 2, row * (band + gap) + height + size)
            draw.text(middle, caption, "black", font, anchor="mm")
    return sheet
