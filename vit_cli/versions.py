"""Versions of this package and of what it runs on, without importing any of it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGE = "vit-flax"
_REQUIRED = ("jax", "jaxlib", "flax", "numpy", "pillow", "safetensors", "huggingface_hub")
_OPTIONAL = ("torch",)


def package_version() -> str:
    """The version of this package; "unknown" where it runs from files that are not installed."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str | None]:
    """Version by name; None for what is not installed."""
    table: dict[str, str | None] = {
        PACKAGE: package_version(),
        "python": platform.python_version(),
    }
    for name in (*_REQUIRED, *_OPTIONAL):
        try:
            table[name] = version(name)
        except PackageNotFoundError:
            table[name] = None
    return table
