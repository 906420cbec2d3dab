"""The generated project's pages: every command in them runs, or expands where it needs AWS; every message exists."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.conftest import NO_ENGINE, TREE, Bake, Project
from tests.test_verbs import table

PAGES = sorted(path.name for path in (TREE / "docs").glob("*.md"))
LONG = {"lint", "test", "update-template"}  # run by tests of their own
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


def cloud() -> set[str]:
    """The verbs that ask AWS."""
    return {verb for stage, rows in table().items() if stage.startswith("On SageMaker") for verb in rows}


@pytest.fixture(scope="module")
def project(bake: Bake, ready: Project) -> Project:
    """A project with a finished run, and the folder `photos` that the pages speak of."""
    made = bake()
    (made.path / ".venv").symlink_to(ready.path / ".venv")
    made.make("train-local", **QUICK)
    for label, digit in (("cat", "4"), ("dog", "7")):
        folder = made.path / "photos" / label
        shutil.copytree(made.path / "data" / "raw" / "digits" / digit, folder)
        next(folder.iterdir()).rename(folder / "1.jpg")
    return made


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_works(page: str, project: Project) -> None:
    asks = cloud()
    assert {"deploy", "train", "status"} <= asks
    for verb, *words in commands(TREE / "docs" / page):
        here = verb not in asks or any(word.startswith("DATA=<") for word in words)
        if here and verb not in LONG and not any(sign in " ".join(words) for sign in ("<", "weights")):
            done = project.run("make", verb, *words, **QUICK)
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            assert ".venv/bin/python -m " in project.make("-n", verb, *words).stdout


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
