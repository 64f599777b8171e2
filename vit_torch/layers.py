"""The layers that the network is built of, with nothing left to PyTorch's defaults: a dense layer,
a convolution and the norms, and the first values of their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from vit_common.config import ViTConfig

if TYPE_CHECKING:
    from vit_torch.model import ViTPart


def initialize(parameter: torch.Tensor, config: ViTConfig) -> None:
    """Truncated normal of standard deviation `initializer_range`, cut at -2 and 2, in place."""
    if config.initializer_range == 0.0:
        nn.init.zeros_(parameter)
    else:
        nn.init.trunc_normal_(parameter, mean=0.0, std=config.initializer_range, a=-2.0, b=2.0)


def add_parameter(
    part: ViTPart, name: str, shape: tuple[int, ...], value: float | Literal["normal"]
) -> None:
    """Give a part, in its constructor, a parameter of that name, filled with `value` or drawn from
    the normal distribution of `initialize`."""
    if value == "normal":
        parameter = nn.Parameter(torch.empty(shape))
        initialize(parameter, part.config)
    else:
        parameter = nn.Parameter(torch.full(shape, value))
    part.register_parameter(name, parameter)


def uninitialized(layer: Callable, *args, **kwargs) -> Any:
    """A layer without PyTorch's own random weights, on the default device."""
    made = layer(*args, **kwargs, device="meta").to_empty(device=torch.get_default_device())
    made._is_hf_initialized = True  # see `ModelBase.init_weights`
    return made


def dense(part: ViTPart, inputs: int, features: int, use_bias: bool = True) -> nn.Linear:
    layer = uninitialized(nn.Linear, inputs, features, bias=use_bias)
    initialize(layer.weight, part.config)
    if use_bias:
        nn.init.zeros_(layer.bias)
    return layer


def convolution(
    part: ViTPart, inputs: int, features: int, size: tuple[int, int], use_bias: bool = True
) -> nn.Conv2d:
    layer = uninitialized(
        nn.Conv2d, inputs, features, kernel_size=size, stride=size, padding=0, bias=use_bias
    )
    initialize(layer.weight, part.config)
    if use_bias:
        nn.init.zeros_(layer.bias)
    return layer


def layer_norm(part: ViTPart, width: int | None = None) -> nn.LayerNorm | nn.RMSNorm:
    """A norm over the last axis, of the config's `norm_type`; `width` None is `hidden_size`."""
    width, epsilon = width or part.config.hidden_size, part.config.layer_norm_eps
    norm: nn.LayerNorm | nn.RMSNorm
    if part.config.norm_type == "rmsnorm":
        norm = nn.RMSNorm(width, eps=epsilon, elementwise_affine=True)
    else:
        norm = nn.LayerNorm(width, eps=epsilon, elementwise_affine=True, bias=True)
    norm._is_hf_initialized = True  # type: ignore[assignment]
    return norm
