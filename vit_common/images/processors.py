"""The image processors of ViT's relatives: DeiT, BEiT and DINOv2.

Each is `BaseImageProcessor` with the defaults, and the order of arguments, of the class of that
name in Transformers 4.57.6 (`models/deit`, `models/beit` and `models/bit`; DINOv2 repositories name
the processor of BiT), which works on PIL and numpy; its pixels are the same to the bit. Options
mean what `ViTImageProcessor` says of them; all of these crop as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from PIL.Image import Resampling

from vit_common.errors import InputError
from vit_common.images.processor import BaseImageProcessor, BatchFeature

__all__ = [
    "BeitFeatureExtractor",
    "BeitImageProcessor",
    "BitImageProcessor",
    "DeiTFeatureExtractor",
    "DeiTImageProcessor",
]

Size = int | Sequence[int] | Mapping[str, int] | None
Values = float | Sequence[float] | None

_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": {"height": 256, "width": 256},
    "resample": Resampling.BICUBIC,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


class DeiTImageProcessor(BaseImageProcessor):
    """Images to the `pixel_values` of a DeiT: resize to 256 x 256, crop the middle 224 x 224.

    The means and deviations are 0.5 by default; files on the Hub carry those of ImageNet.

    Raises:
        InputError: a value is not what the option holds, or an unknown key would change pixels.
    """

    _defaults: ClassVar[dict[str, Any]] = _DEFAULTS

    def __init__(
        self,
        do_resize: bool | None = True,
        size: Size = None,
        resample: int | None = Resampling.BICUBIC,
        do_center_crop: bool | None = True,
        crop_size: Size = None,
        rescale_factor: float | None = 1 / 255,
        do_rescale: bool | None = True,
        do_normalize: bool | None = True,
        image_mean: Values = None,
        image_std: Values = None,
        **options: Any,
    ) -> None:
        super().__init__(
            do_resize=do_resize,
            size=size,
            resample=resample,
            do_center_crop=do_center_crop,
            crop_size=crop_size,
            rescale_factor=rescale_factor,
            do_rescale=do_rescale,
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
            **options,
        )

    def preprocess(
        self,
        images: Any,
        do_resize: bool | None = None,
        size: Size = None,
        resample: int | None = None,
        do_center_crop: bool | None = None,
        crop_size: Size = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: Values = None,
        image_std: Values = None,
        return_tensors: str | None = None,
        data_format: str | None = None,
        input_data_format: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Make `pixel_values` of images; see `BaseImageProcessor.preprocess`."""
        return super().preprocess(
            images,
            do_resize=do_resize,
            size=size,
            resample=resample,
            do_center_crop=do_center_crop,
            crop_size=crop_size,
            do_rescale=do_rescale,
            rescale_factor=rescale_factor,
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
            return_tensors=return_tensors,
            data_format=data_format,
            input_data_format=input_data_format,
            **options,
        )


class DeiTFeatureExtractor(DeiTImageProcessor):
    """The older face of `DeiTImageProcessor`: the same, but a pair as a size is (width, height)."""

    _pairs_are_width_height = True

    @classmethod
    def _written_type(cls) -> str:
        return "DeiTImageProcessor"


class BeitImageProcessor(BaseImageProcessor):
    """Images to the `pixel_values` of a BEiT: resize to 256 x 256, crop the middle 224 x 224.

    Files on the Hub say 224 without a crop, or 256 with one. `do_reduce_labels` (`reduce_labels`
    in older files) is about maps for segmentation, which are not made here: it is kept and written
    back, and must be False.

    Raises:
        InputError: a value is not what the option holds, or an unknown key would change pixels.
    """

    _defaults: ClassVar[dict[str, Any]] = {**_DEFAULTS, "do_reduce_labels": False}

    def __init__(
        self,
        do_resize: bool | None = True,
        size: Size = None,
        resample: int | None = Resampling.BICUBIC,
        do_center_crop: bool | None = True,
        crop_size: Size = None,
        rescale_factor: float | None = 1 / 255,
        do_rescale: bool | None = True,
        do_normalize: bool | None = True,
        image_mean: Values = None,
        image_std: Values = None,
        do_reduce_labels: bool | None = False,
        **options: Any,
    ) -> None:
        super().__init__(
            do_resize=do_resize,
            size=size,
            resample=resample,
            do_center_crop=do_center_crop,
            crop_size=crop_size,
            rescale_factor=rescale_factor,
            do_rescale=do_rescale,
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
            do_reduce_labels=do_reduce_labels,
            **options,
        )

    def _checked(self, name: str, value: Any) -> Any:
        if name not in ("do_reduce_labels", "reduce_labels"):
            return super()._checked(name, value)
        if value is not None and value is not False:
            raise InputError(
                f"`{name}` must be False: it is for the maps of a segmentation, which are not made "
                f"here; given {value!r}. Set it to False to process images alone."
            )
        return value

    def __call__(self, images: Any, segmentation_maps: None = None, **options: Any) -> BatchFeature:
        """The same as `preprocess`."""
        return self.preprocess(images, segmentation_maps, **options)

    def preprocess(
        self,
        images: Any,
        segmentation_maps: None = None,
        do_resize: bool | None = None,
        size: Size = None,
        resample: int | None = None,
        do_center_crop: bool | None = None,
        crop_size: Size = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: Values = None,
        image_std: Values = None,
        do_reduce_labels: bool | None = None,
        return_tensors: str | None = None,
        data_format: str | None = None,
        input_data_format: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Make `pixel_values` of images; see `BaseImageProcessor.preprocess`.

        `segmentation_maps` has the place it has in Transformers, and must be None.
        """
        if segmentation_maps is not None:
            raise InputError(
                "`segmentation_maps` must be None, as maps are not made here; given "
                f"{type(segmentation_maps).__name__}. Pass options by name, and images alone."
            )
        self._checked("do_reduce_labels", do_reduce_labels)
        return super().preprocess(
            images,
            do_resize=do_resize,
            size=size,
            resample=resample,
            do_center_crop=do_center_crop,
            crop_size=crop_size,
            do_rescale=do_rescale,
            rescale_factor=rescale_factor,
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
            return_tensors=return_tensors,
            data_format=data_format,
            input_data_format=input_data_format,
            **options,
        )


class BeitFeatureExtractor(BeitImageProcessor):
    """The older face of `BeitImageProcessor`: the same, but a pair as a size is (width, height)."""

    _pairs_are_width_height = True

    @classmethod
    def _written_type(cls) -> str:
        return "BeitImageProcessor"


class BitImageProcessor(BaseImageProcessor):
    """Images to the `pixel_values` of a DINOv2: resize the shorter edge to 224, crop the middle.

    An int as `size` is the shorter edge, in pixels; the other keeps the proportions. Images are
    made RGB by default. The means and deviations are those of CLIP by default; the files of DINOv2
    carry those of ImageNet, and 256 for the shorter edge.

    Raises:
        InputError: a value is not what the option holds, or an unknown key would change pixels.
    """

    _defaults: ClassVar[dict[str, Any]] = {
        **_DEFAULTS,
        "size": {"shortest_edge": 224},
        # `OPENAI_CLIP_MEAN` and `OPENAI_CLIP_STD` of Transformers 4.57.6's `image_utils.py`.
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }
    _int_is_shortest_edge = True

    def __init__(
        self,
        do_resize: bool | None = True,
        size: Size = None,
        resample: int | None = Resampling.BICUBIC,
        do_center_crop: bool | None = True,
        crop_size: Size = None,
        do_rescale: bool | None = True,
        rescale_factor: float | None = 1 / 255,
        do_normalize: bool | None = True,
        image_mean: Values = None,
        image_std: Values = None,
        do_convert_rgb: bool | None = True,
        **options: Any,
    ) -> None:
        super().__init__(
            do_resize=do_resize,
            size=size,
            resample=resample,
            do_center_crop=do_center_crop,
            crop_size=crop_size,
            do_rescale=do_rescale,
            rescale_factor=rescale_factor,
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
            do_convert_rgb=do_convert_rgb,
            **options,
        )

    def preprocess(
        self,
        images: Any,
        do_resize: bool | None = None,
        size: Size = None,
        resample: int | None = None,
        do_center_crop: bool | None = None,
        crop_size: Size = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: Values = None,
        image_std: Values = None,
        do_convert_rgb: bool | None = None,
        return_tensors: str | None = None,
        data_format: str | None = None,
        input_data_format: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Make `pixel_values` of images; see `BaseImageProcessor.preprocess`."""
        return super().preprocess(
            images,
            do_resize=do_resize,
            size=size,
            resample=resample,
            do_center_crop=do_center_crop,
            crop_size=crop_size,
            do_rescale=do_rescale,
            rescale_factor=rescale_factor,
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
            do_convert_rgb=do_convert_rgb,
            return_tensors=return_tensors,
            data_format=data_format,
            input_data_format=input_data_format,
            **options,
        )


# -- the choice by a file
