"""The project's notebook: executed in the environment of `make notebook`, and committed without output."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NO_ENGINE, TREE, Bake, Project, fresh_shell

BOOK = "notebooks/explore.ipynb"
EXECUTE = """
import os, sys
from pipelines.report.notebook import command
words = command("jupyter", "nbconvert", "--to", "notebook", "--execute", "--output", sys.argv[2], sys.argv[1])
os.execv(words[0], words)
"""
STUB = """
from pipelines.endpoint import invoke, state
state.running = lambda account, name: {"EndpointName": name}
invoke.ask = lambda account, facts, body, kind: {"labels": [facts["EndpointName"], kind], "region": account.region}
"""
QUICK = {"COMPUTE__LOCAL_MODE": "process", "LOCAL_MODE": "process", **NO_ENGINE}


@pytest.fixture(scope="module")
def project(bake: Bake, ready: Project) -> Project:
    """A project of the scope `cloud`, with a run that was not evaluated."""
    made = bake()
    (made.path / ".venv").symlink_to(ready.path / ".venv")
    made.make("train-local", TRAINING__EPOCHS="2", **QUICK)
    return made


def executed(project: Project, replace: dict[str, str], before: str = "") -> list[dict[str, Any]]:
    """The cells of the notebook after they ran, with some of their text replaced, and a cell `before` the last one."""
    text = (project.path / BOOK).read_text(encoding="utf-8")
    for old, new in replace.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    book = json.loads(text)
    if before:
        cell: dict[str, Any] = {"cell_type": "code", "execution_count": None, "id": "before", "metadata": {}}
        book["cells"].insert(-1, cell | {"outputs": [], "source": before})
    tried, result = project.path / "notebooks" / "tried.ipynb", project.path / "notebooks" / "result.ipynb"
    tried.write_text(json.dumps(book), encoding="utf-8")
    done = project.run(project.program("python"), "-c", EXECUTE, str(tried), result.name, **QUICK)
    assert done.returncode == 0, done.stderr[-3000:]
    cells: list[dict[str, Any]] = json.loads(result.read_text(encoding="utf-8"))["cells"]
    for path in (tried, result):
        path.unlink()
    return cells


def outputs(cells: list[dict[str, Any]], name: str) -> tuple[str, int]:
    """What a cell printed or ended with, and how many pictures it drew."""
    (cell,) = [cell for cell in cells if cell["id"] == name]
    text = "".join("".join(each.get("text", each.get("data", {}).get("text/plain", ""))) for each in cell["outputs"])
    return text, sum("image/png" in each.get("data", {}) for each in cell["outputs"])


@contextlib.contextmanager
def served(project: Project) -> Iterator[int]:
    """The run behind `make serve-local`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [project.program("python"), "-m", "pipelines", "serve-local", "--port", str(port)]
    server = subprocess.Popen(command, cwd=project.path, env=fresh_shell() | QUICK, start_new_session=True)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield port
    finally:
        os.killpg(server.pid, signal.SIGINT)
        server.wait(60)


def test_the_notebook_is_committed_without_output() -> None:
    book = json.loads((TREE / BOOK).read_text(encoding="utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 5
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert book["metadata"]["kernelspec"]["name"] == "python3"


def test_the_notebook_opens_a_run_and_asks_it(project: Project) -> None:
    before = (project.path / BOOK).read_bytes()
    assert not list(project.path.glob("artifacts/*/evaluation.json"))
    with served(project) as port:
        cells = executed(project, {"PORT = 8080": f"PORT = {port}"})
    assert "validation accuracy" in outputs(cells, "run")[0]
    assert outputs(cells, "curves")[1] == 1
    text, pictures = outputs(cells, "mistakes")
    assert "test accuracy 0." in text
    assert pictures == 1
    text, pictures = outputs(cells, "predict")
    assert text.startswith("data/raw/digits/")
    assert pictures == 1
    assert "'labels': [" in outputs(cells, "ask")[0]
    assert (project.path / BOOK).read_bytes() == before


def test_the_notebook_asks_an_endpoint_and_says_when_no_server_is_there(project: Project) -> None:
    cells = executed(project, {"PORT = 8080": "PORT = None"}, STUB)
    assert outputs(cells, "ask")[0] == (
        "{'labels': ['image-classifier', 'application/x-image'], 'region': 'us-east-1'}"
    )
    cells = executed(project, {"PORT = 8080": "PORT = 9"})
    assert "nothing answers on port 9: start `make serve-local`" in outputs(cells, "ask")[0]


def test_a_strangers_run_is_not_executed_by_the_notebook(project: Project) -> None:
    """Its code would run as the user; `make predict` has a container for it."""
    trusted = project.path / ".cache" / "trusted"
    project.make("evaluate", **QUICK)
    kept = trusted.read_bytes()
    trusted.unlink()
    try:
        with pytest.raises(AssertionError, match="was not made here: use `make predict`"):
            executed(project, {})
    finally:
        trusted.write_bytes(kept)


def test_the_verb_starts_jupyterlab_beside_the_default_environment(project: Project, tmp_path: Path) -> None:
    """With a uv that tells its words; nothing of JupyterLab is in the project's own environment."""
    fake = tmp_path / "uv"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    fake.chmod(0o755)
    words = ("ARGS=--no-browser --port 9999",)
    done = project.make("notebook", *words, PATH=f"{tmp_path}:{os.environ['PATH']}")
    said = done.stdout.splitlines()
    assert said[:3] == ["run", "--no-project", "--python"]
    assert said[-6:] == ["jupyter", "lab", "--no-browser", "--port", "9999", BOOK]
    assert any(word.startswith("--with=jupyterlab") for word in said)
    names = "jupyterlab ipykernel nbconvert"
    code = f"import importlib.util as u; print([n for n in {names.split()} if u.find_spec(n)])"
    assert project.run(project.program("python"), "-c", code).stdout == "[]\n"
    assert Path(said[3]) == project.path / ".venv" / "bin" / "python"
