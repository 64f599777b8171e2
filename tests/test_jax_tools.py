"""JAX's own tools on the networks with their default attention: what debugs, differentiates or
reads a program, against the same network in plain operations outside those tools."""

import jax
import jax.export
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify, jet

import vit_flax
from vit_common.errors import InputError
from vit_flax.attention import compiled_for, needs_no_kernel, targets

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
FAMILIES = {
    "vit": (vit_flax.FlaxViTForImageClassification, vit_flax.ViTConfig, {"intermediate_size": 32}),
    "deit": (
        vit_flax.FlaxDeiTForImageClassificationWithTeacher,
        vit_flax.DeiTConfig,
        {"intermediate_size": 32},
    ),
    "beit": (
        vit_flax.FlaxBeitForImageClassification,
        vit_flax.BeitConfig,
        {"intermediate_size": 32, "use_relative_position_bias": True},
    ),
    "dinov2": (vit_flax.FlaxDinov2ForImageClassification, vit_flax.Dinov2Config, {}),
    "dinov2_with_registers": (
        vit_flax.FlaxDinov2WithRegistersForImageClassification,
        vit_flax.Dinov2WithRegistersConfig,
        {},
    ),
}
IMAGES = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)

QUICK = ("vit", "beit", "dinov2_with_registers")


@pytest.fixture(
    scope="module",
    params=[
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES
    ],
)
def model(request):
    """A model of random weights, large enough that all of the network shows in the logits."""
    cls, config, further = FAMILIES[request.param]
    made = cls(config(**SIZES, **further))
    draw = np.random.default_rng(1)
    made.params = jax.tree.map(lambda p: p + 0.2 * draw.standard_normal(p.shape, "f"), made.params)
    return made


@pytest.fixture(scope="module")
def wanted(model):
    """The logits as one jitted call gives them, in plain operations."""
    plain = type(model)(model.config, attn_implementation="eager", _do_init=False)
    return np.asarray(plain(IMAGES, params=model.params).logits)


def primitives(jaxpr) -> set:
    """All operations of a program, with those of its inner programs."""
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found |= primitives(inner)
    return found


@pytest.mark.slow
def test_without_jit(model, wanted):
    with jax.disable_jit():
        got = model(IMAGES).logits
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


def test_taylor_series(model, wanted):
    """`jet`: the second derivative along a line, against central differences in float64."""
    direction = np.ones_like(IMAGES)
    value, (first, _) = jet.jet(
        lambda x: model(x).logits, (IMAGES,), ((direction, np.zeros_like(IMAGES)),)
    )
    np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-5)
    _, tangent = jax.jvp(lambda x: model(x).logits, (jnp.asarray(IMAGES),), (direction,))
    np.testing.assert_allclose(first, tangent, rtol=0, atol=1e-4)


def test_programs_hold_operations_of_jax_alone(model):
    """What reads a program (`jet`, jax2onnx, ...) has rules for JAX's operations and no others."""
    program = jax.make_jaxpr(lambda x: model(x).logits)(IMAGES)
    named = {operation.name for operation in primitives(program.jaxpr)}
    assert not {name for name in named if name.startswith("vit_")}
    assert not named & {"platform_index", "cond", "layout_constraint"}
    with compiled_for("tpu"):  # for a chip that is not here: its kernel, in a place of its own
        program = jax.make_jaxpr(lambda x: model(x).logits)(IMAGES)
    assert "vit_attention" in {operation.name for operation in primitives(program.jaxpr)}


def test_checks(model, wanted):
    error, output = checkify.checkify(model, errors=checkify.all_checks)(IMAGES)
    error.throw()
    np.testing.assert_allclose(output.logits, wanted, rtol=0, atol=1e-5)
    with jax.debug_nans(True):
        np.testing.assert_allclose(model(IMAGES).logits, wanted, rtol=0, atol=1e-5)
        with pytest.raises(FloatingPointError):
            model(IMAGES * np.nan)


@pytest.mark.slow
def test_derivatives(model, wanted):
    """Both modes, their mixture, linearisation and vmap over parameters."""
    plain = type(model)(model.config, attn_implementation="eager", _do_init=False)

    def along(network):
        return lambda s: network(IMAGES * s, params=model.params).logits.sum()

    for transform in (jax.jacfwd, jax.jacrev, jax.hessian):
        got, want = (transform(along(each))(1.0) for each in (model, plain))
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
    _, linear = jax.linearize(along(model), 1.0)
    np.testing.assert_allclose(linear(1.0), jax.jvp(along(plain), (1.0,), (1.0,))[1], rtol=1e-3)
    two = jax.tree.map(lambda p: jnp.stack([p, p]), model.params)
    got = jax.vmap(lambda p: model(IMAGES, params=p).logits)(two)
    np.testing.assert_allclose(got, np.stack([wanted, wanted]), rtol=0, atol=1e-5)
    loss = jax.checkpoint(lambda x: model(x).logits.sum())
    assert np.isfinite(jax.grad(loss)(jnp.asarray(IMAGES))).all()
    assert jax.eval_shape(model, IMAGES).logits.shape == wanted.shape


def test_which_programs_need_a_kernel():
    assert targets() == ("cpu",)
    assert needs_no_kernel("auto") == (jax.device_count() == 1)
    assert needs_no_kernel("eager")
    assert not needs_no_kernel("pallas")
    with compiled_for("cpu", "tpu"):
        assert targets() == ("cpu", "tpu")
        assert not needs_no_kernel("auto")
    with pytest.raises(InputError, match="'tpu'; given 'gpu'"), compiled_for("gpu"):
        pass
