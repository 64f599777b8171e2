"""Evaluation: every image counts once, classes are found by name, peers have the same numbers."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from networks import flax_twin, make_config, random_weights, torch_reference
from PIL import Image
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    confusion_matrix,
    log_loss,
    r2_score,
    top_k_accuracy_score,
)

import vit_flax
from vit_cli.main import main
from vit_cli.reports.evaluation import write_predictions
from vit_cli.runs.labelled import open_folder, open_for
from vit_common.embedded import embedded_checkpoint
from vit_common.errors import ImageError, InputError
from vit_flax import AutoConfig
from vit_flax.training.evaluate import Evaluator, evaluate

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
SMALL |= {"intermediate_size": 16, "patch_size": 4}
NAMES = ("cat", "dog", "hen", "owl", "pig")


@dataclass
class Images:
    """A data set of arrays in memory."""

    labels: np.ndarray
    classes: tuple[str, ...] | None = NAMES
    problem_type: str = "single_label_classification"
    broken: set[int] = field(default_factory=set)
    read: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> list[str]:
        return [f"{i}.png" for i in range(len(self))]

    def image(self, i: int) -> Image.Image:
        self.read.append(i)
        if i in self.broken:
            raise ImageError(f"{i}.png: is broken.")
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        return Image.fromarray(pixels)


def config_of(**overrides):
    names = dict(enumerate(NAMES))
    return make_config(**{**SMALL, "id2label": names, **overrides})


@pytest.fixture(name="model", scope="module")
def model_fixture():
    config = config_of()
    return flax_twin(
        vit_flax.FlaxViTForImageClassification, config, random_weights(config, "classifier")
    )


@pytest.fixture(name="evaluator", scope="module")
def evaluator_fixture(model):
    return Evaluator(model, batch_size=4)


@pytest.fixture(name="reference", scope="module")
def reference_fixture():
    """Transformers' logits of the first images of a data set."""
    config = config_of()
    twin = torch_reference(
        transformers.ViTForImageClassification, config, random_weights(config, "classifier")
    )
    prepare = transformers.ViTImageProcessor(
        size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )

    def logits(data, count: int) -> np.ndarray:
        pixels = prepare([data.image(i) for i in range(count)], return_tensors="pt")
        with torch.no_grad():
            return twin(**pixels).logits.numpy()

    return logits


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_every_image_is_run_once(evaluator, reference, count):
    data = Images(np.arange(count) % 5)
    found = evaluator(data)
    assert sorted(data.read) == list(range(count))
    assert found.metrics["images"] == count
    want = reference(data, count)
    np.testing.assert_allclose(found.logits, want, atol=1e-5)
    assert found.metrics["top1"] == np.mean(want.argmax(1) == data.labels)


def test_one_program_serves_all_batches_and_parameters(evaluator, model):
    import jax

    evaluator(Images(np.arange(7) % 5))
    other = jax.tree.map(lambda leaf: leaf * 0, model.params)
    assert not evaluator(Images(np.arange(3)), params=other).logits.any()
    assert evaluator._run._cache_size() == 1


def test_what_cannot_be_read_is_left_out_and_named(evaluator):
    labels = np.array([0, 1, 2, 3, 4, 0])
    found = evaluator(Images(labels, broken={1, 5}))
    assert found.skipped == [("1.png", "1.png: is broken."), ("5.png", "5.png: is broken.")]
    assert found.names == ["0.png", "2.png", "3.png", "4.png"]
    assert found.index.tolist() == [0, 2, 3, 4]
    assert found.labels.tolist() == [0, 2, 3, 4]
    whole = evaluator(Images(labels))
    np.testing.assert_array_equal(found.logits, whole.logits[found.index])


def test_classes_are_matched_by_name(evaluator):
    data = Images(np.array([0, 1, 1]), classes=("Owl", "cat"))
    assert evaluator(data).labels.tolist() == [3, 0, 0]
    with pytest.raises(InputError, match="1 of 2 classes is unknown to the model: 'horse'"):
        evaluator(Images(np.array([0, 1]), classes=("cat", "horse")))


def test_several_labels_and_quantities(model):
    labels = np.eye(5)[[0, 1, 2]] + np.eye(5)[[1, 2, 3]]
    data = Images(labels, problem_type="multi_label_classification", classes=NAMES[::-1])
    several = Evaluator(with_config(model, problem_type="multi_label_classification"), batch_size=4)
    found = several(data)
    np.testing.assert_array_equal(found.labels, labels[:, ::-1])
    want = average_precision_score(found.labels[:, 1:], found.logits[:, 1:])
    assert found.metrics["map"] == pytest.approx(want)
    one = several(Images(np.array([4, 0])))  # one class each, of the several there may be
    np.testing.assert_array_equal(one.labels, np.eye(5)[[4, 0]])

    data = Images(np.arange(15.0).reshape(3, 5), None, "regression")
    found = Evaluator(with_config(model, problem_type="regression"), batch_size=4)(data)
    assert found.metrics["r2"] == pytest.approx(r2_score(data.labels, found.logits))
    assert found.classes is None


class Changed:
    """A model whose configuration says something else."""

    def __init__(self, model, changes) -> None:
        self.model, self.params = model, model.params
        self.network_params = model.network_params
        self.config = copy.deepcopy(model.config)
        for name, value in changes.items():
            setattr(self.config, name, value)

    def __call__(self, *args, **options):
        return self.model(*args, **options)


def with_config(model, **changes):
    return Changed(model, changes)


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        ({}, Images(np.zeros(0, int)), "no images"),
        ({}, Images(np.array([0, 7]), None), "from 0 to 4; given 7"),
        ({"problem_type": "regression"}, Images(np.array([0])), "predicts a quantity"),
        (
            {"problem_type": "single_label_classification"},
            Images(np.zeros((1, 5)), NAMES, "multi_label_classification"),
            "predicts one class",
        ),
        ({"problem_type": "regression"}, Images(np.zeros(2), None, "regression"), "5 quantities"),
    ],
)
def test_data_of_another_kind_is_refused(model, changes, data, message):
    with pytest.raises(InputError, match=message):
        Evaluator(with_config(model, **changes), batch_size=4)(data)


def test_nan_is_named_with_its_image(evaluator, model):
    import jax

    broken = jax.tree.map(lambda leaf: leaf * np.nan, model.params)
    with pytest.raises(InputError, match=r"not finite .* 2 of 2 images, the first is 0\.png"):
        evaluator(Images(np.array([0, 1])), params=broken)


@pytest.mark.slow
def test_devices_share_a_batch(model):
    import jax

    if len(jax.devices()) < 2:
        pytest.skip("one device")
    data = Images(np.arange(7) % 5, broken={3})
    want = Evaluator(model, batch_size=4)(data)
    found = Evaluator(model, batch_size=3, mesh="auto")(data)
    np.testing.assert_allclose(found.logits, want.logits, atol=1e-6)
    assert found.skipped == want.skipped


# -- the command


@pytest.fixture(name="photos", scope="module")
def photos_fixture(tmp_path_factory):
    """The digits of the package in class folders, with one file that is no image; and its name."""
    root = tmp_path_factory.mktemp("digits") / "test"
    for path in sorted((embedded_checkpoint() / "images").glob("*.png")):
        digit = path.name.split("-")[1]
        (root / digit).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / digit / path.name)
    shutil.copy(root / "7" / "digit-7-01.png", root / "1" / "wrong.png")
    (root / "0" / "broken.png").write_bytes(b"no image")
    return root


@pytest.fixture(name="found", scope="module")
def found_fixture(photos, tmp_path_factory):
    """What the command printed and wrote."""
    folder = tmp_path_factory.mktemp("out")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        options = ["--json", "--batch-size", "4", "--report", str(folder / "r.html")]
        rows = str(folder / "rows.jsonl")
        code = main(["evaluate", str(photos), *options, "--output", rows, "--probabilities"])
    return code, json.loads(printed.getvalue()), folder


def test_the_command_s_numbers_are_those_of_its_rows(found):
    code, summary, folder = found
    assert code == 1  # one file was no image
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows, errors = [r for r in rows if "error" not in r], [r for r in rows if "error" in r]
    assert [row["file"] for row in errors] == [row["file"] for row in summary["skipped"]]
    assert len(rows) == summary["images"] == 13
    true = [row["label_index"] for row in rows]
    taken = [row["predicted_index"] for row in rows]
    odds = np.array([row["probabilities"] for row in rows])
    metrics = summary["metrics"]
    assert metrics["top1"] == accuracy_score(true, taken) == 12 / 13
    assert metrics["top5"] == top_k_accuracy_score(true, odds, k=5, labels=range(10))
    assert metrics["top5"] == np.mean([row["rank"] < 5 for row in rows])
    assert metrics["log_loss"] == pytest.approx(log_loss(true, odds, labels=range(10)), rel=1e-6)
    np.testing.assert_array_equal(
        metrics["confusion"], confusion_matrix(true, taken, labels=range(10))
    )
    (wrong,) = [row for row in rows if not row["correct"]]
    assert Path(wrong["file"]).name == "wrong.png"
    assert (wrong["label"], wrong["predicted"]) == ("1", "7")
    assert "wrong.png" in (folder / "r.html").read_text()


def test_rows_in_other_formats_are_the_same(found, photos, tmp_path):
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in (found[2] / "rows.jsonl").read_text().splitlines()]
    evaluation = evaluate(str(embedded_checkpoint()), open_folder(photos), batch_size=4)
    for suffix in (".csv", ".parquet"):
        write_predictions(str(tmp_path / f"rows{suffix}"), evaluation, every=True)
    with open(tmp_path / "rows.csv", newline="") as stream:
        read = [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(stream)]
    for row, want in zip(read, rows, strict=True):
        assert row == {
            name: json.dumps(value) if isinstance(value, (bool, list)) else str(value)
            for name, value in want.items()
        }
    table = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [{k: v for k, v in row.items() if v is not None} for row in table] == rows


def test_tables_have_the_labels_that_folders_have(photos, tmp_path, capsys):
    files = sorted(path for path in photos.glob("*/*.png") if path.name != "broken.png")
    lines = [
        f"{path},{path.parent.name},{'test' if i % 2 else 'val'}" for i, path in enumerate(files)
    ]
    table = tmp_path / "digits.csv"
    table.write_text("\n".join(["file,label,split", *lines]))
    digits = AutoConfig.from_pretrained(embedded_checkpoint())
    both = [open_for(digits, str(table), part=part)[0] for part in ("val", "test")]
    opened = {data.names[i]: data.labels[i] for data in both for i in range(len(data))}
    assert opened == {str(path): int(path.parent.name) for path in files}
    chosen, part = open_for(digits, str(table))
    assert (part, len(chosen)) == ("test", len(both[1]))
    assert "evaluating the test images" in capsys.readouterr().err
    folder, part = open_for(digits, str(photos.parent), part="test")
    assert (part, len(folder)) == ("test", len(files) + 1)


def test_words_on_a_pipe(photos, capsys):
    assert main(["evaluate", str(photos), "--limit", "6", "--top-k", "1,3", "--batch-size=4"]) in (
        0,
        1,
    )
    said = capsys.readouterr()
    assert "top-3 accuracy" in said.out
    assert "top-5" not in said.out
    assert "\x1b" not in said.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{tmp}/none"], "none: no such folder or table"),
        ([], "wanted one folder or table"),
        (["{tmp}/a.txt"], "wanted a folder of class folders, or a table"),
        (["{tmp}/empty"], "no class folders"),
        (["{tmp}/alien"], "1 of 1 classes is unknown to the model: 'horse'"),
        (["{photos}", "--split", "val"], "no part 'val'"),
        (["{photos}", "--top-k", "0"], "positive integer"),
        (["{photos}", "--force"], "--force is for --output"),
        (["{photos}", "--probabilities"], "--probabilities is for --output"),
        (["{photos}", "--report", "x.pdf"], "must end in .html"),
        (["{photos}", "--report", "{tmp}/r.html"], "already there"),
        (["{photos}", "--output", "{tmp}/none/r.csv"], "no such directory"),
        (["{photos}", "--output", "r.txt"], "must end in .jsonl"),
        (["{photos}", "--label-column", "x"], "for a table"),
        (["{photos}", "--devices", "99"], "--devices must be at most"),
    ],
)
def test_options_that_are_wrong(options, message, photos, tmp_path, capsys):
    (tmp_path / "a.txt").touch()
    (tmp_path / "r.html").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "alien" / "horse").mkdir(parents=True)
    shutil.copy(photos / "1" / "wrong.png", tmp_path / "alien" / "horse")
    given = [option.format(tmp=tmp_path, photos=photos) for option in options]
    assert main(["evaluate", *given]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
