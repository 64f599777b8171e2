"""LoRA as a tree beside the parameters: trained like PEFT's, saved as PEFT's files, on any mesh."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from networks import flax_twin, random_weights, randomize
from safetensors.numpy import load_file

import vit_flax
from vit_common.config import ViTConfig
from vit_common.errors import CheckpointError, InputError
from vit_convert.adapters import read_adapter
from vit_flax.int8 import quantize
from vit_flax.sharding import TRAINING_AXES, partition_spec, tree_shardings
from vit_flax.training import (
    TrainState,
    cross_entropy,
    load_adapter,
    lora,
    make_step,
    save_adapter,
)

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 8, "patch_size": 4, "num_labels": 3,
}  # fmt: skip
STEPS = 40


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a network of Transformers, in float64."""
    place = tmp_path_factory.mktemp("base")
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES))
    randomize(model).double().save_pretrained(place)
    return place


def load(place, dtype=jnp.float32, **options):
    return vit_flax.FlaxViTForImageClassification.from_pretrained(
        place, dtype=dtype, param_dtype=dtype, precision="highest", **options
    )


def made(config, head="classifier"):
    cls = vit_flax.FlaxViTModel if head is None else vit_flax.FlaxViTForImageClassification
    return flax_twin(cls, config, random_weights(config, head))


def batches():
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        yield rng.standard_normal((4, 3, 8, 8)), rng.integers(0, 3, 4)


def train_peft(base, **options):
    """PEFT's adapter before and after `STEPS` steps of torch's AdamW, and the loss of each."""
    model = transformers.ViTForImageClassification.from_pretrained(
        base, dtype=torch.float64, attn_implementation="sdpa"
    )
    torch.manual_seed(0)
    made = peft.get_peft_model(model, peft.LoraConfig(modules_to_save=["classifier"], **options))
    made = made.double().train()
    yield made
    trained = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.05)
    losses = []
    for x, y in batches():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(made(torch.tensor(x)).logits, torch.tensor(y))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    yield np.array(losses)


QUERY_VALUE = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
RUNS = {
    "query and value": QUERY_VALUE,
    "dora of patches": {**QUERY_VALUE, "use_dora": True, "target_modules": ["query", "projection"]},
    "rslora of all": {**QUERY_VALUE, "use_rslora": True, "target_modules": "all-linear",
                      "exclude_modules": ["classifier"]},
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [name if name == "query and value" else pytest.param(name, marks=pytest.mark.slow)
     for name in RUNS],
)  # fmt: skip
def test_training_is_that_of_peft(base, tmp_path, name):
    """40 steps of AdamW in float64 from the same A; every loss, and every parameter at the end."""
    peer = train_peft(base, **RUNS[name])
    theirs = next(peer)
    theirs.save_pretrained(tmp_path / "first")
    with jax.enable_x64(True):
        model = load(base, jnp.float64)
        adapter, params = load_adapter(tmp_path / "first", model)
        count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
        assert adapter.num_parameters(params) == count
        optimizer = optax.adamw(1e-2, weight_decay=0.05)
        trainable = adapter.trainable
        state = TrainState.create(model, optimizer, params=params, trainable=trainable)
        assert len(jax.tree.leaves(state.opt_state[0].mu)) == len(adapter.layers) * (
            2 + adapter.settings.dora
        ) + len(adapter.saved)
        step = make_step(
            model, cross_entropy(), optimizer, materialize=adapter.merge, trainable=trainable
        )
        losses = []
        for x, y in batches():
            state, metrics = step(state, {"pixel_values": x, "labels": y})
            losses.append(float(metrics["loss"]))
        save_adapter(tmp_path / "ours", adapter, state.params, base=str(base))
    np.testing.assert_allclose(losses, next(peer), rtol=0, atol=1e-12)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, wanted = (
        load_file(tmp_path / place / "adapter_model.safetensors") for place in ("ours", "theirs")
    )
    assert ours.keys() == wanted.keys()
    for key, value in wanted.items():
        assert ours[key].shape == value.shape
        np.testing.assert_allclose(ours[key], value, rtol=0, atol=1e-11, err_msg=key)


@pytest.mark.parametrize("names", ["transformers-4", "transformers-5"])
def test_saved_adapters_load_everywhere(base, tmp_path, names):
    """Into PEFT, into `from_pretrained` of both twins, and back into training."""
    model = load(base)
    adapter = lora(model, rank=4, alpha=6, targets=("query", "fc1", "projection"), dora=True)
    params = randomised(adapter, adapter.init(model.params))
    wanted = np.asarray(model(PIXELS, params=adapter.merge(params)).logits)
    save_adapter(tmp_path, adapter, params, names=names)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["ViTForImageClassification"]

    merged = vit_flax.FlaxAutoModelForImageClassification.from_pretrained(tmp_path)
    np.testing.assert_allclose(np.asarray(merged(PIXELS).logits), wanted, rtol=0, atol=2e-6)
    again, loaded = load_adapter(tmp_path, model)
    assert again.layers == adapter.layers
    assert again.paths == adapter.paths
    for path, value in flatten_dict(params).items():
        np.testing.assert_array_equal(flatten_dict(loaded)[path], value)
    found = read_adapter(tmp_path)
    assert found.generation == names
    table = json.loads((tmp_path / "adapter_config.json").read_text())
    if names == "transformers-4":
        layers = [f"vit.encoder.layer.{i}." for i in (0, 1)]
        own = [f"{layer}{name}" for layer in layers
               for name in ("attention.attention.query", "intermediate.dense")]  # fmt: skip
        assert table["target_modules"] == sorted(
            [*own, "vit.embeddings.patch_embeddings.projection"]
        )
        peer = transformers.ViTForImageClassification.from_pretrained(base, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(peer, tmp_path).eval()
        with torch.no_grad():
            logits = theirs(torch.tensor(PIXELS)).logits.numpy()
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-6)
        # Transformers takes an adapter folder for a model, with the base model's own classes.
        auto = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        assert auto.active_adapters() == ["default"]
    else:
        assert table["target_modules"] == ["fc1", "projection", "q_proj"]


PIXELS = np.random.default_rng(5).standard_normal((2, 3, 8, 8)).astype(np.float32)


def randomised(adapter, params):
    """All that is trained at random."""
    rng = np.random.default_rng(9)
    flat = flatten_dict(params)
    for path, x in flat.items():
        if adapter.trainable("/".join(path)):
            value = 0.3 * rng.standard_normal(x.shape).astype(np.float32)
            flat[path] = x * (1 + value) if path[-1] == "lora_magnitude" else jnp.asarray(value)
    return unflatten_dict(flat)


def test_first_values_are_those_of_peft(base):
    """A uniform within 1 / sqrt(in), as `kaiming_uniform_(a=sqrt(5))` draws it; B zero."""
    wide = ViTConfig(**{**SIZES, "hidden_size": 64, "num_hidden_layers": 1})
    model = made(wide)
    adapter = lora(model, rank=16, targets="all-linear", modules_to_save=())
    assert adapter.layers[-1].name == "classifier"
    params = adapter.init(model.params, jax.random.key(3))
    flat = {"/".join(path): np.asarray(x) for path, x in flatten_dict(params["lora"]).items()}
    torch.manual_seed(0)
    for name, value in flat.items():
        if name.endswith("lora_B"):
            assert not value.any()
            continue
        theirs = torch.empty(value.shape[::-1])
        torch.nn.init.kaiming_uniform_(theirs, a=np.sqrt(5))
        bound = 1 / np.sqrt(value.shape[0])
        assert theirs.abs().max() <= np.abs(value).max() + 0.02 * bound <= 1.02 * bound
        assert abs(value.std() - theirs.numpy().std()) < 0.06 * bound
        assert abs(value.mean()) < 0.1 * bound
    q, v = (flat[f"vit/encoder/layer/0/attention/attention/{x}/lora_A"] for x in ("query", "value"))
    assert not np.array_equal(q, v)
    merged = adapter.merge(params)
    jax.tree.map(np.testing.assert_array_equal, merged, model.params)
    # A layer's values depend on the key and its name alone.
    other = lora(model, rank=16, targets=("value",))
    alone = flatten_dict(other.init(model.params, jax.random.key(3))["lora"], sep="/")
    np.testing.assert_array_equal(alone["vit/encoder/layer/0/attention/attention/value/lora_A"], v)


def test_few_parameters_are_trained():
    """ViT-B/16 at rank 16 on query and value: 12 x 2 x 16 x (768 + 768), and the head."""
    config = ViTConfig(num_labels=10)
    model = vit_flax.FlaxViTForImageClassification(config, _do_init=False)
    adapter = lora(model, rank=16)
    whole = sum(np.prod(x.shape) for x in jax.tree.leaves(model.params_shape_tree))
    assert adapter.num_parameters() == 12 * 2 * 16 * (768 + 768)
    assert adapter.num_parameters(model.params_shape_tree) == 12 * 2 * 16 * 1536 + 7690
    assert adapter.num_parameters(model.params_shape_tree) / whole < 0.01


def test_both_layers_of_each_mlp(base, tmp_path):
    """The target "mlp" is what PEFT finds by a regular expression; other layers have none."""
    model = load(base)
    adapter = lora(model, rank=2, alpha=4, targets=("query", "value", "mlp"))
    params = randomised(adapter, adapter.init(model.params))
    save_adapter(tmp_path, adapter, params)
    names = r".*(query|value|intermediate\.dense|layer\.\d+\.output\.dense)"
    peer = transformers.ViTForImageClassification.from_pretrained(base, dtype=torch.float32)
    table = peft.LoraConfig(r=2, target_modules=names, modules_to_save=["classifier"])
    wanted = peft.get_peft_model_state_dict(peft.get_peft_model(peer, table))
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == wanted.keys()
    assert adapter.num_parameters(params) == sum(x.numel() for x in wanted.values())
    peer = transformers.ViTForImageClassification.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        logits = peft.PeftModel.from_pretrained(peer, tmp_path).eval()(torch.tensor(PIXELS)).logits
    ours = np.asarray(model(PIXELS, params=adapter.merge(params)).logits)
    np.testing.assert_allclose(logits.numpy(), ours, rtol=0, atol=2e-6)
    # Of some blocks; and where a family has other names.
    some = lora(model, targets=["mlp"], layers=[1])
    assert [layer.name for layer in some.layers] == [
        "vit.encoder.layer.1.intermediate.dense",
        "vit.encoder.layer.1.output.dense",
    ]
    gated = vit_flax.Dinov2Config(**SIZES, use_swiglu_ffn=True)
    other = vit_flax.FlaxDinov2ForImageClassification(gated, _do_init=False)
    assert len(lora(other, targets=["mlp"]).layers) == 2 * SIZES["num_hidden_layers"]


def test_a_network_that_peft_has_no_names_for():
    sizes = {name: value for name, value in SIZES.items() if name != "num_labels"}
    model = vit_flax.FlaxCLIPVisionModel(vit_flax.CLIPVisionConfig(**sizes), _do_init=False)
    with pytest.raises(InputError, match="for a network of model_type 'clip_vision_model'"):
        lora(model)


@pytest.mark.slow
def test_stacked_blocks(base, tmp_path):
    """`scan_layers=True`: the same adapters, first values, merged weights and files."""
    one, scanned = (load(base, scan_layers=x) for x in (False, True))
    options = {"rank": 2, "targets": ("query", "output.dense", "projection"), "dora": True}
    plain, stacked = lora(one, **options), lora(scanned, **options)
    assert plain.num_parameters(one.params) == stacked.num_parameters(scanned.params)
    params = randomised(plain, plain.init(one.params, jax.random.key(1)))
    both = {name: vit_flax.stack_layers(tree) for name, tree in params.items()}
    mine = stacked.init(scanned.params, jax.random.key(1))
    assert jax.tree.map(jnp.shape, mine) == jax.tree.map(jnp.shape, both)
    for path, a in flatten_dict(stacked.merge(both)).items():
        b = flatten_dict(vit_flax.stack_layers(plain.merge(params)))[path]
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    save_adapter(tmp_path / "a", plain, params)
    save_adapter(tmp_path / "b", stacked, both)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again, loaded = load_adapter(tmp_path / "a", scanned)
    assert (again.layers, again.paths) == (stacked.layers, stacked.paths)
    for path, value in flatten_dict(both["lora"]).items():
        np.testing.assert_array_equal(flatten_dict(loaded["lora"])[path], value)
    assert stacked.trainable("lora/vit/encoder/layer/stacked/attention/attention/query/lora_A")
    assert stacked.trainable("model/classifier/bias")
    assert not stacked.trainable("model/vit/encoder/layer/stacked/output/dense/kernel")
    with pytest.raises(InputError, match="must all have the same adapters"):
        lora(scanned, layers=[0])


def test_patterns_and_blocks(base, tmp_path):
    """Ranks and alphas of single layers, which PEFT reads back from what is saved."""
    model = load(base)
    adapter = lora(
        model,
        rank=4,
        targets=r".*(q_proj|attention\.output\.dense)",
        layers=None,
        rank_pattern={"query": 2},
        alpha_pattern={r"layer\.1\..*dense": 3},
    )
    assert [(x.rank, x.alpha) for x in adapter.layers] == [(2, 4), (4, 4), (2, 4), (4, 3)]
    params = randomised(adapter, adapter.init(model.params))
    wanted = np.asarray(model(PIXELS, params=adapter.merge(params)).logits)
    save_adapter(tmp_path, adapter, params)
    peer = transformers.ViTForImageClassification.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(peer, tmp_path).eval()
    with torch.no_grad():
        logits = theirs(torch.tensor(PIXELS)).logits.numpy()
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-6)
    assert [x.name for x in lora(model, layers=[1], targets=["key"]).layers] == [
        "vit.encoder.layer.1.attention.attention.key"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["quer"]}, r"no layer is called 'quer'\. Did you mean 'query'\? Wanted some"),
        ({"targets": ["query", "up_proj"]}, "no layer is called 'up_proj'"),
        ({"targets": ".*nothing"}, r"no layer is called '\.\*nothing'"),
        ({"targets": []}, "no layer gets an adapter"),
        ({"layers": [7]}, r"no layer gets an adapter: .*`layers` \(7,\)"),
        ({"layers": ["x"]}, "`layers_to_transform` must be"),
        ({"rank": 0}, "`r` must be a positive integer; given 0"),
        ({"rank": 2.5}, "`r` must be a positive integer; given 2.5"),
        ({"alpha": float("inf")}, "`lora_alpha` must be a number"),
        ({"rank_pattern": {"(": 2}}, "regular expressions"),
        ({"modules_to_save": ["clasifier"]}, "has no 'clasifier'"),
    ],
)
def test_what_cannot_be_adapted(options, message):
    model = vit_flax.FlaxViTForImageClassification(ViTConfig(**SIZES), _do_init=False)
    with pytest.raises(InputError, match=message):
        lora(model, **options)


def test_weights_and_models_that_do_not_fit(base, tmp_path):
    model = load(base)
    adapter = lora(model, rank=2)
    save_adapter(tmp_path, adapter, adapter.init(model.params))
    other = made(ViTConfig(**{**SIZES, "num_labels": 4}))
    with pytest.raises(CheckpointError, match="adapter's number of classes"):
        load_adapter(tmp_path, other)
    wide = made(ViTConfig(**{**SIZES, "hidden_size": 20}))
    with pytest.raises(CheckpointError, match=r"is for a weight \(16, 16\)"):
        load_adapter(tmp_path, wide)
    with pytest.raises(CheckpointError, match="has no classifier"):
        load_adapter(tmp_path, made(ViTConfig(**SIZES), None))
    model.params = quantize(model.params)
    with pytest.raises(InputError, match="floating point weights"):
        lora(model)


# -- several devices


@pytest.mark.slow
def test_an_adapter_lies_as_its_kernel_does():
    """A is split as the kernel's inputs are, B as its outputs; also in moments and averages."""
    for scan in (False, True):
        model = made(ViTConfig(**SIZES))
        if scan:
            params = vit_flax.stack_layers(model.params)
            model = vit_flax.FlaxViTForImageClassification(
                model.config, scan_layers=True, _do_init=False
            )
            model._is_initialized = True
            model.params = params
        names = ("query", "output.dense", "projection")
        adapter = lora(model, rank=2, targets=names, dora=True)
        params = adapter.init(model.params)
        kernels = flatten_dict(params["model"])
        for path, value in flatten_dict(params["lora"]).items():
            spec = [*partition_spec(("lora", *path), TRAINING_AXES)]
            spec += [None] * (value.ndim - len(spec))
            kernel = [*partition_spec((*path[:-1], "kernel"), TRAINING_AXES)]
            kernel += [None] * (kernels[*path[:-1], "kernel"].ndim - len(kernel))
            wanted = {
                "lora_A": [*kernel[:-1], None],
                "lora_B": [*kernel[:scan], None, kernel[-1]],
                "lora_magnitude": [*kernel[:scan], kernel[-1]],
            }[path[-1]]
            if "projection" in path and path[-1] != "lora_A":
                wanted = [None] * (path[-1] == "lora_B") + [kernel[-1]]
            assert spec == wanted, path
        mesh = jax.make_mesh((1, 1, 1), TRAINING_AXES)
        optimizer = optax.adamw(1e-3)
        state = TrainState.create(
            model, optimizer, params=params, trainable=adapter.trainable, ema=0.9, mesh=mesh
        )
        places = tree_shardings(mesh, state.opt_state)
        assert jax.tree.structure(places) == jax.tree.structure(state.opt_state)


RUN = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, jax.numpy as jnp, numpy as np, optax
jax.config.update("jax_enable_x64", True)
import vit_flax
from vit_common.config import ViTConfig
from vit_flax.sharding import TRAINING_AXES, make_mesh
from vit_flax.training import TrainState, cross_entropy, lora, make_step
config = ViTConfig(**SIZES)
curves = []
for sizes in (None, {"data": 2, "fsdp": 2, "model": 2}):
    model = vit_flax.FlaxViTForImageClassification(
        config, dtype=jnp.float64, param_dtype=jnp.float64
    )
    adapter = lora(model, rank=4, targets="all-linear", modules_to_save=["layernorm"])
    mesh = None if sizes is None else make_mesh(sizes, config, TRAINING_AXES)
    optimizer = optax.adamw(1e-2)
    kept = {"trainable": adapter.trainable, "mesh": mesh}
    state = TrainState.create(model, optimizer, params=adapter.init(model.params), **kept)
    step = make_step(model, cross_entropy(), optimizer, materialize=adapter.merge, **kept)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(5):
        batch = {"pixel_values": rng.standard_normal((8, 3, 8, 8)), "labels": rng.integers(0, 3, 8)}
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    curves.append(losses)
    query = state.params["lora"]["vit"]["encoder"]["layer"]["0"]["attention"]["attention"]["query"]
print(query["lora_A"].sharding.shard_shape((16, 4)), query["lora_B"].sharding.shard_shape((4, 16)))
print(max(abs(a - b) for a, b in zip(*curves)), curves[0][0] - curves[0][-1])
"""


@pytest.mark.slow
def test_on_eight_devices_as_on_one():
    done = subprocess.run(
        [sys.executable, "-c", RUN.replace("SIZES", repr(SIZES))],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    shapes, numbers = done.stdout.splitlines()
    assert shapes == "(8, 4) (4, 8)"
    difference, learnt = map(float, numbers.split())
    assert difference < 1e-12
    assert learnt > 0.01
