"""The last steps of an image processor, rescaling and normalising, as part of a program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vit_common.images.processor import BaseImageProcessor


def normalize(pixel_values: jax.Array, processor: BaseImageProcessor) -> jax.Array:
    """Rescale and normalise 8-bit pixels (B, C, H, W) as the processor does, in float32."""
    options = processor.to_dict()
    values = pixel_values.astype(jnp.float32)
    if options.get("do_rescale"):
        values = values * np.float32(options["rescale_factor"])
    if options.get("do_normalize"):
        mean, std = (
            np.broadcast_to(np.asarray(options[name], np.float32), pixel_values.shape[1])
            for name in ("image_mean", "image_std")
        )
        values = (values - mean[:, None, None]) / std[:, None, None]
    return values
