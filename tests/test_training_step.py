"""One training step beside PyTorch's: the same network, loss and optimizer, step by step."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from networks import flax_tree, flax_twin, make_config, random_weights
from timm_models import timm  # noqa: F401

from vit_common.errors import InputError
from vit_common.recipes import recipe
from vit_flax import FlaxViTForImageClassification
from vit_flax.int8 import quantize
from vit_flax.training import Ema, TrainState, cross_entropy, make_optimizer, make_step

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "image_size": 8, "patch_size": 4}
STEPS = 5
# name -> optax's optimizer, torch's with the same arguments
OPTIMIZERS = {
    "SGD with momentum": (
        optax.sgd(0.1, momentum=0.9),
        lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    ),
    "AdamW": (
        optax.adamw(1e-2, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.1),
        lambda parameters: torch.optim.AdamW(
            parameters, 1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1
        ),
    ),
}


def batches(count=STEPS, dtype=np.float64):
    rng = np.random.default_rng(3)
    return [
        {
            "pixel_values": rng.normal(size=(4, 3, 8, 8)).astype(dtype),
            "labels": rng.integers(0, 5, 4),
        }
        for _ in range(count)
    ]


def pair(dtype):
    """Our model, and Transformers' with the same weights."""
    config = make_config(**SIZES)
    weights = random_weights(config, "classifier")
    reference = transformers.ViTForImageClassification(
        transformers.ViTConfig(**config.to_dict())
    ).to(torch.float64)
    reference.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    ours = flax_twin(FlaxViTForImageClassification, config, weights, dtype)
    return ours, reference


@pytest.mark.parametrize(
    ("name", "smoothing"), [("SGD with momentum", 0.1), ("AdamW", 0.0)], ids=[*OPTIMIZERS]
)
def test_steps_are_those_of_torch(name, smoothing):
    """Parameters, losses and norms of gradients, in float64."""
    ours, theirs = OPTIMIZERS[name]
    with jax.enable_x64(True):
        model, reference = pair(jnp.float64)
        optimizer = theirs(reference.parameters())
        step = make_step(model, cross_entropy(smoothing), ours)
        first = flatten_dict(jax.tree.map(np.asarray, model.params))
        state = TrainState.create(model, ours)
        for batch in batches():
            logits = reference(torch.tensor(batch["pixel_values"])).logits
            loss = torch.nn.functional.cross_entropy(
                logits, torch.tensor(batch["labels"]), label_smoothing=smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), float("inf"))
            optimizer.step()
            state, metrics = step(state, batch)
            assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-10)
            assert metrics["gradient_norm"] == pytest.approx(norm.item(), rel=1e-10)
        after = {name: each.detach().numpy() for name, each in reference.named_parameters()}
        wanted = flatten_dict(flax_tree(after, jnp.float64))
        for path, value in flatten_dict(state.params).items():
            np.testing.assert_allclose(value, wanted[path], rtol=0, atol=1e-10, err_msg=path)
            assert path[-2] == "key" or np.abs(value - first[path]).max() > 1e-3
        assert step._cache_size() == 1


def test_a_module_takes_the_same_step():
    """A `flax.linen.Module`, which has no parameters of its own; images with channels last."""
    model, _ = pair(jnp.float32)
    optimizer = optax.sgd(0.1)
    found = []
    for network, axes in ((model, (0, 1, 2, 3)), (model.module, (0, 2, 3, 1))):
        step = make_step(network, cross_entropy(), optimizer, donate=False)
        batch = batches(1, np.float32)[0]
        batch["pixel_values"] = batch["pixel_values"].transpose(axes)
        state = TrainState.create(network, optimizer, params=model.params)
        found.append(step(state, batch)[0].params)
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


class Half(nn.Module):
    """Dropout at a rate of one half, on one number per image."""

    @nn.compact
    def __call__(self, x, deterministic):
        weight = self.param("weight", nn.initializers.ones, (1,))
        return nn.Dropout(0.5, deterministic=deterministic)(x * weight)


def test_dropout_is_on_and_its_key_decides():
    step = make_step(Half(), lambda outputs, batch: outputs.sum(), optax.sgd(1.0), donate=False)
    params = {"weight": jnp.ones(1)}
    batch = {"pixel_values": jnp.ones((64, 1))}
    state = TrainState.create(Half(), optax.sgd(1.0), params=params, key=jax.random.key(3))

    def lost(number):
        return float(step(state.replace(step=jnp.int32(number)), batch)[1]["loss"])

    assert lost(1) == lost(1) != 64
    assert len({lost(i) for i in range(8)}) > 2
    # As Flax itself drops them with the key of the step's first part.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 5), 1)
    kept = Half().apply({"params": params}, batch["pixel_values"], False, rngs={"dropout": key})
    assert lost(5) == float(kept.sum())


def test_half_parameters_train_in_float32():
    """Whatever the file held: small updates would be lost."""
    model, _ = pair(jnp.bfloat16)
    optimizer = optax.adamw(1e-2)
    state = TrainState.create(model, optimizer, ema=0.9)
    state, metrics = make_step(model, cross_entropy(), optimizer, ema=0.9)(
        state, batches(1, np.float32)[0]
    )
    trees = (state.params, state.opt_state[0].mu, state.opt_state[0].nu, state.ema)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trees)} == {"float32"}
    assert {name: value.dtype.name for name, value in metrics.items()} == {
        **dict.fromkeys(("loss", "accuracy", "gradient_norm"), "float32"),
        "finite": "bool",
    }


def test_the_old_state_gives_its_memory():
    model, _ = pair(jnp.float32)
    optimizer = optax.adamw(1e-2)
    state = TrainState.create(model, optimizer)
    step = make_step(model, cross_entropy(), optimizer)
    step(state, batches(1, np.float32)[0])
    old = (state.params, state.opt_state[0].mu, state.opt_state[0].nu)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(model.params))


def test_a_state_may_take_the_memory_of_the_model():
    model, _ = pair(jnp.float32)
    optimizer = optax.adamw(1e-2)
    kernel = model.params["classifier"]["kernel"]
    params = {**model.params, "tied": kernel}  # the memory of none is taken twice
    step = make_step(
        lambda params, batch, key: model(batch["pixel_values"], params=plain(params)),
        cross_entropy(),
        optimizer,
    )
    plain = lambda params: {n: tree for n, tree in params.items() if n != "tied"}  # noqa: E731
    batch = batches(1, np.float32)[0]
    wanted, _ = step(TrainState.create(model, optimizer, params=params), batch)
    found, _ = step(TrainState.create(model, optimizer, params=params, copy=False), batch)
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(model.params))
    model.params = plain(found.params)
    assert np.isfinite(model(batch["pixel_values"]).logits).all()


def test_labels_may_be_probabilities_and_a_loss_may_tell_more():
    """Mixed labels, as torch takes them."""
    logits = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    targets = np.random.default_rng(1).dirichlet(np.ones(5), 4).astype(np.float32)

    class Logits(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic):
            self.param("unused", nn.initializers.ones, (1,))
            return transformers.modeling_flax_outputs.FlaxSequenceClassifierOutput(logits=x)

    def loss(outputs, batch):
        total = cross_entropy(0.2)(outputs, batch)
        return total.sum / total.count, {"largest": outputs.logits.max()}

    step = make_step(Logits(), loss, optax.sgd(1.0), donate=False)
    batch = {"pixel_values": logits, "labels": targets}
    state = TrainState.create(Logits(), optax.sgd(1.0), params={"unused": jnp.ones(1)})
    metrics = step(state, batch)[1]
    wanted = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(targets), label_smoothing=0.2
    )
    assert metrics["loss"] == pytest.approx(wanted.item(), rel=1e-6)
    assert metrics["largest"] == logits.max()
    assert metrics["gradient_norm"] == 0.0


def test_what_cannot_be_trained():
    model, _ = pair(jnp.float32)
    optimizer = optax.sgd(0.1)
    batch = batches(1, np.float32)[0]
    with pytest.raises(InputError, match=r"kernel is int8, which cannot be trained"):
        TrainState.create(model, optimizer, params=quantize(model.params))
    state = TrainState.create(model, optimizer)
    step = make_step(model, cross_entropy(), optimizer)
    with pytest.raises(InputError, match=r"kernel is int8, which cannot be trained"):
        step(state.replace(params=quantize(model.params)), batch)
    step = make_step(model, lambda outputs, batch: outputs.logits, optimizer)
    with pytest.raises(InputError, match=r"one number for the batch; given shape \(4, 5\)"):
        step(state, batch)


# -- batches in parts, averages, frozen parameters, and what is not finite


class Small(nn.Module):
    """A network that compiles quickly: (B, H, W, C) to logits (B, 5)."""

    @nn.compact
    def __call__(self, x, deterministic):
        x = nn.LayerNorm(name="layernorm")(x.reshape(len(x), -1))
        x = nn.gelu(nn.Dense(16, name="dense")(x))
        logits = nn.Dense(5, name="classifier")(x)
        return transformers.modeling_flax_outputs.FlaxSequenceClassifierOutput(logits=logits)


def small(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    params = {
        "layernorm": {"scale": rng.normal(1, 0.1, 12), "bias": rng.normal(0, 0.1, 12)},
        "dense": {"kernel": rng.normal(0, 0.3, (12, 16)), "bias": rng.normal(0, 0.1, 16)},
        "classifier": {"kernel": rng.normal(0, 0.3, (16, 5)), "bias": rng.normal(0, 0.1, 5)},
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def given(size=8, dtype=np.float32):
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 5, size)
    labels[[1, 6]] = -100
    weights = np.ones(size, np.float32)
    weights[[0, 3]] = 0, 0
    pixels = rng.normal(size=(size, 2, 2, 3)).astype(dtype)
    return {"pixel_values": pixels, "labels": labels, "weights": weights}


def one_step(batch, loss=None, dtype=jnp.float32, optimizer=None, **options):
    loss = cross_entropy(0.1) if loss is None else loss
    optimizer = optimizer or optax.adamw(1e-2)
    kept = {name: options[name] for name in ("ema", "trainable") if name in options}
    state = TrainState.create(Small(), optimizer, params=small(dtype), **kept)
    step = make_step(Small(), loss, optimizer, donate=False, **options)
    return state, *step(state, batch)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_parts_of_a_batch_take_the_step_of_the_whole():
    """Although they hold 0, 1 or 2 labels that count, of classes of unequal weights."""
    loss = cross_entropy(0.1, [0.2, 1.0, 3.0, 0.5, 2.0])
    with jax.enable_x64(True):
        found = {
            parts: one_step(given(dtype=np.float64), loss, jnp.float64, accumulate=parts)[1:]
            for parts in (1, 2, 4, 8)
        }
        for parts in (2, 4, 8):
            for one, other in zip(
                jax.tree.leaves((found[1][0].params, found[1][0].opt_state, found[1][1])),
                jax.tree.leaves(
                    (found[parts][0].params, found[parts][0].opt_state, found[parts][1])
                ),
                strict=True,
            ):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-13)
    # That step is torch's, on the rows that count.
    batch = given(dtype=np.float64)
    kept = (batch["weights"] > 0) & (batch["labels"] >= 0)
    pixels = torch.tensor(batch["pixel_values"][kept]).reshape(-1, 12)
    p = jax.tree.map(
        lambda leaf: torch.tensor(np.asarray(leaf, np.float64), requires_grad=True), small()
    )
    x = torch.nn.functional.layer_norm(
        pixels, (12,), p["layernorm"]["scale"], p["layernorm"]["bias"], 1e-6
    )
    x = torch.nn.functional.gelu(x @ p["dense"]["kernel"] + p["dense"]["bias"], approximate="tanh")
    wanted = torch.nn.functional.cross_entropy(
        x @ p["classifier"]["kernel"] + p["classifier"]["bias"],
        torch.tensor(batch["labels"][kept]),
        torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0]).double(),
        label_smoothing=0.1,
    )
    wanted.backward()
    norm = torch.stack([leaf.grad.norm() for leaf in jax.tree.leaves(p)]).norm()
    assert found[8][1]["loss"] == pytest.approx(wanted.item(), rel=1e-6)
    assert found[8][1]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-6)


def test_a_batch_that_cannot_be_divided():
    with pytest.raises(InputError, match=r"8 images .* by `accumulate`=3; wanted a multiple of 3"):
        one_step(given(), accumulate=3)
    for wrong in (0, -1, True, 2.0):
        with pytest.raises(InputError, match="`accumulate` must be a positive integer"):
            one_step(given(), accumulate=wrong)


@pytest.mark.parametrize("rule", ["plain", "warmup"])
def test_averages_are_those_of_timm(rule):
    """`ModelEmaV3` with `use_warmup`; without, as DeiT's, which has no first step of its own."""
    utils = importlib.import_module("timm.utils.model_ema")
    network = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(16, 5).double())])
    average = Ema(0.6, rule)
    with jax.enable_x64(True):
        optimizer = optax.sgd(0.5)
        state = TrainState.create(Small(), optimizer, params=small(jnp.float64), ema=average)
        step = make_step(Small(), cross_entropy(), optimizer, ema=average)
        network[0].data = torch.tensor(np.asarray(state.params["classifier"]["kernel"]))
        reference = utils.ModelEmaV3(network, decay=0.6, use_warmup=rule == "warmup")
        for i in range(6):
            state, _ = step(state, given(dtype=np.float64))
            network[0].data = torch.tensor(np.asarray(state.params["classifier"]["kernel"]))
            reference.update(network, step=1 + i if rule == "warmup" else None)
            np.testing.assert_allclose(
                state.ema["classifier"]["kernel"],
                reference.module[0].detach().numpy(),
                rtol=0,
                atol=1e-15,
            )
        assert bits(state.averaged) == bits(state.ema) != bits(state.params)
        assert step._cache_size() == 1


def test_frozen_parameters_stay_and_cost_nothing():
    def head(name):
        return name.startswith("classifier")

    state, after, metrics = one_step(given(), trainable=head, ema=0.5, update_norm=True)
    for name in ("layernorm", "dense"):
        assert bits(after.params[name]) == bits(state.params[name])
    assert bits(after.params["classifier"]) != bits(state.params["classifier"])
    assert after.ema.keys() == after.opt_state[0].mu.keys() == {"classifier"}
    averaged = after.averaged
    assert bits(averaged["dense"]) == bits(state.params["dense"])
    assert bits(averaged["classifier"]) == bits(after.ema["classifier"])
    moved = jax.tree.map(jnp.subtract, after.params["classifier"], state.params["classifier"])
    wanted = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(moved)))
    assert metrics["update_norm"] == pytest.approx(wanted, rel=1e-4)
    # The head moves as it does where everything trains.
    _, everything, all_metrics = one_step(given())
    for one, other in zip(
        *(jax.tree.leaves(each.params["classifier"]) for each in (after, everything)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-7)
    assert metrics["gradient_norm"] < all_metrics["gradient_norm"]
    with pytest.raises(InputError, match="no parameter of the model trains"):
        one_step(given(), trainable=lambda name: False)
    model, _ = pair(jnp.float32)
    flops = []
    for trainable in (None, head):
        optimizer = optax.sgd(0.1)
        state = TrainState.create(model, optimizer, trainable=trainable)
        step = make_step(model, cross_entropy(), optimizer, trainable=trainable)
        flops.append(step.lower(state, batches(1, np.float32)[0]).cost_analysis()["flops"])
    assert flops[1] < 0.5 * flops[0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_not_finite_changes_nothing_but_the_count_of_steps(accumulate):
    batch = given()
    batch["pixel_values"][4, 0, 0, 0] = np.nan
    state, after, metrics = one_step(batch, accumulate=accumulate, ema=0.5, update_norm=True)
    assert not metrics["finite"]
    assert metrics["update_norm"] == 0
    assert after.step == 1
    for name in ("params", "opt_state", "ema"):
        assert bits(getattr(after, name)) == bits(getattr(state, name))

    # A gradient may be infinite where the loss is not.
    def steep(outputs, batch):
        return jnp.sqrt(0.0 * outputs.logits.sum())

    state, after, metrics = one_step(given(), steep)
    assert np.isfinite(metrics["loss"])
    assert not metrics["finite"]
    assert bits(after.params) == bits(state.params)


def test_a_batch_without_labels_that_count_changes_nothing():
    """torch's loss of it is 0 / 0."""
    batch = given()
    batch["labels"][:] = -100
    state, after, metrics = one_step(batch, ema=0.5)
    assert metrics["finite"]
    assert metrics["loss"] == metrics["accuracy"] == 0
    for name in ("params", "opt_state", "ema"):
        assert bits(getattr(after, name)) == bits(getattr(state, name))
    # A label that no class has is another matter.
    batch["labels"][5] = 5
    assert not one_step(batch)[2]["finite"]


def test_parameters_stay_float32_where_the_network_computes_in_bfloat16():
    config = make_config(**SIZES)
    model = FlaxViTForImageClassification(config, dtype="bfloat16")
    optimizer = make_optimizer(recipe("fine-tune", steps=9), model, steps=9)
    state = TrainState.create(model, optimizer, ema=0.9)
    step = make_step(model, cross_entropy(), optimizer, ema=0.9, accumulate=2)
    batch = batches(1, np.float32)[0]
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(
        lambda leaf: leaf.dtype, state
    )
    floats = {leaf.dtype.name for leaf in jax.tree.leaves((after.params, after.ema, metrics))}
    assert floats == {"float32", "bool"}
    assert "bf16[" in step.lower(state, batch).as_text(dialect="hlo")


def test_prepare_and_materialize_are_part_of_the_step():
    """The batch is prepared once, as a whole; gradients flow through what makes the parameters."""

    def prepare(batch, key):
        noise = jax.random.normal(key, batch["pixel_values"].shape)
        return {**batch, "pixel_values": batch["pixel_values"] + noise}

    def double(params):
        return {**params, "classifier": {n: 2.0 * p for n, p in params["classifier"].items()}}

    optimizer = optax.sgd(0.1)
    state = TrainState.create(Small(), optimizer, params=small(), key=jax.random.key(7))
    options = {"prepare": prepare, "materialize": double, "donate": False}
    after, _ = make_step(Small(), cross_entropy(), optimizer, **options)(state, given())

    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 0), 0)
    batch = jax.jit(prepare)(given(), key)

    @jax.jit
    @jax.grad
    def gradient(params):
        outputs = Small().apply({"params": double(params)}, batch["pixel_values"], True)
        total = cross_entropy()(outputs, batch)
        return total.sum / total.count

    wanted = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient(state.params))
    for one, other in zip(*map(jax.tree.leaves, (after.params, wanted)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


# -- several devices


SHARDED = """
import json, sys
from pathlib import Path
import jax, numpy as np, optax
from flax.traverse_util import flatten_dict
from vit_flax import FlaxViTForImageClassification
from vit_flax.sharding import TRAINING_AXES, batch_sharding, make_mesh
from vit_flax.training import TrainState, cross_entropy, make_step

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **more: compiled.append(more.get("fun_name"))
    if event.endswith("backend_compile_duration") else None
)
place = Path(sys.argv[2])
model = FlaxViTForImageClassification.from_pretrained(place / "model", precision="highest")
optimizer = optax.adamw(1e-2, weight_decay=0.1)
mesh = make_mesh(json.loads(sys.argv[1]), model.config, TRAINING_AXES)
state = TrainState.create(model, optimizer, mesh=mesh, ema=0.5)
parts = 4 // (mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1))
step = make_step(model, cross_entropy(), optimizer, mesh=mesh, accumulate=parts, ema=0.5)
losses = []
given = np.load(place / "batches.npz")
for batch in zip(given["pixel_values"], given["labels"]):
    batch = dict(zip(("pixel_values", "labels"), batch))
    batch = jax.device_put(batch, batch_sharding(mesh))
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
held = lambda tree: max(
    sum(shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards
        if shard.device == device) for device in mesh.devices.flat)
params, moments = state.params, state.opt_state[0].mu
whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
np.savez(place / "after.npz", **flatten_dict(jax.tree.map(np.asarray, params), sep="/"))
assert held(state.ema) == held(params)
shares = [held(params) / whole, held(moments) / whole]
print(json.dumps([losses, *shares, compiled.count("jit(step)")]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "share"),
    [
        ({"data": 1, "fsdp": 2, "model": 2}, 0.5),
        pytest.param({"data": 4}, 1.0, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2}, 0.7, marks=pytest.mark.slow),
        pytest.param({"fsdp": 4}, 0.5, marks=pytest.mark.slow),
    ],
)
def test_several_devices_take_the_same_steps(tmp_path, mesh, share):
    """As torch takes them; each device holds its part of parameters and moments."""
    ours, reference = pair(jnp.float32)
    ours.save_pretrained(tmp_path / "model")
    given = batches(dtype=np.float32)
    np.savez(
        tmp_path / "batches.npz",
        **{name: np.stack([batch[name] for batch in given]) for name in given[0]},
    )
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, json.dumps(mesh), str(tmp_path)],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
            + " --xla_force_host_platform_device_count=4",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses, params, moments, compiled = json.loads(done.stdout)
    assert compiled == 1
    assert params <= share
    assert moments <= share
    optimizer = torch.optim.AdamW(reference.parameters(), 1e-2, weight_decay=0.1)
    for batch, found in zip(batches(), losses, strict=True):
        logits = reference(torch.tensor(batch["pixel_values"])).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(batch["labels"]))
        assert found == pytest.approx(loss.item(), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = {name: each.detach().numpy() for name, each in reference.named_parameters()}
    wanted = flatten_dict(flax_tree(after, jnp.float32), sep="/")
    with np.load(tmp_path / "after.npz") as found:
        for name, value in wanted.items():
            # Key biases have no gradient but rounding, which Adam scales up to its full rate.
            if not name.endswith("key/bias"):
                np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-3, err_msg=name)
