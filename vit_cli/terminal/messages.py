"""What is said on standard error: single lines that begin with `vit:`."""

from __future__ import annotations

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


def counted(images: int) -> str:
    """The number, with its noun."""
    return "1 image" if images == 1 else f"{images} images"


def say(kind: str, text: str = "") -> None:
    """Write `vit: kind: text` to standard error, on one line; names in it stay as they are."""
    sys.stderr.write(f"vit: {kind}: {printable(text)}\n" if text else f"vit: {printable(kind)}\n")
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
    say("warning", one_line(str(message)))
