"""Evaluation: every image counts once, classes are found by name, peers have the same numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import transformers
from networks import flax_twin, make_config, random_weights, torch_reference
from PIL import Image

import vit_flax
from vit_common.errors import ImageError, InputError
from vit_flax.training.evaluate import Evaluator

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
