"""The errors this project raises on purpose.

Each one says what was wanted, what was given and what to do about it, and each is also the
built-in (or Transformers) error that code written for Transformers 4.57.6 already catches.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any


class ViTError(Exception):
    """Base of every error raised on purpose by this project."""


class ConfigError(ViTError, ValueError):
    """A configuration value, or a combination of them, that no model can have."""


class InputError(ViTError, ValueError):
    """An argument of a call that does not fit the model: a size, a dtype, a label, an option."""


class ImageError(ViTError, ValueError):
    """An image that cannot be read, or whose layout is ambiguous."""


class CheckpointError(ViTError, ValueError):
    """A weights file that is corrupt, hostile, or does not hold what the model needs."""


class NoClassifierError(CheckpointError):
    """A weights file without a classifier, where one is needed."""


class MissingFileError(ViTError, OSError):
    """A file, a directory or a Hub repository that is not there or cannot be reached or written.

    Transformers raises `OSError` in these places, so this is one.
    """


class DeviceError(ViTError):
    """JAX has no device to run on, or the device's memory does not hold the network."""


class HostError(ViTError):
    """Another process of a run on several hosts did not start, stopped, or is gone."""


class ExistingFileError(ViTError, FileExistsError):
    """A file that exists already and must not be overwritten without being asked to."""


def some(names: Iterable[str], most: int, separator: str = ", ") -> str:
    """For a message: the first names, and how many more there are; "nothing" if there are none."""
    listed = list(names)
    rest = len(listed) - most
    return (separator.join(listed[:most]) or "nothing") + (f" and {rest} more" if rest > 0 else "")


# Frames that a warning does not point at: this project, and what only passes a call on.
_PASSED_OVER = ("vit_common", "vit_convert", "vit_flax", "vit_torch", "vit_cli", "contextlib")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, and point at the line outside this project that led here, however deep it is.

    Args:
        message: what was found, and what to do about it.
        category: class of the warning.

    Example:
        >>> warn("weights hold NaN, so outputs will too: classifier.bias.")
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


_LONGEST = 200


def shown(value: Any, most: int = _LONGEST) -> str:
    """A value for a message: its `repr`, cut to `most` characters.

    What a file or a caller gave may be any length; a message that repeats it says its beginning,
    and how long it is.
    """
    if isinstance(value, (str, bytes, bytearray)) and len(value) > most:
        kind = "characters" if isinstance(value, str) else "bytes"
        return f"{value[: most // 2]!r}... ({len(value)} {kind})"
    try:
        text = repr(value)
    except Exception:  # nested without end, an integer of too many digits, somebody's own class
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most // 2]}... ({len(text)} characters)"
