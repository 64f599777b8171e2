"""Batches: the same for any number of threads and processes, every image counted once, and none
that cannot be read ends a run."""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from pictures import photo, pixels

from vit_common.augment import Augment, draws
from vit_common.datasets import ImageFolder, LabelledImages, as_images, epoch_order
from vit_common.errors import ImageError, InputError
from vit_common.images.pictures import load_image
from vit_common.recipes import recipe
from vit_flax.training.loader import Loader, evaluation_batches

TRASHNET = Path(__file__).resolve().parents[2] / "shared" / "data" / "trashnet_small"


def images(n, seed=0, classes=3):
    """So many pictures of as many sizes."""
    rng = np.random.default_rng(seed)
    sources = [pixels(i, *rng.integers(6, 20, 2), 3) for i in range(n)]
    return LabelledImages(sources, np.arange(n) % classes, classes=tuple("abcdef"[:classes]))


def augment(size=8, **settings):
    return Augment(recipe().replace(**settings), size)


def all_of(loader, *epochs):
    return [batch for epoch in epochs for batch in loader.batches(epoch)]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_batches_hold_what_the_order_and_the_draws_say():
    """Each row is the image at its place of the order, augmented by its own draws."""
    data, transform = images(23), augment(auto_augment="rand-m9-mstd0.5-inc1")
    loader = Loader(data, 5, transform, seed=3)
    assert loader.steps_per_epoch == 23 // 5
    batches = all_of(loader, 2)
    order = epoch_order(23, 3, 2)
    assert len(batches) == 4
    np.testing.assert_array_equal(np.concatenate([b["index"] for b in batches]), order[:20])
    for batch in batches:
        assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
            "pixel_values": ((5, 8, 8, 3), "uint8"),
            "labels": ((5,), "int32"),
            "weights": ((5,), "float32"),
            "index": ((5,), "int32"),
        }
        assert batch["weights"].tolist() == [1] * 5
        np.testing.assert_array_equal(batch["labels"], batch["index"] % 3)
        for row, i in zip(batch["pixel_values"], batch["index"].tolist(), strict=True):
            wanted = transform(PIL.Image.fromarray(data.image(i)), draws(3, 2, i))
            np.testing.assert_array_equal(row, np.asarray(wanted))


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("options", [{}, {"repeats": 3}, {"sampling": "balanced"}])
def test_threads_and_processes_change_nothing(workers, options):
    """Nor does it matter where a run begins; the parts of all processes are the whole batch."""
    data = images(26)
    whole = all_of(Loader(data, 8, augment(), workers=2, **options), 0, 1)
    alone = Loader(data, 8, augment(), workers=workers, **options)
    assert_same(all_of(alone, 0, 1), whole)
    assert_same(list(alone.batches(1, start=2)), whole[3 + 2 :])
    assert list(alone.batches(1, start=3)) == []
    for count in (2, 4):
        parts = [
            all_of(
                Loader(
                    data,
                    8,
                    augment(),
                    workers=workers,
                    process_index=i,
                    process_count=count,
                    **options,
                ),
                0,
                1,
            )
            for i in range(count)
        ]
        joined = [
            {name: np.concatenate([part[name] for part in step]) for name in step[0]}
            for step in zip(*parts, strict=True)
        ]
        assert_same(joined, whole)


def test_repeats_have_draws_of_their_own():
    """The same image three times in a batch, each time augmented otherwise."""
    batch = next(Loader(images(12), 6, augment(crop_scale=(0.1, 1.0)), repeats=3).batches(0))
    order = epoch_order(12, 0, 0)
    assert batch["index"].tolist() == [order[0]] * 3 + [order[1]] * 3
    assert len({row.tobytes() for row in batch["pixel_values"]}) == 6
    for repeat in range(3):
        i = int(order[1])
        image = PIL.Image.fromarray(images(12).image(i))
        wanted = augment(crop_scale=(0.1, 1.0))(image, draws(0, 0, i, repeat))
        np.testing.assert_array_equal(batch["pixel_values"][3 + repeat], np.asarray(wanted))


def test_the_rest_of_an_epoch():
    """Left out, other images in each epoch; or in a batch that is filled up and counts in part."""
    data = images(11)
    assert Loader(data, 4, augment()).steps_per_epoch == 2
    loader = Loader(data, 4, augment(), drop_last=False)
    assert loader.steps_per_epoch == 3
    batches = all_of(loader, 0)
    assert batches[-1]["weights"].tolist() == [1, 1, 1, 0]
    assert batches[-1]["index"].tolist() == [*epoch_order(11, 0, 0)[8:], -1]
    # What fills up is a real image, so that mixing it with others means something.
    np.testing.assert_array_equal(batches[-1]["pixel_values"][3], batches[0]["pixel_values"][0])
    assert batches[-1]["labels"][3] == batches[0]["labels"][0]


def test_fewer_images_than_a_batch():
    """One batch of the size that was asked for, in which each image counts once."""
    loader = Loader(images(3), 8, augment())
    assert loader.steps_per_epoch == 1
    (batch,) = all_of(loader, 0)
    assert batch["pixel_values"].shape == (8, 8, 8, 3)
    assert sorted(batch["index"][batch["weights"] > 0].tolist()) == [0, 1, 2]
    assert batch["weights"].sum() == 3


@pytest.mark.parametrize(
    ("labels", "options", "dtype"),
    [
        ([[0, 1], [1, 1], [0, 0]], {"problem_type": "multi_label_classification"}, "float32"),
        ([0.5, 2, 3], {"problem_type": "regression"}, "float32"),
        ([0, 1, 0], {"classes": "ab"}, "int32"),
    ],
)
def test_labels_of_each_kind(labels, options, dtype):
    data = LabelledImages([pixels(i, 9, 9, 3) for i in range(3)], labels, **options)
    batch = next(Loader(data, 3, augment()).batches(0))
    assert batch["labels"].dtype == dtype
    np.testing.assert_array_equal(batch["labels"], np.array(labels, dtype)[batch["index"]])


def test_images_of_every_mode():
    """As the processors take them: 16 bits scaled, CMYK and palettes to RGB, transparency gone."""
    sources = [
        photo(0),
        photo(1).convert("CMYK"),
        photo(2).convert("P"),
        PIL.Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100),
        photo(3).convert("RGBA"),
        photo(4).convert("L"),
    ]
    data = LabelledImages(sources, [0] * 6)
    still = {"crop_scale": None, "flip": 0.0, "interpolation": "bilinear"}
    (batch,) = all_of(Loader(data, 6, augment(16, **still)), 0)
    for row, i in zip(batch["pixel_values"], batch["index"].tolist(), strict=True):
        wanted = load_image(sources[i]).convert("RGB").resize((16, 16), 2)
        np.testing.assert_array_equal(row, np.asarray(wanted))
    grey = Augment(recipe().replace(**still), 16, channels=1)
    (batch,) = all_of(Loader(data, 6, grey), 0)
    assert batch["pixel_values"].shape == (6, 16, 16, 1)
    wanted = load_image(sources[0]).convert("L").resize((16, 16), 2)
    np.testing.assert_array_equal(
        batch["pixel_values"][batch["index"] == 0][0, ..., 0], np.asarray(wanted)
    )


def test_arrays_of_other_channels():
    data = LabelledImages([pixels(i, 9, 9, 5) for i in range(4)], [0, 1, 0, 1])
    (batch,) = all_of(Loader(data, 4, Augment(recipe(), 8, channels=5)), 0)
    assert batch["pixel_values"].shape == (4, 8, 8, 5)
    assert batch["weights"].tolist() == [1] * 4
    data = LabelledImages([pixels(0, 3, 9, 9), pixels(0, 9, 9, 3).astype(float)], [0, 1])
    loader = Loader(data, 2, augment())
    with pytest.raises(ImageError, match="none of the 2 images could be read"):
        all_of(loader, 0)
    said = " ".join(message for _, message in loader.skipped)
    assert "they come last; given shape (3, 9, 9)" in said
    assert "must be uint8" in said


def folder(tmp_path, n=6):
    for i in range(n):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        photo(i).save(path)
    return ImageFolder(tmp_path)


def test_images_that_cannot_be_read_are_skipped(tmp_path):
    """Truncated, empty, removed since the run began: weight 0, named once, and the run goes on."""
    data = folder(tmp_path)
    (tmp_path / "a" / "0.png").write_bytes(b"")
    content = (tmp_path / "b" / "1.png").read_bytes()
    (tmp_path / "b" / "1.png").write_bytes(content[: len(content) // 2])
    os.remove(tmp_path / "a" / "2.png")
    loader = Loader(data, 3, augment())
    batches = all_of(loader, 0, 1, 2)
    assert len(batches) == 6
    bad = {data.names.index(str(tmp_path / name)) for name in ("a/0.png", "b/1.png", "a/2.png")}
    for batch in batches:
        np.testing.assert_array_equal(batch["weights"] == 0, np.isin(batch["index"], list(bad)))
        assert not batch["pixel_values"][batch["weights"] == 0].any()
    assert {name for name, _ in loader.skipped} == {data.names[i] for i in bad}
    assert len(loader.skipped) == 3
    assert all(message.startswith(name) for name, message in loader.skipped)
    strict = Loader(data, 3, augment(), on_error="raise")
    with pytest.raises((ImageError, OSError)):
        all_of(strict, 0)


def test_a_run_whose_images_are_all_gone_ends(tmp_path):
    data = folder(tmp_path)
    for name in data.names:
        os.remove(name)
    loader = Loader(data, 3, augment())
    with pytest.raises(ImageError, match=r"none of the 6 images could be read. The first: .*png"):
        all_of(loader, 0)
    with pytest.raises(ImageError, match="none of the 6 images could be read"):
        list(evaluation_batches(data, 4, lambda source: np.asarray(load_image(source))))


def test_what_is_no_fault_of_an_image_is_raised():
    def broken(image, source):
        raise TypeError("a fault of the program")

    with pytest.raises(TypeError, match="a fault of the program"):
        all_of(Loader(images(4), 2, broken), 0)
    sizes = lambda image, source: np.asarray(image)  # noqa: E731
    with pytest.raises(InputError, match=r"all images of a batch must have one shape; given \("):
        all_of(Loader(images(8), 4, sizes), 0)


def test_leaving_early_stops_the_threads():
    before = threading.active_count()
    for _ in range(3):
        batches = Loader(images(40), 4, augment(), workers=3).batches(0)
        next(batches)
        batches.close()
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_no_more_is_read_than_the_next_batches():
    """However slow the training: three batches at most are in memory."""
    asked = []

    def watched(image, source):
        asked.append(1)
        return image.resize((8, 8))

    batches = Loader(images(60), 4, watched, workers=2).batches(0)
    next(batches)
    time.sleep(0.2)
    assert len(asked) <= 4 * 4
    batches.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be a positive integer; given 0"),
        (
            {"batch_size": 6, "process_count": 4},
            "a batch of 6 images cannot be shared equally",
        ),
        (
            {"process_index": 2, "process_count": 2},
            "`process_index` must be an integer from 0",
        ),
        ({"seed": -1}, "`seed` must be an integer from 0"),
        ({"workers": 0}, "`workers` must be a positive integer"),
        ({"on_error": "stop"}, "`on_error` must be one of skip, raise; given 'stop'"),
        ({"sampling": "even"}, "`sampling` must be one of None, balanced; given 'even'"),
        ({"repeats": 0}, "`repeats` must be a positive integer"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(InputError) as caught:
        Loader(images(8), **{"batch_size": 4, "transform": augment(), **options})
    assert message in str(caught.value)


def test_more_settings_that_cannot_be():
    loader = Loader(images(8), 4, augment())
    with pytest.raises(InputError, match="`start` must be a step from 0 to 2; given 3"):
        list(loader.batches(0, start=3))
    with pytest.raises(InputError, match="`epoch` must be an integer"):
        list(loader.batches(-1))
    numbers = LabelledImages(["a"], [0.5], problem_type="regression")
    with pytest.raises(InputError, match="balanced sampling needs one class per image"):
        Loader(numbers, 1, augment(), sampling="balanced")
    with pytest.raises(InputError, match="a data set of no images"):
        Loader(images(3).select([]), 1, augment())


def test_a_smaller_jpeg_is_decoded_only_if_asked(tmp_path):
    """Pillow's draft mode, and never below twice the pixels of the smallest crop."""
    PIL.Image.fromarray(pixels(0, 400, 600, 3)).save(tmp_path / "a.jpg")
    seen = []

    class Watched(Augment):
        def __call__(self, image, source):
            seen.append(image.size)
            return super().__call__(image, source)

    transform = Watched(recipe().replace(crop_scale=(0.25, 1.0)), 16)
    data = LabelledImages([str(tmp_path / "a.jpg")], [0])
    all_of(Loader(data, 1, transform), 0)
    all_of(Loader(data, 1, transform, fast_decode=True), 0)
    assert seen == [(600, 400), (150, 100)]
    assert min(seen[1]) >= 2 * 16 / math.sqrt(0.25)


# -- evaluation


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (8, 4), (3, 8), (1, 1)])
def test_every_image_is_judged_once(n, batch_size, workers):
    data = images(n)

    def prepare(source):
        resized = PIL.Image.fromarray(source).resize((8, 8))
        return np.asarray(resized, np.float32).transpose(2, 0, 1)

    batches = list(evaluation_batches(data, batch_size, prepare, workers=workers))
    assert len(batches) == math.ceil(n / batch_size)
    assert all(b["pixel_values"].shape == (batch_size, 3, 8, 8) for b in batches)
    index = np.concatenate([b["index"] for b in batches])
    weights = np.concatenate([b["weights"] for b in batches])
    assert index[weights > 0].tolist() == list(range(n))
    assert set(index[weights == 0]) <= {-1}
    found = np.concatenate([b["pixel_values"] for b in batches])[weights > 0]
    np.testing.assert_array_equal(found, np.stack([prepare(data.image(i)) for i in range(n)]))
    if batch_size % 2 == 0:
        parts = [
            list(evaluation_batches(data, batch_size, prepare, process_index=i, process_count=2))
            for i in range(2)
        ]
        joined = [
            {name: np.concatenate([part[name] for part in step]) for name in step[0]}
            for step in zip(*parts, strict=True)
        ]
        assert_same(joined, batches)


def test_evaluation_skips_and_names(tmp_path):
    """Also if the first batch cannot be read, whose shape is then known from a later one."""
    data = folder(tmp_path)
    for name in data.names[:3]:
        Path(name).write_bytes(b"")
    skipped = []

    def prepare(source):
        return np.asarray(load_image(source).resize((8, 8)))

    batches = list(evaluation_batches(data, 2, prepare, skipped=skipped))
    assert [b["weights"].tolist() for b in batches] == [[0, 0], [0, 1], [1, 1]]
    assert [name for name, _ in skipped] == data.names[:3]
    assert [b["index"].tolist() for b in batches] == [[0, 1], [2, 3], [4, 5]]
    first = list(evaluation_batches(data.select(range(4)), 4, prepare, process_count=2))
    assert [b["weights"].tolist() for b in first] == [[0, 0]], "the others have images"
    with pytest.raises(ImageError, match="the file is empty"):
        list(evaluation_batches(data, 2, prepare, on_error="raise"))


# -- grain


def test_a_grain_data_set_is_read_in_our_order():
    """Its items come by index, whatever was done to them; the order is the loader's own."""
    grain = pytest.importorskip("grain")
    pairs = [(pixels(i, 9, 9, 3), i % 3) for i in range(10)]
    source = grain.MapDataset.source(pairs).map(lambda pair: (255 - pair[0], pair[1]))
    batches = all_of(Loader(as_images(source), 5, augment()), 0)
    plain = LabelledImages([255 - image for image, _ in pairs], [label for _, label in pairs])
    assert_same(batches, all_of(Loader(plain, 5, augment()), 0))


@pytest.mark.skipif(not TRASHNET.is_dir(), reason="needs the photographs in shared/data")
def test_real_photographs():
    """Counts as its ORIGIN.md states them, and two batches."""
    from vit_common.datasets import open_images

    parts = open_images(TRASHNET)
    assert {part: len(data) for part, data in parts.items()} == {
        "train": 591,
        "val": 102,
        "test": 329,
    }
    assert parts["test"].classes == ("cardboard", "glass", "metal", "paper", "plastic", "trash")
    batches = Loader(parts["train"], 4, augment(32)).batches(0)
    first, second = next(batches), next(batches)
    batches.close()
    assert first["weights"].all()
    assert second["pixel_values"].std() > 10
