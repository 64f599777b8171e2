"""What a conversion writes to: one file or a folder, in which container, over what."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from vit_common.errors import ExistingFileError, InputError
from vit_convert.formats import DEFAULT, FILES, check_format

SUFFIXES = {files.suffix: name for name, files in FILES.items() if files.suffix}
"""Suffix of a target that is one file -> what is written if no format is named."""

PICKLES = (".pth", ".pt", ".bin")


def is_file(target: Path) -> bool:
    """Whether a target is meant as one file, by its suffix."""
    return target.suffix in (*SUFFIXES, *PICKLES) and not target.is_dir()


def target_format(target: Path, to: str | None) -> str:
    """The format to write: the one asked for, or else what the target says.

    Raises:
        InputError: there is no such format to write, or the suffix does not tell.
    """
    if to is not None:
        check_format(to)
        return FILES[to].for_suffix.get(target.suffix, to)
    if not is_file(target):
        return DEFAULT
    if target.suffix in PICKLES:
        raise InputError(
            f"{target}: say which format to write with `to` (`--to` of the command); a "
            f"{target.suffix} file can have several."
        )
    return SUFFIXES[target.suffix]


def refuse_to_overwrite(paths: Iterable[Path], stale: Iterable[Path]) -> None:
    """Raise ExistingFileError if one of the files to write, or of older weights, is there."""
    there = [str(path) for path in paths if path.exists()]
    older = [str(path) for path in stale if str(path) not in there]
    if older and not there:
        raise ExistingFileError(
            f"{', '.join(older)}: weights of another format, which would be read instead of the "
            "new ones or beside them; nothing was written. Choose another folder, or pass --force "
            "(in Python `force=True`) to replace them."
        )
    if there:
        raise ExistingFileError(
            f"{', '.join(there)}: already there; nothing was written. Pass --force (in Python "
            "`force=True`) to overwrite."
        )


def stale_weights(directory: Path) -> list[Path]:
    """Weights of an earlier save in a directory, which could be read beside the new ones."""
    pattern = re.compile(
        r"(model|flax_model|pytorch_model)(-\d{5,}-of-\d{5,})?"
        r"\.(safetensors|msgpack|bin|npz|pth)(\.index\.json)?"
    )
    if not directory.is_dir():
        return []
    return [file for file in sorted(directory.iterdir()) if pattern.fullmatch(file.name)]
