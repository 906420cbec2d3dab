"""Open the notebooks in a browser: `make notebook`.

    python -m pipelines notebook --no-browser

JupyterLab and matplotlib are in an environment of their own that uv makes and keeps, on top of the project's: what
trains and serves does without them. Other options are handed to JupyterLab.
"""

from __future__ import annotations

import os
import sys

from pipelines import ROOT, terminal
from pipelines.environment import certificates, find_uv

PACKAGES = ("jupyterlab>=4,<5", "matplotlib>=3.9,<4")


def command(*words: str) -> list[str]:
    """A program in that environment, such as `jupyter`."""
    extra = [f"--with={package}" for package in PACKAGES]
    return [find_uv(ROOT / ".venv"), "run", "--no-project", "--python", sys.executable, *extra, *words]


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Open the notebooks with JupyterLab; other options are handed to it.")
    _, more = parser.parse_known_args()
    bundle = certificates()
    os.environ.update({"SSL_CERT_FILE": bundle} if bundle else {})
    words = command("jupyter", "lab", *more, "notebooks/explore.ipynb")
    return os.execv(words[0], words)  # noqa: S606  in place of this: signals reach it
