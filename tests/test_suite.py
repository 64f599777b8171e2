"""Both twins, stage by stage, at the depth of the published networks: every family, size and dtype.

Networks are as deep as their presets and have as many heads; they are narrow, so that one is
compiled and run in seconds. Which combinations are run is a table of pairs: any two values of any
two columns meet in some row of it.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from networks import flax_twin, images, random_weights, torch_twin
from tolerances import BOUNDS

import vit_flax
import vit_flax.attention
import vit_flax.model
import vit_torch
import vit_torch.attention
import vit_torch.model
from vit_common.presets import PRESETS
from vit_flax.attention import compiled_for
from vit_flax.cpu.half import operand_dtype
from vit_torch.parity import difference
from vit_torch.verify.bounds import HALF_PRECISION
from vit_torch.verify.stages import flax_stages, torch_stages

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViTForImageClassification", {}),
    "DeiT": ("DeiTForImageClassificationWithTeacher", {}),
    "Beit": (
        "BeitForImageClassification",
        {"use_relative_position_bias": True, "layer_scale_init_value": 0.1},
    ),
    "Dinov2": ("Dinov2ForImageClassification", {"use_mask_token": False}),
    "Dinov2WithRegisters": (
        "Dinov2WithRegistersForImageClassification",
        {"use_mask_token": False},
    ),
}
# In patches; the native grid is 4 x 4.
GRIDS = {"native": (4, 4), "larger": (5, 5), "smaller": (3, 3), "wide": (2, 7)}
BATCH = 3


class Row(NamedTuple):
    """One combination: sizes are of `GRIDS`, kernels the `attn_implementation` of each twin."""

    family: str
    preset: str
    dtype: str
    size: str
    channels: int
    flax_kernel: str
    torch_kernel: str


# Every family in every dtype; seconds each.
QUICK = [
    Row("Beit", "base", "float32", "smaller", 3, "eager", "sdpa"),
    Row("Dinov2WithRegisters", "small", "float64", "smaller", 1, "auto", "sdpa"),
    Row("ViT", "small", "bfloat16", "native", 1, "eager", "sdpa"),
    Row("Beit", "tiny", "float64", "larger", 3, "eager", "eager"),
    Row("Dinov2", "small", "bfloat16", "wide", 3, "auto", "eager"),
    Row("DeiT", "tiny", "float32", "wide", 1, "auto", "sdpa"),
    Row("DeiT", "base", "float64", "native", 3, "auto", "eager"),
    Row("DeiT", "small", "bfloat16", "larger", 1, "eager", "sdpa"),
    Row("Beit", "small", "bfloat16", "wide", 1, "auto", "eager"),
    Row("Dinov2WithRegisters", "base", "bfloat16", "wide", 1, "eager", "sdpa"),
    Row("Dinov2WithRegisters", "tiny", "float32", "larger", 3, "eager", "eager"),
    Row("ViT", "base", "float32", "wide", 3, "auto", "eager"),
    Row("Dinov2", "tiny", "float64", "native", 1, "eager", "sdpa"),
    Row("Dinov2", "base", "float32", "native", 1, "eager", "eager"),
    Row("ViT", "tiny", "float64", "larger", 3, "auto", "sdpa"),
]
# The deepest, and what is left of the pairs.
SLOW = [
    Row("Dinov2WithRegisters", "huge", "float32", "larger", 3, "eager", "eager"),
    Row("ViT", "giant", "bfloat16", "smaller", 3, "auto", "sdpa"),
    Row("ViT", "large", "float32", "larger", 1, "eager", "eager"),
    Row("ViT", "huge", "float32", "smaller", 3, "auto", "sdpa"),
    Row("DeiT", "large", "float32", "larger", 3, "auto", "sdpa"),
    Row("DeiT", "huge", "float64", "wide", 3, "auto", "sdpa"),
    Row("DeiT", "huge", "bfloat16", "smaller", 3, "auto", "sdpa"),
    Row("Dinov2", "small", "float32", "larger", 1, "auto", "sdpa"),
    Row("Beit", "large", "float64", "native", 3, "eager", "eager"),
    Row("ViT", "large", "bfloat16", "wide", 3, "auto", "sdpa"),
    Row("DeiT", "base", "float32", "larger", 3, "eager", "sdpa"),
    Row("ViT", "tiny", "bfloat16", "smaller", 3, "auto", "eager"),
    Row("DeiT", "giant", "bfloat16", "wide", 3, "eager", "eager"),
    Row("Beit", "huge", "float64", "larger", 3, "eager", "sdpa"),
    Row("Beit", "giant", "float32", "smaller", 3, "eager", "sdpa"),
    Row("Dinov2", "huge", "float32", "smaller", 1, "eager", "eager"),
    Row("Dinov2", "giant", "float32", "native", 1, "eager", "sdpa"),
    Row("Dinov2", "large", "bfloat16", "larger", 3, "auto", "eager"),
    Row("Dinov2WithRegisters", "huge", "float64", "native", 1, "auto", "eager"),
    Row("Dinov2WithRegisters", "large", "float64", "smaller", 1, "auto", "eager"),
    Row("Dinov2WithRegisters", "giant", "float64", "larger", 3, "auto", "sdpa"),
]
DTYPES = ("float64", "float32", "bfloat16")
KERNELS = (("auto", "eager"), ("sdpa", "eager"))
COLUMNS = (tuple(MODELS), tuple(PRESETS), DTYPES, tuple(GRIDS), (3, 1), *KERNELS)


def test_any_two_values_meet_in_some_row():
    for (i, first), (j, second) in itertools.combinations(enumerate(COLUMNS), 2):
        met = {(row[i], row[j]) for row in QUICK + SLOW}
        assert met == set(itertools.product(first, second)), (Row._fields[i], Row._fields[j])
    assert {(row.family, row.dtype) for row in QUICK} == set(itertools.product(MODELS, DTYPES))


def config_of(row: Row):
    """The preset, about a thirtieth as wide."""
    width, depth, heads, inner, patch = PRESETS[row.preset]
    name, fields = MODELS[row.family]
    narrow = heads * max(1, 24 // heads) if heads <= 12 else 2 * heads
    side = patch // 4
    sizes: dict[str, Any] = {
        "hidden_size": narrow,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "image_size": 4 * side,
        "patch_size": side,
        "num_channels": row.channels,
        "num_labels": 40,  # of few logits the error is a matter of luck
    }
    if not row.family.startswith("Dinov2"):
        sizes["intermediate_size"] = narrow * inner // width
    elif row.preset == "giant":
        sizes["use_swiglu_ffn"] = True
    return name, getattr(vit_torch, f"{row.family}Config")(**{**sizes, **fields})


def identifier(row: Row) -> str:
    return "-".join(str(value) for value in row)


@pytest.mark.parametrize(
    "row",
    # Half precision at true depth compiles slowest; test_parity.py has it at a few blocks.
    [
        pytest.param(
            row,
            id=identifier(row),
            marks=[pytest.mark.slow] if row.dtype == "bfloat16" else [],
        )
        for row in QUICK
    ]
    + [pytest.param(row, id=identifier(row), marks=pytest.mark.slow) for row in SLOW],
)
def test_every_stage(row):
    name, config = config_of(row)
    ours_class, twin_class = getattr(vit_flax, f"Flax{name}"), getattr(vit_torch, name)
    weights = random_weights(config, ours_class.head)
    sides = zip(config.patch_height_width, GRIDS[row.size], strict=True)
    size = tuple(side * patches for side, patches in sides)
    x = images(config, BATCH, size=size)
    inputs: dict[str, Any] = {"interpolate_pos_encoding": row.size != "native"}
    if row.family != "DeiT":
        inputs["labels"] = np.array([4, 0, 2])

    def twin(dtype: str):
        kernel = {"attn_implementation": row.torch_kernel}
        return torch_twin(twin_class, config, weights, getattr(torch, dtype), **kernel)

    with jax.enable_x64(row.dtype == "float64"):
        model = flax_twin(
            ours_class,
            config,
            weights,
            getattr(jnp, row.dtype),
            attn_implementation=row.flax_kernel,
        )
        pixels = x.astype(np.float64 if row.dtype == "float64" else np.float32)
        ours = flax_stages(model, pixels, **inputs)
    theirs = torch_stages(twin(row.dtype), pixels, **inputs)
    assert ours.keys() == theirs.keys()
    assert len([stage for stage in ours if stage.startswith("block")]) == (
        3 * PRESETS[row.preset][1]
    )
    if row.dtype == "bfloat16":
        exact = torch_stages(twin("float32"), pixels, **inputs)
        check_error(ours, theirs, exact)
        return
    bound = BOUNDS[f"deep {row.dtype}"]
    for stage, value in theirs.items():
        found = difference(stage, ours[stage], value)
        assert found.max_abs <= bound * max(1.0, found.scale), found


def check_error(ours, theirs, exact) -> None:
    """The Flax twin's error in half precision beside that of the PyTorch twin."""
    for stage, value in exact.items():
        if stage == "loss":
            continue  # one number, whose error may happen to be none
        errors = [np.sqrt(np.mean((twin[stage] - value) ** 2)) for twin in (ours, theirs)]
        found = difference(f"{stage}: {errors[0] / errors[1]}", ours[stage], value)
        assert 0 < errors[0] <= HALF_PRECISION * errors[1], found


# -- determinism


@pytest.fixture(scope="module", params=["ViT", "Beit", "Dinov2WithRegisters"])
def pair(request):
    """Twins in float32, two blocks deep, and eight images."""
    name, config = config_of(Row(request.param, "tiny", "float32", "native", 3, "auto", "sdpa"))
    config = type(config)(**{**config.to_dict(), "num_hidden_layers": 2})
    weights = random_weights(config, getattr(vit_torch, name).head)
    ours = flax_twin(getattr(vit_flax, f"Flax{name}"), config, weights)
    twin = torch_twin(getattr(vit_torch, name), config, weights)
    return ours, twin, images(config, 8).astype(np.float32)


def logits_of(model, x) -> np.ndarray:
    if isinstance(model, torch.nn.Module):
        with torch.no_grad():
            return model(torch.tensor(x)).logits.numpy()
    return np.asarray(model(x).logits)


def test_the_same_input_twice_gives_the_same_bits(pair):
    ours, twin, x = pair
    for model in (ours, twin):
        first = logits_of(model, x)
        assert np.abs(first).max() > 0.1
        for _ in range(2):
            assert first.tobytes() == logits_of(model, x.copy()).tobytes()


def test_an_image_alone_and_among_others(pair):
    """A batch changes the order of sums, and nothing else."""
    ours, twin, x = pair
    for name, model in (("flax", ours), ("torch", twin)):
        among = logits_of(model, x)
        assert np.abs(among[0] - among[5]).max() > 0.01
        for i in (0, 5):
            found = difference(f"{name} alone", logits_of(model, x[i : i + 1]), among[i : i + 1])
            assert found.max_abs <= BOUNDS["batch float32"], found


# -- what unit-scale activations do not show


def test_norms_far_from_zero():
    """Rows of mean 100: their variance in one pass, as the mean square less the squared mean,
    would be wrong by 5e-3."""
    config = vit_torch.ViTConfig(hidden_size=96, num_attention_heads=3, layer_norm_eps=1e-6)
    x = (100.0 + np.random.default_rng(0).normal(size=(50, 96))).astype(np.float32)
    exact = x.astype(np.float64)
    variance = exact.var(axis=-1, keepdims=True)
    exact = (exact - exact.mean(axis=-1, keepdims=True)) / np.sqrt(variance + 1e-6)
    parameters = {"params": {"scale": jnp.ones(96), "bias": jnp.zeros(96)}}
    ours = vit_flax.model.layer_norm(vit_flax.model.FlaxViTPart(config)).apply(parameters, x)
    with torch.no_grad():
        theirs = vit_torch.model.layer_norm(vit_torch.model.ViTPart(config))(torch.tensor(x))
    for name, value in (("flax", np.asarray(ours)), ("torch", theirs.numpy())):
        found = difference(name, value, exact)
        assert found.max_abs <= BOUNDS["offset norm float32"], found


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda")], ids=str)
def test_softmax_in_half_precision(platforms):
    """In bfloat16 each probability is the softmax of the scores, rounded once; a softmax computed
    in bfloat16 is off by up to an eighth."""
    rng = np.random.default_rng(0)
    query, key, value = (scale * rng.normal(size=(2, 300, 3, 8)) for scale in (3.0, 1.0, 1.0))
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in (query, key, value)]
    tensors = [torch.tensor(a).to(torch.bfloat16) for a in (query, key, value)]
    scale = 8**-0.5
    # On a CPU the scores are sums in float32 that are not rounded (docs/cpu.md).
    with compiled_for(*platforms):
        wide = jnp.float32 if operand_dtype(jnp.bfloat16) is not None else jnp.bfloat16
        ours = vit_flax.attention.attention(*arrays, output_attentions=True)[1]
    scaled = (arrays[0] * jnp.bfloat16(scale)).astype(wide)
    scores = {
        "flax": jnp.einsum("bqad,bkad->baqk", scaled, arrays[1].astype(wide)),
        "torch": torch.einsum("bqad,bkad->baqk", tensors[0] * scale, tensors[1]).float(),
    }
    found = {
        "flax": ours,
        "torch": vit_torch.attention.attention(*tensors, output_attentions=True)[1].float(),
    }
    for name, probabilities in found.items():
        exact = np.exp(np.asarray(scores[name], np.float64))
        exact /= exact.sum(axis=-1, keepdims=True)
        ratio = np.asarray(probabilities, np.float64) / exact
        # Half a unit in the last of bfloat16's eight binary digits, of the smallest mantissa.
        assert np.abs(ratio - 1.0).max() <= 2.0**-8 + 1e-5, name
