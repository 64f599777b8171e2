"""Recipes: the settings of a training run under one name each, with their source.

A `Recipe` holds every setting that decides the numbers of a run. Where one name has several
definitions in use (weight decay "on matrices", layer-wise decay, an average of the parameters),
the definition is a field of its own and names who uses it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from vit_common.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run, checked when it is made. All are keyword arguments of `recipe`.

    Raises:
        InputError: a setting is of the wrong type, out of range, or does not go with another.

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
        optimizer: "adamw", "sgd", "lion", "muon", "lamb" (DeiT III) or "lars" (MAE's linear probe).
        learning_rate: at its highest.
        scale_by_batch: batch size that `learning_rate` is meant for: it is multiplied by
            batch_size / scale_by_batch. None leaves it as it is.
        weight_decay: decoupled, and multiplied by the learning rate (AdamW's).
        no_decay: what is spared: "timm" (norms, biases and all other vectors, tokens, positions),
            "transformers" (biases and norms; tokens and positions decay), "kernels" (all but
            matrices and convolutions), "none" (nothing is spared).
        momentum, nesterov: of SGD; Muon and LARS have the momentum.
        b1, b2, eps: of AdamW, LAMB, Lion and Muon.
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
        affine: the most that an image is turned by (degrees), shifted by (share of its sides),
            scaled by (share) and sheared by (degrees), each in both directions; None leaves it.
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
        standardize: whether a head that trains alone sees inputs of mean 0 and deviation 1 over the
            training images; both are folded into the head in the end.
        pooling: what a new head looks at: "cls", "mean", "cls_mean" (both joined), or "" for what
            the model's configuration says.
        class_weights: "none", "balanced" (each class by n / (K * its images)), or "sampling"
            (each class drawn as often as every other).
        patience: epochs without a better validation result before the run stops; None runs on.
        metric: of the validation, decides which checkpoint is best; "" is the task's usual one.
        mask_ratio, mask_patch_size: of masked patches; the size is in pixels.
        distillation: "none", "soft" or "hard" (of the distillation token).
        distillation_alpha, distillation_temperature: weight of the teacher, and its temperature.
        lora: rank of adapters on some layers; 0 trains the layers themselves.
        lora_alpha: adapters are multiplied by it / the rank; None is twice the rank.
        lora_targets: layers with adapters, by Transformers' names, separated by commas; "mlp" is
            both layers of each MLP, "all-linear" every dense layer.
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
    optimizer: Literal["adamw", "sgd", "lion", "muon", "lamb", "lars"] = "adamw"
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
    affine: tuple[float, float, float, float] | None = None
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
    standardize: bool = False
    pooling: Literal["", "cls", "mean", "cls_mean"] = ""
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
    lora_targets: str = "query,value,mlp"

    def __post_init__(self) -> None:
        for name, kind in _kinds().items():
            value = _fitting(kind, getattr(self, name))
            if value is _NO:
                raise InputError(
                    f"recipe: `{name}` must be {_wanted(kind)}; given {getattr(self, name)!r}."
                )
            object.__setattr__(self, name, value)
        for name, (low, high, wanted) in _RANGES.items():
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not low <= number <= high:
                    raise InputError(f"recipe: `{name}` must be {wanted}; given {value!r}.")
        for name in ("crop_scale", "crop_ratio"):
            pair = getattr(self, name)
            if pair is not None and pair[0] > pair[1]:
                raise InputError(f"recipe: `{name}` must be (lowest, highest); given {pair}.")
        if self.batch_size % self.accumulate:
            raise InputError(
                f"recipe: `batch_size` must be a multiple of `accumulate`; given {self.batch_size} "
                f"and {self.accumulate}."
            )
        warmup, whole, unit = self.warmup_epochs, self.epochs, "epochs"
        if self.warmup_steps is not None:
            warmup, whole, unit = self.warmup_steps, self.steps or math.inf, "steps"
        if warmup and warmup >= whole:
            raise InputError(
                f"recipe: the warm-up must be shorter than the run; given {warmup:g} of {whole:g} "
                f"{unit}. Set `warmup_{unit}`."
            )

    def replace(self, **settings: Any) -> Recipe:
        """The same with other settings.

        A run of another length keeps the share of its warm-up, unless that is given too; and one
        whose `epochs` are given no longer counts by the `steps` of the recipe.

        Raises:
            InputError: no such setting, or a value that it cannot have.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in settings:
            if name not in known:
                raise _no_setting(name)
        changed = dict(settings)
        if settings.get("epochs") is not None and "steps" not in settings:
            changed["steps"] = None
        if not {"warmup_steps", "warmup_epochs"} & set(settings):
            changed |= self._same_warmup(changed)
        elif settings.get("warmup_epochs") is not None:
            changed.setdefault("warmup_steps", None)
        return dataclasses.replace(self, **changed)

    def _same_warmup(self, changed: Mapping[str, Any]) -> dict[str, Any]:
        """The warm-up of a run of another length, if it had one of known share."""
        epochs, steps = changed.get("epochs", self.epochs), changed.get("steps", self.steps)
        good = [
            isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
            for value in (epochs, steps if steps is not None else 1)
        ]
        if not all(good):
            return {}  # refused by the checks
        if self.steps and self.warmup_steps is not None:
            share = self.warmup_steps / self.steps
            if steps is None:
                return {"warmup_steps": None, "warmup_epochs": share * epochs}
            return {"warmup_steps": round(share * steps)}
        return {"warmup_epochs": self.warmup_epochs / self.epochs * epochs}

    def is_usual(self, setting: str) -> bool:
        """Whether a setting is that of the recipe of this name. Such a one may be left out where
        it does not fit the model or the data; what a user set may not."""
        began = RECIPES.get(self.name)
        return began is not None and getattr(self, setting) == getattr(began, setting)

    def to_dict(self) -> dict[str, Any]:
        """All settings, as JSON can hold them."""
        return dataclasses.asdict(self)


# -- checks

_NO = object()
_SHARE = (0.0, 1.0, "from 0 to 1")
_BELOW_ONE = (0.0, math.nextafter(1.0, 0.0), "0 or more and less than 1")
_ABOVE_ZERO = (math.ulp(0.0), math.nextafter(math.inf, 0.0), "more than 0 (and finite)")
_NOT_NEGATIVE = (0.0, math.nextafter(math.inf, 0.0), "0 or more (and finite)")
_AT_LEAST_ONE = (1, math.nextafter(math.inf, 0.0), "at least 1")

# setting -> lowest, highest, in words; None passes where the type allows it
_RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(
        ("epochs", "scale_by_batch", "learning_rate", "eps", "clip", "distillation_temperature"),
        _ABOVE_ZERO,
    ),
    **dict.fromkeys(("lora_alpha", "crop_ratio"), _ABOVE_ZERO),
    **dict.fromkeys(
        ("steps", "batch_size", "accumulate", "image_size", "repeats", "patience"), _AT_LEAST_ONE
    ),
    "mask_patch_size": _AT_LEAST_ONE,
    **dict.fromkeys(
        ("weight_decay", "warmup_epochs", "warmup_steps", "warmup_learning_rate", "mixup"),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(("final_learning_rate", "cutmix", "color_jitter", "lora"), _NOT_NEGATIVE),
    "affine": _NOT_NEGATIVE,
    **dict.fromkeys(
        ("momentum", "b1", "b2", "label_smoothing", "drop_path", "dropout"), _BELOW_ONE
    ),
    **dict.fromkeys(("mixup_prob", "mixup_switch_prob", "flip", "erasing"), _SHARE),
    **dict.fromkeys(("distillation_alpha", "ema"), _SHARE),
    "layer_decay": (math.ulp(0.0), 1.0, "more than 0, and at most 1"),
    "crop_scale": (math.ulp(0.0), 1.0, "areas of more than 0, and at most 1"),
    "mask_ratio": (math.ulp(0.0), math.nextafter(1.0, 0.0), "more than 0 and less than 1"),
}


@functools.cache
def _kinds() -> dict[str, Any]:
    """Type of each setting."""
    return typing.get_type_hints(Recipe)


def _options(kind: Any) -> tuple[Any, ...]:
    """The types that a type allows: those of a union, or itself."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if union else (kind,)


def _fitting(kind: Any, value: Any) -> Any:
    """A value as a setting of that type holds it, or `_NO`."""
    for option in _options(kind):
        origin = typing.get_origin(option)
        if origin is Literal:
            if value in typing.get_args(option):
                return value
        elif origin is tuple:
            wanted = typing.get_args(option)
            if isinstance(value, tuple | list) and len(value) == len(wanted):
                parts = [_fitting(*pair) for pair in zip(wanted, value, strict=True)]
                if _NO not in parts:
                    return tuple(parts)
        elif option is float:
            number = isinstance(value, int | float | np.integer | np.floating)
            if number and not isinstance(value, bool) and not math.isnan(value):
                return float(value)
        elif option is int:
            if isinstance(value, int | np.integer) and not isinstance(value, bool):
                return int(value)
        elif isinstance(value, option):
            return value
    return _NO


def _wanted(kind: Any) -> str:
    """A type in words."""
    words = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}
    found = []
    for option in _options(kind):
        if typing.get_origin(option) is Literal:
            found += [repr(name) for name in typing.get_args(option)]
        elif typing.get_origin(option) is tuple:
            count = len(typing.get_args(option))
            found.append("a pair of numbers" if count == 2 else f"{count} numbers")
        else:
            found.append("none" if option is type(None) else words[option])
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def _no_setting(name: str) -> InputError:
    known = [each for each in _kinds() if each not in ("name", "source", "reaches")]
    if name in SHORT_NAMES:
        return InputError(f"a recipe has no setting {name!r}; it is {SHORT_NAMES[name]} here.")
    return InputError(
        f"a recipe has no setting {name!r}.{_nearest(name, known)} Wanted one of "
        f"{', '.join(known)}."
    )


SHORT_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "lr": "learning_rate",
        "wd": "weight_decay",
        "batch": "batch_size",
        "size": "image_size",
        "smoothing": "label_smoothing",
        "warmup": "warmup_epochs",
        "rand_augment": "auto_augment",
        "min_lr": "final_learning_rate",
        "warmup_lr": "warmup_learning_rate",
    }
)
"""Short names of settings, for the command line."""


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """Settings from texts such as "lr=0.01", "crop_scale=0.08,1" or "clip=none".

    Raises:
        InputError: not NAME=VALUE, no such setting, a setting twice, or a value of another type.

    Example:
        >>> parse_settings(["lr=0.01", "layer_decay=0.75", "image_size=384"])
        {'learning_rate': 0.01, 'layer_decay': 0.75, 'image_size': 384}
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise InputError(f"a setting must be NAME=VALUE, such as lr=0.01; given {text!r}.")
        name = SHORT_NAMES.get(name, name)
        if name not in _kinds():
            raise _no_setting(name)
        if name in found:
            raise InputError(f"the setting {name} is given twice.")
        found[name] = _parsed(_kinds()[name], value.strip())
        if found[name] is _NO:
            raise InputError(f"{name} must be {_wanted(_kinds()[name])}; given {value.strip()!r}.")
    return found


def _parsed(kind: Any, text: str) -> Any:
    """A value from its text, or `_NO`."""
    for option in _options(kind):
        origin = typing.get_origin(option)
        if option is type(None):
            if text.lower() in ("none", "null", "off"):
                return None
        elif origin is Literal:
            if text in typing.get_args(option):
                return text
        elif origin is tuple:
            parts = text.strip("()[]").replace("x", ",").split(",")
            wanted = typing.get_args(option)
            if len(parts) == len(wanted):
                values = [
                    _parsed(*pair) for pair in zip(wanted, map(str.strip, parts), strict=True)
                ]
                if _NO not in values:
                    return tuple(values)
        elif option is bool:
            if text.lower() in ("true", "yes", "1", "false", "no", "0"):
                return text.lower() in ("true", "yes", "1")
        elif option is str:
            if text.lower() not in ("none", "null") or type(None) not in _options(kind):
                return text
        else:
            try:
                number = option(text)
            except ValueError:
                continue
            if not math.isnan(number):
                return number
    return _NO


# -- the recipes

_RANDAUGMENT: dict[str, Any] = {"auto_augment": "rand-m9-mstd0.5-inc1", "crop_scale": (0.08, 1.0)}
_MIXING: dict[str, Any] = {"mixup": 0.8, "cutmix": 1.0}
_GOOGLE: dict[str, Any] = {
    "optimizer": "sgd",
    "momentum": 0.9,
    "momentum_dtype": "bfloat16",
    "clip": 1.0,
    "weight_decay": 0.0,
    "no_decay": "none",
    "schedule": "cosine",
    "batch_size": 512,
    "image_size": 384,
    "crop_scale": (0.05, 1.0),
    "interpolation": "bilinear",
    "label_smoothing": 0.0,
}
_PLAIN: dict[str, Any] = {"crop_scale": None, "flip": 0.0, "label_smoothing": 0.0}

_ALL = (
    # For a pretrained network and a few hundred images or more: the blocks next to the head learn
    # at the full rate, those next to the pixels at a fortieth of it (12 blocks).
    Recipe(name="fine-tune", learning_rate=5e-4, layer_decay=0.75, warmup_learning_rate=1e-6),
    Recipe(
        name="scratch",
        epochs=100,
        batch_size=128,
        learning_rate=1e-3,
        warmup_epochs=5,
        warmup_learning_rate=1e-6,
        crop_scale=(0.08, 1.0),
        auto_augment="rand-m9-mstd0.5-inc1",
        drop_path=0.1,
        head="normal",
    ),
    # As "LoRA Without Regret" (Schulman et al. 2025, thinkingmachines.ai) and Biderman et al. 2024
    # (arXiv:2405.09673) advise: on the MLPs too, where most of what is learnt goes, at several
    # times the rate of a full fine-tuning; alpha twice the rank.
    Recipe(
        name="adapter",
        learning_rate=2e-3,
        warmup_learning_rate=1e-6,
        weight_decay=0.0,
        lora=8,
        metric="log_loss",  # as Transformers' Trainer chooses; of few images it is less of luck
    ),
    Recipe(
        name="head",
        epochs=100,
        learning_rate=3e-4,
        warmup_epochs=1,
        crop_scale=None,
        train="head",
        weight_decay=5.0,
        standardize=True,
        pooling="cls_mean",
        metric="log_loss",  # which of a hundred epochs has most right is mostly luck
    ),
    Recipe(
        name="vit-paper",
        source="https://github.com/google-research/vision_transformer, configs/common.py",
        reaches="B/16 of ImageNet-21k at 384 pixels: CIFAR-10 98.59 % after 500 steps, 98.86 % "
        "after 1,000 and 99.02 % after 10,000; CIFAR-100 92.06 %; ImageNet 84.53 %",
        learning_rate=0.03,
        steps=10_000,
        warmup_steps=500,
        accumulate=8,
        **_GOOGLE,
    ),
    Recipe(
        name="augreg",
        source="https://github.com/google-research/big_vision, configs/transfer.py",
        reaches="B/32 of ImageNet-21k at 384 pixels, means of 5 runs: ImageNet 83.27 % (learning "
        "rate 0.03, 20,000 steps), CIFAR-100 91.35 % (0.01), CIFAR-10 98.55 % (0.003)",
        learning_rate=0.01,
        steps=10_000,
        warmup_steps=500,
        **_GOOGLE,
    ),
    Recipe(
        name="few-shot",
        source="https://github.com/google-research/big_vision, configs/transfer.py, data sets of a "
        "few thousand images",
        reaches="B/32 of ImageNet-21k at 384 pixels, means of 5 runs: Oxford-IIIT Pet 93.78 %, "
        "Oxford Flowers 99.43 %",
        learning_rate=0.003,
        steps=500,
        warmup_steps=100,
        **_GOOGLE,
    ),
    Recipe(
        name="deit",
        source="https://github.com/facebookresearch/deit, main.py; arXiv:2012.12877, table 9",
        reaches="ImageNet from nothing at 224 pixels: Ti 72.2 %, S 79.9 %, B 81.8 %; distilled "
        "74.5 %, 81.2 % and 83.4 %",
        epochs=300,
        batch_size=1024,
        image_size=224,
        learning_rate=5e-4,
        scale_by_batch=512,
        weight_decay=0.05,
        clip=None,
        warmup_epochs=5,
        warmup_learning_rate=1e-6,
        final_learning_rate=1e-5,
        warmup_prefix=False,
        schedule_by="epoch",
        erasing=0.25,
        repeats=3,
        drop_path=0.1,
        ema=0.99996,
        head="normal",
        **_RANDAUGMENT,
        **_MIXING,
    ),
    Recipe(
        name="deit3",
        source="https://github.com/facebookresearch/deit, README_revenge.md (ViT-S on "
        "ImageNet-1k); arXiv:2204.07118",
        reaches="ImageNet from nothing at 224 pixels: S 81.4 %; with more drop path, and trained "
        "at 192 pixels, B 83.8 % and L 84.9 %",
        epochs=800,
        batch_size=2048,
        image_size=224,
        optimizer="lamb",
        learning_rate=4e-3,
        weight_decay=0.05,
        clip=1.0,  # inside apex's FusedLAMB
        warmup_epochs=5,
        warmup_learning_rate=1e-6,
        final_learning_rate=1e-5,
        warmup_prefix=False,
        schedule_by="epoch",
        loss="bce",
        label_smoothing=0.0,
        auto_augment="3a",
        color_jitter=0.3,
        crop_scale=(0.08, 1.0),
        repeats=3,
        drop_path=0.05,
        ema=0.99996,
        head="normal",
        **_MIXING,
    ),
    Recipe(
        name="mae-finetune",
        source="https://github.com/facebookresearch/mae, FINETUNE.md (ViT-B)",
        reaches="ImageNet at 224 pixels from MAE: B 83.66 % (4 seeds: 83.63, 83.66, 83.52, 83.46); "
        "L 85.95 % and H 86.93 % (learning rate 1e-3, layer decay 0.75, 50 epochs)",
        epochs=100,
        batch_size=1024,
        image_size=224,
        learning_rate=5e-4,
        scale_by_batch=256,
        weight_decay=0.05,
        clip=None,
        layer_decay=0.65,
        layer_decay_rule="mae",
        warmup_epochs=5,
        final_learning_rate=1e-6,
        erasing=0.25,
        drop_path=0.1,
        head="normal",
        **_RANDAUGMENT,
        **_MIXING,
    ),
    Recipe(
        name="beit",
        source="https://github.com/microsoft/unilm, beit/get_started_for_image_classification.md "
        "(BEiT-B after ImageNet-22k)",
        reaches="ImageNet from ImageNet-22k: B at 384 pixels 86.82 %; L (layer decay 0.9, drop "
        "path 0.4) at 224 pixels 87.40 %",
        epochs=30,
        batch_size=512,
        learning_rate=2e-5,
        weight_decay=1e-8,
        clip=None,
        layer_decay=0.85,
        layer_decay_rule="mae",
        warmup_epochs=5,
        warmup_learning_rate=1e-6,
        final_learning_rate=1e-6,
        erasing=0.25,
        drop_path=0.1,
        head="normal",
        **_RANDAUGMENT,
    ),
    Recipe(
        name="simmim",
        source="https://github.com/microsoft/SimMIM, configs/vit_base__800ep (the authors divide "
        "the learning rate by 10 after 700 of the 800 epochs; here it stays)",
        reaches="ImageNet at 224 pixels after fine-tuning: B 83.8 %",
        task="mim",
        epochs=800,
        batch_size=2048,
        image_size=224,
        learning_rate=1e-4,
        scale_by_batch=512,
        weight_decay=0.05,
        clip=5.0,
        schedule="constant",
        warmup_epochs=10,
        warmup_learning_rate=5e-7,
        crop_scale=(0.67, 1.0),
        label_smoothing=0.0,
        drop_path=0.1,
        mask_ratio=0.6,
        mask_patch_size=32,
    ),
    Recipe(
        name="linear-probe",
        source="https://github.com/facebookresearch/dino, eval_linear.py (MAE's differs: LARS, "
        "0.1 x batch / 256, and batch normalisation before the head)",
        epochs=100,
        batch_size=1024,
        optimizer="sgd",
        learning_rate=1e-3,
        scale_by_batch=256,
        weight_decay=0.0,
        no_decay="none",
        clip=None,
        warmup_epochs=0,
        schedule_by="epoch",
        train="head",
        head="normal",
        label_smoothing=0.0,
        crop_scale=(0.08, 1.0),
        interpolation="bilinear",
    ),
    Recipe(
        name="lora",
        source="https://github.com/huggingface/peft, examples/image_classification",
        epochs=5,
        batch_size=512,
        learning_rate=5e-3,
        weight_decay=0.0,
        no_decay="transformers",
        clip_rule="torch",
        schedule="linear",
        warmup_epochs=0,
        label_smoothing=0.0,
        crop_scale=(0.08, 1.0),
        interpolation="bilinear",
        lora=16,
        lora_alpha=16,
        lora_targets="query,value",
        head="normal",
    ),
    Recipe(
        name="hf",
        source="https://huggingface.co/docs/transformers/main_classes/trainer, defaults of "
        "TrainingArguments in 4.57.6",
        epochs=3,
        batch_size=8,
        learning_rate=5e-5,
        weight_decay=0.0,
        no_decay="transformers",
        clip=1.0,
        clip_rule="torch",
        schedule="linear",
        warmup_epochs=0,
        head="normal",
        **_PLAIN,
    ),
    Recipe(
        name="digits",
        source="scikit-learn's handwritten digits, from nothing",
        epochs=100,
        batch_size=32,
        learning_rate=3e-3,
        weight_decay=0.05,
        warmup_epochs=10,
        crop_scale=None,
        flip=0.0,
        affine=(10.0, 0.0875, 0.1, 6.0),
        head="normal",
    ),
)

RECIPES: Mapping[str, Recipe] = MappingProxyType({each.name: each for each in _ALL})
"""All recipes by name."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {"vit": "vit-paper", "mae": "mae-finetune", "probe": "linear-probe"}
)
"""Other names of recipes."""


def recipe(name: str = "fine-tune", **settings: Any) -> Recipe:
    """A recipe by its name, with settings changed.

    A run of another length keeps the share of its warm-up, unless that is given too.

    Raises:
        InputError: no such recipe or setting, or a value that a setting cannot have.

    Example:
        >>> recipe("fine-tune", epochs=5, image_size=384).epochs
        5.0
    """
    known = ALIASES.get(name, name) if isinstance(name, str) else name
    if known not in RECIPES:
        raise InputError(
            f"no recipe {name!r}.{_nearest(str(name), [*RECIPES, *ALIASES])} Wanted one of "
            f"{', '.join(RECIPES)}."
        )
    return RECIPES[known].replace(**settings)


# -- the learning rate
