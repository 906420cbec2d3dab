"""Ray Serve on an unpacked artifact, as AWS's managed image runs it: a cluster, Serve, then `serve run ray_app:app`.

uv venv build/ray && uv pip install --python build/ray <PACKAGES>
RAY_PYTHON=$PWD/build/ray/bin/python make test ARGS=tests/test_ray.py     # in a bake with these files in tests/
"""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PACKAGES = ("ray[serve]>=2.57,<3", "torch>=2.10,<3", "numpy>=2.0,<3", "pillow>=13,<14", "safetensors>=0.6,<1")
READY_SECONDS = 240
BRIDGE = Path(__file__).with_name("ray_app.py")
START = """
import pathlib, signal, sys, ray
from ray import serve
from ray.serve.scripts import cli
ray.init(include_dashboard=False, _temp_dir=sys.argv[1], object_store_memory=100 * 2**20, namespace="serve")
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
cli(["run", "--non-blocking", "ray_app:app"], standalone_mode=False)
pathlib.Path("ready").touch()  # /ping would answer as soon as the first replica does
signal.pause()
"""


class HostError(RuntimeError):
    """Ray Serve did not come up; the message ends with what it printed."""


@contextmanager
def ray_host(python: Path, model_dir: Path, port: int, **environment: str) -> Iterator[str]:
    """Serve the artifact in `model_dir` for as long as the context lasts.

    Args:
        python: interpreter of an environment with PACKAGES.
        model_dir: an unpacked artifact; the bridge, `ray_app.py`, is copied into its `code/`.
        port: of 127.0.0.1.
        environment: more variables for all of Ray's processes.

    Yields:
        The base URL.

    Raises:
        HostError: when it ends, or does not answer in time.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: a socket's path has at most 107 bytes
    shutil.copy(BRIDGE, model_dir / "code")
    variables = variables_of(folder) | {"PYTHONPATH": f"{model_dir}:{model_dir}/code"} | environment
    with (folder / "log").open("wb") as log:
        command = [str(python), "-c", START, str(folder), str(port)]
        process = subprocess.Popen(command, env=variables, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not ((folder / "ready").exists() and answers(port)):
            if process.poll() is not None or time.monotonic() > deadline:
                text = (folder / "log").read_text(encoding="utf-8", errors="replace")
                raise HostError(f"Ray Serve ended with {process.poll()} or was too slow; it printed:\n{text[-6000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        end(process, folder)


def variables_of(folder: Path) -> dict[str, str]:
    """The environment of a Ray that writes into a folder, by which its processes are found again."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON"))}
    variables |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_HOST_OF_TEST": str(folder), "PYTHONUNBUFFERED": "1"}
    return variables | {"HOME": str(folder), "RAY_TMPDIR": str(folder)}  # HOME: where Ray writes a token


def end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Stop Ray, and whatever of it is left; remove its folder."""
    process.send_signal(signal.SIGINT)  # at exit, Ray ends the cluster that it started
    with suppress(subprocess.TimeoutExpired):
        process.wait(60)
    for pid in processes(folder):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(60)
    shutil.rmtree(folder, ignore_errors=True)


def processes(folder: Path) -> list[int]:
    """Whatever runs with this host's mark in its environment, which every child inherits."""
    mark = f"RAY_HOST_OF_TEST={folder}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def answers(port: int) -> bool:
    """Whether something answers `/ping` there."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/ping")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
