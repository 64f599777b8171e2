"""One run of several processes on this machine, and what becomes of it when one of them goes."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
from feature_files import read_features
from tolerances import BOUNDS

from vit_cli.main import main
from vit_cli.runs.prediction_file import Journal
from vit_cli.runs.rows import check_free
from vit_common.embedded import embedded_checkpoint
from vit_common.errors import InputError, MissingFileError
from vit_flax.distributed import Cluster, Hosts, explain

DIGITS = embedded_checkpoint() / "images"
TOLERANCE = 1e-6  # of a probability or a feature: batches are made up otherwise; seen: 0
RESIZED = BOUNDS["reference float32"]  # of a feature: other sizes of batches; seen: 1.8e-6


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def environment(**more):
    """As a shell has it: JAX, once imported, leaves this in the environment of its process."""
    return {n: v for n, v in os.environ.items() if n != "TF_CPP_MIN_LOG_LEVEL"} | more


def command_for(target):
    """What makes such a file; .parquet is of features here."""
    return "predict" if target.suffix in (".jsonl", ".csv") else "features"


def start(images, target, count, *options, which=None, port=None, instead=None):
    """The processes of a run, some of them a script `instead` of the command."""
    port = port or free_port()
    scripts = instead or {}
    command = [command_for(target), str(images), "--output", str(target)]
    command += ["--coordinator", f"127.0.0.1:{port}", "--lost-after", "5", *options]
    return [
        subprocess.Popen(
            [sys.executable, *(["-c", scripts[i]] if i in scripts else ["-m", "vit_cli"])]
            + [*command, "--process", f"{i}/{count}"],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
            errors="surrogateescape",
        )
        for i in which or range(1, count + 1)
    ]


def ends(processes, seconds=120):
    """Exit codes and what was said; none may take longer."""
    deadline = time.monotonic() + seconds
    said = [p.communicate(timeout=max(1, deadline - time.monotonic()))[1] for p in processes]
    return [p.returncode for p in processes], said


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read(path):
    """File, error, index and probability of each class, or of each image that failed; or the same
    with a list of features."""
    if command_for(path) == "features":
        features, files, failed, errors, _ = read_features(path)
        return [
            *((file, None, None, row.tolist()) for file, row in zip(files, features, strict=True)),
            *((file, error, None, 0.0) for file, error in zip(failed, errors, strict=True)),
        ]
    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as stream:
            return [
                (row["file"], row["error"], row["index"], float(row["probability"] or 0))
                for row in csv.DictReader(stream)
            ]
    return [
        (row["file"], row.get("error"), each.get("index"), each.get("probability", 0.0))
        for row in rows_of(path)
        for each in row.get("predictions", [{}])
    ]


def one_line(said, *words):
    """Nothing but one error, in a line, with these words."""
    lines = said.splitlines()
    assert len(lines) == 1, said
    assert lines[0].startswith("vit: error: ")
    for word in words:
        assert word in lines[0]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """More images than are done before anyone looks."""
    folder = tmp_path_factory.mktemp("many")
    noise = np.random.default_rng(0).integers(0, 256, (20, 300, 300), np.uint8)
    for i, pixels in enumerate(noise):
        PIL.Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    for i in range(len(noise), 1500):
        (folder / f"{i:04d}.png").symlink_to(folder / f"{i % len(noise):04d}.png")
    return folder


def wait_for_rows(target, processes, rows):
    """Until each process has written so many rows."""
    deadline = time.monotonic() + 120
    while True:
        partials = list(target.parent.glob(f"{target.name}.*-of-*.partial"))
        counts = [len(p.read_bytes().splitlines()) - 1 for p in partials]
        if len(counts) == len(processes) and min(counts) >= rows:
            return
        assert time.monotonic() < deadline
        for process in processes:
            assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def end_one(target, processes, victim, number):
    """Signal one of the processes, counted from 1, when all have rows; what it said, and what each
    of the others, which stop."""
    wait_for_rows(target, processes, 8)
    processes[victim - 1].send_signal(number)
    codes, said = ends(processes, 30)
    asked = number != signal.SIGKILL
    assert codes.pop(victim - 1) == (130 if asked else -signal.SIGKILL)
    last = said.pop(victim - 1)
    assert codes == [2] * len(said)
    return last, said


@pytest.mark.parametrize(
    ("count", "suffix"),
    [
        (2, "npz"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((2, "jsonl"), (4, "jsonl"), (4, "csv"), (2, "parquet"), (3, "safetensors"))
        ),
    ],
)
def test_results_are_those_of_one_process(tmp_path, capsys, count, suffix):
    folder = tmp_path / "images"
    folder.mkdir()
    for file in sorted(DIGITS.iterdir()):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    odd = os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.png")
    with open(odd, "wb") as stream:
        stream.write((DIGITS / "digit-3-01.png").read_bytes())
    target, alone = tmp_path / f"out.{suffix}", tmp_path / f"alone.{suffix}"
    codes, said = ends(start(folder, target, count))
    assert codes[0] == 1, said  # an image failed, in whichever process
    assert set(codes) <= {0, 1}
    assert main([command_for(alone), str(folder), "--output", str(alone)]) == 1
    capsys.readouterr()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"alone.{suffix}",
        "images",
        f"out.{suffix}",
    ]
    for ours, theirs in zip(read(target), read(alone), strict=True):
        assert ours[:3] == theirs[:3]
        assert ours[3] == pytest.approx(theirs[3], abs=TOLERANCE)
    names = [row[0] for row in read(target)]
    assert (odd.encode(errors="backslashreplace").decode() if suffix == "parquet" else odd) in names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "victim", "number", "again"),
    [
        (2, 2, signal.SIGKILL, 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (2, 1, signal.SIGKILL, 2),
                (4, 3, signal.SIGKILL, 2),
                (4, 1, signal.SIGKILL, 3),
                (3, 2, signal.SIGTERM, 4),
                (3, 1, signal.SIGINT, 3),
            )
        ),
    ],
)
def test_one_ends_and_the_rest_stop(tmp_path, many, capsys, count, victim, number, again):
    target = tmp_path / "out.jsonl"
    processes = start(many, target, count, "--batch-size", "4")
    last, said = end_one(target, processes, victim, number)
    asked = number != signal.SIGKILL
    if asked:
        assert "--resume goes on from there" in last
    what = "stopped: it was interrupted." if asked else "is gone; process"
    for each in said:
        one_line(each, f"process {victim} of {count} {what}", "--resume goes on from there.")
    assert not target.exists()

    if again == 1:
        assert main(["predict", str(many), "--output", str(target), "--resume"]) == 0
        assert "of 1500 images are done already" in capsys.readouterr().err
    else:
        codes, said = ends(start(many, target, again, "--resume"))
        assert codes == [0] * again, said
    assert [row["file"] for row in rows_of(target)] == sorted(map(str, many.iterdir()))
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "count", "victim", "number", "again"),
    [
        ("npz", 2, 1, signal.SIGKILL, 1),
        ("safetensors", 3, 2, signal.SIGKILL, 2),
        ("parquet", 2, 2, signal.SIGTERM, 3),
    ],
)
def test_features_when_one_ends(tmp_path, many, capsys, suffix, count, victim, number, again):
    """Every image has its own vector, whichever process wrote it, and when."""
    target, whole = tmp_path / f"out.{suffix}", tmp_path / "whole.npz"
    processes = start(many, target, count, "--batch-size", "4")
    _, said = end_one(target, processes, victim, number)
    for each in said:
        one_line(each, f"process {victim} of {count} ", "--resume goes on from there.")
    left = [path.name for path in tmp_path.iterdir()]
    ends_of_names = (".partial", ".partial.rows")
    parts = [f"{target.name}.{i + 1}-of-{count}" for i in range(count)]
    assert sorted(left) == sorted(part + end for part in parts for end in ends_of_names)
    if again == 1:
        assert main(["features", str(many), "--output", str(target), "--resume"]) == 0
    else:
        codes, said = ends(start(many, target, again, "--resume"))
        assert codes == [0] * again, said
    features, files, failed, _, _ = read_features(target)
    assert (files, failed) == (sorted(map(str, many.iterdir())), [])
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    first = files[:20]  # the rest are links to them
    assert main(["features", *first, "--output", str(whole)]) == 0
    capsys.readouterr()
    wanted = read_features(whole)[0]
    assert len(np.unique(wanted[:, 0])) == 20
    wanted = np.resize(wanted, features.shape)
    np.testing.assert_allclose(features, wanted, rtol=0, atol=RESIZED)


@pytest.mark.slow
def test_processes_that_do_not_come_together(tmp_path):
    """One whose peer never comes, and one that asks at the wrong door."""
    waiting = start(DIGITS, tmp_path / "a.jsonl", 2, "--start-timeout", "1", which=[1])
    lost = start(DIGITS, tmp_path / "b.jsonl", 2, "--start-timeout", "1", which=[2])
    codes, said = ends([*waiting, *lost], 30)
    assert codes == [2, 2]
    one_line(said[0], "not all 2 processes came within 1 s")
    one_line(said[1], "process 1 of 2 does not answer at 127.0.0.1:")
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_there_already(tmp_path, capfd):
    target = str(tmp_path / "out.jsonl")
    journal = Journal(target, part=(1, 2))
    arguments = ["predict", str(DIGITS), "--output", target, "--coordinator", "127.0.0.1:1"]
    assert main([*arguments, "--process", "2/2"]) == 2
    assert "out.jsonl.2-of-2.partial: another process is writing this" in capfd.readouterr().err
    journal.close()
    check_free(target, (1, 2))


@pytest.mark.slow
def test_two_come_as_the_same(tmp_path):
    port = free_port()
    options = ("--start-timeout", "5")
    twice = [
        start(DIGITS, tmp_path / "out.jsonl", 3, *options, which=[2], port=port)[0]
        for _ in range(2)
    ]
    first = start(DIGITS, tmp_path / "out.jsonl", 3, *options, which=[1], port=port)
    codes, said = ends([*first, *twice])
    assert codes == [2, 2, 2]
    assert any("each needs its own --process I/N" in each for each in said[1:])
    for each in said:
        one_line(each)


@pytest.mark.slow
def test_processes_started_otherwise(tmp_path):
    port = free_port()
    target = tmp_path / "out.jsonl"
    first = start(DIGITS, target, 2, "--weights", "int8", "--force", which=[1], port=port)
    second = start(DIGITS, target, 2, "--top-k", "1", "--resume", which=[2], port=port)
    codes, said = ends([*first, *second])
    assert codes == [2, 2]
    one_line(said[0], "process 2 of 2 stopped:", "top_k 1 here and 5 there")
    one_line(
        said[1],
        "process 2 of 2 was started otherwise than the first: top_k 1 here and 5 there",
        "resume True here and False there; force False here and True there",
        "weights None here and 'int8' there",
    )


@pytest.mark.slow
def test_features_started_otherwise(tmp_path):
    port = free_port()
    target = tmp_path / "out.npz"
    first = start(DIGITS, target, 2, "--layers", "-2,-1", which=[1], port=port)
    second = start(DIGITS, target, 2, "--pool", "mean", which=[2], port=port)
    codes, said = ends([*first, *second])
    assert codes == [2, 2]
    what = "layers [-1] here and [-2, -1] there; pool 'mean' here and 'cls' there"
    one_line(said[0], "process 2 of 2 stopped:", what)
    one_line(said[1], "process 2 of 2 was started otherwise than the first:", what)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("here", "there"), [({"a": 1}, {}), ({}, {"a": 1}), ({"a": 1, "b": 0}, {"a": 2, "b": 0})]
)
def test_whatever_one_has_and_the_other_not_differs(monkeypatch, here, there):
    hosts = Hosts.__new__(Hosts)
    hosts.index, hosts.count = 1, 2
    monkeypatch.setattr(hosts, "wait", lambda key: json.dumps(there))
    said = f"a {here.get('a')} here and {there.get('a')} there.$"
    with pytest.raises(InputError, match=said):
        hosts.agree(here)
    monkeypatch.setattr(hosts, "wait", lambda key: json.dumps(here))
    hosts.agree(here)


@pytest.mark.slow
def test_one_is_interrupted_while_it_loads(tmp_path, many):
    """The others hear of it long before they would miss it."""
    script = (
        "import os, signal, sys, time\n"
        "import vit_cli.commands.predict\n"
        "from vit_cli.main import main\n"
        "def load(*_, **__):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
        "vit_cli.commands.predict.load_for_stream = load\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    target = tmp_path / "out.jsonl"
    options = ("--lost-after", "60", "--batch-size", "4")
    processes = start(many, target, 2, *options, instead={1: script})
    codes, said = ends(processes, 50)
    assert codes == [130, 2]
    assert said[0] == "vit: interrupted\n"
    one_line(said[1], "process 1 of 2 stopped: it was interrupted.", "--resume goes on from")
    assert not target.exists()


@pytest.mark.slow
def test_an_output_that_is_there_is_told_by_all(tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("")
    codes, said = ends(start(DIGITS, target, 2))
    assert codes == [2, 2]
    assert "already there, and whole" in said[0]
    assert "process 1 of 2 stopped:" in said[1]
    assert target.read_text() == ""


@pytest.mark.slow
def test_a_cluster_that_jax_knows(tmp_path):
    """Slurm's own variables, as `srun` sets them."""
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "127.0.0.1"}
    job |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    target = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "vit_cli", "predict", str(DIGITS), "--distributed"]
    processes = [
        subprocess.Popen(
            [*command, "--output", str(target)],
            env=environment(**job, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    codes, said = ends(processes)
    assert codes == [0, 0], said
    assert [row["file"] for row in rows_of(target)] == sorted(map(str, DIGITS.iterdir()))


@pytest.mark.slow
def test_no_cluster(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "vit_cli", "predict", str(DIGITS), "--distributed"]
        + ["--output", str(tmp_path / "out.jsonl")],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    one_line(done.stderr, "JAX finds no cluster here", "--coordinator HOST:PORT")


@pytest.mark.parametrize("command", ["predict", "features"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--process", "1/2"], "go together"),
        (["--coordinator", "h:1"], "go together"),
        (["--coordinator", "h:1", "--process", "1/2", "--distributed"], "leave one out"),
        (["--coordinator", "h:1", "--process", "1/2"], "name it with --output FILE"),
        (["--distributed", "--shard", "1/2", "--output", "o.csv"], "leave --shard out"),
        (["--coordinator", "h", "--process", "1/2"], "must be HOST:PORT; given 'h'"),
        (["--process", "3/2"], "must be I/N"),
        (["--devices", "0"], "must be a positive integer"),
    ],
)
def test_options_that_do_not_fit(command, options, said, capsys):
    if command == "features" and "--output" not in options:
        if "--output" in said:
            said = "--output FILE is needed"
        else:
            options = [*options, "--output", "o.npz"]
    assert main([command, "x.png", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "features"])
def test_devices_that_cannot_be_divided(tmp_path, capsys, command):
    (image, *_) = DIGITS.iterdir()
    arguments = [command, str(image)]
    if command == "features":
        arguments += ["--output", str(tmp_path / "out.npz")]
    assert main([*arguments, "--devices", "3", "--model-parallel", "2"]) == 2
    assert "--model-parallel must divide the number of devices, 3" in capsys.readouterr().err
    assert main([*arguments, "--devices", "1000"]) == 2
    assert "needs 1000 devices" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n2\n3\nThe "
         "tasks have crashed.\nRPC: /xla.coordination.CoordinationService/PollForError",
         "process 3 of 4 and process 4 of 4 are gone; process 2 of 4 stops."),
        ("UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n"
         "/job:jax_worker/replica:0/task:3\nThe tasks have crashed.",
         "process 4 of 4 is gone"),
        ("calling /xla.coordination.CoordinationService/PollForError:\nSocket closed",
         "process 1 of 4 is gone"),
        ("ALREADY_EXISTS: Aborted connect attempt as there is a request from a newer incarnation.",
         "each needs its own --process I/N"),
    ],
)  # fmt: skip
def test_what_the_last_words_of_the_runtime_mean(words, said):
    """As JAX 0.10.2 says them, and the release before its short form of tasks."""
    assert said in explain(words, Cluster("host:1", (1, 4)))


# -- one file of several processes' rows


def write(target, part, names, *, resume=False):
    journal = Journal(str(target), part=part, resume=resume, run={"top_k": 5})
    for name in names:
        journal.fail(name, "broken")
    return journal


def test_rows_of_all_in_the_order_of_the_files(tmp_path):
    target = tmp_path / "out.jsonl"
    write(target, (1, 3), ["b", "d"]).close()
    write(target, (2, 3), ["c"]).close()
    with open(f"{target}.3-of-3.partial", "ab") as stream:
        stream.write(b'{"file": "half')  # of a process that died
    other = Journal(str(target), part=(0, 2), resume=True, run={"top_k": 5})
    assert other.done == {"b", "c", "d"}
    assert other.failed == 3
    other.fail("a", "broken")
    other.fail("b", "twice")  # once is enough
    other.finish(["a", "b", "c", "d", "b"])
    assert [(row["file"], row["error"]) for row in rows_of(target)] == [
        (name, "broken") for name in "abcd"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_an_image_that_nobody_did(tmp_path):
    target = tmp_path / "out.jsonl"
    first = write(target, (0, 2), ["a"])
    write(target, (1, 2), ["b"]).close()
    with pytest.raises(MissingFileError, match=r"1 of 3 images have no row, the first is c: .*res"):
        first.finish(["a", "b", "c"])
    assert not target.exists()
    again = write(target, (0, 2), ["c"], resume=True)
    again.finish(["a", "b", "c"])
    assert [row["file"] for row in rows_of(target)] == ["a", "b", "c"]
