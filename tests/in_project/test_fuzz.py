"""Thousands of random requests, seeded: never a 5xx, never a traceback, no growing memory, and a server that lives.

python -m pytest tests/test_fuzz.py
FUZZ_MINUTES=20 FUZZ_SEED=7000000 python -m pytest tests/test_fuzz.py   # as long, with seeds from this one on
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import io
import json
import multiprocessing
import os
import resource
import shutil
import socket
import tarfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import payload
from inference.artifact import ArtifactError, unpack, verify
from pipelines import runs
from tests.hosting import Reply, Running, ask, npy, serving
from tests.test_inference import artifact, photo

__all__ = ["artifact"]  # a fixture
ROUNDS, CLIENTS, EACH = 12, 2, 250
ARCHIVES = 600
GROWTH = 8_000  # kB, of the second half; with every body kept it would be more
SIDE = 3600  # pixels of an image after which the server gives all that is free back to the system (bounds.LARGE)
TYPES = ("application/json", "application/x-npy", "application/x-image", "image/png", "image/jpeg", "image/webp",
         "image/tiff", "Application/JSON; charset=latin-1", "text/csv", "", "application/json, text/html")  # fmt: skip
NAMES = ("Accept", "Content-Type", "X-Amzn-SageMaker-Custom-Attributes", "X-Amzn-SageMaker-Inference-Id", "Expect",
         "X-Amzn-SageMaker-Target-Model", "Accept-Encoding", "Content-Encoding", "Connection", "Cookie", "Host",
         "Upgrade", "Range", "X-Forwarded-For", "If-None-Match")  # fmt: skip
VALUES = ("*/*", "application/json;q=0.5", "text/html", "q=;;,,", "close", "gzip", "100-continue", "a" * 3000,
          "websocket", "\xff\xfe", "../../etc/passwd", "${jndi:x}", "%00", "0", "-1", "{}")  # fmt: skip
PATHS = ("/invocations",) * 30 + ("/ping", "/execution-parameters", "/", "/models", "/%00", "/invocations/", "//")
SCALARS = (0, -1, 1.5, 1e308, 10**400, float("nan"), float("-inf"), True, None, "", "\ud800", "\u0000", "é" * 99, "1")


def tree(random: np.random.Generator, depth: int) -> Any:
    """Any JSON."""
    choice = int(random.integers(8))
    if choice == 0 and depth:
        return {str(tree(random, 0)): tree(random, depth - 1) for _ in range(random.integers(4))}
    if choice < 4 and depth:
        return [tree(random, depth - 1) for _ in range(random.integers(5))]
    if choice == 4:
        return random.normal(size=tuple(random.integers(0, 13, random.integers(1, 5)).tolist())).tolist()
    if choice == 5:
        return {"b64": base64.b64encode(random.bytes(int(random.integers(90)))).decode()}
    return SCALARS[int(random.integers(len(SCALARS)))]


def valid(random: np.random.Generator) -> tuple[bytes, str]:
    """A request that would be answered."""
    choice = int(random.integers(8))
    if choice < 5:
        kind, mode = (("JPEG", "RGB"), ("PNG", "P"), ("WEBP", "RGBA"), ("BMP", "1"), ("TIFF", "I;16"))[choice]
        buffer = io.BytesIO()
        picture = Image.open(io.BytesIO(photo()))
        picture.convert("L" if mode == "I;16" else mode).convert(mode).save(buffer, kind)
        return buffer.getvalue(), f"image/{kind.lower()}"
    numbers = random.normal(size=(int(random.integers(1, 5)), 3, 12, 12)).astype(np.float32)
    if choice == 5:
        return npy(numbers), "application/x-npy"
    images = [{"b64": base64.b64encode(photo()).decode()}] * len(numbers)
    return json.dumps({"instances": numbers.tolist() if choice == 6 else images}).encode(), "application/json"


def request(random: np.random.Generator) -> tuple[bytes, dict[str, str]]:
    """Something valid, damaged or neither, with headers that may have nothing to do with it."""
    body, kind = valid(random)
    choice = int(random.integers(6))
    if choice == 0:
        body = random.bytes(int(random.integers(3000)))
    elif choice == 1:
        document = tree(random, 5)
        wrapped = document if random.integers(3) == 0 else {"instances": document}
        body, kind = json.dumps(wrapped, ensure_ascii=bool(random.integers(2))).encode(errors="replace"), TYPES[0]
    elif choice == 2:
        body, kind = random.choice([b"[", b'{"a":', b"[{}", b"]"]).tobytes() * int(random.integers(1, 9999)), TYPES[0]
    elif choice < 5:
        data = bytearray(body)
        for _ in range(random.integers(1, 5)):
            start, length = int(random.integers(len(data))), int(random.integers(1, 40))
            data[start : start + length] = random.bytes(int(random.integers(40)))
        body = bytes(data)
    headers = {"Content-Type": kind if random.integers(4) else TYPES[int(random.integers(len(TYPES)))]}
    for _ in range(max(int(random.integers(-2, 4)), 0)):
        headers[NAMES[int(random.integers(len(NAMES)))]] = VALUES[int(random.integers(len(VALUES)))]
    return body, headers


def clean(reply: Reply) -> None:
    """A right answer, or a refusal that gives nothing away."""
    assert reply.status < 500, reply
    if reply.status == 200:
        return
    if reply.headers.get("content-type", "").startswith("text/plain"):  # of the parser of HTTP, before any application
        assert reply.body == b"Invalid HTTP request received."
    else:
        reply.refused(400, 404, 405, 406, 413, 415)


def client(port: int, seed: list[int]) -> list[int]:
    """Requests over kept connections; gives the statuses of their answers."""
    random, statuses = np.random.default_rng(seed), []
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        for _ in range(EACH):
            body, headers = request(random)
            path = PATHS[int(random.integers(len(PATHS)))]
            method = (*["POST"] * 18, "GET", "DELETE")[int(random.integers(20))]
            try:
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                named = {name.lower(): text for name, text in response.getheaders()}
                reply = Reply(response.status, named, response.read())
            except (http.client.HTTPException, ConnectionError):  # closed before all was sent: after what is no HTTP
                connection.close()
                continue
            clean(reply)
            statuses.append(reply.status)
    return statuses


@pytest.fixture(scope="module")
def server(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(artifact, tmp_path_factory.mktemp("fuzz") / "log", INFERENCE_THREADS="1") as running:
        yield running


def test_random_requests(server: Running) -> None:
    statuses: list[int] = []
    memory: list[int] = []
    large = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(large, "PNG")
    end = time.monotonic() + 60 * MINUTES
    with ThreadPoolExecutor(CLIENTS) as pool:
        while len(memory) < ROUNDS or time.monotonic() < end:
            seeds = [[FIRST_SEED + len(memory), one] for one in range(CLIENTS)]
            for found in pool.map(lambda seed: client(server.port, seed), seeds):
                statuses += found
            # A damaged WebP may ask for 30 MB. They are free after it, but the heap keeps them for the next one.
            assert ask(server.url, large.getvalue(), "image/png").status == 200
            memory.append(server.stat("VmRSS"))
    assert len(statuses) > 0.95 * len(memory) * CLIENTS * EACH
    assert {200, 400, 404, 405, 406, 415} <= set(statuses)
    assert 0.05 < statuses.count(200) / len(statuses) < 0.6
    assert memory[-1] - memory[len(memory) // 2 - 1] < GROWTH, memory
    assert not [line for line in server.lines() if line["level"] != "info"]
    assert ask(server.url, photo("left"), "image/png").labels() == ["left"]


MINUTES = float(os.environ.get("FUZZ_MINUTES", "0.2"))
FIRST_SEED = int(os.environ.get("FUZZ_SEED", "0"))
KEPT: tuple[int, ...] = ()  # seeds of which something was wrong once
SECONDS = 2  # of a decoder, for one picture or body
MEMORY = 6 * 2**30  # of the process that decodes; none of these pictures is large
VALUES_OF = (0, 1, 2, 3, 4, 7, 8, 16, 127, 128, 255, 256, 1000, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def seeds_of_pictures() -> list[bytes]:
    """One of every kind that is read, and what attackers send, in small."""
    picture = Image.open(io.BytesIO(photo())).convert("RGB").resize((64, 48))
    found = []
    for kind, mode, options in (
        ("JPEG", "RGB", {}), ("JPEG", "CMYK", {"progressive": True}), ("JPEG", "L", {"restart_marker_blocks": 1}),
        ("MPO", "RGB", {"save_all": True, "append_images": [picture]}),
        ("PNG", "RGBA", {}), ("PNG", "P", {}), ("PNG", "I;16", {}),
        ("PNG", "RGB", {"save_all": True, "append_images": [picture]}),
        ("WEBP", "RGBA", {"lossless": True}), ("WEBP", "RGB", {"save_all": True, "append_images": [picture]}),
        ("BMP", "RGB", {}), ("BMP", "P", {}), ("TIFF", "RGB", {}), ("TIFF", "L", {"compression": "jpeg"}),
        ("TIFF", "1", {"compression": "group4"}), ("TIFF", "RGB", {"compression": "tiff_lzw", "strip_size": 192}),
        ("TIFF", "RGB", {"compression": "tiff_adobe_deflate", "big_tiff": True}),
    ):  # fmt: skip
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        kept = {} if kind == "BMP" else {"exif": exif}
        picture.convert("L" if mode == "I;16" else mode).convert(mode).save(buffer, kind, **options, **kept)
        found.append(buffer.getvalue())
    return found


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """Numbers that are replaced by unlikely ones, and parts that are cut, doubled, repeated or taken from elsewhere."""
    body = bytearray(data)
    for _ in range(random.integers(1, 6)):
        start = int(random.integers(len(body))) if random.integers(2) else int(random.integers(min(len(body), 200)))
        part = body[start : start + int(random.integers(1, 80))]
        choice = int(random.integers(6))
        if choice < 3:
            width = int(random.choice([1, 2, 4]))
            value = VALUES_OF[int(random.integers(len(VALUES_OF)))] % 256**width
            body[start : start + width] = value.to_bytes(width, "little" if random.integers(2) else "big")
        elif choice == 3:
            body[start : start + len(part)] = b""
        elif choice == 4:
            body[start:start] = part * int(random.choice([1, 2, 50, 5000]))
        else:
            body[start : start + len(part)] = random.bytes(len(part))
        body = body[: 3 * 2**20] or bytearray(1)
    return bytes(body)


def decode_all(seeds: Sequence[int]) -> list[str]:
    """In a process of its own, which may die: what was wrong with the pictures and bodies of these seeds."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # libtiff's warnings
    warnings.simplefilter("ignore")
    pictures, wrong = seeds_of_pictures(), []
    for seed in seeds:
        random = np.random.default_rng(seed)
        if seed % 3:
            body, kind = damaged(pictures[seed % len(pictures)], random), "image/png"
            if seed % 9 == 1:
                body, kind = json.dumps({"instances": [{"b64": base64.b64encode(body).decode()}]}).encode(), TYPES[0]
        else:
            body, kind = valid(random)
            body = damaged(body, random)
        begun = time.thread_time()
        try:
            batch = payload.read(body, kind)
            assert all(image.dtype in (np.uint8, np.uint16, np.float32) for image in batch)
        except payload.RequestError:
            pass
        except Exception as error:
            wrong.append(f"seed {seed}: {error!r}")
        if (seconds := time.thread_time() - begun) > SECONDS:
            wrong.append(f"seed {seed}: {seconds:.1f} s for {len(body)} bytes")
    return wrong


def test_damaged_pictures_and_bodies() -> None:
    """For FUZZ_MINUTES, each seed once; a message names the seed, which then belongs into KEPT."""
    end, first = time.monotonic() + 60 * MINUTES, FIRST_SEED
    seeds: Sequence[int] = KEPT
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        while time.monotonic() < end:
            try:
                assert not pool.submit(decode_all, seeds).result(timeout=300)
            except BrokenProcessPool:
                pytest.fail(f"the decoder died at one of the seeds {[*seeds]}")
            seeds = range(first, first + 200)
            first += 200
    print(f"seeds {FIRST_SEED} to {first}")


PIECES = (b"POST /invocations HTTP/1.1\r\n", b"GET /ping HTTP/1.1\r\n", b"Host: x\r\n", b"\r\n", b"\n", b":\r\n",
          b"Content-Length: -1\r\n", b"Content-Length: " + b"9" * 5000 + b"\r\n", b"Transfer-Encoding: chunked\r\n",
          b"Content-Length: 1_0\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n", b"ffffffffffffffff\r\n", b"\0" * 50,
          b"A: " + b"b" * 70_000, b"Transfer-Encoding: gzip, chunked\r\n", b" folded: x\r\n", b"HTTP/9.9\r\n",
          b"\xff\xfe: \xff\r\n", b"hello", b"Content-Type: image/png\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
          b"Content-Length: 5\r\n", b"Upgrade: h2c\r\n")  # fmt: skip


def test_what_is_no_http(server: Running) -> None:
    random = np.random.default_rng(0)
    first_lines = set()
    for number in range(400):
        chosen = [PIECES[index] for index in random.integers(len(PIECES), size=random.integers(1, 9))]
        data = random.bytes(int(random.integers(2000))) if number % 5 == 0 else b"".join(chosen)
        if number % 2:
            data = PIECES[0] + PIECES[2] + data
        elif number % 4 == 0:
            data = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n" + data
        answer = b""
        with server.connect() as connection, contextlib.suppress(ConnectionError):
            connection.sendall(data)
            with contextlib.suppress(OSError):  # closed by the server already
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                answer += part
        for line in answer.split(b"\r\n"):
            if line.startswith(b"HTTP/1.1 "):
                first_lines.add(int(line.split()[1]))
        assert b"Traceback" not in answer
        assert b"site-packages" not in answer
    assert {200, 400} <= first_lines <= {200, 400, 404, 405, 413, 415}
    assert server.ping() == 200
    assert not [line for line in server.lines() if line["level"] != "info"]


def test_random_archives(artifact: Path, tmp_path: Path) -> None:
    """Archives whose bytes, or those inside, were changed: unpacked and right, or refused in a sentence, and soon."""
    random = np.random.default_rng(15)
    runs.pack(artifact, tmp_path / "whole.tar.gz")
    whole = (tmp_path / "whole.tar.gz").read_bytes()
    small = [path for path in sorted(artifact.rglob("*")) if path.suffix in (".json", ".py")]
    path, kinds = tmp_path / "model.tar.gz", [b"0", b"5", b"1", b"2", b"3", b"6", b"S", b"x", b"g", b"L", b"K", b"\0"]
    outcomes = []
    for number in range(ARCHIVES):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=int(random.integers(3))) as tar:
            for file in random.permutation(len(small))[: random.integers(1, 6)]:
                tar.add(small[file], f"{'.' * int(random.integers(3))}/{small[file].relative_to(artifact)}")
        plain = bytearray(buffer.getvalue())
        for _ in range(random.integers(0, 6)):  # headers lie at multiples of 512
            start = 512 * int(random.integers(len(plain) // 512))
            field = start + int(random.choice([0, 100, 124, 156, 257, 345]))
            plain[field : field + 1] = kinds[int(random.integers(len(kinds)))]
            if random.integers(2):
                plain[start + 124 : start + 136] = random.choice([b"77777777777\0", b"\x80" + b"\xff" * 11, b"1" * 12])
            head = plain[start : start + 148] + b" " * 8 + plain[start + 156 : start + 512]
            plain[start + 148 : start + 156] = b"%06o\0 " % sum(head)
        body = bytearray(gzip.compress(bytes(plain), 1) if number % 3 else whole)
        for _ in range(random.integers(0, 3)):
            body[int(random.integers(len(body)))] = int(random.integers(256))
        path.write_bytes(body[: len(body) if random.integers(4) else int(random.integers(len(body)))])
        folder, began = tmp_path / "outer" / "inside", time.monotonic()
        try:
            unpack(path, folder)
            verify(folder)
            reason = "good"
        except ArtifactError as error:
            reason = str(error)
        assert reason.isprintable()
        outcomes.append("good" if reason == "good" else "refused")
        assert time.monotonic() - began < 2
        assert {found.name for found in tmp_path.iterdir()} <= {"whole.tar.gz", "model.tar.gz", "outer"}
        assert all(found.is_dir() or found.is_file() for found in folder.rglob("*"))
        shutil.rmtree(tmp_path / "outer", ignore_errors=True)
    assert set(outcomes) == {"good", "refused"}


def test_random_facts(artifact: Path, tmp_path: Path) -> None:
    """A model.json of any JSON, or with any names: refused in a sentence."""
    random = np.random.default_rng(16)
    facts = json.loads((artifact / "model.json").read_text())
    shutil.copytree(artifact, tmp_path / "model")
    for _ in range(ARCHIVES):
        changed = tree(random, 5)
        if random.integers(2):
            names = [str(tree(random, 1)) for _ in range(random.integers(1, 4))]
            changed = facts | {"files": {**facts["files"], **dict.fromkeys(names, tree(random, 2))}}
        (tmp_path / "model" / "model.json").write_text(json.dumps(changed))
        with pytest.raises(ArtifactError):
            verify(tmp_path / "model")
