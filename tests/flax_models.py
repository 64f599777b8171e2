"""Small Flax models for the tests of the contract."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from networks import flax_twin, images, make_config, random_weights

import vit_flax
from vit_common.config import ViTConfig

CLASSES = {
    None: vit_flax.FlaxViTModel,
    "classifier": vit_flax.FlaxViTForImageClassification,
    "decoder": vit_flax.FlaxViTForMaskedImageModeling,
}
B, S, D, A, L = 2, 17, 48, 4, 2  # the classifier has one layer: it is compiled often


def config_of(**overrides) -> ViTConfig:
    return make_config(num_hidden_layers=L, **overrides)


@pytest.fixture(name="model", scope="module")
def model_fixture():
    return flax_twin(CLASSES[None], config_of(), random_weights(config_of()))


@pytest.fixture(name="classifier", scope="module")
def classifier_fixture():
    config = make_config(num_hidden_layers=1)
    return flax_twin(CLASSES["classifier"], config, random_weights(config, "classifier"))


@pytest.fixture(name="x", scope="module")
def x_fixture() -> np.ndarray:
    return images(config_of()).astype(np.float32)


def empty(cls: type = CLASSES[None], config: ViTConfig | None = None, **kwargs):
    """A model without parameters: nothing is drawn or compiled."""
    return cls(config or config_of(), _do_init=False, **kwargs)


def assert_trees_equal(got, want, **tolerance) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, **{"rtol": 0, "atol": 0, **tolerance})
