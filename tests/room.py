"""Tells in about a minute whether a change in one room is right: `make try ROOM=cloud`.

It bakes the largest project into build/try, and runs ruff, mypy and the room's tests in it, as many as it has time for.
None needs a Docker engine. `ALL=1` runs all of the room, and `make test` everything.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

from cookiecutter.main import cookiecutter

from tests.conftest import NO_ENGINE, TEMPLATE, Project, add_tests, fresh_shell

# The tests of `tests/in_project` by room: folders of pipelines/ and src/, and `top` for the modules above them.
ROOMS = {
    "top": "config terminal",
    "local": "config terminal failures",
    "report": "report",
    "cloud": "doctor costs bootstrap",
    "endpoint": "deploy",
    "registry": "registry",
    "pipeline": "pipeline triggers",
    "tuning": "tune",
    "batch": "batch_transform batch",
    "monitoring": "monitor",
    "tracking": "tracking",
    "processing": "preprocess ugly_data imaging",
    "training": "loop feed augment model pretrained",
    "inference": "requests artifact server parity batch",
}
FOLDER = TEMPLATE / "build" / "try"
SECONDS, INTERRUPTED = 40, 2  # for tests; what pytest exits with when it was stopped and nothing had failed


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


def check(project: Project, tests: list[str], caches: Path, everything: bool) -> bool:
    """Run the tests, first those that failed last time, until SECONDS are over; gives whether all that ran passed."""
    caches.mkdir(parents=True, exist_ok=True)
    result = caches / "result.xml"
    words = ["-x", "-q", "--failed-first", "-o", f"cache_dir={caches}", f"--junitxml={result}", *tests]
    command = [project.program("python"), "-m", "pytest", *words]
    pytest = subprocess.Popen(command, cwd=project.path, env=fresh_shell() | NO_ENGINE)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return pytest.wait(None if everything else SECONDS) == 0
    pytest.send_signal(signal.SIGINT)
    code, ran = pytest.wait(), len(ET.parse(result).findall(".//testcase")) - 1  # less the one that was stopped
    print(f"stopped after {SECONDS} seconds: {max(ran, 0)} tests had ended, and ALL=1 runs the others too", flush=True)
    return code == INTERRUPTED and ran > 0


def main() -> int:
    """Bake, then types beside the rest; 0 when all is right."""
    room = (sys.argv[1:] or [""])[0]
    if room not in ROOMS:
        print(f"error: ROOM is {room!r}; it must be one of {', '.join(ROOMS)}", file=sys.stderr)
        return 2
    started, project = time.monotonic(), bake()
    add_tests(project)
    python, caches = project.program("python"), TEMPLATE / ".cache" / "try"
    mypy = [python, "-m", "mypy", "--cache-dir", str(caches / "mypy"), "src", "pipelines", "tests"]
    types, right = subprocess.Popen(mypy, cwd=project.path), []
    for words in (["ruff", "check", "--quiet", "."], ["ruff", "format", "--check", "--quiet", "."]):
        done = project.run(python, "-m", *words, RUFF_CACHE_DIR=str(caches / "ruff"))
        print(done.stdout + done.stderr, end="", flush=True)
        right.append(done.returncode == 0)
    tests = [f"tests/test_{name}.py" for name in ROOMS[room].split()]
    right.append(check(project, tests, caches / "pytest", bool(os.environ.get("ALL"))))
    right.append(types.wait() == 0)
    verdict = "nothing wrong was found" if all(right) else "something is wrong, see above"
    print(f"{room}: {verdict}, {time.monotonic() - started:.0f} seconds")
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
