"""Several devices: a mesh with named axes, and which axis each parameter is split over.

- "data": each device has its part of a batch and all of the network.
- "model": each device has its part of each block's heads and of the width of its MLP (tensor
  parallelism as in Shoeybi et al. 2019, arXiv:1909.08053, section 3): the layers that go in are
  split by their outputs, those that come back to the residual stream by their inputs, so that a
  block needs two sums over the axis and nothing else. (A SwiGLU's gate and its other half lie in
  one array, one after the other; their halves are exchanged once a block.)
- "fsdp", for training: each device has its part of a batch and of every large array, parameters
  and the optimizer's moments alike (Rajbhandari et al. 2020, arXiv:1910.02054; Zhao et al. 2023,
  arXiv:2304.11277); a block's arrays are gathered where they are used.

One table says it for all: inference, training, and the programs that are compiled without devices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_common.config import ViTConfig
from vit_common.errors import InputError

DATA, FSDP, MODEL = "data", "fsdp", "model"
AXES = (DATA, MODEL)
"""Axes of a mesh for inference."""
TRAINING_AXES = (DATA, FSDP, MODEL)
"""Axes of a mesh for training."""

MeshLike = Mesh | Mapping[str, int] | Literal["auto"] | None
"""A mesh; the sizes of its axes; all devices of this process; or None, for one device."""

_WHOLE = PartitionSpec()
_OUTPUTS = PartitionSpec(FSDP, MODEL)  # of a kernel (in, out)
_INPUTS = PartitionSpec(MODEL, FSDP)
_PART = PartitionSpec(MODEL)
_BIASES = PartitionSpec(None, MODEL)  # of attention, a column for each head
_WIDTH = PartitionSpec(None, None, FSDP)  # (1, S, D)

_BLOCK = r"encoder/layer/\d+(?:/branch/\d+)?"
_ATTENTION = rf"{_BLOCK}/attention/attention"
_NETWORK: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embeddings/(cls_token|distillation_token|mask_token|register_tokens)", _WHOLE),
    (r"embeddings/position_embeddings", _WIDTH),
    (r"embeddings/stem/.*conv\w*/kernel", PartitionSpec(None, None, None, FSDP)),
    (r"embeddings/stem/.*(conv|norm)\w*/(scale|bias)", _WHOLE),
    (
        r"embeddings/patch_embeddings/projection/kernel",  # (P, P, C, D)
        PartitionSpec(None, None, None, FSDP),
    ),
    (r"embeddings/patch_embeddings/projection/bias", _WHOLE),
    (r"encoder/relative_position_bias/relative_position_bias_table", _BIASES),
    (r"encoder/rope_frequencies", PartitionSpec(None, None, MODEL)),  # (2, L, A, D/A/2)
    (rf"{_ATTENTION}/relative_position_bias/relative_position_bias_table", _BIASES),
    (rf"{_ATTENTION}/differential/(lambda_\w+|norm/scale)", _WHOLE),
    (rf"(encoder|{_ATTENTION})/relative_position_bias/in_(kernel|bias)", _WHOLE),
    (rf"(encoder|{_ATTENTION})/relative_position_bias/out_kernel", _BIASES),
    (rf"(encoder|{_ATTENTION})/relative_position_bias/out_bias", _PART),
    (rf"{_ATTENTION}/(query|key|value)/kernel", _OUTPUTS),
    (rf"{_ATTENTION}/(query|key|value)/(bias|kernel_scale|kernel_sums)", _PART),
    (rf"{_BLOCK}/attention/output/dense/kernel", _INPUTS),
    (rf"{_BLOCK}/intermediate/dense/kernel", _OUTPUTS),
    (rf"{_BLOCK}/intermediate/dense/(bias|kernel_scale|kernel_sums)", _PART),
    (rf"{_BLOCK}/output/dense/kernel", _INPUTS),
    (rf"{_BLOCK}/(attention/)?output/dense/(bias|kernel_scale|kernel_sums)", _WHOLE),
    (rf"{_BLOCK}/(layernorm_(before|after)|attention/output/layernorm)/(scale|bias)", _WHOLE),
    (rf"{_ATTENTION}/(query|key)_norm/(scale|bias)", _WHOLE),  # of one head, the same for all
    (rf"{_BLOCK}/intermediate/layernorm/(scale|bias)", _WHOLE),
    (rf"{_BLOCK}/output/layernorm/(scale|bias)", _PART),  # of the MLP's width
    (rf"{_BLOCK}/lambda_[12]", _WHOLE),
    (r"(pre_layernorm|layernorm|pooler/layernorm)/(scale|bias)", _WHOLE),
    (r"pooler/dense/kernel", PartitionSpec(FSDP)),
    (r"pooler/dense/bias", _WHOLE),
    (r"pooler/probe", _WHOLE),
    (r"pooler/attention/(query|key|value)/kernel", _OUTPUTS),
    (r"pooler/attention/(query|key|value)/bias", _PART),
    (r"pooler/intermediate/dense/kernel", _OUTPUTS),
    (r"pooler/intermediate/dense/bias", _PART),
    (r"pooler/(attention/)?output/dense/kernel", _INPUTS),
    (r"pooler/(attention/)?output/dense/bias", _WHOLE),
    (r"embeddings/(token_embedding|position_embedding)/embedding", PartitionSpec(None, FSDP)),
    (r"final_layernorm/(scale|bias)", _WHOLE),
)
_HEADS = r"(cls_classifier|distillation_classifier|classifier|lm_head)"
_TREES = ("model", "lora")  # a model's parameters, and adapters beside them
_ADAPTERS = ("lora_A", "lora_B", "lora_magnitude")
_FAMILIES = r"(vit|deit|beit|dinov2|dinov2_with_registers|dinov3_vit|vision_model|text_model)"
_TABLE = [(re.compile(rf"({_FAMILIES}/)?{name}"), spec) for name, spec in _NETWORK] + [
    (re.compile(rf"{_HEADS}/kernel"), PartitionSpec(FSDP)),  # (D, K)
    (re.compile(r"decoder/0/kernel"), PartitionSpec(None, None, FSDP)),  # (1, 1, D, ...)
    (re.compile(rf"({_HEADS}|decoder/0)/bias"), _WHOLE),
    (re.compile(r"lm_layernorm/(scale|bias)"), _WHOLE),
    (re.compile(r"(visual|text)_projection/kernel"), PartitionSpec(FSDP)),
    (re.compile(r"logit_(scale|bias)"), _WHOLE),
    (re.compile(r"text_model/head/kernel"), PartitionSpec(FSDP)),
    (re.compile(r"text_model/head/bias"), _WHOLE),
]


def partition_spec(path: tuple[str, ...], axes: Sequence[str] = AXES) -> PartitionSpec:
    """The axis of the mesh that each axis of a parameter is split over.

    Args:
        path: of the parameter in the tree, such as ("vit", "encoder", ..., "kernel").
        axes: of the mesh; one that it lacks splits nothing.

    Raises:
        InputError: no network here has such a parameter.

    Example:
        >>> partition_spec(("classifier", "kernel"), TRAINING_AXES)
        PartitionSpec('fsdp',)
    """
    if path[0] in _TREES:
        path = path[1:]
    if path[-1] in _ADAPTERS:
        return _adapter_spec(path, axes)
    # Blocks that are run by a scan lie in one array each, along a first axis of their own.
    stacked = "stacked" in path
    name = "/".join("0" if part == "stacked" else part for part in path)
    for pattern, spec in _TABLE:
        if pattern.fullmatch(name):
            kept = [axis if axis in axes else None for axis in spec]
            if not any(kept):
                return _WHOLE
            return PartitionSpec(None, *kept) if stacked else PartitionSpec(*kept)
    raise InputError(f"parameter {name}: nothing says how it is split over devices.")


def _adapter_spec(path: tuple[str, ...], axes: Sequence[str]) -> PartitionSpec:
    """The split of a low-rank adapter (`vit_flax.training.lora`): as the kernel's inputs and
    outputs are split, with the rank whole."""
    kernel = (*path[:-1], "kernel")
    axis_count = 4 if path[-2] == "projection" or "stem" in path else 2  # of a convolution: 4
    spec = [*partition_spec(kernel, axes)]
    spec += [None] * (axis_count + ("stacked" in path) - len(spec))
    before, inputs, outputs = spec[:-axis_count], spec[-axis_count:-1], spec[-1]
    if path[-1] == "lora_A":
        kept = [*before, *inputs, None]
    elif path[-1] == "lora_B":
        kept = [*before, None, outputs]
    else:
        kept = [*before, outputs]
    return PartitionSpec(*kept) if any(kept) else _WHOLE


def batch_spec(axes: Sequence[str] = AXES) -> PartitionSpec:
    """The split of a batch, (B, ...), over the axes of a mesh: over "data" and, if the mesh has it,
    "fsdp"."""
    names = tuple(name for name in (DATA, FSDP) if name in axes)
    return PartitionSpec(names if len(names) > 1 else names[0]) if names else _WHOLE


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch, (B, ...), on a mesh."""
    return NamedSharding(mesh, batch_spec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device of a mesh holds whole."""
    return NamedSharding(mesh, _WHOLE)


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of each array of a tree that holds parameters or copies of them.

    Args:
        mesh: with any of the axes "data", "fsdp" and "model".
        tree: parameters, or what an optimizer keeps of them (arrays or their shapes): an array
            lies as the parameter does whose path its own path ends in; counters lie everywhere.

    Raises:
        InputError: no network here has such a parameter.
    """

    def find(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names: list[str] = []
        for key in reversed(path):
            if not isinstance(key, jax.tree_util.DictKey):
                break
            names.insert(0, str(key.key))
        if not names or leaf.ndim == 0:
            return replicated(mesh)
        return param_shardings(mesh, tuple(names))

    return jax.tree_util.tree_map_with_path(find, tree)


def lay_out(tree: Any, shardings: Any) -> Any:
    """Arrays and random keys where shardings say, on the devices of other processes, too.

    Args:
        tree: the same on each process.
        shardings: a tree of the same form.
    """

    def put(leaf: Any, sharding: NamedSharding) -> Any:
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.jit(lambda array: array, out_shardings=sharding)(leaf)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=str(jax.random.key_impl(leaf)))
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, shardings)


def make_mesh(mesh: MeshLike, config: ViTConfig, axes: tuple[str, ...] = AXES) -> Mesh | None:
    """The mesh that an argument stands for; None for one device.

    Args:
        mesh: a mesh with some of `axes`; or their sizes, such as {"data": 4, "model": 2}, where
            "data" left out takes what the devices of this process allow, and others are 1; "auto"
            for all devices on "data"; None for one device.
        config: the network's, whose heads and MLP the "model" axis must divide, and whose width
            the "fsdp" axis.
        axes: that the mesh has in the end, `AXES` or `TRAINING_AXES`.

    Raises:
        InputError: the mesh has other axes, or more devices than there are; or the network cannot
            be divided so.
    """
    if mesh is None:
        return None
    if isinstance(mesh, str):
        if mesh != "auto":
            raise _no_mesh(mesh, axes)
        if len(jax.local_devices()) == 1:
            return None
        mesh = {}
    made = mesh if isinstance(mesh, Mesh) else _mesh_of_sizes(mesh, axes)
    if any(name not in axes for name in made.axis_names):
        listed = " and ".join([", ".join(map(repr, axes[:-1])), repr(axes[-1])])
        raise InputError(
            f"`mesh` must have the axes {listed}, or one of them; given "
            f"{', '.join(map(repr, made.axis_names))}."
        )
    if made.axis_names != axes:
        order = [made.axis_names.index(name) for name in axes if name in made.axis_names]
        sizes = [made.shape.get(name, 1) for name in axes]
        made = Mesh(made.devices.transpose(order).reshape(sizes), axes)
    _check_divides(made, config)
    return made


def _no_mesh(given: Any, axes: tuple[str, ...]) -> InputError:
    example = {name: size for name, size in ((DATA, 4), (FSDP, 8), (MODEL, 2)) if name in axes}
    return InputError(
        f"`mesh` must be 'auto', None, a `jax.sharding.Mesh` or sizes such as {example}; given "
        f"{given!r}."
    )


def _mesh_of_sizes(sizes: Any, axes: tuple[str, ...]) -> Mesh:
    if not isinstance(sizes, Mapping) or any(name not in axes for name in sizes):
        raise _no_mesh(sizes, axes)
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"`mesh`: {name!r} must be a positive integer; given {size!r}.")
    devices = jax.local_devices()
    wanted = {name: sizes.get(name, 1) for name in axes}
    if DATA not in sizes:
        wanted[DATA] = max(1, len(devices) // math.prod(wanted.values()))
    total = math.prod(wanted.values())
    if total > len(devices):
        raise InputError(
            f"`mesh` of {' x '.join(map(str, wanted.values()))} ({' x '.join(wanted)}) needs "
            f"{total} devices; this process has {len(devices)} ({devices[0].device_kind}). Ask for "
            "fewer (in the commands --devices and --model-parallel)."
        )
    return Mesh(np.array(devices[:total]).reshape([*wanted.values()]), axes)


def _check_divides(mesh: Mesh, config: ViTConfig) -> None:
    wholes = {
        MODEL: {
            "attention heads": config.num_attention_heads,
            "columns of the MLP": config.intermediate_size,
        },
        FSDP: {"columns (hidden_size)": config.hidden_size},
    }
    for axis, counts in wholes.items():
        parts = mesh.shape.get(axis, 1)
        odd = [f"{count} {what}" for what, count in counts.items() if count % parts]
        if odd:
            both = "both" if len(counts) > 1 else "it"
            raise InputError(
                f"`mesh`: a {axis!r} axis of {parts} cannot divide this network's "
                f"{' and '.join(odd)}; wanted a divisor of {both}."
            )


def param_shardings(mesh: Mesh, path: tuple[str, ...]) -> NamedSharding:
    """The sharding of a parameter on a mesh."""
    # As short as XLA gives it back: arrays that come out of a program go into it again as they are.
    spec = [*partition_spec(path, [name for name, size in mesh.shape.items() if size > 1])]
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))


def place(params: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The parameters on the devices of the mesh; those that are there already are not copied."""
    flat = flatten_dict(dict(params))
    return unflatten_dict(
        {path: jax.device_put(value, param_shardings(mesh, path)) for path, value in flat.items()}
    )
