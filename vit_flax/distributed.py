"""One program on several hosts: processes meet, agree, wait for each other, and notice who is gone.

JAX's distributed runtime finds the processes and watches them. Where one is gone, it aborts the
others with a dump of their stacks; `run_in_child` therefore does the work in a child process, and
`explain` says in one line what the dump means. Nothing here writes to a terminal, and JAX is not
imported before the processes meet.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vit_common.checks import differences
from vit_common.errors import HostError, InputError
from vit_common.files.texts import reason
from vit_flax import last_words

INTERRUPTION = "it was interrupted."
"""The reason to give to `Hosts.leave` after a Ctrl-C."""
_SECONDS = 1.0  # between looks at the others
_FAILED = 2  # exit code of a child that could not even fail properly


@dataclass(frozen=True)
class Cluster:
    """The processes that take part in a run.

    Attributes:
        coordinator: "host:port" of the first process, where the others meet it; None where JAX
            knows the cluster (TPU pods, Slurm, Open MPI).
        process: (i, n): this is the i-th of n processes, from 0; None as for `coordinator`.
        start_timeout: seconds to wait for the others at the start.
        lost_after: seconds without a sign of life after which a process counts as gone.
    """

    coordinator: str | None = None
    process: tuple[int, int] | None = None
    start_timeout: int = 300
    lost_after: int = 20

    @property
    def name(self) -> str:
        """This process, in messages."""
        return "this process" if self.process is None else _named(*self.process)


def _named(index: int, count: int | str) -> str:
    return f"process {index + 1} of {count}"


class Hosts:
    """The processes of a run, once all of them have met.

    `agree` comes next, and `leave` ends it::

        hosts = Hosts(Cluster("10.0.0.1:1234", (0, 2)))
        hosts.agree({"learning_rate": 1e-3})
        ...  # each does its part: hosts.index of hosts.count; hosts.check() now and then
        hosts.barrier("done")
        hosts.leave()

    Args:
        cluster: the processes.
        advice: what a user can do when another process stops; the end of every such message.

    Raises:
        HostError: they did not come together.
        InputError: JAX knows of no cluster.
    """

    def __init__(self, cluster: Cluster, advice: str = "") -> None:
        import jax

        # The service for preemptions has a handler of its own for SIGTERM.
        jax.config.update("jax_enable_preemption_service", False)
        given: dict[str, Any] = {}
        if cluster.process is not None:
            index, count = cluster.process
            given = {
                "coordinator_address": cluster.coordinator,
                "num_processes": count,
                "process_id": index,
                "cluster_detection_method": "deactivate",
            }
        try:
            jax.distributed.initialize(
                **given,
                initialization_timeout=cluster.start_timeout,
                heartbeat_timeout_seconds=cluster.lost_after,
                shutdown_timeout_seconds=cluster.lost_after,
            )
        except ValueError as error:
            raise InputError(
                "JAX finds no cluster here; give the first process's address with --coordinator "
                f"HOST:PORT, and the number of this one with --process I/N ({reason(error)})."
            ) from error
        except RuntimeError as error:
            raise HostError(
                f"{cluster.name} cannot reach the other processes ({reason(error)})."
            ) from error
        from jax._src import distributed  # the runtime's own client has no public name

        self._client: Any = distributed.global_state.client
        self._advice = f" {advice}" if advice else ""
        self._looked = time.monotonic()
        self.index: int = distributed.global_state.process_id or 0
        """This process, from 0."""
        self.count: int = distributed.global_state.num_processes or 1
        """How many processes there are."""

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Make sure that all processes were started with the same settings.

        Args:
            settings: names and values that JSON can hold.

        Raises:
            InputError: this process has other settings than the first.
            HostError: another process stopped.
        """
        text = json.dumps(dict(settings))
        if self.index == 0:
            self.tell("run", text)
            return
        first = json.loads(self.wait("run"))
        odd = [
            f"{name} {here!r} here and {there!r} there"
            for name, here, there in differences(json.loads(text), first)
        ]
        if odd:
            raise InputError(f"{self.name} was started otherwise than the first: {'; '.join(odd)}.")

    @property
    def name(self) -> str:
        """This process, in messages."""
        return _named(self.index, self.count)

    def tell(self, key: str, value: str = "") -> None:
        """Let the other processes know a value."""
        self._client.key_value_set(f"vit/{key}", value, allow_overwrite=True)

    def told(self, key: str) -> dict[str, str]:
        """The values told under `key`/..., by the rest of the key."""
        found = self._client.key_value_dir_get(f"vit/{key}/")
        return {name.rpartition("/")[2]: value for name, value in found}

    def wait(self, key: str) -> str:
        """Wait for the value of a key.

        Raises:
            HostError: another process stopped.
        """
        while True:
            with contextlib.suppress(Exception):  # there is nothing yet
                value: str = self._client.blocking_key_value_get(f"vit/{key}", 1000)
                return value
            self.check(now=True)

    def wait_for_all(self, key: str) -> None:
        """Wait until each process has told `key`/i.

        Raises:
            HostError: another process stopped.
        """
        while len(self.told(key)) < self.count:
            self.check(now=True)
            time.sleep(_SECONDS / 4)

    def barrier(self, key: str) -> None:
        """Wait until all processes have come to the barrier of this name; each name serves once.

        Raises:
            HostError: another process stopped.
        """
        self.tell(f"{key}/{self.index}")
        self.wait_for_all(key)

    def check(self, *, now: bool = False) -> None:
        """Look whether another process stopped, if the last look was a second ago; or `now`.

        Raises:
            HostError: one did, and said so. The runtime finds out about one that died silently.
        """
        if not now and time.monotonic() - self._looked < _SECONDS:
            return
        self._looked = time.monotonic()
        for index, why in self.told("left").items():
            if int(index) != self.index:
                raise HostError(f"{_named(int(index), self.count)} stopped: {why}{self._advice}")

    def leave(self, why: str | None = None) -> None:
        """Part from the other processes, waiting for those that are alive.

        Args:
            why: the reason to stop before everything is done; the others then stop too. None says
                that this process has done its part.
        """
        import jax

        with contextlib.suppress(Exception):
            if why is not None:
                self.tell(f"left/{self.index}", why)
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()


# -- the process that watches


class Ended(NamedTuple):
    """How a child process ended.

    Attributes:
        code: its exit code; negative for the signal that ended it.
        last_words: what the runtime said when it aborted the process; "" if it did not.
    """

    code: int
    last_words: str


def can_fork() -> bool:
    """Whether this process can be copied: there is `fork`, JAX is not imported, and no other thread
    runs."""
    return hasattr(os, "fork") and "jax" not in sys.modules and threading.active_count() == 1


def run_in_child(work: Callable[[], int]) -> Ended:
    """Do the work in a child process and wait for it.

    SIGINT and SIGTERM are passed on to the child; the child ends if this process does. What the
    child writes to standard error is passed on, but for the runtime's fatal message (with
    VIT_DEBUG set, that too). Call it only if `can_fork`.

    Args:
        work: gives the child's exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    alive_read, alive_write = os.pipe()
    said_read, said_write = os.pipe()
    child = os.fork()
    if child == 0:
        code = _FAILED
        try:
            os.close(alive_write)
            os.close(said_read)
            os.setpgid(0, 0)  # a Ctrl-C comes once, from the parent
            os.dup2(said_write, 2)
            os.close(said_write)
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
            threading.Thread(target=_end_with_parent, args=(alive_read,), daemon=True).start()
            code = work()
            sys.stderr.flush()
        finally:
            os._exit(code)  # the caller goes on in the parent alone
    os.close(alive_read)
    os.close(said_write)

    def forward(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    ignored = (signal.SIG_IGN, None)
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) not in ignored]
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        text = _relay(said_read)
        _, status = os.waitpid(child, 0)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(alive_write)
        os.close(said_read)
    return Ended(os.waitstatus_to_exitcode(status), text)


def _end_with_parent(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    os._exit(_FAILED)


def _relay(descriptor: int) -> str:
    """Hand on what the child says, up to the runtime's fatal message, which is returned."""
    fatal: list[bytes] = []
    everything = bool(os.environ.get("VIT_DEBUG"))
    with open(descriptor, "rb", buffering=0, closefd=False) as raw:
        rest = b""
        while chunk := raw.read(65536):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if fatal or last_words.is_fatal(line):
                    fatal.append(line)
                if everything or not fatal:
                    os.write(2, line + b"\n")
        if rest and (fatal or last_words.is_fatal(rest)):
            fatal.append(rest)
        elif rest:
            os.write(2, rest)
    return b"\n".join(fatal).decode("utf-8", "replace")


def explain(text: str, cluster: Cluster, advice: str = "") -> str:
    """What the runtime's fatal message means, in one line.

    Args:
        text: `Ended.last_words`.
        cluster: the processes of the run.
        advice: what a user can do when another process is gone; the end of that message.
    """
    index, count = cluster.process or (None, "all")
    where = "" if cluster.coordinator is None else f" at {cluster.coordinator}"
    end = last_words.ending(text)
    if end.kind == "duplicate":
        return (
            f"two processes were started as {cluster.name}, or as another one; each needs its own "
            "--process I/N."
        )
    if end.kind == "start":
        late = f"not all {count} processes came within {cluster.start_timeout} s"
        if index == 0:
            return f"{late}. Start them all, each with its own --process I/N{_same(where)}."
        return (
            f"{_named(0, count)} does not answer{where}, or {late}. Start them all, each with its "
            f"own --process I/N{_same(where)}; that address must be reachable from here."
        )
    # The others meet at the first process; without it they lose sight of each other.
    gone = end.lost or (0,)
    who = " and ".join(_named(each, count) for each in gone)
    verb = "are" if len(gone) > 1 else "is"
    tail = f" {advice}" if advice else ""
    if end.kind == "late":
        return (
            f"{who} {verb} not done {cluster.lost_after} s after the others; {cluster.name} stops."
            f"{tail}"
        )
    return f"{who} {verb} gone; {cluster.name} stops.{tail}"


def _same(where: str) -> str:
    return f" and the same --coordinator{where.replace(' at ', ' ')}" if where else ""
