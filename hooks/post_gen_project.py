"""Make the new project a git repository and say what comes next; best effort, offline, and never its loss."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

# What a scope adds to the smaller ones. `make update-template SCOPE=...` bakes again, and so brings it.
OWNS = {
    "cloud": """
        docs/aws.md docs/costs.md docs/deploy.md docs/pipeline.md docs/spot.md infrastructure notebooks
        pipelines/cloud pipelines/endpoint pipelines/report/notebook.py pipelines/pipeline pipelines/registry
        pipelines/sections.py pipelines/training_pipeline.py tests/test_cloud.py
    """,
    "full": """
        .github/workflows/deliver.yml .github/workflows/weekly.yml docs/automation.md docs/batch.md docs/monitoring.md
        docs/tune.md infrastructure/automation.yaml pipelines/batch pipelines/endpoint/shift_traffic.py
        pipelines/monitoring pipelines/tuning src/inference/batch.py src/processing/monitor.py
    """,
    "tracking": "docs/tracking.md pipelines/tracking",  # full, with MLflow
}
ANSWERS = json.loads(r"""{{ cookiecutter | tojson }}""")
NEXT = """
{{ cookiecutter.project_slug }} is ready. Next:
  cd {{ cookiecutter.project_slug }}
  make train-local                        # sample images, in a local container where Docker runs
  make report                             # tests the model and writes a page about it
  make train-local DATA=folder/of/images  # your own: one sub-folder per class
  make                                    # the other verbs
"""


def lacks() -> list[Path]:
    """What the answers leave out."""
    parts = {"local": 0, "cloud": 1, "full": 2}[ANSWERS["scope"]]
    kept = [*OWNS][:parts] + ["tracking"] * bool(ANSWERS["__tracking"])
    return [Path(name) for part in OWNS if part not in kept for name in OWNS[part].split()]


def git(*words: str) -> str:
    """What a git command says; nothing when it fails."""
    return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()


def started(name: str) -> Path | None:
    """The folder that cookiecutter was given: a relative one is of the shell, which this program has left."""
    path = Path(os.environ.get("PWD", ""), Path(name).expanduser())
    return path if name and path.is_absolute() and (path / "cookiecutter.json").is_file() else None


def remember() -> None:
    """Note the template's commit and the answers where cruft looks for them: `make update-template`."""
    sys.path.insert(0, "")
    sys.dont_write_bytecode = True
    from pipelines.update_template import address  # of the new project: without the token that an address may hold

    home, given = (started(ANSWERS.get(name, "")) for name in ("_repo_dir", "_template"))
    commit = git("-C", str(home), "rev-parse", "HEAD") if home else ""
    template = str(given.resolve()) if given else address(git("-C", str(home), "remote", "get-url", "origin"))
    if commit and template:
        answers = {name: value for name, value in ANSWERS.items() if not name.startswith("_")}
        facts = {"template": template, "commit": commit, "checkout": None, "context": {"cookiecutter": answers}}
        Path(".cruft.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    """Remove what the scope lacks, start a repository, print the next steps."""
    for path in lacks():
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if shutil.which("git"):
        remember()
        if not git("rev-parse", "--is-inside-work-tree"):
            git("init", "--quiet", "--initial-branch=main")
    print(NEXT)
    if ANSWERS["mlflow"] and not ANSWERS["__tracking"]:
        print(
            "MLflow is a part of scope full: nothing of it is here now, and `make update-template SCOPE=full` adds it"
        )


if __name__ == "__main__":
    with contextlib.suppress(Exception):
        main()
