"""Checkpoints of small models, as each library saves them."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from networks import flax_tree, flax_twin, make_config, random_weights, reference_config, torch_twin
from safetensors.numpy import save_file

import vit_flax
import vit_torch
from vit_common.config import ViTConfig

FLAX = {
    None: "FlaxViTModel",
    "classifier": "FlaxViTForImageClassification",
    "decoder": "FlaxViTForMaskedImageModeling",
}
TORCH = {
    None: "ViTModel",
    "classifier": "ViTForImageClassification",
    "decoder": "ViTForMaskedImageModeling",
}
SHARDED = "60KB"  # several shards of what is about 200 KB


def config_of(**overrides):
    return make_config(num_hidden_layers=2, **overrides)


def weights_of(head, **overrides) -> dict[str, np.ndarray]:
    """Every parameter as a file holds it: names and shapes of the Hub, float32, none trivial."""
    weights = random_weights(config_of(**overrides), head)
    return {name: value.astype(np.float32) for name, value in weights.items()}


def hub_names(tree, separator: str = ".") -> dict[str, np.ndarray]:
    """A Flax tree under the Hub's names and in its layouts, independent of `convert`."""
    weights = {}
    for path, array in flatten_dict(tree).items():
        array, (*owner, leaf) = np.asarray(array), path
        if leaf == "kernel":
            array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
        leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
        weights[separator.join((*owner, leaf))] = array
    return weights


def in_memory(model) -> dict[str, np.ndarray]:
    """What a model of either twin holds, under the Hub's names."""
    if isinstance(model, torch.nn.Module):
        return {
            name: value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
            for name, value in model.state_dict().items()
        }
    return hub_names(model.params)


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def twin(framework: str, head):
    return getattr(*{"flax": (vit_flax, FLAX[head]), "torch": (vit_torch, TORCH[head])}[framework])


def made(framework: str, head, weights=None, **overrides):
    """A model of either twin with the test's weights."""
    cls, config = twin(framework, head), config_of(**overrides)
    weights = weights_of(head, **overrides) if weights is None else weights
    return (flax_twin if framework == "flax" else torch_twin)(cls, config, weights)


def reference(head, **overrides):
    """Transformers' PyTorch model with the test's weights."""
    model = getattr(transformers, TORCH[head])(reference_config(config_of(**overrides)))
    weights = weights_of(head, **overrides)
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    return model


def save_by_torch(head, path, **options) -> None:
    reference(head).save_pretrained(path, **options)


@functools.cache
def flax_reference(head):
    return getattr(transformers, FLAX[head])(reference_config(config_of()), _do_init=False)


def save_by_flax(head, path, **options) -> None:
    flax_reference(head).save_pretrained(path, params=flax_tree(weights_of(head)), **options)


# name -> (writer, options, a file it has to make)
WRITERS = {
    "safetensors": (save_by_torch, {}, "model.safetensors"),
    "bin": (save_by_torch, {"safe_serialization": False}, "pytorch_model.bin"),
    "safetensors in shards": (
        save_by_torch,
        {"max_shard_size": SHARDED},
        "model.safetensors.index.json",
    ),
    "bin in shards": (
        save_by_torch,
        {"safe_serialization": False, "max_shard_size": SHARDED},
        "pytorch_model.bin.index.json",
    ),
    "msgpack": (save_by_flax, {}, "flax_model.msgpack"),
    "msgpack in shards": (
        save_by_flax,
        {"max_shard_size": SHARDED},
        "flax_model.msgpack.index.json",
    ),
    "flax safetensors": (save_by_flax, {"safe_serialization": True}, "model.safetensors"),
}


@pytest.fixture(name="saved", scope="module")
def saved_fixture(tmp_path_factory):
    """A directory by (writer, head), written by Transformers once."""
    made: dict = {}

    def directory(writer: str, head) -> Path:
        if (writer, head) not in made:
            path = tmp_path_factory.mktemp("saved")
            save, options, name = WRITERS[writer]
            save(head, path, **options)
            assert (path / name).is_file()
            made[writer, head] = path
        return made[writer, head]

    return directory


@pytest.fixture(name="framework", params=["flax", "torch"])
def framework_fixture(request):
    return request.param


def write(path: Path, weights, config: ViTConfig | None = None) -> Path:
    path.mkdir(exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(v) for name, v in weights.items()},
        path / "model.safetensors",
        {"format": "pt"},
    )
    (config or config_of()).save_pretrained(path)
    return path
