"""What benchmarks of serving share: something to serve and to send, clients, a process tree's CPU, bare handlers."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks.process import CLASSES, write_patterns  # noqa: E402
from training.config import Hyperparameters  # noqa: E402
from training.data import load_split  # noqa: E402
from training.export import write_artifact  # noqa: E402
from training.model import build_model  # noqa: E402

KIND = "application/x-image"
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


def make_artifact(folder: Path, name: str, size: int) -> Path:
    """An unpacked artifact with fixed random weights, written as training does it; beside it `photo.jpg`."""
    write_patterns(folder / "data", size, CLASSES)
    torch.manual_seed(0)
    settings, validation = Hyperparameters(model=name), load_split(folder / "data" / "validation")
    write_artifact(folder / "model", build_model(name, CLASSES, size), settings, validation, {}, None)
    (folder / "photo.jpg").write_bytes(photo())
    return folder / "model"


def photo() -> bytes:
    """A JPEG file of 640x480 pixels and about 99 kB, always the same: coarse colours under noise."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (16, 21, 3), dtype=np.uint8)).resize((640, 480))
    noisy = np.asarray(coarse) + random.normal(0, 9, (480, 640, 1))
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def children() -> set[int]:
    """The processes that this one has started and that have not ended."""
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def family(roots: Iterable[int]) -> dict[int, list[str]]:
    """Processes and all their descendants: what /proc/<pid>/stat says after the name, from the state on."""
    fields: dict[int, list[str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields[int(path.parent.name)] = path.read_text(errors="replace").rpartition(")")[2].split()
    tree, size = set(roots), 0
    while size != len(tree):
        size = len(tree)
        tree |= {pid for pid, values in fields.items() if int(values[1]) in tree}
    return {pid: fields[pid] for pid in tree & fields.keys()}


def cpu_seconds(roots: Iterable[int]) -> float:
    """User and system time that processes and all their descendants have used, those that have ended included."""
    return sum(int(value) for values in family(roots).values() for value in values[11:15]) / os.sysconf("SC_CLK_TCK")


def memory_mb(roots: Iterable[int]) -> float:
    """What processes and all their descendants hold: all of their own memory, and the largest mapping of files.

    Processes of one server map the same libraries, which the machine holds once.
    """
    held: dict[str, list[int]] = {"RssAnon": [0], "RssFile": [0], "RssShmem": [0]}  # in KiB
    for pid in family(roots):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
                name, _, value = line.partition(":")
                if name in held:
                    held[name].append(int(value.split()[0]))
    return (sum(held["RssAnon"]) + max(held["RssFile"]) + max(held["RssShmem"])) * 1024 / 1e6


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
