"""`make rehearse`: where the stand-in comes from, and what it is not told."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipelines.cloud import rehearse
from pipelines.local import engine
from pipelines.terminal import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("template", "place"),
    [
        ("https://example.com/org/template", "git+https://example.com/org/template"),
        ("git@example.com:org/template.git", "git+ssh://git@example.com/org/template.git"),
        ("ssh://git@example.com/org/template", "git+ssh://git@example.com/org/template"),
        ("https://me:secret@example.com/org/template", "git+https://example.com/org/template"),
        ("/a folder/template", "git+file:///a%20folder/template"),
    ],
)
def test_the_stand_in_comes_from_the_template_as_it_was(template: str, place: str) -> None:
    wanted = f"rehearsal @ {place}@{COMMIT}#subdirectory=rehearsal"
    assert rehearse.requirement({"template": template, "commit": COMMIT}) == wanted


def test_credentials_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(engine, "check", lambda: None)
    state = tmp_path / "state.json"
    monkeypatch.setattr(rehearse, "STATE", state)
    state.write_text(json.dumps({"template": "https://example.com/template", "commit": COMMIT}))

    def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        ran.append((words, options["env"]))
        return subprocess.CompletedProcess(words, 7)

    monkeypatch.setattr(subprocess, "run", run)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE", "ENDPOINT_URL_S3"):
        monkeypatch.setenv(f"AWS_{name}", "real")
    monkeypatch.setenv("IMAGES__BASE", "registry.example/python:3.12")
    assert rehearse.rehearse(None, ["--keep"]) == 7
    (words, given), *others = ran
    assert not others
    assert not [name for name, value in given.items() if value == "real"]
    assert given["IMAGES__BASE"] == "registry.example/python:3.12"
    assert words[-6:] == ["python", "-m", "rehearsal", "--keep", "--run", "sagemaker_template"]


def test_what_it_needs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "state.json"
    monkeypatch.setattr(rehearse, "STATE", state)
    with pytest.raises(UserError, match="the template that brings the rehearsal is not known"):
        rehearse.rehearse(None, [])
    state.write_text("{}")

    def absent() -> None:
        raise engine.EngineError("Docker does not answer")

    monkeypatch.setattr(engine, "check", absent)
    with pytest.raises(UserError, match="a rehearsal runs containers: Docker does not answer"):
        rehearse.rehearse(None, [])
