"""Programs that a test puts before the real ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def put_first(name: str, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a shell script to `tmp_path/bin/<name>`, and let PATH begin there."""
    program = tmp_path / "bin" / name
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
