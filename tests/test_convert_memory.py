"""How much memory a conversion takes: a few tensors, whatever the size of the file."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from vit_common.files.containers import safetensors_file
from vit_common.files.containers.tensor import DataFile
from vit_common.presets import PRESETS
from vit_convert.convert import convert

MEGABYTE = 1 << 20
ALLOWED_TENSORS = 4
ALLOWED_BYTES = 200 * MEGABYTE

Shapes = dict[str, tuple[int, ...]]

# -- random checkpoints, written one tensor at a time and with none of the code under test


def hub_shapes(D: int, L: int, inner: int, patch: int, image: int, classes: int) -> Shapes:
    """Names of `ViTForImageClassification` as Transformers writes them -> shapes."""
    rows = (image // patch) ** 2 + 1
    shapes: Shapes = {
        "vit.embeddings.cls_token": (1, 1, D),
        "vit.embeddings.position_embeddings": (1, rows, D),
        "vit.embeddings.patch_embeddings.projection.weight": (D, 3, patch, patch),
        "vit.embeddings.patch_embeddings.projection.bias": (D,),
        "vit.layernorm.weight": (D,),
        "vit.layernorm.bias": (D,),
        "classifier.weight": (classes, D),
        "classifier.bias": (classes,),
    }
    dense = {
        "attention.attention.query": (D, D),
        "attention.attention.key": (D, D),
        "attention.attention.value": (D, D),
        "attention.output.dense": (D, D),
        "intermediate.dense": (inner, D),
        "output.dense": (D, inner),
    }
    for i in range(L):
        block = f"vit.encoder.layer.{i}."
        for name, shape in dense.items():
            shapes[f"{block}{name}.weight"] = shape
            shapes[f"{block}{name}.bias"] = shape[:1]
        for name in ("layernorm_before", "layernorm_after"):
            shapes[f"{block}{name}.weight"] = shapes[f"{block}{name}.bias"] = (D,)
    return shapes


def google_shapes(
    D: int, L: int, heads: int, inner: int, patch: int, image: int, classes: int
) -> Shapes:
    """Names of google-research/vision_transformer (`vit_jax/models_vit.py`) -> shapes."""
    rows = (image // patch) ** 2 + 1
    shapes: Shapes = {
        "cls": (1, 1, D),
        "embedding/kernel": (patch, patch, 3, D),
        "embedding/bias": (D,),
        "head/kernel": (D, classes),
        "head/bias": (classes,),
        "Transformer/posembed_input/pos_embedding": (1, rows, D),
        "Transformer/encoder_norm/scale": (D,),
        "Transformer/encoder_norm/bias": (D,),
    }
    for i in range(L):
        block = f"Transformer/encoderblock_{i}/"
        attention = f"{block}MultiHeadDotProductAttention_1/"
        for name in ("query", "key", "value"):
            shapes[f"{attention}{name}/kernel"] = (D, heads, D // heads)
            shapes[f"{attention}{name}/bias"] = (heads, D // heads)
        shapes[f"{attention}out/kernel"] = (heads, D // heads, D)
        shapes[f"{attention}out/bias"] = (D,)
        for name in ("LayerNorm_0", "LayerNorm_2"):
            shapes[f"{block}{name}/scale"] = shapes[f"{block}{name}/bias"] = (D,)
        shapes[f"{block}MlpBlock_3/Dense_0/kernel"] = (D, inner)
        shapes[f"{block}MlpBlock_3/Dense_0/bias"] = (inner,)
        shapes[f"{block}MlpBlock_3/Dense_1/kernel"] = (inner, D)
        shapes[f"{block}MlpBlock_3/Dense_1/bias"] = (D,)
    return shapes


def random_arrays(shapes: Shapes, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """One random float32 array after the other, small enough for outputs to stay finite."""
    rng = np.random.default_rng(seed)
    for name, shape in shapes.items():
        yield name, rng.standard_normal(shape, np.float32) * np.float32(0.02)


def write_safetensors(path: Path, shapes: Shapes, seed: int = 0) -> None:
    """As https://github.com/huggingface/safetensors describes the file."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in random_arrays(shapes, seed):
            array.tofile(file)


def write_npz(path: Path, shapes: Shapes, seed: int = 0) -> None:
    """As `numpy.savez` lays it out, member by member."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in random_arrays(shapes, seed):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array)


def write_hub(folder: Path, name: str) -> tuple[Path, Shapes]:
    D, L, heads, inner, patch = PRESETS[name]
    shapes = hub_shapes(D, L, inner, patch, image=224, classes=1000)
    config = {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": D,
        "num_hidden_layers": L,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "patch_size": patch,
        "id2label": {str(i): f"LABEL_{i}" for i in range(1000)},
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", shapes)
    return folder / "model.safetensors", shapes


def write_google(folder: Path, name: str) -> tuple[Path, Shapes]:
    D, L, heads, inner, patch = PRESETS[name]
    shapes = google_shapes(D, L, heads, inner, patch, image=224, classes=1000)
    write_npz(folder / "model.npz", shapes)
    return folder / "model.npz", shapes


def scanned(shapes: Shapes) -> Shapes:
    """The same network as big_vision has it, with the blocks on the first axis of their arrays."""
    names = {
        "Transformer/posembed_input/pos_embedding": "pos_embedding",
        "LayerNorm_2": "LayerNorm_1",
        "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
        "MlpBlock_3": "MlpBlock_0",
    }
    blocks = {name.split("/")[1] for name in shapes if "encoderblock_" in name}
    out: Shapes = {}
    for name, shape in shapes.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if "encoderblock_0/" in name:
            out[name.replace("encoderblock_0", "encoderblock")] = (len(blocks), *shape)
        elif "encoderblock_" not in name:
            out[name] = shape
    return out


def write_scanned(folder: Path, name: str) -> tuple[Path, Shapes]:
    D, L, heads, inner, patch = PRESETS[name]
    shapes = google_shapes(D, L, heads, inner, patch, image=224, classes=1000)
    write_npz(folder / "model.npz", scanned(shapes))
    return folder / "model.npz", shapes


# -- what a process needs

# The peak of the process itself: `ru_maxrss` of a child begins at the size of its parent.
PEAK = """
import json, sys
def peak():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
"""
CONVERT = """
from vit_convert.convert import convert
report = convert({source!r}, {target!r}, to={to!r}, verify={verify})
frameworks = sorted({{"torch", "jax", "flax", "transformers"}} & {{*sys.modules}})
verified = None if report.verification is None else report.verification.tensors
print(json.dumps({{"peak": peak(), "frameworks": frameworks, "verified": verified}}))
"""
BASELINE = """
import numpy
print(json.dumps({"peak": peak()}))
"""


def run(code: str) -> dict:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc"
)


def allowed(shapes: Shapes) -> int:
    largest = max(4 * int(np.prod(shape)) for shape in shapes.values())
    return ALLOWED_TENSORS * largest + ALLOWED_BYTES


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "write", "to"),
    [
        ("large", write_hub, "flax"),
        ("large", write_hub, "google"),
        ("large", write_google, "hub"),
        ("large", write_google, "flax"),
        ("large", write_scanned, "hub"),
        ("huge", write_hub, "flax"),
        ("huge", write_google, "hub"),
    ],
)
def test_gigabytes_are_converted_in_the_memory_of_a_few_tensors(tmp_path, name, write, to):
    baseline = run(BASELINE)["peak"]
    source, shapes = write(tmp_path, name)
    target = tmp_path / "out"
    found = []
    try:
        for verify in (False, True):
            code = CONVERT.format(source=str(source), target=str(target), to=to, verify=verify)
            result = run(code)
            assert result["frameworks"] == []
            assert (result["verified"] is not None) is verify
            found.append(result["peak"] - baseline)
            for file in target.iterdir():
                file.unlink()
    finally:
        for file in tmp_path.rglob("*"):
            if file.is_file():  # gigabytes, which pytest would keep for its last three runs
                file.unlink()
    print(
        f"{name} to {to}: {sum(4 * np.prod(s) for s in shapes.values()) / 1e9:.2f} GB; above numpy "
        f"{found[0] / 1e6:.0f} MB, verified {found[1] / 1e6:.0f} MB; {allowed(shapes) / 1e6:.0f} "
        "allowed"
    )
    assert max(found) <= allowed(shapes)


class Counted(np.ndarray):
    """An array that counts the bytes of those alive; views are not counted again."""

    alive = 0
    most = 0

    def count(self) -> Counted:
        self.counted = self.nbytes
        Counted.alive += self.nbytes
        Counted.most = max(Counted.most, Counted.alive)
        return self

    def __del__(self) -> None:
        Counted.alive -= getattr(self, "counted", 0)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    """Every array read from a file is counted, until the last view of it is gone."""
    read: Callable = DataFile.array

    def array(self, offset, dtype, shape):
        return read(self, offset, dtype, shape).view(Counted).count()

    monkeypatch.setattr(safetensors_file.DataFile, "array", array)
    Counted.alive = Counted.most = 0
    return Counted


def fused(shapes: Shapes) -> Shapes:
    """The same network with the names that differ between the Hub and timm, and timm's one array of
    query, key and value."""
    out: Shapes = {}
    for name, shape in shapes.items():
        if ".attention.attention." in name:
            name = name.replace("attention.attention.query", "attn.qkv")
            shape = (3 * shape[0], *shape[1:])
        name = name.removeprefix("vit.").replace("encoder.layer.", "blocks.")
        for ours, theirs in TIMM_NAMES.items():
            name = name.replace(ours, theirs)
        if ".attention.attention." not in name:
            out[name] = shape
    return out


TIMM_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layernorm": "norm",
    "classifier": "head",
}


@pytest.mark.parametrize("verify", [False, True], ids=["alone", "verified"])
def test_stacked_blocks_are_read_one_by_one(tmp_path, counted, verify):
    shapes = google_shapes(D=48, L=16, heads=4, inner=192, patch=8, image=16, classes=5)
    write_npz(tmp_path / "model.npz", scanned(shapes))
    convert(tmp_path / "model.npz", tmp_path / "out", verify=verify)
    largest = max(4 * int(np.prod(shape)) for shape in shapes.values())
    total = sum(4 * int(np.prod(shape)) for shape in shapes.values())
    # Only what is read block by block is counted here.
    assert 0 < counted.most <= ALLOWED_TENSORS * largest < total / 4
    assert counted.alive == 0


@pytest.mark.parametrize("verify", [False, True], ids=["alone", "verified"])
@pytest.mark.parametrize("to", ["hub", "flax", "flax-safetensors", "google", "timm"])
@pytest.mark.parametrize("source", ["hub", "timm"])
def test_few_tensors_are_alive_at_once(tmp_path, counted, source, to, verify):
    shapes = hub_shapes(D=48, L=16, inner=192, patch=8, image=16, classes=5)
    if source == "timm":
        shapes = fused(shapes)
    write_safetensors(tmp_path / "model.safetensors", shapes)
    config = {
        "model_type": "vit",
        "hidden_size": 48,
        "num_hidden_layers": 16,
        "num_attention_heads": 4,
        "intermediate_size": 192,
        "image_size": 16,
        "patch_size": 8,
        "num_labels": 5,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert(tmp_path, tmp_path / "out", to=to, verify=verify)
    largest = max(4 * int(np.prod(shape)) for shape in shapes.values())
    total = sum(4 * int(np.prod(shape)) for shape in shapes.values())
    assert 0 < counted.most <= ALLOWED_TENSORS * largest < total / 4
    assert counted.alive == 0
