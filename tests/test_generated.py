"""The generated project at work in containers: its own tests, its verbs from a fresh clone, and nothing left behind.

All tests that use the engine are here (`ENGINE_FILE` in conftest.py says why).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.conftest import (
    ELSEWHERE,
    FAULTS,
    HOSTILE,
    OTHER_HOSTS,
    TEMPLATE,
    Bake,
    Project,
    add_tests,
    engine_alone,
    fresh_shell,
    host_environment,
    run_tests,
)
from tests.photos import CLASSES, FLOOR, SETTINGS, accuracy


@pytest.mark.parametrize("scope", ["cloud", pytest.param("full", marks=pytest.mark.slow)])
def test_its_own_tests_pass(bake: Bake, ready: Project, scope: str) -> None:
    """Those of the scope `local` are in the next test."""
    project = bake(scope=scope)
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    run_tests(project)


def test_its_own_tests_pass_with_every_other_answer(bake: Bake, ready: Project) -> None:
    """And nothing in an answer is ever executed."""
    project = bake(**HOSTILE)
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    run_tests(project)
    project.make("help")
    assert not list(project.path.parent.rglob("canary"))


def test_hostile_machines(bake: Bake, ready: Project) -> None:
    """The tests of `tests/in_project`, which users need not keep, that are marked: they use the Docker engine."""
    project = bake(scope="full")
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    run_tests(project, "-m", "container", *(name for name in add_tests(project) if name not in ELSEWHERE))


@pytest.mark.hosts
def test_other_hosts(bake: Bake, ready: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same handlers under Ray Serve, and under TorchServe with the PyTorch toolkit, each in its own environment."""
    project = bake(scope="full")
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    names = add_tests(project)
    for variable, host in OTHER_HOSTS.items():
        monkeypatch.setenv(variable, str(host_environment(host)))
    wanted = [f"tests/test_{name}.py" for name in (*OTHER_HOSTS.values(), "hosting")]
    assert {*wanted} <= {*names}
    run_tests(project, *wanted[:-1])
    with engine_alone():  # the last one's hosts include the project's image
        run_tests(project, wanted[-1])


@pytest.mark.parametrize(
    "which", [pytest.param("not one_rank", marks=pytest.mark.faults), pytest.param("one_rank", marks=pytest.mark.slow)]
)
def test_faults(bake: Bake, ready: Project, which: str) -> None:
    """Kills, truncated files, full disks, hung peers: minutes of waiting, so in a run of their own.

    What is tried with one rank and with two is tried with two in CI.
    """
    project = bake(scope="full")
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    assert FAULTS in add_tests(project)
    run_tests(project, FAULTS, "-k", which, "-m", "not container")
    if which == "not one_rank":
        with engine_alone():
            run_tests(project, FAULTS, "-m", "container")


def engine_state() -> set[str]:
    if shutil.which("docker") is None:
        return set()
    commands = (["docker", "ps", "--all", "--quiet"], ["docker", "network", "ls", "--quiet"])
    return {
        line
        for command in commands
        for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    }


@pytest.mark.parametrize("mode", ["auto", "process"])
def test_verbs_from_a_fresh_clone_leave_nothing(ready: Project, mode: str) -> None:
    before = engine_state()
    for words in (["data"], ["train-local", f"LOCAL_MODE={mode}", "ARGS=--set training.epochs=3"], ["evaluate"],
                  ["predict", "IMAGE=data/raw/digits/4/0780.png"],
                  ["serve-local", f"LOCAL_MODE={mode}", "IMAGE=data/raw/digits/4/0780.png", "ARGS=--port 8089"],
                  ["lint"], ["clean"]):  # fmt: skip
        ready.make(*words)
        assert engine_state() == before, f"make {words[0]} left containers or networks"
        changed = ready.run("git", "status", "--porcelain").stdout
        assert not changed, f"make {words[0]} changed {changed}"
    run = json.loads((ready.path / "artifacts" / "latest" / "run.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{40}", run["git_commit"])


def test_a_path_with_spaces_and_a_name_like_no_other(bake: Bake, tmp_path: Path, ready: Project) -> None:
    project = Project(tmp_path / "my own prøject")
    shutil.copytree(bake().path, project.path)
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    photos = tmp_path / "the kids' photos"
    shutil.copytree(ready.path / "data" / "raw" / "digits", photos)
    done = project.make("train-local", f"DATA={photos}", "ARGS=--set training.epochs=2")
    assert "data/the-kids-photos" in done.stdout


@pytest.mark.parametrize("mode", ["container", "process"])
def test_a_second_run_needs_no_network(ready: Project, mode: str, request: pytest.FixtureRequest) -> None:
    """In a network namespace of its own, with the engine's socket and nothing else."""
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("this user cannot make a network namespace")
    if mode == "container":
        request.getfixturevalue("engine")
    words = ("make", "train-local", f"LOCAL_MODE={mode}", "ARGS=--set training.epochs=2")
    ready.make(*words[1:])  # environment, data and image are there
    done = ready.run("unshare", "--net", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"({mode}" in done.stdout
    done = ready.run("unshare", "--net", "make", "predict", "IMAGE=data/raw/digits/4/0780.png")
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_belong_to_a_user_who_is_not_root(bake: Bake, engine: str) -> None:
    """What root wrote in a container is given back; and a container trains where the host has no torch."""
    socket = Path("/var/run/docker.sock")
    if os.getuid() != 0 or not socket.exists():
        pytest.skip("only root can become another user who may use the engine")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are root's alone
        home = Path(folder)
        shutil.copytree(bake().path, home / "project")
        shutil.copy(TEMPLATE / ".venv" / "bin" / "uv", home / "uv")
        subprocess.run(["chown", "-R", "12345:12345", folder], check=True)

        def make(*words: str) -> str:
            environment = fresh_shell() | {"HOME": folder, "PATH": f"{folder}:/usr/local/bin:/usr/bin:/bin"}
            done = subprocess.run(
                ["make", *words], cwd=home / "project", env=environment, capture_output=True, text=True, timeout=900,
                user=12345, group=12345, extra_groups=[socket.stat().st_gid],
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        make("setup", "ARGS=--group laptop")
        assert "(container)" in make("train-local", "LOCAL_MODE=container", "ARGS=--set training.epochs=2")
        assert {path.lstat().st_uid for path in home.rglob("*")} == {12345}
    assert engine


def test_raw_photos_through_the_container(ready: Project, photos: Path, engine: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in photos.rglob("*")}
    done = ready.make("train-local", f"DATA={photos}", "LOCAL_MODE=container", f"ARGS={SETTINGS}")
    assert "packed 3 classes at 32 pixels: 210 train, 45 validation, 45 test" in done.stdout
    assert json.loads((ready.path / "artifacts" / "latest" / "run.json").read_text())["mode"] == "container"
    assert accuracy(ready) >= FLOOR
    for kind in CLASSES:
        answer = ready.make("predict", f"IMAGE={photos / kind / 'IMG 1.JPG'}", "ARGS=--json").stdout
        probabilities = json.loads(answer)["probabilities"][0]
        assert len(probabilities) == 3
    assert {path: path.stat().st_mtime_ns for path in photos.rglob("*")} == before
    assert engine
