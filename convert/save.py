"""From canonical tensors to files: what `save_pretrained` of both twins does."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from vit_common.checks import check_keywords
from vit_common.config import CONFIG_NAME, ViTConfig
from vit_common.errors import CheckpointError, InputError
from vit_common.files.checkpoint import make_directory, save_checkpoint
from vit_common.files.hub import PUSH_OPTIONS
from vit_convert.formats import DESCRIBED, FILES, table_for
from vit_convert.rules import TensorLike, to_foreign

# Keywords of Transformers 4.57.6 that change nothing here: files are always written by this project
# and through a temporary place.
_WITHOUT_EFFECT = ("save_function", "use_temp_dir", "variant", "save_peft_format")

SaveFormat = Literal["hub", "flax", "flax-safetensors"]


def save_parameters(
    directory: str | os.PathLike,
    config: ViTConfig,
    tensors: Mapping[str, TensorLike],
    *,
    to: SaveFormat = "hub",
    architecture: str,
    max_shard_size: int | str = "10GB",
) -> list[Path]:
    """Write weights and `config.json` into a directory; an earlier save survives a failure.

    After success nothing of an earlier save is left, in whichever of these formats it was.

    Args:
        directory: made if it is not there.
        config: written with `architecture` and the weights' dtype in it; left as it is.
        tensors: canonical name -> tensor, `vit.` prefix as the model has it.
        to: "hub" (model.safetensors in PyTorch's layout), "flax" (flax_model.msgpack) or
            "flax-safetensors" (model.safetensors in Flax's layout, as Transformers 4.57.6 wrote).
        architecture: class name for `architectures`.
        max_shard_size: largest file, in bytes or as "5GB".

    Returns:
        The files written.

    Raises:
        InputError: no such format, or a bad size.
        MissingFileError: the directory or a file cannot be written.
    """
    if to not in DESCRIBED:
        raise InputError(f"`to` must be one of {', '.join(map(repr, DESCRIBED))}; given {to!r}.")
    files = FILES[to]
    mapped = to_foreign(tensors, table_for(to, config))
    if mapped.unused:
        raise CheckpointError(
            f"these parameters are not part of {architecture}: {', '.join(sorted(mapped.unused))}."
        )
    written = type(config).from_dict(config.to_dict())
    written.architectures = [architecture]
    written.dtype = next(iter(tensors.values())).dtype.name
    text = written.to_json_string()
    return save_checkpoint(
        make_directory(directory),
        mapped.tensors,
        container=files.container,
        stem=files.stem,
        max_shard_size=max_shard_size,
        metadata=files.metadata,
        separator="/",
        beside={CONFIG_NAME: text},
        # Weights of an earlier save in another format would be read instead of these, or beside
        # them, with a configuration that is no longer theirs.
        replaces=("model.safetensors", "flax_model.msgpack"),
    )


def check_save_keywords(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise InputError unless each keyword is known, of the Hub, or without effect here.

    Args:
        what: the method, for the message.
        given: keywords that the method's own signature did not take.
        known: those of its signature, for the message.
    """
    check_keywords(what, given, [*known, *PUSH_OPTIONS, *_WITHOUT_EFFECT])
