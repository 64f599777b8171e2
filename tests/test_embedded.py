"""The embedded checkpoint: what ships, what its card says, and the example that made it."""

from __future__ import annotations

import importlib.resources
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tolerances import BOUNDS

from vit_common.embedded import embedded_checkpoint, embedded_images
from vit_common.errors import MissingFileError
from vit_common.images.pictures import load_image
from vit_flax import FlaxViTForImageClassification, ViTImageProcessor
from vit_torch import ViTForImageClassification
from vit_torch.parity import compare

ROOT = Path(__file__).parent.parent
FILES = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}


def true_digit(path: Path) -> int:
    """From a name such as digit-3-01.png."""
    return int(path.stem.split("-")[1])


def to_pixel_values(images: np.ndarray) -> np.ndarray:
    """The processor's arithmetic by hand: 0 to 255 in uint8 (B, 8, 8) -> (B, 1, 8, 8)."""
    scaled = (images.astype(np.float64) * (1 / 255)).astype(np.float32)
    return ((scaled - np.float32(0.5)) / np.float32(0.5))[:, None]


@pytest.fixture(scope="module")
def parts():
    """The split of the card: (training images, held-out images, their digits), as uint8."""
    digits = load_digits()
    images = np.rint(digits.images * 255 / 16).astype(np.uint8)
    training, held_out, _, labels = train_test_split(
        images, digits.target, test_size=0.25, random_state=0, stratify=digits.target
    )
    return training, held_out, labels


@pytest.fixture(scope="module")
def flax_model():
    return FlaxViTForImageClassification.from_pretrained(embedded_checkpoint(), precision="highest")


@pytest.fixture(scope="module")
def torch_model():
    return ViTForImageClassification.from_pretrained(embedded_checkpoint()).eval()


@pytest.fixture(scope="module")
def processor():
    return ViTImageProcessor.from_pretrained(embedded_checkpoint())


@pytest.fixture(scope="module")
def card():
    return ModelCard.load(embedded_checkpoint() / "README.md")


# -- what ships


def test_the_files_are_there_and_small():
    directory = embedded_checkpoint()
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert {path.name for path in files if path.parent == directory} == FILES
    assert {path.name for path in files if path.parent != directory} == {
        path.name for path in embedded_images()
    }
    assert sum(path.stat().st_size for path in files) < 1_000_000


def test_the_files_are_package_data():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = table["tool"]["setuptools"]["package-data"]["vit_common"]
    package = ROOT / "vit_common"
    found = {path for pattern in patterns for path in package.glob(pattern)}
    missing = {path for path in (package / "digits").rglob("*") if path.is_file()} - found
    assert not missing


def test_a_dozen_images_show_every_digit():
    digits = [true_digit(path) for path in embedded_images()]
    assert len(digits) == 12
    assert set(digits) == set(range(10))
    for path in embedded_images():
        with Image.open(path) as image:
            assert (image.mode, image.size, image.format) == ("L", (8, 8), "PNG")


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys, vit_common.embedded as e; e.embedded_images();"
        "print([m for m in ('jax', 'flax', 'torch', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_installation_without_the_data_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(MissingFileError, match=r"digits: the embedded checkpoint is not there"):
        embedded_checkpoint()
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "config.json").touch()
    with pytest.raises(MissingFileError, match=r"images: the images .* are not there"):
        embedded_images()


# -- what the card says


def test_accuracy_is_what_the_card_says(parts, processor, flax_model, torch_model, card):
    _, held_out, labels = parts
    pixel_values = processor(list(held_out), return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(pixel_values, to_pixel_values(held_out))
    with torch.no_grad():
        theirs = torch_model(torch.from_numpy(pixel_values)).logits.numpy()
    for logits in (np.asarray(flax_model(pixel_values).logits), theirs):
        right = int(np.sum(logits.argmax(axis=-1) == labels))
        assert f"({right} of {len(labels)})" in card.text
        (result,) = card.data.eval_results
        assert result.metric_type == "accuracy"
        assert result.metric_value == pytest.approx(right / len(labels), abs=5e-5)
        assert right / len(labels) >= 0.985


def test_the_card_counts_the_parameters(flax_model, card):
    count = sum(leaf.size for leaf in jax.tree.leaves(flax_model.params))
    assert f"{count:,} parameters" in card.text
    assert sum(p.numel() for p in ViTForImageClassification(flax_model.config).parameters()) == (
        count
    )


# -- the images


def test_images_are_held_out_pixels_of_the_data(parts):
    training, held_out, labels = parts
    for path in embedded_images():
        with Image.open(path) as image:
            pixels = np.asarray(image)
        (where,) = np.nonzero((held_out == pixels).all(axis=(1, 2)))
        assert len(where) == 1, path.name
        assert labels[where[0]] == true_digit(path)
        assert not (training == pixels).all(axis=(1, 2)).any()


def test_images_are_predicted_as_their_names_say(processor, flax_model, torch_model):
    images = [load_image(path) for path in embedded_images()]
    pixel_values = processor(images, return_tensors="np")["pixel_values"]
    raw = np.stack([np.asarray(image) for image in images])
    np.testing.assert_array_equal(pixel_values, to_pixel_values(raw))
    logits = np.asarray(flax_model(pixel_values).logits)
    names = [flax_model.config.id2label[int(best)] for best in logits.argmax(axis=-1)]
    assert names == [str(true_digit(path)) for path in embedded_images()]
    with torch.no_grad():
        theirs = torch_model(torch.from_numpy(pixel_values)).logits.numpy()
    np.testing.assert_array_equal(theirs.argmax(axis=-1), logits.argmax(axis=-1))


def test_a_larger_scan_gives_the_same_pixels(parts, processor):
    _, held_out, _ = parts
    large = [Image.fromarray(image.repeat(4, 0).repeat(4, 1)) for image in held_out[:20]]
    large = [image.convert("RGB") for image in large]
    pixel_values = processor(large, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(pixel_values, to_pixel_values(held_out[:20]))


# -- against others


def test_twins_agree(parts, flax_model, torch_model):
    pixel_values = to_pixel_values(parts[1][:64])
    report = compare(flax_model, torch_model, pixel_values, labels=parts[2][:64])
    for stage in report.stages:  # the bound is for activations of unit scale
        assert stage.max_abs <= BOUNDS["twins float32"] * max(1.0, stage.scale), stage


def test_transformers_reads_it_and_agrees(parts, flax_model):
    images = [Image.fromarray(image) for image in parts[1][:64]]
    reference = transformers.ViTForImageClassification.from_pretrained(embedded_checkpoint()).eval()
    inputs = transformers.ViTImageProcessor.from_pretrained(embedded_checkpoint())(
        # It cannot tell the layout of grey images without a channel axis.
        [np.asarray(image)[:, :, None] for image in images],
        return_tensors="pt",
        input_data_format="channels_last",
    )
    pixel_values = to_pixel_values(parts[1][:64])
    np.testing.assert_array_equal(inputs["pixel_values"].numpy(), pixel_values)
    with torch.no_grad():
        theirs = reference(**inputs).logits.numpy()
    ours = np.asarray(flax_model(pixel_values).logits)
    scale = max(1.0, np.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=BOUNDS["flax reference"] * scale)


# -- the example


@pytest.mark.slow  # trains for a minute
def test_the_example_runs_end_to_end(tmp_path, parts):
    out = tmp_path / "made" / "here"
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/digits.py"), "--out", str(out), "--epochs", "1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "epoch 1/1: loss" in done.stderr
    shipped = {str(p.relative_to(embedded_checkpoint())) for p in embedded_images()}
    made = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert made == (FILES | shipped) - {"README.md"}
    for name in sorted(shipped | {"config.json", "preprocessor_config.json"}):
        assert (out / name).read_bytes() == (embedded_checkpoint() / name).read_bytes(), name

    pixel_values, labels = to_pixel_values(parts[1]), parts[2]
    logits = FlaxViTForImageClassification.from_pretrained(out)(pixel_values).logits
    right = int(np.sum(np.asarray(logits).argmax(axis=-1) == labels))
    assert done.stdout == f"held-out accuracy: {right / 450:.4f} ({right} of 450)\n"
    assert right > 90  # twice what guessing gives
