"""The last block computed only for the tokens that a head looks at, against Transformers 4.57.6's
PyTorch models, which compute it for all; and against XLA's count of operations."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from networks import randomize
from tolerances import BOUNDS

import vit_flax
from vit_common.errors import InputError
from vit_common.flops import forward_flops
from vit_common.images.processor import ViTImageProcessor
from vit_common.parameters import head_tokens
from vit_common.presets import preset
from vit_flax.inference import ImageClassifier
from vit_flax.inference.classifier import PROBABILITIES
from vit_flax.inference.encoder import Work

DINO = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
SMALL = {**DINO, "intermediate_size": 36}
CLS = {"use_mean_pooling": False}

# name of Transformers' class, its configuration, and how many tokens its head looks at
CASES: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "vit": ("ViTForImageClassification", SMALL, 1),
    "vit, one block": ("ViTForImageClassification", {**SMALL, "num_hidden_layers": 1}, 1),
    "deit": ("DeiTForImageClassification", SMALL, 1),
    "deit teacher": ("DeiTForImageClassificationWithTeacher", SMALL, 2),
    "beit": ("BeitForImageClassification", {**SMALL, **CLS}, 1),
    "beit, biases of a block": (
        "BeitForImageClassification",
        {**SMALL, **CLS, "use_relative_position_bias": True},
        1,
    ),
    "beit, shared biases": (
        "BeitForImageClassification",
        {**SMALL, **CLS, "use_shared_relative_position_bias": True},
        1,
    ),
    "beit, mean": ("BeitForImageClassification", SMALL, None),
    "dinov2": ("Dinov2ForImageClassification", DINO, None),
}


some = pytest.mark.parametrize("pair", ["deit teacher", "beit, mean"], indirect=True)
"""One that has a front and one that has none."""


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    cls, fields, tokens = CASES[request.param]
    family = cls.split("For")[0]
    config = getattr(transformers, f"{family}Config")(**fields)
    config._attn_implementation = "sdpa"  # the eager one takes its softmax in float32
    reference = randomize(getattr(transformers, cls)(config)).double()
    folder = tmp_path_factory.mktemp("model")
    reference.save_pretrained(folder)
    return getattr(vit_flax, f"Flax{cls}"), folder, reference, tokens


def test_logits_are_those_of_the_torch_reference(pair):
    cls, folder, reference, tokens = pair
    x = np.random.default_rng(1).normal(size=(3, 3, 16, 16))
    with torch.no_grad():
        want = reference(torch.tensor(x)).logits.numpy()
    with jax.enable_x64(True):
        model = cls.from_pretrained(folder, jnp.float64, param_dtype=jnp.float64)
        assert head_tokens(model.config, model.head) == tokens
        front = model.with_front_tokens(tokens)
        got = front(x, output_hidden_states=True)
    np.testing.assert_allclose(got.logits, want, rtol=0, atol=BOUNDS["reference float64"])
    assert got.hidden_states[-1].shape[1] == (tokens or got.hidden_states[0].shape[1])
    assert model.module.front_tokens is None
    assert front.params is model.params


@pytest.mark.slow
@some
def test_a_gradient_is_that_of_the_torch_reference(pair):
    cls, folder, reference, tokens = pair
    x = torch.tensor(np.random.default_rng(1).normal(size=(2, 3, 16, 16)), requires_grad=True)
    reference(x).logits.square().sum().backward()
    with jax.enable_x64(True):
        model = cls.from_pretrained(folder, jnp.float64, param_dtype=jnp.float64)
        model = model.with_front_tokens(tokens)
        got = jax.grad(lambda x: (model(x).logits ** 2).sum())(x.detach().numpy())
    scale = x.grad.abs().max().item()
    np.testing.assert_allclose(got, x.grad, rtol=0, atol=scale * BOUNDS["gradients float64"])


@some
def test_the_classifier_computes_no_more(pair):
    """Operations by XLA's own count."""
    cls, folder, _, tokens = pair
    model = cls.from_pretrained(folder, attn_implementation="eager")
    classify = ImageClassifier(model)
    x = jax.ShapeDtypeStruct((1, 3, 16, 16), jnp.float32)

    def counted(run):
        return jax.jit(run).lower(model.params, x).cost_analysis()["flops"]

    whole = counted(lambda params, x: model(x, params=params).logits)
    front = counted(partial(classify._run, work=PROBABILITIES))
    saved = forward_flops(model.config, model.head) - classify.flops
    assert (saved > 0) == (tokens is not None)
    # Beside products there are norms, softmax and GELU, in a network as small as this half as many
    # operations; and the classifier's own softmax.
    assert saved - 100 <= whole - front <= 1.5 * saved


def test_operations_of_vit_base():
    config = preset("base", num_labels=1000)
    model = vit_flax.FlaxViTForImageClassification(config, _do_init=False).with_front_tokens(1)
    images = jax.ShapeDtypeStruct((1, 3, 224, 224), jnp.float32)
    lowered = jax.jit(lambda p, x: model(x, params=p).logits).lower(model.params_shape_tree, images)
    flops = forward_flops(config, front_tokens=1)
    assert 1.0 <= lowered.cost_analysis()["flops"] / flops <= 1.02
    # 10 of the 12 D^2 of a block's dense layers, and its attention, for 196 of 197 tokens.
    assert flops / forward_flops(config) == pytest.approx(1 - 10.26 / 12.51 / 12, abs=1e-3)


@some
@pytest.mark.parametrize("layers", [(2,), pytest.param((0, 2), marks=pytest.mark.slow)])
def test_features_of_the_class_token_compute_no_more(pair, layers):
    cls, folder, _, _ = pair
    classify = ImageClassifier(cls.from_pretrained(folder, attn_implementation="eager"))
    x = jax.ShapeDtypeStruct((1, 3, 16, 16), jnp.float32)

    def counted(pool):
        run = partial(classify._run, work=Work("features", layers, pool))
        return jax.jit(run).lower(classify.model.params, x).compile().cost_analysis()["flops"]

    saved = forward_flops(classify.config) - forward_flops(classify.config, front_tokens=1)
    assert counted(None) - counted("cls") >= 0.95 * saved


def test_scanned_blocks_give_every_token(tmp_path):
    """A scan has one program for all blocks."""
    config = transformers.ViTConfig(**SMALL)
    reference = randomize(transformers.ViTForImageClassification(config))
    reference.save_pretrained(tmp_path)
    x = np.random.default_rng(1).normal(size=(2, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        want = torch.softmax(reference(torch.tensor(x)).logits, -1).numpy()
    cls = vit_flax.FlaxViTForImageClassification
    classify = ImageClassifier(cls.from_pretrained(tmp_path, scan_layers=True))
    assert classify.flops == forward_flops(classify.config)
    got = classify.runner(2)(x)
    np.testing.assert_allclose(got, want, rtol=0, atol=BOUNDS["reference float32"])


@pytest.mark.parametrize(
    ("cls", "tokens", "wanted"),
    [
        ("ViTForImageClassification", 0, "positive integer; given 0"),
        ("ViTForImageClassification", "1", "positive integer; given '1'"),
        ("DeiTForImageClassificationWithTeacher", 1, "2 or more"),
        ("Dinov2ForImageClassification", 1, "must be None"),
        ("ViTForMaskedImageModeling", 5, "must be None"),
    ],
)
def test_too_few(cls, tokens, wanted):
    family = cls.split("For")[0]
    fields = {**DINO, "encoder_stride": 4}
    config = getattr(vit_flax, f"{family}Config")(**fields)
    model = getattr(vit_flax, f"Flax{cls}")(config, _do_init=False)
    with pytest.raises(InputError, match=wanted):
        model.with_front_tokens(tokens)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_pooler_that_looks_at_the_patches(tokens):
    config = vit_flax.BeitConfig(**SMALL)
    model = vit_flax.FlaxBeitModel(config, _do_init=False)
    with pytest.raises(InputError, match="must be None, as the pooler of FlaxBeitModel looks at"):
        model.with_front_tokens(tokens)
    alone = vit_flax.FlaxBeitModel(config, add_pooling_layer=False).with_front_tokens(tokens)
    found = alone(np.zeros((1, 3, 16, 16), np.float32))
    assert found.last_hidden_state.shape == (1, tokens, 24)


@pytest.mark.slow
def test_no_mean_of_patches_that_are_not_there():
    model = vit_flax.FlaxBeitModel(vit_flax.BeitConfig(**SMALL))
    module = model.module.clone(front_tokens=1)
    with pytest.raises(InputError, match="mean of the patches needs all tokens"):
        module.apply({"params": model.params}, np.zeros((1, 16, 16, 3), np.float32))


def test_what_the_network_was_built_with_counts():
    """Not a configuration that was changed since."""
    config = vit_flax.BeitConfig(**SMALL)
    model = vit_flax.FlaxBeitForImageClassification(config)
    x = np.random.default_rng(1).normal(size=(2, 3, 16, 16)).astype(np.float32)
    want = ImageClassifier(model).runner(2)(x)
    model.config.use_mean_pooling = False
    np.testing.assert_array_equal(ImageClassifier(model).runner(2)(x), want)


def test_operations_of_an_image_of_another_size():
    """A network that takes any size is given what its processor makes."""
    config = vit_flax.Dinov2Config(**{**DINO, "image_size": 32})
    model = vit_flax.FlaxDinov2ForImageClassification(config)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    native = vit_flax.Dinov2Config(**DINO)
    assert ImageClassifier(model, processor).flops == forward_flops(native)
