"""`attention`: one signature for every kernel.

B batch, S tokens, A heads, D/A width of a head.

"eager" is written in JAX operations and does everything. Of the others, `choose` says which takes
what; it is asked when a program is lowered, with the platform the program is made for, so that a
program compiled or exported for another machine gets that machine's kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, PartitionSpec

from vit_common.errors import InputError

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

IMPLEMENTATIONS = ("auto", "eager", "cpu", "cudnn", "pallas")
"""Kernels by name; "auto" is the one made for the platform, if it takes what it is given."""

CUDNN_HEAD = 128
"""Widest head that cuDNN's attention is used for."""
HEAD_AXES = ("model", "tensor", "tp")
"""Names of axes of a mesh that split heads; any other axis splits the batch. Asked only by a kernel
that XLA cannot partition by itself."""


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
        jax.eval_shape(_cudnn, some, some, some)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error).strip().splitlines()[0].rstrip(".")
    return None


def _pallas_refuses(shape, dtype, bias, precision) -> str | None:
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 and float32, not {dtype}"
    if dtype == jnp.float32 and _kernel_precision(precision) is False:
        return f"multiplies at the default precision or the highest, not at {precision}"
    if bias is not None:
        if len(bias) != 4 or bias[0] != 1:
            return f"takes one bias for all images, not one of shape {bias}"
        from vit_flax.attention.tpu import takes_bias

        _, S, A, width = shape
        if not takes_bias(S, width, A, dtype.itemsize):
            return f"takes a bias where all scores of a head fit in VMEM, not with {S} tokens"
    return None


def _kernel_precision(precision: Any) -> Any:
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


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    head_mask: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
    output_attentions: bool = False,
    implementation: str = "auto",
    precision: jax.lax.PrecisionLike = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1).

    Args:
        query, key, value: (B, S, A, D/A).
        bias: added to the scores; broadcasts against (B, A, S, S).
        head_mask: multiplies the probabilities; broadcasts against (B, A, S, S).
        dropout: applied to the probabilities, element by element; None where none is active.
        output_attentions: whether to return the probabilities. With a kernel that has none they
            are computed beside it, and those that nobody looks at are not computed at all: of the
            maps of all blocks a program may use one, and the other blocks cost nothing.
        implementation: one of `IMPLEMENTATIONS`; what it does not take falls back, see `choose`.
        precision: of both matrix products.

    Returns:
        The context (B, S, A, D/A), and the probabilities (B, A, S, S) after dropout and head mask
        if asked for, else None.
    """
    check_implementation(implementation)
    alike = all((x.shape, x.dtype) == (query.shape, query.dtype) for x in (key, value))
    plain = implementation == "eager" or head_mask is not None or dropout is not None
    if plain or not alike or 0 in query.shape:  # of nothing, kernels cannot be made
        context, probabilities = eager(query, key, value, bias, head_mask, dropout, precision)
        return context, probabilities if output_attentions else None
    if precision is None:  # what is set now, not what will be when the program is lowered
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if isinstance(precision, list):  # as flax takes it; what an operation is bound with is hashed
        precision = tuple(precision)
    operands = _alike(query, key, value, *(() if bias is None else (bias,)))
    context = attention_p.bind(*operands, implementation=implementation, precision=precision)
    if not output_attentions:
        return context, None
    return context, _probabilities(query, key, bias, precision)


def eager(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    head_mask: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[jax.Array, jax.Array]:
    """`attention` in JAX operations: the context, and the probabilities."""
    probabilities = _probabilities(query, key, bias, precision)
    if dropout is not None:
        probabilities = dropout(probabilities)
    if head_mask is not None:
        probabilities = probabilities * head_mask.astype(probabilities.dtype)
    context = jnp.einsum("baqk,bkad->bqad", probabilities, value, precision=precision)
    return context, probabilities


def _probabilities(query, key, bias, precision):
    # The query is scaled, not the scores: the same number, S / (D/A) times fewer products, and
    # float16 scores do not overflow.
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    scores = jnp.einsum("bqad,bkad->baqk", query, key, precision=precision)  # (B, A, S, S)
    statistics = jnp.promote_types(scores.dtype, jnp.float32)
    scores = scores.astype(statistics)
    if bias is not None:
        scores = scores + bias.astype(statistics)
    return jax.nn.softmax(scores, axis=-1).astype(query.dtype)


# -- the kernels behind one operation
#
# An operation of its own, and not a branch for each platform: only the kernel that is needed is
# ever imported and traced, and derivatives of both modes and any order work on every platform.
#
# `attention_p` takes query, key, value and perhaps a bias; `gradients_p` those and the context's
# cotangent, and gives a gradient for each; `tangent_p`, linear in the tangents that follow the
# operands, is what differentiation forward writes down, and its transpose is `gradients_p`.

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


def _cudnn(*operands, precision=None):
    return jax.nn.dot_product_attention(*operands, implementation="cudnn")


def _cudnn_gradients(*operands, precision):
    return list(jax.vjp(_cudnn, *operands[:-1])[1](operands[-1]))


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
        precision=_kernel_precision(precision),
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
        precision=_kernel_precision(precision),
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


_KERNELS = {"cpu": _cpu, "cudnn": _cudnn, "pallas": _pallas}
_GRADIENTS = {"cudnn": _cudnn_gradients, "pallas": _pallas_gradients}

attention_p.def_abstract_eval(lambda query, *_, **__: query)
tangent_p.def_abstract_eval(lambda query, *_, **__: query)
gradients_p.def_abstract_eval(lambda *operands, **_: list(operands[:-1]))


@partial(jax.jit, static_argnames=("p", "implementation", "precision"))
def _run(*operands, p, implementation, precision):
    return p.bind(*operands, implementation=implementation, precision=precision)


for _p in (attention_p, tangent_p, gradients_p):
    _p.def_impl(partial(_run, p=_p))

_told_the_mesh.update((attention_p, gradients_p))

for _platform in ("cpu", "cuda", "rocm", "tpu"):
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


def _alike(*operands):
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
