"""Callables for `ray.data.Dataset.map_batches`: a batch of images in, a table of results out.

    ds = ray.data.read_binary_files("s3://photos/", include_paths=True)
    ds = ds.map_batches(
        ImageFeatures, fn_constructor_kwargs={"model": "facebook/dinov2-small"},
        batch_size=256, concurrency=4, num_gpus=1,
    )
    ds.write_parquet("s3://features/")

Each actor loads the model once and compiles it for one size of batch. Ray itself is not imported
here, and the classes are ordinary callables without it; tables need pyarrow, which Ray brings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import PIL.Image

from vit_common.checks import check_positive
from vit_common.embedded import embedded_checkpoint
from vit_common.errors import InputError, ViTError
from vit_common.files.texts import reason
from vit_common.images.predictions import naming
from vit_flax.inference.classifier import ImageClassifier
from vit_flax.inference.encoder import ImageEncoder, Pool
from vit_flax.inference.stream import not_finite

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_COLUMNS = ("image", "bytes", "source", "file", "path", "file_name", "uri", "item")
"""Columns in which images are looked for, in this order, if none is named."""

NAME_COLUMNS = ("file", "path", "file_name", "uri")
"""Columns that name the image of a row in its error."""


class _OnImages:
    """What both callables do: prepare a batch piece by piece while the network runs the piece
    before, every piece padded to one size."""

    _encoder: ClassVar[type[ImageEncoder]]
    _output: ClassVar[Any]

    def __init__(
        self,
        model: str | os.PathLike | None = None,
        *,
        image: str | None = None,
        keep: Sequence[str] | None = None,
        batch_size: int | None = None,
        max_pixels: int | None = None,
        **options: Any,
    ) -> None:
        if max_pixels is not None:  # Pillow's limit is that of a process
            PIL.Image.MAX_IMAGE_PIXELS = (check_positive("max_pixels", max_pixels) + 1) // 2
        self.image, self.keep = image, keep
        self.encoder = self._encoder.from_pretrained(
            embedded_checkpoint() if model is None else model, **options
        )
        size = self.encoder.default_batch_size if batch_size is None else batch_size
        self.batch_size = self.encoder.engine.divisible(check_positive("batch_size", size))
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="vit-prepare")
        made = self.encoder.preparer
        self._blank = np.zeros((self.batch_size, *made.shape), made.dtype)
        self._empty = self._run(self._blank)[:0]  # compiles the only program of this actor

    @property
    def compilations(self) -> int:
        """Number of programs that were compiled."""
        return self.encoder.compilations

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        """The results of a batch.

        Args:
            batch: columns of equal length, as `batch_format="numpy"` gives them. An image is a
                name, a URI that pyarrow opens ("s3://..."), the bytes of an image file, a dict with
                `bytes`, as Hugging Face writes it, or an array (H, W), (H, W, C) or (C, H, W).

        Returns:
            A pyarrow table with the same number of rows: the columns that are kept, the results,
            and `error`, why an image has none.

        Raises:
            InputError: the batch is no dict of columns, or has no column of images.
        """
        import pyarrow as pa

        if not isinstance(batch, Mapping):
            raise InputError(
                "a batch must be a dict of columns, as `batch_format='numpy'` gives it; given a "
                f"{type(batch).__name__}."
            )
        column = self._column(batch)
        images = list(batch[column])
        names = next((batch[name] for name in NAME_COLUMNS if name in batch), [None] * len(images))
        labels = [name if isinstance(name, str) else None for name in names]
        size = self.batch_size
        pieces = [slice(at, at + size) for at in range(0, len(images), size)]
        rows, errors = [self._empty], []
        ahead = [self._ahead.submit(self._prepare, images[p], labels[p]) for p in pieces[:1]]
        for number, piece in enumerate(pieces):
            pixels, faults = ahead.pop().result()
            if following := pieces[number + 1 : number + 2]:
                after = following[0]
                ahead.append(self._ahead.submit(self._prepare, images[after], labels[after]))
            found = self._run(pixels)[: len(faults)]
            for i, row in enumerate(found):
                if faults[i] is None and not np.isfinite(row).all():
                    name = labels[piece][i]
                    faults[i] = str(not_finite(name, self.encoder.model.dtype))
            rows.append(found)
            errors += faults
        results = self._columns(np.concatenate(rows), errors)
        kept = {name: _array(batch[name]) for name in self._kept(batch, column)}
        return pa.table({**kept, **results, "error": pa.array(errors, pa.string())})

    def _column(self, batch: Mapping[str, Any]) -> str:
        """The column with the images."""
        known = IMAGE_COLUMNS if self.image is None else (self.image,)
        for name in known:
            if name in batch:
                return name
        wanted = " or ".join(map(repr, known))
        raise InputError(
            f"a batch must have a column of images, {wanted}; given {', '.join(batch) or 'none'}. "
            "Name it with `image=`."
        )

    def _kept(self, batch: Mapping[str, Any], column: str) -> list[str]:
        if self.keep is not None:
            if missing := [name for name in self.keep if name not in batch]:
                raise InputError(
                    f"`keep` names columns that the batch has not: {', '.join(missing)}; given "
                    f"{', '.join(batch)}."
                )
            return list(self.keep)
        images = list(batch[column])
        named = all(isinstance(value, (str, type(None))) for value in images)
        return [name for name in batch if name != column or named]

    def _prepare(
        self, images: list[Any], names: list[str | None]
    ) -> tuple[np.ndarray, list[str | None]]:
        """Pixels padded to the size of a batch, and why an image has none."""
        sources, errors = [], []
        with ThreadPoolExecutor(self.encoder.workers) as threads:
            for source, error in threads.map(_opened, images):
                sources.append(source)
                errors.append(error)
        good = [i for i, error in enumerate(errors) if error is None]
        faults: list[ViTError | None] = []
        pixels = self._blank.copy()
        made = self.encoder.prepare([sources[i] for i in good], errors=faults)
        for i, row, fault in zip(good, made, faults, strict=True):
            pixels[i], errors[i] = row, None if fault is None else str(fault)
        for i, error in enumerate(errors):
            if error is not None:  # under the name that the row has, not the one it is read by
                own = images[i] if isinstance(images[i], str) else ""
                text = error.removeprefix(f"{own}: ") if names[i] else error
                errors[i] = naming(names[i], text)
        return pixels, errors

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _columns(self, rows: np.ndarray, errors: list[str | None]) -> dict[str, Any]:
        raise NotImplementedError


class ImageFeatures(_OnImages):
    """Features of images, for `map_batches`: `ImageEncoder` in an actor.

    Args:
        model: folder, weights file or name on the Hub, which every machine must reach; None is the
            network of digits in the package.
        layers, pool: as in `ImageEncoder.features`.
        store_dtype: "float32" or "float16", of the numbers in the result.
        image: column with the images; None looks for one of `IMAGE_COLUMNS`.
        keep: columns that go into the result; None keeps all but an image's bytes or pixels.
        batch_size: images that go through the network at once; None means its usual number. Fewer
            are padded, so nothing is compiled after the start.
        max_pixels: refuse larger images; None means Pillow's limit.
        **options: as `ImageEncoder.from_pretrained` (`dtype`, `weights`, `fast_decode`, ...).

    Raises:
        ViTError: as `ImageEncoder.from_pretrained`.

    Example:
        >>> embed = ImageFeatures("facebook/dinov2-small", batch_size=64)
        >>> embed({"file": ["a.jpg", "missing.jpg"]}).column_names
        ['file', 'features', 'error']
    """

    _encoder = ImageEncoder

    def __init__(
        self,
        model: str | os.PathLike | None = None,
        *,
        layers: Sequence[int] = (-1,),
        pool: Pool = "auto",
        store_dtype: Literal["float32", "float16"] = "float32",
        **options: Any,
    ) -> None:
        if store_dtype not in ("float32", "float16"):
            raise InputError(
                f"`store_dtype` must be 'float32' or 'float16'; given {store_dtype!r}."
            )
        self.store_dtype = np.dtype(store_dtype)
        self._layers, self._pool = layers, pool
        super().__init__(model, **options)

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        return self.encoder.run(
            pixels, "features", layers=self._layers, pool=self._pool, batch_size=self.batch_size
        )

    def _columns(self, rows: np.ndarray, errors: list[str | None]) -> dict[str, Any]:
        import pyarrow as pa

        length = int(np.prod(rows.shape[1:]))
        missing = np.array([error is not None for error in errors], bool)
        values = np.where(missing[:, None], 0, rows.reshape(len(rows), length))
        with np.errstate(over="ignore"):
            stored = values.astype(self.store_dtype)
        for i in np.flatnonzero(~np.isfinite(stored).all(axis=1)):
            most = np.abs(values[i]).max()
            errors[i] = f"{self.store_dtype} cannot hold its features (up to {most:.3g})."
            missing[i], stored[i] = True, 0
        kind = pa.list_(pa.from_numpy_dtype(self.store_dtype), length)
        return {
            "features": pa.FixedSizeListArray.from_arrays(
                stored.reshape(-1), type=kind, mask=pa.array(missing)
            )
        }


class ImagePredictions(_OnImages):
    """The likeliest classes of images, for `map_batches`: `ImageClassifier` in an actor.

    Args:
        model, image, keep, batch_size, max_pixels, **options: as `ImageFeatures`.
        top_k: how many classes; all if there are fewer.

    Raises:
        ViTError: as `ImageClassifier.from_pretrained`.

    Example:
        >>> classify = ImagePredictions("google/vit-base-patch16-224", top_k=1)
        >>> classify({"bytes": [photo]})["predictions"][0][0]["label"].as_py()
        'Egyptian cat'
    """

    _encoder = ImageClassifier

    def __init__(
        self, model: str | os.PathLike | None = None, *, top_k: int = 5, **options: Any
    ) -> None:
        self.top_k = check_positive("top_k", top_k)
        super().__init__(model, **options)

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        return self.encoder.run(pixels, batch_size=self.batch_size)

    def _columns(self, rows: np.ndarray, errors: list[str | None]) -> dict[str, Any]:
        import pyarrow as pa

        each = [("label", pa.string()), ("index", pa.int32()), ("probability", pa.float32())]
        classifier: Any = self.encoder
        found = [
            None
            if error is not None
            else [
                {"label": p.label, "index": p.index, "probability": p.probability}
                for p in predictions
            ]
            for predictions, error in zip(
                classifier.predictions(rows, self.top_k), errors, strict=True
            )
        ]
        return {"predictions": pa.array(found, pa.list_(pa.struct(each)))}


def _array(values: Any) -> Any:
    """A column as pyarrow takes it."""
    import pyarrow as pa

    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    if all(isinstance(value, (str, type(None))) for value in listed):
        return pa.array(listed, pa.string())  # also of a batch in which all are missing
    return pa.array([value.tolist() if hasattr(value, "tolist") else value for value in listed])


def _opened(image: Any) -> tuple[Any, str | None]:
    """What the preparation takes for an image, or why there is nothing."""
    if isinstance(image, Mapping):
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if image is None or (isinstance(image, float) and np.isnan(image)):
        return None, "there is no image in this row."
    if isinstance(image, str) and "://" in image:
        return _fetched(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        if image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (3, 4) and image.size):
            return PIL.Image.fromarray(image), None
        if image.ndim == 3 and image.shape[-1] == 1 and image.size:
            return PIL.Image.fromarray(image[:, :, 0]), None
    if isinstance(image, (str, bytes, Path, np.ndarray, PIL.Image.Image, bytearray, memoryview)):
        return image, None
    return None, f"wanted a name, bytes or an array; given a {type(image).__name__}."


def _fetched(uri: str) -> tuple[bytes | None, str | None]:
    """The bytes behind a URI, by pyarrow's file systems."""
    import pyarrow as pa
    from pyarrow.fs import FileSystem

    try:
        system, path = FileSystem.from_uri(uri)
        with system.open_input_stream(path) as stream:
            return stream.read(), None
    except (OSError, pa.ArrowException, ValueError) as error:
        return None, f"{uri}: cannot be read ({reason(error)})."
