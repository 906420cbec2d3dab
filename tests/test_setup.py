"""The generated project's environment: made without uv, held by a lock, small on a laptop; and its commit hooks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import (
    NO_ENGINE,
    TEMPLATE,
    Bake,
    Project,
    run_tests,
)


def test_environment_is_made_without_uv(bake: Bake, tmp_path: Path) -> None:
    """On a machine that has Python with venv and nothing else."""
    project = bake()
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python3").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    for name in ("make", "sh"):
        (programs / name).symlink_to(shutil.which(name) or name)
    done = project.make("setup", "ARGS=--group laptop", PATH=str(programs))
    assert "uv is not installed: putting it into .venv" in done.stdout
    listed = project.run(project.program("uv"), "pip", "list", "--python", project.program("python"))
    assert "sagemaker" in listed.stdout
    assert "\ntorch " not in listed.stdout  # a laptop submits jobs without it
    assert not (project.path / "uv.lock").exists()


def test_a_lock_is_respected(bake: Bake, tmp_path: Path) -> None:
    project = bake()
    uv = str(TEMPLATE / ".venv" / "bin" / "uv")
    assert project.run(uv, "lock", "--upgrade-package", "ruff==0.11.0").returncode == 0
    before = (project.path / "uv.lock").read_bytes()
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python3", "make", "sh"):
        source = Path(sys.base_prefix) / "bin" / "python3" if name == "python3" else shutil.which(name)
        (programs / name).symlink_to(source or name)
    for _ in range(2):  # the uv that the first setup installed must still be there
        project.make("setup", "ARGS=--group dev", PATH=str(programs))
    listed = project.run(project.program("uv"), "pip", "list", "--python", project.program("python")).stdout
    assert re.search(r"^ruff +0\.11\.0$", listed, re.MULTILINE)
    assert (project.path / "uv.lock").read_bytes() == before


def requirements(folder: Path, package: str) -> str:
    """What an installed package asks for, a line each."""
    (metadata,) = folder.glob(f"{package}-*.dist-info/METADATA")
    lines = metadata.read_text(encoding="utf-8").splitlines()
    return "\n".join(line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: "))


def test_s3fs_must_be_held_and_is(ready: Project, tmp_path: Path) -> None:
    """When this fails, the SDK or s3fs has changed, and the line in pyproject.toml may go.

    Without it uv ends at the same versions, after half a minute of looking through aiobotocore.
    """
    (packages,) = (ready.path / ".venv" / "lib").glob("python*/site-packages")
    held = tomllib.loads((ready.path / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]
    assert held["constraint-dependencies"] == ["s3fs<0.5"]
    assert re.search(r"(?m)^s3fs\b", requirements(packages, "sagemaker_mlops")), "the SDK no longer asks for s3fs"
    assert "aiobotocore" not in requirements(packages, "s3fs"), "the s3fs that is installed asks for aiobotocore"
    uv = str(TEMPLATE / ".venv" / "bin" / "uv")
    newest = ["pip", "install", "--quiet", "--no-config", "--no-deps", "--target", str(tmp_path), "s3fs", "aiobotocore"]
    done = subprocess.run([uv, *newest], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "aiobotocore" in requirements(tmp_path, "s3fs"), "s3fs no longer needs aiobotocore"
    asked = re.search(r"(?m)^botocore\b.*", requirements(tmp_path, "aiobotocore"))
    assert asked
    assert "<" in asked[0], "aiobotocore takes any newer botocore"


def test_the_first_setup_is_quiet_and_says_what_is_wrong(ready: Project, bake: Bake) -> None:
    project = bake(scope="full")
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    done = project.make("setup")
    assert not done.stdout
    first, *more = done.stderr.splitlines()
    assert first == "installing what pyproject.toml names into .venv; the first time this takes minutes"
    assert more in ([], ["the index of PyTorch's builds (auto) does not answer, so torch is PyPI's build"])
    loud = project.make("setup", "ARGS=--dry-run")
    assert "Would make no changes" in loud.stderr or "Resolved" in loud.stderr
    file = project.path / "pyproject.toml"
    file.write_text(file.read_text(encoding="utf-8").replace('"tqdm>=4.66,<5"', '"tqdm>=4.66,<4"'), encoding="utf-8")
    failed = project.run("make", "setup")
    assert failed.returncode == 2
    assert "tqdm" in failed.stderr
    assert "error: the environment is not complete (see above)" in failed.stderr


@pytest.mark.parametrize("scope", ["local", pytest.param("cloud", marks=pytest.mark.slow)])
def test_a_smaller_scope_needs_no_more_than_it_installs(bake: Bake, scope: str) -> None:
    """In an environment of its own: its tests pass, without an engine, and so does its lint."""
    project = bake(scope=scope)
    project.make("setup")
    uv = str(TEMPLATE / ".venv" / "bin" / "uv")
    listed = project.run(uv, "pip", "list", "--format", "json", "--python", project.program("python")).stdout
    there = {package["name"] for package in json.loads(listed)} & {"cfn-lint", "moto", "optuna"}
    assert there == ({"cfn-lint", "moto"} if scope == "cloud" else set())
    project.make("lint")
    run_tests(project, **NO_ENGINE)


def test_a_laptop_without_torch_reaches_the_job(bake: Bake) -> None:
    """Everything that `pipelines` imports is in the group `laptop`."""
    project = bake(scope="full")
    project.make("setup", "ARGS=--group laptop")
    files = [path.relative_to(project.path) for path in (project.path / "pipelines").rglob("[!_]*.py")]
    code = "import " + ", ".join(".".join(path.with_suffix("").parts) for path in files)
    done = project.run(project.program("python"), "-c", code)
    assert done.returncode == 0, done.stderr


def test_pre_commit_hooks_pass_and_can_fail(ready: Project, tmp_path: Path) -> None:
    command = (ready.program("pre-commit"), "run", "--all-files")
    done = ready.run(*command, PRE_COMMIT_HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout
    module = ready.path / "pipelines" / "local" / "images.py"
    text = module.read_text(encoding="utf-8")
    module.write_text(text + "import os   \n", encoding="utf-8")
    try:
        done = ready.run(*command, PRE_COMMIT_HOME=str(tmp_path))
    finally:
        module.write_text(text, encoding="utf-8")
    assert done.returncode == 1
    assert "ruff check" in done.stdout


PLANTED = {  # in parts, so that nobody's scanner takes this file for a leak
    "AWS Access Key": 'KEY = "AKIA' + 'QYLPMN5HHHFPZAM2"',
    "Secret Keyword": 'aws_secret_access_key = "' + 'wJalrXUtnFEMI/K7MDENG/bPxRfiCYzq81mKd0Tu"',
    "GitHub Token": 'TOKEN = "ghp_' + 'wWPw5k4aXcaT4fNP0UcnZwJUVFk6LO0pINUx"',
    "Private Key": "# -----BEGIN OPENSSH PRIVATE " + "KEY-----",
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_commit_with_a_secret_is_refused(ready: Project, bake: Bake, kind: str) -> None:
    """Without a network: the scanner must not ask anybody whether a key works."""
    project = bake()
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    home = str(project.path / ".cache")
    offline = () if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode else ("unshare", "-n")
    person = ("-c", "user.name=test", "-c", "user.email=test@example.com")
    commit = (*offline, "git", *person, "commit", "--message", "mine")
    project.run("git", "add", "--all")
    project.run(project.program("pre-commit"), "install")
    skipped = {"PRE_COMMIT_HOME": home, "SKIP": "mypy"}
    first = project.run(*commit, **skipped)
    assert first.returncode == 0, first.stdout + first.stderr  # every file of the bake is in it
    (project.path / "src" / "mine.py").write_text(f'"""Mine."""\n\n{PLANTED[kind]}\n', encoding="utf-8")
    project.run("git", "add", "--all")
    refused = project.run(*commit, **skipped)
    assert refused.returncode == 1
    assert f"Secret Type: {kind}" in refused.stdout + refused.stderr


def test_no_file_is_left_out_by_the_hook_that_looks_for_secrets(ready: Project, bake: Bake) -> None:
    """Neither the template's address nor the lock; of `.cruft.json` the line of the commit is none."""
    project = bake()
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    project.run("git", "add", "--all")
    check = (project.program("pre-commit"), "run", "detect-secrets", "--files")
    home = str(project.path / ".cache")
    assert project.run(*check, ".cruft.json", PRE_COMMIT_HOME=home).returncode == 0
    facts = json.loads((project.path / ".cruft.json").read_text(encoding="utf-8"))
    for changed in ({"template": "https://user:" + "wWPw5k4aXcaT@example.com/it"}, {"checkout": facts["commit"]}):
        (project.path / ".cruft.json").write_text(json.dumps(facts | changed, indent=2), encoding="utf-8")
        done = project.run(*check, ".cruft.json", PRE_COMMIT_HOME=home)
        assert done.returncode == 1, done.stdout
    (project.path / "uv.lock").write_text(f"{PLANTED['GitHub Token']}\n", encoding="utf-8")
    project.run("git", "add", "--all", "--force")
    assert project.run(*check, "uv.lock", PRE_COMMIT_HOME=home).returncode == 1
