"""Blocks run by a scan over stacked parameters, and what gradient checkpointing keeps.

Outputs are held against Transformers 4.57.6's PyTorch models, which read the same files; gradients
and training, which other tests hold against PyTorch, against the same model without the scan.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.core import freeze
from flax.traverse_util import flatten_dict
from networks import flax_tree, flax_twin, images, make_config, random_weights, randomize
from tolerances import BOUNDS

import vit_flax
from vit_common.config import ViTConfig
from vit_common.errors import InputError
from vit_common.images.processor import ViTImageProcessor
from vit_flax import stack_layers, unstack_layers
from vit_flax.inference import ImageClassifier
from vit_flax.stacked import REMAT_POLICIES
from vit_torch.parity import difference
from vit_torch.pretrained import to_numpy

L, A = 3, 3
DINO = {
    "hidden_size": 24,
    "num_hidden_layers": L,
    "num_attention_heads": A,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
SMALL = {**DINO, "intermediate_size": 36}
BIASES = {"use_relative_position_bias": True, "use_shared_relative_position_bias": True}
MASK = np.array([[1.0, 0.5, 0.0], [0.2, 1.0, 1.0], [1.0, 0.0, 0.7]])  # (L, A)
ALL = {"output_hidden_states": True, "output_attentions": True}

# name of Transformers' class, and its configuration
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", SMALL),
    "deit": ("DeiTForImageClassificationWithTeacher", SMALL),
    "beit, biases of a block": (
        "BeitForImageClassification",
        {**SMALL, "use_relative_position_bias": True},
    ),
    "beit, shared biases": (
        "BeitModel",
        {**SMALL, **BIASES, "use_absolute_position_embeddings": True},
    ),
    "dinov2, gated": ("Dinov2ForImageClassification", {**DINO, "use_swiglu_ffn": True}),
    "registers": ("Dinov2WithRegistersModel", DINO),
}


def scanned(config: ViTConfig, cls: type = vit_flax.FlaxViTModel, **kwargs: Any):
    """A model without parameters."""
    options = {"_do_init": False, "precision": "highest", "scan_layers": True, **kwargs}
    return cls(config, **options)


def bits(tree) -> dict[str, Any]:
    """Dtype, shape and bytes of every leaf, by path."""
    flat = flatten_dict(tree, sep="/")
    return {
        n: (str(a.dtype), np.shape(a), np.asarray(a).tobytes()) for n, a in sorted(flat.items())
    }


def noise(shape, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# -- outputs


@pytest.mark.parametrize("name", CASES)
def test_every_stage_against_the_torch_reference(name, tmp_path):
    cls, fields = CASES[name]
    family = cls.split("For")[0].removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(**fields)
    config._attn_implementation = "eager"
    reference = randomize(getattr(transformers, cls)(config))
    reference.save_pretrained(tmp_path)
    ours = getattr(vit_flax, f"Flax{cls}").from_pretrained(
        tmp_path, precision="highest", scan_layers=True
    )
    assert ours.scan_layers
    x = noise((2, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        want = reference(torch.tensor(x), head_mask=torch.tensor(MASK), **ALL)
    got = ours(x, head_mask=MASK, **ALL)
    assert len(got.hidden_states) == L + 1
    assert len(got.attentions) == L
    for field, value in want.items():
        many = isinstance(value, tuple)
        pairs = zip(got[field], value, strict=True) if many else [(got[field], value)]
        for mine, theirs in pairs:
            stage = difference(field, np.asarray(mine), to_numpy(theirs))
            assert stage.max_abs <= BOUNDS["reference float32"], stage


def test_what_is_not_asked_for_is_not_there():
    config = make_config()
    model = scanned(config)
    out = jax.eval_shape(model, images(config), model.params_shape_tree)
    assert out.hidden_states is None
    assert out.attentions is None
    assert list(out) == ["last_hidden_state", "pooler_output"]


@pytest.mark.slow
def test_the_tpu_kernel_inside_the_scan():
    config = make_config(num_hidden_layers=2, hidden_size=24, intermediate_size=24)
    weights = random_weights(config)
    plain = flax_twin(vit_flax.FlaxViTModel, config, weights, attn_implementation="eager")
    model = scanned(config, attn_implementation="pallas")
    x = images(config).astype(np.float32)

    def loss(params, model):
        return (model(x, params=params).pooler_output ** 2).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    got, want = gradient(stack_layers(plain.params), model), gradient(plain.params, plain)
    check_gradients(unstack_layers(got), want, BOUNDS["gradients float32"])


def test_a_deeper_network_is_no_longer_program():
    def program(layers: int, **kwargs: Any) -> int:
        config = make_config(num_hidden_layers=layers)
        model = scanned(config, **kwargs)
        traced = jax.make_jaxpr(lambda params: model(images(config), params=params).to_tuple())
        return len(str(traced(model.params_shape_tree)).splitlines())

    assert program(3) == program(9)
    assert program(9, scan_layers=False) > 2 * program(3, scan_layers=False)


def test_no_layers():
    config = make_config("no layers")
    weights = random_weights(config)
    plain = flax_twin(vit_flax.FlaxViTModel, config, weights)
    model = scanned(config)
    x = images(config).astype(np.float32)
    params = stack_layers(plain.params)
    assert bits(params) == bits(plain.params)
    got = model(x, params=params, **ALL)
    np.testing.assert_array_equal(got.pooler_output, plain(x).pooler_output)
    assert (len(got.hidden_states), got.attentions) == (1, ())


# -- training


def masks_by_shape(key, p=0.5, shape=None, **kwargs):
    """The same draw for every key, so that what draws in another order draws the same."""
    share = np.random.default_rng(len(shape)).random(tuple(shape))
    return jnp.asarray(share) < p


def check_gradients(got, want, bound: float) -> None:
    got, want = flatten_dict(got, sep="/"), flatten_dict(want, sep="/")
    assert got.keys() == want.keys()
    for name, value in want.items():
        stage = difference(name, np.asarray(got[name]), np.asarray(value))
        # The softmax does not see the key's bias: that gradient is rounding and nothing else.
        scale = 1.0 if "key/bias" in name else stage.scale
        assert scale > 1e-6, f"{name} has no gradient to compare"
        assert stage.max_abs <= bound * scale, stage


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "policy"),
    [
        pytest.param("vit", "dots_with_no_batch_dims_saveable", marks=pytest.mark.slow),
        ("beit", None),
    ],
)
def test_training_is_that_of_the_blocks_one_by_one(name, policy, monkeypatch):
    """Outputs and the gradient of every parameter, under dropout, stochastic depth and a head mask
    for each block."""
    everything = {
        "vit": {"use_swiglu_ffn": True, "layer_scale_init_value": 0.1, "qkv_bias": False},
        "beit": BIASES,
    }
    cls, config_cls = {
        "vit": (vit_flax.FlaxViTForImageClassification, vit_flax.ViTConfig),
        "beit": (vit_flax.FlaxBeitForImageClassification, vit_flax.BeitConfig),
    }[name]
    config = config_cls(
        **SMALL,
        **everything[name],
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.3,
        drop_path_rate=0.6,
    )
    x, weights = noise((4, 3, 16, 16)), random_weights(config, cls.head)
    monkeypatch.setattr(jax.random, "bernoulli", masks_by_shape)
    with jax.enable_x64(True):
        plain = flax_twin(cls, config, weights, jnp.float64)
        model = scanned(config, cls, dtype=jnp.float64, param_dtype=jnp.float64)
        if policy is not None:
            model.enable_gradient_checkpointing(policy)

        def run(params, model):
            out = model(
                x,
                params=params,
                train=True,
                dropout_rng=jax.random.key(0),
                labels=np.array([1, 2, 3, 4]),
                head_mask=MASK,
                **ALL,
            )
            return out.loss + sum((m * noise(m.shape)).sum() for m in out.attentions), out

        grad = jax.jit(jax.grad(run, has_aux=True), static_argnums=1)
        want, plain_out = grad(plain.params, plain)
        got, out = grad(stack_layers(plain.params), model)
        check_gradients(unstack_layers(got), want, BOUNDS["gradients float64"])
        for mine, theirs in zip(jax.tree.leaves(out), jax.tree.leaves(plain_out), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=BOUNDS["twins float64"])
    states = map(np.asarray, plain_out.hidden_states)
    assert min(abs(a - b).max() for a, b in itertools.pairwise(states)) > 0.1


def test_every_block_draws_its_own_masks():
    config = make_config(num_hidden_layers=3, attention_probs_dropout_prob=0.5)
    plain = flax_twin(vit_flax.FlaxViTModel, config, random_weights(config))
    model, params = scanned(config), stack_layers(plain.params)
    x = images(config).astype(np.float32)

    def dropped(seed):
        out = model(
            x, params=params, train=True, dropout_rng=jax.random.key(seed), output_attentions=True
        )
        return [np.asarray(p) == 0 for p in out.attentions]

    masks = dropped(0)
    assert all(abs(mask.mean() - 0.5) < 0.05 for mask in masks)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs((masks[one] == masks[other]).mean() - 0.5) < 0.05
    np.testing.assert_array_equal(dropped(0), masks)
    assert not np.array_equal(dropped(1), masks)


# -- parameters


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("head", [None, "classifier"])
def test_stack_and_unstack_are_inverses(head, dtype):
    config = make_config(num_hidden_layers=11)  # "10" sorts before "2"
    tree = flax_tree(random_weights(config, head), dtype)
    stacked = stack_layers(tree)
    for path, array in flatten_dict(stacked).items():
        if "stacked" not in path:
            continue
        place = path.index("stacked")
        parts = [flatten_dict(tree)[(*path[:place], str(i), *path[place + 1 :])] for i in range(11)]
        np.testing.assert_array_equal(array, np.stack(parts))
    assert bits(unstack_layers(stacked)) == bits(tree)
    assert bits(stack_layers(unstack_layers(stacked))) == bits(stacked)
    assert bits(stack_layers(stacked)) == bits(stacked)
    assert bits(unstack_layers(tree)) == bits(tree)
    assert bits(stack_layers(freeze(tree))) == bits(stacked)


def test_stacking_leaves_arrays_on_the_host():
    tree = jax.tree.map(np.asarray, flax_tree(random_weights(make_config())))
    stacked = stack_layers(tree)
    parts = unstack_layers(stacked)
    assert all(type(a) is np.ndarray for a in jax.tree.leaves([stacked, parts]))
    assert bits(parts) == bits(tree)


def without(tree, *path: str):
    tree = copy.deepcopy(tree)
    inner = tree
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return tree


def test_blocks_that_are_not_alike_are_refused():
    tree = flax_tree(random_weights(make_config("5 layers")))
    with pytest.raises(InputError, match=r"layer/stacked/.*there is none of 2\.$"):
        stack_layers(without(tree, "encoder", "layer", "2"))
    with pytest.raises(InputError, match=r"layernorm_before/bias is stacked .* there is none of 1"):
        stack_layers(without(tree, "encoder", "layer", "1", "layernorm_before", "bias"))
    with pytest.raises(InputError, match="blocks must have the same parameters to be stacked"):
        stack_layers(without(tree, "encoder", "layer", "4", "layernorm_before", "bias"))
    norm = tree["encoder"]["layer"]["3"]["layernorm_after"]
    norm["scale"] = norm["scale"].astype(jnp.bfloat16)
    with pytest.raises(InputError, match=r"alike in all blocks .* bfloat16 \(48,\); float32"):
        stack_layers(tree)


def test_parameters_of_a_scanned_model():
    config = make_config("5 layers")
    plain = vit_flax.FlaxViTForImageClassification(config, seed=3)
    model = vit_flax.FlaxViTForImageClassification(config, seed=3, scan_layers=True)
    assert model.scan_layers
    assert not plain.scan_layers
    stacked = stack_layers(plain.params)
    assert bits(model.params) == bits(stacked)
    flat = flatten_dict(stacked)
    assert model.required_params == set(flat)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), stacked)
    assert model.params_shape_tree == shapes
    drawn = jax.eval_shape(
        model.module.init, jax.random.key(0), jnp.zeros((1, 32, 32, config.num_channels))
    )
    assert drawn["params"] == shapes

    with pytest.raises(InputError, match=r"one by one, .*pass `vit_flax.stack_layers\(params\)`"):
        model.params = plain.params
    with pytest.raises(InputError, match=r"stacked blocks, .*`vit_flax.unstack_layers\(params\)`"):
        plain.params = stacked
    with pytest.raises(InputError, match=r"query/kernel must have shape \(5, 48, 48\); given \(4"):
        model.params = jax.tree.map(lambda a: a[:4] if a.shape[0] == 5 else a, stacked)
    model.params = jax.tree.map(lambda a: 2 * a, stacked)
    assert bits(model.params) == bits(jax.tree.map(lambda a: 2 * a, stacked))

    lacking = without(plain.params, "classifier", "bias")
    for params in (lacking, stack_layers(lacking)):
        assert bits(model.init_weights(jax.random.key(1), params=params)) == bits(stacked)
    with pytest.raises(InputError, match="`scan_layers` must be True or False; given 'yes'"):
        vit_flax.FlaxViTModel(config, scan_layers="yes")


def test_files_are_those_of_the_blocks_one_by_one(tmp_path):
    config = make_config(num_hidden_layers=3)
    plain = flax_twin(vit_flax.FlaxViTModel, config, random_weights(config))
    model = vit_flax.FlaxViTModel(config, seed=1, scan_layers=True)
    model.params = stack_layers(plain.params)
    for safe in (True, False):
        one_by_one, scanned = (tmp_path / kind / "model" for kind in ("plain", "scanned"))
        plain.save_pretrained(one_by_one, safe_serialization=safe)
        model.save_pretrained(scanned, safe_serialization=safe)
        files = {path.name: path.read_bytes() for path in one_by_one.iterdir()}
        assert {path.name: path.read_bytes() for path in scanned.iterdir()} == files
        again = vit_flax.FlaxViTModel.from_pretrained(scanned, scan_layers=True)
        assert bits(again.params) == bits(model.params)
    model.save_pretrained(tmp_path / "given", params=stack_layers(plain.params))
    loaded, params = vit_flax.FlaxViTModel.from_pretrained(
        tmp_path / "given", _do_init=False, scan_layers=True
    )
    assert bits(params) == bits(model.params)
    assert bits(loaded.to_bf16(params)) == bits(stack_layers(plain.to_bf16(plain.params)))


def test_copies_and_pickles():
    config = make_config()
    model = vit_flax.FlaxViTModel(config, scan_layers=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.scan_layers
        assert bits(twin.params) == bits(model.params)


def test_a_classifier_of_images(tmp_path):
    config = make_config(num_hidden_layers=2)
    weights = random_weights(config, "classifier")
    cls = vit_flax.FlaxViTForImageClassification
    flax_twin(cls, config, weights).save_pretrained(tmp_path)
    ViTImageProcessor(size=32).save_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    plain, model = (
        ImageClassifier.from_pretrained(tmp_path, scan_layers=flag) for flag in (False, True)
    )
    assert model.model.scan_layers
    for got, want in zip(model(image), plain(image), strict=True):
        assert got.label == want.label
        assert abs(got.probability - want.probability) < 2e-6
    got, want = (c.features(image, layers=[0, 1]) for c in (model, plain))
    np.testing.assert_allclose(got, want, atol=BOUNDS["twins float32"])


# -- what is kept for the gradient


@pytest.fixture(scope="module")
def network():
    """A configuration, parameters in float64, and their gradient without checkpointing."""
    config = make_config(num_hidden_layers=2)
    with jax.enable_x64(True):
        params = flax_tree(random_weights(config), jnp.float64)
        return config, params, jax.jit(jax.grad(loss_of(exact(config))))(params)


def exact(config, scan: bool = False):
    return scanned(config, dtype=jnp.float64, attn_implementation="eager", scan_layers=scan)


def loss_of(model):
    x = images(model.config)
    return lambda params: (model(x, params=params).pooler_output ** 2).sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "scan"),
    [
        ("dots_with_no_batch_dims_saveable", False),
        ("nothing_saveable", True),
        pytest.param("nothing_saveable", False, marks=pytest.mark.slow),
        pytest.param("dots_saveable", True, marks=pytest.mark.slow),
    ],
)
def test_policies_change_no_gradient(policy, scan, network):
    config, params, want = network
    with jax.enable_x64(True):
        model = exact(config, scan)
        model.enable_gradient_checkpointing(policy)
        given = stack_layers(params) if scan else params
        got = jax.jit(jax.grad(loss_of(model)))(given)
        check_gradients(unstack_layers(got), want, BOUNDS["gradients float64"])


@pytest.mark.parametrize("scan", [False, True])
def test_what_a_policy_keeps_is_not_computed_again(scan, network):
    """Matrix products of a block's forward pass that the gradient's program has: six with weights
    and two of attention."""
    config, *_ = network

    def products(policy=None):
        model = scanned(config, attn_implementation="eager", scan_layers=scan)
        if policy is not None:
            model.enable_gradient_checkpointing(policy)
        text = str(jax.make_jaxpr(jax.grad(loss_of(model)))(model.params_shape_tree))
        return text.count("dot_general")

    assert config.num_hidden_layers == 2
    blocks = 1 if scan else 2
    least = products()
    found = [products(policy) - least for policy in REMAT_POLICIES]
    print(scan, found)
    assert found[0] > found[1] > found[2] == found[3] == 0, blocks


def test_a_policy_that_is_none(network):
    model = scanned(network[0])
    with pytest.raises(InputError, match=r"`policy` must be one of 'nothing_.*; given 'all'"):
        model.enable_gradient_checkpointing("all")
    model.enable_gradient_checkpointing("dots_saveable")
    assert model.module.config.gradient_checkpointing
    model.disable_gradient_checkpointing()
    assert not model.module.config.gradient_checkpointing
