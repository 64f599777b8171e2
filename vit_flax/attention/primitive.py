"""One operation of JAX's for all kernels, with its derivatives, batching and lowering.

An operation of its own, and not a branch for each platform: only the kernel that is needed is ever
imported and traced, and derivatives of both modes and any order work on every platform.

`attention_p` takes query, key, value and perhaps a bias; `gradients_p` those and the context's
cotangent, and gives a gradient for each; `tangent_p`, linear in the tangents that follow the
operands, is what differentiation forward writes down, and its transpose is `gradients_p`.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, PartitionSpec

from vit_flax.attention.choice import choose, kernel_precision
from vit_flax.attention.cudnn import attention_cudnn, cudnn_missing
from vit_flax.attention.eager import eager
from vit_flax.cpu.targets import PLATFORMS

# Private names. Without the first, JAX does not tell the lowering over which mesh a program's
# arguments are split, and programs for several devices get the eager kernel; without the second, a
# kernel inside `shard_map` needs its `check_vma=False`.
try:
    from jax._src.dispatch import prim_requires_devices_during_lowering as _told_the_mesh
except ImportError:
    _told_the_mesh = set()
_check_vma: Any
try:
    from jax._src.config import _check_vma
except ImportError:
    _check_vma = nullcontext

HEAD_AXES = ("model", "tensor", "tp")
"""Names of axes of a mesh that split heads; any other axis splits the batch. Asked only by a kernel
that XLA cannot partition by itself."""

attention_p = Primitive("vit_attention")
tangent_p = Primitive("vit_attention_tangent")
gradients_p = Primitive("vit_attention_gradients")
gradients_p.multiple_results = True


def _eager(*operands, implementation, precision):
    query, key, value, *bias = operands
    return eager(query, key, value, (*bias, None)[0], precision=precision)[0]


def _eager_tangent(*operands, implementation, precision):
    half = len(operands) // 2
    run = partial(_eager, implementation=implementation, precision=precision)
    return jax.jvp(run, operands[:half], operands[half:])[1]


def _eager_gradients(*operands, implementation, precision):
    run = partial(_eager, implementation=implementation, precision=precision)
    return list(jax.vjp(run, *operands[:-1])[1](operands[-1]))


def _cudnn_gradients(*operands, precision):
    return list(jax.vjp(attention_cudnn, *operands[:-1])[1](operands[-1]))


def _cpu(query, key, value, *bias, precision):
    from vit_flax.attention.cpu import attention_cpu

    return attention_cpu(query, key, value, bias=(*bias, None)[0], precision=precision)


def _merge(array):
    """(B, S, A, D/A) -> (B, S, D)."""
    B, S, A, width = array.shape
    return array.reshape(B, S, A * width)


def _pallas(query, key, value, *bias, precision, interpret):
    from vit_flax.attention import tpu as attention_tpu

    context = attention_tpu.attention(
        *map(_merge, (query, key, value)),
        *_squares(query, bias),
        heads=query.shape[2],
        precision=kernel_precision(precision),
        interpret=interpret,
    )
    return context.reshape(query.shape)


def _squares(query, bias):
    """The bias as (A, S, S) in float32, if there is one."""
    _, S, A, _ = query.shape
    return [jnp.broadcast_to(b[0], (A, S, S)).astype(jnp.float32) for b in bias] or [None]


def _unsquare(square, bias):
    """The gradient of a bias (1, A or 1, S or 1, S or 1), from that of its square."""
    axes = tuple(i for i in range(3) if bias.shape[i + 1] < square.shape[i])
    return square.sum(axes, keepdims=True)[None].astype(bias.dtype)


def _pallas_gradients(query, key, value, *rest, precision, interpret):
    from vit_flax.attention import tpu as attention_tpu

    *bias, cotangent = rest
    found = attention_tpu.gradients(
        _merge(query),
        _merge(key),
        _merge(value),
        _squares(query, bias)[0],
        _merge(cotangent),
        heads=query.shape[2],
        precision=kernel_precision(precision),
        interpret=interpret,
    )
    gradients = [each.reshape(query.shape) for each in found[:3]]
    # Not by `jax.vjp` of `_squares`: inside a `shard_map` the kernel's result lacks its axes.
    return [*gradients, *(_unsquare(square, b) for square, b in zip(found[3:], bias, strict=True))]


def _lower(plain, kernels, platform):
    """The lowering of an operation for a platform: the kernel that `choose` names."""

    def rule(ctx, *operands, implementation, precision):
        query = ctx.avals_in[0]
        biased = len(ctx.avals_in) > (3 if plain is _eager else 4)
        bias = ctx.avals_in[3].shape if biased else None
        name = choose(
            implementation,
            platform,
            query.shape,
            query.dtype,
            bias=bias,
            precision=precision,
            gradient=plain is not _eager,
            cudnn=cudnn_missing() if platform == "cuda" else None,
        ).name
        run = partial(plain, implementation=implementation, precision=precision)
        if name != "eager":
            options = {"interpret": platform != "tpu"} if name == "pallas" else {}
            kernel = partial(kernels[name], precision=precision, **options)
            inside = isinstance(ctx.module_context.axis_context, mlir.SPMDAxisContext)
            if name == "cudnn" and not inside:
                run = kernel  # JAX splits it by itself, as its operands are
            else:
                run = _on_every_device(ctx, kernel, query.shape, bias, plain is _eager) or run
        return mlir.lower_fun(run, multiple_results=plain is not _eager)(ctx, *operands)

    return rule


def _on_every_device(ctx, kernel, shape, bias, forward):
    """The kernel on each device's own images and heads; None where it cannot be told which those
    are. XLA cannot split a kernel, and neither can JAX's custom_partitioning for TPUs; of the one
    for CPUs it gathers the heads first."""
    where = ctx.module_context.axis_context
    if isinstance(where, mlir.SPMDAxisContext):
        # Inside a `shard_map`; axes that it left to the compiler are split by one of our own.
        manual = where.manual_axes
        mesh = where.mesh.abstract_mesh.update_axis_types(dict.fromkeys(manual, AxisType.Manual))
    else:
        if getattr(where, "num_devices", 1) == 1:
            return kernel
        manual = frozenset()
        mesh = getattr(where, "abstract_mesh", None) or ctx.avals_in[0].sharding.mesh
    if mesh.empty:
        return None
    left = {name: size for name, size in mesh.shape.items() if name not in manual}
    if not left:
        return _unchecked(kernel)
    # What an array is split over is in its type where axes are explicit, and ours to say elsewhere.
    explicit = {name for name in left if name in mesh.explicit_axes}
    types = [_axes(aval.sharding.spec, explicit) for aval in ctx.avals_in]
    B, _, A, _ = shape
    images: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    for name, size in left.items():
        of_heads = name in types[0][2] if name in explicit else name in HEAD_AXES
        of_images = name in types[0][0] if name in explicit else not of_heads
        if of_heads and A % size == 0:
            heads, A = (*heads, name), A // size
        elif of_images and B % size == 0:
            images, B = (*images, name), B // size
    split = PartitionSpec(images or None, None, heads or None, None)
    operands = [split] * 3
    shared: tuple[str, ...] = ()  # axes whose devices have the same bias
    if bias is not None:
        sizes = (1,) * (4 - len(bias)) + bias  # (B or 1, A or 1, S or 1, S or 1)
        own = (images if sizes[0] > 1 else (), heads if sizes[1] > 1 else ())
        shared = tuple(name for name in images + heads if name not in own[0] + own[1])
        parts = (own[0] or None, own[1] or None, None, None)
        operands.append(PartitionSpec(*parts[4 - len(bias) :]))
    specs = operands if forward else [*operands, split]
    if explicit and types != [_axes(spec, explicit) for spec in specs]:
        return None

    def run(*local):
        found = kernel(*local)
        if not forward and shared:
            found = [*found[:3], jax.lax.psum(found[3], shared)]
        return found if forward else list(found)

    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=split if forward else operands,
        axis_names=set(left),
        check_vma=False,
    )

    def run_mapped(*whole):
        with jax.sharding.use_abstract_mesh(mesh):
            return mapped(*whole)

    return run_mapped


def _axes(spec, names):
    """Which of the names each axis of an array is split over."""
    every = [(axes,) if isinstance(axes, str) else axes or () for axes in spec]
    return [tuple(name for name in axes if name in names) for axes in every]


def _unchecked(kernel):
    """Without `shard_map`'s account of what varies over which axis: it was done when the operation
    was traced, and a kernel keeps none."""

    def run(*local):
        with _check_vma(False):
            return kernel(*local)

    return run


_KERNELS = {"cpu": _cpu, "cudnn": attention_cudnn, "pallas": _pallas}
_GRADIENTS = {"cudnn": _cudnn_gradients, "pallas": _pallas_gradients}

attention_p.def_abstract_eval(lambda query, *_, **__: query)
tangent_p.def_abstract_eval(lambda query, *_, **__: query)
gradients_p.def_abstract_eval(lambda *operands, **_: list(operands[:-1]))


@partial(jax.jit, static_argnames=("p", "implementation", "precision"))
def _compiled(*operands, p, implementation, precision):
    return p.bind(*operands, implementation=implementation, precision=precision)


def _run(p, plain, *operands, **options):
    """The operation on arrays at hand; where nothing is to be compiled, in JAX's operations."""
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        return plain(*operands, **options)
    return _compiled(*operands, p=p, **options)


_PLAIN = {attention_p: _eager, tangent_p: _eager_tangent, gradients_p: _eager_gradients}
for _p, _plain in _PLAIN.items():
    _p.def_impl(partial(_run, _p, _plain))

_told_the_mesh.update((attention_p, gradients_p))

for _platform in PLATFORMS:
    mlir.register_lowering(attention_p, _lower(_eager, _KERNELS, _platform), platform=_platform)
    mlir.register_lowering(
        gradients_p, _lower(_eager_gradients, _GRADIENTS, _platform), platform=_platform
    )
mlir.register_lowering(attention_p, mlir.lower_fun(_eager, multiple_results=False))
mlir.register_lowering(gradients_p, mlir.lower_fun(_eager_gradients, multiple_results=True))
mlir.register_lowering(tangent_p, mlir.lower_fun(_eager_tangent, multiple_results=False))


def _tangent(operands, tangents, **options):
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    return attention_p.bind(*operands, **options), tangent_p.bind(*operands, *tangents, **options)


def _transpose(cotangent, *operands, **options):
    half = len(operands) // 2
    if type(cotangent) is ad.Zero:
        return [None] * len(operands)
    found = gradients_p.bind(*operands[:half], cotangent, **options)
    wanted = map(ad.is_undefined_primal, operands[half:])
    return [None] * half + [g if w else None for g, w in zip(found, wanted, strict=True)]


ad.primitive_jvps[attention_p] = _tangent
ad.primitive_transposes[tangent_p] = _transpose


def _second(plain):
    """Derivatives of derivatives: of the operations themselves."""

    def rule(operands, tangents, **options):
        tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
        return jax.jvp(partial(plain, **options), operands, tuple(tangents))

    return rule


ad.primitive_jvps[tangent_p] = _second(_eager_tangent)
ad.primitive_jvps[gradients_p] = _second(_eager_gradients)


def _batched(p, plain):
    """Images of a further axis are further images; a bias of a further axis leaves the kernels."""

    def rule(operands, axes, **options):
        size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
        half = len(operands) // (2 if p is tangent_p else 1)
        squares = {
            i
            for i in range(len(operands))
            if i % half == 3 and (p is not gradients_p or i != half - 1)
        }
        if squares:
            run = jax.vmap(partial(plain, **options), in_axes=axes, out_axes=0)
            found = run(*operands)
            return found, [0] * len(found) if p.multiple_results else 0
        moved = [
            jnp.broadcast_to(x, (size, *x.shape)) if a is None else jnp.moveaxis(x, a, 0)
            for x, a in zip(operands, axes, strict=True)
        ]
        found = p.bind(*(x.reshape(-1, *x.shape[2:]) for x in moved), **options)
        if p.multiple_results:
            return [x.reshape(size, -1, *x.shape[1:]) for x in found], [0] * len(found)
        return found.reshape(size, -1, *found.shape[1:]), 0

    return rule


batching.primitive_batchers[attention_p] = _batched(attention_p, _eager)
batching.primitive_batchers[tangent_p] = _batched(tangent_p, _eager_tangent)
batching.primitive_batchers[gradients_p] = _batched(gradients_p, _eager_gradients)


def alike(*operands: jax.Array) -> list[jax.Array]:
    """The operands, varying over the same axes where a `shard_map` keeps account of that."""
    axes = [_varying(x) for x in operands]
    every = frozenset().union(*axes)
    return [
        x if own == every else jax.lax.pcast(x, tuple(every - own), to="varying")
        for x, own in zip(operands, axes, strict=True)
    ]


def _varying(x) -> frozenset:
    """Axes of the `shard_map` around that an array varies over."""
    kind = jax.typeof(x)
    # JAX has renamed this; with neither name it fails, since gradients would silently be wrong.
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma
