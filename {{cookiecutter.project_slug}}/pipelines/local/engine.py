"""The Docker engine: is there one, has it the project's image, and leave nothing of a run behind."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pipelines import ROOT
from pipelines.local.job import GRACE
from progress import waiting

NETWORK = "sagemaker-local"  # SDK V3's local mode puts every container of every run on it
# Its root is the caller, and its other users are nobody here: rootless Docker, as client and Podman say it, and Desktop
MAPPED = re.compile(r"(?m)^\s*(rootless(: true)?|Operating System: Docker Desktop.*)$")
OLDEST_COMPOSE = (1, 27)  # the first docker-compose that reads files without a version


class EngineError(Exception):
    """No container can run; one sentence with the reason and the fix."""


def check() -> None:
    """Make sure that an engine answers and that compose, which the SDK starts containers with, is there.

    Raises:
        EngineError: with what is missing.
    """
    if shutil.which("docker") is None:
        raise EngineError("the docker command is not installed; install Docker Engine or Docker Desktop")
    answer = docker("version", timeout=20)
    if answer.returncode:
        detail = (answer.stderr.strip() or answer.stdout.strip()).splitlines()
        reason = detail[-1].strip() if detail else "no message"
        raise EngineError(f"no Docker engine answers ({reason}); start it, or give this user access to its socket")
    command = compose()
    if command is None:
        raise EngineError("Docker Compose is not installed; install the docker compose plugin or docker-compose")
    if command == ["docker-compose"]:
        version = subprocess.run([*command, "version", "--short"], capture_output=True, text=True).stdout.strip()
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if numbers < OLDEST_COMPOSE:
            raise EngineError(f"docker-compose {version or 'of unknown version'} is too old for the SDK's files; "
                              "install 1.27 or newer, or the docker compose plugin")  # fmt: skip
    for sign in ":$":
        if sign in str(ROOT):
            raise EngineError(f"the project's path {ROOT} holds {sign!r}, which compose cannot mount; move the project")


def check_alone(instances: int) -> None:
    """Make sure that no other run shares the host names algo-1, algo-2, ... with one that trains on several hosts.

    Raises:
        EngineError: when one does.
    """
    running = ["ps", "--quiet", "--filter", f"network={NETWORK}"]
    several = docker(*running, "--filter", "name=algo-2").stdout.split()
    if several or (instances > 1 and docker(*running).stdout.split()):
        raise EngineError(
            f"another run trains in containers on the network {NETWORK}, which runs on several hosts cannot share; "
            "wait for it"
        )


def check_sees() -> None:
    """Make sure that the engine sees the project's files, which containers mount.

    One on another machine does not, nor one beside a development container, nor Docker from snap outside of the home
    folder. So it is asked: with an image of nothing and a container that never starts.

    Raises:
        EngineError: when it does not.
    """
    (ROOT / ".cache").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="engine-", dir=ROOT / ".cache") as folder:  # no other machine has that
        empty = Path(folder, "empty.tar")
        empty.write_bytes(bytes(1024))
        image = docker("import", str(empty)).stdout.strip()
        made = docker("create", "--mount", mount(Path(folder), "/seen"), image, "true")
        docker("rm", made.stdout.strip())
        docker("image", "rm", image)
    if image and made.returncode:
        said = made.stderr.strip().partition("\n")[0]
        raise EngineError(f"the Docker engine {about('Name')} does not see this project's files ({said}): use one of "
                          "this machine (DOCKER_HOST, `docker context use`), or a folder that it sees")  # fmt: skip


def about(what: str) -> str:
    """What `docker info` says of something; empty where it says nothing."""
    found = re.search(rf"(?m)^\s*{what}:\s*(\S+)", docker("info").stdout)
    return found[1] if found else ""


def mount(source: Path, target: str) -> str:
    """A mount, of which docker reads the parts as those of a CSV file."""
    quoted = [part.replace('"', '""') for part in (f"source={source}", f"target={target}")]
    return f'type=bind,"{quoted[0]}","{quoted[1]}"'


def owner() -> str:
    """The caller, as containers know user and group."""
    mapped = sys.platform == "linux" and MAPPED.search(docker("info").stdout)
    return "0:0" if mapped else f"{os.getuid()}:{os.getgid()}"


def compose() -> list[str] | None:
    """The compose command, chosen as the SDK chooses: the plugin from version 2 on, else `docker-compose`."""
    if docker("compose", "version").returncode == 0:
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


def gpus(visible: str | None = None) -> int:
    """How many NVIDIA GPUs a process of this machine can use.

    Args:
        visible: CUDA_VISIBLE_DEVICES, which is read as CUDA does, up to the first name that is none; None: all.
    """
    if shutil.which("nvidia-smi") is None:
        return 0
    answer = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    found = [line for line in answer.stdout.splitlines() if line.startswith("GPU ")] if answer.returncode == 0 else []
    if visible is None:
        return len(found)
    names = [name.strip() for name in visible.split(",")]
    known = [int(name) < len(found) if name.isdecimal() else len(name) > 3 and f"UUID: {name}" in answer.stdout
             for name in names]  # fmt: skip
    count = known.index(False) if False in known else len(known)
    return count if len(set(names[:count])) == count else 0


def container_gpus() -> int:
    """How many GPUs containers can use: none when the engine lacks NVIDIA's runtime."""
    return gpus() if "nvidia" in docker("info").stdout.lower() else 0


def remove_run(folder: Path) -> None:
    """Remove the containers and the network of a run of SDK V3's local mode, which leaves both behind."""
    file = folder / "docker-compose.yaml"
    command = compose()
    if file.exists() and command is not None:
        with waiting("the containers to stop"):
            subprocess.run([*command, "-f", str(file), "down", "--timeout", str(GRACE)], capture_output=True)
        docker("network", "rm", NETWORK)  # stays as long as another run uses it, whose end removes it


def give_back(image: str, *folders: Path) -> None:
    """Make the caller the owner of files that root wrote in a container."""
    if os.getuid() == 0 or sys.platform != "linux":  # Docker Desktop maps owners by itself
        return
    for folder in folders:
        if folder.exists():
            words = ["--rm", "--volume", f"{folder}:/given-back", "--entrypoint", "chown", image]
            docker("run", *words, "-R", owner(), "/given-back", timeout=GRACE)


def docker(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """What a docker command says; a time-out is the exit code 124."""
    command = ["docker", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer in {timeout:.0f} s")
