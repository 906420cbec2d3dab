"""Answers are checked before a file exists; what comes after the bake never loses the project."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TEMPLATE


def bake(output: Path, *answers: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Bake from the command line, as a user does."""
    command = [sys.executable, "-m", "cookiecutter", str(TEMPLATE), "--no-input", "--output-dir", str(output), *answers]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("project_slug=Cats", "project_slug is 'Cats'"),
        ("project_slug=1cats", "project_slug is '1cats'"),
        ("project_slug=my-cats", "project_slug is 'my-cats'"),
        ("project_slug=cats_", "project_slug is 'cats_'"),
        ("project_slug=c__s", "project_slug is 'c__s'"),
        ("project_slug=../cats", "project_slug is '../cats'"),
        ("project_slug=class", "a name that Python or a dependency uses"),
        ("project_slug=json", "a name that Python or a dependency uses"),
        ("project_slug=torch", "a name that Python or a dependency uses"),
        (f"project_slug={'c' * 31}", "it must be 1 to 30"),
        ("aws_region=mars", "aws_region is 'mars'; it must be one of"),
        ("description=", "description is ''; it must be one printable line"),
        ("description=two\nlines", "it must be one printable line"),
        (f"author={'a' * 101}", "it must be one printable line of 1 to 100 characters"),
    ],
)
def test_a_bad_answer_is_one_sentence_and_leaves_nothing(tmp_path: Path, answer: str, sentence: str) -> None:
    done = bake(tmp_path, answer)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_booleans_and_choices_from_the_command_line(tmp_path: Path) -> None:
    done = bake(tmp_path, "project_name=Big Cats", "github_workflows=false", "mlflow=yes", "licence=MIT")
    assert done.returncode == 0, done.stderr
    project = tmp_path / "big_cats"
    assert not (project / ".github").exists()
    assert (project / "pipelines" / "track.py").exists()
    assert "cd big_cats" in done.stdout
    assert (project / ".git").is_dir()


def test_without_git_and_inside_a_repository(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    done = bake(tmp_path / "plain", PATH=str(programs))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plain" / "image_classifier" / "Makefile").exists()
    assert not (tmp_path / "plain" / "image_classifier" / ".git").exists()
    git = shutil.which("git")
    assert git
    subprocess.run([git, "init", "--quiet", str(tmp_path / "repository")], check=True)
    done = bake(tmp_path / "repository")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "repository" / "image_classifier" / ".git").exists()
