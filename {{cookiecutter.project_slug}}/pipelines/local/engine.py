"""The Docker engine: is there one, has it the project's image, and leave nothing of a run behind."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pipelines import ROOT, SOURCE
from pipelines.config import Settings
from pipelines.console import UserError
from pipelines.environment import certificates
from pipelines.jobs import GRACE
from processing.progress import waiting

Target = Literal["training", "serving"]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
SERVER = [SOURCE / "inference" / name for name in ("serve.py", "batcher.py")]
BUILD_LOG = ROOT / ".cache" / "image-build.log"
NETWORK = "sagemaker-local"  # SDK V3's local mode puts every container of every run on it
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # `docker info` says one, an image the other
OLDEST_COMPOSE = (1, 27)  # the first docker-compose that reads files without a version
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


class EngineError(Exception):
    """No container can run; one sentence with the reason and the fix."""


def check() -> None:
    """Make sure that an engine answers and that compose, which the SDK starts containers with, is there.

    Raises:
        EngineError: with what is missing.
    """
    if shutil.which("docker") is None:
        raise EngineError("the docker command is not installed; install Docker Engine or Docker Desktop")
    answer = _docker("version", timeout=20)
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
    several = _docker(*running, "--filter", "name=algo-2").stdout.split()
    if several or (instances > 1 and _docker(*running).stdout.split()):
        raise EngineError(
            f"another run trains in containers on the network {NETWORK}, which runs on several hosts cannot share; "
            "wait for it"
        )


def choose(settings: Settings, target: Target) -> str | None:
    """The image to run in, or None to run as processes: as `compute.local_mode` says, or after one line that says why.

    Raises:
        UserError: when a container was asked for and cannot be had.
    """
    mode = settings.compute.local_mode
    if mode == "process":
        return None
    try:
        check()
        if target == "training":
            check_alone(settings.compute.local_instances)
        return image(settings, target)
    except EngineError as error:
        if mode == "container":
            raise UserError(f"{error}; or go without containers: LOCAL_MODE=process") from error
        print(f"{target} as a process on this machine: {error}", flush=True)
        return None


def compose() -> list[str] | None:
    """The compose command, chosen as the SDK chooses: the plugin from version 2 on, else `docker-compose`."""
    plugin = _docker("compose", "version")
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
    return gpus() if "nvidia" in _docker("info").stdout.lower() else 0


def image(settings: Settings, target: Target) -> str:
    """The image for a target: built when it is the project's own and missing or stale, pulled when it is another one.

    Raises:
        EngineError: when it can be neither found nor made.
    """
    name: str = getattr(settings.images, target)
    if name == "project":
        name = image_name(settings, target)
        if not _exists(name):
            build(settings, target)
    elif not _exists(name):
        print(f"pulling {name}", flush=True)
        if subprocess.run(["docker", "pull", name]).returncode:
            raise EngineError(f"image {name} is not here and cannot be pulled (see above); check images.{target}")
    return name


def image_name(settings: Settings, target: Target) -> str:
    """`<project>:<target>-<hash>`: the hash covers all that goes into it, so a stale image has another name."""
    recipe = [DOCKERFILE.read_text(encoding="utf-8"), settings.images.base, *packages(settings)]
    if target == "serving":
        recipe += [*group("serving"), *(file.read_text(encoding="utf-8") for file in SERVER)]
    return f"{project_name()}:{target}-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]}"


def base_digest(settings: Settings) -> str | None:
    """The base image by digest, which never becomes another one; None where the engine has it from no registry."""
    found = _docker("image", "inspect", settings.images.base)
    facts = json.loads(found.stdout or "[]") if found.returncode == 0 else []
    return next(iter(facts[0].get("RepoDigests") or []), None) if facts else None


def packages(settings: Settings) -> list[str]:
    """What pip installs to train: the group `container` of pyproject.toml unless the settings say otherwise."""
    return group("container") if settings.images.packages == "auto" else settings.images.packages


def group(name: str) -> list[str]:
    """A group of dependencies in pyproject.toml."""
    found: list[str] = _pyproject()["dependency-groups"][name]
    return found


def project_name() -> str:
    """The project's name in pyproject.toml; valid in names of images and of SageMaker resources."""
    return str(_pyproject()["project"]["name"])


def image_for(settings: Settings, target: Target, architecture: str) -> str:
    """The project's image for a kind of processor, under a name of its own where this machine's are others (a Mac's).

    Raises:
        EngineError: when it can be neither found nor made.
    """
    found = re.search(r"(?m)^\s*Architecture:\s*(\S+)", _docker("info").stdout)
    if found is None or ARCHITECTURES.get(found[1], found[1]) == architecture:
        return image(settings, target)
    name = f"{image_name(settings, target)}-{architecture}"
    if not _exists(name):
        build(settings, target, ["--platform", f"linux/{architecture}"], name)
    return name


def build(settings: Settings, target: Target, options: Sequence[str] = (), name: str | None = None) -> str:
    """Build an image of the project.

    Args:
        settings: base image, packages and options.
        target: the stage of the Dockerfile.
        options: more options of `docker build`.
        name: of the image; None: `image_name`.

    Returns:
        Its name.

    Raises:
        EngineError: with the last line of the build's log.
    """
    name = name or image_name(settings, target)
    print(
        f"building the image {name} from {settings.images.base} (some minutes; log: {_relative(BUILD_LOG)})", flush=True
    )
    BUILD_LOG.parent.mkdir(parents=True, exist_ok=True)
    command = ["docker", "build", "--force-rm", "--tag", name, "--target", target]
    command += ["--build-arg", f"BASE_IMAGE={settings.images.base}"]
    command += ["--build-arg", f"PACKAGES={' '.join(packages(settings))}"]
    command += ["--build-arg", f"SERVING={' '.join(group('serving'))}"]
    command += [word for proxy in PROXIES if os.environ.get(proxy) for word in ("--build-arg", proxy)]
    command += [*settings.images.build_options, *options]
    with BUILD_LOG.open("w", encoding="utf-8") as log, tempfile.TemporaryDirectory(prefix="image-") as context:
        shutil.copyfile(DOCKERFILE, Path(context, "Dockerfile"))
        Path(context, "inference").mkdir()
        for file in SERVER:
            shutil.copyfile(file, Path(context, "inference", file.name))
        bundle = certificates()
        if bundle:
            shutil.copyfile(bundle, Path(context, "ca.crt"))
        with waiting(f"`docker build`, whose log is {_relative(BUILD_LOG)}"):
            result = subprocess.run([*command, context], stdout=log, stderr=log)
    if result.returncode:
        lines = [line for line in BUILD_LOG.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else "no message"
        raise EngineError(f"the image could not be built ({reason}); the whole log is {_relative(BUILD_LOG)}")
    return name


def remove_run(folder: Path) -> None:
    """Remove the containers and the network of a run of SDK V3's local mode, which leaves both behind."""
    file = folder / "docker-compose.yaml"
    command = compose()
    if file.exists() and command is not None:
        down = [*command, "-f", str(file), "down", "--timeout", str(GRACE)]
        with waiting("the containers to stop"):
            subprocess.run(down, capture_output=True, check=False)
        _docker("network", "rm", NETWORK)  # stays as long as another run uses it, whose end removes it


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


def _exists(image: str) -> bool:
    return _docker("image", "inspect", image).returncode == 0


def _docker(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = ["docker", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer in {timeout:.0f} s")


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))
