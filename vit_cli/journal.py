"""Results in a file: written row by row, so that an interrupted run can go on where it stopped.

Rows go to `FILE.partial`, one JSON object a line, whatever the file's own format. What a process
that died left unfinished at its end is cut off when the run is resumed; the file itself appears
when every image is done.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vit_common.errors import InputError, MissingFileError
from vit_common.files import reason, replace_files

if TYPE_CHECKING:
    from vit_flax.inference import Prediction

SUFFIXES = (".jsonl", ".csv", ".parquet")
_COLUMNS = ("file", "rank", "label", "index", "probability", "error")
_ROWS_AT_ONCE = 10_000


class Journal:
    """The rows of one output file.

    Args:
        path: the file; its suffix is its format.
        resume: go on with what an earlier run left.
        force: begin anew, and overwrite.
        run: what the rows are made with; a run with another cannot be resumed with this.

    Raises:
        InputError: no such format, or parquet without pyarrow.
        MissingFileError: the file is there already, or cannot be written.
    """

    def __init__(
        self,
        path: str,
        *,
        resume: bool = False,
        force: bool = False,
        run: dict[str, Any] | None = None,
    ) -> None:
        self._run = run or {}
        self.failed = 0
        self.path = Path(path)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self.done: set[str] = set()
        suffix = self.path.suffix.lower()
        if suffix not in SUFFIXES:
            raise InputError(f"--output must end in {', '.join(SUFFIXES)}; given {path!r}.")
        if suffix == ".parquet":
            try:
                import pyarrow  # noqa: F401
            except ImportError as error:
                raise InputError(
                    'parquet needs pyarrow; run: pip install "vit-flax[parquet]", or write .jsonl'
                ) from error
        if self.path.exists() and not force:
            raise MissingFileError(
                f"{path}: already there, and whole; pass --force to do it again."
            )
        there = self._partial.exists()
        if there and not (resume or force):
            raise MissingFileError(
                f"{self._partial}: left by a run that did not end; pass --resume to go on, or "
                "--force to begin anew."
            )
        if there and resume:
            self._recover()
        try:
            mode = "ab" if self.done else "wb"
            self._stream: Any = open(self._partial, mode)  # noqa: SIM115  # until `finish`
            if not self.done:
                self._stream.write(json.dumps({"run": self._run}).encode() + b"\n")
        except OSError as error:
            raise MissingFileError(
                f"{self._partial}: cannot be written ({reason(error)})."
            ) from error

    def _recover(self) -> None:
        """Read what is whole, and cut off the rest."""
        end = 0
        try:
            with open(self._partial, "rb") as stream:
                for number, line in enumerate(stream):
                    row = _parse(line)
                    if row is None:
                        break
                    if number == 0:
                        self._check_run(row.get("run"))
                    else:
                        self.done.add(row["file"])
                        self.failed += "error" in row
                    end += len(line)
            os.truncate(self._partial, end)
        except OSError as error:
            raise MissingFileError(f"{self._partial}: cannot be read ({reason(error)}).") from error

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
        self._stream.write(json.dumps(row).encode() + b"\n")

    def flush(self) -> None:
        """Hand the rows so far to the system; they survive the end of this process."""
        self._stream.flush()

    def close(self) -> None:
        """Keep what there is for `resume`; nothing where there is nothing."""
        self._stream.close()
        if not self.done:
            self._partial.unlink(missing_ok=True)

    def finish(self) -> None:
        """Make the file of the rows.

        Raises:
            MissingFileError: it cannot be written; the rows are kept.
        """
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        suffix = self.path.suffix.lower()
        try:
            ways = {".jsonl": self._jsonl, ".csv": self._csv, ".parquet": self._parquet}
            write: Callable[[BinaryIO], object] = ways[suffix]
            replace_files(self.path.parent, {self.path.name: write})
            self._partial.unlink()
        except OSError as error:
            raise MissingFileError(
                f"{self.path}: cannot be written ({reason(error)}); the rows are in "
                f"{self._partial}."
            ) from error

    def _rows(self) -> Iterator[dict[str, Any]]:
        """One row a class, or one with an error an image."""
        with open(self._partial, "rb") as stream:
            next(stream, None)  # what the run was
            for line in stream:
                row = json.loads(line)
                if "error" in row:
                    yield {"file": row["file"], "error": row["error"]}
                for rank, each in enumerate(row.get("predictions", ())):
                    yield {"file": row["file"], "rank": rank, **each}

    def _jsonl(self, stream: BinaryIO) -> None:
        with open(self._partial, "rb") as rows:
            next(rows, None)  # what the run was
            shutil.copyfileobj(rows, stream)

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
                    {n: _text(v) if isinstance(v, str) else v for n, v in row.items()}
                    for row in batch
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                batch.clear()

            for row in self._rows():
                batch.append(row)
                if len(batch) == _ROWS_AT_ONCE:
                    put()
            put()


def _text(value: str) -> str:
    """Text that UTF-8 can hold; bytes that are none are escaped."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def _parse(line: bytes) -> dict[str, Any] | None:
    """A whole row, or None."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    whole = isinstance(row.get("file"), str) and ("error" in row or "predictions" in row)
    return row if whole or "run" in row else None
