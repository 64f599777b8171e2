"""One run on several hosts: JAX's distributed runtime finds the processes and watches over them.

The runtime ends a process with SIGABRT and a dump of its stack where another is gone. So the work
is done in a child process, and this one says in a line what the dump means.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vit_cli.runs.partial import KEPT, differences
from vit_cli.terminal import interrupt
from vit_cli.terminal.exit_codes import COULD_NOT_RUN
from vit_cli.terminal.messages import say
from vit_common.errors import HostError, InputError
from vit_common.files.texts import reason

_SECONDS = 1.0  # between looks at the others
INTERRUPTION = "it was interrupted."
_FATAL = re.compile(rb"F\d{4} \d\d:\d\d:\d\d\.\d+ ")  # as absl's log begins its last words


@dataclass(frozen=True)
class Cluster:
    """Who takes part in a run.

    Attributes:
        coordinator: "host:port" of the first process, where the others meet it; None where JAX
            knows the cluster (TPU pods, Slurm, Open MPI).
        process: (i, n): this is the i-th of n processes, from 0; None as for `coordinator`.
        start_timeout: seconds to wait for the others at the start.
        lost_after: seconds after which a process that is not heard of counts as gone.
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
    """The processes of a run, once all of them are there.

    Args:
        cluster: who they are.
        run: what all of them must have been started with.

    Raises:
        HostError: they did not come together.
        InputError: JAX knows of no cluster; another process was started otherwise.
    """

    def __init__(self, cluster: Cluster, run: dict[str, Any]) -> None:
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
                "JAX finds no cluster here; name the first process with --coordinator HOST:PORT, "
                f"and this one with --process I/N ({reason(error)})."
            ) from error
        except RuntimeError as error:
            raise HostError(
                f"{cluster.name}: the others cannot be met ({reason(error)})."
            ) from error
        from jax._src import distributed  # the runtime's own client has no public name

        from vit_cli.runtime import find_devices

        self._client: Any = distributed.global_state.client
        self._looked = time.monotonic()
        try:
            with interrupt.exits_after(self.leave_interrupted):
                find_devices()  # all processes together; JAX waits for each of them here
                self.index, self.count = jax.process_index(), jax.process_count()
                self._agree(run)
        except BaseException as error:
            self.leave(reason(error))
            raise

    def _agree(self, run: dict[str, Any]) -> None:
        """Raise InputError unless all processes do the same."""
        text = json.dumps(run)
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
        """Let the others know."""
        self._client.key_value_set(f"vit/{key}", value, allow_overwrite=True)

    def told(self, key: str) -> dict[str, str]:
        """What was told under keys that begin so, by the rest of the key."""
        found = self._client.key_value_dir_get(f"vit/{key}/")
        return {name.rpartition("/")[2]: value for name, value in found}

    def wait(self, key: str) -> str:
        """What is told under a key, once it is.

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

    def check(self, *, now: bool = False) -> None:
        """See that no other process stopped; now, or if that is a second ago.

        Raises:
            HostError: one did. One that is gone without a word JAX finds out.
        """
        if not now and time.monotonic() - self._looked < _SECONDS:
            return
        self._looked = time.monotonic()
        for index, why in self.told("left").items():
            if int(index) != self.index:
                raise HostError(f"{_named(int(index), self.count)} stopped: {why} {KEPT}")

    def leave(self, why: str | None = None) -> None:
        """Part from the others; with a reason, if not all is done, and then they stop too.

        Each waits for the rest here, but not for one that is gone.
        """
        import jax

        with contextlib.suppress(Exception):
            if why is not None:
                self.tell(f"left/{jax.process_index()}", why)
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()

    def leave_interrupted(self) -> None:
        """Part from the others after a Ctrl-C."""
        self.leave(INTERRUPTION)


# -- the process that watches


def supervised(cluster: Cluster, run: Callable[[], int]) -> int:
    """Do the work in a child process, and wait for it.

    Returns:
        The child's exit code, or `COULD_NOT_RUN`, with a line that says why, where the runtime
        ended it.
    """
    if not hasattr(os, "fork") or "jax" in sys.modules or threading.active_count() > 1:
        return run()
    sys.stdout.flush()
    sys.stderr.flush()
    alive_read, alive_write = os.pipe()
    said_read, said_write = os.pipe()
    child = os.fork()
    if child == 0:
        code = COULD_NOT_RUN
        try:
            os.close(alive_write)
            os.close(said_read)
            os.setpgid(0, 0)  # a Ctrl-C comes once, from the parent
            os.dup2(said_write, 2)
            os.close(said_write)
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
            threading.Thread(target=_end_with_parent, args=(alive_read,), daemon=True).start()
            from vit_cli.terminal.guard import guarded

            code = guarded(run)
            sys.stderr.flush()
        finally:
            os._exit(code)  # whoever called has a process of his own
    os.close(alive_read)
    os.close(said_write)

    def forward(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    ignored = (signal.SIG_IGN, None)
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) not in ignored]
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        last_words = _relay(said_read)
        _, status = os.waitpid(child, 0)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(alive_write)
        os.close(said_read)
    code = os.waitstatus_to_exitcode(status)
    if last_words:
        say("error", _meaning(last_words, cluster))
        return COULD_NOT_RUN
    if code < 0:
        say("error", f"{cluster.name} was ended by {signal.Signals(-code).name}. {KEPT}")
        return 128 - code
    return code


def _end_with_parent(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    os._exit(COULD_NOT_RUN)


def _relay(descriptor: int) -> str:
    """Hand on what the child says, up to the runtime's last words, which are returned."""
    last_words: list[bytes] = []
    everything = bool(os.environ.get("VIT_DEBUG"))
    with open(descriptor, "rb", buffering=0, closefd=False) as raw:
        rest = b""
        while chunk := raw.read(65536):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if last_words or _FATAL.match(line):
                    last_words.append(line)
                if everything or not last_words:
                    os.write(2, line + b"\n")
        if rest and not last_words:
            os.write(2, rest)
    return b"\n".join(last_words).decode("utf-8", "replace")


def _meaning(last_words: str, cluster: Cluster) -> str:
    """What the runtime's last words mean."""
    index, count = cluster.process or (None, "all")
    where = "" if cluster.coordinator is None else f" at {cluster.coordinator}"
    if "incarnation" in last_words:
        return (
            f"another process came as {cluster.name}, or as one that is there; each needs its own "
            "--process I/N."
        )
    if "RegisterTask" in last_words:
        late = f"not all {count} processes came within {cluster.start_timeout} s"
        if index == 0:
            return f"{late}. Start them all, each with its own --process I/N{_same(where)}."
        return (
            f"{_named(0, count)} does not answer{where}, or {late}. Start them all, each with its "
            f"own --process I/N{_same(where)}; that address must be reachable from here."
        )
    gone = [0]  # whom the others meet; without it they lose sight of each other
    told = re.search(r"tasks are unhealthy.*\n((?:.*\d\n)+)", last_words)
    if told:
        gone = sorted({int(line.rpartition(":")[2]) for line in told[1].split()})
    who = " and ".join(_named(each, count) for each in gone)
    verb = "are" if len(gone) > 1 else "is"
    return f"{who} {verb} gone; {cluster.name} stops. {KEPT}"


def _same(where: str) -> str:
    return f" and the same --coordinator{where.replace(' at ', ' ')}" if where else ""
