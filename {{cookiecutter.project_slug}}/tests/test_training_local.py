"""The main job, end to end: `ModelTrainer` in real local containers, and the same job as processes.

Verbs run in a copy of the project, as a user would run them. Container tests are skipped, with the reason, where no
Docker engine answers; REQUIRE_CONTAINERS=1 turns that into a failure.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipelines import runs
from tests.helpers import Verb, verb_environment

NO_ENGINE = {"DOCKER_HOST": "unix:///nowhere/docker.sock"}
SHORT = ("--set", "training.epochs=3")
RUN_FILES = ["metrics.json", "metrics.jsonl", "model.tar.gz", "run.json", "train.log"]


def published(project: Path) -> Path:
    """The one finished run of a copy, checked for completeness."""
    folder = project / "artifacts" / "latest"
    assert [path.name for path in (project / "artifacts").iterdir() if path.name != "latest"] == [
        folder.readlink().name
    ]
    assert runs.NAME.fullmatch(folder.readlink().name)
    assert sorted(path.name for path in folder.iterdir()) == RUN_FILES
    assert list((project / ".cache" / "local").iterdir()) == []
    metrics = read(folder / "metrics.json")
    assert {"val_accuracy", "val_loss", "epochs", "train_images_per_second", "world_size", "seconds"} <= set(metrics)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == metrics["epochs"] == 3
    assert "epoch=3 step=57 train_loss=" in (folder / "train.log").read_text()
    with tarfile.open(folder / "model.tar.gz") as archive:
        facts = json.load(archive.extractfile("model.json") or io.StringIO())
        for name, digest in facts["files"].items():
            content = archive.extractfile(name)
            assert content is not None
            assert hashlib.sha256(content.read()).hexdigest() == digest
    assert facts["classes"] == [str(digit) for digit in range(10)]
    return folder.resolve()


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def owners(folder: Path) -> set[int]:
    return {path.lstat().st_uid for path in folder.rglob("*")}


@pytest.mark.parametrize("instances", [1, 2])
def test_process_mode_trains_evaluates_and_predicts(verb: Verb, project: Path, instances: int) -> None:
    trained = verb("train_local", "--instances", str(instances), *SHORT, **NO_ENGINE)
    assert trained.returncode == 0, trained.stderr
    assert "training as a process on this machine: no Docker engine answers" in trained.stdout
    folder = published(project)
    facts = read(folder / "run.json")
    assert (facts["mode"], facts["image"], facts["data"]) == ("process", None, "data/digits")
    assert 0 < facts["seconds_to_first_step"] < facts["seconds"]
    assert read(folder / "metrics.json")["world_size"] == instances
    evaluated = verb("evaluate")
    assert evaluated.returncode == 0, evaluated.stderr
    assert 0.5 < read(folder / "evaluation.json")["metrics"]["accuracy"]["value"] <= 1
    hint = verb("predict")
    assert hint.returncode == 1
    example = hint.stderr.strip().rpartition("IMAGE=")[2]
    predicted = verb("predict", "--image", example, "--run", folder.name)
    assert predicted.returncode == 0, predicted.stderr
    assert predicted.stdout.startswith(f"{example}: ")


def test_container_mode_trains(verb: Verb, project: Path, nothing_left: str) -> None:
    trained = verb("train_local", "--mode", "container", *SHORT)
    assert trained.returncode == 0, trained.stderr + trained.stdout
    facts = read(published(project) / "run.json")
    assert (facts["mode"], facts["image"], facts["instances"]) == ("container", nothing_left, 1)
    assert "SM_HPS" not in trained.stdout  # the driver's noise stays in the log
    assert "epoch=3 step=57" in trained.stdout
    assert owners(project) == {os.getuid()}
    assert not list(project.rglob("loop.*.pyc"))  # the container, which is root's, compiles nothing in src/
    assert verb("evaluate").returncode == 0


def test_two_containers_train_one_model(verb: Verb, project: Path, nothing_left: str) -> None:
    trained = verb("train_local", "--mode", "container", "--instances", "2", *SHORT)
    assert trained.returncode == 0, trained.stderr + trained.stdout
    folder = published(project)
    assert read(folder / "metrics.json")["world_size"] == 2
    assert "on 2 rank(s), cpu" in (folder / "train.log").read_text()
    assert read(folder / "run.json")["image"] == nothing_left


def start_long_run(project: Path, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """Start a run that would go on for hours and wait for its third epoch; gives the process and the run's name."""
    command = [sys.executable, "-m", "pipelines.train_local", "--set", "training.epochs=100000"]
    command += ["--set", "training.compile=false", *arguments]  # which such a long run would wait for first
    started = subprocess.Popen(
        command, cwd=project, env=verb_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    name, text = "", ""
    assert started.stdout is not None
    for line in started.stdout:
        text += line
        name = line.split()[1] if line.startswith("run ") else name
        if line.startswith("epoch=3 "):
            return started, name
    raise AssertionError(f"the run ended by itself:\n{text}")


@pytest.mark.parametrize("mode", ["container", "process"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything_and_the_run_can_be_resumed(
    verb: Verb, project: Path, mode: str, number: signal.Signals, request: pytest.FixtureRequest
) -> None:
    if mode == "container":
        request.getfixturevalue("nothing_left")
    started, name = start_long_run(project, "--mode", mode)
    if number == signal.SIGINT:  # a terminal sends it to the whole group, compose included
        os.killpg(started.pid, number)
    else:
        started.send_signal(number)
    text, _ = started.communicate(timeout=60)
    assert started.returncode == 130
    assert f"stopped by {number.name}; nothing was published. Resume with RUN={name}" in text
    assert not (project / "artifacts").exists()
    assert not children_in(project)
    assert owners(project) == {os.getuid()}
    assert list((project / ".cache" / "checkpoints" / name).glob("step-*"))
    resumed = verb("train_local", "--mode", mode, "--run", name, "--set", "training.epochs=3")
    assert resumed.returncode == 1  # what the run was started with counts: it would train for hours
    assert f"run {name} resumes with what it was started with" in resumed.stderr


def children_in(project: Path) -> list[str]:
    """Processes that still work in the copy."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").resolve().is_relative_to(project):
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue
    return found
