"""Which files of a folder are images: by suffix, by content, and what is said of the others."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import types

import numpy as np
import PIL.Image
import pytest

from vit_cli.main import main
from vit_common.embedded import embedded_checkpoint
from vit_common.errors import ImageError
from vit_common.images import kinds
from vit_common.images.find import find_images
from vit_common.images.pictures import load_image

FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "JPEG2000", "PPM"]
APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(100)
HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100)


def encoded(format="PNG", size=(8, 8)):
    stream = io.BytesIO()
    with contextlib.suppress(KeyError, OSError):
        PIL.Image.new("RGB", size, "red").save(stream, format)
    return stream.getvalue()


def found_in(folder):
    """Names of the images, what was reported, and what was noted."""
    said, noted = [], []
    found = list(find_images([str(folder)], said.append, noted.append))
    return [name.removeprefix(f"{folder}/") for name in found], said, noted


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["c", "c.dat", "c.jpg_large"])
def test_content_decides_where_the_suffix_does_not(tmp_path, format, name):
    """Pillow is who says what a file is."""
    data = encoded(format)
    if not data:
        pytest.skip(f"this Pillow writes no {format}")
    (tmp_path / name).write_bytes(data)
    with PIL.Image.open(tmp_path / name) as image:
        assert image.format == format
    assert found_in(tmp_path) == ([name], [], [])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        b"BM is how this text begins",
        b"P1",
        b"P6x",
        b"RIFF....WAVEfmt ",
        bytes(64),
        HEIC,
    ]
    + [b"%PDF-1.7", b"PK\x03\x04", b"II", b"\xff\xd8", b"\x00\x00\x00\x18ftypisom"],
)
def test_other_content_is_no_image(tmp_path, data, monkeypatch):
    monkeypatch.setattr(kinds, "can_read_heif", lambda: False)
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "c").write_bytes(data)
    found, said, noted = found_in(tmp_path)
    assert (found, said) == (["a.png"], [])
    assert noted == [f"{tmp_path}: 1 file of another kind left out (no suffix 1)"]


def test_what_is_left_out_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kinds, "can_read_heif", lambda: False)
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "b.HEIC").write_bytes(HEIC)
    (tmp_path / "c").write_bytes(b"no image")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.mp4").write_bytes(b"\x00\x00\x00\x18ftypisom")
    (tmp_path / "sub" / "e.MP4").write_bytes(b"")
    (tmp_path / "sub" / "f.cr2").write_bytes(encoded("TIFF"))  # what is in there is a thumbnail
    line = (
        f"{tmp_path}: 5 files of other kinds left out (.mp4 2, .cr2 1, .heic 1, no suffix 1); "
        "HEIC photos need pillow-heif (pip install pillow-heif)"
    )
    assert found_in(tmp_path) == (["a.png"], [], [line])
    assert main(["predict", str(tmp_path), "--model", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.splitlines()[0] == f"vit: {line}"


def test_a_folder_with_nothing_but_other_kinds(tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "can_read_heif", lambda: False)
    (tmp_path / "b.heic").write_bytes(HEIC)
    found, said, noted = found_in(tmp_path)
    assert (found, noted) == ([], [])
    assert said[0].startswith(f"{tmp_path}: no images in this folder; looked for .avif ")
    assert "1 file of another kind left out (.heic 1); HEIC photos need pillow-heif" in said[0]


def test_what_desktops_leave_is_no_image(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "._a.png").write_bytes(APPLE_DOUBLE)
    (tmp_path / "._real.png").write_bytes(encoded())  # a strange name, and an image
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "a.png:Zone.Identifier", ".hidden"):
        (tmp_path / name).write_bytes(b"\x00\x00\x00\x01Bud1")
    for name in ("__MACOSX", "__MACOSX/sub"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "._a.png").write_bytes(APPLE_DOUBLE)
    assert found_in(tmp_path) == (["._real.png", "a.png"], [], [])
    assert main(["predict", str(tmp_path), "--model", str(embedded_checkpoint()), "--json"]) == 0
    # A file that is named is tried, whatever it is.
    assert list(find_images([f"{tmp_path}/._a.png"], pytest.fail)) == [f"{tmp_path}/._a.png"]


def test_heic_without_pillow_heif(tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "can_read_heif", lambda: False)
    (tmp_path / "b.heic").write_bytes(HEIC)
    with pytest.raises(ImageError, match=r"b.heic: a HEIF photo.*pip install pillow-heif"):
        load_image(tmp_path / "b.heic")


def test_heic_with_a_reader(tmp_path, monkeypatch):
    """The reader is a stand-in that registers itself with Pillow as pillow-heif does."""

    class Plugin(PIL.ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._size, self._mode, self.tile = (3, 2), "RGB", []

        def load(self):
            self.im = PIL.Image.new("RGB", self.size, "blue").im

    module = types.ModuleType("pillow_heif")
    module.register_heif_opener = lambda: PIL.Image.register_open(
        "HEIF", Plugin, lambda head: head[4:12] == b"ftypheic"
    )
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    monkeypatch.setattr(kinds, "can_read_heif", lambda: True)
    monkeypatch.setattr(PIL.Image, "OPEN", dict(PIL.Image.OPEN))
    monkeypatch.setattr(PIL.Image, "ID", list(PIL.Image.ID))
    for name in ("b.heic", "c"):
        (tmp_path / name).write_bytes(HEIC)
    assert found_in(tmp_path) == (["b.heic", "c"], [], [])
    for name in ("b.heic", "c"):
        assert load_image(tmp_path / name).getpixel((0, 0)) == (0, 0, 255)


def test_heic_as_pillow_heif_reads_it(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    pillow_heif.from_pillow(PIL.Image.fromarray(pixels)).save(tmp_path / "b.heic", quality=90)
    expected = np.asarray(pillow_heif.open_heif(tmp_path / "b.heic").to_pillow())
    (tmp_path / "c").write_bytes((tmp_path / "b.heic").read_bytes())
    assert found_in(tmp_path) == (["b.heic", "c"], [], [])
    for name in ("b.heic", "c"):
        np.testing.assert_array_equal(np.asarray(load_image(tmp_path / name)), expected)


def test_nothing_is_said_of_texts(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "notes.txt").write_bytes(encoded())
    (tmp_path / "labels.json").write_text(json.dumps({}))
    assert found_in(tmp_path) == (["a.png"], [], [])
