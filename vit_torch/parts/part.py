"""What every module of the network shares: its configuration, and the activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vit_common.config import ViTConfig

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": lambda x: F.gelu(x, approximate="none"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "selu": F.selu,
    "silu": F.silu,
    "swish": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": lambda x: x,
}


def activation(name: str | Callable) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function of `hidden_act` or `pooler_act`; a callable is used as given."""
    return name if callable(name) else ACTIVATIONS[name]


class ViTPart(nn.Module):
    """Base of every module here.

    Attributes:
        config: the sizes. All parts of a model share one, which also names the attention kernel.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self._is_hf_initialized = True  # see `ModelBase.init_weights`

    @property
    def attn_implementation(self) -> str:
        """The attention kernel, see `vit_torch.attention`."""
        return self.config._attn_implementation or "auto"


def options(part: ViTPart) -> dict[str, Any]:
    """Arguments that a module passes on to the modules inside it."""
    return {"config": part.config}
