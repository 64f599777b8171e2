"""What the tests share: configurations, random weights, twins and references with those weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax.traverse_util import unflatten_dict

from vit_common.config import ViTConfig
from vit_common.parameters import parameter_shapes
from vit_convert.formats import TREE
from vit_convert.rules import to_foreign

transformers.logging.set_verbosity_error()

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "encoder_stride": 8,
    "num_labels": 5,
}

# name -> what differs from SMALL
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head": {"num_attention_heads": 1},
    "no qkv bias": {"qkv_bias": False},
    "grey": {"num_channels": 1},
    "four channels": {"num_channels": 4},
    "relu": {"hidden_act": "relu", "pooler_act": "relu"},
    "tanh gelu": {"hidden_act": "gelu_new"},
    "pytorch tanh gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "quick gelu": {"hidden_act": "quick_gelu"},
    "silu": {"hidden_act": "silu"},
    "wide pooler": {"pooler_output_size": 60},
    "narrow mlp": {"intermediate_size": 20},
    "large eps": {"layer_norm_eps": 1e-3},
    "5 layers": {"num_hidden_layers": 5},
    "no layers": {"num_hidden_layers": 0},
    "wide image": {"image_size": (32, 48)},
    "tall image": {"image_size": (48, 16)},
    "flat patches": {"image_size": (32, 32), "patch_size": (4, 16), "encoder_stride": 8},
    "cut image": {"image_size": 37},
}


def make_config(name: str = "plain", **overrides: Any) -> ViTConfig:
    """A configuration by name."""
    return ViTConfig(**{**SMALL, **CONFIGS[name], **overrides})


@dataclass
class InMemory:
    """An array as the converter wants to see it."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self) -> np.ndarray:
        return self.array


def random_weights(config: ViTConfig, head=None, seed: int = 0, **kwargs) -> dict[str, np.ndarray]:
    """Every parameter random, none zero or one: zeros hide a swapped or missing parameter.

    Scaled so that activations stay of unit scale: dense weights by one over the root of their
    inputs, norms around one.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in parameter_shapes(config, head, **kwargs).items():
        value = rng.normal(size=shape)
        if len(shape) in (2, 4):
            value /= np.sqrt(np.prod(shape[1:]))
        elif "norm" in name and name.endswith("weight"):
            value = 1.0 + 0.2 * value
        elif len(shape) == 1:
            value *= 0.2
        weights[name] = value
    return weights


def flax_tree(weights: dict[str, np.ndarray], dtype: Any = jnp.float32) -> dict[str, Any]:
    """The weights as a Flax parameter tree."""
    tensors = {name: InMemory(value) for name, value in weights.items()}
    mapped = to_foreign(tensors, TREE)
    assert not mapped.unused
    return unflatten_dict(
        {
            tuple(name.split("/")): jnp.asarray(tensor.read(), dtype)
            for name, tensor in mapped.tensors.items()
        }
    )


def flax_twin(cls: type, config: ViTConfig, weights, dtype: Any = jnp.float32, **kwargs: Any):
    """A Flax model with these weights; matrix products at full precision."""
    options = {"dtype": dtype, "param_dtype": dtype, "precision": "highest", **kwargs}
    model = cls(config, _do_init=False, **options)
    model._is_initialized = True
    model.params = flax_tree(weights, dtype)
    return model


def load_state(model: torch.nn.Module, weights, dtype: torch.dtype) -> torch.nn.Module:
    """A PyTorch model with these weights, in evaluation mode."""
    model = model.to(dtype).eval()
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    return model


def torch_twin(cls: type, config: ViTConfig, weights, dtype=torch.float32, **kwargs: Any):
    """A PyTorch twin with these weights."""
    return load_state(cls(config, **kwargs), weights, dtype)


def reference_config(config: ViTConfig, attn_implementation: str = "eager"):
    """The configuration for Transformers, with the same fields."""
    table = config.to_dict()
    reference = transformers.ViTConfig(**table)
    reference._attn_implementation = attn_implementation
    return reference


def torch_reference(
    cls: type, config: ViTConfig, weights, dtype=torch.float32, attention="eager", **kwargs: Any
):
    """Transformers' PyTorch model with these weights."""
    return load_state(cls(reference_config(config, attention), **kwargs), weights, dtype)


def randomize(model: torch.nn.Module, seed: int = 7) -> torch.nn.Module:
    """Draw every parameter of another's model, as `random_weights` does by our names; in evaluation
    mode."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = rng.normal(size=tuple(parameter.shape))
            if value.ndim == 4 or (value.ndim == 2 and name.endswith(".weight")):
                value /= np.sqrt(np.prod(value.shape[1:]))
            elif "lambda" in name:
                value = 0.7 + 0.3 * value
            elif "norm" in name and name.endswith("weight"):
                value = 1.0 + 0.2 * value
            elif value.ndim == 1:
                value *= 0.2
            parameter.copy_(torch.tensor(value))
    return model.eval()


def images(config: ViTConfig, batch: int = 2, seed: int = 1, size=None) -> np.ndarray:
    """Random images (B, C, H, W) of unit scale, float64."""
    height, width = size or config.image_height_width
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, config.num_channels, height, width))
