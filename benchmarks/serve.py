"""What the server costs on this machine: CPU a request over that of the bare handlers, throughput, latency, start.

    make bench-serve                               # ARGS="--small" adds a network of 32 pixels, which has no limit
    make bench-serve ARGS="--soak 10"              # instead: so many minutes of more clients than the server lets in

CPU is user and system time of the server's whole process tree, from /proc (so Linux only); the clients' does not count.
Bare handlers are called in a process of their own, with as many torch threads. Each round has a fresh server and fresh
bare handlers; each load on the server lies between two loads on the handlers and is compared with their mean.
Prints a table (median, lowest and highest of all rounds), puts it into `benchmarks/results.json` beside what others
wrote there, and ends with exit code 1 where the median of a ratio is above its limit.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib.metadata
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.train import machine, publish  # isort: skip  (it puts src on the path)
from benchmarks.process import ROOT, Measured, children, cpu_seconds, make_artifact, memory_mb
from inference.serve import Settings
from pipelines.local import serve as serve_local

KIND = "application/x-image"
CASES = {"serve": ("resnet18", 224), "serve.small": ("cnn", 32)}  # model, pixels a side
LIMITS = {"serve.cpu_over_bare_c1": 1.20, "serve.cpu_over_bare_c8": 1.10}
Host = Callable[[Path, int], contextlib.AbstractContextManager[Any]]  # serves a folder's artifact on a port
GROWTH = 1.05  # of memory, from the second quarter of a soak to its last
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
    latencies = sorted(latency for _, latency in answers)
    return {
        "cpu_ms": 1000 * cpu / len(latencies),
        "requests_per_second": len(latencies) / passed,
        "p50_ms": 1000 * statistics.median(latencies),
        "p99_ms": 1000 * latencies[int(0.99 * len(latencies))],
    }


class Bare:
    """The handlers in a process of their own, which computes only while it is asked to."""

    def __init__(self, model: Path, threads: int) -> None:
        command = [sys.executable, "-c", BARE, str(model), str(threads), str(model.with_name("photo.jpg")), KIND]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)

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


def soak(model: Path, minutes: float) -> dict[str, float]:
    """Twice as many clients as the server lets in: every answer must be 200 or 503, and its memory must not grow."""
    body, port, clients = model.with_name("photo.jpg").read_bytes(), free_port(), 2 * Settings().queue
    print(f"saturation: {clients} clients for {minutes:g} minutes", flush=True)
    with our_server(model, port) as pid, ThreadPoolExecutor(1) as pool:
        fire(port, body, clients, min(6 * minutes, 10))  # warms up
        firing, held, shown = pool.submit(fire, port, body, clients, 60 * minutes), list[float](), time.monotonic()
        while not firing.done():
            held.append(memory_mb([pid]))
            if time.monotonic() >= shown:
                print(f"memory: {held[-1]:.0f} MB", flush=True)
                shown += 60
            time.sleep(min(minutes, 1))
    statuses = Counter(status for status, _ in firing.result())
    growth = judge(statuses, held)
    return {"minutes": minutes, "answered": statuses[200], "refused": statuses[503], "memory_growth": growth,
            "memory_mb": max(held)}  # fmt: skip


def judge(statuses: Counter[Any], held: list[float]) -> float:
    """Growth of the memory from the second quarter of a soak to the last; ends the benchmark when a soak failed."""
    quarter = max(len(held) // 4, 1)
    growth = statistics.median(held[-quarter:]) / statistics.median(held[quarter : 2 * quarter] or held)
    print(f"answers: {dict(statuses)}; memory: {min(held):.0f} to {max(held):.0f} MB, x{growth:.3f}", flush=True)
    if not {200} <= set(statuses) <= {200, 503}:
        sys.exit("error: every answer must be 200 or 503")
    if growth > GROWTH:
        sys.exit(f"error: memory grew x{growth:.3f} from the second quarter to the last; the limit is x{GROWTH}")
    return growth


def above_limits(measured: Measured) -> list[str]:
    """What is wrong with the medians of the ratios."""
    medians = {key: statistics.median(measured[key]) for key in LIMITS}
    return [
        f"{key} is {medians[key]:.3f}; the limit is {LIMITS[key]:.2f}" for key in LIMITS if medians[key] > LIMITS[key]
    ]


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="What the server costs on this machine.")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement (default: 5)")
    parser.add_argument("--seconds", type=float, default=4, help="of each load (default: 4)")
    parser.add_argument("--small", action="store_true", help="also a network of 32 pixels: the overhead shows most")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="instead: saturate the server for so long")
    parser.add_argument("--quick", action="store_true", help="one round of almost nothing: shows only that it works")
    options = parser.parse_args()
    if not Path("/proc/self/stat").exists():
        sys.exit("error: the CPU of a process tree is read from /proc, which this system does not have; run on Linux")
    rounds, seconds = (1, 0.3) if options.quick else (max(options.rounds, 1), options.seconds)
    facts: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d}"} | machine()
    facts |= {"hardware.threads": Settings().threads}
    facts |= {f"versions.{name}": importlib.metadata.version(name) for name in ("starlette", "uvicorn")}
    measured: Measured = {}
    with tempfile.TemporaryDirectory() as temporary:
        if options.soak:
            found = soak(make_artifact(Path(temporary), *CASES["serve"]), options.soak)
            publish(facts, {f"serve.soak.{key}": [value] for key, value in found.items()}, options.quick, "serve.soak.")
            return 0
        for prefix in CASES if options.small else ["serve"]:
            model = make_artifact(Path(temporary) / prefix, *CASES[prefix])
            print("{} at {} pixels".format(*CASES[prefix]) + f": {rounds} rounds of {seconds:g} s a load", flush=True)
            for found in (compare(model, seconds) for _ in range(rounds)):
                for key, value in found.items():
                    measured.setdefault(f"{prefix}.{key}", []).append(value)
    publish(facts | {"rounds": rounds}, measured, options.quick, "serve.")
    wrong = [] if options.quick else above_limits(measured)
    for each in wrong:
        print(f"error: {each}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
