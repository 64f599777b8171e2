"""A few seconds of `tests/fuzz.py`, always the same inputs; `make fuzz SECONDS=60` makes others."""

from __future__ import annotations

import io
import tracemalloc

import fuzz
import numpy as np
import PIL.Image
import pytest

from vit_common.errors import CheckpointError
from vit_common.files import checkpoint
from vit_common.images.pictures import convert_mode, load_image

# The whole file and bent ones of it; readers that start slowly get fewer.
INPUTS = dict.fromkeys(fuzz.READERS, 60) | {"exported": 15}


@pytest.mark.parametrize("name", fuzz.READERS)
def test_bent_files_load_or_are_refused(tmp_path, capsys, name):
    failed = fuzz.fuzz([fuzz.READERS[name]], seed=12, inputs=INPUTS[name], keep=tmp_path)
    printed = capsys.readouterr().out
    assert not failed, printed
    assert f"{INPUTS[name]} inputs of seed 12" in printed


@pytest.mark.parametrize("fault", [ValueError("planted"), MemoryError(), RecursionError()])
def test_any_other_error_is_told_and_its_input_is_kept(tmp_path, capsys, monkeypatch, fault):
    def read(file):
        if file.size != len(whole["model.npz"]):
            raise fault
        return original(file)

    original = checkpoint.numpy_zip.read
    reader = fuzz.READERS["npz"]
    whole = fuzz.make_input(reader, 3, 0)
    monkeypatch.setattr(checkpoint.numpy_zip, "read", read)
    arguments = ["--readers", "npz", "--seed", "3", "--inputs", "12", "--keep", str(tmp_path)]
    assert fuzz.main(arguments) == 1
    printed = capsys.readouterr().out
    assert f"npz: FAILED: {type(fault).__name__} at checkpoint.py" in printed
    assert "again: python tests/fuzz.py --readers npz --seed 3 --first" in printed
    (kept, *_) = sorted(tmp_path.iterdir())
    number = int(kept.name.rpartition("-")[2])
    assert (kept / "model.npz").read_bytes() == fuzz.make_input(reader, 3, number)["model.npz"]


def test_time_memory_and_long_errors_are_faults(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.3)
    monkeypatch.setattr(fuzz, "MEMORY", 50 << 20)

    def outcome(read) -> str:
        return fuzz.try_input(fuzz.Reader("a", list, fuzz.bend_bytes, read), {"a": b""}, tmp_path)

    def forever(folder):
        while True:
            pass

    def long(folder):
        raise CheckpointError("x" * 5000)

    assert outcome(forever) == "FAILED: more than 0.3 s"
    assert outcome(lambda folder: bytes(2 << 30)).startswith("FAILED: MemoryError")
    assert outcome(long) == "FAILED: an error of 5000 characters"
    assert outcome(lambda folder: None) == "loads"
    assert list(tmp_path.iterdir()) == []


def test_an_image_is_not_given_the_memory_that_a_chunk_states(tmp_path):
    """A PNG of 100 bytes whose pixels are said to take 4 GB of the file."""
    stream = io.BytesIO()
    PIL.Image.new("LA", (9, 12)).save(stream, "png")
    data = stream.getvalue()
    at = data.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(data[:at] + (2**32 - 4096).to_bytes(4, "big") + data[at + 4 :])
    with fuzz.bounded():
        assert load_image(tmp_path / "a.png").size == (9, 12)


def test_deep_images_take_little_more_memory_than_they_are_large(tmp_path):
    """As 8 bits, 16-bit and float images were computed in several arrays of 32 and 64 bits."""
    count = 12_000_000
    for values in (np.full((3000, 4000), 500, np.uint16), np.full((3000, 4000), 0.5, np.float32)):
        image = PIL.Image.fromarray(values)
        tracemalloc.start()
        try:
            plain = convert_mode(image, 1)
            taken = tracemalloc.get_traced_memory()[1]
            assert taken < 2 * (values.nbytes + count)
        finally:
            tracemalloc.stop()
        wanted = round(500 / 257) if values.dtype == np.uint16 else round(0.5 * 255)
        assert np.asarray(plain).max() == np.asarray(plain).min() == wanted
