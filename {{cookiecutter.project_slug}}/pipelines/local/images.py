"""The project's images, to train in and to serve from: found, built when stale, and chosen: `make image`.

python -m pipelines image --pull --no-cache        # other options are handed to `docker build`
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pipelines import ROOT, SOURCE, project, terminal
from pipelines.config import Settings, load
from pipelines.environment import certificates
from pipelines.local.engine import EngineError, check, check_alone, docker
from pipelines.terminal import UserError
from progress import waiting

Target = Literal["training", "serving"]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
SERVER = [SOURCE / "inference" / name for name in ("serve.py", "batcher.py", "connections.py")]
BUILD_LOG = ROOT / ".cache" / "image-build.log"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # `docker info` says one, an image the other
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


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


def image(settings: Settings, target: Target) -> str:
    """The image for a target: built when it is the project's own and missing or stale, pulled when it is another one.

    Raises:
        EngineError: when it can be neither found nor made.
    """
    name: str = getattr(settings.images, target)
    if name == "project":
        name = image_name(settings, target)
        if not exists(name):
            build(settings, target)
    elif not exists(name):
        print(f"pulling {name}", flush=True)
        if subprocess.run(["docker", "pull", name]).returncode:
            raise EngineError(f"image {name} is not here and cannot be pulled (see above); check images.{target}")
    return name


def image_name(settings: Settings, target: Target) -> str:
    """`<project>:<target>-<hash>`: the hash covers all that goes into it, so a stale image has another name."""
    recipe = [DOCKERFILE.read_text(encoding="utf-8"), settings.images.base, *packages(settings)]
    if target == "serving":
        recipe += [*project.group("serving"), *(file.read_text(encoding="utf-8") for file in SERVER)]
    return f"{project.name()}:{target}-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]}"


def base_digest(settings: Settings) -> str | None:
    """The base image by digest, which never becomes another one; None where the engine has it from no registry."""
    found = docker("image", "inspect", settings.images.base)
    facts = json.loads(found.stdout or "[]") if found.returncode == 0 else []
    return next(iter(facts[0].get("RepoDigests") or []), None) if facts else None


def packages(settings: Settings) -> list[str]:
    """What pip installs to train: the project.group `container` of pyproject.toml unless the settings say otherwise."""
    return project.group("container") if settings.images.packages == "auto" else settings.images.packages


def image_for(settings: Settings, target: Target, architecture: str) -> str:
    """The project's image for a kind of processor, under a name of its own where this machine's are others (a Mac's).

    Raises:
        EngineError: when it can be neither found nor made.
    """
    found = re.search(r"(?m)^\s*Architecture:\s*(\S+)", docker("info").stdout)
    if found is None or ARCHITECTURES.get(found[1], found[1]) == architecture:
        return image(settings, target)
    name = f"{image_name(settings, target)}-{architecture}"
    if not exists(name):
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
    command += ["--build-arg", f"SERVING={' '.join(project.group('serving'))}"]
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


def exists(image: str) -> bool:
    """Whether the engine has an image."""
    return docker("image", "inspect", image).returncode == 0


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Build the project's images; other options are handed to `docker build`.", settings=True)
    options, more = parser.parse_known_args()
    try:
        check()
        settings = load(options.set)
        print(build(settings, "training", more))
        more = [word for word in more if word != "--no-cache"]  # it rests on the one that was just built
        print(build(settings, "serving", more))
        digest = base_digest(settings)
        if digest and "@" not in settings.images.base:
            print(f"the base image was {digest}: as images.base in configs/infrastructure.yaml it stays that one")
    except EngineError as error:
        raise UserError(str(error)) from error
    return 0
