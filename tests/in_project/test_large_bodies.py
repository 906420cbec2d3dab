"""Bodies far above what a real-time endpoint takes, as an asynchronous one does: in a file, and never all in memory."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import gc
import gzip
import hashlib
import json
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request

import payload
import spelling
from bounds import IN_MEMORY, PIECE, Stored, pieces, stored
from inference import inference
from inference.batcher import Batcher
from inference.connections import Intake, Refused
from spelling import RequestError
from tests.hosting import Running, ask, npy, serving
from tests.test_inference import artifact, photo

__all__ = ["artifact"]  # a fixture
LARGE, GROWTH = 100 * 2**20, 40_000  # bytes of a body; kB by which the server may grow for it
JUNK = bytes(PIECE)
END = struct.pack(">I4s", 0, b"IEND") + bytes.fromhex("ae426082")


def padded(picture: bytes) -> Iterator[bytes]:
    """A PNG with pieces that no decoder needs."""
    yield picture[: -len(END)]
    for _ in range(LARGE // PIECE):
        yield struct.pack(">I4s", PIECE, b"juNK") + JUNK + bytes(4)
    yield END


def tiff() -> Iterator[bytes]:
    """Its directory, and a white picture of 12 by 12, are behind everything else."""
    fields = [(256, 4, 12), (257, 4, 12), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, LARGE), (277, 3, 1),
              (278, 4, 12), (279, 4, 144)]  # fmt: skip
    yield struct.pack("<2sHL", b"II", 42, LARGE + 144) + JUNK[8:]
    yield from (JUNK for _ in range(LARGE // PIECE - 1))
    yield b"\xff" * 144 + struct.pack("<H", len(fields))
    yield b"".join(struct.pack("<HHLL", tag, kind, 1, value) for tag, kind, value in fields) + bytes(4)


def document(start: bytes = b"") -> Iterator[bytes]:
    """JSON, whose instances all have a long note with quotes, brackets and backslashes."""
    picture, note = base64.b64encode(photo("left")), b"\\" * (PIECE - 4) + b'\\"[,'
    yield start + b'{"instances": ['
    for number in range(LARGE // PIECE):
        yield b"," * (number > 0) + b'{"b64": "' + picture + b'", "note": "' + note + b'"}'
    yield b"]}"


def form() -> Iterator[bytes]:
    yield b'--edge\r\nContent-Disposition: form-data; name="a"; filename="a.png"\r\n\r\n'
    yield from padded(photo("left"))
    yield b"\r\n--edge--\r\n"


def packed() -> bytes:
    return gzip.compress(b"".join(padded(photo("left"))), 1)


@pytest.fixture(scope="module")
def server(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "temporary").mkdir()
    variables = {"INFERENCE_MAX_BYTES": str(2**30), "TMPDIR": str(folder / "temporary")}
    with serving(artifact, folder / "log", **variables) as running:
        yield running


def grown(server: Running, send: Callable[[], object]) -> int:
    """How many kB of memory, without what the system may drop, the server takes more at most meanwhile."""
    done, most, before = threading.Event(), [0], server.stat("RssAnon")

    def look() -> None:
        while not done.is_set():
            most[0] = max(most[0], server.stat("RssAnon") + server.stat("RssShmem") - before)
            time.sleep(0.005)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        send()
    finally:
        done.set()
        thread.join()
    return most[0]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says how a process grows")
@pytest.mark.parametrize(
    ("body", "kind", "count"),
    [
        (lambda: padded(photo("left")), "image/png", 1),
        (lambda: iter([packed()]), "image/png", 1),
        (form, "multipart/form-data; boundary=edge", 1),
        (tiff, "image/tiff", 1),
        (document, "application/json", LARGE // PIECE),
        (lambda: document(b"\xef\xbb\xbf"), "application/json", LARGE // PIECE),
        (lambda: (part.decode().encode("utf-16") for part in [b"".join(document())]), "", LARGE // PIECE),
    ],
    ids=["png", "gzip", "form", "tiff", "json", "mark", "utf-16"],
)
def test_a_large_body_is_in_a_file(body: Callable[[], Iterator[bytes]], kind: str, count: int, server: Running) -> None:
    def send() -> None:
        labels = ask(server.url, body(), kind).labels()
        assert len(labels) == count
        if kind != "image/tiff":
            assert set(labels) == {"left"}

    ask(server.url, photo(), "image/png")
    assert grown(server, send) < GROWTH
    assert not [*(server.log.parent / "temporary").iterdir()]
    opened = []
    for link in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a connection that ends meanwhile
            opened.append(str(link.readlink()))
    assert not [place for place in opened if "deleted" in place]
    assert server.lines()[-1]["bytes"] > min(LARGE, len(packed()) if "gzip" in kind else 2**17)


def test_what_is_wrong_with_a_large_body_is_said_too(server: Running) -> None:
    def junk(start: bytes = b"") -> Iterator[bytes]:
        yield start
        yield from (JUNK for _ in range(12))

    beside = b'{"instances": [], "more": "' + b" " * (IN_MEMORY + PIECE) + b'"}'
    ask(server.url, junk(b"hello"), "text/csv").refused(415)
    ask(server.url, junk(b"\x89PNG\r\n\x1a\n"), "image/png").refused(400)
    ask(server.url, junk(b"\xff\xd8\xff"), "image/png").refused(400)
    ask(server.url, junk(b"\x93NUMPY\x01\0"), "").refused(400)
    ask(server.url, junk(b"\x1f\x8b"), "image/png").refused(400)
    assert "bytes beside its instances" in ask(server.url, iter([beside]), "").refused(413)
    assert "is not one whole stream" in ask(server.url, gzip.compress(bytes(PIECE)) + bytes(2 * PIECE), "").refused(400)
    assert not [line for line in server.lines() if line["level"] != "info"]


def test_own_handlers_get_bytes_unless_they_say_that_they_take_files(tmp_path: Path) -> None:
    got: list[Any] = []
    batcher = Batcher(tmp_path, 1, 1, 1, 1)
    handlers: Any = SimpleNamespace(input_fn=lambda body, *_: got.append(body))
    batcher._handlers = handlers
    with TemporaryFile() as file:
        file.write(b"a body")
        batcher._decode(file, None, None)
        handlers.TAKES_FILES = True
        batcher._decode(file, None, None)
    assert got == [b"a body", file]


FAILING = """
class Trouble(Exception): pass
def model_fn(folder): return None
def input_fn(body, *_): return fail(body, b"input")
def predict_fn(body, *_): return fail(body, b"predict")
def output_fn(body, *_): return fail(body, b"output")
def fail(body, where):
    if body == where:
        raise Trouble
    return body
"""


def test_nothing_of_a_failed_request_waits_for_the_garbage_collector(artifact: Path, tmp_path: Path) -> None:
    """Its traceback holds the body and the picture, so nothing may hold both it and what it comes from."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "inference.py").write_text(FAILING)

    async def failed(folder: Path, bodies: Sequence[bytes]) -> int:
        batcher = Batcher(folder, 1, 1, 1, 1)
        await batcher.load()
        for body in bodies:
            with contextlib.suppress(Exception):
                await batcher.answer(body, "image/png", None, None)
                pytest.fail("it did not fail")
        await batcher.answer(photo(), "image/png", None, None)
        return sum(type(each).__name__ in ("Trouble", "RequestError", "ImageError") for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        assert not asyncio.run(failed(artifact, [photo()[:-40], b"{", b"\x93NUMPY", b"[" * 99]))
        assert not asyncio.run(failed(tmp_path, [b"input", b"predict", b"output"]))
    finally:
        gc.enable()


def received(parts: Sequence[bytes], limit: int) -> tuple[bytes, int, bool]:
    """What the server makes of a body, its size, and whether it was in memory."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> Any:
        return messages.pop(0)

    async def whole() -> tuple[bytes, int, bool]:
        async with Intake(2, limit).received(Request({"type": "http", "headers": []}, receive)) as (body, size):
            in_memory = isinstance(body, bytes)
            return body if isinstance(body, bytes) else bytes(Stored(body)), size, in_memory

    return asyncio.run(whole())


def test_what_is_received_is_all_there() -> None:
    for parts in ([b"a"], [JUNK] * 8, [b"a"] + [JUNK, b"b"] * 40 + [b"c"]):
        size = sum(map(len, parts))
        body, said, in_memory = received(parts, 2**30)
        assert (len(body), said, in_memory) == (size, size, size <= IN_MEMORY)
        assert hashlib.sha256(body).digest() == hashlib.sha256(b"".join(parts)).digest()
    with pytest.raises(Refused, match="more bytes than the limit"):
        received([JUNK] * 30, 20 * PIECE)
    with pytest.raises(RequestError, match="unpacks to more bytes"):
        spelling.unpacked(gzip.compress(bytes(20 * PIECE)), 12 * PIECE)


def test_a_disk_without_room_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    monkeypatch.setattr(payload, "LIMITS", payload.Limits(max_bytes=2**30))
    with pytest.raises(Refused, match="in a file: No space left"):
        received([JUNK] * 20, 2**30)
    with pytest.raises(RequestError, match="in a file: No space left") as caught:
        inference.input_fn(packed(), "image/png")
    assert caught.value.status == 503


def test_a_large_body_gets_the_answer_of_a_small_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever is read from a file is read from memory in the same way, wherever a piece ends."""
    random = np.random.default_rng(0)
    pictures = [{"b64": base64.b64encode(photo()).decode(), "name": "\\" * n + '"[{,' * n} for n in range(9)]
    numbers = random.normal(size=(3, 3, 12, 12)).round(3).astype(np.float32)
    text = json.dumps({"instances": pictures, "more": [1, {"a": []}]})
    bodies = [photo(), npy(numbers), text.encode(), json.dumps({"instances": numbers.tolist()}).encode()]
    bodies += [text.encode("utf-16"), b"\xef\xbb\xbf \n" + text.encode(), text[:-1].encode(), text.encode()[:2000]]
    bodies += [gzip.compress(bodies[0]), gzip.compress(bodies[2]), gzip.compress(text.encode())[:-9], b"hello", b'"a']
    bodies += [base64.b64encode(photo()), b' "data:image/png;base64,' + base64.b64encode(photo()) + b'" \n', b"{[}]"]
    edge = b'--e\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n'
    forms = [edge + photo() + b"\r\n--e--", edge[5:], edge * 2 + b"\r\n--e--", b"\r\n\r\nfilename\r\n\r\n", b"filename"]
    bodies += forms

    def answer(body: bytes, stored_in: Path | None, kind: str) -> object:
        try:
            file = stored_in
            if file:
                file.write_bytes(body)
            batch = payload.read(file.open("rb") if file else body, kind)
            return [hashlib.sha256(np.asarray(image).tobytes()).hexdigest() for image in batch]
        except RequestError as error:
            return error.status, str(error)

    kinds = ["multipart/form-data; boundary=e" if b"filename" in body else "application/json" for body in bodies]
    expected = [answer(body, None, kind) for body, kind in zip(bodies, kinds, strict=True)]
    assert sum(isinstance(each, tuple) for each in expected) == 10
    for size in (7, 64, 1000):
        for module in ("bounds", "spelling", "payload"):
            monkeypatch.setattr(f"{module}.PIECE", size)
        for limit in (IN_MEMORY, 50):
            monkeypatch.setattr("bounds.IN_MEMORY", limit)
            for body, kind, right in zip(bodies, kinds, expected, strict=True):
                for found in (answer(body, tmp_path / "body", kind), answer(body, None, kind)):
                    assert found == right, (size, limit, body[:40])


def test_stored_bytes_are_as_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(np.random.default_rng(0).integers(254, 256, 5000, dtype=np.uint8))
    monkeypatch.setattr("bounds.IN_MEMORY", 100)
    found = stored(pieces(data))
    assert isinstance(found, Stored)
    assert bytes(found) == data
    assert found.count(b"\xff\xfe", 10, 4000) == data.count(b"\xff\xfe", 10, 4000)
    assert found.count(b"\xff\xff") == data.count(b"\xff\xff")
    assert found.startswith(data[7:20], 7)
    assert not found.startswith((b"a", b"b"))
