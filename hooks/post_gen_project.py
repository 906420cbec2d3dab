"""Make the new project a git repository and say what comes next; best effort, offline, and never its loss."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from pathlib import Path

ANSWERS = json.loads(r"""{{ cookiecutter | tojson }}""")
NEXT = """
{{ cookiecutter.project_slug }} is ready. Next:
  cd {{ cookiecutter.project_slug }}
  make train-local                        # sample images, in a local container where Docker runs
  make train-local DATA=folder/of/images  # your own: one sub-folder a class
  make                                    # everything else
"""


def git(*words: str) -> str:
    """What a git command says; nothing when it fails."""
    return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()


def remember() -> None:
    """Note the template's commit and the answers where cruft looks for them: `make update-template`."""
    home, given = ANSWERS.get("_repo_dir", ""), Path(ANSWERS.get("_template", ""))
    commit = git("-C", home, "rev-parse", "HEAD") if home else ""
    template = str(given.resolve()) if given.is_dir() else git("-C", home, "remote", "get-url", "origin")
    if commit and template:
        answers = {name: value for name, value in ANSWERS.items() if not name.startswith("_")}
        facts = {"template": template, "commit": commit, "checkout": None, "context": {"cookiecutter": answers}}
        Path(".cruft.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    """Drop folders that the answers left empty, start a repository, print the next steps."""
    for folder in (Path(".github/workflows"), Path(".github")):
        with contextlib.suppress(OSError):  # it holds files, or it is not there
            folder.rmdir()
    if shutil.which("git"):
        remember()
        if not git("rev-parse", "--is-inside-work-tree"):
            git("init", "--quiet", "--initial-branch=main")
    print(NEXT)


if __name__ == "__main__":
    with contextlib.suppress(Exception):
        main()
