"""What `tune` and `tune-local` show of a search."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.sections import Tuning


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


def short(value: Any) -> str:
    """A value with the digits that a person reads."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
