"""What is baked: the right files, no leftovers, clean text, sound syntax, clean code, small."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.conftest import TEMPLATE, TREE, Bake, Project

MANIFEST = (TEMPLATE / "tests" / "manifest.txt").read_text(encoding="utf-8").split()  # of the default bake
# One bake for every choice that is not a default, with the files that it adds and removes.
OPTIONS: dict[str, tuple[dict[str, object], set[str], set[str]]] = {
    "default": ({}, set(), set()),
    "MIT": ({"licence": "MIT"}, set(), set()),
    "BSD-3-Clause": ({"licence": "BSD-3-Clause"}, set(), set()),
    "Proprietary": ({"licence": "Proprietary"}, set(), set()),
    "no workflows": ({"github_workflows": False}, set(), {".github/workflows/ci.yml"}),
    "mlflow": ({"mlflow": True}, {"pipelines/track.py"}, set()),
    "other region": ({"aws_region": "eu-central-1"}, set(), set()),
    "text": (
        {
            "project_name": 'Löwen & "Tiger"',
            "project_slug": "cats",
            "description": 'He said "hi" \\ to {braces} # and $(shell) `ticks` ünïcödé 🐈',
            "author": "O'Neill <o@example.com> \\n",
        },
        set(),
        set(),
    ),
}


@pytest.fixture(scope="module", params=OPTIONS)
def option(request: pytest.FixtureRequest, bake: Bake) -> tuple[Project, set[str], dict[str, object]]:
    answers, added, removed = OPTIONS[request.param]
    return bake(**answers), (set(MANIFEST) | added) - removed, answers


Baked = tuple[Project, set[str], dict[str, object]]


def text_files(project: Project) -> list[Path]:
    return [project.path / name for name in project.files()]


def test_exactly_these_files(option: Baked) -> None:
    project, manifest, _ = option
    assert set(project.files()) == manifest
    assert not [path for path in project.path.rglob("*") if path.is_dir() and not any(path.iterdir())
                and ".git" not in path.parts]  # fmt: skip


def test_no_template_syntax_is_left(option: Baked) -> None:
    project, _, answers = option
    allowed = str(answers.get("description"))
    for path in text_files(project):
        text = path.read_text(encoding="utf-8").replace(allowed, "").replace(allowed.replace("\\", "\\\\"), "")
        text = text.replace(json.dumps(allowed, ensure_ascii=False)[1:-1], "").replace("${{", "")
        assert not re.search(r"\{\{|\{%|\{#|cookiecutter\.", text), f"{path} has template syntax"


def test_text_is_clean(option: Baked) -> None:
    for path in text_files(option[0]):
        data = path.read_bytes()
        assert data.endswith(b"\n"), f"{path} has no final newline"
        assert not data.endswith(b"\n\n"), f"{path} ends with blank lines"
        assert b"\r" not in data, f"{path} has a carriage return"
        assert not re.search(rb"[ \t]\n", data), f"{path} has trailing blanks"
        assert path.stat().st_mode & 0o777 == 0o644, f"{path} has unusual permissions"


def test_every_file_parses_and_the_answers_arrive(option: Baked) -> None:
    project, _, answers = option
    for path in text_files(project):
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yml", ".yaml"):
            assert yaml.safe_load(text), path
        elif path.suffix == ".toml":
            assert tomllib.loads(text), path
        elif path.suffix == ".py":
            compile(text, str(path), "exec")
    facts = tomllib.loads((project.path / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert facts["description"] == answers.get("description", "Image classification with PyTorch on Amazon SageMaker")
    assert facts["authors"] == [{"name": answers.get("author", "Your Name")}]
    assert facts["name"] == answers.get("project_slug", "image_classifier").replace("_", "-")  # type: ignore[attr-defined]
    infrastructure = yaml.safe_load((project.path / "configs" / "infrastructure.yaml").read_text(encoding="utf-8"))
    assert infrastructure["aws"]["region"] == answers.get("aws_region", "us-east-1")
    licence = (project.path / "LICENSE").read_text(encoding="utf-8")
    first = {"MIT": "MIT License", "BSD-3-Clause": "BSD 3-Clause License", "Proprietary": "Copyright (c) "}
    wanted = first.get(str(answers.get("licence")), "Apache License")
    assert licence.strip().startswith(wanted)
    assert str(answers.get("author", "Your Name")) in licence


def test_every_choice_is_baked_once() -> None:
    prompts = json.loads((TEMPLATE / "cookiecutter.json").read_text(encoding="utf-8"))
    for name, value in prompts.items():
        if name.startswith("_"):
            continue
        assert name in prompts["__prompts__"], f"{name} has no label"
        baked = {answers.get(name) for answers, _, _ in OPTIONS.values()} - {None}
        wanted = set(value[1:]) if isinstance(value, list) else {not value} if isinstance(value, bool) else set()
        assert wanted <= baked, f"no bake has {name} = {wanted - baked}"


def test_the_bake_is_small(default: Project) -> None:
    python = [path for path in text_files(default) if path.suffix == ".py"]
    assert len(default.files()) <= 70
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in python) <= 6000


def test_python_files_of_the_template_are_baked_as_they_are(default: Project) -> None:
    for name in MANIFEST:
        if name.endswith(".py"):
            assert (default.path / name).read_bytes() == (TREE / name).read_bytes()


@pytest.mark.parametrize("where", ["bake", "tree"])
def test_code_is_clean_before_anyone_touched_it(ready: Project, where: str, tmp_path: Path) -> None:
    """The raw bake, and the template's own tree: both are plain Python under the same configuration."""
    place = Project(ready.path if where == "bake" else TREE)
    caches = {"RUFF_CACHE_DIR": str(tmp_path / "ruff"), "MYPY_CACHE_DIR": str(tmp_path / "mypy")}
    for words in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy", "src", "pipelines", "tests"]):
        done = place.run(ready.program(words[0]), *words[1:], **caches)
        assert done.returncode == 0, done.stdout + done.stderr


def test_mlflow_code_is_clean(bake: Bake, ready: Project, tmp_path: Path) -> None:
    project = bake(mlflow=True)
    caches = {"RUFF_CACHE_DIR": str(tmp_path / "ruff"), "MYPY_CACHE_DIR": str(tmp_path / "mypy")}
    for words in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy", "src", "pipelines"]):
        done = project.run(ready.program(words[0]), *words[1:], **caches)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_clean_code_test_can_fail(bake: Bake, ready: Project) -> None:
    project = bake()
    (project.path / "src" / "imaging.py").write_text("import os\nx: int = 'text'\n")
    for words in (["ruff", "check", "."], ["mypy", "src/imaging.py"]):
        assert project.run(ready.program(words[0]), *words[1:]).returncode == 1
