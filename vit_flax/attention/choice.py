"""Which kernel runs, and why: no kernel is imported for it.

`choose` is asked when a program is lowered, with the platform that the program is made for, so that
a program compiled or exported for another machine gets that machine's kernel. `targets` is asked
earlier, when a network is traced: where no platform of the program has a kernel of its own, the
network holds nothing but JAX's own operations, which every tool that reads programs knows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vit_common.errors import InputError
from vit_flax.attention.cudnn import CUDNN_HEAD
from vit_flax.cpu.targets import targets

IMPLEMENTATIONS = ("auto", "eager", "cpu", "cudnn", "pallas")
"""Kernels by name; "auto" is the one made for the platform, if it takes what it is given."""


class Choice(NamedTuple):
    """The kernel that runs, one of `IMPLEMENTATIONS` without "auto", and why."""

    name: str
    reason: str


def check_implementation(name: str) -> str:
    """The name itself; InputError if there is no such kernel."""
    if name not in IMPLEMENTATIONS:
        wanted = ", ".join(map(repr, IMPLEMENTATIONS))
        raise InputError(f"`attn_implementation` must be one of {wanted}; given {name!r}.")
    return name


def choose(
    implementation: str,
    platform: str,
    shape: tuple[int, int, int, int],
    dtype: Any,
    *,
    bias: tuple[int, ...] | None = None,
    head_mask: bool = False,
    dropout: bool = False,
    precision: Any = None,
    gradient: bool = False,
    cudnn: str | None = None,
) -> Choice:
    """Which kernel runs. What one does not do falls to "eager", which does everything.

    Args:
        implementation: one of `IMPLEMENTATIONS`, what was asked for.
        platform: that the program is compiled for: "cpu", "cuda", "rocm" or "tpu".
        shape: of the query, (B, S, A, D/A).
        dtype: of query, key and value.
        bias: shape of what is added to the scores, if anything is.
        head_mask, dropout: whether the probabilities are changed.
        precision: of the matrix products.
        gradient: whether it is the gradient that is to be computed, not the context.
        cudnn: why programs with cuDNN's kernel cannot be made here, see `cudnn_missing`.
    """
    check_implementation(implementation)
    asked = implementation
    if asked == "auto":
        asked = {"cpu": "cpu", "cuda": "cudnn", "tpu": "pallas"}.get(platform, "eager")
        if asked == "eager":
            return Choice("eager", f"there is no kernel made for {platform}")
    elif asked == "eager":
        return Choice("eager", "asked for")
    if head_mask or dropout:
        what = "a head mask" if head_mask else "dropout of probabilities"
        return Choice("eager", f"{asked} never has the probabilities, which {what} changes")
    dtype = jnp.dtype(dtype)
    if asked in ("cudnn", "pallas") and not all(isinstance(size, int) for size in shape):
        return Choice("eager", f"{asked} takes a number of images that is fixed")
    if asked == "cpu":
        reason = "has no gradient of its own" if gradient else None
    elif asked == "cudnn":
        reason = _cudnn_refuses(platform, shape, dtype, bias, gradient, cudnn)
    else:
        reason = _pallas_refuses(shape, dtype, bias, precision)
    if reason:
        return Choice("eager", f"{asked} {reason}")
    if implementation == asked:
        elsewhere = asked == "pallas" and platform != "tpu"
        return Choice(asked, "asked for; interpreted, slowly" if elsewhere else "asked for")
    return Choice(asked, f"the kernel for {platform}")


def _cudnn_refuses(platform, shape, dtype, bias, gradient, cudnn) -> str | None:
    _, S, _, width = shape
    if platform != "cuda":
        return f"runs on NVIDIA GPUs, not on {platform}"
    if cudnn:
        return f"is not to be had: {cudnn}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {dtype}"
    if width % 8 or width > CUDNN_HEAD:
        return (
            f"takes heads whose width is a multiple of 8 and at most {CUDNN_HEAD}; these have "
            f"{width}"
        )
    if bias is not None and bias[-2:] != (S, S):
        return f"takes a bias for every pair of the {S} tokens, not one of shape {bias}"
    if gradient and S % 2:
        return f"has gradients for even numbers of tokens, not for {S}"
    return None


def _pallas_refuses(shape, dtype, bias, precision) -> str | None:
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 and float32, not {dtype}"
    if dtype == jnp.float32 and kernel_precision(precision) is False:
        return f"multiplies at the default precision or the highest, not at {precision}"
    if bias is not None:
        if len(bias) != 4 or bias[0] != 1:
            return f"takes one bias for all images, not one of shape {bias}"
        from vit_flax.attention.tpu import takes_bias

        _, S, A, width = shape
        if not takes_bias(S, width, A, dtype.itemsize):
            return f"takes a bias where all scores of a head fit in VMEM, not with {S} tokens"
    return None


def kernel_precision(precision: Any) -> Any:
    """As Pallas takes it: None or HIGHEST; False for what it does not take."""
    if isinstance(precision, (tuple, list)):
        if len(set(precision)) != 1:
            return False
        precision = precision[0]
    if precision in (None, "default", "bfloat16", "fastest", jax.lax.Precision.DEFAULT):
        return None
    if precision in ("highest", "float32", jax.lax.Precision.HIGHEST):
        return jax.lax.Precision.HIGHEST
    return False


def needs_no_kernel(implementation: str) -> bool:
    """Whether a network traced now can do without a kernel that only its platform knows: it runs on
    one CPU, where the kernel is written in JAX's operations, or none was asked for."""
    if implementation == "eager":
        return True
    one_cpu = targets() == ("cpu",) and jax.device_count() == 1
    return implementation in ("auto", "cpu") and one_cpu
