"""The generated project's server against TorchServe with SageMaker's PyTorch toolkit, and Ray Serve, in one run.

    python benchmarks/serving.py --runs 5

Bakes the default project into a temporary folder and there runs `make bench-serve` and itself again (`--inside`). The
others get environments of their own in `.cache/hosts`, as for `make test-hosts`, which needs the network and Java; they
serve the same artifact and handlers, with their own number of workers and a torch thread in each.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from page import TEMPLATE, arguments, bake, keep, run_inside, spread

SECONDS = 4.0  # of each load
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


def inside(project: Path, rounds: int) -> None:
    """Measure with the packages and the code of a baked project; the last line printed is JSON."""
    sys.path[:0] = [str(project), str(project / "src"), str(TEMPLATE / "tests" / "in_project")]
    from benchmarks.serve import CASES, Settings, compare, make_artifact, our_server
    from host_ray import ray_host
    from host_torchserve import torchserve_host

    threads = {"OMP_NUM_THREADS": str(Settings().threads)}
    python = {name: Path(os.environ[variable]) for variable, name in OTHERS.items()}
    hosts = {
        "this template": our_server,
        "TorchServe, PyTorch toolkit": functools.partial(torchserve_host, python["torchserve"], **threads),
        "Ray Serve, our bridge": functools.partial(ray_host, python["ray"], **threads),
    }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in hosts}
    with tempfile.TemporaryDirectory() as folder:
        model = make_artifact(Path(folder), *CASES["serve"])
        for _ in range(rounds):
            for name, host in hosts.items():
                results[name].append(compare(model, SECONDS, host))
                print(name, results[name][-1], flush=True)
    print(json.dumps(results))


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


def main() -> None:
    """Measure and keep two sections of docs/benchmarks.md."""
    options = arguments("The generated project's server against others.")
    if options.inside:
        inside(options.inside, options.runs)
        return
    sys.path.append(str(TEMPLATE))
    from tests.conftest import host_environment

    uv = str(Path(sys.executable).with_name("uv"))
    with tempfile.TemporaryDirectory() as folder:
        project, python = bake(folder)
        command = [python, "-m", "benchmarks.serve", "--small", "--rounds", str(options.runs)]
        bench = subprocess.run(command, cwd=project, check=True, stdout=subprocess.PIPE, text=True).stdout
        facts, _, rest = bench[bench.index("\ndate: ") :].partition("\n\n|")
        conditions = "".join(f"- {line}\n" for line in facts.strip().splitlines())
        keep("The generated project's `make bench-serve`", f"{conditions}\n|{rest.partition(chr(10) * 2)[0]}")
        about = [versions(python, ("torch", "starlette", "uvicorn"))]
        for variable, name in OTHERS.items():
            os.environ[variable] = str(host_environment(name))
            install = [uv, "pip", "install", "--quiet", "--python", os.environ[variable], "torchvision"]
            subprocess.run(install, check=True)
            about.append(versions(os.environ[variable], (name, "torch")))
        results: Any = run_inside(python, __file__, project, options.runs)
        keep("Against other servers", f"{'; '.join(about)}\n\n{table(results)}")


if __name__ == "__main__":
    main()
