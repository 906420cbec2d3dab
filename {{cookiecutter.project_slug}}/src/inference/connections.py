"""How requests come to the server: uvicorn's connections, with the deadlines and limits that they lack; and bodies.

Part of the server; see `serve.py`. None of this is met by a client that sends what it has; it is what keeps the event
loop, and so `/ping`, free of those that hold thousands of connections open, send byte by byte, or never read.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any, ClassVar

import h11
from starlette.requests import Request
from uvicorn.protocols.http.h11_impl import H11Protocol

ACCEPTED = 64  # connections at once, before any is looked at; the system keeps so many that wait for it:
WAITING = 4096
CONNECTIONS = 1024  # a new one beyond them ends the one that has been without a request for the longest time
HEAD_SECONDS = 10.0  # for the head of a request, from its first byte; or from the start of the connection
BODY_SECONDS = 10.0  # for the next part of a body,
BYTES_A_SECOND = 64 * 2**10  # and on the whole, after as long a start, at least this
READ_SECONDS = 60.0  # for a client to take its answer
PIECES, PIECE_BYTES = 1000, 512  # so many pieces of a body may be small; of more, each has so many bytes on average


class Parser(h11.Connection):
    """h11's, which takes a body in tiny chunks apart for minutes; this one refuses it."""

    pieces = taken = 0  # of the body

    def next_event(self) -> Any:
        """See h11.

        Raises:
            h11.RemoteProtocolError: what is sent is no HTTP, or in too many pieces.
        """
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.pieces = self.taken = 0
        elif isinstance(event, h11.Data):
            self.pieces, self.taken = self.pieces + 1, self.taken + len(event.data)
            if self.pieces > PIECES + self.taken // PIECE_BYTES:
                raise h11.RemoteProtocolError("the body comes in too many pieces")
        return event


def let_wait(server: asyncio.Server) -> None:
    """Let more connections wait than asyncio accepts at once, which it has one number for."""
    for listening in server.sockets:
        with socket.socket(fileno=os.dup(listening.fileno())) as own:
            own.listen(WAITING)


class Connection(H11Protocol):
    """One connection. It is idle while no request is being received or answered on it."""

    idle: ClassVar[dict[Connection, None]] = {}  # in the order in which they became so

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.conn = Parser(h11.SERVER, self.config.h11_max_incomplete_event_size or 16 * 2**10)
        self.deadlines: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, and make room for it."""
        super().connection_made(transport)
        self._settle(HEAD_SECONDS)
        if len(self.connections) > CONNECTIONS:
            oldest = next(iter(self.idle))
            del self.idle[oldest]
            oldest.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self.idle.pop(self, None)
        for name in list(self.deadlines):
            self._within(None, name)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; those of a head must be all there in time, and so must those that follow an early answer."""
        super().data_received(data)
        self._settle(HEAD_SECONDS)

    def on_response_complete(self) -> None:
        """Wait for the next request, for as long as uvicorn does; or for the rest of one that has begun."""
        super().on_response_complete()
        self._settle(HEAD_SECONDS if self.conn.trailing_data[0] else None)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, unless the request has an answer already."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        """The client does not take its answer."""
        super().pause_writing()
        self._within(READ_SECONDS, "answer")

    def resume_writing(self) -> None:
        """It does."""
        super().resume_writing()
        self._within(None, "answer")

    def _settle(self, seconds: float | None) -> None:
        """Note whether the connection is idle, and how long it may be so."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.idle.pop(self, None)
            self._within(None, "head")
        else:
            self.idle.setdefault(self)
            if seconds and "head" not in self.deadlines:
                self._within(seconds, "head")

    def _within(self, seconds: float | None, name: str) -> None:
        """Set or clear a deadline, at which the connection ends."""
        if name in self.deadlines:
            self.deadlines.pop(name).cancel()
        if seconds:
            self.deadlines[name] = self.loop.call_later(seconds, self.transport.abort)


class Refused(Exception):
    """The server itself refuses a request; with the status and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Intake:
    """What is inside. A request counts from when all of it was received: half of one is in nobody's way.

    Args:
        queue: requests that are answered at once, and whose bodies there is memory for.
        max_bytes: of a body.
    """

    def __init__(self, queue: int, max_bytes: int) -> None:
        self._queue, self._max_bytes = queue, max_bytes
        self._requests = self._receiving = 0  # that are answered; bytes of bodies that are not complete

    def _check(self) -> None:
        if self._requests >= self._queue:
            raise Refused(503, f"{self._queue} requests are being answered, which is the limit; try again")

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count one more.

        Raises:
            Refused: 503, there are as many as may be.
        """
        self._check()
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    async def receive(self, request: Request) -> bytes:
        """The whole body.

        Raises:
            Refused: before more than needed is read: 413 it is too long, 408 too slow, or 503 there is no room.
        """
        self._check()
        loop, limit = asyncio.get_running_loop(), self._max_bytes
        too_long = Refused(413, f"the body has more bytes than the limit of {limit}")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise too_long
        body, start = bytearray(), loop.time() + BODY_SECONDS
        try:
            async with asyncio.timeout(BODY_SECONDS) as deadline:
                async for chunk in request.stream():
                    body += chunk
                    self._receiving += len(chunk)
                    if len(body) > limit:
                        raise too_long
                    if self._receiving > self._queue * limit:
                        raise Refused(503, "there is no room for more that is only half received; try again")
                    deadline.reschedule(min(loop.time() + BODY_SECONDS, start + len(body) / BYTES_A_SECOND))
        except TimeoutError as error:
            raise Refused(408, f"the body stopped, or came with less than {BYTES_A_SECOND} bytes a second") from error
        finally:
            self._receiving -= len(body)
        return bytes(body)
