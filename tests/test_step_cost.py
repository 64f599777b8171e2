"""What a training step computes and keeps: GELU's derivative, gradients of kernels, the update."""

from __future__ import annotations

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from networks import make_config

from vit_flax import FlaxViTForImageClassification
from vit_flax.attention import compiled_for
from vit_flax.parts.gelu import gelu
from vit_flax.training import TrainState, cross_entropy, make_step


@pytest.fixture(autouse=True)
def no_jet(monkeypatch):
    """Another test of the same process may have imported it, by way of jax2onnx."""
    monkeypatch.delitem(sys.modules, "jax.experimental.jet", raising=False)


def test_gelu_and_its_derivatives_are_those_of_torch():
    def reference(x):
        return torch.nn.functional.gelu(x).sum()

    with jax.enable_x64(True):
        for dtype, bound in ((np.float64, 1e-14), (np.float32, 5e-7)):
            x = np.concatenate((np.linspace(-12, 12, 481), [-1e4, 1e4])).astype(dtype)
            wanted = torch.tensor(x, requires_grad=True)
            reference(wanted).backward()
            values, tangents = jax.jvp(gelu, (jnp.asarray(x),), (jnp.ones_like(x),))
            np.testing.assert_array_equal(values, jax.nn.gelu(x, approximate=False))
            gradient = jax.grad(lambda x: gelu(x).sum())(jnp.asarray(x))
            for found in (tangents, gradient):
                assert found.dtype == dtype
                np.testing.assert_allclose(found, wanted.grad.numpy(), atol=bound)
        x = np.linspace(-3, 3, 7)
        second = torch.autograd.functional.hessian(reference, torch.tensor(x)).numpy()
        np.testing.assert_allclose(
            jax.hessian(lambda x: gelu(x).sum())(jnp.asarray(x)), second, atol=1e-14
        )


def test_gelu_keeps_one_array_for_its_derivative():
    _, backward = jax.vjp(gelu, jnp.ones((3, 5)))
    assert [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.ndim] == [(3, 5)]


def gradient_of(platform):
    """The gradient of a network of one block, as it is lowered for a platform."""
    config = make_config(num_hidden_layers=1, hidden_act="relu")
    model = FlaxViTForImageClassification(config, _do_init=False)

    def loss(params, pixels):
        return model.module.apply({"params": params}, pixels, True).logits.sum()

    pixels = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    with compiled_for(platform):
        return jax.jit(jax.grad(loss)).trace(model.params_shape_tree, pixels)


def test_gradients_of_kernels_copy_no_activation():
    """With images and tokens as two axes, XLA's CPU compiler transposes 6 of them in a block."""
    lowered = gradient_of("cpu").lower()
    rows = 2 * (16 + 1)
    text = lowered.compile().as_text()
    assert re.findall(rf"= f32\[(?:48|96),{rows}\]\S* (?:copy|transpose|fusion)\(", text) == []
    # Other programs are as they were: images and tokens stay two axes.
    other = gradient_of("tpu").lower(lowering_platforms=("tpu",)).as_text()
    assert f"tensor<{rows}x48xf32>" in lowered.as_text()
    assert f"tensor<{rows}x" not in other


def test_the_update_copies_no_moment():
    """With a choice for every array (`jnp.where`), it copies both moments of every kernel."""
    model = FlaxViTForImageClassification(make_config(num_hidden_layers=1, hidden_act="relu"))
    optimizer = optax.adamw(1e-3)
    step = make_step(model, cross_entropy(), optimizer)
    batch = {"pixel_values": jnp.ones((2, 3, 32, 32)), "labels": jnp.zeros(2, int)}
    state = TrainState.create(model, optimizer)
    text = step.lower(state, batch).compile().as_text()
    assert "mu__" in text
    kernels = {leaf.shape for leaf in jax.tree.leaves(model.params) if leaf.ndim == 2}
    for shape in kernels - {(48, 5)}:
        assert re.findall(rf"= f32\[{','.join(map(str, shape))}\]\S* copy\(", text) == [], shape


def test_two_parts_of_a_batch_are_not_in_memory_at_once():
    config = make_config(num_hidden_layers=2, hidden_act="relu")
    model = FlaxViTForImageClassification(config)
    optimizer = optax.adamw(1e-3)
    batch = {"pixel_values": jnp.ones((64, 3, 32, 32)), "labels": jnp.zeros(64, int)}
    state = TrainState.create(model, optimizer)
    found = []
    for accumulate in (1, 2):
        step = make_step(model, cross_entropy(), optimizer, accumulate=accumulate)
        compiled = step.lower(state, batch).compile()
        found.append(compiled.memory_analysis().temp_size_in_bytes)
        assert "while(" not in compiled.as_text()  # in a loop a step takes a third longer
    assert found[1] < 0.65 * found[0]
