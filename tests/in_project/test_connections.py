"""Connections that would be in others' way: half sent, byte by byte, far too many, or never read.

python -m pytest tests/test_connections.py
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import socket
import threading
import time
import urllib.error
import urllib.request
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

    def __init__(self, port: int, stop: Callable[[], None]) -> None:
        self.port, self.url, self.stop = port, f"http://127.0.0.1:{port}", stop

    def connect(self, data: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.sendall(data)
        return connection

    def connect_for_ever(self) -> None:
        """Until it is refused; seldom enough to push no other connection out."""
        while True:
            self.connect().close()
            time.sleep(0.05)

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
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "READ_SECONDS", "REST_SECONDS"):
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
                http=connections.Connection, timeout_graceful_shutdown=5,
            )  # fmt: skip
            server = serve.Server(config)
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            try:
                await asyncio.to_thread(test, Client(port, lambda: setattr(server, "should_exit", True)))
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
        begun = time.monotonic()
        with client.connect(data) as connection:
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


def test_a_long_body_may_take_longer(beside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deadline is for each part, and for the whole only by its length."""
    monkeypatch.setattr(connections, "BODY_SECONDS", 2)

    def test(client: Client) -> None:
        with client.connect(HEAD + b"Content-Length: 200000\r\n\r\n") as connection:
            for _ in range(10):
                connection.sendall(b"x" * 20_000)
                time.sleep(0.25)
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


def test_the_oldest_idle_connection_makes_room(beside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD_SECONDS", "BODY_SECONDS"):
        monkeypatch.setattr(connections, name, 60)  # no deadline ends a connection here

    def test(client: Client) -> None:
        with contextlib.ExitStack() as stack:
            head = HEAD + b"Content-Length: 4\r\nExpect: 100-continue\r\n\r\n"
            kept = stack.enter_context(client.connect(head))
            assert kept.recv(100).startswith(b"HTTP/1.1 100 ")  # so the server has read it, and it is not idle
            kept.sendall(b"ab")
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


def test_pieces_are_those_of_one_body(beside: Any) -> None:
    """A kept connection may have as many requests as it likes."""

    def test(client: Client) -> None:
        with client.connect(REQUEST * (connections.PIECES + 100)) as connection:
            connection.shutdown(socket.SHUT_WR)
            assert received(connection).count(b"HTTP/1.1 200 ") == connections.PIECES + 100

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


def test_a_client_that_does_not_read_its_answer_is_let_go(beside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def test(client: Client) -> None:
        with client.connect(HEAD + b"Content-Length: 4\r\n\r\nlong") as connection:
            time.sleep(3)
            assert len(received(connection)) < LONG
        monkeypatch.setattr(connections, "READ_SECONDS", 60)
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


CLOSE = b"Connection: close\r\n"


@pytest.mark.parametrize("target", [b"/invocations", b"/nowhere", b"/ping"])
@pytest.mark.parametrize("keep", [b"", CLOSE])
def test_an_early_answer_arrives_although_all_is_sent_first(
    beside: Any, target: bytes, keep: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As urllib does it: 413, 404 and 405 are said before the body, which is more than the system's buffers hold."""
    monkeypatch.setattr(connections, "REST_SECONDS", 60)

    def test(client: Client) -> None:
        head = b"POST %s HTTP/1.1\r\nHost: x\r\n%sContent-Length: 20000000\r\n\r\n" % (target, keep)
        status = {b"/invocations": b"413", b"/nowhere": b"404", b"/ping": b"405"}[target]
        for _ in range(5):
            with client.connect(head) as connection:
                assert select.select([connection], [], [], 10)[0]  # the answer is there
                connection.sendall(b"x" * 20_000_000)
                assert connection.recv(2**16).startswith(b"HTTP/1.1 %s " % status)
                if not keep:  # and it can go on
                    connection.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
                    assert b"HTTP/1.1 200 " in connection.recv(2**16)
        client.answers()

    beside(test)


def test_a_full_server_s_answer_arrives_too(beside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any) -> None:
        raise connections.Refused(503, "full")

    monkeypatch.setattr(connections.Intake, "_check", full)
    monkeypatch.setattr(connections, "REST_SECONDS", 60)

    def test(client: Client) -> None:
        for _ in range(20):
            request = urllib.request.Request(f"{client.url}/invocations", b"x" * 1_000_000)
            with pytest.raises(urllib.error.HTTPError, match="503") as caught:
                urllib.request.urlopen(request, timeout=10)
            assert json.loads(caught.value.read()) == {"error": "full"}

    beside(test)


def test_what_is_no_http_gets_its_answer_too(beside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REST_SECONDS", 5)

    def test(client: Client) -> None:
        with client.connect(b"\x16\x03\x01\r\n\r\n" + b"x" * 5_000_000) as connection:
            assert received(connection).startswith(b"HTTP/1.1 400 ")

    beside(test)


def test_reading_on_has_an_end(beside: Any) -> None:
    head = HEAD + CLOSE + b"Content-Length: 900000000\r\n\r\n"

    def test(client: Client) -> None:
        with client.connect(head) as connection:
            assert ended(connection, b"x" * 1000)

    beside(test)


def test_those_that_are_read_on_make_room(beside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REST_SECONDS", 60)

    def test(client: Client) -> None:
        with contextlib.ExitStack() as stack:
            head = HEAD + CLOSE + b"Content-Length: 900000000\r\n\r\n"
            early = []
            for _ in range(25):
                early.append(stack.enter_context(client.connect(head)))
                assert early[-1].recv(100).startswith(b"HTTP/1.1 413 ")
            client.answers()
            assert sum(ended(one, b"x") for one in early[:3]) == 3

    beside(test)


REQUEST = HEAD + b"Content-Length: 3\r\n\r\nabc"


def test_who_asks_first_is_told_to_go_on_and_an_answer_is_sent_at_once(
    beside: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    transport: Any = asyncio.selector_events._SelectorSocketTransport  # type: ignore[attr-defined]
    real = transport.write

    def write(self: Any, data: bytes) -> None:
        sent.append(data)
        real(self, data)

    monkeypatch.setattr(transport, "write", write)

    def test(client: Client) -> None:
        with client.connect(HEAD + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n") as connection:
            assert connection.recv(2**16).startswith(b"HTTP/1.1 100 ")
            connection.sendall(b"abc")
            assert connection.recv(2**16).startswith(b"HTTP/1.1 200 ")
        assert [data.endswith(b"\r\n\r\n3") for data in sent if data] == [False, True]

    beside(test)


@pytest.mark.parametrize(
    ("data", "statuses"),
    [
        (REQUEST, [200]),
        (REQUEST * 3, [200] * 3),
        (REQUEST + HEAD, [200, 400]),
        (HEAD.replace(b"1.1", b"1.0") + b"Content-Length: 3\r\n\r\nabc", [200]),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", [200]),
        (HEAD + b"Content-Length: 9\r\n\r\nabc", [400]),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nab", [400]),
        (HEAD, [400]),
        (HEAD + b"Content-Length: 9000000\r\n\r\nabc", [413]),
        (b"", []),
    ],
)
def test_a_half_closed_client_gets_its_answer(
    beside: Any, data: bytes, statuses: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HEAD_SECONDS", "BODY_SECONDS"):
        monkeypatch.setattr(connections, name, 60)

    def test(client: Client) -> None:
        for pause in (0, 0.2):
            with client.connect(data) as connection:
                time.sleep(pause)
                connection.shutdown(socket.SHUT_WR)
                reply = received(connection)
            found = [int(part[:3]) for part in reply.split(b"HTTP/1.1 ")[1:]]
            assert found == statuses, reply

    beside(test)


def test_half_closed_while_it_is_answered(beside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, 0.5)

    def test(client: Client) -> None:
        with client.connect(REQUEST * 2) as connection:
            connection.shutdown(socket.SHUT_WR)
            assert received(connection).count(b"HTTP/1.1 200 ") == 2

    beside(test)


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    async def answer(_: Model, body: bytes, *__: Any) -> tuple[bytes, str]:
        await asyncio.sleep(seconds)
        return b"%d" % len(body), "text/plain"

    monkeypatch.setattr(Model, "answer", answer)


def test_a_connection_is_kept_for_longer_than_clients_keep_it(beside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert connections.KEPT_SECONDS >= 75
    monkeypatch.setattr(connections, "KEPT_SECONDS", 1)

    def test(client: Client) -> None:
        begun = time.monotonic()
        with client.connect(REQUEST) as connection:
            assert received(connection).count(b"HTTP/1.1 200 ") == 1
            assert 0.8 < time.monotonic() - begun < 3

    beside(test)


def test_what_was_sent_when_the_server_ends_is_answered(monkeypatch: pytest.MonkeyPatch, beside: Any) -> None:
    """One request is being answered, of one the half is there, and one arrives on a kept connection."""
    inside, go_on = threading.Semaphore(0), threading.Event()

    async def answer(_: Model, body: bytes, *__: Any) -> tuple[bytes, str]:
        inside.release()
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        return b"%d" % len(body), "text/plain"

    monkeypatch.setattr(Model, "answer", answer)
    for name in ("HEAD_SECONDS", "BODY_SECONDS"):
        monkeypatch.setattr(connections, name, 60)

    def test(client: Client) -> None:
        with contextlib.ExitStack() as stack:
            go_on.set()
            kept, quiet = (stack.enter_context(client.connect(REQUEST)) for _ in range(2))
            assert b"close" not in kept.recv(1000) + quiet.recv(1000)
            go_on.clear()
            answered = stack.enter_context(client.connect(REQUEST))
            half = stack.enter_context(client.connect(REQUEST[:-1]))
            head = stack.enter_context(client.connect(REQUEST[:40]))
            for _ in range(3):
                assert inside.acquire(timeout=10)
            time.sleep(0.2)  # so much for the two halves
            client.stop()
            with pytest.raises(OSError, match="refused"):
                client.connect_for_ever()
            go_on.set()
            kept.sendall(REQUEST)
            half.sendall(REQUEST[-1:])
            for connection in (answered, half, kept, head):  # of 3 places
                if connection == head:
                    head.sendall(REQUEST[40:])
                reply = received(connection)  # to its end
                assert reply.startswith(b"HTTP/1.1 200 ")
                assert reply.lower().count(b"connection: close\r\n") == 1
            assert received(quiet) == b""
            with pytest.raises(OSError, match="refused"):
                client.connect()

    beside(test)


def test_who_reads_to_the_end_need_not_wait_for_it(beside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REST_SECONDS", 60)

    def test(client: Client) -> None:
        with client.connect(HEAD + CLOSE + b"Content-Length: 9000000\r\n\r\n") as connection:
            begun = time.monotonic()
            assert received(connection).startswith(b"HTTP/1.1 413 ")
            assert time.monotonic() - begun < 5

    beside(test)
