"""How networks of half precision are computed on a CPU.

XLA's CPU compiler hands a product to its library of kernels with the operands that the program
names. bfloat16 operands with float32 sums reach AMX and AVX512-BF16, at several times the speed of
float32; without such instructions the same product is slower than in float32. Between products,
XLA's CPU compiler computes bfloat16 and float16 in float32 and rounds after every operation.

So on a CPU arrays between products are float32, and are rounded to the compute dtype only where
the network returns them. Operands of products are bfloat16 on a processor that multiplies them,
and float32 on any other (docs/cpu.md). Programs for other platforms hold what they always held.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.lax import dot_general_p

from vit_common.errors import InputError
from vit_flax.cpu.flags import processor_flags
from vit_flax.cpu.targets import elsewhere, targets

Kind = Literal["bfloat16", "float32"]
Dimensions = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]

UNITS = ("amx_bf16", "avx512_bf16")
"""Instruction sets, as Linux names them, that multiply bfloat16 and add up in float32."""


class HalfProducts(NamedTuple):
    """The dtype of the operands of bfloat16 products on a CPU, and why."""

    kind: Kind
    reason: str


_forced: ContextVar[Kind | None] = ContextVar("half", default=None)


def choose_half_products() -> HalfProducts:
    """The dtype of the operands of bfloat16 products in programs for this processor, by what it
    reports.

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
            return HalfProducts("bfloat16", f"this processor reports {name}")
    return HalfProducts("float32", f"this processor reports none of {', '.join(UNITS)}")


def traced_for() -> tuple[Any, ...]:
    """All that programs traced now follow beside their arguments: for the keys of caches.

    Example:
        >>> traced_for() == traced_for()
        True
    """
    return targets(), elsewhere(), choose_half_products().kind


@contextmanager
def half_products(kind: Kind) -> Iterator[None]:
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
    """The dtype of the operands of products on this machine's CPU where the compute dtype is
    `dtype`; None where `dtype` is no half precision, or the program is for something else.

    A program for another machine, such as an exported one, is written in the compute dtype: no
    choice of this machine's is in its file, unless `half_products` asks for one. float16 has no
    kernels in XLA's library, so its products are float32.
    """
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16) or targets() != ("cpu",):
        return None
    if elsewhere() and _forced.get() is None:
        return None
    if jnp.dtype(dtype) == jnp.bfloat16 and choose_half_products().kind == "bfloat16":
        return jnp.bfloat16
    return jnp.float32


def array_dtype(dtype: Any) -> Any:
    """The dtype of arrays between products where the compute dtype is `dtype`: float32 for half
    precision on a CPU, else `dtype`.

    Example:
        >>> array_dtype("float64")
        'float64'
    """
    return dtype if operand_dtype(dtype) is None else jnp.float32


def as_operand(x: jax.Array, dtype: Any) -> jax.Array:
    """An array between products as a product takes it: bfloat16 where such are multiplied, else
    the array itself."""
    return x.astype(jnp.bfloat16) if operand_dtype(dtype) == jnp.bfloat16 else x


def half_product(
    x: jax.Array,
    y: jax.Array,
    dtype: Any,
    precision: jax.lax.PrecisionLike = None,
    dimensions: Dimensions | None = None,
) -> jax.Array:
    """A product of two arrays by the policy of this file.

    Args:
        x, y: (..., in) and (in, ...), or as `dimensions` say; any floating dtype.
        dtype: one that `operand_dtype` has an answer for.
        precision: of a product of float32; those of bfloat16 are exact.
        dimensions: as `jax.lax.dot_general` takes them.

    Returns:
        The product, float32. Those of its derivatives have the same operands.
    """
    dimensions = dimensions or (((x.ndim - 1,), (0,)), ((), ()))
    if operand_dtype(dtype) == jnp.bfloat16:
        return rounded_product(x, y, dimensions)
    return jax.lax.dot_general(
        x.astype(jnp.float32), y.astype(jnp.float32), dimensions, precision=precision
    )


def held_params(params: Any, dtype: Any) -> Any:
    """Parameters as products on this machine's CPU take them, so that no program converts them at
    every call: all of them float32, or the kernels of dense layers bfloat16. A network gives the
    same numbers with either.

    Args:
        params: a nested dict of arrays; integers stay as they are.
        dtype: compute dtype.

    Returns:
        The same tree; the parameters themselves where nothing is to be changed.
    """
    operands = operand_dtype(dtype)
    if operands is None:
        return params

    def held(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        if operands == jnp.float32:
            return x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x
        dense = path[-1].key == "kernel" and x.ndim in (2, 3)  # 3: of all blocks
        return x.astype(jnp.bfloat16) if dense and x.dtype == jnp.float32 else x

    return jax.tree_util.tree_map_with_path(held, params)


# -- products of bfloat16 whose derivatives are products of bfloat16
#
# JAX's own derivative of `dot_general` multiplies the cotangent, float32 as the sums are, by the
# other operand, bfloat16: XLA converts both to float32, and no unit is reached.

rounded_dot_p = Primitive("vit_rounded_dot")
"""`dot_general` of both operands rounded to bfloat16, in float32; linear in each as it is here."""


def _own(rank: int, *others: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that are neither summed over nor of the batch."""
    return tuple(i for i in range(rank) if not any(i in axes for axes in others))


def _rounded(x, y, *, dimensions, apart=False):
    """`dot_general` as batch, rows, in by batch, in, columns.

    Anything else XLA (of JAX 0.10.2) converts to float32, or leaves to a kernel that fails when it
    is run. With `apart`, barriers keep it from moving transpositions around into the product.
    """
    (x_in, y_in), (x_batch, y_batch) = dimensions
    x_own, y_own = _own(x.ndim, x_in, x_batch), _own(y.ndim, y_in, y_batch)
    left = x.astype(jnp.bfloat16).transpose(*x_batch, *x_own, *x_in)
    right = y.astype(jnp.bfloat16).transpose(*y_batch, *y_in, *y_own)
    if apart:
        left, right = jax.lax.optimization_barrier((left, right))
    batch = tuple(range(len(x_batch)))
    last = tuple(range(x.ndim - len(x_in), x.ndim))
    first = tuple(range(len(batch), len(batch) + len(y_in)))
    found = jax.lax.dot_general(
        left, right, ((last, first), (batch, batch)), preferred_element_type=jnp.float32
    )
    return jax.lax.optimization_barrier(found) if apart else found


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def rounded_product(x: jax.Array, y: jax.Array, dimensions: Dimensions) -> jax.Array:
    """The product of both operands rounded to bfloat16, in float32, as are those of its
    derivatives. The product itself is JAX's, which tools and `remat_policy` know by name."""
    return _rounded(x, y, dimensions=dimensions)


def _derivative(dimensions, primals, tangents):
    x, y = primals
    zero = jax.custom_derivatives.SymbolicZero
    parts = []
    if not isinstance(tangents[0], zero):
        parts.append(rounded_dot_p.bind(tangents[0], y, dimensions=dimensions))
    if not isinstance(tangents[1], zero):
        parts.append(rounded_dot_p.bind(x, tangents[1], dimensions=dimensions))
    found = rounded_product(x, y, dimensions)
    return found, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(found)


rounded_product.defjvp(_derivative, symbolic_zeros=True)


def _abstract(x, y, *, dimensions):
    # What `dot_general` says of shape, sharding and axes of a `shard_map`.
    return dot_general_p.abstract_eval(
        x.update(dtype=jnp.dtype(jnp.bfloat16)),
        y.update(dtype=jnp.dtype(jnp.bfloat16)),
        dimension_numbers=dimensions,
        precision=None,
        preferred_element_type=np.dtype(np.float32),
        out_sharding=None,
    )[0]


def _left(cotangent, x, y, *, dimensions):
    (x_in, y_in), (x_batch, y_batch) = dimensions
    x_own, y_own = _own(x.aval.ndim, x_in, x_batch), _own(y.ndim, y_in, y_batch)
    b = len(x_batch)
    last = tuple(range(b + len(x_own), b + len(x_own) + len(y_own)))
    found = rounded_dot_p.bind(
        cotangent, y, dimensions=((last, y_own), (tuple(range(b)), y_batch))
    )  # the batch, what x has of its own, and what was summed over, in y's order
    order = (*x_batch, *x_own, *(x_in[i] for i in np.argsort(y_in)))
    return jnp.transpose(found, np.argsort(order).tolist()).astype(x.aval.dtype)


def _right(cotangent, x, y, *, dimensions):
    (x_in, y_in), (x_batch, y_batch) = dimensions
    x_own, y_own = _own(x.ndim, x_in, x_batch), _own(y.aval.ndim, y_in, y_batch)
    b = len(x_batch)
    middle = tuple(range(b, b + len(x_own)))
    found = rounded_dot_p.bind(
        x, cotangent, dimensions=((x_own, middle), (x_batch, tuple(range(b))))
    )  # the batch, what was summed over, in x's order, and what y has of its own
    order = (*y_batch, *(y_in[i] for i in np.argsort(x_in)), *y_own)
    return jnp.transpose(found, np.argsort(order).tolist()).astype(y.aval.dtype)


_derived = partial(_rounded, apart=True)


def _batched(operands, axes, *, dimensions):
    return jax.vmap(partial(_derived, dimensions=dimensions), in_axes=axes)(*operands), 0


rounded_dot_p.def_abstract_eval(_abstract)
rounded_dot_p.def_impl(jax.jit(rounded_dot_p.bind, static_argnames="dimensions"))
ad.defbilinear(rounded_dot_p, _left, _right)
batching.primitive_batchers[rounded_dot_p] = _batched
mlir.register_lowering(rounded_dot_p, mlir.lower_fun(_derived, multiple_results=False))
