"""A command that runs on several hosts: what `vit_flax.distributed` finds out becomes lines on the
terminal and exit codes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import Any

from vit_cli.runs.partial import KEPT
from vit_cli.terminal import interrupt
from vit_cli.terminal.exit_codes import COULD_NOT_RUN
from vit_cli.terminal.messages import say
from vit_common.files.texts import reason
from vit_flax.distributed import (
    INTERRUPTION,
    Cluster,
    Hosts,
    can_fork,
    explain,
    run_in_child,
)

__all__ = ["INTERRUPTION", "Cluster", "Hosts", "join", "supervised"]


def join(cluster: Cluster, settings: Mapping[str, Any], advice: str = KEPT) -> Hosts:
    """Meet the other processes of a run.

    Args:
        cluster: the processes.
        settings: options that all of them must have been started with.
        advice: what a user can do when another process stops.

    Raises:
        HostError: they did not come together.
        InputError: JAX knows of no cluster, or this process has other settings than the first.
        DeviceError: there is no device to run on.
    """
    hosts = Hosts(cluster, advice)
    from vit_cli.runtime import find_devices

    try:
        with interrupt.exits_after(lambda: hosts.leave(INTERRUPTION)):
            find_devices()  # all processes together; JAX waits for each of them here
            hosts.agree(settings)
    except BaseException as error:
        hosts.leave(reason(error))
        raise
    return hosts


def supervised(cluster: Cluster, run: Callable[[], int], advice: str = KEPT) -> int:
    """Do the work in a child process, and wait for it.

    Args:
        cluster: the processes of the run.
        run: the work of this one.
        advice: what a user can do when a process stops.

    Returns:
        The child's exit code, or `COULD_NOT_RUN`, with a line that says why, where the runtime
        ended it.
    """
    if not can_fork():
        return run()

    def work() -> int:
        from vit_cli.terminal.guard import guarded

        return guarded(run)

    ended = run_in_child(work)
    if ended.last_words:
        say("error", explain(ended.last_words, cluster, advice))
        return COULD_NOT_RUN
    if ended.code < 0:
        name = signal.Signals(-ended.code).name
        say("error", f"{cluster.name} was ended by {name}. {advice}")
        return 128 - ended.code
    return ended.code
