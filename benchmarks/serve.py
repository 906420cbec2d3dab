"""What the server costs on this machine, and what others cost: CPU a request over that of the bare handlers, and more.

    make bench-serve                               # ARGS="--rounds 2 --runs 1 --small": also a network of 32 pixels
    make bench-serve ARGS="--soak 10"              # instead: so many minutes of more clients than the server lets in

Each round has a fresh server and fresh bare handlers; each load on the server lies between two loads on the handlers
and is compared with their mean. The exit code is 1 where the median of a ratio is above its limit. Then `--runs` rounds
of the same with TorchServe under SageMaker's PyTorch toolkit, and with Ray Serve (`--runs 0`: none). These two get
environments of their own in `.cache/hosts`, as for `make test-hosts`, which needs the network and Java; they serve the
same artifact and handlers with their own number of workers and a torch thread in each. CPU and memory come from /proc,
so it runs on Linux only.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from page import TEMPLATE, Book, Measured, again, bake, enter, parser, spread
from tree import memory_mb

TITLE, OTHERS_TITLE = "What serving costs: `make bench-serve`", "Against other servers"
CASES = {"serve": ("resnet18", 224), "serve.small": ("cnn", 32)}  # model, pixels a side
LIMITS = {"serve.cpu_over_bare_c1": 1.10, "serve.cpu_over_bare_c8": 0.95, "serve.small.cpu_over_bare_c1": 1.25}
MORE_REQUESTS = 1.15  # a second, with 8 clients, than the best of the others answers
GROWTH = 1.05  # of memory, from the second quarter of a soak to its last
OTHERS = {"TORCHSERVE_PYTHON": "torchserve", "RAY_PYTHON": "ray"}  # variable with the interpreter, name of the host
ROWS = {
    "CPU of a request over the bare handlers, 1 client": ("cpu_over_bare_c1", 2),
    "the same, 8 clients": ("cpu_over_bare_c8", 2),
    "requests/s, 1 client": ("requests_per_second_c1", 1),
    "requests/s, 8 clients": ("requests_per_second_c8", 1),
    "p50, 1 client, ms": ("p50_ms_c1", 0),
    "p99, 1 client, ms": ("p99_ms_c1", 0),
    "p50, 8 clients, ms": ("p50_ms_c8", 0),
    "p99, 8 clients, ms": ("p99_ms_c8", 0),
    "from the start to the first answer of all workers, s": ("cold_start_seconds", 1),
    "memory, MB": ("memory_mb", 0),
}


def hosts() -> dict[str, str]:
    """The interpreters of the other servers' environments, which are made where they are missing, by variable."""
    if shutil.which("java") is None:
        sys.exit("error: TorchServe, which this compares with, needs java, which is not on PATH: install it (Debian: "
                 "apt-get install default-jre-headless), or leave the comparison out with --runs 0")  # fmt: skip
    threads = os.environ.get("OMP_NUM_THREADS")
    sys.path.append(str(TEMPLATE))
    from tests.conftest import host_environment  # which sets the number of threads, for tests

    if threads is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    uv, found = str(Path(sys.executable).with_name("uv")), {}
    for variable, name in OTHERS.items():
        found[variable] = str(host_environment(name))
        subprocess.run([uv, "pip", "install", "--quiet", "--python", found[variable], "torchvision"], check=True)
    return found


def rounds_of(name: str, rounds: int, seconds: float, folder: Path) -> Measured:
    """What a case measures, a value a round."""
    from load import compare, crowd
    from material import make_artifact

    measured: Measured = {}
    model = make_artifact(folder / name, *CASES[name])
    print("{} at {} pixels".format(*CASES[name]) + f": {rounds} rounds of {seconds:g} s a load", flush=True)
    for found in (compare(model, seconds) | crowd(model, seconds) for _ in range(rounds)):
        for key, value in found.items():
            measured.setdefault(f"{name}.{key}", []).append(value)
    return measured


def comparison(case: str, runs: int, seconds: float, folder: Path) -> tuple[str, list[str]]:
    """A Markdown table, a column a server, which take turns in every round; and in what this one is behind others."""
    if missing := [variable for variable in OTHERS if not os.environ.get(variable)]:
        sys.exit(f"error: {missing[0]} names no interpreter of that server's environment; start this as "
                 "`make bench-serve`, which makes it, or leave the comparison out with --runs 0")  # fmt: skip
    sys.path.append(str(TEMPLATE / "tests" / "in_project"))
    from host_ray import ray_host
    from host_torchserve import torchserve_host
    from inference.serve import Settings
    from load import Host, compare, our_server
    from material import make_artifact

    threads = {"OMP_NUM_THREADS": str(Settings().threads)}
    python = {name: Path(os.environ[variable]) for variable, name in OTHERS.items()}
    servers: dict[str, Host] = {
        "this template": our_server,
        "TorchServe, PyTorch toolkit": functools.partial(torchserve_host, python["torchserve"], **threads),
        "Ray Serve, our bridge": functools.partial(ray_host, python["ray"], **threads),
    }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    model = make_artifact(folder / "others", *CASES[case])
    for _ in range(runs):
        for name, server in servers.items():
            print(f"against others: {name}", flush=True)
            results[name].append(compare(model, seconds, server))
    about = [versions(sys.executable, ("torch", "starlette", "uvicorn"))]
    about += [versions(os.environ[variable], (name, "torch")) for variable, name in OTHERS.items()]
    return f"{'; '.join(about)}; rounds: {runs}\n\n{table(results)}", behind(results)


def behind(results: dict[str, list[dict[str, float]]]) -> list[str]:
    """In what the first server is not as far ahead of the others as it must be, by medians over the rounds."""
    (name, own), *others = ((name, {key: statistics.median(each[key] for each in rounds) for key in rounds[0]})
                            for name, rounds in results.items())  # fmt: skip
    best = MORE_REQUESTS * max(other["requests_per_second_c8"] for _, other in others)
    bounds = {"p99_ms_c8": min(other["p99_ms_c8"] for _, other in others), "memory_mb": others[0][1]["memory_mb"]}
    wrong = [f"{key} of {name} is {own[key]:.0f}; the limit is {most:.0f}" for key, most in bounds.items()
             if own[key] > most]  # fmt: skip
    if own["requests_per_second_c8"] < best:
        rate = own["requests_per_second_c8"]
        wrong.append(f"requests_per_second_c8 of {name} is {rate:.1f}; it must be {best:.1f} at least")
    return wrong


def versions(python: str, names: tuple[str, ...]) -> str:
    """Packages of an interpreter, with their versions."""
    code = f"import importlib.metadata as m; print(', '.join(f'{{n}} {{m.version(n)}}' for n in {names}))"
    return subprocess.run([python, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """A Markdown table, a column a server."""
    text = f"| median (range) | {' | '.join(results)} |\n|---|{'---:|' * len(results)}\n"
    for title, (key, digits) in ROWS.items():
        cells = [spread([each[key] for each in rounds], digits) for rounds in results.values()]
        text += f"| {title} | {' | '.join(cells)} |\n"
    return text


def soak(model: Path, minutes: float) -> dict[str, float]:
    """Twice as many clients as the server lets in: every answer must be 200 or 503, and its memory must not grow."""
    from inference.serve import Settings
    from load import fire, free_port, our_server

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
    medians = {key: statistics.median(measured[key]) for key in LIMITS if key in measured}
    return [
        f"{key} is {median:.3f}; the limit is {LIMITS[key]:.2f}"
        for key, median in medians.items()
        if median > LIMITS[key]
    ]


def measure(options: argparse.Namespace, book: Book) -> int:
    """Measure inside the project, keep what was found, and give the exit code."""
    from inference.serve import Settings
    from material import machine, make_artifact

    rounds, seconds = (1, 0.3) if options.quick else (max(options.rounds, 1), options.seconds)
    facts: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d}"} | machine()
    facts |= {"hardware.threads": Settings().threads}
    facts |= {f"versions.{name}": importlib.metadata.version(name) for name in ("starlette", "uvicorn")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.soak:
            found = soak(make_artifact(folder, *CASES["serve"]), options.soak)
            soaked = {f"serve.soak.{key}": [value] for key, value in found.items()}
            book.publish('What a soak shows: `make bench-serve ARGS="--soak 10"`', facts, soaked, "serve.soak.")
            return 0
        measured: Measured = {}
        for name in CASES if options.small else ["serve"]:
            measured |= rounds_of(name, rounds, seconds, folder)
        book.publish(TITLE, facts | {"rounds": rounds}, measured, "serve.")
        wrong = above_limits(measured)
        if options.runs:
            text, less = comparison("serve.small" if options.quick else "serve", options.runs, seconds, folder)
            book.keep(OTHERS_TITLE, text)
            print(text, flush=True)
            wrong += less
    wrong = [] if options.quick else wrong
    for each in wrong:
        print(f"error: {each}", file=sys.stderr)
    return int(bool(wrong))


def main() -> int:
    """Command line; see the module's docstring."""
    made = parser("What the server costs on this machine, and what others cost.")
    made.add_argument("--seconds", type=float, default=4, help="of each load (default: 4)")
    made.add_argument("--small", action="store_true", help="also a network of 32 pixels: the overhead shows most")
    made.add_argument("--soak", type=float, metavar="MINUTES", help="instead: saturate the server for so long")
    options = made.parse_args()
    if not Path("/proc/self/stat").exists():
        sys.exit("error: the CPU of a process tree is read from /proc, which this system does not have; run on Linux")
    if options.project is None:
        os.environ |= hosts() if options.runs and not options.soak else {}
        project, python = bake()
        return again(python, project)
    enter(options.project)
    return measure(options, Book.of(options))


if __name__ == "__main__":
    sys.exit(main())
