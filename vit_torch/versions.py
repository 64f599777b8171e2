"""Versions of what a parity report was made with."""

from __future__ import annotations

import platform
from importlib import metadata

_PACKAGES = ("vit-flax", "jax", "jaxlib", "flax", "torch", "numpy", "transformers")


def versions() -> dict[str, str | None]:
    """Name -> version; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
