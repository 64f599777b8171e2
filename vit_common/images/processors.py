"""The image processors of ViT's relatives: DeiT, BEiT, DINOv2, CLIP and SigLIP.

Each is `BaseImageProcessor` with the defaults, and the order of arguments, of the class of that
name in Transformers 4.57.6 (`models/deit`, `models/beit`, `models/bit`, `models/clip` and
`models/siglip`; DINOv2 repositories name the processor of BiT), which works on PIL and numpy; its
pixels are the same to the bit. The options are those of `ViTImageProcessor`; all but SigLIP's crop
as well.
"""

from __future__ import annotations

from typing import Any, ClassVar

from PIL.Image import Resampling

from vit_common.errors import InputError, shown
from vit_common.images.processor import BaseImageProcessor, BatchFeature

__all__ = [
    "BeitFeatureExtractor",
    "BeitImageProcessor",
    "BeitImageProcessorFast",
    "BitImageProcessor",
    "BitImageProcessorFast",
    "CLIPFeatureExtractor",
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "DINOv3ViTImageProcessorFast",
    "DeiTFeatureExtractor",
    "DeiTImageProcessor",
    "DeiTImageProcessorFast",
    "SiglipImageProcessor",
    "SiglipImageProcessorFast",
]

# In the order of the constructors, as `_CALL` is in that of the calls.
_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": {"height": 256, "width": 256},
    "resample": Resampling.BICUBIC,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "rescale_factor": 1 / 255,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_CALL = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale"),
    *("rescale_factor", "do_normalize", "image_mean", "image_std"),
)
_RESULT = ("return_tensors", "data_format", "input_data_format")


class DeiTImageProcessor(BaseImageProcessor):
    """Images to the `pixel_values` of a DeiT: resize to 256 x 256, crop the middle 224 x 224.

    The means and deviations are 0.5 by default; files on the Hub carry those of ImageNet.

    Raises:
        InputError: a value is not what the option holds, or an unknown key would change pixels.
    """

    _defaults: ClassVar[dict[str, Any]] = _DEFAULTS
    _call_order = (*_CALL, *_RESULT)


class DeiTFeatureExtractor(DeiTImageProcessor):
    """The older name of `DeiTImageProcessor`: the same, but a pair as a size is (width, height)."""

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
    _call_order = ("segmentation_maps", *_CALL, "do_reduce_labels", *_RESULT)

    def _checked(self, name: str, value: Any) -> Any:
        if name not in ("do_reduce_labels", "reduce_labels"):
            return super()._checked(name, value)
        if value is not None and value is not False:
            raise InputError(
                f"`{name}` must be False: it is for the maps of a segmentation, which are not made "
                f"here; given {shown(value)}. Set it to False to process images alone."
            )
        return value

    def __call__(self, images: Any, segmentation_maps: None = None, **options: Any) -> BatchFeature:
        """The same as `preprocess`."""
        return self.preprocess(images, segmentation_maps, **options)

    def _checked_call(self, options: dict[str, Any]) -> dict[str, Any]:
        maps = options.pop("segmentation_maps", None)
        if maps is not None:
            raise InputError(
                "`segmentation_maps` must be None, as maps are not made here; given "
                f"{type(maps).__name__}. Pass options by name, and images alone."
            )
        self._checked("do_reduce_labels", options.pop("do_reduce_labels", None))
        return options


class BeitFeatureExtractor(BeitImageProcessor):
    """The older name of `BeitImageProcessor`: the same, but a pair as a size is (width, height)."""

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
        **{name: _DEFAULTS[name] for name in _CALL},  # Transformers' order here is that of calls
        "size": {"shortest_edge": 224},
        # `OPENAI_CLIP_MEAN` and `OPENAI_CLIP_STD` of Transformers 4.57.6's `image_utils.py`.
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }
    _int_is_shortest_edge = True
    _call_order = (*_CALL, "do_convert_rgb", *_RESULT)


class CLIPImageProcessor(BitImageProcessor):
    """Images to the `pixel_values` of a CLIP: resize the shorter edge to 224, crop the middle.

    Options and defaults are those of `BitImageProcessor`.

    Raises:
        InputError: a value is not what the option holds, or an unknown key would change pixels.
    """


class CLIPFeatureExtractor(CLIPImageProcessor):
    """The older name of `CLIPImageProcessor`."""

    @classmethod
    def _written_type(cls) -> str:
        return "CLIPImageProcessor"


class ViTHybridImageProcessor(BitImageProcessor):
    """Images to the `pixel_values` of a ViTHybrid: as `BitImageProcessor`, with means and
    deviations of a half by default.

    Raises:
        InputError: a value is not what the option holds, or an unknown key would change pixels.
    """

    _defaults: ClassVar[dict[str, Any]] = {
        **BitImageProcessor._defaults,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


class SiglipImageProcessor(BaseImageProcessor):
    """Images to the `pixel_values` of a SigLIP, and of a SigLIP 2 of one image size: resize to
    224 x 224 with the bicubic filter.

    Raises:
        InputError: a value is not what the option holds, or an unknown key would change pixels.
    """

    _defaults: ClassVar[dict[str, Any]] = {
        **BaseImageProcessor._defaults,
        "resample": Resampling.BICUBIC,
    }
    _call_order = (
        *("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize"),
        *("image_mean", "image_std", *_RESULT, "do_convert_rgb"),
    )


class DINOv3ViTImageProcessorFast(BaseImageProcessor):
    """Images to the `pixel_values` of a DINOv3: pixels from 0 to 1, then resized to 224 x 224, and
    normalised with the means and deviations of ImageNet.

    Transformers has this processor on torchvision alone. Pixels are resized as floating-point
    numbers there, and so they are here, with the bilinear filter and no other; they are the same to
    the bit as PyTorch's on a CPU. (Without `do_rescale` they are resized in 8 bits, as by the other
    processors.)

    Raises:
        InputError: a value is not what the option holds, or an unknown key would change pixels.
    """

    _defaults: ClassVar[dict[str, Any]] = {
        **BaseImageProcessor._defaults,
        # `IMAGENET_DEFAULT_MEAN` and `IMAGENET_DEFAULT_STD` of Transformers' `image_utils.py`.
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    _call_order = (
        *("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize"),
        *("image_mean", "image_std", "do_convert_rgb", *_RESULT),
    )
    _rescales_first = True

    @classmethod
    def _written_type(cls) -> str:
        return "DINOv3ViTImageProcessorFast"

    def _checked(self, name: str, value: Any) -> Any:
        value = super()._checked(name, value)
        if name == "resample" and value not in (None, Resampling.BILINEAR):
            raise InputError(
                f"`resample` must be 2 (BILINEAR) for images of a DINOv3; given {shown(value)}."
            )
        return value


DeiTImageProcessorFast = DeiTImageProcessor
BeitImageProcessorFast = BeitImageProcessor
BitImageProcessorFast = BitImageProcessor
CLIPImageProcessorFast = CLIPImageProcessor
SiglipImageProcessorFast = SiglipImageProcessor
