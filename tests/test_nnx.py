"""The models as NNX modules: the same numbers as the linen models, whatever NNX does with them.

The peers are the linen model, `jax.grad` and `flax.nnx.bridge.ToNNX`; that the linen models are
right is shown elsewhere.
"""

from __future__ import annotations

import copy
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from kinds import SIZES
from networks import CONFIGS, SMALL, flax_twin, images, random_weights

import vit_flax
from vit_common.config import ViTConfig
from vit_common.errors import CheckpointError, InputError, MissingFileError
from vit_flax.nnx import NNXModel, NNXPart, Quantized, from_linen, from_pretrained, to_linen

ROOT = Path(__file__).parents[1]
TINY = {
    **SMALL, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 20,
    "image_size": 16, "num_labels": 3,
}  # fmt: skip
WITH_TEXT = re.compile("CLIP|Siglip")
IDS = np.array([[1, 5, 6, 49, 0], [1, 9, 49, 0, 0]])


class Case(NamedTuple):
    """A class of models, the fields of its configuration, and further arguments."""

    name: str
    fields: dict[str, Any]
    options: dict[str, Any] = {}  # noqa: RUF012  (read alone)


SIGLIP_TEXT = {"vocab_size": 50, "max_position_embeddings": 5, "projection_size": 16}
SIGLIP = {"vision_config": TINY, "text_config": {**TINY, **SIGLIP_TEXT}}
SIGLIP2 = {
    "vision_config": {**TINY, "num_patches": 4},
    "text_config": {**TINY, **SIGLIP_TEXT},
}
TEXT = {"vocab_size": 50, "max_position_embeddings": 10, "eos_token_id": 49, "projection_dim": 20}
CLIP = {
    "vision_config": {**TINY, "projection_dim": 20},
    "text_config": {**TINY, **TEXT},
    "projection_dim": 20,
}
WHOLE = {"CLIPConfig": CLIP, "SiglipConfig": SIGLIP, "Siglip2Config": SIGLIP2}
FAMILY_FIELDS = {
    "FlaxBeit": {"use_mask_token": True, "use_relative_position_bias": True, "vocab_size": 11},
    "FlaxDinov2WithRegisters": {"num_register_tokens": 2},
    "FlaxCLIPText": TEXT,
    "FlaxSiglipText": SIGLIP_TEXT,
    "FlaxSiglip2Text": SIGLIP_TEXT,
    "FlaxSiglip2Vision": {"num_patches": 4},
    "FlaxCLIPVision": {"projection_dim": 20},
}


def public_models() -> list[Case]:
    """Every model class that the package hands out, once under each of its names' first."""
    cases: dict[type, Case] = {}
    for name in vit_flax.__all__:
        cls = getattr(vit_flax, name)
        if not inspect.isclass(cls) or getattr(cls, "module_class", None) is None:
            continue
        fields = next((more for start, more in FAMILY_FIELDS.items() if name.startswith(start)), {})
        fields = WHOLE.get(cls.config_class.__name__, {**TINY, **fields})
        cases.setdefault(cls, Case(name, fields))
    return [*cases.values()]


MODELS = {case.name: case for case in public_models()}
KINDS = {
    **{f"vit, {name}": Case("FlaxViTModel", {**SMALL, **more}) for name, more in CONFIGS.items()},
    **{name: Case("FlaxViTModel", {**SIZES, **more}) for name, more in kinds.KINDS.items()},
    "scanned": Case("FlaxViTModel", TINY, {"scan_layers": True}),
    "scanned CLIP": Case("FlaxCLIPModel", CLIP, {"scan_layers": True}),
    "checkpointed": Case("FlaxViTModel", {**TINY, "gradient_checkpointing": True}),
}  # fmt: skip
QUICK = ("FlaxViTForImageClassification",)
CASES = [
    pytest.param(case, id=name, marks=[] if name in QUICK else pytest.mark.slow)
    for name, case in (MODELS | KINDS).items()
]


def linen_of(case: Case, dtype: Any = jnp.float64) -> Any:
    """The linen model, every parameter at random."""
    cls = getattr(vit_flax, case.name)
    config = cls.config_class(**case.fields)
    model = cls(config, _do_init=False, dtype=dtype, param_dtype=dtype, **case.options)
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> jax.Array:
        scale = 1 / np.sqrt(leaf.shape[-2]) if len(leaf.shape) > 1 else 0.3
        return jnp.asarray(scale * rng.normal(size=leaf.shape), dtype)

    model._is_initialized = True
    model.params = jax.tree.map(draw, model.params_shape_tree)
    return model


def inputs_of(model: Any) -> dict[str, Any]:
    names = inspect.signature(type(model).__call__).parameters
    given: dict[str, Any] = {"input_ids": IDS} if "input_ids" in names else {}
    if "pixel_values" in names:
        given["pixel_values"] = images(getattr(model.config, "vision_config", None) or model.config)
    return given


def same(got: Any, want: Any, tolerance: float = 0.0) -> None:
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_linen_in_float64(case):
    """Outputs to the bit, the tree back to the bit, and every part by its name."""
    with jax.enable_x64(True):
        linen = linen_of(case)
        model = from_linen(linen)
        given = inputs_of(linen)
        back = to_linen(model)
        assert type(back) is type(linen)
        for path, value in flatten_dict(linen.network_params).items():
            part = model
            for name in path:
                part = part[name] if name.isdecimal() else getattr(part, name)
            # No copy, but of CLIP's class token, which has other axes in Transformers' tree.
            assert part.get_value() is value or WITH_TEXT.search(case.name)
            same(part.get_value(), value)
        same(nnx.jit(lambda m, x: m(**x))(model, given), linen(**given))
        for tree in (back.params, to_linen(model).params):  # before and after a compiled function
            assert jax.tree.structure(tree) == jax.tree.structure(linen.params)
            same(tree, linen.params)


@pytest.fixture(name="linen", scope="module")
def linen_fixture() -> Any:
    few = {**TINY, "num_hidden_layers": 1}
    config = ViTConfig(**few, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
    weights = random_weights(config, "classifier")
    return flax_twin(vit_flax.FlaxViTForImageClassification, config, weights)


@pytest.fixture(name="base", scope="module")
def base_fixture(linen) -> NNXModel:
    """Tests take `nnx.clone`s: what one of them has compiled is there for all."""
    return from_linen(linen)


@pytest.fixture(name="x", scope="module")
def x_fixture() -> np.ndarray:
    return images(ViTConfig(**TINY)).astype(np.float32)


LABELS = np.array([0, 2])


def test_split_merge_gradients_and_an_optimizer(linen, base, x):
    """The state is linen's tree, gradients are those of `jax.grad`, three steps those of optax."""
    model = nnx.clone(base)
    graphdef, state = nnx.split(model)
    same(nnx.merge(graphdef, state)(x), linen(x))
    tree = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert jax.tree.structure(tree) == jax.tree.structure(linen.params)

    tx = optax.adamw(1e-2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        loss, gradients = nnx.value_and_grad(lambda m: m(x, labels=LABELS).loss)(model)
        optimizer.update(model, gradients)
        return loss, nnx.to_pure_dict(gradients)

    @jax.jit
    def linen_step(params, state, x):
        loss, gradients = jax.value_and_grad(lambda p: linen(x, params=p, labels=LABELS).loss)(
            params
        )
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss, gradients

    params, moments = linen.params, tx.init(linen.params)
    for _ in range(3):
        found = step(model, optimizer, x)
        params, moments, *wanted = linen_step(params, moments, x)
        same(found, tuple(wanted), 2e-5)
    same(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params, 2e-5)


def test_dropout_follows_the_mode_and_the_rngs(linen, base, x):
    model = from_linen(linen, rngs=nnx.Rngs(dropout=3))
    same(model(x), linen(x))
    model.train()
    stream = nnx.Rngs(dropout=nnx.Rngs(dropout=3).dropout())  # what the model was given
    for _ in range(2):
        same(model(x), linen(x, dropout_rng=stream.dropout(), train=True))
    key = jax.random.key(5)
    same(model(x, rngs=key), linen(x, dropout_rng=key, train=True))
    same(model(x, deterministic=True), linen(x))
    model.eval()
    same(model(x), linen(x))
    with pytest.raises(InputError, match=r"rngs=nnx\.Rngs"):
        base(x, deterministic=False)
    with pytest.raises(InputError, match="no stream for dropout"):
        base(x, rngs=nnx.Rngs(params=0), deterministic=False)


@pytest.mark.slow
def test_a_part_keeps_its_own_mode(linen, x):
    """A backbone in evaluation mode drops nothing while the rest trains; and the other way."""
    model = from_linen(linen, rngs=nnx.Rngs(0))
    model.train()
    model.vit.eval()
    run = nnx.jit(lambda m: m(x).logits)
    same(run(model), linen(x).logits, 1e-5)
    model.eval()
    model.vit.embeddings.train()
    key = jax.random.key(2)
    hidden = model.vit.embeddings(x.transpose(0, 2, 3, 1), rngs=key)
    plain = model.vit.embeddings(x.transpose(0, 2, 3, 1), deterministic=True)
    assert float(jnp.mean(hidden == 0)) > 0.2
    assert not float(jnp.mean(plain == 0))
    assert abs(run(model) - linen(x).logits).max() > 1e-3


@pytest.mark.slow
def test_parts_are_called_by_themselves(linen, base, x):
    """Each part gives what the same part gives inside the network."""
    model = nnx.clone(base)
    states = linen(x, output_hidden_states=True).hidden_states
    hidden = model.vit.embeddings(x.transpose(0, 2, 3, 1))
    same(hidden, states[0], 1e-5)
    for block, wanted in zip(model.vit.encoder.layer, states[1:], strict=True):
        hidden, _ = block(hidden)
        same(hidden, wanted, 1e-4)
    logits = model.classifier(model.vit.layernorm(hidden)[:, 0])
    same(logits, linen(x).logits, 1e-4)
    # As Flax's own bridge runs that linen module.
    bridged = nnx.bridge.ToNNX(model.vit.encoder.layer[0].module)
    for name, value in linen.params["vit"]["encoder"]["layer"]["0"].items():
        setattr(bridged, name, nnx.data(jax.tree.map(nnx.Param, value)))
    same(model.vit.encoder.layer[0](states[0])[0], bridged(states[0])[0], 1e-6)
    assert len(model.vit.encoder.layer) == 1
    assert isinstance(model.vit.encoder.layer[0], NNXPart)


class Doubled(nnx.Module):
    """A foreign module around a part."""

    def __init__(self, part):
        self.part = part

    def __call__(self, *args, **kwargs):
        return jax.tree.map(lambda y: 2 * y, self.part(*args, **kwargs))


def test_a_head_of_another_kind(linen, base, x):
    model = nnx.clone(base)
    width = model.config.hidden_size
    model.classifier = nnx.Linear(width, 7, rngs=nnx.Rngs(0))
    token = linen(x, output_hidden_states=True).hidden_states[-1]
    wanted = model.classifier(base.vit.layernorm(token)[:, 0])
    same(nnx.jit(lambda m: m(x).logits)(model), wanted, 1e-4)
    for refused in (to_linen, lambda m: m.save_pretrained("x")):
        with pytest.raises(InputError, match="in the place of classifier"):
            refused(model)


@pytest.mark.slow
def test_other_modules_take_the_place_of_parts(linen, base, x):
    """A LoRA, and a module around a part with parameters of its own."""
    model = nnx.clone(base)
    width = model.config.hidden_size
    attention = model.vit.encoder.layer[0].attention.attention
    attention.query = nnx.LoRA(width, 2, width, base_module=attention.query, rngs=nnx.Rngs(1))
    same(nnx.jit(lambda m: m(x).logits)(model), linen(x).logits, 1e-4)  # its second factor is zero
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    gradients = nnx.jit(nnx.grad(lambda m: m(x, labels=LABELS).loss, argnums=wrt))(model)
    assert len(jax.tree.leaves(gradients)) == 2

    model = nnx.clone(base)
    model.vit.embeddings = Doubled(model.vit.embeddings)
    params = copy.deepcopy(linen.params)
    for name in ("cls_token", "position_embeddings"):
        params["vit"]["embeddings"][name] = 2 * params["vit"]["embeddings"][name]
    projection = params["vit"]["embeddings"]["patch_embeddings"]["projection"]
    projection |= {name: 2 * value for name, value in projection.items()}
    same(nnx.jit(lambda m: m(x).logits)(model), linen(x, params=params).logits, 1e-4)


def test_checkpoints_are_read_into_the_parameters(linen, x, tmp_path, monkeypatch):
    """No initialiser runs, and what is saved is what linen saves."""
    linen.save_pretrained(tmp_path / "linen")

    def never(*args, **kwargs):
        raise AssertionError("a parameter was drawn")

    for name in ("normal", "uniform", "truncated_normal"):
        monkeypatch.setattr(jax.random, name, never)
    cls = vit_flax.FlaxAutoModelForImageClassification
    model, info = from_pretrained(cls, tmp_path / "linen", output_loading_info=True)
    assert info["missing_keys"] == []
    same(model(x), linen(x), 1e-6)
    model.save_pretrained(tmp_path / "nnx")
    files = [(tmp_path / at / "model.safetensors").read_bytes() for at in ("linen", "nnx")]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("activations", [None, "int8"])
def test_integers_are_no_params(linen, x, activations, tmp_path):
    linen.save_pretrained(tmp_path)
    options = {"weights": "int8", "activations": activations}
    wanted = vit_flax.FlaxViTForImageClassification.from_pretrained(tmp_path, **options)
    model = from_pretrained(vit_flax.FlaxViTForImageClassification, tmp_path, **options)
    same(nnx.jit(lambda m: m(x).logits)(model), wanted(x).logits)
    kernel = model.vit.encoder.layer[0].intermediate.dense.kernel
    assert isinstance(kernel, Quantized)
    assert kernel.dtype == jnp.int8
    gradients = nnx.grad(lambda m: m(x, labels=LABELS).loss)(model)  # of the nnx.Params
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))
    same(to_linen(model).params, wanted.params)
    with pytest.raises(InputError, match=r"no file can: .*kernel_scale"):
        model.save_pretrained(tmp_path / "no")


@pytest.mark.slow
def test_half_precision_is_that_of_linen(x, tmp_path):
    half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    cls = vit_flax.FlaxViTForImageClassification
    cls(ViTConfig(**TINY)).save_pretrained(tmp_path)
    model = from_pretrained(cls, tmp_path, **half)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {
        jnp.dtype("bfloat16")
    }
    same(model(x), cls.from_pretrained(tmp_path, **half)(x))


@pytest.mark.slow
def test_clips_other_methods(x):
    case = MODELS["FlaxCLIPModel"]
    linen = linen_of(case, jnp.float32)
    model = from_linen(linen)
    same(model.get_image_features(x), linen.get_image_features(x))
    same(model.get_text_features(IDS), linen.get_text_features(IDS))
    tower = model.vision_model.encoder.layer[0]
    assert tower(jnp.ones((1, 5, 16)))[0].shape == (1, 5, 16)
    model.visual_projection = nnx.Linear(16, 20, rngs=nnx.Rngs(0))
    assert model(IDS, x).logits_per_image.shape == (2, 2)
    with pytest.raises(AttributeError, match="get_image_features"):
        from_linen(linen_of(MODELS["FlaxViTModel"], jnp.float32)).get_image_features(x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpointed", "scanned", "two branches"])
def test_other_modules_inside_lifted_blocks(name, x):
    linen = linen_of(KINDS[name], jnp.float32)
    model = from_linen(linen, rngs=nnx.Rngs(0))
    width = model.config.hidden_size
    model.pooler = nnx.Linear(width, width, rngs=nnx.Rngs(0))
    model.pooler.eval()
    if name != "scanned":
        dense = model.encoder.layer[1].intermediate.dense
        model.encoder.layer[1].intermediate.dense = Doubled(dense)
        grown = nnx.grad(lambda m: jnp.sum(m(x).last_hidden_state ** 2))(model)
        assert len(jax.tree.leaves(grown)) == len(jax.tree.leaves(linen.params))
    else:
        with pytest.raises(InputError, match="scan_layers"):
            model.encoder.layer["stacked"](jnp.ones((1, 5, 16)))


def without(tree: dict, *path: str) -> dict:
    tree = copy.deepcopy(tree)
    inside = tree
    for name in path[:-1]:
        inside = inside[name]
    del inside[path[-1]]
    return tree


def test_what_does_not_fit_is_refused(linen, base, x, tmp_path):
    cls = vit_flax.FlaxViTForImageClassification
    params = linen.params
    refusals = [
        (lambda: from_linen(nnx.Linear(1, 1, rngs=nnx.Rngs(0))), "given a Linear"),
        (lambda: from_linen(cls), "must be a Flax model"),
        (lambda: from_linen(cls(linen.config, _do_init=False)), "_do_init=False"),
        (lambda: from_linen(linen, without(params, "classifier", "bias")), "classifier/bias"),
        (lambda: from_linen(linen, {**params, "head": jnp.ones(1)}), "has no head"),
        (lambda: from_linen(linen, {"params": params}), "pass what is in it"),
        (lambda: from_linen(linen, jax.tree.map(lambda a: a[None], params)), "must have shape"),
        (lambda: from_linen(linen, rngs=3), "random key"),
        (lambda: to_linen(linen), "must be an NNX model"),
        (lambda: from_pretrained(linen, "x"), "must be a Flax model class"),
        (lambda: from_pretrained("ViT", "x"), "must be a Flax model class"),
        (lambda: from_pretrained(cls, tmp_path, _do_init=False), "_do_init"),
        (lambda: base(x, params), "1 argument by position"),
        (lambda: base(x, train=True), "`train` is an argument of the linen"),
        (lambda: base(x[0]), "batch, channels, height, width"),
    ]
    for run, words in refusals:
        with pytest.raises(InputError, match=words):
            run()
    with pytest.raises(MissingFileError):
        from_pretrained(cls, tmp_path / "nothing")
    (tmp_path / "model.safetensors").write_bytes(b"{}")
    linen.config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        from_pretrained(cls, tmp_path)
    model = nnx.clone(base)
    del model.classifier.bias
    for run in (lambda: model(x), lambda: to_linen(model)):
        with pytest.raises(InputError, match="classifier/bias"):
            run()
    with pytest.raises(KeyError, match="has 0"):
        model.vit.encoder.layer[7]
    with pytest.raises(AttributeError):
        _ = model.nothing
    assert isinstance(model, NNXModel)


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/nnx_fine_tune.py"), "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    accuracy = re.fullmatch(r"held-out accuracy: ([01]\.\d+)\n", done.stdout)
    assert accuracy, done.stdout
    assert float(accuracy[1]) > 0.8  # guessing gives 0.5
    assert vit_flax.ViTConfig.from_pretrained(tmp_path).id2label == {0: "even", 1: "odd"}
