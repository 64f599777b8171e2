"""Both twins against each other and against Transformers 4.57.6, stage by stage.

References: Transformers' PyTorch model with "sdpa" attention where float64 is compared (its eager
attention takes the softmax in float32 whatever the dtype), "eager" where attentions or head masks
are, and its Flax model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from networks import (
    CONFIGS,
    flax_tree,
    flax_twin,
    images,
    make_config,
    random_weights,
    reference_config,
    torch_reference,
    torch_twin,
)
from tolerances import BOUNDS
from transformers.activations import ACT2FN

import vit_flax
import vit_flax.model
import vit_torch
import vit_torch.model
from vit_common.config import ACTIVATIONS
from vit_torch.parity import compare, difference
from vit_torch.pretrained import to_numpy

FAMILY = {
    None: (vit_flax.FlaxViTModel, vit_torch.ViTModel, transformers.ViTModel),
    "classifier": (
        vit_flax.FlaxViTForImageClassification,
        vit_torch.ViTForImageClassification,
        transformers.ViTForImageClassification,
    ),
    "decoder": (
        vit_flax.FlaxViTForMaskedImageModeling,
        vit_torch.ViTForMaskedImageModeling,
        transformers.ViTForMaskedImageModeling,
    ),
}
# Transformers' PyTorch model computes the number of patches of these right, but not its decoder's.
SQUARE = [
    name
    for name, fields in CONFIGS.items()
    if not isinstance(fields.get("image_size"), tuple)
    and not isinstance(fields.get("patch_size"), tuple)
]


# What differs in float64 differs in float32; test_suite.py has quick rows of both.
@pytest.fixture(
    params=[
        pytest.param(jnp.float64, id="float64"),
        pytest.param(jnp.float32, id="float32", marks=pytest.mark.slow),
    ]
)
def dtype(request):
    with jax.enable_x64(request.param == jnp.float64):
        yield jnp.dtype(request.param)


def torch_dtype(dtype) -> torch.dtype:
    return getattr(torch, jnp.dtype(dtype).name)


def check(stage, bound_name: str) -> None:
    bound = BOUNDS[bound_name]
    assert stage.max_abs <= bound, f"{stage} is over {bound}"


def check_report(report, bound_name: str) -> None:
    assert len(report.stages) > 1
    for stage in report.stages:
        check(stage, bound_name)


# -- the twins against each other

STRUCTURES = ("plain", "no qkv bias", "wide pooler", "no layers", "wide image", "flat patches")


@pytest.mark.parametrize(
    "name",
    # The others differ in a number or in a function that other tests here have too.
    [pytest.param(name, marks=[] if name in STRUCTURES else pytest.mark.slow) for name in CONFIGS],
)
def test_every_stage_of_the_base_network(name, dtype):
    """Twin against twin, and each against Transformers' PyTorch and Flax models."""
    config = make_config(name)
    weights = random_weights(config)
    flax_cls, torch_cls, reference_cls = FAMILY[None]
    x = images(config, 3).astype(dtype)
    model = flax_twin(flax_cls, config, weights, dtype)
    twin = torch_twin(torch_cls, config, weights, torch_dtype(dtype), attn_implementation="eager")
    check_report(compare(model, twin, x), f"twins {dtype.name}")
    if name == "no layers":
        return  # Transformers records no hidden states there

    exact = dtype == jnp.float64
    kernel = "sdpa" if exact else "eager"
    reference = torch_reference(reference_cls, config, weights, torch_dtype(dtype), kernel)
    flags = {"output_hidden_states": True, "output_attentions": not exact}
    with torch.no_grad():
        want = reference_stages(reference(torch.tensor(x), **flags), attentions=not exact)
    got = our_stages(model(x, **ALL), want)
    for stage, value in want.items():
        check(difference(stage, got[stage], value), f"reference {dtype.name}")

    if name not in SQUARE:
        return  # Transformers' Flax model takes squares only
    flax_reference = transformers.FlaxViTModel(
        reference_config(config), dtype=dtype, _do_init=False
    )
    tree = flax_tree(weights, dtype)
    with jax.default_matmul_precision("highest"):
        want = our_stages(jax.jit(lambda p, x: flax_reference(x, params=p, **ALL))(tree, x))
    # It casts images to float32 on the way in, and takes LayerNorm's variance as
    # E[x^2] - E[x]^2, so its bound is the same for float64.
    got = our_stages(model(x, **ALL), want)
    for stage, value in want.items():
        check(difference(stage, got[stage], value), "flax reference")


@pytest.mark.parametrize("head", ["classifier", "decoder"])
@pytest.mark.parametrize("name", ["plain", "wide image"])
def test_heads_of_the_twins_agree(name, head, dtype):
    config = make_config(name)
    weights = random_weights(config, head)
    flax_cls, torch_cls, _ = FAMILY[head]
    inputs = (
        {"labels": np.array([1, -100, 4])}
        if head == "classifier"
        else {"bool_masked_pos": masked(config, 3)}
    )
    report = compare(
        flax_twin(flax_cls, config, weights, dtype),
        torch_twin(torch_cls, config, weights, torch_dtype(dtype)),
        images(config, 3).astype(dtype),
        **inputs,
    )
    assert report.stages[-1].name in ("logits", "reconstruction")
    assert any(stage.name == "loss" for stage in report.stages)
    check_report(report, f"twins {dtype.name}")


def masked(config, batch: int, seed: int = 5, grid=None) -> np.ndarray:
    rows, columns = grid or config.grid_size
    mask = np.random.default_rng(seed).integers(0, 2, (batch, rows * columns))
    mask[:, 0], mask[:, 1] = 0, 1
    return mask.astype(bool)


@pytest.mark.parametrize(
    "rule",
    [
        "bicubic",
        "bicubic_antialias",
        "bilinear",
        "bicubic_offset",
        "bilinear_align_corners",
        "bicubic_align_corners",
    ],
)
def test_twins_agree_at_other_sizes(rule, dtype):
    # Larger one way and smaller the other; the matrices have their own tests of every size.
    size = (24, 56)
    config = make_config("plain", position_resize=rule, num_hidden_layers=1)
    weights = random_weights(config)
    flax_cls, torch_cls, _ = FAMILY[None]
    report = compare(
        flax_twin(flax_cls, config, weights, dtype),
        torch_twin(torch_cls, config, weights, torch_dtype(dtype)),
        images(config, 2, size=size).astype(dtype),
        interpolate_pos_encoding=True,
    )
    check_report(report, f"twins {dtype.name}")


@pytest.mark.parametrize("shape", ["heads", "layers and heads"])
def test_twins_agree_under_a_head_mask(shape, dtype):
    config = make_config()
    weights = random_weights(config)
    flax_cls, torch_cls, _ = FAMILY[None]
    report = compare(
        flax_twin(flax_cls, config, weights, dtype),
        torch_twin(torch_cls, config, weights, torch_dtype(dtype)),
        images(config).astype(dtype),
        head_mask=head_mask(config, shape).astype(dtype),
    )
    check_report(report, f"twins {dtype.name}")


def head_mask(config, shape: str) -> np.ndarray:
    rng = np.random.default_rng(9)
    sides = (config.num_attention_heads,)
    if shape != "heads":
        sides = (config.num_hidden_layers, *sides)
    mask = rng.integers(0, 2, sides).astype(np.float64)
    mask.flat[0], mask.flat[1] = 0.0, 0.5
    return mask


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_kernels_of_the_torch_twin_agree(implementation):
    config = make_config()
    weights = random_weights(config)
    x = torch.tensor(images(config))
    with torch.no_grad():
        want = torch_reference(transformers.ViTModel, config, weights, torch.float64, "sdpa")(
            x
        ).last_hidden_state
        got = torch_twin(
            vit_torch.ViTModel, config, weights, torch.float64, attn_implementation=implementation
        )(x).last_hidden_state
    check(difference("last_hidden_state", got, want), "reference float64")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, dtype):
    """Each by itself, as no network tells apart two that are close."""
    x = np.linspace(-9.0, 9.0, 3001).astype(dtype)
    reference = torch.nn.functional.selu if name == "selu" else ACT2FN[name]
    want = to_numpy(reference(torch.tensor(x)))
    ours = np.asarray(vit_flax.model.activation(name)(jnp.asarray(x)))
    twin = to_numpy(vit_torch.model.activation(name)(torch.tensor(x)))
    for got in (ours, twin):
        check(difference(name, got, want), f"activations {dtype.name}")


# -- against Transformers' PyTorch model


def reference_stages(output, attentions: bool = True) -> dict[str, np.ndarray]:
    stages = {f"hidden state {i}": h for i, h in enumerate(output.hidden_states)}
    if attentions:
        stages |= {f"attention {i}": a for i, a in enumerate(output.attentions)}
    for name in ("loss", "last_hidden_state", "pooler_output", "logits", "reconstruction"):
        value = getattr(output, name, None)
        if value is not None:
            stages[name] = value
    return {name: to_numpy(value) for name, value in stages.items()}


def our_stages(output, wanted=None) -> dict[str, np.ndarray]:
    stages = {f"hidden state {i}": h for i, h in enumerate(output.hidden_states)}
    stages |= {f"attention {i}": a for i, a in enumerate(output.attentions)}
    stages |= {k: v for k, v in output.items() if k not in ("hidden_states", "attentions")}
    return {name: np.asarray(stages[name]) for name in wanted or stages}


ALL = {"output_hidden_states": True, "output_attentions": True}


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (24, 56)])
def test_interpolation_against_the_torch_reference(size):
    config = make_config()
    weights = random_weights(config)
    x = images(config, 2, size=size)
    with jax.enable_x64(True), torch.no_grad():
        want = torch_reference(transformers.ViTModel, config, weights, torch.float64, "sdpa")(
            torch.tensor(x), interpolate_pos_encoding=True
        ).last_hidden_state
        flax_cls, torch_cls, _ = FAMILY[None]
        ours = flax_twin(flax_cls, config, weights, jnp.float64)(x, interpolate_pos_encoding=True)
        twin = torch_twin(torch_cls, config, weights, torch.float64)(
            torch.tensor(x), interpolate_pos_encoding=True
        )
    check(difference("flax", ours.last_hidden_state, want), "reference float64")
    check(difference("torch", twin.last_hidden_state, want), "reference float64")


@pytest.mark.parametrize("shape", ["heads", "layers and heads"])
def test_head_mask_against_the_torch_reference(shape):
    config = make_config()
    weights = random_weights(config)
    x, mask = images(config).astype(np.float32), head_mask(config, shape).astype(np.float32)
    flax_cls, torch_cls, reference_cls = FAMILY[None]
    with torch.no_grad():
        reference = torch_reference(reference_cls, config, weights)
        want = reference_stages(reference(torch.tensor(x), head_mask=torch.tensor(mask), **ALL))
        got = torch_twin(torch_cls, config, weights)(
            torch.tensor(x), head_mask=torch.tensor(mask), **ALL
        )
    ours = flax_twin(flax_cls, config, weights)(x, head_mask=mask, **ALL)
    for stages in (our_stages(ours, want), our_stages(got, want)):
        for stage, value in want.items():
            check(difference(stage, stages[stage], value), "reference float32")


@pytest.mark.parametrize("name", ["plain", "grey"])
def test_masked_image_modelling_against_the_torch_reference(name, dtype):
    config = make_config(name)
    weights = random_weights(config, "decoder")
    x, mask = images(config, 3).astype(dtype), masked(config, 3)
    flax_cls, torch_cls, reference_cls = FAMILY["decoder"]
    with torch.no_grad():
        # As numbers: of a bool mask the reference takes the sum plus 1e-5 in float32.
        reference = torch_reference(reference_cls, config, weights, torch_dtype(dtype), "sdpa")(
            torch.tensor(x), bool_masked_pos=torch.tensor(mask.astype(dtype))
        )
        twin = torch_twin(torch_cls, config, weights, torch_dtype(dtype))(
            torch.tensor(x), bool_masked_pos=torch.tensor(mask)
        )
    ours = flax_twin(flax_cls, config, weights, dtype)(x, bool_masked_pos=mask)
    for got in (ours, twin):
        for field in ("loss", "reconstruction"):
            check(difference(field, got[field], reference[field]), f"reference {dtype.name}")


LOSSES = {
    "classes": ({}, np.array([4, 0, 2, 1])),
    "classes, some left out": ({}, np.array([4, -100, 2, -100])),
    "classes as int32": ({}, np.array([4, 0, 2, 1], np.int32)),
    "one number": ({"num_labels": 1}, np.array([0.5, -1.0, 2.0, 0.1])),
    "several numbers": (
        {"problem_type": "regression"},
        np.random.default_rng(2).normal(size=(4, 5)),
    ),
    "several labels": ({}, np.random.default_rng(3).integers(0, 2, (4, 5)).astype(np.float64)),
    "several labels, said so": (
        {"problem_type": "multi_label_classification"},
        np.random.default_rng(4).random((4, 5)),
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_and_their_gradients_against_the_torch_reference(case):
    fields, labels = LOSSES[case]
    # A loss is behind the blocks: their gradients need one of the losses.
    config = make_config("plain", num_hidden_layers=int(case == "classes"), **fields)
    before = config.to_dict()
    weights = random_weights(config, "classifier")
    x = images(config, 4)
    flax_cls, torch_cls, reference_cls = FAMILY["classifier"]
    torch_labels = torch.tensor(labels if labels.dtype != np.int32 else labels.astype(np.int64))
    reference = torch_reference(reference_cls, config, weights, torch.float64, "sdpa")
    twin = torch_twin(torch_cls, config, weights, torch.float64)
    want, got = (m(torch.tensor(x), labels=torch_labels) for m in (reference, twin))
    want.loss.backward(), got.loss.backward()
    with jax.enable_x64(True):
        model = flax_twin(flax_cls, config, weights, jnp.float64)
        ours = model(x, labels=labels)
        gradient = jax.grad(lambda p: model(x, params=p, labels=labels).loss)(model.params)
    assert config.to_dict() == before
    for output in (ours, got):
        check(
            difference("loss", np.asarray(to_array(output.loss)), to_array(want.loss)),
            "reference float64",
        )
    reference_gradient = {n: to_numpy(p.grad) for n, p in reference.named_parameters()}
    check_gradients({n: to_numpy(p.grad) for n, p in twin.named_parameters()}, reference_gradient)
    check_gradients(gradient, reference_gradient)


def to_array(value) -> np.ndarray:
    return to_numpy(value) if isinstance(value, torch.Tensor) else np.asarray(value)


def check_gradients(got, want: dict[str, np.ndarray], bound: str = "gradients float64") -> None:
    """Every parameter's gradient, relative to that parameter's largest entry."""
    from flax.traverse_util import flatten_dict
    from networks import InMemory

    from vit_convert.formats import TREE
    from vit_convert.rules import to_canonical

    if not isinstance(next(iter(got.values())), np.ndarray):
        flat = flatten_dict(got, sep="/")
        mapped = to_canonical({n: InMemory(np.asarray(g)) for n, g in flat.items()}, TREE)
        prefix = {n.removeprefix("vit."): n for n in want}
        got = {prefix[n]: t.read() for n, t in mapped.tensors.items()}
    assert got.keys() == want.keys()
    for name, value in want.items():
        stage = difference(name, got[name], value)
        assert stage.scale > 0 or "key.bias" in name, f"{name} has no gradient to compare"
        # The softmax does not see the key's bias: that gradient is rounding and nothing else.
        scale = 1.0 if "key.bias" in name else stage.scale
        assert stage.max_abs <= BOUNDS[bound] * scale, f"{stage} is over {BOUNDS[bound]}"


@pytest.mark.parametrize("name", ["plain", "tanh gelu"])
def test_gradients_of_every_parameter(name, dtype):
    config = make_config(name, num_hidden_layers=2 if name == "plain" else 1)
    weights = random_weights(config, add_pooling_layer=True)
    x = images(config).astype(dtype)
    flax_cls, torch_cls, reference_cls = FAMILY[None]
    rng = np.random.default_rng(8)
    cotangent = rng.normal(size=(2, config.num_patches + 1, config.hidden_size)).astype(dtype)
    pooled = rng.normal(size=(2, config.pooler_output_size)).astype(dtype)

    def scalar(output, array):
        return (output.last_hidden_state * array(cotangent)).sum() + (
            output.pooler_output * array(pooled)
        ).sum()

    gradients = []
    for cls, make in ((reference_cls, torch_reference), (torch_cls, torch_twin)):
        kwargs = {"attention": "sdpa"} if make is torch_reference else {}
        model = make(cls, config, weights, torch_dtype(dtype), **kwargs)
        scalar(model(torch.tensor(x)), torch.tensor).backward()
        gradients.append({n: to_numpy(p.grad) for n, p in model.named_parameters()})
    model = flax_twin(flax_cls, config, weights, dtype)
    ours = jax.grad(lambda p: scalar(model(x, params=p), jnp.asarray))(model.params)
    bound = f"gradients {dtype.name}"
    check_gradients(gradients[1], gradients[0], bound)
    check_gradients(ours, gradients[0], bound)


# -- half precision


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("plain", "bfloat16"),
        ("plain", "float16"),
        ("5 layers", "bfloat16"),
        # As above, with another number of blocks or heads.
        pytest.param("5 layers", "float16", marks=pytest.mark.slow),
        pytest.param("one head", "bfloat16", marks=pytest.mark.slow),
        pytest.param("one head", "float16", marks=pytest.mark.slow),
    ],
)
def test_half_precision_is_no_worse_than_torch(name, half):
    """Error against float32, beside that of Transformers' PyTorch model at the same precision."""
    config = make_config(name)
    weights = random_weights(config, "classifier")
    x = images(config, 16).astype(np.float32)
    flax_cls, torch_cls, reference_cls = FAMILY["classifier"]
    half_torch = getattr(torch, half)
    with torch.no_grad():
        exact = torch_reference(reference_cls, config, weights)(torch.tensor(x)).logits
        theirs = torch_reference(reference_cls, config, weights, half_torch)(torch.tensor(x)).logits
        twin = torch_twin(torch_cls, config, weights, half_torch)(torch.tensor(x)).logits
    ours = flax_twin(flax_cls, config, weights, getattr(jnp, half))(x).logits
    assert str(ours.dtype) == half
    assert twin.dtype == half_torch

    def error(value) -> float:
        value = (
            to_numpy(value.float())
            if isinstance(value, torch.Tensor)
            else np.asarray(value, np.float32)
        )
        return float(np.sqrt(np.mean((value - to_numpy(exact)) ** 2)))

    assert error(ours) <= 1.5 * error(theirs)
    assert error(twin) <= 1.5 * error(theirs)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_half_precision_keeps_one_residual_stream_and_finite_norms(half):
    config = make_config()
    weights = random_weights(config)
    dtype = getattr(jnp, half)
    # Constant rows have no variance: with statistics in half precision eps would be lost.
    weights["embeddings.patch_embeddings.projection.weight"][:] = 0
    weights["embeddings.patch_embeddings.projection.bias"][:] = 0.25
    weights["embeddings.position_embeddings"][:] = 0
    tree = flax_tree(weights, jnp.float32)
    model = vit_flax.FlaxViTModel(config, dtype=dtype, _do_init=False)
    output = model(images(config), params=tree, **ALL)
    for state in output.hidden_states:
        assert state.dtype == dtype
        assert bool(jnp.isfinite(state).all())
