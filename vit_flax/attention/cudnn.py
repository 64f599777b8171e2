"""cuDNN's attention for NVIDIA GPUs, by `jax.nn.dot_product_attention`."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

CUDNN_HEAD = 128
"""Widest head that cuDNN's attention is used for."""


def attention_cudnn(*operands: jax.Array, precision: Any = None) -> jax.Array:
    """Scaled dot-product attention of (B, S, A, D/A), and perhaps a bias (1 or B, A, S, S).

    Returns:
        The context (B, S, A, D/A).
    """
    return jax.nn.dot_product_attention(*operands, implementation="cudnn")


@cache
def cudnn_missing() -> str | None:
    """Why no program with cuDNN's attention can be made on this machine; None if one can."""
    some = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16)
    try:
        oldest = min(float(gpu.compute_capability) for gpu in jax.devices("cuda"))
    except (RuntimeError, AttributeError, ValueError):
        oldest = 8.0  # no GPU here: the program is for another machine
    if oldest < 8.0:
        return f"it needs a GPU of compute capability 8.0; this one has {oldest}"
    try:
        jax.eval_shape(attention_cudnn, some, some, some)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error).strip().splitlines()[0].rstrip(".")
    return None
