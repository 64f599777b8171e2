"""`ImageClassifier`: images or names of image files in, labels with probabilities out; and
`ImageEncoder`, for networks without classes: features and attention out.

A stream of images is read, run and handed on batch by batch: while the network works on one batch
the next are decoded, and its results are fetched when the next has been set off.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from vit_common.checks import as_integer, check_positive
from vit_common.config import FIELDS, ViTConfig
from vit_common.errors import CheckpointError, ConfigError, ImageError, InputError, ViTError
from vit_common.families import AutoConfig
from vit_common.files.hub import split_hub_options
from vit_common.flops import forward_flops
from vit_common.images.predictions import (
    AS_IN_A_PICTURE,
    Prediction,
    are_many,
    check_processor,
    default_image_processor,
    has_several_labels,
    image_size,
    likeliest,
    naming,
    prepare_image,
)
from vit_common.images.processor import BaseImageProcessor
from vit_convert.source import Source, find_processor, open_source
from vit_flax.auto import FlaxAutoModel, FlaxAutoModelForImageClassification
from vit_flax.inference import maps as attention_maps
from vit_flax.inference.engine import Engine, Running
from vit_flax.inference.reader import Batch, Reader
from vit_flax.int8 import check_weights, quantize
from vit_flax.model import FlaxViTModule, mean_of_patches
from vit_flax.model import options as options_of
from vit_flax.pixels import normalize
from vit_flax.sharding import MeshLike, make_mesh, param_shardings, place


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
_OWN = ("workers", "normalize_on_device", "fast_decode")  # options of the constructor
_RUNNING = 2  # batches on the device: one that is computed, one that waits for it
_streams: weakref.WeakSet[Generator[Result, None, None]] = weakref.WeakSet()


@dataclass
class Timings:
    """Where the time of a stream went, in seconds by the clock where nothing else is said.

    Attributes:
        images: how many came out.
        total: from the first image asked for to the last result handed on, less `caller`.
        caller: spent by the caller with results in hand.
        compiling: programs.
        waiting_for_images: nothing was left to run: the host could not keep up.
        waiting_for_device: for results.
        decoding: reading and preparing images, added up over the threads that do it.
    """

    images: int = 0
    total: float = 0.0
    caller: float = 0.0
    compiling: float = 0.0
    waiting_for_images: float = 0.0
    waiting_for_device: float = 0.0
    decoding: float = 0.0


class ImageEncoder:
    """A network with what prepares its images: features and attention out, whatever stands on the
    network, and where nothing does.

    Computations are in the model's `dtype`, with its parameters as they are held (see `weights`
    and `param_dtype` of `from_pretrained`); what comes out is float32.

    Args:
        model: the network with its parameters.
        image_processor: what prepares the images; None means the Hub's defaults for a ViT at the
            model's image size: bilinear resize, mean and standard deviation 0.5.
        workers: threads that decode images; None means the processor's cores, at most 16; on a CPU
            half of them, as the network needs them too.
        normalize_on_device: send pixels to the device as 8-bit numbers, a quarter of the bytes, and
            rescale and normalise them there. The results may differ in their last digits.
        fast_decode: decode JPEGs that are much larger than the network's images at a fraction of
            their size. The results differ somewhat; see `vit_common.images.pictures.load_image`.
        mesh: devices to run on: None for the one that holds the parameters; "auto" for all of this
            process, each with its part of a batch; {"data": n, "model": m} to split the network
            too, over m devices each time; or a `jax.sharding.Mesh` with axes of these names.

    Raises:
        ConfigError: the model does not take what the processor makes.
    """

    def __init__(
        self,
        model: Any,
        image_processor: BaseImageProcessor | None = None,
        *,
        workers: int | None = None,
        normalize_on_device: bool = False,
        fast_decode: bool = False,
        mesh: MeshLike = None,
    ) -> None:
        if workers is not None:
            workers = check_positive("workers", workers)
        config = model.config
        self.model = model
        self.image_processor = image_processor or default_image_processor(config)
        self.image_size = image_size(config, self.image_processor)
        shape = (config.num_channels, *self.image_size)
        check_processor(self.image_processor, shape)
        self.normalize_on_device = normalize_on_device
        self.fast_decode = fast_decode
        dtype = np.uint8 if normalize_on_device else np.float32
        devices = make_mesh(mesh, config)
        params = model.params if devices is None else place(model.params, devices)
        self.engine = Engine(params, config, shape, dtype, devices)
        self.workers = workers or _usual_workers(self.engine.platform)
        self.timings = Timings()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        dtype: Any = jnp.float32,
        *,
        mesh: MeshLike = "auto",
        weights: Literal["int8"] | None = None,
        **options: Any,
    ) -> Self:
        """Load model and preprocessing.

        Args:
            name_or_path: directory, weights file, or "owner/name" on the Hub.
            dtype: of the computation: float32, bfloat16 or float16. Statistics of norms and softmax
                are float32 in each, and so is what comes out.
            mesh: as for the class; weights are read from a safetensors file as they lie on the
                devices, each part by itself.
            weights: "int8" holds the kernels of the blocks as 8-bit integers, in a quarter of
                float32's bytes; see `vit_flax.int8`. None holds them in `param_dtype`.
            **options: of this class, of the Hub, and of `FlaxViTModel.from_pretrained`; among them
                `param_dtype`, in which parameters are held on the device (None: as in the file).

        Warns:
            UserWarning: there is no `preprocessor_config.json`, so the defaults are used.

        Raises:
            MissingFileError: there is nothing of that name, or it cannot be reached.
            ConfigError: the configuration is not of this architecture, or contradicts the
                preprocessing.
            CheckpointError: the weights are corrupt, do not fit, or lack what this class needs.
        """
        check_weights(weights)
        own = {name: options.pop(name) for name in _OWN if name in options}
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
            config, path = source.config, source.path
            cls._check_source(source)
            processor = find_processor(source, name_or_path, **hub)
        devices = make_mesh(mesh, config)
        if devices is not None:
            options["shardings"] = partial(param_shardings, devices)
        model = cls._load_model(
            path, source.head, dtype=dtype, config=config, format=source.table.name, **options
        )
        if weights is not None:
            model.params = quantize(model.params)
        if processor is None:
            prepare: BaseImageProcessor = default_image_processor(config)
            height, width = config.image_height_width
            warnings.warn(
                f"{name_or_path} has no preprocessor_config.json: images are resized to {height} x "
                f"{width} (height x width) and normalised with mean and standard deviation 0.5, "
                "the Hub's defaults for a ViT. If the model was trained otherwise, its results "
                "are worse than they could be.",
                UserWarning,
                stacklevel=2,
            )
        else:
            prepare = processor[0]
        try:
            return cls(model, prepare, mesh=devices, **own)
        except ConfigError as error:
            raise ConfigError(f"{name_or_path}: {error}") from error

    @classmethod
    def _check_source(cls, source: Source) -> None:
        """Raise CheckpointError if a checkpoint lacks what this class needs."""

    @classmethod
    def _load_model(cls, path: Path, head: str | None, **options: Any) -> Any:
        """The model to run, of a checkpoint with that head."""
        if head in ("classifier", "teacher"):
            return FlaxAutoModelForImageClassification.from_pretrained(path, **options)
        with warnings.catch_warnings():
            # A head that nothing here runs, such as a decoder's, is left aside as asked for.
            warnings.filterwarnings("ignore", message=r".*: in the checkpoint and not used")
            return FlaxAutoModel.from_pretrained(path, add_pooling_layer=False, **options)

    @property
    def config(self) -> ViTConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def compilations(self) -> int:
        """How many times the network was compiled: once for each size of batch and kind of result
        so far."""
        return self.engine.compilations

    @property
    def default_batch_size(self) -> int:
        """Images a batch where the caller does not say: 8 on a CPU, 64 elsewhere; so many for each
        device that a batch is split over."""
        each = 8 if jax.default_backend() == "cpu" else 64
        return each * self.engine.parts_of_batch

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
        many, layers = are_many(images), self._blocks(layers)
        results = self.stream_features(images if many else [images], layers, pool)
        values = _values(results)
        if many and not values:
            several = [len(layers)] if len(layers) > 1 else []
            tokens = [self.engine.tokens] if pool is None else []
            return np.zeros((0, *several, *tokens, self.config.hidden_size), np.float32)
        return np.stack(values) if many else values[0]

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
        many = are_many(images)
        every = range(self.config.num_hidden_layers)
        work = _Work("attention", self._blocks(every if rollout else layers), None)

        def finish(rows: list[np.ndarray]) -> np.ndarray:
            if rollout:
                return attention_maps.rollout([row[None] for row in rows])[0].astype(np.float32)
            return np.stack(rows)

        results = self._checked_stream(images if many else [images], 1, work, finish)
        values = _values(results)
        return values if many else values[0]

    def seen(self, image: Any) -> PIL.Image.Image:
        """An image as the network is given it: resized and cropped, in its own colours.

        Raises:
            ImageError, MissingFileError: it cannot be read or taken.
        """
        pixels = self._prepare(image).transpose(1, 2, 0).astype(np.float64)  # (H, W, C)
        options = {} if self.normalize_on_device else self.image_processor.to_dict()
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
        for layer in layers if isinstance(layers, Iterable) else [layers]:
            index = as_integer(layer)
            if index is None or not -count <= index < count:
                raise InputError(
                    f"`layers` must hold blocks from 0 to {count - 1}, or from -1 back; given "
                    f"{layer!r}."
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
        batch_size = check_positive("batch_size", batch_size)
        if isinstance(images, (str, os.PathLike, PIL.Image.Image)):
            raise InputError(
                f"`images` must be an iterable of images; given one {type(images).__name__}."
            )
        stream = self._stream(iter(images), batch_size, work, finish)
        _streams.add(stream)
        return stream

    def _stream(
        self,
        images: Iterator[Any],
        batch_size: int,
        work: _Work,
        finish: Callable[[list[np.ndarray]], Any],
    ) -> Generator[Result, None, None]:
        timings = self.timings = Timings()
        start = time.perf_counter()
        C, (H, W) = self.config.num_channels, self.image_size
        reader = Reader(
            images, batch_size, self._prepare, (C, H, W), self.engine.dtype, self.workers
        )
        self._add(work)
        size = 0
        running: deque[tuple[Batch, Running | None]] = deque()

        def results() -> Iterator[Result]:
            batch, run = running.popleft()
            with _clock(timings, "waiting_for_device"):
                arrays = () if run is None else run.rows()
            for result in self._results(batch, arrays, finish):
                timings.images += 1
                with _clock(timings, "caller"):
                    yield result

        try:
            while True:
                # What is ready is set off before results are fetched; the device does not wait. A
                # caller whose images come slowly does not wait for the next batch either.
                if running and (len(running) == _RUNNING or not reader.ready()):
                    yield from results()
                    continue
                try:
                    with _clock(timings, "waiting_for_images"):
                        batch = reader.next()
                    if batch is None:
                        break
                    if not size:
                        size = self.engine.bucket(len(batch.sources), batch_size)
                        with _clock(timings, "compiling"):  # while the first batch is decoded
                            self.engine.compile_ahead(work, size)
                    with _clock(timings, "waiting_for_images"):
                        fault = batch.wait()
                    nothing = all(batch.errors)  # to run
                    run = None if nothing else self.engine.start(work, batch.pixel_values, size)
                    running.append((batch, run))
                    if fault is not None:
                        raise fault
                except BaseException:
                    while running:  # what came before the fault comes out before it
                        yield from results()
                    raise
            while running:
                yield from results()
        finally:
            reader.close()
            timings.decoding = reader.decoding
            timings.total = time.perf_counter() - start - timings.caller

    def _results(
        self,
        batch: Batch,
        arrays: Sequence[np.ndarray],
        finish: Callable[[list[np.ndarray]], Any],
    ) -> Iterator[Result]:
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

    def _prepare(self, source: Any) -> np.ndarray:
        """One image as (C, H, W); errors name its file."""
        shape = (self.config.num_channels, *self.image_size)
        # Twice the size, so that what is cropped away is there, and for the resize to have
        # something to average.
        at_least = (2 * shape[1], 2 * shape[2]) if self.fast_decode else None
        if not self.normalize_on_device:
            return prepare_image(source, self.image_processor, shape, at_least=at_least)
        pixels = prepare_image(
            source, self.image_processor, shape, at_least=at_least, **AS_IN_A_PICTURE
        )
        if pixels.dtype != np.uint8:
            raise ImageError(
                naming(
                    source,
                    "`normalize_on_device` takes images of 8 bits; this one has values of "
                    f"{pixels.dtype}.",
                )
            )
        return pixels

    # -- the network

    def _add(self, work: _Work) -> None:
        self.engine.add(work, partial(self._run, work=work))

    def _run(self, params: Any, pixel_values: jax.Array, work: _Work) -> tuple[jax.Array, ...]:
        """Arrays with a row for each image, in float32."""
        if self.normalize_on_device:
            pixel_values = normalize(pixel_values, self.image_processor)
        arrays = self._values(work, params, pixel_values)
        return tuple(array.astype(jnp.float32) for array in arrays)

    def _values(self, work: _Work, params: Any, pixel_values: jax.Array) -> list[jax.Array]:
        """What is wanted of the network, whatever stands on it."""
        config = self.config
        kwargs = options_of(self.model.module)
        kwargs["front_tokens"] = 1 if work.pool == "cls" else None
        output: Any = FlaxViTModule(**kwargs, add_pooling_layer=False).apply(
            {"params": params.get(config.base_model_prefix, params)},  # alone it has no prefix
            pixel_values.transpose(0, 2, 3, 1),  # (B, H, W, C)
            return_dict=True,
            output_hidden_states=work.kind == "features",
            output_attentions=work.kind == "attention",
        )
        if work.kind == "attention":
            return [output.attentions[i] for i in work.layers]  # (B, A, S, S)
        states = [*output.hidden_states[1:-1], output.last_hidden_state]
        return [_pooled(states[i], work.pool, config) for i in work.layers]


class ImageClassifier(ImageEncoder):
    """A model for image classification with what prepares its images and names its classes.

    Probabilities are the softmax of the logits in float32, or their sigmoid where the classes do
    not exclude each other (`problem_type` "multi_label_classification", or a single label).

    Args:
        model: the network with its parameters.
        *args, **kwargs: as `ImageEncoder`.

    Raises:
        ConfigError: the model does not classify, or does not take what the processor makes.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        if model.config.problem_type == "regression":
            raise ConfigError(
                "config: `problem_type` is 'regression': this model predicts a quantity; wanted a "
                "model of classes."
            )
        super().__init__(model, *args, **kwargs)
        self.several = has_several_labels(model.config)

    @classmethod
    def _check_source(cls, source: Source) -> None:
        if source.head not in ("classifier", "teacher"):
            raise CheckpointError(
                f"{source.path}: these weights have no classifier, so predictions would be random; "
                "wanted a checkpoint that was trained or fine-tuned to classify."
            )

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
        many = are_many(images)
        results = self.stream(images if many else [images], top_k=top_k)
        predictions = _values(results)
        return predictions if many else predictions[0]

    def stream(
        self, images: Iterable[Any], top_k: int = 5, batch_size: int | None = None
    ) -> Generator[Result, None, None]:
        """Classify any number of images; results come in order, as they are ready.

        A few batches are in memory at most, however many images there are: those that the device
        works on, and those that threads decode for it. An image that cannot be read gives a
        `Result` with its error, and the stream goes on. `timings` then tells where the time went.

        Args:
            images: each as in a call.
            top_k: how many classes to return; all if there are fewer.
            batch_size: images that go through the model at once; a last batch of fewer is padded,
                so that nothing is compiled for it.

        Raises:
            InputError: `top_k` or `batch_size` is not a positive integer. At once, not with the
                first result.
        """
        top_k = check_positive("top_k", top_k)
        return self._checked_stream(
            images,
            batch_size,
            _PROBABILITIES,
            lambda rows: likeliest(rows[0], self.config.id2label, top_k),
        )

    def compile(self, batch_size: int | None = None) -> None:
        """Compile what `stream` and calls need for any number of images: every power of two up to
        `batch_size`, and that. A last batch of few images is then run in the smallest that holds
        it. Without this each size is compiled when a stream begins with so many images."""
        batch_size = self.default_batch_size if batch_size is None else batch_size
        batch_size = check_positive("batch_size", batch_size)
        self._add(_PROBABILITIES)
        self.engine.compile_all(_PROBABILITIES, batch_size)

    @property
    def flops(self) -> int:
        """Floating point operations in the matrix products of one image: see `vit_common.flops`."""
        front = None if self.model.scan_layers else self.model.head_tokens
        return forward_flops(
            self.config, self.model.head, front_tokens=front, image_size=self.image_size
        )

    def runner(self, batch_size: int) -> Callable[[np.ndarray], np.ndarray]:
        """The network alone, compiled for one size of batch: from prepared pixels (B, C, H, W) to
        probabilities (B, K) of float32, both in the host's memory."""
        batch_size = check_positive("batch_size", batch_size)
        self._add(_PROBABILITIES)
        self.engine.compile_ahead(_PROBABILITIES, batch_size)
        return lambda pixels: self.engine.start(_PROBABILITIES, pixels, batch_size).rows()[0]

    def _values(self, work: _Work, params: Any, pixel_values: jax.Array) -> list[jax.Array]:
        if work.kind != "probabilities":
            return super()._values(work, params, pixel_values)
        model = self.model.with_front_tokens(self.model.head_tokens)
        output = model(
            pixel_values,
            params=params,
            output_attentions=False,
            output_hidden_states=False,
            return_dict=True,
        )
        logits = output.logits.astype(jnp.float32)  # (B, K)
        return [jax.nn.sigmoid(logits) if self.several else jax.nn.softmax(logits, axis=-1)]


def _pooled(hidden_states: jax.Array, pool: str | None, config: ViTConfig) -> jax.Array:
    if pool == "cls":
        return hidden_states[:, 0]
    return mean_of_patches(hidden_states, config) if pool == "mean" else hidden_states


def _values(results: Generator[Result, None, None]) -> list[Any]:
    """The values of all; the stream is closed where one has an error."""
    with contextlib.closing(results):
        return [result.value for result in results]


@atexit.register
def _close_streams() -> None:
    """What a script left open, while the modules that closing needs are still there."""
    for stream in list(_streams):
        with contextlib.suppress(ValueError):  # a thread is running it
            stream.close()


def _usual_workers(platform: str) -> int:
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return min(16, max(1, cores // 2 if platform == "cpu" else cores))


@contextlib.contextmanager
def _clock(timings: Timings, name: str) -> Iterator[None]:
    """Add the time that the block takes."""
    start = time.perf_counter()
    try:
        yield
    finally:
        setattr(timings, name, getattr(timings, name) + time.perf_counter() - start)
