"""`vit convert`: a checkpoint in one layout in, in another out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_cli.terminal import interrupt
from vit_cli.terminal.exit_codes import DONE, INTERRUPTED
from vit_cli.terminal.messages import one_line, say
from vit_common.errors import InputError, MissingFileError
from vit_common.files.texts import reason

_BIG = 200_000_000
"""Bytes from which there is a progress bar."""


def convert(
    source: str,
    target: str,
    *,
    settings: Sequence[str] = (),
    heads: int | None = None,
    labels: str | None = None,
    as_json: bool = False,
    hub: Mapping[str, Any] | None = None,
    **options: Any,
) -> int:
    """Convert and print the report.

    Args:
        source: directory, weights file or Hub name.
        target: directory or file.
        settings: "field=value" texts of the configuration that win over what the source implies.
        heads: number of attention heads, where the source does not say.
        labels: a file of labels: one a line, or JSON (a list, or index to label).
        as_json: print one JSON object.
        hub: options of the Hub.
        **options: as `vit_convert.convert`.

    Returns:
        The exit code.

    Raises:
        ViTError: it cannot be converted; nothing was written.
    """
    from vit_convert import convert as run

    overrides = dict(_setting(text) for text in settings)
    if heads is not None:
        overrides["num_attention_heads"] = heads
    names = None if labels is None else read_labels(labels)
    try:
        with interrupt.raises(), _bar() as advance:
            report = run(
                source,
                target,
                overrides=overrides,
                labels=names,
                progress=advance,
                **options,
                **(hub or {}),
            )
    except KeyboardInterrupt:
        say("interrupted: nothing was written")
        return INTERRUPTED
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        for name, text in report.lines():
            print(f"{name:10}  {one_line(text)}")
    return DONE


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise InputError(f"--set must be FIELD=VALUE; given {text!r}.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def read_labels(path: str) -> list[str]:
    """Labels in the order of the classes, from a text or JSON file.

    Raises:
        MissingFileError: it cannot be read.
        InputError: it does not hold labels.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MissingFileError(f"{path}: cannot be read ({reason(error)}).") from error
    if not path.endswith(".json"):
        return text.splitlines()
    wanted = InputError(
        f"{path}: must hold a JSON list of labels, or an object of index to label without gaps."
    )
    try:
        table = json.loads(text)
    except ValueError as error:
        raise wanted from error
    if isinstance(table, Mapping):
        try:
            numbered = {int(key): value for key, value in table.items()}
        except ValueError as error:
            raise wanted from error
        if sorted(numbered) != list(range(len(numbered))):
            raise wanted
        table = [numbered[i] for i in range(len(numbered))]
    if not isinstance(table, list):
        raise wanted
    return [str(label) for label in table]


class _bar:
    """A progress bar in bytes, on a terminal, where there are many."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> Callable[[int, int], None]:
        return self._advance

    def _advance(self, done: int, total: int) -> None:
        if total < _BIG or not sys.stderr.isatty():
            return
        if self._bar is None:
            try:
                from rich import progress
                from rich.console import Console
            except ImportError:
                return
            self._bar = progress.Progress(
                progress.TextColumn("converting"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TimeRemainingColumn(),
                console=Console(file=sys.stderr),
                transient=True,
            )
            self._task = self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
