"""A folder that is replaced has its old files or its new ones, whenever the process is killed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vit_common.files import folders
from vit_common.files.checkpoint import save_checkpoint
from vit_common.files.folders import change_folder, exchange

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith(("linux", "darwin")), reason="no step that exchanges two folders"
)


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def texts(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_two_folders_exchange_their_names(tmp_path):
    a, b = fill(tmp_path / "a", {"x": "1"}), fill(tmp_path / "b ü", {"y": "2"})
    exchange(a, b)
    assert (texts(a), texts(b)) == ({"y": "2"}, {"x": "1"})
    with pytest.raises(FileNotFoundError):
        exchange(a, tmp_path / "c")
    assert texts(a) == {"y": "2"}


def test_what_else_is_in_the_folder_stays_as_it_is(tmp_path):
    old = {"a": "old", "stale": "old", "notes.md": "mine", "runs/1/log": "log", "empty/x/y": ""}
    out = fill(tmp_path / "out", old)
    (out / "link").symlink_to("notes.md")
    (out / "gone").symlink_to("nowhere")
    (out / "runs").chmod(0o750)
    out.chmod(0o2770)
    files = fill(tmp_path / "new", {"1": "new a", "2": "new b"})
    inode, before = out.stat().st_ino, (out / "runs/1/log").stat()

    with (out / "runs/1/log").open("a") as running:  # a process that goes on writing
        assert change_folder(out, [(files / "1", "a"), (files / "2", "b")], ["stale"])
        running.write(" goes on")

    wanted = {"a": "new a", "b": "new b", "notes.md": "mine", "runs/1/log": "log goes on"}
    assert texts(out) == wanted | {"empty/x/y": "", "link": "mine"}
    assert os.readlink(out / "link") == "notes.md"
    assert os.readlink(out / "gone") == "nowhere"
    assert (out / "runs/1/log").stat().st_ino == before.st_ino
    assert (out / "runs").stat().st_mode & 0o7777 == 0o750
    assert out.stat().st_mode & 0o7777 == 0o2770
    assert out.stat().st_ino != inode
    assert {path.name for path in tmp_path.iterdir()} == {"out", "new"}
    assert texts(files) == {"1": "new a", "2": "new b"}


def test_what_comes_meanwhile_is_kept(tmp_path, monkeypatch):
    out = fill(tmp_path / "out", {"a": "old", "log": "1", "runs/log": "1"})
    new = fill(tmp_path / "new", {"a": "new"})

    def late(a, b):
        fill(out, {"late": "2", "runs/late": "2", "later/late": "2"})
        for name in ("log", "runs/log"):
            (out / f"{name}.tmp").write_text("2")
            os.replace(out / f"{name}.tmp", out / name)
        exchange(a, b)

    monkeypatch.setattr(folders, "exchange", late)
    assert change_folder(out, [(new / "a", "a")], [])
    wanted = {"a": "new", "log": "2", "runs/log": "2"}
    assert texts(out) == wanted | {"late": "2", "runs/late": "2", "later/late": "2"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "new"}


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    out = fill(tmp_path / "deep" / "out", {"a": "old"})
    new = fill(tmp_path / "new", {"a": "new"})
    (tmp_path / "link").symlink_to(out)
    assert change_folder(tmp_path / "link", [(new / "a", "a")], [])
    assert (tmp_path / "link").is_symlink()
    assert texts(out) == {"a": "new"}


@pytest.mark.parametrize("why", ["no exchange", "no links", "worked in", "worked in below"])
def test_where_it_cannot_be_done_nothing_is(tmp_path, monkeypatch, request, why):
    out = fill(tmp_path / "out", {"a": "old", "below/b": "x"})
    new = fill(tmp_path / "new", {"a": "new"})
    if why == "no exchange":
        request.getfixturevalue("no_exchange")
    elif why == "no links":
        monkeypatch.delattr(os, "link")
    else:
        monkeypatch.chdir(out / "below" if "below" in why else out)
    inode = out.stat().st_ino
    assert not change_folder(out, [(new / "a", "a")], ["below"])
    assert texts(out) == {"a": "old", "below/b": "x"}
    assert out.stat().st_ino == inode
    assert {path.name for path in tmp_path.iterdir()} == {"out", "new"}


@pytest.mark.parametrize("why", ["no exchange", "worked in"])
def test_a_save_is_done_otherwise_then(tmp_path, monkeypatch, request, why):
    if why == "no exchange":
        request.getfixturevalue("no_exchange")
    else:
        monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("mine")
    inode = tmp_path.stat().st_ino
    for count in (5, 1):
        tensors = {f"w{i}": np.full(100, i, np.float32) for i in range(count)}
        save_checkpoint(tmp_path, tensors, max_shard_size=800, beside={"config.json": "{}"})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"notes", "config.json", "model.safetensors"}
    assert tmp_path.stat().st_ino == inode


# Runs `act` again and again, and kills it at its first, second, ... step that changes a folder or
# waits for the disk; prints what was left each time.
KILLED = """
import hashlib, json, os, shutil, signal, sys
from pathlib import Path
import numpy as np
from vit_convert import convert
from vit_convert.save import save_parameters
from vit_common.files import folders
from vit_common.config import ViTConfig
from vit_common.parameters import parameter_shapes

what, place = sys.argv[1], Path(sys.argv[2])
EVENTS = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "os.chmod"}

def network(seed, layers):
    config = ViTConfig(hidden_size=8, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=16, image_size=16, patch_size=8, num_labels=3, hidden_act="relu")
    rng = np.random.default_rng(seed)
    shapes = parameter_shapes(config, "classifier")
    return config, {name: rng.standard_normal(s).astype("f4") for name, s in shapes.items()}

class Array:
    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
    def read(self):
        return self.array

def save(folder, seed, layers, **options):
    config, arrays = network(seed, layers)
    save_parameters(folder, config, {n: Array(a) for n, a in arrays.items()},
        architecture="ViTForImageClassification", **options)

def act():
    if what == "convert":
        convert(place / "source", place / "out", to="flax-safetensors", dtype="float16",
            force=True, verify=False, max_shard_size=2000)
    elif what == "convert, new":
        convert(place / "source", place / "out" / "deep", verify=False)
    else:
        save(place / "out", 2, 2, to="flax", max_shard_size=2000)

def hashes(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)}

def fresh():
    shutil.rmtree(place, ignore_errors=True)
    if what != "convert, new":
        save(place / "out", 1, 1)
        (place / "out" / "notes.md").write_text("mine")
        (place / "out" / "runs").mkdir()
        (place / "out" / "runs" / "log").write_text("mine")
    save(place / "source", 2, 2)

def die_at(step):
    count = 0
    def passed(*args):
        nonlocal count
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
    sys.addaudithook(lambda event, args: passed() if event in EVENTS else None)
    for module, name in ((os, "fsync"), (folders, "exchange")):
        original = getattr(module, name)
        setattr(module, name, lambda *a, original=original: (passed(), original(*a))[1])

fresh()
old = hashes(place / "out")
act()
new = hashes(place / "out")
found, status, step = [], None, -1
while status != 0:
    step += 1
    fresh()
    child = os.fork()
    if child == 0:
        die_at(step)
        act()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    left = hashes(place / "out")
    found.append("old" if left == old else "new" if left == new else sorted(left))
print(json.dumps({"old": old, "new": new, "found": found}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["convert", pytest.param("convert, new", marks=pytest.mark.slow), "save"]
)
def test_killed_at_any_step_a_folder_is_old_or_new(tmp_path, what):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, what, str(tmp_path / "place")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    found = report["found"]
    assert {str(state) for state in found} == {"old", "new"}
    # Once new, it stays new; and there were many steps of both kinds.
    assert found == sorted(found, reverse=True)
    assert found.count("old") > 10
    assert found.count("new") > 3
    if what != "convert, new":
        mine = {"notes.md", "runs/log"}
        assert mine <= report["old"].keys()
        assert all(report["new"][name] == report["old"][name] for name in mine)
        assert report["old"]["notes.md"] == hashlib.sha256(b"mine").hexdigest()
        assert "model.safetensors" in report["old"].keys() - report["new"].keys()
        assert len(report["new"]) > 6  # several shards
