"""Products of 8-bit integers, int8 x int8 to int32, by the instructions that a processor has.

On a TPU, a GPU and a processor with AMX, `dot_general` of two int8 arrays is what the hardware
multiplies. A processor with AVX-512 VNNI multiplies unsigned by signed bytes: XLA's library has
kernels for both pairs, and those of int8 by int8 do without VNNI, at a quarter of the speed. So on
such a processor the activations are moved up by 128 to uint8, and 128 times the sum of each column
of the weights is subtracted from the products: the same integers. `jax.lax.dot_general` converts
operands of two dtypes to int32 first, which no library takes; the operation here hands them to XLA
as they are.

Where neither pair reaches a library, the integers are multiplied as float32, in parts so short that
every sum is exact. So a network's integers are the same on every machine.
"""

from __future__ import annotations

import time
from functools import cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.lax import dot_general_p

from vit_flax.cpu.flags import processor_flags
from vit_flax.cpu.targets import elsewhere

Kind = Literal["int8", "uint8", "float32"]
_OFFSET = 128  # from int8 to uint8
_EXACT = 2**24 // (128 * 127)  # products of two 8-bit integers whose sum float32 holds: 1,032


class Product(NamedTuple):
    """How integers are multiplied, and why."""

    kind: Kind
    reason: str


def integer_product(
    x: jax.Array, kernel: jax.Array, sums: jax.Array, kind: Kind | None = None
) -> jax.Array:
    """The product of integers, exact in int32.

    Args:
        x: (..., in) of int8.
        kernel: (in, out) of int8; at most 66,000 inputs.
        sums: (out,) of int32, of the kernel's columns.
        kind: None for what `choose_product` says.

    Returns:
        (..., out) of int32.
    """
    kind = choose_product().kind if kind is None else kind
    if kind == "uint8":
        moved = jax.lax.bitcast_convert_type(x ^ np.int8(-_OFFSET), jnp.uint8)
        return mixed_dot_p.bind(moved, kernel) - _OFFSET * sums
    if kind == "int8":
        return _dot(x, kernel, jnp.int32)
    inputs = kernel.shape[0]
    parts = [slice(start, start + _EXACT) for start in range(0, inputs, _EXACT)]
    products = [
        _dot(x[..., part].astype(jnp.float32), kernel[part].astype(jnp.float32), jnp.float32)
        for part in parts
    ]
    return sum(product.astype(jnp.int32) for product in products)


def _dot(x, kernel, dtype):
    return jax.lax.dot_general(
        x,
        kernel,
        _dimensions(x),
        precision=None if dtype == jnp.int32 else jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )


def choose_product() -> Product:
    """How integers are multiplied in programs that are traced now: for the processor of this
    machine if they run on it, else as int8 by int8.

    Example:
        >>> choose_product().kind in ("int8", "uint8", "float32")
        True
    """
    if elsewhere():
        return Product("int8", "programs for another machine hold products of int8 by int8")
    backend = jax.default_backend()
    if backend != "cpu":
        return Product("int8", f"{backend} multiplies int8 by int8")
    return _of_this_processor(processor_flags())


@cache
def _of_this_processor(flags: frozenset[str]) -> Product:
    if "amx_int8" in flags and _in_library(jnp.int8):
        return Product("int8", "this processor has AMX")
    if "avx512_vnni" in flags and _in_library(jnp.uint8):
        return Product("uint8", "this processor has AVX-512 VNNI, for uint8 by int8")
    integers, floats = (_seconds(kind) for kind in ("int8", "float32"))
    told = f"one product took {integers / floats:.2f} times as long as in float32"
    # Alike is not reason enough to leave the integers, and no reason to choose by chance.
    return Product("int8" if integers < 1.5 * floats else "float32", told)


def _in_library(dtype) -> bool:
    """Whether XLA hands a product of that dtype by int8 to a library, and does not write loops."""
    x, kernel = jnp.zeros((64, 64), dtype), jnp.zeros((64, 64), jnp.int8)
    run = mixed_dot_p.bind if dtype == jnp.uint8 else partial(_dot, dtype=jnp.int32)
    try:
        return "_fusion" in _compile(run, x, kernel).as_text()
    except jax.errors.JaxRuntimeError:
        return False


def _seconds(kind: Kind) -> float:
    """The least time of one product on this processor."""
    x, kernel = jnp.ones((256, 512), jnp.int8), jnp.ones((512, 512), jnp.int8)
    run = _compile(partial(integer_product, kind=kind), x, kernel, jnp.zeros(512, jnp.int32))
    times = []
    for _ in range(8):
        started = time.perf_counter()
        jax.block_until_ready(run(x, kernel, jnp.zeros(512, jnp.int32)))
        times.append(time.perf_counter() - started)
    return min(times)


def _compile(run, *arguments):
    return jax.jit(run).lower(*arguments).compile()


# -- uint8 by int8 as one operation

mixed_dot_p = Primitive("vit_mixed_dot")
"""(..., in) of uint8 by (in, out) of int8, to int32."""


def _dimensions(x):
    return (((x.ndim - 1,), (0,)), ((), ()))


def _plain(x, kernel):
    return _dot(x.astype(jnp.int32), kernel.astype(jnp.int32), jnp.int32)


def _abstract(x, kernel):
    # What `dot_general` says of shape, sharding and axes of a `shard_map`.
    return dot_general_p.abstract_eval(
        x,
        kernel,
        dimension_numbers=_dimensions(x),
        precision=None,
        preferred_element_type=np.dtype(np.int32),
        out_sharding=None,
    )[0]


def _lower(ctx, x, kernel):
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import stablehlo

    (result,) = ctx.avals_out
    (contracting, _), _ = _dimensions(ctx.avals_in[0])
    dimensions = stablehlo.DotDimensionNumbers.get(
        lhs_batching_dimensions=[],
        rhs_batching_dimensions=[],
        lhs_contracting_dimensions=list(contracting),
        rhs_contracting_dimensions=[0],
    )
    kind = ir.RankedTensorType.get(result.shape, ir.IntegerType.get_signless(32))
    return [stablehlo.dot_general(kind, x, kernel, dimensions)]


mixed_dot_p.def_abstract_eval(_abstract)
mixed_dot_p.def_impl(jax.jit(mixed_dot_p.bind))
mlir.register_lowering(mixed_dot_p, mlir.lower_fun(_plain, multiple_results=False))
mlir.register_lowering(mixed_dot_p, _lower, platform="cpu")


def _batched(operands, axes):
    return jax.vmap(_plain, in_axes=axes)(*operands), 0


batching.primitive_batchers[mixed_dot_p] = _batched
