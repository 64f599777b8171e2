"""The layers that the network is built of, with nothing left to PyTorch's defaults: a dense layer,
a convolution and the norms, and the first values of their parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from vit_common.config import ViTConfig
from vit_common.parameters import DIFFERENTIAL_STD, initial_value

if TYPE_CHECKING:
    from vit_torch.parts.part import ViTPart


def initialize(parameter: torch.Tensor, config: ViTConfig) -> None:
    """Truncated normal of standard deviation `initializer_range`, cut at -2 and 2, in place."""
    if config.initializer_range == 0.0:
        nn.init.zeros_(parameter)
    else:
        nn.init.trunc_normal_(parameter, mean=0.0, std=config.initializer_range, a=-2.0, b=2.0)


def initialize_frequencies(parameter: torch.Tensor, config: ViTConfig) -> None:
    """New frequencies of rotary position embeddings, of two coordinates, in place: those of
    `rope_theta`, along axes turned at random in each head of each block (Heo et al. 2024,
    arXiv:2403.13298)."""
    _, L, A, half = parameter.shape
    exact = torch.promote_types(parameter.dtype, torch.float32)
    like: dict[str, Any] = {"dtype": exact, "device": parameter.device}
    size = config.rope_theta ** -(torch.arange(half // 2, **like) / (half // 2))
    angle = 2 * math.pi * torch.rand(L, A, 1, **like).expand(L, A, half // 2)
    parts = [(torch.cos(angle + turn), torch.sin(angle + turn)) for turn in (0.0, math.pi / 2)]
    axes = [torch.cat(axis, -1) for axis in zip(*parts, strict=True)]
    with torch.no_grad():
        parameter.copy_(torch.stack(axes) * size.tile(2))  # (2, L, A, D/A/2)


def fill(parameter: torch.Tensor, name: str, config: ViTConfig) -> None:
    """A new parameter of that canonical name, or the end of one, in place."""
    kind = initial_value(name)
    if kind == "normal":
        initialize(parameter, config)
    elif kind == "frequencies":
        initialize_frequencies(parameter, config)
    elif kind == "differential":
        nn.init.trunc_normal_(parameter, mean=0.0, std=DIFFERENTIAL_STD, a=-2.0, b=2.0)
    else:
        constants = {
            "one": 1.0,
            "layer scale": config.layer_scale_init_value,
            "logit scale": getattr(config, "logit_scale_init_value", 0.0),
        }
        nn.init.constant_(parameter, constants.get(kind, 0.0))


def add_parameter(
    part: ViTPart,
    name: str,
    shape: tuple[int, ...],
    value: float | Literal["normal", "frequencies"],
) -> None:
    """Give a part, in its constructor, a parameter of that name, filled with `value` or drawn from
    the normal distribution of `initialize` or by `initialize_frequencies`."""
    if isinstance(value, str):
        parameter = nn.Parameter(torch.empty(shape))
        (initialize if value == "normal" else initialize_frequencies)(parameter, part.config)
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
