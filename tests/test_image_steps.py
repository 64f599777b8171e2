"""Single steps of the processors beside Transformers 4.57.6's methods; what an image may be given
as; names that code for Transformers imports."""

from __future__ import annotations

import inspect
import io
import json
import pickle

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
import transformers

import vit_flax
import vit_torch
from vit_common.errors import CheckpointError, ImageError, InputError
from vit_common.images.options import MOST_PIXELS
from vit_common.images.pictures import load_image
from vit_common.images.predictions import prepare_image

NAMES = ("ViT", "DeiT", "Beit", "Bit")
processors = pytest.mark.parametrize("name", NAMES)
STEPS = ("resize", "rescale", "normalize", "center_crop")


def both(name: str, **options):
    cls = f"{name}ImageProcessor"
    return getattr(vit_torch, cls)(**options), getattr(transformers, cls)(**options)


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def assert_same(ours, theirs):
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    np.testing.assert_array_equal(ours, theirs)


# -- steps


IMAGES = {
    "last": pixels(21, 34, 3),
    "first": pixels(3, 21, 34, seed=1),
    "grey": pixels(21, 34, 1, seed=2),
    "floats": pixels(21, 34, 3, seed=3) / np.float32(255),
    "whole": pixels(3, 21, 34, seed=4).astype(np.float64),
}
images = pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
formats = pytest.mark.parametrize("data_format", [None, "channels_first", "channels_last"])


@processors
@images
@formats
def test_resize(name, image, data_format):
    ours, theirs = both(name)
    for size in ({"height": 9, "width": 14}, {"height": 40, "width": 30}):
        call = {"size": size, "data_format": data_format}
        assert_same(ours.resize(image, **call), theirs.resize(image, **call))
        call |= {"resample": PIL.Image.Resampling.LANCZOS, "reducing_gap": 2.0}
        assert_same(ours.resize(image, **call), theirs.resize(image, **call))
    if name == "Bit":
        for edge in (9, 40):
            call = {"size": {"shortest_edge": edge}, "data_format": data_format}
            assert_same(ours.resize(image, **call), theirs.resize(image, **call))
    picture = ours.resize(image, {"height": 9, "width": 14}, return_numpy=False)
    expected = theirs.resize(image, {"height": 9, "width": 14}, return_numpy=False)
    assert_same(np.asarray(picture), np.asarray(expected))


@images
@formats
def test_rescale_and_normalize(image, data_format):
    ours, theirs = both("ViT")
    call = {"data_format": data_format}
    for scale in (1 / 255, 2, 0.1):
        assert_same(ours.rescale(image, scale, **call), theirs.rescale(image, scale, **call))
    assert_same(
        ours.rescale(image, 0.5, dtype=np.float64), theirs.rescale(image, 0.5, dtype=np.float64)
    )
    count = 1 if image.shape[-1] == 1 else 3
    numbers = ([0.1, 0.2, 0.3][:count], [0.5, 0.25, 0.4][:count])
    for mean, std in (numbers, (0.5, 0.25), tuple(np.array(each) for each in numbers)):
        assert_same(
            ours.normalize(image, mean, std, **call), theirs.normalize(image, mean, std, **call)
        )


@images
@formats
def test_center_crop(image, data_format):
    ours, theirs = both("DeiT")
    for height, width in ((9, 14), (8, 15), (21, 34), (30, 50), (30, 9), (9, 51), (22, 35)):
        call = {"size": {"height": height, "width": width}, "data_format": data_format}
        assert_same(ours.center_crop(image, **call), theirs.center_crop(image, **call))


def test_the_layout_that_is_said_counts():
    ours, theirs = both("ViT")
    image = pixels(5, 3, 4)
    for call in (
        {"input_data_format": "channels_last"},
        {"input_data_format": "channels_last", "data_format": "channels_first"},
    ):
        assert_same(ours.resize(image, {"height": 7, "width": 6}, **call),
                    theirs.resize(image, {"height": 7, "width": 6}, **call))  # fmt: skip
        assert_same(ours.normalize(image, [0.1] * 4, [0.5] * 4, **call),
                    theirs.normalize(image, [0.1] * 4, [0.5] * 4, **call))  # fmt: skip
    both_ways = pixels(3, 9, 3)
    with pytest.warns(UserWarning, match="channels first or last; taken as channels_first") as seen:
        found = ours.center_crop(both_ways, 2)
    assert seen[0].filename == __file__
    assert_same(found, theirs.center_crop(both_ways, {"height": 2, "width": 2}))
    for each in (PIL.Image.fromarray(image[..., :3]), torch.tensor(image[..., :3].copy())):
        assert_same(
            ours.resize(each, 8, input_data_format="channels_last"),
            theirs.resize(image[..., :3], {"height": 8, "width": 8},
                          input_data_format="channels_last"),
        )  # fmt: skip


def test_the_steps_together_are_the_whole():
    processor = vit_torch.DeiTImageProcessor(size=20, crop_size=16)
    image = pixels(30, 41, 3)
    values = processor.resize(image, processor.size, processor.resample)
    values = processor.center_crop(values, processor.crop_size)
    values = processor.rescale(values, processor.rescale_factor)
    values = processor.normalize(
        values, processor.image_mean, processor.image_std, data_format="channels_first"
    )
    assert_same(values, processor(image, return_tensors="np").pixel_values[0])


def test_steps_refuse_by_name():
    ours, _ = both("ViT")
    image = pixels(9, 9, 5)
    for call, error, match in (
        (lambda: ours.resize(image, 4), ImageError, "looks like the channel; wanted 1 or 3"),
        (lambda: ours.resize(pixels(9, 9), 4), ImageError, "must have 3 dimensions"),
        (lambda: ours.resize(pixels(9, 9, 3), "big"), InputError, "`size` must be"),
        (lambda: ours.resize(pixels(9, 9, 3), 4, resample=77), InputError, "`resample` must be"),
        (lambda: ours.rescale(pixels(9, 9, 3), "x"), InputError, "`rescale_factor` must be"),
        (lambda: ours.rescale("cat.png", 1), ImageError, "given the name 'cat.png'"),
        (lambda: ours.normalize(pixels(9, 9, 3), [0, 0], 1), InputError, "`mean` must have 3"),
        (lambda: ours.normalize(pixels(9, 9, 3), 0, [1, 1]), InputError, "`std` must have 3"),
        (lambda: ours.center_crop(pixels(2, 9, 9, 3), 4), ImageError, "one image with 3 axes"),
        (lambda: ours.center_crop(pixels(9, 9, 3), 65_535), ImageError, "at most 268435456"),
        (lambda: ours.resize(pixels(9, 9, 3), 40_000), ImageError, f"at most {MOST_PIXELS}"),
        (lambda: ours.resize(pixels(9, 9, 3), 2**31), InputError, "at most 65535 pixels per side"),
    ):
        with pytest.raises(error, match=match):
            call()


@processors
def test_every_method_and_its_arguments_are_those_of_transformers(name):
    ours, theirs = both(name)
    left_out = {
        "fetch_images",  # downloads whatever address it is given
        "register_for_auto_class",  # for code kept on the Hub
        "reduce_label",  # maps for segmentation, as the next
        "post_process_semantic_segmentation",
    }
    public = {each for each in dir(theirs) if not each.startswith("_")}
    assert public - set(dir(ours)) <= left_out
    for method in (*STEPS, "preprocess", "__call__", "from_dict", "to_json_file"):
        expected = inspect.signature(getattr(theirs, method)).parameters
        found = inspect.signature(getattr(ours, method)).parameters
        usual = [
            key for key, each in expected.items() if each.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        assert [key for key in found if key in usual] == usual, method
        for key in usual:
            if key not in ("resample", "data_format"):  # each None: as the class has it
                assert found[key].default == expected[key].default, (method, key)
    expected = inspect.signature(type(theirs)).parameters
    found = inspect.signature(type(ours)).parameters
    assert [*found][:-1] == [*expected][:-1]
    for key in [*found][:-1]:
        assert found[key].default == expected[key].default, key
    assert ours.model_input_names == theirs.model_input_names
    assert pickle.loads(pickle.dumps(ours)) == ours


def test_a_class_of_ones_own():
    class Mine(vit_torch.ViTImageProcessor):
        def __init__(self, shade: float = 0.5, **options):
            super().__init__(**options)
            self.shade = shade

        def preprocess(self, images, **options):
            return super().preprocess(images, **options)

    mine = Mine(0.25, size=8)
    assert (mine.shade, mine.size) == (0.25, {"height": 8, "width": 8})
    assert mine(pixels(9, 9, 3), return_tensors="np").pixel_values.shape == (1, 3, 8, 8)
    assert list(inspect.signature(Mine).parameters) == ["shade", "options"]
    with pytest.raises(TypeError, match="takes at most 9 options by place; given 10"):
        vit_torch.ViTImageProcessor(*range(10))
    with pytest.raises(TypeError, match="multiple values for argument 'do_resize'"):
        vit_torch.ViTImageProcessor(True, do_resize=True)


def test_names_that_code_for_transformers_imports(tmp_path):
    for face in (vit_flax, vit_torch):
        for name in NAMES:
            assert getattr(face, f"{name}ImageProcessorFast") is getattr(
                face, f"{name}ImageProcessor"
            )
        feature = face.BatchFeature({"pixel_values": [np.zeros(3)]}, tensor_type="pt")
        theirs = transformers.BatchFeature({"pixel_values": [np.zeros(3)]}, tensor_type="pt")
        assert torch.equal(feature["pixel_values"], theirs["pixel_values"])
        assert face.load_image is load_image
        transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
        for auto in (face.AutoFeatureExtractor, face.AutoImageProcessor):
            assert auto.from_pretrained(tmp_path).size == {"height": 8, "width": 8}
        with pytest.raises(InputError, match=r"call `AutoFeatureExtractor\.from_pretrained`"):
            face.AutoFeatureExtractor()
    ours, theirs = (
        place.ViTImageProcessor.get_image_processor_dict(tmp_path, extra=1)
        for place in (vit_torch, transformers)
    )
    assert ours == (theirs[0], {"extra": 1})
    (tmp_path / "preprocessor_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        vit_torch.ViTImageProcessor.get_image_processor_dict(tmp_path)


# -- which axis is the channel, where several may be


@pytest.mark.parametrize("means", [1, 3])
def test_a_stack_of_grey_images_is_not_one_image_of_many_channels(means):
    processor = vit_torch.ViTImageProcessor(
        size=8, image_mean=[0.5] * means, image_std=[0.5] * means
    )
    theirs = transformers.ViTImageProcessor(
        size={"height": 8, "width": 8}, image_mean=[0.5] * means, image_std=[0.5] * means
    )
    for count in (2, 4, 5, 28) if means == 3 else (2, 3, 4, 5, 28):
        stack = pixels(count, 28, 28)
        with pytest.raises(ImageError, match="list"):
            processor(stack)
        with pytest.raises(ValueError, match=r"."):  # so does Transformers
            theirs(stack)
        # As it says: in a list, or with an axis for the channel, they are so many grey images.
        expected = [processor(each, return_tensors="np").pixel_values[0] for each in stack]
        for given in ([*stack], stack[:, None], stack[..., None]):
            assert_same(processor(given, return_tensors="np").pixel_values, np.stack(expected))


def test_one_image_of_four_channels_is_taken_where_it_is_said_or_sure():
    rgba = pixels(28, 20, 4)
    expected = vit_torch.ViTImageProcessor(size=8)(rgba[..., :3], return_tensors="np").pixel_values
    processor = vit_torch.ViTImageProcessor(size=8)
    assert_same(processor(rgba, return_tensors="np").pixel_values, expected)
    said = processor(
        rgba.transpose(2, 0, 1), input_data_format="channels_first", return_tensors="np"
    )
    assert_same(said.pixel_values, expected)
    four = {"image_mean": [0.5] * 4, "image_std": [0.5] * 4}
    processor = vit_torch.ViTImageProcessor(size=8, **four)
    first = processor(rgba.transpose(2, 0, 1), return_tensors="np").pixel_values
    assert_same(first, processor(rgba, return_tensors="np").pixel_values)


# -- files, bytes, and how the camera was held


@pytest.fixture
def turned(tmp_path):
    """A photo whose EXIF says that it lies on its side."""
    image = PIL.Image.fromarray(pixels(24, 40, 3))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.png"
    image.save(path, exif=exif)
    return path


def test_every_way_to_give_an_image_file_gives_the_same(turned):
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(turned)).convert("RGB")
    data = turned.read_bytes()
    processor = vit_torch.ViTImageProcessor(size=8)
    expected = transformers.ViTImageProcessor(size={"height": 8, "width": 8})(
        upright, return_tensors="np"
    )["pixel_values"]
    with turned.open("rb") as stream:
        sources = [turned, str(turned), data, bytearray(data), memoryview(data), io.BytesIO(data)]
        sources += [
            stream,
            PIL.Image.open(turned),
            load_image(turned),
            load_image(load_image(data)),
        ]
        for source in sources:
            assert_same(np.asarray(load_image(source)), np.asarray(upright))
            assert_same(prepare_image(source, processor, (3, 8, 8)), expected[0])
        for source in (*sources[2:7], [io.BytesIO(data)]):
            assert_same(processor(source, return_tensors="np").pixel_values, expected)
        assert not stream.closed
    assert processor([data, pixels(9, 9, 3), io.BytesIO(data)], return_tensors="np")[
        "pixel_values"
    ].shape == (3, 3, 8, 8)


def test_a_message_never_repeats_the_bytes(turned):
    data = turned.read_bytes()
    processor = vit_torch.ViTImageProcessor(size=8)
    rubbish = b"\x00\xff" * 30_000
    for source in (rubbish, bytearray(rubbish), io.BytesIO(rubbish), data[:300], b""):
        for call in (
            lambda source=source: load_image(source),
            lambda source=source: processor(source),
            lambda source=source: processor([pixels(9, 9, 3), source]),
            lambda source=source: prepare_image(source, processor, (3, 8, 8)),
        ):
            with pytest.raises(ImageError, match=r"bytes: |the given file: ") as caught:
                call()
            assert len(str(caught.value)) < 300
    with pytest.raises(ImageError, match="image 1: 0 bytes: the file is empty"):
        processor([pixels(9, 9, 3), b""])
    with pytest.raises(ImageError) as caught:
        processor("x" * 30_000)
    assert len(str(caught.value)) < 400
    with pytest.raises(ImageError, match="the given file: the image cannot be decoded"):
        load_image(io.StringIO("text"))


def test_json_of_a_processor_reads_back():
    for name in NAMES:
        ours, theirs = both(name)
        assert json.loads(ours.to_json_string()) == json.loads(theirs.to_json_string())
