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
from typing import Any, Literal

from pipelines import ROOT, SOURCE, project, terminal
from pipelines.config import Settings, load
from pipelines.environment import certificates, find_uv, locked_versions
from pipelines.local.engine import EngineError, about, check, check_alone, check_sees, container_gpus, docker
from pipelines.terminal import UserError
from progress import waiting

Target = Literal["training", "serving"]
TARGETS: tuple[Target, ...] = ("training", "serving")
RECIPE = [ROOT / "docker" / name for name in ("Dockerfile", "install.sh")]
ARGUMENTS = {"training": "PACKAGES", "serving": "SERVING"}  # of the Dockerfile, with what a target's image holds
SERVER = [SOURCE / "inference" / name for name in ("serve.py", "batcher.py", "connections.py")]
# PyTorch's build with CUDA 12.8 runs on every driver since 525 by CUDA's compatibility of minor versions, and has code
# for SageMaker's GPUs from T4 on: https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
CUDA = "cu128"
OTHER_BUILD = re.compile(r"torch's build \S+ cannot be had here, so it is PyPI's")
LOCK = ROOT / "uv.lock"
TORCH = ("torch", "torchvision")
EXTRA = re.compile(r"(?m)^#\d+ (\d+\.\d+ )?|\x1b\[[0-9;]*m")  # BuildKit's numbers, and colours of the builder before it
# Of pip, uv, apt and a shell; not the builder's own, that a command failed.
ERROR = re.compile(r"(?i)(error|fatal|e): (?!failed to (build|solve)|process)|╰─▶ |.*(: not found|^Killed)$")
BROKEN = re.compile(r"connection broken by '(.+)': /")
BUILD_LOG = ROOT / ".cache" / "image-build.log"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # `docker info` says one, an image the other
PLAIN = {"BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}  # which would make an index of an image: SageMaker takes none
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
        check_sees()
        if target == "training":
            check_alone(settings.compute.local_instances)
        return image(settings, target)
    except EngineError as error:
        if mode == "container":
            raise UserError(f"{error}; or go without containers: LOCAL_MODE=process") from error
        print(f"{target} as a process on this machine: {error}", flush=True)
        return None


def image(settings: Settings, target: Target, gpu: bool | None = None) -> str:
    """The image for a target: built when it is the project's own and missing or stale, pulled when it is another one.

    `gpu` says whether it will compute on one; None: where containers of this machine can.

    Raises:
        EngineError: when it can be neither found nor made.
    """
    name: str = getattr(settings.images, target)
    if name == "project":
        name = image_name(settings, target, gpu)
        if not exists(name):
            build(settings, target, gpu=gpu)
    elif not exists(name):
        print(f"pulling {name}", flush=True)
        if subprocess.run(["docker", "pull", name]).returncode:
            raise EngineError(f"image {name} is not here and cannot be pulled (see above); check images.{target}")
    return name


def image_name(settings: Settings, target: Target, gpu: bool | None = None) -> str:
    """`<project>:<target>-<hash>`: the hash covers all that goes into it, so a stale image has another name."""
    files = [*RECIPE, *(SERVER if target == "serving" else [])]
    recipe = [settings.images.base, torch_build(settings, gpu), *packages(settings, target)]
    recipe += [*filter(None, [locked(settings, target)])]
    recipe += [file.read_text(encoding="utf-8") for file in files]
    return f"{project.name()}:{target}-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]}"


def base_digest(settings: Settings) -> str | None:
    """The base image by digest, which never becomes another one; None where the engine has it from no registry."""
    return next(iter(inspected(settings.images.base).get("RepoDigests") or []), None)


def inspected(image: str) -> dict[str, Any]:
    """What the engine says of an image; nothing when it has none of that name."""
    found = docker("image", "inspect", image)
    facts: list[dict[str, Any]] = json.loads(found.stdout or "[]") if found.returncode == 0 else []
    return facts[0] if facts else {}


def packages(settings: Settings, target: Target) -> list[str]:
    """What is installed: the groups of pyproject.toml for the target, unless the settings say otherwise.

    With `uv.lock` these are torch and torchvision, in its versions; for the others see `locked`.
    """
    found = {name: project.group(name) for name in _groups(settings, target)}
    if settings.images.packages != "auto":
        found["container"] = settings.images.packages
    words = [word for group in found.values() for word in group]
    if not _follows_lock(settings):
        return words
    named = [name for name in TORCH if any(re.match(rf"{name}\b(?!-)", word) for word in words)]
    versions = locked_versions(LOCK)
    return [f"{name}=={versions[name].partition('+')[0]}" for name in named]


def locked(settings: Settings, target: Target) -> str:
    """What `uv.lock` says of all other packages, with their hashes, as pip reads it; nothing without one.

    What only one build of torch needs is left out, as in `.venv`: torch brings it.

    Raises:
        UserError: when it does not fit pyproject.toml.
    """
    if not _follows_lock(settings):
        return ""
    command = [find_uv(ROOT / ".venv"), "export", "--locked", "--offline", "--quiet", "--no-header", "--no-annotate"]
    command += [word for name in _groups(settings, target) for word in ("--only-group", name)]
    command += [word for name in sorted({*TORCH, *locked_versions(LOCK)}) for word in ("--no-emit-package", name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = " ".join(done.stderr.split("\n\n")[0].split())
        raise UserError(f"uv.lock does not fit pyproject.toml ({said}); `uv lock` renews it")
    return done.stdout


def _follows_lock(settings: Settings) -> bool:
    return settings.images.packages == "auto" and LOCK.is_file()


def _groups(settings: Settings, target: Target) -> list[str]:
    timm = ["timm"] if settings.training.model.startswith("timm/") else []
    return ["container", *timm, *(["serving"] if target == "serving" else [])]


def torch_build(settings: Settings, gpu: bool | None) -> str:
    """The build of torch, as uv calls it; empty where `images.packages` says itself what pip installs."""
    if settings.images.packages != "auto":
        return ""
    wanted = settings.images.torch
    if wanted == "auto":
        wanted = "cuda" if (container_gpus() if gpu is None else gpu) else "cpu"
    return CUDA if wanted == "cuda" else wanted


def image_for(settings: Settings, target: Target, architecture: str, gpu: bool) -> str:
    """The project's image for a kind of processor, under a name of its own where this machine's are others (a Mac's).

    Raises:
        EngineError: when it can be neither found nor made.
    """
    found = about("Architecture")
    if ARCHITECTURES.get(found, found) in ("", architecture):
        return image(settings, target, gpu)
    name = f"{image_name(settings, target, gpu)}-{architecture}"
    if not exists(name):
        build(settings, target, ["--platform", f"linux/{architecture}"], name, gpu)
    return name


def build(
    settings: Settings, target: Target, options: Sequence[str] = (), name: str | None = None, gpu: bool | None = None
) -> str:
    """Build an image of the project.

    Args:
        settings: base image, packages and options.
        target: the stage of the Dockerfile.
        options: more options of `docker build`.
        name: of the image; None: `image_name`.
        gpu: whether it will compute on one; None: where containers of this machine can.

    Returns:
        Its name.

    Raises:
        EngineError: with the line of the build's log that says why.
    """
    name = name or image_name(settings, target, gpu)
    print(
        f"building the image {name} from {settings.images.base} (some minutes; log: {_relative(BUILD_LOG)})", flush=True
    )
    BUILD_LOG.parent.mkdir(parents=True, exist_ok=True)
    command = ["docker", "build", "--force-rm", "--tag", name, "--target", target]
    command += ["--build-arg", f"BASE_IMAGE={settings.images.base}"]
    command += ["--build-arg", f"TORCH={torch_build(settings, gpu)}"]
    for stage, argument in ARGUMENTS.items():  # without BuildKit all stages are built, but only one is wanted
        words = packages(settings, target) if stage == target else []
        command += ["--build-arg", f"{argument}={' '.join(words)}"]
    command += [word for proxy in PROXIES if os.environ.get(proxy) for word in ("--build-arg", proxy)]
    command += [*settings.images.build_options, *options]
    # Docker from snap has a folder /tmp of its own, so the context is in the project.
    with BUILD_LOG.open("w", encoding="utf-8") as log, tempfile.TemporaryDirectory(dir=BUILD_LOG.parent) as context:
        for file in RECIPE:
            shutil.copy(file, context)
        Path(context, "inference").mkdir()
        for file in SERVER:
            shutil.copyfile(file, Path(context, "inference", file.name))
        bundle = certificates()
        if bundle:
            shutil.copyfile(bundle, Path(context, "ca.crt"))
        if text := locked(settings, target):
            Path(context, "locked.txt").write_text(text, encoding="utf-8")
        with waiting(f"`docker build`, whose log is {_relative(BUILD_LOG)}"):
            result = subprocess.run([*command, context], stdout=log, stderr=log, env=os.environ | PLAIN)
    text = BUILD_LOG.read_text(encoding="utf-8", errors="replace")
    if found := OTHER_BUILD.search(text):
        print(f"{found[0]}, which is made for GPUs and much larger on Linux", flush=True)
    if result.returncode:
        raise EngineError(f"the image could not be built ({why(text)}); the whole log is {_relative(BUILD_LOG)}")
    return name


def why(log: str) -> str:
    """The line of a build's log that says why it failed: the last error of a program in it, else the last line.

    Where no index answers, pip's last error is that it knows no such package, so what broke the connection is added.
    """
    lines = [*filter(None, (line.strip() for line in EXTRA.sub("", log).splitlines()))] or ["no message"]
    reason = ([line for line in lines if ERROR.match(line)] or lines)[-1]
    return "; ".join([reason, *(BROKEN.findall(log)[-1:] if "No matching distribution" in reason else [])])


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
        for target in TARGETS:
            name = build(settings, target, more)
            print(f"{name}, {inspected(name).get('Size', 0) / 1e9:.2f} GB")
        digest = base_digest(settings)
        if digest and "@" not in settings.images.base:
            print(f"the base image was {digest}: as images.base in configs/infrastructure.yaml it stays that one")
    except EngineError as error:
        raise UserError(str(error)) from error
    return 0
