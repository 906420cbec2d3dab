"""What the benchmarks share: a baked project to measure in, their command line, and where their numbers are kept.

A benchmark is one program in two parts. The template's Python bakes a project into `build/benchmarks/project` and
starts the same program again with that project's Python and `--project`; that one measures and keeps the numbers, in
`docs/benchmarks.md` (a section each) and in `build/benchmarks.json` (flat, merged with those of other benchmarks).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).resolve().parent.parent
BUILD = TEMPLATE / "build"
OWNERS = ("serve.soak.", "serve.", "")  # of a result's key, by how it begins: who writes anew replaces its own
Measured = dict[str, list[float]]


def own_environment() -> dict[str, str]:
    """The environment without what the `make` that started a benchmark hands down: its ARGS are not the project's."""
    handed_down = ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS")
    return {name: value for name, value in os.environ.items() if name not in handed_down}


def bake() -> tuple[Path, str]:
    """Bake the default project into `build/benchmarks/project`, anew each time, and prepare its environment.

    Returns:
        The project and its Python.
    """
    from cookiecutter.main import cookiecutter  # not where a benchmark runs inside the project

    folder = BUILD / "benchmarks"
    shutil.rmtree(folder / "project", ignore_errors=True)
    project = Path(cookiecutter(str(TEMPLATE), no_input=True, extra_context={"project_slug": "project"},
                                output_dir=str(folder)))  # fmt: skip
    subprocess.run(["make", "setup"], cwd=project, env=own_environment(), check=True)
    return project, str(project / ".venv" / "bin" / "python")


def again(python: str, project: Path) -> int:
    """Run the program that runs, with the same options, by a project's Python inside that project; its exit code."""
    command = [python, sys.argv[0], "--project", str(project), *sys.argv[1:]]
    return subprocess.run(command, env=own_environment()).returncode


def enter(project: Path) -> None:
    """From here on the project's folder is the working one, and its modules can be imported."""
    sys.path[:0] = [str(project), str(project / "src")]
    os.chdir(project)


def path(text: str) -> Path:
    """A path of the command line; it means the same when the working folder is another one."""
    return Path(text).resolve()


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks take, so that `make bench` can hand the same ones to each."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--rounds", type=int, default=5, help="of each measurement (default: 5)")
    made.add_argument("--runs", type=int, default=2,
                      help="of the comparison with other servers, which serve.py has (default: 2)")  # fmt: skip
    made.add_argument("--quick", action="store_true", help="one round of almost nothing: shows only that it works")
    made.add_argument("--project", type=path, metavar="FOLDER",
                      help="measure this project, with the Python that runs this (default: bakes one)")  # fmt: skip
    made.add_argument("--into", type=path, metavar="FOLDER",
                      help="keep benchmarks.md and benchmarks.json there (default: docs/ and build/)")  # fmt: skip
    return made


@dataclass(frozen=True)
class Book:
    """Where numbers are kept.

    Attributes:
        page: a copy of `docs/benchmarks.md`, or itself.
        results: JSON, flat.
        quick: the numbers mean nothing.
    """

    page: Path
    results: Path
    quick: bool = False

    @classmethod
    def of(cls, options: argparse.Namespace) -> Book:
        """The one that the options name; numbers of `--quick` never get into the published one."""
        published = TEMPLATE / "docs" / "benchmarks.md"
        folder: Path | None = options.into or (BUILD / "benchmarks" / "quick" if options.quick else None)
        if folder is None:
            return cls(published, BUILD / "benchmarks.json")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "benchmarks.md").exists():
            shutil.copy(published, folder)
        return cls(folder / "benchmarks.md", folder / "benchmarks.json", options.quick)

    def keep(self, title: str, text: str) -> None:
        """Put `text` in the place of what stands under the heading `title`, or at the end of the page."""
        page = self.page.read_text(encoding="utf-8")
        section = f"## {title}\n\n{text.strip()}\n"
        pattern = rf"(?ms)^## {re.escape(title)}\n.*?(?=^## |\Z)"
        if re.search(pattern, page):
            page = re.sub(pattern, lambda _: section + "\n", page)
        else:
            page += f"\n{section}"
        self.page.write_text(page.rstrip() + "\n", encoding="utf-8")

    def publish(self, title: str, facts: dict[str, Any], measured: Measured, owner: str = OWNERS[-1]) -> None:
        """Print facts and a table, put them into the page, and write them beside the results of other benchmarks."""
        results = {f"{owner}{name}": value for name, value in facts.items()}
        text = "".join(f"- {name}: {value}\n" for name, value in facts.items())
        text += "\n| | median | lowest to highest |\n|---|---:|---:|\n"
        for key, values in measured.items():
            median, lowest, highest = statistics.median(values), min(values), max(values)
            results |= {key: median, f"{key}.lowest": lowest, f"{key}.highest": highest}
            text += f"| {key} | {shown(median)} | {shown(lowest)} to {shown(highest)} |\n"
        self.keep(title, text)
        before = json.loads(self.results.read_text(encoding="utf-8")) if self.results.exists() else {}
        kept = {key: value for key, value in before.items() if next(filter(key.startswith, OWNERS)) != owner}
        self.results.parent.mkdir(parents=True, exist_ok=True)
        self.results.write_text(json.dumps(kept | results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        said = "--quick: these numbers mean nothing; " if self.quick else ""
        print(f"\n{text}\n{said}written to {self.results} and {self.page}", flush=True)


def shown(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: list[float], digits: int | None = None) -> str:
    """Median with the lowest and highest value; digits after the point, by default none from 100 on."""
    after = (0 if statistics.median(values) >= 100 else 1) if digits is None else digits
    if len(values) == 1:
        return f"{values[0]:,.{after}f}"
    return f"{statistics.median(values):,.{after}f} ({min(values):,.{after}f} to {max(values):,.{after}f})"
