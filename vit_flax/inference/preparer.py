"""What comes before a network: images or names of files to an array, without network or device."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import PIL.Image

from vit_common.checks import check_positive
from vit_common.config import ViTConfig
from vit_common.errors import ImageError, ViTError
from vit_common.images.pictures import usual_workers
from vit_common.images.predictions import (
    AS_IN_A_PICTURE,
    are_many,
    check_processor,
    default_image_processor,
    image_size,
    naming,
    prepare_image,
)
from vit_common.images.processor import BaseImageProcessor
from vit_flax.inference.reader import Reader


class Preparer:
    """Prepares images as a network takes them. It holds no parameters, starts no device, and can be
    pickled, so that machines without one can prepare for those that have one.

    Args:
        config: of the network.
        image_processor: prepares the images; None means the Hub's defaults for a ViT at the
            network's image size: bilinear resize, mean and standard deviation 0.5.
        workers: threads that decode images; None means the processor's cores, at most 16.
        normalize_on_device: leave pixels as 8-bit numbers, for a network that normalises them.
        fast_decode: decode JPEGs that are much larger than the network's images at a fraction of
            their size. The results differ somewhat; see `vit_common.images.pictures.load_image`.

    Attributes:
        image_size: (H, W) that the network takes.
        shape: (C, H, W) of one prepared image.
        dtype: of prepared images: float32, or uint8 with `normalize_on_device`.

    Raises:
        ConfigError: the network does not take what the processor makes.

    Example:
        >>> from vit_flax import AutoConfig, AutoImageProcessor
        >>> prepare = Preparer(
        ...     AutoConfig.from_pretrained(name), AutoImageProcessor.from_pretrained(name)
        ... )
        >>> prepare(["a.jpg", "b.jpg"]).shape
        (2, 3, 224, 224)
    """

    def __init__(
        self,
        config: ViTConfig,
        image_processor: BaseImageProcessor | None = None,
        *,
        workers: int | None = None,
        normalize_on_device: bool = False,
        fast_decode: bool = False,
    ) -> None:
        self.workers = usual_workers() if workers is None else check_positive("workers", workers)
        self.image_processor = image_processor or default_image_processor(config)
        self.image_size = image_size(config, self.image_processor)
        self.shape = (config.num_channels, *self.image_size)
        check_processor(self.image_processor, self.shape)
        self.normalize_on_device = normalize_on_device
        self.fast_decode = fast_decode
        self.dtype = np.dtype(np.uint8 if normalize_on_device else np.float32)

    def __call__(self, images: Any, *, errors: list[ViTError | None] | None = None) -> np.ndarray:
        """Prepare one image or a list of images; threads decode them side by side.

        Args:
            images: an image file (its name, its bytes, or open for reading), PIL image, or array
                as the processor takes it; or a list of these, or an array (B, H, W, C) or
                (B, C, H, W). Files and PIL images are turned upright as their EXIF says.
            errors: a list to which is added, for each image, why it could not be prepared, or None;
                its row is then zero. Without a list, the first such error is raised.

        Returns:
            (B, C, H, W) of `dtype`; B is 1 for one image.

        Raises:
            ImageError, MissingFileError: an image cannot be read or taken, and `errors` is None.
        """
        sources = list(images) if are_many(images) else [images]
        return prepare_all(sources, self.one, self.shape, self.dtype, self.workers, errors)

    def one(self, source: Any) -> np.ndarray:
        """One image as (C, H, W); errors name its file."""
        # Twice the size, so that what is cropped away is there, and for the resize to have
        # something to average.
        H, W = self.image_size
        at_least = (2 * H, 2 * W) if self.fast_decode else None
        processor = self.image_processor
        if not self.normalize_on_device:
            return prepare_image(source, processor, self.shape, at_least=at_least)
        pixels = prepare_image(source, processor, self.shape, at_least=at_least, **AS_IN_A_PICTURE)
        if pixels.dtype != np.uint8:
            raise ImageError(
                naming(
                    source,
                    "`normalize_on_device` takes images of 8 bits; this one has values of "
                    f"{pixels.dtype}.",
                )
            )
        return pixels

    def seen(self, image: Any) -> PIL.Image.Image:
        """An image as the network is given it: resized and cropped, in its own colours.

        Raises:
            ImageError, MissingFileError: it cannot be read or taken.
        """
        pixels = self.one(image).transpose(1, 2, 0).astype(np.float64)  # (H, W, C)
        options = {} if self.normalize_on_device else self.image_processor.to_dict()
        if options.get("do_normalize"):
            pixels = pixels * options["image_std"] + options["image_mean"]
        if options.get("do_rescale"):
            pixels = pixels / options["rescale_factor"]
        values = np.clip(np.round(pixels), 0, 255).astype(np.uint8)
        return PIL.Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values[:, :, :3])


def prepare_all(
    sources: list[Any],
    prepare: Any,
    shape: tuple[int, ...],
    dtype: np.dtype,
    workers: int,
    errors: list[ViTError | None] | None,
) -> np.ndarray:
    """All images as one batch, by the reader that streams use; see `Preparer.__call__`."""
    if not sources:
        return np.zeros((0, *shape), dtype)
    workers = min(workers, len(sources))
    reader = Reader(iter(sources), len(sources), prepare, shape, dtype, workers)
    with contextlib.closing(reader):
        batch = reader.next()
        assert batch is not None
        fault = batch.wait()
    if fault is not None:
        raise fault
    if errors is not None:
        errors.extend(batch.errors)
    else:
        for error in filter(None, batch.errors):
            raise error
    return batch.pixel_values
