"""Checkpoints that do not fit the model, and which file of several is read, in both twins."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import transformers
from flax import serialization
from flax.traverse_util import flatten_dict
from networks import flax_tree, reference_config
from safetensors.numpy import save_file
from saved_models import (  # noqa: F401
    WRITERS,
    assert_same,
    config_of,
    framework_fixture,
    in_memory,
    saved_fixture,
    twin,
    weights_of,
    write,
)

import vit_flax
import vit_torch
from vit_common.errors import CheckpointError, ConfigError, InputError, MissingFileError

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
    # In an object: `image_size=16` beside the name would resample the positions.
    overrides = {"config": config_of(num_labels=10, image_size=16)}
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
