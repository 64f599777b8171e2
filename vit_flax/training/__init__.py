"""Training: fine-tuning, from the command's one call down to a pure step for a loop of your own.

>>> from vit_flax.training import ImageFolder, fine_tune, recipe
>>> run = fine_tune("google/vit-base-patch16-224-in21k", ImageFolder("photos"), output="run")
"""

from vit_common.datasets import ImageFolder, ImageTable, LabelledImages, open_images, split
from vit_common.recipes import RECIPES, Recipe, learning_rates, parse_settings, recipe
from vit_flax.training.checkpoints import Checkpoints
from vit_flax.training.evaluate import Evaluation, evaluate
from vit_flax.training.fit import Diverged, Run, Stopped, Watcher, fine_tune, make_plan
from vit_flax.training.loader import Loader, evaluation_batches
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
from vit_flax.training.probe import Features, Probe, probe
from vit_flax.training.step import Ema, Total, TrainState, ema_of, init_state, make_step
from vit_flax.training.tasks import Task, task_of
from vit_flax.training.tasks.distill import Teacher, distillation, load_teacher
from vit_flax.training.tasks.masked import masking, reconstruction

__all__ = [
    "RECIPES",
    "Checkpoints",
    "Diverged",
    "Ema",
    "Evaluation",
    "Features",
    "ImageFolder",
    "ImageTable",
    "LabelledImages",
    "Loader",
    "Lora",
    "Probe",
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
    "distillation",
    "ema_of",
    "evaluate",
    "evaluation_batches",
    "explain",
    "fine_tune",
    "init_state",
    "learning_rates",
    "load_adapter",
    "load_teacher",
    "lora",
    "loss_of",
    "make_optimizer",
    "make_plan",
    "make_step",
    "masking",
    "mixing",
    "open_images",
    "parse_settings",
    "probe",
    "recipe",
    "reconstruction",
    "regression",
    "save_adapter",
    "schedule_of",
    "split",
    "task_of",
    "trainable_of",
]
