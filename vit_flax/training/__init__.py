"""Training: one step of gradient descent, as a pure function, with any optimizer of optax."""

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

__all__ = [
    "Ema",
    "Lora",
    "Total",
    "TrainState",
    "balanced_weights",
    "binary_cross_entropy",
    "check_labels",
    "cross_entropy",
    "ema_of",
    "explain",
    "init_state",
    "load_adapter",
    "lora",
    "loss_of",
    "make_optimizer",
    "make_step",
    "mixing",
    "regression",
    "save_adapter",
    "schedule_of",
    "trainable_of",
]
