"""Positions as both twins apply them alike: position embeddings resampled to another grid, relative
positions, and the angles of rotary position embeddings.

Every family resamples in its own way, and the ways are not close to each other (see `ResizeRule`).
All are linear and separable, so each is a pair of small matrices, one per axis, computed here
once in float64. Both twins and the converter apply the same arrays:
`einsum("Hh,Ww,hwd->HWd", rows, columns, grid)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from vit_common.errors import ConfigError, InputError, shown

ResizeRule = Literal[
    "bicubic",
    "bicubic_antialias",
    "bilinear",
    "bilinear_antialias",
    "bilinear_align_corners",
    "bicubic_offset",
    "bicubic_align_corners",
]
"""How position embeddings are resampled; "a" is the free parameter of the cubic kernel.

- "bicubic": a=-0.75, half-pixel centres, no antialias. Transformers' `interpolate_pos_encoding`
  of ViT, DeiT, BEiT and DINOv2 (`models/vit/modeling_vit.py` and its copies).
- "bicubic_antialias": a=-0.5, half-pixel centres, the kernel widened when shrinking. timm
  (`layers/pos_embed.py`, `resample_abs_pos_embed`) and DINOv2 with registers.
- "bilinear": half-pixel centres, no antialias. timm reading a Google `.npz`
  (`models/vision_transformer.py`, `_load_weights`).
- "bilinear_antialias": half-pixel centres, the kernel widened when shrinking. SigLIP 2 of any
  size (`models/siglip2/modeling_siglip2.py` of Transformers) and timm's NaFlexVit.
- "bilinear_align_corners": corner points stay where they are. google-research vision_transformer
  (`vit_jax/checkpoint.py`) and big_vision (`models/vit.py`, `resample_posemb`), through
  `scipy.ndimage.zoom(order=1)`.
- "bicubic_offset": as "bicubic", but the step between samples is source / (target + 0.1).
  facebookresearch/dinov2 without registers (`models/vision_transformer.py`, `interpolate_offset`);
  Transformers' port of these models uses "bicubic".
- "bicubic_align_corners": a=-0.75, corner points stay. torchvision
  (`models/vision_transformer.py`, `interpolate_embeddings`).
"""

NaFlexRule = Literal[
    "bicubic_antialias_square",
    "bilinear_square",
    "bilinear_align_corners_square",
]
"""More rules, of timm's NaFlexVit (`models/naflexvit.py`).

- "..._square": to a square of the longer side of the grid, of which the grid is the upper left
  part, so that the proportions of an image do not stretch the positions.
"""

_SQUARE = "_square"

_Kernel = Callable[[np.ndarray], np.ndarray]
_Coordinates = Callable[[int, int], np.ndarray]


def _triangle(distance: np.ndarray) -> np.ndarray:
    return np.clip(1.0 - np.abs(distance), 0.0, None)


def _cubic(a: float) -> _Kernel:
    """Cubic convolution kernel with support 2.

    Keys, "Cubic convolution interpolation for digital image processing", 1981, equation 4 with
    its constants left free; written in factors, so that it is exactly 0 at every integer but 0.
    """

    def kernel(distance: np.ndarray) -> np.ndarray:
        x = np.abs(distance)
        near = 1.0 - x * x * ((a + 3.0) - (a + 2.0) * x)
        far = a * (x - 1.0) * (x - 2.0) ** 2
        return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))

    return kernel


def _half_pixel(source: int, target: int) -> np.ndarray:
    # One division of exact integers: samples that fall on a source point do so exactly.
    index = np.arange(target)
    return ((2 * index + 1) * source - target) / (2 * target)


def _half_pixel_offset(source: int, target: int) -> np.ndarray:
    return (np.arange(target) + 0.5) * (source / (target + 0.1)) - 0.5


def _align_corners(source: int, target: int) -> np.ndarray:
    # A single sample is taken at the first source point.
    return np.arange(target) * (source - 1) / max(target - 1, 1)


class _Resampling(NamedTuple):
    """Target index -> source coordinate, and the kernel that weighs source points around it."""

    coordinates: _Coordinates
    kernel: _Kernel
    radius: int
    antialias: bool = False


_TORCH_CUBIC = _cubic(-0.75)
# torch takes Pillow's constant, not its own, as soon as antialias is on.
_PILLOW_CUBIC = _cubic(-0.5)

_RESAMPLINGS: dict[str, _Resampling] = {
    "bicubic": _Resampling(_half_pixel, _TORCH_CUBIC, 2),
    "bicubic_antialias": _Resampling(_half_pixel, _PILLOW_CUBIC, 2, antialias=True),
    "bilinear": _Resampling(_half_pixel, _triangle, 1),
    "bilinear_antialias": _Resampling(_half_pixel, _triangle, 1, antialias=True),
    "bilinear_align_corners": _Resampling(_align_corners, _triangle, 1),
    "bicubic_offset": _Resampling(_half_pixel_offset, _TORCH_CUBIC, 2),
    "bicubic_align_corners": _Resampling(_align_corners, _TORCH_CUBIC, 2),
}


def resize_matrix(rule: ResizeRule | NaFlexRule, source: int, target: int) -> np.ndarray:
    """Matrix that resamples `source` points of one axis to `target` points.

    Equal to torch 2.13's `interpolate` in float64 along one axis (`UpSampleKernel.cpp`), and for
    "bilinear_align_corners" to `scipy.ndimage.zoom(order=1)`, but for two of their faults:
    scipy's default `mode="constant"` rounds itself past the border and gives zeros for the last
    point of some sizes (28 to 14, 28 to 24), and torch with antialias repeats one row in an
    output of width 1.

    With `source == target` it is the identity, except for "bicubic_offset", whose reference
    moves an axis that keeps its size where the other axis does not; `resize_matrices` knows both.

    Returns:
        (target, source), float64, read-only; each row sums to 1. The same array is handed out at
        every call.

    Raises:
        ConfigError: `rule` is not a `ResizeRule`.
        InputError: a size is not a positive integer.
    """
    return _matrix(_check_rule(rule), _check_size("source", source), _check_size("target", target))


def resize_matrices(
    rule: ResizeRule | NaFlexRule, source_grid: tuple[int, int], target_grid: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Matrices that resample a grid of (h, w) points to (H, W), for the rows and for the columns.

    Equal grids give two identities whatever the rule: every reference then returns the positions
    as they are.

    Returns:
        (H, h) and (W, w), float64, read-only, see `resize_matrix`.

    Raises:
        ConfigError: `rule` is not a `ResizeRule`.
        InputError: a grid is not a pair of positive integers.
    """
    rule = _check_rule(rule)
    source_height, source_width = source = _check_grid("source_grid", source_grid)
    target_height, target_width = target = _check_grid("target_grid", target_grid)
    if source == target:
        return _identity(source_height), _identity(source_width)
    if rule.endswith(_SQUARE):
        longer = max(target)
        rows, columns = (_matrix(rule, side, longer) for side in source)
        return rows[:target_height], columns[:target_width]
    return _matrix(rule, source_height, target_height), _matrix(rule, source_width, target_width)


def resize_positions(
    positions: np.ndarray,
    source_grid: tuple[int, int],
    target_grid: tuple[int, int],
    rule: ResizeRule | NaFlexRule,
    num_prefix_tokens: int = 1,
) -> np.ndarray:
    """Resample position embeddings, leaving those of the prefix tokens as they are.

    Args:
        positions: (1, num_prefix_tokens + h * w, D), the grid in row-major order.
        source_grid: (h, w) in patches.
        target_grid: (H, W) in patches.
        rule: see `ResizeRule`.
        num_prefix_tokens: class, distillation and register tokens that have a position.

    Returns:
        A new array (1, num_prefix_tokens + H * W, D) in the dtype of `positions`; the arithmetic
        is float64. Equal grids give an exact copy. A NaN or infinity in the grid leaves nothing
        finite in its channel.

    Raises:
        ConfigError: `rule` is not a `ResizeRule`.
        InputError: `positions` has another shape or a dtype that is not floating, a grid is not
            a pair of positive integers, or `num_prefix_tokens` is not an integer of at least 0.
    """
    rows, columns = resize_matrices(rule, source_grid, target_grid)
    height, width = (int(side) for side in source_grid)
    if not _is_int(num_prefix_tokens) or num_prefix_tokens < 0:
        raise InputError(
            "`num_prefix_tokens` must be an integer of at least 0; given "
            f"{shown(num_prefix_tokens)}."
        )
    positions = np.asarray(positions)
    tokens = num_prefix_tokens + height * width
    if positions.ndim != 3 or positions.shape[:2] != (1, tokens):
        raise InputError(
            f"`positions` must have the shape (1, {tokens}, D): {num_prefix_tokens} prefix tokens "
            f"and a grid of {height} x {width}; given {positions.shape}. Pass the grid the "
            f"positions were trained on as `source_grid`."
        )
    # By name, because numpy itself does not count bfloat16 among the floating dtypes.
    if positions.dtype.name not in ("float64", "float32", "float16", "bfloat16"):
        raise InputError(
            f"`positions` must have the dtype float64, float32, float16 or bfloat16; given "
            f"{positions.dtype}."
        )
    if (rows.shape[0], columns.shape[0]) == (height, width):
        return positions.copy()
    depth = positions.shape[2]
    prefix, grid = positions[:, :num_prefix_tokens], positions[:, num_prefix_tokens:]
    grid = grid.reshape(height, width, depth).astype(np.float64)  # (h, w, D)
    with np.errstate(invalid="ignore"):  # 0 * inf; see "Returns"
        grid = np.einsum("Hh,Ww,hwd->HWd", rows, columns, grid, optimize=True)  # (H, W, D)
    grid = grid.reshape(1, rows.shape[0] * columns.shape[0], depth)  # (1, H*W, D)
    return np.concatenate([prefix, grid.astype(positions.dtype)], axis=1)


def relative_distances(grid: tuple[int, int]) -> int:
    """Rows of a relative position bias table: one for each offset between two patches of a grid,
    then one each for class token to patch, patch to class token and class token to itself."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


RelativeRule = Literal["bilinear", "geometric", "geometric_cubic"]
"""How a relative position bias table is resampled.

- "bilinear": half-pixel centres. Transformers' BEiT, and both twins when they run at another size.
- "geometric": the offsets of the smaller grid are taken to lie at distances that grow as a
  geometric progression up to the larger grid's, and values between them are interpolated
  linearly. timm (`layers/pos_embed_rel.py`, `resize_rel_pos_bias_table`).
- "geometric_cubic": the same places, and a cubic spline through them. microsoft/unilm
  (`beit/run_class_finetuning.py`, through `scipy.interpolate.interp2d(kind="cubic")`).
"""


def resize_relative_positions(
    table: np.ndarray,
    source_grid: tuple[int, int],
    target_grid: tuple[int, int],
    rule: RelativeRule = "bilinear",
) -> np.ndarray:
    """Resample a relative position bias table; its last three rows stay as they are.

    Args:
        table: (relative_distances(source_grid), A).
        source_grid: (h, w) in patches.
        target_grid: (H, W) in patches.
        rule: see `RelativeRule`.

    Returns:
        (relative_distances(target_grid), A) in the dtype of `table`; the arithmetic is float64.
        Equal grids give an exact copy.

    Raises:
        ConfigError: `rule` is not a `RelativeRule`.
        InputError: a grid is too small for a cubic spline, which takes three patches a side.
    """
    if rule not in get_args(RelativeRule):
        wanted = ", ".join(map(repr, get_args(RelativeRule)))
        raise ConfigError(f"the `rule` of a table must be one of {wanted}; given {shown(rule)}.")
    source, target = ((2 * h - 1, 2 * w - 1) for h, w in (source_grid, target_grid))
    if source == target:
        return table.copy()
    if rule == "bilinear":
        rows, columns = resize_matrices("bilinear", source, target)
    else:
        rows, columns = (
            _geometric_matrix(a, b, rule == "geometric_cubic")
            for a, b in zip(source, target, strict=True)
        )
    offsets = table[:-3].astype(np.float64).reshape(*source, -1)  # (2h - 1, 2w - 1, A)
    offsets = np.einsum("Hh,Ww,hwa->HWa", rows, columns, offsets, optimize=True)
    offsets = offsets.reshape(target[0] * target[1], -1).astype(table.dtype)
    return np.concatenate([offsets, table[-3:]])


@lru_cache(maxsize=64)
def _geometric_matrix(source: int, target: int, cubic: bool) -> np.ndarray:
    """(target, source): both sides are odd numbers of offsets, that of no distance in the middle.

    The ratio is found as microsoft/unilm finds it, bounds and steps included: from 1.01, so that
    an axis that becomes shorter, or stays, is cut more than it is resampled.
    """
    steps, reach = source // 2, target // 2
    left, right = 1.01, 1.5
    ratio = left
    while right - left > 1e-6:
        ratio = (left + right) / 2.0
        if (1.0 - ratio**steps) / (1.0 - ratio) > reach:
            right = ratio
        else:
            left = ratio
    distances = np.cumsum(ratio ** np.arange(steps))
    places = np.concatenate([-distances[::-1], [0.0], distances])
    # Beyond the last place its value holds.
    wanted = np.clip(np.arange(target) - reach, places[0], places[-1])
    matrix = _spline(places, wanted) if cubic else _linear(places, wanted)
    matrix.flags.writeable = False
    return matrix


def _linear(places: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Matrix of the piecewise linear interpolation between increasing places."""
    return np.stack([np.interp(wanted, places, unit) for unit in np.eye(len(places))], axis=1)


def _spline(places: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Matrix of the cubic spline through increasing places, with continuous third derivatives at
    the second and the last but one (de Boor, "A Practical Guide to Splines", 1978, chapter IV:
    not-a-knot)."""
    n = len(places)
    if n < 4:
        raise InputError(
            "microsoft's rule for relative positions, a cubic spline, needs a grid of at least 3 "
            f"patches a side; given {n // 2 + 1}."
        )
    step = np.diff(places)
    # Second derivatives m at the places: left @ m = right @ values.
    left, right = np.zeros((n, n)), np.zeros((n, n))
    for i in range(1, n - 1):
        a, b = step[i - 1], step[i]
        left[i, i - 1 : i + 2] = a, 2.0 * (a + b), b
        right[i, i - 1 : i + 2] = 6.0 / a, -6.0 / a - 6.0 / b, 6.0 / b
    left[0, :3] = step[1], -step[0] - step[1], step[0]
    left[-1, -3:] = step[-1], -step[-1] - step[-2], step[-2]
    second = np.linalg.solve(left, right)  # (n, n)
    at = np.clip(np.searchsorted(places, wanted, side="right") - 1, 0, n - 2)
    h = step[at][:, None]
    before, after = (wanted - places[at])[:, None], (places[at + 1] - wanted)[:, None]
    values = np.eye(n)
    return (
        values[at] * after / h
        + values[at + 1] * before / h
        + second[at] * (after**3 / (6.0 * h) - h * after / 6.0)
        + second[at + 1] * (before**3 / (6.0 * h) - h * before / 6.0)
    )


@lru_cache(maxsize=16)
def log_offsets(grid: tuple[int, int]) -> np.ndarray:
    """Offsets between two patches of a grid, each as `sign(x) * log(1 + |x|)` of the rows and of
    the columns between them; in the order of `relative_position_index`.

    Args:
        grid: (rows, columns) of patches.

    Returns:
        ((2 rows - 1) * (2 columns - 1), 2), float64, read-only.
    """
    rows, columns = (np.arange(1 - side, side, dtype=np.float64) for side in grid)
    offsets = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
    scaled = np.sign(offsets) * np.log1p(np.abs(offsets))
    scaled.flags.writeable = False
    return scaled


@lru_cache(maxsize=16)
def relative_position_index(grid: tuple[int, int]) -> np.ndarray:
    """Which row of the table each pair of tokens takes (Bao et al. 2021, arXiv:2106.08254; BEiT's
    `modeling_finetune.py`, as Transformers and timm have it).

    Args:
        grid: (rows, columns) of patches.

    Returns:
        (1 + N, 1 + N) of int32, read-only: from the token of the row to that of the column, the
        class token first.
    """
    rows, columns = grid
    down, across = (axis.reshape(-1) for axis in np.indices(grid))
    offsets = (down[:, None] - down + rows - 1) * (2 * columns - 1)
    offsets += across[:, None] - across + columns - 1
    index = np.empty((1 + rows * columns,) * 2, np.int32)
    distances = relative_distances(grid)
    index[1:, 1:] = offsets
    index[0, :] = distances - 3
    index[:, 0] = distances - 2
    index[0, 0] = distances - 1
    index.flags.writeable = False
    return index


RotaryType = Literal["axial", "dinov3", "mixed"]
"""What rotary position embeddings (Su et al. 2021, arXiv:2104.09864) turn queries and keys by.

Half of the angles of a patch belong to its row and half to its column, each half with the
frequencies theta^(-k / n), k = 0 .. n - 1, where n is a quarter of the width of a head.

- "axial": the number of the row or column, times its frequency. EVA-02 (Fang et al. 2023,
  arXiv:2303.11331), Perception Encoder, RoPE-ViT; timm's "cat" (`layers/pos_embed_sincos.py`,
  `build_rotary_pos_embed`).
- "dinov3": the centre of the patch, in coordinates from -1 to 1 over the image, times 2 pi and its
  frequency (Simeoni et al. 2025, arXiv:2508.10104; `layers/rope_position_encoding.py` of
  facebookresearch/dinov3).
- "mixed": row and column together, each times a learned frequency, which every head of every block
  has of its own (Heo et al. 2024, arXiv:2403.13298); timm's "mixed".
"""


@lru_cache(maxsize=64)
def rotary_coordinates(
    kind: RotaryType,
    grid: tuple[int, int],
    *,
    reference: tuple[int, int] | None = None,
    offset: float = 0.0,
    columns_first: bool = False,
) -> np.ndarray:
    """The coordinates of each patch that rotary position embeddings are computed from.

    Args:
        kind: see `RotaryType`.
        grid: (rows, columns) of patches.
        reference: (rows, columns) that "axial" coordinates are stretched over: those of a grid of
            another size are as far apart as makes it cover this one.
        offset: added to the number of a row or column.
        columns_first: whether the column is the first coordinate, not the row.

    Returns:
        (N, 2), float64, read-only; patches in row-major order.
    """
    axes = []
    for size, wanted in zip(grid, reference or grid, strict=True):
        places = np.arange(size, dtype=np.float64) + offset
        if kind == "dinov3":
            axes.append(2.0 * (places + 0.5) / size - 1.0)
        else:
            axes.append(places / size * wanted if kind == "axial" and reference else places)
    rows, columns = np.meshgrid(*axes, indexing="ij")
    pair = (columns, rows) if columns_first else (rows, columns)
    coordinates = np.stack([axis.reshape(-1) for axis in pair], axis=-1)
    coordinates.flags.writeable = False
    return coordinates


@lru_cache(maxsize=64)
def rotary_angles(kind: RotaryType, width: int, theta: float, **grid: Any) -> np.ndarray:
    """Angles by which the pairs of channels of each patch are rotated, where they are not learned.

    Args:
        kind: "axial" or "dinov3".
        width: D/A of a head, a multiple of 4.
        theta: base of the frequencies.
        **grid: arguments of `rotary_coordinates`.

    Returns:
        (N, D/A/2), float64, read-only: the angles of the first coordinate, then of the second.

    Example:
        >>> rotary_angles("axial", 8, 100.0, grid=(2, 3)).shape
        (6, 4)
    """
    frequencies = theta ** -(np.arange(width // 4) / (width // 4))
    if kind == "dinov3":
        frequencies = 2.0 * np.pi * frequencies
    coordinates = rotary_coordinates(kind, **grid)  # (N, 2)
    angles = (coordinates[:, :, None] * frequencies).reshape(len(coordinates), -1)
    angles.flags.writeable = False
    return angles


@lru_cache(maxsize=256)
def _matrix(rule: str, source: int, target: int) -> np.ndarray:
    coordinates, kernel, radius, antialias = _RESAMPLINGS[rule.removesuffix(_SQUARE)]
    centre = coordinates(source, target)[:, None]
    if antialias:
        # Weights past the border are dropped and the rest scaled to sum to 1.
        matrix = kernel((np.arange(source) - centre) / max(source / target, 1.0))
        matrix /= matrix.sum(axis=1, keepdims=True)
    else:
        # Weights past the border go to the border point.
        points = np.floor(centre).astype(np.int64) + np.arange(1 - radius, 1 + radius)
        inside = np.clip(points, 0, source - 1)
        matrix = np.zeros((target, source))
        np.add.at(matrix, (np.arange(target)[:, None], inside), kernel(points - centre))
    matrix.flags.writeable = False
    return matrix


@lru_cache(maxsize=64)
def _identity(size: int) -> np.ndarray:
    matrix = np.eye(size)
    matrix.flags.writeable = False
    return matrix


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))


def _check_rule(rule: Any) -> Any:
    options = (*get_args(ResizeRule), *get_args(NaFlexRule))
    if not isinstance(rule, str) or rule not in options:
        wanted = ", ".join(map(repr, options))
        raise ConfigError(
            f"the position resize `rule` must be one of {wanted}; given {shown(rule)}."
        )
    return rule


def _check_size(name: str, value: Any) -> int:
    if not _is_int(value) or value < 1:
        raise InputError(f"`{name}` must be a positive number of patches; given {shown(value)}.")
    return int(value)


def _check_grid(name: str, value: Any) -> tuple[int, int]:
    if isinstance(value, (tuple, list)) and len(value) == 2:
        height, width = value
        if _is_int(height) and _is_int(width) and min(height, width) > 0:
            return int(height), int(width)
    raise InputError(
        f"`{name}` must be a pair (height, width) of positive numbers of patches; given "
        f"{shown(value)}."
    )
