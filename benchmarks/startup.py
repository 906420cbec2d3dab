"""Seconds from the command `make train-local` to the first training step and to the end, first and later runs.

    .venv/bin/python benchmarks/startup.py --rounds 5       # a part of `make bench`

Bakes the default project into a temporary folder, as nothing may be left of an earlier run. The first run has an empty
uv cache, no environment, no data and no image, so it also measures the network. Needs no engine: the container's rows
are left out without one.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from cookiecutter.main import cookiecutter
from page import TEMPLATE, Book, own_environment, parser, spread

SLUG = "startup_benchmark"


def train(project: Path, mode: str, environment: dict[str, str]) -> tuple[float, float]:
    """Run `make train-local` and return the seconds to its first step and to its end."""
    started = time.monotonic()
    first_step = 0.0
    command = ["make", "train-local", f"LOCAL_MODE={mode}"]
    process = subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if line.startswith("first step done"):
            first_step = time.monotonic() - started
    if process.wait() or not first_step:
        sys.exit(f"make train-local failed:\n{text}")
    return first_step, time.monotonic() - started


def no_cache(environment: dict[str, str]) -> dict[str, str]:
    """Build options that do without the engine's own cache of layers."""
    options = [*json.loads(environment.get("IMAGES__BUILD_OPTIONS", "[]")), "--no-cache"]
    return {"IMAGES__BUILD_OPTIONS": json.dumps(options)}


def remove_images() -> None:
    """Remove the images that this benchmark builds, by name: others may share their layers."""
    if shutil.which("docker"):
        command = ["docker", "images", "--format", "{{.Repository}}:{{.Tag}}", SLUG.replace("_", "-")]
        for name in subprocess.run(command, capture_output=True, text=True).stdout.split():
            subprocess.run(["docker", "image", "rm", name], capture_output=True, check=False)


def processor() -> str:
    """The processor's name."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(": ")[2] if names else platform.machine()


def main() -> None:
    """Measure, print a Markdown table and keep it in docs/benchmarks.md."""
    options = parser("Seconds to the first step of make train-local.").parse_args()
    runs = 1 if options.quick else max(options.rounds, 1)
    engine = shutil.which("docker") and subprocess.run(["docker", "version"], capture_output=True).returncode == 0
    modes = ["container", "process"] if engine else ["process"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        environment = own_environment() | {"UV_CACHE_DIR": f"{folder}/uv"}
        project = Path(cookiecutter(str(TEMPLATE), True, True, {"project_slug": SLUG}, output_dir=folder))
        remove_images()
        try:
            first = train(project, modes[0], environment | no_cache(environment))
            rows.append((f"{modes[0]}, first run (empty caches, no image)", [first]))
            for mode in modes:
                train(project, mode, environment)  # once unmeasured: Python compiles what it has just been given
                rows.append((f"{mode}, later runs", [train(project, mode, environment) for _ in range(runs)]))
        finally:
            remove_images()
        versions = subprocess.run(
            [str(project / ".venv/bin/python"), "-c", "import torch; print(torch.__version__)"],
            capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
    machine = f"{os.cpu_count()} x {processor()}, torch {versions}"
    text = f"{datetime.now(UTC):%Y-%m-%d}, {machine}, {runs} later runs, median (range)\n\n"
    text += "| | seconds to the first step | seconds in all |\n|---|---|---|\n"
    for name, results in rows:
        text += f"| {name} | {spread([step for step, _ in results], 1)} | {spread([end for _, end in results], 1)} |\n"
    print(text)
    Book.of(options).keep("From the command to the first step", text)


if __name__ == "__main__":
    main()
