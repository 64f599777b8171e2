"""Writes a plan beside its target, has it verified there, and only then puts it in its place."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vit_common.errors import MissingFileError, ViTError
from vit_common.files.checkpoint import save_checkpoint, write_checkpoint
from vit_common.files.replace import move_files, write_text
from vit_common.files.staging import stage, staged_files
from vit_common.files.texts import reason
from vit_convert.plan import PICKLES, Plan, is_file
from vit_convert.proof import verify_result
from vit_convert.report import Report
from vit_convert.source import METADATA_KEY


def write(
    plan: Plan,
    target: Path,
    beside: Mapping[str, str],
    stale: Iterable[Path],
    max_shard_size: int | str,
    verify: bool,
    report: Report,
    progress: Callable[[int, int], Any] | None,
    started: float,
) -> None:
    """Write beside the target, verify there, and only then put it in its place.

    Args:
        plan: what to write.
        target: a file or a directory; those above it are made.
        beside: small files of a directory, name -> text.
        stale: weights in it that the new ones make obsolete.
        max_shard_size: largest file of a directory.
        verify: whether to read the result again and compare it.
        report: gets the time, the verification and the names of what was written.
        progress: called with bytes done and bytes in all.
        started: by `time.perf_counter`.

    Raises:
        MissingFileError: it cannot be written.
        CheckpointError: the result is not equal to the source. Then nothing was replaced.
    """
    total = sum(math.prod(t.shape) * t.dtype.itemsize for t in plan.written.values())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    one_file = is_file(target)
    directory = target.parent if one_file else target
    made = _make_directories(directory)
    try:
        with stage(directory, target.name, [directory.resolve().name]) as staging:
            _write_into(staging, plan, target, beside, max_shard_size, one_file, advance)
            report.seconds = time.perf_counter() - started
            if verify:
                written = staging / target.name if one_file else staging
                report.verification = verify_result(plan, written)
            names = {file.name for file in staged_files(staging)}
            older = [path.name for path in stale if path.name not in names]
            report.written = [str(path) for path in move_files(staging, directory, older)]
    except BaseException as error:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError) and not isinstance(error, ViTError):
            text = f"{directory}: cannot be written ({reason(error)})."
            raise MissingFileError(text) from error
        raise


def _make_directories(directory: Path) -> list[Path]:
    """Make a directory and those above it; which were made."""
    made = [path for path in (*reversed(directory.parents), directory) if not os.path.exists(path)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: no text that a path can be
        raise MissingFileError(f"{directory}: cannot be made ({reason(error)}).") from error
    return made


def _write_into(staging, plan, target, beside, max_shard_size, one_file, advance) -> None:
    files = plan.table.files
    if not one_file:
        if files.container == "torch":
            write_checkpoint(
                staging / f"{files.stem}.pth",
                plan.written,
                wrapper=files.wrapper,
                progress=advance,
            )
            for name, text in beside.items():
                write_text(staging / name, text)
            return
        save_checkpoint(
            staging,
            plan.written,
            container=files.container,
            stem=files.stem,
            max_shard_size=max_shard_size,
            metadata=files.metadata,
            separator="/",
            beside=beside,
            progress=advance,
        )
        return
    metadata = None
    if target.suffix == ".safetensors":
        # A file alone says by itself what it is.
        metadata = {"format": files.tag or "pt", METADATA_KEY: plan.config.to_json_string()}
    write_checkpoint(
        staging / target.name,
        plan.written,
        metadata=metadata,
        wrapper=files.wrapper if target.suffix in PICKLES else None,
        progress=advance,
    )
