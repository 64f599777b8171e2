"""Resampling of position embeddings against torch, scipy, Pillow, JAX and Transformers.

Tables of relative positions are held against timm's function as it runs. For positions, those of
timm 1.0.31 and torchvision 0.29.2 were run once by hand with torch 2.13 on eight pairs of grids,
square and not, up and down, with 0, 1 and 5 prefix tokens: `resample_abs_pos_embed` against
"bicubic_antialias" and "bilinear", made to compute in float64, differed by at most 2.4e-14 (in its
own float32 by 8e-6); `interpolate_embeddings` in float64 against "bicubic_align_corners" by at most
2.2e-14.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import get_args

import jax
import ml_dtypes
import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm_models import as_microsoft, timm

from vit_common.errors import ConfigError, InputError
from vit_common.positions import (
    RelativeRule,
    ResizeRule,
    relative_distances,
    resize_matrices,
    resize_matrix,
    resize_positions,
    resize_relative_positions,
)

RULES = get_args(ResizeRule)

# Ten times the largest difference measured over all 1600 pairs of sizes up to 40 and all rules,
# 1.4e-14: torch rounds each sampling coordinate, which is up to 40, in float64.
MATRIX_BOUND = 1.5e-13
# The same through two axes and unit-variance positions, ten times the 2.1e-14 measured.
GRID_BOUND = 2.1e-13
# Ten times the 3.8e-6 measured where a reference insists on float32, coordinates included.
FLOAT32_BOUND = 3.8e-5

# The same for tables of relative positions, relative to the largest value: 7.4e-7 measured.
RELATIVE_BOUND = 7e-6

# How each reference calls torch.nn.functional.interpolate, "bicubic_offset" aside.
INTERPOLATE = {
    "bicubic": {"mode": "bicubic", "align_corners": False},
    "bicubic_antialias": {"mode": "bicubic", "align_corners": False, "antialias": True},
    "bilinear": {"mode": "bilinear", "align_corners": False, "antialias": False},
    "bilinear_antialias": {"mode": "bilinear", "align_corners": False, "antialias": True},
    "bilinear_align_corners": {"mode": "bilinear", "align_corners": True},
    "bicubic_align_corners": {"mode": "bicubic", "align_corners": True},
}


def reference(rule: str, grid: np.ndarray, target: tuple[int, int]) -> np.ndarray:
    """torch's answer for a float64 grid (h, w, D), as (H, W, D)."""
    if rule.endswith("_antialias") and target[0] > 1 and target[1] == 1:
        # torch 2.13 repeats one row in an output of width 1, but has no trouble with height 1;
        # test_antialias_to_width_one shows which of the two is right.
        return reference(rule, grid.transpose(1, 0, 2), target[::-1]).transpose(1, 0, 2)
    image = torch.from_numpy(np.ascontiguousarray(grid.transpose(2, 0, 1)[None]))
    if rule == "bicubic_offset":
        # facebookresearch/dinov2, models/vision_transformer.py, interpolate_offset=0.1
        factors = tuple((new + 0.1) / old for new, old in zip(target, grid.shape, strict=False))
        out = torch.nn.functional.interpolate(image, scale_factor=factors, mode="bicubic")
    else:
        out = torch.nn.functional.interpolate(image, size=target, **INTERPOLATE[rule])
    assert out.shape[2:] == target
    return out[0].permute(1, 2, 0).numpy()


def reference_matrix(rule: str, source: int, target: int) -> np.ndarray:
    """Every weight torch uses along one axis: its answer for each unit vector."""
    return reference(rule, np.eye(source)[:, None, :], (target, 1))[:, 0]


# -- one axis


@pytest.mark.parametrize("rule", RULES)
def test_matrix_equals_torch_for_every_pair_of_sizes_up_to_40(rule):
    differences = {
        (source, target): np.abs(
            resize_matrix(rule, source, target) - reference_matrix(rule, source, target)
        ).max()
        for source, target in itertools.product(range(1, 41), repeat=2)
    }
    worst = max(differences, key=differences.__getitem__)
    assert differences[worst] <= MATRIX_BOUND, worst


def test_bilinear_align_corners_equals_scipy_zoom():
    # google-research calls zoom with its default mode "constant". Where rounding carries the last
    # sample past the border (28 to 14, say) that gives zeros; "nearest" is the same without.
    for source, target in itertools.product(range(1, 41), repeat=2):
        zoomed = scipy.ndimage.zoom(
            np.eye(source), (target / source, 1), order=1, mode="nearest", grid_mode=False
        )
        matrix = resize_matrix("bilinear_align_corners", source, target)
        np.testing.assert_allclose(matrix, zoomed, rtol=0, atol=MATRIX_BOUND)
    # 224 to 384 and 512 pixels with patches of 16 and 32, called exactly as there.
    for source, target in ((14, 24), (14, 32), (7, 12), (7, 16)):
        zoomed = scipy.ndimage.zoom(np.eye(source), (target / source, 1), order=1)
        matrix = resize_matrix("bilinear_align_corners", source, target)
        np.testing.assert_allclose(matrix, zoomed, rtol=0, atol=MATRIX_BOUND)


@pytest.mark.parametrize(
    ("rule", "method", "antialias"),
    [
        ("bicubic", "cubic-pytorch", False),
        ("bicubic_antialias", "cubic", True),
        ("bilinear_antialias", "linear", True),
        ("bilinear", "linear", False),
    ],
)
def test_matrix_equals_jax_image_where_jax_has_the_rule(rule, method, antialias):
    for source, target in ((14, 24), (37, 16), (1, 5), (6, 1)):
        with jax.enable_x64(True):
            resized = jax.image.resize(
                np.eye(source), (target, source), method=method, antialias=antialias
            )
        matrix = resize_matrix(rule, source, target)
        np.testing.assert_allclose(matrix, np.asarray(resized), rtol=0, atol=MATRIX_BOUND)


def test_antialias_to_width_one():
    # Pillow's bicubic is the one torch's antialias follows; it keeps float32.
    column = np.random.default_rng(0).normal(size=(3, 1))
    resized = Image.fromarray(column.astype(np.float32)).resize((1, 6), Image.Resampling.BICUBIC)
    rows, columns = resize_matrices("bicubic_antialias", (3, 1), (6, 1))
    np.testing.assert_allclose(rows @ column @ columns.T, np.asarray(resized), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("source", "target"), [(14, 24), (37, 16), (1, 9), (9, 1), (40, 39)])
def test_rows_sum_to_one(rule, source, target):
    matrix = resize_matrix(rule, source, target)
    assert matrix.shape == (target, source)
    assert matrix.dtype == np.float64
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("rule", "other"), list(itertools.permutations(RULES, 2)))
@pytest.mark.parametrize(("source", "target"), [(14, 24), (37, 16)])
def test_no_rule_passes_for_another(rule, other, source, target):
    if source < target and {rule, other} == {"bilinear", "bilinear_antialias"}:
        return  # they differ in shrinking alone
    difference = np.abs(
        resize_matrix(rule, source, target) - reference_matrix(other, source, target)
    ).max()
    assert difference > 0.04  # the closest two, "bicubic_antialias" and "bilinear_antialias": 0.049


@pytest.mark.parametrize("rule", RULES)
def test_an_axis_that_keeps_its_size_is_untouched_except_under_the_offset(rule):
    # DINOv2's reference moves both axes as soon as one changes; torch's answer says how far.
    untouched = np.array_equal(resize_matrix(rule, 14, 14), np.eye(14))
    assert untouched == (rule != "bicubic_offset")
    np.testing.assert_allclose(
        resize_matrix(rule, 14, 14), reference_matrix(rule, 14, 14), rtol=0, atol=MATRIX_BOUND
    )


# -- grids

sides = st.integers(1, 40)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    rule=st.sampled_from(RULES),
    source=st.tuples(sides, sides),
    target=st.tuples(sides, sides),
    prefix=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_positions_equal_torch_for_any_grids(rule, source, target, prefix, seed):
    positions = np.random.default_rng(seed).normal(size=(1, prefix + source[0] * source[1], 3))
    resized = resize_positions(positions, source, target, rule, num_prefix_tokens=prefix)
    if source == target:
        expected = positions[0, prefix:]
    else:
        grid = positions[0, prefix:].reshape(*source, 3)
        expected = reference(rule, grid, target).reshape(-1, 3)
    assert resized.shape == (1, prefix + target[0] * target[1], 3)
    np.testing.assert_array_equal(resized[:, :prefix], positions[:, :prefix])
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(resized[0, prefix:], expected, rtol=0, atol=GRID_BOUND * scale)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((14, 14), (24, 24)),
        ((37, 37), (16, 16)),
        ((8, 20), (20, 8)),
        ((7, 13), (7, 26)),
        ((12, 5), (3, 5)),
        ((1, 9), (4, 6)),
        ((9, 1), (1, 12)),
        ((6, 6), (1, 1)),
    ],
)
def test_positions_equal_torch_for_chosen_grids(rule, source, target):
    positions = np.random.default_rng(1).normal(size=(1, 1 + source[0] * source[1], 4))
    resized = resize_positions(positions, source, target, rule)
    expected = reference(rule, positions[0, 1:].reshape(*source, 4), target).reshape(-1, 4)
    np.testing.assert_array_equal(resized[:, 0], positions[:, 0])
    np.testing.assert_allclose(resized[0, 1:], expected, rtol=0, atol=GRID_BOUND)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", [(14, 14), (3, 8), (1, 5)])
def test_equal_grids_give_an_exact_copy(rule, grid):
    # Every reference returns the positions as they are, DINOv2's with the offset too.
    for matrix, side in zip(resize_matrices(rule, grid, grid), grid, strict=True):
        np.testing.assert_array_equal(matrix, np.eye(side))
    positions = np.random.default_rng(2).normal(size=(1, 1 + grid[0] * grid[1], 4))
    resized = resize_positions(positions, grid, grid, rule)
    np.testing.assert_array_equal(resized, positions)
    assert not np.shares_memory(resized, positions)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtype_is_kept_and_the_arithmetic_is_float64(dtype):
    positions = np.random.default_rng(3).normal(size=(1, 2 + 5 * 7, 4)).astype(dtype)
    before = positions.copy()
    resized = resize_positions(positions, (5, 7), (9, 4), "bicubic", num_prefix_tokens=2)
    assert resized.dtype == dtype
    np.testing.assert_array_equal(positions, before)
    np.testing.assert_array_equal(resized[:, :2], positions[:, :2])
    grid = positions[0, 2:].astype(np.float64).reshape(5, 7, 4)
    expected = reference("bicubic", grid, (9, 4)).reshape(-1, 4)
    # Rounded once, at the end: the only freedom left is that rounding's own half unit.
    spacing = float(ml_dtypes.finfo(dtype).eps) * np.maximum(np.abs(expected), 2.0**-10)
    difference = np.abs(resized[0, 2:].astype(np.float64) - expected)
    assert np.all(difference <= spacing / 2 + GRID_BOUND)


def test_infinity_stays_in_its_channel_without_a_warning():
    positions = np.random.default_rng(4).normal(size=(1, 1 + 9 * 9, 3))
    positions[0, 5, 1] = np.inf
    resized = resize_positions(positions, (9, 9), (12, 12), "bicubic")
    assert np.isfinite(resized[..., [0, 2]]).all()
    assert not np.isfinite(resized[:, 1:, 1]).any()


# -- the references' own methods


def transformers_positions(embeddings, positions: np.ndarray, target: tuple[int, int]):
    """`interpolate_pos_encoding` of a Transformers embeddings module with patches of 2."""
    embeddings = embeddings.to(torch.from_numpy(positions).dtype)
    embeddings.position_embeddings.data = torch.from_numpy(positions)
    prefix = positions.shape[1] - 14 * 14
    tokens = torch.zeros(1, prefix + target[0] * target[1], positions.shape[2])
    with torch.no_grad():
        return embeddings.interpolate_pos_encoding(tokens, 2 * target[0], 2 * target[1]).numpy()


@pytest.mark.parametrize(
    ("family", "rule", "prefix", "dtype", "bound"),
    [
        ("ViT", "bicubic", 1, np.float64, GRID_BOUND),
        ("DeiT", "bicubic", 2, np.float64, GRID_BOUND),
        # These two insist on float32. Transformers' DINOv2 has no offset, unlike Facebook's.
        ("Dinov2", "bicubic", 1, np.float32, FLOAT32_BOUND),
        ("Dinov2WithRegisters", "bicubic_antialias", 1, np.float32, FLOAT32_BOUND),
    ],
)
def test_positions_equal_transformers(family, rule, prefix, dtype, bound):
    import transformers
    from transformers.models.deit import modeling_deit
    from transformers.models.dinov2 import modeling_dinov2
    from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers
    from transformers.models.vit import modeling_vit

    modules = (modeling_vit, modeling_deit, modeling_dinov2, modeling_dinov2_with_registers)
    name = f"{family}Embeddings"
    build = next(getattr(module, name) for module in modules if hasattr(module, name))
    config = getattr(transformers, f"{family}Config")(hidden_size=8, image_size=28, patch_size=2)
    positions = np.random.default_rng(5).normal(size=(1, prefix + 14 * 14, 8)).astype(dtype)
    # (7, 28) has as many patches as (14, 14) and is another grid all the same.
    for target in ((14, 14), (24, 24), (7, 7), (10, 19), (7, 28)):
        expected = transformers_positions(build(config), positions, target)
        resized = resize_positions(positions, (14, 14), target, rule, num_prefix_tokens=prefix)
        np.testing.assert_allclose(resized, expected, rtol=0, atol=bound, err_msg=str(target))


# -- constants are shared and cannot be changed


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence", "ignore:.*searchsorted")  # timm's
@pytest.mark.parametrize("rule", ["geometric", "geometric_cubic"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((14, 14), (24, 24)),
        ((14, 14), (16, 16)),
        ((16, 16), (32, 32)),
        ((14, 14), (7, 7)),
        ((4, 4), (32, 32)),
        ((3, 3), (4, 5)),
        ((7, 4), (4, 9)),
        ((14, 14), (14, 20)),
    ],
)
def test_relative_positions_equal_timm_and_microsoft(source, target, rule, monkeypatch):
    table = np.random.default_rng(0).standard_normal((relative_distances(source), 3))
    if rule == "geometric_cubic":
        as_microsoft(monkeypatch)
    wanted = timm.layers.resize_rel_pos_bias_table(
        torch.tensor(table, dtype=torch.float32),
        new_window_size=target,
        new_bias_shape=(relative_distances(target), 3),
        old_window_size=source,
    )
    got = resize_relative_positions(table, source, target, rule)
    assert got.dtype == np.float64
    scale = max(1.0, float(wanted.abs().max()))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=RELATIVE_BOUND * scale)
    np.testing.assert_array_equal(got[-3:], table[-3:])
    half = resize_relative_positions(table.astype(np.float16), source, target, rule)
    assert half.dtype == np.float16


@pytest.mark.parametrize("rule", get_args(RelativeRule))
def test_a_table_for_an_equal_grid_is_a_copy(rule):
    table = np.random.default_rng(0).standard_normal((relative_distances((2, 3)), 3))
    got = resize_relative_positions(table, (2, 3), (2, 3), rule)
    np.testing.assert_array_equal(got, table)
    assert not np.shares_memory(got, table)


def test_rules_of_tables_that_are_refused():
    table = np.zeros((relative_distances((2, 2)), 3))
    with pytest.raises(ConfigError, match=r"one of 'bilinear', 'geometric'.*given 'cubic'"):
        resize_relative_positions(table, (2, 2), (4, 4), "cubic")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"at least 3 patches a side; given 2\."):
        resize_relative_positions(table, (2, 2), (4, 4), "geometric_cubic")


def test_matrices_are_computed_once_and_read_only():
    matrix = resize_matrix("bicubic", 14, 24)
    assert resize_matrix("bicubic", np.int64(14), 24) is matrix
    rows, columns = resize_matrices("bicubic", [14, 9], (24, 9))
    assert rows is matrix
    for array in (matrix, columns, *resize_matrices("bicubic", (3, 4), (3, 4))):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 2.0


def test_import_needs_numpy_alone():
    program = (
        "import sys, vit_common.positions\n"
        "heavy = {'jax', 'flax', 'torch', 'scipy', 'PIL', 'huggingface_hub', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# -- refusals


@pytest.mark.parametrize("rule", ["bicubic ", "nearest", "", None, 3, ["bicubic"]])
def test_unknown_rule_is_refused(rule):
    message = r"`rule` must be one of 'bicubic', .*'bicubic_align_corners'.*; given "
    with pytest.raises(ConfigError, match=message):
        resize_matrix(rule, 14, 24)
    with pytest.raises(ConfigError, match=message):
        resize_matrices(rule, (14, 14), (14, 14))


@pytest.mark.parametrize("size", [0, -3, 2.0, True, None, "14"])
def test_bad_size_is_refused(size):
    with pytest.raises(InputError, match=r"`source` must be a positive number.*given"):
        resize_matrix("bicubic", size, 24)
    with pytest.raises(InputError, match=r"`target` must be a positive number.*given"):
        resize_matrix("bicubic", 14, size)


@pytest.mark.parametrize("grid", [14, (14,), (14, 0), (14, 14, 1), (14.0, 14), None, "14"])
def test_bad_grid_is_refused(grid):
    with pytest.raises(InputError, match=r"`source_grid` must be a pair \(height, width\).*given"):
        resize_matrices("bicubic", grid, (24, 24))
    with pytest.raises(InputError, match=r"`target_grid` must be a pair \(height, width\).*given"):
        resize_matrices("bicubic", (24, 24), grid)


@pytest.mark.parametrize("shape", [(1, 196, 8), (2, 197, 8), (197, 8), (1, 198, 8), ()])
def test_positions_that_do_not_fit_the_grid_are_refused(shape):
    with pytest.raises(
        InputError, match=r"`positions` must have the shape \(1, 197, D\).*14 x 14; given \("
    ):
        resize_positions(np.zeros(shape), (14, 14), (24, 24), "bicubic")


@pytest.mark.parametrize("dtype", [np.int64, np.complex128, np.bool_, "V2", object])
def test_positions_that_are_not_floating_are_refused(dtype):
    with pytest.raises(InputError, match=r"`positions` must have the dtype float64, .*; given"):
        resize_positions(np.zeros((1, 197, 8), dtype), (14, 14), (24, 24), "bicubic")


@pytest.mark.parametrize("count", [-1, 1.0, True, None])
def test_bad_prefix_count_is_refused(count):
    with pytest.raises(InputError, match=r"`num_prefix_tokens` must be an integer.*given"):
        resize_positions(np.zeros((1, 197, 8)), (14, 14), (24, 24), "bicubic", count)
