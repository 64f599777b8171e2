"""Half precision on a CPU: which operands reach the products, and what is lost to float64."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from networks import flax_tree, images, make_config, random_weights, torch_reference

import vit_flax
from vit_common.errors import InputError
from vit_flax.attention import attention, compiled_for, eager
from vit_flax.attention.cpu import attention_cpu_inline
from vit_flax.cpu import choose_half_products, half, half_products
from vit_flax.cpu.flags import processor_flags
from vit_flax.inference import ImageClassifier
from vit_flax.int8 import Dense
from vit_flax.layers import Convolution

UNITS = [frozenset({"avx512f", "amx_bf16"}), frozenset({"avx512f", "avx512_bf16"})]


def operands(text: str) -> set[tuple[str, str, str]]:
    """Dtypes of the operands and the result of each product of a lowered program."""
    pattern = r"dot_general .*: \(tensor<\S*?(\w+)>, tensor<\S*?(\w+)>\) -> tensor<\S*?(\w+)>"
    return {tuple(re.sub(r"^(\d+x)*", "", t) for t in m) for m in re.findall(pattern, text)}


def network(name: str = "plain", dtype=jnp.bfloat16, **options):
    config = make_config(name, num_hidden_layers=1)
    cls = vit_flax.FlaxViTForImageClassification
    return cls(config, dtype=dtype, **options), jnp.asarray(images(config, 2))


@pytest.mark.parametrize(("kind", "short"), [("bfloat16", "bf16"), ("float32", "f32")])
def test_operands_of_products(kind, short):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((64, 96)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((96, 32)), jnp.bfloat16)
    with half_products(kind):
        run = lambda k, x: Dense(32, use_bias=False, dtype=jnp.bfloat16).apply(  # noqa: E731
            {"params": {"kernel": k}}, x
        )
        compiled = jax.jit(run).lower(kernel, x).compile()
    text = compiled.as_text()
    operands = re.search(r"= f32\[64,32\]\S* dot\(%(\S+), %(\S+)\)", text)
    assert operands
    for name in operands.groups():
        assert re.search(rf"%{re.escape(name)} = {short}\[", text)
    wanted = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    error = np.abs(np.asarray(compiled(kernel, x), np.float64) - wanted)
    assert np.all(error <= np.abs(wanted) * 2.0**-8 + 1e-4)  # one rounding to bfloat16


def test_choice_by_what_the_processor_reports(monkeypatch):
    for have, kind in (({"avx512f"}, "float32"), ({"amx_bf16"}, "bfloat16"), (set(), "float32")):
        monkeypatch.setattr(half, "processor_flags", lambda have=have: frozenset(have))
        assert choose_half_products().kind == kind
    with pytest.raises(InputError, match="'bfloat16' or 'float32'"), half_products("int4"):
        pass


# -- whole networks, of a processor that is here by its report alone


@pytest.mark.parametrize("flags", [UNITS[0], pytest.param(UNITS[1], marks=pytest.mark.slow)])
def test_every_product_of_a_network_and_of_its_gradient(monkeypatch, flags):
    monkeypatch.setattr(half, "processor_flags", lambda: flags)
    model, x = network()
    labels = jnp.array([0, 1])

    def loss(params):
        return model(x, params=params, labels=labels).loss

    forward = jax.jit(lambda p: model(x, params=p).logits).lower(model.params)
    wanted = {("bf16", "bf16", "f32")}
    assert operands(forward.as_text()) == wanted  # attention's two and the patches' among them
    step = jax.jit(jax.grad(loss)).lower(model.params)
    assert operands(step.as_text()) == wanted
    compiled = step.compile()
    assert "__ynn_fusion" in compiled.as_text()
    with half_products("float32"):
        exact = jax.jit(jax.grad(lambda p: loss(p)))(model.params)
    for ours, theirs in zip(*map(jax.tree.leaves, (compiled(model.params), exact)), strict=True):
        assert jnp.linalg.norm(ours - theirs) <= 0.05 * jnp.linalg.norm(theirs) + 1e-5


def test_relative_positions_and_every_way_to_attend(monkeypatch):
    """BEiT's bias is added in float32, and kernels other than the CPU's own multiply alike."""
    monkeypatch.setattr(half, "processor_flags", lambda: UNITS[0])
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 9, 2, 8)), jnp.bfloat16) for _ in range(3))
    bias = jnp.asarray(rng.normal(size=(1, 2, 9, 9)), jnp.float32)
    exact, _ = eager(*(x.astype(jnp.float32) for x in (q, k, v)), bias)
    for options in ({"inline": True}, {}, {"implementation": "eager"}):
        run = jax.jit(lambda *a, o=options: attention(*a, bias=bias, **o)[0])
        lowered = run.lower(q, k, v)
        assert operands(lowered.as_text()) == {("bf16", "bf16", "f32")}
        found = lowered.compile()(q, k, v)
        np.testing.assert_allclose(np.float32(found), np.float32(exact), atol=0.02)
        gradient = jax.jit(jax.grad(lambda *a, r=run: r(*a).astype(jnp.float32).sum(), (0, 1, 2)))
        assert operands(gradient.lower(q, k, v).as_text()) == {("bf16", "bf16", "f32")}
        gradient(q, k, v)


def test_without_units_the_network_is_that_of_float32(monkeypatch):
    monkeypatch.setattr(half, "processor_flags", lambda: frozenset({"avx2"}))
    for dtype in (jnp.bfloat16, jnp.float16):
        model, x = network(dtype=dtype)
        text = jax.jit(lambda p, m=model, x=x: m(x, params=p).logits).lower(model.params).as_text()
        assert operands(text) == {("f32", "f32", "f32")}
        exact, _ = network(dtype=jnp.float32)
        found, wanted = (m(x, params=model.params).logits for m in (model, exact))
        assert found.dtype == dtype
        # The base network's last state and the logits are rounded, and nothing before them.
        np.testing.assert_allclose(
            np.float32(found), np.float32(wanted), rtol=0, atol=0.02 * np.abs(wanted).max()
        )


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "options",
    [
        {"strides": (2, 2), "padding": "VALID"},  # patches, of which a row and a column are left
        {"strides": (1, 1), "padding": ((1, 1), (1, 1)), "feature_group_count": 4},
        {"strides": (2, 2), "padding": "SAME"},
    ],
)
def test_convolutions(kind, options):
    """Those of stems too: against Flax's own in float32."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 7, 7, 8)), jnp.float32)
    size = (2, 2) if options["padding"] == "VALID" else (3, 3)
    plain = nn.Conv(12, size, **options)
    variables = plain.init(jax.random.key(0), x)
    with half_products(kind):
        found = Convolution(12, size, **options, dtype=jnp.bfloat16).apply(variables, x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, plain.apply(variables, x), rtol=0, atol=0.03)


def test_a_program_for_another_machine_does_not_follow_this_one(monkeypatch):
    model, x = network()
    texts = set()
    for have in (UNITS[0], frozenset()):
        monkeypatch.setattr(half, "processor_flags", lambda have=have: have)
        jax.block_until_ready(model(x).logits)  # traced for this machine, in the model's cache
        with compiled_for("cpu"):
            run = lambda p, x: model(x, params=p).logits  # noqa: E731
            exported = jax.export.export(jax.jit(run), platforms=("cpu",))(model.params, x)
            texts.add(re.sub(r" loc\(.*", "", exported.mlir_module()))
    assert len(texts) == 1
    assert ("bf16", "bf16", "bf16") in operands(texts.pop())  # as every platform has it


def test_attention_written_into_a_program_is_traced_for_that_program():
    """In one process: for this machine and for another, in either order."""
    x = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    for precision, order in ((None, (True, False)), ("highest", (False, True))):
        for here in order:
            with half_products("bfloat16") if here else compiled_for("cpu"):
                text = str(
                    jax.make_jaxpr(
                        lambda x, precision=precision: attention_cpu_inline(
                            x, x, x, precision=precision
                        )
                    )(x)
                )
            assert ("rounded_product" in text) == here


def test_error_is_no_larger_than_that_of_rounding_after_every_operation():
    """Against float64 of Transformers' network in torch; `compiled_for` gives the program that
    every platform had before, in which each operation is of bfloat16."""
    config = make_config()
    weights = random_weights(config, "classifier")
    x = images(config, 8).astype(np.float32)
    cls = transformers.ViTForImageClassification
    with torch.no_grad():
        exact = torch_reference(cls, config, weights, torch.float64)(torch.tensor(x).double())
        exact = exact.logits.numpy()
    tree = flax_tree(weights, jnp.float32)
    model = vit_flax.FlaxViTForImageClassification(config, dtype=jnp.bfloat16, _do_init=False)

    def error() -> float:
        found = np.asarray(model(jnp.asarray(x), params=tree).logits, np.float64)
        return float(np.sqrt(np.mean((found - exact) ** 2)))

    with compiled_for("cpu", "cuda"):
        before = error()
    found = {}
    for kind in ("bfloat16", "float32"):
        with half_products(kind):
            found[kind] = error()
    assert found["float32"] <= found["bfloat16"] <= before
    assert found["float32"] <= 0.5 * before  # 0.40 here; 0.66 with rounding between products


def _derivatives(f, x, y, g):
    """Backward, forward, the second of both, and of several x at once."""
    ones = (jnp.ones_like(x).at[(0,) * x.ndim].set(3), jnp.ones_like(y))
    gradients = jax.grad(lambda x, y: (f(x, y) * g).sum(), (0, 1))
    several = jax.vmap(gradients, (0, None))(jnp.stack([x, -x]), y)
    return gradients(x, y), jax.jvp(f, (x, y), ones), jax.jvp(gradients, (x, y), ones), several


@pytest.mark.parametrize(
    ("left", "right", "dimensions"),
    [
        ((2, 3, 5), (5, 4), (((2,), (0,)), ((), ()))),
        ((2, 3, 6, 5), (2, 5, 3, 4), (((3,), (1,)), ((0, 1), (0, 2)))),
        pytest.param((6, 5), (5, 4), (((1,), (0,)), ((), ())), marks=pytest.mark.slow),
        pytest.param((2, 6, 5), (2, 4, 5), (((2,), (2,)), ((0,), (0,))), marks=pytest.mark.slow),
        pytest.param((2, 5, 3), (5, 2, 4), (((0, 1), (1, 0)), ((), ())), marks=pytest.mark.slow),
    ],
)
def test_derivatives_of_a_product(left, right, dimensions):
    """Against those of JAX's own product; bfloat16 holds all of these numbers and their sums."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.integers(-3, 4, shape), jnp.float32) for shape in (left, right))
    plain = partial(jax.lax.dot_general, dimension_numbers=dimensions)
    g = jnp.asarray(rng.integers(-2, 3, plain(x, y).shape), jnp.float32)
    wanted = jax.jit(partial(_derivatives, plain))(x, y, g)
    run = lambda x, y: half.rounded_product(x, y, dimensions)  # noqa: E731
    found = jax.jit(partial(_derivatives, run))(x, y, g)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


# -- what holds the parameters, and what says so


def test_parameters_are_converted_once(monkeypatch):
    """Files of bfloat16 on a processor without units, and of float32 on one with them."""
    for have, held, kernel in (
        (frozenset(), jnp.bfloat16, jnp.float32),
        (UNITS[0], jnp.float32, jnp.bfloat16),
    ):
        monkeypatch.setattr(half, "processor_flags", lambda have=have: have)
        model, _ = network()
        model.params = jax.tree.map(lambda x, t=held: x.astype(t), model.params)
        params = ImageClassifier(model).engine.params["vit"]["encoder"]["layer"]["0"]
        assert params["intermediate"]["dense"]["kernel"].dtype == kernel
        assert params["layernorm_before"]["scale"].dtype == jnp.float32
        model.param_dtype = jnp.bfloat16  # asked for
        held = ImageClassifier(model).engine.params
        assert held is model.network_params or held == model.network_params


@pytest.mark.slow
def test_no_flag_is_set_at_import():
    code = (
        "import os; before = dict(os.environ)\n"
        "import vit_flax.inference, vit_flax.cpu, vit_flax.int8\n"
        "assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_info_says_which_and_why(monkeypatch, capsys):
    from vit_cli.main import main

    for have, words in (
        (UNITS[1], "products of bfloat16: this processor reports avx512_bf16"),
        (frozenset(), "products of float32: this processor reports none of amx_bf16, avx512_bf16"),
    ):
        monkeypatch.setattr(half, "processor_flags", lambda have=have: have)
        assert main(["info"]) == 0
        assert words in capsys.readouterr().out


def test_flags_are_those_of_linux():
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    assert processor_flags() == frozenset(found[1].split() if found else ())
