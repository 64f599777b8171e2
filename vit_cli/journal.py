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

from vit_cli.partial import check_begin, check_output, lock, parse_line, utf8
from vit_common.errors import InputError, MissingFileError
from vit_common.files import reason, replace_files

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
        part: (i, n) where n processes write, each its own rows, and this is the i-th from 0. Then
            the first has called `prepare` for all of them, and calls `finish` for all of them.

    Attributes:
        done: images that have a row, of whichever process.
        failed: how many of these rows, from earlier runs, hold an error.

    Raises:
        InputError: no such format, or parquet without pyarrow.
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
        if part is None:
            prepare(path, resume=resume, force=force)
        self._run = run or {}
        self.failed = 0
        self.path = Path(path)
        self._partial = _partial(path, part)
        self.done: set[str] = set()
        self._own = 0
        try:
            # To append, whatever becomes of what is there: another process may be at it.
            self._stream: Any = open(self._partial, "ab")  # noqa: SIM115  # until `finish`
        except OSError as error:
            raise MissingFileError(
                f"{self._partial}: cannot be written ({reason(error)})."
            ) from error
        try:
            lock(self._stream, self._partial, _HINT)
            end = self._recover(self._partial) if resume else 0
            self._own = len(self.done)
            os.truncate(self._partial, end)
            for other in leftovers(path):
                if resume and other != self._partial:
                    self._recover(other)
            if not end:
                self._stream.write(json.dumps({"run": self._run}).encode() + b"\n")
                self._stream.flush()
        except BaseException as error:
            self._stream.close()
            if isinstance(error, OSError) and not isinstance(error, MissingFileError):
                raise MissingFileError(
                    f"{self._partial}: cannot be written ({reason(error)})."
                ) from error
            raise

    def _recover(self, partial: Path) -> int:
        """Read what is whole; returns the bytes that it takes."""
        end = 0
        try:
            with open(partial, "rb") as stream:
                for number, line in enumerate(stream):
                    row = _parse(line)
                    if row is None:
                        break
                    if number == 0:
                        self._check_run(row.get("run"))
                    elif row["file"] not in self.done:
                        self.done.add(row["file"])
                        self.failed += "error" in row
                    end += len(line)
        except OSError as error:
            raise MissingFileError(f"{partial}: cannot be read ({reason(error)}).") from error
        return end

    def _check_run(self, run: Any) -> None:
        """Raise InputError if the rows that are there were made otherwise."""
        odd = [
            f"{name} {run[name]!r}, now {value!r}"
            for name, value in self._run.items()
            if isinstance(run, dict) and run.get(name, value) != value
        ]
        if odd:
            raise InputError(
                f"{self._partial}: its rows were made with {'; '.join(odd)}. Run it as it was, or "
                "pass --force to begin anew."
            )

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
        self._own += 1
        self._stream.write(json.dumps(row).encode() + b"\n")

    def flush(self) -> None:
        """Hand the rows so far to the system; they survive the end of this process."""
        self._stream.flush()

    def close(self) -> None:
        """Keep what there is for `resume`; nothing where there is nothing."""
        self._stream.close()
        if not self._own:
            self._partial.unlink(missing_ok=True)

    def end(self) -> None:
        """Hand the rows to the disk; what `finish` needs of every process but the first."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def finish(self, files: Iterable[str] = ()) -> None:
        """Make the file of the rows.

        Args:
            files: images in the order that the rows of several processes are to have.

        Raises:
            MissingFileError: it cannot be written, or one of the images has no row; the rows are
                kept.
        """
        self.end()
        suffix = self.path.suffix.lower()
        self._order = list(dict.fromkeys(files))
        self._parts = leftovers(self.path)
        try:
            ways = {".jsonl": self._jsonl, ".csv": self._csv, ".parquet": self._parquet}
            write: Callable[[BinaryIO], object] = ways[suffix]
            replace_files(self.path.parent, {self.path.name: write})
            for part in self._parts:
                part.unlink(missing_ok=True)
        except MissingFileError as error:
            raise MissingFileError(f"{error} The rows are in {self._partial}.") from error
        except OSError as error:
            raise MissingFileError(
                f"{self.path}: cannot be written ({reason(error)}); the rows are in "
                f"{self._partial}."
            ) from error

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
                    f"first is {absent[0]}: the processes did not find the same images. Run it "
                    "again with --resume."
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
            writer.writerow(row)
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
            batch: list[dict[str, Any]] = []

            def put() -> None:
                rows = [
                    {n: utf8(v) if isinstance(v, str) else v for n, v in row.items()}
                    for row in batch
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                batch.clear()

            for row in self._rows():
                batch.append(row)
                if len(batch) == _ROWS_AT_ONCE:
                    put()
            put()


def prepare(path: str, *, resume: bool = False, force: bool = False) -> None:
    """See that an output can be begun, or gone on with; once for all processes that write it.

    Raises:
        InputError, ExistingFileError, MissingFileError: as `Journal`.
    """
    check_output(path, SUFFIXES, ".jsonl")
    left = leftovers(path)
    check_begin(path, left, resume=resume, force=force)
    if not resume:
        for part in left:
            if part.name != f"{Path(path).name}.partial":  # that one is emptied, if nobody is at it
                part.unlink(missing_ok=True)


def check_free(path: str, part: tuple[int, int]) -> None:
    """See that no other process writes the rows of this one.

    Raises:
        MissingFileError: one does.
    """
    with contextlib.suppress(FileNotFoundError), open(_partial(path, part), "rb") as stream:
        lock(stream, _partial(path, part), _HINT)


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
    return row if whole or "run" in row else None
