"""What `vit evaluate` writes: one row per image in a file, and tables on standard output."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from vit_cli.runs.partial import batches, check_output, utf8
from vit_cli.terminal.messages import one_line, printable
from vit_common.files.replace import check_target, replace_files

if TYPE_CHECKING:
    from vit_flax.training.evaluate import Evaluation

_SUFFIXES = (".jsonl", ".csv", ".parquet")
_ROWS_AT_ONCE = 10_000
_FEW = 24  # classes that a table on a terminal has at most


# -- a row per image


def check_predictions_file(path: str, *, force: bool) -> None:
    """Refuse a file that cannot be written, before any work is done.

    Raises:
        InputError: no such format, or parquet without pyarrow.
        ExistingFileError: it is there already, and `force` is not set.
        MissingFileError: it is a directory, or has none to be in.
    """
    check_output(path, _SUFFIXES, _SUFFIXES[0])
    check_target(Path(path), force=force)


def prediction_rows(found: Evaluation, *, every: bool) -> Iterator[dict[str, Any]]:
    """The row of each image, those that could not be read last.

    Args:
        found: the evaluation.
        every: give the probability of every class too, in the order of the model's labels.
    """
    kinds: Mapping[str, Callable[[Evaluation, int], dict[str, Any]]] = {
        "single_label_classification": _single,
        "multi_label_classification": _several,
        "regression": _quantity,
    }
    row = kinds[found.problem_type]
    for i, name in enumerate(found.names):
        values: dict[str, Any] = {"file": name, **row(found, i)}
        if every and found.classes is not None:
            values["probabilities"] = found.probabilities_of(i).tolist()
        yield values
    for name, message in found.skipped:
        yield {"file": name, "error": message}


def _single(found: Evaluation, i: int) -> dict[str, Any]:
    probabilities, true = found.probabilities_of(i), int(found.labels[i])
    predicted = int(found.logits[i].argmax())
    row, own = found.logits[i], found.logits[i, true]
    labels = found.classes or ()
    return {
        "label": labels[true],
        "label_index": true,
        "predicted": labels[predicted],
        "predicted_index": predicted,
        "correct": predicted == true,
        "probability": float(probabilities[predicted]),
        "label_probability": float(probabilities[true]),
        "rank": int((row > own).sum() + (row[:true] == own).sum()),
    }


def _several(found: Evaluation, i: int) -> dict[str, Any]:
    labels = found.classes or ()
    return {
        "labels": [labels[k] for k in np.flatnonzero(found.labels[i])],
        "predicted": [labels[k] for k in np.flatnonzero(found.logits[i] >= 0)],
        "correct": bool(((found.logits[i] >= 0) == (found.labels[i] > 0)).all()),
    }


def _quantity(found: Evaluation, i: int) -> dict[str, Any]:
    return {
        "target": found.labels[i].astype(float).tolist(),
        "predicted": found.logits[i].astype(float).tolist(),
    }


def write_predictions(path: str, found: Evaluation, *, every: bool) -> None:
    """Write the rows to a file, all of them or none.

    Raises:
        MissingFileError: it cannot be written.
    """
    ways: Mapping[str, Callable[[BinaryIO, Iterator[dict[str, Any]], list[str]], None]] = {
        ".jsonl": _jsonl,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    target = Path(path)
    columns = [*dict.fromkeys(key for row in _first(found, every=every) for key in row)]
    way = ways[target.suffix.lower()]
    rows = prediction_rows(found, every=every)
    replace_files(target.parent, {target.name: lambda stream: way(stream, rows, columns)})


def _first(found: Evaluation, *, every: bool) -> list[dict[str, Any]]:
    """The first row of each kind: one of an image that was read, and one of one that was not."""
    rows = prediction_rows(found, every=every)
    return [next(rows, {"file": ""}), {"error": ""}]


def _jsonl(stream: BinaryIO, rows: Iterator[dict[str, Any]], columns: list[str]) -> None:
    for row in rows:
        stream.write(json.dumps(row, allow_nan=False).encode() + b"\n")


def _csv(stream: BinaryIO, rows: Iterator[dict[str, Any]], columns: list[str]) -> None:
    # A name may hold bytes that are no text; they come out as they were.
    text = io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    text.flush()
    text.detach()


def _cell(value: Any) -> Any:
    """A value in a CSV file: lists are JSON, and so are true and false."""
    return json.dumps(value) if isinstance(value, (list, bool)) else value


def _parquet(stream: BinaryIO, rows: Iterator[dict[str, Any]], columns: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {
        "label_index": pa.int32(),
        "predicted_index": pa.int32(),
        "correct": pa.bool_(),
        "probability": pa.float64(),
        "label_probability": pa.float64(),
        "rank": pa.int32(),
        "labels": pa.list_(pa.string()),
        "target": pa.list_(pa.float64()),
        "probabilities": pa.list_(pa.float64()),
    }
    if "labels" in columns:
        kinds["predicted"] = pa.list_(pa.string())
    if "target" in columns:
        kinds["predicted"] = pa.list_(pa.float64())
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in columns])
    with pq.ParquetWriter(stream, schema) as writer:
        for batch in batches(rows, _ROWS_AT_ONCE):
            clean = [
                {name: utf8(v) if isinstance(v, str) else v for name, v in row.items()}
                for row in batch
            ]
            writer.write_table(pa.Table.from_pylist(clean, schema=schema))


# -- tables

_TITLES = {
    "balanced_accuracy": "balanced accuracy",
    "precision": "mean precision",
    "recall": "mean recall",
    "f1": "mean F1",
    "log_loss": "log loss",
    "brier": "Brier score",
    "ece": "expected calibration error",
    "mce": "maximum calibration error",
    "map": "mean average precision",
    "f1_micro": "F1, all labels together",
    "f1_macro": "F1, mean over classes",
    "exact_match": "all labels right",
    "mse": "mean squared error",
    "rmse": "root mean squared error",
    "mae": "mean absolute error",
    "r2": "R2",
}


def title_of(name: str) -> str:
    """What a measure is called in a table."""
    if name.startswith("top") and name[3:].isdecimal():
        return f"top-{name[3:]} accuracy"
    return _TITLES.get(name, name.replace("_", " "))


def scalars(metrics: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """The measures that are one number, in the order in which they are shown."""
    kept = {
        name: value
        for name, value in metrics.items()
        if name != "images" and not isinstance(value, (list, dict, np.ndarray))
    }
    if kept.get("recall") == kept.get("balanced_accuracy"):
        kept.pop("recall", None)
    return [*kept.items()]


def number(value: Any, digits: int = 4) -> str:
    """A measure in a table; a dash where it does not exist."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.6g}"


def confused(found: Evaluation, most: int = 10) -> list[tuple[str, str, int]]:
    """The classes that are taken for others most often: (true, predicted, images)."""
    if found.classes is None or found.labels.ndim != 1:
        return []
    predicted = found.predicted
    wrong = predicted != found.labels
    cells = found.labels[wrong] * len(found.classes) + predicted[wrong]
    pairs, counts = np.unique(cells, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    K = len(found.classes)
    return [
        (found.classes[pair // K], found.classes[pair % K], int(count))
        for pair, count in zip(pairs[order].tolist(), counts[order], strict=True)
    ]


def worst_classes(rows: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """All rows in their order if they are few; else those of the lowest F1, which have images."""
    if len(rows) <= most:
        return [*rows]
    there = [row for row in rows if row["images"]]
    return sorted(there, key=lambda row: row["f1"] if row["f1"] is not None else 2.0)[:most]


def print_evaluation(found: Evaluation, summary: Mapping[str, Any]) -> None:
    """Print tables: with rich on a terminal, and else as aligned text."""
    many = len(found.names)
    classes = f", {len(found.classes)} classes" if found.classes else ""
    head = f"{one_line(str(summary['model']))} on {printable(str(summary['source']))}"
    part = f" ({summary['split']})" if summary.get("split") else ""
    _line(f"{head}{part}: {many} image{'' if many == 1 else 's'}{classes}")
    if not found.metrics:
        return
    _line("")
    print_table(["measure", "value"], [[title_of(n), number(v)] for n, v in scalars(found.metrics)])
    rows = found.metrics.get("per_class")
    if rows:
        shown = worst_classes(rows, _FEW)
        _line("")
        if len(shown) < len(rows):
            _line(f"the {len(shown)} classes with the lowest F1, of {len(rows)} (--json has all)")
        names = [n for n in ("images", "predicted", "precision", "recall", "f1") if n in rows[0]]
        more = ["average_precision"] if "average_precision" in rows[0] else []
        columns = ["class", *names, *more]
        print_table(
            [name.replace("_", " ") for name in columns],
            [[row["class"], *(number(row[n]) for n in columns[1:])] for row in shown],
        )
    pairs = confused(found)
    if pairs:
        _line("")
        print_table(
            ["most frequent mistakes", "taken for", "images"],
            [[true, taken, str(count)] for true, taken, count in pairs],
        )


def _line(text: str) -> None:
    print(text)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns: the first to the left, numbers to the right."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for i, name in enumerate(header):
            table.add_column(
                name, justify="right" if _numeric(rows, i) else "left", overflow="fold"
            )
        for row in rows:
            table.add_row(*map(Text, row))
        Console(file=sys.stdout, highlight=False).print(table)
        return
    widths = [max(len(header[i]), *(len(row[i]) for row in rows)) for i in range(len(header))]
    right = [_numeric(rows, i) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [
            cell.rjust(width) if end else cell.ljust(width)
            for cell, width, end in zip(row, widths, right, strict=True)
        ]
        print("  ".join(cells).rstrip())


def _numeric(rows: list[list[str]], column: int) -> bool:
    return column > 0 and all(row[column][:1] in "0123456789-" for row in rows)
