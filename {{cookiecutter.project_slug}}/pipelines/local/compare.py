"""Set two finished runs side by side: `make compare RUN_A=<name> RUN_B=<name>`; without names the two newest.

    python -m pipelines compare --a 20261120-093000-a1b2 --b 20261121-093000-c3d4

What differs in settings, code, data and environment, every metric, and whether the test accuracies really differ.
"""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines import runs, terminal
from pipelines.report import page
from pipelines.report.charts import number_text
from pipelines.report.page import Record
from pipelines.terminal import UserError
from progress import plain
from training.config import shown

FACTS = ("git_commit", "data", "dataset_fingerprint", "pretrained_sha256", "mode", "image", "instances", "device")
NAMES = {"git_commit": "commit", "dataset_fingerprint": "fingerprint of the data", "world_size": "processes",
         "pretrained_sha256": "weights to start from", "seconds": "seconds of the training script",
         "train_images_per_second": "images a second"}  # fmt: skip
DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{28,}\b")  # a commit or a checksum: its beginning tells enough
Row = tuple[str, ...]  # name, A, B, difference


def differences(a: Record, b: Record) -> list[Row]:
    """What the two were made from, where it is not the same."""
    sides = [
        {name: record.run.get(name) for name in FACTS} | record.run.get("versions", {})
        | record.run.get("hyperparameters", {}) for record in (a, b)
    ]  # fmt: skip
    names = dict.fromkeys([*sides[0], *sides[1]])
    return [(NAMES.get(name, name), *(_short(side.get(name)) for side in sides), "") for name in names
            if sides[0].get(name) != sides[1].get(name)]  # fmt: skip


def metrics(a: Record, b: Record) -> list[Row]:
    """Every metric that either has, with its interval, and the difference where both have it."""
    sides: list[dict[str, dict[str, Any]]] = [
        {f"test {name}": found for name, found in record.evaluation.get("metrics", {}).items()}
        | {name: {"value": value} for name, value in record.metrics.items()} for record in (a, b)
    ]  # fmt: skip
    rows = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        found = [side.get(name, {}) for side in sides]
        shown = [number_text(each.get("value")) + (f" ({each['ci_low']:.4f} to {each['ci_high']:.4f})"
                                                   if "ci_low" in each else "") for each in found]  # fmt: skip
        change = found[1]["value"] - found[0]["value"] if all(found) else 0
        rows.append((NAMES.get(name, name), *shown, f"{'+' * (change > 0)}{number_text(change)}" if change else ""))
    return rows


def _short(value: Any) -> str:
    """A fact as people compare it."""
    return "none" if value is None else DIGEST.sub(r"\1", str(value))


def aligned(rows: list[Row]) -> Iterator[str]:
    """The rows as lines of a table that fits a terminal: what is too long for its column goes on below."""
    widths = [max(1, *map(len, column)) for column in zip(*rows, strict=True)]
    while sum(widths) > runs.WIDTH - 2 - 2 * len(widths):
        widths[widths.index(max(widths))] -= 1
    for row in rows:
        cells = [textwrap.wrap(*each, break_on_hyphens=False) for each in zip(row, widths, strict=True)]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            yield "  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()


def verdict(a: Record, b: Record) -> str:
    """Whether the test accuracies differ by more than chance explains.

    The interval of the difference is made from both intervals (Newcombe, "Interval estimation for the difference
    between independent proportions", Statistics in Medicine 17, 1998), as if the images were not the same: too wide.
    """
    first, second = (record.evaluation.get("metrics", {}).get("accuracy") for record in (a, b))
    if not first or not second:
        missing = " and ".join(plain(record.run.get("run")) for record in (a, b) if not record.evaluation)
        return f"no test accuracy to compare: {missing} is not evaluated; `make evaluate RUN=<name>` does it"
    if a.evaluation["dataset_fingerprint"] != b.evaluation["dataset_fingerprint"]:
        return "the test accuracies are of different data sets: their difference says little about the models"
    change = second["value"] - first["value"]
    low = change - math.hypot(first["ci_high"] - first["value"], second["value"] - second["ci_low"])
    high = change + math.hypot(first["value"] - first["ci_low"], second["ci_high"] - second["value"])
    answer = "more than chance explains" if low > 0 or high < 0 else "not more than chance explains"
    return f"test accuracy {change:+.4f} (95 % interval {low:+.4f} to {high:+.4f}): {answer}"


def names(a: str | None, b: str | None) -> tuple[Path, Path]:
    """The folders of both runs: B is the newest, and A the one before it, unless they are named."""
    second = runs.find(b)
    older = sorted(path.parent.name for path in runs.ARTIFACTS.glob("*/model.tar.gz")
                   if runs.NAME.fullmatch(path.parent.name) and path.parent.name < second.name)  # fmt: skip
    if not a and not older:
        raise UserError(f"there is no run before {second.name} to compare it with; name one with RUN_A")
    return runs.find(a or older[-1]), second


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Set two finished runs side by side.")
    parser.add_argument("--a", variable="RUN_A", metavar="RUN", help="name of a run (default: the one before B)")
    parser.add_argument("--b", variable="RUN_B", metavar="RUN", help="name of a run (default: the newest)")
    options = parser.parse_args()
    a, b = (page.read(folder) for folder in names(options.a, options.b))
    try:
        tables, said = [("Differences", differences(a, b)), ("Metrics", metrics(a, b))], verdict(a, b)
    except terminal.DAMAGED as error:
        raise UserError(f"the files of these runs do not hold what a run writes ({shown(error)})") from error
    print(f"A {a.folder.name}\nB {b.folder.name}")
    for title, rows in tables:
        print(f"\n{title.lower()}{'' if rows else ': none'}")
        print("".join(f"  {line}\n" for line in aligned([tuple(map(plain, row)) for row in rows])), end="")
    whole = re.sub("`.*?`", lambda command: command[0].replace(" ", "\0"), said)  # a command stays on one line
    print("\n" + textwrap.fill(whole, runs.WIDTH, break_on_hyphens=False).replace("\0", " "))
    return 0
