"""What the benchmarks share: a baked project to measure, and `docs/benchmarks.md`, where each keeps its section."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).resolve().parent.parent
PAGE = TEMPLATE / "docs" / "benchmarks.md"


def own_environment() -> dict[str, str]:
    """The environment without what the `make` that started a benchmark hands down: its ARGS are not the project's."""
    handed_down = ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    return {name: value for name, value in os.environ.items() if name not in handed_down}


def bake(folder: str) -> tuple[Path, str]:
    """Bake the default project into a folder and prepare its environment; gives the project and its Python."""
    from cookiecutter.main import cookiecutter  # not where a benchmark runs inside the project

    options = {"project_slug": "benchmarked"}
    project = Path(cookiecutter(str(TEMPLATE), no_input=True, extra_context=options, output_dir=folder))
    subprocess.run(["make", "setup"], cwd=project, env=own_environment(), check=True)
    return project, str(project / ".venv" / "bin" / "python")


def arguments(description: str) -> argparse.Namespace:
    """The command line of a benchmark that bakes a project and runs itself inside."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runs", type=int, default=5, help="rounds of each measurement")
    parser.add_argument("--inside", type=Path, metavar="PROJECT", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_inside(python: str, script: str, project: Path, runs: int) -> Any:
    """Run a benchmark's script with the project's Python and `--inside`; gives its last line, which is JSON."""
    command = [python, script, "--inside", str(project), "--runs", str(runs)]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(text.splitlines()[-1])


def spread(values: list[float], digits: int | None = None) -> str:
    """Median with the lowest and highest value; digits after the point, by default none from 100 on."""
    after = (0 if statistics.median(values) >= 100 else 1) if digits is None else digits
    if len(values) == 1:
        return f"{values[0]:,.{after}f}"
    return f"{statistics.median(values):,.{after}f} ({min(values):,.{after}f} to {max(values):,.{after}f})"


def keep(title: str, text: str) -> None:
    """Put `text` in the place of what stands under the heading `title`, or at the end of the page."""
    page = PAGE.read_text(encoding="utf-8")
    section = f"## {title}\n\n{text.strip()}\n"
    pattern = rf"(?ms)^## {re.escape(title)}\n.*?(?=^## |\Z)"
    if re.search(pattern, page):
        page = re.sub(pattern, lambda _: section + "\n", page)
    else:
        page += f"\n{section}"
    PAGE.write_text(page.rstrip() + "\n", encoding="utf-8")
