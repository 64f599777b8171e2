"""`ImageClassifier`: images or names of image files in, labels with probabilities out.

The network is compiled once for each batch size, ahead of the first call; a stream of images is
read, run and handed on batch by batch, the next batch being decoded while the model runs.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from convert.source import find_processor, open_source
from vit_common.config import FIELDS, AutoConfig, ViTConfig
from vit_common.errors import (
    CheckpointError,
    ConfigError,
    ImageError,
    InputError,
    ViTError,
)
from vit_common.hub import split_hub_options
from vit_common.image_processor import BaseImageProcessor, ViTImageProcessor
from vit_common.images import convert_mode, load_image
from vit_flax.auto import FlaxAutoModelForImageClassification

_PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class: its label, its index and its probability, from 0 to 1."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Result:
    """What became of one image of a stream.

    Attributes:
        source: the image or the name, as it was given.
        error: why there are no predictions, or None.
    """

    source: Any
    _predictions: tuple[Prediction, ...] = ()
    error: ViTError | None = None

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """The likeliest classes, best first; raises `error` where there is one."""
        if self.error is not None:
            raise self.error
        return self._predictions


class _Batch(NamedTuple):
    sources: list[Any]
    errors: list[ViTError | None]
    pixel_values: np.ndarray  # (B, C, H, W); rows of images with an error stay zero


class ImageClassifier:
    """A model for image classification with what prepares its images and names its classes.

    Probabilities are the softmax of the logits in float32, or their sigmoid where the classes do
    not exclude each other (`problem_type` "multi_label_classification", or a single label).

    Args:
        model: the network with its parameters.
        image_processor: what prepares the images; None means the Hub's defaults for a ViT at the
            model's image size: bilinear resize, mean and standard deviation 0.5.

    Raises:
        ConfigError: the model does not classify, or does not take what the processor makes.
    """

    def __init__(
        self,
        model: Any,
        image_processor: BaseImageProcessor | None = None,
    ) -> None:
        config = model.config
        if config.problem_type == "regression":
            raise ConfigError(
                "config: `problem_type` is 'regression': this model predicts a quantity; wanted a "
                "model of classes."
            )
        self.model = model
        self.image_processor = image_processor or default_image_processor(config)
        self._several = (
            config.problem_type == "multi_label_classification" or config.num_labels == 1
        )
        self.image_size = self._input_size()
        self._compiled: dict[tuple[int, ...], jax.stages.Compiled] = {}
        self._check_processor()

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike, dtype: Any = jnp.float32, **options: Any
    ) -> ImageClassifier:
        """Load model and preprocessing.

        Args:
            name_or_path: directory, weights file, or "owner/name" on the Hub.
            dtype: of the computation.
            **options: of the Hub and of `FlaxViTForImageClassification.from_pretrained`.

        Warns:
            UserWarning: there is no `preprocessor_config.json`, so the defaults are used.

        Raises:
            MissingFileError: there is nothing of that name, or it cannot be reached.
            ConfigError: the configuration is not of this architecture, or contradicts the
                preprocessing.
            CheckpointError: the weights are corrupt, do not fit, or have no classifier.
        """
        hub, options = split_hub_options(options)
        config, format = options.pop("config", None), options.pop("format", None)
        if isinstance(config, (str, os.PathLike)):
            config = AutoConfig.from_pretrained(config, **hub)
        fields = {name: options.pop(name) for name in list(options) if name in FIELDS}
        if config is not None and fields:
            raise InputError(
                f"{', '.join(map(repr, fields))} and `config` were both given; set them in the "
                "configuration."
            )
        with open_source(
            name_or_path, format=format, config=config, overrides=fields, **hub
        ) as source:
            config, weights = source.config, source.path
            if source.head not in ("classifier", "teacher"):
                raise CheckpointError(
                    f"{weights}: these weights have no classifier, so predictions would be random; "
                    "wanted a checkpoint that was trained or fine-tuned to classify."
                )
            processor = find_processor(source, name_or_path, **hub)
        model = FlaxAutoModelForImageClassification.from_pretrained(
            weights, dtype=dtype, config=config, format=source.table.name, **options
        )
        if processor is None:
            prepare: BaseImageProcessor = default_image_processor(config)
            height, width = config.image_height_width
            warnings.warn(
                f"{name_or_path} has no preprocessor_config.json: images are resized to {height} x "
                f"{width} (height x width) and normalised with mean and standard deviation 0.5, "
                "the Hub's defaults for a ViT. If the model was trained otherwise, its predictions "
                "are worse than they could be.",
                UserWarning,
                stacklevel=2,
            )
        else:
            prepare = processor[0]
        try:
            return cls(model, prepare)
        except ConfigError as error:
            raise ConfigError(f"{name_or_path}: {error}") from error

    @property
    def config(self) -> ViTConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def compilations(self) -> int:
        """How many times the network was compiled: once for each batch size so far."""
        return len(self._compiled)

    @property
    def default_batch_size(self) -> int:
        """Images a batch where the caller does not say: 8 on a CPU, 64 elsewhere."""
        return 8 if jax.default_backend() == "cpu" else 64

    def __call__(self, images: Any, top_k: int = 5) -> Any:
        """Classify one image or a list of images.

        Args:
            images: name of a file, PIL image, or array as `ViTImageProcessor` takes it; or a list
                of these, or an array (B, H, W, C) or (B, C, H, W).
            top_k: how many classes to return; all if there are fewer.

        Returns:
            A tuple of `Prediction`, best first; for a list, a list of these.

        Raises:
            ImageError, MissingFileError: an image cannot be read or taken.
            InputError: `top_k` is not a positive integer.
        """
        many = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
        results = self.stream(images if many else [images], top_k=top_k)
        predictions = [result.predictions for result in results]
        return predictions if many else predictions[0]

    def stream(
        self, images: Iterable[Any], top_k: int = 5, batch_size: int | None = None
    ) -> Generator[Result, None, None]:
        """Classify any number of images; results come in order, as they are ready.

        Two batches are in memory at most: one in the model, the next being decoded in a thread.
        An image that cannot be read gives a `Result` with its error, and the stream goes on.

        Args:
            images: each as in a call.
            top_k: how many classes to return; all if there are fewer.
            batch_size: images that go through the model at once; a last batch of fewer is padded,
                so that nothing is compiled for it.

        Raises:
            InputError: `top_k` or `batch_size` is not a positive integer. At once, not with the
                first result.
        """
        batch_size = self.default_batch_size if batch_size is None else batch_size
        for name, value in (("top_k", top_k), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"`{name}` must be a positive integer; given {value!r}.")
        if isinstance(images, (str, os.PathLike, PIL.Image.Image)):
            raise InputError(
                f"`images` must be an iterable of images; given one {type(images).__name__}."
            )
        return self._stream(iter(images), top_k, batch_size)

    def _stream(
        self, images: Iterator[Any], top_k: int, batch_size: int
    ) -> Generator[Result, None, None]:
        first = list(islice(images, batch_size))
        if not first:
            return
        # Fewer images than a batch: the next power of two, so that few sizes are ever compiled.
        size = min(batch_size, 1 << (len(first) - 1).bit_length())
        stop = threading.Event()
        loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vit-decode")
        try:
            loading = loader.submit(self._load, first, size, stop)
            run = self._executable(size)  # compiled while the first batch is decoded
            batch = loading.result()
            while batch.sources:
                # The thread also asks for the next images, so results never wait for them.
                loading = loader.submit(
                    lambda: self._load(list(islice(images, batch_size)), size, stop)
                )
                yield from self._results(batch, run, top_k)
                batch = loading.result()
        finally:
            stop.set()
            loader.shutdown(cancel_futures=True)

    def _results(self, batch: _Batch, run: jax.stages.Compiled, top_k: int) -> Iterator[Result]:
        rows: list[np.ndarray] = []
        if not all(batch.errors):
            rows = list(np.asarray(run(self.model.params, batch.pixel_values)))  # (K,) each
        for i, (source, error) in enumerate(zip(batch.sources, batch.errors, strict=True)):
            if error is None and not np.isfinite(rows[i]).all():
                text = (
                    "the model's output is not finite (NaN or infinity): its weights hold such "
                    f"values, or {self.model.dtype} cannot hold what it computes."
                )
                error = ImageError(_naming(source, text))
            if error is not None:
                yield Result(source, error=error)
            else:
                yield Result(source, self._best(rows[i], top_k))

    def _best(self, probabilities: np.ndarray, top_k: int) -> tuple[Prediction, ...]:
        labels = self.config.id2label
        order = np.argsort(-probabilities, kind="stable")[:top_k].tolist()
        return tuple(Prediction(str(labels[i]), i, float(probabilities[i])) for i in order)

    # -- images

    def _input_size(self) -> tuple[int, int]:
        """Height and width of what the network is given: the config's, or for a family that takes
        any size what the processor makes."""
        options = self.image_processor.to_dict()
        size = options.get("size") or {}
        if options.get("do_center_crop") and options.get("crop_size"):
            size = options["crop_size"]
        made = (size.get("height"), size.get("width"))
        if self.config.any_image_size and all(made):
            patch = self.config.patch_height_width
            if made[0] % patch[0] == 0 and made[1] % patch[1] == 0:
                return made
        return self.config.image_height_width

    def _load(self, sources: list[Any], size: int, stop: threading.Event) -> _Batch:
        C, (H, W) = self.config.num_channels, self.image_size
        pixel_values = np.zeros((size, C, H, W), np.float32)
        errors: list[ViTError | None] = []
        for i, source in enumerate(sources):
            if stop.is_set():
                break
            try:
                pixel_values[i] = self._prepare(source)
                errors.append(None)
            except ViTError as error:
                errors.append(error)
        return _Batch(sources, errors, pixel_values)

    def _prepare(self, source: Any) -> np.ndarray:
        """One image as (C, H, W); errors name its file."""
        try:
            image = load_image(source) if isinstance(source, (str, os.PathLike)) else source
            if isinstance(image, PIL.Image.Image) and self.config.num_channels in _PIL_MODES:
                image = convert_mode(image, self.config.num_channels)
            pixel_values = self.image_processor(image, return_tensors="np")["pixel_values"]
            wanted = (1, self.config.num_channels, *self.image_size)
            if pixel_values.shape != wanted:
                raise ImageError(
                    "the image processor gives (batch, channels, height, width) = "
                    f"{pixel_values.shape}; the model takes {wanted}."
                )
            return pixel_values[0]
        except MemoryError as error:
            raise ImageError(_naming(source, "not enough memory to decode it.")) from error
        except ViTError as error:
            if _naming(source, str(error)) == str(error):
                raise
            raise ImageError(_naming(source, str(error))) from error

    def _check_processor(self) -> None:
        """Raise ConfigError if no image could come out right; better once than for each image."""
        mode = _PIL_MODES.get(self.config.num_channels)
        if mode is None:
            return  # no image file has so many channels, but an array may
        height, width = self.image_size
        # A portrait and a landscape, as a size given by the shortest edge alone may fit neither.
        for size in ((width, height + 16), (width + 16, height)):
            try:
                self._prepare(PIL.Image.new(mode, size))
            except ImageError as error:
                raise ConfigError(
                    "preprocessor_config.json and config.json contradict each other: for an image "
                    f"of {size[1]} x {size[0]} pixels (height x width) {error}"
                ) from error

    # -- the network

    def _probabilities(self, params: Any, pixel_values: jax.Array) -> jax.Array:
        logits = self.model(pixel_values, params=params, return_dict=True).logits  # (B, K)
        logits = logits.astype(jnp.float32)
        return jax.nn.sigmoid(logits) if self._several else jax.nn.softmax(logits, axis=-1)

    def _executable(self, size: int) -> jax.stages.Compiled:
        """The network for a batch of that size, compiled where it is not yet."""
        shape = (size, self.config.num_channels, *self.image_size)
        if shape not in self._compiled:
            pixel_values = jax.ShapeDtypeStruct(shape, jnp.float32)
            lowered = jax.jit(self._probabilities).lower(self.model.params, pixel_values)
            self._compiled[shape] = lowered.compile()
        return self._compiled[shape]


def default_image_processor(config: ViTConfig) -> ViTImageProcessor:
    """The Hub's defaults for a ViT, at the model's own image size and number of channels."""
    height, width = config.image_height_width
    return ViTImageProcessor(
        size={"height": height, "width": width},
        image_mean=[0.5] * config.num_channels,
        image_std=[0.5] * config.num_channels,
    )


def _naming(source: Any, text: str) -> str:
    """The text of an error, with the name of the file, if there is one, in it."""
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
    return text if name in text else f"{name}: {text}"
