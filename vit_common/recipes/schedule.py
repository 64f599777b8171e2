"""The learning rate of each step, by a recipe."""

from __future__ import annotations

import math

import numpy as np

from vit_common.errors import InputError
from vit_common.recipes.recipe import Recipe


def peak_learning_rate(recipe: Recipe) -> float:
    """The learning rate at its highest, scaled by the batch size if the recipe asks for it."""
    if recipe.scale_by_batch is None:
        return recipe.learning_rate
    return recipe.learning_rate * recipe.batch_size / recipe.scale_by_batch


def learning_rates(recipe: Recipe, steps: int) -> np.ndarray:
    """The learning rate of each step of a run, (steps,) in float64.

    Only the peak is scaled by the batch size; the first and last rates are as given. Without
    `warmup_steps`, the warm-up is `warmup_epochs / epochs` of the steps.

    Raises:
        InputError: no steps, or the warm-up is not shorter than the run.

    Example:
        >>> learning_rates(recipe("fine-tune", learning_rate=0.1), steps=100)[-1]
    """
    if steps < 1:
        raise InputError(f"a run must have at least one step; given {steps}.")
    peak, first, last = (
        peak_learning_rate(recipe),
        recipe.warmup_learning_rate,
        recipe.final_learning_rate,
    )
    warmup = recipe.warmup_steps
    if warmup is None:
        warmup = round(steps * recipe.warmup_epochs / recipe.epochs)
    if warmup and warmup >= steps:
        raise InputError(
            f"the warm-up must be shorter than the run; given {warmup} of {steps} steps. Set "
            "`warmup_steps` or `warmup_epochs`."
        )
    at, length, before = np.arange(steps, dtype=np.float64), float(steps), float(warmup)
    if recipe.schedule_by == "epoch":
        at = np.floor(at * (recipe.epochs / steps) + 1e-9)
        length, before = float(recipe.epochs), warmup * recipe.epochs / steps
    start = before if recipe.warmup_prefix else 0.0
    share = np.clip((at - start) / max(length - start, 1e-300), 0.0, 1.0)
    if recipe.schedule == "cosine":
        rates = last + (peak - last) * 0.5 * (1.0 + np.cos(math.pi * share))
    elif recipe.schedule == "linear":
        rates = peak + (last - peak) * share
    else:
        rates = np.full(steps, peak)
    if before:
        rates = np.where(at < before, first + (peak - first) * at / before, rates)
    return rates
