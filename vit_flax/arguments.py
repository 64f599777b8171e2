"""What the models' arguments must be: arrays, random keys, dtypes, flags."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_common.errors import InputError


def as_array(name: str, value: Any) -> jax.Array:
    """A JAX array of a numpy or JAX array, a torch tensor or a nested list of numbers.

    Raises:
        InputError: it is none of these.
    """
    if hasattr(value, "detach"):  # a torch tensor: numpy takes neither gradients nor bfloat16
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    try:
        array = None if value is None else jnp.asarray(value)
    except (TypeError, ValueError):
        array = None
    if array is None or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise InputError(f"`{name}` must be an array of real numbers; given {_described(value)}.")
    return array


def _described(value: Any) -> str:
    dtype = getattr(value, "dtype", None)
    return f"a {type(value).__name__}" + ("" if dtype is None else f" of {dtype}")


def check_key(name: str, key: Any) -> None:
    """Raise InputError unless `key` is a JAX random key, of the new or of the old kind."""
    dtype, ndim = getattr(key, "dtype", None), np.ndim(key)
    new = dtype is not None and ndim == 0 and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not new and not (dtype == np.uint32 and ndim == 1):
        raise InputError(
            f"`{name}` must be one JAX random key, as `jax.random.key(0)` gives it; given "
            f"{_described(key)}" + (f" and shape {np.shape(key)}." if ndim else ".")
        )


def check_precision(precision: Any) -> Any:
    """The precision itself; InputError if JAX knows none of that name."""
    row = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    try:
        jax.eval_shape(lambda x: jnp.matmul(x, x, precision=precision), row)
    except (TypeError, ValueError) as error:
        raise InputError(
            "`precision` must be None, 'default', 'high', 'highest' or another that "
            f"`jax.numpy.matmul` takes; given {precision!r}."
        ) from error
    return precision


def check_flag(name: str, value: Any) -> bool:
    """The value itself; InputError unless it is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"`{name}` must be True or False; given {value!r}.")
    return value


def float_dtype(name: str, dtype: Any) -> Any:
    """The JAX dtype; InputError unless it is a floating one."""
    if dtype is None:
        raise InputError(f"`{name}` must be a floating dtype; given None.")
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as error:
        raise InputError(f"`{name}` must be a floating dtype; given {dtype!r}.") from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"`{name}` must be a floating dtype; given {dtype}.")
    return dtype


def values_of(name: str, array: Any) -> np.ndarray | None:
    """The values of an argument; None while JAX traces, when it has none."""
    try:
        return np.asarray(array if isinstance(array, np.ndarray) else as_array(name, array))
    except jax.errors.TracerArrayConversionError:
        return None
