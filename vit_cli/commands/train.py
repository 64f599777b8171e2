"""`vit train`: labelled images in, a fine-tuned model out.

The result goes to a folder that is a checkpoint like any other; its numbers go to standard output,
and everything else to standard error.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_cli.options import (
    DTYPES,
    Options,
    Parser,
    Reading,
    add_columns,
    add_hosts,
    add_pixel_limit,
    add_reading,
    cluster_of,
    positive,
    size,
)
from vit_cli.terminal.exit_codes import COULD_NOT_RUN, DIVERGED, DONE, SAVED
from vit_cli.terminal.messages import counted, say

if TYPE_CHECKING:
    from vit_cli.runs.supervise import Hosts
    from vit_cli.terminal.progress import Progress
    from vit_common.recipes import Recipe
    from vit_flax.training.fit import Plan, Run

_KEPT = "The last checkpoint is kept; the same command with --resume goes on from there."
_SHARE = 0.1  # of the images, for the validation
_REPORT = "report.html"


# -- options


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number; given {text!r}")
    return value


# Option -> the setting of a recipe that it is short for, how it is read, and its help.
_SETTINGS: dict[str, tuple[str, Callable[[str], Any], str, str]] = {
    "--epochs": ("epochs", _number, "N", "passes over the training images"),
    "--steps": ("steps", positive, "N", "updates, instead of --epochs"),
    "--batch-size": ("batch_size", positive, "N", "images in one update, over all devices"),
    "--accumulate": (
        "accumulate",
        positive,
        "N",
        "run each batch in N parts, one after the other, in less memory; the numbers are the same",
    ),
    "--learning-rate": ("learning_rate", _number, "RATE", "at its highest"),
    "--layer-decay": (
        "layer_decay",
        _number,
        "FACTOR",
        "factor of the learning rate from one block to the block below it, such as 0.75",
    ),
    "--image-size": (
        "image_size",
        size,
        "N|HxW",
        "train at this size: positions are resampled by the model's own rule",
    ),
    "--mixup": ("mixup", _number, "ALPHA", "strength of mixup; 0 is off"),
    "--cutmix": ("cutmix", _number, "ALPHA", "strength of cutmix; 0 is off"),
    "--label-smoothing": (
        "label_smoothing",
        _number,
        "SHARE",
        "share of each label that is spread over all classes",
    ),
    "--ema": (
        "ema",
        _number,
        "DECAY",
        "average the parameters, such as 0.9998; the average is what is evaluated and kept",
    ),
    "--train": (
        "train",
        str,
        "all|head|PATTERN,...",
        "what trains: everything, the classifier alone, or parameters by regular expressions",
    ),
    "--freeze": (
        "freeze",
        str,
        "PATTERN,...",
        "what does not train, by regular expressions, or blocks as blocks.0-5",
    ),
    "--lora": (
        "lora",
        positive,
        "RANK",
        "train adapters of this rank instead; the result is a PEFT adapter folder",
    ),
    "--task": ("task", str, "TASK", "classify (default), mim (hidden patches) or distill"),
    "--class-weights": (
        "class_weights",
        str,
        "none|balanced|sampling",
        "for skewed classes: weigh each in the loss, or draw each as often as every other",
    ),
    "--patience": (
        "patience",
        positive,
        "N",
        "stop after N epochs without a better validation result",
    ),
    "--metric": ("metric", str, "NAME", "of the validation, decides which epoch is the best"),
}


def add_options(parser: Parser) -> None:
    parser.usage = "vit train [options] PHOTOS --model NAME --output DIR"
    parser.description = (
        "Fine-tune a model on labelled images, or train one from nothing. The output is a folder "
        "that every other command and both frameworks read. A run that is stopped or killed goes "
        "on with --resume as if nothing had happened."
    )
    parser.add_names(
        "PHOTOS",
        "a folder with a folder for each class (photos/CLASS/*.jpg, or "
        "photos/{train,val,test}/CLASS/*.jpg), or a table (.csv, .jsonl, .parquet)",
        least=1,
        most=1,
        wanted="one folder or table of training images",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="what to begin with: a folder, weights file, or name on the Hub such as "
        "google/vit-base-patch16-224-in21k; or a size (vit-tiny, vit-small, vit-base, ...), whose "
        "weights are drawn from --seed",
    )
    parser.add_argument("--output", metavar="DIR", help="folder for the result and the checkpoints")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --output, if there is one"
    )
    parser.add_argument(
        "--force", action="store_true", help="delete the run in --output and begin anew"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing: check every image, and print classes, steps, what trains, memory and "
        "seconds for each step",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=int,
        help="of the order, the augmentation and new weights (default: 0)",
    )
    _add_recipe(parser)
    _add_data(parser)
    _add_devices(parser)
    _add_keeping(parser)
    add_reading(parser, image_size=None, fields="--config")

    def check(options: Options) -> None:
        if options.output is None and not options.dry_run:
            parser.error("name the folder of the result with --output DIR")
        if options.resume and options.force:
            parser.error("--resume goes on with a run and --force deletes it; leave one out")
        if options.seed is not None and options.seed < 0:
            parser.error(f"--seed must be 0 or more; given {options.seed}")

    parser.checks.append(check)


def _add_recipe(parser: Parser) -> None:
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--recipe",
        metavar="NAME",
        help="settings to begin with, under one name (default: fine-tune); the options below "
        "change single ones",
    )
    for option, (setting, read, metavar, text) in _SETTINGS.items():
        group.add_argument(option, dest=f"recipe_{setting}", metavar=metavar, type=read, help=text)
    group.add_argument(
        "--set",
        dest="settings",
        metavar="SETTING=VALUE",
        action="append",
        default=[],
        help="any other setting of the recipe, such as weight_decay=0.1; may be repeated",
    )
    group.add_argument(
        "--teacher", metavar="NAME", help="model that is learnt from, with --task distill"
    )
    group.add_argument(
        "--merge",
        action="store_true",
        help="with --lora: write the whole model, with the adapters merged into its weights",
    )


def _add_data(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--validation",
        metavar="DIR|SHARE|none",
        help="folder or table of the validation images, or the share of PHOTOS taken for them "
        "(default: photos/val if it is there, else 0.1)",
    )
    add_columns(group)
    group.add_argument(
        "--limit", metavar="N", type=positive, help="use N images of each part only, for a try"
    )
    group.add_argument("--workers", metavar="N", type=positive, help="threads that read images")
    add_pixel_limit(parser)


def _add_devices(parser: Parser) -> None:
    group = parser.add_argument_group("precision, memory and devices")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="compute dtype (default: float32); parameters and moments are float32 in any case",
    )
    group.add_argument(
        "--remat",
        metavar="POLICY",
        nargs="?",
        const="nothing_saveable",
        help="compute blocks anew in the backward pass, in less memory (nothing_saveable, or "
        "another policy of JAX's)",
    )
    group.add_argument(
        "--scan-layers",
        action="store_true",
        help="compile one block and run it for all; deep networks compile several times as fast",
    )
    group.add_argument(
        "--devices",
        metavar="N",
        type=positive,
        help="devices to use, over all processes (default: all)",
    )
    group.add_argument(
        "--fsdp",
        action="store_true",
        help="split parameters and moments over the devices, too, and not only the batch",
    )
    group.add_argument(
        "--model-parallel",
        metavar="M",
        type=positive,
        default=1,
        help="split heads and MLP of the network over M devices (default: 1)",
    )
    add_hosts(
        parser,
        "Images and output are on a file system they share.",
        "the first process writes the run; name it with --output DIR",
    )


def _add_keeping(parser: Parser) -> None:
    group = parser.add_argument_group("checkpoints and logs")
    group.add_argument(
        "--save-every",
        metavar="STEPS",
        type=positive,
        help="save after so many steps, besides the end of each epoch",
    )
    group.add_argument(
        "--keep",
        metavar="N",
        type=positive,
        default=3,
        help="checkpoints to keep, besides the best (default: 3)",
    )
    group.add_argument(
        "--tensorboard", metavar="DIR", help="write event files for TensorBoard into a folder"
    )
    group.add_argument(
        "--detect-nan",
        action="store_true",
        help="if a step is not finite, find the first layer whose output is not (a little slower)",
    )


# -- the run


def run(options: Options) -> int:
    """Train.

    Returns:
        The exit code: `SAVED` if the run was asked to stop, `DIVERGED` if a step was not finite.

    Raises:
        ViTError: the data, the model or the settings do not fit, or something cannot be written.
    """
    _check_names(options)
    cluster = cluster_of(options)
    if cluster is None:
        return _train(options, None)
    from vit_cli.runs.supervise import supervised

    return supervised(cluster, lambda: _together(options, cluster), _KEPT)


def _check_names(options: Options) -> None:
    """Faults that can be found before anything is loaded."""
    from vit_common.errors import InputError, MissingFileError

    if not all(map(importlib.util.find_spec, ("optax", "orbax"))):
        raise InputError(
            "vit train needs optax and Orbax; run: pip install optax orbax-checkpoint (the extra "
            "`train`)"
        )
    source = options.names[0]
    if not os.path.exists(source):
        raise MissingFileError(f"{source}: no such folder or table of images.")
    if options.output is not None:
        output, photos = Path(options.output).resolve(), Path(source).resolve()
        if output == photos or photos in output.parents:
            raise InputError(
                f"--output {options.output} lies in the images' own folder, where it would be "
                "taken for a class; name another folder."
            )
        if output.exists() and not output.is_dir():
            raise MissingFileError(f"{options.output}: wanted a folder; a file has that name.")


def _together(options: Options, cluster: Any) -> int:
    """The run as one of several processes."""
    from vit_cli.runs.supervise import join
    from vit_cli.runtime import enable_cache
    from vit_common.errors import HostError, ViTError
    from vit_common.files.texts import reason

    enable_cache()
    own = ("process", "coordinator", "workers")
    settings = {name: value for name, value in vars(options).items() if name not in own}
    hosts = join(cluster, settings, _KEPT)
    try:
        code = _train(options, hosts)
    except BaseException as error:
        if not isinstance(error, HostError):
            try:
                hosts.check(now=True)  # is it that another process stopped?
            except HostError as other:
                hosts.leave()
                raise other from error
        if isinstance(error, ViTError):  # now: the end of the others may end this process, too
            say("error", str(error))
            hosts.leave(reason(error))
            return COULD_NOT_RUN
        hosts.leave(reason(error) if isinstance(error, Exception) else "it was interrupted.")
        raise
    hosts.leave()
    return code


def _train(options: Options, hosts: Hosts | None) -> int:
    from vit_cli.terminal import interrupt

    first = hosts is None or hosts.index == 0
    _recall(options)
    recipe, stored = _recipe(options)
    if options.merge and not recipe.lora:
        from vit_common.errors import InputError

        raise InputError(
            "--merge writes adapters into a model's weights; it goes with --lora RANK."
        )
    model = options.model or stored.get("model")
    if model is None:
        from vit_common.errors import InputError

        raise InputError(
            "name what to begin with: --model NAME, such as google/vit-base-patch16-224-in21k, or "
            "a size such as vit-tiny for new weights."
        )
    seed = options.seed if options.seed is not None else int(stored.get("seed", 0))
    dtype = options.dtype or stored.get("dtype", "float32")
    teacher = options.teacher or stored.get("teacher")
    train, validation = _data(options, recipe, seed)

    from vit_cli.runtime import enable_cache, find_devices

    enable_cache()
    find_devices()
    from vit_flax.training.fit import Diverged, Stopped, fine_tune, make_plan

    common: dict[str, Any] = {
        "validation": validation,
        "recipe": recipe,
        "seed": seed,
        "dtype": dtype,
        "remat": options.remat,
        "scan_layers": options.scan_layers,
        "mesh": _mesh(options),
        "workers": options.workers,
        "teacher": teacher,
        "options": Reading.of(options, resized=True).keywords,
    }
    if options.dry_run:
        from vit_cli.runs.dry_run import describe

        plan = make_plan(model, train, **common, say=say)
        with advised(recipe, options):
            return describe(plan, model)
    watcher = _watcher(show=first)
    with interrupt.asks(_stopping) as asked, watcher, advised(recipe, options):
        try:
            result = fine_tune(
                model,
                train,
                output=options.output,
                resume=options.resume,
                force=options.force,
                save_every=options.save_every,
                keep=options.keep,
                tensorboard=options.tensorboard,
                detect_nan=options.detect_nan,
                merge=options.merge,
                stop=asked,
                watcher=watcher,
                notes={"command": {name: getattr(options, name) for name in _RECALLED}},
                **common,
            )
        except Stopped as stopped:
            say(str(stopped))
            return SAVED
        except Diverged as diverged:
            say("error", str(diverged))
            return DIVERGED
    if first:
        _report(options, result, validation, recipe)
        _print(result, options)
    return DONE


_RECALLED = (
    "validation",
    "limit",
    "image_column",
    "label_column",
    "format",
    "heads",
    "fields",
    "ignore",
    "revision",
    "subfolder",
    "merge",
)
"""Options that a resumed run takes from its first start, where they are not given again."""


def _recall(options: Options) -> None:
    if not options.resume or options.output is None:
        return
    from vit_flax.training.logs import read_run

    found = (read_run(options.output) or {}).get("command", {})
    for name in _RECALLED:
        if name in found and getattr(options, name) in (None, [], False):
            setattr(options, name, found[name])


def _stopping() -> None:
    say("stopping: this step is finished and saved first (Ctrl-C once more ends at once)")


class advised:
    """Out of memory, said with the options of this command that help, and what they are now."""

    def __init__(self, recipe: Recipe, options: Options) -> None:
        self._recipe, self._options = recipe, options

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        from vit_common.errors import DeviceError, ViTError
        from vit_flax.last_words import is_out_of_memory

        if error is None or isinstance(error, ViTError) or not is_out_of_memory(error):
            return
        recipe = self._recipe
        ways = []
        parts = range(recipe.accumulate + 1, recipe.batch_size + 1)
        more = next((n for n in parts if recipe.batch_size % n == 0), None)
        if more is not None:
            ways.append(f"--accumulate {more} (now {recipe.accumulate}; the numbers are the same)")
        if self._options.remat is None:
            ways.append("--remat (slower by about a third; the numbers are the same)")
        if self._options.dtype in (None, "float32"):
            ways.append("--dtype bfloat16 (other roundings)")
        if not self._options.fsdp:
            ways.append("--fsdp on several devices")
        smaller = f"a --batch-size below {recipe.batch_size}"
        if recipe.image_size is not None:
            smaller += f" or an --image-size below {recipe.image_size}"
        ways.append(f"{smaller} (another run)")
        raise DeviceError(f"out of memory; try, in this order: {'; '.join(ways)}.") from error


# -- settings


def _recipe(options: Options) -> tuple[Recipe, Mapping[str, Any]]:
    """The recipe, and what else the run holds that is gone on with."""
    from vit_common.errors import InputError
    from vit_common.recipes import Recipe, parse_settings
    from vit_common.recipes import recipe as recipe_named
    from vit_flax.training.begin import is_size

    given: dict[str, Any] = {
        setting: getattr(options, f"recipe_{setting}")
        for setting, *_ in _SETTINGS.values()
        if getattr(options, f"recipe_{setting}") is not None
    }
    if "freeze" in given:
        given["freeze"] = ",".join(map(_blocks, given["freeze"].split(",")))
    more = parse_settings(options.settings)
    twice = [name for name in more if name in given]
    if twice:
        raise InputError(
            f"{twice[0]} is given by --set and by an option of its own; leave one out."
        )
    given.update(more)
    stored: Mapping[str, Any] = {}
    if options.resume and options.output is not None:
        from vit_flax.training.logs import read_run

        stored = (read_run(options.output) or {}).get("settings", {})
    if stored:
        names = {field for field in Recipe().to_dict() if field in stored}
        began = recipe_named(options.recipe) if options.recipe else Recipe()
        if not options.recipe:
            began = began.replace(**{name: _tuples(stored[name]) for name in names})
        return began.replace(**given), stored
    name = options.recipe
    if name is None:
        name = {"mim": "simmim"}.get(given.get("task", ""), "fine-tune")
        if name == "fine-tune" and options.model is not None and is_size(options.model):
            name = "scratch"
        if given.get("lora"):
            name = "adapter"
        if given.get("train") == "head":
            name = "head"
    return recipe_named(name, **given), stored


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _blocks(pattern: str) -> str:
    """The regular expression that `blocks.0-5` is short for."""
    name, dot, numbers = pattern.partition(".")
    first, dash, last = numbers.partition("-")
    if name not in ("blocks", "layers") or not (dot and first.isdecimal()):
        return pattern
    end = int(last) if dash and last.isdecimal() else int(first)
    listed = "|".join(map(str, range(int(first), end + 1)))
    return rf"layer\.({listed})\."


# -- data and devices


def _data(options: Options, recipe: Recipe, seed: int) -> tuple[Any, Any]:
    """The images to train on and those to validate with, or None."""
    from vit_cli.runs.labelled import columns
    from vit_common.datasets import open_images, split
    from vit_common.errors import InputError

    named = columns(options.image_column, options.label_column)
    labelled = recipe.task != "mim"
    source, asked = options.names[0], options.validation
    parts = open_images(source, limit=options.limit, labelled=labelled, **named)
    if "train" not in parts:
        raise InputError(f"{source}: there are no training images; wanted {source}/train.")
    train, validation = parts["train"], parts.get("val")
    if asked == "none" or not labelled:
        return train, None
    share = _share(asked)
    if share is not None:
        return split(train, share, seed)
    if asked is not None:
        more = {"problem_type": train.problem_type} if Path(asked).is_file() else {}
        found = open_images(asked, limit=options.limit, classes=train.classes, **{**named, **more})
        return train, found.get("val", found.get("train"))
    if validation is not None:
        return train, validation
    say(f"{round(_SHARE * 100)}% of the images are kept for the validation (--validation)")
    return split(train, _SHARE, seed)


def _share(text: str | None) -> float | None:
    if text is None or os.path.exists(text):
        return None
    try:
        return float(text)
    except ValueError:
        from vit_common.errors import MissingFileError

        raise MissingFileError(
            f"--validation {text}: no such folder or table, and no share such as 0.1."
        ) from None


def _mesh(options: Options) -> Any:
    import jax
    import numpy as np

    from vit_common.errors import InputError
    from vit_flax.sharding import TRAINING_AXES

    there = jax.devices()
    count = options.devices or len(there)
    if count > len(there):
        raise InputError(f"--devices must be at most {len(there)}; given {count}.")
    if jax.process_count() > 1 and count != len(there):
        raise InputError("several processes use all of their devices; leave --devices out.")
    model = options.model_parallel
    if count % model:
        raise InputError(
            f"--model-parallel must divide the number of devices, {count}; given {model}."
        )
    if count == 1:
        return None
    parts = count // model
    shape = (1, parts, model) if options.fsdp else (parts, 1, model)
    return jax.sharding.Mesh(np.array(there[:count]).reshape(shape), TRAINING_AXES)


# -- what is shown


def _watcher(*, show: bool) -> Any:
    """What shows a run on the terminal. (Made in a function: its base class loads JAX.)"""
    from vit_cli.terminal.progress import Progress
    from vit_flax.training.fit import Watcher

    class Shown(Watcher):
        def __init__(self) -> None:
            self._bar: Progress = Progress(show=show, what="training", few=0, detailed=True)
            self._plan: Plan | None = None
            self._began = time.monotonic()
            self._first = 0
            self._done = 0
            self._size = 0
            self._timed = False

        def __enter__(self) -> None:
            self._bar.__enter__()

        def __exit__(self, *error: object) -> None:
            self._bar.__exit__(*error)

        def say(self, line: str) -> None:
            if show:
                with self._bar.hidden():
                    say(line)

        def begin(self, plan: Plan, step: int) -> None:
            self._plan, self._first, self._done = plan, step, step
            self._size = plan.images_per_step
            trained = len(plan.train)
            checked = 0 if plan.validation is None else len(plan.validation)
            self.say(
                f"training on {counted(trained)}"
                + (f", validating on {checked}" if checked else "")
                + f": {counted(plan.steps, 'step')} of {self._size}, "
                + counted(plan.epochs, "epoch")
            )
            self._began = time.monotonic()
            self._bar.reach(step, plan.steps)

        def step(self, row: Mapping[str, Any]) -> None:
            assert self._plan is not None
            self._done = row["step"]
            if not self._timed:  # the first step, with the compilation
                self._began, self._first, self._timed = time.monotonic(), self._done, True
            shown = [f"loss {row['loss']:.4g}"]
            if "accuracy" in row:
                shown.append(f"accuracy {row['accuracy']:.3f}")
            if self._rate():
                shown.append(f"{self._rate():.4g} images/s")
            self._bar.describe("  ".join(shown), f"epoch {row['epoch']}/{self._plan.epochs}")
            self._bar.reach(self._done, self._plan.steps)

        def _rate(self) -> float:
            steps, seconds = self._done - self._first, time.monotonic() - self._began
            return steps * self._size / seconds if steps and seconds > 0 else 0.0

        def evaluating(self, done: int, total: int, what: str = "validating") -> None:
            self._bar.describe(f"{done}/{total} images", what)

        def epoch(self, row: Mapping[str, Any]) -> None:
            assert self._plan is not None
            plan = self._plan
            parts = [f"loss {row.get('loss', math.nan):.4g}"]
            if "accuracy" in row:
                parts.append(f"accuracy {row['accuracy']:.3f}")
            if "validation" in row:
                found = row["validation"].get(plan.metric)
                value = "unknown" if found is None else format(found, ".4f")
                parts.append(f"validation {plan.metric} {value}")
            rate = self._rate()
            if rate:
                left = (plan.steps - row["step"]) * self._size / rate
                parts.append(f"{rate:.4g} images/s")
                parts.append(f"{_duration(left)} left")
            self.say(f"epoch {row['epoch']}/{plan.epochs}: {', '.join(parts)}")

    return Shown()


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def _report(options: Options, result: Run, validation: Any, recipe: Recipe) -> None:
    """The report in the folder of the run."""
    if result.folder is None or ((result.folder / _REPORT).exists() and result.evaluation is None):
        return
    from vit_cli.reports.report import write_report
    from vit_flax.training.logs import LOG, read_log

    write_report(
        result.folder / _REPORT,
        title=f"Training of {result.folder.resolve().name}",
        history=read_log(result.folder / LOG),
        evaluation=result.evaluation,
        dataset=validation,
        settings={name: value for name, value in recipe.to_dict().items() if value is not None},
        skipped=result.skipped,
    )


def _print(result: Run, options: Options) -> None:
    if result.skipped:
        count = len(result.skipped)
        say("warning", f"{counted(count)} could not be read and were skipped; see {_REPORT}")
    numbers = {
        name: value
        for name, value in result.metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    for name, value in numbers.items():
        print(f"{name:20}  {value if isinstance(value, int) else format(value, '.4f')}")
    if result.best is not None:
        print(f"{'best step':20}  {result.best.step} of {result.steps}")
    print(f"{'model':20}  {result.folder}")
