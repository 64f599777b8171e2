"""The program beside an ONNX file, in an interpreter that has numpy, Pillow and onnxruntime alone,
against Transformers' processors and models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import PIL.Image
import PIL.ImageOps
import pytest
import torch
import transformers
from networks import randomize
from timm_models import timm

import vit_torch.export
from vit_cli.main import main
from vit_common.errors import ExistingFileError
from vit_common.images.timm import processor_from_timm
from vit_torch import AutoModelForImageClassification, ViTImageProcessor

OTHERS = ["vit_common", "vit_convert", "convert", "vit_flax", "vit_torch", "vit_cli"]
OTHERS += ["jax", "flax", "torch", "transformers", "onnx", "timm", "torchvision"]
SIZES = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
SIZES |= {"intermediate_size": 36, "image_size": 16, "patch_size": 4, "num_labels": 5}
COLOURS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
CROP = {"size": {"shortest_edge": 19}, "do_center_crop": True, "crop_size": 16, **COLOURS}
# name -> Transformers' processor, which all give 16 x 16
PROCESSORS = {
    "squash": transformers.ViTImageProcessor(size=16, resample=3, **COLOURS),
    "crop": transformers.BitImageProcessor(**CROP),
    "crop of RGB": transformers.BitImageProcessor(**CROP, do_convert_rgb=True),
    "DeiT": transformers.DeiTImageProcessor(size=20, crop_size=16, **COLOURS),
    "padded": transformers.BitImageProcessor(**{**CROP, "size": {"shortest_edge": 13}}),
    "no arithmetic": transformers.ViTImageProcessor(size=16, do_rescale=False, do_normalize=False),
    "rescaled alone": transformers.ViTImageProcessor(size=16, do_normalize=False),
}


def save_pictures(folder):
    """Files of every kind, and the RGB image that a person sees in each."""
    rng = np.random.default_rng(0)
    small = PIL.Image.fromarray(rng.integers(0, 256, (7, 5, 3), np.uint8))
    wide, tall = small.resize((50, 33), 3), small.resize((21, 64), 3)
    grey = wide.convert("L")
    deep = np.asarray(grey).astype(np.uint16) * 257
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    seen = {}
    for name, image, shown in (
        ("wide.png", wide, wide),
        ("tall.png", tall, tall),
        ("grey.png", grey, grey),
        ("deep.png", PIL.Image.fromarray(deep), grey),
        ("palette.gif", wide.convert("P"), None),
        ("alpha.png", tall.convert("RGBA"), tall),
        ("cmyk.tif", wide.convert("CMYK"), None),
    ):
        image.save(folder / name)
        with PIL.Image.open(folder / name) as stored:
            seen[name] = (shown or stored).convert("RGB")
    tall.transpose(PIL.Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    seen["turned.png"] = tall
    return seen


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model as Transformers saves it and its ONNX file by the command, pictures."""
    folder = tmp_path_factory.mktemp("model")
    model = randomize(transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES)))
    model.save_pretrained(folder / "theirs")
    PROCESSORS["squash"].save_pretrained(folder / "theirs")
    code = main(["export", str(folder / "theirs"), str(folder / "m.onnx"), "--no-check"])
    assert code == 0
    return folder, model, save_pictures(folder)


def alone(code, folder):
    """What code prints where nothing else can be imported."""
    blocked = f"import sys\nsys.path[:0] = ['.']\nsys.modules.update(dict.fromkeys({OTHERS!r}))\n"
    done = subprocess.run(
        [sys.executable, "-P", "-c", blocked + code], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PREPARE = """
import json, numpy as np
from m_onnx import Model
names = json.load(open("names.json"))
for path in json.load(open("paths.json")):
    model = Model(path)
    np.savez(path + ".npz", **{name: model.prepare(name) for name in names})
"""


@pytest.mark.slow
def test_pixels_are_those_of_transformers(made, tmp_path):
    """Of every processor and every kind of file."""
    folder, _, seen = made
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "names.json").write_text(json.dumps([*seen]))
    graph = onnx.load(tmp_path / "m.onnx")
    for name, processor in PROCESSORS.items():
        for entry in graph.metadata_props:
            if entry.key == "preprocessing":
                entry.value = ViTImageProcessor.from_dict(processor.to_dict()).to_json_string()
                table = json.loads(entry.value) | processor.to_dict()
                entry.value = json.dumps(table, default=str)
        onnx.save(graph, tmp_path / f"{name}.onnx")
    cfg = {"input_size": (3, 16, 16), "crop_pct": 0.95, "interpolation": "bicubic"}
    for entry in graph.metadata_props:
        if entry.key == "preprocessing":
            entry.value = processor_from_timm(cfg).to_json_string()
    onnx.save(graph, tmp_path / "timm.onnx")
    paths = [f"{name}.onnx" for name in (*PROCESSORS, "timm")]
    (tmp_path / "paths.json").write_text(json.dumps(paths))
    alone(PREPARE, tmp_path)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(cfg))
    with np.load(tmp_path / "timm.onnx.npz") as found:
        for file, image in seen.items():
            wanted = transform(image).numpy()
            np.testing.assert_allclose(found[file], wanted, rtol=0, atol=3e-6, err_msg=file)
    for name, processor in PROCESSORS.items():
        with np.load(tmp_path / f"{name}.onnx.npz") as found:
            for file, image in seen.items():
                wanted = processor(image, return_tensors="np")["pixel_values"][0]
                np.testing.assert_allclose(
                    found[file], wanted, rtol=0, atol=1e-6 * np.abs(wanted).max(), err_msg=file
                )


def test_labels_and_probabilities(made):
    folder, model, seen = made
    pixels = PROCESSORS["squash"](list(seen.values()), return_tensors="pt")
    with torch.no_grad():
        wanted = model(**pixels).logits.softmax(-1).numpy()
    program = folder / "m_onnx.py"
    code = f"sys.argv = ['m_onnx.py', *{[*seen]!r}]\n"
    code += "import runpy\nrunpy.run_path('m_onnx.py', run_name='__main__')"
    lines = [line.split("  ") for line in alone(code, folder).splitlines()]
    assert program.exists()
    assert len(lines) == 5 * len(seen)
    for i, (name, row) in enumerate(zip(seen, wanted, strict=True)):
        for (file, probability, label), index in zip(
            lines[5 * i : 5 * i + 5], np.argsort(-row), strict=True
        ):
            assert (file, label) == (name, f"LABEL_{index}")
            assert float(probability) == pytest.approx(row[index], abs=1e-4)


def test_nothing_of_anybody_else_is_overwritten(made, tmp_path, capsys):
    folder, _, _ = made
    target = tmp_path / "m_onnx.py"
    target.write_text("print('mine')\n")
    with pytest.raises(ExistingFileError, match=r"m_onnx\.py: already there, and not a program"):
        vit_torch.export.write_program(tmp_path / "m.onnx")
    assert main(["export", str(folder / "theirs"), str(tmp_path / "m.onnx"), "--force"]) == 2
    assert "Move it, or choose another name" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m_onnx.py"]
    assert target.read_text() == "print('mine')\n"
    target.write_bytes((folder / "m_onnx.py").read_bytes())
    assert vit_torch.export.write_program(tmp_path / "m.onnx") == target


@pytest.mark.slow
def test_a_fixed_number_of_images(made, tmp_path):
    """Fewer are padded, more are cut."""
    folder, model, seen = made
    twin = AutoModelForImageClassification.from_pretrained(folder / "theirs")
    processor = ViTImageProcessor.from_pretrained(folder / "theirs")
    path = tmp_path / "m.onnx"
    vit_torch.export.export(twin, path, image_processor=processor, batch=2, check=False)
    vit_torch.export.write_program(path)
    images = list(seen.values())[:3]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    code = "import json\nfrom m_onnx import Model\n"
    code += "print(json.dumps(Model().classify(['0.png', '1.png', '2.png'], top_k=1)))"
    found = json.loads(alone(code, tmp_path))
    with torch.no_grad():
        logits = model(**PROCESSORS["squash"](images, return_tensors="pt")).logits
    for ((label, probability),), row in zip(found, logits.softmax(-1).numpy(), strict=True):
        assert label == f"LABEL_{row.argmax()}"
        assert probability == pytest.approx(row.max(), abs=1e-5)
