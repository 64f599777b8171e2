"""An adapter under the other generation's names: `vit convert ADAPTER TARGET --to peft-5`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vit_common.config import CONFIG_NAME as MODEL_CONFIG
from vit_common.config import FLOATS, ViTConfig
from vit_common.errors import (
    CheckpointError,
    ExistingFileError,
    InputError,
    MissingFileError,
    some,
)
from vit_common.families import AutoConfig
from vit_common.files.cards import CARD_NAME
from vit_common.files.containers.tensor import DTYPES, as_tensor
from vit_common.files.hub import ModelFiles
from vit_common.files.texts import read_json
from vit_common.images.processor import PROCESSOR_NAME
from vit_convert.adapters.folder import (
    CONFIG_NAME,
    WEIGHTS_NAMES,
    Adapter,
    adapter_table,
    adapter_tensors,
    find_adapter,
    has_adapter,
    read_adapter,
    same_adapters,
    understood,
    write_adapter,
)
from vit_convert.adapters.settings import LoraSettings
from vit_convert.report import Report, Verification

FORMATS: Mapping[str, str] = {"peft-4": "transformers-4", "peft-5": "transformers-5"}
"""Format of an adapter folder -> the generation of Transformers whose names it has."""
_OF_FILES = (".safetensors", ".msgpack", ".npz", ".pth", ".bin")


def rename_adapter(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str,
    *,
    base: str | os.PathLike | None = None,
    dtype: str | None = None,
    dry_run: bool = False,
    verify: bool = True,
    force: bool = False,
    **hub: Any,
) -> Report:
    """Write an adapter under the names of a generation of Transformers.

    Args:
        source: adapter folder, or "owner/name" on the Hub.
        target: folder.
        to: one of `FORMATS`.
        base: the base model, if the adapter's own names do not say its family; None is the one that
            the adapter names.
        dtype: to write; None keeps the source's.
        dry_run: do all but writing.
        verify: understand the result again and compare every tensor.
        force: overwrite files of the target.
        **hub: options of the Hub.

    Returns:
        What was done.

    Raises:
        MissingFileError, ConfigError, CheckpointError: as `read_adapter`.
        ExistingFileError: the target is there already.
        InputError: the source is no adapter, or the target no folder.

    Example:
        >>> rename_adapter("adapter", "adapter-5", "peft-5").format_from
        'peft-4'
    """
    started = time.perf_counter()
    files = ModelFiles(source, **hub)
    if find_adapter(files) is None and not has_adapter(files):
        raise InputError(
            f"{source} is no adapter folder (it has no {CONFIG_NAME}): {', '.join(FORMATS)} are "
            "for LoRA adapters alone. Choose a format for whole models."
        )
    target = Path(target)
    if target.suffix in _OF_FILES or os.path.isfile(target):
        raise InputError(f"{target}: an adapter is a folder of two files; give a folder.")
    adapter = read_adapter(files)
    config = None
    if adapter.family is None or base is not None:
        config = _config_of(adapter, base, hub)
    family = None if config is None else config.base_family
    if family and adapter.family and family != adapter.family:
        raise CheckpointError(
            f"the adapter {adapter.place} is for a model of the family {adapter.family!r}; {base} "
            f"is of {family!r}."
        )
    if config is not None:
        adapter.gated = bool(config.use_swiglu_ffn)
    layers = None if config is None else config.num_hidden_layers
    names = FORMATS[to]
    if dtype is not None:
        _check_dtype(dtype)
        adapter = _cast(adapter, DTYPES[dtype])
    tensors, changes = adapter_tensors(adapter, names, family=family)
    table = adapter_table(adapter, names, changes, layers)
    there = [
        target / name for name in (CONFIG_NAME, *WEIGHTS_NAMES) if os.path.exists(target / name)
    ]
    if there and not force:
        raise ExistingFileError(
            f"{', '.join(map(str, there))}: already there; nothing was written. Pass --force (in "
            "Python `force=True`) to overwrite."
        )
    report = Report(
        source=str(files.name),
        target=str(target),
        format_from=next(key for key, value in FORMATS.items() if value == adapter.generation),
        format_to=to,
        describes=adapter.describe(),
        family=str(adapter.family or family),
        architecture="an adapter of PEFT"
        + (f" on {adapter.settings.base}" if adapter.settings.base else ""),
        tensors_read=len(tensors),
        tensors_written=len(tensors),
        parameters=adapter.parameters,
        bytes=sum(array.nbytes for array in tensors.values()),
        dtype=", ".join(sorted({array.dtype.name for array in tensors.values()})),
        dry_run=dry_run,
    )
    if verify:
        again = understood(
            {name: as_tensor(name, array) for name, array in tensors.items()},
            LoraSettings.from_dict(json.loads(json.dumps(table))),
            family,
            str(target),
        )
        if wrong := list(same_adapters(adapter, again)):
            raise CheckpointError(f"verification failed: {some(wrong, 8)} would differ.")
        report.verification = Verification(len(tensors))
    if not dry_run:
        beside = {}
        for name in (MODEL_CONFIG, PROCESSOR_NAME, CARD_NAME):
            path = files.find(name)
            if path is not None and path.name == name:
                beside[name] = path.read_text(encoding="utf-8")
        written = write_adapter(target, adapter, names, family=family, layers=layers, beside=beside)
        report.written = [str(path) for path in written]
    report.seconds = time.perf_counter() - started
    return report


def _config_of(adapter: Adapter, base: Any, hub: Mapping[str, Any]) -> ViTConfig:
    """The base model's configuration."""
    name = base or adapter.settings.base
    if name is None:
        raise InputError(
            f"{adapter.place}: neither its names nor its {CONFIG_NAME} say what its base model is. "
            "Name the base model with --base (in Python `base=`)."
        )
    options = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
    revision = None if base else adapter.settings.revision
    try:
        path = ModelFiles(name, revision=revision, **options).need(MODEL_CONFIG)
    except MissingFileError as error:
        raise type(error)(
            f"the base model of the adapter {adapter.place}: {error} Name another place of it with "
            "--base (in Python `base=`)."
        ) from error
    config: ViTConfig = AutoConfig.from_dict(read_json(path))
    return config


def _check_dtype(dtype: str) -> None:
    if dtype not in FLOATS:
        raise InputError(f"`dtype` must be one of {', '.join(FLOATS)}; given {dtype!r}.")


def _cast(adapter: Adapter, dtype: np.dtype) -> Adapter:
    def cast(array: np.ndarray | None) -> Any:
        return None if array is None else array.astype(dtype)

    layers = {
        name: replace(
            layer,
            a=cast(layer.a),
            b=cast(layer.b),
            magnitude=cast(layer.magnitude),
            bias=cast(layer.bias),
        )
        for name, layer in adapter.layers.items()
    }
    return replace(adapter, layers=layers, saved={n: cast(x) for n, x in adapter.saved.items()})
