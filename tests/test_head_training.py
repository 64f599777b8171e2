"""A head on a frozen network: what it looks at, that training it is training a linear layer of
torch on the same inputs, and that it works for every family and kind of label."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from networks import flax_twin, random_weights, torch_twin
from training_runs import CLASSES, SIDE, pictures, tiny_config

import vit_flax
import vit_torch
from vit_common.datasets import LabelledImages
from vit_common.errors import InputError
from vit_common.families import BeitConfig, DeiTConfig, Dinov2Config
from vit_common.recipes import recipe
from vit_flax.training.fit import Stopped, Watcher, fine_tune, make_plan
from vit_flax.training.tasks.head import head_inputs

TRAIN, VALIDATION = pictures(0, 6), pictures(1, 3)
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 4,
    "num_labels": 3,
    "id2label": dict(enumerate(CLASSES)),
    "initializer_range": 0.3,
}
CONFIGS = {
    "ViT": lambda: tiny_config(**SIZES),
    "no class token": lambda: tiny_config(**SIZES, use_cls_token=False, pooling="mean"),
    "norm after the mean": lambda: tiny_config(**SIZES, pooling="mean", norm_after_pooling=True),
    "DeiT": lambda: DeiTConfig(**SIZES, intermediate_size=24),
    "BEiT": lambda: BeitConfig(**SIZES, intermediate_size=24),
    "DINOv2": lambda: Dinov2Config(**SIZES, mlp_ratio=2),
}


def slow_but(kinds, *quick):
    """Parameters of a test, of which all but a few are slow."""
    return [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


class Told(Watcher):
    """Remembers what a run said."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[int] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def step(self, row) -> None:
        self.steps.append(row["step"])


def head(**settings):
    given = {"epochs": 2, "batch_size": 6, "warmup_epochs": 0, "learning_rate": 3e-2}
    return recipe("head", **{**given, **settings})


def classifier(config, name="ImageClassification"):
    """The Flax and the torch class of a family's classifier."""
    return (
        getattr(vit_flax, f"Flax{type(config).class_stem()}For{name}"),
        getattr(vit_torch, f"{type(config).class_stem()}For{name}"),
    )


def saved(folder, kind):
    """A checkpoint with random weights."""
    config = CONFIGS[kind]()
    flax_twin(classifier(config)[0], config, random_weights(config, "classifier")).save_pretrained(
        folder
    )
    return str(folder)


def looked_at(model, pixel_values):
    """What the linear classifier of a torch twin is given."""
    found = []
    model.classifier.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    with torch.no_grad():
        logits = model(torch.tensor(pixel_values)).logits
    return found[0].numpy(), logits.numpy()


@pytest.mark.parametrize("kind", slow_but([*CONFIGS, "joined"], "BEiT", "joined"))
def test_inputs_are_what_the_classifier_of_the_torch_twin_is_given(kind):
    joined = kind == "joined"
    config = tiny_config(**SIZES, pooling="cls_mean") if joined else CONFIGS[kind]()
    weights = random_weights(config, "classifier")
    flax_class, torch_class = classifier(config)
    model = flax_twin(flax_class, config, weights)
    pixels = np.random.default_rng(0).normal(size=(3, 3, SIDE, SIDE)).astype(np.float32)
    given, _ = looked_at(torch_twin(torch_class, config, weights), pixels)
    found = head_inputs(model)(model.params, pixels)
    assert found.shape == (3, config.classifier_width)
    np.testing.assert_allclose(found, given, atol=2e-6)


def test_the_head_that_comes_out_is_one_of_torch_trained_on_the_same_inputs(tmp_path):
    """Standardised inputs, cross entropy, AdamW with decoupled decay and a cosine; the shift and
    the scale are folded into the head, so the whole network has the same logits."""
    name = saved(tmp_path / "net", "ViT")
    settings = {"pooling": "cls", "flip": 0.0, "label_smoothing": 0.1, "clip": None, "epochs": 4}
    settings["weight_decay"] = 0.5
    run = fine_tune(name, TRAIN, recipe=head(**settings, metric=""))
    plan = make_plan(name, TRAIN, recipe=head(**settings))

    config = CONFIGS["ViT"]()
    twin = torch_twin(classifier(config)[1], config, random_weights(config, "classifier"))
    pixels = np.stack([np.asarray(TRAIN.image(i)) for i in range(len(TRAIN))])
    pixels = (pixels.transpose(0, 3, 1, 2) / np.float32(255) - 0.5) / 0.5
    inputs, _ = looked_at(twin, pixels.astype(np.float32))
    mean, deviation = inputs.mean(axis=0), inputs.std(axis=0)
    rows = torch.tensor((inputs - mean) / deviation)
    linear = torch.nn.Linear(*twin.classifier.weight.shape[::-1])
    with torch.no_grad():  # the same head on other inputs
        weight = twin.classifier.weight
        linear.weight[:] = weight * torch.tensor(deviation)
        linear.bias[:] = twin.classifier.bias + weight @ torch.tensor(mean)
    groups = [{"params": [linear.weight]}, {"params": [linear.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-2, weight_decay=0.5)
    labels = torch.tensor(TRAIN.labels)
    step = 0
    for epoch in range(4):
        order = plan.loader.loader.order(epoch)
        for start in range(0, len(order), 6):
            index = order[start : start + 6]
            for group in optimizer.param_groups:
                group["lr"] = 3e-2 * 0.5 * (1 + np.cos(np.pi * step / 12))
            loss = torch.nn.functional.cross_entropy(
                linear(rows[index]), labels[index], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    assert step == run.steps == 12
    expected = linear(rows).detach().numpy()
    found = run.model(pixels.astype(np.float32), train=False).logits
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert np.abs(expected).max() > 0.5
    kept = jax.tree.map(np.array_equal, run.model.params["vit"], plan.model.params["vit"])
    assert all(jax.tree.leaves(kept))  # the network did not train


LEFT = {
    "ViT": None,
    "no class token": "the mean of the patches",
    "norm after the mean": "the mean of the patches",
    "DeiT": "the class token",
    "BEiT": "the mean of the patches",
    "DINOv2": None,
}


@pytest.mark.parametrize("kind", slow_but(CONFIGS, "no class token"))
def test_every_family_has_its_head_trained(kind, tmp_path):
    name, told = saved(tmp_path / "net", kind), Told()
    run = fine_tune(name, TRAIN, validation=VALIDATION, recipe=head(), watcher=told)
    left = [line for line in told.lines if "it stays so" in line]
    if LEFT[kind] is None:
        assert not left
        assert run.model.config.pooling == "cls_mean"
    else:
        (line,) = left
        assert line.startswith(f"{name}: the classifier of this ")
        assert LEFT[kind] in line
    assert run.metrics["images"] == len(VALIDATION)
    # What was measured on the inputs is what the whole network gives.
    pixels = np.stack([np.asarray(VALIDATION.image(i)) for i in range(len(VALIDATION))])
    pixels = ((pixels.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5).astype(np.float32)
    logits = run.model(pixels, train=False).logits
    np.testing.assert_allclose(run.evaluation.logits, logits, atol=2e-5)


@pytest.mark.slow
def test_a_network_with_two_heads_and_one_with_dropout(tmp_path):
    config = CONFIGS["DeiT"]()
    cls = classifier(config, "ImageClassificationWithTeacher")[0]
    cls(config, seed=1).save_pretrained(tmp_path / "two")
    told = Told()
    fine_tune(str(tmp_path / "two"), TRAIN, recipe=head(epochs=1), watcher=told)
    assert any("this model has two heads; they are taken as they are" in x for x in told.lines)
    config = tiny_config(**SIZES, attention_probs_dropout_prob=0.5, drop_path_rate=0.5)
    vit_flax.FlaxViTForImageClassification(config, seed=1).save_pretrained(tmp_path / "drop")
    plan = make_plan(str(tmp_path / "drop"), TRAIN, recipe=head())
    assert plan.frozen is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "mean"}, "`pooling` cannot be 'mean'.*looks at the class token. Leave it out"),
        ({"metric": "map"}, "`metric`"),
    ],
)
def test_what_a_user_asks_for_and_cannot_have_is_refused(settings, message, tmp_path):
    name = saved(tmp_path / "net", "DeiT")
    with pytest.raises(InputError, match=message):
        make_plan(name, TRAIN, validation=VALIDATION, recipe=head(**settings))
    with pytest.raises(InputError, match=r"`standardize`.*the network trains, too.*Leave it out"):
        make_plan(name, TRAIN, recipe=recipe(standardize=True))
    model = vit_flax.FlaxViTForImageClassification(tiny_config(**SIZES))
    with pytest.raises(InputError, match="pooling 'mean', not 'cls' as the model was built"):
        make_plan(model, TRAIN, recipe=recipe(pooling="mean"))


@pytest.mark.parametrize(
    "settings",
    [{"affine": (10.0, 0.1, 0.1, 5.0)}, {"mixup": 0.2}, {"crop_scale": (0.5, 1.0)}],
    ids=lambda settings: next(iter(settings)),
)
def test_images_that_are_drawn_anew_are_not_computed_once(settings, tmp_path):
    told = Told()
    name = saved(tmp_path / "net", "ViT")
    plan = make_plan(name, TRAIN, recipe=head(**settings), say=told.say)
    assert plan.frozen is None
    (setting,) = settings
    assert f"each epoch draws other ones ({setting}); they are taken as they are" in told.lines[-1]


def spoiled():
    arrays = [TRAIN.image(i) for i in range(len(TRAIN))]
    arrays[4] = b"no image"
    names = [f"{i}.png" for i in range(len(TRAIN))]
    return LabelledImages(arrays, TRAIN.labels, classes=TRAIN.classes, names=names)


@pytest.mark.slow
@pytest.mark.parametrize("standardize", slow_but([True, False], True))
def test_a_run_goes_on_to_the_bit_and_a_bad_image_is_named_once(standardize, tmp_path):
    name, data = saved(tmp_path / "net", "ViT"), spoiled()
    given = {"recipe": head(standardize=standardize), "validation": VALIDATION}
    whole = Told()
    expected = fine_tune(name, data, **given, output=tmp_path / "whole", watcher=whole)
    assert sum("skipped" in line and "4.png" in line for line in whole.lines) == 1
    assert [name for name, _ in expected.skipped] == ["4.png"]
    given["output"] = tmp_path / "run"
    first = Told()
    with pytest.raises(Stopped, match="stopped after step 3 of 6"):
        fine_tune(name, data, **given, watcher=first, stop=lambda: 3 in first.steps)
    again = Told()
    run = fine_tune(name, data, **given, watcher=again, resume=True)
    assert again.steps == [4, 5, 6]
    assert not any("skipped" in line for line in again.lines)
    assert run.skipped == expected.skipped
    assert run.history == expected.history
    for one, other in zip(
        jax.tree.leaves(run.model.params), jax.tree.leaves(expected.model.params), strict=True
    ):
        assert np.array_equal(one, other)
    # An image that cannot be read is in no mean: the same as without it.
    rest = data.select([i for i in range(len(data)) if i != 4])
    plans = [make_plan(name, each, recipe=given["recipe"]) for each in (data, rest)]
    for one, other in zip(*(plan.frozen.statistics for plan in plans), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_labels_of_every_kind(tmp_path):
    name = saved(tmp_path / "net", "ViT")
    arrays = [TRAIN.image(i) for i in range(len(TRAIN))]
    both = np.eye(3, dtype=np.float32)[TRAIN.labels]
    both[::3, 2] = 1.0
    kinds = {
        "multi_label_classification": (both, tuple(CLASSES), "log_loss"),
        "regression": (TRAIN.labels.astype(np.float32), None, "mse"),
    }
    for problem, (labels, classes, metric) in kinds.items():
        data = LabelledImages(arrays, labels, classes=classes, problem_type=problem)
        plan = make_plan(name, data, validation=data, recipe=head())
        assert plan.metric == metric
        run = fine_tune(name, data, validation=data, recipe=head(epochs=6))
        assert run.model.config.problem_type == problem
        assert run.metrics[metric] < run.history[0]["validation"][metric]
        assert run.best.value == min(row["validation"][metric] for row in run.history)


def test_a_run_can_be_stopped_while_inputs_are_computed(tmp_path):
    name = saved(tmp_path / "net", "ViT")
    given = {"recipe": head(), "output": tmp_path / "run"}
    with pytest.raises(Stopped, match="stopped after step 0 of 6"):
        fine_tune(name, TRAIN, **given, stop=lambda: True)
    assert fine_tune(name, TRAIN, **given, resume=True).steps == 6


_ON_DEVICES = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from test_head_training import TRAIN, VALIDATION, fine_tune, head
mesh = {"data": 1, "fsdp": 2} if sys.argv[3] == "fsdp" else {"data": 2}
run = fine_tune(sys.argv[2], TRAIN, validation=VALIDATION, recipe=head(), mesh=mesh)
np.save(sys.argv[4], run.evaluation.logits)
"""


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_on_several_devices(axis, tmp_path):
    name = saved(tmp_path / "net", "ViT")
    expected = fine_tune(name, TRAIN, validation=VALIDATION, recipe=head()).evaluation.logits
    flags = "--xla_force_host_platform_device_count=2"
    tests = str(Path(__file__).parent)
    subprocess.run(
        [sys.executable, "-c", _ON_DEVICES, tests, name, axis, str(tmp_path / "logits.npy")],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(tests).parent,
        check=True,
    )
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-5)
