"""The progress bar: on standard error, where that is a terminal and there is enough to do."""

from __future__ import annotations

import importlib.util
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vit_cli.terminal.messages import one_line, say

FEW = 8
"""Images up to which there is no bar."""


class Progress:
    """A bar to enter and leave; where none is shown, every method does nothing but its work.

    While it is shown, lines on standard error go above it, warnings included.

    Args:
        total: images to come.
        show: whether a bar may be shown at all; none is without rich.
        what: is being done.
    """

    def __init__(self, total: int, *, show: bool = True, what: str = "classifying") -> None:
        self._bar: Any = None
        self._lock = threading.RLock()
        self._kept: Any = None
        show = show and total > FEW and sys.stderr.isatty()
        if show and importlib.util.find_spec("rich") is not None:
            from rich import progress
            from rich.console import Console

            console = Console(file=sys.stderr)
            if not console.is_interactive:  # a dumb terminal, or the environment says no
                return
            self._bar = progress.Progress(
                progress.TextColumn(what),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                console=console,
                transient=True,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Progress:
        self._kept = warnings.showwarning
        if self._bar is not None:
            warnings.showwarning = lambda message, *_: self.say("warning", one_line(str(message)))
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        warnings.showwarning = self._kept
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """So many images more are done."""
        if self._bar is not None:
            with self._lock:
                self._bar.update(self._task, advance=count, refresh=True)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Take the bar away while something else is written to the terminal."""
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
            yield
            if self._bar is not None:
                self._bar.start()

    def say(self, kind: str, text: str) -> None:
        """`messages.say`, above the bar."""
        with self.hidden():
            say(kind, text)
