"""One server under load, between the bare handlers of the same artifact: what clients see, and what it costs.

For the part that runs inside a project (`page.enter`). CPU is user and system time of the server's whole process tree;
the clients' does not count. Bare handlers are called in a process of their own, with as many torch threads.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from inference.serve import Settings
from pipelines.local import serve as serve_local
from tree import children, cpu_seconds, memory_mb

KIND = "application/x-image"
CROWDS = (32, 128)  # clients; the server lets half of the second in
Host = Callable[[Path, int], contextlib.AbstractContextManager[Any]]  # serves a folder's artifact on a port
BARE = """
import sys, time
sys.path.insert(0, "src")
from pathlib import Path
import torch
from inference.batcher import import_handlers
folder, threads, photo, kind = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
handlers, body = import_handlers(folder / "code"), photo.read_bytes()
torch.set_num_threads(threads)
model = handlers.model_fn(str(folder))
for seconds in sys.stdin:
    requests, end = 0, time.perf_counter() + float(seconds)
    while time.perf_counter() < end:
        handlers.output_fn(handlers.predict_fn(handlers.input_fn(body, kind), model), "application/json")
        requests += 1
    print(requests, flush=True)
"""


def fire(port: int, body: bytes, clients: int, seconds: float) -> list[tuple[int | str, float]]:
    """Let clients send one request after the other, each on a connection of its own that stays open.

    Returns:
        Of every request the status, or the error in its place, and the seconds that it took.
    """
    answers: list[tuple[int | str, float]] = []
    end = time.perf_counter() + seconds

    def client(_: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while (begun := time.perf_counter()) < end:
            status: int | str
            rest = 0.0
            try:
                connection.request("POST", "/invocations", body, {"Content-Type": KIND})
                response = connection.getresponse()
                response.read()
                status, rest = response.status, float(response.headers.get("Retry-After", 0))
            except (OSError, http.client.HTTPException) as error:
                status = repr(error)
                connection.close()
                rest = 0.1
            answers.append((status, time.perf_counter() - begun))
            time.sleep(rest)
        connection.close()

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return answers


def measure(roots: Iterable[int], port: int, body: bytes, clients: int, seconds: float) -> dict[str, float]:
    """What so many clients cost the server and see; every answer must be 200."""
    before, started = cpu_seconds(roots), time.perf_counter()
    answers = fire(port, body, clients, seconds)
    passed, cpu = time.perf_counter() - started, cpu_seconds(roots) - before
    statuses = Counter(status for status, _ in answers)
    if set(statuses) != {200}:
        sys.exit(f"error: {clients} clients got {dict(statuses)}; every answer must be 200")
    return {"cpu_ms": 1000 * cpu / len(answers)} | as_seen([latency for _, latency in answers], passed)


def as_seen(latencies: list[float], passed: float) -> dict[str, float]:
    """What clients see of requests that were answered within so many seconds, from the seconds that each took."""
    return {
        "requests_per_second": len(latencies) / passed,
        "p50_ms": 1000 * statistics.median(latencies),
        "p99_ms": 1000 * sorted(latencies)[int(0.99 * len(latencies))],
    }


def crowd(model: Path, seconds: float) -> dict[str, float]:
    """What our server does with more clients, also with more than it lets in: each gets its answer or a 503."""
    body, port, found = model.with_name("photo.jpg").read_bytes(), free_port(), dict[str, float]()
    with our_server(model, port):
        for clients in CROWDS:
            fire(port, body, clients, min(seconds, 2))  # warms up
            started = time.perf_counter()
            answers = fire(port, body, clients, seconds)
            passed, statuses = time.perf_counter() - started, Counter(status for status, _ in answers)
            if not {200} <= set(statuses) <= {200, 503}:
                sys.exit(f"error: {clients} clients got {dict(statuses)}; every answer must be 200 or 503")
            seen = as_seen([latency for status, latency in answers if status == 200], passed)
            seen["refused"] = statuses[503] / len(answers)
            found |= {f"{key}_c{clients}": value for key, value in seen.items()}
    return found


class Bare:
    """The handlers in a process of their own, which computes only while it is asked to."""

    def __init__(self, model: Path, threads: int) -> None:
        command = [sys.executable, "-c", BARE, str(model), str(threads), str(model.with_name("photo.jpg")), KIND]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def cpu_ms(self, seconds: float) -> float:
        """Milliseconds of CPU for a request, over so many seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        before = cpu_seconds([self.process.pid])
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        requests = self.process.stdout.readline()
        if not requests:
            sys.exit("error: the bare handlers failed; their messages are above")
        return 1000 * (cpu_seconds([self.process.pid]) - before) / int(requests)


@contextlib.contextmanager
def bare_handlers(model: Path, threads: int) -> Iterator[Bare]:
    """The bare handlers of an artifact, loaded and warm."""
    bare = Bare(model, threads)
    try:
        bare.cpu_ms(0.5)
        yield bare
    finally:
        bare.process.kill()
        bare.process.communicate()


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def our_server(model: Path, port: int) -> Iterator[int]:
    """The server as `make serve-local LOCAL_MODE=process` starts it, once it is ready; gives its process."""
    log = model.with_name("server.log")
    with log.open("wb") as file:
        started = time.monotonic()
        process = subprocess.Popen(serve_local.command(None, model, port), stdout=file, stderr=subprocess.STDOUT)
    try:
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if serve_local.ask(port, "GET", "/ping")[0] == 200:
                    break
            if process.poll() is not None or time.monotonic() > started + serve_local.PATIENCE:
                sys.exit(f"error: the server did not get ready:\n{log.read_text(encoding='utf-8')}")
            time.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def compare(model: Path, seconds: float, host: Host = our_server) -> dict[str, float]:
    """One round: a server between bare handlers, at one client and at eight."""
    body, port, others = model.with_name("photo.jpg").read_bytes(), free_port(), children()
    started = time.monotonic()
    with host(model, port):
        found, roots = {"cold_start_seconds": time.monotonic() - started}, children() - others
        with bare_handlers(model, Settings().threads) as bare:
            for clients in (8, 1):
                fire(port, body, clients, min(seconds, 2))  # warms up
            before = bare.cpu_ms(seconds)
            for clients in (1, 8):
                cost = measure(roots, port, body, clients, seconds)
                after = bare.cpu_ms(seconds)
                found[f"cpu_over_bare_c{clients}"] = cost["cpu_ms"] / ((before + after) / 2)
                found |= {f"{name}_c{clients}": value for name, value in cost.items()}
                before = after
        return found | {"bare_cpu_ms": before, "memory_mb": memory_mb(roots)}
