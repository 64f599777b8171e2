"""`vit convert`: every tensor accounted for, odd and hostile files, and failures while writing."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from convert_sources import (  # noqa: F401
    command_fixture,
    contents,
    make_source,
    nowhere_fixture,
    rows,
    source_fixture,
    timm_state,
)
from networks import make_config, random_weights
from safetensors.numpy import load_file, save_file

from vit_common.config import DeiTConfig, ViTConfig
from vit_common.errors import (
    CheckpointError,
    ConfigError,
)
from vit_common.files.checkpoint import write_checkpoint
from vit_common.files.containers.tensor import Tensor
from vit_convert import write
from vit_convert.convert import convert as run_convert
from vit_torch import AutoModelForImageClassification, ViTForImageClassification, ViTModel

# -- accounting


def save_hub(place: Path, arrays, **config) -> Path:
    place.mkdir()
    save_file(arrays, place / "model.safetensors")
    made = make_config(num_hidden_layers=2)
    (place / "config.json").write_text(json.dumps({**made.to_dict(), **config}))
    return place


def hub_arrays(head="classifier", dtype=np.float32, blocks=2):
    weights = random_weights(make_config(num_hidden_layers=blocks), head)
    return {name: w.astype(dtype) for name, w in weights.items()}


def test_every_fault_is_in_one_error(tmp_path, command):
    arrays = hub_arrays()
    del arrays["vit.layernorm.bias"]
    arrays["classifier.bias"] = np.zeros(6, np.float32)
    arrays["vit.encoder.layer.0.extra"] = np.zeros(2, np.float32)
    arrays["vit.encoder.layer.1.output.dense.bias"] = np.zeros(48, np.int64)
    source = save_hub(tmp_path / "source", arrays)
    code, _, err = command("convert", source, tmp_path / "out")
    assert code == 2
    for part in (
        "4 faults:",
        "layernorm.bias: missing",
        "classifier.bias: its shape is (6,); by the configuration it must be (5,)",
        "vit.encoder.layer.0.extra: nothing here knows this name",
        "encoder.layer.1.output.dense.bias: its dtype is int64; wanted one of float64, float32",
        "Nothing was written",
    ):
        assert part in err
    assert not (tmp_path / "out").exists()


def test_ignore(tmp_path, command):
    arrays = hub_arrays() | {"vit.extra.0": np.zeros(2, np.float32)}
    source = save_hub(tmp_path / "source", arrays)
    assert command("convert", source, tmp_path / "out")[0] == 2
    code, out, _ = command("convert", source, tmp_path / "out", "--ignore", r"vit\.extra\..*")
    assert code == 0
    assert "vit.extra.0: given up by the caller" in rows(out)["ignored"]


def test_half_of_the_blocks_missing(tmp_path, command):
    arrays = hub_arrays(blocks=4)
    half = {n: a for n, a in arrays.items() if ".layer.2." not in n and ".layer.3." not in n}
    source = save_hub(tmp_path / "source", half, num_hidden_layers=4)
    code, _, err = command("convert", source, tmp_path / "out")
    assert code == 2
    assert "32 faults:" in err
    assert "encoder.layer.3.layernorm_after.bias: missing" in err
    # Without a configuration only a gap can be seen.
    state = {n: a for n, a in timm_state(4).items() if "blocks.1." not in n}
    save_file(state, tmp_path / "gap.safetensors")
    code, _, err = command("convert", tmp_path / "gap.safetensors", tmp_path / "o", "--heads", 4)
    assert code == 2
    assert "blocks 1 are missing; the last one is 3" in err


def test_every_row_of_a_long_list_is_counted(tmp_path, command):
    source = save_hub(tmp_path / "source", hub_arrays(), num_hidden_layers=12)
    code, _, err = command("convert", source, tmp_path / "out")
    assert code == 2
    assert "160 faults:" in err
    assert err.count(": missing") == 60
    assert "and 100 more" in err


def test_a_second_head_is_said(tmp_path, command):
    arrays = hub_arrays() | {
        "decoder.0.weight": np.ones((192, 48, 1, 1), np.float32),
        "decoder.0.bias": np.ones(192, np.float32),
    }
    arrays["vit.pooler.dense.weight"] = np.ones((48, 48), np.float32)
    arrays["vit.pooler.dense.bias"] = np.ones(48, np.float32)
    arrays["vit.embeddings.mask_token"] = np.ones((1, 1, 48), np.float32)
    source = save_hub(tmp_path / "source", arrays)
    code, out, _ = command("convert", source, tmp_path / "out", "--json")
    assert code == 0
    ignored = json.loads(out)["ignored"]
    assert {n for n, why in ignored.items() if why == "a second head"} == {
        "decoder.0.weight",
        "decoder.0.bias",
    }
    assert len(ignored) == 5
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(hub_arrays())


def test_parameters_that_the_configuration_has_not_can_be_given_up(tmp_path, command):
    arrays = hub_arrays() | {"vit.encoder.layer.0.lambda_1": np.ones(48, np.float32)}
    source = save_hub(tmp_path / "source", arrays)
    code, _, err = command("convert", source, tmp_path / "out")
    assert code == 2
    assert "encoder.layer.0.lambda_1: the configuration has no such parameter" in err
    code, out, _ = command("convert", source, tmp_path / "out", "--ignore", r".*lambda_1")
    assert code == 0
    assert "encoder.layer.0.lambda_1: given up by the caller" in out


def test_a_distilled_checkpoint_names_its_classes(tmp_path):
    config = DeiTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96,
        image_size=32, patch_size=8, num_labels=5,
    )  # fmt: skip
    place = make_source(tmp_path / "deit", config=config, head="teacher")
    for cls in (ViTModel, ViTForImageClassification):
        with pytest.raises(ConfigError, match=r"'deit'.*use DeiTModel or DeiTForImageClass"):
            cls.from_pretrained(place)
    assert type(AutoModelForImageClassification.from_pretrained(place)).__name__ == (
        "DeiTForImageClassificationWithTeacher"
    )
    run_convert(place, tmp_path / "deit.pth", to="deit")
    with pytest.raises(ConfigError, match=r"'deit'.*use DeiTModel or DeiTForImageClass"):
        ViTForImageClassification.from_pretrained(tmp_path / "deit.pth", num_attention_heads=4)
    # A configuration of a ViT is believed, so it is the weights that do not fit.
    sizes = {name: getattr(config, name) for name in ViTConfig.fields if hasattr(config, name)}
    for file in (place, tmp_path / "deit.pth"):
        with pytest.raises(
            CheckpointError,
            match=r"have a distillation token, which ViTModel does not.*use DeiTModel or DeiTFor",
        ):
            ViTModel.from_pretrained(file, config=ViTConfig(**sizes))


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (lambda s: {"module." + n: t for n, t in s.items()}, None),
        (lambda s: {"_orig_mod." + n: t for n, t in s.items()}, None),
        (lambda s: {"state_dict": {"module." + n: t for n, t in s.items()}, "epoch": 3}, None),
        (
            lambda s: {
                "model": s,
                "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
                "scaler": {"scale": torch.ones(1)},
            },
            "state of the optimizer",
        ),
        (
            lambda s: {"model": s, "model_ema": {n: t + 1 for n, t in s.items()}},
            "an average of the weights over training; the weights themselves are taken",
        ),
        (
            lambda s: {"state_dict": s, "state_dict_ema": {n: t + 1 for n, t in s.items()}},
            "an average of the weights over training; the weights themselves are taken",
        ),
        (lambda s: {"model_ema": s}, None),
    ],
    ids=["module", "compiled", "lightning", "optimizer", "ema", "timm's ema", "only an average"],
)
def test_wrappers_and_copies(wrap, reason, tmp_path, command):
    state = {n: torch.tensor(a) for n, a in timm_state().items()}
    torch.save(wrap(state), tmp_path / "a.pth")
    code, out, err = command(
        "convert", tmp_path / "a.pth", tmp_path / "out.safetensors", "--heads", 4, "--json",
        "--to", "timm",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert set(json.loads(out)["ignored"].values()) == ({reason} if reason else set())
    again = load_file(tmp_path / "out.safetensors")
    assert set(again) == set(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(again[name], tensor.numpy())


def test_several_networks_in_one_file(tmp_path, command):
    state = {n: torch.tensor(a) for n, a in timm_state().items()}
    torch.save({"left": state, "right": state}, tmp_path / "a.pth")
    code, _, err = command("convert", tmp_path / "a.pth", tmp_path / "out", "--heads", 4)
    assert code == 2
    assert "several networks, under 'left/', 'right/'" in err


def test_two_formats_fit(tmp_path, command):
    """Nothing in the names tells timm's from DINO's without a head."""
    state = {n: torch.tensor(a) for n, a in timm_state().items() if not n.startswith("head.")}
    torch.save(state, tmp_path / "a.pth")
    for name, rule in (("timm", "bicubic_antialias"), ("dino", "bicubic_offset")):
        code, _, err = command("convert", tmp_path / "a.pth", tmp_path / name, "--heads", 4)
        assert code == 2
        assert "fit timm (" in err
        assert "dino (" in err
        assert "`--from` of the command" in err
        code, _, _ = command(
            "convert", tmp_path / "a.pth", tmp_path / name, "--heads", 4, "--from", name
        )
        assert code == 0
        assert ViTConfig.from_pretrained(tmp_path / name).position_resize == rule


def test_unknown_keys_of_a_configuration_are_kept(tmp_path, command):
    source = save_hub(tmp_path / "source", hub_arrays(), my_notes={"a": [1, 2]})
    assert command("convert", source, tmp_path / "out", "--to", "flax")[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["my_notes"] == {"a": [1, 2]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("position_embedding_type", "relative_key"),
        ("qk_norm", True),
        ("rope_theta", 100.0),
        ("is_decoder", True),
        ("norm_type", "rmsnorm"),
        ("pruned_heads", {"0": [1]}),
    ],
)
def test_keys_that_change_the_mathematics_are_refused(key, value, tmp_path, command):
    source = save_hub(tmp_path / "source", hub_arrays(), **{key: value})
    code, _, err = command("convert", source, tmp_path / "out")
    assert code == 2
    assert key in err
    assert "changes what the network computes" in err
    with pytest.raises(ConfigError, match=key):
        AutoModelForImageClassification.from_pretrained(source)


def test_a_configuration_of_another_network(tmp_path, command):
    source = save_hub(tmp_path / "source", hub_arrays(), model_type="swin")
    code, _, err = command("convert", source, tmp_path / "out")
    assert code == 2
    assert "swin" in err


# -- hostile and odd files


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_pickles_with_code_are_refused_and_not_run(nowhere, command):
    with zipfile.ZipFile("evil.npz", "w") as archive:
        stream = io.BytesIO()
        np.lib.format.write_array(stream, np.array([Evil()], object), allow_pickle=True)
        archive.writestr("cls.npy", stream.getvalue())
    with open("old.pth", "wb") as plain:
        plain.write(pickle.dumps({"model": Evil()}))
    torch.save({"model": Evil()}, "evil.pth")
    for name, what in (
        ("evil.npz", "cls"),
        ("old.pth", ""),
        ("evil.pth", "mkdir"),
    ):
        code, _, err = command("convert", name, "out")
        assert code == 2
        assert name in err
        assert what in err
        assert command("inspect", name)[0] == 2
    assert not Path("executed").exists()
    assert not Path("out").exists()


def test_a_zip_bomb(nowhere, command):
    """A member that unpacks to more than the file can be."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 26,)}
    )
    with zipfile.ZipFile("bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("embedding/kernel.npy", header.getvalue() + bytes(1 << 22))
    for arguments in (("convert", "bomb.npz", "out"), ("inspect", "bomb.npz")):
        code, _, err = command(*arguments)
        assert code == 2
        assert "bomb.npz" in err


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int32", "bool"])
def test_weights_that_are_no_floats(dtype, tmp_path, command):
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    name = "vit.encoder.layer.0.output.dense.weight"
    arrays = hub_arrays()
    arrays[name] = arrays[name].astype(kind)
    source = tmp_path / "source"
    source.mkdir()
    write_checkpoint(source / "model.safetensors", arrays)
    (source / "config.json").write_text(make_config(num_hidden_layers=2).to_json_string())
    code, _, err = command("convert", source, tmp_path / "out")
    assert code == 2
    assert f"encoder.layer.0.output.dense.weight: its dtype is {dtype}" in err
    code, out, _ = command("inspect", source)
    assert code == 0
    assert f"{dtype}, which is not floating: {name}" in out


def test_weights_that_are_not_contiguous_or_shared(tmp_path, command):
    state = {n: torch.tensor(a) for n, a in timm_state().items()}
    key = "blocks.0.attn.proj.weight"
    state[key] = state[key].T.contiguous().T
    assert not state[key].is_contiguous()
    state["blocks.1.norm1.weight"] = state["blocks.0.norm1.weight"]
    state["blocks.1.norm2.bias"] = torch.ones(1).expand(48)
    torch.save(state, tmp_path / "a.pth")
    arguments = ("--heads", 4, "--to", "timm")
    code, _, _ = command("convert", tmp_path / "a.pth", tmp_path / "b.safetensors", *arguments)
    assert code == 0
    again = load_file(tmp_path / "b.safetensors")
    for name, tensor in state.items():
        np.testing.assert_array_equal(again[name], tensor.numpy())


def test_nan_in_the_weights_is_no_failure_of_the_conversion(tmp_path, command):
    arrays = hub_arrays()
    arrays["classifier.bias"][0] = np.nan
    source = save_hub(tmp_path / "source", arrays)
    assert command("convert", source, tmp_path / "out")[0] == 0


@pytest.mark.parametrize("name", ["missing", "empty.npz", "text.pth", "folder"])
def test_sources_that_are_not_there_or_nothing(name, nowhere, command):
    Path("empty.npz").touch()
    Path("text.pth").write_text("not weights at all, " * 20)
    Path("folder").mkdir()
    for arguments in (("convert", f"./{name}", "out"), ("inspect", f"./{name}")):
        code, out, err = command(*arguments)
        assert (code, out) == (2, "")
        assert name in err
    assert not Path("out").exists()


# -- failures while writing


def test_an_interrupted_read_leaves_what_was_there(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run_convert(source, out)
    before = contents(tmp_path)
    reads = stop = 0
    original = Tensor.read

    def failing(self, *args, **kwargs):
        nonlocal reads
        reads += 1
        if reads > stop:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "read", failing)
    for limit in (0, 1, 7, 19):
        reads, stop = 0, limit
        for target in (out, tmp_path / "new" / "deep", tmp_path / "other" / "a.msgpack"):
            with pytest.raises(KeyboardInterrupt):
                run_convert(source, target, to="flax", dtype="float16", force=True)
            reads = 0
        assert contents(tmp_path) == before
        assert {p.name for p in tmp_path.iterdir()} == {"source", "out"}


def test_a_failing_rename_leaves_what_was_there(
    source, tmp_path, monkeypatch, no_exchange, command
):
    out = tmp_path / "out"
    run_convert(source, out)
    before = contents(tmp_path)
    original = os.replace
    count = stop = 0

    def failing(a, b, **kwargs):
        nonlocal count
        if Path(b).parent == out:
            count += 1
            if count == stop:
                raise OSError(28, "No space left on device")
        return original(a, b, **kwargs)

    monkeypatch.setattr(os, "replace", failing)
    for number in (1, 2, 3):
        stop, count = number, 0
        code, _, err = command("convert", source, out, "--dtype", "float16", "--force")
        assert code == 2
        assert "cannot be written" in err
        assert contents(tmp_path) == before


def test_a_full_disk_leaves_no_directories(source, tmp_path, monkeypatch, no_exchange, command):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            for target in (tmp_path / "new" / "deep", tmp_path / "new" / "a.npz"):
                code, _, err = command("convert", source, target)
                assert code == 2
                assert "No space left on device" in err
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


def test_a_directory_that_may_not_be_written(source, tmp_path, monkeypatch, command):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", denied)
    code, _, err = command("convert", source, tmp_path / "out" / "a.npz")
    assert code == 2
    assert f"{tmp_path / 'out'}: cannot be written" in err
    monkeypatch.undo()
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_directory(source, tmp_path, command):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    try:
        for target in (closed, closed / "a.npz", closed / "new" / "a.npz"):
            code, _, err = command("convert", source, target)
            assert code == 2
            assert "cannot be" in err
        assert not list(closed.iterdir())
    finally:
        closed.chmod(0o755)


def test_a_file_where_a_directory_should_be(source, tmp_path, command):
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "file" / "a.npz"):
        code, _, err = command("convert", source, target)
        assert code == 2
        assert "file" in err
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("fault", ["a bit", "a name", "settings"])
def test_a_failed_verification_leaves_what_was_there(fault, source, tmp_path, monkeypatch, command):
    out = tmp_path / "out"
    run_convert(source, out)
    before = contents(tmp_path)
    original = write._write_into

    def spoiled(staging, *args):
        original(staging, *args)
        path = staging / "model.safetensors"
        arrays = load_file(path)
        if fault == "a bit":
            name = "vit.encoder.layer.0.output.dense.bias"
            arrays[name] = np.nextafter(arrays[name], np.float32(9))
        elif fault == "a name":
            a, b = (f"vit.encoder.layer.0.layernorm_{w}.bias" for w in ("before", "after"))
            arrays[a], arrays[b] = arrays[b], arrays[a]
        else:
            config = json.loads((staging / "config.json").read_text())
            (staging / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
        save_file(arrays, path, {"format": "pt"})

    monkeypatch.setattr(write, "_write_into", spoiled)
    code, _, err = command("convert", source, out, "--force")
    assert code == 2
    assert "verification failed" in err
    assert contents(tmp_path) == before
    # Without looking, nobody sees.
    assert command("convert", source, out, "--force", "--no-verify")[0] == 0
