"""Several devices: a mesh with the axes "data" and "model", and what of a network lies where.

Images are split over "data". Over "model" each block's heads and the width of its MLP are split
(tensor parallelism as in Shoeybi et al. 2019, arXiv:1909.08053, section 3): the layers that go in
are split by their outputs, those that come back to the residual stream by their inputs, so that a
block needs two sums over the axis and nothing else. (A SwiGLU's gate and its other half lie in one
array, one after the other; their halves are exchanged once a block.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_common.config import ViTConfig
from vit_common.errors import InputError

DATA, MODEL = "data", "model"
AXES = (DATA, MODEL)

MeshLike = Mesh | Mapping[str, int] | Literal["auto"] | None
"""A mesh; the sizes of its axes; all devices of this process; or None, for one device."""

_WHOLE = PartitionSpec()
_OUTPUTS = PartitionSpec(None, MODEL)  # of a kernel (in, out)
_INPUTS = PartitionSpec(MODEL, None)
_PART = PartitionSpec(MODEL)

_BLOCK = r"encoder/layer/\d+"
_ATTENTION = rf"{_BLOCK}/attention/attention"
_NETWORK: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embeddings/(cls_token|distillation_token|mask_token|register_tokens)", _WHOLE),
    (r"embeddings/position_embeddings", _WHOLE),
    (r"embeddings/patch_embeddings/projection/(kernel|bias)", _WHOLE),
    (r"encoder/relative_position_bias/relative_position_bias_table", _OUTPUTS),
    (rf"{_ATTENTION}/relative_position_bias/relative_position_bias_table", _OUTPUTS),
    (rf"{_ATTENTION}/(query|key|value)/kernel", _OUTPUTS),
    (rf"{_ATTENTION}/(query|key|value)/(bias|kernel_scale)", _PART),
    (rf"{_BLOCK}/attention/output/dense/kernel", _INPUTS),
    (rf"{_BLOCK}/intermediate/dense/kernel", _OUTPUTS),
    (rf"{_BLOCK}/intermediate/dense/(bias|kernel_scale)", _PART),
    (rf"{_BLOCK}/output/dense/kernel", _INPUTS),
    (rf"{_BLOCK}/(attention/)?output/dense/(bias|kernel_scale)", _WHOLE),
    (rf"{_BLOCK}/layernorm_(before|after)/(scale|bias)", _WHOLE),
    (rf"{_BLOCK}/lambda_[12]", _WHOLE),
    (r"(layernorm|pooler/layernorm)/(scale|bias)", _WHOLE),
    (r"pooler/dense/(kernel|bias)", _WHOLE),
)
_HEADS = r"(cls_classifier|distillation_classifier|classifier|lm_head|decoder/0)/(kernel|bias)"
_FAMILIES = r"(vit|deit|beit|dinov2|dinov2_with_registers)"
_TABLE = [(re.compile(rf"({_FAMILIES}/)?{name}"), spec) for name, spec in _NETWORK] + [
    (re.compile(_HEADS), _WHOLE),
    (re.compile(r"lm_layernorm/(scale|bias)"), _WHOLE),
]


def partition_spec(path: tuple[str, ...]) -> PartitionSpec:
    """What axis of the mesh each axis of a parameter is split over.

    Args:
        path: of the parameter in the tree, such as ("vit", "encoder", ..., "kernel").

    Raises:
        InputError: no network here has such a parameter.
    """
    # Blocks that are run by a scan lie in one array each, along a first axis of their own.
    stacked = "stacked" in path
    name = "/".join("0" if part == "stacked" else part for part in path)
    for pattern, spec in _TABLE:
        if pattern.fullmatch(name):
            return PartitionSpec(None, *spec) if stacked and spec else spec
    raise InputError(f"parameter {name}: nothing says how it is split over devices.")


def make_mesh(mesh: MeshLike, config: ViTConfig) -> Mesh | None:
    """The mesh that is meant; None where one device is.

    Args:
        mesh: a mesh with axes "data" and "model" or one of them; or their sizes, such as
            {"data": 4, "model": 2}, where one that is left out takes what the devices of this
            process allow; "auto" for all of these on "data"; None for one device.
        config: the network's, whose heads and MLP the "model" axis is to divide.

    Raises:
        InputError: the mesh has other axes, or more devices than there are; or the heads or the
            width of the MLP cannot be divided so.
    """
    if mesh is None:
        return None
    if isinstance(mesh, str):
        if mesh != "auto":
            raise InputError(
                "`mesh` must be 'auto', None, a `jax.sharding.Mesh` or sizes such as "
                f"{{'data': 4, 'model': 2}}; given {mesh!r}."
            )
        if len(jax.local_devices()) == 1:
            return None
        mesh = {}
    made = mesh if isinstance(mesh, Mesh) else _mesh_of_sizes(mesh)
    odd = [name for name in made.axis_names if name not in AXES]
    if odd:
        raise InputError(
            f"`mesh` must have the axes 'data' and 'model', or one of them; given "
            f"{', '.join(map(repr, made.axis_names))}."
        )
    if made.axis_names != AXES:
        devices = made.devices if made.axis_names != (MODEL, DATA) else made.devices.T
        rows = made.shape.get(DATA, 1)
        made = Mesh(devices.reshape(rows, made.devices.size // rows), AXES)
    _check_divides(made.shape[MODEL], config)
    return made


def _mesh_of_sizes(sizes: Any) -> Mesh:
    if not isinstance(sizes, Mapping) or any(name not in AXES for name in sizes):
        raise InputError(
            "`mesh` must be 'auto', None, a `jax.sharding.Mesh` or sizes such as "
            f"{{'data': 4, 'model': 2}}; given {sizes!r}."
        )
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"`mesh`: {name!r} must be a positive integer; given {size!r}.")
    devices = jax.local_devices()
    model = sizes.get(MODEL, 1)
    data = sizes.get(DATA, max(1, len(devices) // model))
    if data * model > len(devices):
        raise InputError(
            f"`mesh` of {data} x {model} (data x model) needs {data * model} devices; this "
            f"process has {len(devices)} ({devices[0].device_kind}). Ask for fewer (in the "
            "commands --devices and --model-parallel)."
        )
    return Mesh(np.array(devices[: data * model]).reshape(data, model), AXES)


def _check_divides(parts: int, config: ViTConfig) -> None:
    wholes = {
        "attention heads": config.num_attention_heads,
        "columns of the MLP": config.intermediate_size,
    }
    odd = [f"{count} {what}" for what, count in wholes.items() if count % parts]
    if odd:
        raise InputError(
            f"`mesh`: a 'model' axis of {parts} cannot divide this network's {' and '.join(odd)}; "
            "wanted a divisor of both."
        )


def param_shardings(mesh: Mesh, path: tuple[str, ...]) -> NamedSharding:
    """Where a parameter lies."""
    return NamedSharding(mesh, partition_spec(path))


def place(params: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The parameters on the devices of the mesh; those that are there already are not copied."""
    flat = flatten_dict(dict(params))
    return unflatten_dict(
        {path: jax.device_put(value, param_shardings(mesh, path)) for path, value in flat.items()}
    )
