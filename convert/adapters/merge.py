"""An adapter merged into its base model's tensors, which stay in their file until they are read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vit_common.config import FLOATS, ViTConfig
from vit_common.errors import CheckpointError, some
from vit_common.files.containers.tensor import Tensor
from vit_common.parameters import HEAD_PARAMETERS, TOP_PARAMETERS
from vit_convert.adapters.folder import Adapter
from vit_convert.adapters.lowrank import LowRank
from vit_convert.rules import MappedTensor, as_mapped

_SHOWN = 6
_CLASSIFIERS = ("classifier.weight", "cls_classifier.weight")


def merged(
    adapter: Adapter, tensors: Mapping[str, MappedTensor], config: ViTConfig
) -> dict[str, MappedTensor]:
    """The base model's tensors with the adapter in them: W + scale B A where it has a layer, its
    own where it has a parameter whole.

    Args:
        adapter: what is merged.
        tensors: of the base model, by canonical names without prefix.
        config: the base model's.

    Returns:
        A new dict; each tensor is computed when it is read, in float64, and rounded once to the
        dtype of the base model's.

    Raises:
        CheckpointError: the adapter is for another family, for other sizes, or for layers that the
            base model does not have.

    Source: `merge_and_unload` of PEFT 0.21.2, which computes in the weight's own dtype.
    """
    family = config.base_model_prefix
    if adapter.family is not None and adapter.family != family:
        raise CheckpointError(
            f"the adapter {adapter.place} is for a model of the family {adapter.family!r}; its "
            f"base model is of {family!r}. Name the right base model (in a command, --base)."
        )
    faults = []
    found = dict(tensors)
    if any(f"{name}.".startswith("classifier.") for name in (*adapter.layers, *adapter.saved)):
        # The two heads of a distilled base model give way to the one that was trained.
        others = ("cls_classifier.", "distillation_classifier.")
        found = {name: x for name, x in found.items() if not name.startswith(others)}
    for layer, change in adapter.layers.items():
        name = f"{layer}.weight"
        weight = tensors.get(name)
        if weight is None:
            faults.append(f"{layer}: the base model has no such layer")
            continue
        fault = change.fault(tuple(weight.shape))
        if fault is not None:
            faults.append(f"{layer}: {fault}")
            continue
        if weight.dtype.name not in FLOATS:
            faults.append(f"{layer}: its weight is {weight.dtype}, which LoRA cannot change")
            continue
        found[name] = _changed(name, weight, change)
        if change.bias is not None:
            bias = tensors.get(f"{layer}.bias")
            if bias is None:
                faults.append(f"{layer}: the adapter has a bias for it, and the layer has none")
            else:
                found[f"{layer}.bias"] = _changed_bias(f"{layer}.bias", bias, change)
    dtype = next(iter(tensors.values())).dtype if tensors else None
    for name, array in adapter.saved.items():
        own = tensors.get(name)
        if own is None and not name.startswith(HEAD_PARAMETERS):
            faults.append(f"{name}: the base model has no such parameter")
        elif own is not None and own.shape != array.shape and not name.startswith(TOP_PARAMETERS):
            faults.append(
                f"{name}: its shape is {array.shape}; the base model's is {tuple(own.shape)}"
            )
        elif array.dtype.name not in FLOATS:
            faults.append(f"{name}: its dtype is {array.dtype}")
        else:
            wanted = own.dtype if own is not None else dtype
            found[name] = _whole(name, array, wanted)
    if faults:
        raise CheckpointError(
            f"the adapter {adapter.place} does not fit its base model: "
            f"{some(faults, _SHOWN, '; ')}. Name the right base model (in a command, --base)."
        )
    return found


def classes_of(adapter: Adapter) -> int | None:
    """Number of classes of the classifier in an adapter; None where it has none."""
    for name in _CLASSIFIERS:
        if name in adapter.saved:
            return int(adapter.saved[name].shape[0])
    return None


def _changed(name: str, weight: MappedTensor, change: LowRank) -> MappedTensor:
    def load() -> np.ndarray:
        return change.apply(weight.read())

    return as_mapped(Tensor(name, tuple(weight.shape), weight.dtype, load))


def _changed_bias(name: str, bias: MappedTensor, change: LowRank) -> MappedTensor:
    return as_mapped(
        Tensor(name, tuple(bias.shape), bias.dtype, lambda: change.apply_bias(bias.read()))
    )


def _whole(name: str, array: np.ndarray, dtype: np.dtype | None) -> MappedTensor:
    dtype = array.dtype if dtype is None or dtype.name not in FLOATS else dtype
    return as_mapped(Tensor(name, array.shape, dtype, lambda: array.astype(dtype)))
