"""The engine under `ImageClassifier`: sizes of batches, memory that runs out, readers that fail."""

import subprocess
import sys
import threading
import time

import jax
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from test_inference import dense, picture, reference, save_model, threads

from vit_common.errors import DeviceError, ImageError, InputError
from vit_common.images.pictures import load_image
from vit_common.images.processor import ViTImageProcessor
from vit_flax.inference import ImageClassifier, engine
from vit_flax.inference.reader import Reader

TOLERANCE = 2e-6  # of a probability, float32; the largest difference seen was 2.4e-7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    processor = ViTImageProcessor(size=32, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3])
    return save_model(tmp_path_factory.mktemp("model"), processor)


@pytest.fixture(scope="module")
def images():
    return [picture((30 + i, 40), seed=i) for i in range(11)]


@pytest.fixture(scope="module")
def expected(folder, images):
    return reference(folder, images)


@pytest.fixture
def classify(folder):
    return ImageClassifier.from_pretrained(folder)


def probabilities(results):
    return np.array([dense(result.predictions) for result in results])


def test_steady_state_compiles_nothing(classify, images, expected):
    classify.compile(8)
    sizes = sorted(size for _, size in classify.engine._compiled)
    assert sizes == [1, 2, 4, 8]
    for count in (*range(1, 12), 3, 7):
        found = probabilities(classify.stream(images[:count], batch_size=8))
        np.testing.assert_allclose(found, expected[:count], rtol=0, atol=TOLERANCE)
    assert classify.compilations == 4


def test_a_stream_s_last_batch_takes_what_is_compiled(classify, images):
    list(classify.stream(images[:9], batch_size=8))
    assert classify.compilations == 1
    assert classify.engine.padded == 7
    classify.compile(2)
    list(classify.stream(images[:9], batch_size=8))
    assert classify.engine.padded == 7  # the ninth alone


@pytest.mark.parametrize("batch_size", [5, 6, 7, 8, 11])
def test_a_few_images_at_a_time(folder, images, expected, batch_size, monkeypatch):
    monkeypatch.setattr(engine, "_MICRO_BATCH_NUMBERS", 4 * 17 * 64)
    classify = ImageClassifier.from_pretrained(folder)
    assert 1 < classify.engine._micro_batch < 8
    found = probabilities(classify.stream(images, batch_size=batch_size))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


# -- memory of the device


class Full:
    """A program that the device's memory holds up to some size only."""

    def __init__(self, program, size, most):
        self.program, self.size, self.most = program, size, most

    def __call__(self, *arguments):
        if self.size > self.most:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating bytes.")
        return self.program(*arguments)


def fill(classify, most, monkeypatch):
    compile = engine.Engine.compile
    monkeypatch.setattr(
        engine.Engine, "compile", lambda self, work, n: Full(compile(self, work, n), n, most)
    )


@pytest.mark.parametrize(("most", "said"), [(4, ["8 images", "4"]), (3, ["4 images", "2"])])
def test_what_does_not_fit_is_run_in_halves(classify, images, expected, most, said, monkeypatch):
    fill(classify, most, monkeypatch)
    with pytest.warns(RuntimeWarning, match="out of device memory") as seen:
        found = probabilities(classify.stream(images, batch_size=8))
    assert f"with {said[0]} at once; going on with {said[1]}" in str(seen[-1].message)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    found = probabilities(classify.stream(images, batch_size=8))  # remembered: nothing is said
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def fill_the_compiler(classify, most, monkeypatch):
    """As XLA for TPUs, which tells of memory that will not do when it compiles."""
    compile = engine.Engine.compile

    def full(self, work, n):
        if n > most:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm.")
        return compile(self, work, n)

    monkeypatch.setattr(engine.Engine, "compile", full)


def test_what_the_compiler_finds_too_large_is_run_in_halves(
    classify, images, expected, monkeypatch
):
    fill_the_compiler(classify, 2, monkeypatch)
    with pytest.warns(RuntimeWarning, match="out of device memory") as seen:
        found = probabilities(classify.stream(images, batch_size=8))
    assert [str(w.message).partition("; ")[2] for w in seen] == [
        "going on with 4.",
        "going on with 2.",
    ]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    found = probabilities(classify.stream(images, batch_size=8))  # remembered: nothing is said
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_compiling_all_ends_with_what_the_compiler_finds_too_large(
    classify, images, expected, monkeypatch
):
    fill_the_compiler(classify, 2, monkeypatch)
    with pytest.warns(RuntimeWarning, match="with 4 images at once; going on with 2") as seen:
        classify.compile(8)
    assert len(seen) == 1
    classify.compile(16)  # remembered: nothing is said
    found = probabilities(classify.stream(images, batch_size=8))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert sorted(size for _, size in classify.engine._compiled) == [1, 2]


def test_the_network_alone_where_the_compiler_finds_a_batch_too_large(
    classify, images, expected, monkeypatch
):
    fill_the_compiler(classify, 2, monkeypatch)
    run = classify.runner(4)
    with pytest.warns(RuntimeWarning, match="going on with 2"):
        found = run(np.stack([classify._prepare(image) for image in images[:4]]))
    np.testing.assert_allclose(found, expected[:4], rtol=0, atol=TOLERANCE)


def test_not_even_one_image_fits(classify, images, monkeypatch):
    fill(classify, 0, monkeypatch)
    with (
        pytest.warns(RuntimeWarning, match="out of device memory"),
        pytest.raises(DeviceError, match="does not hold one image of 32 x 32 pixels"),
    ):
        list(classify.stream(images, batch_size=2))


def test_other_faults_of_the_device_are_not_hidden(classify, images, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device fell off the bus")

    monkeypatch.setattr(engine.Engine, "compile", lambda *_: fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="fell off the bus"):
        list(classify.stream(images, batch_size=2))


# -- the host


def test_normalised_on_the_device(folder, images, expected):
    classify = ImageClassifier.from_pretrained(folder, normalize_on_device=True)
    assert classify.engine.dtype == np.uint8
    found = probabilities(classify.stream(images, batch_size=4))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    classify.image_processor.do_resize = False
    with pytest.raises(ImageError, match="takes images of 8 bits; this one has values of float"):
        classify(np.random.default_rng(0).random((32, 32, 3)))


def test_fast_decoding_of_jpegs(folder, tmp_path):
    big = picture((640, 960), seed=3)
    big.save(tmp_path / "big.jpg", quality=95)
    assert load_image(tmp_path / "big.jpg", at_least=(64, 64)).size == (120, 80)
    assert load_image(tmp_path / "big.jpg", at_least=(100, 400)).size == (960, 640)
    big.save(tmp_path / "big.png")
    assert load_image(tmp_path / "big.png", at_least=(64, 64)).size == (960, 640)
    exact = ImageClassifier.from_pretrained(folder)
    fast = ImageClassifier.from_pretrained(folder, fast_decode=True)
    path = tmp_path / "big.jpg"
    difference = np.abs(dense(exact(path)) - dense(fast(path))).max()
    assert 0 < difference < 0.01  # of a smooth picture; 0.0013 was seen


def test_workers(folder, images, expected):
    seen = set()

    def slow():
        yield from images

    classify = ImageClassifier.from_pretrained(folder, workers=4)
    prepare = classify._prepare

    def watched(source):
        seen.add(threading.current_thread().name)
        time.sleep(0.01)
        return prepare(source)

    classify._prepare = watched
    found = probabilities(classify.stream(slow(), batch_size=8))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert len(seen) == 4
    with pytest.raises(InputError, match="`workers` must be a positive integer; given 0"):
        ImageClassifier.from_pretrained(folder, workers=0)


@pytest.mark.parametrize("at", [0, 4, 6, 7])  # in batches of four
def test_a_reader_that_dies(classify, images, at):
    """What is no image's own fault ends the stream, after what came before it."""
    prepare = classify._prepare

    def dying(source):
        if source is images[at]:
            raise RuntimeError("the decoder died")
        return prepare(source)

    classify._prepare = dying
    done = []
    with pytest.raises(RuntimeError, match="the decoder died"):
        done.extend(classify.stream(images, batch_size=4))
    assert [result.source for result in done] == images[:at]
    assert all(len(result.predictions) == 5 for result in done)
    assert threads() == []


def test_a_fault_while_a_batch_is_set_off_comes_after_earlier_results(
    classify, images, monkeypatch
):
    start = engine.Engine.start

    def full(self, work, pixel_values, size):
        if len(pixel_values) == 3:
            raise MemoryError
        return start(self, work, pixel_values, size)

    monkeypatch.setattr(engine.Engine, "start", full)
    done = []
    with pytest.raises(MemoryError):
        done.extend(classify.stream(images, batch_size=4))
    assert [result.source for result in done] == images[:8]


def test_a_batch_that_the_host_s_memory_does_not_hold():
    """It is heard of: nobody waits for a thread that is gone."""
    shape = (1 << 20, 1 << 20, 1 << 10)  # beyond what a processor can address
    reader = Reader(iter(range(3)), 2, np.zeros, shape, np.float32, 1)
    reader._feeder.join(timeout=60)
    assert reader.ready()
    said = r"a batch of 2 images of 1048576 x 1048576 x 1024 needs 9007199\.3 GB.*smaller batch"
    with pytest.raises(InputError, match=said):
        reader.next()
    reader.close()


def test_results_do_not_wait_for_images_that_come_slowly(classify, images):
    go_on = threading.Event()

    def slow():
        yield from images[:2]
        assert go_on.wait(timeout=60)
        yield images[2]

    results = classify.stream(slow(), batch_size=2)
    assert [next(results).source for _ in range(2)] == images[:2]
    go_on.set()
    assert len(list(results)) == 1


def test_timings(classify, images):
    start = time.perf_counter()
    for _ in classify.stream(images, batch_size=4):
        time.sleep(0.01)
    total = time.perf_counter() - start
    seen = classify.timings
    assert seen.images == 11
    assert 0.11 <= seen.caller < total
    assert seen.total + seen.caller == pytest.approx(total, rel=0.05)
    parts = seen.compiling + seen.waiting_for_images + seen.waiting_for_device
    assert 0 < parts <= seen.total
    assert seen.decoding > 0


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_images_of_odd_shapes(folder, classify, tmp_path, size):
    image = picture(size[::-1], seed=1)
    image.save(tmp_path / "odd.png")
    pixels = np.asarray(image.resize((32, 32), PIL.Image.Resampling.BILINEAR), np.float32)
    pixels = (pixels / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]  # Transformers stumbles over 1 x 1
    model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)).logits
    expected = torch.softmax(logits, dim=-1)[0].numpy()
    np.testing.assert_allclose(dense(classify(tmp_path / "odd.png")), expected, atol=TOLERANCE)


@pytest.mark.slow
def test_an_image_of_400_million_pixels(classify, tmp_path, monkeypatch):
    """Refused as Pillow does, and read where its limit is raised."""
    path = tmp_path / "huge.png"
    PIL.Image.new("1", (20_000, 20_000)).save(path)
    (result,) = classify.stream([path])
    with pytest.raises(ImageError, match="too large"):
        result.value  # noqa: B018
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    black = PIL.Image.new("RGB", (32, 32))
    expected = dense(classify(black))
    np.testing.assert_allclose(dense(classify(path)), expected, atol=TOLERANCE)


STREAM = """
import resource, sys
import numpy as np
from vit_flax.inference import ImageClassifier
classify = ImageClassifier.from_pretrained(sys.argv[1])
image = np.zeros((256, 256, 3), np.uint8)
def peak(count):
    images = (image + 0 for _ in range(count))
    assert sum(1 for _ in classify.stream(images, batch_size=32)) == count
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(peak(500), peak(int(sys.argv[2])))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_stream(folder):
    """Images of 192 KB each: 5,000 of them are 960 MB."""
    out = subprocess.run(
        [sys.executable, "-c", STREAM, str(folder), "5000"], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    first, last = map(float, out.stdout.split())
    assert last - first < 60  # MB; 4 were seen


@pytest.mark.slow
def test_a_broken_file_among_many(classify, tmp_path):
    """One of 10,000: one error, and every other image once, in order."""
    picture((32, 32)).save(tmp_path / "good.png")
    names = [tmp_path / f"{i}.png" for i in range(10_000)]
    for name in names:
        name.symlink_to(tmp_path / "good.png")
    names[6_789].unlink()
    names[6_789].write_bytes(b"\x89PNG\r\n\x1a\n broken")
    results = list(classify.stream(names, batch_size=256))
    assert [result.source for result in results] == names
    assert [i for i, result in enumerate(results) if result.error] == [6_789]
