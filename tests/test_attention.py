"""`vit_flax.attention`: every kernel against PyTorch's, on its own and under JAX's transformations,
and who is chosen why. The TPU's kernels run interpreted here; tests/test_tpu_check.py compiles
them."""

import os
import re
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vit_common.errors import InputError
from vit_flax import attention as module
from vit_flax.attention import Choice, attention, choose, primitive
from vit_flax.attention import cpu as attention_cpu
from vit_flax.attention import tpu as attention_tpu

# Largest differences seen: context and gradients of inputs 9.6e-7, of a bias 2.2e-6 (a sum over
# the images); bfloat16 against PyTorch's float32 of the same inputs 0.008 and 0.02.
FLOAT32, BIAS, BFLOAT16, BFLOAT16_GRADIENT = 5e-6, 1e-5, 0.03, 0.08

SIZES = [
    # B, S, A, D/A
    (2, 1, 2, 32),
    (3, 17, 3, 64),  # the last 128 columns are half empty
    (1, 197, 2, 64),
    (2, 50, 2, 80),
    (1, 257, 1, 80),
]


def operands(B, S, A, width, count=4, seed=0, dtype=jnp.float32):
    draw = np.random.default_rng(seed)
    return [jnp.asarray(draw.standard_normal((B, S, A, width)), dtype) for _ in range(count)]


def square(S, A, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((1, A, S, S)), jnp.float32)


def reference(query, key, value, cotangent, bias=None):
    """PyTorch's context and gradients of query, key, value and bias, in float32."""
    tensors = [
        torch.tensor(np.asarray(x, np.float32)).transpose(1, 2).requires_grad_()
        for x in (query, key, value)
    ]
    mask = None if bias is None else torch.tensor(np.asarray(bias)).requires_grad_()
    context = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask)
    context = context.transpose(1, 2)
    context.backward(torch.tensor(np.asarray(cotangent, np.float32)))
    gradients = [x.grad.transpose(1, 2).numpy() for x in tensors]
    return context.detach().numpy(), gradients + ([] if mask is None else [mask.grad.numpy()])


def ours(query, key, value, cotangent, bias=None, **options):
    options = {"implementation": "pallas", "precision": "highest", **options}

    def run(*given):
        context, none = attention(*given[:3], bias=(*given[3:], None)[0], **options)
        assert none is None
        return context

    given = (query, key, value, *(() if bias is None else (bias,)))
    context, pullback = jax.jit(lambda *given: jax.vjp(run, *given))(*given)
    return context, pullback(cotangent)


def compare(found, wanted, forward=FLOAT32, backward=FLOAT32):
    (context, gradients), (their_context, their_gradients) = found, wanted
    np.testing.assert_allclose(np.float32(context), their_context, rtol=0, atol=forward)
    for ours_, theirs in zip(gradients, their_gradients, strict=True):
        bound = BIAS if theirs.ndim == 4 and theirs.shape[2] == theirs.shape[3] else backward
        np.testing.assert_allclose(np.float32(ours_), theirs, rtol=0, atol=max(backward, bound))


@pytest.mark.parametrize(
    ("size", "biased"),
    [
        *((size, False) for size in SIZES),
        (SIZES[1], True),
        *(pytest.param(size, True, marks=pytest.mark.slow) for size in SIZES[2:]),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_kernel_of_whole_images_against_torch(size, biased):
    inputs = operands(*size)
    bias = square(size[1], size[2]) if biased else None
    compare(ours(*inputs, bias), reference(*inputs, bias))


FEW_SCORES = 2 * 50 * 50


@pytest.mark.parametrize(
    ("size", "most"),
    [
        *((size, None) for size in (*SIZES, (3, 50, 4, 16))),
        *((size, FEW_SCORES) for size in (*SIZES[2:4], (3, 50, 4, 16))),
        # One group of heads, as without the limit.
        *(
            pytest.param(size, FEW_SCORES, marks=pytest.mark.slow)
            for size in (*SIZES[:2], SIZES[4])
        ),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_kernel_for_processors_against_torch(size, biased, most, monkeypatch):
    if most:
        monkeypatch.setattr(attention_cpu, "_MOST_SCORES", most)
    query, key, value, cotangent = operands(*size)
    bias = square(size[1], size[2]) if biased else None
    found = ours(query, key, value, cotangent, bias, implementation="cpu")
    compare(found, reference(query, key, value, cotangent, bias))


def test_kernel_for_processors_with_large_scores():
    """The exponentials of scores near a thousand do not overflow."""
    query, key, value, cotangent = operands(2, 17, 2, 32)
    found = ours(query * 40, key * 40, value, cotangent, implementation="cpu")[0]
    wanted = reference(query * 40, key * 40, value, cotangent)[0]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=20 * FLOAT32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_kernel_for_processors_in_half_precision(dtype):
    exact = operands(2, 197, 2, 64)
    given = [x.astype(dtype) for x in exact]
    found = ours(*given, implementation="cpu")[0]
    assert found.dtype == dtype
    rounded = [np.float32(x) for x in given]
    wanted = reference(*rounded)[0]
    as_torch = {jnp.bfloat16: torch.bfloat16, jnp.float16: torch.float16}[dtype]
    tensors = [torch.tensor(x).transpose(1, 2).to(as_torch) for x in rounded[:3]]
    theirs = torch.nn.functional.scaled_dot_product_attention(*tensors).transpose(1, 2)
    limit = np.abs(theirs.float().numpy() - wanted).max()
    assert np.abs(np.float32(found) - wanted).max() <= 1.5 * limit


def test_kernel_of_whole_images_in_bfloat16():
    inputs = operands(2, 50, 2, 64, dtype=jnp.bfloat16)
    found, wanted = ours(*inputs), reference(*inputs)
    assert found[0].dtype == found[1][0].dtype == jnp.bfloat16
    compare(found, wanted, BFLOAT16, BFLOAT16_GRADIENT)


def long_ones(monkeypatch, tile=128):
    """No image fits in the VMEM, so that the tiled kernels run at sizes a test can afford."""
    monkeypatch.setattr(attention_tpu, "VMEM_BYTES", 0)
    monkeypatch.setattr(attention_tpu, "TILE", tile)


@pytest.mark.parametrize(
    ("size", "tile"),
    [
        pytest.param((1, 17, 2, 32), 128, marks=pytest.mark.slow),  # less than a tile
        pytest.param((1, 256, 3, 64), 128, marks=pytest.mark.slow),  # no rest, half a group
        ((2, 257, 2, 64), 128),  # a rest of one token
        pytest.param((1, 300, 1, 80), 256, marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_tiled_kernel_against_torch(size, tile, monkeypatch):
    long_ones(monkeypatch, tile)
    inputs = operands(*size)
    compare(ours(*inputs), reference(*inputs))


@pytest.mark.slow
def test_tiled_kernel_in_bfloat16(monkeypatch):
    long_ones(monkeypatch)
    inputs = operands(1, 200, 2, 64, dtype=jnp.bfloat16)
    compare(ours(*inputs), reference(*inputs), BFLOAT16, BFLOAT16_GRADIENT)


@pytest.mark.parametrize(
    "tokens",
    [pytest.param(1025, marks=pytest.mark.slow), pytest.param(4097, marks=pytest.mark.slow)],
)
def test_large_images_are_tiled(tokens):
    assert attention_tpu.whole_blocks((1, tokens, 64), 64, 4, operands=4, scores=4, bias=0) is None
    inputs = operands(1, tokens, 1, 64)
    compare(ours(*inputs), reference(*inputs))


@pytest.mark.parametrize("kernel", ["whole", "tiled"])
def test_large_scores(kernel, monkeypatch):
    """Scores of some thousands: exponentials of them are not numbers."""
    if kernel == "tiled":
        long_ones(monkeypatch)
    query, key, value, cotangent = operands(1, 150, 1, 64)
    inputs = (query * 100, key * 10, value, cotangent)
    context, gradients = ours(*inputs)
    # One key takes nearly all: float32 knows scores of 10^4 to 10^-3.
    np.testing.assert_allclose(context, reference(*inputs)[0], rtol=0, atol=5e-3)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


# -- JAX's transformations, by the operation that stands for all kernels


def both(*inputs, bias=None, implementation="pallas"):
    return attention(*inputs, bias=bias, implementation=implementation, precision="highest")[0]


def test_vmap():
    inputs = [
        jnp.stack(pair)
        for pair in zip(operands(2, 9, 2, 32), operands(2, 9, 2, 32, seed=2), strict=True)
    ]
    query, key, value, cotangent = inputs

    def gradient(q, k, v, c):
        return jax.vjp(both, q, k, v)[1](c)

    def one_by_one(f, *arrays):
        return jax.tree.map(lambda *x: np.stack(x), *(f(*(a[i] for a in arrays)) for i in range(2)))

    got = jax.vmap(both)(query, key, value)
    np.testing.assert_allclose(got, one_by_one(both, query, key, value), atol=FLOAT32)
    got = jax.vmap(gradient)(query, key, value, cotangent)
    for g, w in zip(got, one_by_one(gradient, *inputs), strict=True):
        np.testing.assert_allclose(g, w, atol=FLOAT32)
    shared = jax.vmap(both, in_axes=(1, None, None), out_axes=1)(
        query.swapaxes(0, 1), key[0], value[0]
    )
    want = [reference(q, key[0], value[0], cotangent[0])[0] for q in query]
    np.testing.assert_allclose(shared, np.stack(want, axis=1), atol=FLOAT32)


def test_vmap_over_biases():
    query, key, value, _ = operands(2, 9, 2, 32)
    biases = jnp.stack([square(9, 2), square(9, 2, seed=3)])
    got = jax.vmap(lambda b: both(query, key, value, bias=b))(biases)
    want = [reference(query, key, value, value, b)[0] for b in biases]
    np.testing.assert_allclose(got, np.stack(want), atol=FLOAT32)


@pytest.mark.parametrize("implementation", [pytest.param("auto", marks=pytest.mark.slow), "pallas"])
def test_forward_mode_and_second_derivatives(implementation):
    query, key, value, direction = operands(1, 5, 1, 8)

    def plain(q):
        return both(q, key, value, implementation="eager")

    def kernel(q):
        return both(q, key, value, implementation=implementation)

    def twice(f):
        loss = lambda q: jnp.sum(jnp.sin(f(q)))  # noqa: E731
        return jax.jvp(jax.grad(loss), (query,), (direction,))[1]

    got, want = (jax.jvp(f, (query,), (direction,))[1] for f in (kernel, plain))
    np.testing.assert_allclose(got, want, atol=FLOAT32)
    np.testing.assert_allclose(twice(kernel), twice(plain), atol=FLOAT32)


def test_rematerialisation():
    inputs = operands(1, 9, 2, 32)
    loss = lambda q, k, v: jnp.sum(both(q, k, v) * inputs[3])  # noqa: E731
    found = jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2)))(*inputs[:3])
    for ours_, theirs in zip(found, reference(*inputs)[1], strict=True):
        np.testing.assert_allclose(ours_, theirs, atol=FLOAT32)


def test_probabilities_beside_a_kernel():
    query, key, value, _ = operands(2, 17, 2, 64)
    bias = square(17, 2)
    options = {"bias": bias, "output_attentions": True, "precision": "highest"}
    context, probabilities = attention(query, key, value, implementation="pallas", **options)
    want = attention(query, key, value, implementation="eager", **options)
    np.testing.assert_allclose(context, want[0], atol=FLOAT32)
    np.testing.assert_array_equal(probabilities, want[1])


def test_maps_nobody_looks_at_are_not_computed():
    """Of three blocks' maps one is returned: one S x S matrix for each image and head is left."""

    def run(x):
        maps = []
        for _ in range(3):
            x, probabilities = attention(
                x, x, x, output_attentions=True, implementation="pallas", precision="highest"
            )
            maps.append(probabilities)
        return x, maps[1]

    shape = jax.ShapeDtypeStruct((5, 23, 3, 8), jnp.float32)
    text = jax.jit(run).lower(shape).compile().as_text()
    # Whole batches of scores, (5, 3, 23, 23), come from the wanted map alone; the kernel's are one
    # head's.
    products = [line for line in text.splitlines() if " dot(" in line and "f32[5,3,23,23]" in line]
    assert len(products) == 1


SPLIT = """
import jax, jax.numpy as jnp, numpy as np
from vit_flax.attention import attention

assert jax.device_count() == 4
Mesh, Sharding, P = jax.sharding.Mesh, jax.sharding.NamedSharding, jax.sharding.PartitionSpec
draw = np.random.default_rng(0)
q, k, v, c = (jnp.asarray(draw.standard_normal((4, 9, 2, 32)), jnp.float32) for _ in range(4))
bias = jnp.asarray(draw.standard_normal((1, 2, 9, 9)), jnp.float32)

def run(kernel, biased):
    def f(q, k, v, c, bias):
        g = lambda *a: attention(*a[:3], bias=a[3] if biased else None, implementation=kernel,
                                 precision="highest")[0]
        context, pullback = jax.vjp(g, q, k, v, bias)
        return context, pullback(c)
    return f

def collectives(compiled):
    text = compiled.as_text()
    assert ("/vit_attention" in text) == (kernel == "pallas")  # its name, in those of operations
    kinds = "all-gather", "all-to-all", "collective-permute", "all-reduce"
    return [kind for kind in kinds if f" {kind}(" in text or f" {kind}-start(" in text]

def differ(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)

for biased in (False, True):
    want = run("eager", biased)(q, k, v, c, bias)
    summed = ["all-reduce"] if biased else []
    for shape, names in (((4,), ("data",)), ((2, 2), ("data", "model"))):
        mesh = Mesh(np.array(jax.devices()).reshape(shape), names)
        rows = Sharding(mesh, P("data", None, *names[1:]))
        heads = Sharding(mesh, P(None, *names[1:]))
        options = {"in_shardings": (rows,) * 4 + (heads,),
                   "out_shardings": (rows, (rows,) * 3 + (heads,))}
        for kernel in ("pallas", "cpu"):
            compiled = jax.jit(run(kernel, biased), **options).lower(q, k, v, c, bias).compile()
            assert collectives(compiled) == summed, (biased, names, kernel)
            differ(jax.jit(run(kernel, biased), **options)(q, k, v, c, bias), want)
            # One bias for all heads: its gradient is of the heads of every device.
            one = Sharding(mesh, P())
            same = {"in_shardings": (rows,) * 4 + (one,),
                    "out_shardings": (rows, (rows,) * 3 + (one,))}
            differ(jax.jit(run(kernel, biased), **same)(q, k, v, c, bias[:, :1]),
                   run("eager", biased)(q, k, v, c, bias[:, :1]))
            if len(names) == 1:
                continue
            for check in (True, False):  # as the engine does: heads are left to the compiler
                def local(*a):
                    context, (*gradients, d_bias) = run(kernel, biased)(*a)
                    return context, (*gradients, d_bias if check else jax.lax.psum(d_bias, "data"))
                mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("data"),) * 4 + (P(),),
                                       out_specs=(P("data"), (P("data"),) * 3 + (P(),)),
                                       axis_names={"data"}, check_vma=check)
                compiled = jax.jit(mapped, **options).lower(q, k, v, c, bias).compile()
                assert collectives(compiled) == summed, (biased, check, kernel)
                differ(jax.jit(mapped, **options)(q, k, v, c, bias), want)
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=explicit)
    rows, heads = Sharding(mesh, P("data", None, "model")), Sharding(mesh, P(None, "model"))
    given = [jax.device_put(x, rows) for x in (q, k, v, c)] + [jax.device_put(bias, heads)]
    for kernel in ("pallas", "cpu"):
        compiled = jax.jit(run(kernel, biased)).lower(*given).compile()
        assert collectives(compiled) == summed, (biased, kernel)
        differ(compiled(*given), want)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = P("data"), P()
    for check in (True, False):
        def local(*a):
            context, (*gradients, d_bias) = run(kernel, biased)(*a)
            # With the account of what varies, JAX sums the gradient of what does not by itself.
            return context, (*gradients, d_bias if check else jax.lax.psum(d_bias, "data"))
        for kernel in ("pallas", "cpu"):
            mapped = jax.shard_map(local, mesh=mesh, in_specs=(rows,) * 4 + (whole,),
                                   out_specs=(rows, (rows,) * 3 + (whole,)), check_vma=check)
            differ(jax.jit(mapped)(q, k, v, c, bias), want)
    one = q[:1]
    mixed = jax.shard_map(lambda q, k, v: attention(q, k, v)[0], mesh=mesh,
                          in_specs=(whole, rows, rows), out_specs=whole)
    try:
        mixed(one, k, v)
    except ValueError as error:
        assert "out_specs" in str(error), error
    else:
        raise AssertionError("a result that varies was taken for one that does not")
from jax._src.cudnn import fused_attention_stablehlo as private
from vit_flax.attention import primitive
private.check_cudnn_version, primitive.cudnn_missing = lambda: 91300, lambda: None
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
mapped = jax.shard_map(lambda q, b: attention(q, q, q, bias=b)[0], mesh=mesh, out_specs=P("data"),
                       in_specs=(P("data"), P()), axis_names={"data"})
half = jax.ShapeDtypeStruct((8, 9, 6, 32), jnp.bfloat16)
b = jax.ShapeDtypeStruct((1, 6, 9, 9), jnp.bfloat16)
text = jax.jit(mapped).trace(half, b).lower(lowering_platforms=("cuda",)).as_text()
(call,) = [line for line in text.splitlines() if "__cudnn$fmha" in line]
assert "tensor<4x9x3x32xbf16>" in call and "tensor<1x3x9x9xbf16>" in call, call
print("done")
"""


@pytest.mark.slow
def test_every_device_computes_its_own_images():
    """Split over the batch, or over batch and heads, nothing is gathered; only the gradient of a
    bias is summed. And inside a `shard_map` of the user's, over all axes or the batch's alone."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4",
    }
    done = subprocess.run(
        [sys.executable, "-c", SPLIT], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


# -- what falls back


def changed(probabilities):
    return probabilities * 0.5


@pytest.mark.parametrize("implementation", ["cpu", "pallas", "cudnn"])
@pytest.mark.parametrize("what", ["head_mask", "dropout"])
def test_what_changes_probabilities_is_never_lost(implementation, what):
    query, key, value, _ = operands(1, 9, 2, 32)
    option = {"head_mask": jnp.full((1, 2, 1, 1), 0.5), "dropout": changed}[what]
    got, _ = attention(
        query, key, value, implementation=implementation, precision="highest", **{what: option}
    )
    want = 0.5 * reference(query, key, value, value)[0]
    np.testing.assert_allclose(got, want, atol=FLOAT32)


@pytest.mark.parametrize("implementation", ["auto", "cpu", "pallas"])
def test_no_images(implementation):
    x = jnp.zeros((0, 9, 2, 16))
    context, probabilities = attention(
        x, x, x, implementation=implementation, output_attentions=True
    )
    assert context.shape == x.shape
    assert probabilities.shape == (0, 2, 9, 9)


def test_precision_of_each_operand():
    """As flax hands it on: of both operands."""
    x = jnp.ones((1, 3, 1, 8))
    context, _ = attention(x, x, x, precision=["highest", "highest"])
    np.testing.assert_allclose(context, x, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["cpu", "pallas", "cudnn"])
def test_float64_stays_float64(implementation):
    with jax.enable_x64(True):
        query, key, value, cotangent = operands(1, 9, 2, 32, dtype=jnp.float64)
        context, gradients = ours(query, key, value, cotangent, implementation=implementation)
        want = attention(query, key, value, implementation="eager")[0]
        assert context.dtype == gradients[0].dtype == jnp.float64
        np.testing.assert_allclose(context, want, rtol=0, atol=1e-14)


SHAPE, BF16 = (8, 197, 12, 64), jnp.bfloat16


@pytest.mark.parametrize(
    ("arguments", "options", "name", "reason"),
    [
        (("auto", "tpu", SHAPE, BF16), {}, "pallas", "the kernel for tpu"),
        (("auto", "tpu", SHAPE, jnp.float32), {"precision": "highest"}, "pallas", "for tpu"),
        (("auto", "tpu", (8, 4097, 16, 80), BF16), {}, "pallas", "for tpu"),
        (
            ("auto", "tpu", SHAPE, jnp.float16),
            {},
            "eager",
            "takes bfloat16 and float32, not float16",
        ),
        (("pallas", "tpu", SHAPE, jnp.float64), {}, "eager", "not float64"),
        (("auto", "tpu", SHAPE, jnp.float32), {"precision": "high"}, "eager", "not at high"),
        (("auto", "tpu", SHAPE, BF16), {"precision": "high"}, "pallas", "for tpu"),
        (("auto", "tpu", SHAPE, BF16), {"bias": (1, 12, 197, 197)}, "pallas", "for tpu"),
        (("auto", "tpu", SHAPE, BF16), {"bias": (8, 12, 197, 197)}, "eager", "one bias for all"),
        (
            ("auto", "tpu", (8, 1025, 12, 64), BF16),
            {"bias": (1, 12, 1025, 1025)},
            "eager",
            "not with 1025 tokens",
        ),
        (("auto", "tpu", SHAPE, BF16), {"head_mask": True}, "eager", "which a head mask changes"),
        (("auto", "tpu", SHAPE, BF16), {"dropout": True}, "eager", "which dropout .* changes"),
        (("eager", "tpu", SHAPE, BF16), {}, "eager", "asked for"),
        (("pallas", "cpu", SHAPE, BF16), {}, "pallas", "interpreted"),
        (("auto", "cpu", SHAPE, BF16), {}, "cpu", "the kernel for cpu"),
        (("cpu", "tpu", SHAPE, jnp.float32), {}, "cpu", "asked for"),
        (("auto", "cpu", SHAPE, BF16), {"gradient": True}, "eager", "no gradient of its own"),
        (("auto", "cpu", SHAPE, BF16), {"dropout": True}, "eager", "which dropout .* changes"),
        (("auto", "rocm", SHAPE, BF16), {}, "eager", "no kernel made for rocm"),
        (("auto", "cuda", SHAPE, BF16), {}, "cudnn", "the kernel for cuda"),
        (("cudnn", "cuda", SHAPE, jnp.float16), {}, "cudnn", "asked for"),
        (("auto", "cuda", SHAPE, jnp.float32), {}, "eager", "bfloat16 and float16, not float32"),
        (("auto", "cuda", (8, 197, 3, 60), BF16), {}, "eager", "multiple of 8 .* these have 60"),
        (("auto", "cuda", (8, 197, 3, 136), BF16), {}, "eager", "at most 128; these have 136"),
        (("auto", "cuda", SHAPE, BF16), {"gradient": True}, "eager", "even numbers .* not for 197"),
        (("auto", "cuda", (8, 198, 12, 64), BF16), {"gradient": True}, "cudnn", "for cuda"),
        (("auto", "cuda", SHAPE, BF16), {"bias": (1, 12, 197, 197)}, "cudnn", "for cuda"),
        (("auto", "cuda", SHAPE, BF16), {"bias": (1, 12, 1, 197)}, "eager", "for every pair"),
        (("cudnn", "tpu", SHAPE, BF16), {}, "eager", "runs on NVIDIA GPUs, not on tpu"),
        (
            ("auto", "cuda", SHAPE, BF16),
            {"cudnn": "none here"},
            "eager",
            "not to be had: none here",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_choice(arguments, options, name, reason):
    found = choose(*arguments, **options)
    assert isinstance(found, Choice)
    assert found.name == name
    assert re.search(reason, found.reason), found.reason


def test_any_number_of_images():
    (batch,) = jax.export.symbolic_shape("b")
    for platform in ("tpu", "cuda"):
        found = choose("auto", platform, (batch, 197, 12, 64), BF16)
        assert found.name == "eager"
        assert "a number of images that is fixed" in found.reason
    assert choose("auto", "cpu", (batch, 197, 12, 64), BF16).name == "cpu"


def test_unknown_kernel():
    with pytest.raises(
        InputError, match=r"one of 'auto', 'eager', 'cpu', 'cudnn', 'pallas'; given 'f"
    ):
        choose("flash", "cpu", SHAPE, BF16)


def test_bias_that_does_not_fit_is_refused(monkeypatch):
    long_ones(monkeypatch)
    x = jnp.zeros((1, 9, 64))
    bias = jnp.zeros((2, 9, 9))
    with pytest.raises(InputError, match="`bias` must be None with 9 tokens"):
        attention_tpu.attention(x, x, x, bias, heads=2, interpret=True)
    with pytest.raises(InputError, match="`bias` must be None with 9 tokens"):
        attention_tpu.gradients(x, x, x, bias, x, heads=2, interpret=True)


# -- the platform is the program's


def lowered(platforms, dtype, gradient=False, tokens=197):
    shape = jax.ShapeDtypeStruct((2, tokens, 2, 64), dtype)

    def run(x):
        return attention(x, x, x)[0]

    function = jax.grad(lambda x: run(x).sum().astype(jnp.float32)) if gradient else run
    return jax.jit(function).trace(shape).lower(lowering_platforms=platforms).as_text()


def test_a_program_gets_the_kernel_of_its_platform():
    assert "tpu_custom_call" in lowered(("tpu",), jnp.bfloat16)
    assert "tpu_custom_call" in lowered(("cpu", "tpu"), jnp.bfloat16)
    for dtype in (jnp.bfloat16, jnp.float32):
        assert "custom_call" not in lowered(("cpu",), dtype)


def test_cudnn_is_traced_where_it_is(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as private

    assert module.cudnn_missing() == "cuDNN is not detected" or jax.default_backend() == "gpu"
    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(primitive, "cudnn_missing", lambda: None)
    assert "__cudnn$fmha" in lowered(("cuda",), jnp.bfloat16)
    for tokens in (197, 198):
        text = lowered(("cuda",), jnp.bfloat16, gradient=True, tokens=tokens)
        assert ("__cudnn$fmhaSoftmaxBackward" in text) == (tokens == 198)
    assert "__cudnn" not in lowered(("cuda",), jnp.float32)
