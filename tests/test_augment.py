"""Augmentation against timm and torchvision, which are given the same random numbers."""

from __future__ import annotations

import math
import pickle
import types

import numpy as np
import PIL.Image
import pytest
from pictures import photo
from PIL import ImageFilter, ImageOps

from vit_common.augment import Augment, auto_augment, draws
from vit_common.augment.operations import OPERATIONS
from vit_common.errors import InputError
from vit_common.recipes import recipe


class Same:
    """Python's `random`, and the parts of numpy's and torch's, from one source of numbers."""

    def __init__(self, source):
        self.random = source.random

    def uniform(self, low, high):
        return low + (high - low) * self.random()

    def gauss(self, mean, deviation):
        angle = self.random() * math.tau
        return mean + math.cos(angle) * math.sqrt(-2 * math.log(1 - self.random())) * deviation

    def randint(self, low, high):
        return low + int(self.random() * (high - low + 1))

    def choice(self, items):
        return items[int(self.random() * len(items))]


def posterize(image, bits):
    """`ImageOps.posterize` of Pillow 12, which takes 0 bits: Pillow 13 does not, and timm asks for
    it where `PosterizeIncreasing` has its full magnitude."""
    mask = ~(2 ** (8 - bits) - 1)
    return image.point([value & mask for value in range(256)] * len(image.getbands()))


class SameNumpy(Same):
    """What timm asks of `numpy.random`."""

    def choice(self, items, count, replace=True, p=None):
        if p is None:
            return [items[int(self.random() * len(items))] for _ in range(count)]
        left, found = np.array(p, float), []
        for _ in range(count):
            edges = np.cumsum(left)
            place = int((edges <= self.random() * edges[-1]).sum())
            found.append(items[place])
            left[place] = 0
        return found

    def randint(self, low, high):
        return low + int(self.random() * (high - low))

    def dirichlet(self, alpha):
        parts = np.array([-math.log(1 - self.random()) for _ in alpha])
        return parts / parts.sum()

    def beta(self, a, b):
        return self.random()


@pytest.fixture(name="timm_with")
def timm_with_fixture(monkeypatch):
    """Lets timm and torchvision draw from a source; gives timm's factory of transforms."""
    import timm_models  # noqa: F401
    import torch
    import torchvision.transforms
    from timm.data import auto_augment as timm_auto
    from timm.data import transforms as timm_transforms
    from timm.data import transforms_factory

    numpy, image_ops = types.SimpleNamespace(**vars(np)), types.SimpleNamespace(**vars(ImageOps))
    image_ops.posterize = posterize
    monkeypatch.setattr(timm_auto, "np", numpy)
    monkeypatch.setattr(timm_auto, "ImageOps", image_ops)

    def jitter(brightness, contrast, saturation, hue):
        ranks = [same.random() for _ in range(3)]
        factors = [same.uniform(*range) for range in (brightness, contrast, saturation)]
        return (torch.tensor(np.argsort(ranks)), *factors, None)

    def use(source):
        nonlocal same
        same = Same(source)
        numpy.random = SameNumpy(source)
        monkeypatch.setattr(timm_auto, "random", same)
        monkeypatch.setattr(timm_transforms, "random", same)
        monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor([same.random()]).double())
        return transforms_factory

    same = None
    monkeypatch.setattr(torchvision.transforms.ColorJitter, "get_params", staticmethod(jitter))
    return use


def same_image(ours, theirs):
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


NAMES = [
    "rand-m9-mstd0.5-inc1",
    "rand-m9-n3-p1-mstd101-inc1",
    "rand-m7-p0.7",
    "rand-m15-mmax20-mstd1-p1-inc1",
    "rand-m9-n3-p1-tweights",
    "rand-m9-n2-p1-t3aw",
    "rand-m5-n2-t3a",
    "original",
    "original-mstd0.5",
    "originalr",
    "v0-mstd1",
    "v0r",
    "3a",
    "augmix-m5-w4-d2",
    "augmix",
]


@pytest.mark.parametrize("interpolation", ["random", "bicubic"])
@pytest.mark.parametrize("name", [*NAMES, None])
def test_whole_pipeline_against_timm(timm_with, name, interpolation):
    """Crop, flip, automatic augmentation and jitter of colours, as `create_transform` has them."""
    mean = (0.485, 0.456, 0.406)
    settings = recipe().replace(
        auto_augment=name,
        color_jitter=0.3,
        interpolation=interpolation,
        crop_scale=(0.08, 1.0),
    )
    augment = Augment(settings, (24, 20), mean=mean)
    image = photo(1, 50, 37)
    for index in range(12):
        theirs = timm_with(draws(5, 1, index)).transforms_imagenet_train(
            (24, 20),
            color_jitter=0.3,
            auto_augment=name,
            interpolation=interpolation,
            mean=mean,
            normalize=False,
        )(image)
        ours = augment(image, draws(5, 1, index))
        same_image(ours, theirs.permute(1, 2, 0))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_operations_against_timm(timm_with, name, mode):
    """Every operation at every magnitude, and between and beyond."""
    timm_with(draws(0, 0, 0))
    from timm.data import auto_augment as timm_auto

    from vit_common.augment.auto import Operation
    from vit_common.augment.operations import Setting

    fill = (120, 110, 100) if mode == "RGB" else 120
    image = photo(2, 19, 23).convert(mode)
    assert set(OPERATIONS) == set(timm_auto.NAME_TO_OP)
    for magnitude in [*range(11), 0.3, 7.77, 13]:
        hparams = {"translate_const": 9, "img_mean": fill, "magnitude_max": 15}
        theirs = timm_auto.AugmentOp(name, 0.9, magnitude, hparams)
        ours = Operation(name, 0.9, magnitude, Setting(fill, translate_pixels=9), most=15)
        for index in range(2):
            timm_with(draws(3, 0, index))
            same_image(ours(image, draws(3, 0, index)), theirs(image))


@pytest.mark.parametrize("size", [(50, 37), (400, 3), (3, 400), (1, 1), (24, 24)])
def test_crop_against_timm(timm_with, size):
    """Of images of every form; those too long or too high for the aspect are cropped in the
    middle."""
    settings = recipe().replace(crop_scale=(0.2, 1.0), crop_ratio=(0.5, 1.5), flip=0.0)
    image = photo(3, *size)
    for index in range(30):
        timm_with(draws(1, 0, index))
        from timm.data.transforms import RandomResizedCropAndInterpolation

        theirs = RandomResizedCropAndInterpolation(16, (0.2, 1.0), (0.5, 1.5), "bicubic")(image)
        same_image(Augment(settings, 16)(image, draws(1, 0, index)), theirs)


def test_three_augment_is_deit_iiis():
    """Grey, solarised or blurred, each a third of the time, as `augment.py` of
    facebookresearch/deit has it."""
    augment = auto_augment("3a", size=(16, 16))
    image = photo(4, 16, 16)
    kinds = []
    for index in range(30):
        source = draws(0, 0, index)
        kinds.append(int(source.random() * 3))
        wanted = [
            lambda source: ImageOps.solarize(image),
            lambda source: ImageOps.grayscale(image).convert("RGB"),
            lambda source: image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * source.random())),
        ][kinds[-1]](source)
        same_image(augment(image, draws(0, 0, index)), wanted)
    assert set(kinds) == {0, 1, 2}


def test_draws_are_a_function_of_their_place():
    """Philox of numpy with the place as its counter, so that no two places share a number."""
    places = [(s, e, i, r) for s in (0, 1) for e in (0, 7) for i in range(50) for r in (0, 1)]
    found = [draws(*place).random(4).tolist() for place in places]
    assert found == [draws(*place).random(4).tolist() for place in places]
    flat = [number for row in found for number in row]
    assert len(set(flat)) == len(flat)
    philox = np.random.Philox(key=np.array([9, 16], np.uint64), counter=[0, 17, 3, 2])
    assert draws(9, 3, 17, 2).random() == np.random.Generator(philox).random()
    # Of numbers of one place and those of the next, none say anything of each other.
    first = np.array([draws(0, 0, i).random() for i in range(4000)])
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.05
    assert abs(first.mean() - 0.5) < 0.02


@pytest.mark.parametrize("given", [-1, 1 << 64, 1.0, True, "0", None])
def test_draws_refuse_what_is_no_place(given):
    with pytest.raises(InputError, match=r"`seed` must be an integer from 0 to 2\^64 - 1; given"):
        draws(given, 0, 0)


def test_other_numbers_of_channels():
    """Grey images and arrays of many bands get the crop and flip of an image with colours."""
    image = photo(5, 30, 20)
    bands = np.asarray(image)
    settings = recipe()
    colour = Augment(settings, 12)(image, draws(0, 0, 1))
    six = Augment(settings, 12, channels=6)(np.concatenate([bands, bands], -1), draws(0, 0, 1))
    same_image(six[..., :3], colour)
    same_image(six[..., 3:], colour)
    grey = Augment(settings, 12, channels=1)(image.getchannel(1), draws(0, 0, 1))
    same_image(grey, np.asarray(colour)[..., 1])


def test_without_a_crop_the_image_is_resized():
    image = photo(6, 30, 20)
    settings = recipe().replace(crop_scale=None, flip=0.0, interpolation="bilinear")
    wanted = image.resize((8, 12), PIL.Image.Resampling.BILINEAR)
    same_image(Augment(settings, (12, 8))(image, draws(0, 0, 0)), wanted)


def test_augment_can_be_pickled():
    settings = recipe().replace(auto_augment="rand-m9-mstd0.5-inc1")
    augment = Augment(settings, 12, mean=(0.5, 0.4, 0.3))
    image = photo(7)
    again = pickle.loads(pickle.dumps(augment))
    same_image(again(image, draws(0, 0, 3)), augment(image, draws(0, 0, 3)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("randm9", "no augmentation 'randm9'. Did you mean rand?"),
        ("rand-m9-x3", "no option 'x3'; rand has m, n, p, mstd, mmax, inc, t"),
        ("rand-m", "no option 'm'"),
        ("rand-m9.5", "the value of m must be a whole number; given '9.5'"),
        ("rand-tmany", "no set of operations 'many'; wanted one of 3a, 3aw, weights"),
        ("rand-n16-t3aw", "16 different operations of 14"),
        ("original-m9", "no option 'm9'; original has mstd"),
        ("rand-mstd0.5.1", "the value of mstd must be a number"),
        ("", "no augmentation ''"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(InputError) as caught:
        auto_augment(name, size=(8, 8))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "channels", "message"),
    [
        ({"auto_augment": "3a"}, 4, "it needs images with 1 or 3 channels; the model's have 4"),
        ({"color_jitter": 0.3}, 6, "it needs images with 1 or 3 or 4 channels; the model's have 6"),
    ],
)
def test_settings_that_do_not_suit_the_channels(settings, channels, message):
    with pytest.raises(InputError) as caught:
        Augment(recipe().replace(**settings), 8, channels=channels)
    assert message in str(caught.value)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_affine_against_torchvision(mode):
    """Its `functional.affine`, of the numbers that are drawn here."""
    import timm_models  # noqa: F401
    from torchvision.transforms import InterpolationMode, functional

    most = (20.0, 0.2, 0.3, 15.0)
    settings = recipe().replace(
        affine=most, crop_scale=None, flip=0.0, interpolation="bilinear", color_jitter=0.0
    )
    image = photo((40, 56)).convert(mode)
    augment = Augment(settings, (24, 32), channels=len(mode))
    for index in range(8):
        source = draws(3, 0, index)
        angle, across, down, scale, shear = (
            low + (high - low) * source.random()
            for low, high in [(-20, 20), (-6.4, 6.4), (-4.8, 4.8), (0.7, 1.3), (-15, 15)]
        )
        want = functional.affine(
            image.resize((32, 24), PIL.Image.Resampling.BILINEAR),
            angle,
            [across, down],
            scale,
            [shear, 0.0],
            interpolation=InterpolationMode.BILINEAR,
        )
        same_image(augment(image, draws(3, 0, index)), want)
    assert recipe("digits").affine == (10.0, 0.0875, 0.1, 6.0)
    with pytest.raises(InputError, match="affine"):
        recipe("digits", affine=(10.0, -0.1, 0.1, 6.0))
    with pytest.raises(InputError, match="`affine` must be 4 numbers or none; given"):
        recipe("digits", affine=(10.0, 0.1))
