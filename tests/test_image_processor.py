"""The image processors against Transformers 4.57.6, to the bit; files against Pillow."""

import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
import transformers
from pictures import (
    GREY,
    IMAGENET,
    assert_equal_output,
    moded,
    photo,
    pixels,
    quiet_reference_fixture,  # noqa: F401
)
from PIL.Image import Resampling
from transformers.image_utils import ChannelDimension
from transformers.utils import TensorType

from vit_common.errors import ImageError, InputError
from vit_common.images.processor import (
    BatchFeature,
    MissingFrameworkError,
    ViTFeatureExtractor,
    ViTImageProcessor,
    convert_mode,
)


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return function(*args, **kwargs)


def compare(images, call=None, reference=transformers.ViTImageProcessor, ours=None, **options):
    """Both processors on the same images; returns what ours gave."""
    call = call or {}
    theirs = reference(**options)(images, **call)["pixel_values"]
    result = quietly((ours or ViTImageProcessor(**options)), images, **call)["pixel_values"]
    assert_equal_output(result, theirs)
    return result


# -- bit equality where 4.57.6 works


def random_case(rng):
    """Options and images out of everything 4.57.6 can mean; many a draw it cannot do at all."""

    def maybe(probability):
        return rng.random() < probability

    def side():
        return int(rng.integers(1, 30))

    def some(channels):
        return [float(v) for v in rng.random(channels) + 0.1]

    channels = int(rng.choice([1, 3, 4], p=[0.2, 0.65, 0.15]))
    options, call = {}, {}
    for where in (options, call):
        if maybe(0.5):
            sizes = [side(), (side(), side()), {"height": side(), "width": side()}]
            where["size"] = sizes[rng.integers(3)]
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if maybe(0.2):
                where[name] = maybe(0.5)
        if maybe(0.4):
            where["resample"] = int(rng.integers(0, 6))
        if maybe(0.2):
            where["rescale_factor"] = float(rng.random())
        if maybe(0.2):
            where["do_convert_rgb"] = channels == 3
    if channels != 3 or maybe(0.5):
        options |= {"image_mean": some(channels), "image_std": some(channels)}
    if maybe(0.2):
        call |= {"image_mean": 0.3, "image_std": some(channels) if maybe(0.5) else 0.2}
    if maybe(0.3):
        call["data_format"] = str(rng.choice(["channels_first", "channels_last"]))
    if maybe(0.5):
        call["return_tensors"] = str(rng.choice(["np", "pt", "jax"]))

    height, width = (int(v) for v in rng.integers(5, 40, 2))
    layout = str(rng.choice(["channels_first", "channels_last"]))
    shape = (height, width, channels)
    if layout == "channels_first":
        shape = (channels, height, width)
    if channels == 4 or maybe(0.2):
        call["input_data_format"] = layout
    values = rng.integers(0, 256, (3, *shape), dtype=np.uint8)
    kind = rng.integers(10)
    if kind == 0:
        values = rng.random(values.shape, dtype=np.float32)
    elif kind == 1:
        values = rng.random(values.shape).astype(np.float16)
    elif kind == 2:
        values = rng.normal(size=values.shape)
    elif kind < 7:
        values = values.astype([np.float32, np.float64, np.int64, np.uint16][kind - 3])
    elif kind == 7 and layout == "channels_last":
        values = [PIL.Image.fromarray(v[..., 0] if channels == 1 else v) for v in values]
    one = values[0]
    if not isinstance(values, list) and maybe(0.3):
        one = [torch.from_numpy, jnp.asarray][rng.integers(2)](one)
    images = [one, [one], values, list(values), [[one], [one, one]], [values, values]]
    if isinstance(values, list):
        images[-1] = [values, values]
    return options, call, images[rng.integers(len(images))]


@pytest.mark.parametrize("seed", range(8))
def test_equals_transformers_on_random_cases(seed):
    rng = np.random.default_rng(seed)
    compared = 0
    for _ in range(50):
        options, call, images = random_case(rng)
        try:
            theirs = transformers.ViTImageProcessor(**options)(images, **call)["pixel_values"]
        except ValueError:
            continue  # ours may well work there
        ours = quietly(ViTImageProcessor(**options), images, **call)["pixel_values"]
        assert_equal_output(ours, theirs)
        compared += 1
    assert compared > 15


@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize("size", [(17, 23), (64, 51), (30, 40)])
def test_every_filter(resample, size):
    compare(photo(), {"return_tensors": "np"}, resample=resample, size=size)
    compare(pixels(1, 30, 40, 3), {"return_tensors": "np"}, resample=resample, size=size)


@pytest.mark.parametrize("resample", sorted(Resampling))
def test_every_filter_of_this_pillow(resample):
    result = ViTImageProcessor(resample=resample, size=12)(photo(), return_tensors="np")
    expected = np.asarray(photo().resize((12, 12), resample), dtype=np.float64) / 255
    np.testing.assert_allclose(
        result.pixel_values[0].transpose(1, 2, 0), (expected - 0.5) / 0.5, atol=1e-6
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        IMAGENET,
        {"do_resize": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_resize": False, "do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": [0, 1, 0.5], "image_std": [1, 2, 3]},
        {"image_mean": 0.4, "image_std": [0.1, 0.2, 0.3]},
        {"image_mean": np.array([0.1, 0.2, 0.3], np.float32), "image_std": (0.4, 0.5, 0.6)},
    ],
)
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("return_tensors", [None, "np", "pt", "jax"])
def test_each_option(options, data_format, return_tensors):
    call = {"data_format": data_format, "return_tensors": return_tensors}
    compare(photo(), call, **options)
    compare([photo(1), photo(2)], call, **options)


def test_every_option_for_one_call():
    call = {
        "do_resize": True,
        "size": (9, 11),
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 0.01,
        "do_normalize": True,
        **IMAGENET,
        "return_tensors": "np",
        "data_format": "channels_last",
        "do_convert_rgb": True,
    }
    compare([photo(mode="L")], call, do_resize=False, do_normalize=False)
    positional = list(call.values())[:9]
    ours = ViTImageProcessor().preprocess(photo(), *positional)["pixel_values"]
    theirs = transformers.ViTImageProcessor().preprocess(photo(), *positional)["pixel_values"]
    assert_equal_output(ours, theirs)


def test_options_of_the_constructor_that_4_57_6_knows_for_calls_only():
    options = {"return_tensors": "np", "data_format": "channels_last"}
    array = pixels(0, 6, 3, 4)  # 3 wide, 4 channels: only the option can tell
    options |= {"input_data_format": "channels_last", "image_mean": 0.5, "image_std": 0.5}
    result = ViTImageProcessor(**options)(array).pixel_values
    theirs = transformers.ViTImageProcessor(image_mean=0.5, image_std=0.5)(array, **options)
    assert_equal_output(result, theirs["pixel_values"])


def test_enumerations_of_transformers_are_taken():
    call = {"return_tensors": TensorType.NUMPY, "data_format": ChannelDimension.LAST}
    compare(photo(), call, resample=transformers.image_utils.PILImageResampling.LANCZOS)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("do_resize", [True, False])
def test_dtypes_of_arrays(dtype, do_resize):
    array = pixels(3, 3, 20, 24).astype(dtype)
    for call in ({}, {"do_rescale": False}, {"do_rescale": False, "do_normalize": False}):
        compare(array, {"do_resize": do_resize, "return_tensors": "np", **call}, size=16)


def test_a_resize_to_the_same_size_still_makes_eight_bits_of_floats():
    array = np.random.default_rng(0).random((3, 16, 16))
    ours = compare(array, {"do_rescale": False, "return_tensors": "np"}, size=16)
    assert len(np.unique(ours)) <= 256
    compare(
        pixels(0, 16, 16, 4),
        {"input_data_format": "channels_last"},
        size=16,
        image_mean=0,
        image_std=1,
    )


@pytest.mark.parametrize("do_resize", [True, False])
def test_bfloat16(do_resize):
    values = pixels(4, 12, 14, 3)
    call = {"do_resize": do_resize, "size": 8, "return_tensors": "np"}
    compare(jnp.asarray(values, jnp.bfloat16), call)
    # 4.57.6 cannot read the torch tensor; its values are those of jax.
    ours = ViTImageProcessor()(torch.from_numpy(values).bfloat16(), **call).pixel_values
    theirs = transformers.ViTImageProcessor()(jnp.asarray(values, jnp.bfloat16), **call)
    assert_equal_output(ours, theirs["pixel_values"])


def test_torch_tensor_that_requires_grad():
    compare(torch.from_numpy(pixels(0, 3, 9, 9)).float().requires_grad_(), size=6)


@pytest.mark.parametrize("height", [30, 31, 10, 11, 1])
@pytest.mark.parametrize("crop", [(20, 21), (31, 9), (12, 40), (45, 47)])
@pytest.mark.parametrize("do_resize", [True, False])
def test_center_crop_equals_deit(height, crop, do_resize):
    options = {"resample": 3, "size": 26, "do_resize": do_resize, "crop_size": crop, **IMAGENET}
    array = pixels(height, height, 33, 3)
    call = {"return_tensors": "np", "input_data_format": "channels_last"}
    ours = ViTImageProcessor(do_center_crop=True, **options)
    compare(array, call, transformers.DeiTImageProcessor, ours, **options)
    compare(array / 255, call, transformers.DeiTImageProcessor, ours, **options)


def test_deit_and_clip_pipelines_of_real_files():
    image = photo(5, 320, 280)
    deit = {"size": 256, "crop_size": 224, "resample": 3, "do_center_crop": True, **IMAGENET}
    ours = ViTImageProcessor(**deit)
    result = compare(image, {"return_tensors": "np"}, transformers.DeiTImageProcessor, ours, **deit)
    assert result.shape == (1, 3, 224, 224)
    for width, height in ((45, 30), (30, 45), (33, 33), (7, 40)):
        clip = {
            "size": {"shortest_edge": 24},
            "crop_size": {"height": 20, "width": 20},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "resample": 3,
            **IMAGENET,
        }
        image = photo(6, width, height, mode="CMYK")
        for reference in (transformers.CLIPImageProcessor, transformers.BitImageProcessor):
            compare(image, {"return_tensors": "np"}, reference, ViTImageProcessor(**clip), **clip)
            uncropped = clip | {"do_center_crop": False}
            compare(image, {}, reference, ViTImageProcessor(**uncropped), **uncropped)


def test_the_feature_extractor_gives_the_same():
    with pytest.warns(FutureWarning, match="ViTFeatureExtractor is deprecated"):
        theirs = transformers.ViTFeatureExtractor(size=13)
    ours = ViTFeatureExtractor(size=13)
    call = {"images": photo(), "return_tensors": "np"}
    assert_equal_output(ours(**call)["pixel_values"], theirs(**call)["pixel_values"])
    # Pairs are (width, height) in the older face, for the constructor and for calls.
    assert ViTFeatureExtractor(size=(13, 7)).size == {"height": 7, "width": 13}
    assert ours(photo(), size=[13, 7])["pixel_values"][0].shape == (3, 7, 13)


# -- PIL images of every mode


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "RGBa", "La"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb_as_pillow_does_it(mode):
    image = moded(mode)
    expected = image.convert("LA").convert("RGB") if mode == "La" else image.convert("RGB")
    np.testing.assert_array_equal(np.asarray(convert_mode(image, 3)), np.asarray(expected))
    theirs = transformers.ViTImageProcessor(size=12)(expected, return_tensors="np")["pixel_values"]
    for do_convert_rgb in (None, True):
        if do_convert_rgb is None and mode in ("YCbCr", "HSV"):
            continue  # three bands, which 4.57.6 takes as they are
        processor = ViTImageProcessor(size=12, do_convert_rgb=do_convert_rgb)
        ours = processor(image, return_tensors="np").pixel_values
        assert_equal_output(ours, theirs)


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB"])
def test_other_spaces_of_three_bands_stay_as_in_4_57_6(mode):
    image = PIL.Image.merge(mode, moded("RGB").split())
    compare(image, {"return_tensors": "np"}, size=12)


@pytest.mark.parametrize("mode", MODES)
def test_grey_models_take_every_mode(mode):
    image = moded(mode)
    expected = {"La": "LA", "PA": "RGBA"}.get(mode, mode)
    expected = image.convert(expected).convert("L")
    call = {"return_tensors": "np", "input_data_format": "channels_last"}
    theirs = transformers.ViTImageProcessor(size=12, **GREY)(expected, **call)["pixel_values"]
    ours = ViTImageProcessor(size=12, **GREY)(image, return_tensors="np").pixel_values
    assert_equal_output(ours, theirs)
    assert ours.shape == (1, 1, 12, 12)


def test_models_of_four_channels_take_rgba():
    options = {"size": 12, "image_mean": [0.1, 0.2, 0.3, 0.4], "image_std": [0.5] * 4}
    call = {"return_tensors": "np", "input_data_format": "channels_last"}
    theirs = transformers.ViTImageProcessor(**options)(moded("RGBA"), **call)["pixel_values"]
    ours = ViTImageProcessor(**options)(moded("RGBA"), return_tensors="np").pixel_values
    assert_equal_output(ours, theirs)
    opaque = moded("RGBA")
    opaque.putalpha(255)
    theirs = transformers.ViTImageProcessor(**options)(opaque, **call)["pixel_values"]
    ours = ViTImageProcessor(**options)(opaque.convert("RGB"), return_tensors="np").pixel_values
    assert_equal_output(ours, theirs)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "RGBX", "CMYK", "I", "F"])
@pytest.mark.parametrize("options", [{"do_normalize": False}, {"image_mean": 0.4, "image_std": 2}])
def test_modes_stay_where_4_57_6_is_told_the_layout(mode, options):
    image = moded(mode, width=20, height=24)
    call = {"input_data_format": "channels_last", "return_tensors": "np"}
    compare(image, call, size=12, **options)
    compare(image, call | {"do_convert_rgb": False}, size=12, do_convert_rgb=True, **options)


@pytest.mark.parametrize("transparency", [3, bytes(range(256)), (1, 2, 3)])
def test_transparency_of_palettes_is_dropped_and_the_image_left_alone(transparency):
    image = moded("P")
    expected = image.convert("RGB")
    image.info["transparency"] = transparency
    palette = image.im.getpalette("RGBA", "RGBA")
    result = convert_mode(image, 3)
    np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))
    assert image.im.getpalette("RGBA", "RGBA") == palette
    assert image.mode == "P"
    assert image.info["transparency"] == transparency


def test_sixteen_bit_grey_is_scaled_not_cut_off():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 257.0).astype(np.uint8)  # 65535 / 255 = 257
    for image in (
        PIL.Image.fromarray(values),
        PIL.Image.fromarray(values.astype(">u2")),
        PIL.Image.fromarray(values.astype(np.int32)),
    ):
        assert image.mode in ("I;16", "I;16B", "I")
        np.testing.assert_array_equal(np.asarray(convert_mode(image, 1)), expected)
        grey = PIL.Image.fromarray(expected).convert("RGB")
        ours = ViTImageProcessor(size=9, do_convert_rgb=True)(image)["pixel_values"]
        assert_equal_output(ours, transformers.ViTImageProcessor(size=9)(grey)["pixel_values"])


def test_wide_integers_and_floats_of_eight_bit_range():
    values = pixels(0, 10, 12)
    for dtype in (np.int32, np.float32):
        image = PIL.Image.fromarray(values.astype(dtype))
        np.testing.assert_array_equal(np.asarray(convert_mode(image, 1)), values)
    unit = PIL.Image.fromarray((values / 255).astype(np.float32))
    np.testing.assert_array_equal(np.asarray(convert_mode(unit, 3))[..., 1], values)
    fractions = PIL.Image.fromarray(np.linspace(0, 255, 40, dtype=np.float32).reshape(5, 8))
    np.testing.assert_array_equal(
        np.asarray(convert_mode(fractions, 1)), np.asarray(fractions.convert("L"))
    )


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (PIL.Image.fromarray(np.full((4, 4), 70000, np.int32)), "0 to 65535; given 70000"),
        (PIL.Image.fromarray(np.full((4, 4), -1, np.int32)), "0 to 65535; given -1 to -1"),
        (PIL.Image.fromarray(np.full((4, 4), 300, np.float32)), "0 to 1 or from 0 to 255"),
        (PIL.Image.fromarray(np.full((4, 4), np.nan, np.float32)), "given nan to nan"),
    ],
)
def test_pil_images_without_an_eight_bit_meaning(image, match):
    with pytest.raises(ImageError, match=match):
        convert_mode(image, 3)
    with pytest.raises(ImageError, match=f"image 1: .*{match}"):
        ViTImageProcessor()([photo(), image])


def test_convert_mode_refuses_other_channel_counts():
    with pytest.raises(ImageError, match="cannot be given 2 channels; wanted 1, 3 or 4"):
        convert_mode(photo(), 2)


# -- layouts


def test_a_short_pil_image_is_not_taken_for_channels_first():
    for height in (1, 3, 4):
        image = photo(7, 8, height)
        expected = np.asarray(image.resize((6, 6), 2)).transpose(2, 0, 1)
        processor = ViTImageProcessor(size=6, do_rescale=False, do_normalize=False)
        for option in (None, "channels_first", "channels_last"):
            (ours,) = processor(image, input_data_format=option).pixel_values
            np.testing.assert_array_equal(ours, expected)


def test_layouts_are_told_image_by_image():
    arrays = [pixels(1, 3, 20, 24), pixels(2, 20, 24, 3), pixels(3, 21, 9, 3)]
    ours = ViTImageProcessor(size=8)(arrays, return_tensors="np").pixel_values
    for array, result in zip(arrays, ours, strict=True):
        theirs = transformers.ViTImageProcessor(size=8)(array)["pixel_values"]
        assert_equal_output(result, theirs[0])


def test_an_ambiguous_layout_warns_and_is_taken_as_4_57_6_does():
    array = pixels(1, 3, 20, 3)
    with pytest.warns(UserWarning, match=r"image 1 of shape \(3, 20, 3\).*input_data_format"):
        ours = ViTImageProcessor(size=8)([photo(), array])["pixel_values"]
    theirs = transformers.ViTImageProcessor(size=8)(array)["pixel_values"]
    assert_equal_output(ours[1], theirs[0])
    for layout in ("channels_first", "channels_last"):
        compare(array, {"input_data_format": layout}, size=8)


def test_the_rest_of_a_batch_settles_an_ambiguous_layout():
    arrays = [pixels(1, 20, 9, 3), pixels(2, 3, 20, 3), pixels(3, 20, 9, 3)]
    for batch in (arrays, arrays[::-1], arrays[1:]):
        ours = ViTImageProcessor(size=8)(batch)["pixel_values"]
        call = {"input_data_format": "channels_last"}
        assert_equal_output(
            ours, transformers.ViTImageProcessor(size=8)(batch, **call).pixel_values
        )


def test_the_means_settle_what_1_and_3_leave_open():
    array = pixels(1, 1, 20, 3)  # one row of RGB for 3 means, three columns of grey for 1
    for options, layout in ((IMAGENET, "channels_last"), (GREY, "channels_first")):
        ours = ViTImageProcessor(size=8, **options)(array)["pixel_values"]
        call = {"input_data_format": layout}
        theirs = transformers.ViTImageProcessor(size=8, **options)(array, **call)["pixel_values"]
        assert_equal_output(ours, theirs)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("do_resize", [True, False])
def test_grey_and_rgba_arrays_are_what_their_pil_images_are(dtype, do_resize):
    call = {"do_resize": do_resize, "size": 8, "return_tensors": "np"}
    for mode in ("L", "RGBA"):
        image = moded(mode)
        array = np.asarray(image).astype(dtype)
        theirs = transformers.ViTImageProcessor()(image.convert("RGB"), **call)["pixel_values"]
        first = np.atleast_3d(array).transpose(2, 0, 1)
        for variant in [array, np.atleast_3d(array)] + [first] * (mode == "L"):
            assert_equal_output(ViTImageProcessor()(variant, **call).pixel_values, theirs)
        # Four channels first may be four grey images, so it has to be said.
        ours = ViTImageProcessor()(
            first, input_data_format="channels_first", do_convert_rgb=None, **call
        )
        assert_equal_output(ours.pixel_values, theirs)


def test_colour_arrays_for_grey_models():
    image = photo()
    call = {"return_tensors": "np", "size": 8}
    theirs = transformers.ViTImageProcessor(**GREY)(
        image.convert("L"), input_data_format="channels_last", **call
    )["pixel_values"]
    processor = ViTImageProcessor(**GREY)
    assert_equal_output(processor(np.asarray(image), **call).pixel_values, theirs)
    assert_equal_output(processor(np.asarray(image, np.float64), **call).pixel_values, theirs)
    with pytest.raises(ImageError, match=r"image 0: has 3 channels, but .* are for 1"):
        processor(np.asarray(image, np.float64), do_resize=False)


def test_nesting_and_kinds_can_be_mixed():
    array = pixels(1, 20, 24, 3)
    kinds = [
        PIL.Image.fromarray(array),
        array,
        torch.from_numpy(array),
        jnp.asarray(array.transpose(2, 0, 1)),
        array[None],
        [[array], (torch.from_numpy(array),)],
        [],
    ]
    ours = ViTImageProcessor(size=8)(kinds, return_tensors="np").pixel_values
    assert ours.shape == (7, 3, 8, 8)
    theirs = transformers.ViTImageProcessor(size=8)(array, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(ours, np.repeat(theirs, 7, axis=0))


def test_images_and_options_are_left_as_they_were():
    array, image = pixels(1, 20, 24, 3), moded("P")
    tensor = torch.from_numpy(array.copy()).float()
    batch = [image, array, tensor]
    before = copy.deepcopy(batch)
    size = {"height": 8, "width": 8}
    processor = ViTImageProcessor(size=size)
    kept = processor.to_dict()
    quietly(processor, batch, size={"height": 3, "width": 4}, do_rescale=False)
    processor(array, do_resize=False, do_rescale=False, do_normalize=False).pixel_values[0][:] = 0
    assert size == {"height": 8, "width": 8}
    assert processor.to_dict() == kept
    np.testing.assert_array_equal(array, before[1])
    assert torch.equal(tensor, before[2])
    assert image == before[0]


# -- warnings and refusals


@pytest.mark.parametrize("do_resize", [True, False])
def test_values_that_are_rescaled_already_warn(do_resize):
    array = np.random.default_rng(0).random((3, 20, 24), dtype=np.float32)
    batch = [pixels(1, 3, 20, 24), array, array]
    with pytest.warns(UserWarning, match=r"image 1 \(and 1 more\): .*`do_rescale=False`") as seen:
        ViTImageProcessor(size=8)(batch, do_resize=do_resize)
    assert seen[0].filename == __file__
    ViTImageProcessor(size=8)(batch, do_rescale=False)


def test_unknown_options_of_a_call_are_named():
    processor = ViTImageProcessor(size=8)
    with pytest.warns(
        UserWarning, match="ViTImageProcessor does not know .*: device, padding"
    ) as w:
        ours = processor(photo(), device="cpu", padding=True)["pixel_values"]
    assert w[0].filename == __file__
    assert_equal_output(ours, processor(photo())["pixel_values"])


NAN = pixels(0, 3, 9, 9).astype(np.float32)
NAN[0, 3, 3] = np.nan


@pytest.mark.parametrize(
    ("images", "call", "match"),
    [
        ([], {}, "`images` holds no image"),
        ([[], []], {}, "`images` holds no image"),
        (None, {}, "image 0: an image must be .*given NoneType"),
        ([photo(), "cat.png"], {}, "image 1: .*'cat.png'. Open it with `load_image`"),
        ([[1, 2], [3, 4]], {}, "image 0: .*given int"),
        ({"image": photo()}, {}, "given dict"),
        (np.float32(3), {}, "given float32"),
        (np.zeros(5), {}, r"given shape \(5,\)"),
        ([photo(), np.zeros((2, 2, 3, 9, 9))], {}, r"image 1: .*shape \(2, 2, 3, 9, 9\)"),
        (np.zeros((3, 9, 9), object), {}, "must hold numbers .*given dtype object"),
        (np.zeros((3, 9, 9), complex), {}, "given dtype complex128"),
        (np.full((3, 9, 9), "a"), {}, "given dtype <U1"),
        (np.zeros((3, 0, 9), np.uint8), {}, r"no pixels in an image of size \(3, 0, 9\)"),
        (np.zeros((0, 3, 9, 9), np.uint8), {}, "`images` holds no image"),
        (PIL.Image.new("RGB", (0, 4)), {}, r"no pixels in an image of size \(0, 4\)"),
        ([photo(), NAN], {}, "image 1: holds NaN or infinity"),
        ([NAN], {"do_resize": False}, "image 0: holds NaN or infinity"),
        (np.full((3, 9, 9), np.inf), {}, "NaN or infinity"),
        (pixels(0, 20, 9, 7), {}, r"\(20, 9, 7\) looks like the channel.*`input_data_format`"),
        (pixels(0, 9, 9, 2), {}, r"\(9, 9, 2\) looks like the channel; wanted 3 channels"),
        (
            pixels(0, 20, 9, 3),
            {"input_data_format": "channels_first"},
            r"has 20 channels.*an `input_data_format` that fits its shape \(20, 9, 3\)",
        ),
        (
            moded("L"),
            {"do_convert_rgb": False},
            r"has 1 channel, but .* are for 3.*`do_convert_rgb=None` \(it is False\)",
        ),
        (photo(), {"do_convert_rgb": True, **GREY}, r"has 3 channels, but .* are for 1"),
        (photo(), {"image_mean": [0.5] * 5, "image_std": 1}, "cannot be given 5 channels"),
        (np.full((3, 9, 9), 256), {}, "whole numbers from 0 to 255.*from 256 to 256"),
        (np.full((3, 9, 9), -0.5), {}, "from -0.5 to -0.5.*`do_resize=False, do_rescale=False"),
        (np.full((3, 9, 9), 12.5), {}, "given dtype float64 with values from 12.5"),
        (np.full((3, 9, 9), 1e30, np.float32), {}, r"from 1e\+30"),
        (
            pixels(0, 9, 9, 5),
            {"input_data_format": "channels_last", "image_mean": 1, "image_std": 1},
            "Pillow resizes images with 1 to 4 channels; given 5",
        ),
    ],
)
def test_images_that_cannot_be_taken(images, call, match):
    with pytest.raises(ImageError, match=match) as caught:
        ViTImageProcessor(size=8)(images, **call)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_traced_array_cannot_be_taken():
    with pytest.raises(ImageError, match=r"image 0: a .*Tracer cannot be read as an array"):
        jax.jit(lambda x: ViTImageProcessor()(x))(jnp.zeros((3, 9, 9)))


def test_images_of_several_sizes_are_a_list_but_no_tensor():
    batch = [photo(1, 20, 10), photo(2, 10, 20)]
    compare(batch, do_resize=False)
    for kind in ("np", "pt", "jax"):
        with pytest.raises(InputError, match=r"image 0 has \(3, 10, 20\) and image 1 has \(3, 20"):
            ViTImageProcessor(do_resize=False)(batch, return_tensors=kind)


BAD_OPTIONS = [
    ({"do_resize": "yes"}, "`do_resize` must be True or False; given 'yes'"),
    ({"size": 0}, "`size` must be made of positive integers; given 0"),
    ({"size": (3, 4, 5)}, "`size` must be an int, a pair or a dict"),
    ({"size": 22.5}, "positive integers; given 22.5"),
    ({"size": True}, "positive integers; given True"),
    ({"size": {"height": 3}}, "with `height` and `width`, or with `shortest_edge`"),
    ({"size": {"shortest_edge": 3, "longest_edge": 4}}, "or with `shortest_edge`; given"),
    ({"crop_size": {"shortest_edge": 3}}, "`crop_size` must be"),
    ({"resample": 99}, r"`resample` must be one of Pillow's filters 0 \(NEAREST\)"),
    ({"resample": "bicubic"}, r"3 \(BICUBIC\).*given 'bicubic'"),
    ({"rescale_factor": "1/255"}, "`rescale_factor` must be a finite number"),
    ({"rescale_factor": float("nan")}, "given nan"),
    ({"image_mean": [0.5, None, 0.5]}, "`image_mean` must be a finite number, or a list"),
    ({"image_mean": []}, "`image_mean` must be"),
    ({"image_std": [0.5, 0, 0.5]}, "`image_std` must be free of zeros"),
    ({"image_std": "0.5"}, "`image_std` must be a finite number"),
    ({"data_format": "CHW"}, "'channels_first' or 'channels_last'; given 'CHW'"),
    ({"input_data_format": 3}, "'channels_first' or 'channels_last'; given 3"),
    ({"return_tensors": "torch"}, "None, 'np', 'pt', 'jax', 'tf'; given 'torch'"),
]


@pytest.mark.parametrize(("options", "match"), BAD_OPTIONS, ids=str)
def test_bad_options_are_refused_wherever_they_are_given(options, match):
    with pytest.raises(InputError, match=match):
        ViTImageProcessor(**options)
    processor = ViTImageProcessor()
    with pytest.raises(InputError, match=match):
        processor(photo(), **options)
    (name, value) = next(iter(options.items()))
    with pytest.raises(InputError, match=match):
        setattr(processor, name, value)
    with pytest.raises(InputError, match=match):
        ViTImageProcessor.from_dict(options)


def test_options_that_contradict_each_other():
    with pytest.raises(InputError, match="of one length; given 1 and 3 values"):
        ViTImageProcessor(image_mean=[0.5])(photo())
    with pytest.raises(InputError, match="`do_center_crop` needs `crop_size`"):
        ViTImageProcessor(do_center_crop=True)(photo())


def test_a_size_changed_from_outside_is_used_and_checked():
    processor = ViTImageProcessor(size=8)
    processor.size["height"] = 5
    assert processor(photo(), return_tensors="np").pixel_values.shape == (1, 3, 5, 8)
    processor.size["height"] = "5"
    with pytest.raises(InputError, match="`size` must be made of positive integers; given '5'"):
        processor(photo())


@pytest.mark.parametrize("kind", ["pt", "jax", "tf"])
def test_a_framework_that_is_not_installed(kind, monkeypatch):
    module, name = {"pt": ("torch", "PyTorch"), "jax": ("jax.numpy", "JAX")}.get(
        kind, ("tensorflow", "TensorFlow")
    )
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingFrameworkError, match=f"return_tensors='{kind}'` needs {name}"):
        ViTImageProcessor()(photo(), return_tensors=kind)
    with pytest.raises(ImportError, match="or pass another of 'np', 'pt'"):
        BatchFeature({"pixel_values": [1]}, kind)


def test_importing_the_processor_imports_no_framework():
    script = (
        "import sys, vit_common.images.processor as m, numpy as np\n"
        "m.ViTImageProcessor(size=8)(np.zeros((9, 9, 3), np.uint8), return_tensors='np')\n"
        "print(sorted({'torch', 'jax', 'flax', 'tensorflow', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


# -- the result


def test_the_result_is_a_mapping_with_attributes():
    result = ViTImageProcessor(size=8)(photo(), return_tensors="pt")
    assert isinstance(result, Mapping)
    assert list(result) == list(result.keys()) == ["pixel_values"]
    assert result.pixel_values is result["pixel_values"] is result.data["pixel_values"]
    assert dict(**result) == dict(result.items())
    with pytest.raises(AttributeError, match="no attribute or key 'labels'"):
        _ = result.labels
    for twin in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result), copy.copy(result)):
        assert torch.equal(twin.pixel_values, result.pixel_values)


def test_the_result_converts_and_moves():
    result = ViTImageProcessor(size=8)([photo(), photo(1)])
    array = np.stack(result.pixel_values)
    for kind, tensor in (("np", np.ndarray), ("pt", torch.Tensor), ("jax", jax.Array)):
        converted = BatchFeature(dict(result)).convert_to_tensors(kind)
        assert isinstance(converted.pixel_values, tensor)
        np.testing.assert_array_equal(np.asarray(converted.pixel_values), array)
    moved = BatchFeature({"pixel_values": array, "index": np.arange(2)}, "pt")
    assert moved.to(torch.float16) is moved
    assert moved.pixel_values.dtype == torch.float16
    assert moved.to("meta").index.device.type == "meta"
    assert moved.index.dtype == torch.int64
    with pytest.raises(InputError, match="`pixel_values` cannot be made one NumPy tensor"):
        BatchFeature({"pixel_values": [np.zeros(2), np.zeros(3)]}, "np")
