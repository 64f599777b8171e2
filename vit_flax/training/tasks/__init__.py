"""What a run trains: the model, its loss, and what happens to a batch inside the step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from vit_common.config import ViTConfig
from vit_common.errors import InputError, shown
from vit_common.images.predictions import default_image_processor
from vit_common.images.processor import BaseImageProcessor
from vit_common.recipes import Recipe
from vit_flax.training.losses import loss_of
from vit_flax.training.mixing import mixing
from vit_flax.training.step import Loss, Prepare
from vit_flax.training.tasks.distill import (
    Teacher,
    distillation,
    load_teacher,
    taught,
    teacher_constants,
)
from vit_flax.training.tasks.masked import masking, reconstruction, visual_tokens

__all__ = ["Task", "task_of"]


class Task(NamedTuple):
    """What `make_step` takes of a recipe's task.

    Attributes:
        model: what the step runs.
        loss: from its output and a batch to a `Total`.
        prepare: (batch, key) -> batch, inside the step; None leaves the batch.
        constants: further entries of every batch: `step(state, {**batch, **task.constants})`.
    """

    model: Any
    loss: Loss
    prepare: Prepare | None
    constants: Mapping[str, Any] = {}


def task_of(
    recipe: Recipe,
    model: Any,
    teacher: Any = None,
    *,
    processor: BaseImageProcessor | None = None,
    class_weights: Sequence[float] | np.ndarray | None = None,
    tokens: bool = False,
    mesh: Mesh | None = None,
) -> Task:
    """The task of a recipe.

    Args:
        recipe: its `task`: "classify" (labels), "mim" (hidden patches: see
            `vit_flax.training.tasks.masked`) or "distill" (labels and a teacher: see
            `vit_flax.training.tasks.distill`); and what belongs to each.
        model: a model of this package with the head that the task needs.
        teacher: of "distill": a name, a `Teacher`, or a model of this package with its Hub's
            preprocessing.
        processor: prepares the student's images; its mean and standard deviation are applied inside
            the step. None means the Hub's defaults for a ViT.
        class_weights: (K,), of the labels' loss.
        tokens: whether a batch's "labels" are visual tokens (B, N), which BEiT predicts.
        mesh: devices that a teacher's parameters are laid out on.

    Raises:
        InputError: the model has another head, a setting is out of range, the teacher is missing
            or has other classes.

    Example:
        >>> task = task_of(recipe("fine-tune"), model, processor=processor)
        >>> step = make_step(task.model, task.loss, optimizer, prepare=task.prepare)
        >>> state, metrics = step(state, {**batch, **task.constants})
    """
    config: ViTConfig = model.config
    processor = default_image_processor(config) if processor is None else processor
    if teacher is not None and recipe.task != "distill":
        raise InputError(
            f"a teacher was given, and the task is {recipe.task!r}; wanted the task 'distill'."
        )
    if recipe.task == "mim":
        return _masked(recipe, model, processor, tokens)
    if recipe.task not in ("classify", "distill"):
        raise InputError(
            f"`task` must be 'classify', 'mim' or 'distill'; given {shown(recipe.task)}."
        )
    if model.head not in ("classifier", "teacher"):
        raise InputError(
            f"the task {recipe.task!r} needs a classifier; {type(model).__name__} has none."
        )
    prepare = _mixing(recipe, config.num_labels, processor)
    loss = loss_of(recipe, config, class_weights)
    if recipe.task == "classify":
        return Task(model, loss, prepare)
    if teacher is None:
        raise InputError(
            "the task 'distill' needs a teacher: any classifier that this package loads. Pass "
            "`teacher=` (in a command, --teacher)."
        )
    if isinstance(teacher, (str, os.PathLike)):
        teacher = load_teacher(teacher)
    elif not isinstance(teacher, Teacher):
        teacher = Teacher(teacher, default_image_processor(teacher.config))
    return Task(
        model,
        distillation(recipe, loss),
        taught(recipe, teacher, model, processor, prepare),
        teacher_constants(teacher, mesh),
    )


def _masked(recipe: Recipe, model: Any, processor: BaseImageProcessor, tokens: bool) -> Task:
    config = model.config
    if model.head == "tokens" and not tokens:
        raise InputError(
            f"{type(model).__name__} predicts visual tokens, and images have none; wanted "
            "FlaxViTForMaskedImageModeling or FlaxDeiTForMaskedImageModeling, which draw pixels. "
            "(For visual tokens as labels, pass `tokens=True` to `task_of`.)"
        )
    if model.head != ("tokens" if tokens else "decoder"):
        raise InputError(
            f"the task 'mim' needs a decoder of pixels; {type(model).__name__} has none. Wanted "
            "FlaxViTForMaskedImageModeling or FlaxDeiTForMaskedImageModeling."
        )
    # What is hidden is drawn again: images that are mixed or erased would be drawn so.
    plain = recipe.replace(mixup=0.0, cutmix=0.0, erasing=0.0)
    prepare = masking(recipe, config, _mixing(plain, None, processor))
    return Task(model, visual_tokens() if tokens else reconstruction(config), prepare)


def _mixing(recipe: Recipe, num_labels: int | None, processor: BaseImageProcessor) -> Prepare:
    """`mixing` with the last steps of a processor, rescaling and normalising."""
    options = processor.to_dict()
    normalizes = options.get("do_normalize")
    return mixing(
        recipe,
        num_labels,
        options["image_mean"] if normalizes else None,
        options["image_std"] if normalizes else None,
        options["rescale_factor"] if options.get("do_rescale") else None,
    )
