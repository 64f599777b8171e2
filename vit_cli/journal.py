"""Results in a file: written row by row, so that an interrupted run can go on where it stopped.

Rows go to `FILE.partial`, one JSON object a line, whatever the file's own format; those of several
processes to `FILE.1-of-2.partial` and so on, one for each. What a process that died left unfinished
at its end is cut off when the run is resumed, by as many processes as there are then; the file
itself appears when every image is done.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vit_cli.partial import (
    PartialFile,
    batches,
    check_begin,
    check_output,
    check_run,
    claimed,
    json_line,
    made_of,
    parse_line,
    told,
    utf8,
)
from vit_common.errors import MissingFileError
from vit_common.files import delete_strays, replace_files

if TYPE_CHECKING:
    from vit_flax.inference import Prediction

SUFFIXES = (".jsonl", ".csv", ".parquet")
_COLUMNS = ("file", "rank", "label", "index", "probability", "error")
_ROWS_AT_ONCE = 10_000
_HINT = " (Of several processes on one run, each needs its own --process I/N.)"


class Journal:
    """The rows of one output file.

    Args:
        path: the file; its suffix is its format.
        resume: go on with what an earlier run left.
        force: begin anew, and overwrite.
        run: what the rows are made with; a run with another cannot be resumed with this.
        part: (i, n) where n processes write, each its own rows, and this is the i-th from 0. The
            first begins before the others, and calls `finish` for all of them.

    Attributes:
        done: images that have a row, of whichever process.
        failed: how many of these rows, from earlier runs, hold an error.

    Raises:
        InputError: no such format, or parquet without pyarrow; or an earlier run was another.
        ExistingFileError: the file is there already, or a part of it without `resume` or `force`.
        MissingFileError: it cannot be written, or another process is writing it.
    """

    def __init__(
        self,
        path: str,
        *,
        resume: bool = False,
        force: bool = False,
        run: dict[str, Any] | None = None,
        part: tuple[int, int] | None = None,
    ) -> None:
        self._run = run or {}
        self.failed = 0
        self.path = Path(path)
        self._partial = _partial(path, part)
        self.done: set[str] = set()
        first = part is None or part[0] == 0
        if first:
            check_output(path, SUFFIXES, ".jsonl")
        header = json_line({"run": self._run})
        self._file = PartialFile(self._partial, header=header, hint=_HINT)
        try:
            left = leftovers(path)
            others = [each for each in left if each != self._partial]
            if first:
                # Each run has one that looks at the files of all others after it has its own, so
                # that of two that begin at once one sees the other.
                with claimed(others, _HINT):
                    check_begin(path, left, resume=resume, force=force)
                    delete_strays(self.path)
                    if not resume:
                        for other in others:
                            with told(other, "deleted"):
                                other.unlink(missing_ok=True)
            end = self._recover(self._partial) if resume else 0
            self._file.cut(end if self.done else 0)
            if resume:
                for other in others:
                    self._recover(other)
        except BaseException:
            self._file.close()
            raise

    def _recover(self, partial: Path) -> int:
        """Read what is whole; returns the bytes that it takes."""
        end = 0
        with told(partial, "read"), open(partial, "rb") as stream:
            for line in stream:
                row = _parse(line)
                if row is None or (end == 0) != ("run" in row):
                    break
                if end == 0:
                    check_run(partial, row["run"], self._run, "rows")
                elif row["file"] not in self.done:
                    self.done.add(row["file"])
                    self.failed += "error" in row
                end += len(line)
        return end

    def write(self, file: str, predictions: Sequence[Prediction]) -> None:
        """The row of an image."""
        self._row(
            {
                "file": file,
                "predictions": [
                    {"label": p.label, "index": p.index, "probability": p.probability}
                    for p in predictions
                ],
            }
        )

    def fail(self, file: str, error: str) -> None:
        """The row of an image that could not be classified."""
        self._row({"file": file, "error": error})

    def _row(self, row: dict[str, Any]) -> None:
        if row["file"] in self.done:  # named twice, or by two folders
            return
        self.done.add(row["file"])
        self._file.write(json_line(row))

    def flush(self) -> None:
        """Hand the rows so far to the system; they survive the end of this process."""
        self._file.flush()

    def close(self) -> None:
        """Keep what there is for `resume`; nothing where there is nothing."""
        self._file.close()

    def end(self) -> None:
        """Hand the rows to the disk; what `finish` needs of every process but the first, which
        keep their files until it is done."""
        self._file.sync()

    def finish(self, files: Iterable[str] = ()) -> None:
        """Make the file of the rows.

        Args:
            files: images in the order that the rows of several processes are to have.

        Raises:
            MissingFileError: it cannot be written, or one of the images has no row; the rows are
                kept.
        """
        self._order = list(dict.fromkeys(files))
        self._parts = leftovers(self.path)
        ways = {".jsonl": self._jsonl, ".csv": self._csv, ".parquet": self._parquet}
        write: Callable[[BinaryIO], object] = ways[self.path.suffix.lower()]
        try:
            self._file.sync()
            with made_of(self._partial):
                replace_files(self.path.parent, {self.path.name: write})
            for part in self._parts:
                if part != self._partial:
                    with told(part, "deleted"):
                        part.unlink(missing_ok=True)
            self._file.discard()  # the last: until then it keeps other runs out
        finally:
            self.close()

    def _lines(self) -> Iterator[bytes]:
        """The rows as they were written: those of one process in their order, those of several in
        the order of the files."""
        if self._parts == [self._partial]:
            with open(self._partial, "rb") as stream:
                next(stream, None)  # what the run was
                yield from stream
            return
        where: dict[str, tuple[int, int, int]] = {}
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(open(part, "rb")) for part in self._parts]
            for number, stream in enumerate(streams):
                position = 0
                for line in stream:
                    row = _parse(line)
                    if row is None:
                        break
                    if "file" in row:
                        where.setdefault(row["file"], (number, position, len(line)))
                    position += len(line)
            absent = [file for file in self._order if file not in where]
            if absent:
                raise MissingFileError(
                    f"{self.path}: {len(absent)} of {len(self._order)} images have no row, the "
                    f"first is {absent[0]}: the processes did not find the same images."
                )
            for file in dict.fromkeys((*self._order, *where)):
                number, position, length = where[file]
                streams[number].seek(position)
                yield streams[number].read(length)

    def _rows(self) -> Iterator[dict[str, Any]]:
        """One row a class, or one with an error an image."""
        for line in self._lines():
            row = json.loads(line)
            if "error" in row:
                yield {"file": row["file"], "error": row["error"]}
            for rank, each in enumerate(row.get("predictions", ())):
                yield {"file": row["file"], "rank": rank, **each}

    def _jsonl(self, stream: BinaryIO) -> None:
        for line in self._lines():
            stream.write(line)

    def _csv(self, stream: BinaryIO) -> None:
        # A name may hold bytes that are no text; they come out as they were.
        text = io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="")
        writer = csv.DictWriter(text, _COLUMNS, restval="")
        writer.writeheader()
        for row in self._rows():
            writer.writerow({n: utf8(v) if n in ("label", "error") else v for n, v in row.items()})
        text.flush()
        text.detach()

    def _parquet(self, stream: BinaryIO) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema(
            [
                ("file", pa.string()),
                ("rank", pa.int32()),
                ("label", pa.string()),
                ("index", pa.int32()),
                ("probability", pa.float32()),
                ("error", pa.string()),
            ]
        )
        with pq.ParquetWriter(stream, schema) as writer:
            for batch in batches(self._rows(), _ROWS_AT_ONCE):
                rows = [
                    {n: utf8(v) if isinstance(v, str) else v for n, v in row.items()}
                    for row in batch
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def check_free(path: str, part: tuple[int, int]) -> None:
    """See that no other process writes the rows of this one.

    Raises:
        MissingFileError: one does.
    """
    with claimed([_partial(path, part)], _HINT):
        pass


def _partial(path: str, part: tuple[int, int] | None) -> Path:
    name = "partial" if part is None else f"{part[0] + 1}-of-{part[1]}.partial"
    return Path(f"{path}.{name}")


def leftovers(path: str | Path) -> list[Path]:
    """The files of rows of an output that is not whole yet, of one process or of several."""
    path = Path(path)
    pattern = re.compile(re.escape(path.name) + r"(\.[1-9]\d*-of-[1-9]\d*)?\.partial")
    try:
        names = os.listdir(path.parent)
    except OSError:
        return []
    return [path.with_name(name) for name in sorted(names) if pattern.fullmatch(name)]


def _parse(line: bytes) -> dict[str, Any] | None:
    """A whole row, or None."""
    row = parse_line(line)
    if row is None:
        return None
    whole = isinstance(row.get("file"), str) and ("error" in row or "predictions" in row)
    return row if whole or isinstance(row.get("run"), dict) else None
