"""Broken, bent and random files: every reader ends in a result or a `ViTError`, soon and small."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from networks import InMemory, make_config, random_weights
from safetensors.numpy import load, save

from vit_cli.commands.inspect import describe
from vit_cli.main import main
from vit_cli.options import Reading
from vit_common.errors import ViTError
from vit_convert.convert import convert
from vit_convert.formats import FORMATS, NAMES
from vit_convert.save import save_parameters

# Address space on top of what is in use: room for these files many times over, not for what a
# file may claim.
ROOM = 3 << 30

FUZZ = settings(
    max_examples=10,
    deadline=5000,
    database=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # shrinking takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FEW = settings(FUZZ, max_examples=6)


@contextlib.contextmanager
def little_memory():
    """Whatever is allocated because a file says so does not fit."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(source: Path, **options: Any) -> bool:
    """Convert and inspect; whether it could be converted. Anything but a ViTError is raised."""
    fine = True
    with warnings.catch_warnings(), little_memory(), tempfile.TemporaryDirectory() as place:
        warnings.simplefilter("ignore")
        target = Path(place) / "out"
        try:
            convert(source, target, to="hub", **options)
        except ViTError:
            fine = False
        assert fine == target.exists()
        with contextlib.suppress(ViTError):
            json.dumps(describe(str(source), Reading()))
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = main(["inspect", str(source)])
        assert code in (0, 2)
        assert "(unexpected;" not in output.getvalue()
        assert "Traceback" not in output.getvalue()
    return fine


CONFIG = make_config(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
HEADS = {"overrides": {"num_attention_heads": 2}}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """One small network in every container."""
    root = tmp_path_factory.mktemp("whole")
    weights = random_weights(CONFIG, "classifier")
    tensors = {n: InMemory(w.astype(np.float32)) for n, w in weights.items()}
    save_parameters(root / "hub", CONFIG, tensors, architecture="ViTForImageClassification")
    targets = {
        "a.safetensors": "hub",
        "b.safetensors": "timm",
        "a.npz": "google",
        "a.pth": "timm",
        "b.pth": "deit",
    }
    for name, to in targets.items():
        convert(root / "hub", root / name, to=to, verify=False)
    convert(root / "hub", root / "flax", to="flax", verify=False)
    old = io.BytesIO()
    state = torch.load(root / "a.pth", weights_only=True)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    out = {name: (root / name).read_bytes() for name in targets}
    out["old.pth"] = old.getvalue()
    out["flax_model.msgpack"] = (root / "flax" / "flax_model.msgpack").read_bytes()
    out["config.json"] = (root / "flax" / "config.json").read_bytes()
    return out


CONTAINERS = (
    "a.safetensors",
    "b.safetensors",
    "a.npz",
    "a.pth",
    "b.pth",
    "old.pth",
    "flax_model.msgpack",
)


def place_file(files: dict[str, bytes], name: str, data: bytes, root: Path) -> Path:
    """The file in a folder of its own, with the configuration that it needs beside it."""
    place = Path(tempfile.mkdtemp(dir=root))
    (place / name).write_bytes(data)
    if name == "flax_model.msgpack":
        (place / "config.json").write_bytes(files["config.json"])
        return place
    return place / name


def test_whole_models_are_converted(files, tmp_path):
    table = json.loads(files["config.json"])
    assert outcome(write_model(tmp_path, table, files["a.safetensors"]))
    assert outcome(write_model(tmp_path, TIMM, files["b.safetensors"]))


@pytest.mark.parametrize("name", CONTAINERS)
def test_whole_files_are_converted(name, files, tmp_path):
    options = {} if name in ("a.safetensors", "flax_model.msgpack") else HEADS
    assert outcome(place_file(files, name, files[name], tmp_path), **options)


@pytest.mark.parametrize("name", CONTAINERS)
@FEW
@given(data=st.data())
def test_truncated_files(name, files, tmp_path, data):
    whole = files[name]
    near = st.sampled_from([0, 1, 4, 8, 9, 64, len(whole) - 1, len(whole) - 22])
    cut = data.draw(near | st.integers(0, len(whole) - 1))
    tail = data.draw(st.binary(max_size=16))
    source = place_file(files, name, whole[:cut] + tail, tmp_path)
    if len(whole) - cut > 64 + len(tail):
        assert not outcome(source, **HEADS)
    else:
        outcome(source, **HEADS)


@pytest.mark.parametrize("name", CONTAINERS)
@FUZZ
@given(data=st.data())
def test_files_with_flipped_bits(name, files, tmp_path, data):
    bent = bytearray(files[name])
    # Headers and directories are at the ends; between them are numbers, of which any will do.
    ends = st.integers(0, min(3000, len(bent) - 1)) | st.integers(-1500, -1)
    for _ in range(data.draw(st.integers(1, 6))):
        where = data.draw(ends | st.integers(0, len(bent) - 1))
        bent[where] ^= 1 << data.draw(st.integers(0, 7))
    outcome(place_file(files, name, bytes(bent), tmp_path), **HEADS)


@pytest.mark.parametrize("name", CONTAINERS)
@FEW
@given(data=st.data())
def test_files_with_pieces_moved(name, files, tmp_path, data):
    whole = files[name]
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, min(4000, len(whole)))] * 2)))
    kind = data.draw(st.sampled_from(["drop", "repeat", "reverse", "ones"]))
    middle = {
        "drop": b"",
        "repeat": whole[a:b] * 2,
        "reverse": whole[a:b][::-1],
        "ones": b"\xff" * (b - a),
    }[kind]
    outcome(place_file(files, name, whole[:a] + middle + whole[b:], tmp_path), **HEADS)


@FEW
@given(data=st.binary(max_size=300), name=st.sampled_from(CONTAINERS))
def test_files_of_anything(data, name, files, tmp_path):
    magic = {".safetensors": b"\x02\0\0\0\0\0\0\0{}", ".npz": b"PK\x03\x04", ".pth": b"\x80\x02"}
    for start in (b"", magic.get(Path(name).suffix, b"\x81")):
        assert not outcome(place_file(files, name, start + data, tmp_path), **HEADS)


# -- configurations and names


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 2**65)
    | st.sampled_from([0, 1, 7, 8, 10**9, -1, 1e308, "gelu", "mean", "", "vit", "beit", "dinov2"])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def write_model(root: Path, config: dict[str, Any], weights: bytes) -> Path:
    place = Path(tempfile.mkdtemp(dir=root))
    (place / "config.json").write_text(json.dumps(config))
    (place / "model.safetensors").write_bytes(weights)
    return place


@FUZZ
@given(data=st.data())
def test_configurations_of_anything(data, files, tmp_path):
    table = json.loads(files["config.json"])
    for key in data.draw(st.lists(st.sampled_from(sorted(table)), min_size=1, max_size=3)):
        if data.draw(st.booleans()):
            table.pop(key, None)
        else:
            table[key] = data.draw(json_values)
    outcome(write_model(tmp_path, table, files["a.safetensors"]))


TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 5,
    "num_features": 8,
    "global_pool": "token",
    "model_args": {"img_size": 32, "num_heads": 2, "act_layer": "gelu"},
    "pretrained_cfg": {
        "input_size": [3, 32, 32],
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "num_classes": 5,
    },
}


@FUZZ
@given(data=st.data())
def test_timms_configurations_of_anything(data, files, tmp_path):
    table = json.loads(json.dumps(TIMM))
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from(["", "model_args", "pretrained_cfg"]))
        inner = table.get(part) if part else table
        inner = inner if isinstance(inner, dict) else table
        key = data.draw(st.sampled_from([*inner, "pool", "vit_flax"]))
        inner[key] = data.draw(json_values)
    outcome(write_model(tmp_path, table, files["b.safetensors"]))


shapes = st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 24]), max_size=5).map(tuple)


@FUZZ
@given(data=st.data())
def test_names_and_shapes_of_anything(data, files, tmp_path):
    """Tensors swapped, gone, doubled under another name, of another shape or dtype."""
    name = data.draw(st.sampled_from(["a.safetensors", "b.safetensors"]))
    arrays = dict(load(files[name]))
    kinds = ["swap", "drop", "double", "shape", "dtype", "other"]
    foreign = [n for t in FORMATS for rule in t.rules for n in rule.foreign_names]
    for _ in range(data.draw(st.integers(1, 4))):
        if not arrays:
            break
        key = data.draw(st.sampled_from(sorted(arrays)))
        kind = data.draw(st.sampled_from(kinds))
        if kind == "swap":
            other = data.draw(st.sampled_from(sorted(arrays)))
            arrays[key], arrays[other] = arrays[other], arrays[key]
        elif kind == "drop":
            del arrays[key]
        elif kind == "double":
            prefix = data.draw(st.sampled_from(["vit.", "module.", "model.", "teacher.", "beit."]))
            arrays[prefix + key] = arrays[key]
        elif kind == "shape":
            arrays[key] = np.ones(data.draw(shapes), np.float32)
        elif kind == "dtype":
            arrays[key] = arrays[key].astype(
                data.draw(st.sampled_from(["i8", "f2", "f8", "u1", "?"]))
            )
        else:
            index = data.draw(st.sampled_from(["0", "1", "00", "99999", "-1"]))
            arrays[data.draw(st.sampled_from(foreign)).replace("{i}", index)] = arrays[key]
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    (root / "model.safetensors").write_bytes(save(arrays, {"format": "pt"}))
    options = dict(HEADS)
    if name == "a.safetensors":
        (root / "config.json").write_bytes(files["config.json"])
        options = {}
    outcome(root, **options)


FOREIGN = sorted(
    {n.replace("{i}", "0") for t in FORMATS for rule in t.rules for n in rule.foreign_names}
)


@FEW
@given(
    keys=st.lists(
        st.sampled_from(
            sorted(
                {n.replace("{i}", "0") for t in FORMATS for r in t.rules for n in r.foreign_names}
            )
        ),
        min_size=1,
        max_size=40,
        unique=True,
    ),
    form=st.sampled_from([None, *NAMES]),
    sizes=st.lists(shapes, min_size=40, max_size=40),
)
def test_any_names_of_any_format(keys, form, sizes, tmp_path):
    arrays = {k: np.ones(s, np.float32) for k, s in zip(keys, sizes, strict=False)}
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    (root / "a.safetensors").write_bytes(save(arrays))
    outcome(root / "a.safetensors", from_=form, **HEADS)


@FEW
@given(data=st.data())
def test_headers_of_safetensors(data, files, tmp_path):
    """Offsets, shapes and dtypes that the header only claims."""
    whole = files["a.safetensors"]
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    key = data.draw(st.sampled_from(sorted(header)))
    part = data.draw(st.sampled_from(sorted(header[key]) + ["vit_config"]))
    header[key][part] = data.draw(
        json_values | st.lists(st.integers(-(2**63), 2**64), min_size=2, max_size=4)
    )
    text = json.dumps(header).encode()
    bent = len(text).to_bytes(8, "little") + text + whole[8 + length :]
    outcome(place_file(files, "a.safetensors", bent, tmp_path))


@FEW
@given(data=st.data())
def test_indices_of_shards(data, files, tmp_path):
    arrays = load(files["a.safetensors"])
    names = sorted(arrays)
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in halves.items():
        (root / file).write_bytes(save({n: arrays[n] for n in part}))
    (root / "config.json").write_bytes(files["config.json"])
    weight_map: Any = {n: file for file, part in halves.items() for n in part}
    for _ in range(data.draw(st.integers(0, 3))):
        key = data.draw(st.sampled_from([*names, "other"]))
        values = st.sampled_from([*halves, "../a", "", "none.safetensors", "config.json", 3, None])
        weight_map[key] = data.draw(values)
    index: Any = {"metadata": {"total_size": data.draw(json_values)}, "weight_map": weight_map}
    if data.draw(st.booleans()):
        index[data.draw(st.sampled_from(["weight_map", "metadata", "x"]))] = data.draw(json_values)
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    outcome(root)
