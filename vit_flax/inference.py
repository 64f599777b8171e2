"""`ImageClassifier`: images or names of image files in, labels with probabilities out.

The network is compiled once for each batch size, ahead of the first call; a stream of images is
read, run and handed on batch by batch, the next batch being decoded while the model runs.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import flax.linen as nn
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
from vit_common.image_processor import BaseImageProcessor
from vit_common.predictions import (
    Prediction,
    check_processor,
    default_image_processor,
    image_size,
    likeliest,
    naming,
    prepare_image,
)
from vit_flax import attention_maps
from vit_flax.auto import FlaxAutoModelForImageClassification
from vit_flax.model import mean_of_patches


@dataclass(frozen=True)
class Result:
    """What became of one image of a stream.

    Attributes:
        source: the image or the name, as it was given.
        error: why there is no value, or None.
    """

    source: Any
    _value: Any = ()
    error: ViTError | None = None

    @property
    def value(self) -> Any:
        """What was asked for: predictions, features or attention; raises `error` if there is
        one."""
        if self.error is not None:
            raise self.error
        return self._value

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """The likeliest classes, best first; raises `error` where there is one."""
        return self.value


class _Work(NamedTuple):
    """What the compiled network gives."""

    kind: Literal["probabilities", "features", "attention"]
    layers: tuple[int, ...] = ()
    pool: str | None = None


_PROBABILITIES = _Work("probabilities")


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
        self.several = config.problem_type == "multi_label_classification" or config.num_labels == 1
        self.image_size = image_size(config, self.image_processor)
        self._compiled: dict[Any, jax.stages.Compiled] = {}
        check_processor(self.image_processor, (config.num_channels, *self.image_size))

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
        """How many times the network was compiled: once for each batch size and kind of result so
        far."""
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
        check_positive("top_k", top_k)
        return self._checked_stream(
            images,
            batch_size,
            _PROBABILITIES,
            lambda rows: likeliest(rows[0], self.config.id2label, top_k),
        )

    # -- features and attention

    def features(
        self,
        images: Any,
        layers: Sequence[int] = (-1,),
        pool: Literal["cls", "mean"] | None = "cls",
    ) -> Any:
        """What the network makes of images, before any classifier.

        Args:
            images: as in a call.
            layers: blocks, the first is 0; -1 is the last. The last block's is taken after the
                final norm, as `last_hidden_state` is.
            pool: "cls" for the class token, "mean" for the mean of the patches, None for all
                tokens.

        Returns:
            float32 (D,), or (S, D) without pooling; (layers, D) or (layers, S, D) for several
            layers; for a list of images, one more axis in front.

        Raises:
            ImageError, MissingFileError: an image cannot be read or taken.
            InputError: there is no such block, or nothing of that name to pool.
        """
        many = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
        results = self.stream_features(images if many else [images], layers, pool)
        values = [result.value for result in results]
        if many:
            return np.stack(values) if values else np.zeros((0,), np.float32)
        return values[0]

    def stream_features(
        self,
        images: Iterable[Any],
        layers: Sequence[int] = (-1,),
        pool: Literal["cls", "mean"] | None = "cls",
        batch_size: int | None = None,
    ) -> Generator[Result, None, None]:
        """`features` of any number of images, as `stream`; each result's `value` holds them."""
        if pool not in ("cls", "mean", None):
            raise InputError(f"`pool` must be 'cls', 'mean' or None; given {pool!r}.")
        if pool == "cls" and not self.config.use_cls_token:
            raise InputError("`pool` must be 'mean' or None: this network has no class token.")
        work = _Work("features", self._blocks(layers), pool)
        single = len(work.layers) == 1
        return self._checked_stream(
            images, batch_size, work, lambda rows: rows[0] if single else np.stack(rows)
        )

    def attention(
        self, images: Any, layers: Sequence[int] = (-1,), *, rollout: bool = False
    ) -> Any:
        """Where the network looks: attention after the softmax.

        Args:
            images: as in a call.
            layers: blocks, the first is 0; -1 is the last.
            rollout: instead of one block's, how much of each token of the input is in each of
                the output, over all blocks (Abnar and Zuidema 2020); `layers` is not looked at.

        Returns:
            float32 (layers, A, S, S), or (S, S) with `rollout`; for a list of images, one more axis
            in front. The tokens in front of the patches come first, then the patches row by row.

        Raises:
            ImageError, MissingFileError: an image cannot be read or taken.
            InputError: there is no such block.
        """
        many = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
        every = range(self.config.num_hidden_layers)
        work = _Work("attention", self._blocks(every if rollout else layers), None)

        def finish(rows: list[np.ndarray]) -> np.ndarray:
            if rollout:
                return attention_maps.rollout([row[None] for row in rows])[0].astype(np.float32)
            return np.stack(rows)

        results = self._checked_stream(images if many else [images], 1, work, finish)
        values = [result.value for result in results]
        return values if many else values[0]

    def seen(self, image: Any) -> PIL.Image.Image:
        """An image as the network is given it: resized and cropped, in its own colours.

        Raises:
            ImageError, MissingFileError: it cannot be read or taken.
        """
        pixels = self._prepare(image).transpose(1, 2, 0).astype(np.float64)  # (H, W, C)
        options = self.image_processor.to_dict()
        if options.get("do_normalize"):
            pixels = pixels * options["image_std"] + options["image_mean"]
        if options.get("do_rescale"):
            pixels = pixels / options["rescale_factor"]
        values = np.clip(np.round(pixels), 0, 255).astype(np.uint8)
        return PIL.Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values[:, :, :3])

    def _blocks(self, layers: Iterable[int]) -> tuple[int, ...]:
        """Indices of blocks, counted from the front."""
        count = self.config.num_hidden_layers
        found = []
        for index in [layers] if isinstance(layers, int) else layers:
            if isinstance(index, bool) or not isinstance(index, int) or not -count <= index < count:
                raise InputError(
                    f"`layers` must hold blocks from 0 to {count - 1}, or from -1 back; given "
                    f"{index!r}."
                )
            found.append(index % count)
        if not found:
            raise InputError("`layers` must hold at least one block.")
        return tuple(found)

    # -- the stream

    def _checked_stream(
        self,
        images: Iterable[Any],
        batch_size: int | None,
        work: _Work,
        finish: Callable[[list[np.ndarray]], Any],
    ) -> Generator[Result, None, None]:
        batch_size = self.default_batch_size if batch_size is None else batch_size
        check_positive("batch_size", batch_size)
        if isinstance(images, (str, os.PathLike, PIL.Image.Image)):
            raise InputError(
                f"`images` must be an iterable of images; given one {type(images).__name__}."
            )
        return self._stream(iter(images), batch_size, work, finish)

    def _stream(
        self,
        images: Iterator[Any],
        batch_size: int,
        work: _Work,
        finish: Callable[[list[np.ndarray]], Any],
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
            run = self._executable(size, work)  # compiled while the first batch is decoded
            batch = loading.result()
            while batch.sources:
                # The thread also asks for the next images, so results never wait for them.
                loading = loader.submit(
                    lambda: self._load(list(islice(images, batch_size)), size, stop)
                )
                yield from self._results(batch, run, finish)
                batch = loading.result()
        finally:
            stop.set()
            loader.shutdown(cancel_futures=True)

    def _results(
        self,
        batch: _Batch,
        run: jax.stages.Compiled,
        finish: Callable[[list[np.ndarray]], Any],
    ) -> Iterator[Result]:
        arrays: list[np.ndarray] = []
        if not all(batch.errors):
            arrays = [np.asarray(a) for a in run(self.model.params, batch.pixel_values)]
        for i, (source, error) in enumerate(zip(batch.sources, batch.errors, strict=True)):
            if error is None and not all(np.isfinite(array[i]).all() for array in arrays):
                text = (
                    "the model's output is not finite (NaN or infinity): its weights hold such "
                    f"values, or {self.model.dtype} cannot hold what it computes."
                )
                error = ImageError(naming(source, text))
            if error is not None:
                yield Result(source, error=error)
            else:
                yield Result(source, finish([array[i] for array in arrays]))

    # -- images

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
        shape = (self.config.num_channels, *self.image_size)
        return prepare_image(source, self.image_processor, shape)

    # -- the network

    def _run(self, params: Any, pixel_values: jax.Array, work: _Work) -> tuple[jax.Array, ...]:
        """Arrays with a row for each image, in float32."""
        output = self.model(
            pixel_values,
            params=params,
            return_dict=True,
            output_hidden_states=work.kind == "features",
            output_attentions=work.kind == "attention",
        )
        if work.kind == "attention":
            found = [output.attentions[i] for i in work.layers]  # (B, A, S, S)
        elif work.kind == "features":
            found = [self._pooled(params, output.hidden_states, i, work.pool) for i in work.layers]
        else:
            logits = output.logits.astype(jnp.float32)  # (B, K)
            several = self.several
            found = [jax.nn.sigmoid(logits) if several else jax.nn.softmax(logits, axis=-1)]
        return tuple(array.astype(jnp.float32) for array in found)

    def _pooled(self, params: Any, hidden_states: Any, layer: int, pool: str | None) -> jax.Array:
        """A block's output; the last one's after the final norm, where that is on the tokens."""
        x, config = hidden_states[layer + 1], self.config
        network = params[config.base_model_prefix]
        if layer == config.num_hidden_layers - 1 and "layernorm" in network:
            norm = nn.LayerNorm(
                epsilon=config.layer_norm_eps,
                dtype=self.model.dtype,
                use_fast_variance=False,
                force_float32_reductions=True,
            )
            x = norm.apply({"params": network["layernorm"]}, x)
        if pool == "cls":
            return x[:, 0]
        return mean_of_patches(x, config) if pool == "mean" else x

    def _executable(self, size: int, work: _Work) -> jax.stages.Compiled:
        """The network for a batch of that size, compiled where it is not yet."""
        shape = (size, self.config.num_channels, *self.image_size)
        if (shape, work) not in self._compiled:
            pixel_values = jax.ShapeDtypeStruct(shape, jnp.float32)
            lowered = jax.jit(partial(self._run, work=work)).lower(self.model.params, pixel_values)
            self._compiled[shape, work] = lowered.compile()
        return self._compiled[shape, work]


def check_positive(name: str, value: Any) -> None:
    """Raise InputError unless the value is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"`{name}` must be a positive integer; given {value!r}.")
