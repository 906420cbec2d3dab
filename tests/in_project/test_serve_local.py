"""`make serve-local`: what it prints, how it fails, how it stops, and what its container may not do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from inference.artifact import digest_of
from pipelines import project
from pipelines.local import serve as serve_local
from tests.helpers import Verb, containers_and_networks, free_port, verb_environment
from tests.test_inference import archive, artifact, photo

__all__ = ["archive", "artifact"]  # fixtures
RUN = "20260101-000000-abcd"


def note(project: Path, archive: Path) -> None:
    """Trust an artifact in a copy of the project, as a run there would have."""
    file = project / ".cache" / "trusted"
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as lines:
        lines.write(f"{digest_of(archive)} by a test\n")


@pytest.fixture
def served(project: Path, archive: Path) -> Path:
    """A copy of the project with one finished run."""
    folder = project / "artifacts" / RUN
    folder.mkdir(parents=True)
    shutil.copy(archive, folder / "model.tar.gz")
    note(project, archive)
    (project / "artifacts" / "latest").symlink_to(RUN)
    (project / "photo.png").write_bytes(photo("left"))
    return project


def process_mode(verb: Verb, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return verb("serve-local", "--mode", "process", "--port", str(free_port()), *arguments, **environment)


def test_it_asks_once_and_stops(served: Path, verb: Verb) -> None:
    done = process_mode(verb, "--image", "photo.png")
    assert done.returncode == 0, done.stderr
    assert "photo.png: left, probability 0." in done.stdout
    assert not list((served / ".cache" / "local").iterdir())  # the unpacked artifact is gone


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("no.png", None, "cannot be read"), ("text.png", b"text", "the server answered 400: ")],
)
def test_a_bad_image_is_one_sentence(served: Path, verb: Verb, name: str, content: bytes | None, message: str) -> None:
    if content:
        (served / name).write_bytes(content)
    done = process_mode(verb, "--image", name)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert message in done.stderr


def test_a_port_that_is_taken(served: Path, verb: Verb) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = verb("serve-local", "--mode", "process", "--port", str(other.getsockname()[1]))
    assert done.returncode == 1
    assert "cannot be had" in done.stderr
    assert served


def test_wrong_artifacts_and_settings_are_named(served: Path, verb: Verb) -> None:
    done = process_mode(verb, "--image", "photo.png", INFERENCE_QUEUE="none")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "INFERENCE_QUEUE is 'none'" in done.stderr
    (served / "artifacts" / RUN / "model.tar.gz").write_bytes(b"no archive")
    note(served, served / "artifacts" / RUN / "model.tar.gz")
    assert "cannot be unpacked" in process_mode(verb).stderr
    done = process_mode(verb, "--run", "20260101-000000-ffff")
    assert "no finished run" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("mode", ["process", pytest.param("container", marks=pytest.mark.container)])
def test_a_stop_leaves_nothing(served: Path, request: pytest.FixtureRequest, mode: str, number: int) -> None:
    before: Any = None
    if mode == "container":
        request.getfixturevalue("serving_image")
        before = containers_and_networks()
    port = free_port()
    command = [sys.executable, "-m", "pipelines", "serve-local", "--mode", mode, "--port", str(port)]
    environment = verb_environment() | {"INFERENCE_MAX_DEPTH": "3"}
    verb = subprocess.Popen(command, cwd=served, env=environment, stdout=subprocess.PIPE, text=True)
    output = verb.stdout
    assert output is not None
    lines: list[str] = []
    while "curl" not in (lines or [""])[-1]:
        lines.append(output.readline())
        assert lines[-1], f"it ended: {lines}"
    assert f"127.0.0.1:{port}/invocations" in lines[-1]
    assert f"AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME=http://127.0.0.1:{port}\n" in lines[-2]
    path = "/endpoints/any/invocations"
    assert json.loads(serve_local.ask(port, "POST", path, photo("up"))[1])["labels"] == ["up"]
    assert serve_local.ask(port, "POST", "/endpoints/any/async-invocations", photo("up"))[0] == 202
    deep = json.dumps({"instances": [[[[1]]]]}).encode()
    assert b"nested" in serve_local.ask(port, "POST", "/invocations", deep, "application/json")[1]  # handed on
    if mode == "container":
        name = f"{project.name()}-serve-{verb.pid}"
        facts = json.loads(subprocess.check_output(["docker", "inspect", name]))[0]
        assert [bound["HostIp"] for bound in facts["NetworkSettings"]["Ports"]["8080/tcp"]] == ["127.0.0.1"]
        assert facts["HostConfig"]["ReadonlyRootfs"]
        assert facts["HostConfig"]["CapDrop"] == ["ALL"]
        assert facts["HostConfig"]["SecurityOpt"] == ["no-new-privileges"]
        assert facts["HostConfig"]["PidsLimit"] == 1024
        assert facts["Config"]["User"] == f"{os.getuid()}:{os.getgid()}"
        written = {mount["Destination"] for mount in facts["Mounts"] if mount["RW"]}
        assert written == {str(served / "artifacts" / "async")}
    verb.send_signal(number)
    assert verb.wait(timeout=40) == 0
    output.close()
    assert before is None or containers_and_networks() == before
    assert not list((served / ".cache" / "local").iterdir())
    end = time.monotonic() + 5
    while True:
        try:
            serve_local.ask(port, "GET", "/ping")
        except OSError:
            break
        assert time.monotonic() < end, "something still answers"
