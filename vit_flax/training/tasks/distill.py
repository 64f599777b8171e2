"""Distillation: a student that learns from labels and from the logits of a teacher.

Source: `DistillationLoss` of facebookresearch/deit (`losses.py`; Touvron et al. 2021,
arXiv:2012.12877), where a distillation token learns from the teacher and the class token from the
labels; for students without that token, Hinton et al. 2015, arXiv:1503.02531.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_common.config import ViTConfig
from vit_common.errors import CheckpointError, InputError, some, warn
from vit_common.images.predictions import default_image_processor, image_size
from vit_common.images.processor import BaseImageProcessor
from vit_common.recipes import Recipe
from vit_convert.source import find_processor
from vit_flax.auto import FlaxAutoModelForImageClassification
from vit_flax.sharding import tree_shardings
from vit_flax.training.losses import IGNORED
from vit_flax.training.step import CONSTANTS, Batch, Loss, Prepare, Total

__all__ = ["Teacher", "distillation", "load_teacher", "taught"]

TEACHER = "teacher_logits"
"""Entry of a batch: (B, K), of the teacher."""
_METHODS = {0: "nearest", 1: "lanczos3", 2: "linear", 3: "cubic"}  # Pillow's numbers
_SHOWN = 3


@dataclass(frozen=True)
class Teacher:
    """A classifier to learn from.

    Attributes:
        model: a Flax classifier of this package, with its parameters.
        processor: prepares images for it: its size, mean and standard deviation count.
    """

    model: Any
    processor: BaseImageProcessor

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images that it takes."""
        return image_size(self.model.config, self.processor)


def load_teacher(name: str | os.PathLike, dtype: Any = "float32", **options: Any) -> Teacher:
    """A teacher by its name: any classifier that this package loads.

    Args:
        name: folder, weights file, or "owner/name" on the Hub.
        dtype: compute dtype.
        **options: of `FlaxAutoModelForImageClassification.from_pretrained`.

    Raises:
        CheckpointError: it has no classifier. MissingFileError: there is nothing of that name.
    """
    auto = FlaxAutoModelForImageClassification
    source, loading = auto.open_pretrained(name, options)
    with source:
        if not source.classifies:
            raise CheckpointError(
                f"{source.path}: these weights have no classifier, so there is nothing to learn "
                "from them; wanted a teacher that was trained to classify."
            )
        found = find_processor(source)
        model = auto.from_source(source, dtype=dtype, **loading)
    processor = default_image_processor(model.config) if found is None else found[0]
    return Teacher(model, processor)


def taught(
    recipe: Recipe,
    teacher: Teacher,
    student: Any,
    processor: BaseImageProcessor,
    prepare: Prepare,
) -> Prepare:
    """A `prepare` that adds the teacher's logits after another has prepared the pixels.

    The teacher sees the student's images, augmented and mixed, with its own mean and standard
    deviation; resized where it takes another size. With `recipe.accumulate`, it runs in as many
    parts. Its parameters are an entry of the batch (`teacher_constants`).

    Args:
        recipe: of the run.
        teacher: the classifier.
        student: the model that learns.
        processor: the student's, by which pixels are normalised.
        prepare: (batch, key) -> batch with "pixel_values" (B, C, H, W).

    Raises:
        InputError: the teacher has other classes, or takes images of other channels.
    """
    check_classes(student.config, teacher.model.config)
    C = student.config.num_channels
    if teacher.model.config.num_channels != C:
        raise InputError(
            f"the teacher takes images of {teacher.model.config.num_channels} channels, and the "
            f"student of {C}; wanted the same."
        )
    factor, offset = _renormalized(processor, teacher.processor, C)
    size = teacher.image_size
    method = _METHODS.get(int(teacher.processor.to_dict().get("resample") or 0), "linear")
    parts = recipe.accumulate

    def logits_of(params: Any, images: jax.Array) -> jax.Array:
        if factor is not None and offset is not None:
            images = images * jnp.asarray(factor, images.dtype) + jnp.asarray(offset, images.dtype)
        if images.shape[-2:] != size:
            images = jax.image.resize(images, (*images.shape[:2], *size), method)
        outputs = teacher.model(images, params=params, return_dict=True)
        logits = outputs.logits
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    def with_teacher(batch: dict[str, Any], key: jax.Array) -> dict[str, Any]:
        constants = batch[CONSTANTS]
        batch = dict(prepare(batch, key))
        images = jax.lax.stop_gradient(batch["pixel_values"])
        B = images.shape[0]
        if parts == 1 or B % parts:
            logits = logits_of(constants["teacher"], images)
        else:  # as the step divides the batch
            split = images.reshape(B // parts, parts, *images.shape[1:]).swapaxes(0, 1)
            logits = jax.lax.map(lambda part: logits_of(constants["teacher"], part), split)
            logits = logits.swapaxes(0, 1).reshape(B, -1)
        return {**batch, TEACHER: jax.lax.stop_gradient(logits)}

    return with_teacher


def teacher_constants(teacher: Teacher, mesh: Mesh | None = None) -> dict[str, Any]:
    """What `taught` reads of each batch besides images: the teacher's parameters, laid out on the
    devices of a mesh."""
    params = teacher.model.network_params
    if mesh is not None:
        params = jax.device_put(params, tree_shardings(mesh, params))
    return {CONSTANTS: {"teacher": params}}


def distillation(recipe: Recipe, base: Loss) -> Loss:
    """The loss of a student: (1 - alpha) * labels + alpha * teacher.

    The labels teach `cls_logits` and the teacher `distillation_logits` where the student has both
    (a distilled DeiT), as facebookresearch/deit trains it; otherwise both teach `logits`.

    Args:
        recipe: `distillation` "hard" (the cross entropy with the teacher's likeliest class) or
            "soft" (the divergence from its probabilities at a temperature, T^2 * sum / (B * K));
            "none" is "soft". And `distillation_alpha`, `distillation_temperature`.
        base: the loss of labels, on an output's `logits`.

    Raises:
        InputError: alpha is not from 0 to 1, or the temperature not positive.
    """
    alpha, T = recipe.distillation_alpha, recipe.distillation_temperature
    if not 0.0 <= alpha <= 1.0:
        raise InputError(f"`distillation_alpha` must be from 0 to 1; given {alpha!r}.")
    if not 0.0 < T < float("inf"):
        raise InputError(f"`distillation_temperature` must be over 0; given {T!r}.")
    hard = recipe.distillation == "hard"

    def loss(outputs: Any, batch: Batch) -> Total:
        labelled = outputs
        pupil = outputs.logits
        if getattr(outputs, "distillation_logits", None) is not None:
            labelled, pupil = _Labelled(outputs.cls_logits), outputs.distillation_logits
        pupil = pupil.astype(jnp.promote_types(pupil.dtype, jnp.float32))  # (B, K)
        teacher = batch[TEACHER].astype(pupil.dtype)
        if hard:
            chosen = jnp.argmax(teacher, axis=-1)[:, None]
            each = -jnp.take_along_axis(jax.nn.log_softmax(pupil), chosen, axis=-1)[:, 0]
        else:
            wanted, found = jax.nn.log_softmax(teacher / T), jax.nn.log_softmax(pupil / T)
            each = (jnp.exp(wanted) * (wanted - found)).sum(axis=-1) * (T * T / pupil.shape[-1])
        rows = _rows(batch, pupil)
        total = jnp.where(rows == 0, 0.0, rows * each).sum()
        counted = rows.sum()
        of_labels = base(labelled, batch)
        # In units of what the labels are counted by (classes too, or class weights), so that parts
        # of a batch add up.
        unit = of_labels.count / jnp.where(counted > 0, counted, 1.0)
        agree = jnp.argmax(pupil, axis=-1) == jnp.argmax(teacher, axis=-1)
        metrics = {
            **of_labels.metrics,
            "distillation_loss": (total, counted),
            "teacher_agreement": (jnp.where(rows == 0, 0.0, agree).sum(), counted),
        }
        both = (1.0 - alpha) * of_labels.sum + alpha * unit * total
        return Total(both, of_labels.count, metrics)

    return loss


class _Labelled(NamedTuple):
    """The output that labels teach."""

    logits: jax.Array


def _rows(batch: Batch, logits: jax.Array) -> jax.Array:
    """(B,), 1 for a row that counts and 0 for one that does not."""
    rows = jnp.ones(logits.shape[0], logits.dtype)
    if "weights" in batch:
        rows = jnp.asarray(batch["weights"]).astype(logits.dtype)
    labels = jnp.asarray(batch["labels"])
    if labels.ndim == 1 and jnp.issubdtype(labels.dtype, jnp.integer):
        rows = jnp.where(labels == IGNORED, 0.0, rows)
    return rows


def check_classes(student: ViTConfig, teacher: ViTConfig) -> None:
    """Raise InputError unless a teacher has the student's classes, in the same order.

    Warns:
        UserWarning: there are as many, under other names.
    """
    if student.num_labels != teacher.num_labels:
        raise InputError(
            f"the teacher has {teacher.num_labels} classes and the student {student.num_labels}; "
            "wanted a teacher that was trained on the same classes."
        )
    ours, theirs = (_names(config) for config in (student, teacher))
    if ours is None or theirs is None or ours == theirs:
        return
    if sorted(ours) == sorted(theirs):
        first = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if len({*pair}) > 1)
        raise InputError(
            f"the teacher has the student's classes in another order: class {first} is "
            f"{theirs[first]!r} there and {ours[first]!r} here."
        )
    different = [f"{b!r} for {a!r}" for a, b in zip(ours, theirs, strict=True) if a != b]
    warn(
        f"the teacher's classes have other names ({some(different, _SHOWN)}): they are taken to be "
        "the same, in this order."
    )


def _names(config: ViTConfig) -> list[str] | None:
    """The classes' names, in order; None where they have none."""
    names = [str(config.id2label[i]) for i in sorted(config.id2label)]
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names


def _renormalized(
    ours: BaseImageProcessor, theirs: BaseImageProcessor, channels: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(C, 1, 1) factor and offset from the student's pixels to the teacher's; None where they are
    the same."""
    (scale, shift), (their_scale, their_shift) = (
        _normalization(processor.to_dict(), channels) for processor in (ours, theirs)
    )
    factor = their_scale / scale
    offset = their_shift - factor * shift
    if np.allclose(factor, 1.0, rtol=1e-12) and np.allclose(offset, 0.0, atol=1e-12):
        return None, None
    return factor[:, None, None], offset[:, None, None]


def _normalization(options: Mapping[str, Any], channels: int) -> tuple[np.ndarray, np.ndarray]:
    """(C,) scale and shift from 8-bit pixels to those of a processor."""
    scale, shift = np.ones(channels), np.zeros(channels)
    if options.get("do_rescale"):
        scale = scale * options["rescale_factor"]
    if options.get("do_normalize"):
        mean, std = (
            np.broadcast_to(np.asarray(options[name], np.float64), channels)
            for name in ("image_mean", "image_std")
        )
        scale, shift = scale / std, (shift - mean) / std
    return scale, shift
