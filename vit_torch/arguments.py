"""What a model's arguments must be, before anything is computed from them."""

from __future__ import annotations

from typing import Any

import torch

from vit_common.errors import InputError


def check_tensors(**inputs: Any) -> None:
    """Raise InputError unless each input is a tensor or None."""
    for name, value in inputs.items():
        if not (value is None or isinstance(value, torch.Tensor)):
            raise InputError(f"`{name}` must be a torch tensor; given a {type(value).__name__}.")


def has_values(tensor) -> bool:
    """Whether the values can be read: not while a program is compiled, exported or captured, nor
    under the transformations of `torch.func`."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if type(tensor) is not torch.Tensor or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return not (tensor.is_meta or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()))
