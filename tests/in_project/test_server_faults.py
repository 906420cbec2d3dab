"""Faults around the server: kills, a vanished artifact, a full disk, slow and vanishing clients, many connections.

python -m pytest tests/test_server_faults.py
"""

from __future__ import annotations

import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipelines.local.serve import command
from tests.helpers import free_port, verb_environment
from tests.hosting import ANY_IMAGE, Running, ask, serving
from tests.test_inference import artifact, photo

__all__ = ["artifact"]  # a fixture
HEAD = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\n"
IDLE = 1000


def answers(url: str) -> None:
    assert ask(url, photo("left"), ANY_IMAGE, timeout=10).labels() == ["left"]


@pytest.fixture(scope="module")
def copy(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(artifact, tmp_path_factory.mktemp("copy") / "model"))


@pytest.fixture(scope="module")
def server(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))  # it inherits this, and raises it
    with serving(copy, tmp_path_factory.mktemp("server") / "log", INFERENCE_TIMEOUT="3") as running:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        yield running


def test_a_slow_client_hinders_nobody_and_is_let_go(server: Running) -> None:
    with server.connect(HEAD) as connection:
        connection.settimeout(1)
        begun = time.monotonic()
        reply = b""
        while not reply and time.monotonic() - begun < 20:
            connection.sendall(b"x")
            answers(server.url)
            try:
                reply = connection.recv(1000)
            except TimeoutError:
                continue
        assert reply.startswith(b"HTTP/1.1 504 "), reply
        assert time.monotonic() - begun < 10


def test_clients_that_vanish_leave_nothing(server: Running) -> None:
    answers(server.url)
    before = open_files(server)
    for number in range(200):
        connection = server.connect(HEAD + b"x" * number)
        if number % 2:  # a reset instead of an end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
    end = time.monotonic() + 10
    while (left := open_files(server)) > before + 1 and time.monotonic() < end:
        time.sleep(0.05)
    assert left <= before + 1
    answers(server.url)
    assert {line["level"] for line in server.lines()} == {"info"}
    while not (gone := sum(line.get("status") == 499 for line in server.lines())) and time.monotonic() < end:
        time.sleep(0.05)
    assert gone  # not all: a client may have gone before its request was read


def test_idle_connections_hinder_nobody(server: Running) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with ExitStack() as stack:
            for number in range(IDLE):
                stack.enter_context(server.connect(b"POST /inv" if number % 2 else b""))
            answers(server.url)
            assert open_files(server) > IDLE  # it took all of them before that request
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    answers(server.url)


def open_files(server: Running) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def test_an_artifact_that_goes_away_is_not_missed(server: Running, copy: Path) -> None:
    shutil.rmtree(copy)
    answers(server.url)
    assert server.ping() == 200


def test_a_killed_server_starts_again_on_its_port(artifact: Path, tmp_path: Path) -> None:
    with serving(artifact, tmp_path / "log") as running, running.connect(HEAD + b"half") as connection:
        answers(running.url)
        running.process.kill()
        running.process.wait()
        assert connection.recv(100) == b""
        with serving(artifact, tmp_path / "again", running.port) as again:
            answers(again.url)


def test_a_log_on_a_full_disk_costs_no_request(artifact: Path, tmp_path: Path) -> None:
    port = free_port()
    with Path("/dev/full").open("wb") as full, (tmp_path / "errors").open("wb") as errors:
        process = subprocess.Popen(command(None, artifact, port), env=verb_environment(), stdout=full, stderr=errors)
    try:
        running = Running(process, port, artifact / "nowhere")
        running.wait_until(200)
        for _ in range(300):
            ask(running.url, b"x", ANY_IMAGE).refused(400)
        answers(running.url)
        process.terminate()
        assert process.wait(20) == 0
        assert (tmp_path / "errors").read_text() == ""
    finally:
        process.kill()
        process.wait()
