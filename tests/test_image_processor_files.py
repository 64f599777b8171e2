"""The files of image processors against Transformers 4.57.6, and files of images against Pillow."""

import copy
import io
import json
import os
import pickle
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import transformers
from pictures import (
    GREY,
    IMAGENET,
    assert_equal_output,
    moded,
    photo,
    quiet_reference_fixture,  # noqa: F401
)
from PIL.Image import Resampling

from vit_common.errors import ConfigError, ImageError, InputError, MissingFileError
from vit_common.images.processor import (
    ViTFeatureExtractor,
    ViTImageProcessor,
    load_image,
)

# -- files


FAST_FILE = {  # what ViTImageProcessorFast writes
    "crop_size": None,
    "data_format": "channels_first",
    "default_to_square": True,
    "device": None,
    "disable_grouping": None,
    "do_center_crop": None,
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_pad": None,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "ViTImageProcessorFast",
    "image_std": [0.5, 0.5, 0.5],
    "input_data_format": None,
    "pad_size": None,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "return_tensors": None,
    "size": {"height": 21, "width": 21},
}
OLD_FILE = {  # google/vit-base-patch16-224 and its kind, before processors had a dict for `size`
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": 21,
    "feature_extractor_type": "ViTFeatureExtractor",
}
UNKNOWN = {"note": {"a": [1, 2]}, "processor_class": "ViltProcessor", "do_reduce_labels": True}


@pytest.mark.parametrize("table", [{}, OLD_FILE, FAST_FILE, UNKNOWN, IMAGENET, {"size": (3, 4)}])
def test_files_are_those_of_transformers(table, tmp_path):
    ours = ViTImageProcessor.from_dict(table)
    theirs = transformers.ViTImageProcessor.from_dict(table)
    assert ours.to_json_string() == theirs.to_json_string()
    for name, value in theirs.to_dict().items():
        assert value == (ours.to_dict()[name] if name[0] != "_" else getattr(ours, name))
    assert ViTImageProcessor.from_dict(theirs.to_dict()) == ours
    path = tmp_path / "ours.json"
    ours.to_json_file(path)
    assert transformers.ViTImageProcessor.from_json_file(path).to_dict() == theirs.to_dict()
    assert ViTImageProcessor.from_json_file(path) == ours
    assert_equal_output(ours(photo())["pixel_values"], theirs(photo())["pixel_values"])


def test_save_and_load(tmp_path):
    ours = ViTImageProcessor(size=19, resample=3, note=[1], **IMAGENET)
    (written,) = ours.save_pretrained(tmp_path / "model")
    assert written == str(tmp_path / "model" / "preprocessor_config.json")
    for source in (tmp_path / "model", str(tmp_path / "model"), written):
        assert ViTImageProcessor.from_pretrained(source) == ours
    theirs = transformers.ViTImageProcessor.from_pretrained(tmp_path / "model")
    assert theirs.to_json_string() == ours.to_json_string()
    (tmp_path / "theirs").mkdir()
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "preprocessor_config.json").read_text() == (
        tmp_path / "model" / "preprocessor_config.json"
    ).read_text()


def test_uploads_hold_the_one_file(tmp_path, monkeypatch):
    calls = []

    def push(directory, repo_id, files=None, **options):
        (name,) = files
        calls.append((repo_id, name, (directory / name).read_text(), options))
        return "address"

    monkeypatch.setattr("vit_common.files.hub.push_folder", push)
    ours = ViTImageProcessor(size=9)
    ours.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="a/b", token="t")
    assert ours.push_to_hub("a/b", token="t") == "address"
    expected = ("a/b", "preprocessor_config.json", ours.to_json_string(), {"token": "t"})
    assert calls == [expected, expected]


def test_overrides_of_a_file(tmp_path):
    ViTImageProcessor(size=19).save_pretrained(tmp_path)
    options = {"size": 7, "do_normalize": False, "resample": 0}
    ours = ViTImageProcessor.from_pretrained(tmp_path, **options)
    theirs = transformers.ViTImageProcessor.from_pretrained(tmp_path, **options)
    assert ours.to_json_string() == theirs.to_json_string()
    ours, unused = ViTImageProcessor.from_pretrained(
        tmp_path, size=7, foo=1, return_unused_kwargs=True
    )
    assert (ours.size, unused) == ({"height": 7, "width": 7}, {"foo": 1})
    with pytest.warns(UserWarning, match="ignores them: foo") as seen:
        ViTImageProcessor.from_pretrained(tmp_path, foo=1, use_fast=True)
    assert seen[0].filename == __file__
    assert ViTImageProcessor.from_pretrained(tmp_path, size=None).size["height"] == 19
    with pytest.raises(InputError, match="`size` must be"):
        ViTImageProcessor.from_pretrained(tmp_path, size="big")


def test_options_beyond_those_of_vit_are_written_back():
    table = {"do_center_crop": True, "crop_size": 20, "data_format": "channels_last"}
    ours = ViTImageProcessor.from_dict({**table, "size": {"shortest_edge": 24}})
    again = ViTImageProcessor.from_dict(json.loads(ours.to_json_string()))
    assert again == ours
    assert again.crop_size == {"height": 20, "width": 20}
    assert again(photo(), return_tensors="np").pixel_values.shape == (1, 20, 20, 3)
    assert "crop_size" not in ViTImageProcessor().to_dict()


def test_pairs_in_old_files_are_width_height():
    table = OLD_FILE | {"size": [13, 7]}
    for cls in (ViTImageProcessor, ViTFeatureExtractor):
        assert cls.from_dict(table).size == {"height": 7, "width": 13}
    assert table["size"] == [13, 7]


def test_the_feature_extractor_writes_a_file_that_every_version_reads(tmp_path):
    ViTFeatureExtractor(size=9).to_json_file(tmp_path / "file.json")
    table = json.loads((tmp_path / "file.json").read_text())
    assert table == json.loads(transformers.ViTImageProcessor(size=9).to_json_string())


def test_the_part_of_a_file_for_several_kinds_of_input(tmp_path):
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({"image_processor": OLD_FILE, "processor_class": "X"}))
    assert ViTImageProcessor.from_json_file(path).size == {"height": 21, "width": 21}


@pytest.mark.parametrize(
    "keys",
    [{"crop_pct": 0.875}, {"do_pad": True}, {"do_flip_channel_order": True}, {"size_divisor": 32}],
    ids=str,
)
def test_keys_that_would_change_pixels_are_refused_by_name(keys, tmp_path):
    (name,) = keys
    with pytest.raises(InputError, match=f"not supported here: `{name}`"):
        ViTImageProcessor(**keys)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(OLD_FILE | keys))
    with pytest.raises(ConfigError, match=f"preprocessor_config.json: .*`{name}`"):
        ViTImageProcessor.from_pretrained(tmp_path)
    ViTImageProcessor(**dict.fromkeys(keys, None), do_reduce_labels=True)


def test_bad_files(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    with pytest.raises(MissingFileError, match=r"nowhere\.json"):
        ViTImageProcessor.from_json_file(tmp_path / "nowhere.json")
    path.write_text(json.dumps({"size": "big"}))
    with pytest.raises(ConfigError, match=r"preprocessor_config.json: `size` must be .*'big'"):
        ViTImageProcessor.from_pretrained(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: .*line 1"):
        ViTImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="expected a mapping"):
        ViTImageProcessor.from_dict([1])
    with pytest.raises(InputError, match="cannot be written as JSON"):
        ViTImageProcessor(note=object()).to_json_string()
    with pytest.raises(InputError, match="`preprocess` is a method of ViTImageProcessor"):
        ViTImageProcessor(preprocess=1)


def test_a_processor_is_a_plain_value():
    ours = ViTImageProcessor(size=9, note="x")
    assert ours == ViTImageProcessor(size=(9, 9), note="x") != ViTImageProcessor(size=9)
    assert ours != ViTFeatureExtractor(size=9, note="x")
    assert pickle.loads(pickle.dumps(ours)) == copy.deepcopy(ours) == ours
    assert ours.note == "x"
    assert not ours.is_fast
    assert repr(ours) == repr(transformers.ViTImageProcessor(size=9, note="x"))
    assert ours.model_input_names == ["pixel_values"]
    ours.size = 11
    assert ours.size == {"height": 11, "width": 11}
    ours.resample = 3
    assert ours.resample is Resampling.BICUBIC


# -- files of images


def save(tmp_path, image, name="image.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["image.jpg", "image.png", "image.tif", "image.webp"])
def test_exif_orientation_is_honoured(orientation, name, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, photo(0, 12, 9), name, exif=exif)
    result = load_image(path)
    with PIL.Image.open(path) as image:
        expected = PIL.ImageOps.exif_transpose(image)
    assert result.size == ((12, 9) if orientation < 5 else (9, 12))
    np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_does_not_exist_is_none(orientation, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, photo(0, 12, 9), "image.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(photo(0, 12, 9)))


def test_broken_exif_is_no_reason_to_lose_an_image(tmp_path):
    path = save(tmp_path, photo(0, 12, 9), "image.png", exif=b"Exif\0\0XX\0\0broken")
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(photo(0, 12, 9)))


@pytest.mark.parametrize(
    ("name", "mode", "given"),
    [
        ("grey.png", "L", "L"),
        ("bits.png", "1", "L"),
        ("alpha.png", "LA", "LA"),
        ("palette.png", "P", "RGB"),
        ("palette.gif", "P", "RGB"),
        ("colour.png", "RGB", "RGB"),
        ("alpha.png", "RGBA", "RGBA"),
        ("print.tif", "CMYK", "RGB"),
        ("print.jpg", "CMYK", "RGB"),
        ("colour.bmp", "RGB", "RGB"),
        ("video.jpg", "YCbCr", "RGB"),
    ],
)
def test_files_of_every_mode(name, mode, given, tmp_path):
    path = save(tmp_path, moded(mode), name)
    result = load_image(path)
    with PIL.Image.open(path) as image:
        expected = image.convert(given)
    assert result.mode == given
    np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))
    theirs = transformers.ViTImageProcessor(size=12)(expected.convert("RGB"))["pixel_values"]
    assert_equal_output(ViTImageProcessor(size=12)(result)["pixel_values"], theirs)


def test_a_palette_with_transparency_keeps_it(tmp_path):
    path = save(tmp_path, moded("P"), transparency=bytes(range(256)))
    result = load_image(path)
    with PIL.Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(result), np.asarray(image.convert("RGBA")))
    ViTImageProcessor(size=12)(PIL.Image.open(path))  # no warning here either


@pytest.mark.parametrize("name", ["image.png", "image.tif", "image.pgm"])
@pytest.mark.parametrize("dark", [1, 512])
def test_sixteen_bit_files_are_scaled(name, dark, tmp_path):
    values = (np.random.default_rng(0).integers(0, 65536, (9, 11)) // dark).astype(np.uint16)
    path = save(tmp_path, PIL.Image.fromarray(values), name)
    result = load_image(path)
    assert result.mode == "L"
    np.testing.assert_array_equal(np.asarray(result), np.rint(values / 257.0))


def test_an_adobe_cmyk_jpeg_is_inverted_as_pillow_does(tmp_path):
    image = PIL.Image.new("CMYK", (16, 16), (255, 0, 0, 0))  # cyan
    result = np.asarray(load_image(save(tmp_path, image, "print.jpg", quality=95)))
    assert (np.abs(result.astype(int) - [0, 255, 255]) < 12).all()


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = save(tmp_path, frames[0], "image.gif", save_all=True, append_images=frames[1:])
    assert load_image(path).getpixel((0, 0)) == (255, 0, 0)


def test_open_files_are_read_and_left_open(tmp_path):
    path = save(tmp_path, photo())
    with path.open("rb") as stream:
        np.testing.assert_array_equal(np.asarray(load_image(stream)), np.asarray(photo()))
        assert not stream.closed
    memory = io.BytesIO(path.read_bytes())
    np.testing.assert_array_equal(np.asarray(load_image(memory)), np.asarray(photo()))
    assert not memory.closed
    with pytest.raises(ImageError, match=r"^the given file: the file is empty"):
        load_image(io.BytesIO())
    with pytest.raises(InputError, match=r"a path or a file .*given int"):
        load_image(3)


@pytest.mark.parametrize("name", ["image.jpg", "image.png", "image.gif", "image.tif", "image.webp"])
@pytest.mark.parametrize("part", [0.3, 0.7, 0.9])
def test_truncated_files(name, part, tmp_path):
    path = save(tmp_path, photo(0, 64, 64), name)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ImageError) as caught:
        load_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["image.jpg", "image.png", "image.gif", "image.tif", "image.bmp"])
def test_corrupt_files_give_an_image_or_one_line(name, tmp_path):
    path = save(tmp_path, photo(0, 24, 24), name)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(40):
        data = bytearray(good)
        for place in rng.integers(0, min(len(data), 200), 6):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        said = f"{path}: "
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow on odd metadata
                assert load_image(path).mode in ("L", "LA", "RGB", "RGBA")
        except ImageError as error:
            said = str(error)
        assert said.startswith(f"{path}: ")
        assert "\n" not in said


def test_a_damaged_checksum(tmp_path):
    path = save(tmp_path, photo(0, 64, 64))
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 40] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"image\.png: the image cannot be decoded \(.+\)\.$"):
        load_image(path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "the file is empty"),
        (b"no picture, just text\n", "not an image, or of a kind that Pillow does not read"),
        (bytes(1000), "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image|cannot be decoded"),
        (b"\xff\xd8\xff\xe0", "not an image|cannot be decoded"),
    ],
)
def test_files_that_are_no_images(content, match, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=match) as caught:
        load_image(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(MissingFileError, match=r"nowhere\.png: cannot be opened \(No such file"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(MissingFileError, match="Is a directory"):
        load_image(str(tmp_path))
    with pytest.raises(MissingFileError, match="null byte"):
        load_image("a\0b")


def test_the_limit_on_pixels_is_pillows(tmp_path, monkeypatch):
    path = save(tmp_path, photo(0, 30, 20))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 299)
    said = (
        r"image\.png: too large: .*600 pixels.*598 pixels, .* attack\. If you trust the file, "
        r"raise `PIL\.Image\.MAX_IMAGE_PIXELS`; in a command, --max-pixels\.$"
    )
    with pytest.raises(ImageError, match=said):
        load_image(path)
    for limit in (300, 599, None):
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
        filters = list(warnings.filters)
        assert load_image(path).size == (30, 20)  # no warning, or this test would fail
        assert warnings.filters == filters


def test_files_are_read_by_many_threads_at_once(tmp_path, monkeypatch):
    path = save(tmp_path, photo(0, 30, 20))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 599)
    filters = list(warnings.filters)
    results = []
    threads = [
        threading.Thread(target=lambda: results.extend(load_image(path) for _ in range(20)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 160
    assert warnings.filters == filters


def test_threads_do_not_wait_for_each_others_disk(tmp_path, monkeypatch):
    """The first read of each of two files ends when the other's has begun."""
    path = save(tmp_path, photo(0, 64, 64))
    both = threading.Barrier(2, timeout=5)

    class Disk(io.FileIO):
        def readinto(self, buffer):
            if self.tell() == 0:
                both.wait()
            return super().readinto(buffer)

    def slow(self, mode="r", buffering=-1):
        return io.BufferedReader(Disk(self), max(buffering, io.DEFAULT_BUFFER_SIZE))

    monkeypatch.setattr(Path, "open", slow)
    with ThreadPoolExecutor(2) as pool:
        for image in pool.map(load_image, [path, path]):
            np.testing.assert_array_equal(np.asarray(image), np.asarray(photo(0, 64, 64)))


def test_names_of_bytes(tmp_path):
    path = save(tmp_path, photo())
    with os.scandir(os.fsencode(tmp_path)) as scan:
        (entry,) = scan
    assert isinstance(os.fspath(entry), bytes)
    np.testing.assert_array_equal(np.asarray(load_image(entry)), np.asarray(photo()))
    path.write_bytes(b"no image")
    with pytest.raises(ImageError, match=f"^{re.escape(str(path))}: not an image"):
        load_image(entry)


def test_a_truncated_file_that_was_opened_lazily(tmp_path):
    path = save(tmp_path, photo(0, 64, 64), "image.jpg")
    path.write_bytes(path.read_bytes()[:1500])
    with (
        PIL.Image.open(path) as image,
        pytest.raises(ImageError, match=r"image 1: the file .*image\.jpg cannot be decoded"),
    ):
        ViTImageProcessor()([photo(), image])


def test_what_load_image_gives_is_what_grey_and_colour_models_take(tmp_path):
    path = save(tmp_path, moded("L"))
    for options, channels in ((IMAGENET, 3), (GREY, 1)):
        result = ViTImageProcessor(size=8, **options)(load_image(path), return_tensors="np")
        assert result.pixel_values.shape == (1, channels, 8, 8)
