"""`vit convert` and `vit inspect`: options, reports, what is refused, and what is left after a
failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
from networks import make_config
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vit_common.config import BeitConfig, Dinov2Config, ViTConfig
from vit_common.errors import (
    CheckpointError,
    ExistingFileError,
    InputError,
    MissingFileError,
)
from vit_convert.convert import convert as run_convert
from vit_torch import ViTForImageClassification

LABELS = ["cat", "dog", "a tree, and more", "Zürich", "写真"]


# -- the report


def test_report_for_people(source, tmp_path, command):
    code, out, err = command("convert", source, tmp_path / "out", "--to", "flax")
    assert (code, err) == (0, "")
    table = rows(out)
    assert table["from"].startswith(f"{source / 'model.safetensors'} (hub:")
    assert table["to"] == f"{tmp_path / 'out'} (flax, float32)"
    assert table["model"] == "vit, loads as ViTForImageClassification"
    shapes = load_file(source / "model.safetensors")
    count = sum(a.size for a in shapes.values())
    assert f"{len(shapes)} read, {len(shapes)} written, {count:,} parameters" in table["tensors"]
    assert table["images"] == "preprocessing from: preprocessor_config.json"
    assert table["wrote"].splitlines() == [
        str(tmp_path / "out" / n)
        for n in ("config.json", "flax_model.msgpack", "preprocessor_config.json")
    ]
    assert table["verified"].startswith(
        f"{len(shapes)} tensors read again and equal; outputs of source and target differ"
    )
    assert set(contents(tmp_path / "out")) == {
        "config.json",
        "flax_model.msgpack",
        "preprocessor_config.json",
    }


def test_report_says_what_was_set_and_from_what(tmp_path, command):
    save_file(timm_state(), tmp_path / "a.safetensors")
    code, out, _ = command("convert", tmp_path / "a.safetensors", tmp_path / "out", "--heads", 4)
    assert code == 0
    said = rows(out)["set"].splitlines()
    assert "num_attention_heads = 4 (from: given)" in said
    assert any("layer_norm_eps = 1e-06" in line and "the format timm" in line for line in said)
    assert any("hidden_size = 48" in line and "shapes" in line for line in said)


def test_report_as_json(source, tmp_path, command):
    code, out, err = command("convert", source, tmp_path / "out.npz", "--json")
    assert (code, err) == (0, "")
    table = json.loads(out)
    assert table["format_from"] == "hub"
    assert table["format_to"] == "google"
    assert table["written"] == [str(tmp_path / "out.npz")]
    assert table["verification"]["tensors"] == table["tensors_read"]
    assert table["verification"]["logits_max_abs"] <= 1e-6 * table["verification"]["logits_scale"]
    assert any("hidden_act='gelu_pytorch_tanh'" in text for text in table["warnings"])


def test_dry_run_writes_nothing(source, tmp_path, command):
    before = contents(tmp_path)
    for target in ("out", "deep/er/out.npz"):
        code, out, _ = command("convert", source, tmp_path / target, "--dry-run")
        assert code == 0
        assert f"would write {tmp_path / target}" in out
        assert "verified" not in out
    assert contents(tmp_path) == before
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


def test_no_verify(source, tmp_path, command):
    code, out, _ = command("convert", source, tmp_path / "out", "--no-verify", "--json")
    assert code == 0
    assert json.loads(out)["verification"] is None


# -- targets


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("a.safetensors", "hub"), ("a.msgpack", "flax"), ("a.npz", "google"), ("folder", "hub")],
)
def test_the_suffix_says_what_is_written(name, wanted, source, tmp_path, command):
    code, out, _ = command("convert", source, tmp_path / "new" / "deep" / name, "--json")
    assert code == 0
    assert json.loads(out)["format_to"] == wanted
    written = contents(tmp_path / "new" / "deep")
    assert (name in written) == ("." in name)
    assert not [n for n in written if ".tmp" in n]


def test_pickles_need_a_format(source, tmp_path, command):
    code, _, err = command("convert", source, tmp_path / "a.pth")
    assert code == 2
    assert "say which format to write with `to`" in err
    code, _, _ = command("convert", source, tmp_path / "a.pth", "--to", "deit")
    assert code == 0
    assert set(torch.load(tmp_path / "a.pth", weights_only=True)) == {"model"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "pickle"], "must be one of hub, flax, flax-safetensors, timm, deit, dino, beit"),
        (["--to", "mae"], "read here, but not written"),
        (["--to", "beit"], "holds the families beit"),
        (["--from", "timm"], "not weights in the format 'timm'"),
        (["--from", "nothing"], "format must be one of hub, flax"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--image-size", "0"], "image-size"),
        (["--image-size", "33"], "multiple of the patch, 8 x 8"),
        (["--num-labels", "4"], "has 5 classes; given 4"),
        (["--heads", "0"], "heads"),
        (["--heads", "5"], "must be a multiple of `num_attention_heads`"),
        (["--set", "hidden_act"], "--set must be FIELD=VALUE"),
        (["--set", "hidden_act=sine"], "`hidden_act` must be"),
        (["--ignore", "("], "regular expressions"),
        (["--max-shard-size", "many"], "max_shard_size"),
    ],
)
def test_wrong_options(arguments, message, source, tmp_path, command):
    code, out, err = command("convert", source, tmp_path / "out", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("vit: error: ")
    assert err.count("\n") == 1 or "usage" in err
    assert message in err
    assert not (tmp_path / "out").exists()


def test_unknown_options_of_the_function(source, tmp_path):
    with pytest.raises(InputError, match="precision"):
        run_convert(source, tmp_path / "out", precision="highest")


def test_overwriting_needs_force(source, tmp_path, command):
    for target in (tmp_path / "out", tmp_path / "a.npz"):
        assert command("convert", source, target)[0] == 0
        before = contents(tmp_path)
        code, _, err = command("convert", source, target, "--dtype", "bfloat16")
        assert code == 2
        assert "already there; nothing was written. Pass --force" in err
        assert contents(tmp_path) == before
        assert command("convert", source, target, "--dtype", "bfloat16", "--force")[0] == 0
    arrays = load_file(tmp_path / "out" / "model.safetensors")
    assert {a.dtype.name for a in arrays.values()} == {"bfloat16"}


def test_a_source_onto_itself(source, command):
    before = contents(source)
    code, _, err = command("convert", source, source)
    assert (code, contents(source)) == (2, before)
    assert "already there" in err
    code, _, _ = command("convert", source, source, "--force", "--dtype", "float16")
    assert code == 0
    assert {a.dtype.name for a in load_file(source / "model.safetensors").values()} == {"float16"}


def test_a_new_layout_leaves_no_weights_of_the_old_one(source, tmp_path, command):
    out = tmp_path / "out"
    assert command("convert", source, out)[0] == 0
    (out / "notes.txt").write_text("mine")
    code, _, err = command("convert", source, out, "--to", "flax", "--force")
    assert (code, err) == (0, "")
    assert set(contents(out)) == {
        "config.json",
        "flax_model.msgpack",
        "notes.txt",
        "preprocessor_config.json",
    }


@pytest.mark.parametrize("to", ["hub", "flax", "flax-safetensors"])
def test_shards(to, source, tmp_path, command):
    out = tmp_path / "out"
    code, _, _ = command("convert", source, out, "--to", to, "--max-shard-size", "20KB")
    assert code == 0
    files = set(contents(out))
    assert sum("-of-" in name for name in files) > 2
    code, _, _ = command("convert", out, tmp_path / "back")
    assert code == 0
    first, again = (load_file(p / "model.safetensors") for p in (source, tmp_path / "back"))
    assert set(first) == set(again)
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    # From shards to one file, none of them is left.
    code, _, _ = command("convert", source, out, "--to", to, "--force")
    assert code == 0
    assert not [n for n in contents(out) if "-of-" in n or n.endswith(".index.json")]


# -- dtypes, labels, sizes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtypes_are_rounded_once(dtype, source, tmp_path, command):
    code, out, _ = command("convert", source, tmp_path / "out", "--dtype", dtype, "--json")
    assert code == 0
    assert json.loads(out)["dtype"] == dtype
    wanted = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    first, again = (load_file(p / "model.safetensors") for p in (source, tmp_path / "out"))
    for name, array in first.items():
        assert again[name].dtype == wanted
        assert again[name].tobytes() == array.astype(wanted).tobytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_what_float16_cannot_hold_is_refused(tmp_path, command):
    source = make_source(tmp_path / "source", scale=1e6)
    code, _, err = command("convert", source, tmp_path / "out", "--dtype", "float16")
    assert code == 2
    assert "more than float16 can (65504); use bfloat16" in err
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("kind", ["text", "list", "table"])
def test_labels(kind, source, tmp_path, command):
    path = tmp_path / ("labels.txt" if kind == "text" else "labels.json")
    table = {str(i): label for i, label in reversed(list(enumerate(LABELS)))}
    text = {
        "text": "\n".join(LABELS) + "\n",
        "list": json.dumps(LABELS),
        "table": json.dumps(table),
    }[kind]
    path.write_text(text, encoding="utf-8")
    assert command("convert", source, tmp_path / "out", "--labels", path)[0] == 0
    config = ViTConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == dict(enumerate(LABELS))
    assert config.label2id == {label: i for i, label in enumerate(LABELS)}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "a\nb\n", "has 5 classes; given 2 labels"),
        ("l.json", "{", "must hold a JSON list"),
        ("l.json", '{"0": "a", "2": "b"}', "without gaps"),
        ("l.json", '{"a": "a"}', "without gaps"),
        ("l.json", "3", "must hold a JSON list"),
        ("none.txt", None, "cannot be read"),
    ],
)
def test_wrong_labels(name, text, message, source, tmp_path, command):
    if text is not None:
        (tmp_path / name).write_text(text)
    code, _, err = command("convert", source, tmp_path / "out", "--labels", tmp_path / name)
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_labels_without_a_classifier(tmp_path, command):
    source = make_source(tmp_path / "source", head=None)
    code, _, err = command("convert", source, tmp_path / "out", "--num-labels", 5)
    assert code == 2
    assert "have no classifier" in err


def test_num_labels_keeps_names_there_are(tmp_path, command):
    config = make_config(num_hidden_layers=1, id2label=dict(enumerate(LABELS)))
    source = make_source(tmp_path / "source", config=config)
    assert command("convert", source, tmp_path / "out", "--num-labels", 5)[0] == 0
    table = ViTConfig.from_pretrained(tmp_path / "out").id2label
    assert table == dict(enumerate(LABELS))


def test_weights_of_another_format_are_not_deleted_without_force(source, tmp_path, command):
    """Nor what is being read, whatever is forced."""
    place = tmp_path / "place"
    assert command("convert", source, place)[0] == 0
    code, _, err = command("convert", source, place, "--to", "flax")
    assert code == 2
    assert "already there" in err
    (place / "config.json").unlink()
    (place / "preprocessor_config.json").unlink(missing_ok=True)
    code, _, err = command("convert", source, place, "--to", "flax")
    assert code == 2
    assert "weights of another format" in err
    assert (place / "model.safetensors").exists()
    assert command("convert", source, place, "--to", "flax", "--force")[0] == 0
    assert not (place / "model.safetensors").exists()  # it would be read instead
    assert command("convert", place, place, "--force")[0] == 0
    assert (place / "flax_model.msgpack").exists()  # that is what was read
    assert (place / "model.safetensors").exists()


def test_image_size(source, tmp_path, command):
    code, out, _ = command("convert", source, tmp_path / "out", "--image-size", "48x16")
    assert code == 0
    assert "image_size = (48, 16) (from: given; positions by bicubic)" in out
    config = ViTConfig.from_pretrained(tmp_path / "out")
    assert config.image_height_width == (48, 16)
    x = np.random.default_rng(0).normal(size=(1, 3, 48, 16)).astype(np.float32)
    one, other = (
        ViTForImageClassification.from_pretrained(place).eval()
        for place in (source, tmp_path / "out")
    )
    with torch.no_grad():
        want = one(torch.tensor(x), interpolate_pos_encoding=True).logits
        np.testing.assert_allclose(other(torch.tensor(x)).logits, want, rtol=0, atol=1e-5)
    prepared = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert prepared["size"] == {"height": 48, "width": 16}


def test_settings_win(source, tmp_path, command):
    code, out, _ = command(
        "convert", source, tmp_path / "out",
        "--set", "hidden_act=gelu_new", "--set", "layer_norm_eps=1e-5",
    )  # fmt: skip
    assert code == 0
    assert "hidden_act = 'gelu_new'" in rows(out)["set"]
    config = ViTConfig.from_pretrained(tmp_path / "out")
    assert (config.hidden_act, config.layer_norm_eps) == ("gelu_new", 1e-5)


# -- inspect


def test_inspect(source, command):
    code, out, err = command("inspect", source, "--lines", 3)
    assert (code, err) == (0, "")
    table = rows(out)
    assert table["format"] == "hub: Hub torch layout, names of Transformers v4"
    assert table["family"] == "vit, head: classifier"
    assert table["sizes"] == (
        "1 layers, width 48, 4 heads, MLP width 96, patches 8 x 8, image 32 x 32, 17 tokens, "
        "5 classes"
    )
    assert table["numerics"] == "gelu, layer norm eps 1e-12, positions resized by bicubic"
    assert table["images"] == "preprocessor_config.json"
    arrays = load_file(source / "model.safetensors")
    assert table["parameters"] == f"{sum(a.size for a in arrays.values()):,}"
    assert table["tensors"] == f"{len(arrays)} of float32"
    assert f"... and {len(arrays) - 3} more" in out


def test_inspect_as_json_has_every_tensor(source, command):
    code, out, _ = command("inspect", source, "--json")
    assert code == 0
    arrays = load_file(source / "model.safetensors")
    table = {row["name"]: row for row in json.loads(out)["tensors"]}
    assert {n: row["shape"] for n, row in table.items()} == {
        n: list(a.shape) for n, a in arrays.items()
    }
    assert {row["dtype"] for row in table.values()} == {"float32"}


def test_inspect_says_what_is_odd(nowhere, command):
    state = {n: torch.tensor(a) for n, a in timm_state().items()}
    state["blocks.0.norm1.bias"] = state["blocks.0.norm1.bias"].half()
    extra = {"head_extra": torch.ones(2), "nothing": torch.ones(0, 3)}
    torch.save({"model": state | extra, "optimizer": {"m": torch.ones(2)}}, "a.pth")
    code, out, _ = command("inspect", "a.pth")
    assert code == 0
    odd = rows(out)["odd"]
    assert "1 of float16" in odd
    assert "empty: model/nothing" in odd
    assert "state of the optimizer: optimizer/m" in odd
    assert "names that nothing here knows: model/head_extra" in odd
    assert "number of attention heads" in odd


def test_inspect_files_of_other_things(nowhere, command):
    save_file({"bert.encoder.weight": np.ones((2, 2), np.float32)}, "bert.safetensors")
    code, out, _ = command("inspect", "bert.safetensors")
    assert code == 0
    assert "not the weights of a Vision Transformer" in rows(out)["odd"]
    assert "bert.encoder.weight  float32   2 x 2" in out
    save_file({}, "none.safetensors")
    assert command("inspect", "none.safetensors")[0] == 0
    name = "a\x1b[31m\nb"
    save_file({name: np.ones(2, np.float32)}, "escape.safetensors")
    code, out, _ = command("inspect", "escape.safetensors")
    assert code == 0
    assert "\x1b" not in out


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 2000])
def test_inspect_of_truncated_files(keep, source, nowhere, command):
    for name in ("a.safetensors", "a.msgpack", "a.npz"):
        run_convert(source, name)
        whole = Path(name).read_bytes()
        Path(name).write_bytes(whole[:keep])
        code, out, err = command("inspect", name)
        assert code == 2, (name, out)
        assert name in err


# -- what is imported


@pytest.mark.parametrize("target", ["b.safetensors", "b.msgpack", "b.npz", "folder"])
def test_neither_torch_nor_jax_is_imported(target, tmp_path):
    save_file(timm_state(1), tmp_path / "a.safetensors")
    script = (
        "import sys; from vit_cli.main import main\n"
        f"assert main(['convert', 'a.safetensors', {target!r}, '--heads', '4']) == 0\n"
        f"assert main(['convert', {target!r}, 'again.npz', '--heads', '4']) in (0, 2)\n"
        f"assert main(['inspect', {target!r}]) == 0\n"
        "heavy = {'torch', 'jax', 'jaxlib', 'flax', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_target_that_is_there_already(source, tmp_path):
    for target in (tmp_path / "out", tmp_path / "a.npz"):
        run_convert(source, target)
        with pytest.raises(ExistingFileError, match="already there; nothing was written"):
            run_convert(source, target)
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "out" / name).unlink()
    with pytest.raises(FileExistsError, match="weights of another format"):
        run_convert(source, tmp_path / "out", to="google")


def test_a_configuration_in_metadata_is_named_by_its_file(source, tmp_path, command):
    file = tmp_path / "a.safetensors"
    run_convert(source, file)
    with safe_open(file, "np") as opened:
        table = json.loads(opened.metadata()["vit_config"])
    metadata = {"format": "pt", "vit_config": json.dumps({**table, "hidden_act": "sine"})}
    save_file(load_file(file), file, metadata)
    code, _, err = command("convert", file, tmp_path / "out")
    assert code == 2
    assert f"{file}: config: `hidden_act` must be" in err
    assert "config.json" not in err


def test_exit_codes_and_errors_of_the_function(tmp_path):
    with pytest.raises(MissingFileError):
        run_convert(tmp_path / "none.npz", tmp_path / "out")
    with pytest.raises(InputError, match="`dtype` must be one of"):
        run_convert(tmp_path, tmp_path / "out", dtype="int8")
    with pytest.raises((CheckpointError, MissingFileError)):
        run_convert(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("cls", [BeitConfig, Dinov2Config])
def test_families_keep_their_own_configuration(cls, tmp_path, command):
    fields = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3,
              "image_size": 16, "patch_size": 4, "num_labels": 5}  # fmt: skip
    if cls is BeitConfig:
        fields["intermediate_size"] = 40
    source = make_source(tmp_path / "source", config=cls(**fields))
    assert command("convert", source, tmp_path / "out", "--to", "flax")[0] == 0
    assert cls.from_pretrained(tmp_path / "out").to_dict() | {"architectures": 0} == (
        cls.from_pretrained(source).to_dict() | {"architectures": 0}
    )
