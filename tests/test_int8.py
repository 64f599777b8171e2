"""Parameters held as 8-bit integers or in half precision: the same network, against Transformers
with the rounded weights; bytes; and the cost on real images."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from flax_models import assert_trees_equal
from networks import randomize
from tolerances import BOUNDS

from vit_cli.main import main
from vit_common.embedded import embedded_checkpoint
from vit_common.errors import InputError
from vit_common.families import Dinov2Config
from vit_flax import (
    FlaxAutoModelForImageClassification,
    FlaxDinov2ForImageClassification,
    to_transformers_tree,
)
from vit_flax.attention import compiled_for
from vit_flax.export import export, load
from vit_flax.families.clip import FlaxCLIPVisionModel
from vit_flax.inference import ImageClassifier, ImageEncoder
from vit_flax.int8 import Dense, is_quantized, parameter_bytes, quantize
from vit_flax.int8.product import integer_product

DEIT_TINY = Path(__file__).parents[2] / "shared" / "data" / "deit_tiny"
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 8,
    "image_size": 32,
    "num_labels": 3,
}
FAMILIES = {
    "vit": (
        transformers.ViTForImageClassification,
        transformers.ViTConfig,
        {"intermediate_size": 64},
    ),
    "deit": (
        transformers.DeiTForImageClassificationWithTeacher,
        transformers.DeiTConfig,
        {"intermediate_size": 64},
    ),
    "beit": (
        transformers.BeitForImageClassification,
        transformers.BeitConfig,
        {"intermediate_size": 64, "use_relative_position_bias": True},
    ),
    "dinov2": (
        transformers.Dinov2ForImageClassification,
        transformers.Dinov2Config,
        {"mlp_ratio": 2, "use_swiglu_ffn": True},
    ),
    "dinov2 with registers": (
        transformers.Dinov2WithRegistersForImageClassification,
        transformers.Dinov2WithRegistersConfig,
        {"mlp_ratio": 2},
    ),
}


def rounded(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A weight (out, in) of PyTorch rounded to integers of at most 127, by rows; and the integers.

    Equations of Wu et al. 2020 (arXiv:2004.09602), 2 to 4: s = 127 / amax, q = round(s x)."""
    largest = np.abs(weight).max(axis=1, keepdims=True)
    step = (largest / 127).astype(np.float32)
    integers = np.rint(weight / step)
    return (integers * step).astype(np.float32), integers


def rounded_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows rounded to 256 steps from the least to the largest value, 0 among them, by PyTorch."""
    rows = x.reshape(-1, x.shape[-1])
    least, largest = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    step = (largest - least) / 255
    zero = (-128 - torch.round(least / step)).to(torch.int32)
    return torch.fake_quantize_per_channel_affine(rows, step, zero, 0, -128, 127).reshape(x.shape)


def of_a_block(name: str) -> bool:
    return ".layer." in name and name.endswith(".weight")


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=pytest.mark.slow if i else []) for i, n in enumerate(FAMILIES)],
)
def family(request, tmp_path_factory):
    cls, config_class, fields = FAMILIES[request.param]
    config = config_class(**SIZES, **fields)
    config._attn_implementation = "eager"
    model = randomize(cls(config).eval())
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder


def test_the_network_is_that_of_the_rounded_weights(family):
    model, folder = family
    ours = FlaxAutoModelForImageClassification.from_pretrained(folder, precision="highest")
    pixels = np.random.default_rng(3).normal(size=(2, 3, 32, 32)).astype(np.float32)
    before = np.asarray(ours(pixels).logits)
    ours.params = quantize(ours.params)
    state = model.state_dict()
    count = 0
    for name, weight in state.items():
        if of_a_block(name) and weight.ndim == 2:
            state[name] = torch.tensor(rounded(weight.numpy())[0])
            count += 1
    kernels = [x for x in jax.tree.leaves(ours.params) if x.dtype == np.int8]
    assert len(kernels) == count >= 12
    model.load_state_dict(state)
    with torch.no_grad():
        wanted = model(torch.tensor(pixels)).logits.numpy()
    found = np.asarray(ours(pixels).logits)
    bound = BOUNDS["reference float32"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)
    assert np.abs(found - before).max() > 20 * bound  # it is not the network of before
    scanned = FlaxAutoModelForImageClassification.from_pretrained(
        folder, precision="highest", scan_layers=True
    )
    scanned.params = quantize(scanned.params)
    np.testing.assert_allclose(scanned(pixels).logits, wanted, rtol=0, atol=bound)


def test_the_network_is_that_of_the_rounded_weights_and_activations(family):
    """Against Transformers, its weights rounded, and the input of each dense layer of a block as
    well, by PyTorch."""
    model, folder = family
    model = copy.deepcopy(model)
    pixels = np.random.default_rng(3).normal(size=(2, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        exact = model(torch.tensor(pixels)).logits.numpy()
        for name, module in model.named_modules():
            if of_a_block(f"{name}.weight") and isinstance(module, torch.nn.Linear):
                module.weight.copy_(torch.tensor(rounded(module.weight.numpy())[0]))
                module.register_forward_pre_hook(lambda _, inputs: (rounded_rows(inputs[0]),))
        wanted = model(torch.tensor(pixels)).logits.numpy()
    options = {"precision": "highest", "weights": "int8", "activations": "int8"}
    for scan in (False, True):
        ours = FlaxAutoModelForImageClassification.from_pretrained(
            folder, **options, scan_layers=scan
        )
        # A number that the twins round to neighbouring integers moves the rest by a step.
        found = np.asarray(ours(pixels).logits)
        assert np.abs(found - wanted).max() < 0.1 * np.abs(exact - wanted).max()


def test_a_layer_of_integers_is_that_of_rounded_inputs():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, 48)).astype(np.float32)
    x[0, 1] = np.abs(x[0, 1]) + 3  # its range begins at 0
    x[1, 0] *= -1e-6
    kernel = rng.normal(size=(48, 9)).astype(np.float32)
    tree = {"encoder": {"layer": {"0": {"dense": {"kernel": kernel}}}}}
    made = quantize(tree, activations="int8")["encoder"]["layer"]["0"]["dense"]
    assert made["kernel_sums"].dtype == np.int32
    np.testing.assert_array_equal(made["kernel_sums"], np.asarray(made["kernel"], int).sum(0))
    layer = jax.jit(lambda x: Dense(9, use_bias=False).apply({"params": made}, x))
    found = layer(x)
    weight = rounded(kernel.T)[0].astype(np.float64)
    wanted = rounded_rows(torch.tensor(x)).numpy().astype(np.float64) @ weight.T
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-12 + 2e-6 * np.abs(wanted).max())
    x[1, 1] = 0
    np.testing.assert_array_equal(layer(x)[1, 1], np.zeros(9))
    x[0, 0, 0] = np.nan
    found = np.asarray(layer(x))
    assert np.isnan(found[0, 0]).all()
    assert np.isfinite(found[0, 1:]).all()
    # The derivative is that of the rounded weights.
    cotangent = rng.normal(size=(2, 3, 9)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda x: (layer(x) * cotangent).sum()))(np.ones_like(x))
    np.testing.assert_allclose(gradient, cotangent @ weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "uint8", "float32"])
def test_products_of_integers_are_exact(kind):
    rng = np.random.default_rng(2)
    x = rng.integers(-128, 128, (2, 3, 2100)).astype(np.int8)
    kernel = rng.integers(-127, 128, (2100, 5)).astype(np.int8)
    x[0, 0, :1037], kernel[:1037, 0] = -128, 127  # sums beyond what float32 counts one by one
    x[0, 0, 1037:1040], kernel[1037:1040, 0] = 1, 1
    wanted = x.astype(np.int64) @ kernel.astype(np.int64)
    sums = jnp.asarray(kernel.sum(0, dtype=np.int32))
    run = jax.jit(partial(integer_product, kind=kind))
    found = run(x, kernel, sums)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, wanted)
    found = jax.jit(jax.vmap(lambda x: integer_product(x, kernel, sums, kind=kind)))(x)
    np.testing.assert_array_equal(found, wanted)


def test_programs_for_other_machines_multiply_int8_by_int8():
    x = jax.ShapeDtypeStruct((4, 48), jnp.float32)
    tree = {"encoder": {"layer": {"0": {"dense": {"kernel": np.ones((48, 48), np.float32)}}}}}
    params = quantize(tree, activations="int8")["encoder"]["layer"]["0"]["dense"]
    run = jax.jit(lambda x: Dense(48, use_bias=False).apply({"params": params}, x))
    for platform in ("tpu", "cuda", "rocm"):
        with compiled_for(platform):
            text = run.trace(x).lower(lowering_platforms=(platform,)).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        (product,) = products
        assert "(tensor<4x48xi8>, tensor<48x48xi8>) -> tensor<4x48xi32>" in product


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    sizes = {name: x for name, x in SIZES.items() if name != "num_labels"}
    config = transformers.CLIPVisionConfig(**sizes, intermediate_size=64)
    folder = tmp_path_factory.mktemp("clip")
    randomize(transformers.CLIPVisionModel(config).eval()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "scan_layers", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one by one", "scan"]
)
def test_trees_of_other_names(clip, scan_layers):
    """CLIP's `params` have Transformers' names: quantized under either, they are the same."""
    model = FlaxCLIPVisionModel.from_pretrained(clip, scan_layers=scan_layers)
    loaded = FlaxCLIPVisionModel.from_pretrained(
        clip, weights="int8", activations="int8", scan_layers=scan_layers
    )
    kernels = [x for x in jax.tree.leaves(loaded.params) if x.dtype == np.int8]
    assert len(kernels) == 6 * (1 if scan_layers else 2)
    assert_trees_equal(quantize(model.params, activations="int8"), loaded.params)
    pixels = np.random.default_rng(3).normal(size=(2, 3, 32, 32)).astype(np.float32)
    single = FlaxCLIPVisionModel.from_pretrained(clip)  # Transformers' names, whoever scans
    found = model(pixels, params=quantize(single.params, activations="int8")).pooler_output
    np.testing.assert_allclose(found, loaded(pixels).pooler_output, rtol=0, atol=1e-6)
    model.params = quantize(model.network_params, activations="int8")
    assert_trees_equal(model.params, loaded.params)


def test_a_tree_of_transformers_dinov2():
    """Transformers' Flax model of DINOv2 has other names for the parts of a block."""
    model = FlaxDinov2ForImageClassification(Dinov2Config(**SIZES, mlp_ratio=2))
    theirs = to_transformers_tree(model.params, model.config)
    assert "mlp" in theirs["dinov2"]["encoder"]["layer"]["0"]
    wanted = quantize(model.params, activations="int8")
    model.params = quantize(theirs, activations="int8")
    assert_trees_equal(model.params, wanted)


def test_integers_and_factors_are_the_papers():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(40, 6)).astype(np.float32) * np.float32([1, 1e-3, 50, 1, 1, 1e-30])
    kernel[:, 3] = 0.0
    params = {"encoder": {"layer": {"0": {"output": {"dense": {"kernel": kernel}}}}}}
    made = quantize(params)["encoder"]["layer"]["0"]["output"]["dense"]
    assert set(made) == {"kernel", "kernel_scale"}
    assert made["kernel"].dtype == np.int8
    assert made["kernel_scale"].dtype == np.float32
    with np.errstate(invalid="ignore"):
        _, integers = rounded(kernel.T)
    np.testing.assert_array_equal(made["kernel"], np.nan_to_num(integers).T)
    largest = np.abs(kernel).max(axis=0)
    scale = np.where(largest == 0, 1.0, largest / 127)
    np.testing.assert_allclose(made["kernel_scale"], scale, rtol=1e-6)


def test_what_is_not_finite_stays_so():
    kernel = np.ones((3, 2), np.float32)
    kernel[1, 0] = np.nan
    params = {"encoder": {"layer": {"0": {"output": {"dense": {"kernel": kernel}}}}}}
    made = quantize(params)["encoder"]["layer"]["0"]["output"]["dense"]
    assert np.isnan(made["kernel_scale"]).tolist() == [True, False]


def test_all_else_stays_as_it_is():
    classify = FlaxAutoModelForImageClassification.from_pretrained(embedded_checkpoint())
    before, after = flatten_dict(classify.params), flatten_dict(quantize(classify.params))
    for path, array in before.items():
        if path[-1] == "kernel" and "layer" in path:
            assert after[path].dtype == np.int8
            assert after[*path[:-1], "kernel_scale"].shape == (array.shape[1],)
        else:
            assert after[path] is array
    assert len(after) == len(before) + 4 * 6  # blocks, and kernels in each
    assert all(array.dtype == np.float32 for array in before.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_on_the_device(dtype):
    """4 blocks of width 48 and 96: six kernels each; 77,530 parameters in all."""
    kernels, columns, every = 4 * (4 * 48 * 48 + 2 * 48 * 96), 4 * (5 * 48 + 96), 77_530
    size = jnp.dtype(dtype).itemsize
    options = {"dtype": dtype, "param_dtype": dtype}
    whole = ImageClassifier.from_pretrained(embedded_checkpoint(), **options)
    assert parameter_bytes(whole.model.params) == every * size
    small = ImageClassifier.from_pretrained(embedded_checkpoint(), **options, weights="int8")
    found = parameter_bytes(small.model.params)
    assert found == kernels + 4 * columns + (every - kernels) * size
    (held,) = [small.engine.params]
    assert parameter_bytes(held) == found  # the engine has no other copy
    assert is_quantized(held)
    assert not is_quantized(whole.model.params)


def test_sums_are_scaled_before_they_are_rounded():
    rng = np.random.default_rng(5)
    kernel = rng.normal(size=(48, 48)).astype(np.float32)
    x = jnp.asarray(rng.normal(size=(7, 48)), jnp.bfloat16)
    tree = {"encoder": {"layer": {"0": {"dense": {"kernel": kernel}}}}}
    params = {**quantize(tree)["encoder"]["layer"]["0"]["dense"], "bias": jnp.zeros(48)}
    found = Dense(48, dtype=jnp.bfloat16).apply({"params": params}, x)
    assert found.dtype == jnp.bfloat16
    scale = np.asarray(params["kernel_scale"], np.float64)
    exact = np.asarray(x, np.float64) @ (np.asarray(params["kernel"], np.float64) * scale)
    # One rounding to 8 significant bits is off by 2^-8 at most, two by twice that.
    error = np.abs(np.asarray(found, np.float64) - exact)
    assert (error <= 1.01 * 2**-8 * np.abs(exact)).all()


# -- half precision


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_parameters_in_half_precision_are_no_worse_than_torch(half, tmp_path):
    config = transformers.ViTConfig(**SIZES, intermediate_size=64)
    config._attn_implementation = "eager"
    model = randomize(transformers.ViTForImageClassification(config).eval())
    model.save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    pictures = [
        PIL.Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(16)
    ]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    torch_half = getattr(torch, half)
    with torch.no_grad():
        exact = model.vit(pixels).last_hidden_state.numpy()
        theirs = model.vit.to(torch_half)(pixels.to(torch_half)).last_hidden_state.float().numpy()
    encode = ImageEncoder.from_pretrained(tmp_path, dtype=half, param_dtype=half)
    assert {x.dtype.name for x in jax.tree.leaves(encode.engine.params)} == {half}
    ours = encode.features(pictures, pool=None)
    assert ours.dtype == np.float32

    def error(value):
        return float(np.sqrt(np.mean((value - exact) ** 2)))

    assert 0 < error(ours) <= 1.5 * error(theirs)


# -- the cost, on real images


def probabilities(classify, images):
    found = np.zeros((len(images), classify.config.num_labels))
    for row, result in zip(found, classify.stream(images, top_k=2000, batch_size=16), strict=True):
        for each in result.predictions:
            row[each.index] = each.probability
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activations", "largest", "mean"),
    # Measured: 0.016 and 0.00033; with activations 0.059 and 0.0007.
    [(None, 0.05, 0.002), ("int8", 0.15, 0.003)],
    ids=["weights", "weights and activations"],
)
def test_the_cost_on_held_out_digits(activations, largest, mean):
    """450 digits that the network was not trained on (examples/digits.py has the split)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = digits.images, digits.target
    _, images, _, labels = train_test_split(
        images, labels, test_size=450, random_state=0, stratify=labels
    )
    images = [PIL.Image.fromarray(np.minimum(x * 16, 255).astype(np.uint8)) for x in images]
    exact = probabilities(ImageClassifier.from_pretrained(embedded_checkpoint()), images)
    small = ImageClassifier.from_pretrained(
        embedded_checkpoint(), weights="int8", activations=activations
    )
    found = probabilities(small, images)
    assert (exact.argmax(1) == labels).sum() == 445  # as vit_common/digits/README.md has it
    assert (found.argmax(1) == labels).sum() == 445
    assert (found.argmax(1) == exact.argmax(1)).all()
    change = np.abs(found - exact).max(1)
    assert change.max() < largest
    assert 1e-5 < change.mean() < mean


PHOTOS = (
    *("astronaut", "brick", "camera", "cat", "cell", "chelsea", "clock", "coffee", "coins"),
    *("colorwheel", "grass", "gravel", "horse", "hubble_deep_field", "immunohistochemistry"),
    *("logo", "microaneurysms", "moon", "page", "retina", "rocket", "text"),
)


@pytest.mark.slow
@pytest.mark.skipif(not DEIT_TINY.is_dir(), reason="the shared DeiT-Tiny is not beside this clone")
@pytest.mark.parametrize("activations", [None, "int8"], ids=["weights", "weights and activations"])
def test_the_cost_on_photos(activations):
    """A real ImageNet network on scikit-image's pictures."""
    from skimage import data

    images = []
    for name in PHOTOS:
        pixels = getattr(data, name)()
        pixels = pixels * np.uint8(255) if pixels.dtype == bool else pixels
        images.append(PIL.Image.fromarray(pixels).convert("RGB"))
    exact = probabilities(ImageClassifier.from_pretrained(DEIT_TINY), images)
    small = ImageClassifier.from_pretrained(DEIT_TINY, weights="int8", activations=activations)
    found = probabilities(small, images)
    change = np.abs(found - exact).max(1)
    assert (found.argmax(1) == exact.argmax(1)).mean() >= 0.98
    assert 1e-3 < change.max() < 0.2  # measured 0.043; with activations 0.065
    assert change.mean() < 0.05  # 0.010; 0.013
    bound = 0.31 if activations is None else 0.32  # the sums of columns
    assert parameter_bytes(small.model.params) < bound * 4 * 5_717_416


# -- the doors


def test_what_cannot_be(tmp_path, capsys):
    with pytest.raises(InputError, match="`weights` must be 'int8' or None; given 'int4'"):
        ImageClassifier.from_pretrained(embedded_checkpoint(), weights="int4")
    model = FlaxAutoModelForImageClassification.from_pretrained(embedded_checkpoint())
    for cls in (ImageClassifier, ImageEncoder, FlaxAutoModelForImageClassification):
        with pytest.raises(InputError, match="add `weights='int8'`"):
            cls.from_pretrained(embedded_checkpoint(), activations="int8")
        with pytest.raises(InputError, match="`activations` must be 'int8' or None; given 'int4'"):
            cls.from_pretrained(embedded_checkpoint(), weights="int8", activations="int4")
    digit = str(min((embedded_checkpoint() / "images").iterdir()))
    assert main(["predict", digit, "--activations", "int8"]) == 2
    assert "add --weights int8" in capsys.readouterr().err
    small = quantize(model.params)
    with pytest.raises(InputError, match="8-bit integers already"):
        quantize(small)
    with pytest.raises(InputError, match="there are none"):
        quantize({"classifier": {"kernel": np.ones((2, 2), np.float32)}})
    with pytest.raises(InputError, match="kernel_scale"):
        model.save_pretrained(tmp_path, params=small)


def test_factors_alone_are_no_parameters():
    """A tree with the integers but without their factors is refused, not run."""
    model = FlaxAutoModelForImageClassification.from_pretrained(embedded_checkpoint())
    flat = flatten_dict(quantize(model.params))
    bare = unflatten_dict({p: x for p, x in flat.items() if p[-1] != "kernel_scale"})
    with pytest.raises(InputError, match="integers need `kernel_scale`"):
        model(np.zeros((1, 1, 8, 8), np.float32), params=bare)


@pytest.mark.slow
@pytest.mark.parametrize("activations", [[], ["--activations", "int8"]], ids=["float", "int8"])
def test_the_commands(activations, tmp_path, capsys):
    digit = str(min((embedded_checkpoint() / "images").iterdir()))
    options = {"weights": "int8", "param_dtype": "bfloat16"}
    options |= {"activations": "int8"} if activations else {}
    arguments = ["--weights", "int8", "--param-dtype", "bfloat16", *activations]
    assert main(["predict", digit, "--json", "--top-k", "1", *arguments]) == 0
    (row,) = json.loads(capsys.readouterr().out)["predictions"]
    (wanted,) = ImageClassifier.from_pretrained(embedded_checkpoint(), **options)(digit, top_k=1)
    assert row["label"] == wanted.label
    assert row["probability"] == pytest.approx(wanted.probability, abs=1e-6)
    target = tmp_path / "out.npz"
    assert main(["features", digit, "--output", str(target), *arguments]) == 0
    with np.load(target) as arrays:
        made_with = json.loads(str(arrays["made_with"]))
    assert {name: made_with[name] for name in options} == options
    capsys.readouterr()


@pytest.mark.slow
def test_an_exported_program_multiplies_integers(tmp_path):
    model = FlaxAutoModelForImageClassification.from_pretrained(
        embedded_checkpoint(), weights="int8", activations="int8"
    )
    path = tmp_path / "digits.jaxexport"
    export(model, path, batch=2, platforms=("cpu",), check=False)
    pixels = np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype(np.float32)
    found = load(path)(pixels)
    np.testing.assert_allclose(found, model(pixels).logits, rtol=0, atol=1e-4)
    assert path.stat().st_size < 77_530 * 4  # less than its parameters in float32
