"""Render the report of a finished run, `artifacts/<run>/report.html`: `make report`, `make report RUN=<name>`.

    python -m pipelines report --run 20261121-093000-a1b2

A run that has not been evaluated on the test split is evaluated first; where that cannot be done, the report says so
and shows the rest.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipelines import ROOT, runs, terminal
from pipelines.local import evaluate, sandbox
from pipelines.report import page
from pipelines.terminal import UserError


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Render the HTML report of a finished run.")
    parser.add_argument("--run", variable="RUN", help="name of a run (default: the newest)")
    sandbox.add_options(parser)
    options = parser.parse_args()
    folder = runs.find(options.run)
    page.read(folder)  # what cannot be reported is not evaluated either
    if not (folder / "evaluation.json").exists():
        try:
            if evaluate.evaluate(folder, options):
                print("the report has no part on the test split: evaluation failed, see above")
        except UserError as error:
            print(f"the report has no part on the test split: {error}")
    print(f"report: {Path(os.path.relpath(page.write(folder), ROOT))}")
    return 0
