"""`fine_tune`: a whole run, and what stops it, resumes it or is refused."""

from __future__ import annotations

import inspect
import json
import os

import jax
import numpy as np
import PIL.Image
import pytest
import sklearn.metrics
import torch
import transformers
from jax.experimental.compilation_cache import compilation_cache
from training_runs import log_of, pictures, save_tiny, short, tiny_config

from vit_common.datasets import LabelledImages
from vit_common.errors import (
    ConfigError,
    ExistingFileError,
    ImageError,
    InputError,
    MissingFileError,
    ViTError,
)
from vit_common.images.processor import ViTImageProcessor
from vit_common.presets import PRESETS
from vit_common.recipes import recipe
from vit_flax import FlaxViTForImageClassification, FlaxViTModel
from vit_flax.training import Diverged, Stopped, Watcher, fine_tune, make_plan
from vit_flax.training.begin import begin
from vit_flax.training.checkpoints import Checkpoints
from vit_flax.training.evaluate import Evaluator
from vit_flax.training.logs import RunFolder

TRAIN, VALIDATION = pictures(0, 9), pictures(1, 5)
STEPS = 9  # 27 pictures in batches of 8, three epochs


class Told(Watcher):
    """What a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[int] = []

    def say(self, line: str) -> None:
        assert "\n" not in line
        self.lines.append(line)

    def step(self, row) -> None:
        self.steps.append(row["step"])


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The same step is compiled once, for all the runs here."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("xla")), 0.1), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run that nothing disturbs, and what it said."""
    told = Told()
    run = fine_tune(
        str(tiny),
        TRAIN,
        validation=VALIDATION,
        recipe=short(),
        output=tmp_path_factory.mktemp("whole") / "run",
        watcher=told,
    )
    return run, told


@pytest.mark.parametrize("given", [False, True])
def test_only_a_model_that_was_given_keeps_its_parameters_beside_the_run(tiny, given):
    class Looks(Told):
        def begin(self, plan, step) -> None:
            self.leaves = jax.tree.leaves(plan.model.params)

        def step(self, row) -> None:
            super().step(row)
            assert {leaf.is_deleted() for leaf in self.leaves} == {not given}

    model = str(tiny)
    if given:
        model = FlaxViTForImageClassification(tiny_config(num_labels=3))
    run = fine_tune(model, TRAIN, recipe=short(steps=2, drop_path=0.0), watcher=(looks := Looks()))
    assert looks.steps == [1, 2]
    assert np.isfinite(jax.tree.leaves(run.model.params)[0]).all()


def logits_of(folder) -> np.ndarray:
    """What Transformers makes of the validation with a folder's model and preprocessing."""
    model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    prepare = transformers.ViTImageProcessor.from_pretrained(folder)
    images = [PIL.Image.fromarray(VALIDATION.image(i)) for i in range(len(VALIDATION))]
    with torch.no_grad():
        return model(**prepare(images, return_tensors="pt")).logits.numpy()


@pytest.mark.slow
def test_the_result_is_a_checkpoint_like_any_other(whole):
    run, told = whole
    assert told.steps == list(range(1, STEPS + 1))
    logits = logits_of(run.folder)  # with the resize of the Hub's usual processor
    np.testing.assert_allclose(run.evaluation.logits, logits, atol=2e-5)
    top1 = sklearn.metrics.accuracy_score(VALIDATION.labels, logits.argmax(-1))
    assert run.metrics["top1"] == pytest.approx(top1)
    config = json.loads((run.folder / "config.json").read_text())
    assert config["id2label"] == {"0": "dark", "1": "light", "2": "mid"}
    assert config["problem_type"] == "single_label_classification"
    assert run.best.step in {3, 6, 9}
    assert run.best.value == max(row["validation"]["top1"] for row in run.history)
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    head = [line for line in told.lines if "its head for 5 classes is replaced" in line]
    assert len(head) == 1


@pytest.mark.slow
def test_the_card_says_how_it_was_made(whole):
    run, _ = whole
    card = (run.folder / "README.md").read_text()
    for part in ("27 training images", "dark (9)", "| epoch | step | loss | top1 |", "jax 0."):
        assert part in card
    assert "| batch_size | `8` |" in card
    assert os.sep + "tmp" not in card  # nothing of this machine
    metadata = card.split("---")[1]
    assert "pipeline_tag: image-classification" in metadata


def test_the_log_has_each_step_once(whole):
    rows = log_of(whole[0].folder)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "validation" in row] == [3, 6, 9]


def test_a_run_that_was_stopped_goes_on_to_the_bit(tiny, whole, tmp_path):
    given = {"validation": VALIDATION, "recipe": short(), "output": tmp_path / "run"}
    told = Told()  # is asked to stop in the first validation
    with pytest.raises(Stopped, match=r"stopped after step 3 of 9: saved in .*--resume"):
        fine_tune(str(tiny), TRAIN, **given, watcher=told, stop=lambda: len(told.steps) >= 3)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped"
    assert "validation" not in log_of(tmp_path / "run")[-1]
    told = Told()  # in the middle of an epoch
    with pytest.raises(Stopped, match="stopped after step 5 of 9") as stopped:
        fine_tune(
            str(tiny), TRAIN, **given, resume=True, watcher=told, stop=lambda: 4 in told.steps
        )
    assert stopped.value.step == 5
    # The last line of a log may be half written, and later steps may have been logged.
    with (tmp_path / "run" / "log.jsonl").open("a") as stream:
        stream.write('{"step": 6, "loss": 0.1}\n{"step": 7, "lo')
    told = Told()
    run = fine_tune(str(tiny), TRAIN, **given, resume=True, watcher=told, workers=1)
    assert "going on after step 5 of 9" in told.lines
    assert told.steps == list(range(6, STEPS + 1))
    expected = whole[0]
    assert log_of(run.folder) == log_of(expected.folder)
    assert run.history == expected.history
    assert run.best == expected.best
    files = ("model.safetensors", "config.json", "preprocessor_config.json")
    for name in files:
        assert (run.folder / name).read_bytes() == (expected.folder / name).read_bytes()
    assert read_checkpoint(run.folder, STEPS) == read_checkpoint(expected.folder, STEPS)


def read_checkpoint(folder, step: int) -> dict:
    """Digests of all arrays of a checkpoint: parameters, moments, average and key."""
    checkpoints = Checkpoints(folder / "checkpoints")
    found = checkpoints._read_record(step)[1]["digests"]
    checkpoints.close()
    names = {name.split("/")[0] for name in found}
    assert {"params", "opt_state", "ema", "key@0:2", "step@"} <= names
    return found


@pytest.mark.slow
def test_a_checkpoint_from_before_its_validation_stays(tiny, whole, tmp_path, monkeypatch):
    """Were it deleted to be written anew, a full disk or a kill would lose the run."""
    given = {"recipe": short(), "validation": VALIDATION, "output": tmp_path / "run", "keep": 1}
    told = Told()
    with pytest.raises(Stopped, match="stopped after step 3 of 9"):
        fine_tune(str(tiny), TRAIN, **given, watcher=told, stop=lambda: 3 in told.steps)

    def full(*args, **kwargs):
        raise MissingFileError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", full)
        with pytest.raises(MissingFileError, match="No space"):
            fine_tune(str(tiny), TRAIN, **given, resume=True)
    found = Checkpoints(tmp_path / "run" / "checkpoints")
    assert found.steps == [3]
    found.close()
    run = fine_tune(str(tiny), TRAIN, **given, resume=True)
    assert log_of(run.folder) == log_of(whole[0].folder)
    assert (run.history, run.best) == (whole[0].history, whole[0].best)


def test_without_a_folder_the_result_is_the_best_one_too(tiny, monkeypatch):
    """Top-1 falls from epoch to epoch here, so the first is the best."""
    values = iter([0.9, 0.5, 0.4, 0.9])  # the last is of the result
    found = []
    plain = Evaluator.__call__

    def falling(self, dataset, *, params, **kwargs):
        evaluation = plain(self, dataset, params=params, **kwargs)
        evaluation.metrics["top1"] = next(values)
        found.append(jax.tree.map(np.array, params))
        return evaluation

    monkeypatch.setattr(Evaluator, "__call__", falling)
    run = fine_tune(str(tiny), TRAIN, validation=VALIDATION, recipe=short())
    assert run.best.step == 3
    assert run.metrics["top1"] == 0.9
    for one, other in zip(
        jax.tree.leaves(run.model.params), jax.tree.leaves(found[0]), strict=True
    ):
        assert np.array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_that_can_read_no_image_is_no_run(tiny, tmp_path, steps):
    """It would end with the model that it began with, as if that were trained."""
    unreadable = LabelledImages([b"no"] * 12, [0, 1, 2] * 4, classes=TRAIN.classes)
    with pytest.raises(ImageError, match=r"none of the \d+ images could be read"):
        fine_tune(str(tiny), unreadable, recipe=short(steps=steps), output=tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_validation_without_the_measure_is_no_end(tiny, tmp_path):
    """None of its images can be read, so there is no top-1: the run ends by its patience."""
    unreadable = LabelledImages(
        [b"no", b"image"], [0, 1], classes=TRAIN.classes, names=["x1", "x2"]
    )
    told = Told()
    run = fine_tune(
        str(tiny),
        TRAIN,
        validation=unreadable,
        recipe=short(patience=2),
        output=tmp_path / "run",
        watcher=told,
    )
    assert (run.steps, run.best) == (6, None)
    assert "stopping early: 2 epochs without a top1" in told.lines
    assert sum("2 of 2 validation images cannot be read: x1: " in x for x in told.lines) == 1
    assert "| 2 | 6 | " in (run.folder / "README.md").read_text()


def test_what_a_folder_holds_is_not_lost(tiny, whole, tmp_path):
    run, _ = whole
    given = {"validation": VALIDATION, "output": run.folder}
    before = {p.name: p.stat().st_mtime_ns for p in run.folder.iterdir()}
    with pytest.raises(ExistingFileError, match=r"a run already \(finished, step 9\).*--resume"):
        fine_tune(str(tiny), TRAIN, recipe=short(), **given)
    odd = r"other settings: learning_rate 0\.01 there and 0\.02 here; seed 0 there and 7 here"
    with pytest.raises(InputError, match=odd):
        fine_tune(str(tiny), TRAIN, recipe=short(learning_rate=2e-2), seed=7, resume=True, **given)
    with pytest.raises(InputError, match=r"other settings: data '27 images, \w+' there and"):
        fine_tune(str(tiny), pictures(5, 9).select(range(26)), recipe=short(), resume=True, **given)
    told = Told()
    again = fine_tune(str(tiny), TRAIN, recipe=short(), resume=True, watcher=told, **given)
    assert told.lines == [f"{run.folder}: this run is finished (9 steps); nothing to do"]
    assert again.best == run.best
    assert again.history == run.history
    assert again.metrics["top1"] == run.metrics["top1"]
    with pytest.raises(InputError, match=r"other settings: weights .* there and"):
        fine_tune(str(tiny), TRAIN, recipe=short(), resume=True, class_weights=[1, 2, 1], **given)
    assert {p.name: p.stat().st_mtime_ns for p in run.folder.iterdir()} == before
    (tmp_path / "other.txt").write_text("mine")
    with pytest.raises(ExistingFileError, match=r"other files \(other\.txt\)"):
        fine_tune(str(tiny), TRAIN, recipe=short(), output=tmp_path)


def test_two_runs_into_one_folder_are_refused(tiny, tmp_path):
    first = RunFolder(tmp_path / "run", {})
    with pytest.raises(MissingFileError, match="another process trains into this folder"):
        fine_tune(str(tiny), TRAIN, recipe=short(), output=tmp_path / "run", force=True)
    first.close()


@pytest.mark.slow
def test_a_batch_larger_than_the_data_is_one_of_all_images(tiny):
    """Without rows for images that are not there, and with the numbers of the larger batch."""
    given = {"mixup": 0.0, "cutmix": 0.0, "epochs": 2, "steps": None, "warmup_epochs": 0}
    plans = [make_plan(str(tiny), TRAIN, recipe=short(batch_size=n, **given)) for n in (32, 1024)]
    states = []
    for plan in plans:
        state, losses = plan.make_state(), []
        for step in range(plan.steps):
            batch = next(iter(plan.batches(step)))
            assert batch["pixel_values"].shape[0] == 32
            assert batch["weights"].sum() == len(TRAIN) == plan.images_per_step
            state, metrics = plan.step(state, plan.placed(batch))
            losses.append(float(metrics["loss"]))
        states.append(losses)
    assert states[0] == states[1]
    assert plans[0].steps == 2


def test_a_run_that_cannot_begin_leaves_everything_as_it_was(tiny, tmp_path):
    """Also the run that `force` would have deleted."""
    wrong = {"recipe": short(image_size=9), "output": tmp_path / "run"}
    with pytest.raises(ViTError, match="multiple of the patch"):
        fine_tune(str(tiny), TRAIN, **wrong)
    assert not (tmp_path / "run").exists()
    old = RunFolder(tmp_path / "run", {})
    old.begin(step=7)
    old.close()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ViTError, match="multiple of the patch"):
        fine_tune(str(tiny), TRAIN, **wrong, force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == {**before}


@pytest.mark.slow
def test_a_step_that_is_not_finite_ends_the_run(tiny, tmp_path):
    settings = {"learning_rate": 1e30, "mixup": 0.0, "ema": None, "drop_path": None}
    given = {"recipe": short(warmup_steps=0, warmup_epochs=0, clip=None, **settings)}
    with pytest.raises(Diverged) as found:
        fine_tune(str(tiny), TRAIN, **given, output=tmp_path / "run", detect_nan=True)
    message = str(found.value)
    assert found.value.step <= 3
    assert f"step {found.value.step}: not finite" in message
    assert "image " in message  # the names of its images
    assert "layernorm" in message or "encoder/layer/0" in message
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "diverged"
    assert not (tmp_path / "run" / "model.safetensors").exists()


# -- what a run begins with


def began(name, *, data=TRAIN, **settings):
    told = Told()
    found = begin(str(name), recipe(**settings), data, seed=1, say=told.say)
    return found, told.lines


def test_heads_for_other_classes_are_replaced(tmp_path):
    same = {0: "dark", 1: "light", 2: "mid"}
    save_tiny(tmp_path / "same", num_labels=3, id2label=same)
    model, lines = began(tmp_path / "same")
    assert lines == []
    assert np.any(model.model.params["classifier"]["kernel"])
    save_tiny(tmp_path / "others", num_labels=3, id2label={0: "cat", 1: "dog", 2: "owl"})
    model, lines = began(tmp_path / "others")
    assert len(lines) == 1
    assert "as many classes, but others ('cat' is now 'dark', 'dog' is now 'light'" in lines[0]
    assert not np.any(model.model.params["classifier"]["kernel"])
    assert model.model.config.id2label == same
    FlaxViTModel(tiny_config()).save_pretrained(tmp_path / "base")
    _, lines = began(tmp_path / "base")
    assert lines == [
        f"{tmp_path / 'base'}: has no classification head; a new one for 3 classes is trained"
    ]
    _, lines = began(tmp_path / "same", pooling="mean")
    assert lines == [
        f"{tmp_path / 'same'}: its head is replaced, since the recipe sets what a head looks at; a "
        "new one for 3 classes is trained"
    ]
    model, _ = began(tmp_path / "base", head="normal")
    assert np.any(model.model.params["classifier"]["kernel"])


def test_parameters_are_float32_whatever_the_file_has(tmp_path):
    model = FlaxViTForImageClassification(tiny_config())
    model.save_pretrained(tmp_path, params=model.to_bf16(model.params))
    from vit_flax.training.fit import make_plan

    state = make_plan(str(tmp_path), TRAIN, recipe=short()).make_state()
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves((state.params, state.ema))}
    assert kinds == {"float32"}


def test_a_size_is_drawn_from_the_seed(monkeypatch):
    monkeypatch.setitem(PRESETS, "mini", (16, 1, 2, 32, 16))
    (model, _), lines = began("vit-mini", image_size=32)
    assert lines == ["vit-mini is a size, not a trained model: its weights are drawn from --seed"]
    assert model.config.hidden_size == 16
    assert model.config.num_labels == 3
    assert model.config.image_size in (32, (32, 32))
    with pytest.raises(MissingFileError, match="For new weights name a size: vit-tiny, "):
        began("vit-tinny/none", image_size=32)


def test_preprocessing_follows_the_image_size(tmp_path):
    save_tiny(tmp_path)
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(
        tmp_path
    )
    (model, processor), _ = began(tmp_path, image_size=16)
    assert processor.size == {"height": 16, "width": 16}
    assert processor.image_mean == [0.1, 0.2, 0.3]
    assert model.config.image_height_width == (16, 16)
    with pytest.raises((ConfigError, InputError), match=r"multiple|patch"):
        began(tmp_path, image_size=18)


# -- bad input, each refused before anything is written


def labelled(labels: list[int]) -> LabelledImages:
    """Images of somebody's own class, which does not check its labels."""
    data = LabelledImages(["a", "b"], [0, 1], classes=("a", "b"))
    data.labels = np.array(labels)
    return data


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (pictures(0, 9).select(range(15)), {}, None),
        (LabelledImages(["a", "b"], [0, 0], classes=("a",)), {}, "one class only"),
        (labelled([0, 3]), {}, "from 0 to 1"),
        (labelled([-100, -100]), {}, "-100"),
        (LabelledImages([], [], classes=("a", "b")), {}, "no training images"),
        (TRAIN, {"batch_size": 8, "accumulate": 3}, "3"),
        (TRAIN, {"warmup_steps": 100}, "warm-up must be shorter"),
    ],
    ids=["fine", "one class", "out of range", "ignored", "empty", "accumulate", "warm-up"],
)
def test_bad_input(tiny, tmp_path, data, settings, message):
    from vit_flax.training.fit import make_plan

    if message is None:
        make_plan(str(tiny), data, recipe=short(**settings))
        return
    with pytest.raises(InputError, match=message):
        fine_tune(str(tiny), data, recipe=short(**settings), output=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_validation_with_another_class_is_refused(tiny):
    odd = LabelledImages(["a"], [0], classes=("darkk",))
    with pytest.raises(InputError, match="classes that training lacks: darkk"):
        fine_tune(str(tiny), TRAIN, validation=odd, recipe=short())


@pytest.mark.slow
def test_patience_ends_a_run_and_unreadable_images_do_not(tiny, tmp_path):
    arrays = [TRAIN.image(i) for i in range(len(TRAIN))]
    arrays[4] = b"no image"
    names = [f"{i}.png" for i in range(len(TRAIN))]
    spoiled = LabelledImages(arrays, TRAIN.labels, classes=TRAIN.classes, names=names)
    told = Told()
    run = fine_tune(
        str(tiny),
        spoiled,
        validation=VALIDATION,
        recipe=short(learning_rate=1e-12, patience=2, epochs=9, ema=None),
        output=tmp_path / "run",
        watcher=told,
    )
    assert run.steps == 9  # three epochs: the first is the best, and two more
    assert run.best.step == 3
    assert any("stopping early: top1 was best at step 3, 2 epochs ago" in x for x in told.lines)
    assert [name for name, _ in run.skipped] == ["4.png"]
    assert sum("skipped 4.png" in line for line in told.lines) == 1
    assert "1 images could not be read" in (run.folder / "README.md").read_text()


def test_a_plan_takes_what_a_run_takes():
    """The same names, with the same defaults, but for what only a run needs."""
    plan, run = (inspect.signature(each).parameters for each in (make_plan, fine_tune))
    assert {name: run[name].default for name in plan if name != "say"} == {
        name: each.default for name, each in plan.items() if name != "say"
    }
    assert {*run} - {*plan} == {
        *("output", "resume", "force", "save_every", "keep", "tensorboard", "detect_nan", "merge"),
        *("stop", "watcher", "notes"),
    }
