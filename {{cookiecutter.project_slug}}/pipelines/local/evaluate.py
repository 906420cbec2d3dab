"""Evaluate a finished run on the test split of its data set: `make evaluate`, `make evaluate RUN=<name>`.

    python -m pipelines evaluate --run 20261121-093000-a1b2

The split must be the one that was set aside when the run was trained: packed again in another way, it may hold images
that the model has seen. The run's report is rendered again, with what came out.
"""

from __future__ import annotations

import contextlib
import os
from argparse import Namespace
from pathlib import Path

from pipelines import ROOT, runs, terminal
from pipelines.local import sandbox
from pipelines.report import page
from pipelines.terminal import UserError
from progress import plain


def evaluate(folder: Path, options: Namespace) -> int:
    """Write `evaluation.json` into a run's folder; gives the exit code of the script that does it.

    Raises:
        UserError: when the run's data set is gone or has changed, or its artifact may not run.
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
    output, archive = folder / "evaluation.json", folder / "model.tar.gz"
    image = sandbox.image(archive, options.trust, mode=options.mode)
    words = ["--artifact", str(archive), "--data", str(data)]
    code = sandbox.run(image, "processing/evaluate.py", words, [archive, data], output)
    if code == 0:
        print(f"-> {Path(os.path.relpath(output, ROOT))}")
    return code


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Evaluate a finished run on the test split of its data set.")
    parser.add_argument("--run", variable="RUN", help="name of a run (default: the newest)")
    sandbox.add_options(parser)
    options = parser.parse_args()
    folder = runs.find(options.run)
    code = evaluate(folder, options)
    if code == 0:
        print(page.attach(folder))
        print(runs.after(folder))
    return code
