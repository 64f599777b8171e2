"""What is said on standard error: lines that begin with `vit:`, and under an error that holds
several faults, one line for each of them."""

from __future__ import annotations

import re
import sys
from typing import TextIO


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
    Spaces in names stay as they are, and what is not printable is escaped."""
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
