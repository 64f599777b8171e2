"""The Flax models inside JAX: transformations, dropout, rematerialisation, copies, refusals."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.core import freeze
from flax.training.train_state import TrainState
from flax_models import (  # noqa: F401
    CLASSES,
    L,
    assert_trees_equal,
    classifier_fixture,
    config_of,
    empty,
    model_fixture,
    x_fixture,
)
from networks import flax_tree, flax_twin, images, make_config, random_weights, reference_config

import vit_flax
from vit_common.config import ViTConfig
from vit_common.errors import ConfigError, InputError


@pytest.fixture(scope="module")
def dropping():
    """A model with dropout everywhere."""
    config = config_of(hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.5)
    return flax_twin(CLASSES[None], config, random_weights(config))


def quick_key(seed: int) -> jax.Array:
    """A random key whose generator compiles in less time than the default one."""
    return jax.random.key(seed, impl="rbg")


# -- calls in other transformations


def test_params_that_are_empty_or_none_are_the_models_own(model, x):
    want = model(x)
    for own in (None, {}):
        assert_trees_equal(model(x, params=own), want)
        assert_trees_equal(model(x, own), want)
    other = jax.tree.map(lambda v: 0 * v, model.params)
    assert not np.asarray(model(x, other).last_hidden_state).any()
    assert_trees_equal(model(x, freeze(model.params)), want)


def test_inside_jit_grad_and_vmap(classifier, x):
    want = classifier(x).logits
    nested = jax.jit(lambda p, pixels: classifier(pixels, params=p).logits)
    np.testing.assert_allclose(nested(classifier.params, x), want, rtol=0, atol=2e-6)
    several = np.stack([x, x + 1, -x])  # (3, B, C, H, W)
    batched, gradient = jax.vmap(
        jax.value_and_grad(lambda pixels: classifier(pixels).logits[:, 0].sum())
    )(several)
    assert batched.shape == (3,)
    for got, pixels in zip(batched, several, strict=True):
        want = classifier(pixels).logits[:, 0].sum()
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    step = np.zeros_like(x)
    step[1, 2, 3, 4] = 1e-2
    slope = (classifier(x + step).logits - classifier(x - step).logits)[:, 0].sum() / 2e-2
    np.testing.assert_allclose(gradient[0, 1, 2, 3, 4], slope, rtol=0, atol=2e-3)


def test_labels_that_are_traced_are_looked_at_in_the_loss(classifier, x):
    loss = jax.jit(lambda labels: classifier(x, labels=labels).loss)
    np.testing.assert_allclose(
        loss(jnp.array([4, -100])), classifier(x, labels=[4, -100]).loss, rtol=1e-6
    )
    for wrong in ([0, 5], [0, -1], [0, -99]):
        assert np.isnan(loss(jnp.array(wrong)))
    with pytest.raises(InputError, match=r"`labels` must hold one class index per image"):
        loss(jnp.array([1, 2, 3]))


@pytest.mark.parametrize(
    "kind", ["numpy", "float64", "jax", "torch", "torch with gradient", "list"]
)
def test_images_of_any_library(model, x, kind):
    given = {
        "numpy": x,
        "float64": x.astype(np.float64),
        "jax": jnp.asarray(x),
        "torch": torch.tensor(x),
        "torch with gradient": torch.tensor(x, requires_grad=True),
        "list": [list(image) for image in x],
    }[kind]
    assert_trees_equal(model(given), model(x))


def test_half_precision_and_integers_as_images(model, x):
    halves = torch.tensor(x).bfloat16()
    assert_trees_equal(model(halves), model(halves.float().numpy()))
    pixels = (x > 0).astype(np.uint8)
    assert_trees_equal(model(pixels), model(pixels.astype(np.float32)))


def test_other_inputs_of_any_library(classifier, x):
    def loss(labels, head_mask):
        return classifier(x, labels=labels, head_mask=head_mask).loss

    want = loss(jnp.array([1, 2]), jnp.array([1.0, 0.0, 1.0, 1.0]))
    for labels, head_mask in (
        ([1, 2], [1.0, 0.0, 1.0, 1.0]),
        (np.array([1, 2]), np.array([1.0, 0.0, 1.0, 1.0])),
        (torch.tensor([1, 2]), torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)),
    ):
        np.testing.assert_array_equal(loss(labels, head_mask), want)
    # Booleans are several labels at once.
    several = np.arange(10).reshape(2, 5) % 2
    np.testing.assert_array_equal(
        classifier(x, labels=several.astype(bool)).loss,
        classifier(x, labels=several.astype(np.float32)).loss,
    )


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Fills with one entry each time XLA compiles the network: the function `run`, jitted."""
    seen: list[str] = []

    def listen(name: str, _: float, **details) -> None:
        function = str(details.get("fun_name", ""))
        if name.endswith("/backend_compile_duration") and re.fullmatch(
            r"(jit[(_])?run\)?", function
        ):
            seen.append(function)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_loop_compiles_once_for_each_shape_and_set_of_flags(x):
    config = make_config(num_hidden_layers=1, hidden_dropout_prob=0.5)
    built = flax_twin(CLASSES["classifier"], config, random_weights(config, "classifier"))
    keys = list(jax.random.split(jax.random.PRNGKey(0), 3))
    one = jnp.asarray(x[:1])
    with compilations() as seen:
        built(x)
    assert len(seen) == 1, seen
    calls = [
        {"pixel_values": x},
        {"pixel_values": one},
        {"pixel_values": x, "output_attentions": True},
        {"pixel_values": x, "train": True, "dropout_rng": keys[0]},
        {"pixel_values": x, "labels": np.array([1, 2])},
        {"pixel_values": x, "head_mask": np.ones(4)},
    ]
    for number, call in enumerate(calls):
        with compilations() as seen:
            built(**call)
        assert len(seen) == (number > 0), (call, seen)
    with compilations() as seen:
        for _ in range(3):
            for call in calls:
                built(**call)
            built(jnp.asarray(x), params=built.params)
            built(x.astype(np.float64), {}, output_attentions=False, return_dict=True)
            built(torch.tensor(x), dropout_rng=keys[1])
            built(x, output_attentions=np.True_, interpolate_pos_encoding=False)
            for key in keys:
                built(x + 1, train=True, dropout_rng=key)
            built(x, labels=[2, -100])
            built.params = jax.tree.map(lambda v: v + 1, built.params)
    assert len(seen) == 0, seen
    with compilations() as seen:
        built(x, output_hidden_states=True)
    assert len(seen) == 1


# -- dropout


def test_dropout_needs_a_key(dropping, model, x):
    with pytest.raises(InputError, match="`train=True` with dropout needs `dropout_rng`"):
        dropping(x, train=True)
    for wrong in (
        3,
        np.zeros(2),
        jnp.zeros((3, 2), jnp.uint32),
        jax.random.split(jax.random.key(0)),
    ):
        with pytest.raises(InputError, match="`dropout_rng` must be one JAX random key"):
            dropping(x, train=True, dropout_rng=wrong)
    assert_trees_equal(model(x, train=True), model(x))  # no dropout, no key


@pytest.mark.slow
def test_keys_decide_what_is_dropped(dropping, x):
    plain = dropping(x).last_hidden_state
    first, again, other = (
        dropping(x, train=True, dropout_rng=key).last_hidden_state
        for key in (jax.random.PRNGKey(1), jax.random.PRNGKey(1), jax.random.PRNGKey(2))
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, plain)
    np.testing.assert_array_equal(
        dropping(x, dropout_rng=jax.random.PRNGKey(1)).last_hidden_state, plain
    )
    by_position = dropping(x, None, jax.random.key(1), True)
    assert by_position.keys() == ["last_hidden_state", "pooler_output"]


def assert_element_wise(kept: np.ndarray, rate: float) -> None:
    """`kept` (B, ..., ...): dropped at `rate`, and alone: no axis shares a mask with another."""
    n = kept.size
    assert abs(1 - kept.mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / n)
    for axis in range(kept.ndim):
        a, b = np.moveaxis(kept, axis, 0)[:2].astype(float)
        correlation = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(a.size), axis


def test_dropout_is_element_wise_at_its_rate(dropping):
    batch = images(dropping.config, 8).astype(np.float32)
    flags = {"output_hidden_states": True, "output_attentions": True}
    plain = dropping(batch, **flags)
    noisy = dropping(batch, train=True, dropout_rng=quick_key(5), **flags)
    # After the embeddings: 0, or the value over one minus the rate.
    before, after = (np.asarray(o.hidden_states[0]) for o in (plain, noisy))
    kept = after != 0
    np.testing.assert_allclose(after[kept], before[kept] / 0.75, rtol=1e-6)
    assert_element_wise(kept, 0.25)
    # Attention: softmax leaves no zero, so zeros are what was dropped.
    for probabilities in noisy.attentions:
        assert_element_wise(np.asarray(probabilities) != 0, 0.5)
    layers = [np.asarray(p) != 0 for p in noisy.attentions]
    assert not np.array_equal(*layers)


def test_attention_probabilities_are_dropped_after_the_softmax(x):
    config = config_of(attention_probs_dropout_prob=0.5)
    built = flax_twin(CLASSES[None], config, random_weights(config))
    plain = np.asarray(built(x, output_attentions=True).attentions[0])
    noisy = built(x, train=True, dropout_rng=quick_key(5), output_attentions=True)
    noisy = np.asarray(noisy.attentions[0])
    kept = noisy != 0
    np.testing.assert_allclose(noisy[kept], 2 * plain[kept], rtol=1e-6)


# -- gradient checkpointing


@pytest.mark.slow  # compiles two deep networks with their gradients
def test_gradient_checkpointing_changes_the_memory_and_nothing_else(x):
    config = make_config(
        num_hidden_layers=1, hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.5
    )
    built = flax_twin(CLASSES["classifier"], config, random_weights(config, "classifier"))
    key = quick_key(0)

    def loss(params):
        out = built(
            x,
            params=params,
            train=True,
            dropout_rng=key,
            labels=np.array([1, 2]),
            output_attentions=True,
            output_hidden_states=True,
        )
        return out.loss, out

    def measure():
        traced = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(built.params)
        (_, out), gradient = traced.lower().compile()(built.params)
        return out, gradient, str(traced.jaxpr).count("remat")

    plain, gradient, recomputed = measure()
    assert recomputed == 0
    built.enable_gradient_checkpointing()
    assert built.module.config.gradient_checkpointing
    assert not config.gradient_checkpointing  # another model may be built from it
    out, regradient, recomputed = measure()
    assert recomputed
    assert_trees_equal(out, plain, atol=1e-5)
    for a, b in zip(jax.tree.leaves(regradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()) + 1e-6)
    built.disable_gradient_checkpointing()
    assert "remat" not in str(jax.make_jaxpr(loss)(built.params))


def test_gradient_checkpointing_from_the_config(x, model):
    built = empty(config=config_of(gradient_checkpointing=True), precision="highest")
    text = str(jax.make_jaxpr(lambda p: built(x, params=p).pooler_output)(model.params))
    assert text.count("remat") >= L


# -- models as objects


def test_copies_and_pickles(model, x):
    want = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert twin.config == model.config
        assert_trees_equal(twin.params, model.params)
        assert_trees_equal(twin(x), want)
        twin.params["layernorm"]["scale"] = 0 * twin.params["layernorm"]["scale"]
        twin.config.output_attentions = True
    assert_trees_equal(model(x), want)


def test_one_step_of_a_train_state(x):
    config = make_config(num_hidden_layers=1, hidden_dropout_prob=0.1)
    built = flax_twin(CLASSES["classifier"], config, random_weights(config, "classifier"))
    state = TrainState.create(apply_fn=built.__call__, params=built.params, tx=optax.adam(1e-3))

    @jax.jit
    def step(state, batch, labels, key):
        def loss(params):
            logits = state.apply_fn(batch, params=params, dropout_rng=key, train=True).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    losses = []
    for _ in range(4):
        state, value = step(state, x, jnp.array([1, 2]), quick_key(0))
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert int(state.step) == 4
    built.params = state.params


# -- what does not fit


WRONG_CALLS = {
    "no images": (
        None,
        {"pixel_values": None},
        "`pixel_values` must be an array of real numbers; given a NoneType",
    ),
    "text": (None, {"pixel_values": "cat.png"}, "`pixel_values` must be an array .* given a str"),
    "objects": (None, {"pixel_values": np.array([["a"]])}, "`pixel_values` must be .* of <U1"),
    "complex": (None, {"pixel_values": np.ones((2, 3, 32, 32), complex)}, "of complex128"),
    "ragged": (None, {"pixel_values": [[1], [1, 2]]}, "`pixel_values` must be .* given a list"),
    "one image": (
        None,
        {"pixel_values": np.ones((3, 32, 32))},
        r"4 dimensions, \(batch, channels, height, width\).*`pixel_values\[None\]`",
    ),
    "channels": (
        None,
        {"pixel_values": np.ones((2, 4, 32, 32))},
        "`pixel_values` must have 3 channels; given 4",
    ),
    "channels last": (
        None,
        {"pixel_values": np.ones((2, 32, 32, 3))},
        "must have 3 channels; given 32. Channels seem to be last",
    ),
    "size": (
        None,
        {"pixel_values": np.ones((2, 3, 16, 64))},
        r"must be 32 x 32 pixels \(height x width\); given 16 x 64",
    ),
    "no whole patches": (
        None,
        {"pixel_values": np.ones((2, 3, 39, 39)), "interpolate_pos_encoding": True},
        r"whole patches of 8 x 8 pixels \(height x width\); given 39 x 39",
    ),
    "head mask": (
        None,
        {"head_mask": np.ones(3)},
        r"`head_mask` must have shape \(heads,\) = \(4,\) or .* = \(2, 4\); given \(3,\)",
    ),
    "head mask of text": (None, {"head_mask": "all"}, "`head_mask` must be an array"),
    "mask without token": (
        None,
        {"bool_masked_pos": np.ones((2, 16))},
        "`bool_masked_pos` needs a mask token.*`use_mask_token=True`",
    ),
    "mask of other shape": (
        "decoder",
        {"bool_masked_pos": np.ones((2, 4, 4))},
        r"\(batch, patches\) = \(2, 16\); given \(2, 4, 4\)",
    ),
    "label too large": (
        "classifier",
        {"labels": [0, 5]},
        r"`labels` must be from 0 to 4 \(or -100 .*\); given 5",
    ),
    "label too small": ("classifier", {"labels": [-1, 0]}, "from 0 to 4 .* given -1"),
    "too few labels": (
        "classifier",
        {"labels": [0]},
        r"one class index per image, shape \(2,\); given \(1,\)",
    ),
    "labels of several": (
        "classifier",
        {"labels": np.ones((2, 4), np.float32)},
        r"\(batch, classes\) = \(2, 5\) for multi_label_classification; given "
        r"\(2, 4\)",
    ),
    "labels of text": ("classifier", {"labels": ["cat", "dog"]}, "`labels` must be an array"),
    "params": (None, {"params": [1]}, "`params` must be a nested dict of arrays; given a list"),
    "params inside params": (
        None,
        {"params": {"params": {"a": 1}}},
        r'include the following: .*\(given \{"params": ...\}',
    ),
    "params of the other model": (
        "classifier",
        {"params": {"layernorm": {"scale": np.ones(48)}}},
        "include the following: vit/embeddings/cls_token",
    ),
    "params of other shape": (
        None,
        {"params": "halved"},
        r"layernorm/scale must have shape \(48,\); given \(24,\)",
    ),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_calls_name_the_argument(case, x):
    head, call, message = WRONG_CALLS[case]
    built = empty(CLASSES[head])
    params = flax_tree(random_weights(config_of(), head))
    call = {"pixel_values": x, "params": params, **call}
    if isinstance(call["params"], str):
        call["params"] = jax.tree.map(lambda v: v[..., : max(1, v.shape[-1] // 2)], params)
    with pytest.raises(InputError, match=message):
        built(**call)


def test_the_module_says_when_channels_come_first(model, x):
    with pytest.raises(InputError, match=r"given 32\. Channels seem to be first"):
        model.module.apply({"params": model.params}, x)


def test_decoding_to_another_patch_side_is_refused(x):
    built = empty(CLASSES["decoder"], config_of(encoder_stride=4))
    params = flax_tree(random_weights(built.config, "decoder"))
    with pytest.raises(InputError, match=r"`patch_size` and `encoder_stride` .*8 and 4"):
        built(x, params=params, bool_masked_pos=np.ones((2, 16)))


WRONG_MODELS = {
    "keyword": (
        {"foo": 1, "bar": 2},
        "FlaxViTModel has no keyword 'foo', 'bar'; wanted one of "
        "input_shape, seed, dtype, _do_init, param_dtype, precision, attn_implementation, "
        "scan_layers, add_pooling_layer, use_mask_token",
    ),
    "kernel": (
        {"attn_implementation": "flash"},
        "must be one of 'auto', 'eager', 'cpu', 'cudnn', 'pallas'; given 'flash'",
    ),
    "integer dtype": ({"dtype": jnp.int32}, "`dtype` must be a floating dtype; given int32"),
    "no dtype": ({"dtype": None}, "`dtype` must be a floating dtype; given None"),
    "name of no dtype": ({"dtype": "half a float"}, "`dtype` must be .* given 'half a float'"),
    "integer parameters": ({"param_dtype": jnp.int8}, "`param_dtype` must be a floating dtype"),
    "precision": ({"precision": "best"}, "`precision` must be None, .* given 'best'"),
    "input shape": (
        {"input_shape": (1, 3, 32, 32)},
        r"`input_shape` must be .* = \(batch, 32, 32, 3\).*given \(1, 3, 32, 32\)",
    ),
    "size of input": ({"input_shape": (1, 64, 64, 3)}, r"`input_shape` must be .*\(1, 64, 64, 3\)"),
}


@pytest.mark.parametrize("case", WRONG_MODELS)
def test_wrong_constructors_name_the_argument(case):
    kwargs, message = WRONG_MODELS[case]
    with pytest.raises(InputError, match=message):
        empty(**kwargs)


def test_keywords_of_another_class_are_refused():
    for head in ("classifier", "decoder"):
        with pytest.raises(
            InputError,
            match=f"{CLASSES[head].__name__} has no keyword "
            "'add_pooling_layer'; wanted one of input_shape",
        ):
            empty(CLASSES[head], add_pooling_layer=False)
    assert not empty(add_pooling_layer=False).module.add_pooling_layer
    assert empty(use_mask_token=True).module.use_mask_token


def test_configurations_nobody_can_build():
    with pytest.raises(ConfigError, match="`config` must be a ViTConfig; given dict"):
        empty(config={"hidden_size": 48})
    config = config_of()
    config.num_attention_heads = 7
    with pytest.raises(ConfigError, match=r"`hidden_size` must be .* 48 and 7"):
        empty(config=config)
    built = empty(config=reference_config(config_of()))  # Transformers' own will do
    assert type(built.config) is ViTConfig
    assert built.params_shape_tree == empty().params_shape_tree
    with pytest.raises(InputError, match="FlaxViTPreTrainedModel has no network of its own"):
        vit_flax.FlaxViTPreTrainedModel(config_of())
