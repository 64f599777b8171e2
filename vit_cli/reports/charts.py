"""Charts as SVG for a page of HTML, which has the colours: lines, a confusion matrix, calibration.

Classes that the page's style must have: `axis` (lines), `grid`, `tick` (text), `s0` to `s5` (colour
of a series, as `stroke` or `fill`), `ideal`, `good` and `bad` (cells).
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SERIES = 6
"""Colours that series have; later ones begin again."""

_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 10, 34
_MOST_POINTS = 400

Points = Sequence[tuple[float, float]]


def text(value: Any) -> str:
    """A value as text in HTML."""
    return html.escape(str(value))


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k" if abs(value) < 1e6 else f"{value:.0e}"
    if abs(value) >= 1e-3:
        return f"{value:.6g}"
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers from `low` to `high`, `most` at the most."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, most - 1)
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(scale * factor for factor in (1, 2, 5, 10) if scale * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


class _Frame:
    """The axes of a chart: from values to places on it."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.low_x, self.high_x = x if x[1] > x[0] else (x[0] - 0.5, x[0] + 0.5)
        pad = (y[1] - y[0]) * 0.04 or abs(y[0]) * 0.1 or 0.5
        self.low_y, self.high_y = y[0] - pad, y[1] + pad

    def x(self, value: float) -> float:
        share = (value - self.low_x) / (self.high_x - self.low_x)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low_y) / (self.high_y - self.low_y)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def axes(self, x_title: str, y_ticks: Sequence[float] = ()) -> str:
        parts = []
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        for value in y_ticks or ticks(self.low_y, self.high_y):
            at = self.y(value)
            parts.append(
                f"<line class='grid' x1='{_LEFT}' x2='{right}' y1='{at:.1f}' y2='{at:.1f}'/>"
                f"<text class='tick' x='{_LEFT - 6}' y='{at + 4:.1f}' text-anchor='end'>"
                f"{_number(value)}</text>"
            )
        for value in ticks(self.low_x, self.high_x):
            at = self.x(value)
            parts.append(
                f"<line class='axis' x1='{at:.1f}' x2='{at:.1f}' y1='{bottom}' y2='{bottom + 4}'/>"
                f"<text class='tick' x='{at:.1f}' y='{bottom + 16}' text-anchor='middle'>"
                f"{_number(value)}</text>"
            )
        parts.append(
            f"<line class='axis' x1='{_LEFT}' x2='{right}' y1='{bottom}' y2='{bottom}'/>"
            f"<text class='tick' x='{(right + _LEFT) / 2}' y='{_HEIGHT - 2}' text-anchor='middle'>"
            f"{text(x_title)}</text>"
        )
        return "".join(parts)


def _open(label: str, width: float, height: float) -> str:
    return f"<svg viewBox='0 0 {width:g} {height:g}' role='img' aria-label='{text(label)}'>"


def thinned(points: Points, most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """As many points as fit: of many, the means of neighbours."""
    if len(points) <= most:
        return [*points]
    parts = np.array_split(np.asarray(points, np.float64), most)
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]


def line_chart(title: str, series: Mapping[str, Points], *, x_title: str = "step") -> str:
    """Lines over steps; a series of few points has a dot at each.

    Args:
        title: of the chart, for those who cannot see it.
        series: points (x, y) by name; those that are not finite are left out.
        x_title: of the axis below.

    Returns:
        The chart with its legend; nothing if there is nothing to draw.
    """
    drawn = {
        name: thinned([(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)])
        for name, points in series.items()
    }
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    every = [point for points in drawn.values() for point in points]
    xs, ys = [x for x, _ in every], [y for _, y in every]
    frame = _Frame((min(xs), max(xs)), (min(ys), max(ys)))
    parts = [_open(title, _WIDTH, _HEIGHT), frame.axes(x_title)]
    for number, (name, points) in enumerate(drawn.items()):
        colour = f"s{number % SERIES}"
        places = [(frame.x(x), frame.y(y)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f"<polyline class='line {colour}' points='{path}'/>")
        if len(places) <= 40:
            parts += [
                f"<circle class='dot {colour}' cx='{x:.1f}' cy='{y:.1f}' r='3'>"
                f"<title>{text(name)} {_number(v)} ({x_title} {_number(u)})"
                "</title></circle>"
                for (x, y), (u, v) in zip(places, points, strict=True)
            ]
    return "".join(parts) + "</svg>" + legend([*drawn])


def legend(names: Sequence[str]) -> str:
    """The names of series, each with its colour."""
    items = "".join(
        f"<span><i class='key s{number % SERIES}'></i>{text(name)}</span>"
        for number, name in enumerate(names)
    )
    return f"<div class='legend'>{items}</div>"


def confusion_chart(confusion: np.ndarray, classes: Sequence[str]) -> str:
    """A confusion matrix: counts, coloured by their share of the true class."""
    K = len(classes)
    names = [_short(name, 18) for name in classes]
    longest = max(map(len, names))
    cell = 58 if K <= 8 else 40 if K <= 14 else 24 if K <= 24 else 17
    left = 24 + 6.6 * longest
    top = 10
    # Names below stand at a slant where they are wider than a cell.
    slanted = 6.6 * longest > cell
    below = 18 + (4.5 * longest if slanted else 12)
    width = left + cell * K + (4.9 * longest if slanted else 8)
    height = top + cell * K + below + 18
    totals = np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    shares = confusion / totals
    parts = [_open("Confusion matrix", width, height)]
    small = "small" if cell < 30 else ""
    for i in range(K):
        y = top + i * cell
        parts.append(
            f"<text class='tick {small}' x='{left - 6}' y='{y + cell / 2 + 4:.1f}' "
            f"text-anchor='end'>{text(names[i])}</text>"
        )
        for j in range(K):
            x, count, share = left + j * cell, int(confusion[i, j]), float(shares[i, j])
            kind = "good" if i == j else "bad"
            tip = f"{classes[i]} taken for {classes[j]}: {count} ({share:.1%})"
            parts.append(
                f"<g><title>{text(tip)}</title><rect class='cell' x='{x:.1f}' y='{y:.1f}' "
                f"width='{cell - 1}' height='{cell - 1}'/>"
            )
            if count:
                parts.append(
                    f"<rect class='{kind}' x='{x:.1f}' y='{y:.1f}' width='{cell - 1}' "
                    f"height='{cell - 1}' fill-opacity='{0.08 + 0.92 * share:.2f}'/>"
                    f"<text class='count {small} {'strong' if share > 0.55 else ''}' "
                    f"x='{x + cell / 2 - 0.5:.1f}' y='{y + cell / 2 + 4:.1f}' "
                    f"text-anchor='middle'>{count}</text>"
                )
            parts.append("</g>")
    bottom = top + cell * K
    for j in range(K):
        x = left + j * cell + cell / 2
        if slanted:
            parts.append(
                f"<text class='tick {small}' transform='translate({x - 3:.1f},{bottom + 12}) "
                f"rotate(42)'>{text(names[j])}</text>"
            )
        else:
            parts.append(
                f"<text class='tick {small}' x='{x:.1f}' y='{bottom + 16}' text-anchor='middle'>"
                f"{text(names[j])}</text>"
            )
    parts.append(
        f"<text class='tick' x='{left + cell * K / 2:.1f}' y='{height - 4:.1f}' "
        "text-anchor='middle'>predicted class</text>"
        f"<text class='tick' transform='translate(11,{top + cell * K / 2:.1f}) rotate(-90)' "
        "text-anchor='middle'>true class</text></svg>"
    )
    return f"<div class='matrix' style='max-width:{width:.0f}px'>{''.join(parts)}</div>"


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def calibration_chart(table: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy by confidence, with the share of images in each bin below it."""
    frame = _Frame((0.0, 1.0), (0.0, 1.0))
    frame.low_y, frame.high_y = 0.0, 1.0
    images = sum(row["images"] for row in table) or 1
    base, high = frame.y(0.0), frame.y(0.0) - frame.y(1.0)
    parts = [_open("Calibration", _WIDTH, _HEIGHT), frame.axes("confidence (probability)")]
    for row in table:
        if not row["images"]:
            continue
        x, width = frame.x(row["low"]) + 1, frame.x(row["high"]) - frame.x(row["low"]) - 2
        share = row["images"] / images
        tip = (
            f"{row['low']:.2f} to {row['high']:.2f}: {row['images']} images, accuracy "
            f"{row['accuracy']:.3f}, mean confidence {row['confidence']:.3f}"
        )
        parts.append(
            f"<g><title>{text(tip)}</title><rect class='s0 area' x='{x:.1f}' width='{width:.1f}' "
            f"y='{base - high * share:.1f}' height='{high * share:.1f}'/></g>"
        )
    parts.append(
        f"<line class='ideal' x1='{frame.x(0):.1f}' y1='{frame.y(0):.1f}' x2='{frame.x(1):.1f}' "
        f"y2='{frame.y(1):.1f}'/>"
    )
    full = [row for row in table if row["images"]]
    places = [(frame.x(row["confidence"]), frame.y(row["accuracy"])) for row in full]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f"<polyline class='line s1' points='{path}'/>")
    for (x, y), row in zip(places, full, strict=True):
        size = 2.5 + 6 * math.sqrt(row["images"] / images)
        parts.append(f"<circle class='dot s1' cx='{x:.1f}' cy='{y:.1f}' r='{size:.1f}'/>")
    return (
        "".join(parts)
        + "</svg><div class='legend'><span><i class='key s1'></i>accuracy</span>"
        + "<span><i class='key s0'></i>share of the images</span>"
        + "<span><i class='key ideal'></i>perfectly calibrated</span></div>"
    )


def scatter_chart(targets: np.ndarray, predicted: np.ndarray) -> str:
    """Predicted quantities over the true ones; at most 2000 of them, evenly picked."""
    step = max(1, len(targets) // 2000)
    x, y = targets[::step], predicted[::step]
    low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    frame = _Frame((low, high), (low, high))
    parts = [
        _open("Predicted and true quantities", _WIDTH, _HEIGHT),
        frame.axes("true quantity"),
        f"<line class='ideal' x1='{frame.x(low):.1f}' y1='{frame.y(low):.1f}' "
        f"x2='{frame.x(high):.1f}' y2='{frame.y(high):.1f}'/>",
    ]
    parts += [
        f"<circle class='dot s0' cx='{frame.x(a):.1f}' cy='{frame.y(b):.1f}' r='2.5' "
        "fill-opacity='.6'/>"
        for a, b in zip(x.tolist(), y.tolist(), strict=True)
    ]
    return "".join(parts) + "</svg>" + legend(["predicted quantity"])
