"""`ViTConfig` beside Transformers 4.57.6's: fields, defaults, files both ways, and refusals."""

from __future__ import annotations

import copy
import inspect
import json
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import vit_torch
from vit_common.config import ACTIVATIONS, ViTConfig, as_config
from vit_common.errors import CheckpointError, ConfigError, MissingFileError
from vit_common.families import CONFIG_MAPPING, AutoConfig

REFERENCE = {
    name: parameter.default
    for name, parameter in inspect.signature(transformers.ViTConfig.__init__).parameters.items()
    if name not in ("self", "kwargs")
}
# Fields of every Transformers configuration that the contract names.
INHERITED = (
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_return_dict",
    "name_or_path",
    "model_type",
)

# Values no default has, for every field both know.
CHANGED = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "hidden_act": "gelu_new",
    "hidden_dropout_prob": 0.25,
    "attention_probs_dropout_prob": 0.125,
    "initializer_range": 0.01,
    "layer_norm_eps": 1e-6,
    "image_size": 64,
    "patch_size": 8,
    "num_channels": 4,
    "qkv_bias": False,
    "encoder_stride": 8,
    "pooler_output_size": 20,
    "pooler_act": "relu",
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "id2label": {0: "cat", 1: "dog", 2: "cow"},
    "label2id": {"cat": 0, "dog": 1, "cow": 2},
    "problem_type": "multi_label_classification",
    "architectures": ["ViTForImageClassification"],
    "dtype": "bfloat16",
}


# -- fields and defaults


def test_positional_arguments_are_those_of_transformers():
    values = [CHANGED[name] for name in REFERENCE]
    ours, theirs = ViTConfig(*values), transformers.ViTConfig(*values)
    for name in REFERENCE:
        assert getattr(ours, name) == getattr(theirs, name) == CHANGED[name]


@pytest.mark.parametrize("name", [*REFERENCE, *INHERITED])
def test_defaults_are_those_of_transformers(name):
    ours, theirs = getattr(ViTConfig(), name), getattr(transformers.ViTConfig(), name)
    assert ours == theirs
    assert type(ours) is type(theirs)


def test_gradient_checkpointing_is_off_by_default():
    assert ViTConfig().gradient_checkpointing is False


def test_too_many_and_repeated_positional_arguments_are_refused():
    count = len(ViTConfig.fields)
    with pytest.raises(ConfigError, match=f"at most {count} positional arguments"):
        ViTConfig(*range(count + 1))
    with pytest.raises(ConfigError, match="`hidden_size` was given twice"):
        ViTConfig(768, hidden_size=768)


def test_derived_sizes():
    config = ViTConfig(
        image_size=(48, 70), patch_size=(8, 16), hidden_size=32, num_attention_heads=4
    )
    assert config.grid_size == (6, 4)
    assert config.num_patches == 24
    assert config.image_height_width == (48, 70)
    assert config.patch_height_width == (8, 16)
    assert config.head_dim == 8
    assert ViTConfig(image_size=[48, 70]).image_size == (48, 70)
    assert ViTConfig().grid_size == (14, 14)


def test_pooler_output_size_follows_the_width_once():
    config = ViTConfig(hidden_size=96)
    assert config.pooler_output_size == 96
    config.pooler_output_size = None
    assert config.pooler_output_size == 96
    assert ViTConfig(pooler_output_size=20).pooler_output_size == 20


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_one_of_transformers(name):
    # Transformers documents "selu" and does not have it.
    assert name in transformers.activations.ACT2FN or name == "selu"
    assert ViTConfig(hidden_act=name, pooler_act=name).hidden_act == name


# -- files, both ways


def value(config, name: str):
    """A field as files have it; Transformers holds dtypes as torch's in memory."""
    found = getattr(config, name)
    return str(found).removeprefix("torch.") if isinstance(found, torch.dtype) else found


def shared(config) -> dict:
    return {name: value(config, name) for name in CHANGED}


@pytest.mark.parametrize(
    "fields", [{}, CHANGED, {"num_labels": 11}], ids=["plain", "all", "labels"]
)
def test_either_reads_what_the_other_writes(tmp_path, fields):
    theirs = transformers.ViTConfig(**fields)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ViTConfig.from_pretrained(tmp_path / "theirs")
    for name in [*REFERENCE, *INHERITED]:
        if name != "name_or_path":
            assert value(ours, name) == value(theirs, name), name

    ViTConfig(**fields).save_pretrained(tmp_path / "ours")
    back = transformers.ViTConfig.from_pretrained(tmp_path / "ours")
    assert shared(back) == shared(theirs)

    # There and back through either is the same configuration.
    ours.save_pretrained(tmp_path / "again")
    assert ViTConfig.from_pretrained(tmp_path / "again") == ours
    assert shared(transformers.ViTConfig.from_pretrained(tmp_path / "again")) == shared(theirs)


def test_from_transformers_configuration_object():
    theirs = transformers.ViTConfig(**CHANGED)
    ours = as_config(theirs)
    assert shared(theirs) == shared(ours)
    assert as_config(ours) is ours
    with pytest.raises(ConfigError, match="`config` must be a ViTConfig; given int"):
        as_config(3)
    with pytest.raises(ConfigError, match=r"`model_type` must be 'vit'.*given 'bert'"):
        as_config(transformers.BertConfig())


def test_the_text_is_laid_out_as_transformers_writes_it():
    # id2label in the order of the classes, not of their strings; floats as floats; dtype a string.
    fields = {
        **CHANGED,
        "id2label": {i: f"c{i}" for i in range(12)},
        "label2id": {f"c{i}": i for i in range(12)},
    }
    theirs = json.loads(transformers.ViTConfig(**fields).to_json_string())
    theirs.pop("transformers_version")
    ours = ViTConfig(**fields)
    text = ours.to_json_string()
    assert json.loads(text) == theirs
    assert list(json.loads(text)["id2label"]) == [str(i) for i in range(12)]
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert text.startswith('{\n  "architectures": [')
    assert text.endswith("}\n")
    assert '"layer_norm_eps": 1e-06' in text
    assert '"dtype": "bfloat16"' in text
    assert "num_labels" not in text
    assert ViTConfig(hidden_dropout_prob=0).to_dict()["hidden_dropout_prob"].hex() == (0.0).hex()


def test_a_file_and_the_texts_round_trip(tmp_path):
    config = ViTConfig(**CHANGED, image_mean=[0.5], made_by={"who": "someone"})
    config.to_json_file(tmp_path / "x.json")
    assert ViTConfig.from_json_file(tmp_path / "x.json") == config
    assert ViTConfig.from_pretrained(tmp_path / "x.json") == config
    assert (tmp_path / "x.json").read_text() == config.to_json_string()
    assert ViTConfig.from_dict(config.to_dict()) == config
    assert ViTConfig.from_dict(json.loads(config.to_json_string())) == config


def test_unknown_keys_are_kept_and_written_back(tmp_path):
    extra = {"transformers_version": "4.13.0.dev0", "qk_norm": None, "nested": {"a": [1, 2]}}
    config = ViTConfig(**extra)
    assert config.nested == {"a": [1, 2]}
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert extra.items() <= written.items()
    config.to_dict()["nested"]["a"].append(3)
    assert config.nested == {"a": [1, 2]}


def test_an_unknown_key_cannot_hide_a_method():
    with pytest.raises(ConfigError, match="`to_dict` must not be a key"):
        ViTConfig.from_dict({"to_dict": 1})
    with pytest.raises(ConfigError, match="`__dict__` must not be a key"):
        ViTConfig.from_dict({"__dict__": {}})


HUB_VIT_BASE = {  # every key but the labels, as google/vit-base-patch16-224 has them on the Hub
    "architectures": ["ViTForImageClassification"],
    "attention_probs_dropout_prob": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 768,
    "image_size": 224,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "model_type": "vit",
    "num_attention_heads": 12,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 16,
    "qkv_bias": True,
    "transformers_version": "4.13.0.dev0",
}


def test_a_file_of_the_hub_reads_as_it_is(tmp_path):
    # Two of ImageNet's 1000 classes are called "crane", so label2id is shorter than id2label.
    labels = {str(i): f"class {i}" for i in range(1000)}
    labels["134"] = labels["517"] = "crane"
    table = {
        **HUB_VIT_BASE,
        "id2label": dict(sorted(labels.items())),
        "label2id": {label: int(i) for i, label in labels.items()},
    }
    (tmp_path / "config.json").write_text(json.dumps(table, indent=2, sort_keys=True))
    ours = ViTConfig.from_pretrained(tmp_path)
    theirs = transformers.ViTConfig.from_pretrained(tmp_path)
    for name in [*REFERENCE, *INHERITED]:
        if name != "name_or_path":
            assert value(ours, name) == value(theirs, name), name
    assert ours.num_labels == 1000
    assert len(ours.label2id) == 999
    assert (ours.encoder_stride, ours.pooler_act, ours.pooler_output_size) == (16, "tanh", 768)
    assert ours.id2label[134] == "crane"
    assert list(ours.id2label) == list(theirs.id2label)


def test_a_file_with_very_little_in_it(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert ViTConfig.from_pretrained(tmp_path) == ViTConfig()
    (tmp_path / "config.json").write_text("{}")
    assert ViTConfig.from_pretrained(tmp_path) == ViTConfig()


def test_bad_files_are_refused_by_name(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(MissingFileError, match=r"config\.json: no such file"):
        ViTConfig.from_pretrained(tmp_path)
    path.write_text('{"hidden_size": 768,\n "patch')
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON.* at line 2"):
        ViTConfig.from_pretrained(tmp_path)
    path.write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=r"config\.json: .*`model_type` must be 'vit'.*'bert'"):
        ViTConfig.from_pretrained(tmp_path)
    path.write_text('{"hidden_size": "768"}')
    with pytest.raises(
        ConfigError, match=r"config\.json: .*`hidden_size` must be an integer.*'768'"
    ):
        ViTConfig.from_pretrained(tmp_path)


def test_what_no_file_can_hold_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="`hidden_act` must be the name of an activation"):
        ViTConfig(hidden_act=jnp.tanh).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        ViTConfig(extra=object()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        ViTConfig(extra=float("nan")).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- overrides


def test_overrides_and_what_is_left_of_them(tmp_path):
    fields = {
        "num_labels": 7,
        "hidden_size": 96,
        "dtype": "float16",
        "output_attentions": True,
    }
    for config in (transformers.ViTConfig(num_labels=3), ViTConfig(num_labels=3)):
        config.save_pretrained(tmp_path)
        results = []
        for cls in (ViTConfig, transformers.ViTConfig):
            built, unused = cls.from_pretrained(
                tmp_path, return_unused_kwargs=True, add_pooling_layer=False, **fields
            )
            unused.pop("dtype", None)  # Transformers takes it and says it did not
            assert unused == {"add_pooling_layer": False}
            results.append([value(built, name) for name in (*fields, "id2label", "label2id")])
        assert results[0] == results[1]


def test_label_tables_given_over_those_of_a_file(tmp_path):
    ViTConfig(num_labels=3).save_pretrained(tmp_path)
    config = ViTConfig.from_pretrained(tmp_path, id2label={0: "a", 1: "b"})
    assert config.num_labels == 2
    assert config.label2id == {"a": 0, "b": 1}
    config = ViTConfig.from_pretrained(
        tmp_path, num_labels=2, id2label={"0": "a", "1": "b"}, label2id={"a": "0", "b": "1"}
    )
    assert config.id2label == {0: "a", 1: "b"}
    assert config.label2id == {"a": "0", "b": "1"}
    # As many as there are: the names of the file stay.
    ViTConfig(id2label={0: "a", 1: "b"}).save_pretrained(tmp_path)
    assert ViTConfig.from_pretrained(tmp_path, num_labels=2).id2label == {0: "a", 1: "b"}


# -- labels


def test_number_of_labels_as_in_transformers():
    for cls in (ViTConfig, transformers.ViTConfig):
        config = cls(num_labels=3)
        assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
        assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
        config.id2label = {0: "a", 1: "b"}
        assert config.num_labels == 2
        config.num_labels = 2
        assert config.id2label == {0: "a", 1: "b"}
        config.num_labels = 10
        assert list(config.id2label) == list(range(10))
        assert config.label2id["LABEL_9"] == 9


def test_label_tables_keep_what_files_have():
    for cls in (ViTConfig, transformers.ViTConfig):
        config = cls(id2label={"0": "a", "1": "b"}, label2id={"a": "0", "b": "1"})
        assert config.id2label == {0: "a", 1: "b"}
        assert config.label2id == {"a": "0", "b": "1"}
        assert config.num_labels == 2
    assert ViTConfig(id2label={0: "a", 1: "b"}).label2id == {"a": 0, "b": 1}
    text = ViTConfig(id2label={0: "a", 1: "b"}, label2id={"a": "0", "b": "1"}).to_json_string()
    assert json.loads(text)["label2id"] == {"a": "0", "b": "1"}
    assert json.loads(text)["id2label"] == {"0": "a", "1": "b"}


def test_labels_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="`num_labels` is 3 but `id2label` names 2 classes"):
        ViTConfig(num_labels=3, id2label={0: "a", 1: "b"})


# -- dtype


@pytest.mark.parametrize(
    "value",
    [
        "bfloat16",
        "torch.bfloat16",
        torch.bfloat16,
        jnp.bfloat16,
        jnp.dtype("bfloat16"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype_and_its_older_name(name, value):
    config = ViTConfig(**{name: value})
    assert config.dtype == config.torch_dtype == "bfloat16"
    assert config.to_dict()["dtype"] == "bfloat16"
    assert "torch_dtype" not in config.to_dict()
    config = ViTConfig()
    setattr(config, name, value)
    assert config.dtype == config.torch_dtype == "bfloat16"


def test_dtype_of_numpy_and_of_older_files(tmp_path):
    assert ViTConfig(dtype=np.float64).dtype == "float64"
    assert ViTConfig(dtype=np.dtype("float16")).dtype == "float16"
    (tmp_path / "config.json").write_text('{"model_type": "vit", "torch_dtype": "float16"}')
    assert ViTConfig.from_pretrained(tmp_path).dtype == "float16"
    assert ViTConfig.from_pretrained(tmp_path, torch_dtype="float64").dtype == "float64"
    assert ViTConfig.from_pretrained(tmp_path, dtype="float64").dtype == "float64"


# -- refusals, at the line that sets the value

REFUSED = [
    ("hidden_size", 0, "an integer of at least 1"),
    ("hidden_size", 64.0, "an integer of at least 1"),
    ("hidden_size", True, "an integer of at least 1"),
    ("hidden_size", None, "an integer of at least 1"),
    ("num_hidden_layers", -1, "an integer of at least 0"),
    ("num_attention_heads", 0, "an integer of at least 1"),
    ("intermediate_size", "3072", "an integer of at least 1"),
    ("hidden_act", "gleu", "a callable or one of 'gelu'"),
    ("hidden_act", None, "a callable or one of 'gelu'"),
    ("pooler_act", 3, "a callable or one of 'gelu'"),
    ("hidden_dropout_prob", 1.5, "a number from 0 to 1"),
    ("hidden_dropout_prob", -0.1, "a number from 0 to 1"),
    ("attention_probs_dropout_prob", float("nan"), "a number from 0 to 1"),
    ("attention_probs_dropout_prob", "0.1", "a number from 0 to 1"),
    ("initializer_range", -1.0, "a number of at least 0"),
    ("layer_norm_eps", float("inf"), "a number of at least 0"),
    ("layer_norm_eps", "1e-12", "a number of at least 0"),
    ("image_size", 0, r"a positive integer or a pair \(height, width\)"),
    ("image_size", (224, 224, 3), r"a positive integer or a pair \(height, width\)"),
    ("image_size", (224, 0), r"a positive integer or a pair \(height, width\)"),
    ("patch_size", 16.0, r"a positive integer or a pair \(height, width\)"),
    ("num_channels", 0, "an integer of at least 1"),
    ("qkv_bias", 1, "True or False"),
    ("encoder_stride", None, "an integer of at least 1"),
    ("pooler_output_size", 0, "an integer of at least 1"),
    ("gradient_checkpointing", "yes", "True or False"),
    ("position_resize", "nearest", "one of 'bicubic'"),
    ("output_attentions", None, "True or False"),
    ("output_hidden_states", 0, "True or False"),
    ("return_dict", "false", "True or False"),
    ("num_labels", 0, "an integer of at least 1"),
    ("num_labels", "10", "an integer of at least 1"),
    ("id2label", {}, "a non-empty mapping"),
    ("id2label", ["a", "b"], "a non-empty mapping"),
    ("id2label", {"a": 0}, "a mapping whose keys are integers"),
    ("id2label", {0: "a", 2: "b"}, "keyed by 0 to 1 without gaps"),
    ("label2id", ["a"], "a mapping of label to class index"),
    ("problem_type", "classification", "one of 'regression'"),
    ("architectures", "ViTModel", "a list of class names"),
    ("dtype", "int8", "one of 'float64'"),
    ("dtype", torch.int32, "one of 'float64'"),
    ("dtype", np.int32, "one of 'float64'"),
    ("dtype", object(), "a floating dtype"),
]


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    REFUSED,
    ids=[f"{name}={value!r:.20}" for name, value, _ in REFUSED],
)
def test_bad_values_are_refused_where_they_are_set(name, value, wanted):
    with pytest.raises(ConfigError, match=f"`{name}` must be {wanted}.*; given ") as at_birth:
        ViTConfig(**{name: value})
    config = ViTConfig()
    before = config.to_dict()
    with pytest.raises(ConfigError, match=f"`{name}` must be {wanted}.*; given ") as later:
        setattr(config, name, value)
    assert str(at_birth.value) == str(later.value)
    assert config.to_dict() == before
    with pytest.raises(ConfigError, match=f"`{name}` must be "):
        config.update({name: value})
    assert isinstance(later.value, ValueError)


def test_fields_that_contradict_each_other_are_refused():
    with pytest.raises(
        ConfigError,
        match="`hidden_size` must be a multiple of `num_attention_heads`; given 768 and 7",
    ):
        ViTConfig(num_attention_heads=7)
    with pytest.raises(
        ConfigError, match="`image_size` must be at least `patch_size`; given 8 and 16"
    ):
        ViTConfig(image_size=8)
    config = ViTConfig()
    config.hidden_size = 769
    with pytest.raises(ConfigError, match="given 769 and 12"):
        config.validate()


# -- behaves as a value


def test_copies_pickles_and_equality():
    config = ViTConfig(**CHANGED, image_mean=[0.5])
    for twin in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        assert type(twin) is ViTConfig
        assert twin.to_dict() == config.to_dict()
    twin = copy.deepcopy(config)
    twin.id2label[0] = "lion"
    twin.image_mean.append(1)
    assert config.id2label[0] == "cat"
    assert config.image_mean == [0.5]
    assert twin != config
    assert ViTConfig() == ViTConfig()
    assert ViTConfig() != ViTConfig(hidden_size=96)
    assert ViTConfig() != {"hidden_size": 768}
    with pytest.raises(TypeError, match="unhashable"):
        hash(config)
    with pytest.raises(ConfigError, match="`hidden_size` must be"):
        twin.hidden_size = -1


def test_building_leaves_its_arguments_alone():
    table = {
        "id2label": {"0": "a", "1": "b"},
        "num_labels": 2,
        "torch_dtype": "float16",
        "model_type": "vit",
    }
    kept = copy.deepcopy(table)
    config = ViTConfig.from_dict(table, num_labels=5)
    assert table == kept
    assert config.num_labels == 5
    config.to_dict()["id2label"][0] = "lion"
    assert config.id2label[0] == "LABEL_0"


def test_name_or_path_says_where_it_came_from_and_is_not_written(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    config = ViTConfig.from_pretrained(tmp_path)
    assert config.name_or_path == str(tmp_path)
    assert config == ViTConfig()
    assert "_name_or_path" not in config.to_dict()


def test_repr_shows_the_fields_even_where_no_file_could():
    assert '"hidden_size": 768' in repr(ViTConfig())
    assert "hidden_act" in repr(ViTConfig(hidden_act=jnp.tanh))


# -- every family, beside Transformers' own class of that name

FAMILIES = ("ViT", "DeiT", "Beit", "Dinov2", "Dinov2WithRegisters")
families = pytest.mark.parametrize("family", FAMILIES)

# Attributes of Transformers' configurations that are about text and its generation.
GENERATION = set(transformers.PretrainedConfig._get_global_generation_defaults())


def both(family: str, **fields):
    ours, theirs = (getattr(place, f"{family}Config") for place in (vit_torch, transformers))
    return ours(**fields), theirs(**fields)


@families
def test_every_attribute_that_is_not_about_text_is_there(family):
    ours, theirs = both(family)
    plain = transformers.PretrainedConfig()
    names = {name.removesuffix("_internal") for name in vars(plain)} - GENERATION
    names |= {"name_or_path", "use_return_dict", "attribute_map", "sub_configs", "base_config_key"}
    names |= {"has_no_defaults_at_init", "model_type", "num_labels"}
    names.remove("_output_attentions")  # its own private place for `output_attentions`
    for name in sorted(names):
        assert getattr(ours, name) == getattr(theirs, name), name
        assert type(getattr(ours, name)) is type(getattr(theirs, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        ours.nothing  # noqa: B018


@families
def test_the_constructor_shows_the_arguments_of_transformers(family):
    ours, theirs = (
        inspect.signature(getattr(place, f"{family}Config")).parameters
        for place in (vit_torch, transformers)
    )
    common = [name for name in theirs if name in ours]
    assert [name for name in ours if name in theirs] == common
    for name in common:
        assert ours[name].default == theirs[name].default, name
    assert "image_size" in common
    assert all(f"{name}: " in getattr(vit_torch, f"{family}Config").__doc__ for name in ours)


# What the testers of Transformers 4.57.6 give, and other keys that it keeps and no network reads.
IGNORED = {
    "intermediate_size": 37,
    "pooler_output_size": 5,
    "pooler_act": "tanh",
    "mlp_ratio": 3,
    "head_dim": 7,
    "num_patches": 3,
    "use_mask_token": True,
    "use_mean_pooling": False,
    "layer_scale_init_value": 0.25,
    "qkv_bias": False,
    "use_cls_token": False,
    "is_decoder": False,
    "tie_word_embeddings": False,
    "chunk_size_feed_forward": 5,
    "torchscript": True,
    "finetuning_task": "translation",
    "scope": None,
    "_attn_implementation_autoset": True,
    "_commit_hash": "0123456789abcdef",
    "mask_ratio": 0.5,
    "hidden_size": 32,
    "num_attention_heads": 4,
}
FIELDS_OF_OTHERS = {
    "ViT": ("use_cls_token", "layer_scale_init_value"),  # fields here: a network of another kind
    "Dinov2WithRegisters": ("use_mask_token",),  # likewise
}


@families
def test_keys_that_transformers_keeps_and_ignores(family, tmp_path):
    keys = {k: v for k, v in IGNORED.items() if k not in FIELDS_OF_OTHERS.get(family, ())}
    theirs = getattr(transformers, f"{family}Config")(**keys)
    table = theirs.to_dict()
    cls = getattr(vit_torch, f"{family}Config")
    ours = cls.from_dict({**keys, **table})
    plain = cls(**{k: v for k, v in keys.items() if k in cls.fields})
    # The network is the one that it would be without them, and files keep them.
    for name in (*cls.fields, "intermediate_size", "head_dim", "has_layer_scale", "pooling"):
        assert getattr(ours, name) == getattr(plain, name), name
    ours.save_pretrained(tmp_path)
    back = json.loads((tmp_path / "config.json").read_text())
    for name in keys.keys() - {"_commit_hash"}:
        assert back[name] == keys[name], name
    assert cls.from_pretrained(tmp_path) == ours
    assert AutoConfig.from_pretrained(tmp_path) == ours
    again = getattr(transformers, f"{family}Config").from_pretrained(tmp_path)
    for name in keys.keys() - {"_commit_hash"}:
        assert getattr(again, name) == getattr(theirs, name), name


def test_the_testers_of_dinov2_give_a_width_that_is_not_read():
    fields = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 37}
    for family in ("Dinov2", "Dinov2WithRegisters"):
        ours, theirs = both(family, **fields)
        assert ours.intermediate_size == 4 * 32
        assert ours.to_dict()["intermediate_size"] == theirs.to_dict()["intermediate_size"] == 37


@families
def test_what_is_written_beside_the_defaults(family):
    ours, theirs = both(family, hidden_size=36, num_attention_heads=4, num_labels=3)
    wanted = theirs.to_diff_dict()
    wanted.pop("transformers_version")
    assert {k: v for k, v in wanted.items() if k in ours.fields}.items() <= (
        ours.to_diff_dict().items()
    )
    ours, theirs = both(family)
    assert ("id2label" in ours.to_diff_dict()) is ("id2label" in theirs.to_diff_dict()) is False
    assert ("hidden_size" in ours.to_diff_dict()) is True
    assert "is_decoder" in both(family, is_decoder=True)[0].to_diff_dict()


def test_the_attention_kernel_is_kept_and_not_written(tmp_path):
    for cls in (ViTConfig, transformers.ViTConfig):
        config = cls(attn_implementation="eager")
        assert config._attn_implementation == "eager"
        assert not [key for key in config.to_dict() if "attn" in key and "probs" not in key]
        config.save_pretrained(tmp_path)
        assert "eager" not in (tmp_path / "config.json").read_text()
        assert cls.from_pretrained(tmp_path)._attn_implementation is None
        chosen, unused = cls.from_pretrained(
            tmp_path, attn_implementation="eager", return_unused_kwargs=True
        )
        assert chosen._attn_implementation == "eager"
        assert unused == {}
        chosen._attn_implementation = {"": "sdpa"}
        assert chosen._attn_implementation == "sdpa"
        # A file that names one, as older versions wrote it, is not asked.
        table = {"model_type": "vit", "attn_implementation": "flash_attention_2"}
        assert cls.from_dict(dict(table))._attn_implementation is None
    with pytest.raises(ConfigError, match="`attn_implementation` must be the name of an attention"):
        ViTConfig(attn_implementation=3)
    assert as_config(transformers.ViTConfig(attn_implementation="eager"))._attn_implementation == (
        "eager"
    )


def test_fields_set_from_text():
    text = "hidden_size=96,hidden_dropout_prob=0.5,qkv_bias=no,hidden_act=relu"
    for cls in (ViTConfig, transformers.ViTConfig):
        config = cls()
        config.update_from_string(text)
        assert (config.hidden_size, config.hidden_dropout_prob) == (96, 0.5)
        assert (config.qkv_bias, config.hidden_act) == (False, "relu")
        for bad in ("nothing=1", "qkv_bias=maybe", "hidden_size=wide", "hidden_size"):
            with pytest.raises(ValueError, match=r"."):
                config.update_from_string(bad)
        with pytest.raises((TypeError, ConfigError), match=r"."):
            config.update_from_string("id2label=a")
    with pytest.raises(ConfigError, match="`qkv_bias` must be true or false; given 'maybe'"):
        ViTConfig().update_from_string("qkv_bias=maybe")


def test_the_rest_of_what_scripts_call(tmp_path):
    for cls in (ViTConfig, transformers.ViTConfig):
        config = cls(num_labels=3, made_by="someone")
        config.save_pretrained(tmp_path, push_to_hub=False)
        table, rest = cls.get_config_dict(tmp_path, revision="main", extra=1)
        assert (table["model_type"], table["made_by"]) == ("vit", "someone")
        assert rest["extra"] == 1
        config.to_json_file(json_file_path=tmp_path / "x.json", use_diff=True)
        assert cls.from_json_file(json_file=tmp_path / "x.json").num_labels == 3
        assert {"made_by", "hidden_size", "id2label"} <= set(config)
        config.name_or_path = tmp_path
        assert config.name_or_path == str(tmp_path)
        assert config.get_text_config(decoder=True) is config
        config.torchscript = True
        assert config.use_return_dict is False
        overridden = cls.from_pretrained(tmp_path, tie_word_embeddings=False)
        assert overridden.tie_word_embeddings is False
        assert cls(name_or_path="somewhere").name_or_path == "somewhere"
        assert callable(config.push_to_hub)
    assert ViTConfig.get_config_dict(tmp_path, token=None, extra=1)[1] == {"extra": 1}


def test_the_mapping_of_names_to_classes():
    for name, cls in CONFIG_MAPPING.items():
        theirs = getattr(transformers, cls.__name__)  # their mapping lacks some text towers
        assert cls.__name__ == theirs.__name__
        assert cls.model_type == theirs.model_type == name
    assert CONFIG_MAPPING["vit"]() == ViTConfig()
    assert {*CONFIG_MAPPING} == {"vit", "deit", "beit", "dinov2", "dinov2_with_registers"} | {
        "dinov3_vit",
        "clip",
        "clip_vision_model",
        "clip_text_model",
        *("siglip", "siglip_vision_model", "siglip_text_model"),
        *("siglip2", "siglip2_vision_model", "siglip2_text_model"),
    }
    assert vit_torch.BeitConfig is CONFIG_MAPPING["beit"]

    class Mine(ViTConfig):
        model_type = "mine"

    assert Mine(hidden_size=96).model_type == "mine"
    assert "mine" not in CONFIG_MAPPING
