"""`vit predict --output`: whole rows whatever happens, and every image exactly once."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest

import vit_cli.runs.partial
import vit_cli.runs.rows
from vit_cli.main import main
from vit_cli.runs.feature_file import FeatureFile
from vit_cli.runs.job import in_shard
from vit_cli.runs.partial import PartialFile
from vit_cli.runs.prediction_file import Journal
from vit_common.embedded import embedded_checkpoint
from vit_common.errors import ExistingFileError, InputError, MissingFileError
from vit_flax.inference import ImageClassifier, Prediction

DIGITS = embedded_checkpoint() / "images"
needs_locks = pytest.mark.skipif(
    vit_cli.runs.partial.fcntl is None, reason="this system has no locks of files"
)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# What the command says that its rows were made with; what is None may be absent.
RUN = {"dtype": "float32", "top_k": 5}


def predictions(label="cat"):
    return (Prediction(label, 0, 0.75), Prediction("dog, or not", 1, 0.25))


@pytest.fixture
def folder(tmp_path):
    """Digits, one of them broken."""
    place = tmp_path / "images"
    place.mkdir()
    for file in sorted(DIGITS.iterdir())[:6]:
        (place / file.name).write_bytes(file.read_bytes())
    (place / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return place


def test_rows_are_those_of_standard_output(folder, tmp_path, capsys):
    assert main(["predict", str(folder), "--json"]) == 1
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    target = tmp_path / "out.jsonl"
    assert main(["predict", str(folder), "--output", str(target)]) == 1
    assert capsys.readouterr().out == ""
    rows = rows_of(target)
    assert [row for row in rows if "error" not in row] == printed
    (failed,) = [row for row in rows if "error" in row]
    assert failed["file"].endswith("broken.png")
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_a_model_that_cannot_be_loaded_leaves_nothing(folder, tmp_path, capsys):
    target = tmp_path / "out.jsonl"
    assert main(["predict", str(folder), "--output", str(target), "--model", "/no/model"]) == 2
    assert not (tmp_path / "out.jsonl.partial").exists()
    capsys.readouterr()


def test_rows_of_another_run_are_not_mixed(tmp_path):
    target = str(tmp_path / "out.jsonl")
    journal = Journal(target, run={"model": "a", "top_k": 5})
    journal.fail("x.png", "broken")
    journal.flush()
    journal.close()
    with pytest.raises(
        InputError, match=r"out\.jsonl\.partial: its rows were made with top_k 5, now 1"
    ):
        Journal(target, resume=True, run={"model": "a", "top_k": 1})
    run = {"model": "a", "top_k": 5, "weights": None}
    with pytest.raises(InputError, match="made with weights not given, now 'int8'"):
        Journal(target, resume=True, run={**run, "weights": "int8"})
    with pytest.raises(InputError, match="made with model 'a', now not given"):
        Journal(target, resume=True, run={"top_k": 5})
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl.partial"]
    again = Journal(target, resume=True, run=run)
    assert again.done == {"x.png"}
    assert again.failed == 1
    again.close()


def test_resume_does_each_image_once(folder, tmp_path, capsys):
    target = tmp_path / "out.jsonl"
    first = sorted(map(str, folder.glob("digit*")))[:3]
    journal = Journal(str(target), run=RUN)
    for name in first:
        journal.write(name, predictions())
    journal.flush()
    journal.close()
    with open(f"{target}.partial", "ab") as stream:
        stream.write(b'{"file": "half a row')  # as a killed process leaves it
    assert main(["predict", str(folder), "--output", str(target)]) == 2
    assert "pass --resume to go on" in capsys.readouterr().err
    assert main(["predict", str(folder), "--output", str(target), "--resume"]) == 1
    assert "3 of 7 images are done already" in capsys.readouterr().err
    files = [row["file"] for row in rows_of(target)]
    assert sorted(files) == sorted(map(str, folder.iterdir()))
    assert rows_of(target)[0]["predictions"][0]["label"] == "cat"  # what was done stays
    assert main(["predict", str(folder), "--output", str(target), "--resume"]) == 2
    assert "already there, and whole" in capsys.readouterr().err


def test_a_finished_run_needs_no_model(folder, tmp_path, capsys):
    target = tmp_path / "out.csv"
    journal = Journal(str(target), run={**RUN, "model": "/no/such/model"})
    for path in folder.iterdir():
        journal.write(str(path), predictions())
    journal.flush()
    journal.close()
    code = main(
        ["predict", str(folder), "--output", str(target), "--resume", "--model", "/no/such/model"]
    )
    assert code == 0
    assert target.exists()


def test_csv_and_parquet_hold_the_same(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    tables = []
    for suffix in ("csv", "parquet"):
        target = tmp_path / f"out.{suffix}"
        journal = Journal(str(target))
        journal.write("a b.png", predictions("Zürich, 写真"))
        journal.fail("broken.png", 'no "image"\nat all')
        journal.finish()
        if suffix == "csv":
            with open(target, newline="", encoding="utf-8") as stream:
                tables.append(list(csv.DictReader(stream)))
        else:
            tables.append(pq.read_table(target).to_pylist())
    for text, typed in zip(*tables, strict=True):
        assert {n: "" if v is None else str(v) for n, v in typed.items()} == text


def test_csv_by_itself(tmp_path):
    target = tmp_path / "out.csv"
    journal = Journal(str(target))
    journal.write("a,b.png", predictions())
    journal.write("a,b.png", predictions("twice"))  # once is enough
    journal.fail("name\udcff.png", "name\udcff.png: cannot be read")
    journal.write("c.png", predictions("\ud83d"))
    journal.finish()
    with open(target, newline="", encoding="utf-8", errors="surrogateescape") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["file"] for row in rows] == ["a,b.png"] * 2 + ["name\udcff.png", "c.png", "c.png"]
    # Half a surrogate pair, which a configuration in JSON may hold, is no text in any encoding.
    assert [row["label"] for row in rows] == ["cat", "dog, or not", "", "\\ud83d", "dog, or not"]
    assert rows[2]["error"] == "name\\udcff.png: cannot be read"
    assert float(rows[0]["probability"]) == 0.75


def test_shards_hold_every_file_once():
    names = [f"folder/{i}.png" for i in range(2000)] + ["name\udcff.png"]
    for count in (1, 2, 7):
        parts = [[n for n in names if in_shard(n, i, count)] for i in range(count)]
        assert sorted(name for part in parts for name in part) == sorted(names)
        assert min(map(len, parts)) > 0.8 * len(names) / count


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0"])
def test_shards_that_are_none(text, capsys):
    assert main(["predict", "x.png", "--shard", text]) == 2
    assert "must be I/N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("out.txt", InputError, "must end in"),
        ("no/such/folder/out.jsonl", MissingFileError, "no/such/folder: no such directory"),
        ("folder.jsonl", MissingFileError, "wanted the name of a file; this is a directory"),
    ],
)
def test_files_that_cannot_be(tmp_path, name, error, said):
    (tmp_path / "folder.jsonl").mkdir()
    for force in (False, True):
        with pytest.raises(error, match=said):
            Journal(str(tmp_path / name), force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.jsonl"]


def test_force_begins_anew(tmp_path):
    target = tmp_path / "out.jsonl"
    for label in ("old", "new"):
        journal = Journal(str(target), force=label == "new")
        journal.write("a.png", predictions(label))
        journal.finish()
    assert [row["predictions"][0]["label"] for row in rows_of(target)] == ["new"]


def test_a_full_disk_leaves_whole_rows(tmp_path):
    """The limit on a file's size stands for a disk without room."""
    script = (
        "import resource, signal, sys\n"
        "from vit_cli.runs.prediction_file import Journal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "journal = Journal(sys.argv[1])\n"
        "try:\n"
        "    for i in range(1000):\n"
        "        journal.fail(f'{i}.png', 'x'); journal.flush()\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    target = tmp_path / "out.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == (
        f"{target}.partial: cannot be written (File too large). What was done is kept; --resume "
        "goes on from there."
    ), done.stderr
    journal = Journal(str(target), resume=True)
    assert len(journal.done) > 10
    journal.finish()
    assert len(rows_of(target)) == len(journal.done)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, id="term", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, id="kill"),
    ],
)
def test_a_run_that_is_ended_can_be_resumed(tmp_path, number):
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(0)
    noise = PIL.Image.fromarray(rng.integers(0, 256, (900, 900), np.uint8))
    noise.save(folder / "0000.png", compress_level=1)
    for i in range(1, 80):
        (folder / f"{i:04d}.png").symlink_to(folder / "0000.png")
    target = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "vit_cli", "predict", str(folder), "--output", str(target)]
    process = subprocess.Popen(
        [*command, "--batch-size", "4"], stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    partial = tmp_path / "out.jsonl.partial"
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size > 2000):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert not target.exists()
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert "--resume goes on from there" in err
    before = len(rows_of(partial)) - 1 if number == signal.SIGTERM else None
    assert main(["predict", str(folder), "--output", str(target), "--resume"]) == 0
    files = [row["file"] for row in rows_of(target)]
    assert files == sorted(map(str, folder.iterdir()))
    assert before is None or 0 < before < 80


def test_wherever_a_run_is_killed(tmp_path):
    """The file of rows cut at every byte: whole rows are kept, each once."""
    names = ["a.png", "b\udcff.png", "写真.png"]
    target = tmp_path / "out.jsonl"
    journal = Journal(str(target), run={"top_k": 1})
    for name in names:
        journal.write(name, predictions())
    journal.flush()
    whole = (tmp_path / "out.jsonl.partial").read_bytes()
    journal.close()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for length in range(len(whole) + 1):
        (tmp_path / "out.jsonl.partial").write_bytes(whole[:length])
        journal = Journal(str(target), resume=True, run={"top_k": 1})
        assert len(journal.done) == max(0, sum(end <= length for end in ends) - 1)
        for name in names:
            journal.write(name, predictions())
        journal.flush()
        journal.close()
        assert (tmp_path / "out.jsonl.partial").read_bytes() == whole


def test_two_do_not_write_one_output(tmp_path):
    target = str(tmp_path / "out.jsonl")
    journal = Journal(target)
    journal.fail("a.png", "broken")
    journal.flush()
    for options in ({}, {"resume": True}, {"force": True}):
        with pytest.raises(MissingFileError, match="another process is writing this"):
            Journal(target, **options)
    journal.finish()
    assert len(rows_of(tmp_path / "out.jsonl")) == 1


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_names_in_any_encoding(tmp_path, capsys, suffix):
    """Latin-1 bytes, Japanese in Shift JIS, a line break: the names on disk are bytes."""
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    folder = tmp_path / "images"
    folder.mkdir()
    names = [
        b"Z\xfcrich.png",
        "写真.png".encode("shift_jis"),
        "写真.png".encode(),
        b"two\nlines.png",
    ]
    digit = (DIGITS / "digit-3-01.png").read_bytes()
    for name in names:
        with open(os.fsencode(folder) + b"/" + name, "wb") as stream:
            stream.write(digit)
    target = tmp_path / f"out.{suffix}"
    options = ["--output", str(target), "--top-k", "1"]
    assert main(["predict", str(folder), *options]) == 0
    wanted = sorted(os.fsdecode(name) for name in names)
    if suffix == "jsonl":
        found = [row["file"] for row in rows_of(target)]
    elif suffix == "csv":
        with open(target, newline="", encoding="utf-8", errors="surrogateescape") as stream:
            found = [row["file"] for row in csv.DictReader(stream)]
    else:
        import pyarrow.parquet as pq

        found = pq.read_table(target)["file"].to_pylist()
        wanted = [n.encode("utf-8", "backslashreplace").decode() for n in wanted]
    assert [os.path.basename(name) for name in found] == wanted
    capsys.readouterr()


def test_a_folder_that_changes_while_it_is_read(folder, tmp_path, capsys, monkeypatch):
    """What is gone when its turn comes is told; what came after the folder was looked at is not
    there yet."""
    digits = sorted(folder.glob("digit*"))

    def find(names, report, note):
        yield from map(str, digits)
        digits[2].unlink()
        (folder / "digit-late.png").write_bytes(digits[0].read_bytes())

    monkeypatch.setattr("vit_cli.runs.job.find_images", find)
    target = tmp_path / "out.jsonl"
    assert main(["predict", str(folder), "--output", str(target)]) == 1
    rows = rows_of(target)
    assert [row["file"] for row in rows] == list(map(str, digits))
    assert [i for i, row in enumerate(rows) if "error" in row] == [2]
    assert "no such file" in rows[2]["error"].lower()
    assert digits[2].name in capsys.readouterr().err


def test_a_disk_that_fills_up(folder, tmp_path, capsys):
    """The command says so in a line; with room again, --resume goes on."""
    script = (
        "import resource, signal, sys\n"
        "from vit_cli.main import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1100, resource.RLIM_INFINITY))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    target = tmp_path / "out.jsonl"
    command = ["predict", str(folder), "--output", str(target), "--batch-size", "1"]
    done = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "broken.png" not in line]
    assert lines == [
        f"vit: error: {target}.partial: cannot be written (File too large). What was done is "
        "kept; --resume goes on from there."
    ]
    assert not target.exists()
    assert main([*command, "--resume"]) == 1
    said = capsys.readouterr().err
    assert "of 7 images are done already" in said
    assert [row["file"] for row in rows_of(target)] == sorted(map(str, folder.iterdir()))


# -- one output has one run at a time


def refused(target, **options):
    """A run that finds another one at its output, and leaves it alone."""
    before = {path: path.read_bytes() for path in target.parent.iterdir()}
    with pytest.raises(MissingFileError, match="another process is writing this"):
        Journal(str(target), **options)
    assert {path: path.read_bytes() for path in target.parent.iterdir()} == before


@needs_locks
@pytest.mark.parametrize("option", ["resume", "force"])
def test_nobody_else_begins_while_the_file_is_made(tmp_path, monkeypatch, option):
    target = tmp_path / "out.jsonl"
    journal = Journal(str(target))
    journal.fail("a", "broken")
    replace, discard = vit_cli.runs.rows.replace_files, PartialFile.discard
    looked = []

    def while_it_is_written(*arguments):
        refused(target, **{option: True})
        replace(*arguments)
        looked.append("written")

    def before_rows_are_deleted():
        refused(target, **{option: True})
        looked.append("there")

    def before_the_last_is_deleted(self):
        looked.append(self.path.name)
        refused(target, **{option: True})
        discard(self)

    monkeypatch.setattr("vit_cli.runs.rows.replace_files", while_it_is_written)
    monkeypatch.setattr(PartialFile, "discard", before_the_last_is_deleted)
    journal.finish(before_rows_are_deleted)
    assert looked == ["written", "there", "out.jsonl.partial"]
    assert [row["file"] for row in rows_of(target)] == ["a"]


@needs_locks
def test_a_file_that_another_run_began_is_not_deleted(tmp_path):
    target = tmp_path / "out.jsonl"
    first = Journal(str(target))
    (tmp_path / "out.jsonl.partial").unlink()
    second = Journal(str(target))
    first.close()  # without rows it would delete its file; the one of that name is another's now
    second.fail("a", "broken")
    second.close()
    assert len(rows_of(tmp_path / "out.jsonl.partial")) == 2


@pytest.mark.parametrize("names", [["a"], []])
def test_rows_are_kept_until_the_last_word(tmp_path, names):
    """Even those of a run without images: the file that is there must not be in its way."""
    target = tmp_path / "out.jsonl"

    def fails():
        assert len(rows_of(target)) == len(names)
        raise RuntimeError("another process is gone")

    for option in ({}, {"resume": True}):
        journal = Journal(str(target), **option)
        for name in names:
            journal.fail(name, "broken")
        with pytest.raises(RuntimeError):
            journal.finish(fails)
        Journal(str(target), resume=True).close()  # another stops before this one goes on
    journal = Journal(str(target), resume=True)
    assert journal.done == {*names}
    journal.finish()
    assert [row["file"] for row in rows_of(target)] == names
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@needs_locks
def test_a_lock_on_a_file_that_was_deleted_is_none(tmp_path, monkeypatch):
    """Another run ends between the opening of its file here and the lock on it."""
    target = tmp_path / "out.jsonl"
    lock = vit_cli.runs.partial.lock
    opened = []

    def late(stream, path):
        if not opened:
            path.unlink()
        opened.append(path)
        lock(stream, path)

    monkeypatch.setattr("vit_cli.runs.partial.lock", late)
    journal = Journal(str(target))
    assert len(opened) == 2
    refused(target, force=True)
    journal.fail("a", "broken")
    journal.finish()
    assert [row["file"] for row in rows_of(target)] == ["a"]


# -- runs that do not end


def test_a_forced_run_can_be_resumed(tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("old\n")
    journal = Journal(str(target), force=True)
    journal.fail("a", "broken")
    journal.close()
    with pytest.raises(ExistingFileError, match="left by a run that did not end; pass --resume"):
        Journal(str(target))
    assert target.read_text() == "old\n"
    journal = Journal(str(target), resume=True)
    assert journal.done == {"a"}
    journal.fail("b", "broken")
    journal.finish()
    assert [row["file"] for row in rows_of(target)] == ["a", "b"]
    with pytest.raises(ExistingFileError, match="already there, and whole"):
        Journal(str(target), resume=True)


def test_a_run_without_rows_is_in_nobodys_way(tmp_path):
    """One that was killed while the model was loaded; and the odd files of one that was killed
    while it made the output."""
    target = tmp_path / "out.jsonl"
    script = (
        "import os, signal, sys\n"
        "from vit_cli.runs.prediction_file import Journal\n"
        "journal = Journal(sys.argv[1])\n"
        "journal.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    kept = [".out.jsonl.notes.tmp", ".out.jsonl.0123abcd.tmp.png", "out.jsonl.0123abcd.tmp"]
    for name in (*kept, ".out.jsonl.0123abcd.tmp"):
        (tmp_path / name).write_text("")
    journal = Journal(str(target))
    assert journal.done == set()
    journal.fail("a", "broken")
    journal.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "out.jsonl"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_the_model_is_loaded(folder, tmp_path, number):
    script = (
        "import os, sys, time\n"
        "import vit_cli.commands.features, vit_cli.commands.predict\n"
        "from vit_cli.main import main\n"
        "def load(*_, **__):\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    time.sleep(60)\n"
        "vit_cli.commands.features.load_for_stream = load\n"
        "vit_cli.commands.predict.load_for_stream = load\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    for command, name in (("predict", "out.jsonl"), ("features", "out.npz")):
        options = [command, str(folder), "--output", str(tmp_path / name)]
        done = subprocess.run(
            [sys.executable, "-c", script, *options], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (130, "vit: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_the_file_is_made(folder, tmp_path, capsys, monkeypatch, number):
    target = tmp_path / "out.jsonl"
    journal = Journal(str(target), run=RUN)
    for path in sorted(folder.iterdir()):
        journal.write(str(path), predictions())
    journal.close()

    def write(self, stream):
        stream.write(b"some")
        os.kill(os.getpid(), number)
        time.sleep(60)

    command = ["predict", str(folder), "--output", str(target), "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_jsonl", write)
        assert main(command) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        f"vit: interrupted: what was done is in {target}.partial; --resume makes the file of it"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out.jsonl.partial"]
    assert main(command) == 0
    assert len(rows_of(target)) == 7


def test_whatever_goes_wrong_rows_are_kept_and_the_file_is_free(folder, tmp_path, monkeypatch):
    target = tmp_path / "out.jsonl"
    stream = ImageClassifier.stream

    def fails(self, *arguments, **options):
        with contextlib.closing(stream(self, *arguments, **options)) as results:
            yield next(results)
            raise RuntimeError("this should not happen")

    command = ["predict", str(folder), "--output", str(target)]
    with monkeypatch.context() as patch:
        patch.setattr(ImageClassifier, "stream", fails)
        assert main(command) == 2
    journal = Journal(str(target), resume=True, run=RUN)
    assert len(journal.done) == 1
    journal.close()


# -- what is done already, and whose


def test_images_that_are_named_twice_are_counted_once(folder, tmp_path, capsys):
    target = tmp_path / "out.jsonl"
    digit = str(sorted(folder.glob("digit*"))[0])
    assert main(["predict", digit, digit, "--output", str(target)]) == 0
    assert capsys.readouterr().err == f"vit: wrote {target}: 1 image\n"
    assert [row["file"] for row in rows_of(target)] == [digit]


@pytest.mark.parametrize(("command", "suffix"), [("predict", "jsonl"), ("features", "npz")])
def test_a_shard_is_part_of_the_run(folder, tmp_path, capsys, command, suffix):
    target = tmp_path / f"out.{suffix}"
    digits = sorted(map(str, folder.glob("digit*")))
    other = next(i for i in range(2) if not in_shard(digits[0], i, 2)) + 1
    assert main([command, digits[0], "--output", str(target), "--shard", f"{other}/2"]) == 0
    assert f"no image falls to shard {other}/2" in capsys.readouterr().err
    target.unlink()
    run = {**RUN, "shard": "1/2"}
    if command == "predict":
        left = Journal(str(target), run=run)
    else:
        del run["top_k"]
        settings = {"layers": [-1], "pool": "cls", "store_dtype": "float32"}
        left = FeatureFile(str(target), run={**run, **settings})
    left.fail("a.png", "broken")
    left.close()
    arguments = [command, *digits, "--output", str(target), "--resume"]
    for shard, said in ((["--shard", "2/2"], "'2/2'"), ([], "not given")):
        assert main([*arguments, *shard]) == 2
        assert f"made with shard '1/2', now {said}." in capsys.readouterr().err
    assert main([*arguments, "--shard", "1/2"]) == 1
