"""From canonical tensors to files: what `save_pretrained` of both twins does."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from convert.formats import FORMATS
from convert.rules import TensorLike, to_foreign
from vit_common.checkpoint import make_directory, save_checkpoint
from vit_common.config import CONFIG_NAME, ViTConfig
from vit_common.errors import CheckpointError, InputError

SaveFormat = Literal["hub", "flax", "flax-safetensors"]

# format -> (container, stem of the file names, value of "format" in the metadata)
_FILES: dict[str, tuple[Any, str, str]] = {
    "hub": ("safetensors", "model", "pt"),
    "flax": ("msgpack", "flax_model", "flax"),
    "flax-safetensors": ("safetensors", "model", "flax"),
}


def save_parameters(
    directory: str | os.PathLike,
    config: ViTConfig,
    tensors: Mapping[str, TensorLike],
    *,
    to: SaveFormat = "hub",
    architecture: str,
    max_shard_size: int | str = "10GB",
) -> Path:
    """Write weights and `config.json` into a directory; an earlier save survives a failure.

    Args:
        directory: made if it is not there.
        config: written with `architecture` and the weights' dtype in it; left as it is.
        tensors: canonical name -> tensor, `vit.` prefix as the model has it.
        to: "hub" (model.safetensors in PyTorch's layout), "flax" (flax_model.msgpack) or
            "flax-safetensors" (model.safetensors in Flax's layout, as Transformers 4.57.6 wrote).
        architecture: class name for `architectures`.
        max_shard_size: largest file, in bytes or as "5GB".

    Returns:
        The directory.

    Warns:
        UserWarning: the directory holds other weights that `from_pretrained` reads first.

    Raises:
        InputError: no such format, or a bad size.
        MissingFileError: the directory or a file cannot be written.
    """
    if to not in _FILES:
        raise InputError(f"`to` must be one of {', '.join(map(repr, _FILES))}; given {to!r}.")
    container, stem, tag = _FILES[to]
    mapped = to_foreign(tensors, FORMATS[to])
    if mapped.unused:
        raise CheckpointError(
            f"these parameters are not part of {architecture}: {', '.join(sorted(mapped.unused))}."
        )
    written = ViTConfig.from_dict(config.to_dict())
    written.architectures = [architecture]
    written.dtype = next(iter(tensors.values())).dtype.name
    text = written.to_json_string()
    path = make_directory(directory)
    save_checkpoint(
        path,
        mapped.tensors,
        container=container,
        stem=stem,
        max_shard_size=max_shard_size,
        metadata={"format": tag} if container == "safetensors" else None,
        separator="/",
        beside={CONFIG_NAME: text},
    )
    if to == "flax":
        other = [
            name
            for name in ("model.safetensors", "model.safetensors.index.json")
            if (path / name).is_file()
        ]
        if other:
            warnings.warn(
                f"{path} also holds {' and '.join(other)}, which `from_pretrained` reads before "
                "flax_model.msgpack; delete it if it is of another save.",
                UserWarning,
                stacklevel=3,
            )
    return path
