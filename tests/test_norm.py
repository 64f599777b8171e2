"""Layer norm and RMS norm: Flax's forward pass to the bit, torch's gradients, and a step that grows
linearly."""

from __future__ import annotations

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vit_common.config import ViTConfig
from vit_flax import FlaxViTForImageClassification
from vit_flax.layers import LayerNorm, RMSNorm, normalized, rms_normalized


def arrays(dtype, shape=(2, 5, 48)):
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, shape).astype(dtype)
    scale, bias = (rng.normal(1.0, 0.5, shape[-1]).astype(dtype) for _ in range(2))
    return x, scale, bias, rng.normal(size=shape).astype(dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_forward_is_flax_to_the_bit(dtype, param_dtype):
    x, scale, bias, _ = arrays(np.float32)
    params = {"scale": jnp.asarray(scale, param_dtype), "bias": jnp.asarray(bias, param_dtype)}
    ours = LayerNorm(1e-6, dtype, param_dtype)
    theirs = nn.LayerNorm(1e-6, dtype, param_dtype, use_fast_variance=False)
    x = jnp.asarray(x, dtype)
    a, b = (module.apply({"params": params}, x) for module in (ours, theirs))
    assert a.dtype == b.dtype == dtype
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_forward_of_rms_is_flax_to_the_bit(dtype):
    x, scale, _, _ = arrays(np.float32)
    params = {"scale": jnp.asarray(scale)}
    x = jnp.asarray(x, dtype)
    a, b = (cls(1e-6, dtype).apply({"params": params}, x) for cls in (RMSNorm, nn.RMSNorm))
    assert a.dtype == b.dtype == dtype
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("epsilon", [1e-6, 0.1])
def test_gradients_of_rms_are_those_of_torch(epsilon):
    with jax.enable_x64(True):
        x, scale, tangent, weights = arrays(np.float64, (3, 7))

        def loss(x, scale):
            return (rms_normalized(x, scale, epsilon) * weights).sum()

        tensors = [torch.tensor(a, requires_grad=True) for a in (x, scale)]
        out = torch.nn.functional.rms_norm(tensors[0], (7,), tensors[1], epsilon)
        (out * torch.tensor(weights)).sum().backward()
        want = [tensor.grad.numpy() for tensor in tensors]
        for a, b in zip(jax.grad(loss, (0, 1))(x, scale), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
        _, forward = jax.jvp(loss, (x, scale), (weights, tangent))
        along = (want[0] * weights).sum() + (want[1] * tangent).sum()
        np.testing.assert_allclose(forward, along, rtol=1e-12)


@pytest.mark.parametrize("epsilon", [1e-12, 1e-6, 0.1])
def test_gradients_are_those_of_torch(epsilon):
    with jax.enable_x64(True):
        x, scale, bias, weights = arrays(np.float64)
        ours = jax.grad(lambda *a: (normalized(*a, epsilon) * weights).sum(), argnums=(0, 1, 2))
        given = ours(*map(jnp.asarray, (x, scale, bias)))
        tensors = [torch.tensor(a, requires_grad=True) for a in (x, scale, bias)]
        out = torch.nn.functional.layer_norm(tensors[0], (48,), tensors[1], tensors[2], epsilon)
        (out * torch.tensor(weights)).sum().backward()
        for a, b in zip(given, tensors, strict=True):
            np.testing.assert_allclose(a, b.grad.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_second_derivatives_and_forward_mode():
    with jax.enable_x64(True):
        x, scale, bias, weights = arrays(np.float64, (6,))

        def loss(x):
            return (jnp.sin(normalized(x, jnp.asarray(scale), jnp.asarray(bias), 1e-6))).sum()

        def torch_loss(x):
            norm = torch.nn.functional.layer_norm
            return norm(x, (6,), torch.tensor(scale), torch.tensor(bias), 1e-6).sin().sum()

        hessian = torch.autograd.functional.hessian(torch_loss, torch.tensor(x))
        for ours in (jax.hessian(loss), jax.jacrev(jax.grad(loss))):
            np.testing.assert_allclose(ours(jnp.asarray(x)), hessian.numpy(), atol=1e-10)
        _, tangent = jax.jvp(loss, (jnp.asarray(x),), (jnp.asarray(weights),))
        gradient = torch.autograd.functional.jacobian(torch_loss, torch.tensor(x))
        np.testing.assert_allclose(tangent, gradient.numpy() @ weights, atol=1e-12)


def test_a_training_step_grows_linearly_with_depth(monkeypatch):
    """What XLA computes again for the gradient must not grow with the square of the depth: with
    the derivative that JAX makes of the two passes it does (a ratio of 3.1 in additions)."""
    # Another test of the same process may have imported it, by way of jax2onnx.
    monkeypatch.delitem(sys.modules, "jax.experimental.jet", raising=False)

    def additions(depth):
        config = ViTConfig(
            hidden_size=32,
            num_hidden_layers=depth,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
            num_labels=3,
            hidden_act="relu",  # a GELU is a third of the program, and nothing of the question
        )
        model = FlaxViTForImageClassification(config, _do_init=False)
        labels = jnp.zeros(2, int)

        def loss(params, pixels):
            logits = model.module.apply({"params": params}, pixels, True).logits
            return -jax.nn.log_softmax(logits)[jnp.arange(2), labels].sum()

        pixels = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
        lowered = jax.jit(jax.grad(loss)).lower(model.params_shape_tree, pixels)
        return lowered.compile().as_text().count(" add(")

    few, many = additions(6), additions(12)
    assert few < many < 2.2 * few
