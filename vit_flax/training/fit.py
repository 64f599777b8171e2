"""A whole training run: `fine_tune`.

The position in the data is the step: which images a batch holds, and what is drawn for them, are
functions of (seed, epoch, index). So a run that is killed at any moment goes on from its last
checkpoint as if nothing had happened, to the bit where the machine computes alike.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from vit_common.datasets import as_images, split
from vit_common.datasets.labelled import SINGLE
from vit_common.errors import CheckpointError, InputError, ViTError, some
from vit_common.images.processor import BaseImageProcessor
from vit_common.metrics import LOWER_IS_BETTER, USUAL, is_better, measure
from vit_common.recipes import Recipe, learning_rates
from vit_common.recipes import recipe as recipe_named
from vit_flax.sharding import (
    DATA,
    FSDP,
    MODEL,
    TRAINING_AXES,
    batch_sharding,
    make_mesh,
    replicated,
    tree_shardings,
)
from vit_flax.training.begin import begin, outputs_of
from vit_flax.training.checkpoints import Checkpoints, from_all
from vit_flax.training.evaluate import Evaluation, Evaluator
from vit_flax.training.loader import Loader, none_read
from vit_flax.training.logs import Log, RunFolder, check_tensorboard, read_log
from vit_flax.training.losses import balanced_weights, check_labels
from vit_flax.training.optimizers import make_optimizer, trainable_of
from vit_flax.training.step import TrainState, ema_of, make_step
from vit_flax.training.tasks import task_of
from vit_flax.training.tasks.head import FrozenNetwork, frozen

__all__ = ["Best", "Diverged", "Plan", "Run", "Stopped", "Watcher", "fine_tune", "make_plan"]

_POLL = 8  # steps between looks at whether another process was asked to stop
_SHOWN = 4  # images in a message
_MOST_NAMED = 20  # skipped images that are named while the run goes on


class Stopped(ViTError):
    """A run was asked to stop; it is saved, and can go on.

    Attributes:
        step: that it is saved at.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Diverged(ViTError):
    """The loss, or a gradient, is not finite any more.

    Attributes:
        step: the first such step.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Best(NamedTuple):
    """The best validation: its step, and the value of the metric."""

    step: int
    value: float


@dataclass
class Run:
    """What `fine_tune` gives.

    Attributes:
        model: with the parameters of the result.
        metrics: of the validation with them; empty if there was none.
        best: the best validation; None if there was none.
        history: one row for each epoch: "epoch", "step", "loss", and "validation".
        folder: where everything is; None if nothing was written.
        steps: that were taken.
        skipped: (name, message) of each image that could not be read.
        evaluation: of the result, with every output; None if there was no validation, and for a
            run that was finished before.
    """

    model: Any
    metrics: dict[str, Any]
    best: Best | None
    history: list[dict[str, Any]]
    folder: Path | None
    steps: int
    skipped: list[tuple[str, str]] = field(default_factory=list)
    evaluation: Evaluation | None = None


class Watcher:
    """What a run tells while it goes on. Every method does nothing; a subclass shows it."""

    def say(self, line: str) -> None:
        """One line that a user should read."""

    def begin(self, plan: Plan, step: int) -> None:
        """The run begins, or goes on, after this step."""

    def step(self, row: Mapping[str, Any]) -> None:
        """A step is done: the row of the log."""

    def evaluating(self, done: int, total: int, what: str = "validating") -> None:
        """So many images of the validation are done; or of those whose head's inputs are computed,
        as `what` says."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch is done: the row of the history."""


# -- what will be done


@dataclass
class Plan:
    """A run before it begins: everything that is settled by its settings.

    Attributes:
        model: that is trained. If it was loaded for this plan, the first step of a run takes the
            memory of its parameters.
        processor: prepares images for evaluation and prediction.
        recipe: the settings.
        train, validation: the images.
        steps, steps_per_epoch: how many there will be.
        images_per_step: that a step sees: those of a batch, or all that there are.
        loader: of the training images.
        optimizer: of optax.
        rate: step -> learning rate.
        trainable: path of a parameter -> whether it trains; None for all.
        mesh: devices; None for one.
        make_state: the state before the first step; with copy=False it may take the memory of the
            model's parameters, see `TrainState.create`.
        step: the compiled step.
        materialize: parameters of the state -> parameters of the model.
        metric: of the validation that decides; "" if none does.
        seed: of everything that is drawn.
        task: what the step runs (`vit_flax.training.tasks`).
        adapter: of a recipe that trains one; None otherwise.
        frozen: what is under a head that trains alone, if its inputs are computed once.
        parameters: that the run begins with, as the state holds them.
    """

    model: Any
    processor: BaseImageProcessor
    recipe: Recipe
    train: Any
    validation: Any
    steps: int
    steps_per_epoch: int
    images_per_step: int
    loader: Loader | FrozenNetwork
    optimizer: Any
    rate: Callable[[int], float]
    trainable: Callable[[str], bool] | None
    mesh: Mesh | None
    make_state: Callable[..., TrainState]
    step: Any
    materialize: Callable[[Any], Any]
    metric: str
    seed: int
    task: Any
    adapter: Any
    parameters: Any
    frozen: FrozenNetwork | None = None

    @property
    def epochs(self) -> int:
        """How many, the last perhaps in part."""
        return -(-self.steps // self.steps_per_epoch)

    def params_of(self, state: TrainState) -> Any:
        """The parameters of the model, averaged if the run keeps an average."""
        return self.materialize(state.averaged)

    def placed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of the loader as the step takes it."""
        batch = {name: array for name, array in batch.items() if name != "index"}
        if self.mesh is not None:
            sharding = batch_sharding(self.mesh)
            batch = {
                name: jax.make_array_from_process_local_data(sharding, array)
                for name, array in batch.items()
            }
        return {**batch, **self.task.constants}

    def batches(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        """The batches from a step on, to the end of its epoch."""
        epoch, start = divmod(step, self.steps_per_epoch)
        return self.loader.batches(epoch, start=start)


def make_plan(
    model: Any,
    train: Any,
    *,
    validation: Any = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    dtype: Any = "float32",
    remat: str | None = None,
    scan_layers: bool = False,
    mesh: Mesh | None = None,
    workers: int | None = None,
    teacher: Any = None,
    class_weights: Any = None,
    on_error: str = "skip",
    image_processor: BaseImageProcessor | None = None,
    options: Mapping[str, Any] | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Plan:
    """Settle everything a run needs; arguments as `fine_tune`.

    Raises:
        ViTError: something does not fit; nothing was written.
    """
    recipe = recipe or recipe_named()
    check_recipe(recipe)
    train = as_images(train)
    validation = None if validation is None else as_images(validation, like=train)
    _check_data(train, validation, recipe)
    loaded = isinstance(model, (str, os.PathLike))  # here, so nothing else uses its parameters
    beginning = begin(
        model,
        recipe,
        train,
        seed=seed,
        dtype=dtype,
        remat=remat,
        scan_layers=scan_layers,
        processor=image_processor,
        options=options,
        say=say,
    )
    model, processor = beginning
    if recipe.task != "mim":
        check_labels(train.labels, model.config.num_labels, problem_type=train.problem_type)
    mesh = make_mesh(mesh, model.config, TRAINING_AXES)
    _check_batch(recipe, mesh)
    if recipe.class_weights == "balanced" and class_weights is None:
        if train.problem_type != SINGLE:
            raise InputError(
                "balanced class weights need one class for each image; given "
                f"{train.problem_type}. Use class_weights=none."
            )
        class_weights = balanced_weights(train.labels, outputs_of(train))
    task = task_of(
        recipe, model, teacher, processor=processor, class_weights=class_weights, mesh=mesh
    )
    size = _rows(recipe, len(train), mesh)
    loader = _loader(recipe, model, processor, train, size, seed, workers, on_error)
    if len(train) < recipe.batch_size:
        say(
            f"a batch of {recipe.batch_size} is larger than the {len(train)} training images; each "
            "step has all of them"
        )
    per_epoch = loader.steps_per_epoch
    steps = recipe.steps or max(1, round(recipe.epochs * per_epoch))
    rates = learning_rates(recipe, steps)
    trainable = trainable_of(recipe, model)
    params, materialize, adapter = task.model.network_params, None, None
    network = frozen(recipe, model, processor, loader, _evaluation_mesh(mesh), say)
    if network is not None:
        task = task._replace(model=network.outputs, prepare=None)
        params, materialize = network.shapes, network.whole
    if recipe.lora:
        adapter = _adapter(recipe, task.model)
        params, materialize = adapter.init(params, jax.random.key(seed)), adapter.merge
        trainable = adapter.trainable
    optimizer = make_optimizer(recipe, params, steps=steps, trainable=trainable)
    ema = ema_of(recipe)

    def make_state(copy: bool = True) -> TrainState:
        return TrainState.create(
            task.model,
            optimizer,
            key=jax.random.key(seed),
            params=params if network is None else network.params,
            ema=ema,
            trainable=trainable,
            mesh=mesh,
            copy=copy or not loaded,
        )

    step = make_step(
        task.model,
        task.loss,
        optimizer,
        accumulate=recipe.accumulate,
        ema=ema,
        trainable=trainable,
        # A head that trains alone is run on what it sees, and not as a part of the model.
        materialize=materialize if network is None else None,
        prepare=task.prepare,
        mesh=mesh,
    )

    metric = ""
    if validation is not None:
        metric = _metric(recipe, train)
    return Plan(
        model=model,
        processor=processor,
        recipe=recipe,
        train=train,
        validation=validation,
        steps=steps,
        steps_per_epoch=per_epoch,
        images_per_step=min(size, len(train)),
        loader=loader if network is None else network,
        frozen=network,
        optimizer=optimizer,
        rate=lambda step: float(rates[step]),
        trainable=trainable,
        mesh=mesh,
        make_state=make_state,
        step=step,
        materialize=materialize or (lambda params: params),
        metric=metric,
        seed=seed,
        task=task,
        adapter=adapter,
        parameters=params,
    )


def _metric(recipe: Recipe, train: Any) -> str:
    """The measure of the validation that decides."""
    K, problem = outputs_of(train), train.problem_type
    labels = np.zeros(2, np.int64) if problem == SINGLE else np.zeros((2, K))
    found = measure(np.zeros((2, K)), labels, problem)
    names = [name for name, each in found.items() if each is None or isinstance(each, float)]
    metric = recipe.metric or USUAL[problem]
    if metric not in names and recipe.is_usual("metric"):
        metric = USUAL[problem]  # the recipe's own is of other problems
    if metric not in names:
        raise InputError(
            f"`metric`: the validation has no {metric!r}; wanted one of {', '.join(names)}."
        )
    return metric


def _adapter(recipe: Recipe, model: Any) -> Any:
    """The adapters that a recipe trains."""
    from vit_flax.training.lora import lora

    if recipe.train != "all" or recipe.freeze:
        raise InputError(
            "adapters (lora) train themselves and the head; leave `train` and `freeze` out."
        )
    targets: str | tuple[str, ...] = recipe.lora_targets
    if targets != "all-linear":
        targets = tuple(filter(None, map(str.strip, recipe.lora_targets.split(","))))
    alpha = 2 * recipe.lora if recipe.lora_alpha is None else recipe.lora_alpha
    return lora(model, recipe.lora, alpha, targets)


def _loader(
    recipe: Recipe,
    model: Any,
    processor: BaseImageProcessor,
    train: Any,
    size: int,
    seed: int,
    workers: int | None,
    on_error: Any,
) -> Loader:
    from vit_common.augment import Augment

    config = model.config
    mean, _, _ = normalization(processor, config.num_channels)
    augment = Augment(
        recipe, config.image_height_width, channels=config.num_channels, mean=tuple(mean)
    )
    return Loader(
        train,
        size,
        augment,
        seed=seed,
        workers=workers,
        repeats=recipe.repeats,
        sampling="balanced" if recipe.class_weights == "sampling" else None,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        on_error=on_error,
    )


def normalization(
    processor: BaseImageProcessor, channels: int
) -> tuple[list[float], list[float], float]:
    """Mean, standard deviation and factor that a processor normalises 8-bit pixels by."""
    table = processor.to_dict()
    mean, std = [0.0] * channels, [1.0] * channels
    if table.get("do_normalize", True):
        mean, std = ([*map(float, table[name])] for name in ("image_mean", "image_std"))
    rescale = float(table.get("rescale_factor", 1 / 255)) if table.get("do_rescale", True) else 1.0
    return mean, std, rescale


# -- checks


def check_recipe(recipe: Recipe) -> None:
    """Raise InputError if no run can have these settings."""

    def wanted(name: str, what: str) -> InputError:
        return InputError(f"`{name}` must be {what}; given {getattr(recipe, name)!r}.")

    positive = ["epochs", "learning_rate", "batch_size", "accumulate", "repeats"]
    positive += ["steps"] if recipe.steps is not None else []
    for name in positive:
        value = getattr(recipe, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wanted(name, "a number")
        if not math.isfinite(value) or value <= 0:
            raise wanted(name, "positive")
    for name in ("steps", "batch_size", "accumulate", "repeats", "patience"):
        value = getattr(recipe, name)
        if value is not None and value != int(value):
            raise wanted(name, "a whole number")
    if recipe.batch_size % recipe.accumulate:
        near = recipe.batch_size - recipe.batch_size % recipe.accumulate or recipe.accumulate
        raise InputError(
            f"a batch of {recipe.batch_size} images cannot be run in {recipe.accumulate} equal "
            f"parts; wanted a multiple, such as a batch size of {near}."
        )


def _check_batch(recipe: Recipe, mesh: Mesh | None) -> None:
    devices = 1 if mesh is None else mesh.shape.get(DATA, 1) * mesh.shape.get(FSDP, 1)
    parts = devices * recipe.accumulate
    if recipe.batch_size % parts:
        raise InputError(
            f"a batch of {recipe.batch_size} images cannot be divided by {devices} devices"
            + (f" times {recipe.accumulate} parts" if recipe.accumulate > 1 else "")
            + f"; wanted a multiple of {parts}."
        )


def _rows(recipe: Recipe, images: int, mesh: Mesh | None) -> int:
    """Rows of a batch: those of the recipe, halved while every image has one. A batch of 2048 would
    else be computed whole for a hundred images. Halved, so that it is the same on most meshes."""
    parts = 1 if mesh is None else mesh.shape.get(DATA, 1) * mesh.shape.get(FSDP, 1)
    parts = math.lcm(parts * recipe.accumulate, jax.process_count())
    rows = recipe.batch_size
    while rows % 2 == 0 and rows // 2 >= images and rows // 2 % parts == 0:
        rows //= 2
    return rows


def _check_data(train: Any, validation: Any, recipe: Recipe) -> None:
    if len(train) == 0:
        raise InputError("there are no training images; wanted one at least.")
    if validation is not None and len(validation) == 0:
        raise InputError("there are no validation images; wanted one at least, or no validation.")
    if recipe.task == "mim":
        if validation is not None:
            raise InputError(
                "the task 'mim' has no validation: what it learns shows in a fine-tuning or a "
                "probe. Leave `validation` out."
            )
        return
    if train.classes is not None and len(train.classes) < 2 and train.labels.ndim == 1:
        raise InputError(
            f"there is one class only ({train.classes[0]!r}); wanted two at least, so that there "
            "is something to tell apart."
        )
    if validation is None:
        return
    if validation.problem_type != train.problem_type:
        raise InputError(
            f"the validation's problem_type is {validation.problem_type!r}, the training's "
            f"{train.problem_type!r}."
        )
    if train.classes is not None and validation.classes is not None:
        unknown = [name for name in validation.classes if name not in train.classes]
        if unknown:
            raise InputError(
                f"the validation has classes that training lacks: {some(unknown, _SHOWN)}."
            )


def data_digest(data: Any) -> str:
    """What tells one set of labelled images from another: names, labels, classes."""
    digest = hashlib.sha256(repr((data.problem_type, data.classes)).encode())
    for name in data.names:  # a folder may be mounted elsewhere
        digest.update("/".join(Path(str(name)).parts[-2:]).encode("utf-8", "surrogateescape"))
    digest.update(np.ascontiguousarray(data.labels).tobytes())
    return digest.hexdigest()[:16]


# -- the run


def fine_tune(
    model: Any,
    train: Any,
    *,
    validation: Any = None,
    recipe: Recipe | None = None,
    output: str | os.PathLike | None = None,
    resume: bool = False,
    force: bool = False,
    seed: int = 0,
    dtype: Any = "float32",
    remat: str | None = None,
    scan_layers: bool = False,
    mesh: Mesh | None = None,
    workers: int | None = None,
    teacher: Any = None,
    class_weights: Any = None,
    on_error: str = "skip",
    image_processor: BaseImageProcessor | None = None,
    options: Mapping[str, Any] | None = None,
    save_every: int | None = None,
    keep: int = 3,
    tensorboard: str | os.PathLike | None = None,
    detect_nan: bool = False,
    merge: bool = False,
    stop: Callable[[], bool] = lambda: False,
    watcher: Watcher | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Run:
    """Train a model on labelled images.

    Args:
        model: folder, weights file, Hub name or a model of this package; or a size such as
            "vit-base", whose weights are drawn.
        train: images of `vit_common.datasets`, or what `as_images` makes them of: a path, or an
            object with items by index.
        validation: more of them, or the share of `train` that is taken for it, such as 0.1.
        recipe: the settings; None means those of `recipe()`.
        output: folder for the result, the log and the checkpoints; None writes nothing.
        resume: go on with the run in `output`, if there is one.
        force: delete the run in `output`.
        seed: of the order, the augmentation, dropout and new parameters.
        dtype: compute dtype; parameters and moments are float32.
        remat: what a block keeps for its gradient ("nothing_saveable", ...); None keeps everything.
        scan_layers: compile one block and run it for all.
        mesh: devices, with axes of `vit_flax.sharding.TRAINING_AXES`; None for one.
        workers: threads that read images.
        teacher: a model (or its name) that is learnt from, for the task "distill".
        class_weights: (K,) weights of the classes in the loss, besides the recipe's.
        on_error: "skip" images that cannot be read, or "raise".
        image_processor: of the model; None means its own.
        options: more of `from_pretrained`.
        save_every: steps between checkpoints, besides one at the end of each epoch.
        keep: checkpoints that are kept, besides the best.
        tensorboard: folder for event files.
        detect_nan: if a step is not finite, find the first layer whose output is not.
        merge: write the whole model, not the adapter alone, if the recipe has one.
        stop: asked after each step and in the evaluation whether to stop; the run is then saved.
        watcher: is told what happens.
        notes: what `run.json` holds besides, as JSON can hold it.

    Returns:
        The `Run`. With a validation, its model has the parameters of the best one.

    Raises:
        Stopped: `stop` said so.
        Diverged: a step was not finite.
        ExistingFileError: `output` holds another run.
        ViTError: something else does not fit, or cannot be read or written.

    Example:
        >>> run = fine_tune("google/vit-base-patch16-224-in21k", ImageFolder("photos"),
        ...                 validation=0.1, recipe=recipe(epochs=5), output="pets")
        >>> run.metrics["top1"], run.best.step
    """
    watcher = watcher or Watcher()
    recipe = recipe or recipe_named()
    check_recipe(recipe)
    train = as_images(train)
    if isinstance(validation, float):
        train, validation = split(train, validation, seed)
    elif validation is not None:
        validation = as_images(validation, like=train)
    settings = {
        **recipe.to_dict(),
        "model": _described(model),
        "options": {name: repr(value) for name, value in (options or {}).items()},
        "data": f"{len(train)} images, {data_digest(train)}",
        "validation": None
        if validation is None
        else f"{len(validation)} images, {data_digest(validation)}",
        "seed": seed,
        "dtype": str(np.dtype(dtype)) if not isinstance(dtype, str) else dtype,
        "teacher": None if teacher is None else _described(teacher),
    }
    if class_weights is not None:
        settings["weights"] = np.asarray(class_weights, np.float64).tolist()
    if image_processor is not None:
        settings["image_processor"] = repr(sorted(image_processor.to_dict().items()))
    if tensorboard is not None and output is not None and jax.process_index() == 0:
        check_tensorboard(tensorboard)
    folder = None
    if output is not None:
        folder = _opened(output, settings, resume=resume, force=force)
    try:
        if folder is not None and folder.is_finished:
            return _finished(folder, watcher)
        plan = make_plan(
            model,
            train,
            validation=validation,
            recipe=recipe,
            seed=seed,
            dtype=dtype,
            remat=remat,
            scan_layers=scan_layers,
            mesh=mesh,
            workers=workers,
            teacher=teacher,
            class_weights=class_weights,
            on_error=on_error,
            image_processor=image_processor,
            options=options,
            say=watcher.say,
        )
        if folder is not None:
            folder.begin(**(notes or {}))
        loop = _Loop(plan, folder, watcher, stop, save_every, keep, tensorboard, detect_nan, merge)
        return loop.run()
    finally:
        if folder is not None:
            folder.close()


def _opened(
    output: str | os.PathLike, settings: Mapping[str, Any], *, resume: bool, force: bool
) -> RunFolder:
    """The folder of the run; what the first process finds there holds for all."""
    folder, error = None, None
    try:
        writes = jax.process_index() == 0
        folder = RunFolder(output, settings, resume=resume, force=force, writes=writes)
    except ViTError as caught:
        error = caught
    found, fault = from_all([None if folder is None else folder.found, error and str(error)])[0]
    if error is not None:
        raise error
    if fault is not None:
        raise InputError(f"the first process stopped: {fault}")
    assert folder is not None
    folder.found = found
    return folder


def _described(model: Any) -> str:
    if isinstance(model, (str, os.PathLike)):
        return os.fspath(model)
    return f"a {type(model).__name__}"


class _Abandoned(Exception):
    """An evaluation was given up, since the run is to stop."""


class _Loop:
    """The steps of a run, and what is kept of them."""

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder | None,
        watcher: Watcher,
        stop: Callable[[], bool],
        save_every: int | None,
        keep: int,
        tensorboard: str | os.PathLike | None,
        detect_nan: bool,
        merge: bool,
    ) -> None:
        self.plan, self.folder, self.watcher = plan, folder, watcher
        self._stop, self._save_every, self._merge = stop, save_every, merge
        self._keep, self._tensorboard = keep, tensorboard
        self._detect_nan = detect_nan
        self._lower = plan.metric in LOWER_IS_BETTER
        self._evaluator: Any = None
        self._laid_out: Any = None
        self._evaluation: tuple[int, Evaluation] | None = None
        self._best_params: tuple[int, Any] | None = None  # where there are no checkpoints
        self._pending: list[tuple[int, Any, Any]] = []
        self._read_any = False  # any image of training, so far
        self._named = 0  # images that were skipped, and named
        self._told_skipped = False  # which images of the validation cannot be read
        self.checkpoints: Checkpoints | None = None
        self.log: Log | None = None
        self.record: dict[str, Any] = {
            "epochs": 0,  # whose end was dealt with
            "best": None,
            "worse": 0,  # epochs since the best
            "history": [],
            "skipped": [],
            "sums": {},  # of the metrics of this epoch's steps
            "steps": 0,  # of this epoch, that are in the sums
        }

    def run(self) -> Run:
        plan, folder = self.plan, self.folder
        if plan.frozen is not None:
            plan.frozen.progress = self._progress("the head's inputs")
        step = 0
        try:
            state = plan.make_state(copy=False)
            if folder is not None:
                step, state = self._open(state)
            before = [(name, why) for name, why in self.record["skipped"]]
            known = {name for name, _ in before}
            skipped = plan.loader.skipped  # of a frozen network, known by now
            skipped[:] = before + [each for each in skipped if each[0] not in known]
            self._named = len(before)
            self.watcher.begin(plan, step)
            state, step = self._steps(state, step)
            return self._finish(state, step)
        except _Abandoned:  # in what comes before the first step: a validation is given up there
            raise Stopped(f"stopped after step {step} of {plan.steps}.", step) from None
        finally:
            for each in (self.log, self.checkpoints):
                if each is not None:
                    each.close()

    def _open(self, state: TrainState) -> tuple[int, TrainState]:
        """Checkpoints and log; the state that the run goes on from."""
        assert self.folder is not None
        step = 0
        self.checkpoints = Checkpoints(
            self.folder.checkpoints,
            keep=self._keep,
            best="min" if self._lower else "max",
            say=self.watcher.say,
        )
        if self.checkpoints.steps:
            state, record, step = self.checkpoints.restore(state)
            self.record.update({name: record[name] for name in self.record})
            self.watcher.say(f"going on after step {step} of {self.plan.steps}")
        self.checkpoints.forget_after(step)
        if self.record["best"] is not None:
            self.checkpoints.rate(self.record["best"]["step"], self.record["best"]["value"])
        if self.folder.writes:
            epochs = self.record["epochs"]  # the validation of a later one is still to come
            self.log = Log(self.folder.log, step, epochs=epochs, tensorboard=self._tensorboard)
        return step, state

    # -- steps

    def _steps(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        plan = self.plan
        if self._at_end(step):  # it was stopped before the validation
            self._end_of_epoch(state, step)
        while step < plan.steps and not self._patience_is_over():
            before = time.monotonic()
            for batch in plan.batches(step):
                self._read_any |= bool(batch["weights"].any())
                state, metrics = plan.step(state, plan.placed(batch))
                step += 1
                self._pending.append((step, metrics, batch["index"]))
                if len(self._pending) > 1 or self._detect_nan:
                    before = self._drain(state, batch, before, keep=0 if self._detect_nan else 1)
                if self._asked_to_stop(step):
                    self._leave(state, step)
                if step == plan.steps or step % plan.steps_per_epoch == 0:
                    break
                if self._save_every and step % self._save_every == 0:
                    self._save(state, step)
            self._drain(state, batch, before, keep=0)
            if self.record["epochs"] == 0 and not any(from_all(self._read_any)):
                raise none_read(plan.loader.skipped)  # nothing was learnt
            self._end_of_epoch(state, step)
        return state, step

    def _at_end(self, step: int) -> bool:
        """Whether an epoch ends here whose validation is still to come."""
        plan = self.plan
        ends = step > 0 and (step % plan.steps_per_epoch == 0 or step == plan.steps)
        return ends and self.record["epochs"] < -(-step // plan.steps_per_epoch)

    def _drain(self, state: TrainState, batch: Any, before: float, *, keep: int) -> float:
        """Log the steps that are done, but for the last few, which may still be running."""
        while len(self._pending) > keep:
            step, metrics, index = self._pending.pop(0)
            found = {name: float(value) for name, value in jax.device_get(metrics).items()}
            now = time.monotonic()
            bad = [
                name
                for name in ("loss", "gradient_norm", "update_norm")
                if not math.isfinite(found.get(name, 0.0))
            ]
            found.pop("finite", None)
            row = {
                "step": step,
                "epoch": (step - 1) // self.plan.steps_per_epoch + 1,
                **found,
                "learning_rate": self.plan.rate(step - 1),
                "seconds": round(now - before, 6),
                "images": self.plan.images_per_step,
            }
            before = now
            if self.log is not None:
                self.log.write(row)
            if bad:
                self._diverged(state, step, found, bad, index, batch)
            sums = self.record["sums"]
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value
            self.record["steps"] += 1
            self.watcher.step(row)
            self._name_skipped()
        return before

    def _name_skipped(self) -> None:
        """Say which images could not be read since the last step."""
        skipped = self.plan.loader.skipped
        for name, why in skipped[self._named : _MOST_NAMED]:
            self.watcher.say(f"skipped {why if str(name) in why else f'{name}: {why}'}")
        if self._named < _MOST_NAMED < len(skipped):
            self.watcher.say("more images are skipped; all are counted at the end")
        self._named = len(skipped)

    def _diverged(
        self,
        state: TrainState,
        step: int,
        found: Mapping[str, float],
        bad: list[str],
        index: Any,
        batch: Any,
    ) -> None:
        if self.log is not None:
            self.log.flush()
        names = [str(self.plan.train.names[i]) for i in index if i >= 0]
        where = ""
        if self._detect_nan:
            from vit_flax.training.ends import first_not_finite

            where = f" {first_not_finite(self.plan, state, batch, step - 1)}"
        values = ", ".join(f"{name.replace('_', ' ')} {found[name]}" for name in bad)
        stays = ""
        if self.checkpoints is not None:
            self.checkpoints.wait()
            kept = self.checkpoints.steps
            stays = (
                f" The checkpoint of step {kept[-1]} stays."
                if kept
                else " There is no checkpoint yet."
            )
            assert self.folder is not None
            self.folder.note(status="diverged", step=kept[-1] if kept else 0)
        advice = "" if self._detect_nan else " --detect-nan finds the first layer."
        raise Diverged(
            f"step {step}: not finite ({values}); its images: {some(names, _SHOWN)}.{where}{stays} "
            f"Try a lower learning rate, a longer warm-up, or --dtype float32.{advice}",
            step,
        )

    # -- stopping

    def _asked_to_stop(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self._stop()
        if step % _POLL:
            return False
        return any(from_all(bool(self._stop())))

    def _leave(self, state: TrainState, step: int) -> None:
        """Save, and end the run."""
        self._drain(state, None, time.monotonic(), keep=0)
        where = "nothing was saved, as there is no output folder"
        if self.checkpoints is not None:
            self._save(state, step)
            self.checkpoints.wait()
            assert self.folder is not None
            self.folder.note(status="stopped", step=step)
            where = f"saved in {self.folder.path}; --resume goes on from here"
        raise Stopped(f"stopped after step {step} of {self.plan.steps}: {where}.", step)

    def _save(self, state: TrainState, step: int, value: float | None = None) -> None:
        if self.checkpoints is None:
            return
        assert self.folder is not None
        self._drain(state, None, time.monotonic(), keep=0)
        if self.log is not None:
            self.log.flush()
        self.record["skipped"] = [list(each) for each in self.plan.loader.skipped]
        if step in self.checkpoints.steps:
            # Saved before its validation, and kept: were it written anew and that failed, the run
            # would have lost it. If it is gone on from, it is validated once more.
            self.checkpoints.rate(step, value)
            return
        self.checkpoints.save(step, state, self.record, value=value)
        self.folder.note(step=step)

    # -- epochs

    def _end_of_epoch(self, state: TrainState, step: int) -> None:
        plan, record = self.plan, self.record
        epoch = -(-step // plan.steps_per_epoch)
        sums, count = record["sums"], record["steps"]
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": step,
            **{name: total / count for name, total in sums.items() if count},
            "learning_rate": plan.rate(step - 1),
        }
        value = None
        if plan.validation is not None:
            try:
                measured = self._validate(state, step)
            except _Abandoned:
                self._leave(state, step)
            row["validation"] = measured
            value = measured.get(plan.metric)
            best = record["best"]
            if value is None:  # of these images there is no such measure
                record["worse"] += 1
            elif is_better(plan.metric, value, None if best is None else best["value"]):
                record["best"], record["worse"] = {"step": step, "value": value}, 0
                if self.checkpoints is None:
                    params = _on_host(plan.params_of(state), plan.mesh)
                    # Copies: the next step takes the memory of the state.
                    self._best_params = step, jax.tree.map(np.array, params)
            else:
                record["worse"] += 1
            if self.log is not None:
                self.log.write({"step": step, "epoch": epoch, "validation": measured})
        record["history"].append(row)
        record.update(epochs=epoch, sums={}, steps=0)
        self._save(state, step, value)
        self.watcher.epoch(row)
        if self._patience_is_over() and step < plan.steps:
            self.watcher.say(
                f"stopping early: {plan.metric} was best at step {record['best']['step']}, "
                f"{record['worse']} epochs ago"
                if record["best"] is not None
                else f"stopping early: {record['worse']} epochs without a {plan.metric}"
            )

    def _patience_is_over(self) -> bool:
        patience = self.plan.recipe.patience
        return patience is not None and self.record["worse"] >= patience

    def _validate(self, state: TrainState, step: int) -> dict[str, Any]:
        """The measures of the validation, single numbers only."""
        found = self._evaluated(self.plan.params_of(state), poll=True)
        self._evaluation = (step, found)
        if found.skipped and not self._told_skipped:
            self._told_skipped = True
            names = [why if name in why else f"{name}: {why}" for name, why in found.skipped]
            self.watcher.say(
                f"{len(names)} of {len(self.plan.validation)} validation images cannot be read: "
                f"{some(names, _SHOWN, '; ')}"
            )
        return {
            name: value
            for name, value in found.metrics.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }

    def _evaluated(self, params: Any, *, poll: bool) -> Evaluation:
        plan = self.plan
        if plan.frozen is not None:
            return plan.frozen.evaluate(plan.validation, _on_host(params["classifier"], plan.mesh))
        mesh = _evaluation_mesh(plan.mesh)
        if self._evaluator is None:
            self._evaluator = Evaluator(
                plan.model, plan.processor, mesh=mesh, workers=plan.loader.workers
            )
        if mesh is not None:
            if self._laid_out is None:
                self._laid_out = jax.jit(
                    lambda tree: tree, out_shardings=tree_shardings(mesh, params)
                )
            params = self._laid_out(params)

        progress = self._progress("validating", poll=poll)
        return self._evaluator(plan.validation, params=params, progress=progress)

    def _progress(self, what: str, *, poll: bool = True) -> Callable[[int, int], None]:
        """Tells the watcher of images that are done, and gives up if the run is to stop."""

        def progress(done: int, total: int) -> None:
            self.watcher.evaluating(done, total, what)
            if poll and jax.process_count() == 1 and self._stop():
                raise _Abandoned

        return progress

    # -- the end

    def _finish(self, state: TrainState, step: int) -> Run:
        plan, record, folder = self.plan, self.record, self.folder
        best = None if record["best"] is None else Best(**record["best"])
        chosen = step
        if best is not None and self.checkpoints is not None and best.step != step:
            self.checkpoints.wait()
            try:
                state = self.checkpoints.restore(state, best.step).state
                chosen = best.step
            except CheckpointError as error:
                self.watcher.say(f"{error} The result has the parameters of the last step.")
        params = plan.params_of(state)
        if best is not None and self._best_params is not None:
            chosen, params = self._best_params
        evaluation = None
        if plan.validation is not None:
            if self._evaluation is not None and self._evaluation[0] == chosen:
                evaluation = self._evaluation[1]
            else:
                evaluation = self._evaluated(params, poll=False)
        plan.model.params = _on_host(params, plan.mesh)
        skipped = [(str(name), str(why)) for name, why in plan.loader.skipped]
        run = Run(
            model=plan.model,
            metrics={} if evaluation is None else dict(evaluation.metrics),
            best=best,
            history=list(record["history"]),
            folder=None if folder is None else folder.path,
            steps=step,
            skipped=skipped,
            evaluation=evaluation,
        )
        if folder is not None:
            if self.checkpoints is not None:
                self.checkpoints.wait()
            if self.log is not None:
                self.log.flush()
            if folder.writes:
                from vit_flax.training.ends import write_result

                name = folder.settings["model"]
                tree = None if self._merge or plan.adapter is None else state.averaged
                write_result(plan, run, chosen, name=name, adapters=tree)
            folder.note(status="finished", step=step, result=chosen, best=record["best"])
        return run


def _evaluation_mesh(mesh: Mesh | None) -> Mesh | None:
    """The same devices, for a network that is only run."""
    if mesh is None:
        return None
    devices = mesh.devices.reshape(-1, mesh.shape.get(MODEL, 1))
    return Mesh(devices, (DATA, MODEL))


def _on_host(params: Any, mesh: Mesh | None) -> Any:
    if mesh is not None:
        whole = replicated(mesh)
        params = jax.jit(lambda tree: tree, out_shardings=whole)(params)
    return jax.tree.map(lambda leaf: jax.numpy.asarray(np.asarray(leaf)), params)


def _finished(folder: RunFolder, watcher: Watcher) -> Run:
    """The run that was finished before."""
    from vit_flax.auto import (
        FlaxAutoModelForImageClassification,
        FlaxAutoModelForMaskedImageModeling,
    )

    found = folder.found or {}
    watcher.say(f"{folder.path}: this run is finished ({found.get('step')} steps); nothing to do")
    history = _history(read_log(folder.log))
    rows = [row for row in history if "validation" in row]
    best = found.get("best")
    auto: Any = FlaxAutoModelForImageClassification
    if folder.settings["task"] == "mim":
        auto = FlaxAutoModelForMaskedImageModeling
    model = auto.from_pretrained(folder.path)
    result = found.get("result")
    metrics: dict[str, Any] = next((row["validation"] for row in rows if row["step"] == result), {})
    return Run(
        model=model,
        metrics=metrics,
        best=None if best is None else Best(**best),
        history=history,
        folder=folder.path,
        steps=int(found.get("step", 0)),
    )


def _history(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The history of a run from its log: of each epoch the means over its steps, and its
    validation."""
    of_epochs: dict[int, dict[str, Any]] = {}
    for row in rows:
        epoch = of_epochs.setdefault(row["epoch"], {"steps": [], "more": {}})
        if "validation" in row:
            epoch["more"] = {"validation": row["validation"]}
        else:
            epoch["steps"].append(row)
    history = []
    for number, epoch in of_epochs.items():
        steps = epoch["steps"]
        last = steps[-1] if steps else {"step": 0}
        apart = ("step", "epoch", "learning_rate", "seconds", "images")
        names = [name for name in last if name not in apart]
        means = {name: sum(row[name] for row in steps) / len(steps) for name in names}
        rate = {"learning_rate": last["learning_rate"]} if steps else {}
        history.append({"epoch": number, "step": last["step"], **means, **rate, **epoch["more"]})
    return history
