"""Parameter trees: under Transformers' names, checked, by their names in files, and on devices.

In memory all families here have ViT's names; Transformers' Flax models of DINOv2 and of BEiT's
masked image modelling have others (`norm1`, `mlp.fc1`, `layer_scale1.lambda1`, a `layernorm` for
`lm_layernorm`). CLIP's and SigLIP's models show theirs (`params`), and take both. A tree is turned
by its paths alone, so anything with the same names can be turned: gradients, moments of an
optimizer, traced arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_common.config import ViTConfig
from vit_common.errors import InputError
from vit_common.files.containers.tensor import as_tensor
from vit_common.parameters import Head, parameter_shapes
from vit_convert.formats import FORMATS, TREE
from vit_convert.formats.format import Format
from vit_convert.load import is_finite
from vit_convert.rules import Mapped, MappedTensor, to_canonical, to_foreign
from vit_flax.layers import initializer
from vit_flax.stacked import flat_params, is_stacked

Params = Mapping[str, Any]
Path = tuple[str, ...]
Shapes = Mapping[str, tuple[int, ...]]

_HEADS: dict[str, tuple[Head | None, ...]] = {
    "vit": (None, "classifier", "decoder"),
    "deit": (None, "classifier", "teacher", "decoder"),
    "beit": (None, "classifier", "tokens"),
    "clip_vision_model": (None, "projection"),
    "clip_text_model": (None, "projection"),
    "clip": ("towers", "classifier"),
    "siglip": ("towers", "classifier"),
    "siglip2": ("towers", "classifier"),
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
    flat = flat_params(params)
    unknown: set[Path] = set(flat)
    for head in _HEADS.get(config.base_family, (None, "classifier")):
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


class Renaming:
    """A model's parameters under the names of Transformers' tree and under those here, leaf by
    leaf. What is in neither table goes with its module (the factors of an integer kernel), or stays
    as it is (blocks that are in one array each).

    Args:
        config: the model's configuration.
        head: what stands on the network, as in `parameter_shapes`.
        under: path of a module; only what is in it is turned, by its paths from there.
    """

    def __init__(self, config: ViTConfig, head: Head | None, under: Path = ()) -> None:
        names = parameter_shapes(config, head)
        theirs, ours = _table_shapes(names, config), tree_shapes(names, TREE)
        pairs = [
            (their[len(under) :], their_shape, our[len(under) :], our_shape)
            for (their, their_shape), (our, our_shape) in zip(
                theirs.items(), ours.items(), strict=True
            )
            if our[: len(under)] == under
        ]
        self._to_ours = _Turn({their: (our, shape) for their, _, our, shape in pairs})
        self._to_theirs = _Turn({our: (their, shape) for their, shape, our, _ in pairs})

    def ours(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """A tree of either names under those here."""
        return self._to_ours(params)

    def theirs(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """A tree of either names under Transformers'."""
        return self._to_theirs(params)


class _Turn:
    """One direction of a `Renaming`."""

    def __init__(self, paths: Mapping[Path, tuple[Path, tuple[int, ...]]]) -> None:
        self.paths = paths
        self.modules = {path[:-1]: new[:-1] for path, (new, _) in paths.items() if len(path) > 1}

    def __call__(self, params: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[Path, Any] = {}
        flat = flat_params(params)
        for path, value in flat.items():
            if path in self.paths:
                path, wanted = self.paths[path]
                value = _reshaped(value, wanted)
            elif path[:-1] in self.modules:
                path = (*self.modules[path[:-1]], path[-1])
            found[path] = value
        return unflatten_dict(found)


def _reshaped(value: Any, wanted: tuple[int, ...]) -> Any:
    """A leaf in the shape of its new place, where that only has more or fewer axes of length 1."""
    shape = getattr(value, "shape", wanted)
    if shape == wanted or np.prod(shape, dtype=np.int64) != np.prod(wanted, dtype=np.int64):
        return value
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(wanted, value.dtype)
    return value.reshape(wanted) if hasattr(value, "reshape") else value


def _table_shapes(shapes: Shapes, config: ViTConfig) -> dict[Path, tuple[int, ...]]:
    for table in FORMATS:
        is_theirs = table.name == "flax" and config.base_family in table.families
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
    found = {paths[path]: _reshaped(value, shapes[paths[path]]) for path, value in flat.items()}
    return unflatten_dict(found)


# -- parameters of a subclass's own module


class Parameter(NamedTuple):
    """A parameter of a subclass's own module.

    Attributes:
        path: where it is in the tree.
        shape: shape in the tree.
        canonical: shape in files, where matrices lie as PyTorch has them.
        name: name in files.
        own: whether no network here has such a parameter.
    """

    path: Path
    shape: tuple[int, ...]
    canonical: tuple[int, ...]
    name: str
    own: bool = False


def custom_parameters(
    shapes: Mapping[Path, tuple[int, ...]], config: ViTConfig, prefix: str
) -> dict[str, Parameter]:
    """Parameters of a subclass's own module by their names in files: what it shares with the
    networks here has the canonical name; parts of its own are named by their path.

    Args:
        shapes: path -> shape, of all its parameters.
        config: the model's configuration.
        prefix: name of the base network inside the module.
    """
    network = parameter_shapes(config, None, add_pooling_layer=True, use_mask_token=True)
    known: dict[Path, Parameter] = {}
    for (name, canonical), (path, shape) in zip(
        network.items(), tree_shapes(network, TREE).items(), strict=True
    ):
        known[path] = Parameter(path, shape, canonical, name)
        path, name = (prefix, *path), f"{prefix}.{name}"
        known[path] = Parameter(path, shape, canonical, name)
    head = parameter_shapes(config, "classifier")
    for (name, canonical), (path, shape) in zip(
        head.items(), tree_shapes(head, TREE).items(), strict=True
    ):
        known.setdefault(path, Parameter(path, shape, canonical, name))
    found = {}
    for path, shape in shapes.items():
        parameter = known.get(path)
        if parameter is None or parameter.shape != shape:
            parameter = Parameter(path, shape, shape, ".".join(path), own=True)
        found[parameter.name] = parameter
    return found


# -- a model's parameters, checked and by their names in files


def check_params(params: Params, shapes: Mapping[Path, tuple[int, ...]]) -> dict[str, Any]:
    """The parameters as a plain nested dict; InputError naming all that does not fit."""
    if isinstance(params, FrozenDict):
        params = unfreeze(params)
    if not isinstance(params, Mapping):
        raise InputError(
            f"`params` must be a nested dict of arrays; given a {type(params).__name__}."
        )
    flat = flatten_dict(dict(params))
    missing = ["/".join(path) for path in shapes if path not in flat]
    if missing:
        hint = ""
        if "params" in params:
            hint = ' (given {"params": ...}; pass what is in it).'
        elif is_stacked(flat) != is_stacked(shapes):
            hint = (
                " (given stacked blocks, which the model takes one by one; pass "
                "`vit_flax.unstack_layers(params)`, or make the model with `scan_layers=True`)."
                if is_stacked(flat)
                else " (given blocks one by one, which a model with `scan_layers=True` takes "
                "stacked; pass `vit_flax.stack_layers(params)`)."
            )
        raise InputError(
            "Some parameters are missing. Make sure that `params` include the following: "
            + ", ".join(missing)
            + hint
        )
    wrong = [
        f"{'/'.join(path)} must have shape {shape}; given {np.shape(flat[path])}"
        for path, shape in shapes.items()
        if np.shape(flat[path]) != shape
    ]
    if wrong:
        raise InputError("`params`: " + "; ".join(wrong) + ".")
    return unflatten_dict(flat)


def canonical(params: Params) -> Mapped:
    """A nested dict of arrays as tensors of canonical names (without the prefix of a model with a
    head); `unused` names what is no parameter of a network."""
    flat = {"/".join(path): array for path, array in flatten_dict(params).items()}
    return to_canonical({name: as_tensor(name, array) for name, array in flat.items()}, TREE)


def read_path(tree: Any, path: tuple[str, ...]) -> Any:
    """The leaf of a nested dict at a path."""
    for name in path:
        tree = tree[name]
    return tree


# -- arrays


@partial(jax.jit, static_argnums=(1, 2, 3))
def draw_normal(key: jax.Array, std: float, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """A new weight; compiled once for each shape, whichever model asks."""
    return initializer(std)(key, shape, dtype)


def to_device(array: np.ndarray) -> jax.Array:
    """A JAX array of what a checkpoint's tensor read, with no more copies than needed.

    `device_put` turns a transposed view in one pass, twice as fast as `jnp.array` (ViT-B: 0.4 s
    and 0.9 s), and on the CPU takes a contiguous array as it is. What a file reader gives is
    fresh memory unless it is marked read-only; a view of the file is copied, the file may change.
    """
    if array.flags.c_contiguous and not array.flags.writeable:
        array = array.copy()
    return jax.block_until_ready(jax.device_put(array))


def to_devices(
    tensor: MappedTensor, sharding: jax.sharding.Sharding, dtype: Any = None
) -> tuple[jax.Array, bool]:
    """A checkpoint's tensor on the devices of a sharding, and whether all of it is finite.

    Each part is read once, and is in this process's memory once at most, whichever devices hold
    it; a tensor whose parts cannot be read by themselves is read whole, once.
    """
    whole = None if tensor.has_parts else tensor.read()
    finite, parts = True, {}
    where: dict[tuple[tuple[int, int], ...], tuple[tuple[slice, ...], list[Any]]] = {}
    for device, index in sharding.addressable_devices_indices_map(tensor.shape).items():
        index = index or ()
        bounds = tuple(i.indices(n)[:2] for i, n in zip(index, tensor.shape, strict=True))
        where.setdefault(bounds, (index, []))[1].append(device)
    for index, devices in where.values():
        array = tensor.read_part(index) if whole is None else whole[index]
        finite = finite and is_finite(array)
        array = array if dtype is None else array.astype(dtype)
        if array.flags.c_contiguous and not array.flags.writeable:
            array = array.copy()  # as in `to_device`
        for device in devices:
            parts[device] = jax.block_until_ready(jax.device_put(array, device))
    arrays = list(parts.values())
    return jax.make_array_from_single_device_arrays(tensor.shape, sharding, arrays), finite
