"""`ImageClassifier` against Transformers' model and processor, and its faults and its laziness."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from networks import flax_twin, make_config, random_weights

from vit_common.errors import CheckpointError, ConfigError, ImageError, InputError, MissingFileError
from vit_common.images.processor import ViTImageProcessor
from vit_flax import FlaxViTForImageClassification, FlaxViTModel
from vit_flax.inference import ImageClassifier, reader

LABELS = ["cat", "dog", "a tree, and more", "Zürich", "写真"]
TOLERANCE = 2e-6  # of a probability, float32; the largest difference seen was 2.4e-7


def save_model(folder, processor=None, head=True, **fields):
    """A model of random weights on disk, sharp enough to have opinions."""
    config = make_config(**{"id2label": dict(enumerate(LABELS)), "num_hidden_layers": 1, **fields})
    weights = random_weights(config, "classifier" if head else None)
    cls = FlaxViTForImageClassification if head else FlaxViTModel
    flax_twin(cls, config, weights).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    processor = ViTImageProcessor(size=32, resample=3, image_mean=[0.4, 0.5, 0.6])
    return save_model(tmp_path_factory.mktemp("model"), processor)


@pytest.fixture(scope="module")
def classify(folder):
    return ImageClassifier.from_pretrained(folder)


def picture(size=(50, 70), channels=3, seed=0):
    """A smooth random picture, as pixels (H, W, C) or (H, W)."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 5, channels), np.uint8)
    image = PIL.Image.fromarray(small if channels > 1 else small[:, :, 0])
    return image.resize(size[::-1], PIL.Image.Resampling.BICUBIC)


@pytest.fixture
def paths(tmp_path):
    out = []
    for i in range(7):
        path = tmp_path / f"{i}.png"
        picture((30 + 9 * i, 40), seed=i).save(path)
        out.append(path)
    return out


def reference(folder, images):
    """Probabilities (B, K) by Transformers' torch model and processor."""
    model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    processor = transformers.ViTImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**processor(images, return_tensors="pt")).logits
    return torch.softmax(logits, dim=-1).numpy()


def dense(predictions):
    """Probabilities in the order of the classes."""
    return np.array([p.probability for p in sorted(predictions, key=lambda p: p.index)])


# -- numbers


def test_matches_transformers(folder, classify, paths):
    images = [PIL.Image.open(path) for path in paths]
    expected = reference(folder, images)
    results = classify(paths)
    np.testing.assert_allclose([dense(r) for r in results], expected, rtol=0, atol=TOLERANCE)
    for predictions, row in zip(results, expected, strict=True):
        assert [p.index for p in predictions] == list(np.argsort(-row))
        assert [p.label for p in predictions] == [LABELS[p.index] for p in predictions]


def test_inputs_of_every_kind(folder, classify, paths):
    image = PIL.Image.open(paths[0]).convert("RGB")
    pixels = np.asarray(image)
    expected = reference(folder, [image])[0]
    for given in (str(paths[0]), paths[0], image, pixels, pixels.transpose(2, 0, 1)):
        np.testing.assert_allclose(dense(classify(given)), expected, rtol=0, atol=TOLERANCE)
    for given in ([image], (pixels,), pixels[None]):
        (predictions,) = classify(given)
        np.testing.assert_allclose(dense(predictions), expected, rtol=0, atol=TOLERANCE)
    assert classify([]) == []


def save_kinds(folder):
    """Files of every kind -> the RGB image that a person would see."""
    rgb, grey = picture(), picture(channels=1)
    alpha = rgb.convert("RGBA")
    alpha.putalpha(picture(channels=1, seed=5))
    deep = np.asarray(grey).astype(np.uint16) * 257
    cmyk = rgb.convert("CMYK")
    palette = rgb.convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    kinds = {
        "grey.png": (grey, grey),
        "grey with alpha.png": (grey.convert("LA"), grey),
        "one bit.png": (grey.convert("1"), grey.convert("1").convert("L")),
        "palette.gif": (palette, palette),
        "palette.png": (palette, palette),
        "alpha.png": (alpha, rgb),
        "cmyk.tif": (cmyk, cmyk),
        "sixteen bits.png": (PIL.Image.fromarray(deep), grey),
        "sixteen bits.tif": (PIL.Image.fromarray(deep), grey),
        "plain.bmp": (rgb, rgb),
        "plain.webp": (rgb, rgb),
    }
    seen = {}
    for name, (image, shown) in kinds.items():
        image.save(folder / name, **({"lossless": True} if name.endswith("webp") else {}))
        seen[folder / name] = shown.convert("RGB")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned = rgb.transpose(PIL.Image.Transpose.ROTATE_90)
    turned.save(folder / "turned.png", exif=exif)
    seen[folder / "turned.png"] = rgb
    return seen


@pytest.mark.parametrize("do_convert_rgb", [None, True, False])
def test_files_of_every_kind(folder, classify, tmp_path, monkeypatch, do_convert_rgb):
    seen = save_kinds(tmp_path)
    expected = reference(folder, list(seen.values()))
    monkeypatch.setattr(classify.image_processor, "do_convert_rgb", do_convert_rgb)
    for path, predictions, row in zip(seen, classify(list(seen)), expected, strict=True):
        np.testing.assert_allclose(
            dense(predictions), row, rtol=0, atol=TOLERANCE, err_msg=path.name
        )


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.03), ("float16", 0.004)])
def test_half_precision(folder, paths, dtype, bound):
    # Ten times what was seen: 0.0031 and 0.0004.
    classify = ImageClassifier.from_pretrained(folder, dtype)
    expected = reference(folder, [PIL.Image.open(path) for path in paths])
    found = np.array([dense(predictions) for predictions in classify(paths)])
    assert 1e-6 < np.abs(found - expected).max() < bound
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


def test_classes_that_do_not_exclude_each_other(tmp_path, paths):
    processor = ViTImageProcessor(size=32)
    folder = save_model(tmp_path / "m", processor, problem_type="multi_label_classification")
    model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    processor = transformers.ViTImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**processor(PIL.Image.open(paths[0]), return_tensors="pt")).logits
    found = dense(ImageClassifier.from_pretrained(folder)(paths[0]))
    np.testing.assert_allclose(found, torch.sigmoid(logits)[0].numpy(), rtol=0, atol=TOLERANCE)


def test_grey_model(tmp_path, paths):
    processor = ViTImageProcessor(size=32, image_mean=[0.5], image_std=[0.25])
    folder = save_model(tmp_path / "m", processor, num_channels=1)
    grey = np.asarray(PIL.Image.open(paths[1]).convert("L").resize((32, 32), 2))
    pixels = (grey.astype(np.float32) / 255 - 0.5) / 0.25
    model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor(pixels)[None, None]).logits
    expected = torch.softmax(logits, dim=-1)[0].numpy()
    found = dense(ImageClassifier.from_pretrained(folder)(paths[1]))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


DEIT = Path(__file__).parents[2] / "shared" / "data" / "deit_tiny" / "model.safetensors"


@pytest.mark.skipif(not DEIT.exists(), reason="the real network is not beside the repository")
def test_real_photos(tmp_path):
    skimage = pytest.importorskip("skimage")
    from vit_common.presets import preset
    from vit_convert.formats import table_for

    shutil.copy(DEIT, tmp_path)
    settings = table_for("timm", preset("tiny")).settings
    preset("tiny", num_labels=1000, **settings).save_pretrained(tmp_path)
    ViTImageProcessor(
        size={"shortest_edge": 248},
        resample=3,
        do_center_crop=True,
        crop_size=224,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(tmp_path)
    classify = ImageClassifier.from_pretrained(tmp_path)
    photos = [skimage.data.chelsea(), skimage.data.coffee(), skimage.data.camera()]
    best = [predictions[0] for predictions in classify(photos, top_k=1)]
    # Seen with timm's own model and preprocessing: Egyptian cat, espresso, tripod.
    assert [(p.index, round(p.probability, 2)) for p in best] == [
        (285, 0.44),
        (967, 0.82),
        (872, 0.87),
    ]


# -- streams


@pytest.fixture
def compilations():
    """Names of the compilations since the test began."""
    seen = []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_compiles_once(folder, paths, compilations):
    classify = ImageClassifier.from_pretrained(folder)
    compilations.clear()
    assert len(list(classify.stream(paths, batch_size=3))) == 7  # the last batch holds one
    assert len(compilations) == classify.compilations == 1
    assert len(list(classify.stream(paths[:5], batch_size=3))) == 5
    assert len(compilations) == 1
    classify(paths[0])
    assert len(compilations) == classify.compilations == 2


def test_few_images_share_a_size(classify, paths, compilations):
    classify(paths[:4])
    before = len(compilations)
    for count in (3, 4):
        assert len(classify(paths[:count])) == count
    assert len(compilations) == before


def test_results_come_in_order_whatever_the_batch(classify, paths):
    whole = [result.predictions for result in classify.stream(paths)]
    for batch_size in (3, 100):
        results = list(classify.stream(iter(paths), batch_size=batch_size))
        assert [result.source for result in results] == paths
        for result, predictions in zip(results, whole, strict=True):
            np.testing.assert_allclose(
                dense(result.predictions), dense(predictions), rtol=0, atol=TOLERANCE
            )


def threads():
    """Those of streams that are alive."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("vit-decode", "vit-read"))]


def test_reads_three_batches_ahead_at_most(classify, paths):
    taken = []

    def endless():
        while True:
            taken.append(None)
            yield paths[len(taken) % len(paths)]

    results = classify.stream(endless(), batch_size=2)
    assert taken == []
    for count in range(1, 12):
        next(results)
        time.sleep(0.02)  # for whoever reads to go too far
        assert len(taken) <= count + count % 2 + 3 * 2
    results.close()
    assert threads() == []


def test_closing_leaves_the_images_alone(classify, paths):
    """The next of them is the caller's again."""
    taken = []

    def slow():
        for path in paths * 100:
            taken.append(path)
            yield path
            time.sleep(0.1 if len(taken) > 4 else 0)

    source = slow()
    results = classify.stream(source, batch_size=4)
    next(results)
    before = len(taken)
    results.close()
    assert threads() == []
    count = len(taken)
    assert count <= before + 1
    next(source)
    assert len(taken) == count + 1


def test_closing_does_not_wait_for_ever(classify, paths, monkeypatch):
    monkeypatch.setattr(reader, "_PATIENCE", 0.05)
    go_on = threading.Event()

    def stuck():
        yield from paths[:2]
        assert go_on.wait(timeout=60)

    results = classify.stream(stuck(), batch_size=2)
    next(results)
    results.close()
    assert threads() == ["vit-read"]
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "vit-read":
            thread.join(timeout=60)
    assert threads() == []


LEFT_OPEN = """
import sys
from vit_flax.inference import ImageClassifier
classify = ImageClassifier.from_pretrained(sys.argv[1])
results = classify.stream(sys.argv[2:] * 20, batch_size=2)
print(next(results).source)
"""


@pytest.mark.slow
def test_a_script_that_ends_in_the_middle(folder, paths):
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN, str(folder), *map(str, paths)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{paths[0]}\n", "")


def test_decodes_in_another_thread(classify, paths, monkeypatch):
    seen = set()

    def load_image(path, at_least):
        seen.add(threading.current_thread().name)
        return PIL.Image.open(path)

    monkeypatch.setattr("vit_common.images.predictions.load_image", load_image)
    assert len(list(classify.stream(paths, batch_size=2))) == 7
    assert seen
    assert all(name.startswith("vit-decode") for name in seen)


def test_next_batch_is_decoded_while_results_are_used(classify, paths, monkeypatch):
    decoded = threading.Event()

    def load_image(path, at_least):
        if path == paths[3]:
            decoded.set()
        return PIL.Image.open(path)

    monkeypatch.setattr("vit_common.images.predictions.load_image", load_image)
    results = classify.stream(paths, batch_size=2)
    next(results)
    assert decoded.wait(timeout=30)  # the second image of the second batch
    assert len(list(results)) == 6


def broken_files(folder):
    """Names -> what is said of them."""
    whole = folder / "whole.png"
    picture((90, 90)).save(whole)
    data = whole.read_bytes()
    files = {
        "truncated.png": data[: len(data) // 2],
        "noise.jpg": b"\xff\xd8\xff\xe0" + bytes(200),
        "empty.png": b"",
        "text.png": b"no image at all",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files] + [folder / "missing.png"]


def test_broken_files_do_not_end_a_stream(classify, paths, tmp_path):
    broken = broken_files(tmp_path)
    mixed = [paths[0], *broken[:3], paths[1], *broken[3:], paths[2]]
    results = list(classify.stream(mixed, batch_size=2))
    assert [result.source for result in results] == mixed
    for result in results:
        if result.source not in broken:
            assert result.error is None
            assert len(result.predictions) == 5
            continue
        assert isinstance(result.error, (ImageError, MissingFileError))
        assert str(result.error).startswith(f"{result.source}: ")
        with pytest.raises(type(result.error), match=result.source.name):
            _ = result.predictions
    with pytest.raises(ImageError, match=r"truncated\.png"):
        classify([paths[0], broken[0]])


@pytest.mark.parametrize("name", ["model", "image", "the"])
def test_a_name_that_is_in_the_text_of_the_error(classify, paths, tmp_path, monkeypatch, name):
    """It is named all the same."""
    monkeypatch.chdir(tmp_path)
    paths[0].rename(name)
    monkeypatch.setattr(classify.image_processor, "do_resize", False)
    with pytest.raises(ImageError, match=rf"^{name}: the image processor gives .*; the model take"):
        classify(name)


def test_files_of_a_folder_named_in_bytes(classify, paths):
    paths[1].write_bytes(b"no image")
    with os.scandir(os.fsencode(paths[0].parent)) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    good, bad, *rest = classify.stream(entries)
    assert good.source is entries[0]
    np.testing.assert_allclose(
        dense(good.predictions), dense(classify(paths[0])), rtol=0, atol=TOLERANCE
    )
    with pytest.raises(ImageError, match=f"^{re.escape(str(paths[1]))}: not an image"):
        bad.value  # noqa: B018
    assert [result.error for result in rest] == [None] * 5


def test_decompression_bomb(classify, paths, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 700)
    first, second = classify.stream(paths[:2])
    assert first.error is None  # 1200 pixels: less than twice the limit
    with pytest.raises(ImageError, match=r"1\.png: too large"):
        _ = second.predictions


def test_fault_of_the_source_comes_after_earlier_results(classify, paths):
    def source():
        yield from paths[:3]
        raise RuntimeError("the disk is gone")

    results = classify.stream(source(), batch_size=2)
    assert [next(results).source for _ in range(3)] == paths[:3]
    with pytest.raises(RuntimeError, match="the disk is gone"):
        next(results)


def test_top_k(classify, paths):
    assert len(classify(paths[0])) == 5
    assert len(classify(paths[0], top_k=2)) == 2
    assert len(classify(paths[0], top_k=100)) == 5


def test_integers_of_any_type(classify, paths):
    (result,) = classify.stream(paths[:1], top_k=np.int64(2), batch_size=np.uint8(3))
    expected = classify(paths[0], top_k=2)
    assert [p.index for p in result.predictions] == [p.index for p in expected]


@pytest.mark.parametrize("bad", [0, -1, 1.5, "3", True, np.True_, np.int64(0), None])
def test_bad_numbers(classify, paths, bad):
    with pytest.raises(InputError, match=r"`top_k` must be a positive integer; given"):
        classify.stream(paths, top_k=bad)
    if bad is not None:
        with pytest.raises(InputError, match=r"`batch_size` must be a positive integer; given"):
            classify.stream(paths, batch_size=bad)


def test_one_name_is_no_stream(classify, paths):
    with pytest.raises(InputError, match="must be an iterable of images; given one str"):
        classify.stream(str(paths[0]))


def test_output_that_is_no_number(folder, paths):
    classify = ImageClassifier.from_pretrained(folder)
    params = classify.model.params
    params["classifier"]["bias"] = params["classifier"]["bias"].at[0].set(np.nan)
    (result,) = classify.stream(paths[:1])
    with pytest.raises(ImageError, match=r"0\.png: the model's output is not finite"):
        _ = result.predictions


# -- models that cannot be used


def test_no_preprocessing_file(tmp_path, paths):
    folder = save_model(tmp_path / "m")
    with pytest.warns(UserWarning, match=r"has no preprocessor_config\.json: images are resized "):
        classify = ImageClassifier.from_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    expected = reference(folder, [PIL.Image.open(paths[0])])[0]
    np.testing.assert_allclose(dense(classify(paths[0])), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size=64),
        ViTImageProcessor(size={"shortest_edge": 32}),
        ViTImageProcessor(size=32, image_mean=[0.5], image_std=[0.5]),
    ],
    ids=["size", "shortest edge", "channels"],
)
def test_preprocessing_of_another_model(tmp_path, processor):
    folder = save_model(tmp_path / "m", processor)
    with pytest.raises(ConfigError, match=r"preprocessor_config.json and config.json contradict"):
        ImageClassifier.from_pretrained(folder)


def test_no_classifier(tmp_path):
    folder = save_model(tmp_path / "m", ViTImageProcessor(size=32), head=False)
    with pytest.raises(CheckpointError, match="have no classifier, so predictions would be random"):
        ImageClassifier.from_pretrained(folder)


def test_regression(tmp_path):
    folder = save_model(tmp_path / "m", ViTImageProcessor(size=32), problem_type="regression")
    with pytest.raises(ConfigError, match="`problem_type` is 'regression'"):
        ImageClassifier.from_pretrained(folder)


def test_weights_file_by_name(folder, classify, paths):
    again = ImageClassifier.from_pretrained(folder / "model.safetensors")
    assert again(paths[0]) == classify(paths[0])


def test_nothing_there(tmp_path):
    with pytest.raises(MissingFileError, match="no such file or directory"):
        ImageClassifier.from_pretrained(tmp_path / "nothing")
