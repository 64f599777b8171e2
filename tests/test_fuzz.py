"""A few seconds of `tests/fuzz.py`, always the same inputs; `make fuzz SECONDS=60` makes others."""

from __future__ import annotations

import fuzz
import pytest

from vit_common.errors import CheckpointError
from vit_common.files import checkpoint

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
