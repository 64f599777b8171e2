"""Runs what README.md and docs/ show, and compares what comes out with what they say comes out.

A page is run from top to bottom, in a folder of its own that looks like a clone of this repository
with a few photographs beside it. In a page

- ```` ```console ````: each line that begins with `$ ` is run; the lines below are its output, as
  on a terminal;
- ```` ```python ````: is run, each page in one namespace; a `print(...)  # x` must print `x`;
- ```` ```text ```` right after one of python is what that printed;
- `<!-- online -->` before a block: it needs the Hub, and is not run here;
- `<!-- not run: why -->` before a block: it is not run.

In expected output `...` stands for anything, and numbers may differ in their fourth digit.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_FENCE = re.compile(
    r"^(?:<!--(?P<mark>[^\n]*?)-->\n\s*)?"
    r"(?P<indent>[ \t]*)```(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
_SHELL = re.compile(r"[|><;&*`$]")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its kind, its text, its line, and why it is not run, if so."""

    kind: str
    text: str
    line: int
    skipped: str | None


def pages() -> list[Path]:
    """README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    source = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(source):
        mark = (match["mark"] or "").strip()
        skipped = mark if mark == "online" or mark.startswith("not run:") else None
        indent = match["indent"]
        text = "".join(line.removeprefix(indent) for line in match["text"].splitlines(True))
        line = source.count("\n", 0, match.start("kind")) + 1
        found.append(Block(match["kind"], text, line, skipped))
    return found


def commands(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with the output it is said to have."""
    command, expected = "", ""
    for line in text.splitlines(True):
        if line.startswith("$ "):
            if command:
                yield command, expected
            command, expected = line[2:].rstrip("\n"), ""
        elif command.endswith("\\"):
            command = command[:-1] + line.strip()
        else:
            expected += line
    if command:
        yield command, expected


def without_comment(command: str) -> str:
    """A command without the remark that a page may put behind it."""
    return re.split(r"\s{2,}# ", command, maxsplit=1)[0].strip()


def agrees(expected: str, given: str) -> bool:
    """Whether an output is the one a page shows; see the top of this file."""
    return _agree([*_lines(expected)], [*_lines(given)])


def _lines(text: str) -> Iterator[str]:
    return (line.strip() for line in text.strip().splitlines() if line.strip())


def _agree(expected: list[str], given: list[str]) -> bool:
    if not expected:
        return not given
    if expected[0] == "...":
        return any(_agree(expected[1:], given[n:]) for n in range(len(given) + 1))
    if not given or not _same_line(expected[0], given[0]):
        return False
    return _agree(expected[1:], given[1:])


_WORD = re.compile(r"[-+]?\d+\.\d+(?:e[-+]?\d+)?|\S+?(?=[-+]?\d+\.\d+)|\S+")


def _same_line(expected: str, given: str) -> bool:
    if "..." in expected:
        parts = [re.escape(part.strip()) for part in expected.split("...")]
        pattern = r".*".join(re.sub(r"(\\ )+", r"\\s+", part) for part in parts)
        return re.fullmatch(pattern, given) is not None or _same_words(expected, given)
    return _same_words(expected, given)


def _same_words(expected: str, given: str) -> bool:
    ours, theirs = _WORD.findall(expected), _WORD.findall(given)
    return len(ours) == len(theirs) and all(map(_same_word, ours, theirs))


def _same_word(expected: str, given: str) -> bool:
    if expected == given or expected == "...":
        return True
    try:
        a, b = float(expected), float(given)
    except ValueError:
        return False
    return abs(a - b) <= 2e-3 * max(abs(a), abs(b))


class Reader:
    """Somebody who reads a page and does what it shows.

    Args:
        folder: where they work.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, object] = {"__name__": "__page__"}
        self.printed = ""
        for name in ("vit_common", "examples", "benchmarks", "tests", "README.md", "docs"):
            (folder / name).symlink_to(ROOT / name)
        _photographs(folder)

    def faults(self, page: Path) -> Iterator[str]:
        """What a page shows that is not so."""
        for block in blocks(page):
            if block.skipped:
                continue
            place = f"{page.relative_to(ROOT)}:{block.line}"
            if block.kind == "console":
                for command, expected in commands(block.text):
                    given = self.run(without_comment(command))
                    if expected.strip() and not agrees(expected, given):
                        yield _differs(f"{place}: $ {command}", expected, given)
                    elif not expected.strip() and "Traceback" in given:
                        yield f"{place}: $ {command}\n{given}"
            elif block.kind == "python":
                expected = "\n".join(re.findall(r"^print\(.*\)  # (.+)$", block.text, re.M))
                self.printed, failed = self.execute(block.text)
                if failed:
                    yield f"{place}:\n{failed}"
                elif expected and not agrees(expected, self.printed):
                    yield _differs(place, expected, self.printed)
            elif block.kind == "text" and self.printed:
                if not agrees(block.text, self.printed):
                    yield _differs(place, block.text, self.printed)
                self.printed = ""

    def execute(self, text: str) -> tuple[str, str]:
        """Run Python; what it prints, and the end of its traceback if it fails."""
        output = io.StringIO()
        try:
            with (
                contextlib.chdir(self.folder),
                contextlib.redirect_stdout(output),
                warnings.catch_warnings(),
                pytest.MonkeyPatch.context() as patch,
            ):
                patch.syspath_prepend(self.folder)
                warnings.simplefilter("ignore", UserWarning)  # readers see them, and read on
                # Not with this file's own `from __future__` imports.
                exec(compile(text, "<page>", "exec", dont_inherit=True), self.names)
        except BaseException:
            return output.getvalue(), "".join(traceback.format_exc().splitlines(True)[-6:])
        return output.getvalue(), ""

    def run(self, command: str) -> str:
        """Run a command as a shell would; what it writes to standard output and error."""
        if command.startswith("vit ") and not _SHELL.search(command):
            return self._run_here(shlex.split(command)[1:])
        environment = {
            **os.environ,
            "PATH": f"{self._bin()}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "120",
        }
        ran = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return ran.stdout

    def _bin(self) -> Path:
        """A folder with the commands `vit`, `python` and `pip` of this interpreter."""
        place = self.folder.parent / f"{self.folder.name}-bin"
        if not place.exists():
            place.mkdir()
            for name, module in (("vit", "-m vit_cli"), ("python", "")):
                (place / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
                (place / name).chmod(0o755)
        return place

    def _run_here(self, arguments: list[str]) -> str:
        # In this process: a page of twenty commands would start JAX twenty times.
        from vit_cli.main import main

        output = _Terminal()
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(_Beside(output)),
            contextlib.suppress(SystemExit),
            pytest.MonkeyPatch.context() as patch,
        ):
            # A wide terminal without colours: no line goes on in the next one.
            for name, value in {"TERM": "dumb", "COLUMNS": "1000", "LINES": "50"}.items():
                patch.setenv(name, value)
            main(arguments)
        return output.getvalue()


class _Terminal(io.StringIO):
    """What a reader sees: commands write there as to a terminal."""

    def isatty(self) -> bool:
        return True


class _Beside(io.TextIOBase):
    """Standard error, to the same place; progress bars are not shown there."""

    def __init__(self, place: io.StringIO) -> None:
        self._place = place

    def write(self, text: str) -> int:
        return self._place.write(text)


def _differs(place: str, expected: str, given: str) -> str:
    return f"{place}\n--- the page says\n{expected.rstrip()}\n--- it is\n{given.rstrip()}"


def _photographs(folder: Path) -> None:
    """cat.jpg, dog.jpg and photos/ with a few photographs, from scikit-image."""
    import PIL.Image
    from skimage import data

    (folder / "photos" / "birds").mkdir(parents=True)
    cat, other = PIL.Image.fromarray(data.chelsea()), PIL.Image.fromarray(data.astronaut())
    cat.save(folder / "cat.jpg")
    cat.save(folder / "photos" / "cat.jpg")
    other.save(folder / "photos" / "astronaut.jpg")
    PIL.Image.fromarray(data.coffee()).save(folder / "photos" / "birds" / "coffee.png")
