"""`convert`: any checkpoint of the family into any layout that can hold it, and the proof."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_common.checks import check_keywords
from vit_common.config import FLOATS, ViTConfig
from vit_common.errors import CheckpointError, ConfigError, ExistingFileError, InputError
from vit_common.files.hub import HUB_OPTIONS
from vit_common.images.auto import AutoImageProcessor
from vit_common.images.processor import BaseImageProcessor
from vit_common.images.usual import is_usual, usual_processor
from vit_convert.adapters import CONFIG_NAME as ADAPTER_CONFIG
from vit_convert.adapters import FORMATS as ADAPTERS
from vit_convert.adapters import rename_adapter
from vit_convert.plan import Plan, is_file, refuse_to_overwrite, stale_weights, target_format
from vit_convert.report import Report
from vit_convert.source import find_processor, open_source
from vit_convert.write import write


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    to: str | None = None,
    from_: str | None = None,
    dtype: str | None = None,
    num_labels: int | None = None,
    labels: Sequence[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    ignore: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
    preprocessing: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    dry_run: bool = False,
    verify: bool = True,
    force: bool = False,
    max_shard_size: int | str = "10GB",
    progress: Callable[[int, int], Any] | None = None,
    **hub: Any,
) -> Report:
    """Convert a checkpoint.

    Args:
        source: directory, weights file, index of shards, or "owner/name" on the Hub; or an adapter
            folder of PEFT, which is merged into its base model.
        target: a file, whose suffix decides the container, or a directory, which also gets
            `config.json` and `preprocessor_config.json`.
        to: the format to write, one of `vit_convert.formats.WRITTEN`; None takes what the suffix
            says, and "hub" for a directory. "peft-4" and "peft-5" write an adapter folder as it is,
            with the names of Transformers 4 or 5.
        from_: the source's format, if it is not detected.
        dtype: of the target: "float32", "bfloat16", "float16" or "float64"; None keeps it.
        num_labels: number of classes; must be that of the head.
        labels: names of the classes, in order.
        image_size: resample the positions to images of this size, with the family's own rule.
        ignore: regular expressions of names in the source to leave aside.
        overrides: fields of the configuration that win over what the source implies.
        preprocessing: how images are prepared, instead of what the source says or implies:
            `preprocessor_config.json`, a model that has one, or "imagenet", "inception" or "clip"
            (`vit_common.images.usual`), with another crop as in "imagenet:0.95".
        base: the base model of an adapter, instead of the one that it names.
        dry_run: do all but writing.
        verify: read the result again and compare it, and run source and target on one image.
        force: overwrite files of the target.
        max_shard_size: largest file of a directory, in bytes or as "5GB".
        progress: called with bytes done and bytes in all.
        **hub: options of the Hub.

    Returns:
        What was done.

    Raises:
        MissingFileError: the source is not there, or the target cannot be written.
        ExistingFileError: the target is there already.
        CheckpointError: the source is corrupt, of no known format, or does not account for every
            parameter; all faults are in one message. Or the result is not equal to it: then
            nothing was replaced.
        ConfigError: its configuration is refused.
        InputError: an option is wrong, or the format cannot hold these weights.
    """
    started = time.perf_counter()
    check_keywords("convert", hub, HUB_OPTIONS)
    target = Path(target)
    if to is not None and to in ADAPTERS:
        given = {
            "from_": from_, "num_labels": num_labels, "labels": labels, "image_size": image_size,
            "ignore": ignore, "overrides": overrides, "preprocessing": preprocessing,
        }  # fmt: skip
        for option, value in given.items():
            if value:
                raise InputError(f"`{option}` is for whole models; {to!r} writes an adapter.")
        return rename_adapter(
            source, target, to, base=base, dtype=dtype, dry_run=dry_run, verify=verify,
            force=force, **hub,
        )  # fmt: skip
    to = target_format(target, to)
    if os.path.isfile(target / ADAPTER_CONFIG):
        raise ExistingFileError(
            f"{target / ADAPTER_CONFIG}: an adapter is in this folder, and other tools would add "
            "it to the model a second time; nothing was written. Choose another folder."
        )
    if dtype is not None and dtype not in FLOATS:
        raise InputError(f"`dtype` must be one of {', '.join(FLOATS)}; given {dtype!r}.")
    wanted = dict(overrides or {})
    model, adapter = (source, None) if base is None else (base, source)
    with open_source(model, format=from_, overrides=wanted, adapter=adapter, **hub) as opened:
        try:
            plan = Plan(opened, to, dtype, image_size, tuple(ignore), num_labels, labels)
        except (CheckpointError, ConfigError) as error:
            raise type(error)(f"{opened.path}: {error}") from error
        report = plan.report(target, dry_run)
        if preprocessing is None:
            processor = find_processor(opened)
        else:
            processor = _given(preprocessing, plan.config), f"{preprocessing} (given)"
        beside = plan.beside(target, processor, report)
        stale = [] if is_file(target) else stale_weights(target)
        if not force:
            refuse_to_overwrite(plan.names(target, beside), stale)
        # What is being read is never deleted, whatever else `force` allows.
        own = {file.resolve() for file in (opened.path, *opened.checkpoint.files)}
        stale = [path for path in stale if path.resolve() not in own]
        if not dry_run:
            write(plan, target, beside, stale, max_shard_size, verify, report, progress, started)
        else:
            report.seconds = time.perf_counter() - started
    return report


def _given(preprocessing: str | os.PathLike, config: ViTConfig) -> BaseImageProcessor:
    """The image processor that the caller names."""
    if not is_usual(preprocessing) or Path(preprocessing).exists():
        return AutoImageProcessor.from_pretrained(preprocessing)
    if config.num_channels != 3:
        raise InputError(
            f"preprocessing {preprocessing!r} is for images of 3 channels; this network takes "
            f"{config.num_channels}."
        )
    return usual_processor(str(preprocessing), config.image_height_width)
