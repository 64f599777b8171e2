"""The progress bar: on standard error, where that is a terminal and there is enough to do."""

from __future__ import annotations

import importlib.util
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vit_cli.terminal.messages import is_quiet, say, tidy

FEW = 8
"""Images up to which there is no bar."""


class Progress:
    """A bar to enter and leave; where none is shown, every method does nothing but its work.

    While it is shown, lines on standard error go above it, warnings included.

    Args:
        total: images to come; None where `reach` says it.
        show: whether a bar may be shown at all; none is without rich.
        what: is being done.
        few: up to so many there is no bar.
        in_bytes: it counts bytes, not images.
        detailed: room is left for what `describe` is given.
    """

    def __init__(
        self,
        total: int | None = None,
        *,
        show: bool = True,
        what: str = "classifying",
        few: int = FEW,
        in_bytes: bool = False,
        detailed: bool = False,
    ) -> None:
        self._bar: Any = None
        self._lock = threading.RLock()
        self._kept: Any = None
        self._show = show and not is_quiet() and sys.stderr.isatty()
        self._show = self._show and importlib.util.find_spec("rich") is not None
        self._what, self._few, self._in_bytes = what, few, in_bytes
        self._detailed = detailed
        if total is not None:
            self._make(total)

    def _make(self, total: int) -> None:
        if not self._show or total <= self._few:
            return
        from rich import progress
        from rich.console import Console

        console = Console(file=sys.stderr)
        if not console.is_interactive:  # a dumb terminal, or the environment says no
            self._show = False
            return
        more = [progress.TextColumn("{task.fields[detail]}")] if self._detailed else []
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=20 if self._detailed else 40),
            progress.DownloadColumn() if self._in_bytes else progress.MofNCompleteColumn(),
            *more,
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task(self._what, total=total, detail="")

    def __enter__(self) -> Progress:
        self._kept = warnings.showwarning
        self._start()
        return self

    def _start(self) -> None:
        if self._bar is not None:
            warnings.showwarning = lambda message, *_: self.say("warning", tidy(str(message)))
            self._bar.start()

    def __exit__(self, *_: object) -> None:
        warnings.showwarning = self._kept
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """So many more are done."""
        self._update(advance=count)

    @property
    def shown(self) -> bool:
        """Whether there is a bar."""
        return self._bar is not None

    def describe(self, detail: str, what: str | None = None) -> None:
        """Show a text beside the numbers, and what is being done now."""
        self._update(detail=detail, description=what or self._what)

    def reach(self, done: int, total: int) -> None:
        """So many are done, of so many."""
        if self._bar is None and self._show:
            self._make(total)
            self._start()
        self._update(completed=done)

    def _update(self, **counts: Any) -> None:
        if self._bar is not None:
            with self._lock:
                self._bar.update(self._task, **counts, refresh=True)

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
