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
from vit_cli.runs.job import in_shard, part_of
from vit_cli.runs.prediction_file import Journal
from vit_common.embedded import embedded_checkpoint
from vit_common.errors import ExistingFileError, HostError, InputError
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


def part(target, number, count):
    """The file of one of several processes, counted from 1."""
    return target.with_name(f"{target.stem}.{number}-of-{count}{target.suffix}")


def names_in(folder):
    """The images in the files of all processes, each once for its row."""
    parts = [path for path in folder.iterdir() if "-of-" in path.name]
    return [name for path in parts for name in dict.fromkeys(row[0] for row in read(path))]


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
        partials = list(target.parent.glob(f"{target.stem}.*-of-*{target.suffix}.partial"))
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
    broken = next(i for i in range(count) if in_shard(str(folder / "broken.png"), i, count))
    assert codes == [int(i == broken) for i in range(count)], said
    parts = [part(target, i + 1, count) for i in range(count)]
    images = [*map(str, folder.iterdir())]
    for i, (own, each) in enumerate(zip(parts, said, strict=True)):
        some = any(in_shard(image, i, count) for image in images)
        assert (f"vit: wrote {own}: " if some else "vit: no image falls to shard") in each
    assert main([command_for(alone), str(folder), "--output", str(alone)]) == 1
    capsys.readouterr()
    names = sorted(["images", alone.name, *(path.name for path in parts)])
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    rows = sorted((row for path in parts for row in read(path)), key=by_name)
    for ours, theirs in zip(rows, sorted(read(alone), key=by_name), strict=True):
        assert ours[:3] == theirs[:3]
        assert ours[3] == pytest.approx(theirs[3], abs=TOLERANCE)
    shown = odd.encode(errors="backslashreplace").decode() if suffix == "parquet" else odd
    assert shown in [row[0] for row in rows]


def by_name(row):
    return row[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "count", "victim", "number"),
    [
        ("jsonl", 2, 2, signal.SIGKILL),
        ("jsonl", 4, 1, signal.SIGKILL),
        ("csv", 3, 2, signal.SIGTERM),
        ("jsonl", 3, 1, signal.SIGINT),
        ("npz", 2, 1, signal.SIGKILL),
        ("safetensors", 3, 2, signal.SIGKILL),
        ("parquet", 2, 2, signal.SIGTERM),
    ],
)
def test_one_ends_and_the_rest_stop(tmp_path, many, capsys, suffix, count, victim, number):
    target = tmp_path / f"out.{suffix}"
    last, said = end_one(target, start(many, target, count, "--batch-size", "4"), victim, number)
    asked = number != signal.SIGKILL
    if asked:
        assert "--resume goes on from there" in last
    what = "stopped: it was interrupted." if asked else "is gone; process"
    for each in said:
        one_line(each, f"process {victim} of {count} {what}", "--resume goes on from there.")
    parts = [part(target, i + 1, count) for i in range(count)]
    ends_of_names = [".partial"]
    if command_for(target) == "features":
        ends_of_names.append(".partial.rows")
    left = {path.name + end for path in parts for end in ends_of_names}
    there = {path.name for path in tmp_path.iterdir()}
    # One that had done its share waited for the others, with its rows beside its file.
    assert left <= there <= left | {path.name for path in parts} - {parts[victim - 1].name}

    codes, said = ends(start(many, target, count + 1, "--resume"))
    assert codes == [2] * (count + 1)
    for each in said:
        one_line(each, f"written by one of {count} processes, and these are {count + 1}")
    assert {path.name for path in tmp_path.iterdir()} == there

    # The share of a machine that is lost can be done on another.
    shard = ["--shard", f"{victim}/{count}", "--output", str(parts[victim - 1]), "--resume"]
    assert main([command_for(target), str(many), *shard]) == 0
    assert "images are done already" in capsys.readouterr().err
    codes, said = ends(start(many, target, count, "--resume"))
    assert codes == [0] * count, said
    for i, each in enumerate(said):
        assert ("already there, and whole" in each) == (i == victim - 1)
        assert ("images are done already" in each) == (i != victim - 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in parts)
    assert sorted(names_in(tmp_path)) == sorted(map(str, many.iterdir()))
    if command_for(target) == "features":  # each image has its own vector
        whole = tmp_path / "whole.npz"
        first = sorted(map(str, many.iterdir()))[:20]  # the rest are links to them
        assert main(["features", *first, "--output", str(whole)]) == 0
        wanted = read_features(whole)[0]
        assert len(np.unique(wanted[:, 0])) == 20
        for path in parts:
            features, files, *_ = read_features(path)
            which = [int(file[-8:-4]) % 20 for file in files]
            np.testing.assert_allclose(features, wanted[which], rtol=0, atol=RESIZED)
    capsys.readouterr()


@pytest.mark.slow
def test_one_that_is_early_waits(tmp_path):
    """Longer than a process may be silent: making a file can take that long."""
    script = (
        "import sys, time\n"
        "import vit_cli.runs.rows\n"
        "from vit_cli.main import main\n"
        "replace = vit_cli.runs.rows.replace_files\n"
        "def late(*arguments):\n"
        "    time.sleep(12)\n"
        "    replace(*arguments)\n"
        "vit_cli.runs.rows.replace_files = late\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    target = tmp_path / "out.jsonl"
    codes, said = ends(start(DIGITS, target, 2, instead={2: script}))
    assert codes == [0, 0], said
    for i, each in enumerate(said):
        own = part(target, i + 1, 2)
        assert each == f"vit: wrote {own}: {len(rows_of(own))} images\n"


@pytest.mark.slow
def test_one_that_is_early_hears_of_the_end_of_another(tmp_path):
    target = tmp_path / "out.jsonl"
    own = part(target, 1, 2)
    script = (
        "import os, signal, sys, time\n"
        "import vit_cli.commands.predict\n"
        "from vit_cli.main import main\n"
        "def load(*_, **__):\n"
        f"    while not os.path.exists({str(own)!r}):\n"
        "        time.sleep(0.1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "vit_cli.commands.predict.load_for_stream = load\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    codes, said = ends(start(DIGITS, target, 2, instead={2: script}))
    assert codes == [2, 128 + signal.SIGKILL], said
    one_line(said[0], "process 2 of 2 is gone; process 1 of 2 stops.", "--resume goes on from")
    left = [own.name, f"{own.name}.partial", f"{part(target, 2, 2).name}.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    codes, said = ends(start(DIGITS, target, 2, "--resume"))
    assert codes == [0, 0], said
    assert "images are done already" in said[0]
    assert sorted(names_in(tmp_path)) == sorted(map(str, DIGITS.iterdir()))


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
    """It is told before it meets those at work, whom a second of its number would end."""
    target = tmp_path / "out.jsonl"
    journal = Journal(str(part(target, 2, 2)))
    arguments = ["predict", str(DIGITS), "--output", str(target), "--coordinator", "127.0.0.1:1"]
    assert main([*arguments, "--process", "2/2"]) == 2
    one_line(capfd.readouterr().err, "out.2-of-2.jsonl.partial: another process is writing this")
    journal.close()
    assert not list(tmp_path.iterdir())


def test_a_name_without_a_suffix_is_refused_as_it_was_given(tmp_path, capfd):
    arguments = ["predict", str(DIGITS), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--coordinator", "127.0.0.1:1", "--process", "2/2"]) == 2
    one_line(capfd.readouterr().err, "--output must end in .jsonl", "given '", "/out'")


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
    part(target, 1, 2).write_text("")
    codes, said = ends(start(DIGITS, target, 2))
    assert codes == [2, 2]
    assert "already there, and whole" in said[0]
    assert "process 1 of 2 stopped:" in said[1]
    assert part(target, 1, 2).read_text() == ""


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
    assert sorted(names_in(tmp_path)) == sorted(map(str, DIGITS.iterdir()))


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


# -- a share and a file for each


@pytest.mark.parametrize(
    ("output", "own"),
    [
        ("out.jsonl", "out.2-of-3.jsonl"),
        ("more/a.b.npz", "more/a.b.2-of-3.npz"),
        ("new.1-of-2.csv", "new.1-of-2.2-of-3.csv"),
    ],
)
def test_the_file_of_one_of_several(tmp_path, monkeypatch, output, own):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more").mkdir()
    others = ("out.jsonl", "out.1-of-2.jsonl.txt", "out.1-of-2.npz", "an-out.1-of-2.jsonl")
    for name in ("out.1-of-3.jsonl", "out.2-of-3.jsonl.partial", *others):
        (tmp_path / name).touch()
    assert part_of(output, 1, 3) == own


@pytest.mark.parametrize("left", ["out.4-of-10.csv", "out.1-of-1.csv", "out.2-of-2.csv.partial"])
def test_files_of_another_number_of_processes(tmp_path, left):
    (tmp_path / left).touch()
    number = left.split("-")[2].partition(".")[0]
    said = f"{left}: written by one of {number} processes, and these are 3; .* Start {number} p"
    with pytest.raises(ExistingFileError, match=said):
        part_of(str(tmp_path / "out.csv"), 0, 3)


class Met:
    """The processes of a run as one of them sees them, without any."""

    count = 2

    def __init__(self, index):
        self.index = index
        self.barriers = []
        self.why = "not gone"

    def barrier(self, key):
        self.barriers.append(key)

    def check(self):
        pass

    def leave(self, why=None):
        self.why = why


@pytest.fixture
def run_as(monkeypatch):
    """A command as one of two processes, which has met the other, and what it told that one."""
    told = {}

    def run(hosts, target, *options, images=DIGITS):
        def join(cluster, settings):
            told.update(settings)
            return hosts

        monkeypatch.setattr("vit_cli.runs.job.join", join)
        monkeypatch.setattr("vit_cli.runs.job.supervised", lambda cluster, work: work())
        command = [command_for(target), str(images), "--output", str(target), *options]
        code = main([*command, "--coordinator", "h:1", "--process", f"{hosts.index + 1}/2"])
        return code, told

    return run


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "npz", "safetensors", "parquet"])
def test_a_process_writes_what_its_shard_writes(tmp_path, capsys, run_as, suffix):
    target, alone = tmp_path / f"out.{suffix}", tmp_path / "alone"
    alone.mkdir()
    for index in range(2):
        hosts = Met(index)
        code, _ = run_as(hosts, target)
        own = part(target, index + 1, 2)
        assert f"vit: wrote {own}: " in capsys.readouterr().err
        assert (code, hosts.barriers, hosts.why) == (0, ["begun", "made"], None)
        shard = ["--shard", f"{index + 1}/2", "--output", str(alone / own.name)]
        assert main([command_for(target), str(DIGITS), *shard]) == 0
        assert own.read_bytes() == (alone / own.name).read_bytes()
    capsys.readouterr()
    assert sorted(names_in(tmp_path)) == sorted(map(str, DIGITS.iterdir()))


@pytest.mark.parametrize("share", ["some", "none"])
@pytest.mark.parametrize("suffix", ["jsonl", "npz"])
def test_another_stops_while_this_one_waits(tmp_path, capsys, run_as, suffix, share):
    """Its file is there; its rows are, too, so that both go on with --resume."""
    image = next(str(file) for file in DIGITS.iterdir() if in_shard(str(file), 0, 2))
    index = 0 if share == "some" else 1
    target = tmp_path / f"out.{suffix}"
    own = part(target, index + 1, 2)
    hosts = Met(index)

    def stops(key):
        if key == "made":
            assert own.exists()
            raise HostError("process 2 of 2 is gone")

    hosts.barrier = stops
    assert run_as(hosts, target, images=image)[0] == 2
    assert "vit: error: process 2 of 2 is gone" in capsys.readouterr().err
    left = [own.name, f"{own.name}.partial"]
    if share == "some" and suffix == "npz":
        left.append(f"{own.name}.partial.rows")
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    whole = own.read_bytes()
    assert run_as(Met(index), target, "--resume", images=image)[0] == 0
    said = capsys.readouterr().err
    assert ("1 of 1 images are done already" in said) == (share == "some")
    assert ("no image falls to shard 2/2" in said) == (share == "none")
    assert own.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == [own.name]


def test_an_output_that_is_there_is_told_before_the_work(tmp_path, capsys, run_as):
    target = tmp_path / "out.jsonl"
    part(target, 1, 2).write_text("")
    hosts = Met(0)
    assert run_as(hosts, target)[0] == 2
    assert "out.1-of-2.jsonl: already there, and whole" in capsys.readouterr().err
    assert "already there, and whole" in hosts.why
    assert hosts.barriers == []
    for path in (target, part(target, 1, 3)):
        path.write_text("")
    hosts = Met(1)
    assert run_as(hosts, target, "--force")[0] == 2
    assert "written by one of 3 processes, and these are 2" in capsys.readouterr().err
    assert "written by one of 3 processes" in hosts.why


def test_no_image_at_all(tmp_path, capsys, run_as):
    (tmp_path / "empty").mkdir()
    hosts = Met(0)
    assert run_as(hosts, tmp_path / "out.jsonl", images=tmp_path / "empty")[0] == 1
    assert hosts.why is None
    assert "no images" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_all_are_told_which_images_were_found(tmp_path, monkeypatch, run_as):
    """Names that are the same may hold others: folders that no file system shares."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    digits = [file.read_bytes() for file in sorted(DIGITS.iterdir())]
    found = []
    for names in (["a"], ["a", "b"], ["a", "c"], ["a", "b"]):
        for old in (tmp_path / "images").iterdir():
            old.unlink()
        for name in names:
            (tmp_path / "images" / f"{name}.png").write_bytes(digits[0])
        _, told = run_as(Met(0), tmp_path / "out.jsonl", "--force", images="images")
        found.append(told["images found"])
    assert [each.partition(",")[0] for each in found] == ["1", "2", "2", "2"]
    assert found[1] == found[3] != found[2]
