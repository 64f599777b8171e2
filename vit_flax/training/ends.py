"""How a run ends: with a folder that holds its result, or with a step that is not finite."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from vit_common.errors import some
from vit_common.files.cards import CARD_NAME, write_card
from vit_common.recipes import Recipe
from vit_common.versions import versions
from vit_flax.stacked import unstack_layers

if TYPE_CHECKING:
    from vit_flax.training.fit import Plan, Run
    from vit_flax.training.step import TrainState

_SHOWN = 4  # names in a message
_BARS = "▁▂▃▄▅▆▇█"


# -- the result


def write_result(plan: Plan, run: Run, step: int, *, name: str, adapters: Any = None) -> None:
    """Write the model of a run, its image processor and its card into the folder of the run, which
    is then a checkpoint like any other.

    Args:
        plan, run: as `fine_tune` has them.
        step: that the parameters are of.
        name: of the model that the run began with, as the user gave it.
        adapters: the state's parameters, of which the adapters alone are written; None writes the
            whole model.

    Raises:
        MissingFileError: a file cannot be written.
    """
    assert run.folder is not None
    if adapters is None:
        run.model.save_pretrained(run.folder)
    else:
        base = os.path.abspath(name) if os.path.exists(name) else name
        plan.adapter.save(run.folder, jax.tree.map(np.asarray, adapters), base=base)
    plan.processor.save_pretrained(run.folder)
    card = run.model._model_card(origin=False)
    card = card._replace(
        metadata={**card.metadata, **_base(name)},
        text=card.text.replace("# {repo}", f"# {run.folder.resolve().name}").replace(
            "{repo}", run.folder.resolve().name
        )
        + card_text(plan, run, step, name),
        tags=(*card.tags, "image-classification", "fine-tuned"),
    )
    write_card(run.folder / CARD_NAME, card)


def _shown(name: str) -> str:
    """A name that says nothing of this machine."""
    return Path(name).resolve().name if os.path.exists(name) else name


def _base(name: str) -> dict[str, str]:
    """The front matter's word for a model of the Hub that this one was made of."""
    return {"base_model": name} if name.count("/") == 1 and not os.path.exists(name) else {}


def card_text(plan: Plan, run: Run, step: int, name: str) -> str:
    """What the card says of the training, in Markdown: data, results, curve, recipe, versions."""
    parts = [f"\n## Training\n\nTrained from `{_shown(name)}` with `vit train`; {step} steps.\n"]
    parts.append(_data_text(plan, run))
    numbers = {
        key: value
        for key, value in run.metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    if numbers:
        rows = "".join(f"| {key} | {_number(value)} |\n" for key, value in numbers.items())
        chosen = "the best" if run.best is not None else "the last"
        parts.append(
            f"\n### Results on the validation images\n\nOf step {step}, {chosen} by {plan.metric} "
            f"(these images chose the step).\n\n| measure | value |\n| --- | --- |\n{rows}"
        )
    parts.append(_curve(plan, run))
    rows = "".join(f"| {key} | `{value}` |\n" for key, value in _settings(plan.recipe).items())
    parts.append(
        f"\n### Recipe\n\n| setting | value |\n| --- | --- |\n{rows}| seed | `{plan.seed}` |\n"
    )
    used = versions("vitflax", "jax", "flax", "optax", "numpy", "pillow")
    listed = ", ".join(f"{key} {value}" for key, value in used.items() if value)
    parts.append(f"\n### Versions\n\n{listed}; on {jax.devices()[0].device_kind}.\n")
    return "".join(parts)


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe's name, and what of it is not the default."""
    usual = {field.name: field.default for field in dataclasses.fields(Recipe)}
    always = ("name", "epochs", "batch_size", "optimizer", "learning_rate", "weight_decay")
    given = recipe.to_dict()
    return {key: given[key] for key in given if key in always or given[key] != usual[key]}


def _data_text(plan: Plan, run: Run) -> str:
    lines = [f"- {len(plan.train)} training images"]
    if plan.validation is not None:
        lines.append(f"- {len(plan.validation)} validation images")
    if plan.train.classes is not None:
        counts = plan.train.counts
        listed = [f"{each} ({int(n)})" for each, n in zip(plan.train.classes, counts, strict=True)]
        lines.append(f"- {len(listed)} classes: {some(listed, 20)}")
    if run.skipped:
        lines.append(f"- {len(run.skipped)} images could not be read and were left out")
    return "\n### Data\n\n" + "\n".join(lines) + "\n"


def _curve(plan: Plan, run: Run) -> str:
    if not run.history:
        return ""
    losses = [row.get("loss", float("nan")) for row in run.history]
    head, rows = ["epoch", "step", "loss"], []
    measured = plan.metric if plan.validation is not None else ""
    head += [measured] if measured else []
    for row in run.history:
        cells = [row["epoch"], row["step"], _number(row.get("loss", float("nan")))]
        found = row.get("validation", {}).get(measured)
        cells += ["-" if found is None else _number(found)] if measured else []
        rows.append("| " + " | ".join(map(str, cells)) + " |\n")
    title = "| " + " | ".join(head) + " |\n|" + " --- |" * len(head) + "\n"
    return f"\n### Curve\n\nLoss by epoch: {bars(losses)}\n\n{title}{''.join(rows)}"


def bars(values: list[float]) -> str:
    """Numbers as a row of bars, one for each."""
    finite = [value for value in values if np.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        _BARS[round((value - low) * scale)] if np.isfinite(value) else "?" for value in values
    )


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


# -- a step that is not finite


def first_not_finite(plan: Plan, state: TrainState, batch: Mapping[str, Any], step: int) -> str:
    """Where the first number that is not finite comes from, in a sentence.

    The network is run layer by layer, without a compiled program, and each layer's output is looked
    at.

    Args:
        plan: of the run.
        state: before the step; a step that is not finite leaves it as it was.
        batch: of the step, as the loader gives it.
        step: counted from 0.
    """
    params = plan.materialize(state.params)
    bad = _names_not_finite(params)
    if bad:
        return f"Parameters are not finite already: {some(bad, _SHOWN)}."
    now = jax.random.fold_in(state.key, step)
    prepared = dict(plan.placed(batch))
    if plan.task.prepare is not None:
        prepared = dict(plan.task.prepare(prepared, jax.random.fold_in(now, 0)))
    if not _finite(prepared["pixel_values"]):
        return "The pixels are not finite."
    key = jax.random.fold_in(now, 1)
    if plan.frozen is not None:
        return "The head alone trains: its inputs are finite, and its output or gradient is not."
    layer = _first_layer(plan.task.model, params, prepared, key)
    if layer is not None:
        return f"The first layer with an output that is not finite is {layer}."

    def loss(params: Any) -> jax.Array:
        outputs = plan.task.model(
            prepared["pixel_values"], params=params, dropout_rng=key, train=True, return_dict=True
        )
        found = plan.task.loss(outputs, prepared)
        return found.sum if hasattr(found, "sum") and hasattr(found, "count") else found

    value, gradients = jax.value_and_grad(loss)(params)
    if not _finite(value):
        return "The output of every layer is finite; the loss is not."
    bad = _names_not_finite(gradients)
    if bad:
        return f"The loss is finite; the gradient is not, of {some(bad[::-1], _SHOWN)}."
    return "All outputs and gradients are finite, but together too large for their dtype."


def _first_layer(model: Any, params: Any, batch: Mapping[str, Any], key: Any) -> str | None:
    found: list[str] = []

    def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        if not found and context.method_name == "__call__" and not _finite(output):
            found.append("/".join(context.module.path) or "the network")
        return output

    config = copy.deepcopy(model.module.config)
    config.gradient_checkpointing = False
    module = model.module.clone(config=config, scan_layers=False)
    pixels = jnp.transpose(batch["pixel_values"], (0, 2, 3, 1))  # (B, H, W, C)
    more = {name: batch[name] for name in ("bool_masked_pos",) if name in batch}
    with nn.intercept_methods(look):
        module.apply(
            {"params": unstack_layers(params)},
            pixels,
            deterministic=False,
            rngs={"dropout": key, "droppath": key},
            **more,
        )
    return found[0] if found else None


def _finite(tree: Any) -> bool:
    return all(
        isinstance(leaf, jax.core.Tracer) or bool(jnp.isfinite(leaf).all())
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    )


def _names_not_finite(tree: Any) -> list[str]:
    return ["/".join(path) for path, leaf in flatten_dict(tree).items() if not _finite(leaf)]
