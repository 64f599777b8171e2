"""Training: one step of gradient descent, as a pure function, with any optimizer of optax."""

from vit_common.datasets import ImageFolder, ImageTable, LabelledImages, open_images
from vit_common.recipes import Recipe, recipe
from vit_flax.training.checkpoints import Checkpoints
from vit_flax.training.distill import Teacher, load_teacher
from vit_flax.training.evaluate import Evaluation, evaluate
from vit_flax.training.fit import Diverged, Run, Stopped, Watcher, fine_tune, make_plan
from vit_flax.training.lora import Lora, load_adapter, lora, save_adapter
from vit_flax.training.losses import (
    balanced_weights,
    binary_cross_entropy,
    check_labels,
    cross_entropy,
    loss_of,
    regression,
)
from vit_flax.training.mixing import mixing
from vit_flax.training.optimizers import explain, make_optimizer, schedule_of, trainable_of
from vit_flax.training.step import Ema, Total, TrainState, ema_of, init_state, make_step
from vit_flax.training.tasks import Task, task_of

__all__ = [
    "Checkpoints",
    "Diverged",
    "Ema",
    "Evaluation",
    "ImageFolder",
    "ImageTable",
    "LabelledImages",
    "Lora",
    "Recipe",
    "Run",
    "Stopped",
    "Task",
    "Teacher",
    "Total",
    "TrainState",
    "Watcher",
    "balanced_weights",
    "binary_cross_entropy",
    "check_labels",
    "cross_entropy",
    "ema_of",
    "evaluate",
    "explain",
    "fine_tune",
    "init_state",
    "load_adapter",
    "load_teacher",
    "lora",
    "loss_of",
    "make_optimizer",
    "make_plan",
    "make_step",
    "mixing",
    "open_images",
    "recipe",
    "regression",
    "save_adapter",
    "schedule_of",
    "task_of",
    "trainable_of",
]
