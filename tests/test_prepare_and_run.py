"""`prepare` and `run`, the two halves of what a call does, against Transformers; in threads too."""

from __future__ import annotations

import gc
import io
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from networks import randomize

from vit_common.errors import ImageError, InputError, MissingFileError
from vit_flax import AutoConfig, AutoImageProcessor
from vit_flax.inference import ImageClassifier, ImageEncoder, Preparer

TOLERANCE = 2e-6  # float32; of probabilities and features
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
    "attn_implementation": "eager",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder as Transformers writes it, pictures, and what Transformers makes of them."""
    folder = tmp_path_factory.mktemp("model")
    model = randomize(transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES)))
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )
    processor.save_pretrained(folder)
    rng = np.random.default_rng(0)
    pictures = [
        PIL.Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), np.uint8)) for i in range(5)
    ]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        base = model.vit(pixels, output_hidden_states=True, output_attentions=True)
        probabilities = torch.softmax(model(pixels).logits, -1)
    return folder, pictures, pixels.numpy(), base, probabilities.numpy()


@pytest.fixture(scope="module")
def classify(made):
    return ImageClassifier.from_pretrained(made[0])


@pytest.fixture(scope="module")
def encode(made):
    return ImageEncoder.from_pretrained(made[0])


def test_prepare_gives_the_processors_pixels(made, classify):
    _, pictures, pixels, _, _ = made
    found = classify.prepare(pictures)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, pixels)
    np.testing.assert_array_equal(classify.prepare(pictures[1]), pixels[1:2])
    assert classify.prepare([]).shape == (0, 3, 32, 32)


def test_run_gives_what_transformers_gives(made, classify, encode):
    _, _, pixels, base, probabilities = made
    close = {"rtol": 0, "atol": TOLERANCE}
    np.testing.assert_allclose(classify.run(pixels), probabilities, **close)
    last = base.last_hidden_state.numpy()
    for each in (encode.run(pixels), classify.run(pixels, "features")):
        np.testing.assert_allclose(each, last[:, 0], rtol=0, atol=2e-5)
    several = encode.run(pixels, layers=(0, -1), pool=None)
    wanted = np.stack([base.hidden_states[1].numpy(), last], axis=1)
    np.testing.assert_allclose(several, wanted, rtol=0, atol=2e-5)
    attention = encode.run(pixels, "attention", layers=[1])
    np.testing.assert_allclose(attention, base.attentions[1].numpy(), **close)


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_any_number_of_images_in_batches(made, classify, batch_size):
    _, pictures, pixels, _, probabilities = made
    before = classify.compilations
    found = classify.run(pixels, batch_size=batch_size)
    np.testing.assert_allclose(found, probabilities, rtol=0, atol=TOLERANCE)
    assert classify.compilations <= before + 1
    streamed = classify.stream(pictures, top_k=3, batch_size=batch_size)
    assert classify.predictions(found, top_k=3) == [result.predictions for result in streamed]


def test_no_image(classify, encode):
    empty = classify.prepare([])
    assert classify.run(empty).shape == (0, 3)
    assert encode.run(empty).shape == (0, 32)
    assert encode.run(empty, "attention", layers=(0, 1)).shape == (0, 2, 4, 17, 17)
    assert classify.predictions(classify.run(empty)) == []


def test_pixels_of_8_bits_are_normalised_on_the_device(made):
    folder, pictures, _, _, probabilities = made
    classify = ImageClassifier.from_pretrained(folder, normalize_on_device=True)
    pixels = classify.prepare(pictures)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(classify.run(pixels), probabilities, rtol=0, atol=TOLERANCE)
    with pytest.raises(InputError, match=r"of uint8; given float32 of shape \(5, 3, 32, 32\)"):
        classify.run(pixels.astype(np.float32))


def test_images_that_cannot_be_read(made, classify, tmp_path):
    _, pictures, pixels, _, _ = made
    broken, missing = tmp_path / "broken.png", tmp_path / "missing.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    errors = [None]  # is added to
    found = classify.prepare([pictures[0], broken, missing, pictures[1]], errors=errors)
    np.testing.assert_array_equal(found[[0, 3]], pixels[:2])
    assert not found[1:3].any()
    assert [type(error) for error in errors] == [
        *(type(None),) * 2,
        ImageError,
        MissingFileError,
        type(None),
    ]
    assert "broken.png" in str(errors[2])
    with pytest.raises(ImageError, match=r"broken\.png"):
        classify.prepare([pictures[0], broken, missing])


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (np.zeros((2, 32, 32, 3), np.float32), r"= \(B, 3, 32, 32\) of float32; given float32 of"),
        (np.zeros((3, 32, 32), np.float32), r"given float32 of shape \(3, 32, 32\)"),
        (np.zeros((2, 3, 32, 32)), "given float64 of shape"),
        ([1.0], "given list"),
        (b"\x00" * 4000, "given bytes"),
    ],
)
def test_pixels_that_do_not_fit(classify, pixels, said):
    with pytest.raises(InputError, match=said) as caught:
        classify.run(pixels)
    assert len(str(caught.value)) < 300


def test_outputs_that_do_not_fit(made, classify, encode):
    pixels = made[2]
    with pytest.raises(InputError, match="must be 'features' or 'attention' for ImageEncoder"):
        encode.run(pixels, "probabilities")
    with pytest.raises(InputError, match="`output` must be"):
        classify.run(pixels, "logits")
    with pytest.raises(InputError, match="`batch_size` must be a positive integer"):
        classify.run(pixels, batch_size=0)
    with pytest.raises(InputError, match="`pool` must be"):
        encode.run(pixels, pool="max")
    with pytest.raises(InputError, match="`top_k` must be"):
        classify.predictions(np.zeros((1, 3)), top_k=0)


def test_threads_share_one_network(made):
    """Each gets its own images' results, and each size is compiled once."""
    folder, pictures, _, _, probabilities = made
    classify = ImageClassifier.from_pretrained(folder)

    def work(i):
        return classify.run(classify.prepare([pictures[i % 5], pictures[(i + 1) % 5]]))

    with ThreadPoolExecutor(8) as pool:
        for i, found in enumerate(pool.map(work, range(24))):
            wanted = probabilities[[i % 5, (i + 1) % 5]]
            np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
    assert classify.compilations == 1


def test_pixels_are_prepared_without_network_or_device(made, tmp_path):
    """On a machine that has neither: from the two small files, by a pickle, in another process."""
    folder, pictures, pixels, _, _ = made
    prepare = Preparer(
        AutoConfig.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder), workers=2
    )
    np.testing.assert_array_equal(prepare(pictures), pixels)
    pictures[0].save(tmp_path / "a.png")
    (tmp_path / "prepare.pickle").write_bytes(pickle.dumps(prepare))
    code = (
        "import pickle, sys, json, jax, numpy as np\n"
        "prepare = pickle.load(open('prepare.pickle', 'rb'))\n"
        "np.save('pixels.npy', prepare('a.png'))\n"
        "print(json.dumps(bool(jax._src.xla_bridge._backends)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) is False
    np.testing.assert_array_equal(np.load(tmp_path / "pixels.npy"), pixels[:1])


def given_as(kind, data, path):
    """The content of an image file in each way that it can be handed over."""
    path.write_bytes(data)
    return {
        "name": lambda: str(path),
        "open file": lambda: open(path, "rb"),  # closed with the test
        "BytesIO": lambda: io.BytesIO(data),
        "bytes": lambda: data,
        "bytearray": lambda: bytearray(data),
        "memoryview": lambda: memoryview(data),
        "PIL image": lambda: PIL.Image.open(io.BytesIO(data)),
    }[kind]()


KINDS = ["open file", "BytesIO", "bytes", "bytearray", "memoryview", "PIL image"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_image_files_however_they_are_given(made, classify, tmp_path, kind):
    """A photo that the camera held sideways, as what a server holds; upright, as by its name."""
    _, pictures, _, _, _ = made
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    pictures[0].transpose(PIL.Image.Transpose.ROTATE_90).save(data, "PNG", exif=exif)
    wanted = classify(pictures[0])
    give = lambda: given_as(kind, data.getvalue(), tmp_path / "a.png")  # noqa: E731
    assert classify(give()) == wanted
    assert classify([give(), give()]) == classify([pictures[0]] * 2)
    assert next(classify.stream([give()])).predictions == wanted
    np.testing.assert_array_equal(classify.features(give()), classify.features(pictures[0]))
    np.testing.assert_array_equal(classify.prepare(give()), classify.prepare(pictures[0]))
    assert classify.seen(give()).size == (32, 32)
    gc.collect()  # what was left open is warned of here, and not in another test


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_errors_never_repeat_an_image(classify, tmp_path, kind):
    data = b"no image at all" * 4000
    for call in (classify, classify.features, classify.prepare, classify.attention, classify.seen):
        with pytest.raises(ImageError) as caught:
            call(given_as(kind, data, tmp_path / "a.png"))
        assert len(str(caught.value)) < 300
        assert "no image at all" not in str(caught.value)
    (result,) = classify.stream([given_as(kind, data, tmp_path / "a.png")])
    assert len(str(result.error)) < 300
    del caught, result
    gc.collect()  # what was left open is warned of here, and not in another test


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_one_image_is_no_stream(classify, kind):
    data = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(data, "PNG")
    given = data.getvalue() if kind == "bytes" else data
    with pytest.raises(InputError, match="must be an iterable of images; given one") as caught:
        classify.stream(given)
    assert len(str(caught.value)) < 200
