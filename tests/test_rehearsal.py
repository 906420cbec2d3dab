"""The rehearsal of a project's way to AWS: its own tests, a whole journey, and accidents; all in containers."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import TEMPLATE, Bake, Project, fresh_shell

pytestmark = pytest.mark.rehearsal


def run(folder: Path, with_: str, *words: str) -> str:
    """A program of an environment that has the package, which knows no project; what it says."""
    uv = [str(TEMPLATE / ".venv" / "bin" / "uv"), "run", "--isolated", "--no-project", "--with", with_, "python", "-m"]
    done = subprocess.run([*uv, *words], cwd=folder, env=fresh_shell(), capture_output=True, text=True)
    print(done.stdout[-5000:])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_own_tests() -> None:
    """Two files at a time, as they mostly wait for containers; a file stays whole, its last test may look at all."""
    output = run(TEMPLATE / "rehearsal", ".[test]", "pytest", "-p", "no:cacheprovider", "-n2", "--dist=loadfile")
    assert "skipped" not in output.splitlines()[-1] or not os.environ.get("REQUIRE_CONTAINERS")


@pytest.mark.parametrize("scope", [pytest.param("cloud", marks=pytest.mark.slow), "full"])
def test_a_journey(bake: Bake, ready: Project, scope: str) -> None:
    """All verbs for AWS, as they are, in a stand-in that carries out in containers what they ask for."""
    project = bake(scope=scope)
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    done = project.make("rehearse")
    print(done.stdout)
    assert "left: nothing" in done.stdout
    executed = re.search(r"(?m)^executed: .* steps: (.*)$", done.stdout)
    promised = project.make("help").stdout.partition("On SageMaker: the account")[2].partition("The project itself")[0]
    assert executed
    assert {*re.findall(r"(?m)^  make (\S+)", promised)} - {"rehearse"} <= {*executed[1].split(", ")}


def test_accidents(ready: Project) -> None:
    """Where jobs and endpoints end at once, as a GPU is asked for, which is not played."""
    ready.make("train-local", "LOCAL_MODE=process", "ARGS=--set training.epochs=1")
    words = ("--quick", "--artifact", "artifacts/latest/model.tar.gz")
    output = run(ready.path, str(TEMPLATE / "rehearsal"), "rehearsal", "--run", "faults", *words)
    assert output.splitlines()[-1] == "left that bills: nothing"


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "deploy", "pipeline"])
def test_accidents_in_containers(ready: Project, verb: str) -> None:
    output = run(ready.path, str(TEMPLATE / "rehearsal"), "rehearsal", "--run", "faults", verb)
    assert output.splitlines()[-1] == "left that bills: nothing"
