"""What the project is called, what it depends on, and which version of its source this is."""

from __future__ import annotations

import hashlib
import subprocess
import tomllib
from typing import Any

from pipelines import ROOT, SOURCE


def name() -> str:
    """The project's name in pyproject.toml; valid in names of images and of SageMaker resources."""
    return str(_pyproject()["project"]["name"])


def group(named: str) -> list[str]:
    """A group of dependencies in pyproject.toml."""
    found: list[str] = _pyproject()["dependency-groups"][named]
    return found


def job_prefix() -> str:
    """What the names of this project's jobs begin with: its own, where a run and the SDK's time stamp have room too."""
    whole = name()
    return whole if len(whole) <= 27 else tuning_prefix()


def tuning_prefix() -> str:
    """What the names of its tuning jobs begin with: these have at most 32 characters."""
    return name()[:19].rstrip("-")


def git_commit() -> str:
    """The commit of the project, with `-dirty` when files differ from it; empty outside of a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def source_hash() -> str:
    """A hash of the source that jobs run."""
    digest = hashlib.sha256()
    for path in sorted(path for path in SOURCE.rglob("*") if path.is_file() and path.parent.name != "__pycache__"):
        digest.update(f"{path.relative_to(SOURCE)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
