"""Serve a finished run on this machine: `make serve-local`, `make serve-local IMAGE=photo.jpg` asks once and stops.

    python -m pipelines serve-local --port 8081 --run 20261121-093000-a1b2

The server is the one that SageMaker will run, in the same image, with its files read-only; where no Docker engine
answers it is a process. It listens on 127.0.0.1 only. INFERENCE_... variables (see src/inference/serve.py) are handed
on.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from inference.artifact import ArtifactError, unpack, verify
from pipelines import SOURCE, project, runs, terminal
from pipelines.config import load
from pipelines.local import engine, images, sandbox
from pipelines.terminal import UserError
from progress import plain, waiting

PATIENCE = 120  # seconds until the model must be loaded
FILES = runs.ARTIFACTS / "async"  # of asynchronous requests: s3://bucket/key is bucket/key there


def command(image: str | None, model: Path, port: int, alone: bool = False, local: Sequence[str] = ()) -> list[str]:
    """The command line of the server, in a container or as a process.

    Args:
        image: to run it in; None for a process.
        model: folder of the unpacked artifact.
        port: on 127.0.0.1.
        alone: without a network, because the artifact is not trusted.
        local: options of what `inference/local.py` adds, which no image holds.
    """
    more = [*local, *(["--files", str(FILES)] if local and not alone else [])]
    if image is None:
        script = SOURCE / "inference" / "serve.py"
        words = [sys.executable, str(script), "--model-dir", str(model), "--host", "127.0.0.1"]
        return [*words, "--port", str(port), *more]
    words = [*sandbox.container("serve"), "--volume", f"{model}:/opt/ml/model:ro"]
    words += ["--network", "none"] if alone else ["--publish", f"127.0.0.1:{port}:8080"]
    words += ["--gpus", "all"] if engine.container_gpus() and not alone else []
    if not image.startswith(f"{project.name()}:"):  # anybody's own, with another server
        more = []
    for name in ("local.py", "page.html") if more else ():
        words += ["--volume", f"{SOURCE / 'inference' / name}:/opt/serving/inference/{name}:ro"]
    words += ["--volume", f"{FILES}:{FILES}"] if "--files" in more else []
    return [*words, image, "serve", *more]


@contextlib.contextmanager
def server(
    archive: Path, image: str | None, port: int, alone: bool = False, local: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """The running server, ready to answer; it is stopped at the end, after it answered what was inside.

    Where it is to be `alone`, its container has no network, and this process hands its connections on.

    Raises:
        UserError: when the port is taken, the artifact cannot be unpacked, or the server does not get ready.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise UserError(f'port {port} cannot be had ({error}); choose another one: ARGS="--port 8081"') from error
    runs.WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="serve-", dir=runs.WORK) as folder, contextlib.ExitStack() as stack:
        try:
            unpack(archive, Path(folder))
            verify(Path(folder))
        except ArtifactError as error:
            raise UserError(f"{archive}: {error}") from error
        Path(folder).chmod(0o755)
        words, piped = command(image, Path(folder), port, alone, local), subprocess.PIPE if alone else None
        process = subprocess.Popen(
            words, start_new_session=True, env=None if image else sandbox.environment(),
            stdout=piped, stderr=subprocess.STDOUT if alone else None,
        )  # fmt: skip
        try:
            if alone:
                threading.Thread(target=sandbox.show, args=(process.stdout, sys.stdout), daemon=True).start()
                stack.enter_context(sandbox.door(port, words))
            with waiting(f"the server, which loads the model ({PATIENCE} s at most)", alone=False):
                _wait(process, port)
            yield process
        finally:
            process.terminate()
            process.wait()


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if ask(port, "GET", "/ping")[0] == 200:
                return
        time.sleep(0.1)
    if process.poll() is None:
        raise UserError(f"the server was not ready within {PATIENCE} s; its messages are above")
    raise UserError(f"the server ended with exit code {process.returncode}; its messages above say why")


def ask(
    port: int, method: str, path: str, body: bytes | None = None, content_type: str = "application/x-image"
) -> tuple[int, bytes]:
    """Status and body of the server's answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": content_type})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def ask_about(file: Path, body: bytes, port: int) -> int:
    """Send an image file's content, print what came back; gives the exit code."""
    status, answer = ask(port, "POST", "/invocations", body)
    if status != 200:
        raise UserError(f"{plain(file)}: the server answered {status}: {plain(answer.decode(errors='replace'))}")
    try:
        found = json.loads(answer)
        said = f"{plain(found['labels'][0])}, probability {max(found['probabilities'][0]):.3f}"
    except (ValueError, LookupError, TypeError) as error:  # handlers may be anybody's
        raise UserError(f"{plain(file)}: the server's answer is no classification: {answer[:200]!r}") from error
    print(f"{plain(file)}: {said}", flush=True)
    return 0


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Serve a finished run on 127.0.0.1.", settings=True)
    parser.add_argument("--run", variable="RUN", help="name of a run (default: the newest)")
    parser.add_argument(
        "--image", variable="IMAGE", type=Path, help="an image file: ask once, print the answer and stop"
    )
    sandbox.add_options(parser, mode="where the server runs")
    parser.add_argument("--port", type=int, default=8080, help="default: 8080")
    parser.add_argument("--cors", variable="CORS", help="origin of another page that may ask: http://localhost:3000")
    options = parser.parse_args()
    cors = (options.cors or "").rstrip("/")
    if cors and not re.fullmatch(r"(https?|[a-z]+-extension|capacitor|ionic|tauri)://[A-Za-z0-9.:\[\]-]+", cors):
        raise UserError(f"CORS is {plain(options.cors)}, which is no origin; give one like http://localhost:3000")
    settings = load(options.set, options={"compute.local_mode": options.mode})
    folder = runs.find(options.run)
    try:
        body = options.image.read_bytes() if options.image else b""  # before seconds are spent on a server
    except OSError as error:
        raise UserError(f"{plain(options.image)} cannot be read: {error.strerror}") from error
    archive = folder / "model.tar.gz"
    local = [] if options.image else ["--local", *(["--cors", cors] if cors else [])]
    guarded = sandbox.image(archive, options.trust, settings)
    image = guarded or images.choose(settings, "serving")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        FILES.mkdir(parents=True, exist_ok=True)
        with server(archive, image, options.port, bool(guarded), local) as process:
            if options.image:
                return ask_about(options.image, body, options.port)
            url = f"http://127.0.0.1:{options.port}"
            print(f"serving run {folder.name} {f'in image {image}' if image else 'as a process'}; Ctrl-C stops it.")
            print(f"A page to try it: {url}")
            print(f"AWS's own clients come here with AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME={url}")
            print(
                f"Try: curl --data-binary @{terminal.quoted(runs.example_image(folder))} "
                f'-H "Content-Type: application/x-image" {url}/invocations',
                flush=True,
            )
            if process.wait():
                raise UserError(f"the server ended with exit code {process.returncode}; its messages above say why")
    except KeyboardInterrupt:
        print("stopped", flush=True)
    return 0
