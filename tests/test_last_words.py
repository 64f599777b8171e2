"""What XLA and JAX's runtime say when they fail, as each version really said it.

`last_words.json` was recorded from processes of jaxlib that were killed, left waiting, or started
twice; lines of stack frames are left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from vit_flax import last_words
from vit_flax.distributed import Cluster, Hosts, can_fork, explain

RECORDED = json.loads(Path(__file__).with_name("last_words.json").read_text())
# what happened -> kind, and which processes did it (the runtime cannot name the first if it is it)
HAPPENED = {
    "peer killed": ("lost", (1,), "process 2 of 3 is gone; process 1 of 3 stops. Advice."),
    "first killed": ("lost", (), "process 1 of 3 is gone; process 1 of 3 stops. Advice."),
    "no show": ("start", (), "not all 3 processes came within 300 s. Start them all"),
    "nobody there": ("start", (), "not all 3 processes came within 300 s. Start them all"),
    "leaves early": ("late", (0,), "process 1 of 3 is not done 20 s after the others"),
}
CASES = [(version, name) for version, cases in RECORDED.items() for name in cases]


@pytest.mark.parametrize(("version", "name"), CASES)
def test_why_a_process_was_ended(version, name):
    text = RECORDED[version][name]
    assert last_words.is_fatal(text.encode())
    assert not any(last_words.is_fatal(line.encode()) for line in text.split("\n")[1:])
    happened = name.partition(",")[0]
    if happened == "twice":  # which of the two is refused, the clock decides
        kind = "duplicate" if "newer incarnation" in text else "start"
        assert last_words.ending(text) == (kind, ())
        return
    kind, lost, said = HAPPENED[happened]
    assert last_words.ending(text) == (kind, lost)
    assert said in explain(text, Cluster("host:1", (0, 3)), "Advice.")


@pytest.mark.parametrize(
    "line",
    [b"W1128 20:47:41.391197   14549 client.h:80] a warning", b"", b"vit: error: F1128", b"Fatal"],
)
def test_other_lines_are_not_fatal(line):
    assert not last_words.is_fatal(line)


# Of the CPU (0.10.2, 0.12.0.1) and of the TPU compiler, recorded; the others after XLA's sources.
@pytest.mark.parametrize(
    "text",
    [
        "RESOURCE_EXHAUSTED: Out of memory allocating 17592186044416 bytes.",
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes.",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (71.53G) exceeds available HBM (15.75G).",
        "INTERNAL: Failed to allocate: out of memory",
    ],
)
def test_out_of_memory(text):
    assert last_words.is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize("text", ["INTERNAL: the device fell off the bus", "memory", ""])
def test_other_failures(text):
    assert not last_words.is_out_of_memory(RuntimeError(text))


def test_out_of_memory_here():
    """The installed jaxlib's own words."""
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(jnp.zeros(1 << 42))
    assert last_words.is_out_of_memory(caught.value)
    assert last_words.is_out_of_memory(MemoryError())


def test_the_watching_process_does_not_import_jax():
    code = "import sys, vit_flax.distributed as d; assert d.can_fork(); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert not can_fork()  # here


class Store:
    """A coordination service's keys and values."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite):
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


def hosts_of(store, count):
    found = []
    for index in range(count):
        hosts = Hosts.__new__(Hosts)
        hosts.index, hosts.count, hosts._client = index, count, store
        hosts._advice, hosts._looked = " Advice.", 0.0
        found.append(hosts)
    return found


def test_a_barrier_opens_when_the_last_has_come():
    from vit_common.errors import HostError

    store = Store()
    first, second = hosts_of(store, 2)
    second.tell("epoch-1/1")
    first.barrier("epoch-1")
    second.tell("left/1", "it ran out of memory.")
    with pytest.raises(HostError, match=r"^process 2 of 2 stopped: it ran out of memory. Advice.$"):
        first.barrier("epoch-2")
