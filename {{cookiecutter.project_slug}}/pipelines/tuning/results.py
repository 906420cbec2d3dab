"""What `tune` and `tune-local` show of a search: a table, and a plot as SVG."""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.config import Range, Tuning

WIDTH, HEIGHT, MARGIN = 300, 220, 48  # of a panel, in pixels
BLUE, GREY, GREEN = "#2563eb", "#94a3b8", "#059669"


@dataclass(frozen=True)
class Trial:
    """One training of a search.

    Attributes:
        name: of the run or of the training job.
        values: the searched hyperparameters.
        objective: what it reached; None when it failed or still runs.
        status: as SageMaker's training jobs have it.
    """

    name: str
    values: dict[str, Any]
    objective: float | None
    status: str


def best(tuning: Tuning, trials: Sequence[Trial]) -> Trial | None:
    """The best that succeeded."""
    done = [trial for trial in trials if trial.objective is not None and trial.status == "Completed"]
    sign = 1 if tuning.goal == "Maximize" else -1
    return max(done, key=lambda trial: sign * (trial.objective or 0), default=None)


def table(tuning: Tuning, trials: Sequence[Trial], columns: int = 0) -> str:
    """A line for each trial in the order of their start; a star marks the best.

    A heading that makes it wider than `columns` is broken into several lines.
    """
    first = best(tuning, trials)
    rows = [["", tuning.objective, *tuning.ranges, "status", "name"]]
    for trial in trials:
        reached = "" if trial.objective is None else f"{trial.objective:.4f}"
        values = [short(trial.values.get(name, "")) for name in tuning.ranges]
        rows.append(["*" if trial is first else "", reached, *values, trial.status, trial.name])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if columns and sum(widths) + 2 * len(widths) > columns:
        words = [re.split(r"(?<=[_:])", cell) for cell in rows[0]]
        rows[:1] = [list(line) for line in itertools.zip_longest(*words, fillvalue="")]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def options(trial: Trial) -> str:
    """A trial's values as another verb takes them in ARGS."""
    return shlex.join(word for name, value in trial.values.items() for word in ("--set", f"training.{name}={value}"))


def plot(tuning: Tuning, trials: Sequence[Trial]) -> str:
    """An SVG: the objective by trial with the best so far, and by each hyperparameter."""
    done = [(number, trial) for number, trial in enumerate(trials, 1) if trial.objective is not None]
    first = best(tuning, trials)
    heights = _scaled([trial.objective or 0.0 for _, trial in done], False)
    panels: list[tuple[str, list[Any], bool]] = [("trial", [number for number, _ in done], False)]
    for name, choice in tuning.ranges.items():
        log = isinstance(choice, Range) and choice.scale == "log"
        panels.append((name, [trial.values[name] for _, trial in done], log))
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{columns * WIDTH}" height="{rows * HEIGHT}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
    ]
    inner, depth = WIDTH - MARGIN - 16, HEIGHT - MARGIN - 16
    bottom = MARGIN // 2 + depth
    for index, (name, values, log) in enumerate(panels):
        if any(isinstance(value, str | bool) for value in values) or isinstance(tuning.ranges.get(name), list):
            kinds = sorted(set(values), key=lambda v: (isinstance(v, str), v))
            labels, across = [short(kind) for kind in kinds], _scaled([kinds.index(value) for value in values], False)
        else:
            labels = [short(end) for end in (min(values), max(values))] if values else []
            across = _scaled(values, log)
        labels = labels[:1] if len(set(labels)) == 1 else labels
        parts.append(f'<g transform="translate({index % columns * WIDTH + MARGIN} {index // columns * HEIGHT})">')
        parts.append(f'<rect y="{MARGIN // 2}" width="{inner}" height="{depth}" fill="#f8fafc" stroke="#e2e8f0"/>')
        parts.append(_text(inner / 2, bottom + 32, f"{name}{' (log scale)' if log else ''}", "middle"))
        for place, label in enumerate(labels):
            share = 0.5 if len(labels) == 1 else place / (len(labels) - 1)
            parts.append(_text(_inset(share) * inner, bottom + 16, label, "middle"))
        for share, value in ((0.0, min), (1.0, max)) if done and index % columns == 0 else ():
            end = value(trial.objective or 0.0 for _, trial in done)
            parts.append(_text(-6, bottom - _inset(share) * depth + 4, f"{end:.4g}", "end"))
        points = [(_inset(x) * inner, bottom - _inset(y) * depth) for x, y in zip(across, heights, strict=True)]
        if index == 0:
            parts.append(_text(0, MARGIN // 2 - 8, tuning.objective, "start"))
            pick = min if tuning.goal == "Maximize" else max  # pixels grow downwards
            steps = [(x, pick(y for _, y in points[: place + 1])) for place, (x, _) in enumerate(points)]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in steps)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{GREY}" stroke-width="1.5"/>')
        for (x, y), (_, trial) in sorted(zip(points, done, strict=True), key=lambda point: point[1][1] is first):
            look = f'r="6" fill="{GREEN}"' if trial is first else f'r="4" fill="{BLUE}" fill-opacity="0.65"'
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" {look}/>')
        parts.append("</g>")
    return "\n".join([*parts, "</svg>\n"])


def _inset(share: float) -> float:
    """Points keep away from the panel's edges."""
    return 0.05 + 0.9 * share


def _scaled(values: Sequence[float], log: bool) -> list[float]:
    """Values as shares of the way from the least to the most."""
    scaled = [math.log(value) if log else float(value) for value in values]
    low, span = min(scaled, default=0.0), max(scaled, default=0.0) - min(scaled, default=0.0)
    return [(value - low) / span if span else 0.5 for value in scaled]


def short(value: Any) -> str:
    """A value with the digits that a person reads."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#334155">{words}</text>'
