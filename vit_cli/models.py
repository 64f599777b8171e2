"""The models that commands run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vit_cli.terminal.messages import say
from vit_common.errors import InputError

if TYPE_CHECKING:
    from vit_cli.options import StreamOptions


def load_for_inference(
    name: str,
    model: str | None,
    dtype: str,
    *,
    devices: int | None = None,
    model_parallel: int = 1,
    **options: Any,
) -> Any:
    """A class of `vit_flax.inference`, loaded.

    Args:
        name: of the class.
        model: folder, weights file or Hub name; None is the checkpoint in the package.
        dtype: compute dtype.
        devices: how many of this process's devices to use; None is all.
        model_parallel: devices that one copy of the network is split over.
        **options: more of `from_pretrained`.

    Raises:
        InputError: the devices cannot be split so.
        ViTError: it cannot be loaded, or there is no device to run it on.
    """
    # Only now: a wrong name is reported at once, without the seconds that JAX takes.
    import jax

    from vit_cli.runtime import enable_cache, find_devices
    from vit_flax import inference

    enable_cache()
    find_devices()
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
        say("no --model was given: this is the small network of handwritten digits (8 x 8, grey)")
    return getattr(inference, name).from_pretrained(model, dtype=dtype, **options)


def load_for_stream(name: str, stream: StreamOptions) -> Any:
    """The same, as the options of a stream say."""
    return load_for_inference(
        name,
        stream.model,
        stream.dtype,
        devices=stream.devices,
        model_parallel=stream.model_parallel,
        **stream.precision,
        **stream.reading.keywords,
    )
