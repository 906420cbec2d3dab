"""The tests of the house's rules see what breaks a rule."""

from __future__ import annotations

from pathlib import Path

from tests.test_house import imported, upward


def test_wall_test_can_fail(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("def late():\n    import boto3.session\n    from torch import nn\n")
    assert imported(file) == {"boto3", "torch"}


def test_imports_that_run_upward_are_seen() -> None:
    text = "def late():\n    from pipelines.endpoint import state\n    from pipelines import ROOT, cloud, config\n"
    assert upward("local", text) == {"cloud", "endpoint"}
    assert upward("cloud", text) == upward("registry", text) == {"endpoint"}
    assert upward("endpoint", text) == upward("pipeline", text) == upward("mine", text) == set()
