"""Where compiled networks are kept between runs, so that the next start does not compile again."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

VARIABLE = "VIT_COMPILATION_CACHE"
"""Names another directory; empty switches the cache off. JAX's own JAX_COMPILATION_CACHE_DIR
wins."""


def directory() -> Path | None:
    """The directory, or None where there is to be no cache."""
    own = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if own:
        return Path(own)
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given) if given else None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "vit-flax" / "xla"


def enable() -> None:
    """Have JAX keep what it compiles, where a directory can be made for it."""
    place = directory()
    if place is None:
        return
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
    if not os.access(place, os.W_OK):
        return  # a home that cannot be written is no reason to fail
    import jax

    jax.config.update("jax_compilation_cache_dir", str(place))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
