"""Data sets: what is read from folders, tables and other libraries, in which order, and what is
said of those that cannot be trained on."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import sklearn.model_selection

from vit_common.datasets import (
    ImageFiles,
    ImageFolder,
    ImageObjects,
    ImageTable,
    LabelledImages,
    as_images,
    check_images,
    epoch_order,
    occurrences,
    open_images,
    split,
    survey,
)
from vit_common.errors import InputError, MissingFileError
from vit_common.images import kinds

SINGLE, MULTI = "single_label_classification", "multi_label_classification"


def picture(seed=0, format="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, format)
    return stream.getvalue()


def photos(root, **numbers):
    """A folder with so many images of each class."""
    for name, number in numbers.items():
        folder = Path(root) / name
        folder.mkdir(parents=True)
        for i in range(number):
            (folder / f"{i}.png").write_bytes(picture(zlib.crc32(f"{folder}{i}".encode())))
    return Path(root)


def refused(call, *args, kind=InputError, **options):
    """The message of the error; one line."""
    with pytest.raises(kind) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- folders


def test_folder_against_torchvision(tmp_path):
    """Classes, paths and labels, in order."""
    import timm_models  # noqa: F401
    from torchvision.datasets import ImageFolder as TheirFolder

    photos(tmp_path, b=3, a=2, C=4, **{"10": 1, "9": 1})
    (tmp_path / "a" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a" / "deep" / "er" / "x.JPG").write_bytes(picture(1, "JPEG"))
    ours, theirs = ImageFolder(tmp_path), TheirFolder(tmp_path)
    assert ours.classes == tuple(theirs.classes)
    found = sorted(zip(ours.names, ours.labels.tolist(), strict=True))
    assert found == sorted(theirs.samples)
    assert ours.counts.tolist() == np.bincount(theirs.targets).tolist()
    assert ours.problem_type == SINGLE
    again = pickle.loads(pickle.dumps(ours))
    assert again.names == ours.names
    assert again.labels.tolist() == ours.labels.tolist()


def test_what_is_left_out_of_folders(tmp_path):
    """What desktops and notebooks leave behind is neither image nor class."""
    photos(tmp_path, cat=2, dog=2)
    for name in ("cat/.DS_Store", "cat/._0.png", "cat/.hidden.png", "dog/Thumbs.db", "dog/a.txt"):
        (tmp_path / name).write_bytes(b"x")
    for name in (".ipynb_checkpoints", "__MACOSX", "dog/.thumbnails"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(picture())
    os.symlink(tmp_path / "dog" / "0.png", tmp_path / "cat" / "link.png")
    os.symlink(tmp_path, tmp_path / "dog" / "loop")
    data = ImageFolder(tmp_path)
    assert data.classes == ("cat", "dog")
    names = [os.path.relpath(name, tmp_path) for name in data.names]
    assert names == ["cat/0.png", "cat/1.png", "cat/link.png", "dog/0.png", "dog/1.png"]


def test_files_of_other_kinds_are_counted(tmp_path, monkeypatch):
    """Photos of a phone are not left out without a word."""
    monkeypatch.setattr(kinds, "can_read_heif", lambda: False)
    photos(tmp_path, cat=2, dog=2, empty=0)
    for name in ("cat/a.heic", "cat/b.HEIC", "dog/film.mp4"):
        (tmp_path / name).write_bytes(b"x" * 50)
    (tmp_path / "empty" / "c.heic").write_bytes(b"x" * 50)
    message = refused(ImageFolder, tmp_path)
    assert "no images for 1 class (empty)" in message
    assert "cat: 2 files of other kinds left out (.heic 2); HEIC photos need pillow-heif" in message
    assert "empty: 1 file of another kind left out (.heic 1)" in message
    (tmp_path / "empty" / "c.png").write_bytes(picture())
    for kind in (ImageFolder, ImageFiles):
        with pytest.warns(UserWarning, match=r"not all files are images; .*left out .*mp4 1"):
            assert len(kind(tmp_path)) == 5


def test_classes_come_from_training(tmp_path):
    photos(tmp_path / "train", ant=2, bee=2, cow=2)
    photos(tmp_path / "val", bee=1, cow=1)
    photos(tmp_path / "test", cow=1)
    parts = open_images(tmp_path)
    assert {name: part.labels.tolist() for name, part in parts.items()} == {
        "train": [0, 0, 1, 1, 2, 2],
        "val": [1, 2],
        "test": [2],
    }
    assert open_images(tmp_path, part="test")["test"].classes == ("ant", "bee", "cow")
    other = open_images(tmp_path, part="test", classes=("cow", "bee", "ant"))["test"]
    assert other.labels.tolist() == [0]
    assert list(open_images(tmp_path / "train")) == ["train"]


def test_parts_by_their_usual_names(tmp_path):
    photos(tmp_path / "Training", a=1, b=1)
    photos(tmp_path / "validation", a=1, b=1)
    assert list(open_images(tmp_path)) == ["train", "val"]
    photos(tmp_path / "dev", a=1)
    assert "two folders for the same part" in refused(open_images, tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    photos(tmp_path / "1", train=2, boat=2, test=1)
    assert open_images(tmp_path / "1")["train"].classes == ("boat", "test", "train")
    photos(tmp_path / "2", train=2, test=1)
    assert open_images(tmp_path / "2")["train"].classes == ("test", "train")
    photos(tmp_path / "3" / "test", a=2, b=1)
    photos(tmp_path / "3" / "val", b=1)
    assert {part: len(data) for part, data in open_images(tmp_path / "3").items()} == {
        "val": 1,
        "test": 3,
    }
    assert open_images(tmp_path / "3", part="val")["val"].labels.tolist() == [1]
    photos(tmp_path / "4" / "train", a=2, b=1)
    photos(tmp_path / "4", notes=0)
    assert "no images for 1 class (notes)" in refused(open_images, tmp_path / "4")


def test_a_table_beside_the_images(tmp_path):
    """As Hugging Face's `imagefolder` has it; one of captions alone has no say."""
    for part in ("train", "validation"):
        photos(tmp_path, **{part: 2})
        text = "file_name,label\n0.png,cat\n1.png,dog\n"
        (tmp_path / part / "metadata.csv").write_text(text)
    parts = open_images(tmp_path)
    assert {part: data.labels.tolist() for part, data in parts.items()} == {
        "train": [0, 1],
        "val": [0, 1],
    }
    assert open_images(tmp_path / "train")["train"].classes == ("cat", "dog")
    photos(tmp_path / "x", cat=1, dog=1)
    (tmp_path / "x" / "metadata.csv").write_text("file_name,text\ncat/0.png,a cat\n")
    assert open_images(tmp_path / "x")["train"].classes == ("cat", "dog")


def test_names_in_another_unicode_form_are_the_same_class(tmp_path):
    name = "café"
    photos(tmp_path / "train", tea=1, **{unicodedata.normalize("NFD", name): 1})
    photos(tmp_path / "val", **{unicodedata.normalize("NFC", name): 1})
    assert open_images(tmp_path)["val"].labels.tolist() == [0]


def test_limit_keeps_each_class_its_share(tmp_path):
    photos(tmp_path, a=40, b=20, c=2)
    data = ImageFolder(tmp_path, limit=31)
    assert data.counts.tolist() == [20, 10, 1]
    assert data.names == ImageFolder(tmp_path, limit=31).names
    assert ImageFolder(tmp_path, limit=3).counts.tolist() == [1, 1, 1]
    assert len(ImageFolder(tmp_path, limit=2)) == 2
    assert len(ImageFolder(tmp_path, limit=1000)) == 62
    assert "`limit` must be a positive integer" in refused(ImageFolder, tmp_path, limit=0)


def test_images_without_labels(tmp_path):
    photos(tmp_path, a=2, b=1)
    (tmp_path / "c.png").write_bytes(picture())
    data = ImageFiles(tmp_path)
    assert len(data) == 4
    assert not data.labelled
    assert data.classes is None
    photos(tmp_path / "x" / "train", a=2)
    assert len(open_images(tmp_path / "x", labelled=False)["train"]) == 2


def test_folders_that_are_none(tmp_path):
    photos(tmp_path / "ok", a=1, b=1)
    (tmp_path / "empty").mkdir()
    assert "no such folder" in refused(ImageFolder, tmp_path / "no", kind=MissingFileError)
    (tmp_path / "file").write_text("x")
    assert "a file, not a folder" in refused(ImageFolder, tmp_path / "file", kind=MissingFileError)
    assert "holds no class folders; wanted one folder of images per class" in refused(
        ImageFolder, tmp_path / "empty"
    )
    assert "2 images in the folder itself, and no class folders" in refused(
        ImageFolder, photos(tmp_path / "flat", a=2) / "a"
    )
    assert "wanted at least two classes; given one (a)" in refused(
        ImageFolder, photos(tmp_path / "one", a=2)
    )
    assert "no images for 1 class (b); every class needs at least one" in refused(
        ImageFolder, photos(tmp_path / "hole", a=2, b=0, c=1)
    )
    assert "no images in its 2 class folders" in refused(
        ImageFolder, photos(tmp_path / "none", a=0, b=0)
    )
    photos(tmp_path / "parts" / "train", a=1, b=1)
    photos(tmp_path / "parts" / "val", a=1)
    assert "wanted one folder per class; given the parts of a data set (train, val)" in refused(
        ImageFolder, tmp_path / "parts"
    )
    assert "no images in this folder" in refused(ImageFiles, tmp_path / "empty")
    assert "no images for the part 'val'; there are train" in refused(
        open_images, tmp_path / "ok", part="val"
    )
    assert "`part` must be one of train, val, test" in refused(
        open_images, tmp_path / "ok", part="dev"
    )
    assert "`label` is an option of tables" in refused(open_images, tmp_path / "ok", label="x")


def test_names_that_are_easily_confused(tmp_path):
    assert "'Cat' and 'cat' differ only in case, Unicode form or white space" in refused(
        ImageFolder, photos(tmp_path / "1", Cat=1, cat=1)
    )
    assert "'a  b' and 'a b' differ only" in refused(
        ImageFolder, photos(tmp_path / "2", **{"a b": 1, "a  b": 1})
    )
    train = ImageFolder(photos(tmp_path / "3", cat=1, dog=1))
    message = refused(ImageFolder, photos(tmp_path / "4", Cat=1, dog=1), classes=train.classes)
    assert "1 class not among the 2 that training or the model knows: 'Cat'" in message
    assert "Did you mean 'cat'?" in message


def test_links_that_would_be_classes(tmp_path):
    photos(tmp_path / "a", cat=1, dog=1)
    os.symlink(tmp_path / "a", tmp_path / "a" / "loop")
    assert "a link to a folder that contains it" in refused(ImageFolder, tmp_path / "a")
    photos(tmp_path / "b", cat=1, dog=1)
    os.symlink(tmp_path / "b" / "cat", tmp_path / "b" / "puss")
    assert "are links to one folder" in refused(ImageFolder, tmp_path / "b")
    photos(tmp_path / "c", cat=1)
    os.symlink(tmp_path / "b" / "dog", tmp_path / "c" / "dog")
    assert len(ImageFolder(tmp_path / "c")) == 2


def test_images_beside_class_folders_are_named(tmp_path):
    photos(tmp_path, cat=1, dog=1)
    (tmp_path / "stray.jpg").write_bytes(picture())
    with pytest.warns(UserWarning, match=r"1 image beside the class folders left out \(stray.jpg"):
        assert len(ImageFolder(tmp_path)) == 2


# -- tables


@pytest.fixture(name="table")
def table_fixture(tmp_path):
    """Writes a table beside the images a.png to e.png."""
    for i, name in enumerate("abcde"):
        (tmp_path / f"{name}.png").write_bytes(picture(i))

    def write(columns, suffix=".csv", name="t", metadata=None):
        path = tmp_path / f"{name}{suffix}"
        rows = list(zip(*columns.values(), strict=True))
        if suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
        elif suffix == ".jsonl":
            lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
            path.write_text("\n".join(lines))
        else:
            with path.open("w", newline="") as stream:
                writer = csv.writer(stream, delimiter="\t" if suffix == ".tsv" else ",")
                writer.writerows([list(columns), *rows])
        return path

    return write


FILES = ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables_of_each_kind_say_the_same(table, suffix, tmp_path):
    path = table({"file": FILES, "label": ["dog", "cat", "dog"]}, suffix)
    data = ImageTable(path)
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [1, 0, 1]
    assert data.names == [str(tmp_path / name) for name in FILES]
    assert ImageTable(path, classes=("x", "dog", "cat")).labels.tolist() == [1, 2, 1]
    numbers = table({"file_name": FILES, "label": [1.5, 2.0, -3.25]}, suffix)
    data = ImageTable(numbers)
    assert data.problem_type == "regression"
    assert data.labels.tolist() == [1.5, 2.0, -3.25]
    assert data.classes is None


@pytest.mark.parametrize(
    ("suffix", "values"),
    [
        (".csv", ["cat|dog", "", "dog"]),
        (".csv", ["dog;cat", "", "dog"]),
        (".csv", ["dog, cat", "", "dog"]),
        (".jsonl", [["cat", "dog"], [], ["dog"]]),
        (".parquet", [["cat", "dog"], [], ["dog"]]),
    ],
)
def test_several_classes_per_image(table, suffix, values):
    asked = {} if isinstance(values[0], list) else {"problem_type": MULTI}
    data = ImageTable(table({"file": FILES, "labels": values}, suffix), **asked)
    assert data.problem_type == MULTI
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [[1, 1], [0, 0], [0, 1]]
    assert data.labels.dtype == np.float32
    assert data.counts.tolist() == [1, 2]


def test_what_a_label_is_found_out(table):
    def found(values, **options):
        data = ImageTable(table({"file": FILES, "label": values}), **options)
        return data.problem_type, data.classes, data.labels.tolist()

    assert found(["tench, Tinca tinca", "b", "b"])[0] == SINGLE
    assert found(["a|b", "b", "a"])[0] == MULTI
    assert found(["0", "2", "1"]) == (SINGLE, ("0", "1", "2"), [0, 2, 1])
    assert found(["1", "10", "2"]) == (SINGLE, ("1", "2", "10"), [0, 2, 1])
    assert found(["0", "2", "1"], classes=("x", "y", "z")) == (SINGLE, ("x", "y", "z"), [0, 2, 1])
    assert found(["10", "1", "1"], classes=("1", "10")) == (SINGLE, ("1", "10"), [1, 0, 0])
    assert found(["7", "31", "12"], problem_type="regression")[2] == [7.0, 31.0, 12.0]


def test_a_column_for_each_class_or_number(table):
    path = table({"file": FILES, "cat": [1, 0, 1], "dog": [1, 0, 0]})
    data = ImageTable(path, label=["cat", "dog"])
    assert data.labels.tolist() == [[1, 1], [0, 0], [1, 0]]
    assert data.classes == ("cat", "dog")
    assert ImageTable(path, label=["dog", "cat"], classes=("cat", "dog")).labels.tolist() == [
        [1, 1],
        [0, 0],
        [1, 0],
    ]
    path = table({"file": FILES, "x": [1.5, 0, 1], "y": [1, 0, 9]})
    data = ImageTable(path, label=["x", "y"])
    assert data.labels.tolist() == [[1.5, 1], [0, 0], [1, 9]]
    assert data.problem_type == "regression"


HUGGING_FACE = {
    b"huggingface": json.dumps(
        {
            "info": {
                "features": {
                    "image": {"_type": "Image"},
                    "label": {"names": ["zebra", "ant", "never"], "_type": "ClassLabel"},
                }
            }
        }
    ).encode()
}


def test_parquet_as_hugging_face_writes_it(table, tmp_path):
    """Bytes and path of each image, and class names in the schema, as `Dataset.to_parquet` of
    `datasets` 5.2 writes them."""
    images = [
        {"bytes": picture(1), "path": "x.jpg"},
        {"bytes": picture(2), "path": None},
        {"bytes": None, "path": "c.png"},
    ]
    path = table({"image": images, "label": [1, 0, 1]}, ".parquet", metadata=HUGGING_FACE)
    data = ImageTable(path)
    assert data.classes == ("zebra", "ant", "never")
    assert data.labels.tolist() == [1, 0, 1]
    assert data.image(0) == picture(1)
    assert data.image(2) == str(tmp_path / "c.png")
    assert data.names == ["x.jpg (row 0)", f"{path} (row 1)", str(tmp_path / "c.png")]
    assert check_images(data) == []
    assert ImageTable(path, classes=("ant", "bee", "zebra", "never")).labels.tolist() == [0, 2, 0]
    assert "2 that training or the model knows: 'ant'" in refused(
        ImageTable, path, classes=("zebra", "x")
    )
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        columns = {"image": images[:2], "label": [1, 0]}
        table(columns, ".parquet", name=f"data/{name}", metadata=HUGGING_FACE)
    parts = open_images(tmp_path)
    assert {part: images.labels.tolist() for part, images in parts.items()} == {
        "train": [1, 0, 1, 0],
        "test": [1, 0],
    }
    assert len(ImageTable(tmp_path / "data" / "train-*.parquet")) == 4


def test_parts_of_a_table(table):
    path = table(
        {"file": FILES, "label": ["b", "a", "b"], "split": ["train", "train", "validation"]}
    )
    parts = open_images(path)
    assert {part: images.labels.tolist() for part, images in parts.items()} == {
        "train": [1, 0],
        "val": [1],
    }
    table({"file": FILES, "label": ["a|b", "a", "b"]}, name="train")
    table({"file": FILES, "label": ["b", "a", "b"]}, name="val")
    parts = open_images(path.parent)
    assert parts["val"].labels.tolist() == [[0, 1], [1, 0], [0, 1]], "as training has them"
    assert list(open_images(table({"file": FILES, "label": ["a", "b", "b"]}))) == ["train"]
    assert "must say train, val or test in each row; given 'x'" in refused(
        open_images, table({"file": FILES, "label": ["a", "b", "b"], "split": ["train", "x", "x"]})
    )


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (["a", "", "b"], {}, "1 row without a label (line 3)"),
        (["0", "-1", "-100"], {}, "2 rows with a negative label (line 3, line 4)"),
        (["0", "3", "1"], {"classes": "xyz"}, "1 row whose label is out of range (line 3); wanted"),
        (["0", "0.5", "x"], {}, "1 row whose label is a fraction (line 3)"),
        (["1.0", "0.5", "2"], {"problem_type": SINGLE}, "1 row whose label is a fraction (line 3)"),
        (["1.0", "nan", "x"], {"problem_type": "regression"}, "2 rows whose label is no finite"),
        (["a", "b", "B"], {}, "'B' and 'b' differ only in case"),
        (["a", "q", "b"], {"classes": "ab"}, "1 class not among the 2"),
        (["a", "a", "a"], {}, "wanted at least two classes; given one (a)"),
        (["a", "b", "a"], {"problem_type": "classes"}, "`problem_type` must be one of single_"),
        (["a", "b", "a"], {"label": "lable"}, "no column 'lable' for the label; the table has"),
        (["a", "b", "a"], {"image": "x"}, "no column 'x' for the image; the table has file, label"),
        (["1", "2", "0"], {"label": ["label"], "problem_type": MULTI}, "must hold 0 or 1; given"),
        (["a", "b", "b"], {"classes": "aab"}, "'a' stands for 2 of the 3 classes"),
        (["0", "1", "1"], {"classes": "aab"}, "'a' stands for 2 of the 3 classes"),
    ],
)
def test_labels_that_cannot_be_trained_on(table, values, options, message):
    assert message in refused(ImageTable, table({"file": FILES, "label": values}), **options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([{"a": 1}, "b", "c"], "1 row whose label is of no kind that is known (line 1, {'a': 1})"),
        ([["a", ["b"]], [], []], "1 row whose label is of no kind that is known (line 1"),
        ([["a", None], ["b"], []], "1 row whose label is of no kind that is known (line 1"),
        ([None, "a", "b"], "1 row without a label (line 1)"),
        ([float("nan"), 1.5, 2], "1 row without a label (line 1)"),
        ([10**400, 1.5, 2], "whose label is no finite number"),
    ],
)
def test_values_of_other_kinds(table, values, message):
    assert message in refused(ImageTable, table({"file": FILES, "label": values}, ".jsonl"))


def test_paths_written_on_windows(table, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").write_bytes(picture())
    data = ImageTable(table({"file": ["x\\a.png", "b.png"], "label": "ab"}))
    assert data.names == [str(tmp_path / "x" / "a.png"), str(tmp_path / "b.png")]


def test_class_folders_whose_names_are_no_text(tmp_path):
    photos(tmp_path, cat=1)
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    assert "the name of a class folder must be UTF-8; given '\\udcff'" in refused(
        ImageFolder, tmp_path
    )


def test_images_that_a_table_names_in_vain(table, tmp_path):
    names = ["a.png", *(f"no{i}.png" for i in range(7))]
    path = table({"file": names, "label": list("abababab")})
    message = refused(ImageTable, path, kind=MissingFileError)
    assert "7 images of 8 not there" in message
    assert f"{tmp_path / 'no4.png'} and 2 more" in message
    assert len(ImageTable(table({"file": FILES, "label": "aba"}), root=tmp_path)) == 3
    for name, text in (("", "line 2 names no image"), ("http://x/a.png", "Download it first")):
        path = table({"file": [name], "label": ["a"]})
        assert text in refused(ImageTable, path)


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".csv", b"", "the file is empty"),
        (".csv", b"file,label\n", "no rows"),
        (".csv", b"file,label\na.png,x,y\n", "line 2 has 3 fields; the header has 2 (file, label)"),
        (".csv", b"file,file\na,b\n", "the column 'file' comes twice"),
        (".csv", b"x,y\na,b\n", "no column for the image; looked for file, file_name"),
        (".csv", b"file,label\na.png,\xff\n", "not UTF-8"),
        (".csv", b'file,label\na.png,"x\n', "cannot be read as CSV"),
        (".jsonl", b'{"file": "a.png"', "line 1 is not JSON"),
        (".jsonl", b"\n[1, 2]\n", "line 2 must be a JSON object {...}; given a list"),
        (".jsonl", b'{"file": "a.png"}\n', "no column for the label"),
        (".parquet", b"PAR1 and more", "cannot be read as Parquet"),
        (".xlsx", b"PK", "wanted a table (.csv, .tsv, .jsonl, .ndjson, .parquet)"),
    ],
)
def test_tables_that_are_none(tmp_path, suffix, content, message):
    path = tmp_path / f"t{suffix}"
    path.write_bytes(content)
    assert message in refused(ImageTable, path)


def test_tables_of_spreadsheets(tmp_path):
    """A mark at the beginning, semicolons, blank lines."""
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "t.csv").write_bytes("\ufeffFile;Label\r\na.png;ä\r\n\r\na.png;b\r\n".encode())
    assert ImageTable(tmp_path / "t.csv").classes == ("b", "ä")
    missing = refused(ImageTable, tmp_path / "no.csv", kind=MissingFileError)
    assert "cannot be read" in missing


# -- objects of other libraries


class HuggingFace:
    """The face of `datasets.Dataset` 5.2; a column is read without decoding images."""

    class ClassLabel:
        names = ("zebra", "ant")

    column_names = ("image", "label")
    features = {"image": object(), "label": ClassLabel()}  # noqa: RUF012
    decoded = 0

    def __len__(self):
        return 4

    def __getitem__(self, key):
        if key == "label":
            return [0, 1, 1, 0]
        HuggingFace.decoded += 1
        return {"image": PIL.Image.new("RGB", (4, 4), (key, 0, 0)), "label": [0, 1, 1, 0][key]}


def test_objects_with_items_by_index():
    grain = pytest.importorskip("grain")
    data = as_images(HuggingFace())
    assert data.classes == ("zebra", "ant")
    assert data.labels.tolist() == [0, 1, 1, 0]
    assert HuggingFace.decoded == 0
    assert data.image(3).getpixel((0, 0)) == (3, 0, 0)
    pairs = [(np.full((4, 4, 3), i, np.uint8), "ab"[i % 2]) for i in range(5)]
    source = grain.MapDataset.source(pairs)
    for given in (pairs, source, source.map(lambda pair: {"img": pair[0], "labels": pair[1]})):
        data = as_images(given)
        assert data.labels.tolist() == [0, 1, 0, 1, 0]
        assert data.classes == ("a", "b")
        assert data.image(3)[0, 0, 0] == 3
        assert data.select([3]).image(0)[0, 0, 0] == 3
    assert as_images(data) is data
    assert len(ImageObjects(pairs, limit=2)) == 2
    assert as_images(pairs, classes=("b", "a")).labels.tolist() == [1, 0, 1, 0, 1]
    other = [(image, "b") for image, _ in pairs]
    assert as_images(other, like=as_images(pairs)).labels.tolist() == [1] * 5


def test_objects_of_torchvision(tmp_path):
    import timm_models  # noqa: F401
    from torchvision.datasets import ImageFolder as TheirFolder

    photos(tmp_path, cat=2, dog=3)
    data = as_images(TheirFolder(tmp_path))
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1, 1, 1]
    assert as_images(str(tmp_path)).labels.tolist() == [0, 0, 1, 1, 1]
    photos(tmp_path / "new", dog=1)
    assert as_images(str(tmp_path / "new"), like=data).labels.tolist() == [1]
    (tmp_path / "t.csv").write_text("file,label\nnew/dog/0.png,dog\n")
    assert as_images(tmp_path / "t.csv", like=data).labels.tolist() == [1]


def test_objects_that_are_none():
    grain = pytest.importorskip("grain")
    assert "given generator. A stream has no order" in refused(as_images, (i for i in range(3)))
    assert "has no items" in refused(as_images, [])
    assert "items must be (image, label)" in refused(as_images, [1, 2])
    assert "no key for the label; the items have image, x" in refused(
        as_images, [{"image": 1, "x": 2}]
    )
    source = grain.MapDataset.source([(1, 0), (2, 1), (3, 1)])
    assert "so it repeats without end; give one pass" in refused(as_images, source.repeat())
    holes = source.filter(lambda pair: pair[0] != 2)
    assert "item 1 is None; wanted an image and a label" in refused(as_images, holes)
    assert "A stream has no order" in refused(as_images, source.to_iter_dataset())
    assert "1 row with a negative label (item 1)" in refused(as_images, [(1, 0), (1, -1)])


@pytest.mark.parametrize(
    ("labels", "problem_type", "message"),
    [
        ([0, 3], SINGLE, "1 label is out of range, the first 3 (image 1); wanted class indices"),
        ([0, -100], SINGLE, "out of range, the first -100"),
        ([0.5, 1], SINGLE, "must be whole numbers"),
        (["a", "b"], SINGLE, "labels must be numbers; given <U1"),
        ([0], SINGLE, "given 2 images, 1 labels and 2 names"),
        ([[0, 1], [1, 1]], MULTI, "3 long; given shape (2, 2)"),
        ([[0, 1, 2], [1, 1, 0]], MULTI, "zeros and ones"),
        ([0, np.nan], "regression", "must be finite numbers"),
        ([0, 1], "classes", "`problem_type` must be one of"),
    ],
)
def test_labels_out_of_range(labels, problem_type, message):
    call = lambda: LabelledImages(  # noqa: E731
        ["a", "b"], labels, classes=("x", "y", "z"), problem_type=problem_type
    )
    assert message in refused(call)


# -- what is wrong with images


def test_images_that_cannot_be_read_are_named(tmp_path):
    photos(tmp_path, cat=3, dog=2)
    (tmp_path / "cat" / "0.png").write_bytes(b"")
    (tmp_path / "cat" / "1.png").write_bytes(picture()[:80])
    (tmp_path / "dog" / "0.png").write_text("no image")
    os.symlink(tmp_path / "gone.png", tmp_path / "dog" / "gone.png")
    found = check_images(ImageFolder(tmp_path))
    names = [os.path.relpath(name, tmp_path) for name, _ in found]
    assert names == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/gone.png"]
    assert all(message.startswith(name) for name, message in found)
    assert "the file is empty" in found[0][1]


def test_images_of_two_parts_are_found(tmp_path):
    photos(tmp_path / "train", cat=3, dog=3)
    photos(tmp_path / "val", cat=1, dog=1)
    copy = picture(500)
    for name in ("train/cat/0.png", "val/dog/0.png", "train/dog/1.png", "train/dog/2.png"):
        (tmp_path / name).write_bytes(copy)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(picture(501))
    (tmp_path / "train" / "cat" / "2.png").write_bytes(picture(501))
    found = survey(open_images(tmp_path)).same
    assert [[(p, os.path.relpath(n, tmp_path)) for p, n in group] for group in found] == [
        [
            ("train", "train/cat/0.png"),
            ("train", "train/dog/1.png"),
            ("train", "train/dog/2.png"),
            ("val", "val/dog/0.png"),
        ]
    ]


# -- order


def test_order_is_a_function_of_seed_and_epoch():
    """Each is a permutation by the raw numbers of numpy's Philox, which numpy keeps."""
    orders = {(s, e): epoch_order(100, s, e) for s in range(3) for e in range(3)}
    assert all(sorted(order) == list(range(100)) for order in orders.values())
    assert len({order.tobytes() for order in orders.values()}) == 9
    philox = np.random.Philox(key=np.array([2, 1], np.uint64), counter=[0, 1, 0, 0])
    np.testing.assert_array_equal(orders[2, 1], np.argsort(philox.random_raw(100), kind="stable"))
    # Every place is as likely for every image.
    places = np.array([np.argsort(epoch_order(5, 7, e)) for e in range(2000)])
    assert np.abs(places.mean(axis=0) - 2).max() < 0.15


@pytest.mark.parametrize(("n", "repeats"), [(10, 3), (9, 3), (100, 4), (5, 1), (2, 5)])
def test_repeats_against_timm(monkeypatch, n, repeats):
    import timm_models  # noqa: F401
    import torch
    from timm.data.distributed_sampler import RepeatAugSampler

    order = epoch_order(n, 0, 1)
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.tensor(order))
    theirs = RepeatAugSampler(range(n), num_replicas=1, rank=0, num_repeats=repeats)
    ours = epoch_order(n, 0, 1, repeats=repeats)
    assert ours.tolist() == list(theirs)
    counts = [list(ours[:i]).count(index) for i, index in enumerate(ours)]
    assert occurrences(ours).tolist() == counts


def test_balanced_sampling():
    """Every class as often as every other, and within a class every image, or nearly."""
    labels = np.repeat([0, 1, 3], [70, 25, 5])
    orders = [epoch_order(100, 0, e, labels=labels) for e in range(30)]
    for order in orders:
        counts = np.bincount(labels[order])
        assert sorted(counts.tolist()) == [0, 33, 33, 34]
        each = np.bincount(order, minlength=100)
        for label in (0, 1, 3):
            assert np.ptp(each[labels == label]) <= 1
    assert len({order.tobytes() for order in orders}) == 30
    assert np.ptp(np.bincount(np.concatenate(orders))[labels == 0]) < 17, "all come in the end"
    assert np.ptp(sum(np.bincount(labels[order]) for order in orders)[[0, 1, 3]]) < 20


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_split_against_scikit_learn(share):
    """As many of each class as `train_test_split(stratify=...)` takes, or one more or less."""
    labels = np.repeat(np.arange(5), [40, 23, 11, 60, 9])
    data = LabelledImages([str(i) for i in range(len(labels))], labels, classes="abcde")
    train, held = split(data, share, seed=3)
    _, theirs = sklearn.model_selection.train_test_split(
        labels, test_size=int(share * len(labels) + 0.5), stratify=labels, random_state=0
    )
    assert len(held) == len(theirs)
    assert np.abs(held.counts - np.bincount(theirs)).max() <= 1
    assert sorted(train.names + held.names, key=int) == data.names
    again = split(data, share, seed=3)[1]
    assert again.names == held.names
    assert split(data, share, seed=4)[1].names != held.names
    assert held.classes == train.classes == data.classes


def test_split_of_few_images():
    """A class of one image stays in training; there is one image on each side at least."""
    data = LabelledImages([str(i) for i in range(12)], [0] * 10 + [1, 2], classes="abc")
    train, held = split(data, 0.5)
    assert train.counts.tolist() == [4, 1, 1]
    assert held.counts.tolist() == [6, 0, 0]
    lone = LabelledImages(["a", "b"], [0, 1], classes="ab")
    assert "leaves 0 for validation" in refused(split, lone, 0.5)
    for share in (0, 1, 1.5, "x", True):
        assert "must lie between 0 and 1" in refused(split, data, share)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_split_of_images_with_several_classes(share):
    """Each class by its share, to within one or two images, also the rare ones; and the sides'
    sizes."""
    rng = np.random.default_rng(0)
    labels = rng.random((300, 6)) < [0.5, 0.3, 0.1, 0.05, 0.02, 0.02]
    names = [str(i) for i in range(300)]
    data = LabelledImages(names, labels, classes="abcdef", problem_type=MULTI)
    for seed in range(3):
        train, held = split(data, share, seed)
        assert sorted(train.names + held.names, key=int) == data.names
        assert abs(len(held) - 300 * share) <= 3
        assert np.abs(held.counts - share * data.counts).max() <= 2
        assert held.counts.min() > 0
        assert split(data, share, seed)[1].names == held.names
    assert split(data, share, 0)[1].names != held.names
    few = LabelledImages(names[:4], np.eye(4), classes="abcd", problem_type=MULTI)
    assert list(map(len, split(few, 0.25))) == [3, 1]
