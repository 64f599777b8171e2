"""The names of timm's NaFlexVit, at one size of images.

Source: `timm/models/naflexvit.py` of timm 1.0.31. Patches are flattened, channels last, and go
through a dense layer, and positions keep the axes of their grid: at one size it is a ViT. Its
positions are resampled to whatever grid an image has, so the size that they are for is the image's
here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vit_convert.formats.format import Rule
from vit_convert.layouts import Arrays, Layout

POSITIONS = "embeds.pos_embed"
PROJECTION = "embeds.proj.weight"


def _side(size: int) -> tuple[int, int]:
    """(side of a patch, channels) of that many numbers; 3 P^2 is never a square."""
    for channels in (3, 1):
        side = math.isqrt(size // channels)
        if side * side * channels == size:
            return side, channels
    raise ValueError(f"{size} numbers are no square patch of three channels or one")


def _as_kernel(arrays: Arrays) -> Arrays:
    if arrays[0].ndim == 4:
        return list(arrays)
    width, size = arrays[0].shape
    side, channels = _side(size)
    return [arrays[0].reshape(width, side, side, channels).transpose(0, 3, 1, 2)]


def _as_dense(arrays: Arrays) -> Arrays:
    return [arrays[0].transpose(0, 2, 3, 1).reshape(arrays[0].shape[0], arrays[0][0].size)]


PATCHES = Layout("patches, channels last", _as_kernel, _as_dense)
"""Dense weight (D, P P C) <-> convolution weight (D, C, P, P)."""


def _flat(arrays: Arrays) -> Arrays:
    _, rows, columns, width = arrays[0].shape
    return [arrays[0].reshape(1, rows * columns, width)]


def _square(arrays: Arrays) -> Arrays:
    side = math.isqrt(arrays[0].shape[1])
    if side * side != arrays[0].shape[1]:
        raise ValueError(f"positions {arrays[0].shape} of a grid that is not square")
    return [arrays[0].reshape(1, side, side, arrays[0].shape[2])]


GRID = Layout("positions of a grid", _flat, _square, 4, 3)
"""Positions (1, rows, columns, D) <-> (1, rows columns, D)."""


def _sum(arrays: Arrays) -> Arrays:
    rows, columns = (array[0] for array in arrays)
    if rows.shape != columns.shape:
        # timm stretches both to the longer side first, whatever the size of the image.
        raise ValueError(f"positions of {len(rows)} rows and {len(columns)} columns")
    return [(rows[:, None] + columns).reshape(1, -1, rows.shape[1])]


def _no_parts(arrays: Arrays) -> Arrays:
    raise ValueError("positions are not taken apart into those of rows and of columns")


ROWS_AND_COLUMNS = Layout("positions of rows and of columns", _sum, _no_parts, 3, 3)
"""Positions of rows and of columns (1, side, D) -> their sums (1, side side, D)."""
_ROWS = "embeds.pos_embed_y"

RULES = (
    Rule("embeds.cls_token", "embeddings.cls_token"),
    Rule("embeds.reg_token", "embeddings.register_tokens"),
    Rule(POSITIONS, "embeddings.position_embeddings", GRID),
    Rule((_ROWS, "embeds.pos_embed_x"), "embeddings.position_embeddings", ROWS_AND_COLUMNS),
    Rule(PROJECTION, "embeddings.patch_embeddings.projection.weight", PATCHES),
    Rule("embeds.proj.bias", "embeddings.patch_embeddings.projection.bias"),
)


def says(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The size of images that the positions in a file are for."""
    positions, projection = tensors.get(POSITIONS), tensors.get(PROJECTION)
    rows = tensors.get(_ROWS)
    if projection is None or (positions is None and rows is None):
        return {}
    grid = positions.shape[1:3] if positions is not None else (rows.shape[1],) * 2  # type: ignore[union-attr]
    shape = projection.shape
    side = shape[2] if len(shape) == 4 else _side(shape[1])[0]
    height, width = (count * side for count in grid)
    return {
        "image_size": height if height == width else (height, width),
        "position_tokens": "patches",
    }
