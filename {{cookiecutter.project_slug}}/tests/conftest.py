"""Fixtures: small image folders, packed data sets, copies of the project to run verbs in, and the Docker engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import ROOT, config
from pipelines.local import engine, images
from processing.preprocess import pack
from tests.helpers import CLASSES, Verb, containers_and_networks, draw, verb_environment


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw image folder: three classes of 20 PNG files."""
    folder = tmp_path_factory.mktemp("raw") / "edges"
    for label in CLASSES:
        (folder / label).mkdir(parents=True)
        for number in range(20):
            draw(label, number).save(folder / label / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def packed(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, packed."""
    folder = tmp_path_factory.mktemp("packed") / "edges"
    pack(raw, folder)
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of this project without environment, data and artifacts, so that verbs leave nothing behind here."""
    folder = tmp_path / "project"
    away = shutil.ignore_patterns(".*", "data", "artifacts", "__pycache__", "build")
    shutil.copytree(ROOT, folder, ignore=away)
    return folder


@pytest.fixture
def verb(project: Path) -> Verb:
    """Run a verb in the copy: `verb("train-local", "--mode", "process", DOCKER_HOST=...)`."""

    def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipelines", name, *arguments]
        done = subprocess.run(
            command, cwd=project, env=verb_environment() | environment, capture_output=True, text=True, timeout=600
        )
        assert "\x1b" not in done.stdout + done.stderr  # colours are for terminals
        return done

    return run


def project_image(target: images.Target) -> str:
    """The test is skipped without an engine, or fails where REQUIRE_CONTAINERS is set."""
    try:
        engine.check()
        return images.image(config.load(), target)
    except engine.EngineError as error:
        if os.environ.get("REQUIRE_CONTAINERS"):
            pytest.fail(f"REQUIRE_CONTAINERS is set, but no container can run: {error}")
        pytest.skip(f"no container can run: {error}")


@pytest.fixture(scope="session")
def image() -> str:
    """The project's image to train in."""
    return project_image("training")


@pytest.fixture(scope="session")
def serving_image() -> str:
    """The project's image to serve from."""
    return project_image("serving")


@pytest.fixture
def nothing_left(image: str) -> Iterator[str]:
    """The image, for a test after which containers and networks must be as before."""
    before = containers_and_networks()
    yield image
    assert containers_and_networks() == before, "the run left containers or networks behind"
