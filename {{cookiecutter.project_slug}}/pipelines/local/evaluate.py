"""Evaluate a finished run on the test split of its data set: `make evaluate`, `make evaluate RUN=<name>`.

    python -m pipelines evaluate --run 20261121-093000-a1b2

The split must be the one that was set aside when the run was trained: packed again in another way, it may hold images
that the model has seen. The run's report is rendered again, with what came out.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from pipelines import ROOT, SOURCE, runs, terminal
from pipelines.report import page
from pipelines.terminal import UserError
from progress import plain


def evaluate(folder: Path) -> int:
    """Write `evaluation.json` into a run's folder; gives the exit code of the script that does it.

    Raises:
        UserError: when the run's data set is gone or has changed.
    """
    facts = {"run": folder.name, "data": "data", "dataset_fingerprint": None} | runs.read(folder / "run.json")
    data = ROOT / str(facts["data"]) / "test"
    run, data_set, there = plain(facts["run"]), plain(facts["data"]), False
    with contextlib.suppress(OSError):  # a name that is too long
        there = (data / "dataset.json").is_file()
    if not there:
        raise UserError(f"{data_set} is gone, which run {run} was trained on; pack it again (`make data`)")
    if runs.read(data / "dataset.json").get("fingerprint") != facts["dataset_fingerprint"]:
        raise UserError(
            f"{data_set} has changed since run {run} was trained on it, so its test split may hold images that the "
            "model has seen; pack it as before, or train again"
        )
    output = folder / "evaluation.json"
    script = SOURCE / "processing" / "evaluate.py"
    command = [sys.executable, str(script), "--artifact", str(folder / "model.tar.gz"), "--data", str(data)]
    code = subprocess.run([*command, "--output", str(output)]).returncode
    if code == 0:
        print(f"-> {Path(os.path.relpath(output, ROOT))}")
    return code


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Evaluate a finished run on the test split of its data set.")
    parser.add_argument("--run", variable="RUN", help="name of a run (default: the newest)")
    folder = runs.find(parser.parse_args().run)
    code = evaluate(folder)
    if code == 0:
        print(page.attach(folder))
        print(runs.after(folder))
    return code
