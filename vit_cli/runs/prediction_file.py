"""Predictions in a file: written row by row, so that an interrupted run can go on where it stopped.

Rows go to `FILE.partial`, one JSON object a line, whatever the file's own format; see `rows`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, BinaryIO

from vit_cli.runs.partial import batches, utf8
from vit_cli.runs.rows import RowFile
from vit_cli.terminal.messages import counted
from vit_cli.terminal.results import as_row

if TYPE_CHECKING:
    from vit_flax.inference import Prediction

_COLUMNS = ("file", "rank", "label", "index", "probability", "error")
_ROWS_AT_ONCE = 10_000


class Journal(RowFile):
    """The predictions of one output file."""

    suffixes = (".jsonl", ".csv", ".parquet")
    what = "rows"

    def _whole(self) -> Callable[[dict[str, Any]], bool]:
        return lambda row: (
            [*row] == ["file", "predictions"] and _are_predictions(row["predictions"])
        )

    def write(self, file: str, value: Sequence[Prediction]) -> None:
        """The row of an image."""
        self._row(as_row(file, value))

    def summary(self, images: int, done: int) -> str:
        return counted(images) if done else ""

    # -- formats

    def _ways(self) -> Mapping[str, Callable[[BinaryIO], object]]:
        return {".jsonl": self._jsonl, ".csv": self._csv, ".parquet": self._parquet}

    def _rows(self) -> Iterator[dict[str, Any]]:
        """One row per class of an image, or one row with its error."""
        for line in self._lines():
            row = json.loads(line)
            if "error" in row:
                yield {"file": row["file"], "error": row["error"]}
            for rank, each in enumerate(row.get("predictions", ())):
                yield {"file": row["file"], "rank": rank, **each}

    def _jsonl(self, stream: BinaryIO) -> None:
        stream.writelines(self._lines())

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


def _are_predictions(values: Any) -> bool:
    """Whether a value in a row is what `as_row` writes: different classes, the likeliest first."""
    if not (isinstance(values, list) and values and all(map(_is_prediction, values))):
        return False
    pairs = pairwise(each["probability"] for each in values)
    different = len({each["index"] for each in values}) == len(values)
    return different and not any(first < second for first, second in pairs)


def _is_prediction(value: Any) -> bool:
    """Whether a value in a row is a class as `as_row` writes it."""
    if not isinstance(value, dict) or [*value] != ["label", "index", "probability"]:
        return False
    label, index, probability = value.values()
    known = isinstance(label, str) and type(index) is int and type(probability) is float
    return known and index >= 0 and not (probability < 0 or probability > 1)  # it may be NaN
