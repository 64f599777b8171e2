"""`from_pretrained` and `save_pretrained` of both twins, beside those of Transformers 4.57.6."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from flax import serialization
from flax.traverse_util import flatten_dict
from networks import flax_tree, make_config, random_weights
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from saved_models import (  # noqa: F401
    FLAX,
    SHARDED,
    TORCH,
    WRITERS,
    assert_same,
    config_of,
    framework_fixture,
    hub_names,
    in_memory,
    made,
    reference,
    save_by_torch,
    saved_fixture,
    twin,
    weights_of,
    write,
)

import vit_flax
import vit_torch
from vit_common import presets
from vit_common.config import ViTConfig
from vit_common.errors import CheckpointError, ConfigError, InputError, MissingFileError
from vit_common.parameters import parameter_shapes

HEADS = list(TORCH)


# -- files of Transformers 4.57.6 in both twins


@pytest.mark.parametrize(
    ("writer", "head"),
    [
        (writer, head)
        for writer, (save, *_) in WRITERS.items()
        for head in HEADS
        if hasattr(transformers, FLAX[head]) or save is save_by_torch
    ],
)
def test_files_of_transformers_load_bit_equal(saved, writer, head, framework):
    model = twin(framework, head).from_pretrained(saved(writer, head))
    assert_same(in_memory(model), weights_of(head))
    assert model.config.num_labels == 5
    assert model.config.hidden_size == 48


# As `state_dict()` of Transformers 5.23.0's models has them; the other names did not change.
V5_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
}


def v5_name(name: str) -> str:
    match = re.fullmatch(r"(vit\.)?encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        return name
    prefix, layer, part, leaf = match.groups("")
    return f"{prefix}layers.{layer}.{V5_NAMES[part]}.{leaf}"


@pytest.mark.parametrize("prefixed", [True, False], ids=["vit.", "bare"])
@pytest.mark.parametrize("names", ["v4", "v5"])
@pytest.mark.parametrize("head", HEADS)
def test_names_of_v4_and_v5_with_and_without_prefix(tmp_path, names, prefixed, head, framework):
    rename = v5_name if names == "v5" else str
    start = "vit." if prefixed else ""
    weights = weights_of(head)
    tasks = ("classifier.", "decoder.")
    stored = {
        rename(name if name.startswith(tasks) else start + name.removeprefix("vit.")): value
        for name, value in weights.items()
    }
    assert len(stored) == len(weights)
    if names == "v5":
        assert f"{start}layers.1.attention.q_proj.weight" in stored
        assert not any("encoder" in name for name in stored)
    save_file(stored, tmp_path / "model.safetensors")
    config_of().save_pretrained(tmp_path)
    model = twin(framework, head).from_pretrained(tmp_path)
    assert_same(in_memory(model), weights)


@pytest.mark.parametrize("container", ["msgpack", "safetensors"])
def test_a_tree_inside_params(tmp_path, container, framework):
    tree = {"params": flax_tree(weights_of("classifier"))}
    config_of().save_pretrained(tmp_path)
    if container == "msgpack":
        (tmp_path / "flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    else:
        flat = {name: np.asarray(x) for name, x in flatten_dict(tree, sep=".").items()}
        save_file(flat, tmp_path / "model.safetensors", {"format": "flax"})
    model = twin(framework, "classifier").from_pretrained(tmp_path)
    assert_same(in_memory(model), weights_of("classifier"))


def test_a_network_without_blocks_loads(tmp_path, framework):
    # Nothing then tells the names of v4 from those of v5.
    config = make_config("no layers")
    weights = {n: v.astype(np.float32) for n, v in random_weights(config).items()}
    save_file(weights, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    assert_same(in_memory(twin(framework, None).from_pretrained(tmp_path)), weights)


# -- our files in Transformers 4.57.6, and in the other twin


@pytest.fixture
def transformers_warnings(monkeypatch):
    said: list[str] = []
    for module in (transformers.modeling_flax_utils, transformers.modeling_utils):
        monkeypatch.setattr(module.logger, "warning", lambda text, *_: said.append(text))
    return said


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_transformers_torch_reads_what_we_write(tmp_path, head, shards):
    size = SHARDED if shards else "1GB"
    made("flax", head).save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    cls = getattr(transformers, TORCH[head])
    model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(in_memory(model), weights_of(head))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == [TORCH[head]]
    assert written["dtype"] == "float32"


@pytest.mark.parametrize(
    ("to", "head"),
    [
        ("hub", "classifier"),
        ("flax", "classifier"),
        ("flax", None),
        pytest.param("flax in shards", "classifier", marks=pytest.mark.slow),
        ("flax-safetensors", None),
    ],
)
def test_transformers_flax_reads_what_we_write(tmp_path, head, to, transformers_warnings):
    options = {"max_shard_size": SHARDED} if "shards" in to else {}
    made("flax", head).save_pretrained(tmp_path, to=to.split()[0], **options)
    cls = getattr(transformers, FLAX[head])
    if to == "hub":  # it needs its random parameters to read this layout
        params = cls.from_pretrained(tmp_path).params
    else:
        model, params = cls.from_pretrained(tmp_path, _do_init=False)
        assert set(flatten_dict(params)) == model.required_params
    assert_same(hub_names(params), weights_of(head))
    # It warns of every parameter it misses or does not know.
    assert [text for text in transformers_warnings if "deprecated" not in text] == []


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("to", ["hub", "flax", "flax-safetensors"])
@pytest.mark.parametrize("size", ["1GB", SHARDED])
def test_both_twins_write_the_same_files(tmp_path, head, to, size):
    files = []
    for framework in ("flax", "torch"):
        path = tmp_path / framework / "model"  # the card has the folder's name
        made(framework, head).save_pretrained(path, to=to, max_shard_size=size)
        files.append({file.name: file.read_bytes() for file in path.iterdir()})
    assert files[0] == files[1]
    assert len(files[0]) == 3 if size == "1GB" else len(files[0]) > 5


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("to", ["hub", "flax", "flax-safetensors"])
@pytest.mark.parametrize("size", ["1GB", SHARDED])
def test_either_twin_reads_what_the_other_writes(tmp_path, head, to, size):
    made("torch", head).save_pretrained(tmp_path, to=to, max_shard_size=size)
    for other in ("flax", "torch"):
        model = twin(other, head).from_pretrained(tmp_path)
        assert_same(in_memory(model), weights_of(head))
        assert model.config.architectures == [TORCH[head]]


def test_names_and_metadata_of_the_files(tmp_path):
    model = made("flax", "classifier")
    model.save_pretrained(tmp_path / "a")
    with safe_open(tmp_path / "a" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(weights_of("classifier"))
    model.save_pretrained(tmp_path / "b", to="flax-safetensors")
    with safe_open(tmp_path / "b" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "flax"}
        assert "vit.encoder.layer.0.attention.attention.query.kernel" in file.keys()  # noqa: SIM118
    model.save_pretrained(tmp_path / "c", safe_serialization=False)
    tree = msgpack.unpackb((tmp_path / "c" / "flax_model.msgpack").read_bytes(), raw=False)
    assert list(tree) == ["classifier", "vit"] or list(tree) == ["vit", "classifier"]
    assert names(tmp_path / "c") == {"README.md", "config.json", "flax_model.msgpack"}


def test_params_given_to_save_are_the_ones_written(tmp_path):
    model = made("flax", None)
    other = jax.tree.map(lambda x: x + 1, model.params)
    model.save_pretrained(tmp_path, params=other)
    assert_same(load_file(tmp_path / "model.safetensors"), hub_names(other))
    without, params = vit_flax.FlaxViTModel.from_pretrained(tmp_path, _do_init=False)
    without.save_pretrained(tmp_path / "again", params=params)
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), hub_names(other))
    with pytest.raises(InputError, match="_do_init=False"):
        without.save_pretrained(tmp_path)
    torch_model = made("torch", None)
    state = {name: value + 1 for name, value in torch_model.state_dict().items()}
    torch_model.save_pretrained(tmp_path / "torch", state_dict=state)
    assert_same(
        load_file(tmp_path / "torch" / "model.safetensors"),
        {name: value.numpy() for name, value in state.items()},
    )


def test_what_does_not_fit_is_not_written(tmp_path):
    flax_model, torch_model = made("flax", None), made("torch", None)
    params = {**flax_model.params, "more": {"kernel": jnp.ones(1)}}
    with pytest.raises(InputError, match="`params` hold what no file can: more/kernel"):
        flax_model.save_pretrained(tmp_path, params=params)
    params = {name: part for name, part in flax_model.params.items() if name != "layernorm"}
    with pytest.raises(InputError, match="include the following: layernorm/scale, layernorm/bias"):
        flax_model.save_pretrained(tmp_path, params=params)
    state = dict(torch_model.state_dict())
    state["more.weight"] = state.pop("layernorm.weight")
    with pytest.raises(
        InputError, match=r"lacks or has in excess: layernorm\.weight, more\.weight"
    ):
        torch_model.save_pretrained(tmp_path, state_dict=state)
    state = {name: value[:1] for name, value in torch_model.state_dict().items()}
    with pytest.raises(InputError, match=r"layernorm\.bias must have shape \(48,\); given \(1,\)"):
        torch_model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(InputError, match="`safe_serialization=False` would write a pickle"):
        torch_model.save_pretrained(tmp_path, safe_serialization=False)
    for model in (flax_model, torch_model):
        with pytest.raises(
            InputError, match="`to` must be one of 'hub', 'flax', 'flax-safetensors'"
        ):
            model.save_pretrained(tmp_path, to="keras")
        with pytest.raises(InputError, match=r"`max_shard_size` must be .*; given 'much'"):
            model.save_pretrained(tmp_path, max_shard_size="much")
    assert list(tmp_path.iterdir()) == []


def test_a_save_leaves_model_and_config_as_they_were(tmp_path, framework):
    model = made(framework, "classifier")
    before = model.config.to_dict()
    model.save_pretrained(tmp_path)
    assert model.config.to_dict() == before
    assert model.config.architectures is None


def test_directories_that_cannot_be_written(tmp_path, framework):
    model = made(framework, None)
    (tmp_path / "file").write_text("x")
    with pytest.raises(MissingFileError, match=r"file: wanted a directory; a file has that name"):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


# -- dtypes


def bfloat16_copy(path: Path) -> dict[str, np.ndarray]:
    """A bfloat16 file by Transformers; the values as float32."""
    model = reference("classifier").to(torch.bfloat16)
    model.save_pretrained(path)
    return {name: value.float().numpy() for name, value in model.state_dict().items()}


def test_bfloat16_files_in_flax(tmp_path):
    want = bfloat16_copy(tmp_path)
    cls = vit_flax.FlaxViTForImageClassification
    model = cls.from_pretrained(tmp_path)
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    assert model.dtype == jnp.float32
    as_float = {n: v.astype(np.float32) for n, v in in_memory(model).items()}
    assert_same(as_float, want)
    model = cls.from_pretrained(tmp_path, param_dtype=jnp.float32)
    assert_same(in_memory(model), want)
    # `dtype` is the second positional argument and that of the computation.
    model = cls.from_pretrained(tmp_path, jnp.bfloat16)
    assert model.dtype == model.module.dtype == jnp.bfloat16
    model.save_pretrained(tmp_path / "again")
    assert ViTConfig.from_pretrained(tmp_path / "again").dtype == "bfloat16"
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "again", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert_same({n: v.float().numpy() for n, v in again.state_dict().items()}, want)


def test_bfloat16_files_in_torch(tmp_path):
    want = bfloat16_copy(tmp_path)
    cls = vit_torch.ViTForImageClassification
    cases = [
        ({}, torch.float32),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"torch_dtype": "auto"}, torch.bfloat16),
        ({"torch_dtype": torch.float16}, torch.float16),
        ({"dtype": "float64"}, torch.float64),
        ({"dtype": "torch.bfloat16"}, torch.bfloat16),
    ]
    for kwargs, dtype in cases:
        model = cls.from_pretrained(tmp_path, **kwargs)
        assert {p.dtype for p in model.parameters()} == {dtype}
        for name, value in model.state_dict().items():
            assert torch.equal(value, torch.tensor(want[name]).to(dtype))
    cls.from_pretrained(tmp_path, dtype="auto").save_pretrained(tmp_path / "again")
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "again", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert_same({n: v.float().numpy() for n, v in again.state_dict().items()}, want)


@pytest.mark.parametrize("to", ["flax", "flax-safetensors", "hub"])
def test_bfloat16_in_every_layout(tmp_path, to, transformers_warnings):
    model = made("flax", None)
    halves = model.to_bf16(model.params)
    model.save_pretrained(tmp_path, params=halves, to=to)
    want = {name: value.astype(np.float32) for name, value in hub_names(halves).items()}
    found = vit_torch.ViTModel.from_pretrained(tmp_path, dtype="auto")
    assert found.dtype == torch.bfloat16
    assert_same(in_memory(found), want)
    found = [vit_flax.FlaxViTModel.from_pretrained(tmp_path).params]
    if to == "flax":  # in the others Transformers asks numpy, which does not know the type
        found += [transformers.FlaxViTModel.from_pretrained(tmp_path, _do_init=False)[1]]
    for params in found:
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
        assert_same({n: v.astype(np.float32) for n, v in hub_names(params).items()}, want)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_floats_keep_their_bits(tmp_path, dtype):
    weights = {name: value.astype(dtype) for name, value in weights_of(None).items()}
    write(tmp_path, weights)
    model = vit_torch.ViTModel.from_pretrained(tmp_path, dtype="auto")
    assert_same(in_memory(model), weights)
    with jax.enable_x64(dtype == "float64"):
        model = vit_flax.FlaxViTModel.from_pretrained(tmp_path)
        assert_same(in_memory(model), weights)


# -- saving again


def names(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


@pytest.mark.parametrize("to", ["hub", "flax", "flax-safetensors"])
def test_no_file_of_an_earlier_save_survives(tmp_path, to, framework):
    model = made(framework, "classifier")
    whole = "flax_model.msgpack" if to == "flax" else "model.safetensors"
    model.save_pretrained(tmp_path, to=to, max_shard_size="30KB")
    many = names(tmp_path)
    assert len(many) > 6
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path, to=to, max_shard_size=SHARDED)
    assert len(names(tmp_path)) < len(many)
    assert_same(
        in_memory(twin(framework, "classifier").from_pretrained(tmp_path)), weights_of("classifier")
    )
    model.save_pretrained(tmp_path, to=to)
    assert names(tmp_path) == {"README.md", "config.json", "notes.txt", whole}
    model.save_pretrained(tmp_path, to=to, max_shard_size=SHARDED)
    assert whole not in names(tmp_path)
    assert_same(
        in_memory(twin(framework, "classifier").from_pretrained(tmp_path)), weights_of("classifier")
    )


def test_a_save_over_files_of_transformers(tmp_path, framework):
    save_by_torch("classifier", tmp_path, max_shard_size=SHARDED)
    other = {name: value + 1 for name, value in weights_of("classifier").items()}
    made(framework, "classifier", other).save_pretrained(tmp_path)
    assert names(tmp_path) == {"README.md", "config.json", "model.safetensors"}
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert_same(in_memory(model), other)


@pytest.mark.parametrize(("first", "then"), [("hub", "flax"), ("flax", "hub")])
def test_a_save_in_another_format_leaves_nothing_of_the_one_before(
    tmp_path, first, then, framework
):
    made(framework, "classifier").save_pretrained(tmp_path, to=first, max_shard_size=SHARDED)
    other = {name: value + 1 for name, value in weights_of("classifier").items()}
    made(framework, "classifier", other).save_pretrained(tmp_path, to=then)
    weights = {"hub": "model.safetensors", "flax": "flax_model.msgpack"}[then]
    assert names(tmp_path) == {"README.md", "config.json", weights}


@pytest.mark.parametrize("method", ["save_pretrained", "push_to_hub"])
def test_misspelt_keywords_of_a_save(tmp_path, method, framework):
    model = made(framework, "classifier")
    with pytest.raises(InputError, match=rf"{method} has no keyword 'max_shard_sizes'; wanted"):
        getattr(model, method)(str(tmp_path / "new"), max_shard_sizes=3)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("to", ["hub", "flax"])
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_failed_save_leaves_the_old_files(
    tmp_path, monkeypatch, no_exchange, to, step, after, framework
):
    made(framework, "classifier").save_pretrained(tmp_path, to=to, max_shard_size=SHARDED)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = {name: value + 1 for name, value in weights_of("classifier").items()}
    model = made(framework, "classifier", other, layer_norm_eps=0.5)
    calls, real = [], getattr(os, step)

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) > after and ".old" not in str(args[0]):
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, step, failing)
        with pytest.raises(
            MissingFileError, match=r"cannot be written \(No space left on device\)"
        ):
            model.save_pretrained(tmp_path, to=to, max_shard_size="100KB")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    loaded = twin(framework, "classifier").from_pretrained(tmp_path)
    assert_same(in_memory(loaded), weights_of("classifier"))


def test_a_configuration_that_no_file_can_hold_leaves_the_old_files(tmp_path, framework):
    model = made(framework, "classifier")
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model.config.extra = object()
    model.config.layer_norm_eps = 0.5
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        model.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# -- what loading does not do


def test_nothing_is_drawn_for_a_complete_checkpoint(saved, monkeypatch):
    def refuse(*args, **kwargs):
        if args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            return args[0]
        raise AssertionError("random numbers were drawn")

    for head in HEADS:  # made before anything is forbidden
        saved("safetensors", head)
    monkeypatch.setattr(nn.Module, "init", refuse)
    monkeypatch.setattr(vit_flax.pretrained, "draw_normal", refuse)
    for name in ("trunc_normal_", "normal_", "uniform_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, refuse)
    state = torch.get_rng_state()
    for framework, head in itertools.product(("flax", "torch"), HEADS):
        twin(framework, head).from_pretrained(saved("safetensors", head))
    assert torch.equal(torch.get_rng_state(), state)
    for cls in (vit_flax.FlaxViTModel, vit_torch.ViTModel):
        with pytest.raises(AssertionError, match="random numbers were drawn"):
            cls(config_of())


def test_no_layout_but_a_pickle_needs_torch(saved, tmp_path, monkeypatch):
    for writer in WRITERS:  # made while there is torch
        saved(writer, "classifier")
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it now fails
    for writer in WRITERS:
        path = saved(writer, "classifier")
        if "bin" in writer:
            with pytest.raises(CheckpointError, match=r"needs torch; run `pip install torch`"):
                vit_flax.FlaxViTForImageClassification.from_pretrained(path)
        else:
            model = vit_flax.FlaxViTForImageClassification.from_pretrained(path)
            model.save_pretrained(tmp_path / writer)


MEMORY = """
import resource, sys
framework, path = sys.argv[1:]
if framework == "flax":
    import jax, vit_flax
    cls, fields = vit_flax.FlaxViTModel, {"dtype": "float32"}
    jax.block_until_ready(jax.numpy.ones(1))
else:
    import torch, vit_torch
    cls, fields = vit_torch.ViTModel, {}

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024

before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # forget the peak that importing had
model = cls.from_pretrained(path)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("preset", "layout"),
    [
        ("small", "hub"),
        *(pytest.param("base", layout, marks=pytest.mark.slow) for layout in ("hub", "flax")),
    ],
)
def test_loading_holds_little_more_than_the_weights(tmp_path, preset, layout, framework):
    config = presets.preset(preset)
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape, np.float32)
        for name, shape in parameter_shapes(config).items()
    }
    if layout == "hub":
        write(tmp_path, weights, config)
        file = tmp_path / "model.safetensors"
    else:
        file = tmp_path / "flax_model.msgpack"
        file.write_bytes(serialization.to_bytes(jax.tree.map(np.asarray, flax_tree(weights))))
        config.save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, framework, tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak, size = int(done.stdout), file.stat().st_size
    assert size < peak < 1.6 * size, f"{peak / size:.2f} of the file"
