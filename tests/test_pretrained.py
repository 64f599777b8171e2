"""`from_pretrained` and `save_pretrained` of both twins, beside those of Transformers 4.57.6."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
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
from networks import flax_tree, flax_twin, make_config, random_weights, reference_config, torch_twin
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import vit_flax
import vit_torch
from vit_common import presets
from vit_common.config import ViTConfig
from vit_common.errors import CheckpointError, ConfigError, InputError, MissingFileError
from vit_common.parameters import parameter_shapes

FLAX = {
    None: "FlaxViTModel",
    "classifier": "FlaxViTForImageClassification",
    "decoder": "FlaxViTForMaskedImageModeling",
}
TORCH = {
    None: "ViTModel",
    "classifier": "ViTForImageClassification",
    "decoder": "ViTForMaskedImageModeling",
}
SHARDED = "60KB"  # several shards of what is about 200 KB
HEADS = list(TORCH)


def config_of(**overrides):
    return make_config(num_hidden_layers=2, **overrides)


def weights_of(head, **overrides) -> dict[str, np.ndarray]:
    """Every parameter as a file holds it: names and shapes of the Hub, float32, none trivial."""
    weights = random_weights(config_of(**overrides), head)
    return {name: value.astype(np.float32) for name, value in weights.items()}


def hub_names(tree, separator: str = ".") -> dict[str, np.ndarray]:
    """A Flax tree under the Hub's names and in its layouts, independent of `convert`."""
    weights = {}
    for path, array in flatten_dict(tree).items():
        array, (*owner, leaf) = np.asarray(array), path
        if leaf == "kernel":
            array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
        leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
        weights[separator.join((*owner, leaf))] = array
    return weights


def in_memory(model) -> dict[str, np.ndarray]:
    """What a model of either twin holds, under the Hub's names."""
    if isinstance(model, torch.nn.Module):
        return {
            name: value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
            for name, value in model.state_dict().items()
        }
    return hub_names(model.params)


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def twin(framework: str, head):
    return getattr(*{"flax": (vit_flax, FLAX[head]), "torch": (vit_torch, TORCH[head])}[framework])


def made(framework: str, head, weights=None, **overrides):
    """A model of either twin with the test's weights."""
    cls, config = twin(framework, head), config_of(**overrides)
    weights = weights_of(head, **overrides) if weights is None else weights
    return (flax_twin if framework == "flax" else torch_twin)(cls, config, weights)


def reference(head, **overrides):
    """Transformers' PyTorch model with the test's weights."""
    model = getattr(transformers, TORCH[head])(reference_config(config_of(**overrides)))
    weights = weights_of(head, **overrides)
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    return model


def save_by_torch(head, path, **options) -> None:
    reference(head).save_pretrained(path, **options)


@functools.cache
def flax_reference(head):
    return getattr(transformers, FLAX[head])(reference_config(config_of()), _do_init=False)


def save_by_flax(head, path, **options) -> None:
    flax_reference(head).save_pretrained(path, params=flax_tree(weights_of(head)), **options)


# name -> (writer, options, a file it has to make)
WRITERS = {
    "safetensors": (save_by_torch, {}, "model.safetensors"),
    "bin": (save_by_torch, {"safe_serialization": False}, "pytorch_model.bin"),
    "safetensors in shards": (
        save_by_torch,
        {"max_shard_size": SHARDED},
        "model.safetensors.index.json",
    ),
    "bin in shards": (
        save_by_torch,
        {"safe_serialization": False, "max_shard_size": SHARDED},
        "pytorch_model.bin.index.json",
    ),
    "msgpack": (save_by_flax, {}, "flax_model.msgpack"),
    "msgpack in shards": (
        save_by_flax,
        {"max_shard_size": SHARDED},
        "flax_model.msgpack.index.json",
    ),
    "flax safetensors": (save_by_flax, {"safe_serialization": True}, "model.safetensors"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory by (writer, head), written by Transformers once."""
    made: dict = {}

    def directory(writer: str, head) -> Path:
        if (writer, head) not in made:
            path = tmp_path_factory.mktemp("saved")
            save, options, name = WRITERS[writer]
            save(head, path, **options)
            assert (path / name).is_file()
            made[writer, head] = path
        return made[writer, head]

    return directory


@pytest.fixture(params=["flax", "torch"])
def framework(request):
    return request.param


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
        path = tmp_path / framework
        made(framework, head).save_pretrained(path, to=to, max_shard_size=size)
        files.append({file.name: file.read_bytes() for file in path.iterdir()})
    assert files[0] == files[1]
    assert len(files[0]) == 2 if size == "1GB" else len(files[0]) > 4


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
    assert sorted(os.listdir(tmp_path / "c")) == ["config.json", "flax_model.msgpack"]


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


# -- base into head, head into base


def caught(function, *args, **kwargs):
    """The result, and the messages of the warnings it gave."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = function(*args, **kwargs)
    assert all(w.category is UserWarning for w in found)
    assert all(Path(w.filename) == Path(__file__) for w in found)  # it points at the caller
    return result, [str(w.message) for w in found]


# of -> into: what is new, what is left aside
CROSSINGS = {
    (None, "classifier"): (
        ["classifier.weight", "classifier.bias"],
        ["pooler.dense.bias", "pooler.dense.weight"],
    ),
    (None, "decoder"): (
        ["vit.embeddings.mask_token", "decoder.0.weight", "decoder.0.bias"],
        ["pooler.dense.bias", "pooler.dense.weight"],
    ),
    ("classifier", None): (
        ["pooler.dense.weight", "pooler.dense.bias"],
        ["classifier.bias", "classifier.weight"],
    ),
    ("decoder", "classifier"): (
        ["classifier.weight", "classifier.bias"],
        ["decoder.0.bias", "decoder.0.weight", "embeddings.mask_token"],
    ),
}


@pytest.mark.parametrize(
    ("of", "into", "writer"),
    [
        *((of, into, "safetensors") for of, into in CROSSINGS),
        *((of, into, "msgpack") for of, into in CROSSINGS if of != "decoder"),
    ],
)
def test_heads_are_drawn_or_left_aside_and_named_once(saved, of, into, writer, framework):
    new, unused = CROSSINGS[of, into]
    model, said = caught(twin(framework, into).from_pretrained, saved(writer, of))
    (message,) = said
    assert f"newly initialized, so train them: {', '.join(new)}" in message
    left = message.split("in the checkpoint and not used: ")[1].removesuffix(".").split(", ")
    if writer == "safetensors":
        assert [name.removeprefix("vit.") for name in left] == unused
    else:
        assert len(left) == len(unused)

    source = {name.removeprefix("vit."): value for name, value in weights_of(of).items()}
    for name, value in in_memory(model).items():
        if name in new:
            assert np.isfinite(value).all()
            assert value.dtype == np.float32
            spread = value.std()
            assert spread == 0 if "bias" in name or "token" in name else 0.015 < spread < 0.025
        else:
            np.testing.assert_array_equal(value, source[name.removeprefix("vit.")], name)


def test_without_init_the_parameters_come_beside_the_model_and_are_complete(saved):
    cls = vit_flax.FlaxViTForImageClassification
    (model, params), (message,) = caught(
        cls.from_pretrained, saved("safetensors", None), _do_init=False
    )
    assert "newly initialized, so train them: classifier.weight, classifier.bias" in message
    assert set(flatten_dict(params)) == model.required_params
    with pytest.raises(ValueError, match="`params` cannot be accessed"):
        _ = model.params


def test_a_model_without_pooler_leaves_it_aside(saved, framework):
    model, (message,) = caught(
        twin(framework, None).from_pretrained, saved("safetensors", None), add_pooling_layer=False
    )
    assert "not used: pooler.dense.bias, pooler.dense.weight" in message
    assert "newly" not in message
    assert not any("pooler" in name for name in in_memory(model))


def test_the_options_that_ask_for_everything_do_not_warn(saved, framework):
    kwargs = {"use_mask_token": True, "add_pooling_layer": False}
    model, (message,) = caught(
        twin(framework, None).from_pretrained, saved("safetensors", "decoder"), **kwargs
    )
    assert "not used: decoder.0.bias, decoder.0.weight." in message
    np.testing.assert_array_equal(
        in_memory(model)["embeddings.mask_token"],
        weights_of("decoder")["vit.embeddings.mask_token"],
    )


# -- what does not fit


def write(path: Path, weights, config: ViTConfig | None = None) -> Path:
    path.mkdir(exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(v) for name, v in weights.items()},
        path / "model.safetensors",
        {"format": "pt"},
    )
    (config or config_of()).save_pretrained(path)
    return path


def test_missing_parameters_of_the_network_are_an_error_that_names_all(tmp_path, framework):
    weights = weights_of("classifier")
    gone = ["vit.layernorm.bias", "vit.encoder.layer.1.output.dense.weight"]
    write(tmp_path, {name: value for name, value in weights.items() if name not in gone})
    cls = twin(framework, "classifier")
    with pytest.raises(CheckpointError) as error:
        cls.from_pretrained(tmp_path)
    text = str(error.value)
    assert "2 of the 40 parameters" in text
    assert all(name in text for name in gone)
    assert "allow_missing=True" in text
    assert str(tmp_path / "model.safetensors") in text

    model, (message,) = caught(cls.from_pretrained, tmp_path, allow_missing=True)
    assert all(name in message for name in gone)
    found = in_memory(model)
    assert 0.015 < found[gone[1]].std() < 0.025
    assert not found[gone[0]].any()
    kept = {name: value for name, value in found.items() if name not in gone}
    assert_same(kept, {name: weights[name] for name in kept})


def test_mismatched_shapes_are_an_error_that_names_all(tmp_path, framework):
    path = write(tmp_path, weights_of("classifier"))
    cls = twin(framework, "classifier")
    overrides = {"num_labels": 10, "image_size": 16}
    with pytest.raises(ValueError, match="the shapes did not match") as error:
        cls.from_pretrained(path, **overrides)
    text = str(error.value)
    assert isinstance(error.value, CheckpointError)
    for line in (
        "- classifier.weight: found shape (5, 48) in the checkpoint and (10, 48) in the model",
        "- classifier.bias: found shape (5,) in the checkpoint and (10,) in the model",
        "- vit.embeddings.position_embeddings: found shape (1, 17, 48) in the checkpoint and "
        "(1, 5, 48) in the model",
    ):
        assert line in text
    assert "ignore_mismatched_sizes=True" in text
    assert text.startswith(str(path / "model.safetensors"))

    model, (message,) = caught(cls.from_pretrained, path, ignore_mismatched_sizes=True, **overrides)
    assert "the shapes did not match" in message
    assert "(10, 48) in the model" in message
    assert "train them" not in message
    found = in_memory(model)
    assert found["classifier.weight"].shape == (10, 48)
    assert found["vit.embeddings.position_embeddings"].shape == (1, 5, 48)
    assert 0.015 < found["classifier.weight"].std() < 0.025
    assert model.config.num_labels == 10
    assert model.config.id2label[9] == "LABEL_9"
    np.testing.assert_array_equal(
        found["vit.layernorm.bias"], weights_of("classifier")["vit.layernorm.bias"]
    )


def test_a_new_number_of_labels_alone(saved, framework):
    cls = twin(framework, "classifier")
    model, said = caught(
        cls.from_pretrained,
        saved("safetensors", "classifier"),
        num_labels=10,
        ignore_mismatched_sizes=True,
    )
    assert len(said) == 1
    assert in_memory(model)["classifier.bias"].shape == (10,)
    # On a base checkpoint there is nothing to mismatch.
    model, said = caught(cls.from_pretrained, saved("safetensors", None), num_labels=10)
    assert in_memory(model)["classifier.bias"].shape == (10,)


OTHER = {
    "bert": {
        "bert.embeddings.word_embeddings.weight": (30, 8),
        "bert.encoder.layer.0.attention.self.query.weight": (8, 8),
        "bert.encoder.layer.0.attention.self.query.bias": (8,),
        "bert.pooler.dense.weight": (8, 8),
    },
    "resnet": {
        "conv1.weight": (8, 3, 7, 7),
        "bn1.running_mean": (8,),
        "layer1.0.conv1.weight": (8, 8, 1, 1),
        "fc.weight": (10, 8),
    },
    "nothing": {},
}


@pytest.mark.parametrize("name", OTHER)
def test_another_architecture_is_one_clear_error(tmp_path, name, framework):
    weights = {key: np.ones(shape, np.float32) for key, shape in OTHER[name].items()}
    path = write(tmp_path, weights)
    with pytest.raises(CheckpointError) as error:
        twin(framework, None).from_pretrained(path)
    text = str(error.value)
    assert text.startswith(f"{path / 'model.safetensors'}: these are not the weights of a Vision")
    assert "Known formats: " in text
    if weights:
        assert min(weights) in text


def test_a_configuration_of_another_architecture(tmp_path, framework):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json: .*must be one of vit, .*given 'bert'"):
        twin(framework, None).from_pretrained(tmp_path)
    write(tmp_path / "vit", weights_of(None))
    with pytest.raises(ConfigError, match=r"must be 'vit' for ViTConfig; given 'bert'"):
        twin(framework, None).from_pretrained(tmp_path / "vit", config=transformers.BertConfig())


def test_integer_weights_are_refused(tmp_path, framework):
    weights = weights_of(None)
    weights["layernorm.weight"] = np.ones(48, np.int64)
    weights["pooler.dense.bias"] = np.ones(48, np.int8)
    path = write(tmp_path, weights)
    with pytest.raises(CheckpointError) as error:
        twin(framework, None).from_pretrained(path)
    text = str(error.value)
    assert text.startswith(str(path / "model.safetensors"))
    assert "layernorm.weight, pooler.dense.bias are int64, int8" in text or (
        "layernorm.weight, pooler.dense.bias are int8, int64" in text
    )
    # What the network does not use may be anything.
    weights = {**weights_of(None), "embeddings.counter": np.arange(17)}
    model, (message,) = caught(twin(framework, None).from_pretrained, write(tmp_path, weights))
    assert "not used: embeddings.counter" in message
    assert_same(in_memory(model), weights_of(None))


def test_values_that_are_not_finite_load_with_one_warning_that_names_them(tmp_path, framework):
    weights = weights_of(None)
    weights["layernorm.weight"][3] = np.nan
    weights["encoder.layer.0.output.dense.weight"][0, 1] = np.inf
    model, (message,) = caught(twin(framework, None).from_pretrained, write(tmp_path, weights))
    assert str(tmp_path / "model.safetensors") in message
    named = message.split("outputs will too: ")[1].removesuffix(".").split(", ")
    want = ["encoder.layer.0.output.dense.weight", "layernorm.weight"]
    if framework == "flax":
        want = ["encoder/layer/0/output/dense/kernel", "layernorm/scale"]
    assert named == want
    assert_same(in_memory(model), weights)
    # Large values whose sum overflows are finite.
    weights = weights_of(None)
    weights["layernorm.weight"][:] = 3e38
    caught_none = caught(twin(framework, None).from_pretrained, write(tmp_path, weights))[1]
    assert caught_none == []


def test_keys_that_name_one_parameter_twice(tmp_path, framework):
    weights = weights_of("classifier")
    for name in ("layernorm.weight", "embeddings.cls_token"):
        weights[name] = weights[f"vit.{name}"]
    path = write(tmp_path, weights)
    with pytest.raises(CheckpointError) as error:
        twin(framework, "classifier").from_pretrained(path)
    for name in ("layernorm.weight", "embeddings.cls_token"):
        assert f"'{name}' and 'vit.{name}'" in str(error.value) or (
            f"'vit.{name}' and '{name}'" in str(error.value)
        )


def test_keywords_nobody_knows(saved, framework):
    cls = twin(framework, None)
    path = saved("safetensors", None)
    with pytest.raises(InputError) as error:
        cls.from_pretrained(path, num_lables=3, hiden_size=4)
    text = str(error.value)
    assert f"{cls.__name__}.from_pretrained has no keyword 'num_lables', 'hiden_size'" in text
    for known in (
        "num_labels",
        "hidden_size",
        "revision",
        "ignore_mismatched_sizes",
        "add_pooling_layer",
        "attn_implementation",
    ):
        assert known in text
    with pytest.raises(InputError, match=r"with a `config` object.*'num_labels'") as error:
        cls.from_pretrained(path, config=config_of(), num_labels=3)
    assert "hidden_size" not in str(error.value)
    with pytest.raises(InputError, match=r"`attn_implementation` must be one of .*'flash'"):
        cls.from_pretrained(path, attn_implementation="flash")
    with pytest.raises(InputError, match="`dtype` must be a floating"):
        cls.from_pretrained(path, dtype="int8")


# -- where to look


def test_where_the_configuration_comes_from(tmp_path, framework):
    write(tmp_path / "a", weights_of("classifier"))
    cls = twin(framework, "classifier")
    path = tmp_path / "a"
    model = cls.from_pretrained(path, layer_norm_eps=1e-3, output_attentions=True)
    assert model.config.layer_norm_eps == 1e-3
    assert model.config.output_attentions

    given = config_of(layer_norm_eps=1e-4)
    model = cls.from_pretrained(path, config=given)
    assert model.config is given
    model = cls.from_pretrained(path, config=reference_config(given))
    assert model.config.layer_norm_eps == 1e-4

    given.save_pretrained(tmp_path / "b")
    (path / "config.json").unlink()
    for where in (tmp_path / "b", str(tmp_path / "b"), tmp_path / "b" / "config.json"):
        assert cls.from_pretrained(path, config=where).config.layer_norm_eps == 1e-4
    assert cls.from_pretrained(path, config=tmp_path / "b", problem_type="regression").config == (
        config_of(layer_norm_eps=1e-4, problem_type="regression", architectures=None)
    )
    with pytest.raises(MissingFileError, match=r"config\.json: no such file"):
        cls.from_pretrained(path)
    with pytest.raises(MissingFileError, match=r"no weights there; looked for model\.safetensors"):
        cls.from_pretrained(tmp_path / "b")
    with pytest.raises(MissingFileError, match="no such file or directory"):
        cls.from_pretrained(tmp_path / "c")


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_or_an_index_instead_of_a_directory(saved, writer, framework):
    path = saved(writer, "classifier") / WRITERS[writer][2]
    for given in (path, str(path)):
        assert_same(
            in_memory(twin(framework, "classifier").from_pretrained(given)),
            weights_of("classifier"),
        )


def test_a_file_of_another_name_and_place(tmp_path, framework):
    path = tmp_path / "some weights.safetensors"
    save_file(weights_of(None), path)
    model = twin(framework, None).from_pretrained(path, config=config_of())
    assert_same(in_memory(model), weights_of(None))
    with pytest.raises(MissingFileError, match=r"config\.json: no such file"):
        twin(framework, None).from_pretrained(path)


def test_a_subfolder(tmp_path, framework):
    write(tmp_path, weights_of(None))
    shutil.copytree(tmp_path, tmp_path / "inner" / "deep")
    other = {name: value + 1 for name, value in weights_of(None).items()}
    write(tmp_path / "inner" / "deep", other, config_of(layer_norm_eps=0.5))
    model = twin(framework, None).from_pretrained(tmp_path, subfolder="inner/deep")
    assert_same(in_memory(model), other)
    assert model.config.layer_norm_eps == 0.5
    with pytest.raises(MissingFileError, match="other: no such directory"):
        twin(framework, None).from_pretrained(tmp_path, subfolder="other")


def both_layouts(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """A directory with weights in both layouts, which differ."""
    first = weights_of("classifier")
    second = {name: value + 1 for name, value in first.items()}
    write(path, first)
    tree = flax_tree(second)
    (path / "flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    stamp = (path / "model.safetensors").stat().st_mtime
    os.utime(path / "flax_model.msgpack", (stamp, stamp))
    return {"torch": first, "flax": second}


def test_which_of_two_layouts_is_read(tmp_path):
    weights = both_layouts(tmp_path)
    cls = vit_flax.FlaxViTForImageClassification
    assert_same(in_memory(cls.from_pretrained(tmp_path)), weights["torch"])
    assert_same(in_memory(cls.from_pretrained(tmp_path, from_pt=True)), weights["torch"])
    cls = vit_torch.ViTForImageClassification
    assert_same(in_memory(cls.from_pretrained(tmp_path)), weights["torch"])
    assert_same(in_memory(cls.from_pretrained(tmp_path, from_flax=True)), weights["flax"])

    # The one that is read is the older one: that is said.
    stamp = (tmp_path / "model.safetensors").stat().st_mtime
    os.utime(tmp_path / "flax_model.msgpack", (stamp + 60, stamp + 60))
    for twin_cls in (cls, vit_flax.FlaxViTForImageClassification):
        with pytest.warns(
            UserWarning, match=r"model\.safetensors is used, but flax_model\.msgpack is"
        ):
            twin_cls.from_pretrained(tmp_path)


@pytest.mark.parametrize("flag", ["from_pt", "from_flax"])
def test_flags_of_the_other_layout_are_not_needed_and_do_no_harm(saved, flag):
    cls = vit_flax.FlaxViTModel if flag == "from_pt" else vit_torch.ViTModel
    for writer in ("bin", "msgpack", "flax safetensors"):
        model = cls.from_pretrained(saved(writer, None), **{flag: True})
        assert_same(in_memory(model), weights_of(None))


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
    assert names(tmp_path) == {"config.json", "notes.txt", whole}
    model.save_pretrained(tmp_path, to=to, max_shard_size=SHARDED)
    assert whole not in names(tmp_path)
    assert_same(
        in_memory(twin(framework, "classifier").from_pretrained(tmp_path)), weights_of("classifier")
    )


def test_a_save_over_files_of_transformers(tmp_path, framework):
    save_by_torch("classifier", tmp_path, max_shard_size=SHARDED)
    other = {name: value + 1 for name, value in weights_of("classifier").items()}
    made(framework, "classifier", other).save_pretrained(tmp_path)
    assert names(tmp_path) == {"config.json", "model.safetensors"}
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
    assert names(tmp_path) == {"config.json", weights}


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
