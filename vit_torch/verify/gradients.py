"""Gradients of every parameter in either twin, for the same loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vit_torch.verify.stages import arrays_and_flags, as_dtype, as_tensors


def flax_gradients(model, pixels, inputs, dtype) -> dict[str, np.ndarray]:
    """Gradient of the loss, by canonical name, of a Flax twin."""
    import jax
    import jax.numpy as jnp

    from vit_flax.params import canonical

    x = jnp.asarray(as_dtype(pixels, dtype))
    arrays, flags = arrays_and_flags(inputs)

    def loss(params, arrays):
        output = model.module.apply(
            {"params": params}, x.transpose(0, 2, 3, 1), True, return_dict=True, **arrays, **flags
        )
        if "loss" in output:
            return output.loss
        return _summary(output, jnp)

    tree = jax.jit(jax.grad(loss))(model.network_params, arrays)
    return {name: tensor.read() for name, tensor in canonical(tree).tensors.items()}


def torch_gradients(model, pixels, inputs, dtype) -> dict[str, np.ndarray]:
    """Gradient of the loss, by canonical name, of a PyTorch twin."""
    from vit_convert.rules import unprefixed

    model.zero_grad(set_to_none=True)
    output = model.eval()(
        torch.as_tensor(as_dtype(pixels, dtype)),
        return_dict=True,
        **as_tensors(inputs, model.device),
    )
    value = output.loss if "loss" in output else _summary(output, torch)
    value.backward()
    return {
        unprefixed(name): (np.zeros(tuple(p.shape)) if p.grad is None else p.grad.numpy())
        for name, p in model.named_parameters()
    }


def _summary(output: Any, np_like: Any) -> Any:
    """A number that depends on all of an output without a loss."""
    value = output.logits if "logits" in output else output.last_hidden_state
    total = (value**2).mean()
    if "pooler_output" in output:
        total = total + (output.pooler_output**2).mean()
    return total
