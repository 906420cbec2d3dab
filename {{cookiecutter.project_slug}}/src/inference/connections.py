"""How requests come to the server: uvicorn's connections, with the deadlines and limits that they lack; and bodies.

Part of the server; see `serve.py`. None of this is met by a client that sends what it has; it is what keeps the event
loop, and so `/ping`, free of those that hold thousands of connections open, send byte by byte, or never read.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from typing import IO, Any, ClassVar

import h11
from starlette.requests import Request
from uvicorn.protocols.http.h11_impl import H11Protocol

ACCEPTED = 64  # connections at once, before any is looked at; the system keeps so many that wait for it:
WAITING = 4096
CONNECTIONS = 1024  # a new one beyond them ends the one that has been without a request for the longest time
HEAD_SECONDS = 10.0  # for the head of a request, from its first byte; or from the start of the connection
BODY_SECONDS = 10.0  # for the next part of a body,
BYTES_A_SECOND = 64 * 2**10  # and on the whole, after as long a start, at least this
IN_MEMORY = 2**23  # bytes of a body; of a larger one the rest, and what was there, is in a file
READ_SECONDS = 60.0  # for a client to take its answer
REST_SECONDS = 30.0  # for one that has an early answer to send the rest: many read only after it
KEPT_SECONDS = 75  # without a request: longer than clients and load balancers keep a connection
LEAVING_SECONDS = 1.0  # after SIGTERM, for a request that is on its way
CLOSE = (b"connection", b"close")  # as a header; uvicorn gives it back
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


class Ending:
    """A transport that is closed only when its client can have read the answer; a closed one makes the system reset.

    The head of an answer is sent with the first part of its body: one packet, one call of the system.
    """

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self.real, self._connection, self._head = transport, connection, b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def is_closing(self) -> bool:
        """Whether nothing more is answered."""
        return self._connection.lingering or self.real.is_closing()

    def write(self, data: bytes) -> None:
        """Send, a head later."""
        cycle = self._connection.cycle
        if not self._head and cycle and cycle.response_started and not cycle.response_complete:
            self._head = data
        else:
            self.real.write(self._head + data)
            self._head = b""

    def close(self) -> None:
        """Close, or send no more and read on for a while."""
        self._connection.end(self.real)


class Connection(H11Protocol):
    """One connection. It is idle while no request is being received or answered on it."""

    idle: ClassVar[dict[Connection, None]] = {}  # in the order in which they became so

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.conn = Parser(h11.SERVER, self.config.h11_max_incomplete_event_size or 16 * 2**10)
        self.deadlines: dict[str, asyncio.TimerHandle] = {}
        self.timeout_keep_alive = KEPT_SECONDS
        self.lingering = self.leaving = self.half_closed = False

    @property
    def busy(self) -> bool:
        """Whether a request is being received or answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, and make room for it."""
        super().connection_made(Ending(transport, self))  # type: ignore[arg-type]
        self._settle(HEAD_SECONDS)
        if len(self.connections) > CONNECTIONS:
            oldest = next(iter(self.idle))
            del self.idle[oldest]
            oldest.transport.real.close()  # type: ignore[attr-defined]

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self.idle.pop(self, None)
        for name in list(self.deadlines):
            self._within(None, name)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; those of a head must be all there in time, and so must those that follow an early answer."""
        if self.lingering:  # thrown away
            return
        early = not self.busy and self.conn.their_state is h11.SEND_BODY
        super().data_received(data)
        if self.leaving:
            self._say_close()
        if early and self.conn.their_state is h11.IDLE:
            self._within(KEPT_SECONDS, "head")
        self._settle(HEAD_SECONDS)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more, and may wait for its answer all the same; True keeps the connection for that."""
        self.half_closed = True
        if self.lingering or not (self.busy or self.conn.trailing_data[0]):
            return False
        if not self.busy or self.conn.their_state is h11.SEND_BODY:  # half of a request
            self.conn.receive_data(b"")
            self.handle_events()
        return True

    def end(self, transport: asyncio.Transport) -> None:
        """Close; where the client still sends, read on, so that it gets to read what it was answered."""
        if self.half_closed or self.conn.their_state not in (h11.SEND_BODY, h11.ERROR):
            transport.close()
        elif not self.lingering:
            self.lingering = True
            transport.write_eof()
            self.flow.resume_reading()
            self._within(REST_SECONDS, "head")

    def shutdown(self) -> None:
        """The server ends: answer what was sent, and what is on its way."""
        self.leaving = True
        if self.busy:
            self._say_close()
        else:
            self.loop.call_later(LEAVING_SECONDS, self._leave)

    def _leave(self) -> None:
        if not self.busy and not self.conn.trailing_data[0]:
            self.transport.close()

    def _say_close(self) -> None:
        if self.busy:
            self.cycle.keep_alive = False
            self.cycle.scope["headers"] = [*self.cycle.scope["headers"], CLOSE]

    def on_response_complete(self) -> None:
        """Wait for the next request, for as long as uvicorn does; or for the rest of one that has begun."""
        super().on_response_complete()
        self._settle(HEAD_SECONDS if self.conn.trailing_data[0] else None)
        if self.half_closed and not self.busy:
            self.transport.close()

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
        if self.busy:
            self.idle.pop(self, None)
            self._within(None, "head")
        else:
            self.idle.setdefault(self)
            if self.conn.their_state is h11.SEND_BODY:  # and has its answer
                seconds = REST_SECONDS
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

    @contextlib.asynccontextmanager
    async def received(self, request: Request) -> AsyncIterator[tuple[bytes | IO[bytes], int]]:
        """The whole body, and its size. A large one is in a file, which has no name and is gone afterwards.

        Raises:
            Refused: before more than needed is read: 413 it is too long, 408 too slow, or 503 there is no room.
        """
        self._check()
        loop, limit = asyncio.get_running_loop(), self._max_bytes
        too_long = Refused(413, f"the body has more bytes than the limit of {limit}")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise too_long
        body, start, size, file = bytearray(), loop.time() + BODY_SECONDS, 0, None
        with contextlib.ExitStack() as closing:
            try:
                async with asyncio.timeout(BODY_SECONDS) as deadline:
                    async for chunk in request.stream():
                        body += chunk
                        size += len(chunk)
                        self._receiving += len(chunk)
                        if size > limit:
                            raise too_long
                        if len(body) > IN_MEMORY or (file and not chunk):
                            file = file or closing.enter_context(tempfile.TemporaryFile())
                            await asyncio.to_thread(file.write, body)
                            await asyncio.to_thread(file.flush)
                            self._receiving -= len(body)
                            body = bytearray()
                        if self._receiving > self._queue * min(limit, IN_MEMORY):
                            raise Refused(503, "there is no room for more that is only half received; try again")
                        deadline.reschedule(min(loop.time() + BODY_SECONDS, start + size / BYTES_A_SECOND))
            except TimeoutError as error:
                said = f"the body stopped, or came with less than {BYTES_A_SECOND} bytes a second"
                raise Refused(408, said) from error
            except OSError as error:
                why = os.strerror(error.errno or 0)
                raise Refused(503, f"a body of more than {IN_MEMORY} bytes is kept in a file: {why}") from error
            finally:
                self._receiving -= len(body)
            yield file or bytes(body), size
