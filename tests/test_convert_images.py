"""What a conversion says of the preparation of images: where it is from, and where it is lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peers import randomise
from PIL import Image
from timm_models import timm

from vit_common.errors import InputError, MissingFileError
from vit_common.images.usual import USUAL, usual_processor
from vit_convert.convert import convert
from vit_convert.formats import WRITTEN

HEADS = {"num_attention_heads": 4}
MODEL = {"depth": 1, "embed_dim": 48, "num_heads": 4, "patch_size": 8, "num_classes": 7}


def pickled(path: Path, size: int = 32) -> Path:
    model = randomise(timm.create_model("vit_tiny_patch16_224", img_size=size, **MODEL))
    torch.save({"state_dict": model.state_dict(), "arch": "vit_tiny_patch16_224"}, path)
    return path


def test_a_file_that_says_nothing_of_images_is_noted(tmp_path):
    source = pickled(tmp_path / "model_best.pth.tar")
    report = convert(source, tmp_path / "out", from_="timm", overrides=HEADS)
    assert report.preprocessing is None
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()
    (note,) = [text for text in report.warnings if "--preprocessing" in text]
    assert all(name in note for name in USUAL)


@pytest.mark.parametrize(
    ("name", "constants", "crop"),
    [
        ("imagenet", "IMAGENET_DEFAULT", 0.875),
        ("inception", "IMAGENET_INCEPTION", 0.9),
        ("clip", "OPENAI_CLIP", 1.0),
        ("imagenet:0.75", "IMAGENET_DEFAULT", 0.75),
    ],
)
def test_the_usual_preparations_are_timms(name, constants, crop, tmp_path):
    source = pickled(tmp_path / "file.pth", 72)
    out = tmp_path / "out"
    report = convert(source, out, from_="timm", overrides=HEADS, preprocessing=name)
    assert report.preprocessing == f"{name} (given)"
    assert not any("--preprocessing" in text for text in report.warnings)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8))
    transform = timm.data.create_transform(
        input_size=(3, 72, 72),
        interpolation="bicubic",
        mean=getattr(timm.data, f"{constants}_MEAN"),
        std=getattr(timm.data, f"{constants}_STD"),
        crop_pct=crop,
    )
    from vit_common.images.auto import AutoImageProcessor

    pixels = AutoImageProcessor.from_pretrained(out)(image)["pixel_values"][0]
    np.testing.assert_allclose(pixels, transform(image).numpy(), atol=1e-5)


@pytest.mark.parametrize("crop", ["0", "1.5", "-1", "x", "nan", ""])
def test_crops_that_are_none(crop):
    with pytest.raises(InputError, match="the crop must be a number over 0, and 1 at most"):
        usual_processor(f"imagenet:{crop}", (224, 224))


def test_a_name_that_is_none_of_them_is_a_place(tmp_path):
    source = pickled(tmp_path / "file.pth")
    with pytest.raises(MissingFileError):
        convert(
            source, tmp_path / "out", from_="timm", overrides=HEADS, preprocessing="./imagenet21k"
        )


def test_channels_that_are_not_three(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, in_chans=1, **MODEL)
    torch.save(model.state_dict(), tmp_path / "grey.pth")
    with pytest.raises(InputError, match="takes 1"):
        convert(
            tmp_path / "grey.pth", tmp_path / "out", from_="timm", overrides=HEADS,
            preprocessing="clip",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("target", "to"), [("a.npz", None), ("a.pth", "timm"), ("a.msgpack", None)]
)
def test_a_file_loses_the_preparation_of_images_and_says_so(target, to, tmp_path):
    source = pickled(tmp_path / "file.pth")
    convert(source, tmp_path / "hub", from_="timm", overrides=HEADS, preprocessing="imagenet")
    report = convert(tmp_path / "hub", tmp_path / target, to=to)
    (note,) = [text for text in report.warnings if "image preprocessing" in text]
    assert "preprocessor_config.json" in note
    # What the file's own format implies is not lost.
    convert(source, tmp_path / "own", from_="timm", overrides=HEADS, preprocessing="imagenet")
    report = convert(tmp_path / "own", tmp_path / "deit.pth", to="deit")
    kept = json.loads((tmp_path / "own" / "preprocessor_config.json").read_text())
    assert kept["size"] == {"shortest_edge": 36}
    assert not any("image preprocessing" in text for text in report.warnings)


def test_the_command_names_every_format_that_can_be_written():
    from vit_cli.commands import convert as command

    assert command._WRITTEN == WRITTEN
