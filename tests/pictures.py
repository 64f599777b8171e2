"""Pictures for the tests of image processors, and the reference beside ours."""

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import transformers

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
GREY = {"image_mean": [0.3], "image_std": [0.7]}


@pytest.fixture(name="quiet_reference", autouse=True)
def quiet_reference_fixture():
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    yield
    transformers.logging.set_verbosity(verbosity)


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def photo(seed=0, width=40, height=30, mode="RGB"):
    return PIL.Image.fromarray(pixels(seed, height, width, 3)).convert(mode)


def assert_equal_output(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_equal_output(a, b)
    else:
        assert tuple(ours.shape) == tuple(theirs.shape)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def moded(mode, seed=0, width=21, height=17):
    four = PIL.Image.fromarray(pixels(seed, height, width, 4))
    if mode == "P":
        return four.convert("RGB").convert("P")
    if mode in ("I", "F"):
        return four.convert("L").convert(mode)
    through = {"RGBa": "RGBA", "RGBA": "RGBA", "La": "LA", "LA": "LA", "PA": "RGBA"}
    image = four.convert(through.get(mode, "RGB"))
    return image if image.mode == mode else image.convert(mode)
