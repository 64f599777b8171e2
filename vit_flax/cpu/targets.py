"""Which platforms programs that are traced now are for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

from vit_common.errors import InputError

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""Platforms by the names that programs are lowered for."""

_compiled_for: ContextVar[tuple[str, ...] | None] = ContextVar("compiled_for", default=None)


@contextmanager
def compiled_for(*platforms: str) -> Iterator[None]:
    """Trace networks for these platforms, and not for the devices of this process.

    For programs that are compiled or exported for another machine: a network that is traced on a
    machine with nothing but a CPU has no place for a TPU's kernel otherwise.

    Args:
        platforms: of "cpu", "cuda", "rocm" and "tpu".

    Raises:
        InputError: there is no such platform.

    Example:
        >>> with compiled_for("tpu"):
        ...     lowered = jax.jit(run).trace(params, images).lower(lowering_platforms=("tpu",))
    """
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown or not platforms:
        wanted = ", ".join(map(repr, PLATFORMS))
        given = ", ".join(map(repr, unknown)) or "none"
        raise InputError(f"`platforms` must be some of {wanted}; given {given}.")
    token = _compiled_for.set(tuple(platforms))
    try:
        yield
    finally:
        _compiled_for.reset(token)


def targets() -> tuple[str, ...]:
    """The platforms that programs traced now may run on: those of `compiled_for`, else what JAX
    runs on here."""
    named = _compiled_for.get()
    if named is not None:
        return named
    backend = jax.default_backend()
    return ("cuda", "rocm") if backend == "gpu" else (backend,)


def elsewhere() -> bool:
    """Whether programs traced now are made for machines that are not asked: in `compiled_for`."""
    return _compiled_for.get() is not None
