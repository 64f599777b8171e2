"""Recipes: the settings of a training run under one name each, with their source.

A `Recipe` holds every setting that decides the numbers of a run. Where one name has several
definitions in use (weight decay "on matrices", layer-wise decay, an average of the parameters),
the definition is a field of its own and names who uses it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from vit_common.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run. All are keyword arguments of `recipe`.

    Attributes:
        name: of the recipe that this began as.
        source: where the settings are published.
        reaches: what they are published to reach.
        task: what is learnt: "classify", "mim" (masked patches, SimMIM) or "distill".
        epochs: passes over the training images.
        steps: updates; if given, it counts instead of `epochs`.
        batch_size: images in one update, over all devices and accumulated parts.
        accumulate: parts that a batch is run in, one after the other.
        image_size: side of the images, or (height, width); None is the model's own.
        optimizer: "adamw", "sgd", "lion" or "muon".
        learning_rate: at its highest.
        scale_by_batch: batch size that `learning_rate` is meant for: it is multiplied by
            batch_size / scale_by_batch. None leaves it as it is.
        weight_decay: decoupled, and multiplied by the learning rate (AdamW's).
        no_decay: what is spared: "timm" (norms, biases and all other vectors, tokens, positions),
            "transformers" (biases and norms; tokens and positions decay), "kernels" (all but
            matrices and convolutions), "none" (nothing is spared).
        momentum, nesterov: of SGD.
        b1, b2, eps: of AdamW, Lion and Muon.
        momentum_dtype: dtype of SGD's momentum and of AdamW's first moment.
        clip: largest norm of all gradients together; None does not clip.
        clip_rule: "exact" scales by clip / norm (optax, big_vision); "torch" by
            clip / (norm + 1e-6), as `torch.nn.utils.clip_grad_norm_` does.
        layer_decay: factor of the learning rate from one block to the block below it; None is 1.
        layer_decay_rule: "mae" (MAE, BEiT: the final norm has the full rate) or "timm" (it has the
            rate of the last block).
        schedule: "cosine", "linear" or "constant" after the warm-up.
        warmup_epochs, warmup_steps: length of the linear warm-up; steps count if given.
        warmup_learning_rate: learning rate that the warm-up begins with.
        warmup_prefix: whether the schedule begins after the warm-up; if not (timm's default), it
            has run down by the length of the warm-up when that ends.
        schedule_by: "step", or "epoch": the learning rate changes between epochs only (timm).
        final_learning_rate: learning rate that the schedule ends with.
        loss: "cross_entropy", or "bce" (each class by itself, as DeiT III trains).
        label_smoothing: share of each label that is spread over all classes.
        mixup, cutmix: the alpha of each; 0 is off.
        mixup_prob: probability that a batch is mixed at all.
        mixup_switch_prob: probability of cutmix where both are on.
        crop_scale, crop_ratio: area and aspect of the random crop; None resizes without a crop.
        flip: probability of a horizontal flip.
        color_jitter: strength of the change of brightness, contrast and saturation.
        auto_augment: timm's name ("rand-m9-mstd0.5-inc1"), "3a" (DeiT III's 3-Augment) or None.
        erasing: probability of random erasing.
        repeats: times that each image of an epoch is in a batch (repeated augmentation).
        interpolation: "bilinear", "bicubic" or "random", of the crop's resize.
        drop_path: rate of stochastic depth at the last block; None is the model's own.
        dropout: rate in the residual branches; None is the model's own.
        ema: decay of the running average of the parameters; None keeps none.
        ema_rule: "plain" (DeiT) or "warmup" (timm: min(decay, 1 - (1 + t) ** (-2 / 3))).
        train: "all", "head", or regular expressions of canonical parameter names, separated by
            commas.
        freeze: regular expressions of names of parameters that do not train, whatever `train` says,
            separated by commas.
        head: first values of a new head: "zero" or "normal".
        class_weights: "none", "balanced" (each class by n / (K * its images)), or "sampling"
            (each class drawn as often as every other).
        patience: epochs without a better validation result before the run stops; None runs on.
        metric: of the validation, decides which checkpoint is best; "" is the task's usual one.
        mask_ratio, mask_patch_size: of masked patches; the size is in pixels.
        distillation: "none", "soft" or "hard" (of the distillation token).
        distillation_alpha, distillation_temperature: weight of the teacher, and its temperature.
        lora: rank of adapters on the query and value layers; 0 trains the layers themselves.
        lora_alpha: None is the rank.
        lora_targets: layers with adapters, by Transformers' names, separated by commas.
    """

    name: str = "fine-tune"
    source: str = ""
    reaches: str = ""
    task: Literal["classify", "mim", "distill"] = "classify"
    epochs: float = 10
    steps: int | None = None
    batch_size: int = 32
    accumulate: int = 1
    image_size: int | tuple[int, int] | None = None
    optimizer: Literal["adamw", "sgd", "lion", "muon"] = "adamw"
    learning_rate: float = 3e-4
    scale_by_batch: int | None = None
    weight_decay: float = 0.05
    no_decay: Literal["timm", "transformers", "kernels", "none"] = "timm"
    momentum: float = 0.9
    nesterov: bool = False
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    clip: float | None = 1.0
    clip_rule: Literal["exact", "torch"] = "exact"
    layer_decay: float | None = None
    layer_decay_rule: Literal["mae", "timm"] = "mae"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_epochs: float = 0.5
    warmup_steps: int | None = None
    warmup_learning_rate: float = 0.0
    final_learning_rate: float = 0.0
    warmup_prefix: bool = True
    schedule_by: Literal["step", "epoch"] = "step"
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    crop_scale: tuple[float, float] | None = (0.35, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    erasing: float = 0.0
    repeats: int = 1
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    drop_path: float | None = None
    dropout: float | None = None
    ema: float | None = None
    ema_rule: Literal["plain", "warmup"] = "plain"
    train: str = "all"
    freeze: str = ""
    head: Literal["zero", "normal"] = "zero"
    class_weights: Literal["none", "balanced", "sampling"] = "none"
    patience: int | None = None
    metric: str = ""
    mask_ratio: float = 0.6
    mask_patch_size: int = 32
    distillation: Literal["none", "soft", "hard"] = "none"
    distillation_alpha: float = 0.5
    distillation_temperature: float = 3.0
    lora: int = 0
    lora_alpha: float | None = None
    lora_targets: str = "query,value"

    def replace(self, **settings: Any) -> Recipe:
        """The same with other settings.

        Raises:
            InputError: no such setting.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in settings:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
                hint = f" Did you mean {close[0]}?" if close else ""
                raise InputError(
                    f"a recipe has no setting {name!r}.{hint} Wanted one of {', '.join(known)}."
                )
        return dataclasses.replace(self, **settings)

    def to_dict(self) -> dict[str, Any]:
        """All settings, as JSON can hold them."""
        return dataclasses.asdict(self)


RECIPES: Mapping[str, Recipe] = MappingProxyType({"fine-tune": Recipe()})
"""All recipes by name."""


def recipe(name: str = "fine-tune", **settings: Any) -> Recipe:
    """A recipe by its name, with settings changed.

    Raises:
        InputError: no such recipe or setting.

    Example:
        >>> recipe("fine-tune", epochs=5, image_size=384).epochs
        5
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.6)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise InputError(f"no recipe {name!r}.{hint} Wanted one of {', '.join(RECIPES)}.")
    return RECIPES[name].replace(**settings)


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
