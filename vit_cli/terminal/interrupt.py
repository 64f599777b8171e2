"""What Ctrl-C does: end the command at once, or, where there are results, after they are out."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from vit_cli.terminal.exit_codes import INTERRUPTED


@contextmanager
def exits_at_once() -> Iterator[None]:
    """Ctrl-C ends the process, with a line to say so.

    Extension modules that are being imported turn a `KeyboardInterrupt` into an `ImportError` and
    a traceback, and the command spends its first seconds on little else.
    """
    with _handled(_exit):
        yield


@contextmanager
def raises() -> Iterator[Callable[[], bool]]:
    """Ctrl-C raises `KeyboardInterrupt`, as usual in Python; so does being asked to end.

    Python drops an exception that is raised in a callback of its garbage collector, where JAX has
    one; so the loop asks what this gives, too: whether there was a signal.
    """
    asked: list[int] = []

    def note(number: int, _: object) -> NoReturn:
        asked.append(number)
        raise KeyboardInterrupt

    with _handled(note), _handled(note, signal.SIGTERM):
        yield lambda: bool(asked)


@contextmanager
def exits_after(leave: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C, or being asked to end, ends the process after a call; a second one ends it at once.

    Args:
        leave: what is left to do; should it fail, the process ends all the same.
    """

    def handler(*_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _exit)
        try:
            leave()
        finally:
            _exit()

    with _handled(handler), _handled(handler, signal.SIGTERM):
        yield


@contextmanager
def asks(say: Callable[[], object]) -> Iterator[Callable[[], bool]]:
    """Ctrl-C, or being asked to end, is noted for the work to ask for when it can stop; a second
    Ctrl-C ends the process at once.

    Args:
        say: called at the first signal.

    Yields:
        Whether there was a signal.
    """
    asked: list[int] = []

    def note(number: int, _: object) -> None:
        if number == signal.SIGINT and asked:
            _exit()
        asked.append(number)
        if len(asked) == 1:
            say()

    with _handled(note), _handled(note, signal.SIGTERM):
        yield lambda: bool(asked)


def _exit(*_: object) -> NoReturn:
    os.write(2, b"vit: interrupted\n")
    os._exit(INTERRUPTED)


@contextmanager
def _handled(handler: Callable[..., Any], number: signal.Signals = signal.SIGINT) -> Iterator[None]:
    # Left alone in a thread, which cannot set it, and where a parent wants it ignored (nohup).
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(number) in (signal.SIG_IGN, None):
        yield
        return
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)
