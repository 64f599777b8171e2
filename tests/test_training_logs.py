"""The log of a training run, its folder, and what ends the process that writes them."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys

import pytest

from vit_cli.terminal import interrupt
from vit_common.errors import InputError
from vit_flax.training.logs import Log, RunFolder, read_log, read_run


def test_a_log_goes_on_after_a_step(tmp_path):
    file = tmp_path / "log.jsonl"
    log = Log(file, 0)
    for step in range(1, 5):
        log.write({"step": step, "loss": 1 / step})
    log.write({"step": 4, "validation": {"top1": 0.5}})
    log.write({"step": 5, "loss": math.nan})
    log.close()
    assert json.loads(file.read_text().splitlines()[-1]) == {"step": 5, "loss": "nan"}
    with file.open("a") as stream:
        stream.write('{"step": 6, "lo')  # killed
    log = Log(file, 3)
    log.write({"step": 4, "loss": 9.0})
    log.close()
    assert [(row["step"], row["loss"]) for row in read_log(file)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (4, 9.0),
    ]


def scalars(folder) -> dict[tuple[str, int], float]:
    """Numbers in TensorBoard's event files: records of a length, its checksum, an event, its
    checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for name in sorted(os.listdir(folder)):
        data = (folder / name).read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            data = data[16 + length :]
    return found


def test_event_files_hold_the_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    log = Log(tmp_path / "log.jsonl", 0, tensorboard=tmp_path / "events")
    log.write({"step": 1, "epoch": 1, "loss": 0.5})
    log.write({"step": 2, "epoch": 1, "validation": {"top1": 0.25}})
    log.close()
    assert scalars(tmp_path / "events") == {("loss", 1): 0.5, ("validation/top1", 2): 0.25}


def test_a_folder_says_how_far_its_run_is(tmp_path):
    folder = RunFolder(tmp_path / "run", {"seed": 1, "crop": (1, 2)})
    folder.begin()
    folder.note(step=3)
    folder.close()
    assert read_run(tmp_path / "run")["step"] == 3
    again = RunFolder(tmp_path / "run", {"seed": 1, "crop": (1, 2)}, resume=True)
    assert again.found["step"] == 3  # a tuple and a list are the same in a file
    again.close()
    (tmp_path / "run" / "run.json").write_text('{"kind": "so')
    with pytest.raises(InputError, match="pass --force to begin anew"):
        RunFolder(tmp_path / "run", {}, resume=True)
    (tmp_path / "run" / "run.json").write_text('{"kind": "another"}')
    with pytest.raises(InputError, match="not written by a training run"):
        RunFolder(tmp_path / "run", {}, resume=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_the_first_signal_is_noted(number):
    said = []
    with interrupt.asks(lambda: said.append("stopping")) as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may repeat itself
        assert asked()
    assert said == ["stopping"]


def test_a_second_ctrl_c_ends_the_process():
    code = """
import os, signal
from vit_cli.terminal import interrupt
with interrupt.asks(lambda: None):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "vit: interrupted\n"
