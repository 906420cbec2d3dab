"""Connections that would be in others' way: half sent, byte by byte, far too many, or never read.

python -m pytest tests/test_connections.py
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn

from inference import connections, serve
from tests.helpers import free_port
from tests.hosting import ask

HEAD = b"POST /invocations HTTP/1.1\r\nHost: x\r\n"
LONG = 20_000_000  # bytes of the answer to "long": more than the system keeps for a client that does not read


class Model:
    """Takes the place of the batcher."""

    healthy = True

    async def answer(self, body: bytes, *_: Any) -> tuple[bytes, str]:
        return (b"x" * LONG if body == b"long" else b"%d" % len(body)), "text/plain"


class Client:
    """What a test does beside the server."""

    def __init__(self, port: int) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"

    def connect(self, data: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.sendall(data)
        return connection

    def answers(self) -> None:
        """Others are not hindered."""
        begun = time.monotonic()
        assert ask(self.url, method="GET", path="/ping", timeout=10).status == 200
        assert ask(self.url, b"abc", timeout=10).body == b"3"
        assert time.monotonic() - begun < 2


def received(connection: socket.socket) -> bytes:
    """All that comes until the connection ends."""
    data = bytearray()
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(2**16):
            data += part
    return bytes(data)


def send(connection: socket.socket, data: bytes) -> None:
    """As much as the other side takes."""
    with contextlib.suppress(ConnectionError):
        connection.sendall(data)


def ended(connection: socket.socket, piece: bytes) -> bool:
    """Whether it ends although something is sent again and again."""
    with contextlib.suppress(ConnectionError):
        for _ in range(60):
            connection.sendall(piece)
            time.sleep(0.05)
        return False
    return True


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Client], None]], None]]:
    """Runs a function beside a server of which all deadlines are half a second, and that takes 20 connections."""
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "READ_SECONDS"):
        monkeypatch.setattr(connections, name, 0.5)
    monkeypatch.setattr(connections, "CONNECTIONS", 20)

    def run(test: Callable[[Client], None]) -> None:
        async def both() -> None:
            failures: list[dict[str, Any]] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
            port, settings = free_port(), serve.Settings(queue=3, timeout=20, max_bytes=2**20)
            served: Any = serve.application(Model(), settings)  # type: ignore[arg-type]
            config = uvicorn.Config(
                served, host="127.0.0.1", port=port, log_config=None, lifespan="off", backlog=connections.ACCEPTED,
                http=connections.Connection, timeout_graceful_shutdown=1,
            )  # fmt: skip
            server = serve.Server(config)
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            try:
                await asyncio.to_thread(test, Client(port))
                end = time.monotonic() + 5
                while server.server_state.connections and time.monotonic() < end:
                    await asyncio.sleep(0.01)
                assert not server.server_state.connections  # nothing is left
                assert not connections.Connection.idle
                assert not failures
            finally:
                server.should_exit = True
                await serving

        asyncio.run(both())

    yield run
    connections.Connection.idle.clear()


@pytest.mark.parametrize("data", [b"", b"P", HEAD, b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\nGET /ping HTTP/1.1\r\nHo"])
def test_a_head_that_does_not_come_ends_the_connection(beside: Any, data: bytes) -> None:
    def test(client: Client) -> None:
        with client.connect(data) as connection:
            begun = time.monotonic()
            assert received(connection).count(b"HTTP/1.1") == data.count(b"\r\n\r\n")
            assert 0.3 < time.monotonic() - begun < 2
        client.answers()

    beside(test)


def test_a_head_byte_by_byte_ends_at_the_same_time(beside: Any) -> None:
    def test(client: Client) -> None:
        with client.connect() as connection:
            assert ended(connection, b"G")

    beside(test)


@pytest.mark.parametrize("length", [b"Content-Length: 9000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n2328\r\n"])
@pytest.mark.parametrize("trickle", [False, True])
def test_a_body_that_stops_or_trickles_is_refused(beside: Any, length: bytes, trickle: bool) -> None:
    def test(client: Client) -> None:
        with client.connect(HEAD + length + b"x" * 1000) as connection:
            begun, reply = time.monotonic(), b""
            connection.settimeout(0.1)
            while not reply and time.monotonic() - begun < 3:
                with contextlib.suppress(TimeoutError):
                    reply = connection.recv(2**16)
                if trickle and not reply:
                    connection.sendall(b"x")
            assert reply.startswith(b"HTTP/1.1 408 ")
            assert b"connection: close" in reply.lower()
            connection.settimeout(10)
            received(connection)  # it ends
        client.answers()

    beside(test)


def test_a_long_body_may_take_longer(beside: Any) -> None:
    """A deadline is for each part, and for the whole only by its length."""

    def test(client: Client) -> None:
        with client.connect(HEAD + b"Content-Length: 200000\r\n\r\n") as connection:
            for _ in range(10):
                connection.sendall(b"x" * 20_000)
                time.sleep(0.1)
            assert b"200000" in connection.recv(2**16)

    beside(test)


def test_half_bodies_take_no_place(beside: Any) -> None:
    def test(client: Client) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(8):  # of 3 places
                stack.enter_context(client.connect(HEAD + b"Content-Length: 100\r\n\r\nhalf"))
            client.answers()

    beside(test)


def test_what_is_half_received_is_bounded(beside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "BODY_SECONDS", 10)

    def test(client: Client) -> None:
        with contextlib.ExitStack() as stack:
            length = 2**20
            body = HEAD + b"Content-Length: %d\r\n\r\n" % length + b"x" * (length - 1)
            half = [stack.enter_context(client.connect(body)) for _ in range(4)]  # with room for 3
            (refused,) = select.select(half, [], [], 5)[0]
            assert refused.recv(2**16).startswith(b"HTTP/1.1 503 ")
            assert not select.select([one for one in half if one != refused], [], [], 0.1)[0]
        client.answers()

    beside(test)


def test_the_oldest_idle_connection_makes_room(beside: Any) -> None:
    def test(client: Client) -> None:
        with contextlib.ExitStack() as stack:
            kept = stack.enter_context(client.connect(HEAD + b"Content-Length: 4\r\n\r\nab"))  # not idle
            idle = [stack.enter_context(client.connect(b"GE" * (number % 2))) for number in range(30)]
            client.answers()
            assert [received(connection) for connection in idle[:11]] == [b""] * 11  # at once
            kept.sendall(b"cd")
            assert kept.recv(2**16).startswith(b"HTTP/1.1 200 ")
            assert idle[-1].send(b"T /ping HTTP/1.1\r\nHost: x\r\n\r\n")
            assert idle[-1].recv(100).startswith(b"HTTP/1.1 200 ")
            kept.close()

    beside(test)


def test_tiny_pieces_of_a_body_are_refused(beside: Any) -> None:
    def chunked(client: Client, size: int, count: int) -> bytes:
        chunk = b"%x\r\n" % size + b"x" * size + b"\r\n"
        head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
        with client.connect(head) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(chunk * count + b"0\r\n\r\n")
            return connection.recv(100)
        return b"HTTP/1.1 400 "  # refused before all was sent

    def test(client: Client) -> None:
        for size, count, status in ((1, 100, 200), (1, 5000, 400), (1000, 1000, 200), (100, 5000, 400)):
            assert chunked(client, size, count).startswith(b"HTTP/1.1 %d " % status), (size, count)
        with client.connect(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n") as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 404 ")  # has its answer before the body
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"1\r\nx\r\n" * 50_000)
            received(connection)
        client.answers()

    beside(test)


def test_what_follows_an_early_answer_ends(beside: Any) -> None:
    def test(client: Client) -> None:
        with client.connect(HEAD + b"Content-Length: 2000000\r\n\r\n") as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
            assert ended(connection, b"x")

    beside(test)


def test_a_long_body_that_stops_is_not_waited_for(beside: Any) -> None:
    """At the rate of a body this long it would have 15 seconds; without a byte it has half of one."""

    def test(client: Client) -> None:
        with client.connect(HEAD + b"Content-Length: 1048576\r\n\r\n" + b"x" * 1_000_000) as connection:
            begun = time.monotonic()
            assert received(connection).startswith(b"HTTP/1.1 408 ")
            assert time.monotonic() - begun < 3

    beside(test)


def test_what_is_no_http_after_an_early_answer_ends_the_connection(beside: Any) -> None:
    def test(client: Client) -> None:
        chunk = b"Transfer-Encoding: chunked\r\n\r\n180000\r\n" + b"x" * 0x180000 + b"\r\n"
        with client.connect(HEAD) as connection:
            sending = threading.Thread(target=send, args=(connection, chunk + b"no length\r\n"))
            sending.start()
            assert received(connection).count(b"HTTP/1.1 ") == 1
            sending.join()

    beside(test)


def test_a_client_that_does_not_read_its_answer_is_let_go(beside: Any) -> None:
    def test(client: Client) -> None:
        with client.connect(HEAD + b"Content-Length: 4\r\n\r\nlong") as connection:
            time.sleep(1.5)
            assert len(received(connection)) < LONG
        assert len(ask(client.url, b"long").body) == LONG
        client.answers()

    beside(test)


def test_a_kept_connection_is_not_ended_by_the_deadline_of_heads(beside: Any) -> None:
    def test(client: Client) -> None:
        request = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
        with client.connect() as connection:
            for _ in range(3):
                connection.sendall(request)
                assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
                time.sleep(0.8)

    beside(test)
