"""The main job, end to end: `ModelTrainer` in real local containers, and the same job as processes.

Verbs run in a copy of the project, as a user would run them. Container tests are skipped, with the reason, where no
Docker engine answers; REQUIRE_CONTAINERS=1 turns that into a failure.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipelines import runs
from tests.helpers import Verb

NO_ENGINE = {"DOCKER_HOST": "unix:///nowhere/docker.sock"}
SHORT = ("--set", "training.epochs=3")
RUN_FILES = ["metrics.json", "metrics.jsonl", "model.tar.gz", "report.html", "run.json", "train.log"]


def published(project: Path) -> Path:
    """The one finished run of a copy, checked for completeness."""
    folder = project / "artifacts" / "latest"
    assert [path.name for path in (project / "artifacts").iterdir() if path.name != "latest"] == [
        folder.readlink().name
    ]
    assert runs.NAME.fullmatch(folder.readlink().name)
    names = sorted(path.name for path in folder.iterdir())
    assert [name for name in names if not name.startswith("events.")] == RUN_FILES  # those are TensorBoard's
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
    trained = verb("train-local", "--instances", str(instances), *SHORT, **NO_ENGINE)
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
    trained = verb("train-local", "--mode", "container", *SHORT)
    assert trained.returncode == 0, trained.stderr + trained.stdout
    facts = read(published(project) / "run.json")
    assert (facts["mode"], facts["image"], facts["instances"]) == ("container", nothing_left, 1)
    assert not [sign for sign in ("SM_HPS", "++ ") if sign in trained.stdout]  # the driver's noise stays in the log
    assert "epoch=3 step=57" in trained.stdout
    assert owners(project) == {os.getuid()}
    assert not list(project.rglob("loop.*.pyc"))  # the container, which is root's, compiles nothing in src/
    assert verb("evaluate").returncode == 0


def test_two_containers_train_one_model(verb: Verb, project: Path, nothing_left: str) -> None:
    trained = verb("train-local", "--mode", "container", "--instances", "2", *SHORT)
    assert trained.returncode == 0, trained.stderr + trained.stdout
    folder = published(project)
    assert read(folder / "metrics.json")["world_size"] == 2
    assert "on 2 processes, CPU" in (folder / "train.log").read_text()
    assert read(folder / "run.json")["image"] == nothing_left
