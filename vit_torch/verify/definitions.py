"""What training code defines differently under one name, and a twin trainer that can take each.

A run that drifts from another differs in one of these, more often than not. `alternatives` lists
the changes to try: settings of the recipe, and definitions that a recipe leaves no room for.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from vit_common.errors import InputError
from vit_common.recipes import SHORT_NAMES, Recipe, parse_settings
from vit_torch.training import (
    Average,
    Batch,
    Trainer,
    example_losses,
    make_optimizer,
    parameter_groups,
    split,
)


@dataclass(frozen=True)
class Definitions:
    """Definitions beside a recipe. The defaults are those of both trainers here.

    Attributes:
        schedule_offset: steps that the schedule is read ahead (1: no step has the rate of step 0).
        schedule_dtype: dtype that the learning rates are rounded to; optax's warm-up computes in
            float32.
        eps_root: added to Adam's second moment inside the root (optax's `eps_root`); `eps` then
            counts as 0.
        bias_correction: whether Adam's moments are corrected for their start at zero.
        coupled_decay: weight decay as a part of the gradient (L2), as in `torch.optim.Adam`.
        decay_rate: what weight decay is multiplied by: the "layer" learning rate, that of the
            "schedule" without layer-wise decay, or "nothing".
        dampening: share of a gradient that SGD's momentum leaves out.
        smoothing: classes that label smoothing spreads over: "all" (torch, optax, timm), or the
            "others" (big_vision).
        accumulation: a batch in parts is the "sum" over its images divided by how many count, or
            the "mean" of the parts' means.
        unused: parameters without a gradient "decay" (optax), or torch.optim's "skip".
        average: the running average is taken "after" an update or "before" it.
    """

    schedule_offset: int = 0
    schedule_dtype: Literal["float64", "float32"] = "float64"
    eps_root: float = 0.0
    bias_correction: bool = True
    coupled_decay: bool = False
    decay_rate: Literal["layer", "schedule", "nothing"] = "layer"
    dampening: float = 0.0
    smoothing: Literal["all", "others"] = "all"
    accumulation: Literal["sum", "mean"] = "sum"
    unused: Literal["decay", "skip"] = "decay"
    average: Literal["after", "before"] = "after"


DEFINITIONS = {field.name: field for field in dataclasses.fields(Definitions)}
_CHOICES = {
    "schedule_dtype": ("float64", "float32"),
    "decay_rate": ("layer", "schedule", "nothing"),
    "smoothing": ("all", "others"),
    "accumulation": ("sum", "mean"),
    "unused": ("decay", "skip"),
    "average": ("after", "before"),
}


def _check(name: str, value: Any) -> None:
    """Raise InputError unless a definition can have that value."""
    default = DEFINITIONS[name].default
    if name in _CHOICES:
        good, wanted = value in _CHOICES[name], f"one of {', '.join(_CHOICES[name])}"
    elif isinstance(default, bool):
        good, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        good, wanted = isinstance(value, int) and not isinstance(value, bool), "an integer"
    else:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        good, wanted = is_number and value >= 0, "a number, 0 or more"
    if not good:
        raise InputError(f"{name} must be {wanted}; given {value!r}.")


@dataclass(frozen=True)
class Setup:
    """A recipe and definitions: all that decides the numbers of a run.

    Attributes:
        recipe: the settings.
        definitions: what the recipe leaves open.
    """

    recipe: Recipe
    definitions: Definitions = dataclasses.field(default_factory=Definitions)

    def change(self, **changes: Any) -> Setup:
        """The same with other settings or definitions.

        Raises:
            InputError: there is no such name, or no such choice.
        """
        ours = {name: value for name, value in changes.items() if name in DEFINITIONS}
        for name, value in ours.items():
            _check(name, value)
        theirs = {name: value for name, value in changes.items() if name not in DEFINITIONS}
        for name in theirs:
            if name not in _SETTINGS:
                raise _unknown(name)
        return Setup(self.recipe.replace(**theirs), dataclasses.replace(self.definitions, **ours))


_SETTINGS = {field.name for field in dataclasses.fields(Recipe)}


def _unknown(name: str) -> InputError:
    close = difflib.get_close_matches(name, [*DEFINITIONS, *_SETTINGS], 1, 0.6)
    hint = f" Did you mean {close[0]}?" if close else ""
    return InputError(f"{name!r} is neither a setting of a recipe nor a definition.{hint}")


def parse_changes(texts: Iterable[str]) -> dict[str, Any]:
    """Settings and definitions from texts such as "lr=0.01" or "schedule_offset=1".

    Raises:
        InputError: not NAME=VALUE, no such name, or a value that it cannot have.

    Example:
        >>> parse_changes(["clip_rule=torch", "schedule_offset=1"])
        {'clip_rule': 'torch', 'schedule_offset': 1}
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name):
            raise InputError(
                f"a change must be NAME=VALUE, such as clip_rule=torch; given {text!r}."
            )
        if name in DEFINITIONS:
            try:
                found[name] = json.loads(value.lower() if value in ("True", "False") else value)
            except ValueError:
                found[name] = value
            _check(name, found[name])
        elif name in _SETTINGS or name in SHORT_NAMES:
            found |= parse_settings([text])
        else:
            raise _unknown(name)
    return found


# -- a trainer for each of them


class VariantAdam(torch.optim.Optimizer):
    """AdamW in the definitions that `torch.optim` does not have; see `Definitions`."""

    def __init__(self, params: Any, recipe: Recipe, definitions: Definitions) -> None:
        super().__init__(params, {"lr": recipe.learning_rate})
        self.recipe, self.definitions = recipe, definitions

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        b1, b2, root = self.recipe.b1, self.recipe.b2, self.definitions.eps_root
        eps = 0.0 if root else self.recipe.eps
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 1 - b1)
                state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                first, second = state["exp_avg"], state["exp_avg_sq"]
                if self.definitions.bias_correction:
                    first = first / (1 - b1 ** state["step"])
                    second = second / (1 - b2 ** state["step"])
                p.sub_(first / ((second + root).sqrt() + eps), alpha=group["lr"])


class VariantAverage(Average):
    """A running average that is taken of the parameters before their update."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.before = {name: value.clone() for name, value in self.values.items()}

    def update(self) -> None:
        now, self.parameters = self.parameters, self.before  # type: ignore[assignment]
        super().update()
        self.parameters = now
        self.before = {name: p.detach().clone() for name, p in now.items()}


class Variant(Trainer):
    """The twin trainer with other definitions.

    Args:
        model: as in `Trainer`.
        setup: the recipe and the definitions.
        steps: number of updates of the whole run.
    """

    def __init__(self, model: Any, setup: Setup, steps: int) -> None:
        self.definitions = setup.definitions
        super().__init__(model, setup.recipe, steps)

    @property
    def _decays_by_hand(self) -> bool:
        return self.definitions.coupled_decay or self.definitions.decay_rate != "layer"

    def make_optimizer(self) -> torch.optim.Optimizer:
        recipe, definitions = self.recipe, self.definitions
        optimizer = make_optimizer(recipe, self.model)
        if recipe.optimizer == "adamw" and (
            definitions.eps_root or not definitions.bias_correction
        ):
            groups = list(parameter_groups(recipe, self.model))
            optimizer = VariantAdam(groups, recipe, definitions)
            for group in optimizer.param_groups:
                group["decay"] = group.pop("weight_decay")
        for group in optimizer.param_groups:
            if definitions.dampening and "dampening" in group:
                group["dampening"] = definitions.dampening
            if self._decays_by_hand and not isinstance(optimizer, VariantAdam):
                name = "decay" if "decay" in group else "weight_decay"
                group["by hand"], group[name] = group[name], 0.0
        return optimizer

    def make_average(self, decay: float) -> Average:
        kind = VariantAverage if self.definitions.average == "before" else Average
        return kind(self.trained(), decay, self.recipe.ema_rule)

    def learning_rate(self, step: int) -> float:
        rate = self.rate(max(step + self.definitions.schedule_offset, 0))
        if self.definitions.schedule_dtype == "float64":
            return rate
        with np.errstate(over="ignore"):
            return float(np.float32(rate))

    def losses(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if self.definitions.smoothing == "all" or batch["labels"].ndim != 1:
            return super().losses(outputs, batch)
        # share / (K - 1) on the other classes is share * K / (K - 1) spread over all.
        K = outputs.logits.shape[-1]
        share = self.recipe.label_smoothing * K / max(K - 1, 1)
        return example_losses(self.recipe, outputs, batch, self.problem_type, share)

    def backward(self, batch: dict[str, Any]) -> float:
        if self.definitions.accumulation == "sum" or self.problem_type is None:
            return super().backward(batch)
        recipe, parts = self.recipe, self.recipe.accumulate
        total = 0.0
        self.recipe = recipe.replace(accumulate=1)
        try:
            for part in split(batch, parts):
                total += super().backward(part)
        finally:
            self.recipe = recipe
        for _, parameter in self.trained():
            if parameter.grad is not None:
                parameter.grad /= parts
        return total / parts

    def fill_gradients(self) -> None:
        if self.definitions.unused == "decay":
            super().fill_gradients()

    def clip(self) -> float:
        norm = super().clip()
        rate = self.learning_rate(self.step_number)
        for group in self.optimizer.param_groups:
            decay = group.get("by hand", group.get("decay", 0.0))
            if "by hand" not in group and not isinstance(self.optimizer, VariantAdam):
                continue
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                with torch.no_grad():
                    if self.definitions.coupled_decay:
                        parameter.grad.add_(parameter, alpha=decay)
                    else:
                        scales = {"layer": rate * group["scale"], "schedule": rate, "nothing": 1.0}
                        parameter.mul_(1 - scales[self.definitions.decay_rate] * decay)
        return norm


# -- what to try


def alternatives(setup: Setup) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what is changed, the changes as `Setup.change` takes them) for each definition known to
    differ between libraries, the commonest first."""
    now = {**setup.recipe.to_dict(), **dataclasses.asdict(setup.definitions)}
    for text, changes in _changes(setup.recipe, setup.definitions):
        if any(now[name] != value for name, value in changes.items()):
            named = ", ".join(f"{name} = {value!r}" for name, value in changes.items())
            yield f"{text} ({named})", changes


def _changes(r: Recipe, d: Definitions) -> Iterator[tuple[str, dict[str, Any]]]:
    if r.clip is None:
        yield "gradients clipped at norm 1", {"clip": 1.0}
    else:
        yield (
            "a clipping epsilon of 1e-6, as in torch's clip_grad_norm_",
            {"clip_rule": "torch"},
        )
        yield "a clipping epsilon of 0, as in optax", {"clip_rule": "exact"}
        yield "gradients that are not clipped", {"clip": None}
    yield "a schedule one step ahead", {"schedule_offset": d.schedule_offset + 1}
    yield "a schedule one step behind", {"schedule_offset": d.schedule_offset - 1}
    yield "no weight decay", {"weight_decay": 0.0}
    yield "the weight decay of optax.adamw's default", {"weight_decay": 1e-4}
    yield "the weight decay of torch.optim.AdamW's default", {"weight_decay": 1e-2}
    yield "the weight decay of most recipes", {"weight_decay": 5e-2}
    if r.weight_decay:
        yield from _decays()
    if r.optimizer == "adamw":
        yield from _adam(r)
    if r.optimizer == "sgd":
        yield from _sgd(r)
    if r.ema is not None:
        yield "a running average with timm's warm-up", {"ema_rule": "warmup"}
        yield "a running average without a warm-up", {"ema_rule": "plain"}
        yield "a running average taken before the update", {"average": "before"}
        yield "a running average taken after the update", {"average": "after"}
    if r.label_smoothing:
        yield "label smoothing spread over the other classes", {"smoothing": "others"}
        yield "label smoothing spread over all classes", {"smoothing": "all"}
        yield "no label smoothing", {"label_smoothing": 0.0}
    else:
        yield "label smoothing", {"label_smoothing": 0.1}
    if r.layer_decay is not None:
        yield "the last block's learning rate for the final norm", {"layer_decay_rule": "timm"}
        yield "the head's learning rate for the final norm", {"layer_decay_rule": "mae"}
        yield "no layer-wise decay of the learning rate", {"layer_decay": None}
    if r.accumulate > 1:
        yield "the mean of the parts' means as a batch's loss", {"accumulation": "mean"}
        yield "the mean over all images that count as a batch's loss", {"accumulation": "sum"}
    yield "learning rates rounded to float32", {"schedule_dtype": "float32"}
    yield "learning rates in float64", {"schedule_dtype": "float64"}
    for name in ("cosine", "linear", "constant"):
        yield f"a {name} schedule", {"schedule": name}
    yield "no warm-up", {"warmup_steps": 0}
    yield "a schedule that ends at 0", {"final_learning_rate": 0.0}
    yield "parameters without a gradient left alone, as in torch.optim", {"unused": "skip"}
    yield "parameters without a gradient decayed, as in optax", {"unused": "decay"}
    if r.train != "all":
        yield "every parameter trained", {"train": "all"}
    if r.scale_by_batch is not None:
        yield "a learning rate not scaled by the batch size", {"scale_by_batch": None}


def _decays() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "weight decay added to the gradient, as in torch.optim.Adam", {"coupled_decay": True}
    yield "weight decay apart from the gradient, as in AdamW", {"coupled_decay": False}
    for rule, text in {
        "timm": "no weight decay of vectors, tokens and positions",
        "transformers": "weight decay of tokens and positions too",
        "kernels": "weight decay of matrices and convolutions only",
        "none": "weight decay of every parameter",
    }.items():
        yield text, {"no_decay": rule}
    for rate, text in {
        "layer": "weight decay multiplied by the parameter's own learning rate",
        "schedule": "weight decay multiplied by the learning rate before layer-wise decay",
        "nothing": "weight decay multiplied by no learning rate",
    }.items():
        yield text, {"decay_rate": rate}


def _adam(r: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "Adam's epsilon inside the root, optax's eps_root", {"eps_root": r.eps**2}
    yield "Adam's epsilon outside the root", {"eps_root": 0.0}
    for eps in (1e-8, 1e-7, 1e-6):
        yield "another epsilon of Adam", {"eps": eps}
    yield "moments without bias correction", {"bias_correction": False}
    yield "moments with bias correction", {"bias_correction": True}
    for b2 in (0.999, 0.99, 0.98, 0.95):
        yield "another decay of the second moment", {"b2": b2}


def _sgd(r: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "Nesterov's momentum", {"nesterov": True}
    yield "momentum that is not Nesterov's", {"nesterov": False}
    yield "momentum that averages the gradients", {"dampening": r.momentum}
    yield "momentum that adds up the gradients", {"dampening": 0.0}
    for momentum in (0.9, 0.0):
        yield "another momentum", {"momentum": momentum}
