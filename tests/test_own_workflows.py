"""The template's own workflows, and those of a project under actionlint: sound, pinned, with the least rights."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import TEMPLATE, TREE, Bake
from tests.test_workflows import PINS, READS, audit

FOLDER = TEMPLATE / ".github" / "workflows"
NEWEST = "3.14"  # torch and what the SDK needs have wheels for it, and none for a newer one


def workflow(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.load((FOLDER / name).read_text(encoding="utf-8"), yaml.BaseLoader)
    return found


def actionlint(folder: Path) -> subprocess.CompletedProcess[str]:
    program = TEMPLATE / ".venv" / "bin" / "actionlint"
    files = [str(path) for path in sorted(folder.glob("*.yml"))]
    return subprocess.run([str(program), "-no-color", *files], capture_output=True, text=True, timeout=120)


def test_zizmor_and_actionlint_find_nothing(bake: Bake) -> None:
    done = audit(FOLDER)
    assert done.returncode == 0, done.stdout
    for folder in (FOLDER, bake(scope="full").path / ".github" / "workflows"):
        done = actionlint(folder)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("ci.yml", "runs-on: ubuntu-24.04", "runs-on: ubuntu-24.40"),
        ("ci.yml", "${{ matrix.python }}", "${{ matrix.pyhton }}"),
        ("release.yml", 'tags: ["20*"]', 'tag: ["20*"]'),
    ],
)
def test_actionlint_would_find_something(tmp_path: Path, name: str, old: str, new: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new), encoding="utf-8")
    assert actionlint(tmp_path).returncode != 0


def test_actions_are_pinned_and_rights_are_the_least() -> None:
    for path in FOLDER.glob("*.yml"):
        for use in re.findall(r"- uses: (.*)", path.read_text(encoding="utf-8")):
            action = use.partition("@")[0]
            assert use == f"{action}@{PINS[action]}"
        assert workflow(path.name)["permissions"] == {}
    assert all(job["permissions"] == READS for job in workflow("ci.yml")["jobs"].values())
    assert [job["permissions"] for job in workflow("release.yml")["jobs"].values()] == [{"contents": "write"}]


def test_every_python_from_the_oldest_to_the_newest_is_tested() -> None:
    jobs = workflow("ci.yml")["jobs"].values()
    (versions,) = (job["strategy"]["matrix"]["python"] for job in jobs if "strategy" in job)
    oldest = tomllib.loads((TEMPLATE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    assert f'requires-python = "{oldest}"' in (TREE / "pyproject.toml").read_text(encoding="utf-8")
    wanted = [f"3.{minor}" for minor in range(int(oldest.removeprefix(">=3.")), int(NEWEST.removeprefix("3.")) + 1)]
    assert versions == wanted


def test_a_release_has_its_own_section_of_the_changelog(tmp_path: Path) -> None:
    (step,) = (step for step in workflow("release.yml")["jobs"]["release"]["steps"] if step.get("name") == "notes")
    text = "# Log\n\n## Unreleased\n\nlater\n\n## 2026.11.27\n\n### Added\n\n- a room\n\n## 2026.1.1\n\nfirst\n"
    (tmp_path / "CHANGELOG.md").write_text(text, encoding="utf-8")

    def run(tag: str) -> int:
        command = ["bash", "-e", "-c", step["run"]]
        return subprocess.run(command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "GITHUB_REF_NAME": tag}).returncode

    assert run("2026.11.27") == 0
    assert (tmp_path / "notes.md").read_text(encoding="utf-8").strip() == "### Added\n\n- a room"
    assert run("2026.11.28") != 0
    assert run("Unreleased") != 0
