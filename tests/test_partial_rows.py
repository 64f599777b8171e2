"""Partial files of a run that were changed between a kill and `--resume`: a line is one of ours, or
it is cut off and its image done again."""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import random

import numpy as np
import pytest

from vit_cli.runs.feature_file import FeatureFile
from vit_cli.runs.prediction_file import Journal
from vit_common.errors import InputError
from vit_flax.inference import Prediction

NAMES = ["a.png", "b\udcff.png", "写真.png", "d.png", "e.png"]
RUN = {"dtype": "float32", "top_k": 2}
ODD = [None, True, 0, -1, 3, 0.5, 1e999, 10**30, "", "a.png", [], [1], [[]], {}, {"file": "a.png"}]
TEXTS = [b"", b"{", b"[]", b"null", b"{}", b'{"file":"a.png"}', b"\xff\x00", b"[" * 100_000, b"NaN"]


def values(kind, name):
    if kind == "predictions":
        return (Prediction("cat", 0, 0.75), Prediction(f"dog of {name!r}", 1, 0.25))
    return np.full(3, NAMES.index(name), np.float32)


def begin(kind, path, **options):
    return (Journal if kind == "predictions" else FeatureFile)(str(path), run=RUN, **options)


def mutated(lines, rng):
    """The lines of a partial file with one thing changed, so that most are JSON still."""
    lines, i = list(lines), rng.randrange(len(lines))
    how = rng.randrange(9)
    if how == 0:
        lines[i] = rng.choice(TEXTS) + b"\n"
    elif how == 1:
        lines.insert(rng.randrange(len(lines) + 1), lines[i])
    elif how == 2:
        j = rng.randrange(len(lines))
        lines[i], lines[j] = lines[j], lines[i]
    elif how == 3:
        del lines[i]
    elif how == 4:
        at = rng.randrange(len(lines[i]))
        lines[i] = lines[i][:at] + bytes([rng.randrange(256)]) + lines[i][at + 1 :]
    elif how == 5:
        lines[i] = lines[i][: rng.randrange(len(lines[i]))]
    elif how == 6:
        lines[i] = lines[i].replace(b", ", rng.choice([b",", b",  ", b"\n"]), 1)
    else:
        row = json.loads(lines[i])
        at = row
        while isinstance(at, dict | list) and at and rng.random() < 0.7:
            holder, key = at, rng.choice([*at] if isinstance(at, dict) else range(len(at)))
            at = at[key]
        if at is row:
            row[rng.choice(["file", "error", "predictions", "shape", "more"])] = rng.choice(ODD)
        elif rng.random() < 0.3:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD))
        lines[i] = json.dumps(row).encode() + b"\n"
    return lines


@pytest.mark.parametrize(
    ("kind", "suffix"), [("predictions", "csv"), ("predictions", "jsonl"), ("features", "npz")]
)
def test_every_image_has_one_row_whatever_was_there(tmp_path, kind, suffix):
    rng = random.Random(0)
    first = tmp_path / f"first.{suffix}"
    journal = begin(kind, first)
    for name in NAMES[:3]:
        journal.write(name, values(kind, name))
    journal.fail(NAMES[3], "broken")
    journal.close()
    lines = (tmp_path / f"first.{suffix}.partial").read_bytes().splitlines(keepends=True)
    rows = tmp_path / f"first.{suffix}.partial.rows"
    vectors = rows.read_bytes() if kind == "features" else b""
    resumed = 0
    for number in range(100):
        path = tmp_path / f"{number}.{suffix}"
        partial = tmp_path / f"{number}.{suffix}.partial"
        partial.write_bytes(b"".join(mutated(lines, rng)))
        if kind == "features":
            (tmp_path / f"{number}.{suffix}.partial.rows").write_bytes(vectors)
        with contextlib.ExitStack() as stack:
            # The rows of another run, or vectors of another shape, may be refused.
            stack.enter_context(contextlib.suppress(InputError))
            journal = begin(kind, path, resume=True)
            stack.callback(journal.close)
            resumed += bool(journal.done)
            for name in NAMES:
                if name not in journal.done:
                    journal.write(name, values(kind, name))
            journal.finish()
        if not path.exists():
            continue
        found = names_in(path)
        assert len(found) == len(set(found)), number
        assert set(NAMES) <= set(found), number
    assert resumed > 30


def names_in(path):
    """The images in a file, each once for its row."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            assert len(arrays["files"]) == len(arrays["features"])
            for name, vector in zip(arrays["files"], arrays["features"], strict=True):
                if name in NAMES:
                    assert vector.shape == (3,)
            return [*arrays["files"], *arrays["failed"]]
    if path.suffix == ".jsonl":
        return [json.loads(line)["file"] for line in path.read_text().splitlines()]
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as stream:
        table = list(csv.DictReader(stream))
    for row in table:
        assert None not in row
    return [row["file"] for row in table if row["rank"] in ("", "0")]


@pytest.mark.parametrize(
    "line",
    [
        {"file": "b.png", "predictions": "cat"},
        {"file": "b.png", "predictions": []},
        {"file": "b.png", "predictions": [1]},
        {"file": "b.png", "predictions": [{"label": "cat"}]},
        {"file": "b.png", "predictions": [{"label": "cat", "index": 0, "probability": "high"}]},
        {"file": "b.png", "predictions": [], "more": 1},
        {"file": "b.png", "error": None},
        {"file": "b.png", "error": "x", "predictions": []},
        {"file": "a.png", "error": "a second row"},
        {"file": ["b.png"], "error": "x"},
        {"run": {}},
    ],
    ids=json.dumps,
)
def test_rows_that_are_none_of_ours_are_cut_off(tmp_path, line):
    target = tmp_path / "out.jsonl"
    rows = [
        {"run": RUN},
        {"file": "a.png", "error": "broken"},
        line,
        {"file": "c.png", "error": ""},
    ]
    (tmp_path / "out.jsonl.partial").write_text("".join(json.dumps(row) + "\n" for row in rows))
    journal = begin("predictions", target, resume=True)
    assert journal.done == {"a.png"}
    journal.write("b.png", values("predictions", "a.png"))
    journal.finish()
    assert names_in(target) == ["a.png", "b.png"]
