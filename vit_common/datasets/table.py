"""Tables of images: CSV, TSV, JSON lines or Parquet, one row for each image."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_common.datasets.folder import check_classes, class_name, part_of
from vit_common.datasets.labelled import MULTI, REGRESSION, SINGLE, LabelledImages
from vit_common.datasets.order import limited
from vit_common.datasets.values import labels_of
from vit_common.errors import InputError, MissingFileError, shown, some
from vit_common.files.texts import not_the_file, reason

IMAGE_COLUMNS = ("file", "file_name", "filename", "filepath", "path", "image", "img", "image_path")
LABEL_COLUMNS = ("label", "labels", "class", "target", "category", "fine_label")
"""Names of the columns that are looked for, in this order, if none is named."""

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
"""Suffixes of the tables that are read."""

_MARKS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
_SHOWN = 5


class ImageTable(LabelledImages):
    """Images of a table, with one row per image.

    The image is a path, from the table's folder, or the content of an image file as Hugging Face
    writes it to Parquet (`{"bytes": ..., "path": ...}`), which stays in memory. The label is a
    class name or index, several of them (a list, or a text with `|` or `;` between them), a number,
    or one column for each class or number.

    Args:
        path: a .csv, .tsv, .jsonl, .ndjson or .parquet file; or a pattern of several, such as
            "data/train-*.parquet", or a list of them.
        image: name of the image's column; None looks for a usual one, "file" first.
        label: name of the label's column, or names of several; None looks for a usual one.
        classes: see `ImageFolder`. None takes those of the table: sorted, or as its schema says.
        problem_type: None finds out: see `vit_common.datasets.values.labels_of`.
        root: folder that paths are relative to; None is the table's own.
        part: use the rows whose column "split" names this part: "train", "val" or "test".
        limit: use this many images only, each class by its share.

    Raises:
        MissingFileError: the table, or an image that it names, is not there.
        InputError: it cannot be read as a table, a column or a label is missing, or a label is out
            of range; Parquet without pyarrow.

    Example:
        >>> ages = ImageTable("faces.csv", label="age", problem_type="regression")
        >>> ages.labels.dtype, ages.classes
        (dtype('float32'), None)
    """

    def __init__(
        self,
        path: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        image: str | None = None,
        label: str | Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        problem_type: str | None = None,
        root: str | os.PathLike | None = None,
        part: str | None = None,
        limit: int | None = None,
    ) -> None:
        paths = _paths(path)
        where = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        tables = [_read(one) for one in paths]
        sources: list[Any] = []
        values: list[Any] = []
        names: list[str] = []
        rows: list[str] = []
        declared: Sequence[str] | None = None
        for one, table in zip(paths, tables, strict=True):
            image_column = _column(one, table.columns, image, IMAGE_COLUMNS, "image")
            found, declared_here = _label_values(one, table, label)
            declared = declared or declared_here
            keep = _rows_of_part(one, table, part)
            base = Path(root) if root is not None else one.parent
            for i in keep:
                source, name = _source(one, table.columns[image_column][i], base, table.row(i))
                sources.append(source)
                names.append(name)
                values.append(found[i])
                rows.append(table.row(i) if len(paths) == 1 else f"{one.name} {table.row(i)}")
        if part is not None and not sources:
            raise InputError(f"{where}: no row whose column `split` says {part!r}.")
        _check_files(where, sources)
        if label is not None and not isinstance(label, str):
            labels, known, problem_type = _separate(
                where, values, list(label), rows, problem_type, classes
            )
        else:
            labels, known, problem_type = labels_of(
                values,
                where,
                rows.__getitem__,
                problem_type=problem_type,
                classes=classes,
                declared=declared,
            )
        everything = LabelledImages(
            sources, labels, classes=known, names=names, problem_type=problem_type
        )
        chosen = everything if limit is None else limited(everything, limit)
        super().__init__(
            [chosen.image(i) for i in range(len(chosen))],
            chosen.labels,
            classes=known,
            names=chosen.names,
            problem_type=problem_type,
        )


def parts_of(path: Path) -> list[tuple[str, bool]]:
    """The parts that a table has rows of, each with whether its column "split" says so; a table
    without that column is all "train"."""
    columns = _read(path).columns
    if "split" not in columns:
        return [("train", False)]
    found = {name: part_of(name) for name in dict.fromkeys(map(str, columns["split"]))}
    unknown = [name for name, part in found.items() if part is None]
    if unknown:
        raise InputError(
            f"{path}: the column `split` must say train, val or test in each row; given "
            f"{some(map(repr, unknown), _SHOWN)}."
        )
    return [(str(part), True) for part in dict.fromkeys(found.values())]


def has_labels(path: Path) -> bool:
    """Whether a table has a column of labels by one of the usual names."""
    return any(name.lower() in LABEL_COLUMNS for name in _read(path).columns)


class Table:
    """Columns of one file by name, and what to call a row of it."""

    def __init__(
        self,
        columns: Mapping[str, Sequence[Any]],
        first: int = 1,
        declared: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.columns = columns
        self.first = first
        self.declared = declared or {}

    def row(self, index: int) -> str:
        """ "line 7" of a text, "row 6" of Parquet."""
        return f"{'line' if self.first else 'row'} {index + self.first}"

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))


# -- from files to columns


def _paths(path: Any) -> list[Path]:
    if isinstance(path, (str, os.PathLike)):
        text = os.fspath(path)
        if not os.path.exists(text) and any(mark in str(text) for mark in "*?["):
            found = sorted(glob.glob(str(text)))
            if not found:
                raise MissingFileError(f"{text}: no file matches this pattern.")
            return [Path(one) for one in found]
        return [Path(path)]
    paths = [Path(one) for one in path]
    if not paths:
        raise InputError("an empty list of tables; wanted at least one file.")
    return paths


def _read(path: Path) -> Table:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"{path}: wanted a table ({', '.join(SUFFIXES)}); given a file of another kind."
        )
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read ({reason(error)}).") from error
    if not head:
        raise InputError(f"{path}: the file is empty; wanted a table with one row per image.")
    if (other := not_the_file(head, path, "a table")) is not None:
        raise other
    if suffix == ".parquet":
        return _read_parquet(path)
    try:
        if suffix in (".csv", ".tsv"):
            return _read_csv(path, "\t" if suffix == ".tsv" else None)
        return _read_lines(path)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save the table as UTF-8."
        ) from error
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read ({reason(error)}).") from error


def _read_csv(path: Path, delimiter: str | None) -> Table:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        if delimiter is None:
            header = stream.readline()
            # Some spreadsheets write what their country uses.
            delimiter = next((mark for mark in ",;\t" if mark in header), ",")
            stream.seek(0)
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            names = [name.strip() for name in next(reader, [])]
            twice = [name for i, name in enumerate(names) if name in names[:i]]
            if twice:
                raise InputError(f"{path}: the column {shown(twice[0])} comes twice in the header.")
            rows = []
            for row in reader:
                if not row:
                    continue
                if len(row) != len(names):
                    raise InputError(
                        f"{path}: line {reader.line_num} has {len(row)} fields; the header has "
                        f"{len(names)} ({some(names, _SHOWN)}). Put texts that hold "
                        f"{delimiter!r} in double quotes."
                    )
                rows.append(row)
        except csv.Error as error:
            raise InputError(
                f"{path}: line {reader.line_num} cannot be read as CSV ({reason(error)})."
            ) from error
    return Table({name: [row[i] for row in rows] for i, name in enumerate(names)}, first=2)


def _read_lines(path: Path) -> Table:
    rows = []
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{path}: line {number} is not JSON ({reason(error)}); wanted one object per "
                    "line."
                ) from error
            if not isinstance(row, dict):
                raise InputError(
                    f"{path}: line {number} must be a JSON object {{...}}; given a "
                    f"{type(row).__name__}."
                )
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table({name: [row.get(name) for row in rows] for name in names}, first=1)


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(
            f"{path}: Parquet needs pyarrow; run: pip install pyarrow, or give a CSV table."
        ) from error
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({reason(error)}).") from error
    declared = _class_labels(table.schema.metadata or {})
    return Table({name: _Arrow(table.column(name)) for name in table.column_names}, 0, declared)


class _Arrow(Sequence):
    """A column of Arrow, whose values become Python's one at a time."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        return self._column[index].as_py()


def _class_labels(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """The class names of each column that Hugging Face's `datasets` wrote into the schema."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        found = {}
        for name, feature in features.items():
            inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
            inner = inner[0] if isinstance(inner, list) else inner
            if isinstance(inner.get("names"), list):
                found[name] = [str(one) for one in inner["names"]]
        return found
    except (KeyError, ValueError, TypeError, AttributeError, IndexError):
        return {}


# -- from columns to images and label values


def _column(
    path: Path,
    columns: Mapping[str, Any],
    wanted: str | None,
    usual: Sequence[str],
    what: str,
) -> str:
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise InputError(
            f"{path}: no column {shown(wanted)} for the {what}; the table has {some(columns, 12)}."
        )
    by_lower = {name.lower(): name for name in reversed(list(columns))}
    for name in usual:
        if name in by_lower:
            return by_lower[name]
    raise InputError(
        f"{path}: no column for the {what}; looked for {', '.join(usual)}, and the table has "
        f"{some(columns, 12)}. Name the column with `{what}`."
    )


def _label_values(
    path: Path, table: Table, label: str | Sequence[str] | None
) -> tuple[Sequence[Any], Sequence[str] | None]:
    if label is None or isinstance(label, str):
        name = _column(path, table.columns, label, LABEL_COLUMNS, "label")
        return table.columns[name], table.declared.get(name)
    names = [_column(path, table.columns, one, (), "label") for one in label]
    if not names:
        raise InputError("`label` names no column; wanted at least one.")
    columns = [table.columns[name] for name in names]
    return [[column[i] for column in columns] for i in range(len(table))], None


def _separate(
    where: str,
    values: list[list[Any]],
    columns: list[str],
    rows: list[str],
    problem_type: str | None,
    classes: Sequence[str] | None,
) -> tuple[np.ndarray, tuple[str, ...] | None, str]:
    """Labels of one column for each class, which holds 0 or 1, or for each number."""
    if problem_type is None:
        flat = {str(mark).strip().lower() for value in values for mark in value}
        problem_type = MULTI if flat <= _MARKS.keys() else REGRESSION
    if problem_type == REGRESSION:
        return labels_of(values, where, rows.__getitem__, problem_type=REGRESSION)
    if problem_type == SINGLE:
        raise InputError(
            f"{where}: {len(columns)} label columns ({some(columns, _SHOWN)}) are for several "
            "classes or for regression; wanted one column for one class per image."
        )
    names = [class_name(column) for column in columns]
    known = check_classes(where, names, classes)
    labels = np.zeros((len(values), len(known)), np.float32)
    places = [known.index(name) for name in names]
    for i, value in enumerate(values):
        for place, mark in zip(places, value, strict=True):
            number = _MARKS.get(str(mark).strip().lower())
            if number is None:
                raise InputError(
                    f"{where}: {rows[i]}: a column for each class must hold 0 or 1; given "
                    f"{shown(mark)}."
                )
            labels[i, place] = number
    return labels, known, MULTI


def _rows_of_part(path: Path, table: Table, part: str | None) -> Sequence[int]:
    if part is None:
        return range(len(table))
    if "split" not in table.columns:
        raise InputError(
            f"{path}: no column `split` that names the part {part!r}; the table has "
            f"{some(table.columns, 12)}."
        )
    return [i for i, name in enumerate(table.columns["split"]) if part_of(str(name)) == part]


def _source(path: Path, value: Any, root: Path, row: str) -> tuple[Any, str]:
    """An image's source and its name."""
    if isinstance(value, Mapping):
        content, name = value.get("bytes"), value.get("path")
        if content is not None:
            return bytes(content), f"{name or path} ({row})"
        value = name
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value), f"{path} ({row})"
    if isinstance(value, (list, np.ndarray)):
        raise InputError(
            f"{path}: {row}: an image must be a path or the content of an image file; given a "
            "list of numbers."
        )
    if value is None or not str(value).strip():
        raise InputError(f"{path}: {row} names no image; wanted a path.")
    text = str(value).strip()
    if "://" in text:
        raise InputError(
            f"{path}: {row}: an image must be a file on this machine; given the link "
            f"{shown(text)}. Download it first."
        )
    name = os.path.join(root, text)
    if "\\" in text and not os.path.exists(name):  # a table that was written on Windows
        name = os.path.join(root, text.replace("\\", "/"))
    return name, name


def _check_files(where: str, sources: Sequence[Any]) -> None:
    missing = [
        source for source in sources if isinstance(source, str) and not os.path.isfile(source)
    ]
    if missing:
        count = "1 image" if len(missing) == 1 else f"{len(missing)} images"
        raise MissingFileError(
            f"{where}: {count} of {len(sources)} not there ({some(missing, _SHOWN)}); wanted paths "
            "from the table's folder, or from `root`."
        )
