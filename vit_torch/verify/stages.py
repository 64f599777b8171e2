"""Runs a model of either twin and keeps what every stage of it computed.

The twins have the same modules under the same names, so a stage is the output of a module: the
patches, the embeddings, each block's attention, MLP and sum, the final norm, pooler and logits.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from vit_torch.pretrained import ViTPreTrainedModel, to_numpy

# path of a module, without the family's prefix -> name of its stage
_STAGES = (
    (r"embeddings\.patch_embeddings", "patches"),
    (r"embeddings", "embeddings"),
    (r"pre_layernorm", "norm before the blocks"),
    (r"encoder\.layer\.(\d+)\.attention", "block {} attention"),
    (r"encoder\.layer\.(\d+)\.output", "block {} MLP"),
    (r"encoder\.layer\.(\d+)", "block {}"),
    (r"layernorm", "final norm"),
    (r"pooler", "pooled"),
    (r"lm_layernorm", "head norm"),
    (r"lm_head|classifier", "logits"),
    (r"cls_classifier", "class token logits"),
    (r"distillation_classifier", "distillation logits"),
    (r"decoder", "reconstruction"),
)


def stage_of(path: str, prefix: str) -> str | None:
    """The name of the stage that a module makes, or None; "3" of block 3 included.

    Args:
        path: its name in the model, such as "vit.encoder.layer.3.attention".
        prefix: what the family puts before the network's names.
    """
    bare = path.removeprefix(f"{prefix}.")
    for pattern, name in _STAGES:
        if match := re.fullmatch(pattern, bare):
            return name.format(*match.groups())
    return None


def first(value: Any) -> Any:
    """The array of a module's output: attention and blocks give it with the probabilities."""
    return value[0] if isinstance(value, tuple) else value


@contextlib.contextmanager
def recorded(model: ViTPreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """While entered, calls of a PyTorch twin fill a dict with the stages, in their order."""
    stages: dict[str, torch.Tensor] = {}
    hooks = []
    for path, module in model.named_modules():
        name = stage_of(path, model.base_model_prefix)
        if name is not None:

            def keep(module, inputs, output, name=name):
                stages[name] = first(output)

            hooks.append(module.register_forward_hook(keep))
    try:
        yield stages
    finally:
        for hook in hooks:
            hook.remove()


def arrays_and_flags(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a call that are numpy arrays, and the others: a jitted function takes the
    first as its arguments, and is another function for each value of the second."""
    arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
    return arrays, {name: value for name, value in inputs.items() if name not in arrays}


def as_tensors(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments of a call, with torch tensors for numpy arrays."""
    arrays, flags = arrays_and_flags(inputs)
    return {name: torch.as_tensor(a, device=device) for name, a in arrays.items()} | flags


def as_dtype(pixels: np.ndarray, dtype: str) -> np.ndarray:
    """Pixels in float64 for a float64 model, in float32 for any other."""
    return pixels.astype(np.float64 if dtype == "float64" else np.float32)


def torch_stages(
    model: ViTPreTrainedModel, pixel_values: np.ndarray, **inputs: Any
) -> dict[str, np.ndarray]:
    """Every stage of a PyTorch twin in evaluation mode, as float64 arrays.

    Args:
        model: left as it was.
        pixel_values: (B, C, H, W).
        **inputs: further arguments of the call; numpy arrays or flags.
    """
    device, dtype, training = model.device, model.dtype, model.training
    tensors = as_tensors(inputs, device)
    try:
        with torch.no_grad(), recorded(model) as stages:
            output = model.eval()(
                torch.as_tensor(pixel_values, device=device).to(dtype), **tensors, return_dict=True
            )
    finally:
        model.train(training)
    if "loss" in output:
        stages["loss"] = output.loss
    return {name: to_numpy(value).astype(np.float64) for name, value in stages.items()}


def flax_stages(model: Any, pixel_values: np.ndarray, **inputs: Any) -> dict[str, np.ndarray]:
    """Every stage of a Flax twin, as float64 arrays; the network is jitted as a call of it is.

    Args:
        model: with its parameters.
        pixel_values: (B, C, H, W).
        **inputs: further arguments of the call; numpy arrays or flags.
    """
    import jax
    import jax.numpy as jnp

    arrays, flags = arrays_and_flags(inputs)
    prefix = model.config.base_model_prefix

    def wanted(module: Any, method: str) -> bool:
        return method == "__call__" and stage_of(".".join(module.path), prefix) is not None

    def run(params: Any, pixels: Any, arrays: Any) -> Any:
        output, state = model.module.apply(
            {"params": params},
            pixels.transpose(0, 2, 3, 1),
            True,
            return_dict=True,
            capture_intermediates=wanted,
            mutable=["intermediates"],
            **arrays,
            **flags,
        )
        return output, state["intermediates"]

    pixels = jnp.asarray(pixel_values)
    output, tree = jax.jit(run)(model.network_params, pixels, arrays)
    found: dict[str, np.ndarray] = {}
    for path, value in _calls(tree):
        name = stage_of(".".join(path), prefix)
        assert name is not None
        found[name] = np.asarray(first(value)).astype(np.float64)
    if "loss" in output:
        found["loss"] = np.asarray(output.loss).astype(np.float64)
    return found


def _calls(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path of a module, its first output) of a tree of intermediates."""
    for key, value in tree.items():
        if key == "__call__":
            yield path, value[0]
        else:
            yield from _calls(value, (*path, key))
