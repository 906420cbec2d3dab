"""Evaluate a finished run on the test split of its data set: `make evaluate`, `make evaluate RUN=<name>`.

    python -m pipelines evaluate --run 20261121-093000-a1b2

The split must be the one that was set aside when the run was trained: packed again in another way, it may hold images
that the model has seen. The run's report is rendered again, with what came out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from pipelines import ROOT, SOURCE, runs, terminal
from pipelines.report import page
from pipelines.terminal import UserError


def evaluate(folder: Path) -> int:
    """Write `evaluation.json` into a run's folder; gives the exit code of the script that does it.

    Raises:
        UserError: when the run's data set is gone or has changed.
    """
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    data = ROOT / facts["data"] / "test"
    if not (data / "dataset.json").is_file():
        raise UserError(
            f"{facts['data']} is gone, which run {facts['run']} was trained on; pack it again (`make data`)"
        )
    if json.loads((data / "dataset.json").read_text(encoding="utf-8"))["fingerprint"] != facts["dataset_fingerprint"]:
        raise UserError(
            f"{facts['data']} has changed since run {facts['run']} was trained on it, so its test split may hold "
            f"images that the model has seen; pack it as before, or train again"
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
