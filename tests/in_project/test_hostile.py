"""A server under attack: what is sent is refused or answered, `/ping` answers, and no other request is lost.

python -m pytest tests/test_hostile.py
"""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.hosting import ANY_IMAGE, JSON, Running, ask, serving
from tests.test_imaging import HOSTILE
from tests.test_inference import artifact, photo

__all__ = ["artifact"]  # a fixture
MEBIBYTES = 6 * 2**20
HEADS = 3000
Attack = Callable[[Running], int]


def body(content: bytes, kind: str = JSON) -> Attack:
    return lambda server: ask(server.url, content, kind).status


def picture(name: str) -> Attack:
    return lambda server: ask(server.url, HOSTILE[name][0](), ANY_IMAGE).status


def tiny_chunks(server: Running) -> int:
    head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server.connect(head) as connection, contextlib.suppress(ConnectionError):
        for _ in range(50):
            connection.sendall(b"1\r\nx\r\n" * 20_000)
        return int(connection.recv(100).split()[1])
    return 400  # refused before all of it was sent


LISTS = b'{"instances":[' + b"[]," * (MEBIBYTES // 3 - 20) + b"[]]}"
ATTACKS: dict[str, tuple[int, Attack]] = {  # clients
    "empty lists": (8, body(LISTS)),
    "open lists": (8, body(b"[" * MEBIBYTES)),
    "numbers": (8, body(b'{"instances":[[' + b"1," * (MEBIBYTES // 2 - 20) + b"1]]}")),
    "quotes": (8, body(b'"' + b'\\"' * 32_000)),
    "more quotes": (8, body(b'"' + b'\\"' * (MEBIBYTES // 2 - 1))),
    "strings": (8, body(b'{"instances":[["' + b"x" * 500_000 + b'"' + b',""' * 2000 + b"]]}")),
    "no picture": (8, body(bytes(MEBIBYTES), ANY_IMAGE)),
    "chunks of a byte": (8, tiny_chunks),
    **{name: (2, picture(name)) for name in ("passes", "tables", "ends of lines", "strips", "unknown chunks")},
}


@pytest.fixture(scope="module")
def server(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(artifact, tmp_path_factory.mktemp("hostile") / "log", INFERENCE_THREADS="1") as running:
        yield running


def harmless(server: Running, seconds: float, done: Callable[[], bool] = bool) -> None:
    """For so long, `/ping` and a usual request get their answers."""
    begun, slowest = time.monotonic(), 0.0
    while time.monotonic() - begun < seconds or not (done is bool or done()):
        asked = time.monotonic()
        assert ask(server.url, method="GET", path="/ping", timeout=10).status == 200
        slowest = max(slowest, time.monotonic() - asked)
        assert ask(server.url, photo("left"), ANY_IMAGE, timeout=20).labels() == ["left"]
    assert slowest < 2


@pytest.mark.parametrize("name", ATTACKS)
def test_ping_and_others_are_answered_meanwhile(server: Running, name: str) -> None:
    clients, attack = ATTACKS[name]
    end = threading.Event()

    def fire(_: int) -> set[int]:
        statuses = set()
        while not end.is_set():
            statuses.add(attack(server))
        return statuses

    with ThreadPoolExecutor(clients) as pool:
        firing = pool.map(fire, range(clients))
        try:
            harmless(server, 3)
        finally:
            end.set()
        assert set().union(*firing) == {400}
    assert {line["level"] for line in server.lines()} == {"info"}


def test_thousands_of_half_sent_heads(server: Running) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    held: list[socket.socket] = []
    try:
        opening = threading.Thread(target=lambda: held.extend(server.connect(b"POST /inv") for _ in range(HEADS)))
        opening.start()
        harmless(server, 1, lambda: not opening.is_alive())
        opening.join()
        assert len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())) < HEADS / 2  # some have made room
        begun = time.monotonic()
        assert held[-1].recv(100) == b""  # and the others end in time
        assert time.monotonic() - begun < 15
    finally:
        for connection in held:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    harmless(server, 0)


def test_memory_comes_back(server: Running) -> None:
    """After many large requests of every kind the server holds little more than before."""
    before = server.stat("VmRSS")
    for _, attack in [ATTACKS["numbers"], ATTACKS["strings"], ATTACKS["empty lists"], ATTACKS["no picture"]] * 5:
        assert attack(server) == 400
    assert server.stat("VmRSS") - before < 100_000
