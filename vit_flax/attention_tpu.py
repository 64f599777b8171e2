"""Attention on a TPU, written by hand in Pallas: no S x S matrix ever leaves the chip's VMEM.

Operands are (B, S, D) with D = A * D/A, as the dense layers give them: a head is a range of
columns, so nothing is transposed, padded or split in HBM. Two kernels: of short sequences one step
holds whole images, every score of a head at once; of long ones it holds tiles of queries and keys,
and the softmax is kept up to date as keys come by (Milakov and Gimelshein 2018, arXiv:1805.02867;
Dao et al. 2022, arXiv:2205.14135). Probabilities are computed anew for the gradient.

Scores, softmax and sums are float32; products have operands of the given dtype.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
"""Columns of a TPU register; a block of columns is a multiple of it, or all there are."""
VMEM_BYTES = 12 * 2**20
"""What the blocks of one step may take, of the 16 MiB that the compiler grants a kernel."""
IMAGE_BYTES = 2**19
"""Of one operand in one step: enough that copying hides the step's own cost, and little to wait
for at the start."""
TILE = 512
"""Queries, and keys, in one step of a long sequence."""


class Blocks(NamedTuple):
    """What one step of the kernel for short sequences holds of each operand: images, columns."""

    images: int
    columns: int


def whole_blocks(
    shape: tuple[int, int, int], width: int, itemsize: int, *, operands: int, scores: int, bias: int
) -> Blocks | None:
    """The largest blocks of whole images that fit in VMEM; None if not even one group of heads
    does.

    Args:
        shape: (B, S, D).
        width: of a head.
        itemsize: bytes of a number.
        operands: how many arrays of the shape are read and written.
        scores: how many S x S matrices in float32 live at once.
        bias: how many arrays (A, S, S) in float32 are read and written.
    """
    B, S, D = shape
    rows, columns = _up(S, 16), _up(S, LANES)
    unit = math.lcm(width, LANES)
    groups = [D] + [unit * n for n in range(D // unit, 0, -1) if unit * n < D]
    for group in groups:
        # Twice: while one block is computed on, the next is on its way.
        image = rows * _up(group, LANES) * itemsize
        squares = scores + 2 * bias * (-(-group // width))
        fixed = squares * rows * columns * 4
        if fixed + 2 * operands * image > VMEM_BYTES:
            continue
        most = min(IMAGE_BYTES // image, (VMEM_BYTES - fixed) // (2 * operands * image))
        images = next(n for n in range(max(1, min(B, most)), 0, -1) if B % n == 0)
        return Blocks(images, group)
    return None


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _forward_blocks(shape: tuple[int, int, int], width: int, itemsize: int, bias: bool):
    return whole_blocks(shape, width, itemsize, operands=4, scores=4, bias=int(bias))


def _backward_blocks(shape: tuple[int, int, int], width: int, itemsize: int, bias: bool):
    return whole_blocks(shape, width, itemsize, operands=7, scores=6, bias=2 * int(bias))


def takes_bias(tokens: int, width: int, heads: int, itemsize: int) -> bool:
    """Whether the kernels take a bias with that many tokens: only those of short sequences do."""
    shape = (1, tokens, heads * width)
    return _backward_blocks(shape, width, itemsize, True) is not None


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    *,
    heads: int,
    precision: Any = None,
    interpret: bool = False,
) -> jax.Array:
    """The context of every head, (B, S, D).

    Args:
        query, key, value: (B, S, D), float32 or bfloat16; heads side by side in D.
        bias: (A, S, S), added to the scores; see `takes_bias`.
        heads: A.
        precision: of the products, `jax.lax.Precision.HIGHEST` or None.
        interpret: run it as JAX operations, on any device.
    """
    width = query.shape[-1] // heads
    return _forward(query, key, value, bias, width, precision, interpret)


def gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    cotangent: jax.Array,
    *,
    heads: int,
    precision: Any = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Gradients of query, key, value and, if there is one, the bias (float32), for the context's
    `cotangent` (B, S, D). Other arguments as `attention`."""
    width = query.shape[-1] // heads
    found = _backward(query, key, value, bias, cotangent, width, precision, interpret)
    return tuple(found)


# -- short sequences


def _forward(query, key, value, bias, width, precision, interpret):
    squares = [] if bias is None else [bias]
    biased = bool(squares)
    B, S, D = query.shape
    blocks = _forward_blocks(query.shape, width, query.dtype.itemsize, biased)
    if blocks is None:
        return _long_forward(query, key, value, width, precision, interpret)
    images, columns = blocks
    image = pl.BlockSpec((images, S, columns), lambda g, b: (b, 0, g))
    square = pl.BlockSpec((-(-columns // width), S, S), lambda g, b: (g, 0, 0))
    return pl.pallas_call(
        partial(_whole_kernel, width=width, precision=precision),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        grid=(pl.cdiv(D, columns), B // images),  # groups outside: a bias is then read once
        in_specs=[image] * 3 + [square] * biased,
        out_specs=image,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=_cost(query, width, *squares, operands=4, products=2, elementwise=3),
        interpret=interpret,
        name="vit_attention",
    )(query, key, value, *squares)


def _cost(query, width: int, *bias, operands: int, products: int, elementwise: int):
    B, S, D = query.shape
    A = D // width
    squares = sum(each.size * each.dtype.itemsize for each in bias)
    return pl.CostEstimate(
        flops=B * A * S * S * (2 * products * width + elementwise + len(bias)),
        transcendentals=B * A * S * S,
        bytes_accessed=operands * query.size * query.dtype.itemsize + squares,
    )


def _product(left, right, dims: tuple[int, int], precision: Any):
    """Sum over one axis of each, in float32."""
    return jax.lax.dot_general(
        left,
        right,
        (((dims[0],), (dims[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _scaled(query, width: int):
    return query * jnp.asarray(width**-0.5, query.dtype)


def _whole_kernel(query, key, value, *rest, width, precision):
    """Blocks (images, S, columns); a head after the other, all of its scores at once."""
    *bias, context = rest

    def image(b, _):
        for h in range(-(-query.shape[2] // width)):
            lanes = slice(h * width, (h + 1) * width)
            scores = _product(
                _scaled(query[b, :, lanes], width), key[b, :, lanes], (1, 1), precision
            )  # (S, S)
            if bias:
                scores += bias[0][h]
            scores = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
            total = jnp.sum(scores, axis=1, keepdims=True)
            weights = scores.astype(value.dtype)
            found = _product(weights, value[b, :, lanes], (1, 0), precision)  # (S, D/A)
            context[b, :, lanes] = (found / total).astype(context.dtype)
        return 0

    jax.lax.fori_loop(0, query.shape[0], image, 0)


def _backward(query, key, value, bias, cotangent, width, precision, interpret):
    squares = [] if bias is None else [bias]
    biased = bool(squares)
    B, S, D = query.shape
    blocks = _backward_blocks(query.shape, width, query.dtype.itemsize, biased)
    if blocks is None:
        return _long_backward(query, key, value, cotangent, width, precision, interpret)
    images, columns = blocks
    image = pl.BlockSpec((images, S, columns), lambda g, b: (b, 0, g))
    square = pl.BlockSpec((-(-columns // width), S, S), lambda g, b: (g, 0, 0))
    like = jax.ShapeDtypeStruct(query.shape, query.dtype)
    return pl.pallas_call(
        partial(_whole_backward_kernel, width=width, precision=precision, biased=biased),
        out_shape=[like] * 3 + [jax.ShapeDtypeStruct(each.shape, jnp.float32) for each in squares],
        grid=(pl.cdiv(D, columns), B // images),
        in_specs=[image] * 4 + [square] * biased,
        out_specs=[image] * 3 + [square] * biased,
        # The gradient of a bias is summed over the images, one after the other.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary" if biased else "parallel")
        ),
        cost_estimate=_cost(
            query, width, *squares, *squares, operands=7, products=5, elementwise=8
        ),
        interpret=interpret,
        name="vit_attention_gradients",
    )(query, key, value, cotangent, *squares)


def _whole_backward_kernel(query, key, value, cotangent, *rest, width, precision, biased):
    bias, rest = rest[:biased], rest[biased:]
    d_query, d_key, d_value, *d_bias = rest
    dtype = query.dtype
    if biased:

        @pl.when(pl.program_id(1) == 0)
        def _():
            d_bias[0][...] = jnp.zeros_like(d_bias[0])

    def image(b, _):
        for h in range(-(-query.shape[2] // width)):
            lanes = slice(h * width, (h + 1) * width)
            q, k, v = _scaled(query[b, :, lanes], width), key[b, :, lanes], value[b, :, lanes]
            dc = cotangent[b, :, lanes]
            scores = _product(q, k, (1, 1), precision)  # (S, S)
            if bias:
                scores += bias[0][h]
            scores = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
            weights = scores / jnp.sum(scores, axis=1, keepdims=True)
            d_value[b, :, lanes] = _product(weights.astype(dtype), dc, (0, 0), precision).astype(
                dtype
            )
            d_weights = _product(dc, v, (1, 1), precision)  # (S, S)
            mean = jnp.sum(weights * d_weights, axis=1, keepdims=True)
            d_scores = weights * (d_weights - mean)
            if bias:
                d_bias[0][h] += d_scores
            d_scores = d_scores.astype(dtype)
            d_query[b, :, lanes] = _scaled(_product(d_scores, k, (1, 0), precision), width).astype(
                dtype
            )
            d_key[b, :, lanes] = _product(d_scores, q, (0, 0), precision).astype(dtype)
        return 0

    jax.lax.fori_loop(0, query.shape[0], image, 0)


# -- long sequences


def _long_forward(query, key, value, width, precision, interpret):
    raise NotImplementedError


def _long_backward(query, key, value, cotangent, width, precision, interpret):
    raise NotImplementedError
