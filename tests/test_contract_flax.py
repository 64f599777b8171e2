"""The Flax models as drop-ins for those of Transformers 4.57.6: arguments, parameters, outputs.

Numbers are compared in test_parity.py, files in test_pretrained.py.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import torch
import transformers
from flax.core import freeze
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict
from networks import flax_tree, flax_twin, images, make_config, random_weights, reference_config

import vit_flax
from vit_common.config import ViTConfig
from vit_common.errors import ConfigError, InputError

CLASSES = {
    None: vit_flax.FlaxViTModel,
    "classifier": vit_flax.FlaxViTForImageClassification,
    "decoder": vit_flax.FlaxViTForMaskedImageModeling,
}
# Transformers has the first two.
REFERENCES = {
    None: transformers.FlaxViTModel,
    "classifier": transformers.FlaxViTForImageClassification,
}
B, S, D, A, L = 2, 17, 48, 4, 2  # the classifier has one layer: it is compiled often


def config_of(**overrides) -> ViTConfig:
    return make_config(num_hidden_layers=L, **overrides)


@pytest.fixture(scope="module")
def model():
    return flax_twin(CLASSES[None], config_of(), random_weights(config_of()))


@pytest.fixture(scope="module")
def classifier():
    config = make_config(num_hidden_layers=1)
    return flax_twin(CLASSES["classifier"], config, random_weights(config, "classifier"))


@pytest.fixture(scope="module")
def dropping():
    """A model with dropout everywhere."""
    config = config_of(hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.5)
    return flax_twin(CLASSES[None], config, random_weights(config))


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return images(config_of()).astype(np.float32)


def empty(cls: type = CLASSES[None], config: ViTConfig | None = None, **kwargs):
    """A model without parameters: nothing is drawn or compiled."""
    return cls(config or config_of(), _do_init=False, **kwargs)


def assert_trees_equal(got, want, **tolerance) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, **{"rtol": 0, "atol": 0, **tolerance})


def quick_key(seed: int) -> jax.Array:
    """A random key whose generator compiles in less time than the default one."""
    return jax.random.key(seed, impl="rbg")


# -- signatures


def parameters(function) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


# What a call hands over may be given by position as far as Transformers takes it by position.
@pytest.mark.parametrize(
    ("name", "other_default"),
    [
        ("__init__", {}),
        ("__call__", {}),
        ("init_weights", {"input_shape"}),
        ("from_pretrained", {"revision"}),
        ("save_pretrained", {"safe_serialization"}),
        ("to_bf16", {}),
        ("to_fp16", {}),
        ("to_fp32", {}),
        ("enable_gradient_checkpointing", {}),
    ],
)
@pytest.mark.parametrize("head", CLASSES)
def test_signatures_are_those_of_transformers(name, other_default, head):
    theirs = parameters(getattr(transformers.FlaxViTModel, name))
    ours = parameters(getattr(CLASSES[head], name))
    positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional
    for parameter in positional:
        assert ours[parameter].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    takes_more = any(p.kind is p.VAR_KEYWORD for p in ours.values())
    for parameter, their in theirs.items():
        if their.kind in (their.VAR_KEYWORD, their.VAR_POSITIONAL):
            continue
        assert parameter in ours or takes_more, parameter
        if parameter in ours and parameter not in other_default:
            assert ours[parameter].default == their.default, parameter


def test_arguments_that_are_new_are_keyword_only():
    extra = {
        None: ["head_mask", "bool_masked_pos", "interpolate_pos_encoding"],
        "classifier": ["head_mask", "labels", "interpolate_pos_encoding"],
        "decoder": ["head_mask", "bool_masked_pos", "interpolate_pos_encoding"],
    }
    for head, cls in CLASSES.items():
        call = parameters(cls.__call__)
        new = [name for name, p in call.items() if p.kind is p.KEYWORD_ONLY]
        assert new == extra[head]
    new = [n for n, p in parameters(CLASSES[None].__init__).items() if p.kind is p.KEYWORD_ONLY]
    assert new == ["param_dtype", "precision", "attn_implementation", "scan_layers"]


def test_constructor_by_position():
    config = config_of()
    built = vit_flax.FlaxViTModel(config, (3, 32, 32, 3), 7, jnp.bfloat16, False)
    assert built.config is config
    assert built.input_shape == (3, 32, 32, 3)
    assert built.seed == 7
    np.testing.assert_array_equal(built.key, jax.random.PRNGKey(7))
    assert built.dtype == built.module.dtype == jnp.bfloat16
    assert built.framework == "flax"
    assert isinstance(built.module, vit_flax.FlaxViTModule)
    assert built.config_class is ViTConfig
    assert (built.base_model_prefix, built.main_input_name) == ("vit", "pixel_values")
    assert isinstance(built, vit_flax.FlaxViTPreTrainedModel)
    assert empty().input_shape == (1, 32, 32, 3)


def test_later_changes_of_the_config_do_not_reach_the_network(x):
    config = config_of()
    built = empty(config=config)
    config.hidden_act = "relu"
    config.output_attentions = True
    assert built.module.config.hidden_act == "gelu"
    assert built.config.output_attentions


# -- parameters

OPTIONS = [
    (None, {}, {}),
    (None, {}, {"add_pooling_layer": False}),
    (None, {}, {"use_mask_token": True}),
    (None, {"qkv_bias": False, "pooler_output_size": 20}, {}),
    (None, {"image_size": (16, 24), "patch_size": (4, 8), "num_channels": 1}, {}),
    ("classifier", {"num_labels": 7}, {}),
    ("classifier", {"qkv_bias": False}, {}),
    ("decoder", {}, {}),
    ("decoder", {"encoder_stride": 4, "num_channels": 4}, {}),
]


@pytest.mark.parametrize(("head", "fields", "kwargs"), OPTIONS)
def test_shape_tree_is_that_of_the_module(head, fields, kwargs):
    config = make_config(num_hidden_layers=1, **fields)
    built = empty(CLASSES[head], config, param_dtype=jnp.float16, **kwargs)
    pixels = jax.ShapeDtypeStruct(built.input_shape, jnp.float32)
    want = jax.eval_shape(built.module.init, jax.random.PRNGKey(0), pixels)["params"]
    assert built.params_shape_tree == want
    assert built.required_params == set(flatten_dict(want))


@pytest.mark.parametrize(
    ("head", "fields", "kwargs"),
    [
        o
        for o in OPTIONS
        if o[0] in REFERENCES
        and "use_mask_token" not in o[2]
        and not isinstance(o[1].get("image_size"), tuple)
    ],
)
def test_parameters_are_those_of_transformers(head, fields, kwargs):
    config = make_config(num_hidden_layers=1, **fields)
    theirs = REFERENCES[head](reference_config(config), _do_init=False, **kwargs)
    ours = empty(CLASSES[head], config, **kwargs)
    assert ours.required_params == theirs.required_params
    assert ours.params_shape_tree == theirs.params_shape_tree


@pytest.mark.parametrize("layers", [0, 1, 5])
def test_number_of_leaves(layers):
    built = empty(config=make_config(num_hidden_layers=layers))
    assert len(jax.tree.leaves(built.params_shape_tree)) == 8 + 16 * layers


def test_number_of_parameters_of_vit_base():
    built = empty(CLASSES["classifier"], ViTConfig(num_labels=1000))
    sizes = [np.prod(leaf.shape) for leaf in jax.tree.leaves(built.params_shape_tree)]
    assert sum(sizes) == 86_567_656


def test_params_are_not_there_without_init(x, model):
    for error in (ValueError, InputError):
        with pytest.raises(error, match="`params` cannot be accessed"):
            _ = empty().params
        with pytest.raises(error, match="`params` cannot be set"):
            empty().params = model.params
        with pytest.raises(error, match="`params` cannot be accessed"):
            empty()(x)
        with pytest.raises(error, match="`params` cannot be accessed"):
            empty()(x, params={})
    assert empty().required_params == model.required_params
    without = empty(precision="highest")
    assert_trees_equal(without(x, params=model.params), model(x))


def setter():
    built = empty()
    built._is_initialized = True
    return built


def test_setting_params(model):
    built = setter()
    built.params = model.params
    assert type(built.params) is dict
    built.params = freeze(model.params)
    assert type(built.params) is type(built.params["encoder"]["layer"]) is dict
    assert_trees_equal(built.params, model.params)
    as_numpy = jax.tree.map(np.asarray, model.params)
    built.params = as_numpy
    assert_trees_equal(built.params, model.params)
    # The caller's dict and the model's are two.
    built.params["layernorm"].pop("scale")
    assert "scale" in as_numpy["layernorm"]


def test_setting_params_that_do_not_fit(model):
    flat = flatten_dict(model.params)
    built = setter()

    def set_to(**changes):
        changed = {**flat, **{tuple(k.split("/")): v for k, v in changes.items()}}
        built.params = unflatten_dict({k: v for k, v in changed.items() if v is not ...})

    with pytest.raises(
        ValueError,
        match=r"^Some parameters are missing. Make sure that `params` "
        "include the following: layernorm/scale, pooler/dense/kernel$",
    ):
        set_to(**{"layernorm/scale": ..., "pooler/dense/kernel": ...})
    with pytest.raises(
        InputError,
        match=r"layernorm/scale must have shape \(48,\); given \(3,\); "
        r"layernorm/bias must have shape \(48,\); given \(\)",
    ):
        set_to(**{"layernorm/scale": np.ones(3), "layernorm/bias": 1.0})
    with pytest.raises(InputError, match=r"layernorm/scale must have shape \(48,\); given \(\)"):
        set_to(**{"layernorm/scale": None})
    with pytest.raises(InputError, match="`params` must be a nested dict of arrays; given a list"):
        built.params = [1]
    with pytest.raises(InputError, match=r'are missing.*\{"params": ...\}; pass what is in it'):
        built.params = {"params": model.params}
    assert built._params is None


# -- random parameters


def drawn(leaves: dict) -> dict[str, np.ndarray]:
    """The leaves that are drawn, divided by what they should deviate by."""
    return {
        "/".join(path): np.asarray(x, np.float64).ravel()
        for path, x in leaves.items()
        if path[-1] in ("kernel", "cls_token", "position_embeddings")
    }


def assert_drawn_as_documented(params, std: float) -> None:
    flat = flatten_dict(params)
    for path, leaf in flat.items():
        if path[-1] == "scale":
            assert (np.asarray(leaf) == 1).all()
        elif path[-1] in ("bias", "mask_token"):
            assert not np.asarray(leaf).any()
    kernels = drawn(flat)
    assert len(kernels) + sum(p[-1] in ("scale", "bias", "mask_token") for p in flat) == len(flat)
    for name, values in kernels.items():  # no two are the same numbers
        n = values.size
        assert abs(values.std() / std - 1) < 5 / np.sqrt(2 * n), name
        assert abs(values.mean()) < 5 * std / np.sqrt(n), name
    starts = {tuple(values[:8]) for values in kernels.values()}
    assert len(starts) == len(kernels)
    everything = np.concatenate(list(kernels.values()))
    assert scipy.stats.kstest(everything, scipy.stats.norm(0, std).cdf).pvalue > 1e-3


@pytest.fixture(scope="module")
def random_model():
    return CLASSES["decoder"](make_config(num_hidden_layers=1, initializer_range=0.03), seed=3)


def test_random_parameters_follow_the_config(random_model):
    assert_drawn_as_documented(random_model.params, 0.03)
    tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random_model.params)
    assert tree == random_model.params_shape_tree
    assert_trees_equal(
        random_model.params, random_model.init_weights(jax.random.PRNGKey(3), (1, 32, 32, 3))
    )
    other = random_model.init_weights(jax.random.PRNGKey(4))
    assert not np.array_equal(
        other["decoder"]["0"]["kernel"], random_model.params["decoder"]["0"]["kernel"]
    )


def test_init_of_the_module_draws_alike(random_model):
    pixels = jnp.zeros((1, 32, 32, 3))
    params = jax.jit(random_model.module.init)(jax.random.PRNGKey(0), pixels)["params"]
    assert_drawn_as_documented(params, 0.03)


def test_no_draw_is_far_off_and_halves_are_drawn_in_full_precision():
    """A bound a hundred deviations away once came out of one draw in 2^23, of 0.8 % in bfloat16."""
    draw = jax.jit(vit_flax.layers.initializer(0.02), static_argnums=(1, 2))
    values = draw(jax.random.PRNGKey(4), (4_000_000,), jnp.float32)
    assert 0.09 < float(jnp.abs(values).max()) <= 0.1
    for dtype in (jnp.bfloat16, jnp.float16):
        values = draw(jax.random.PRNGKey(0), (100_000,), dtype)
        assert values.dtype == dtype
        assert abs(float(values.astype(jnp.float32).std()) / 0.02 - 1) < 0.02
    # Where the bound of 2 matters it is that of PyTorch's truncated normal.
    draw = vit_flax.layers.initializer(1.5)
    values = np.asarray(draw(jax.random.PRNGKey(0), (50_000,), jnp.float32))
    want = scipy.stats.truncnorm(-2 / 1.5, 2 / 1.5, scale=1.5)
    assert scipy.stats.kstest(values, want.cdf).pvalue > 1e-3
    zeros = vit_flax.layers.initializer(0.0)(jax.random.PRNGKey(0), (9,), float)
    assert not np.asarray(zeros).any()


def test_init_weights_completes_what_is_missing(random_model):
    flat = flatten_dict(random_model.params)
    gone = {
        ("decoder", "0", "kernel"),
        ("vit", "embeddings", "cls_token"),
        ("vit", "layernorm", "scale"),
    }
    kept = {path: x + 1 for path, x in flat.items() if path not in gone}
    for given in (unflatten_dict(kept), freeze(unflatten_dict(kept))):
        whole = random_model.init_weights(jax.random.PRNGKey(3), (1, 32, 32, 3), given)
        assert type(whole) is dict
        found = flatten_dict(whole)
        assert list(found) == list(flat)
        for path, x in found.items():
            np.testing.assert_array_equal(x, flat[path] if path in gone else kept[path])
    assert set(flatten_dict(unflatten_dict(kept))) == set(kept)


def test_init_weights_under_jit_and_in_half_precision():
    built = empty(param_dtype=jnp.bfloat16)
    shapes = jax.eval_shape(built.init_weights, jax.random.PRNGKey(0))
    assert shapes == built.params_shape_tree
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}


# -- dtypes


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("to_bf16", jnp.bfloat16), ("to_fp16", jnp.float16), ("to_fp32", jnp.float32)],
)
def test_casts_with_and_without_mask(model, method, dtype):
    source = jnp.bfloat16 if dtype == jnp.float32 else jnp.float32
    params = {
        "a": {"kernel": jnp.ones(2, source), "bias": jnp.ones(2, source)},
        "steps": jnp.ones(2, jnp.int32),
    }
    reference = getattr(transformers.FlaxViTModel, method)
    theirs = transformers.FlaxViTModel.__new__(transformers.FlaxViTModel)
    mask = {"a": {"kernel": True, "bias": False}, "steps": True}
    for args in ((params,), (params, mask)):
        got, want = getattr(model, method)(*args), reference(theirs, *args)
        assert_trees_equal(got, want)
        assert jax.tree.map(lambda v: v.dtype, got) == jax.tree.map(lambda v: v.dtype, want)
    assert got["a"]["kernel"].dtype == dtype
    assert got["a"]["bias"].dtype == source
    assert params["a"]["kernel"].dtype == source


# -- outputs


@pytest.fixture(scope="module")
def output(model, x):
    return model(x, output_hidden_states=True, output_attentions=True)


def test_shapes_of_the_output(output):
    assert type(output) is vit_flax.FlaxBaseModelOutputWithPooling
    assert output.last_hidden_state.shape == (B, S, D)
    assert output.pooler_output.shape == (B, D)
    assert isinstance(output.hidden_states, tuple)
    assert isinstance(output.attentions, tuple)
    assert [h.shape for h in output.hidden_states] == [(B, S, D)] * (L + 1)
    assert [a.shape for a in output.attentions] == [(B, A, S, S)] * L
    for attention in output.attentions:
        np.testing.assert_allclose(np.asarray(attention).sum(-1), 1.0, atol=1e-6)
        assert (np.asarray(attention) > 0).all()


def same_class_of_transformers(output):
    return transformers.modeling_flax_outputs.FlaxBaseModelOutputWithPooling(
        **{
            name: getattr(output, name)
            for name in ("last_hidden_state", "pooler_output", "hidden_states", "attentions")
        }
    )


@pytest.mark.parametrize("fields", [(), ("pooler_output",), ("hidden_states", "attentions")])
def test_outputs_read_as_those_of_transformers(output, fields):
    ours = output.replace(**dict.fromkeys(fields))
    theirs = same_class_of_transformers(ours)
    assert list(ours.keys()) == list(theirs.keys())
    assert list(ours) == list(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours.to_tuple(), theirs.to_tuple(), strict=True):
        assert a is b
    for a, b in zip(ours.values(), theirs.values(), strict=True):
        assert a is b
    for (name, a), (other, b) in zip(ours.items(), theirs.items(), strict=True):
        assert name == other
        assert a is b
    for name in theirs.keys():  # noqa: SIM118
        assert ours[name] is theirs[name] is getattr(ours, name)
        assert name in ours
    for index in range(len(theirs)):
        assert ours[index] is theirs[index]
    assert ours[-1] is theirs[-1]
    for part in (slice(1), slice(1, None), slice(None, None, 2)):
        assert all(a is b for a, b in zip(ours[part], theirs[part], strict=True))
    assert dict(**ours).keys() == dict(**theirs).keys()
    for name in fields:
        assert getattr(ours, name) is None
        assert name not in ours
        for one in (ours, theirs):
            with pytest.raises(KeyError, match=name):
                one[name]
    for one in (ours, theirs):
        with pytest.raises(IndexError):
            one[len(ours)]
        with pytest.raises(AttributeError):
            _ = one.logits


def test_outputs_are_pytrees(output):
    for one in (output, output.replace(pooler_output=None, hidden_states=None)):
        doubled = jax.tree.map(lambda v: 2 * v, one)
        assert type(doubled) is type(one)
        assert doubled.keys() == one.keys()
        np.testing.assert_array_equal(doubled.last_hidden_state, 2 * one.last_hidden_state)
        leaves, structure = jax.tree.flatten(one)
        assert_trees_equal(jax.tree.unflatten(structure, leaves), one)
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(output)}
    assert {".last_hidden_state", ".hidden_states[0]", ".attentions[1]"} <= names
    again = pickle.loads(pickle.dumps(output))
    assert type(again) is type(output)
    assert_trees_equal(again, output)


def test_outputs_of_the_heads(classifier, x):
    result = classifier(x, labels=np.array([0, 4]))
    assert type(result) is vit_flax.FlaxSequenceClassifierOutput
    assert result.keys() == ["loss", "logits"]
    assert result.loss.shape == ()
    assert result.logits.shape == (B, 5)
    config = make_config(num_hidden_layers=1)
    built = flax_twin(CLASSES["decoder"], config, random_weights(config, "decoder"))
    result = built(x, bool_masked_pos=np.ones((B, S - 1), bool))
    assert type(result) is vit_flax.FlaxMaskedImageModelingOutput
    assert result.keys() == ["loss", "reconstruction"]
    assert result.reconstruction.shape == x.shape


@pytest.mark.parametrize("return_dict", [True, False])
def test_tuples_hold_every_requested_field_in_order(model, classifier, x, return_dict):
    heads = ((model, ["last_hidden_state", "pooler_output"]), (classifier, ["logits"]))
    for (built, first), hidden, attentions in itertools.product(heads, (0, 1), (0, 1)):
        flags = {"output_hidden_states": bool(hidden), "output_attentions": bool(attentions)}
        shapes = jax.eval_shape(lambda v, b=built, f=flags: b(v, return_dict=return_dict, **f), x)
        want = first + ["hidden_states"] * hidden + ["attentions"] * attentions
        if return_dict:
            assert shapes.keys() == want
            shapes = shapes.to_tuple()
        assert type(shapes) is tuple
        every = {
            "last_hidden_state": (B, S, D),
            "pooler_output": (B, D),
            "logits": (B, 5),
            "hidden_states": ((B, S, D),) * (built.config.num_hidden_layers + 1),
            "attentions": ((B, A, S, S),) * built.config.num_hidden_layers,
        }
        assert jax.tree.map(jnp.shape, shapes) == tuple(every[name] for name in want)


def test_tuples_hold_what_the_fields_do(model, output, x):
    plain = model(x, output_hidden_states=True, output_attentions=True, return_dict=False)
    assert_trees_equal(plain, output.to_tuple())


def test_flags_that_are_none_come_from_the_config(model, x):
    config = model.config
    want = model(x, output_attentions=True, output_hidden_states=True, return_dict=False)
    try:
        config.output_attentions = config.output_hidden_states = True
        config.return_dict = False
        assert_trees_equal(model(x), want)
        assert len(model(x, output_attentions=False, output_hidden_states=False)) == 2
        assert model(x, None, None, False, False, False, True).keys() == [
            "last_hidden_state",
            "pooler_output",
        ]
    finally:
        config.output_attentions = config.output_hidden_states = False
        config.return_dict = True


# -- the module by itself


@pytest.mark.parametrize("head", [None, "classifier"])
def test_the_module_by_position_and_channels_last(model, classifier, x, head):
    built = classifier if head else model
    variables = {"params": built.params}
    channels_last = x.transpose(0, 2, 3, 1)
    theirs = REFERENCES[head](reference_config(built.config), _do_init=False)
    signature = parameters(theirs.module.__call__)
    ours = parameters(built.module.__call__)
    assert list(ours)[: len(signature)] == list(signature)
    with jax.default_matmul_precision("highest"):
        want = jax.jit(theirs.module.apply, static_argnums=(2, 3, 4, 5))(
            variables, channels_last, True, True, True, True
        )
    got = jax.jit(built.module.apply, static_argnums=(2, 3, 4, 5))(
        variables, channels_last, True, True, True, True
    )
    assert list(got.keys()) == list(want.keys())
    assert jax.tree.map(jnp.shape, got.to_tuple()) == jax.tree.map(jnp.shape, want.to_tuple())
    assert_trees_equal(got.to_tuple(), want.to_tuple(), atol=2e-5)
    assert_trees_equal(got, built(x, output_attentions=True, output_hidden_states=True), atol=2e-6)
    shapes = jax.eval_shape(
        lambda v: built.module.apply(variables, v, return_dict=False), channels_last
    )
    assert type(shapes) is tuple


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
