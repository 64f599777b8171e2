"""`vit train`: what it prints, writes and refuses, and how it ends."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training_runs import log_of, pictures, save_tiny, write_pictures

from vit_cli.commands.train import add_options, advised
from vit_cli.main import main
from vit_cli.options import Parser
from vit_cli.terminal.exit_codes import COULD_NOT_RUN, DIVERGED, DONE, SAVED
from vit_common.errors import DeviceError
from vit_common.recipes import recipe

ROOT = Path(__file__).parents[1]
SHORT = ("--epochs", "3", "--batch-size", "8", "--learning-rate", "0.01")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures in folders, with a model, as photos/{train,val}/CLASS and model/."""
    folder = tmp_path_factory.mktemp("train")
    write_pictures(folder / "photos" / "train", pictures(0, 9))
    write_pictures(folder / "photos" / "val", pictures(1, 5))
    save_tiny(folder / "model")
    return folder


def train(place: Path, *options: str) -> int:
    return main(["train", str(place / "photos"), *options])


def test_a_run_and_what_it_leaves(place, tmp_path, capsys):
    output = tmp_path / "run"
    given = ("--model", str(place / "model"), "--output", str(output), *SHORT)
    assert train(place, *given) == DONE
    out, err = capsys.readouterr()
    shown = dict(line.split(None, 1) for line in out.splitlines() if "step" not in line)
    assert 0 <= float(shown["top1"]) <= 1
    assert shown["model"] == str(output)
    lines = err.splitlines()
    assert all(line.startswith("vit: ") for line in lines)
    assert sum("epoch 3/3: loss " in line for line in lines) == 1
    assert any("training on 27 images, validating on 15: 9 steps of 8" in line for line in lines)
    names = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    names |= {"report.html", "log.jsonl", "run.json", "checkpoints"}
    assert names <= {path.name for path in output.iterdir()}
    # The result is a checkpoint like any other.
    image = str(next((place / "photos" / "val" / "light").iterdir()))
    assert main(["predict", image, "--model", str(output), "--json"]) == DONE
    labels = [each["label"] for each in json.loads(capsys.readouterr().out)["predictions"]]
    assert {*labels} == {"dark", "light", "mid"}
    # Without the settings, which are those of the run: there is nothing left to do.
    assert train(place, "--output", str(output), "--resume") == DONE
    assert "this run is finished (9 steps); nothing to do" in capsys.readouterr().err
    assert train(place, "--output", str(output), "--resume", "--epochs", "4") == COULD_NOT_RUN
    assert "epochs 3.0 there and 4.0 here" in capsys.readouterr().err
    assert train(place, *given) == COULD_NOT_RUN
    assert "holds a run already (finished, step 9)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_writes_nothing(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = write_pictures(tmp_path / "photos", pictures(0, 4)) / "mid" / "broken.png"
    bad.write_bytes(b"no image")
    copy = tmp_path / "validation" / "mid" / "copy.png"
    write_pictures(tmp_path / "validation", pictures(1, 2))
    copy.write_bytes((tmp_path / "photos" / "mid" / "008.png").read_bytes())
    before = sorted(tmp_path.rglob("*"))
    given = ("--model", str(place / "model"), "--validation", "validation", "--dry-run", *SHORT)
    assert main(["train", "photos", *given, "--layer-decay", "0.5", "--train", "all"]) == DONE
    out = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    for part in (
        "training            13 images",
        "validation          7 images",
        "  mid               5 + 3",
        "1: photos/mid/broken.png: ",
        "1: validation/mid/copy.png = photos/mid/008.png",
        "3, in 3 epochs of 1",
        "100%",
        "rate x 0.25, weight decay",
        "by XLA's account",
        "seconds per step",
    ):
        assert part in out


def test_out_of_memory_names_what_helps():
    names = (
        "--model",
        "m",
        "--output",
        "o",
        "--batch-size",
        "8",
        "--image-size",
        "16",
        "--scan-layers",
    )
    parser = Parser("vit train")
    add_options(parser)
    options = parser.parse(["photos", *names])
    settings = recipe("fine-tune", batch_size=8, image_size=16)
    with (
        pytest.raises(DeviceError, match="out of memory; try, in this order") as caught,
        advised(settings, options),
    ):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
    ways = str(caught.value)
    for way in ("--accumulate 2 ", "--remat", "--dtype bfloat16", "--fsdp", "--batch-size below 8"):
        assert way in ways
    assert "an --image-size below 16" in ways
    with pytest.raises(RuntimeError, match="another"), advised(settings, options):
        raise RuntimeError("another fault")


# -- bad input: one line, and nothing is written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "epochs"),
        (["--learning-rate", "-1"], "learning_rate"),
        (["--learning-rate", "nan"], "must be a number"),
        (["--batch-size", "8", "--accumulate", "3"], "3"),
        (["--set", "lerning_rate=1"], "Did you mean learning_rate?"),
        (["--set", "b1=high"], "b1 must be"),
        (["--set", "epochs=1", "--epochs", "2"], "given by --set and by an option of its own"),
        (["--recipe", "simmmim"], "Did you mean simmim?"),
        (["--image-size", "10"], "multiple"),
        (["--train", "no_such_layer"], "no parameter matches 'no_such_layer'"),
        (["--freeze", "("], "not a regular expression"),
        (["--metric", "top2"], "top2"),
        (["--validation", "nothing"], "no such folder or table, and no share"),
        (["--validation", "1.5"], "between 0 and 1"),
        (["--task", "distill"], "needs a teacher"),
        (["--lora", "2", "--set", "lora_targets=nobody"], "no layer is called 'nobody'"),
        (["--devices", "99"], "--devices must be at most"),
        (["--force", "--resume"], "leave one out"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--model", "vit-bse"], "vit-base"),
        (["--tensorboard", "/dev/null/tb"], "/dev/null"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(place, tmp_path, capsys, options, message):
    output = tmp_path / "run"
    given = ["--model", str(place / "model"), "--output", str(output), *options]
    assert train(place, *given) == COULD_NOT_RUN
    err = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(err) == 1
    assert message in err[0]
    assert not (output / "model.safetensors").exists()
    assert not (output / "checkpoints").exists() or not any((output / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "no such folder"),
        (lambda root: root.mkdir(), "class"),
        (lambda root: write_pictures(root, pictures(0, 4).select([0, 1, 2])), "class"),
        (lambda root: (root / "a").mkdir(parents=True) or (root / "b").mkdir(), ""),
    ],
    ids=["nothing", "empty", "one class", "empty classes"],
)
def test_bad_folders(place, tmp_path, capsys, make, message):
    make(tmp_path / "photos")
    given = ["--model", str(place / "model"), "--output", str(tmp_path / "run")]
    assert main(["train", str(tmp_path / "photos"), *given]) == COULD_NOT_RUN
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert message in err[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["optax", "orbax"])
def test_what_is_not_installed_is_named(place, tmp_path, capsys, monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: name != missing and find(name, *more)
    )
    given = ("--model", str(place / "model"), "--output", str(tmp_path / "run"))
    assert train(place, *given) == COULD_NOT_RUN
    assert "pip install optax orbax-checkpoint (the extra `train`)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_output_is_not_among_the_images(place, capsys):
    given = ["--model", str(place / "model"), "--output", str(place / "photos" / "train" / "run")]
    assert train(place, *given) == COULD_NOT_RUN
    assert "would be taken for a class" in capsys.readouterr().err


# -- processes that are killed, stopped, or several


def command(place: Path, output: Path, *options: str) -> list[str]:
    given = ["--model", str(place / "model"), "--output", str(output), *SHORT, *options]
    return [sys.executable, "-m", "vit_cli", "train", str(place / "photos"), *given]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Programs are compiled once for all processes, each runs on one thread."""
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    return {**os.environ, **kept}


MIXED = (
    "--mixup",
    "0.3",
    "--ema",
    "0.9",
    "--set",
    "erasing=0.2",
    "--seed",
    "5",
    "--save-every",
    "2",
)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(place, tmp_path, environment):
    whole = tmp_path / "whole"
    subprocess.run(command(place, whole, *MIXED), env=environment, check=True, capture_output=True)
    rng = np.random.default_rng(0)
    killed = tmp_path / "killed"
    wanted = sorted(rng.choice(np.arange(1, 10), 5, replace=False).tolist())
    for i, step in enumerate(wanted):
        process = subprocess.Popen(
            command(place, killed, *MIXED, "--resume", "--workers", str(1 + i % 3)),
            env=environment,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        log = killed / "log.jsonl"
        while process.poll() is None:
            rows = log.read_text().count("\n") if log.exists() else 0
            if rows >= step:
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(
        command(place, killed, *MIXED, "--resume"), env=environment, capture_output=True, text=True
    )
    assert done.returncode == DONE, done.stderr
    assert log_of(killed) == log_of(whole)
    one, other = ((each / "model.safetensors").read_bytes() for each in (whole, killed))
    assert one == other


@pytest.mark.slow
def test_a_signal_saves_the_run(place, tmp_path, environment):
    for number in (signal.SIGTERM, signal.SIGINT):
        output = tmp_path / number.name
        process = subprocess.Popen(
            command(place, output, *MIXED, "--epochs", "500"),
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in process.stderr:
            if "epoch 1/500" in line:
                break
        process.send_signal(number)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == SAVED, err
        assert "stopping: this step is finished and saved first" in err
        state = json.loads((output / "run.json").read_text())
        assert state["status"] == "stopped"
        assert str(state["step"]) in os.listdir(output / "checkpoints")


@pytest.mark.slow
def test_a_learning_rate_that_is_too_high_has_an_exit_code_of_its_own(place, tmp_path, capsys):
    given = ("--model", str(place / "model"), "--output", str(tmp_path / "run"), *SHORT)
    more = ("--set", "warmup_epochs=0", "--set", "clip=none")
    high = ("--epochs", "30", "--learning-rate", "1e30")
    assert train(place, *given, *more, *high) == DIVERGED
    err = capsys.readouterr().err.splitlines()
    assert sum("error" in line for line in err) == 1
    assert "not finite" in err[-1]
    assert "--detect-nan finds the first layer" in err[-1]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in log_of(folder) if "loss" in row]


@pytest.mark.slow
def test_several_devices_and_processes_have_the_same_losses(place, tmp_path, environment):
    one = tmp_path / "one"
    subprocess.run(command(place, one, *MIXED), env=environment, check=True, capture_output=True)
    eight = {**environment, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    for name, options in {
        "data": [],
        "fsdp": ["--fsdp"],
        "model": ["--fsdp", "--model-parallel", "2"],
    }.items():
        output = tmp_path / name
        subprocess.run(
            command(place, output, *MIXED, *options), env=eight, check=True, capture_output=True
        )
        np.testing.assert_allclose(losses(output), losses(one), rtol=1e-6)
    # A run goes on with other devices: from 8 to one.
    moved = tmp_path / "model"
    (moved / "run.json").write_text(
        (moved / "run.json").read_text().replace('"finished"', '"running"')
    )
    for step in os.listdir(moved / "checkpoints"):
        if int(step) > 6:
            import shutil

            shutil.rmtree(moved / "checkpoints" / step)
    done = subprocess.run(
        command(place, moved, *MIXED, "--resume"), env=environment, capture_output=True, text=True
    )
    assert done.returncode == DONE, done.stderr
    assert "going on after step 6 of 9" in done.stderr
    np.testing.assert_allclose(losses(moved), losses(one), rtol=1e-6)
    # Two processes, each with its share of every batch.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two = tmp_path / "two"
    processes = [
        subprocess.Popen(
            command(
                place, two, *MIXED, "--coordinator", f"127.0.0.1:{port}", "--process", f"{i}/2"
            ),
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in (1, 2)
    ]
    for process in processes:
        err = process.communicate(timeout=300)[1]
        assert process.returncode == DONE, err
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-6)


# One epoch. A run of 17 saves, validates and waits for its other processes 17 times, which on two
# cores takes longer than all of its steps.
FIFTY = (*MIXED, "--epochs", "1", "--save-every", "40", "--learning-rate", "0.002")


@pytest.fixture(scope="module")
def crowd(place, tmp_path_factory):
    """As `place`, with images for an epoch of 51 steps."""
    folder = tmp_path_factory.mktemp("crowd")
    write_pictures(folder / "photos" / "train", pictures(0, 137))
    write_pictures(folder / "photos" / "val", pictures(1, 5))
    (folder / "model").symlink_to(place / "model")
    return folder


@pytest.fixture(scope="module")
def fifty(crowd, tmp_path_factory, environment):
    """The losses of 51 steps on one device."""
    output = tmp_path_factory.mktemp("fifty") / "run"
    subprocess.run(command(crowd, output, *FIFTY), env=environment, check=True, capture_output=True)
    return losses(output)


# name -> virtual devices of each process, processes, options
MANY = {
    "8 devices": (8, 1, ()),
    "8 devices that share the parameters": (8, 1, ("--fsdp",)),
    "2 processes": (1, 2, ()),
    "4 processes of 2 devices that share the parameters": (2, 4, ("--fsdp",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
def test_fifty_steps_have_the_losses_of_one_device(name, crowd, fifty, tmp_path, environment):
    devices, processes, options = MANY[name]
    flag = f"--xla_force_host_platform_device_count={devices}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = tmp_path / "run"
    given = command(crowd, output, *FIFTY, *options)
    many = [
        [
            *given,
            "--coordinator",
            f"127.0.0.1:{port}",
            "--process",
            f"{i + 1}/{processes}",
            "--lost-after",
            "300",
        ]
        for i in range(processes)
    ]
    started = [
        subprocess.Popen(
            each, env={**environment, "XLA_FLAGS": flag}, stderr=subprocess.PIPE, text=True
        )
        for each in (many if processes > 1 else [given])
    ]
    for process in started:
        err = process.communicate(timeout=600)[1]
        assert process.returncode == DONE, err
    found = losses(output)
    assert len(found) >= 50
    np.testing.assert_allclose(found, fifty, rtol=1e-6)
