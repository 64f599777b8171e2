"""How products of half precision are computed on a CPU.

XLA's CPU compiler hands a product to its library of kernels with the operands that the program
names. bfloat16 operands with float32 sums reach the units that AMX and AVX512-BF16 are; on a
processor without them the same product runs at 0.5 to 0.9 times the speed of float32
(docs/cpu.md), so there the operands are converted to float32 first. Both add up the same numbers:
the product of two bfloat16 numbers is exact in float32.

Programs for another machine, and other backends, hold what they always held.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from vit_common.errors import InputError
from vit_flax.attention.choice import targets
from vit_flax.cpu.flags import processor_flags

UNITS = ("amx_bf16", "avx512_bf16")
"""Instruction sets, as Linux names them, that multiply bfloat16 and add up in float32."""


class HalfProducts(NamedTuple):
    """The dtype of the operands of half-precision products on a CPU, and why."""

    kind: Literal["bfloat16", "float32"]
    reason: str


_forced: ContextVar[Literal["bfloat16", "float32"] | None] = ContextVar("half", default=None)


def choose_half_products() -> HalfProducts:
    """How a CPU multiplies in half precision, by what the processor reports.

    Example:
        >>> choose_half_products().kind in ("bfloat16", "float32")
        True
    """
    forced = _forced.get()
    if forced is not None:
        return HalfProducts(forced, "asked for")
    flags = processor_flags()
    for name in UNITS:
        if name in flags:
            return HalfProducts("bfloat16", f"this processor has {name}")
    return HalfProducts("float32", "this processor has no instructions for bfloat16")


@contextmanager
def half_products(kind: Literal["bfloat16", "float32"]) -> Iterator[None]:
    """Trace networks with these operands, whatever the processor reports.

    Args:
        kind: "bfloat16" or "float32".

    Raises:
        InputError: there is no such kind.

    Example:
        >>> with half_products("bfloat16"):
        ...     text = jax.jit(network).lower(params, images).compile().as_text()
    """
    if kind not in ("bfloat16", "float32"):
        raise InputError(f"`kind` must be 'bfloat16' or 'float32'; given {kind!r}.")
    token = _forced.set(kind)
    try:
        yield
    finally:
        _forced.reset(token)


def operand_dtype(dtype: Any) -> Any:
    """The dtype that operands of a product are given on a CPU where the compute dtype is `dtype`;
    None where the program is not for this machine's CPU alone, or `dtype` is no half precision.

    float16 has no kernels in XLA's library, so it is always float32.
    """
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16) or targets() != ("cpu",):
        return None
    if jnp.dtype(dtype) == jnp.bfloat16 and choose_half_products().kind == "bfloat16":
        return jnp.bfloat16
    return jnp.float32


def half_product(
    inputs: jax.Array, kernel: jax.Array, dtype: Any, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    """Inputs (..., in) by a kernel (in, out), both rounded to `dtype`; (..., out) of float32.

    `dtype` must be one that `operand_dtype` has an answer for.
    """
    operands = operand_dtype(dtype)
    return jax.lax.dot_general(
        inputs.astype(dtype).astype(operands),
        kernel.astype(dtype).astype(operands),
        (((inputs.ndim - 1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
