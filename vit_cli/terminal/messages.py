"""What is said on standard error: lines that begin with `vit:`, and under an error that holds
several faults, one line for each of them."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import TextIO

_ALWAYS = ("warning", "error")  # kinds that --quiet leaves
_quiet = contextvars.ContextVar("quiet", default=False)


def is_quiet() -> bool:
    """Whether only warnings and errors are said, and no progress is shown."""
    return _quiet.get()


@contextlib.contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """Say only warnings and errors for as long as the block runs."""
    token = _quiet.set(quiet)
    try:
        yield
    finally:
        _quiet.reset(token)


def printable(text: str) -> str:
    """The text with everything that is not printable escaped.

    Names of files may hold line breaks, escape sequences of terminals, and bytes that are no
    text (surrogates, in Python).
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # stands for a byte that could not be decoded
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def one_line(text: str) -> str:
    """The text on one line, printable, with one space for any number of them."""
    return printable(" ".join(text.split()))


def parts(text: str) -> list[str]:
    """The lines of a text that lists faults ("2 faults:\\n- one;\\n- two.\\nNothing was written."),
    or the text alone where it lists none. A line break elsewhere is part of a name."""
    head, begins, rest = text.partition(":\n- ")
    if not begins:
        return [text]
    *faults, last = re.split(r";?\n- ", rest)
    last, *closing = last.split(".\n", 1)
    return [f"{head}:", *(f"- {fault}" for fault in (*faults, last)), *closing]


def counted(number: int, noun: str = "image") -> str:
    """The number, with its noun."""
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"


def tidy(text: str) -> str:
    """A text with one space for any number of them, and the faults of a list still apart."""
    several = len(parts(text)) > 1
    return re.sub(r"[^\S\n]+", " ", text) if several else " ".join(text.split())


def say(kind: str, text: str = "") -> None:
    """Write `vit: kind: text` to standard error, with each fault of several on a line of its own.
    Spaces in names stay as they are, and what is not printable is escaped. With --quiet, only
    warnings and errors are written."""
    if is_quiet() and not (text and kind in _ALWAYS):
        return
    first, *others = map(printable, parts(text or kind))
    start = f"vit: {kind}: " if text else "vit: "
    sys.stderr.write("".join([f"{start}{first}\n", *(f"  {line}\n" for line in others)]))
    sys.stderr.flush()


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """What `warnings.showwarning` is while the command runs."""
    say("warning", tidy(str(message)))


class _Said(logging.Handler):
    """Says what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.levelname.lower(), tidy(record.getMessage()))


@contextlib.contextmanager
def logged(name: str, least: str = "WARNING") -> Iterator[None]:
    """Say what a logger is given, of this level and above; with VIT_DEBUG set everything."""
    logger, handler = logging.getLogger(name), _Said()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if os.environ.get("VIT_DEBUG") else least)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
