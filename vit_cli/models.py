"""The models that commands run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vit_cli.terminal.messages import say
from vit_common.errors import InputError

_GREY = ("1", "L", "LA", "I;16", "I")
_SMALL, _LOOKED_AT = 64, 8  # pixels on a side; images

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
    return getattr(inference, name).from_pretrained(model, dtype=dtype, **options)


def load_for_stream(name: str, stream: StreamOptions, files: Sequence[str], **options: Any) -> Any:
    """The same, as the options of a stream of image files say; `options` are more of
    `from_pretrained`."""
    if stream.model is None and stream.cluster is None:
        mention_digits(files)
    return load_for_inference(
        name,
        stream.model,
        stream.dtype,
        devices=stream.devices,
        model_parallel=stream.model_parallel,
        **stream.precision,
        **stream.reading.keywords,
        **options,
    )


def mention_digits(files: Sequence[str]) -> None:
    """Say that the network of digits is used, where images are not like its own: small and grey."""
    import PIL.Image

    for file in files[:_LOOKED_AT]:
        try:
            with warnings.catch_warnings(action="ignore"), PIL.Image.open(file) as image:
                alike = image.mode in _GREY and max(image.size) <= _SMALL
        except Exception:  # it is reported when its turn comes
            continue
        if not alike:
            say(
                "no --model was given, so the small network of handwritten digits that comes with "
                f"the package is used; {file} is not like its images (8 x 8 pixels, grey)"
            )
            return
