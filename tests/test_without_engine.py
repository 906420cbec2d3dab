"""What the generated project does where no Docker engine answers."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from tests.conftest import (
    ELSEWHERE,
    NO_ENGINE,
    TEMPLATE,
    TRACKING,
    Bake,
    Project,
    add_tests,
    run_tests,
)

PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
def test_hostile_data_and_settings(part: int, bake: Bake, ready: Project) -> None:
    """The others, in parts, as they take the longest: they pass where no engine answers.

    One that asks for an image, and is not marked, would be skipped here, and run nowhere.
    """
    project = bake(scope="full")
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    names = [name for name in add_tests(project) if name not in ELSEWHERE][part::PARTS]
    output = run_tests(project, "-m", "not container", *names, **NO_ENGINE)
    assert "no container can run" not in output


def test_hostile_tests_are_clean(bake: Bake, ready: Project, tmp_path: Path) -> None:
    project = bake(scope="full")
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    add_tests(project)
    caches = {"RUFF_CACHE_DIR": str(tmp_path / "ruff"), "MYPY_CACHE_DIR": str(tmp_path / "mypy")}
    mypy = ["mypy", "src", "pipelines", "tests"]
    for words in (["ruff", "check", "."], ["ruff", "format", "--check", "."], mypy):
        done = project.run(ready.program(words[0]), *words[1:], **caches)
        assert done.returncode == 0, done.stdout + done.stderr


def test_mlflow_logs_a_run_once_and_never_fails_training(bake: Bake, ready: Project) -> None:
    project = bake(scope="full", mlflow=True)
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    uv = str(TEMPLATE / ".venv" / "bin" / "uv")
    project.make("setup")
    done = project.run(uv, "pip", "install", "tensorboard>=2.20", "--python", project.program("python"))
    assert done.returncode == 0, done.stderr
    assert TRACKING in add_tests(project)
    run_tests(project, TRACKING)
    words = ("train-local", "LOCAL_MODE=process", "ARGS=--set training.epochs=2")
    done = project.make(*words)
    assert "logged run" in done.stdout
    assert "already" in project.make("track").stdout
    done = project.make(*words, MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert "logged run" not in done.stdout
    assert "validation accuracy" in done.stdout


RECIPE = """
import sys, json, statistics, torch
from dataclasses import replace
from pathlib import Path
from processing.preprocess import pack
from training.config import Hyperparameters, resolve
from training.data import load_channels
from training.distributed import World
from training.loop import fit
from model import build_model
world = World(0, 1, torch.device("cpu"))
accuracies = []
for split_seed in range(5):
    folder = Path(sys.argv[2]) / str(split_seed)
    pack(Path(sys.argv[1]), folder, seed=split_seed)
    splits = load_channels(folder / "train", folder / "validation")
    for seed in range(2):
        settled = resolve(Hyperparameters(seed=seed), 8, len(splits[0]))
        torch.manual_seed(seed)
        model, history = fit(build_model(settled.model, 10, 8), *splits, settled, world)
        accuracies.append(history[-1]["val_accuracy"])
print(json.dumps(accuracies))
"""


def test_the_default_recipe_on_the_digits(ready: Project, tmp_path: Path) -> None:
    """Over five split seeds and two training seeds: a mean of 99.0 % validation accuracy, none below 97.0 %."""
    ready.make("data")
    raw = str(ready.path / "data" / "raw" / "digits")
    done = ready.run(ready.program("python"), "-c", RECIPE, raw, str(tmp_path), PYTHONPATH=str(ready.path / "src"))
    assert done.returncode == 0, done.stderr
    accuracies = json.loads(done.stdout.splitlines()[-1])
    assert len(accuracies) == 10
    assert statistics.mean(accuracies) >= 0.990, accuracies
    assert min(accuracies) >= 0.970, accuracies


def test_training_falls_back_to_a_process_and_says_why(ready: Project) -> None:
    done = ready.make("train-local", "ARGS=--set training.epochs=1")
    assert "(process)" in done.stdout
    assert "no Docker engine answers" in done.stdout + done.stderr
