"""TorchServe with SageMaker's PyTorch toolkit on an unpacked artifact, without Docker, in an environment of its own.

apt-get install default-jre-headless
uv venv build/torchserve && uv pip install --python build/torchserve <PACKAGES>
TORCHSERVE_PYTHON=$PWD/build/torchserve/bin/python make test ARGS=tests/test_torchserve.py   # in a bake

The configuration is what the toolkit writes for its own `serve` command; only addresses are added. That command is not
run itself: it writes to /etc, allows one server a machine, and installs `code/requirements.txt` from the network.
"""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.helpers import verb_environment

PACKAGES = (
    "sagemaker-pytorch-inference==2.0.25",
    "torchserve==0.12.0",
    "torch-model-archiver==0.12.0",
    "pyyaml>=6,<7",  # TorchServe imports it without saying so
    "setuptools<81",  # later ones have no pkg_resources, which the toolkit imports
    "torch>=2.10,<3",
    "numpy>=2.0,<3",
    "pillow>=13,<14",
    "safetensors>=0.6,<1",
)
READY_SECONDS = 180
CONFIGURE = """
import pathlib, sys
from sagemaker_pytorch_serving_container import serving, torchserve
settings = torchserve._generate_ts_config_properties(serving.HANDLER_SERVICE)
pathlib.Path("ts.properties").write_text(settings + sys.argv[1])  # of two lines with one name the last counts
print(torchserve.DEFAULT_TS_LOG_FILE)
"""


class HostError(RuntimeError):
    """TorchServe cannot start or does not answer; the message says why, or what it printed."""


class Reply(NamedTuple):
    """An answer."""

    status: int
    reason: str
    kind: str | None  # content type
    body: bytes


@contextmanager
def torchserve_host(python: Path, model_dir: Path, port: int, **environment: str) -> Iterator[str]:
    """Serve the artifact in `model_dir` for as long as the context lasts.

    Args:
        python: interpreter of an environment with PACKAGES.
        model_dir: an unpacked artifact.
        port: of 127.0.0.1.
        environment: more variables for all processes, such as SAGEMAKER_MODEL_SERVER_WORKERS.

    Yields:
        The base URL, once `/ping` says 200 and the handlers have answered.

    Raises:
        HostError: when it ends, or does not answer in time.
    """
    url = f"http://127.0.0.1:{port}"
    with (
        tempfile.TemporaryDirectory() as logs,
        started(python, model_dir, port, LOG_LOCATION=logs, **environment) as it,
    ):
        deadline = time.monotonic() + READY_SECONDS
        while not _is_ready(url):
            if it.poll() is not None or time.monotonic() > deadline:
                text = "".join(path.read_text(errors="replace")[-4000:] for path in Path(logs).glob("ts_log.log"))
                raise HostError(f"TorchServe ended with {it.poll()} or was too slow; its logs:\n{text}")
            time.sleep(0.5)
        yield url


@contextmanager
def started(python: Path, model_dir: Path, port: int, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """The same, not waiting: the process, which leads the group of all the others."""
    if shutil.which("java") is None:
        raise HostError("TorchServe needs java, which is not on PATH: apt-get install default-jre-headless")
    with tempfile.TemporaryDirectory(prefix="torchserve-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        variables = verb_environment() | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
        variables |= {"PYTHONPATH": f"{model_dir}/code", "PYTHONDONTWRITEBYTECODE": "1"}
        variables |= {"TEMP": folder, "TMPDIR": folder}  # for Java and Python: sockets, links, the process id
        variables |= {"SAGEMAKER_PROGRAM": "inference.py", "LOG_LOCATION": folder, "METRICS_LOCATION": folder}
        variables |= environment
        free = free_ports(3)
        addresses = f"inference_address=http://127.0.0.1:{port}\nmanagement_address=http://127.0.0.1:{port}\n"
        addresses += f"metrics_address=http://127.0.0.1:{free[0]}\n"
        addresses += f"grpc_inference_port={free[1]}\ngrpc_management_port={free[2]}\n"
        configure = [str(python), "-c", CONFIGURE, addresses]
        log = subprocess.run(configure, env=variables, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout
        command = [str(python.parent / "torchserve"), "--foreground", "--start", "--no-config-snapshots"]
        command += ["--model-store", folder, "--ts-config", "ts.properties", "--log-config", log.strip()]
        command += ["--models", f"model={model_dir}"]
        server = subprocess.Popen(command, env=variables, cwd=folder, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            yield server
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def ask(url: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Reply:
    """POST the body, or GET without one."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:
        connection.request("GET" if body is None else "POST", path, body, headers or {})
        response = connection.getresponse()
        return Reply(response.status, response.reason, response.getheader("Content-Type"), response.read())
    finally:
        connection.close()


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens at."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def _is_ready(url: str) -> bool:
    """`/ping` alone says 200 before a worker has loaded the model, and when none ever can."""
    try:
        return ask(url, "/ping").status == 200 and ask(url, "/invocations", b"{}").status != 503
    except OSError:
        return False
