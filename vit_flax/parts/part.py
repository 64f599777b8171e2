"""What every module of the network shares: its sizes and options, and the activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_common.config import ViTConfig
from vit_flax.cpu.half import array_dtype
from vit_flax.parts.gelu import gelu

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "selu": jax.nn.selu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "linear": lambda x: x,
}


def activation(name: str | Callable) -> Callable[[jax.Array], jax.Array]:
    """The function of `hidden_act` or `pooler_act`; a callable is used as given.

    In half precision it is computed in float32, as PyTorch's kernels do: JAX would round after
    every operation inside it, which doubles the error of a block.
    """
    function = name if callable(name) else ACTIVATIONS[name]

    def run(x: jax.Array) -> jax.Array:
        return function(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)

    return run


class FlaxViTPart(nn.Module):
    """Base of every module here: sizes, dtypes, precision, kernel, and how blocks are run.

    Attributes:
        config: the sizes.
        dtype: compute dtype; `array_dtype` is that of the residual stream.
        param_dtype: dtype of new parameters.
        precision: precision of every matrix product; None means JAX's default for the device.
        attn_implementation: the attention kernel, see `vit_flax.attention`.
        scan_layers: compile one block and run it L times, over stacked parameters.
        remat_policy: one of `vit_flax.stacked.REMAT_POLICIES`, for `config.gradient_checkpointing`.
        front_tokens: number of tokens, from the first, that the last block computes, for heads that
            use no others; None means all. `scan_layers` always computes all.
    """

    config: ViTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: Any = None
    attn_implementation: str = "auto"
    scan_layers: bool = False
    remat_policy: str = "nothing_saveable"
    front_tokens: int | None = None

    @property
    def array_dtype(self) -> Any:
        """The dtype of arrays between products: `dtype`, but float32 for half precision on a CPU
        (see `vit_flax.cpu`)."""
        return array_dtype(self.dtype)

    def rounded(self, results: Any) -> Any:
        """Arrays that the network returns, rounded from `array_dtype` to `dtype`."""
        if self.array_dtype == self.dtype:
            return results
        return jax.tree.map(lambda x: x.astype(self.dtype), results)


def options(part: FlaxViTPart) -> dict[str, Any]:
    """Arguments that a module passes on to the modules inside it."""
    names = (field.name for field in fields(FlaxViTPart))
    return {name: getattr(part, name) for name in names if name not in ("parent", "name")}
