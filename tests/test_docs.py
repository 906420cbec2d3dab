"""The project's pages: commands run, or are known where they need AWS; every message, verb and setting exists."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

from tests.conftest import NO_ENGINE, TEMPLATE, TREE, Bake, Project

PAGES = sorted(path.name for path in (TREE / "docs").glob("*.md"))
SCOPES: dict[str, dict[str, Any]] = {
    "local": {"scope": "local"},
    "cloud": {"scope": "cloud"},
    "full": {"scope": "full", "mlflow": True},
}
LONG = {"audit", "image", "lint", "setup", "test", "update-template"}  # run by tests of their own
QUICK = {  # few epochs, no container: for tests of what a page says, not of what a verb does
    "TRAINING__EPOCHS": "1", "COMPUTE__LOCAL_MODE": "process", "TUNING__MAX_JOBS": "2", "PIPELINE__MIN_ACCURACY": "0",
    **NO_ENGINE,
}  # fmt: skip


def commands(page: Path) -> list[list[str]]:
    """The words of every `make` in the blocks of a page, in order."""
    blocks = re.findall(r"(?ms)^```\n(.*?)^```", page.read_text(encoding="utf-8"))
    lines = [line.partition(" # ")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(re.sub("<.*?>", lambda place: place[0].replace(" ", "-"), line))[1:]
            for line in lines if line.startswith("make ")]  # fmt: skip


def stages(project: Project) -> dict[str, list[str]]:
    """The verbs of a project by stage, as `make help` shows them."""
    command = [sys.executable, "-m", "pipelines", "help"]
    said = subprocess.run(command, cwd=project.path, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"(?m)^(?=\S)", said)
    return {part.splitlines()[0]: re.findall(r"(?m)^  make ([a-z-]+) ", part) for part in parts if part}


def cloud(project: Project) -> set[str]:
    """The verbs of the stages that run on SageMaker."""
    return {verb for stage, verbs in stages(project).items() if "SageMaker" in stage for verb in verbs}


def settings(project: Project) -> set[str]:
    """Every `section.key` that a project has."""
    folder = project.path / "configs"
    found = yaml.safe_load((folder / "infrastructure.yaml").read_text(encoding="utf-8"))
    found["training"] = yaml.safe_load((folder / "training.yaml").read_text(encoding="utf-8"))
    return {f"{section}.{key}" for section, keys in found.items() for key in keys}


@pytest.fixture(scope="module")
def baked(bake: Bake) -> dict[str, Project]:
    """A project of each scope."""
    return {scope: bake(**answers) for scope, answers in SCOPES.items()}


@pytest.fixture(scope="module")
def project(bake: Bake, ready: Project) -> Project:
    """A full project with a finished run, and the folder `photos` that the pages speak of."""
    made = bake(**SCOPES["full"] | {"mlflow": False})
    (made.path / ".venv").symlink_to(ready.path / ".venv")
    made.make("train-local", **QUICK)
    for label, digit in (("cat", "4"), ("dog", "7")):
        folder = made.path / "photos" / label
        shutil.copytree(made.path / "data" / "raw" / "digits" / digit, folder)
        next(folder.iterdir()).rename(folder / "1.jpg")
    return made


@pytest.mark.parametrize("page", [page for page in PAGES if page != "tracking.md"])  # that one is in test_tracking.py
def test_every_command_of_a_page_works(page: str, project: Project) -> None:
    asks = cloud(project)
    assert {"deploy", "train", "status"} <= asks
    listed = project.run(sys.executable, "-m", "pipelines", "help").stdout
    for verb, *words in commands(project.path / "docs" / page):
        here = verb not in asks or any(word.startswith("DATA=<") for word in words)
        if verb == "serve-local" and not any(word.startswith("IMAGE=") for word in words):
            here = False  # it would serve until Ctrl-C
        if here and verb not in LONG and not any(sign in " ".join(words) for sign in ("<", "weights")):
            done = project.run("make", verb, *words, **QUICK)
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            done = project.run("make", "-n", verb, *words)
            assert done.returncode == 0, done.stderr
            assert "-m pipelines" in done.stdout
            (row,) = (part for part in re.split(r"(?m)^(?=  make )", listed)[1:] if part.split()[1] == verb)
            given = {word.partition("=")[0] for word in words} - {"ARGS"}
            assert given <= {*re.findall(r"\b([A-Z_]+)=", row)}, f"make {verb} does not take all of {given}"


@pytest.mark.parametrize("scope", SCOPES)
def test_a_page_speaks_of_no_verb_setting_file_or_page_that_the_scope_lacks(
    scope: str, baked: dict[str, Project]
) -> None:
    made = baked[scope]
    known, keys = {verb for verbs in stages(made).values() for verb in verbs}, settings(made)
    sections = {key.partition(".")[0] for key in settings(baked["full"])}
    assert len(known) > 15
    for path in [made.path / "README.md", *sorted((made.path / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        named = {*re.findall(r"`make\s+([a-z-]+)", text), *(words[0] for words in commands(path))}
        assert named <= known, f"{path.name} speaks of {named - known}"
        words = re.findall(r"\b([a-z]+)\.([a-z_]+)\b(?!\()", re.sub(r"(?ms)^```(?:python|diff|sh)\n.*?^```", "", text))
        files = ("md", "py", "yaml", "jsonl", "txt", "safetensors")
        said = {f"{section}.{key}" for section, key in words if section in sections and key not in files}
        assert said <= keys, f"{path.name} speaks of {said - keys}"
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (path.parent / target).is_file(), f"{path.name} links {target}"
        for name in re.findall(r"`((?:src|pipelines|configs|docker|infrastructure|\.github)/[\w./-]*)`", text):
            assert (made.path / name).exists() or "/my_" in name, f"{path.name} speaks of {name}"


def test_pages_have_no_dead_link_where_people_read_the_raw_template() -> None:
    pages = [path for folder in (TEMPLATE, TREE) for path in (*folder.glob("*.md"), *folder.glob("docs/**/*.md"))]
    for path in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            there = target.startswith("https://") or (path.parent / unquote(target)).exists()
            assert there, f"{path} links {target}"


def test_a_project_of_this_machine_alone_does_not_call_itself_one_of_sagemaker(baked: dict[str, Project]) -> None:
    path = baked["local"].path
    facts = tomllib.loads((path / "pyproject.toml").read_text(encoding="utf-8"))
    assert "SageMaker" not in facts["project"]["description"]
    assert "SageMaker" not in (path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("scope", SCOPES)
def test_the_readme_is_one_page(scope: str, baked: dict[str, Project]) -> None:
    text = (baked[scope].path / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert len(text.split()) <= 500
    assert max(map(len, text.splitlines())) <= 120
    pages = {f"docs/{path.name}" for path in (baked[scope].path / "docs").glob("*.md")}
    assert pages <= set(re.findall(r"\]\(([^)]+)\)", text)), "the README leads to every page"
    assert (baked[scope].path / "docs" / "report.png").stat().st_size < 150_000


def test_every_message_exists() -> None:
    rows = (TREE / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    messages = [row.split("|")[1] for row in rows if row.startswith("| ") and "---" not in row][1:]
    files = [path for folder in ("src", "pipelines") for path in (TREE / folder).rglob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in files))
    quoted = [re.search(r"``(.+?) ``|`([^`]+)`", message) for message in messages]
    said = [(found[1] or found[2]).strip() for found in quoted if found]
    assert len(said) > 10
    for text in said:
        if not text.startswith(("CUDA", "Connection closed", "Retry-After")):  # torch's; a header
            assert text in code, f"no message says {text!r}"


def test_the_security_page_names_tests_that_exist() -> None:
    text = (TEMPLATE / "SECURITY.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:tests/)?(test_\w+)(?:\.py)?`", text))
    assert len(named) > 10
    assert named <= {path.stem for path in (TEMPLATE / "tests").rglob("test_*.py")}
