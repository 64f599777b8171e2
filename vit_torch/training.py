"""The twin trainer: the run of a recipe in PyTorch, with `torch.optim` and a plain loop.

It exists to prove the JAX run: `vit verify MODEL --training STEPS` trains both twins on the same
batches and compares every step (`vit_torch.verify.training`). It is written from the recipe alone
and shares no code with `vit_flax.training`. It has no data loading, augmentation, several devices
or checkpoints; to train in PyTorch, use Transformers' `Trainer` or timm, which accept these models.

    >>> model = ViTForImageClassification.from_pretrained("google/vit-base-patch16-224")
    >>> history = fine_tune(model, batches, recipe("fine-tune", steps=len(batches)))
    >>> history[-1]["loss"]
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vit_common.checks import resolve_problem_type
from vit_common.errors import InputError
from vit_common.parameters import TOP_PARAMETERS
from vit_common.recipes import Recipe
from vit_torch.model import ViTPart

Batch = Mapping[str, Any]

OPTIMIZERS = ("adamw", "sgd", "lion", "lamb", "lars")
"""Optimizers of a recipe that the twin trainer has."""

IGNORED = -100
"""Label of an image that does not count."""

_TOKENS = ("cls_token", "distillation_token", "register_tokens", "mask_token")
_POSITIONS = ("position_embeddings", "relative_position_bias_table", "rope_frequencies")


# -- what is trained, at which rate, with which decay


@dataclass(frozen=True)
class Setting:
    """How one parameter is trained.

    Attributes:
        trained: whether it is trained at all.
        scale: factor of the learning rate.
        decay: its weight decay.
    """

    trained: bool
    scale: float
    decay: float


def settings(recipe: Recipe, model: ViTPart) -> dict[str, Setting]:
    """How each parameter of a model is trained, by name.

    Args:
        recipe: `train`, `layer_decay`, `layer_decay_rule`, `weight_decay` and `no_decay` count.
        model: a model of `vit_torch`.

    Raises:
        InputError: `train` is no regular expression, or matches no parameter.

    Example:
        >>> settings(recipe("fine-tune", layer_decay=0.75), model)["vit.layernorm.weight"]
        Setting(trained=True, scale=1.0, decay=0.0)
    """
    prefix = f"{model.config.base_model_prefix}."
    last = model.config.num_hidden_layers + 1
    trained = _trained(recipe.train, [name for name, _ in model.named_parameters()])
    table = {}
    for name, parameter in model.named_parameters():
        bare = name.removeprefix(prefix)
        depth = _depth(bare, last, recipe.layer_decay_rule)
        scale = 1.0 if recipe.layer_decay is None else recipe.layer_decay ** (last - depth)
        spared = _spared(bare, parameter.ndim, recipe.no_decay)
        table[name] = Setting(name in trained, scale, 0.0 if spared else recipe.weight_decay)
    return table


def _trained(train: str, names: list[str]) -> set[str]:
    if train == "all":
        return set(names)
    if train == "head":
        return {name for name in names if name.startswith(TOP_PARAMETERS)}
    chosen = set()
    for pattern in filter(None, (text.strip() for text in train.split(","))):
        try:
            found = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            message = f"`train`: {pattern!r} is not a regular expression: {error}."
            raise InputError(message) from error
        if not found:
            raise InputError(f"`train`: no parameter matches {pattern!r}; one is {names[0]}.")
        chosen |= found
    return chosen


def _depth(bare: str, last: int, rule: str) -> int:
    """0 for the embeddings, i + 1 for block i, `last` for what stands behind the blocks."""
    if block := re.match(r"encoder\.layer\.(\d+)\.", bare):
        return int(block[1]) + 1
    if bare.startswith(("embeddings.", "pre_layernorm.")):
        return 0
    if bare.startswith("encoder."):  # a table of position biases that all blocks share
        return last if rule == "mae" else 0
    if bare.startswith("layernorm.") and rule == "timm":
        return last - 1
    return last


def _spared(bare: str, ndim: int, rule: str) -> bool:
    """Whether a parameter has no weight decay."""
    leaf = bare.rpartition(".")[2]
    if rule == "none":
        return False
    if rule == "transformers":
        return "bias" in bare or "layernorm" in bare
    if rule == "kernels":
        return leaf != "weight" or ndim < 2
    return ndim <= 1 or leaf in (*_TOKENS, *_POSITIONS)


# -- the learning rate


def schedule_of(recipe: Recipe, steps: int) -> Callable[[int], float]:
    """The learning rate of each step, counted from 0.

    Args:
        recipe: the warm-up lasts `warmup_steps`, or `warmup_epochs / epochs` of the steps.
        steps: number of updates of the whole run.

    Raises:
        InputError: no steps, or the warm-up is not shorter than the run.

    Example:
        >>> rate = schedule_of(recipe("fine-tune", learning_rate=1.0, warmup_steps=2), 10)
        >>> [rate(0), rate(1), rate(2)]
        [0.0, 0.5, 1.0]
    """
    if steps < 1:
        raise InputError(f"a run must have at least one step; given {steps}.")
    peak, start, end = (
        recipe.learning_rate,
        recipe.warmup_learning_rate,
        recipe.final_learning_rate,
    )
    if recipe.scale_by_batch is not None:
        peak = peak * recipe.batch_size / recipe.scale_by_batch
    warmup: float | None = recipe.warmup_steps
    if warmup is None:
        warmup = round(steps * recipe.warmup_epochs / recipe.epochs)
    if warmup and warmup >= steps:
        raise InputError(
            f"the warm-up must be shorter than the run; given {warmup} of {steps} steps. Set "
            "`warmup_steps` or `warmup_epochs`."
        )
    length: float = steps
    per_epoch = steps / recipe.epochs
    if recipe.schedule_by == "epoch":
        warmup, length = warmup / per_epoch, recipe.epochs

    def rate(step: int) -> float:
        at: float = min(step, steps - 1)
        if recipe.schedule_by == "epoch":
            at = math.floor(at / per_epoch + 1e-9)
        if at < warmup:
            return start + (peak - start) * at / warmup
        if recipe.schedule == "constant":
            return peak
        done = warmup if recipe.warmup_prefix else 0
        share = min((at - done) / (length - done), 1.0)
        if recipe.schedule == "linear":
            return peak + (end - peak) * share
        return end + (peak - end) * 0.5 * (1.0 + math.cos(math.pi * share))

    return rate


# -- the optimizer


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2), which `torch.optim` lacks.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: of the update, and of the momentum.
        weight_decay: decoupled, multiplied by the learning rate.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                momentum = state.setdefault("exp_avg", torch.zeros_like(parameter))
                update = torch.sign(b1 * momentum + (1 - b1) * parameter.grad)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update, alpha=group["lr"])
                momentum.mul_(b2).add_(parameter.grad, alpha=1 - b2)


class LAMB(torch.optim.Optimizer):
    """LAMB (You et al. 2019, arXiv:1904.00962): Adam's direction and the weight decay, scaled to
    the norm of each parameter; without weight decay it is Adam, as in timm.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decays of the moments.
        eps: added to the root of the second moment.
        weight_decay: part of the update that is scaled.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                first = state.setdefault("exp_avg", torch.zeros_like(parameter))
                second = state.setdefault("exp_avg_sq", torch.zeros_like(parameter))
                state["step"] = n = state.get("step", 0) + 1
                first.mul_(b1).add_(parameter.grad, alpha=1 - b1)
                second.mul_(b2).addcmul_(parameter.grad, parameter.grad, value=1 - b2)
                root = (second / (1 - b2**n)).sqrt() + group["eps"]
                update = first / (1 - b1**n) / root
                if group["weight_decay"]:
                    update = update + group["weight_decay"] * parameter
                    update = update * _trust(parameter, update)
                parameter.sub_(update, alpha=group["lr"])


class LARS(torch.optim.Optimizer):
    """LARS (You et al. 2017, arXiv:1708.03888) as MAE has it (util/lars.py): the gradient and the
    weight decay of matrices, scaled to their norm, go into the momentum; vectors have plain SGD.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        momentum: share of the momentum that stays at each step.
        weight_decay: part of the update that is scaled.
        trust: update's norm over the parameter's.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad + group["weight_decay"] * parameter
                if parameter.ndim > 1:
                    update = update * _trust(parameter, update, group["trust"])
                state = self.state[parameter]
                momentum = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
                momentum.mul_(group["momentum"]).add_(update)
                parameter.sub_(momentum, alpha=group["lr"])


def _trust(parameter: torch.Tensor, update: torch.Tensor, trust: float = 1.0) -> float:
    """What an update is multiplied by to have `trust` times the parameter's norm; 1 where one of
    them is zero."""
    norms = float(parameter.norm()), float(update.norm())
    return trust * norms[0] / norms[1] if all(norms) else 1.0


class SGD(torch.optim.SGD):
    """`torch.optim.SGD` with decoupled weight decay: a group's "decay", times its learning rate."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and group.get("decay"):
                    parameter.mul_(1 - group["lr"] * group["decay"])
        return super().step(closure)


def make_optimizer(recipe: Recipe, model: ViTPart) -> torch.optim.Optimizer:
    """The optimizer of a recipe over a model's parameters; those it does not train stop requiring
    gradients.

    Args:
        recipe: the settings; the learning rate of each step is set by the loop, from
            `schedule_of(recipe, steps)(step) * group["scale"]`.
        model: a model of `vit_torch`.

    Returns:
        An optimizer of `torch.optim`, or one of those above, with one group for each learning rate
        and decay.

    Raises:
        InputError: the twin trainer does not have that optimizer, or that dtype of momentum.
    """
    if recipe.optimizer not in OPTIMIZERS:
        raise InputError(
            f"the twin trainer has the optimizers {', '.join(OPTIMIZERS)}; the recipe wants "
            f"{recipe.optimizer}."
        )
    if recipe.momentum_dtype != "float32":
        raise InputError(
            "the twin trainer keeps momentum in the dtype of the parameters; the recipe wants "
            f"{recipe.momentum_dtype}. Set momentum_dtype to 'float32'."
        )
    groups = list(parameter_groups(recipe, model))
    lr, betas = recipe.learning_rate, (recipe.b1, recipe.b2)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr, betas=betas, eps=recipe.eps)
    if recipe.optimizer == "lion":
        return Lion(groups, lr, betas=betas)
    if recipe.optimizer == "lamb":
        return LAMB(groups, lr, betas=betas, eps=recipe.eps)
    if recipe.optimizer == "lars":
        return LARS(groups, lr, momentum=recipe.momentum)
    for group in groups:
        group["decay"] = group.pop("weight_decay")
    return SGD(groups, lr, momentum=recipe.momentum, nesterov=recipe.nesterov)


def parameter_groups(recipe: Recipe, model: ViTPart) -> Iterator[dict[str, Any]]:
    """The groups of an optimizer: parameters of one learning rate and weight decay.

    Returns:
        Dicts with "params", "names", "scale" (factor of the learning rate) and "weight_decay".
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    table, parameters = settings(recipe, model), dict(model.named_parameters())
    for name, setting in table.items():
        parameters[name].requires_grad_(setting.trained)
        if setting.trained:
            key = setting.scale, setting.decay
            fresh = {"params": [], "names": [], "scale": key[0], "weight_decay": key[1]}
            group = groups.setdefault(key, fresh)
            group["params"].append(parameters[name])
            group["names"].append(name)
    yield from groups.values()


# -- the loss


def example_losses(
    recipe: Recipe,
    outputs: Any,
    batch: Batch,
    problem_type: str | None,
    label_smoothing: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each image, and which images count.

    Args:
        recipe: `loss` and `label_smoothing` count.
        outputs: a model's output with `logits` (B, K).
        batch: "labels": (B,) class indices, of which -100 does not count; (B, K) probabilities, or
            0 and 1 for several labels; numbers for a regression. "weights" (B,), if there: 0 for a
            row that does not count.
        problem_type: as in Transformers' configurations.
        label_smoothing: in place of the recipe's.

    Returns:
        Losses (B,) and weights (B,).
    """
    logits, labels = outputs.logits, batch["labels"]
    weights = batch.get("weights")
    weights = torch.ones(len(logits)) if weights is None else torch.as_tensor(weights)
    weights = weights.to(logits)
    if problem_type == "regression":
        labels = labels.to(logits).reshape(logits.shape)
        return F.mse_loss(logits, labels, reduction="none").mean(dim=-1), weights
    if problem_type == "multi_label_classification":
        losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none")
        return losses.mean(dim=-1), weights
    if labels.ndim == 1:
        weights = weights * (labels != IGNORED)
        labels = F.one_hot(labels.clamp(min=0), logits.shape[-1])
    K = logits.shape[-1]
    share = recipe.label_smoothing if label_smoothing is None else label_smoothing
    targets = (1.0 - share) * labels.to(logits) + share / K
    if recipe.loss == "bce":
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return losses.mean(dim=-1), weights
    return -(targets * F.log_softmax(logits, dim=-1)).sum(dim=-1), weights


# -- the run


class Average:
    """A running average of a model's parameters.

    Args:
        parameters: what is averaged, by name; the average begins there.
        decay: share of the old average that is kept.
        rule: "plain" or "warmup" (min(decay, 1 - (1 + t) ** (-2 / 3)) at update t, from 0).

    Attributes:
        values: the average, by name.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float, rule: str = "plain"
    ) -> None:
        self.parameters = dict(parameters)
        self.decay, self.rule, self.updates = decay, rule, 0
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters."""
        decay = self.decay
        if self.rule == "warmup":
            decay = min(decay, 1.0 - (1.0 + self.updates) ** (-2.0 / 3.0))
        self.updates += 1
        for name, value in self.values.items():
            value.lerp_(self.parameters[name].detach(), 1.0 - decay)


class Trainer:
    """One run: a model, its optimizer, and the number of updates so far.

    Args:
        model: a model of `vit_torch` with a head; trained in place, in its own dtype.
        recipe: the settings. What decides the batches (augmentation, mixing) does not count here.
        steps: number of updates of the whole run.

    Attributes:
        model, recipe, steps: as given.
        optimizer: the optimizer.
        average: the running average, or None.
        step_number: updates so far.

    Raises:
        InputError: the recipe has an optimizer that the twin trainer lacks.

    Example:
        >>> trainer = Trainer(model, recipe("fine-tune"), steps=100)
        >>> trainer.step({"pixel_values": images, "labels": labels})["loss"]
    """

    def __init__(self, model: ViTPart, recipe: Recipe, steps: int) -> None:
        self.model, self.recipe, self.steps = model, recipe, steps
        self.problem_type = None
        if getattr(model, "head", None) in ("classifier", "teacher"):
            self.problem_type = resolve_problem_type(model.config, True)
        self.optimizer = self.make_optimizer()
        self.rate = schedule_of(recipe, steps)
        self.average: Average | None = None
        if recipe.ema is not None:
            self.average = self.make_average(recipe.ema)
        self.step_number = 0

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer."""
        return make_optimizer(self.recipe, self.model)

    def make_average(self, decay: float) -> Average:
        """The running average of the parameters that are trained."""
        return Average(self.trained(), decay, self.recipe.ema_rule)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.rate(step)

    def losses(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses (B,) and weights (B,) of images; see `example_losses`."""
        return example_losses(self.recipe, outputs, batch, self.problem_type)

    def step(self, batch: Batch) -> dict[str, float]:
        """One update; none where the loss or a gradient is not finite, or no image counts.

        Args:
            batch: "pixel_values" (B, C, H, W), and "labels" and "weights" as in `example_losses`;
                numpy arrays or tensors. A head with a loss of its own (masked patches) takes the
                other names as its arguments.

        Returns:
            "loss", "gradient_norm" (of all gradients together, before clipping) and
            "learning_rate".
        """
        self.optimizer.zero_grad(set_to_none=True)
        batch = as_tensors(batch, self.model)
        loss = self.backward(batch)
        self.fill_gradients()
        norm = self.clip()
        rate = self.learning_rate(self.step_number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        if math.isfinite(loss) and math.isfinite(norm) and self.counted(batch):
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
        self.step_number += 1
        return {"loss": loss, "gradient_norm": norm, "learning_rate": rate}

    def backward(self, batch: dict[str, Any]) -> float:
        """The batch's loss; leaves its gradients in the parameters. The losses of all parts are
        added up, and divided by what counts in the whole batch."""
        parts = list(split(batch, self.recipe.accumulate))
        self.model.train()
        if self.problem_type is None:  # the head's own loss is a mean already
            total = 0.0
            for part in parts:
                loss = self.model(**part, return_dict=True).loss / len(parts)
                loss.backward()
                total += loss.item()
            return total
        inputs = [{"pixel_values": part["pixel_values"], "return_dict": True} for part in parts]
        counted = max(self.counted(batch), 1e-300)
        total = 0.0
        for part, given in zip(parts, inputs, strict=True):
            losses, weights = self.losses(self.model(**given), part)
            loss = (losses * weights).sum() / counted
            loss.backward()
            total += loss.item()
        return total

    def counted(self, batch: Batch) -> float:
        """How many images of a batch count."""
        if self.problem_type is None:
            return len(batch["pixel_values"])
        labels = batch["labels"]
        weights = batch.get("weights")
        weights = torch.ones(len(labels)) if weights is None else weights
        if self.problem_type == "single_label_classification" and labels.ndim == 1:
            weights = weights * (labels != IGNORED)
        return float(weights.sum())

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of all that is trained."""
        for group in self.optimizer.param_groups:
            yield from zip(group["names"], group["params"], strict=True)

    def fill_gradients(self) -> None:
        """Give zeros to parameters that the loss does not depend on, which `torch.optim` would
        leave out: their moments and weight decay go on."""
        for _, parameter in self.trained():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def clip(self) -> float:
        """Scale the gradients to the recipe's largest norm; returns the norm before."""
        gradients = [p.grad for _, p in self.trained() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
        most = self.recipe.clip
        if most is not None:
            low = 1e-6 if self.recipe.clip_rule == "torch" else 0.0
            scale = most / (norm + low)
            if scale < 1.0:
                for gradient in gradients:
                    gradient.mul_(scale)
        return float(norm)


def fine_tune(
    model: ViTPart, batches: Iterable[Batch], recipe: Recipe, *, steps: int | None = None
) -> list[dict[str, float]]:
    """Train a model on batches, one update for each.

    Args:
        model: a model of `vit_torch` with a head; trained in place.
        batches: as `Trainer.step` takes them.
        recipe: the settings.
        steps: number of updates that the schedule is made for; the recipe's, or the number of
            batches, if not given.

    Returns:
        "loss", "gradient_norm" and "learning_rate" of each step.

    Raises:
        InputError: there is no batch, or the recipe has what the twin trainer lacks.
    """
    batches = list(batches)
    if not batches:
        raise InputError("`batches` must hold at least one batch; given none.")
    trainer = Trainer(model, recipe, steps or recipe.steps or len(batches))
    return [trainer.step(batch) for batch in batches]


def as_tensors(batch: Batch, model: ViTPart) -> dict[str, Any]:
    """A batch as tensors on the model's device, floating ones in its dtype."""
    parameter = next(model.parameters())
    found = {}
    for name, value in batch.items():
        value = torch.as_tensor(np.asarray(value) if not torch.is_tensor(value) else value)
        dtype = parameter.dtype if value.is_floating_point() else value.dtype
        found[name] = value.to(parameter.device, dtype)
    return found


def split(batch: Batch, parts: int) -> Iterator[dict[str, Any]]:
    """The batch in equal parts; a part is every `parts`-th row.

    Raises:
        InputError: they would not be equal.
    """
    size = len(batch["pixel_values"])
    if size % parts:
        raise InputError(f"a batch of {size} images cannot be run in {parts} equal parts.")
    for i in range(parts):
        yield {name: value[i::parts] for name, value in batch.items()}
