"""What `vit train --dry-run` prints: everything that can be known of a run before it begins."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from vit_cli.terminal.exit_codes import DONE
from vit_cli.terminal.messages import one_line, say
from vit_cli.terminal.progress import Progress
from vit_cli.terminal.results import print_titled
from vit_common.datasets.survey import Survey, survey

if TYPE_CHECKING:
    from vit_flax.training.fit import Plan

_STEPS = 3  # that are timed
_SHOWN = 10  # names of a kind
_WIDTH = 18


def describe(plan: Plan, name: str) -> int:
    """Look at every image, compile the step, run it a few times, and print what was found.

    Args:
        plan: the run.
        name: of the model.

    Returns:
        The exit code.
    """
    parts = {"training": plan.train}
    if plan.validation is not None:
        parts["validation"] = plan.validation
    found = _survey(parts, plan.loader.workers)
    rows = [("model", f"{name}, images of {_size(plan)}")]
    rows += _data_rows(plan, parts)
    for part, faults in found.unreadable.items():
        if faults:
            messages = [message for _, message in faults]
            rows.append((f"unreadable, {part}", f"{len(faults)}: {_some(messages)}"))
    if not any(found.unreadable.values()):
        rows.append(("unreadable", "none"))
    rows.append(("in both parts", _duplicates(parts, found)))
    rows += _step_rows(plan)
    print_titled(rows, _WIDTH)
    print()
    print_titled(_groups(plan), _WIDTH)
    print()
    print_titled(_compiled(plan), _WIDTH)
    return DONE


def _size(plan: Plan) -> str:
    H, W = plan.model.config.image_height_width
    return f"{H} x {W} pixels"


def _some(items: list[str]) -> str:
    rest = len(items) - _SHOWN
    return "; ".join(map(one_line, items[:_SHOWN])) + (f"; and {rest} more" if rest > 0 else "")


# -- data


def _survey(parts: dict[str, Any], workers: int) -> Survey:
    """What is wrong with the images, all of which are read."""
    total = sum(map(len, parts.values()))
    with Progress(total, what="reading the images") as bar:
        return survey(parts, workers=workers, done=lambda: bar.advance(1))


def _duplicates(parts: dict[str, Any], found: Survey) -> str:
    """Images that are in training and in validation, too."""
    if "validation" not in parts:
        return "none, as there is no validation"
    both = []
    for group in found.same:
        names = {part: [name for of, name in group if of == part] for part in parts}
        both += [
            f"{name} = {names['training'][0]}" for name in names["validation"] if names["training"]
        ]
    if not both:
        return "none"
    say("warning", f"{len(both)} validation images are training images, too")
    return f"{len(both)}: {_some(both)}"


def _data_rows(plan: Plan, parts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(part, f"{len(data)} images") for part, data in parts.items()]
    classes = plan.train.classes
    if classes is None or not getattr(plan.train, "labelled", True):
        return rows
    counts = [data.counts for data in parts.values()]
    rows.append(("classes", str(len(classes))))
    for i, each in enumerate(classes):
        rows.append((f"  {each}"[:_WIDTH], " + ".join(str(int(count[i])) for count in counts)))
    return rows


# -- the step


def _step_rows(plan: Plan) -> list[tuple[str, str]]:
    recipe = plan.recipe
    rates = [plan.rate(step) for step in range(plan.steps)]
    peak = max(rates)
    return [
        ("recipe", recipe.name),
        ("steps", f"{plan.steps}, in {plan.epochs} epochs of {plan.steps_per_epoch}"),
        (
            "batch",
            f"{recipe.batch_size} images"
            + (f" in {recipe.accumulate} parts" if recipe.accumulate > 1 else ""),
        ),
        (
            "learning rate",
            f"{rates[0]:.3g} at first, {peak:.3g} at step {rates.index(peak)}, {rates[-1]:.3g} at "
            f"last ({recipe.optimizer}, {recipe.schedule})",
        ),
    ]


def _groups(plan: Plan) -> list[tuple[str, str]]:
    """Parameters that train alike, in one row."""
    from vit_flax.training.optimizers import explain

    found: Counter[tuple[str, float, bool]] = Counter()
    arrays: Counter[tuple[str, float, bool]] = Counter()
    state = plan.parameters
    for row in explain(plan.recipe, state, plan.trainable):
        rates = row.rate if isinstance(row.rate, tuple) else (row.rate,)
        for each in rates:
            key = (f"{each:.4g}", row.decay, row.trained)
            found[key] += math.prod(row.shape) // len(rates)
            arrays[key] += 1
    trained = sum(count for (_, _, trains), count in found.items() if trains)
    total = sum(found.values())
    rows = [("parameters", f"{trained:,} of {total:,} train ({100 * trained / total:.3g}%)")]
    for key, count in sorted(found.items(), key=lambda item: (not item[0][2], -float(item[0][0]))):
        rate, decay, trains = key
        what = f"rate x {rate}, weight decay {decay:g}" if trains else "frozen"
        rows.append(("  group", f"{what}: {count:,} in {arrays[key]} arrays"))
    return rows


def _compiled(plan: Plan) -> list[tuple[str, str]]:
    import jax

    state = plan.make_state()
    batch = plan.placed(next(iter(plan.batches(0))))
    say("compiling the step")
    begin = time.monotonic()
    program = plan.step.lower(state, batch).compile()
    seconds = time.monotonic() - begin
    rows = [("compiled in", f"{seconds:.1f} s, once")]
    memory = program.memory_analysis()
    if memory is not None:
        held = memory.argument_size_in_bytes
        more = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        rows.append(
            (
                "memory",
                f"{_bytes(held + more)} on each device, by XLA's account: {_bytes(held)} "
                f"parameters, moments and batch, {_bytes(more)} for the step",
            )
        )
    times = []
    for _ in range(_STEPS):
        begin = time.monotonic()
        state, metrics = program(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.monotonic() - begin)
    each = sorted(times)[len(times) // 2]
    rows.append(
        (
            "seconds per step",
            f"{each:.3g} (median of {_STEPS}; {plan.images_per_step / each:.4g} images/s), "
            f"about {_hours(each * plan.steps)} for all steps, reading and validation aside",
        )
    )
    return rows


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
