"""Tells in about a minute whether a change in one room is right: `make try ROOM=cloud`.

It bakes the largest project into build/try, and runs ruff, mypy and the room's tests in it. No test here needs a Docker
engine, and the long ones are left out: `make test` has them all.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time

from cookiecutter.main import cookiecutter

from tests.conftest import NO_ENGINE, TEMPLATE, Project, add_tests

# The quick tests of `tests/in_project` by room: folders of pipelines/ and src/, and `top` for the modules above them.
ROOMS = {
    "top": "config terminal requests",
    "local": "config terminal failures",
    "report": "report",
    "cloud": "bootstrap costs doctor requests",
    "endpoint": "deploy costs",
    "registry": "registry",
    "pipeline": "pipeline triggers",
    "tuning": "tune",
    "batch": "batch_transform batch",
    "monitoring": "monitor",
    "tracking": "tracking",
    "processing": "preprocess ugly_data imaging",
    "training": "loop feed augment model pretrained",
    "inference": "artifact server parity batch",
}
FOLDER = TEMPLATE / "build" / "try"


def bake() -> Project:
    """A fresh project of the scope `full`, in the environment of the last one where that fits."""
    project = FOLDER / "image_classifier"
    facts = project / "pyproject.toml"
    before = facts.read_bytes() if facts.is_file() else b""
    for path in project.iterdir() if project.is_dir() else ():
        if path.name != ".venv":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    answers = {"scope": "full", "mlflow": True}
    cookiecutter(str(TEMPLATE), no_input=True, extra_context=answers, output_dir=str(FOLDER), overwrite_if_exists=True)
    made = Project(project)
    if facts.read_bytes() == before and (project / ".venv" / ".ready").is_file():
        (project / ".venv" / ".ready").touch()
    else:
        print(made.make("setup").stdout, flush=True)
    return made


def main() -> int:
    """Bake, then types beside the rest; 0 when all is right."""
    room = (sys.argv[1:] or [""])[0]
    if room not in ROOMS:
        print(f"error: ROOM is {room!r}; it must be one of {', '.join(ROOMS)}", file=sys.stderr)
        return 2
    started, project = time.monotonic(), bake()
    add_tests(project)
    python, caches = project.program("python"), TEMPLATE / ".cache" / "try"
    tests = [f"tests/test_{name}.py" for name in ROOMS[room].split()]
    mypy = [python, "-m", "mypy", "--cache-dir", str(caches / "mypy"), "src", "pipelines", "tests"]
    types = subprocess.Popen(mypy, cwd=project.path)
    codes = []
    for words in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["pytest", "-x", "-q", *tests]):
        done = project.run(python, "-m", *words, RUFF_CACHE_DIR=str(caches / "ruff"), **NO_ENGINE)
        print("\n".join((done.stdout + done.stderr).splitlines()[-40:]), flush=True)
        codes.append(done.returncode)
    codes.append(types.wait())
    print(f"{room}: {'something is wrong, see above' if any(codes) else 'all is right'}, "
          f"{time.monotonic() - started:.0f} seconds")  # fmt: skip
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
