"""The folder of a training run: its settings, its log, and the lock that keeps other runs out.

OUTPUT/run.json        settings, versions, how far the run is
OUTPUT/log.jsonl       one JSON object for each step and each validation
OUTPUT/checkpoints/    see `vit_flax.training.checkpoints`
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_common.checks import differences
from vit_common.errors import ExistingFileError, InputError, MissingFileError, ViTError, shown, some
from vit_common.files.replace import make_directory, write_text
from vit_common.files.staging import take_lock
from vit_common.files.texts import read_json, reason

RUN, LOG, CHECKPOINTS, LOCK = "run.json", "log.jsonl", "checkpoints", "run.lock"
_KIND = "vit-training-run"
_SHOWN = 6  # settings in a message


class RunFolder:
    """The folder of one run, held by one process until `close`.

    Args:
        path: made if it is not there.
        settings: what decides the numbers of the run, as JSON can hold it.
        resume: go on with the run that is there, if there is one.
        force: delete the run that is there.
        writes: whether this process looks and writes; of several, the first one does, and tells
            the others what it `found`.

    Attributes:
        path: the folder.
        found: what `run.json` holds of an earlier start of the same run; None for a new run.

    Raises:
        ExistingFileError: the folder holds another run, or other files.
        InputError: `resume` with other settings than the run has; the message names them.
        MissingFileError: the folder cannot be written, or another process trains into it.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
        force: bool = False,
        writes: bool = True,
    ) -> None:
        self.path = Path(path)
        self.writes = writes
        self.settings = json.loads(json.dumps(dict(settings)))
        self._lock: int | None = None
        self._made = self._locks = self._begun = False
        self.found: dict[str, Any] | None = None
        if not writes:
            return
        self._look(resume, force)
        self._made = not self.path.exists()
        self._locks = not (self.path / LOCK).exists()
        make_directory(self.path)
        self._lock = _locked(self.path)
        try:
            self.found = self._look(resume, force)  # another run may have ended meanwhile
        except BaseException:
            self.close()
            raise

    def begin(self, **notes: Any) -> None:
        """Write the first files of a run, or that it goes on; what a run that is not gone on with
        left is deleted. Until then the folder is as it was, so a run that cannot begin, since its
        model or settings do not fit, costs nothing.

        Args:
            **notes: as `note` takes them.
        """
        self._begun = True
        if self.writes and self.found is None:
            self._clear()
        self.note(status="running", **notes)

    def _look(self, resume: bool, force: bool) -> dict[str, Any] | None:
        found = read_run(self.path)
        if found is None:
            others = _others(self.path)
            if others and not force:
                raise ExistingFileError(
                    f"{self.path}: holds other files ({some(others, 3)}) and no run; wanted a new "
                    "or empty folder for --output. Pass --force to write into it."
                )
            return None
        if force and not resume:
            return None
        if not resume:
            state = "finished" if found.get("status") == "finished" else "not finished"
            raise ExistingFileError(
                f"{self.path}: holds a run already ({state}, step {found.get('step', 0)}). Pass "
                "--resume to go on with it, or --force to delete it and begin anew."
            )
        theirs = found.get("settings", {})
        odd = [
            f"{name} {shown(there, 60)} there and {shown(here, 60)} here"
            for name, here, there in differences(self.settings, theirs)
        ]
        if odd:
            raise InputError(
                f"{self.path}: this run cannot go on with other settings: {some(odd, _SHOWN, '; ')}"
                ". Give the same ones (or none: they are taken from the run), or another --output."
            )
        return found

    def _clear(self) -> None:
        """Delete what a run left; other files stay."""
        for name in (RUN, LOG):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)

    @property
    def is_finished(self) -> bool:
        """Whether the run was finished before."""
        return self.found is not None and self.found.get("status") == "finished"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def log(self) -> Path:
        """The file of the log."""
        return self.path / LOG

    def note(self, **more: Any) -> None:
        """Write `run.json` with more entries, such as `status`.

        Raises:
            MissingFileError: it cannot be written.
        """
        if not self.writes:
            return
        from vit_common.versions import versions

        body = {
            "kind": _KIND,
            "status": "running",
            "step": 0,
            **(self.found or {}),
            "settings": self.settings,
            "versions": versions("jax", "flax", "optax", "orbax-checkpoint", "numpy", "pillow"),
            **more,
        }
        self.found = body
        write_text(self.path / RUN, json.dumps(body, indent=2, sort_keys=True) + "\n")

    def close(self) -> None:
        """Let the folder go. Where no run began, it is as it was."""
        if self._lock is None:
            return
        if self._locks and not self._begun:
            (self.path / LOCK).unlink(missing_ok=True)
            if self._made:
                with contextlib.suppress(OSError):
                    self.path.rmdir()
        os.close(self._lock)
        self._lock = None


def read_run(path: str | os.PathLike) -> dict[str, Any] | None:
    """What `run.json` of a folder holds; None if there is none.

    Raises:
        InputError: there is one, but it is not what a training run writes.
    """
    file = Path(path) / RUN
    if not file.is_file():
        return None
    try:
        found = read_json(file)
    except ViTError as error:
        raise InputError(
            f"{file}: cannot be read ({error}); pass --force to begin anew."
        ) from error
    if found.get("kind") != _KIND:
        raise InputError(f"{file}: was not written by a training run; wanted another --output.")
    return found


def _others(path: Path) -> list[str]:
    """Names in a folder that a run did not write."""
    if not path.exists():
        return []
    if not path.is_dir():
        raise MissingFileError(f"{path}: wanted a folder; a file has that name.")
    return sorted(name for name in os.listdir(path) if name != LOCK and not name.endswith(".tmp"))


def _locked(path: Path) -> int:
    try:
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be written ({reason(error)}).") from error
    if take_lock(descriptor) is False:
        os.close(descriptor)
        raise MissingFileError(f"{path}: another process trains into this folder now.")
    return descriptor


# -- the log


class Log:
    """One JSON object on each line, in the order of the steps; each step is there once.

    Args:
        file: is made, or goes on after `step`: lines of later steps, and what a killed process left
            of a line, are deleted.
        step: the last one that counts.
        epochs: whose validation is done; lines of a later one's are deleted, too. None keeps all.
        tensorboard: folder for TensorBoard's event files, too; None writes none.

    Raises:
        MissingFileError: the file cannot be written.
        InputError: tensorboardX is not installed.

    Example:
        >>> log = Log("run/log.jsonl", 0)
        >>> log.write({"step": 1, "loss": 2.3})
    """

    def __init__(
        self,
        file: str | os.PathLike,
        step: int,
        *,
        epochs: int | None = None,
        tensorboard: str | os.PathLike | None = None,
    ) -> None:
        self._file = Path(file)
        self._events = None if tensorboard is None else _events(tensorboard, step)
        if self._file.exists():
            kept = [
                row
                for row in read_log(self._file)
                if row["step"] <= step
                and (epochs is None or "validation" not in row or row["epoch"] <= epochs)
            ]
            write_text(self._file, "".join(map(_line, kept)))
        try:
            self._stream = self._file.open("a", encoding="utf-8")
        except OSError as error:
            raise MissingFileError(f"{file}: cannot be written ({reason(error)}).") from error

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a line. Numbers go to TensorBoard, too.

        Raises:
            MissingFileError: it cannot be written.
        """
        with _writing(self._file):
            self._stream.write(_line(row))
        if self._events is not None:
            for name, value in _flat(row):
                if name not in ("step", "epoch"):
                    self._events.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        """See to it that all lines are on the disk.

        Raises:
            MissingFileError: they cannot be written.
        """
        with _writing(self._file):
            self._stream.flush()
            os.fsync(self._stream.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Close the files.

        Raises:
            MissingFileError: they cannot be written.
        """
        with _writing(self._file):
            self._stream.close()
        if self._events is not None:
            self._events.close()


class _writing:
    """Errors of writing a file as one line."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, OSError) and not isinstance(error, ViTError):
            raise MissingFileError(
                f"{self._file}: the log cannot be written ({reason(error)}); the last checkpoint "
                "stays."
            ) from error


def read_log(file: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a log, without one that was not written to its end."""
    rows = []
    for line in Path(file).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> str:
    # NaN is no JSON: a diverged step says "nan".
    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(each) for name, each in value.items()}
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(row)) + "\n"


def _flat(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in row.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((prefix + name, float(value)))
    return found


def check_tensorboard(folder: str | os.PathLike) -> None:
    """Make the folder of TensorBoard's event files.

    Raises:
        InputError: tensorboardX is not installed.
        MissingFileError: the folder cannot be made.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        raise InputError(
            "--tensorboard needs tensorboardX: pip install tensorboardX, or leave it out."
        )
    make_directory(folder)


def _events(folder: str | os.PathLike, step: int) -> Any:
    check_tensorboard(folder)
    from tensorboardX import SummaryWriter

    # TensorBoard passes over what an earlier start of the run wrote of later steps.
    return SummaryWriter(os.fspath(folder), purge_step=step + 1)
