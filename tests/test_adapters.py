"""LoRA adapters in PEFT's files, against PEFT itself: merged, under both generations' names, and
what is refused."""

from __future__ import annotations

import functools
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import peft
import PIL.Image
import pytest
import torch
import transformers
from convert_sources import command_fixture, contents, nowhere_fixture, rows  # noqa: F401
from networks import randomize
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_hub import hub, waits  # noqa: F401  # fixtures
from test_hub_families import serve

import vit_flax
import vit_torch
from vit_common.errors import CheckpointError, ConfigError, InputError, ViTError
from vit_convert import convert
from vit_convert.adapters import read_adapter, rename_adapter, write_adapter
from vit_convert.adapters.folder import same_adapters

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 8, "patch_size": 4, "num_labels": 3,
}  # fmt: skip

# name -> class in Transformers, and what differs from SIZES
FAMILIES = {
    "vit": ("ViTForImageClassification", {}),
    "deit": ("DeiTForImageClassificationWithTeacher", {}),
    "beit": ("BeitForImageClassification", {"use_relative_position_bias": True}),
    "dinov2": ("Dinov2ForImageClassification", {"mlp_ratio": 2}),
    "swiglu": ("Dinov2ForImageClassification", {"mlp_ratio": 2, "use_swiglu_ffn": True}),
    "registers": ("Dinov2WithRegistersForImageClassification", {"mlp_ratio": 2}),
    "base": ("ViTModel", {}),
}

QUERY_VALUE = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"]}
WITH_HEAD = {**QUERY_VALUE, "modules_to_save": ["classifier"]}

# name -> arguments of LoraConfig
ADAPTERS = {
    "query and value": WITH_HEAD,
    "rslora": {**QUERY_VALUE, "use_rslora": True},
    "patterns": {
        "r": 4, "target_modules": ["query", "key", "value"],
        "rank_pattern": {"query": 2, "layer.1.attention.attention.value": 3},
        "alpha_pattern": {"^vit.*key": 5, "value": 7.5},
    },
    "a block": {**QUERY_VALUE, "layers_to_transform": [1], "layers_pattern": "layer"},
    "a regular expression": {"r": 2, "target_modules": r".*layer\.[01]\..*(query|output.dense)"},
    "not all": {"r": 2, "target_modules": ["dense"], "exclude_modules": ["intermediate.dense"]},
    "all linear": {"r": 2, "target_modules": "all-linear"},
    "patches": {"r": 4, "target_modules": ["projection"]},
    "norm whole": {**QUERY_VALUE, "modules_to_save": ["vit.layernorm", "classifier"]},
    "all biases": {**WITH_HEAD, "bias": "all"},
    "own biases": {**QUERY_VALUE, "bias": "lora_only"},
    "bias of B": {**QUERY_VALUE, "lora_bias": True},
    "dora": {"r": 4, "target_modules": ["query", "projection"], "use_dora": True},
    "eva": {**QUERY_VALUE, "fan_in_fan_out": True, "lora_dropout": 0.3},
}  # fmt: skip

ALL_LINEAR = {"r": 2, "target_modules": "all-linear"}
DORA = {"r": 2, "target_modules": "all-linear", "use_dora": True}
CASES = [
    *(("vit", name, options) for name, options in ADAPTERS.items()),
    *((f, "all linear", ALL_LINEAR) for f in ("deit", "beit", "dinov2", "swiglu", "registers")),
    *((family, "dora", DORA) for family in ("deit", "swiglu")),
    ("base", "base network", QUERY_VALUE),
]


def peer_class(family):
    return getattr(transformers, FAMILIES[family][0])


@functools.cache
def made_in(root: Path, family: str) -> Path:
    """A folder with a network of Transformers, in float64."""
    other = FAMILIES[family][1]
    sizes = {key: v for key, v in SIZES.items() if "mlp_ratio" not in other or "inter" not in key}
    cls = peer_class(family)
    model = randomize(cls(cls.config_class(**sizes, **other))).double()
    place = root / family
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    root = tmp_path_factory.mktemp("networks")
    return lambda family: made_in(root, family)


def pixels() -> torch.Tensor:
    return torch.tensor(np.random.default_rng(5).normal(size=(2, 3, 8, 8)))


def numbers(output) -> np.ndarray:
    output = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return output.detach().double().numpy()


def load_peer(base: Path, family: str):
    return peer_class(family).from_pretrained(base, dtype=torch.float64).eval()


def make_adapter(place: Path, base: Path, family: str = "vit", **options) -> np.ndarray:
    """Have PEFT write an adapter with everything in it at random; what it gives for `pixels()`."""
    rng = np.random.default_rng(7)
    model = peft.get_peft_model(load_peer(base, family), peft.LoraConfig(**options)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                value = torch.tensor(rng.normal(size=tuple(parameter.shape)))
                own = parameter * (1 + 0.3 * value) if "magnitude" in name else 0.3 * value
                parameter.copy_(own)
        model.save_pretrained(place)
        return numbers(model(pixels()))


def run_torch(place, cls="AutoModelForImageClassification", **options) -> np.ndarray:
    model = getattr(vit_torch, cls).from_pretrained(place, dtype="auto", **options).eval()
    with torch.no_grad():
        return numbers(model(pixels().to(model.dtype)))


@pytest.fixture(scope="module")
def adapter(network, tmp_path_factory):
    """An adapter of rank 4 on query and value with a classifier, and PEFT's logits."""
    place = tmp_path_factory.mktemp("adapter") / "adapter"
    return place, make_adapter(place, network("vit"), **WITH_HEAD)


# -- numbers


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out", "ignore:.*bias", "ignore:.*invalid shape")
@pytest.mark.parametrize(("family", "name", "options"), CASES, ids=lambda x: str(x).split("{")[0])
def test_outputs_and_names_are_those_of_peft(network, tmp_path, family, name, options):
    """Merged, renamed to Transformers 5's names, and back again."""
    base = network(family)
    wanted = make_adapter(tmp_path / "4", base, family, **options)
    cls = "AutoModel" if family == "base" else "AutoModelForImageClassification"
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(run_torch(tmp_path / "4", cls), wanted, rtol=0, atol=1e-12 * scale)

    first = read_adapter(tmp_path / "4")
    assert first.generation == "transformers-4"
    convert(tmp_path / "4", tmp_path / "5", to="peft-5")
    np.testing.assert_allclose(run_torch(tmp_path / "5", cls), wanted, rtol=0, atol=1e-12 * scale)
    convert(tmp_path / "5", tmp_path / "again", to="peft-4")
    back = load_file(tmp_path / "again/adapter_model.safetensors")
    theirs = load_file(tmp_path / "4/adapter_model.safetensors")
    twice = {name for name in theirs if ".original_module." in name or ".modules_to_save." in name}
    assert back.keys() == theirs.keys() - twice
    assert all(back[key].tobytes() == theirs[key].tobytes() for key in back)
    assert all(back[key].shape == theirs[key].shape for key in back)

    loaded = peft.PeftModel.from_pretrained(load_peer(base, family), tmp_path / "again").eval()
    with torch.no_grad():
        np.testing.assert_array_equal(numbers(loaded.double()(pixels())), wanted)


# As PEFT 0.21.2 wrote them with Transformers 5.23.0, which also loaded the files written here, of
# every family and adapter above, with equal outputs to the bit (SwiGLU: to 1e-6, in float32).
NAMES_5 = {
    "vit": "vit.layers.0.attention.q_proj vit.layers.0.attention.k_proj "
    "vit.layers.0.attention.v_proj vit.layers.0.attention.o_proj vit.layers.0.mlp.fc1 "
    "vit.layers.0.mlp.fc2 classifier",
    "deit": "deit.layers.0.attention.q_proj deit.layers.0.attention.k_proj "
    "deit.layers.0.attention.v_proj deit.layers.0.attention.o_proj deit.layers.0.mlp.fc1 "
    "deit.layers.0.mlp.fc2 cls_classifier distillation_classifier",
    "beit": "beit.layers.0.attention.q_proj beit.layers.0.attention.k_proj "
    "beit.layers.0.attention.v_proj beit.layers.0.attention.o_proj beit.layers.0.mlp.fc1 "
    "beit.layers.0.mlp.fc2 classifier",
    "dinov2": "dinov2.encoder.layer.0.attention.q_proj dinov2.encoder.layer.0.attention.k_proj "
    "dinov2.encoder.layer.0.attention.v_proj dinov2.encoder.layer.0.attention.o_proj "
    "dinov2.encoder.layer.0.mlp.fc1 dinov2.encoder.layer.0.mlp.fc2 classifier",
    "swiglu": "dinov2.encoder.layer.0.attention.q_proj dinov2.encoder.layer.0.attention.k_proj "
    "dinov2.encoder.layer.0.attention.v_proj dinov2.encoder.layer.0.attention.o_proj "
    "dinov2.encoder.layer.0.mlp.gate_proj dinov2.encoder.layer.0.mlp.up_proj "
    "dinov2.encoder.layer.0.mlp.down_proj classifier",
}


@pytest.mark.parametrize("family", NAMES_5)
def test_names_of_transformers_5(network, tmp_path, family):
    make_adapter(tmp_path / "4", network(family), family, **ALL_LINEAR)
    rename_adapter(tmp_path / "4", tmp_path / "5", "peft-5")
    with safe_open(tmp_path / "5/adapter_model.safetensors", "np") as file:
        names = [*file.keys()]
        assert file.metadata() == {"format": "pt"}
    first = NAMES_5[family].split()
    second = [name.replace(".0.", ".1.") for name in first if ".0." in name]
    assert {*names} == {
        f"base_model.model.{name}.lora_{factor}.weight"
        for name in (*first, *second)
        for factor in "AB"
    }
    table = json.loads((tmp_path / "5/adapter_config.json").read_text())
    assert {*table["target_modules"]} == {*first, *second}


def test_simple_targets_stay_simple(adapter, tmp_path):
    place, _ = adapter
    rename_adapter(place, tmp_path / "5", "peft-5")
    table = json.loads((tmp_path / "5/adapter_config.json").read_text())
    before = json.loads((place / "adapter_config.json").read_text())
    assert table["target_modules"] == ["q_proj", "v_proj"]
    changed = {name for name in table if table[name] != before[name]}
    assert changed == {"target_modules"}


@pytest.mark.parametrize("shared", [False, True], ids=["an A each", "one A"])
def test_halves_of_a_swiglu(network, tmp_path, shared):
    """Transformers 5 has two layers where 4 has one; numpy says what the weight becomes."""
    rng = np.random.default_rng(2)
    layer = "base_model.model.dinov2.encoder.layer.1.mlp"
    tensors = {}
    a = rng.normal(size=(2, 16))
    for half in ("gate_proj", "up_proj"):
        tensors[f"{layer}.{half}.lora_A.weight"] = a if shared else rng.normal(size=(2, 16))
        tensors[f"{layer}.{half}.lora_B.weight"] = rng.normal(size=(24, 2))
    base = network("swiglu")
    weight = load_file(base / "model.safetensors")["dinov2.encoder.layer.1.mlp.weights_in.weight"]
    tensors = {
        name: x if "_A" in name else rng.normal(size=(len(weight) // 2, 2))
        for name, x in tensors.items()
    }
    write_by_hand(tmp_path / "5", tensors, base, ["gate_proj", "up_proj"], r=2, lora_alpha=3)
    wanted = weight + 1.5 * np.concatenate(
        [
            tensors[f"{layer}.{half}.lora_B.weight"] @ tensors[f"{layer}.{half}.lora_A.weight"]
            for half in ("gate_proj", "up_proj")
        ]
    )
    for place in ("5", "4"):
        model = vit_torch.AutoModelForImageClassification.from_pretrained(
            tmp_path / place, dtype="auto"
        )
        found = model.state_dict()["dinov2.encoder.layer.1.intermediate.dense.weight"].numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-13, atol=1e-13)
        if place == "5":
            convert(tmp_path / "5", tmp_path / "4", to="peft-4")
    table = json.loads((tmp_path / "4/adapter_config.json").read_text())
    ranks = {table["r"], *table["rank_pattern"].values()}
    assert (4 in ranks) != shared
    loaded = peft.PeftModel.from_pretrained(load_peer(base, "swiglu"), tmp_path / "4").eval()
    with torch.no_grad():
        theirs = numbers(loaded.double()(pixels()))
    np.testing.assert_allclose(run_torch(tmp_path / "4"), theirs, rtol=0, atol=1e-12)


def write_by_hand(place: Path, tensors, base, targets, **fields) -> Path:
    place.mkdir()
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()},
              place / "adapter_model.safetensors")  # fmt: skip
    table = {"peft_type": "LORA", "base_model_name_or_path": str(base), "target_modules": targets}
    (place / "adapter_config.json").write_text(json.dumps({**table, **fields}))
    return place


def test_in_float32_both_twins(network, adapter):
    """As people have them: a base in float32, and an adapter trained in it."""
    place, wanted = adapter
    base = network("vit").parent / "float32"
    vit_torch.ViTForImageClassification.from_pretrained(
        network("vit"), dtype=torch.float32
    ).save_pretrained(base)
    bound = 2e-6 * np.abs(wanted).max()
    options = {"adapter": place}
    np.testing.assert_allclose(run_torch(base, **options), wanted, rtol=0, atol=bound)
    model = vit_flax.FlaxAutoModelForImageClassification.from_pretrained(base, **options)
    assert type(model) is vit_flax.FlaxViTForImageClassification
    logits = model(pixels().float().numpy()).logits
    np.testing.assert_allclose(np.asarray(logits), wanted, rtol=0, atol=bound)


def test_merged_weights_are_those_of_peft(network, adapter, tmp_path):
    """In another format, whose fused arrays hold what PEFT merges one by one."""
    place, wanted = adapter
    report = convert(place, tmp_path / "timm", to="timm")
    assert report.verification.tensors == 40
    loaded = peft.PeftModel.from_pretrained(load_peer(network("vit"), "vit"), place).double()
    theirs = loaded.merge_and_unload().state_dict()
    ours = load_file(tmp_path / "timm/model.safetensors")
    parts = ("query", "key", "value")
    for i in range(2):
        names = [f"vit.encoder.layer.{i}.attention.attention.{part}.weight" for part in parts]
        qkv = np.concatenate([theirs[name].numpy() for name in names])
        np.testing.assert_allclose(ours[f"blocks.{i}.attn.qkv.weight"], qkv, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(ours["head.weight"], theirs["classifier.weight"].numpy())
    np.testing.assert_allclose(run_torch(tmp_path / "timm"), wanted, rtol=0, atol=1e-12)


def test_bfloat16_is_rounded_once(network, adapter, tmp_path):
    place, _ = adapter
    convert(network("vit"), tmp_path / "half", dtype="bfloat16")
    name = "vit.encoder.layer.0.attention.attention.query"
    half = vit_torch.ViTForImageClassification.from_pretrained(tmp_path / "half", dtype="auto")
    weight = half.state_dict()[f"{name}.weight"].double()
    factors = load_file(place / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    wanted = (weight + 1.5 * torch.tensor(b) @ torch.tensor(a)).bfloat16()
    merged = vit_torch.ViTForImageClassification.from_pretrained(
        tmp_path / "half", dtype="auto", adapter=place
    )
    assert torch.equal(merged.state_dict()[f"{name}.weight"], wanted)


def test_a_distilled_base_with_a_new_classifier(network, tmp_path):
    """The two heads of a distilled DeiT give way to the one that the adapter was trained with."""
    base = network("deit")
    model = transformers.DeiTForImageClassification.from_pretrained(base, dtype=torch.float64)
    made = peft.get_peft_model(randomize(model.double()), peft.LoraConfig(**WITH_HEAD)).eval()
    made.save_pretrained(tmp_path / "adapter")
    state = made.merge_and_unload().state_dict()
    loaded = vit_torch.AutoModelForImageClassification.from_pretrained(
        tmp_path / "adapter", dtype="auto"
    )
    assert type(loaded) is vit_torch.DeiTForImageClassification
    np.testing.assert_array_equal(
        loaded.state_dict()["classifier.weight"].numpy(), state["classifier.weight"].numpy()
    )


# -- folders


def test_the_classifier_says_how_many_classes(network, tmp_path):
    """The base model has 3; the adapter's file alone says that there are 5 now."""
    cls = transformers.ViTForImageClassification
    model = cls.from_pretrained(
        network("vit"), num_labels=5, ignore_mismatched_sizes=True, dtype=torch.float64
    )
    made = peft.get_peft_model(model, peft.LoraConfig(**WITH_HEAD)).double().eval()
    made.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = numbers(made(pixels()))
    np.testing.assert_allclose(run_torch(tmp_path / "adapter"), wanted, rtol=0, atol=1e-12)
    config = vit_torch.AutoModelForImageClassification.from_pretrained(tmp_path / "adapter").config
    assert config.id2label == {i: f"LABEL_{i}" for i in range(5)}

    table = {**config.to_dict(), "id2label": dict(enumerate("abcde"))}
    (tmp_path / "adapter/config.json").write_text(json.dumps(table))
    model = vit_flax.FlaxAutoModelForImageClassification.from_pretrained(tmp_path / "adapter")
    assert [*model.config.id2label.values()] == [*"abcde"]
    own = vit_torch.AutoModelForImageClassification.from_pretrained(
        tmp_path / "adapter", id2label=dict(enumerate("vwxyz"))
    )
    assert own.config.id2label[4] == "z"


def test_an_adapter_trained_at_another_image_size(network, adapter, tmp_path):
    """Its `config.json` says the size; the base model's positions are resampled to it."""
    place = tmp_path / "adapter"
    shutil.copytree(adapter[0], place)
    table = json.loads((network("vit") / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**table, "image_size": 16}))
    model = vit_torch.AutoModelForImageClassification.from_pretrained(place, dtype="auto").eval()
    assert model.config.image_size == 16
    x = torch.tensor(np.random.default_rng(6).normal(size=(1, 3, 16, 16)))
    theirs = peft.PeftModel.from_pretrained(load_peer(network("vit"), "vit"), place).double()
    with torch.no_grad():
        wanted = numbers(theirs(x, interpolate_pos_encoding=True))
        np.testing.assert_allclose(numbers(model(x)), wanted, rtol=0, atol=1e-6)


def test_predict_and_inspect(network, adapter, tmp_path, command):
    place = tmp_path / "adapter"
    shutil.copytree(adapter[0], place)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(place)
    PIL.Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    code, merged_report, _ = command("convert", place, tmp_path / "merged")
    assert code == 0
    assert "LoRA of rank 4 on 4 layers (query, value)" in rows(merged_report)["set"]
    outputs = []
    files = (place, place / "adapter_model.safetensors", tmp_path / "merged")
    for model in files:
        code, out, err = command("predict", tmp_path / "a.png", "--model", model)
        assert (code, err) == (0, "")
        outputs.append(out)
    assert len({*outputs}) == 1
    assert outputs[0].count("LABEL_") == 3

    code, out, err = command("inspect", place)
    assert (code, err) == (0, "")
    table = rows(out)
    assert table["adapter"] == "LoRA of rank 4 on 4 layers (query, value), and classifier whole"
    assert table["scale"] == "alpha / r, alpha 6, r 4"
    assert table["family"] == "vit, names of Transformers 4"
    assert table["base"] == str(network("vit"))
    code, out, _ = command("inspect", place, "--json")
    assert json.loads(out)["adapter"]["saved"] == ["classifier.bias", "classifier.weight"]


def test_rename_by_the_command(adapter, tmp_path, command):
    place, _ = adapter
    code, out, err = command("convert", place, tmp_path / "5", "--to", "peft-5", "--dtype",
                             "float32")  # fmt: skip
    assert (code, err) == (0, "")
    table = rows(out)
    assert table["to"] == f"{tmp_path / '5'} (peft-5, float32)"
    assert table["verified"] == "10 tensors read again and equal"
    tensors = load_file(tmp_path / "5/adapter_model.safetensors")
    assert {x.dtype for x in tensors.values()} == {np.dtype(np.float32)}
    before = contents(tmp_path)
    code, _, err = command("convert", place, tmp_path / "5", "--to", "peft-5")
    assert code == 2
    assert "already there" in err
    code, _, err = command("convert", place, tmp_path / "5")
    assert code == 2
    assert "an adapter is in this folder" in err
    assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has no preprocessor_config.json")
def test_export_of_an_adapter(adapter, tmp_path, command):
    place, wanted = adapter
    code, _, _ = command("export", place, tmp_path / "m.jaxexport", "--no-check")
    assert code == 0
    from vit_flax.export import load

    logits = np.asarray(load(tmp_path / "m.jaxexport")(pixels().float().numpy()))
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-5)


def test_where_the_base_model_is_looked_for(network, adapter, tmp_path, monkeypatch):
    place, wanted = adapter
    (tmp_path / "far").mkdir()
    shutil.copytree(place, tmp_path / "far/adapter")
    shutil.copytree(network("vit"), tmp_path / "far/adapter/base")
    edit(tmp_path / "far/adapter", base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path)
    np.testing.assert_allclose(run_torch("far/adapter"), wanted, rtol=0, atol=1e-12)

    edit(tmp_path / "far/adapter", base_model_name_or_path=None)
    with pytest.raises(ConfigError, match=r"names no base model\. Name it with --base"):
        run_torch("far/adapter")
    own = run_torch(network("vit"), adapter="far/adapter")
    np.testing.assert_allclose(own, wanted, rtol=0, atol=1e-12)
    edit(tmp_path / "far/adapter", base_model_name_or_path="not/there/at/all")
    with pytest.raises(OSError, match=r"base model of the adapter far/adapter: not/there.*--base"):
        run_torch("far/adapter")


def test_from_the_hub(network, adapter, hub, command):  # noqa: F811
    """The adapter, and its base model at the revision that it names."""
    place, wanted = adapter
    serve(hub, "someone/vit", network("vit"))
    commit = hub.repositories["someone/vit"].refs["main"]
    hub.repositories["someone/vit"].commit({"config.json": b"{}"})
    copy = place.parent / "hub"
    shutil.copytree(place, copy)
    edit(copy, base_model_name_or_path="someone/vit", revision=commit)
    serve(hub, "someone/adapter", copy)
    np.testing.assert_allclose(run_torch("someone/adapter"), wanted, rtol=0, atol=1e-12)
    own = run_torch("someone/vit", adapter="someone/adapter", revision=commit)
    np.testing.assert_allclose(own, wanted, rtol=0, atol=1e-12)
    # Some put the model's configuration beside it.
    config = (network("vit") / "config.json").read_bytes()
    hub.repositories["someone/adapter"].commit({"config.json": config})
    np.testing.assert_allclose(run_torch("someone/adapter"), wanted, rtol=0, atol=1e-12)
    code, out, _ = command("inspect", "someone/adapter")
    assert code == 0
    assert rows(out)["base"] == f"someone/vit, revision {commit}"


def test_a_whole_model_beside_an_adapter_is_a_model(network, adapter, tmp_path):
    shutil.copytree(adapter[0], tmp_path / "both")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(network("vit") / name, tmp_path / "both")
    np.testing.assert_array_equal(run_torch(tmp_path / "both"), run_torch(network("vit")))


def test_pickles_are_read_and_run_nothing(adapter, tmp_path, nowhere):
    place, wanted = adapter
    shutil.copytree(place, tmp_path / "pickle")
    tensors = load_file(tmp_path / "pickle/adapter_model.safetensors")
    (tmp_path / "pickle/adapter_model.safetensors").unlink()
    file = tmp_path / "pickle/adapter_model.bin"
    torch.save({name: torch.tensor(x) for name, x in tensors.items()}, file)
    np.testing.assert_allclose(run_torch(tmp_path / "pickle"), wanted, rtol=0, atol=1e-12)
    assert not list(same_adapters(read_adapter(place), read_adapter(tmp_path / "pickle")))

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    file.write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(ViTError):
        read_adapter(tmp_path / "pickle")
    assert not (tmp_path / "ran").exists()


# -- what is refused


def edit(place: Path, **fields) -> None:
    path = place / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


REFUSED = [
    ({"peft_type": "IA3"}, "`peft_type` must be 'LORA'; given 'IA3'"),
    ({"peft_type": "LOHA"}, "given 'LOHA'.*merge_and_unload"),
    ({"peft_type": None}, "given none"),
    ({"use_qalora": True}, "`use_qalora`.*QA-LoRA"),
    ({"layer_replication": [[0, 1], [0, 2]]}, "blocks that are used several times"),
    ({"trainable_token_indices": [1]}, "rows of an embedding table"),
    ({"target_parameters": ["x"]}, "`target_parameters`"),
    ({"kasa_config": {"beta": 1}}, "KaSA"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base model's own"),
    ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    ({"new_in_2027": 0.5}, "`new_in_2027` is 0.5, which changes the numbers in a way"),
    ({"r": 3}, "its rank is 4; adapter_config.json says 3"),
    ({"rank_pattern": {"value": 8}}, "value: its rank is 4; adapter_config.json says 8"),
    ({"r": "4"}, "`r` must be a positive integer; given '4'"),
    ({"lora_alpha": float("nan")}, "`lora_alpha` must be a number"),
    ({"lora_alpha": 10**400}, "`lora_alpha` must be a number"),
    ({"use_rslora": "yes"}, "`use_rslora` must be true or false"),
    ({"use_dora": True}, "no DoRA magnitude, and `use_dora`"),
    ({"target_modules": ["query"]}, "value: the file has an adapter for this layer, which"),
    ({"target_modules": "("}, "`target_modules` must be made of regular expressions"),
    ({"target_modules": [1]}, "`target_modules` must be a list of names"),
    ({"layers_to_transform": [0]}, r"layer\.1.*`target_modules`"),
    ({"layers_to_transform": ["0"]}, "`layers_to_transform` must be a list of block numbers"),
    ({"bias": "some"}, "`bias` must be"),
    ({"base_model_name_or_path": 3}, "`base_model_name_or_path` must be a string"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_settings_that_are_refused(adapter, tmp_path, fields, message):
    shutil.copytree(adapter[0], tmp_path / "adapter")
    edit(tmp_path / "adapter", **fields)
    with pytest.raises((ConfigError, CheckpointError), match=message) as caught:
        vit_flax.FlaxAutoModelForImageClassification.from_pretrained(tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(caught.value)


_QUERY = "base_model.model.vit.encoder.layer.0.attention.attention.query"

# what happens to the tensors, and what is said
DAMAGED = {
    "half": (lambda t: t.pop(f"{_QUERY}.lora_B.weight"), r"query: lora_B is missing"),
    "unknown layer": (
        lambda t: t.update({f"{_QUERY.replace('query', 'gate')}.lora_A.weight": t.popitem()[1]}),
        r"no layer of a vit model is called vit\.encoder\.layer\.0\.attention\.attention\.gate",
    ),
    "other method": (
        lambda t: t.update({f"{_QUERY}.hada_w1_a": np.zeros((4, 4))}),
        r"hada_w1_a: no tensors of LoRA",
    ),
    "block that is not there": (
        lambda t: t.update(
            {k.replace("layer.0.", "layer.7."): v for k, v in t.items() if "layer.0." in k}
        ),
        r"does not fit its base model: encoder\.layer\.7.*has no such layer",
    ),
    "width": (
        lambda t: t.update({f"{_QUERY}.lora_A.weight": np.zeros((4, 20))}),
        r"query: it is for a weight \(16, 20\); the base model's is \(16, 16\)",
    ),
    "classifier's width": (
        lambda t: t.update({"base_model.model.classifier.weight": np.zeros((3, 20))}),
        r"classifier\.weight.*\(3, 20\)",
    ),
    "not floating": (
        lambda t: t.update({f"{_QUERY}.lora_A.weight": np.zeros((4, 16), np.int32)}),
        r"lora_A must be floating point; given int32",
    ),
    "three axes": (
        lambda t: t.update({f"{_QUERY}.lora_A.weight": np.zeros((4, 16, 1))}),
        r"lora_A \(4, 16, 1\) and lora_B",
    ),
    "empty": (lambda t: t.clear(), "the file holds no tensors"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_files_that_are_refused(adapter, tmp_path, case):
    damage, message = DAMAGED[case]
    shutil.copytree(adapter[0], tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=message):
        vit_torch.AutoModelForImageClassification.from_pretrained(tmp_path / "adapter")


def test_other_base_models_are_refused(network, adapter, tmp_path, command):
    place, _ = adapter
    with pytest.raises(CheckpointError, match="of the family 'vit'; its base model is of 'beit'"):
        run_torch(network("beit"), adapter=place)
    code, _, err = command("convert", place, tmp_path / "out", "--base", network("dinov2"))
    assert code == 2
    assert err.count("\n") == 1
    assert "of the family 'vit'; its base model is of 'dinov2'" in err
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="is an adapter itself"):
        run_torch(place, adapter=place)
    with pytest.raises(InputError, match=r"no adapter folder.*Choose a format for whole models"):
        convert(network("vit"), tmp_path / "out", to="peft-4")
    with pytest.raises(InputError, match="`image_size` is for whole models"):
        convert(place, tmp_path / "out", to="peft-5", image_size=16)
    with pytest.raises(InputError, match="an adapter is a folder"):
        convert(place, tmp_path / "out.safetensors", to="peft-5")
    with pytest.raises(InputError, match="`names` must be one of"):
        write_adapter(tmp_path / "out", read_adapter(place), "transformers-6")
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_a_family(network, tmp_path):
    """Names of a base network do not say of which family it is; its configuration does."""
    make_adapter(tmp_path / "4", network("base"), "base", **QUERY_VALUE)
    edit(tmp_path / "4", base_model_name_or_path=None)
    with pytest.raises(InputError, match=r"say what its base model is.*--base"):
        convert(tmp_path / "4", tmp_path / "5", to="peft-5")
    convert(tmp_path / "4", tmp_path / "5", to="peft-5", base=network("base"))
    names = load_file(tmp_path / "5/adapter_model.safetensors")
    assert "base_model.model.layers.1.attention.v_proj.lora_B.weight" in names
