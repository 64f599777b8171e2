"""What XLA and JAX's distributed runtime say when something fails. Neither promises its wording, so
every pattern stands here, and tests/test_last_words.py holds what each version really said.

Nothing is imported: the process that watches over another reads these lines without JAX.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

# How absl's log begins a fatal entry: severity, month and day, time.
_FATAL = re.compile(rb"F\d{4} \d\d:\d\d:\d\d\.\d+ ")
_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|\bout of memory\b", re.IGNORECASE)
_UNHEALTHY = re.compile(r"tasks are unhealthy.*\n((?:.*\d\n)+)")
_LATE = re.compile(r"timed out task names:\n((?:.*\d\n)+)")


class Ending(NamedTuple):
    """Why the distributed runtime ended a process.

    Attributes:
        kind: "duplicate": another process has the same number; "start": the processes did not all
            come in time; "lost": a process that was there is gone; "late": a process was not
            done when the others were.
        lost: numbers of the processes that are gone or late, from 0; empty if the runtime names
            none.
    """

    kind: Literal["duplicate", "start", "lost", "late"]
    lost: tuple[int, ...] = ()


def is_fatal(line: bytes) -> bool:
    """Whether a line of standard error begins the message with which a process is aborted."""
    return _FATAL.match(line) is not None


def ending(text: str) -> Ending:
    """What the fatal message of the distributed runtime means.

    Args:
        text: from the line for which `is_fatal` holds to the end.
    """
    if "incarnation" in text:
        return Ending("duplicate")
    if "RegisterTask" in text:
        return Ending("start")
    late = _LATE.search(text)
    if late:
        return Ending("late", _numbers(late[1]))
    unhealthy = _UNHEALTHY.search(text)
    return Ending("lost", _numbers(unhealthy[1]) if unhealthy else ())


def _numbers(lines: str) -> tuple[int, ...]:
    """Of lines such as "3" or "/job:jax_worker/replica:0/task:3"."""
    return tuple(sorted({int(line.rpartition(":")[2]) for line in lines.split()}))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host ran out of memory, while compiling or running."""
    return isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


def first_line(error: BaseException) -> str:
    """The first line of a compiler's message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason")
