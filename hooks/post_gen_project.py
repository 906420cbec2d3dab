"""Make the new project a git repository and say what comes next; best effort, offline, and never its loss."""

import contextlib
import shutil
import subprocess
from pathlib import Path

NEXT = """
{{ cookiecutter.project_slug }} is ready. Next:
  cd {{ cookiecutter.project_slug }}
  make train-local                        # sample images, in a local container where Docker runs
  make train-local DATA=folder/of/images  # your own: one sub-folder a class
  make                                    # everything else
"""


def main() -> None:
    """Drop folders that the answers left empty, start a repository, print the next steps."""
    for folder in (Path(".github/workflows"), Path(".github")):
        with contextlib.suppress(OSError):  # it holds files, or it is not there
            folder.rmdir()
    if shutil.which("git"):
        inside = subprocess.run(["git", "rev-parse", "--is-inside-work-tree"], capture_output=True)
        if inside.returncode:
            subprocess.run(["git", "init", "--quiet", "--initial-branch=main"], capture_output=True)
    print(NEXT)


if __name__ == "__main__":
    with contextlib.suppress(Exception):
        main()
