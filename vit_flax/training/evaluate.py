"""Evaluation: a model's output for every image of a data set, and what it says of the model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_common.checks import check_positive
from vit_common.datasets import as_images
from vit_common.datasets.class_names import labels_of, match_classes
from vit_common.errors import ImageError, InputError, ViTError, shown
from vit_common.files.texts import reason
from vit_common.images.pictures import usual_workers
from vit_common.images.predictions import (
    check_processor,
    default_image_processor,
    image_size,
    prepare_image,
)
from vit_common.images.processor import BaseImageProcessor
from vit_common.metrics import BINS, measure, sigmoid, softmax
from vit_flax.sharding import MeshLike, batch_sharding, make_mesh, place, replicated
from vit_flax.training.loader import read_ahead

Report = Callable[[int, int], object]
"""Told how many images are done, of how many."""

_SINGLE, _MULTI, _QUANTITY = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
_MEANT = {_SINGLE: "one class", _MULTI: "several classes", _QUANTITY: "a quantity"}


@dataclass
class Evaluation:
    """What a model gave for the images of a data set, those that could be read.

    Attributes:
        logits: (N, K) float32.
        labels: (N,) int64 indices of the model's classes; (N, K) of 0 and 1; or (N, K) quantities.
        names: of the images.
        index: (N,) int64, where each image stands in the data set.
        metrics: of `vit_common.metrics.measure`; empty where no image could be read.
        skipped: (name, message) of each image that could not be read.
        classes: the model's labels; None for quantities.
        problem_type: Transformers' name.
    """

    logits: np.ndarray
    labels: np.ndarray
    names: list[str]
    index: np.ndarray
    metrics: dict[str, Any]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    classes: tuple[str, ...] | None = None
    problem_type: str = _SINGLE

    @property
    def probabilities(self) -> np.ndarray:
        """(N, K) float64: the softmax of the logits, their sigmoid where an image may have several
        classes, or the quantities themselves."""
        return self.probabilities_of(slice(None))

    def probabilities_of(self, images: Any) -> np.ndarray:
        """The same, of the images with these indices alone: (K,) of one."""
        logits = self.logits[images]
        if self.problem_type == _QUANTITY:
            return logits.astype(np.float64)
        return softmax(logits) if self.problem_type == _SINGLE else sigmoid(logits)

    @property
    def predicted(self) -> np.ndarray:
        """(N,) int64: the class of the highest logit; of equal ones the first."""
        return self.logits.argmax(axis=1)


class Evaluator:
    """Evaluates a model again and again with one compiled program, as training does.

    Every image counts once: the last batch is padded with rows that do not count.

    Args:
        model: a Flax model of this package that classifies; its `config` names the classes.
        processor: prepares the images; None means the Hub's defaults for a ViT.
        batch_size: images that go through the model at once; None is 8 on a CPU and 64 elsewhere,
            for each device. On several devices it is rounded up to a multiple of them.
        mesh: devices to run on; see `vit_flax.sharding.make_mesh`. Several processes share the
            reading, and each has every result.
        workers: threads that read images; None is the processor's cores, at most 16.

    Raises:
        ConfigError: the model does not take what the processor makes.

    Example:
        >>> evaluator = Evaluator(model, processor)
        >>> evaluator(validation, params=state.params).metrics["top1"]
        0.91
    """

    def __init__(
        self,
        model: Any,
        processor: BaseImageProcessor | None = None,
        *,
        batch_size: int | None = None,
        mesh: MeshLike = None,
        workers: int | None = None,
    ) -> None:
        config = model.config
        self.model = model
        self.processor = processor or default_image_processor(config)
        self.shape = (config.num_channels, *image_size(config, self.processor))
        check_processor(self.processor, self.shape)
        self.mesh = make_mesh(mesh, config)
        self._split = None if self.mesh is None else batch_sharding(self.mesh)
        parts = 1 if self._split is None else _parts(self._split)
        if batch_size is None:
            batch_size = parts * (8 if jax.default_backend() == "cpu" else 64)
        self.batch_size = -(-check_positive("batch_size", batch_size) // parts) * parts
        self.workers = workers or usual_workers()
        # Parameters that went through training lie on the mesh already, under any tree of axes.
        whole = None if self.mesh is None else replicated(self.mesh)
        self._run = jax.jit(self._logits, out_shardings=whole)

    def _logits(self, params: Any, pixel_values: jax.Array, valid: jax.Array) -> Any:
        output = self.model(pixel_values, params=params, train=False, return_dict=True)
        return output.logits.astype(jnp.float32), valid

    def __call__(
        self,
        dataset: Any,
        *,
        params: Any = None,
        top_k: Sequence[int] = (1, 5),
        bins: int = BINS,
        progress: Report | None = None,
    ) -> Evaluation:
        """Evaluate.

        Args:
            dataset: images of `vit_common.datasets`, or what `as_images` makes them of. Their
                classes are found among the model's by name.
            params: other parameters than the model's own.
            top_k, bins: of `vit_common.metrics.classification`.
            progress: called after each batch.

        Raises:
            InputError: the data set is empty, has classes that the model lacks, or is of another
                problem type; or the model's output is not finite.
        """
        dataset = as_images(dataset)
        rows, index, skipped = self.outputs(dataset, params=params, progress=progress)
        return self.judged(dataset, rows, index, skipped, top_k=top_k, bins=bins)

    def outputs(
        self, dataset: Any, *, params: Any = None, progress: Report | None = None
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]]]:
        """The model's output for every image that can be read.

        Returns:
            (N, K) float32; (N,) the images' indices; (name, message) of each of the others.
        """
        count = len(model_labels(self.model.config, dataset)[0])
        if params is None:
            params = self.model.network_params
            if self.mesh is not None:
                params = place(params, self.mesh)
        logits: list[np.ndarray] = []
        valid: list[np.ndarray] = []
        faults: dict[int, str] = {}
        for start, pixels, fine in self._batches(dataset, count, faults):
            rows, good = jax.device_get(self._run(params, *self._placed(pixels, fine)))
            logits.append(rows)
            valid.append(good)
            if progress is not None:
                progress(min(start + self.batch_size, count), count)
        read = np.concatenate(valid)[:count] > 0
        index = np.flatnonzero(read)
        names = dataset.names
        skipped = [
            (str(names[i]), faults.get(i, "could not be read by another process"))
            for i in np.flatnonzero(~read).tolist()
        ]
        return np.concatenate(logits)[:count][index], index, skipped

    def judged(
        self,
        dataset: Any,
        rows: np.ndarray,
        index: np.ndarray,
        skipped: list[tuple[str, str]],
        *,
        top_k: Sequence[int] = (1, 5),
        bins: int = BINS,
    ) -> Evaluation:
        """What outputs say of the model; `rows`, `index` and `skipped` as `outputs` gives them."""
        labels, classes, problem = model_labels(self.model.config, dataset)
        names = [str(dataset.names[i]) for i in index]
        _check_finite(rows, names)
        metrics = {}
        if len(index):
            metrics = measure(
                rows,
                labels[index],
                problem,
                classes=classes,
                **_options(problem, top_k=top_k, bins=bins),
            )
        return Evaluation(rows, labels[index], names, index, metrics, skipped, classes, problem)

    # -- reading

    def _batches(
        self, dataset: Any, count: int, faults: dict[int, str]
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Batches of one size, in order: where each begins, its pixels (B, C, H, W), and (B,)
        float32, 1 for rows that count. Threads read ahead."""
        size = self.batch_size
        local = range(size) if self._split is None else _local_rows(self._split, size)

        def read(image: int) -> np.ndarray:
            try:
                return prepare_image(dataset.image(image), self.processor, self.shape)
            except OSError as error:
                raise ImageError(f"cannot be read ({reason(error)}).") from error

        starts = range(0, count, size)
        steps = [
            np.array([start + row for row in local if start + row < count], int) for start in starts
        ]
        with contextlib.closing(read_ahead(steps, read, self.workers)) as found:
            for start, images, rows in zip(starts, steps, found, strict=True):
                pixels = np.zeros((size, *self.shape), np.float32)
                fine = np.zeros(size, np.float32)
                for image, row in zip(images.tolist(), rows, strict=True):
                    if isinstance(row, ViTError):
                        faults[image] = str(row)
                    else:
                        pixels[image - start], fine[image - start] = row, 1.0
                yield start, pixels, fine

    def _placed(self, pixels: np.ndarray, valid: np.ndarray) -> list[Any]:
        """Arrays of a batch as the program takes them."""
        arrays = [pixels, valid]
        if self._split is None:
            return arrays
        return [jax.make_array_from_callback(a.shape, self._split, partial(_at, a)) for a in arrays]


def _at(array: np.ndarray, index: Any) -> np.ndarray:
    return array[index]


def evaluate(
    model: Any,
    dataset: Any,
    *,
    processor: BaseImageProcessor | None = None,
    batch_size: int | None = None,
    mesh: MeshLike = None,
    params: Any = None,
    workers: int | None = None,
    top_k: Sequence[int] = (1, 5),
    bins: int = BINS,
    progress: Report | None = None,
) -> Evaluation:
    """Run a model on every image of a data set, and measure what it gives.

    Args:
        model: a Flax model of this package that classifies, or the folder, file or Hub name of one,
            which is then loaded with its own image processor.
        dataset, params, top_k, bins, progress: as `Evaluator` is called with.
        processor, batch_size, mesh, workers: as `Evaluator`.

    Returns:
        The `Evaluation`; images that cannot be read are in its `skipped`.

    Raises:
        ViTError: the model cannot be loaded, or does not fit the data set.

    Example:
        >>> found = evaluate("pets", ImageFolder("photos/test"))
        >>> found.metrics["top1"], found.metrics["ece"], found.skipped
        (0.93, 0.021, [])
    """
    if isinstance(model, (str, os.PathLike)):
        model, own = load_classifier(model)
        processor = processor or own
    evaluator = Evaluator(model, processor, batch_size=batch_size, mesh=mesh, workers=workers)
    return evaluator(dataset, params=params, top_k=top_k, bins=bins, progress=progress)


def load_classifier(
    name_or_path: str | os.PathLike, dtype: Any = jnp.float32, **options: Any
) -> tuple[Any, BaseImageProcessor]:
    """A model that classifies, and what prepares its images.

    Args:
        name_or_path: folder, weights file, or name on the Hub.
        dtype: compute dtype.
        **options: of `FlaxAutoModelForImageClassification.from_pretrained`.

    Raises:
        ViTError: there is none of that name, or its weights have no classifier.
    """
    from vit_common.errors import CheckpointError, warn
    from vit_convert.source import find_processor
    from vit_flax.auto import FlaxAutoModelForImageClassification

    source, loading = FlaxAutoModelForImageClassification.open_pretrained(name_or_path, options)
    with source:
        if not source.classifies:
            raise CheckpointError(
                f"{source.path}: these weights have no classifier; wanted a checkpoint that was "
                "trained or fine-tuned to classify (`vit train` makes one; `vit probe` measures "
                "features without one)."
            )
        found = find_processor(source)
        model = FlaxAutoModelForImageClassification.from_source(source, dtype=dtype, **loading)
    if found is None:
        warn(
            f"{name_or_path} has no preprocessor_config.json: images are resized to the model's "
            "size and normalised with mean and standard deviation 0.5, the Hub's defaults for a "
            "ViT. If the model was trained otherwise, its results are worse than they could be."
        )
        return model, default_image_processor(model.config)
    return model, found[0]


def model_labels(config: Any, dataset: Any) -> tuple[np.ndarray, tuple[str, ...] | None, str]:
    """The labels of a data set as a model counts its classes.

    Args:
        config: of the model.
        dataset: with `labels`, `classes` and `problem_type`.

    Returns:
        Labels, (N,) or (N, K); the model's class names, or None for quantities; the problem type.

    Raises:
        InputError: the data set is empty, of another problem type, or has classes that the model
            lacks.
    """
    problem = dataset.problem_type
    trained = config.problem_type or (_QUANTITY if config.num_labels == 1 else None)
    if problem == _SINGLE and trained == _MULTI:
        problem = _MULTI  # the one class of an image among those it might have
        labels = np.eye(len(dataset.classes or config.id2label))[np.asarray(dataset.labels)]
    else:
        labels = np.asarray(dataset.labels)
    if trained not in (None, problem) and not (
        config.num_labels == 1 and config.problem_type is None
    ):
        raise InputError(
            f"the model predicts {_MEANT.get(trained, trained)} for each image (problem_type "
            f"{trained!r}), and the data set labels {_MEANT.get(problem, problem)} (problem_type "
            f"{problem!r}); evaluate it on data of its own kind."
        )
    if not len(labels):
        raise InputError("the data set has no images; wanted one at least.")
    K = config.num_labels
    if problem == _QUANTITY:
        labels = labels[:, None] if labels.ndim == 1 else labels
        if labels.shape[1] != K:
            raise InputError(
                f"the model predicts {K} quantities for each image; the data set has "
                f"{labels.shape[1]}."
            )
        return labels.astype(np.float64), None, problem
    names = labels_of(config.id2label)
    if dataset.classes is None:
        if problem == _SINGLE and (labels.min() < 0 or labels.max() >= K):
            wrong = labels[(labels < 0) | (labels >= K)][0]
            raise InputError(f"labels must be from 0 to {K - 1}; given {shown(wrong.item())}.")
        return labels, names, problem
    where = match_classes(dataset.classes, names, what=str(getattr(dataset, "path", "")))
    if problem == _SINGLE:
        return where[labels.astype(np.int64)], names, problem
    spread = np.zeros((len(labels), K), np.float32)
    spread[:, where] = labels
    return spread, names, problem


def _options(problem: str, **options: Any) -> dict[str, Any]:
    return options if problem == _SINGLE else {}


def _check_finite(logits: np.ndarray, names: list[str]) -> None:
    rows = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(rows):
        raise InputError(
            f"the model's output is not finite (NaN or infinite) for {len(rows)} of {len(logits)} "
            f"images, the first is {names[rows[0]]}; its weights are damaged, or need float32."
        )


# -- devices


def _parts(sharding: Any) -> int:
    """How many parts a batch is split into."""
    shape = sharding.mesh.shape
    names = sharding.spec[0] if len(sharding.spec) else None
    names = (names,) if isinstance(names, str) else names or ()
    return int(np.prod([shape[name] for name in names], dtype=int))


def _local_rows(sharding: Any, size: int) -> list[int]:
    """The rows of a batch that this process's devices hold."""
    places = sharding.addressable_devices_indices_map((size,)).values()
    return sorted({row for (rows,) in places for row in range(*rows.indices(size))})
