"""Run what an artifact holds, which is code: as the user when it is trusted, else in a container that it cannot leave.

Trusted is what a run here or a job of this project made (`runs.trusted`), and for one call what TRUST=1 names. Anything
else runs in the serving container: without a network, on files that are read-only, with one folder to write its result
to. No credentials reach either.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import shutil
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

from pipelines import SOURCE, project, runs, terminal
from pipelines.config import Settings, load
from pipelines.local import engine, images
from pipelines.terminal import UserError

# Variables that programs with an artifact's code get: none that may hold a key, a password or a token.
KEPT = re.compile(
    "PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|TERM|COLUMNS|LINES|NO_COLOR|TZ|TMPDIR|VIRTUAL_ENV|(DY)?LD_LIBRARY_PATH|"
    "PYTHON[A-Z]*|(CUDA|CUDNN|INFERENCE|KMP|LC|MKL|NCCL|NVIDIA|OMP|OPENBLAS|PYTORCH|TORCH|TORCHINDUCTOR)_[A-Z0-9_]*"
)
SECRET = re.compile("TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY")
PLACE = "/opt/scratch"  # in the container, the one folder that it can write to
# In the container: carries a connection from the program's own input and output to the server, which has no network.
RELAY = """
import socket, sys, threading
server = socket.create_connection(("127.0.0.1", 8080))
def up():
    while data := sys.stdin.buffer.read1(65536):
        server.sendall(data)
    server.shutdown(socket.SHUT_WR)
threading.Thread(target=up, daemon=True).start()
while data := server.recv(65536):
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
"""


def environment() -> dict[str, str]:
    """What a program with an artifact's code may know of this process's environment."""
    return {name: value for name, value in os.environ.items() if KEPT.fullmatch(name) and not SECRET.search(name)}


def add_options(parser: terminal.Parser, mode: str = "where it runs when it is not trusted") -> None:
    """The options that say where an artifact's code runs; `mode` is the help of LOCAL_MODE."""
    parser.add_argument(
        "--trust", variable="TRUST", action="store_true", help="run its code as you, whoever made it; for this call"
    )
    parser.add_mode(f"{mode} (default: compute.local_mode)")


def image(archive: Path, trust: bool, settings: Settings | None = None, mode: str | None = None) -> str | None:
    """The image that an artifact must run in; None when it is trusted.

    Raises:
        UserError: when there is no container for one that is not.
    """
    if trust or runs.trusted(archive):
        return None
    settings = settings or load(options={"compute.local_mode": mode})
    try:
        if settings.compute.local_mode == "process":
            raise engine.EngineError("LOCAL_MODE is process")
        engine.check()
        engine.check_sees()
        return images.image(settings, "serving")
    except engine.EngineError as error:
        raise UserError(
            f"{archive} was not made by a run or job of this project, and an artifact is code: it would run in a "
            f"container without a network, but {error}; where you know who made it, TRUST=1 runs it as you, this once"
        ) from error


def run(
    image: str | None, script: str, words: Sequence[str], reads: Iterable[Path] = (), output: Path | None = None
) -> int:
    """Run a script of `src/` on an artifact to its end; gives its exit code.

    Args:
        image: to run it in; None: as the user.
        script: below `src/`.
        words: its options.
        reads: files and folders that it needs.
        output: a file that it is to write, its option `--output`.

    Raises:
        UserError: when the output is a folder.
    """
    if output and output.is_dir():
        raise UserError(f"{output} cannot be the output, it is a folder; name a file")
    command = [str(SOURCE / script), *(["--output", str(output)] if output else []), *words]
    if image is None:
        return subprocess.run([sys.executable, *command], env=environment()).returncode
    runs.WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sandbox-", dir=runs.WORK) as folder:
        inside = Path(folder, "output")
        for made in (inside, Path(folder, "temporary")):
            made.mkdir()
        if output:
            command[2] = f"{PLACE}/output/{output.name}"
            _copy(output.parent, inside, output.name)
        there = dict.fromkeys(path.absolute() for path in (SOURCE, *reads) if path.exists())
        docker = [*container("sandbox"), "--network", "none", "--workdir", str(Path.cwd())]
        docker += [f"--env={name}={PLACE}/temporary" for name in ("HOME", "TMPDIR")]
        docker += ["--mount", engine.mount(Path(folder), PLACE)]
        docker += [word for path in there for word in ("--mount", f"{engine.mount(path, str(path))},readonly")]
        code = _follow([*docker, image, "python3", *command])
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            _copy(inside, output.parent, output.name)
    return code


def container(what: str) -> list[str]:
    """A container with no more rights than a program that computes needs."""
    words = ["docker", "run", "--rm", "--init", "--name", f"{project.name()}-{what}-{os.getpid()}", "--read-only"]
    words += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "1024"]
    words += [f"--env={name}=" for name in images.PROXIES]  # which docker would hand on, with their passwords
    words += [f"--env={name}" for name in sorted(environment()) if name.startswith("INFERENCE_")]
    return [*words, "--user", engine.owner()]


def show(source: IO[bytes], target: TextIO) -> None:
    """Print what a stranger's program prints, without what a terminal would obey."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while piece := os.read(source.fileno(), 65536):
        text = decoder.decode(piece)
        target.write("".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text))
        target.flush()


def _follow(command: Sequence[str]) -> int:
    """Run a container and print what it says; signals go to it."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda caught, _: process.send_signal(caught)) for number in numbers}
    ends: list[tuple[Any, TextIO]] = [(process.stdout, sys.stdout), (process.stderr, sys.stderr)]
    threads = [threading.Thread(target=show, args=end) for end in ends]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return process.wait()
    finally:
        engine.docker("rm", "--force", command[command.index("--name") + 1])
        for number, handler in before.items():
            signal.signal(number, handler)


def _copy(source: Path, target: Path, name: str) -> None:
    """Put a file, or what was begun of it, in place of another; a link or device is left out, and none is followed."""
    for file in (name, f"{name}.partial", f"{name}.partial.json"):
        (target / file).unlink(missing_ok=True)
        if (source / file).is_file() and not (source / file).is_symlink():
            shutil.copyfile(source / file, target / file)


@contextlib.contextmanager
def door(port: int, command: Sequence[str]) -> Iterator[None]:
    """Lead from a port of 127.0.0.1 to the server in the container, without a network, that a command started."""
    relay = ["docker", "exec", "--interactive", command[command.index("--name") + 1], "python3", "-c", RELAY]

    class Door(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

        def finish_request(self, request: Any, _: Any) -> None:
            subprocess.run(relay, stdin=request, stdout=request, stderr=subprocess.DEVNULL)

    with Door(("127.0.0.1", port), socketserver.BaseRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()
