"""JAX as the commands use it: its devices, and where compiled networks are kept between runs, so
that the next start does not compile again."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_common.errors import DeviceError
from vit_common.files.texts import reason

if TYPE_CHECKING:
    import jax

VARIABLE = "VIT_COMPILATION_CACHE"
"""Names another directory for compiled networks; empty switches the cache off. JAX's own
JAX_COMPILATION_CACHE_DIR wins."""

_LEVELS = {
    "default": 0,
    "bfloat16": 0,
    "fastest": 0,
    "high": 1,
    "bfloat16_3x": 1,
    "tensorfloat32": 1,
    "highest": 2,
    "float32": 2,
}


def cache_directory() -> Path | None:
    """Where compiled networks are kept, or None where they are not."""
    own = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if own:
        return Path(own)
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given) if given else None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "vit-flax" / "xla"


def enable_cache() -> None:
    """Have JAX keep what it compiles, where a directory can be made for it."""
    place = cache_directory()
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


def find_devices() -> list[jax.Device]:
    """JAX's devices.

    Raises:
        DeviceError: it finds none of the kind that the environment asks for.
    """
    import jax

    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS")
        why = f"JAX_PLATFORMS is {asked!r}" if asked else reason(error)
        raise DeviceError(
            f"JAX finds no device to run on: {why}; without JAX_PLATFORMS it takes what there is."
        ) from error


def describe_devices() -> dict[str, Any]:
    """JAX's devices, and what a product of float32 matrices is computed in on them."""
    import jax

    devices = find_devices()
    setting = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    capability = getattr(devices[0], "compute_capability", None)
    return {
        "platform": devices[0].platform,
        "devices": [device.device_kind for device in devices],
        "matmul_precision": {
            "setting": setting or "default",
            "float32": float32_products(devices[0].platform, capability, setting),
        },
    }


def compiled_for(device: jax.Device) -> str:
    """The platform that programs for a device are compiled for: "cpu", "cuda", "rocm", "tpu"."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version else "cuda"


def float32_products(platform: str, capability: str | None, setting: str | None) -> str:
    """What products of float32 matrices are computed in, where a call does not say.

    Args:
        platform: "cpu", "gpu" or "tpu".
        capability: compute capability of an NVIDIA GPU, such as "8.0".
        setting: `jax_default_matmul_precision`; None is "default".

    Returns:
        "float32", "tensorfloat32", "bfloat16", "three passes of bfloat16", or the name of a dot
        algorithm (https://docs.jax.dev/en/latest/jax.lax.html#jax.lax.DotAlgorithmPreset).
    """
    setting = (setting or "default").lower()
    level = _LEVELS.get(setting)
    if level is None:
        return setting
    if platform == "tpu":
        return ("bfloat16", "three passes of bfloat16", "float32")[level]
    if platform in ("gpu", "cuda") and _has_tensor_float(capability) and level < 2:
        return "tensorfloat32"
    return "float32"


def _has_tensor_float(capability: str | None) -> bool:
    """Whether an NVIDIA GPU is an Ampere or later; AMD's have names that are no numbers."""
    try:
        return float(capability or 0) >= 8.0
    except ValueError:
        return False
