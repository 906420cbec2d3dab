"""What is too long for CI, for `make test-slow`; every pair of options is in test_bake.py."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from tests.conftest import FUZZING, NO_ENGINE, TEMPLATE, Bake, Project, add_tests, fresh_shell, run_tests

pytestmark = pytest.mark.slow


def test_thousands_of_random_requests(bake: Bake, ready: Project) -> None:
    """For 20 minutes: half of them requests to a server, half of them pictures and bodies that are damaged."""
    project = bake(scope="full")
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    assert FUZZING in add_tests(project)
    seed = os.environ.get("FUZZ_SEED", str(random.SystemRandom().randrange(2**30)))  # a failure names its own
    run_tests(project, FUZZING, FUZZ_MINUTES=os.environ.get("FUZZ_MINUTES", "10"), FUZZ_SEED=seed, **NO_ENGINE)


@pytest.mark.parametrize("scope", ["local", "cloud", "full"])
def test_the_lowest_versions(scope: str, bake: Bake) -> None:
    """Of every package that the project names, torch too: an environment of its own."""
    project = bake(scope=scope)
    project.make("setup", "ARGS=--resolution lowest-direct --upgrade")
    done = project.run(project.program("python"), "-c", "import torch; print(torch.__version__)")
    assert done.stdout.startswith("2.10."), done.stdout + done.stderr
    run_tests(project, **NO_ENGINE)


def test_a_soak(tmp_path: Path) -> None:
    """Two minutes with as many clients as would hold the server: answers and 503, and level memory."""
    command = [
        str(TEMPLATE / ".venv" / "bin" / "python"),
        "benchmarks/serve.py",
        "--soak",
        "2",
        "--into",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=TEMPLATE, env=fresh_shell(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
