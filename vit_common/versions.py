"""Versions of this package and of what it runs on, without importing any of it."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGE = "vitflax"
"""Name of the distribution; `vit-flax` on the package index is another project."""


def package_version() -> str:
    """The version of this package; "unknown" where it runs from files that are not installed."""
    return versions(PACKAGE)[PACKAGE] or "unknown"


def versions(*names: str) -> dict[str, str | None]:
    """Version by name of a package, or of "python"; None for what is not installed."""
    table: dict[str, str | None] = {}
    for name in names:
        try:
            table[name] = platform.python_version() if name == "python" else metadata.version(name)
        except metadata.PackageNotFoundError:
            table[name] = None
    return table
