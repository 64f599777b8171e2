"""Parameter trees of Transformers 4.57.6 and of the models here.

In memory all families here have ViT's names; Transformers' Flax models of DINOv2 and of BEiT's
masked image modelling have others (`norm1`, `mlp.fc1`, `layer_scale1.lambda1`, a `layernorm` for
`lm_layernorm`). A tree is turned by its paths alone, so anything with the same names can be turned:
gradients, moments of an optimizer, traced arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_common.config import ViTConfig
from vit_common.errors import InputError
from vit_common.files.containers.tensor import as_tensor
from vit_common.parameters import Head, parameter_shapes
from vit_convert.formats import FORMATS, TREE
from vit_convert.formats.format import Format
from vit_convert.rules import to_foreign

Path = tuple[str, ...]
Shapes = Mapping[str, tuple[int, ...]]

_HEADS: dict[str, tuple[Head | None, ...]] = {
    "vit": (None, "classifier", "decoder"),
    "deit": (None, "classifier", "teacher", "decoder"),
    "beit": (None, "classifier", "tokens"),
}


def from_transformers_tree(params: Mapping[str, Any], config: ViTConfig) -> dict[str, Any]:
    """Turn a parameter tree of a Flax model of Transformers 4.57.6 into one for the models here.

    `params=` of every call and the setter of `model.params` do this by themselves; the function is
    for trees that go elsewhere: a saved `TrainState`, `flax.serialization.from_bytes`.

    Args:
        params: nested dict of arrays, or of anything else with those names (gradients, moments).
        config: the model's configuration.

    Returns:
        A new nested dict; a tree that has the names of the models here already comes back equal.

    Raises:
        InputError: a name belongs to neither.

    Example:
        >>> old = flax.serialization.msgpack_restore(open("dinov2.msgpack", "rb").read())
        >>> model.params = vit_flax.from_transformers_tree(old, model.config)
    """
    return _turned(params, config, back=False)


def to_transformers_tree(params: Mapping[str, Any], config: ViTConfig) -> dict[str, Any]:
    """Undo `from_transformers_tree`: the tree as Transformers' Flax model of `config` holds it.

    Args:
        params: nested dict with the names of the models here.
        config: the model's configuration.

    Raises:
        InputError: a name belongs to no model here.
    """
    return _turned(params, config, back=True)


def _turned(params: Mapping[str, Any], config: ViTConfig, back: bool) -> dict[str, Any]:
    flat = flatten_dict(unfreeze(params) if isinstance(params, FrozenDict) else dict(params))
    unknown: set[Path] = set(flat)
    for head in _HEADS.get(config.model_type, (None, "classifier")):
        names = parameter_shapes(config, head, add_pooling_layer=True, use_mask_token=True)
        paths, ours = transformers_paths(config, names), tree_shapes(names, TREE)
        if back:
            target = _table_shapes(names, config)
            paths = {mine: theirs for theirs, mine in paths.items()}
        else:
            target = ours
        for known in (paths, dict.fromkeys(target)):
            if left := set(flat) - set(known):
                unknown = left if len(left) < len(unknown) else unknown
                continue
            if known is paths:
                return rename(flat, paths, target)
            return unflatten_dict(flat)
    named = ", ".join(sorted("/".join(path) for path in unknown)[:4])
    raise InputError(
        f"`params` must be the tree of a {config.model_type} model; no such model has {named}."
    )


def transformers_paths(config: ViTConfig, shapes: Shapes) -> dict[Path, Path]:
    """Path in Transformers' tree -> path here, of parameters by their canonical names."""
    theirs, ours = _table_shapes(shapes, config), tree_shapes(shapes, TREE)
    return dict(zip(theirs, ours, strict=True))


def _table_shapes(shapes: Shapes, config: ViTConfig) -> dict[Path, tuple[int, ...]]:
    for table in FORMATS:
        is_theirs = table.name == "flax" and config.model_type in table.families
        if is_theirs and (table.fits is None or table.fits(config, None)):
            return tree_shapes(shapes, table)
    return tree_shapes(shapes, TREE)


def tree_shapes(shapes: Shapes, table: Format) -> dict[Path, tuple[int, ...]]:
    """Path and shape of each parameter in a Flax tree, in the order of the canonical names."""
    nothing = np.zeros((), np.float32)
    dummies = {
        name: as_tensor(name, np.broadcast_to(nothing, shape)) for name, shape in shapes.items()
    }
    tree = to_foreign(dummies, table).tensors
    return {tuple(name.split("/")): tensor.shape for name, tensor in tree.items()}


def rename(
    flat: Mapping[Path, Any], paths: Mapping[Path, Path], shapes: Mapping[Path, tuple[int, ...]]
) -> dict[str, Any]:
    """The nested dict under other paths; a token that lacks an axis of length one, or has one more,
    gets the shape of its new place."""
    found = {}
    for path, value in flat.items():
        wanted = shapes[paths[path]]
        shape = getattr(value, "shape", wanted)
        same_size = np.prod(shape, dtype=np.int64) == np.prod(wanted, dtype=np.int64)
        reshape = same_size and shape != wanted and hasattr(value, "reshape")
        found[paths[path]] = value.reshape(wanted) if reshape else value
    return unflatten_dict(found)
