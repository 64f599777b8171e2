"""The report of `vit verify`: one HTML page that needs nothing else, JSON, or Markdown."""

from __future__ import annotations

import html as escape
import json
import math
from typing import Any

from vit_cli.terminal.messages import counted

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _ZERO = 920, 380, 70, 90, 30
_COLOURS = ("#0b5cad", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#0e7490", "#a16207", "#475569")


def summary(found: Any) -> list[list[str]]:
    """A table, its header first: one line a device, dtype and precision."""
    table = [["device", "dtype", "precision", "against", "worst stage", "value", "bound", "result"]]
    for row in found.rows:
        worst = row.worst
        cells = ["-", "-", "-"]
        if worst is not None:
            numbers = (worst.value, worst.bound)
            absolute = row.rule == "absolute"
            texts = [f"{n:.2e}" if absolute else f"{n:.2f} x" for n in numbers]
            cells = [worst.stage.name, *texts]
        start = [row.device, row.dtype, row.precision, row.against]
        table.append([*start, *cells, "pass" if row.passed else "FAIL"])
    return table


def remarks(row: Any) -> list[str]:
    """What is wrong with a row, and why as far as that is known."""
    lines = list(row.unmatched)
    if _is_training(row):
        lines = _losses(row) + lines
    over = row.first_over
    if over is None:
        return lines
    if _is_training(row):
        return lines + _drift(row, over)
    where = ", ".join(map(str, over.stage.where))
    lines.append(
        f"the first stage outside its bound is {over.stage.name}: {over.value:.3g} "
        f"(bound {over.bound:.3g}), largest at ({where})"
    )
    if not math.isfinite(over.value):
        lines.append("there it is infinite or no number (NaN)")
    if row.causes is None:
        lines.append("no cause was looked for: none is known of such a stage, dtype or precision")
    elif not row.causes:
        lines.append("none of the known causes makes it agree")
    for cause in row.agreeing or (row.causes or [])[:1]:
        how = "it agrees with" if row.agreeing else "it comes closest with"
        lines.append(f"{how} {cause.change}: {cause.before:.2g} becomes {cause.after:.2g}")
    return lines


def _is_training(row: Any) -> bool:
    """Whether a row compares two training runs."""
    return getattr(row, "steps", 0) > 0


def _losses(row: Any) -> list[str]:
    """What the runs learnt, in a line."""
    first, last = row.losses[0][0], row.losses[0][-1]
    return [f"{_count_of(row.steps, 'step')} of {row.optimizer}: loss {first:.4f} to {last:.4f}"]


def _drift(row: Any, over: Any) -> list[str]:
    """Where two runs drift apart, and why as far as that is known."""
    lines = [
        f"the runs drift apart from step {row.drifts_from} on, first in the {over.stage.name} "
        f"(bound {over.bound:.3g}); the largest difference there is {over.value:.3g}, at step "
        f"{over.stage.where[0]}"
    ]
    if not math.isfinite(over.value):
        lines.append("there it is infinite or no number (NaN)")
    if row.causes is None:
        lines.append("no cause was looked for: that takes float64")
    elif not row.causes:
        lines.append("none of the known definitions makes the drift vanish")
    for cause in row.agreeing or (row.causes or [])[:1]:
        how = "the drift vanishes" if row.agreeing else "most of the drift vanishes"
        lines.append(
            f"{how} if the PyTorch run has {cause.change}: {cause.before:.2g} becomes "
            f"{cause.after:.2g}"
        )
    return lines


def as_json(found: Any) -> str:
    """Everything, for programs."""
    return json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n"


def markdown(found: Any) -> str:
    """The summary and the stages as Markdown."""
    lines = [f"# {_title(found)}", "", _verdict(found), ""]
    lines += _markdown_table(summary(found))
    for row in found.rows:
        lines += ["", f"## {_name(row)}", ""]
        lines += _markdown_table(_stages(row))
        lines += [f"\n{remark}" for remark in remarks(row)]
    lines += [f"\n{note}" for note in found.notes]
    lines += [
        "",
        ", ".join(f"{name} {version}" for name, version in found.versions.items() if version),
    ]
    return "\n".join(lines) + "\n"


def _markdown_table(rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(rows[0]), "|" + "---|" * len(rows[0]), *map(line, rows[1:])]


def _stages(row: Any) -> list[list[str]]:
    table = [["stage", "max abs", "of the largest value", "where", "value", "bound", "result"]]
    for checked in row.stages:
        stage = checked.stage
        table.append(
            [
                stage.name,
                f"{stage.max_abs:.2e}",
                f"{stage.relative:.2e}",
                "(" + ", ".join(map(str, stage.where)) + ")",
                f"{checked.value:.2e}",
                f"{checked.bound:.2e}",
                "pass" if checked.passed else "FAIL",
            ]
        )
    return table


def _is_preprocessing(row: Any) -> bool:
    """Whether a row compares what the two models are given, and not the networks."""
    return [checked.stage.name for checked in row.stages] == ["pixels"]


def _name(row: Any) -> str:
    """What a row compares; different for each."""
    if _is_preprocessing(row):
        return f"preprocessing, against {row.against}"
    return f"{row.device}, {row.dtype}, {row.precision}, against {row.against}"


def _count(items: Any, noun: str) -> str:
    return _count_of(len(items), noun)


def _count_of(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _title(found: Any) -> str:
    if any(map(_is_training, found.rows)):
        return f"Training of {found.first} in JAX against PyTorch"
    other = "its PyTorch twin" if found.second is None else found.second
    return f"{found.first} against {other}"


def _verdict(found: Any) -> str:
    size = " x ".join(map(str, found.image_size))
    what = f"{found.family}, {counted(found.batch)} of {size} pixels (height x width)"
    return f"{'Within bounds' if found.passed else 'OUTSIDE bounds'}: {what}."


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem;
       color: #111; background: #fff; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #ddd; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; } .scroll { overflow-x: auto; }
.FAIL { color: #b91c1c; font-weight: 600; } .pass { color: #15803d; }
.verdict { font-size: 1.1rem; font-weight: 600; } footer { color: #555; font-size: 13px; }
svg { width: 100%; height: auto; } details { margin: .5rem 0; }
"""


def html(found: Any) -> str:
    """One page: verdict, plot of the error by depth, and every stage."""
    text = escape.escape
    mark = "pass" if found.passed else "FAIL"
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{text(_title(found))}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{text(_title(found))}</h1><p class='verdict {mark}'>{text(_verdict(found))}</p>",
        _html_table(summary(found)),
        f"<h2>{'Drift by step' if any(map(_is_training, found.rows)) else 'Error by depth'}</h2>",
        _plot(found.rows),
    ]
    for row in found.rows:
        parts.append(f"<h2>{text(_name(row))}</h2>")
        parts += [f"<p>{text(remark)}</p>" for remark in remarks(row)]
        opened = "" if row.passed else " open"
        parts.append(f"<details{opened}><summary>{_count(row.stages, 'stage')}</summary>")
        parts.append(_html_table(_stages(row)) + "</details>")
    versions = ", ".join(f"{name} {value}" for name, value in found.versions.items() if value)
    notes = "".join(f"<p>{text(note)}</p>" for note in found.notes)
    parts.append(f"{notes}<footer><p>{text(versions)}</p></footer></body></html>\n")
    return "".join(parts)


def _html_table(rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape.escape(cell)}</th>" for cell in rows[0])
    body = []
    for row in rows[1:]:
        cells = "".join(
            f"<td class='{cell}'>{cell}</td>"
            if cell in ("pass", "FAIL")
            else f"<td>{escape.escape(cell)}</td>"
            for cell in row
        )
        body.append(f"<tr>{cells}</tr>")
    return (
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _plot(rows: list[Any]) -> str:
    """An SVG of the largest difference by stage, or by step of a training run; logarithmic, with
    one line per row, or per kind of number in a training run."""
    lines = [
        (f"{_name(row)}: {kind}", [(str(step), value) for step, value in enumerate(values)])
        for row in rows
        if _is_training(row)
        for kind, values in row.drift.items()
    ] or [
        (
            _name(row),
            [
                (checked.stage.name, checked.stage.max_abs)
                for checked in row.stages
                if not checked.stage.name.startswith(("gradient", "loss"))
            ],
        )
        for row in rows
        if not _is_preprocessing(row)  # one point is no line
    ]
    names = max((points for _, points in lines), key=len, default=[])
    order = {name: place for place, (name, _) in enumerate(names)}
    values = [v for _, points in lines for n, v in points if n in order and 0 < v < math.inf]
    if not values or len(order) < 2:
        return "<p>There is nothing to plot: no stage of the network differs.</p>"
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 1)
    right, top = _WIDTH - 60, 20  # the last name hangs over
    zero = _HEIGHT - _BOTTOM  # stages without any difference have a line of their own
    floor = zero - _ZERO if any(v == 0 for _, points in lines for _, v in points) else zero

    def x(place: int) -> float:
        return _LEFT + (right - _LEFT) * place / (len(order) - 1)

    def y(value: float) -> float:
        if value == 0:
            return zero
        level = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return floor - (floor - top) * level

    height = _HEIGHT + 20 * len(lines)
    out = [
        f"<svg viewBox='0 0 {_WIDTH} {height}' role='img' "
        "aria-label='Largest difference by stage or step'>"
    ]
    for power in range(low, high + 1):
        at = y(10.0**power)
        out.append(
            f"<line x1='{_LEFT}' x2='{right}' y1='{at:.1f}' y2='{at:.1f}' stroke='#e5e5e5'/>"
            f"<text x='{_LEFT - 8}' y='{at + 4:.1f}' text-anchor='end' font-size='12'>"
            f"1e{power}</text>"
        )
    if floor < zero:
        out.append(
            f"<line x1='{_LEFT}' x2='{right}' y1='{zero}' y2='{zero}' stroke='#999' "
            f"stroke-dasharray='3 3'/><text x='{_LEFT - 8}' y='{zero + 4}' text-anchor='end' "
            "font-size='12'>0</text>"
        )
    step = max(1, len(order) // 16)
    for name, place in order.items():
        if place % step == 0 or place == len(order) - 1:
            at = x(place)
            out.append(
                f"<text transform='translate({at:.1f},{zero + 12}) rotate(40)' font-size='11'>"
                f"{escape.escape(name)}</text>"
            )
    for number, (label, points) in enumerate(lines):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [(x(order[n]), y(v)) for n, v in points if n in order and math.isfinite(v)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        out.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>")
        out += [f"<circle cx='{a:.1f}' cy='{b:.1f}' r='2.5' fill='{colour}'/>" for a, b in places]
        at = _HEIGHT + 20 * number
        out.append(
            f"<rect x='{_LEFT}' y='{at - 10}' width='18' height='4' fill='{colour}'/>"
            f"<text x='{_LEFT + 26}' y='{at - 4}' font-size='13'>{escape.escape(label)}</text>"
        )
    out.append("</svg>")
    return "".join(out)
