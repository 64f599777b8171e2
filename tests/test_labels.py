"""Files of class names."""

from __future__ import annotations

import codecs
import json

import pytest

from vit_common.errors import InputError, MissingFileError
from vit_common.files.labels import read_labels

LABELS = ["tench", "goldfish, Carassius auratus", "Zürich", "写真"]
KERAS = {str(i): [f"n0144{i:04}", label] for i, label in enumerate(LABELS)}
TEXT = "\n".join(LABELS)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("plain.txt", TEXT.encode()),
        ("newline.txt", TEXT.encode() + b"\n"),
        ("blank end.txt", TEXT.encode() + b"\n\n \n"),
        ("windows.txt", codecs.BOM_UTF8 + TEXT.replace("\n", "\r\n").encode()),
        ("notepad.txt", codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le")),
        ("big.txt", codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be")),
        ("old mac.txt", TEXT.replace("\n", "\r").encode()),
        ("spaces.txt", TEXT.replace("\n", " \t\n").encode()),
        ("list.json", json.dumps(LABELS).encode()),
        ("mark.json", codecs.BOM_UTF8 + json.dumps(LABELS).encode()),
        ("LIST.JSON", json.dumps(LABELS).encode()),
        ("json.txt", json.dumps(LABELS).encode()),
        ("table.json", json.dumps(dict(reversed(list(enumerate(LABELS))))).encode()),
        ("keras.json", json.dumps(KERAS).encode()),
        ("pairs.json", json.dumps(list(KERAS.values())).encode()),
        ("mark and keras.json", codecs.BOM_UTF8 + json.dumps(KERAS).encode()),
        ("classes to indices.json", json.dumps({x: i for i, x in enumerate(LABELS)}).encode()),
    ],
)
def test_read(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert read_labels(tmp_path / name) == LABELS


def test_brackets_are_text_too(tmp_path):
    (tmp_path / "l.txt").write_text("[UNK]\ncat\n")
    assert read_labels(tmp_path / "l.txt") == ["[UNK]", "cat"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "", "line 1 is empty"),
        ("l.txt", "a\n\nb", "line 2 is empty"),
        ("l.json", '["a", ""]', "label 1 is empty"),
        ("l.json", '["a", {"b": 1}]', "label 1 must be a text"),
        ("l.json", '["a", null]', "label 1 must be a text"),
        ("l.json", '{"0": ["a", "b", "c"]}', "label 0 must be a text, or a pair"),
        ("l.json", '{"0": ["a", "b"]}', "label 0 must be a text, or a pair"),
        ("l.json", '{"0": "a", "00": "b"}', "without gaps"),
        ("l.json", '{"a": 0, "b": 2}', "without gaps"),
        ("l.json", "[" * 100_000, "must hold a JSON list"),
    ],
)
def test_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_labels(tmp_path / name)


def test_no_text(tmp_path):
    (tmp_path / "l.txt").write_bytes(b"\xff\xff\x00")
    with pytest.raises(MissingFileError, match=r"l.txt: cannot be read"):
        read_labels(tmp_path / "l.txt")
