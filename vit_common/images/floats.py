"""Images of floating-point pixels at another size, to the bit as PyTorch 2.13 makes it on a CPU.

Image processors that are only there in a fast version (DINOv3's) rescale pixels before they resize
them, so nothing is rounded to 8 bits on the way.

Source: `aten/src/ATen/native/cpu/UpSampleKernel.cpp` of PyTorch 2.13 (`_upsample_bilinear2d_aa`),
compiled as in its wheels: a product and a sum are rounded once together, but for groups of four
taps, which are multiplied side by side and then added in order.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_GROUP = 4
_F = np.float32


@lru_cache(maxsize=64)
def _taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each of `target` points along an axis comes from.

    Returns:
        Of each point the indices (target, taps) and weights (target, taps), float32 and zero behind
        its last tap, and the number of its taps, (target,).
    """
    scale = _F(source) / _F(target)
    support, inverse = (scale, _F(1) / scale) if scale >= 1 else (_F(1), _F(1))
    rows = []
    for i in range(target):
        center = scale * (_F(i) + _F(0.5))
        first = max(int(center - support + _F(0.5)), 0)
        last = min(int(center + support + _F(0.5)), source)
        # PyTorch adds a half and multiplies in float64, and rounds that.
        offset = (np.arange(first, last).astype(_F) - center).astype(np.float64) + 0.5
        distance = np.abs((offset * np.float64(inverse)).astype(_F))
        weights = np.where(distance < 1, _F(1) - distance, _F(0))
        total = _F(0)
        for weight in weights:
            total = total + weight
        rows.append((first, weights / total))
    most = max(len(weights) for _, weights in rows)
    indices, table = np.zeros((target, most), np.intp), np.zeros((target, most), _F)
    for i, (first, weights) in enumerate(rows):
        indices[i, : len(weights)] = np.arange(first, first + len(weights))
        table[i, : len(weights)] = weights
    counts = np.array([len(weights) for _, weights in rows])
    for array in (indices, table, counts):
        array.setflags(write=False)
    return indices, table, counts


def _along(values: np.ndarray, axis: int, target: int) -> np.ndarray:
    """float32 values with `target` points along an axis."""
    if values.shape[axis] == target:
        return values
    indices, weights, counts = _taps(values.shape[axis], target)
    along = [1] * values.ndim
    along[axis] = target
    result = np.zeros(1, _F)
    for j in range(weights.shape[1]):
        product = values.take(indices[:, j], axis).astype(np.float64)
        product *= weights[:, j].astype(np.float64).reshape(along)  # exact
        if j == 0:
            result = product.astype(_F)
            continue
        apart = ((j - 1) // _GROUP < (counts - 1) // _GROUP).reshape(along)
        once = (product + result).astype(_F)
        result = np.where(apart, result + product.astype(_F), once) if apart.any() else once
    return result


def resize_floats(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels (H, W, C), float32, at another size, by the triangle filter that is widened where the
    image shrinks."""
    return _along(_along(values, 1, width), 0, height)
