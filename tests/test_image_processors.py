"""The relatives' processors against Transformers 4.57.6, to the bit; timm's transform; labels."""

import json
import math
import subprocess
import sys
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from PIL.Image import Resampling

from vit_common.errors import ConfigError, InputError, MissingFileError
from vit_common.images import processors as image_processors
from vit_common.images.auto import AutoImageProcessor
from vit_common.images.imagenet import imagenet_labels
from vit_common.images.processor import ViTImageProcessor
from vit_common.images.processors import (
    BeitFeatureExtractor,
    BeitImageProcessor,
    BitImageProcessor,
    DeiTFeatureExtractor,
    DeiTImageProcessor,
)
from vit_common.images.timm import processor_from_timm

CLASSES = [DeiTImageProcessor, BeitImageProcessor, BitImageProcessor]
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
FILE = "preprocessor_config.json"

# Options as repositories on the Hub have them.
DEIT_FILE = {  # facebook/deit-base-distilled-patch16-224
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "DeiTFeatureExtractor",
    "resample": 3,
    "size": 256,
    **IMAGENET,
}
BEIT_FILE = {  # microsoft/beit-base-patch16-224
    "crop_size": 224,
    "do_center_crop": False,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "BeitFeatureExtractor",
    "resample": 2,
    "size": 224,
    **HALF,
}
OLD_BEIT_FILE = BEIT_FILE | {"do_center_crop": True, "size": 256, "resample": 3}
DINO_FILE = {  # facebook/dinov2-base
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_processor_type": "BitImageProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256},
    **IMAGENET,
}
FILES = [
    (DeiTImageProcessor, DEIT_FILE),
    (BeitImageProcessor, BEIT_FILE),
    (BeitImageProcessor, OLD_BEIT_FILE),
    (BitImageProcessor, DINO_FILE),
]


@pytest.fixture(autouse=True)
def quiet_reference():
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    yield
    transformers.logging.set_verbosity(verbosity)


def reference(cls):
    return getattr(transformers, cls.__name__)


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def photo(seed=0, width=40, height=30, mode="RGB"):
    return PIL.Image.fromarray(pixels(seed, height, width, 3)).convert(mode)


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return function(*args, **kwargs)


def assert_equal_output(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(theirs, list):
        for a, b in zip(ours, theirs, strict=True):
            assert_equal_output(a, b)
    else:
        assert (tuple(ours.shape), ours.dtype) == (tuple(theirs.shape), theirs.dtype)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def compare(cls, images, call=None, **options):
    call = call or {}
    theirs = quietly(reference(cls), **options)(images, **call)["pixel_values"]
    ours = quietly(cls(**options), images, **call)["pixel_values"]
    assert_equal_output(ours, theirs)
    return ours


# -- bit equality where 4.57.6 works


@pytest.mark.parametrize("cls", CLASSES)
def test_defaults(cls):
    assert cls().to_json_string() == reference(cls)().to_json_string()
    for width, height in ((320, 280), (61, 301)):
        result = compare(cls, photo(1, width, height), {"return_tensors": "np"})
        assert result.shape == (1, 3, 224, 224)


@pytest.mark.parametrize(("cls", "table"), FILES)
def test_files_of_the_hub(cls, table):
    compare(cls, [photo(2, 320, 281), photo(3, 241, 301)], {"return_tensors": "pt"}, **table)


def random_case(rng, cls):
    def maybe(probability):
        return rng.random() < probability

    def side():
        return int(rng.integers(1, 30))

    options, call = {}, {}
    for where in (options, call):
        if where is options or maybe(0.5):
            sizes = [side(), (side(), side()), {"height": side(), "width": side()}]
            where["crop_size"] = sizes[rng.integers(3)]
            if cls is BitImageProcessor:
                sizes.append({"shortest_edge": side()})
            where["size"] = sizes[rng.integers(len(sizes))]
        for name in ("do_resize", "do_rescale", "do_normalize", "do_center_crop"):
            if maybe(0.2):
                where[name] = maybe(0.5)
        if maybe(0.4):
            where["resample"] = int(rng.integers(0, 6))
        if maybe(0.2):
            where["rescale_factor"] = float(rng.random())
    if maybe(0.5):
        options |= IMAGENET
    if maybe(0.3):
        call["data_format"] = str(rng.choice(["channels_first", "channels_last"]))
    if maybe(0.5):
        call["return_tensors"] = str(rng.choice(["np", "pt", "jax"]))
    values = pixels(int(rng.integers(1000)), 3, *(int(v) for v in rng.integers(5, 40, 2)), 3)
    kind = rng.integers(6)
    if kind == 0:
        return options, call, [PIL.Image.fromarray(each) for each in values]
    if kind == 1:
        values = values.transpose(0, 3, 1, 2)
    if kind == 2:
        values = values / 255
    if kind == 3:
        return options, call, torch.from_numpy(values).float()
    return (
        options,
        call,
        [values, list(values), values[0], [[values[0]], [values[1]]]][rng.integers(4)],
    )


@pytest.mark.parametrize("cls", CLASSES)
def test_equals_transformers_on_random_cases(cls):
    rng = np.random.default_rng(CLASSES.index(cls))
    compared = 0
    for _ in range(80):
        options, call, images = random_case(rng, cls)
        try:
            theirs = reference(cls)(**options)(images, **call)["pixel_values"]
        except ValueError:
            continue
        ours = quietly(cls(**options), images, **call)["pixel_values"]
        assert_equal_output(ours, theirs)
        compared += 1
    assert compared > 50


@pytest.mark.parametrize("cls", CLASSES)
def test_options_have_the_places_of_transformers(cls):
    made = {
        DeiTImageProcessor: (True, 20, 2, True, 16, 0.01, True, True, [0.1] * 3, [0.2] * 3),
        BeitImageProcessor: (True, 20, 2, True, 16, 0.01, True, True, [0.1] * 3, [0.2] * 3, False),
        BitImageProcessor: (True, 20, 2, True, 16, True, 0.01, True, [0.1] * 3, [0.2] * 3, False),
    }[cls]
    assert cls(*made).to_json_string() == reference(cls)(*made).to_json_string()
    call = [True, 20, 2, True, 16, True, 0.01, True, [0.1] * 3, [0.2] * 3]
    extra = {DeiTImageProcessor: [], BeitImageProcessor: [False], BitImageProcessor: [False]}[cls]
    front = [None] if cls is BeitImageProcessor else []
    call = [*front, *call, *extra, "np", "channels_last", "channels_last"]
    ours = cls().preprocess(photo(), *call)["pixel_values"]
    theirs = reference(cls)().preprocess(photo(), *call)["pixel_values"]
    assert_equal_output(ours, theirs)
    assert ours.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "CMYK", "1"])
def test_grey_and_transparent_images(cls, mode):
    image = photo(4, 50, 41, mode)
    options = {"size": 33, "crop_size": 20}
    expected = reference(cls)(**options)(image.convert("RGB"), return_tensors="np")
    ours = cls(**options)([image], return_tensors="np").pixel_values
    assert_equal_output(ours, expected["pixel_values"])
    if cls is BitImageProcessor:  # the one that converts in 4.57.6 too
        compare(cls, image, **options)


def test_an_int_is_the_shorter_edge_for_bit_alone():
    assert BitImageProcessor(size=9).size == {"shortest_edge": 9}
    assert BitImageProcessor(size=(9, 7)).size == {"height": 9, "width": 7}
    assert BitImageProcessor(crop_size=9).crop_size == {"height": 9, "width": 9}
    assert DeiTImageProcessor(size=9).size == {"height": 9, "width": 9}
    processor = BitImageProcessor(size=40)
    processor.size = 10
    assert processor.size == {"shortest_edge": 10}
    with pytest.raises(InputError, match="`size` must be made of positive integers; given True"):
        BitImageProcessor(size=True)
    call = {"size": 10, "do_center_crop": False}
    assert compare(BitImageProcessor, photo(0, 40, 30), call)[0].shape == (3, 10, 13)


@pytest.mark.parametrize("cls", CLASSES)
def test_none_is_the_default(cls):
    named = ("size", "resample", "crop_size", "rescale_factor", "image_mean", "image_std")
    assert cls(**dict.fromkeys(named)).to_json_string() == reference(cls)().to_json_string()
    processor = cls(size=9, crop_size=8, resample=0, rescale_factor=1, **IMAGENET)
    for name in named:
        setattr(processor, name, None)
    assert processor == cls()


# -- segmentation


def test_beit_makes_no_maps():
    for call in (
        lambda: BeitImageProcessor(do_reduce_labels=True),
        lambda: BeitImageProcessor(reduce_labels=True),
        lambda: BeitImageProcessor()(photo(), do_reduce_labels=True),
        lambda: setattr(BeitImageProcessor(), "do_reduce_labels", 1),
    ):
        with pytest.raises(InputError, match="reduce_labels` must be False: it is for the maps"):
            call()
    with pytest.raises(InputError, match=r"`segmentation_maps` must be None.*given ndarray"):
        BeitImageProcessor()(photo(), pixels(0, 30, 40))
    processor = BeitImageProcessor.from_dict(BEIT_FILE | {"reduce_labels": False})
    table = processor.to_dict()
    assert table["reduce_labels"] is False
    assert table["do_reduce_labels"] is False


def test_a_file_of_a_segmenter_is_refused_by_its_name(tmp_path):
    (tmp_path / FILE).write_text(json.dumps(BEIT_FILE | {"reduce_labels": True}))
    with pytest.raises(ConfigError, match=rf"{FILE}: `reduce_labels` must be False"):
        AutoImageProcessor.from_pretrained(tmp_path)


# -- files


@pytest.mark.parametrize(("cls", "table"), FILES)
def test_files_are_read_crosswise(cls, table, tmp_path):
    ours = cls.from_dict(table)
    theirs = quietly(reference(cls).from_dict, table)  # BEiT's warns of a key it drops
    assert ours.to_json_string() == theirs.to_json_string()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "ours" / FILE).read_text() == (tmp_path / "theirs" / FILE).read_text()
    for read in (cls, AutoImageProcessor):
        again = read.from_pretrained(tmp_path / "theirs")
        assert type(again) is cls
        assert again == ours
    for read in (reference(cls), transformers.AutoImageProcessor):
        again = read.from_pretrained(tmp_path / "ours")
        assert type(again) is reference(cls)
        assert again.to_dict() == theirs.to_dict()
    image = photo(5, 63, 47)
    assert_equal_output(ours(image)["pixel_values"], theirs(image)["pixel_values"])


@pytest.mark.parametrize("cls", CLASSES)
def test_a_dict_of_defaults_is_not_shared(cls):
    cls().size["height"] = 7
    cls().image_mean.append(1)
    assert cls().to_json_string() == reference(cls)().to_json_string()


@pytest.mark.parametrize(
    ("older", "cls"),
    [(DeiTFeatureExtractor, DeiTImageProcessor), (BeitFeatureExtractor, BeitImageProcessor)],
)
def test_the_feature_extractors(older, cls):
    options = {"size": (13, 17), "crop_size": [8, 9]}
    ours = older(**options)
    assert ours.size == {"height": 17, "width": 13}  # as those of the time: (width, height)
    assert ours.crop_size == {"height": 9, "width": 8}
    expected = cls(size=(17, 13), crop_size=(9, 8))
    assert ours.to_json_string() == expected.to_json_string()
    assert isinstance(ours, cls)
    square = {"size": 13, "crop_size": 8}
    with pytest.warns(FutureWarning, match=f"{older.__name__} is deprecated"):
        theirs = getattr(transformers, older.__name__)(**square)
    assert_equal_output(older(**square)(photo())["pixel_values"], theirs(photo())["pixel_values"])


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("ViTImageProcessor", ViTImageProcessor),
        ("ViTImageProcessorFast", ViTImageProcessor),
        ("DeiTImageProcessorFast", DeiTImageProcessor),
        ("BeitImageProcessorFast", BeitImageProcessor),
        ("BitImageProcessorFast", BitImageProcessor),
    ],
)
def test_auto_takes_the_class_that_the_file_names(name, cls, tmp_path):
    (tmp_path / FILE).write_text(json.dumps({"image_processor_type": name, "size": 23}))
    ours = AutoImageProcessor.from_pretrained(tmp_path, do_normalize=False, use_fast=False)
    assert type(ours) is cls
    assert not ours.do_normalize
    assert ours.to_dict()["image_processor_type"] == cls.__name__
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    assert type(theirs).__name__ == cls.__name__
    assert ours.size == theirs.size
    assert AutoImageProcessor.from_pretrained(tmp_path / FILE).size == theirs.size


def test_a_file_of_a_fast_processor(tmp_path):
    table = DINO_FILE | {
        "image_processor_type": "BitImageProcessorFast",
        "data_format": "channels_first",
        "default_to_square": False,
        "device": None,
        "disable_grouping": None,
        "input_data_format": None,
        "return_tensors": None,
    }
    (tmp_path / FILE).write_text(json.dumps(table))
    ours = AutoImageProcessor.from_pretrained(tmp_path)
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    image = photo(6, 300, 271)
    assert_equal_output(ours(image)["pixel_values"], theirs(image)["pixel_values"])


@pytest.mark.parametrize(
    "model_type",
    ["vit", "vit_mae", "vit_msn", "deit", "beit", "data2vec-vision", "bit", "dinov2", "clip"],
)
def test_auto_asks_the_config_where_the_file_names_no_class(model_type, tmp_path):
    table = {"do_resize": True, "size": 23, "resample": 2, **HALF}
    (tmp_path / FILE).write_text(json.dumps(table))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    for source in (tmp_path, tmp_path / FILE):
        ours = AutoImageProcessor.from_pretrained(source)
        assert type(ours).__name__ == type(theirs).__name__
        assert ours.to_json_string() == theirs.to_json_string()


def test_auto_refuses_what_it_does_not_know(tmp_path):
    known = "ViTImageProcessor, DeiTImageProcessor, BeitImageProcessor, BitImageProcessor"
    with pytest.raises(MissingFileError, match=FILE):
        AutoImageProcessor.from_pretrained(tmp_path)
    (tmp_path / FILE).write_text(json.dumps({"image_processor_type": "ConvNextImageProcessor"}))
    with pytest.raises(ConfigError, match=f"{FILE}: .*{known}.*given 'ConvNextImageProcessor'"):
        AutoImageProcessor.from_pretrained(tmp_path)
    (tmp_path / FILE).write_text(json.dumps({"feature_extractor_type": ["x"]}))
    with pytest.raises(ConfigError, match=r"`feature_extractor_type` must be .*given \['x'\]"):
        AutoImageProcessor.from_pretrained(tmp_path)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(ConfigError, match=f"{FILE}: .*{known}.*; there is no config.json"):
        AutoImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "convnext"}))
    wanted = r"out of vit, .*dinov2.*; its `model_type` is 'convnext'"
    with pytest.raises(ConfigError, match=wanted):
        AutoImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"call `AutoImageProcessor\.from_pretrained`"):
        AutoImageProcessor()


def test_options_refused_and_ignored(tmp_path):
    (tmp_path / FILE).write_text(json.dumps(DEIT_FILE | {"crop_size": "big"}))
    with pytest.raises(ConfigError, match=f"{FILE}: `crop_size` must be .*given 'big'"):
        AutoImageProcessor.from_pretrained(tmp_path)
    (tmp_path / FILE).write_text(json.dumps(BEIT_FILE))
    with pytest.warns(UserWarning, match="BeitImageProcessor does not know .*: foo") as seen:
        AutoImageProcessor.from_pretrained(tmp_path, foo=1)
    assert seen[0].filename == __file__
    ours = AutoImageProcessor.from_pretrained(tmp_path, do_reduce_labels=False, size=9)
    assert ours.size == {"height": 9, "width": 9}


def test_importing_the_processors_imports_no_framework():
    script = (
        "import sys, vit_common.images.processors, vit_common.images.timm\n"
        "import vit_common.images.imagenet\n"
        "print(sorted({'torch', 'jax', 'flax', 'transformers', 'huggingface_hub'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
    assert image_processors.__all__ == sorted(image_processors.__all__)


# -- timm


def timm_transform(image, cfg):
    """timm's steps for evaluation, with Pillow and numpy: resize, crop, scale, normalise.

    Source: `transforms_imagenet_eval` of timm 1.0.31, and `resize` and `center_crop` of torchvision
    0.28 (`transforms/functional.py`), which rounds where the crop starts.
    """
    _, height, width = cfg["input_size"]
    pct = cfg.get("crop_pct", 0.875)
    wide, high = image.size
    short = math.floor(height / pct)
    if cfg.get("crop_mode") == "squash":
        new = (math.floor(width / pct), math.floor(height / pct))
    elif wide <= high:
        new = (short, int(short * high / wide))
    else:
        new = (int(short * wide / high), short)
    image = image.resize(new, Resampling[cfg.get("interpolation", "bicubic").upper()])
    left, top = round((new[0] - width) / 2.0), round((new[1] - height) / 2.0)
    image = image.crop((left, top, left + width, top + height))
    values = np.asarray(image, np.float32).reshape(height, width, -1) / np.float32(255)
    mean = np.float32(cfg.get("mean", IMAGENET["image_mean"]))
    std = np.float32(cfg.get("std", IMAGENET["image_std"]))
    return ((values - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize(
    "cfg",
    [
        {"input_size": (3, 32, 32)},
        {"input_size": [3, 40, 40], "crop_pct": 0.9, "mean": [0.5] * 3, "std": (0.5, 0.5, 0.5)},
        {"input_size": [3, 30, 30], "crop_pct": 0.95, "interpolation": "bilinear"},
        {"input_size": [3, 28, 28], "crop_pct": 1.0, "interpolation": "nearest"},
        {"input_size": [3, 28, 28], "crop_pct": 1, "interpolation": "lanczos"},
        {"input_size": [3, 40, 20], "crop_pct": 0.9, "crop_mode": "squash"},
        {"input_size": [3, 28, 28], "crop_pct": 1.0, "crop_mode": "squash", "mean": None},
        {"input_size": [1, 28, 28], "mean": [0.4], "std": [0.3], "interpolation": "box"},
    ],
    ids=str,
)
def test_timm(cfg):
    processor = processor_from_timm({"architecture": "vit", "num_classes": 10, **cfg})
    cfg = {k: v for k, v in cfg.items() if v is not None}
    random = np.random.default_rng(0)
    images = [(60, 45), (45, 60), (50, 50), (20, 33), (90, 41), (64, 48), (41, 97), (33, 35)]
    images += [tuple(size) for size in random.integers(8, 120, (40, 2)).tolist()]
    for seed, (width, height) in enumerate(images):
        image = photo(seed, width, height, "L" if cfg["input_size"][0] == 1 else "RGB")
        expected = timm_transform(image, cfg)
        result = processor(image, return_tensors="np").pixel_values[0]
        assert result.shape == expected.shape == tuple(cfg["input_size"])
        np.testing.assert_array_equal(result, expected)


def test_the_crop_starts_where_that_of_timm_starts_and_in_transformers_files_where_theirs_does():
    processor = processor_from_timm({"input_size": (3, 20, 20), "crop_pct": 0.87})  # 22 to 20
    assert processor.size == {"shortest_edge": 22}
    wide = photo(0, 23, 22)  # is 23 wide after the resize too: 3 more than the crop
    for rounding, left in (("half_to_even", 2), ("floor", 1)):
        processor.crop_rounding = rounding
        result = processor(wide, return_tensors="np", do_rescale=False, do_normalize=False)
        result = result.pixel_values[0].transpose(1, 2, 0)
        np.testing.assert_array_equal(result, np.asarray(wide)[1:21, left : left + 20])
    with pytest.raises(InputError, match="`crop_rounding` must be None or one of 'floor', 'half_"):
        processor.crop_rounding = "up"


def test_how_the_crop_is_rounded_stands_in_files_and_transformers_reads_them(tmp_path):
    processor = processor_from_timm({"input_size": (3, 20, 20)})
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / FILE).read_text())["crop_rounding"] == "half_to_even"
    assert AutoImageProcessor.from_pretrained(tmp_path) == processor
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert theirs(photo(), return_tensors="np").pixel_values.shape == (1, 3, 20, 20)
    assert "crop_rounding" not in BitImageProcessor().to_dict()


def test_timm_options_of_models():
    processor = processor_from_timm(
        {"input_size": [3, 224, 224], "crop_pct": 0.9, "interpolation": "bicubic"}
    )
    assert processor.size == {"shortest_edge": 248}
    assert processor.crop_size == {"height": 224, "width": 224}
    assert processor.resample is Resampling.BICUBIC
    assert processor.image_mean == IMAGENET["image_mean"]
    assert processor.do_convert_rgb is True
    assert json.loads(processor.to_json_string())["image_processor_type"] == "BitImageProcessor"
    grey = processor_from_timm({"input_size": [1, 28, 28], "mean": 0.5, "std": [0.5]})
    assert (grey.image_mean, grey.do_convert_rgb) == ([0.5], None)
    assert grey(photo(), return_tensors="np").pixel_values.shape == (1, 1, 28, 28)


@pytest.mark.parametrize(
    ("cfg", "match"),
    [
        ([], r"`pretrained_cfg` must be a mapping; given \[\]"),
        ({"pretrained_cfg": {}}, "no `input_size`; .*under the key `pretrained_cfg`"),
        ({"input_size": 224}, r"`input_size` must be three integers \(channels, height, width\)"),
        ({"input_size": [3, 224]}, "`input_size` must be three integers"),
        ({"input_size": [3, 224, 2.5]}, "`input_size` must be three integers"),
        ({"input_size": [3, 0, 0]}, "`input_size` must be three integers"),
        ({"input_size": [5, 8, 8]}, "of 1, 3 or 4 channels"),
        ({"input_size": [3, 28, 20]}, "28 x 20 needs a resize that covers both"),
        ({"interpolation": "random"}, "one of nearest, .*'random' is for training; given 'random'"),
        ({"interpolation": "cubic"}, "`interpolation` must be one of .*bicubic.*given 'cubic'"),
        ({"crop_mode": "border"}, r"`crop_mode` must be 'center' or 'squash' .*given 'border'"),
        ({"crop_pct": 1.5}, "`crop_pct` must be over 0, and 1 at most; given 1.5"),
        ({"crop_pct": "1"}, "`crop_pct` must be a number over 0.*given '1'"),
        ({"crop_pct": float("nan")}, "`crop_pct` must be over 0"),
        ({"mean": [0.5, 0.5]}, "`mean` must be one number for each of 3 channels"),
        ({"mean": "x"}, "`pretrained_cfg`: `image_mean` must be a finite number"),
        ({"std": [0, 1, 1]}, "`pretrained_cfg`: `image_std` must be free of zeros"),
    ],
    ids=str,
)
def test_timm_refusals(cfg, match):
    if isinstance(cfg, dict) and not {"pretrained_cfg", "input_size"} & set(cfg):
        cfg = {"input_size": [3, 28, 28], **cfg}
    with pytest.raises(ConfigError, match=match) as caught:
        processor_from_timm(cfg)
    assert "\n" not in str(caught.value)


# -- labels


def test_labels_of_imagenet():
    labels = imagenet_labels()
    assert isinstance(labels, tuple)
    assert len(labels) == 1000
    assert labels is imagenet_labels()
    assert all(label and label == label.strip() for label in labels)
    # Facts of the file imagenet_classes that came with ILSVRC-2012, as Hub configurations have it.
    facts = {
        0: "tench, Tinca tinca",
        1: "goldfish, Carassius auratus",
        207: "golden retriever",
        281: "tabby, tabby cat",
        285: "Egyptian cat",
        386: "African elephant, Loxodonta africana",
        400: "academic gown, academic robe, judge's robe",
        638: "maillot",
        639: "maillot, tank suit",
        757: "recreational vehicle, RV, R.V.",
        967: "espresso",
        999: "toilet tissue, toilet paper, bathroom tissue",
    }
    assert {index: labels[index] for index in facts} == facts
    # The one name that two classes have: the bird and the machine.
    twice = {label for label in labels if labels.count(label) > 1}
    assert twice == {"crane"}
    assert [i for i, label in enumerate(labels) if label == "crane"] == [134, 517]


def test_a_timm_folder_is_said_to_be_one(tmp_path):
    """README's snippet with the folder of a timm checkpoint: the class that reads it is named."""
    cfg = {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
    table = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(table))
    with pytest.raises(MissingFileError, match=r"`AutoImageProcessor\.from_pretrained` reads it"):
        ViTImageProcessor.from_pretrained(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).crop_size == {"height": 8, "width": 8}

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(MissingFileError, match="no such file") as error:
        ViTImageProcessor.from_pretrained(tmp_path)
    assert "AutoImageProcessor" not in str(error.value)
