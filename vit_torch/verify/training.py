"""The same training run in both twins, compared step by step: `vit verify MODEL --training STEPS`.

Both begin with the same weights and see the same batches; JAX trains with optax
(`vit_flax.training`), PyTorch with `torch.optim` (`vit_torch.training`). Augmentation, mixing,
dropout and stochastic depth are off, so that nothing is drawn. Where the two drift apart, the
PyTorch run is repeated under each of the definitions of `vit_torch.verify.definitions`, to find
the one that the drift comes from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vit_common.errors import InputError
from vit_common.recipes import Recipe
from vit_common.versions import versions
from vit_torch.pretrained import to_numpy
from vit_torch.training import OPTIMIZERS, schedule_of, split
from vit_torch.verify.bounds import BOUNDS
from vit_torch.verify.definitions import Setup, Variant, alternatives
from vit_torch.verify.diagnose import Cause
from vit_torch.verify.parity import Stage
from vit_torch.verify.pixels import model_inputs
from vit_torch.verify.results import Checked, Row, Verification
from vit_torch.verify.run import PACKAGES, places
from vit_torch.verify.subject import Subject

TRAINING_DTYPES = ("float64", "float32")
EXAMPLES = 10
"""Batches' worth of different images; a run goes through them again and again."""

_MOMENTS = {"mu": "first moment", "nu": "second moment", "trace": "momentum"}
_TORCH_MOMENTS = {
    "exp_avg": "first moment",
    "exp_avg_sq": "second moment",
    "momentum_buffer": "momentum",
}
_ORDER = ("learning rate", "loss", "gradient norm", *_MOMENTS.values(), "parameter", "average")
_SMALL = 1_000_000
"""Parameters up to which PyTorch has one thread: several would wait for each other."""
_AFTER = 3
"""Steps behind the first drift that a definition is tried for."""
_FIRST = 50
"""Steps in float32 whose losses are held where the optimizer lets rounding grow."""
_FACTOR = 20.0
"""A definition has a part in a drift if the drift is this many times smaller with it."""

State = dict[str, dict[str, np.ndarray]]
"""Arrays of a run by kind ("parameter", "first moment", "average" ...) and canonical name."""


@dataclass
class TrainingRow(Row):
    """One comparison of two runs. Its stages are the learning rate, the loss, the gradients' norm,
    each moment, each parameter and each average, with the largest difference over all steps; the
    first number of `stage.where` is the step, counted from 0.

    Attributes:
        steps: updates.
        optimizer: name of the optimizer.
        losses: losses of the Flax and of the PyTorch run.
        drift: largest difference of each kind at each step.
        drifts_from: the first step with a difference over its bound, or None.
        drifts_first: the stage that is over its bound there, or None.
    """

    steps: int = 0
    optimizer: str = ""
    losses: tuple[list[float], list[float]] = ((), ())  # type: ignore[assignment]
    drift: dict[str, list[float]] = field(default_factory=dict)
    drifts_from: int | None = None
    drifts_first: str | None = None

    @property
    def first_over(self) -> Checked | None:
        """The stage that drifts first, or None."""
        return next((c for c in self.stages if c.stage.name == self.drifts_first), None)

    @property
    def agreeing(self) -> list[Cause]:
        """The causes with which the drift vanishes; a few at most."""
        over = self.first_over
        bound = 0.0 if over is None else over.bound
        return [cause for cause in self.causes or () if cause.after <= bound][:3]


# -- what both runs see


def quiet(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe without what is drawn or stays outside the comparison, and remarks on that.

    Raises:
        InputError: it has an optimizer, or adapters, that the PyTorch twin lacks.
    """
    if recipe.optimizer not in OPTIMIZERS:
        raise InputError(
            f"the PyTorch twin trains with {', '.join(OPTIMIZERS)}; the recipe has "
            f"{recipe.optimizer}. Set another optimizer."
        )
    if recipe.lora:
        raise InputError(
            "the PyTorch twin has no adapters; set lora to 0 to compare a run of all parameters."
        )
    off = {
        "mixup": 0.0,
        "cutmix": 0.0,
        "erasing": 0.0,
        "drop_path": 0.0,
        "dropout": 0.0,
        "class_weights": "none",
        "standardize": False,
        "distillation": "none",
        "momentum_dtype": "float32",
    }
    now = recipe.to_dict()
    changed = [
        f"{name} ({now[name]!r})"
        for name, value in off.items()
        if now[name] != value and now[name] is not None
    ]
    notes = ["both runs see the same images, without augmentation and dropout"]
    if recipe.task != "classify":
        notes.append(f"the loss is that of the checkpoint's head, not of the task {recipe.task!r}")
    if changed:
        notes.append(f"settings of the recipe that were turned off: {', '.join(changed)}")
    return recipe.replace(**off), notes


def make_batches(
    config: Any,
    head: str | None,
    problem_type: str | None,
    *,
    steps: int,
    batch: int,
    accumulate: int = 1,
    pixels: np.ndarray | None = None,
    seed: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of a run that can be learnt: each class is a pattern, and each image one of them
    in noise.

    Args:
        config: of the model.
        head, problem_type: which labels there are.
        steps, batch: number of batches, and of images in each.
        accumulate: parts of a batch; with more than one, some images do not count (label -100), so
            that the parts differ in how many do.
        pixels: images (N, C, H, W) to train on instead; their labels are drawn.
        seed: of everything drawn.

    Yields:
        "pixel_values" (B, C, H, W), float64, and what the head's loss needs.
    """
    rng = np.random.default_rng(seed)
    classes = max(config.num_labels, 1)
    count = EXAMPLES * batch if pixels is None else len(pixels)
    labels = rng.integers(0, classes, count)
    shape = (config.num_channels, *config.image_height_width)
    if pixels is None:
        patterns = rng.normal(size=(classes, *shape))
        pixels = 0.5 * patterns[labels] + rng.normal(size=(count, *shape))
    P, (H, W) = config.patch_height_width, pixels.shape[2:]
    N = (H // P[0]) * (W // P[1])
    table: dict[str, np.ndarray] = {"pixel_values": pixels}
    if head in ("decoder", "tokens"):
        table["bool_masked_pos"] = rng.random((count, N)) < 0.5
        table["bool_masked_pos"][:, 0] = True
        if head == "tokens":
            table["labels"] = rng.integers(0, config.vocab_size, (count, N))
    elif problem_type == "regression":
        table["labels"] = rng.normal(size=(count, classes))
    elif problem_type == "multi_label_classification":
        table["labels"] = rng.integers(0, 2, (count, classes)).astype(np.float64)
    else:
        table["labels"] = labels
    order = rng.permutation(count)
    for step in range(steps):
        rows = order[np.arange(step * batch, (step + 1) * batch) % count]
        chosen = {name: array[rows] for name, array in table.items()}
        if accumulate > 1 and "labels" in chosen and chosen["labels"].ndim == 1:
            chosen["labels"] = np.where(np.arange(batch) % 7 == 1, -100, chosen["labels"])
        yield chosen


# -- the two runs


class TorchRun:
    """The PyTorch twin's run.

    Args:
        model: trained in place.
        setup: the recipe and definitions.
        steps: updates of the whole run.
    """

    def __init__(self, model: Any, setup: Setup, steps: int) -> None:
        self.trainer = Variant(model, setup, steps)
        self.prefix = f"{model.config.base_model_prefix}."

    def step(self, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        """One update."""
        return self.trainer.step(batch)

    def state(self) -> State:
        """The parameters, moments and average now; views of them."""
        found: State = {"parameter": {}}
        trainer = self.trainer
        for name, parameter in trainer.model.named_parameters():
            bare = name.removeprefix(self.prefix)
            found["parameter"][bare] = to_numpy(parameter.detach())
            for key, kind in _TORCH_MOMENTS.items():
                value = trainer.optimizer.state.get(parameter, {}).get(key)
                if value is not None:
                    found.setdefault(kind, {})[bare] = to_numpy(value)
        if trainer.average is not None:
            found["average"] = {
                name.removeprefix(self.prefix): to_numpy(value)
                for name, value in trainer.average.values.items()
            }
        return found


class FlaxRun:
    """The Flax twin's run.

    Args:
        model: with its parameters, which stay as they are.
        recipe: the settings.
        steps: updates of the whole run.
    """

    def __init__(self, model: Any, recipe: Recipe, steps: int) -> None:
        from vit_flax import training

        self.model = model
        trainable = training.trainable_of(recipe)
        optimizer = training.make_optimizer(recipe, model, steps=steps)
        ema = training.ema_of(recipe)
        self.run = training.make_step(
            _with_own_loss(model) if _has_own_loss(model) else model,
            _own_loss if _has_own_loss(model) else training.loss_of(recipe, model.config),
            optimizer,
            accumulate=recipe.accumulate,
            ema=ema,
            trainable=trainable,
        )
        self.now = training.TrainState.create(model, optimizer, ema=ema, trainable=trainable)
        schedule = training.schedule_of(recipe, steps)
        self.rates = [float(rate) for rate in np.asarray(schedule(np.arange(steps)))]
        self.number = 0
        self.names: dict[str, _Names] = {}

    def step(self, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        """One update."""
        dtype = np.dtype(self.model.dtype)
        given = {
            name: array.astype(dtype) if array.dtype.kind == "f" else array
            for name, array in batch.items()
        }
        self.now, metrics = self.run(self.now, given)
        rate = self.rates[self.number]
        self.number += 1
        return {
            "loss": float(metrics["loss"]),
            "gradient_norm": float(metrics["gradient_norm"]),
            "learning_rate": rate,
        }

    def state(self) -> State:
        """The parameters, moments and average now."""
        found = {"parameter": self.now.params, **moments(self.now.opt_state)}
        if self.now.ema is not None:
            found["average"] = self.now.ema
        for kind, tree in found.items():
            if kind not in self.names:
                self.names[kind] = _Names(tree)
        return {kind: self.names[kind].read(tree) for kind, tree in found.items()}


def _has_own_loss(model: Any) -> bool:
    return model.head in ("decoder", "tokens")


def _own_loss(outputs: Any, batch: Any) -> Any:
    return outputs.loss


def _with_own_loss(model: Any) -> Callable[..., Any]:
    """A call of a model that predicts masked patches, with the loss of its head."""

    def call(params: Any, batch: Any, key: Any) -> Any:
        inputs = {name: batch[name] for name in ("bool_masked_pos", "labels") if name in batch}
        pixels = batch["pixel_values"].transpose(0, 2, 3, 1)
        return model.module.apply({"params": params}, pixels, True, return_dict=True, **inputs)

    return call


def moments(opt_state: Any) -> dict[str, Any]:
    """The moments in the state of an optimizer of optax, wherever in it they are: trees like the
    parameters, by the names used here."""
    from flax.traverse_util import flatten_dict, unflatten_dict

    found: dict[str, dict[Any, Any]] = {}

    def visit(node: Any) -> None:
        for name in getattr(node, "_fields", ()):
            if name in _MOMENTS and isinstance(tree := getattr(node, name), Mapping):
                leaves = {
                    path: leaf
                    for path, leaf in flatten_dict(tree).items()
                    if hasattr(leaf, "shape")
                }
                found.setdefault(_MOMENTS[name], {}).update(leaves)
        if isinstance(node, Mapping):
            for child in node.values():
                visit(child)
        elif isinstance(node, (tuple, list)):
            for child in node:
                visit(child)

    visit(opt_state)
    return {kind: unflatten_dict(flat) for kind, flat in found.items()}


class _Leaf:
    """A leaf of a tree that changes from step to step."""

    def __init__(self, array: Any) -> None:
        self.shape, self.dtype, self.array = tuple(array.shape), np.dtype(array.dtype), array

    def read(self) -> np.ndarray:
        return np.asarray(self.array)


class _Names:
    """Reads trees of one form under canonical names, in PyTorch's layouts."""

    def __init__(self, tree: Any) -> None:
        from flax.traverse_util import flatten_dict

        from vit_convert.formats import TREE
        from vit_convert.rules import to_canonical

        self.leaves = {path: _Leaf(array) for path, array in flatten_dict(tree).items()}
        named = {"/".join(path): leaf for path, leaf in self.leaves.items()}
        self.tensors = to_canonical(named, TREE).tensors

    def read(self, tree: Any) -> dict[str, np.ndarray]:
        """The arrays of a tree; views of them where the layout allows it."""
        for path, leaf in self.leaves.items():
            node = tree
            for key in path:
                node = node[key]
            leaf.array = node
        return {name: tensor.read() for name, tensor in self.tensors.items()}


# -- how far apart they are


def is_key_bias(name: str) -> bool:
    """Whether a parameter is the bias of a key: softmax does not see it, so that its gradient is
    rounding and nothing else, which Adam divides by itself."""
    return name.endswith("attention.key.bias")


def compare_states(ours: State, theirs: State) -> Iterator[tuple[str, str, Stage, float]]:
    """(kind, name, stage, value) of every array that both runs have; the value is the difference
    relative to the largest entry: of the array or 1 for parameters and averages, of the array or a
    hundredth of the largest of all for moments."""
    for kind in (kind for kind in _ORDER if kind in ours and kind in theirs):
        mine, other = ours[kind], theirs[kind]
        largest = 1.0
        if kind in _MOMENTS.values():
            largest = 1e-2 * max(
                (float(np.abs(a).max(initial=0)) for a in other.values()), default=0
            )
        for name in other:
            if name not in mine:
                continue
            error = np.abs(mine[name] - other[name])
            scale = float(np.abs(other[name]).max(initial=0.0))
            at = int(error.argmax()) if error.size else 0
            most = float(error.flat[at]) if error.size else 0.0
            where = tuple(int(i) for i in np.unravel_index(at, error.shape))
            stage = Stage(f"{kind} {name}", most, scale, where)
            yield kind, name, stage, most / max(scale, largest, 1e-300)


def _unmatched(ours: State, theirs: State) -> list[str]:
    """Arrays that one of two runs alone has, in words."""
    said = []
    for here, there, who in ((ours, theirs, "Flax"), (theirs, ours, "PyTorch")):
        for kind, arrays in here.items():
            alone = [name for name in arrays if name not in there.get(kind, {})]
            if alone:
                more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
                said.append(f"the {who} run alone has the {kind} of {alone[0]}{more}")
    return said


def _numbers(ours: Mapping[str, float], theirs: Mapping[str, float], peak: float):
    """(kind, difference, scale, value) of the numbers of a step."""
    for kind, name, least in (
        ("learning rate", "learning_rate", peak),
        ("loss", "loss", 1.0),
        ("gradient norm", "gradient_norm", 1.0),
    ):
        error = abs(ours[name] - theirs[name])
        scale = abs(theirs[name])
        yield kind, error, scale, error / max(scale, least, 1e-300)


class Record:
    """The largest differences of two runs so far, and where they began.

    Args:
        bound: largest difference that passes.
        loose: the bound of key biases.
        held: which kinds have a bound; others are only written down.
        peak: the highest learning rate.
        until: step from which on nothing has a bound.
    """

    def __init__(
        self, bound: float, loose: float, held: Sequence[str], peak: float, until: int
    ) -> None:
        self.bound, self.loose, self.held, self.peak = bound, loose, held, peak
        self.until = until
        self.worst: dict[str, Checked] = {}
        self.drift: dict[str, list[float]] = {}
        self.losses: tuple[list[float], list[float]] = ([], [])
        self.numbers: list[dict[str, float]] = []
        self.first: tuple[int, str] | None = None
        self.values: list[float] = []

    def add(
        self,
        step: int,
        ours: Mapping[str, float],
        theirs: Mapping[str, float],
        states: tuple[State, State] | None,
    ) -> None:
        """Take one step into account."""
        self.numbers.append(dict(ours))
        self.losses[0].append(ours["loss"])
        self.losses[1].append(theirs["loss"])
        most: dict[str, float] = {}
        worst = 0.0
        for kind, error, scale, value in _numbers(ours, theirs, self.peak):
            self._keep(kind, Stage(kind, error, scale, (step,)), value, self.bound, step)
            most[kind], worst = value, _larger(worst, value)
        if states is not None:
            for kind, name, stage, value in compare_states(*states):
                loose = is_key_bias(name) and kind in ("parameter", "average")
                stage = dataclasses.replace(stage, where=(step, *stage.where))
                self._keep(kind, stage, value, self.loose if loose else self.bound, step)
                kind = "key biases" if loose else kind
                most[kind] = _larger(most.get(kind, 0.0), value)
        for kind, value in most.items():
            self.drift.setdefault(kind, []).append(value)

    def _keep(self, kind: str, stage: Stage, value: float, bound: float, step: int) -> None:
        if kind not in self.held or step >= self.until:
            return
        checked = Checked(stage, bound, value)
        before = self.worst.get(stage.name)
        if before is None or not value <= before.value:
            self.worst[stage.name] = checked
        if self.first is None and not checked.passed:
            self.first = step, stage.name

    @property
    def stages(self) -> list[Checked]:
        """All of them, in the order of a step."""
        return list(self.worst.values())


def _larger(a: float, b: float) -> float:
    """The larger; NaN is larger than anything."""
    return a if a != a or a > b else b


# -- the comparison


@contextlib.contextmanager
def _on(place: Any, dtype: str) -> Iterator[None]:
    import jax

    with jax.enable_x64(dtype == "float64"), jax.default_device(place):
        yield


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if number is not None:
            torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)


def compare_runs(
    ours: FlaxRun | TorchRun,
    torch_model: Any,
    setup: Setup,
    batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    *,
    steps: int,
    dtype: str = "float64",
    bounds: Mapping[str, float] = BOUNDS,
    device: str = "cpu",
    explain: bool = True,
) -> TrainingRow:
    """Run to its end a run that has not begun, train the PyTorch twin beside it, and compare every
    step.

    Args:
        ours: the run; its model is of `dtype`.
        torch_model: the twin of its model in the same dtype; it is given that model's weights and
            trained in place.
        setup: what the twin is trained with.
        batches: gives the batches anew each time it is called.
        steps: number of updates.
        dtype: "float64" or "float32".
        bounds: as in `vit_torch.verify.bounds`.
        device: name for the row.
        explain: look for the cause of a drift.

    Returns:
        The row.
    """
    recipe = setup.recipe
    exact = dtype == "float64"
    held = _ORDER if exact else ("learning rate", "loss")
    adam = recipe.optimizer in ("adamw", "lamb")
    bound = bounds[f"training {dtype}" if exact or adam else "training SGD float32"]
    rates = schedule_of(recipe, steps)
    peak = max(rate for rate in map(rates, range(steps)))
    loose = bounds["training key biases"]
    if recipe.optimizer in ("lion", "lamb"):  # which move them by the learning rate, up or down
        loose = 2.0 * steps * peak
    record = Record(bound, loose, held, peak, steps if exact or adam else _FIRST)
    parameters = dict(torch_model.named_parameters())
    prefix = f"{torch_model.config.base_model_prefix}."
    small = sum(p.numel() for p in parameters.values()) <= _SMALL
    with _threads(1 if small else None):
        with torch.no_grad():
            begin = {name: np.array(a) for name, a in ours.state()["parameter"].items()}
            for name, parameter in parameters.items():
                parameter.copy_(torch.tensor(begin[name.removeprefix(prefix)]))
        theirs = TorchRun(torch_model, setup, steps)
        unmatched: list[str] = []
        end, last = None, None
        for number, batch in enumerate(batches()):
            mine, other = ours.step(batch), theirs.step(batch)
            states = (ours.state(), theirs.state()) if exact else None
            if number == 0 and states is not None:
                unmatched = _unmatched(*states)
            record.add(number, mine, other, states)
            if end is None and record.first is not None:
                end = min(record.first[0] + _AFTER, steps - 1)
            if number == end and states is not None:
                last = {
                    kind: {name: np.array(array) for name, array in arrays.items()}
                    for kind, arrays in states[0].items()
                }
        causes = None
        if record.first is not None and explain and exact and end is not None:

            def restored() -> Any:
                with torch.no_grad():
                    for name, parameter in parameters.items():
                        parameter.copy_(torch.tensor(begin[name.removeprefix(prefix)]))
                        parameter.requires_grad_(True)
                return torch_model

            causes = find_causes(setup, restored, batches, steps, end, record, last)
    first = record.first
    return TrainingRow(
        device=device,
        dtype=dtype,
        precision="highest",
        against=f"torch.optim, cpu, {dtype}",
        rule="absolute",
        stages=record.stages,
        unmatched=unmatched,
        causes=causes,
        steps=steps,
        optimizer=recipe.optimizer,
        losses=record.losses,
        drift=record.drift,
        drifts_from=None if first is None else first[0],
        drifts_first=None if first is None else first[1],
    )


def find_causes(
    setup: Setup,
    restored: Callable[[], Any],
    batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    steps: int,
    end: int,
    record: Record,
    last: State | None,
) -> list[Cause]:
    """Definitions with which the PyTorch run agrees with the recorded one, the best first; several
    joined by "and" where it takes more than one.

    Args:
        setup: what the PyTorch run that drifted had.
        restored: gives the PyTorch model with the first weights.
        batches: gives the batches anew.
        steps: updates of the whole run, for the schedule.
        end: the last step to run, counted from 0.
        record: of the run that drifted.
        last: state of the Flax run after that step.
    """

    def distance(tried: Setup, limit: float) -> float:
        """The largest difference up to `end`; infinite as soon as it is over the limit."""
        run, worst = TorchRun(restored(), tried, steps), 0.0
        for number, batch in zip(range(end + 1), batches(), strict=False):
            other = run.step(batch)
            for _, _, _, value in _numbers(record.numbers[number], other, record.peak):
                worst = _larger(worst, value)
            if not worst <= limit:
                return float("inf")
        if last is not None:
            theirs = run.state()
            for kind, name, _, value in compare_states(last, theirs):
                if not (is_key_bias(name) and kind in ("parameter", "average")):
                    worst = _larger(worst, value)
        return worst

    found: list[Cause] = []
    start = before = distance(setup, float("inf"))
    if start <= record.bound:  # it is only key biases
        return []
    said: list[str] = []
    for _ in range(3):
        tried: list[tuple[float, str, Setup]] = []
        for text, changes in alternatives(setup):
            try:
                other = setup.change(**changes)
                part = before / _FACTOR if before < np.inf else 0.0
                after = distance(other, max(part, record.bound))
            except (InputError, ValueError):  # not with this optimizer
                continue
            if after <= record.bound or after * _FACTOR <= before < np.inf:
                tried.append((after, text, other))
        tried.sort(key=lambda each: each[0])
        found = [
            Cause(" and ".join([*said, text]), start, after)
            for after, text, _ in tried
            if after <= record.bound
        ] or found
        if not tried or tried[0][0] <= record.bound:
            break
        before, text, setup = tried[0]
        said.append(text)
        found = [Cause(" and ".join(said), start, before)]
    return found


# -- the command


def verify_training(
    first: Any,
    *,
    steps: int,
    recipe: Recipe | None = None,
    changes: Mapping[str, Any] | None = None,
    images: Sequence[Any] | None = None,
    devices: Sequence[str] = ("cpu",),
    dtypes: Sequence[str] = ("float64",),
    batch: int | None = None,
    format: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    ignore: Iterable[str] = (),
    bounds: Mapping[str, float] | None = None,
    seed: int = 0,
    **hub: Any,
) -> Verification:
    """Train a checkpoint's Flax and PyTorch twins on the same batches and compare every step.

    Args:
        first: directory, weights file or Hub name, in any format. One without a head gets a new
            classifier.
        steps: number of updates.
        recipe: the settings; augmentation, mixing and dropout are turned off.
        changes: settings and definitions of the PyTorch run alone, as
            `vit_torch.verify.definitions` has them: what another program's run has.
        images: PIL images or arrays to train on, under labels that are drawn; None draws both.
        devices: "cpu", "gpu", "tpu": where the Flax model trains.
        dtypes: "float64", which holds every number of the run; "float32", the losses only.
        batch: images in a batch; None is 16.
        format: format of the checkpoint, if it cannot be detected.
        overrides: fields of the configuration that win over what the files say.
        ignore: regular expressions of names of tensors that may be left out.
        bounds: bounds by name, in place of those in `vit_torch.verify.bounds.BOUNDS`.
        seed: of the batches.
        **hub: options of the Hub.

    Returns:
        A row for each device and dtype; `passed` says whether the runs stayed together.

    Raises:
        ViTError: the model cannot be loaded, or an option is wrong.

    Example:
        >>> found = verify_training("google/vit-base-patch16-224", steps=20)
        >>> found.passed, found.rows[0].losses
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"`steps` must be a positive integer; given {steps!r}.")
    wrong = [dtype for dtype in dtypes if dtype not in TRAINING_DTYPES]
    if wrong or not dtypes:
        raise InputError(
            f"training is compared in {' or '.join(TRAINING_DTYPES)}; given "
            f"{wrong[0] if wrong else 'none'}."
        )
    wanted, notes = quiet((recipe or Recipe()).replace(steps=steps))
    batch = batch or 16
    setup = Setup(wanted)
    if changes:
        setup = setup.change(**changes)
        said = ", ".join(f"{name} = {value!r}" for name, value in changes.items())
        notes.append(f"the PyTorch run alone has {said}")
        setup = dataclasses.replace(setup, recipe=quiet(setup.recipe)[0])
    for each in (wanted, setup.recipe):
        list(split({"pixel_values": np.zeros(batch)}, each.accumulate))
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0}
    subject = Subject(first, format, hub, {**(overrides or {}), **still}, ignore)
    has_head = subject.head is not None
    if not has_head:
        subject.head = "classifier"
        notes.append("the checkpoint has no head; both runs have the same new classifier")
    pixels = None
    if images is not None:
        pixels, size = model_inputs(subject, images, None, 2)
        if size != subject.config.image_height_width:
            raise InputError(
                f"training is compared at the model's image size; the images are prepared at "
                f"{size[0]} x {size[1]} (height x width)."
            )
    rows: list[Row] = []
    for place in places(devices):
        for dtype in dtypes:
            if place.platform == "tpu" and dtype == "float64":
                notes.append("float64 was left out on the tpu, which has none")
                continue
            name = place.platform
            name = name if name == "cpu" else f"{name} {place.device_kind}"

            def batches() -> Iterator[dict[str, np.ndarray]]:
                return make_batches(
                    subject.config,
                    subject.head,
                    subject.problem_type,
                    steps=steps,
                    batch=batch,
                    accumulate=wanted.accumulate,
                    pixels=pixels,
                    seed=seed,
                )

            with _on(place, dtype):
                with warnings.catch_warnings():
                    if not has_head:  # that its head is new is among the notes
                        warnings.simplefilter("ignore", UserWarning)
                    ours, twin = subject.flax(dtype, "highest"), subject.torch(dtype)
                rows.append(
                    compare_runs(
                        FlaxRun(ours, wanted, steps),
                        twin,
                        setup,
                        batches,
                        steps=steps,
                        dtype=dtype,
                        bounds={**BOUNDS, **(bounds or {})},
                        device=name,
                    )
                )
    if "float32" in dtypes:
        what = "losses" if wanted.optimizer in ("adamw", "lamb") else f"first {_FIRST} losses"
        notes.append(f"in float32 only the {what} have a bound: rounding grows")
    if not rows:
        raise InputError(f"nothing of what was asked for can be compared: {'; '.join(notes)}.")
    return Verification(
        first=str(first),
        second=None,
        family=subject.config.model_type,
        head=subject.head,
        image_size=subject.config.image_height_width,
        batch=batch,
        rows=rows,
        versions=versions(*PACKAGES, "optax"),
        notes=notes,
    )
