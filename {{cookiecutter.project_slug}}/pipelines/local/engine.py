"""The Docker engine: is there one, has it the project's image, and leave nothing of a run behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from pipelines import ROOT
from pipelines.local.job import GRACE
from progress import waiting

NETWORK = "sagemaker-local"  # SDK V3's local mode puts every container of every run on it
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


def compose() -> list[str] | None:
    """The compose command, chosen as the SDK chooses: the plugin from version 2 on, else `docker-compose`."""
    plugin = docker("compose", "version")
    if plugin.returncode == 0:
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


def gpus() -> int:
    """How many NVIDIA GPUs this machine has."""
    if shutil.which("nvidia-smi") is None:
        return 0
    answer = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return sum(line.startswith("GPU ") for line in answer.stdout.splitlines()) if answer.returncode == 0 else 0


def container_gpus() -> int:
    """How many of them containers can use: none when the engine lacks NVIDIA's runtime."""
    return gpus() if "nvidia" in docker("info").stdout.lower() else 0


def remove_run(folder: Path) -> None:
    """Remove the containers and the network of a run of SDK V3's local mode, which leaves both behind."""
    file = folder / "docker-compose.yaml"
    command = compose()
    if file.exists() and command is not None:
        down = [*command, "-f", str(file), "down", "--timeout", str(GRACE)]
        with waiting("the containers to stop"):
            subprocess.run(down, capture_output=True, check=False)
        docker("network", "rm", NETWORK)  # stays as long as another run uses it, whose end removes it


def give_back(image: str, *folders: Path) -> None:
    """Make the caller the owner of files that root wrote in a container."""
    if os.getuid() == 0 or sys.platform != "linux":  # Docker Desktop maps owners by itself
        return
    for folder in folders:
        if folder.exists():
            owner = f"{os.getuid()}:{os.getgid()}"
            mount = ["-v", f"{folder}:/given-back", "--entrypoint", "chown"]
            subprocess.run(
                ["docker", "run", "--rm", *mount, image, "-R", owner, "/given-back"], capture_output=True, check=False
            )


def docker(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """What a docker command says; a time-out is the exit code 124."""
    command = ["docker", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer in {timeout:.0f} s")
