"""The Flax models as drop-ins for those of Transformers 4.57.6: arguments, parameters, outputs.

Numbers are compared in test_parity.py, files in test_pretrained.py.
"""

from __future__ import annotations

import inspect
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import transformers
from flax.core import freeze
from flax.traverse_util import flatten_dict, unflatten_dict
from flax_models import (  # noqa: F401
    CLASSES,
    A,
    B,
    D,
    L,
    S,
    assert_trees_equal,
    classifier_fixture,
    config_of,
    empty,
    model_fixture,
    x_fixture,
)
from networks import flax_twin, make_config, random_weights, reference_config

import vit_flax
from vit_common.config import ViTConfig
from vit_common.errors import InputError

# Transformers has the first two.
REFERENCES = {
    None: transformers.FlaxViTModel,
    "classifier": transformers.FlaxViTForImageClassification,
}


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
