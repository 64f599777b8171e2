"""How predictions are printed: a table on a terminal, aligned text in a pipe, or JSON lines."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from vit_cli.terminal.messages import one_line, printable, say

if TYPE_CHECKING:
    from vit_common.errors import ViTError
    from vit_flax.inference import Prediction

_FILE, _PROBABILITY, _LABEL = "file", "probability", "label"


def print_titled(rows: Iterable[tuple[str, str]], width: int) -> None:
    """Print titles and texts in two columns. On a terminal long texts go on in the next line, and
    break between words; elsewhere each is one line.

    Args:
        rows: titles and texts; two empty ones make an empty line.
        width: of the titles.
    """
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for title, text in rows:
        line = f"{title:{width}}  {one_line(text)}".rstrip()
        if room > width + 20 and len(line) > room:
            line = textwrap.fill(
                line,
                room,
                subsequent_indent=" " * (width + 2),
                drop_whitespace=True,
                break_long_words=False,
                break_on_hyphens=False,
            )
        print(line)


class Writer(Protocol):
    """Where results go; what is written may be held back until `flush`.

    What `write` returns is why a result cannot be held, if so.
    """

    def write(self, file: str, value: Any, /) -> ViTError | None: ...
    def flush(self) -> None: ...


def as_row(file: str, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """What is known of an image, as JSON has it."""
    return {
        "file": file,
        "predictions": [
            {"label": p.label, "index": p.index, "probability": p.probability} for p in predictions
        ],
    }


class JsonLines:
    """One JSON object a line, for each image; ASCII, whatever the names and labels hold."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, file: str, predictions: Sequence[Prediction]) -> None:
        self._stream.write(json.dumps(as_row(file, predictions)) + "\n")

    def flush(self) -> None:
        self._stream.flush()


class PlainText:
    """One line a class: file, probability, label. Nothing is cut off, so lines may be long.

    Args:
        stream: where to.
        files: names of all the files there may be, for the width of their column.
    """

    def __init__(self, stream: TextIO, files: Iterable[str]) -> None:
        self._stream = stream
        self._width = max((_cells(printable(file)) for file in files), default=0)

    def write(self, file: str, predictions: Sequence[Prediction]) -> None:
        name = printable(file)
        name += " " * (self._width - _cells(name))
        for each in predictions:
            self._stream.write(f"{name}  {each.probability:.4f}  {one_line(each.label)}\n")

    def flush(self) -> None:
        self._stream.flush()


def _cells(text: str) -> int:
    """Columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


class Table:
    """A table as wide as the terminal at most; long names go on in the next line.

    Column widths are fixed from the start, so that results can be printed as they come.

    Args:
        stream: the terminal.
        files: names of all the files there may be.
        labels: all the labels there may be.
    """

    def __init__(self, stream: TextIO, files: Iterable[str], labels: Iterable[str]) -> None:
        from rich.console import Console

        self._console = Console(file=stream, highlight=False)
        total = self._console.width - len(_PROBABILITY) - 2 * 2
        label = max((_cells(one_line(each)) for each in labels), default=0)
        file = max((_cells(printable(each)) for each in files), default=0)
        file, label = max(file, len(_FILE)), max(label, len(_LABEL))
        if file + label > total:
            # Each may have half; what one leaves of it is the other's.
            file = max(min(file, max(total // 2, total - label)), len(_FILE))
            label = max(min(label, total - file), len(_LABEL))
        self._widths = (file, len(_PROBABILITY), label)
        self._results: list[tuple[str, Sequence[Prediction]]] = []
        self._started = False

    def write(self, file: str, predictions: Sequence[Prediction]) -> None:
        self._results.append((file, predictions))

    def flush(self) -> None:
        from rich.text import Text

        file_width, *widths = self._widths
        for file, predictions in self._results:
            classes = self._columns(widths)
            for rank, each in enumerate(predictions):
                style = "" if rank else "bold"
                label = Text(one_line(each.label), style=style)
                classes.add_row(Text(f"{each.probability:.4f}", style=style), label)
            image = self._columns([file_width, sum(widths) + 2])
            image.add_row(Text(printable(file)), classes)
            if not self._started:
                header = self._columns(self._widths)
                header.add_row(_FILE, _PROBABILITY, _LABEL, style="dim")
                self._console.print(header)
                self._started = True
            self._console.print(image)
        self._results.clear()
        self._console.file.flush()

    @staticmethod
    def _columns(widths: Iterable[int]) -> Any:
        from rich.table import Table as RichTable

        table = RichTable.grid(padding=(0, 2, 0, 0))
        for width in widths:
            table.add_column(width=width, overflow="fold")
        return table


def printer_of(as_json: bool, files: Iterable[str], labels: Iterable[object]) -> Writer:
    """How predictions go to standard output; says so where a table would need rich.

    Args:
        as_json: one JSON object per image.
        files: names of all the files there may be.
        labels: all the labels there may be.
    """
    rich = importlib.util.find_spec("rich") is not None
    if not rich and sys.stdout.isatty():
        say("warning", "tables and progress bars need rich; run: pip install rich")
    if as_json:
        return JsonLines(sys.stdout)
    if rich and sys.stdout.isatty():
        return Table(sys.stdout, files, map(str, labels))
    return PlainText(sys.stdout, files)
