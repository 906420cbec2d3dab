"""Charts as inline SVG for the report: no script, no font and no file from elsewhere; the page's CSS gives the colours.

`lines({"training": [(1, 0.9), (2, 0.4)]}, "loss")` gives a `<figure>`. A drawing is 360 units wide, which is a phone's
screen: text stays readable there, and is never smaller elsewhere. page.html takes a chart in as it is, so a chart holds
numbers and the texts of this project only; text of any other origin would have to be escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 220, 46, 16, 8, 32
LEVELS = 5  # of opacity in the heat map
Scale = Callable[[float], float]


def lines(series: Mapping[str, Sequence[tuple[Any, Any]]], title: str) -> str:
    """A curve for every series over the epochs; values that are no finite number are left out."""
    points = {name: [(x, y) for x, y in values if _finite(x) and _finite(y)] for name, values in series.items()}
    drawn = [point for values in points.values() for point in values]
    if not drawn:
        return f"<p>No finite value of {escape(title.lower())} was logged.</p>"
    low, high = min(y for _, y in drawn), max(y for _, y in drawn)
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    body, x_of, y_of = _axes((1, max(2, *(x for x, _ in drawn))), (low - margin, high + margin), "epoch")
    keys = ""
    for number, (name, values) in enumerate(points.items(), 1):
        if values:
            path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in values)
            x, y = values[-1]
            body += f'<polyline class="l{number}" points="{path}"/>'
            body += f'<circle class="l{number}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3"/>'
            keys += f' <span class="key k{number}">{escape(name)} {number_text(y)}</span>'
    return _figure(f"{title}{keys}", f"{title} over the epochs", body)


def reliability(bins: Sequence[Mapping[str, float]]) -> str:
    """Accuracy in bins of confidence; the diagonal is where both are equal."""
    body, x_of, y_of = _axes((0.0, 1.0), (0.0, 1.0), "confidence")
    for each in bins:
        left, top, width = x_of(each["low"]), y_of(each["accuracy"]), x_of(each["high"]) - x_of(each["low"])
        text = f"{each['images']:,} images: confidence {each['confidence']:.3f}, accuracy {each['accuracy']:.3f}"
        body += f'<rect class="bar" x="{left + 0.5:.1f}" y="{top:.1f}" width="{width - 1:.1f}"'
        body += f' height="{y_of(0.0) - top:.1f}"><title>{text}</title></rect>'
        body += f'<circle class="l2" cx="{x_of(each["confidence"]):.1f}" cy="{top:.1f}" r="3"/>'
    body += f'<path class="diagonal" d="M{x_of(0.0):.1f} {y_of(0.0):.1f}L{x_of(1.0):.1f} {y_of(1.0):.1f}"/>'
    keys = '<span class="key k1">accuracy</span> <span class="key k2">mean confidence of a bin</span>'
    return _figure(f"Accuracy by confidence {keys}", "Reliability diagram", body)


def heat_map(confusion: Sequence[Sequence[int]]) -> str:
    """A cell for every true class (down) and predicted class (across): the darker, the larger its share of the row."""
    cell = (WIDTH - LEFT - RIGHT) / len(confusion)
    paths = [""] * LEVELS
    for row, counts in enumerate(confusion):
        total = sum(counts)
        for column, count in enumerate(counts):
            if count:
                paths[math.ceil(count / total * LEVELS) - 1] += f"M{column} {row}h1v1h-1z"
    side = cell * len(confusion)
    body = f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{side:.1f}" height="{side:.1f}"/>'
    body += f'<g class="cells" transform="translate({LEFT} {TOP}) scale({cell:.4f})">'
    body += "".join(f'<path opacity="{(index + 1) / LEVELS}" d="{path}"/>' for index, path in enumerate(paths) if path)
    body += "</g>"
    for number in (tick for tick in _ticks(1, len(confusion), 8) if tick >= 1):
        place = cell * (number - 0.5)
        body += f'<text class="y" x="{LEFT - 5}" y="{TOP + place + 4:.1f}">{number:g}</text>'
        body += f'<text class="x" x="{LEFT + place:.1f}" y="{TOP + side + 15:.1f}">{number:g}</text>'
    body += f'<text class="x" x="{LEFT + side / 2:.1f}" y="{TOP + side + 29:.1f}">number of the predicted class</text>'
    return _figure("Predicted class by true class", "Confusion matrix", body, TOP + round(side) + 36)


def number_text(value: Any) -> str:
    """A number with as many digits as a person reads; a dash for what is none."""
    if not _finite(value):
        return "–"  # noqa: RUF001 - an en dash
    return (
        f"{value:,.0f}" if abs(value) >= 100 or isinstance(value, int) else f"{value:.{1 if abs(value) >= 10 else 4}f}"
    )


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two numbers: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) <= most)
    return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _axes(x: tuple[float, float], y: tuple[float, float], label: str) -> tuple[str, Scale, Scale]:
    """Grid, numbers and the label of the x-axis, and where a value lies on either axis."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT

    def x_of(value: float) -> float:
        return LEFT + (value - x[0]) / (x[1] - x[0]) * (right - LEFT)

    def y_of(value: float) -> float:
        return bottom - (value - y[0]) / (y[1] - y[0]) * (bottom - TOP)

    body = ""
    for tick in _ticks(*y):
        body += f'<path class="grid" d="M{LEFT} {y_of(tick):.1f}H{right}"/>'
        body += f'<text class="y" x="{LEFT - 5}" y="{y_of(tick) + 4:.1f}">{tick:,g}</text>'
    for tick in (tick for tick in _ticks(*x) if label != "epoch" or tick == int(tick)):
        body += f'<text class="x" x="{x_of(tick):.1f}" y="{bottom + 15}">{tick:g}</text>'
    body += f'<text class="x" x="{(LEFT + right) / 2:.1f}" y="{HEIGHT - 3}">{label}</text>'
    return body, x_of, y_of


def _figure(caption: str, name: str, body: str, height: int = HEIGHT) -> str:
    drawing = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(name)}">{body}</svg>'
    return f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>"
