"""The report of a training run or an evaluation: one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_cli.reports import charts
from vit_cli.reports.charts import text
from vit_cli.reports.evaluation import confused, number, scalars, title_of, worst_classes
from vit_cli.terminal.messages import printable
from vit_common.errors import ViTError
from vit_common.files.replace import write_text
from vit_common.metrics import sigmoid

if TYPE_CHECKING:
    from vit_flax.training.evaluate import Evaluation

_MOST_MISTAKES = 24
_MOST_CELLS = 30  # classes that a confusion matrix is drawn for
_MOST_ROWS = 100  # of the table of classes, and of what was skipped
_SIDE = 168  # of a thumbnail, in pixels

_TILES = {
    "single_label_classification": ("top1", "top5", "balanced_accuracy", "f1", "ece"),
    "multi_label_classification": ("map", "f1_micro", "f1_macro", "exact_match", "log_loss"),
    "regression": ("mse", "rmse", "mae", "r2"),
}
_TILE_NAMES = {"ece": "calibration error", "map": "mean average precision"}
_SHARES = frozenset(
    {"balanced_accuracy", "precision", "recall", "f1", "map", "f1_micro", "f1_macro", "exact_match"}
)

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1a1f26; --dim: #5b6673; --rule: #dfe3e8;
  --card: #f6f8fa; --c0: #3b82c4; --c1: #d9622b; --c2: #2f9e62; --c3: #8b5cc7; --c4: #b8860b;
  --c5: #6b7785; --good: #1d7fd1; --bad: #d9622b; --strong: #fff; }
@media (prefers-color-scheme: dark) { :root { --back: #14181d; --text: #e4e8ed; --dim: #9aa6b2;
  --rule: #2e353d; --card: #1c2229; --c0: #64a9e6; --c1: #f08a56; --c2: #58c48c; --c3: #b18cea;
  --c4: #dfb344; --c5: #94a1af; --good: #2f8fe0; --bad: #e0703c; --strong: #fff; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--text);
  background: var(--back); margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 66rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; } h3 { font-size: .95rem; margin: 0 0 .4rem; }
p { margin: .25rem 0 .75rem; } .dim, footer, .note { color: var(--dim); }
.note { font-size: 13px; max-width: 46rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1.25rem 0; }
.tile, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: .7rem .9rem; } .tile b { display: block; font-size: 1.6rem; line-height: 1.2;
  font-variant-numeric: tabular-nums; } .tile span { color: var(--dim); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1rem; } .card { padding: .9rem; min-width: 0; }
svg { display: block; width: 100%; height: auto; }
.grid { stroke: var(--rule); } .axis { stroke: var(--dim); }
.tick { fill: var(--dim); font-size: 11px; } .small { font-size: 9px; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .dot { stroke: none; }
.area { fill-opacity: .3; } .ideal { stroke: var(--dim); stroke-dasharray: 4 4; }
.cell { fill: var(--back); stroke: var(--rule); stroke-width: .5; }
.good { fill: var(--good); } .bad { fill: var(--bad); }
.count { font-size: 11px; fill: var(--text); } .count.small { font-size: 8px; }
.count.strong { fill: var(--strong); font-weight: 600; }
polyline.s0 { stroke: var(--c0); } .s0:not(polyline) { fill: var(--c0); background: var(--c0); }
polyline.s1 { stroke: var(--c1); } .s1:not(polyline) { fill: var(--c1); background: var(--c1); }
polyline.s2 { stroke: var(--c2); } .s2:not(polyline) { fill: var(--c2); background: var(--c2); }
polyline.s3 { stroke: var(--c3); } .s3:not(polyline) { fill: var(--c3); background: var(--c3); }
polyline.s4 { stroke: var(--c4); } .s4:not(polyline) { fill: var(--c4); background: var(--c4); }
polyline.s5 { stroke: var(--c5); } .s5:not(polyline) { fill: var(--c5); background: var(--c5); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: 12px; color: var(--dim);
  margin-top: .35rem; }
.key { display: inline-block; width: 14px; height: 4px; border-radius: 2px; margin-right: .4rem;
  vertical-align: middle; } .key.ideal { height: 0; border-top: 2px dashed var(--dim); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th { color: var(--dim); font-weight: 500; } th, td { text-align: right; padding: .28rem .7rem;
  border-bottom: 1px solid var(--rule); font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, .left th, .left td { text-align: left; }
td { white-space: nowrap; } td:first-child, .left td { white-space: normal;
  overflow-wrap: anywhere; min-width: 7rem; }
.bar { display: inline-block; width: 6rem; height: 7px;
  border-radius: 4px; background: var(--rule); overflow: hidden; vertical-align: middle; }
.bar i { display: block; height: 100%; background: var(--good); }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr));
  gap: .9rem; } figure { margin: 0; min-width: 0; }
figure .picture { display: flex; align-items: center; justify-content: center; height: 9.5rem;
  background: var(--card); border: 1px solid var(--rule); border-radius: 8px; overflow: hidden; }
figure img { max-width: 100%; max-height: 100%; } img.tiny { image-rendering: pixelated;
  width: 100%; height: 100%; object-fit: contain; }
figcaption { font-size: 12.5px; line-height: 1.4; margin-top: .35rem; overflow-wrap: anywhere; }
figcaption .wrong { color: var(--bad); } figcaption .dim { font-size: 11.5px; }
details { margin: .4rem 0; } summary { cursor: pointer; }
footer { font-size: 13px; margin-top: 2.5rem; border-top: 1px solid var(--rule);
  padding-top: .75rem; }
@media print { body { max-width: none; padding: 0; } .card, figure { break-inside: avoid; } }
"""


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    history: Sequence[Mapping[str, Any]] | None = None,
    evaluation: Evaluation | None = None,
    dataset: Any = None,
    settings: Mapping[str, Any] | None = None,
    skipped: Sequence[tuple[str, str]] = (),
) -> None:
    """Write a report; the file that was there survives a failure.

    Args:
        path: an .html file.
        title: of the page.
        history: rows of a training log: "step" and numbers ("loss", "learning_rate", ...), or
            "step" and "validation", a dict of numbers.
        evaluation: of the model.
        dataset: what it was evaluated on, for pictures of the worst mistakes.
        settings: what the page says of the run, by name.
        skipped: (name, message) of images that could not be read, beside those of the evaluation.

    Raises:
        MissingFileError: it cannot be written.

    Example:
        >>> write_report("eval.html", title="pets", evaluation=found, dataset=photos)
    """
    write_text(
        path,
        report(
            title=title,
            history=history,
            evaluation=evaluation,
            dataset=dataset,
            settings=settings,
            skipped=skipped,
        ),
    )


def report(
    *,
    title: str,
    history: Sequence[Mapping[str, Any]] | None = None,
    evaluation: Evaluation | None = None,
    dataset: Any = None,
    settings: Mapping[str, Any] | None = None,
    skipped: Sequence[tuple[str, str]] = (),
) -> str:
    """The page that `write_report` writes."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{_shown(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_shown(title)}</h1>",
    ]
    if evaluation is not None:
        parts += _heading(evaluation)
    if history:
        parts += _curves(history)
    if evaluation is not None and evaluation.metrics:
        parts += _judged(evaluation)
        parts += _mistakes(evaluation, dataset)
    left_out = [*skipped, *(evaluation.skipped if evaluation is not None else ())]
    parts += _skipped(left_out)
    if settings:
        rows = [[str(name), _value(value)] for name, value in settings.items()]
        parts += ["<h2>Settings</h2>", _table(["setting", "value"], rows, left=True)]
    parts.append(f"<footer>{_versions()}</footer></body></html>\n")
    return "".join(parts)


def _shown(value: Any) -> str:
    return text(printable(str(value)))


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _heading(found: Evaluation) -> list[str]:
    count = len(found.names)
    parts = [f"{count} image{'' if count == 1 else 's'}"]
    if found.classes:
        parts.append(f"{len(found.classes)} classes")
    if found.skipped:
        parts.append(f"{len(found.skipped)} left out")
    tiles = "".join(
        f"<div class='tile'><b>{_measure(name, found.metrics[name])}</b>"
        f"<span>{text(_TILE_NAMES.get(name) or title_of(name))}</span></div>"
        for name in _TILES[found.problem_type]
        if name in found.metrics
    )
    return [f"<p class='dim'>{', '.join(parts)}</p><div class='tiles'>{tiles}</div>"]


def _measure(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in _SHARES or name.startswith("top"):
        return f"{100 * value:.1f}%"
    return number(value, 3)


# -- curves

_LOSSES = ("loss", "log_loss")
_SCORES = ("accuracy", "top1", "balanced_accuracy", "f1", "map", "f1_macro", "r2")
_CURVES = ("Loss", "Accuracy", "Learning rate", "Gradient norm")


def _curves(history: Sequence[Mapping[str, Any]]) -> list[str]:
    charts_of: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in _CURVES}
    for row in history:
        for prefix, values in (("", row), ("validation ", row.get("validation"))):
            for name, value in values.items() if isinstance(values, Mapping) else ():
                kind = _kind(name, bool(prefix))
                if kind is None or isinstance(value, bool) or not isinstance(value, (int, float)):
                    continue
                title = prefix + (name if name in _LOSSES[:1] else title_of(name))
                points = charts_of[kind].setdefault(title, [])
                points.append((float(row.get("step", len(points))), float(value)))
    drawn = [
        f"<div class='card'><h3>{kind}</h3>{chart}</div>"
        for kind, series in charts_of.items()
        if (chart := charts.line_chart(kind, series))
    ]
    return ["<h2>Training</h2><div class='charts'>", *drawn, "</div>"] if drawn else []


def _kind(name: str, validation: bool) -> str | None:
    """The chart that a number of the log is in."""
    if name in _LOSSES or name in ("mse",):
        return "Loss"
    if name in _SCORES:
        return "Accuracy"
    if name in ("learning_rate", "rate", "lr"):
        return "Learning rate"
    return "Gradient norm" if name == "gradient_norm" and not validation else None


# -- the evaluation


def _judged(found: Evaluation) -> list[str]:
    metrics = found.metrics
    rows = [[title_of(name), number(value)] for name, value in scalars(metrics)]
    parts = [
        "<h2>Measures</h2><div class='charts'>",
        f"<div class='card'>{_table(['measure', 'value'], rows)}</div>",
    ]
    if "calibration" in metrics:
        parts.append(
            "<div class='card'><h3>Calibration</h3>"
            f"{charts.calibration_chart(metrics['calibration'])}"
            "<p class='note'>Points above the dashed line: the model is right more often than its "
            "probability says; below it: less often. The expected calibration error is the mean "
            "distance from the line, weighted by the images in each bin.</p></div>"
        )
    if found.problem_type == "regression":
        parts.append(
            "<div class='card'><h3>Predicted and true</h3>"
            f"{charts.scatter_chart(found.labels[:, 0], found.logits[:, 0])}</div>"
        )
    parts.append("</div>")
    if found.classes is not None and metrics.get("confusion") is not None:
        parts += _confusion(found, metrics["confusion"])
    if "per_class" in metrics:
        parts += _classes(metrics["per_class"])
    return parts


def _confusion(found: Evaluation, confusion: np.ndarray) -> list[str]:
    classes = found.classes or ()
    parts = ["<h2>Confusion matrix</h2>"]
    if len(classes) <= _MOST_CELLS:
        parts.append(charts.confusion_chart(confusion, [printable(name) for name in classes]))
    pairs = confused(found, 15)
    if pairs and len(classes) > 6:
        rows = [[true, taken, str(count)] for true, taken, count in pairs]
        parts.append("<h3>Most frequent mistakes</h3>")
        parts.append(_table(["true class", "taken for", "images"], rows, left=True))
    return parts


def _classes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    shown = worst_classes([dict(row) for row in rows], _MOST_ROWS)
    names = ["images", "predicted", "precision", "recall", "f1"]
    more = ["average_precision"] if "average_precision" in rows[0] else []
    head = ["class", *names, *more]
    body = []
    for row in shown:
        cells = "".join(f"<td>{number(row[name], 3)}</td>" for name in head[1:])
        share = row[more[0] if more else "f1"]
        bar = "" if share is None else f"<span class='bar'><i style='width:{share:.1%}'></i></span>"
        body.append(f"<tr><td>{_shown(row['class'])}</td>{cells}<td>{bar}</td></tr>")
    titles = "".join(f"<th>{_shown(name.replace('_', ' '))}</th>" for name in head) + "<th></th>"
    note = ""
    if len(shown) < len(rows):
        note = f"<p class='note'>The {len(shown)} of {len(rows)} classes with the lowest F1.</p>"
    return [
        f"<h2>Classes</h2>{note}<div class='scroll'><table><thead><tr>{titles}</tr></thead>",
        f"<tbody>{''.join(body)}</tbody></table></div>",
    ]


# -- the worst mistakes


def worst(found: Evaluation, most: int = _MOST_MISTAKES) -> list[tuple[int, float]]:
    """The images that the model is most wrong about: (index among those that were read, loss).

    One class: the wrong ones, by the probability of their true class, the lowest first. Several
    classes: those with a wrong label, by their binary cross entropy. Quantities: by their error.
    """
    if found.problem_type == "regression":
        losses = np.abs(found.logits - found.labels).sum(axis=1)
        wrong = losses > 0
    elif found.problem_type == "multi_label_classification":
        signed = np.where(found.labels > 0, -found.logits, found.logits).astype(np.float64)
        losses = np.logaddexp(0.0, signed).mean(axis=1)
        wrong = ((found.logits >= 0) != (found.labels > 0)).any(axis=1)
    else:
        probabilities = found.probabilities
        losses = 1 - np.take_along_axis(probabilities, found.labels[:, None], axis=1)[:, 0]
        wrong = found.predicted != found.labels
    order = np.argsort(-np.where(wrong, losses, -1.0), kind="stable")[:most]
    return [(int(i), float(losses[i])) for i in order if wrong[i]]


def _mistakes(found: Evaluation, dataset: Any) -> list[str]:
    chosen = worst(found)
    if not chosen:
        return []
    figures = "".join(
        f"<figure>{_picture(dataset, int(found.index[i]))}"
        f"<figcaption>{_caption(found, i)}</figcaption></figure>"
        for i, _ in chosen
    )
    return ["<h2>Worst mistakes</h2>", f"<div class='mistakes'>{figures}</div>"]


def _caption(found: Evaluation, i: int) -> str:
    name = found.names[i]
    place = f"<br><span class='dim' title='{_shown(name)}'>{_shown(os.path.basename(name))}</span>"
    if found.problem_type == "regression":
        given = ", ".join(number(float(v), 3) for v in found.logits[i])
        true = ", ".join(number(float(v), 3) for v in found.labels[i])
        return f"<span class='wrong'>{given}</span>, true {true}{place}"
    classes = found.classes or ()
    if found.problem_type == "multi_label_classification":
        taken, true = found.logits[i] >= 0, found.labels[i] > 0
        odds = sigmoid(found.logits[i])
        missed = [f"{classes[k]} ({odds[k]:.0%})" for k in np.flatnonzero(true & ~taken)]
        extra = [f"{classes[k]} ({odds[k]:.0%})" for k in np.flatnonzero(taken & ~true)]
        lines = [("missed", missed), ("wrongly given", extra)]
        return (
            "<br>".join(
                f"{kind} <span class='wrong'>{_shown(', '.join(names))}</span>"
                for kind, names in lines
                if names
            )
            + place
        )
    probabilities = found.probabilities_of(i)
    predicted, label = int(found.logits[i].argmax()), int(found.labels[i])
    return (
        f"<span class='wrong'>{_shown(classes[predicted])}</span> {probabilities[predicted]:.0%}"
        f"<br>true: {_shown(classes[label])} {probabilities[label]:.1%}{place}"
    )


def _picture(dataset: Any, index: int) -> str:
    """A thumbnail inside the page."""
    if dataset is None:
        return ""
    image = _thumbnail(dataset, index)
    if image is None:
        return "<div class='picture dim'>no picture</div>"
    tiny = max(image.size) < _SIDE // 2
    kind, options = ("PNG", {}) if tiny else ("JPEG", {"quality": 82})
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    mark = " class='tiny'" if tiny else ""
    source = f"data:image/{kind.lower()};base64,{data}"
    return f"<div class='picture'><img{mark} alt='' src='{source}'></div>"


def _thumbnail(dataset: Any, index: int) -> Any:
    import PIL.Image

    from vit_common.images.pictures import load_image

    try:
        image = dataset.image(index)
        if isinstance(image, np.ndarray):
            image = PIL.Image.fromarray(image)
        image = load_image(image, at_least=(_SIDE, _SIDE)) if not _is_picture(image) else image
        image = image.convert("RGB")
        image.thumbnail((2 * _SIDE, _SIDE))
        return image
    except (ViTError, OSError, TypeError, ValueError):  # the page does without it
        return None


def _is_picture(image: Any) -> bool:
    import PIL.Image

    return isinstance(image, PIL.Image.Image)


# -- what is left


def _skipped(skipped: Sequence[tuple[str, str]]) -> list[str]:
    if not skipped:
        return []
    lines = "".join(f"<li>{_shown(message)}</li>" for _, message in skipped[:_MOST_ROWS])
    rest = len(skipped) - _MOST_ROWS
    more = f"<p class='note'>and {rest} more</p>" if rest > 0 else ""
    return [f"<h2>Images that could not be read ({len(skipped)})</h2><ul>{lines}</ul>{more}"]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    head = "".join(f"<th>{_shown(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{_shown(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    kind = " class='left'" if left else ""
    return (
        f"<div class='scroll'><table{kind}><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _versions() -> str:
    from vit_common.versions import PACKAGE, versions

    found = versions(PACKAGE, "python", "jax", "flax", "optax", "numpy", "pillow")
    return _shown(", ".join(f"{name} {value}" for name, value in found.items() if value))
