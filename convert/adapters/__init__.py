"""LoRA adapters in PEFT's files: read, merged into a base model, written for either generation of
Transformers.

`open_source` of an adapter folder, and with it every `from_pretrained` and command, gives the base
model with the adapter merged.
"""

from __future__ import annotations

from vit_convert.adapters.folder import (
    CONFIG_NAME,
    WEIGHTS_NAMES,
    Adapter,
    find_adapter,
    has_adapter,
    is_adapter,
    read_adapter,
    write_adapter,
)
from vit_convert.adapters.lowrank import LowRank
from vit_convert.adapters.merge import classes_of, merged
from vit_convert.adapters.names import GENERATIONS, layer_names
from vit_convert.adapters.rename import FORMATS, rename_adapter
from vit_convert.adapters.settings import LoraSettings, plain_table

__all__ = [
    "CONFIG_NAME",
    "FORMATS",
    "GENERATIONS",
    "WEIGHTS_NAMES",
    "Adapter",
    "LoraSettings",
    "LowRank",
    "classes_of",
    "find_adapter",
    "has_adapter",
    "is_adapter",
    "layer_names",
    "merged",
    "plain_table",
    "read_adapter",
    "rename_adapter",
    "write_adapter",
]
