"""`ImageEncoder`: features and attention of images, for any network."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from vit_common.checks import as_integer, check_positive
from vit_common.config import FIELDS, ViTConfig
from vit_common.errors import ConfigError, InputError, ViTError
from vit_common.features import features_pool, pooled_tokens
from vit_common.images.predictions import are_many, default_image_processor
from vit_common.images.processor import BaseImageProcessor
from vit_convert.source import Source, find_processor
from vit_flax.auto import FlaxAutoImageModel, FlaxAutoModelForImageClassification
from vit_flax.cpu.half import held_params
from vit_flax.inference import maps as attention_maps
from vit_flax.inference.engine import Engine
from vit_flax.inference.preparer import Preparer, prepare_all, usual_workers
from vit_flax.inference.reader import Reader
from vit_flax.inference.stream import Result, Timings, stream, values_of
from vit_flax.int8 import check_activations, check_weights
from vit_flax.model import FlaxViTModule
from vit_flax.model import options as options_of
from vit_flax.pixels import normalize
from vit_flax.sharding import MeshLike, make_mesh, param_shardings, place


class Work(NamedTuple):
    """The kind of arrays that a compiled network gives."""

    kind: Literal["probabilities", "features", "attention"]
    layers: tuple[int, ...] = ()
    pool: str | None = None


Pool = Literal["auto", "cls", "mean"] | None
"""How tokens become one vector: see `vit_common.features`."""


class ImageEncoder:
    """Features and attention of images, from any network, with or without a classifier.

    Computations are in the model's `dtype`, with its parameters as they are held (see `weights`
    and `param_dtype` of `from_pretrained`); results are float32. `features` and `attention` take
    images; `prepare` and `run` are the two halves of the way, for a server, or a cluster engine
    that prepares on one machine and runs on another. vit_flax/inference/README.md says what may be
    shared between threads.

    Args:
        model: the network with its parameters.
        image_processor: prepares the images; None means the Hub's defaults for a ViT at the
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

    Example:
        >>> encode = ImageEncoder.from_pretrained("facebook/dinov2-small")
        >>> encode.features(["a.jpg", "b.jpg"]).shape
        (2, 384)
        >>> encode.run(encode.prepare(["a.jpg", "b.jpg"])).shape
        (2, 384)
    """

    _OWN: ClassVar[tuple[str, ...]] = ("workers", "normalize_on_device", "fast_decode")
    """Options of the constructor."""

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
        config = model.config
        self.model = model
        self.preparer = Preparer(
            config,
            image_processor,
            workers=workers,
            normalize_on_device=normalize_on_device,
            fast_decode=fast_decode,
        )
        self.image_processor = self.preparer.image_processor
        self.image_size = self.preparer.image_size
        self.normalize_on_device = normalize_on_device
        self.fast_decode = fast_decode
        devices = make_mesh(mesh, config)
        params = model.network_params
        params = params if devices is None else place(params, devices)
        if model.param_dtype == jnp.float32:  # no other dtype was asked for
            params = held_params(params, model.dtype)
        shape, dtype = self.preparer.shape, self.preparer.dtype
        self.engine = Engine(params, config, shape, dtype, devices)
        share = 2 if self.engine.platform == "cpu" else 1  # a network on the CPU needs cores too
        self.workers = workers or usual_workers(share)
        self.timings = Timings()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        dtype: Any = jnp.float32,
        *,
        mesh: MeshLike = "auto",
        weights: Literal["int8"] | None = None,
        activations: Literal["int8"] | None = None,
        **options: Any,
    ) -> Self:
        """Load model and preprocessing.

        Args:
            name_or_path: directory, weights file, or "owner/name" on the Hub.
            dtype: compute dtype: float32, bfloat16 or float16. Statistics of norms, softmax and
                results are float32 in each.
            mesh: as for the class; weights are read from a safetensors file as they lie on the
                devices, each part by itself.
            weights: "int8" holds the kernels of the blocks as 8-bit integers, in a quarter of
                float32's bytes; see `vit_flax.int8`. None holds them in `param_dtype`.
            activations: "int8", with `weights="int8"`, quantises what these kernels are multiplied
                by as well, each token by itself, and multiplies integers. None multiplies in
                `dtype`.
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
        check_activations(activations, weights)
        own = {name: options.pop(name) for name in cls._OWN if name in options}
        fields = [name for name in options if name in FIELDS]
        given = options.get("config")
        if given is not None and not isinstance(given, (str, os.PathLike)) and fields:
            raise InputError(
                f"{', '.join(map(repr, fields))} and `config` were both given; set them in the "
                "configuration."
            )
        source, loading = FlaxAutoImageModel.open_pretrained(name_or_path, options)
        with source:
            config = source.config
            cls._check_source(source)
            own = cls._arguments(source, own)
            processor = find_processor(source)
            devices = make_mesh(mesh, config)
            if devices is not None:
                loading["shardings"] = partial(param_shardings, devices)
            loading.update(weights=weights, activations=activations)
            model = cls._load_model(source, dtype=dtype, **loading)
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
    def _arguments(cls, source: Source, own: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the constructor, with those that the files hold."""
        return own

    @classmethod
    def _load_model(cls, source: Source, **options: Any) -> Any:
        """The model to run, with the head that the checkpoint has if it classifies."""
        if source.classifies:
            return FlaxAutoModelForImageClassification.from_source(source, **options)
        with warnings.catch_warnings():
            # A head that nothing here runs, such as a decoder's, is left aside as asked for.
            warnings.filterwarnings("ignore", message=r".*: in the checkpoint and not used")
            return FlaxAutoImageModel.from_source(source, add_pooling_layer=False, **options)

    @property
    def config(self) -> ViTConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def compilations(self) -> int:
        """Number of compilations: one for each size of batch and kind of result so far."""
        return self.engine.compilations

    @property
    def default_batch_size(self) -> int:
        """Batch size unless the caller sets one: 8 on a CPU, 64 elsewhere, for each device that a
        batch is split over."""
        each = 8 if jax.default_backend() == "cpu" else 64
        return each * self.engine.parts_of_batch

    # -- the two halves: pixels, and the network

    def prepare(self, images: Any, *, errors: list[ViTError | None] | None = None) -> np.ndarray:
        """Prepare images as `run` takes them. No device is used: `preparer` does the same without
        the network.

        Args:
            images: an image file (its name, its bytes, or open for reading), PIL image, or array
                as `ViTImageProcessor` takes it; or a list of these, or an array (B, H, W, C) or
                (B, C, H, W). Files and PIL images are turned upright as their EXIF says.
            errors: a list to which is added, for each image, why it could not be prepared, or None;
                its row is then zero. Without a list, the first such error is raised.

        Returns:
            (B, C, H, W), float32, or uint8 with `normalize_on_device`; B is 1 for one image.

        Raises:
            ImageError, MissingFileError: an image cannot be read or taken, and `errors` is None.

        Example:
            >>> errors = []
            >>> pixels = encode.prepare(["a.jpg", "missing.jpg"], errors=errors)
            >>> pixels.shape, [error is None for error in errors]
            ((2, 3, 224, 224), [True, False])
        """
        sources = list(images) if are_many(images) else [images]
        made = self.preparer
        return prepare_all(sources, self._prepare, made.shape, made.dtype, self.workers, errors)

    def run(
        self,
        pixel_values: np.ndarray,
        output: Literal["probabilities", "features", "attention"] | None = None,
        *,
        layers: Sequence[int] = (-1,),
        pool: Pool = "auto",
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Run the network on prepared images.

        Each size of batch is compiled once: the images are run `batch_size` at a time, and fewer
        are padded to a power of two, as in a stream. Several threads may call it.

        Args:
            pixel_values: (B, C, H, W) as `prepare` makes it; on any number of images.
            output: "probabilities" of the classes (the default of an `ImageClassifier`), "features"
                (that of an `ImageEncoder`) or "attention".
            layers, pool: of features and attention, as in `features` and `attention`.
            batch_size: images at once; None means `default_batch_size`.

        Returns:
            float32 in the host's memory: probabilities (B, K); features (B, D), or (B, S, D) with
            `pool` None; attention (B, A, S, S). For several layers (B, layers, ...). What is
            not finite is returned as it is.

        Raises:
            InputError: the pixels or an option do not fit the network.
            DeviceError: the device's memory does not hold a single image.
        """
        work = self._work(output or self._output, layers, pool)
        pixel_values = self._checked_pixels(pixel_values)
        size = self.default_batch_size if batch_size is None else batch_size
        size = check_positive("batch_size", size)
        images = len(pixel_values)
        if not images:  # for the shape of what comes out
            pixel_values = np.zeros((1, *self.engine.shape), self.engine.dtype)
        self._add(work)
        bucket = self.engine.bucket(len(pixel_values), size)
        arrays = self.engine.start(work, pixel_values, bucket).rows()
        found = arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=1)
        return found[:images]

    _output: Literal["probabilities", "features"] = "features"  # of `run`

    def _work(self, output: Any, layers: Iterable[int], pool: Pool) -> Work:
        """The program to run."""
        if output == "attention":
            return Work("attention", self._blocks(layers), None)
        if output == "features":
            return Work("features", self._blocks(layers), self._pool(pool))
        raise InputError(
            f"`output` must be 'features' or 'attention' for {type(self).__name__}; given "
            f"{output!r}."
        )

    def _pool(self, pool: Pool) -> Literal["cls", "mean"] | None:
        if pool not in ("auto", "cls", "mean", None):
            raise InputError(f"`pool` must be 'cls', 'mean' or None, or 'auto'; given {pool!r}.")
        if pool == "auto":
            return features_pool(self.config)
        if pool == "cls" and not self.config.use_cls_token:
            raise InputError("`pool` must be 'mean' or None: this network has no class token.")
        return pool

    def _checked_pixels(self, pixel_values: Any) -> np.ndarray:
        wanted = (*self.engine.shape,)
        shape, dtype = getattr(pixel_values, "shape", None), getattr(pixel_values, "dtype", None)
        if shape is None or tuple(shape[1:]) != wanted or dtype != self.engine.dtype:
            given = type(pixel_values).__name__ if shape is None else f"{dtype} of shape {shape}"
            raise InputError(
                "`pixel_values` must be an array as `prepare` makes it, (batch, channels, height, "
                f"width) = (B, {', '.join(map(str, wanted))}) of {self.engine.dtype}; given "
                f"{given}."
            )
        return np.asarray(pixel_values)

    # -- features and attention

    def features(self, images: Any, layers: Sequence[int] = (-1,), pool: Pool = "auto") -> Any:
        """The embeddings of images: the network's output before any classifier.

        Args:
            images: as in `prepare`.
            layers: blocks, the first is 0; -1 is the last. The last block's is taken after the
                final norm, as `last_hidden_state` is.
            pool: "cls" for the class token, "mean" for the mean of the patches, None for all
                tokens; "auto" for the class token or, in a network without one, the mean.

        Returns:
            float32 (D,), or (S, D) without pooling; (layers, D) or (layers, S, D) for several
            layers; for a list of images, one more axis in front.

        Raises:
            ImageError, MissingFileError: an image cannot be read or taken.
            InputError: there is no such block, or nothing of that name to pool.
        """
        many, layers = are_many(images), self._blocks(layers)
        results = self.stream_features(images if many else [images], layers, pool)
        values = values_of(results)
        if many and not values:
            several = [len(layers)] if len(layers) > 1 else []
            tokens = [self.engine.tokens] if pool is None else []
            return np.zeros((0, *several, *tokens, self.config.hidden_size), np.float32)
        return np.stack(values) if many else values[0]

    def stream_features(
        self,
        images: Iterable[Any],
        layers: Sequence[int] = (-1,),
        pool: Pool = "auto",
        batch_size: int | None = None,
    ) -> Generator[Result, None, None]:
        """`features` of any number of images, one result per image, in order and as they are
        ready; each result's `value` holds them. See `ImageClassifier.stream`."""
        work = self._work("features", layers, pool)
        single = len(work.layers) == 1
        return self._checked_stream(
            images, batch_size, work, lambda rows: rows[0] if single else np.stack(rows)
        )

    def attention(
        self, images: Any, layers: Sequence[int] = (-1,), *, rollout: bool = False
    ) -> Any:
        """The attention of blocks after the softmax.

        Args:
            images: as in `prepare`.
            layers: blocks, the first is 0; -1 is the last.
            rollout: instead of one block's, how much of each token of the input is in each of
                the output, over all blocks (Abnar and Zuidema 2020); `layers` is ignored.

        Returns:
            float32 (layers, A, S, S), or (S, S) with `rollout`; for a list of images, one more axis
            in front. The tokens in front of the patches come first, then the patches row by row.

        Raises:
            ImageError, MissingFileError: an image cannot be read or taken.
            InputError: there is no such block.
        """
        many = are_many(images)
        every = range(self.config.num_hidden_layers)
        work = self._work("attention", every if rollout else layers, None)

        def finish(rows: list[np.ndarray]) -> np.ndarray:
            if rollout:
                return attention_maps.rollout([row[None] for row in rows])[0].astype(np.float32)
            return np.stack(rows)

        results = self._checked_stream(images if many else [images], 1, work, finish)
        values = values_of(results)
        return values if many else values[0]

    def seen(self, image: Any) -> PIL.Image.Image:
        """An image as the network is given it: resized and cropped, in its own colours.

        Raises:
            ImageError, MissingFileError: it cannot be read or taken.
        """
        return self.preparer.seen(image)

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
        work: Work,
        finish: Callable[[list[np.ndarray]], Any],
    ) -> Generator[Result, None, None]:
        batch_size = self.default_batch_size if batch_size is None else batch_size
        batch_size = check_positive("batch_size", batch_size)
        one = isinstance(images, (str, os.PathLike, PIL.Image.Image, bytes, bytearray, memoryview))
        if one or hasattr(images, "read"):
            raise InputError(
                f"`images` must be an iterable of images; given one {type(images).__name__}. Put "
                "it in a list."
            )
        self._add(work)
        self.timings = Timings()
        shape, dtype, iterator = self.engine.shape, self.engine.dtype, iter(images)
        return stream(
            lambda: Reader(iterator, batch_size, self._prepare, shape, dtype, self.workers),
            self.engine,
            work,
            batch_size,
            finish,
            self.timings,
            self.model.dtype,
        )

    def _prepare(self, source: Any) -> np.ndarray:
        """One image as (C, H, W); errors name its file."""
        return self.preparer.one(source)

    # -- the network

    def _add(self, work: Work) -> None:
        self.engine.add(work, partial(self._run, work=work))

    def _run(self, params: Any, pixel_values: jax.Array, work: Work) -> tuple[jax.Array, ...]:
        """Arrays with a row for each image, in float32."""
        if self.normalize_on_device:
            pixel_values = normalize(pixel_values, self.image_processor)
        arrays = self._values(work, params, pixel_values)
        return tuple(array.astype(jnp.float32) for array in arrays)

    def _values(self, work: Work, params: Any, pixel_values: jax.Array) -> list[jax.Array]:
        """The arrays of `work`, computed by the network without its head."""
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
        return [pooled_tokens(states[i], config, work.pool) for i in work.layers]
