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

from vit_common.errors import InputError

LANES = 128
"""Columns of a TPU register; a block of columns is a multiple of it, or all there are."""
VMEM_BYTES = 12 * 2**20
"""What one step of a kernel may take by our count."""
VMEM_LIMIT = 32 * 2**20
"""What the compiler may give it, with what it keeps between operations; a chip has 64 MiB or more
(v5e, v5p, v6e)."""
IMAGE_BYTES = 2**19
"""Of one operand in one step: enough that copying hides the step's own cost, and little to wait
for at the start."""
TILE = 512
"""Queries, and keys, in one step of a long sequence."""


NEEDED = {
    "vit_attention": 1.0,
    "vit_attention_gradients": 4 / 5,
    "vit_attention_long": 1.0,
    "vit_attention_long_again": 0.0,
    "vit_attention_long_query_gradient": 2 / 3,
    "vit_attention_long_key_gradients": 2 / 4,
}
"""The kernels by name: of the matrix products each says it does, the share that is not a computing
anew of what another has had."""


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


def _check_no_bias(bias: jax.Array | None, tokens: int) -> None:
    if bias is not None:
        raise InputError(f"`bias` must be None with {tokens} tokens; see `takes_bias`.")


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


def _parameters(*order: Any) -> pltpu.CompilerParams:
    """ "parallel" or "arbitrary" (one after the other) for each axis of the grid."""
    return pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=VMEM_LIMIT)


# -- short sequences


def _forward(query, key, value, bias, width, precision, interpret):
    squares = [] if bias is None else [bias]
    biased = bool(squares)
    B, S, D = query.shape
    blocks = _forward_blocks(query.shape, width, query.dtype.itemsize, biased)
    if blocks is None:
        _check_no_bias(bias, S)
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
        compiler_params=_parameters("parallel", "parallel"),
        cost_estimate=_cost(query, width, *squares, operands=4, products=2),
        interpret=interpret,
        name="vit_attention",
    )(query, key, value, *squares)


def _cost(query, width: int, *bias, operands: int, products: int):
    """What a kernel says of itself: matrix products, exponentials, and bytes of HBM."""
    B, S, D = query.shape
    A = D // width
    squares = sum(each.size * each.dtype.itemsize for each in bias)
    return pl.CostEstimate(
        flops=2 * products * B * A * S * S * width,
        transcendentals=B * A * S * S,
        bytes_accessed=operands * query.size * query.dtype.itemsize + squares,
    )


def _product(left, right, dims: tuple[int, int], precision: Any):
    """Sum over one axis of each, in float32."""
    if left.dtype != jnp.float32:
        precision = None  # bfloat16 has but one, and Mosaic refuses to be asked for another
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
        _check_no_bias(bias, S)
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
        compiler_params=_parameters("parallel", "arbitrary" if biased else "parallel"),
        cost_estimate=_cost(query, width, *squares, *squares, operands=7, products=5),
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
#
# Steps are (image, group of heads, tile of the outer sequence, tile of the inner one). The last
# tiles may reach past the end of the sequence, and what is read there is anything: it must not be
# multiplied with, not even by zero. Logarithms of the sums of exponentials, one for each query and
# head, are held with the queries along the lanes: (B, groups, heads of a group, S).


class Tiles(NamedTuple):
    """How a long sequence is cut."""

    columns: int
    heads: int
    queries: int
    keys: int
    rows: int  # S

    def grid(self, shape: tuple[int, int, int], outer: int, inner: int) -> tuple[int, ...]:
        B, S, D = shape
        return B, pl.cdiv(D, self.columns), pl.cdiv(S, outer), pl.cdiv(S, inner)


def _tiles(shape: tuple[int, int, int], width: int) -> Tiles:
    _, S, D = shape
    columns = min(math.lcm(width, LANES), D)
    tile = min(TILE, _up(S, LANES))
    return Tiles(columns, columns // width, tile, tile, S)


_LONG = _parameters("parallel", "parallel", "parallel", "arbitrary")


def _long_forward(query, key, value, width, precision, interpret, sums: bool = False):
    """The context; with `sums`, and the logarithm of each query's sum of exponentials."""
    tiles = _tiles(query.shape, width)
    grid = tiles.grid(query.shape, tiles.queries, tiles.keys)
    outer, inner = _long_specs(tiles, tiles.queries, tiles.keys)
    row = pl.BlockSpec((1, 1, tiles.heads, tiles.queries), lambda b, g, i, j: (b, g, 0, i))
    like = jax.ShapeDtypeStruct(query.shape, query.dtype)
    per_query = jax.ShapeDtypeStruct((*grid[:2], tiles.heads, tiles.rows), jnp.float32)
    found = pl.pallas_call(
        partial(_long_kernel, width=width, tiles=tiles, precision=precision),
        out_shape=[like] + [per_query] * sums,
        grid=grid,
        in_specs=[outer, inner, inner],
        out_specs=[outer] + [row] * sums,
        scratch_shapes=[
            pltpu.VMEM((tiles.heads, tiles.queries, LANES), jnp.float32),
            pltpu.VMEM((tiles.heads, tiles.queries, LANES), jnp.float32),
            pltpu.VMEM((tiles.queries, tiles.columns), jnp.float32),
        ],
        compiler_params=_LONG,
        # Keys and values come by once for each tile of queries.
        cost_estimate=_cost(query, width, operands=2 + 2 * grid[2], products=2),
        interpret=interpret,
        name="vit_attention_long_again" if sums else "vit_attention_long",
    )(query, key, value)
    return found if sums else found[0]


def _long_specs(tiles: Tiles, outer: int, inner: int) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    return (
        pl.BlockSpec((1, outer, tiles.columns), lambda b, g, i, j: (b, i, g)),
        pl.BlockSpec((1, inner, tiles.columns), lambda b, g, i, j: (b, j, g)),
    )


def _inside(tile, count: int, size: int, shape: tuple[int, ...], axis: int):
    """Where a tile of `count` tokens is inside the sequence, for an array of that shape; None where
    every tile is."""
    if size % count == 0:
        return None
    return tile * count + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < size


def _or_zero(inside, x):
    return x if inside is None else jnp.where(inside, x, jnp.zeros_like(x))


def _long_kernel(query, key, value, *rest, width, tiles, precision):
    *results, maxima, totals, context = rest
    j, last = pl.program_id(3), pl.num_programs(3) - 1

    @pl.when(j == 0)
    def _():
        maxima[...] = jnp.full_like(maxima, -jnp.inf)
        totals[...] = jnp.zeros_like(totals)
        context[...] = jnp.zeros_like(context)

    known = _inside(j, tiles.keys, tiles.rows, (tiles.queries, tiles.keys), 1)
    real = _inside(j, tiles.keys, tiles.rows, (tiles.keys, width), 0)
    for h in range(tiles.heads):
        lanes = slice(h * width, (h + 1) * width)
        scores = _product(_scaled(query[0, :, lanes], width), key[0, :, lanes], (1, 1), precision)
        if known is not None:
            scores = jnp.where(known, scores, -jnp.inf)
        before = maxima[h, :, :1]  # (queries, 1)
        now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        scores = jnp.exp(scores - now)
        shrunk = jnp.exp(before - now)
        total = shrunk * totals[h, :, :1] + jnp.sum(scores, axis=1, keepdims=True)
        maxima[h] = jnp.broadcast_to(now, maxima.shape[1:])
        totals[h] = jnp.broadcast_to(total, totals.shape[1:])
        values = _or_zero(real, value[0, :, lanes])
        found = _product(scores.astype(value.dtype), values, (1, 0), precision)
        context[:, lanes] = shrunk * context[:, lanes] + found

    @pl.when(j == last)
    def _():
        for h in range(tiles.heads):
            lanes = slice(h * width, (h + 1) * width)
            total = totals[h, :, :1]
            results[0][0, :, lanes] = (context[:, lanes] / total).astype(results[0].dtype)
            if len(results) == 2:
                sums = maxima[h] + jnp.log(totals[h])  # (queries, LANES), each row one number
                results[1][0, 0, h : h + 1, :] = sums.T[:1, :]


def _long_backward(query, key, value, cotangent, width, precision, interpret):
    """Two kernels, as either the gradient of the queries or those of keys and values can stay in
    VMEM while the others come by."""
    B, S, D = query.shape
    tiles = _tiles(query.shape, width)
    context, sums = _long_forward(query, key, value, width, precision, interpret, sums=True)
    means = cotangent.astype(jnp.float32) * context.astype(jnp.float32)  # (B, S, D)
    means = means.reshape(B, S, D // width, width).sum(axis=3)  # (B, S, A)
    _, groups, heads, _ = sums.shape
    means = jnp.pad(means, ((0, 0), (0, 0), (0, groups * heads - means.shape[2])))
    means = means.reshape(B, S, groups, heads).transpose(0, 2, 3, 1)
    like = jax.ShapeDtypeStruct(query.shape, query.dtype)
    options: dict[str, Any] = {"width": width, "tiles": tiles, "precision": precision}

    outer, inner = _long_specs(tiles, tiles.queries, tiles.keys)
    row = pl.BlockSpec((1, 1, heads, tiles.queries), lambda b, g, i, j: (b, g, 0, i))
    grid = tiles.grid(query.shape, tiles.queries, tiles.keys)
    d_query = pl.pallas_call(
        partial(_long_query_kernel, **options),
        out_shape=like,
        grid=grid,
        in_specs=[outer, inner, inner, outer, row, row],
        out_specs=outer,
        scratch_shapes=[pltpu.VMEM((tiles.queries, tiles.columns), jnp.float32)],
        compiler_params=_LONG,
        cost_estimate=_cost(query, width, operands=3 + 2 * grid[2], products=3),
        interpret=interpret,
        name="vit_attention_long_query_gradient",
    )(query, key, value, cotangent, sums, means)

    outer, inner = _long_specs(tiles, tiles.keys, tiles.queries)
    row = pl.BlockSpec((1, 1, heads, tiles.queries), lambda b, g, i, j: (b, g, 0, j))
    grid = tiles.grid(query.shape, tiles.keys, tiles.queries)
    d_key, d_value = pl.pallas_call(
        partial(_long_key_kernel, **options),
        out_shape=[like, like],
        grid=grid,
        in_specs=[inner, outer, outer, inner, row, row],
        out_specs=[outer, outer],
        scratch_shapes=[pltpu.VMEM((tiles.keys, tiles.columns), jnp.float32)] * 2,
        compiler_params=_LONG,
        cost_estimate=_cost(query, width, operands=4 + 2 * grid[2], products=4),
        interpret=interpret,
        name="vit_attention_long_key_gradients",
    )(query, key, value, cotangent, sums, means)
    return [d_query, d_key, d_value]


def _long_query_kernel(
    query, key, value, cotangent, sums, means, d_query, total, *, width, tiles, precision
):
    j = pl.program_id(3)

    @pl.when(j == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    shape = (tiles.queries, tiles.keys)
    known = _inside(j, tiles.keys, tiles.rows, shape, 1)
    real = _inside(j, tiles.keys, tiles.rows, (tiles.keys, width), 0)
    for h in range(tiles.heads):
        lanes = slice(h * width, (h + 1) * width)
        k, v = _or_zero(real, key[0, :, lanes]), _or_zero(real, value[0, :, lanes])
        scores = _product(_scaled(query[0, :, lanes], width), k, (1, 1), precision)
        weights = _or_zero(known, jnp.exp(scores - _upright(sums[0, 0, h : h + 1, :])))
        d_weights = _product(cotangent[0, :, lanes], v, (1, 1), precision)
        d_scores = weights * (d_weights - _upright(means[0, 0, h : h + 1, :]))
        total[:, lanes] += _product(d_scores.astype(query.dtype), k, (1, 0), precision)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        d_query[0] = _scaled(total[...], width).astype(d_query.dtype)


def _upright(row):
    """(1, n) -> (n, 1)."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _long_key_kernel(
    query,
    key,
    value,
    cotangent,
    sums,
    means,
    d_key,
    d_value,
    keys,
    values,
    *,
    width,
    tiles,
    precision,
):
    """Scores are transposed here, keys down and queries across."""
    j = pl.program_id(3)

    @pl.when(j == 0)
    def _():
        keys[...] = jnp.zeros_like(keys)
        values[...] = jnp.zeros_like(values)

    known = _inside(j, tiles.queries, tiles.rows, (tiles.keys, tiles.queries), 1)
    real = _inside(j, tiles.queries, tiles.rows, (tiles.queries, width), 0)
    for h in range(tiles.heads):
        lanes = slice(h * width, (h + 1) * width)
        q = _scaled(_or_zero(real, query[0, :, lanes]), width)
        dc = _or_zero(real, cotangent[0, :, lanes])
        scores = _product(key[0, :, lanes], q, (1, 1), precision)  # (keys, queries)
        weights = _or_zero(known, jnp.exp(scores - sums[0, 0, h : h + 1, :]))
        values[:, lanes] += _product(weights.astype(dc.dtype), dc, (1, 0), precision)
        d_weights = _product(value[0, :, lanes], dc, (1, 1), precision)
        d_scores = _or_zero(known, weights * (d_weights - means[0, 0, h : h + 1, :]))
        keys[:, lanes] += _product(d_scores.astype(q.dtype), q, (1, 0), precision)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        d_key[0] = keys[...].astype(d_key.dtype)
        d_value[0] = values[...].astype(d_value.dtype)
