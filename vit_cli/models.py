"""The models that commands run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vit_cli import cache
from vit_common.errors import InputError

_PRECISION = ("param_dtype", "weights")


def load_for_inference(
    name: str,
    model: str | None,
    dtype: str,
    options: Mapping[str, Any] | None = None,
    *,
    devices: int | None = None,
    model_parallel: int = 1,
) -> Any:
    """A class of `vit_flax.inference`, loaded.

    Args:
        name: of the class.
        model: folder, weights file or Hub name; None is the checkpoint in the package.
        dtype: of the computation.
        options: more of `from_pretrained`.
        devices: how many of this process's devices to use; None is all.
        model_parallel: devices that one copy of the network is split over.

    Raises:
        InputError: the devices cannot be split so.
        ViTError: it cannot be loaded, or there is no device to run it on.
    """
    # Only now: a name that is wrong is told at once, without the seconds that JAX takes.
    import jax

    from vit_cli.devices import find_devices
    from vit_flax import inference

    cache.enable()
    find_devices()
    options = dict(options or {})
    if devices is not None or model_parallel > 1:
        devices = devices or len(jax.local_devices())
        if devices % model_parallel:
            raise InputError(
                f"--model-parallel must divide the number of devices, {devices}; given "
                f"{model_parallel}."
            )
        sizes = {"data": devices // model_parallel, "model": model_parallel}
        options["mesh"] = None if devices == 1 else sizes
    if model is None:
        from vit_common.embedded import embedded_checkpoint

        model = str(embedded_checkpoint())
    return getattr(inference, name).from_pretrained(model, dtype=dtype, **options)


def settings(
    model: str | None,
    dtype: str,
    options: Mapping[str, Any] | None,
    shard: tuple[int, int] | None,
) -> dict[str, Any]:
    """What results depend on, whatever is made; and which images are among them.

    Args:
        model, dtype, options: as `load_for_inference`.
        shard: (i, n): only the i-th of n parts of the images, counted from 0.
    """
    options = options or {}
    return {
        "model": model,
        "revision": options.get("revision"),
        "subfolder": options.get("subfolder"),
        "dtype": dtype,
        **{name: value for name, value in options.items() if name in _PRECISION},
        "shard": None if shard is None else f"{shard[0] + 1}/{shard[1]}",
    }
