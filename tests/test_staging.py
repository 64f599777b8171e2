"""What killed processes leave beside a target is deleted by the next run on it; nothing else is."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vit_common.files import staging
from vit_common.files.checkpoint import save_checkpoint, write_checkpoint
from vit_common.files.replace import staged
from vit_common.files.staging import delete_leftovers, stage

pytestmark = pytest.mark.skipif(staging.fcntl is None, reason="no locks")

# Writes again and again until it is killed; says so when it begins, and then each time.
WRITER = """
import sys, time
import numpy as np
from pathlib import Path
from vit_common.files.checkpoint import save_checkpoint, write_checkpoint

class Slow:
    shape, dtype = (100,), np.dtype("float32")
    def read(self):
        time.sleep(0.002)
        return np.zeros(100, "f4")

what, target, times = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
for _ in range(times):
    tensors = {f"w{i}": Slow() for i in range(6)}
    if what == "file":
        write_checkpoint(target / "x.safetensors", tensors)
    else:
        save_checkpoint(target, tensors, max_shard_size=900, beside={"config.json": "{}"})
    print("written", flush=True)
"""


def start(what: str, target: Path, times: int = 1000) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, what, str(target), str(times)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*"))


def write(what: str, target: Path) -> None:
    tensors = {"w": np.ones(3, np.float32), "v": np.ones(300, np.float32)}
    if what == "file":
        write_checkpoint(target / "x.safetensors", tensors)
    else:
        save_checkpoint(target, tensors, max_shard_size=900, beside={"config.json": "{}"})


@pytest.mark.parametrize("what", ["file", "folder"])
def test_after_kills_at_any_moment_the_next_run_leaves_nothing(tmp_path, what):
    rng = random.Random(0)
    target = tmp_path / "out"
    left = 0
    for _ in range(4):
        with start(what, target) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(rng.random() * 0.03)
            child.kill()
        assert child.returncode == -signal.SIGKILL
        left += bool(hidden(tmp_path))
    assert left
    write(what, target)
    assert hidden(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_whose_lock_comes_just_now_is_no_leftover(tmp_path, monkeypatch):
    """Its process makes the lock between the looks of another for it and at what is there."""
    folder = tmp_path / ".x.abcdefgh.tmp"
    folder.mkdir()
    listdir = os.listdir

    def late(path):
        if path == folder:
            (folder / staging.LOCK).touch()
        return listdir(path)

    monkeypatch.setattr(os, "listdir", late)
    delete_leftovers(tmp_path, ["x"])
    assert (folder / staging.LOCK).exists()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_second_living_writer_is_not_disturbed(tmp_path, what):
    target = tmp_path / "out"
    end = time.monotonic() + 60
    with start(what, target, times=8) as child:
        while child.poll() is None and time.monotonic() < end:
            write(what, target)
        said, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert said.count("written") == 8
    write(what, target)
    assert hidden(tmp_path) == []


def test_a_folder_that_is_held_stays_and_so_does_what_is_not_ours(tmp_path):
    kept = [".x.safetensors.swp", ".x.safetensors.abc.tmp", "x.safetensors.0123abcd.tmp"]
    kept += [".y.safetensors.0123abcd.tmp", ".x.safetensors.0123ABCD.tmp", ".x.safetensors"]
    for name in kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    (tmp_path / ".x.safetensors.0123abcd.tmp").write_text("a file of another program")
    with stage(tmp_path, "x.safetensors") as held:
        (held / "mine").write_text("mine")
        write_checkpoint(tmp_path / "x.safetensors", {"a": np.ones(1)})
        with staged(tmp_path / "x.safetensors") as other:
            other.write_text("new")
        assert (held / "mine").read_text() == "mine"
    left = {".x.safetensors.0123abcd.tmp", "x.safetensors", *kept}
    assert {path.name for path in tmp_path.iterdir()} == left
    assert all((tmp_path / name / "mine").exists() for name in kept)


def test_a_folder_that_is_half_deleted_or_just_made_goes(tmp_path):
    for name, files in (("a" * 8, []), ("b" * 8, [staging.LOCK]), ("c" * 8, ["x", "y/z"])):
        folder = tmp_path / f".x.{name}.tmp"
        folder.mkdir()
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text("")
    delete_leftovers(tmp_path, ["x"])
    assert list(tmp_path.iterdir()) == []


def test_without_locks_nothing_is_deleted(tmp_path, monkeypatch):
    """NFS may have none: whether another host is at it cannot be told."""

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(staging.fcntl, "flock", no_locks)
    left = tmp_path / ".x.npz.0123abcd.tmp"
    left.mkdir()
    (left / staging.LOCK).write_text("")
    (left / "x.npz").write_text("")
    write_checkpoint(tmp_path / "x.npz", {"a": np.ones(1)})
    assert {path.name for path in tmp_path.iterdir()} == {left.name, "x.npz"}
    assert len(os.listdir(left)) == 2


def test_one_that_takes_the_new_folder_for_a_leftover_does_no_harm(tmp_path, monkeypatch):
    """Between the making of a folder and its lock another run can come by."""
    make, made = staging.tempfile.mkdtemp, []

    def come_by(**options):
        made.append(make(**options))
        if len(made) < 3:
            delete_leftovers(tmp_path, ["x"])
        return made[-1]

    monkeypatch.setattr(staging.tempfile, "mkdtemp", come_by)
    with stage(tmp_path, "x") as folder:
        assert str(folder) == made[2]
    assert list(tmp_path.iterdir()) == []
