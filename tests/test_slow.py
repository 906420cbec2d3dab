"""What is too long for CI, for `make test-slow`; every pair of options is in test_bake.py."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import (
    FAMILIES,
    FAULTS,
    FUZZING,
    NO_ENGINE,
    TEMPLATE,
    Bake,
    Project,
    add_tests,
    fresh_shell,
    run_tests,
)
from tests.photos import INSECTS, SHAPES, store_insects

pytestmark = pytest.mark.slow


def test_thousands_of_random_requests(bake: Bake, ready: Project) -> None:
    """For 20 minutes: half of them requests to a server, half of them pictures and bodies that are damaged."""
    project = bake(scope="full")
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    assert FUZZING in add_tests(project)
    seed = os.environ.get("FUZZ_SEED", str(random.SystemRandom().randrange(2**30)))  # a failure names its own
    run_tests(project, FUZZING, FUZZ_MINUTES=os.environ.get("FUZZ_MINUTES", "10"), FUZZ_SEED=seed, **NO_ENGINE)


@pytest.mark.parametrize("scope", ["local", "cloud", "full"])
def test_the_lowest_versions(scope: str, bake: Bake) -> None:
    """Of every package that the project names, torch too: an environment of its own."""
    project = bake(scope=scope)
    project.make("setup", "ARGS=--resolution lowest-direct --upgrade")
    done = project.run(project.program("python"), "-c", "import torch; print(torch.__version__)")
    assert done.stdout.startswith("2.10."), done.stdout + done.stderr
    run_tests(project, **NO_ENGINE)
    if scope == "local":  # launching, resuming and what is for GPUs: `make test` tries it with the newest torch
        for name in ("test_faults.py", "test_gpu.py", "test_loop.py"):
            shutil.copy(TEMPLATE / "tests" / "in_project" / name, project.path / "tests")
        run_tests(project, FAULTS, "tests/test_gpu.py", "tests/test_loop.py", **NO_ENGINE)


def test_every_family_of_models(bake: Bake) -> None:
    """From a name to an answer; with timm, so in an environment of its own."""
    project = bake(scope="local")
    project.make("setup")
    project.make("setup", "ARGS=--group timm")
    for name in ("test_families.py", "test_models.py"):
        shutil.copy(TEMPLATE / "tests" / "in_project" / name, project.path / "tests")
    run_tests(project, FAMILIES, **NO_ENGINE)


def test_few_photos_begin_with_weights_or_say_that_they_are_too_few(ready: Project, tmp_path: Path) -> None:
    """200 photos of two kinds that differ little, as in the tutorials' ants and bees."""
    store_insects(tmp_path / "shapes", SHAPES, 200, (5, 25))
    store_insects(tmp_path / "insects", INSECTS, 100, (10, 25))

    def train(photos: str, *settings: str) -> tuple[str, float]:
        chosen = ("training.model=resnet18", "training.image_size=112", "training.precision=fp32", *settings)
        words = " ".join(f"--set {each}" for each in chosen)
        done = ready.make("train-local", f"DATA={tmp_path / photos}", "LOCAL_MODE=process", f"ARGS={words}")
        metrics = json.loads((ready.path / "artifacts" / "latest" / "metrics.json").read_text())
        assert metrics["majority"] < 0.51
        return done.stdout, metrics["val_accuracy"]

    train("shapes", "training.epochs=8", "training.learning_rate=0.003", "training.translate=0")
    with tarfile.open(ready.path / "artifacts" / "latest" / "model.tar.gz") as tar:
        tar.extract("model.safetensors", tmp_path, filter="data")
    said, accuracy = train("insects", f"data.pretrained={tmp_path / 'model.safetensors'}")
    assert accuracy > 0.75
    assert "warning: The accuracy of" not in said
    said, accuracy = train("insects")
    assert accuracy < 0.75
    assert "begin with pretrained weights (data.pretrained)" in said


def test_aws_s_own_clients(bake: Bake, ready: Project, tmp_path: Path) -> None:
    """Against what `make serve-local` starts: the CLI as PyPI has it, and JavaScript's SDK as npm does."""
    subprocess.run(["npm", "install", "--silent", "@aws-sdk/client-sagemaker-runtime"], cwd=tmp_path, check=True)
    subprocess.run(["uv", "venv", "--quiet", "cli"], cwd=tmp_path, check=True)
    subprocess.run(["uv", "pip", "install", "--quiet", "--python", "cli", "awscli"], cwd=tmp_path, check=True)
    project = bake(scope="full")
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    add_tests(project)
    clients = {"JAVASCRIPT_SDK": str(tmp_path), "CLI_OF_AWS": str(tmp_path / "cli" / "bin" / "aws")}
    run_tests(project, "tests/test_clients.py", **clients, **NO_ENGINE)


def test_a_soak(tmp_path: Path) -> None:
    """Two minutes with as many clients as would hold the server: answers and 503, and level memory."""
    command = [
        str(TEMPLATE / ".venv" / "bin" / "python"),
        "benchmarks/serve.py",
        "--soak",
        "2",
        "--into",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=TEMPLATE, env=fresh_shell(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr


CURRENT = ("docker.io", "docker-cli", "containerd", "docker-buildx", "docker-compose")  # in Debian's newest
# The sizes of what the image of a target holds of torch itself, and of everything; in MB.
SIZES = """
import importlib.metadata, pathlib, re
import torch
size = 0
for each in importlib.metadata.distributions():
    if re.fullmatch("torch|triton|(nvidia|cuda)-.*", each.metadata["Name"]):
        size += sum(file.locate().stat().st_size for file in each.files or [] if file.locate().is_file())
print(size // 10**6, torch.__version__)
"""


@pytest.fixture(scope="module")
def current_engine() -> Iterator[dict[str, str]]:
    """A current Docker Engine with containerd's store, unpacked beside the machine's own, on a socket of its own.

    It leaves the machine's network as it is: a bridge of its own, no rules. Gives what makes it the engine.
    """
    base = os.environ.get("IMAGES__BASE", "")
    if os.geteuid() or not base or not all(map(shutil.which, ("apt-get", "dpkg", "ip", "runc"))):
        pytest.skip("needs Debian's root, and IMAGES__BASE as .ci/run makes it")
    bridge = f"docker{os.getpid() % 10000}"
    machine = {name: value for name, value in os.environ.items() if name != "DOCKER_HOST"}
    with tempfile.TemporaryDirectory(prefix="engine-") as name:  # a socket's path is short
        folder = Path(name)
        bins = unpack(folder)
        environment = {
            "DOCKER_HOST": f"unix://{folder}/socket",
            "DOCKER_CONFIG": str(folder),
            "REQUIRE_CONTAINERS": "1",
        }
        environment["PATH"] = f"{bins}:{folder}/root/usr/sbin:{os.environ['PATH']}"
        for words in (["add", bridge, "type", "bridge"], ["set", bridge, "up"]):
            subprocess.run(["ip", "link", *words], check=True)
        subprocess.run(["ip", "address", "add", "10.211.0.1/24", "dev", bridge], check=True)
        command = ["dockerd", "--host", environment["DOCKER_HOST"], "--data-root", f"{folder}/data", "--exec-root"]
        command += [f"{folder}/exec", "--pidfile", f"{folder}/pid", "--bridge", bridge, "--iptables=false"]
        command += ["--ip6tables=false", "--ip-masq=false", "--feature", "containerd-snapshotter=true"]
        command += ["--default-address-pool", "base=10.212.0.0/16,size=24"]
        with (folder / "log").open("w") as log:
            engine = subprocess.Popen(command, env=machine | environment, stdout=log, stderr=log)
        try:
            version = ["docker", "version", "--format", "{{.Server.Version}}"]
            for _ in range(60):
                asked = subprocess.run(version, env=machine | environment, capture_output=True, text=True)
                if asked.returncode == 0:
                    break
                time.sleep(1)
            assert int(asked.stdout.split(".")[0] or 0) >= 28, (folder / "log").read_text()[-2000:]
            with subprocess.Popen(["docker", "save", base], env=machine, stdout=subprocess.PIPE) as saved:
                subprocess.run(["docker", "load"], env=machine | environment, stdin=saved.stdout, check=True)
            assert saved.returncode == 0
            yield environment
        finally:
            engine.terminate()
            engine.wait(60)
            subprocess.run(["ip", "link", "delete", bridge])


def unpack(folder: Path) -> Path:
    """Fetch Debian's newest packages with apt, which leaves what is installed as it is; gives the programs' folder."""
    listed = [path.read_text() for path in Path("/etc/apt").rglob("*") if path.suffix in (".list", ".sources")]
    mirror = re.findall(r"(?m)^(?:URIs:|deb) .*?(http\S+/debian)/?(?:\s|$)", "\n".join(listed))[0]
    for part in ("lists/partial", "cache/archives/partial", "packages", "root"):
        (folder / part).mkdir(parents=True)
    (folder / "status").touch()
    (folder / "sources.list").write_text(
        f"deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {mirror} sid main\n"
    )
    (folder / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{folder}/sources.list";\nDir::Etc::sourceparts "-";\n'
        f'Dir::State::lists "{folder}/lists";\nDir::State::status "{folder}/status";\nDir::Cache "{folder}/cache";\n'
        'APT::Sandbox::User "root";\n'
    )
    apt = {"env": os.environ | {"APT_CONFIG": str(folder / "apt.conf")}, "cwd": folder / "packages", "check": True}
    subprocess.run(["apt-get", "update", "-qq"], **apt)  # type: ignore[call-overload]
    subprocess.run(["apt-get", "download", "-qq", *CURRENT], **apt)  # type: ignore[call-overload]
    for package in (folder / "packages").glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(folder / "root")], check=True)
    plugins = {"cliPluginsExtraDirs": [f"{folder}/root/usr/libexec/docker/cli-plugins"]}
    (folder / "config.json").write_text(json.dumps(plugins))
    return folder / "root" / "usr" / "bin"


def test_a_current_docker(bake: Bake, ready: Project, current_engine: dict[str, str]) -> None:
    """A job and a server in its containers, and what it pushes, images with BuildKit's attestations too."""
    project = bake(scope="full")
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    add_tests(project)
    names = ["tests/test_containers.py", "tests/test_serve_local.py", "tests/test_engines.py"]
    wanted = "same_contract or stop_leaves_nothing or pushes or lock_says or real_engine"
    run_tests(project, *names, "-m", "container", "-k", wanted, **current_engine)


def test_the_default_build(bake: Bake, ready: Project, current_engine: dict[str, str]) -> None:
    """As `make image` builds without any setting, on this machine's base; the sizes are for docs/setup.md."""
    project = bake()
    (project.path / ".venv").symlink_to(ready.path / ".venv")
    environment = current_engine | {"IMAGES__PACKAGES": "auto"}
    done = project.make("image", **environment)
    print(done.stdout)
    names = [line.partition(",")[0] for line in done.stdout.splitlines() if line.endswith(" GB")]
    assert len(names) == 2

    def inside(image: str, *command: str) -> str:
        words = ["docker", "run", "--rm", "--network", "none", "--entrypoint", command[0], image, *command[1:]]
        said = project.run(*words, **environment)
        assert said.returncode == 0, said.stderr
        return said.stdout

    def everything(image: str) -> int:
        return int(inside(image, "du", "--summarize", "--one-file-system", "--block-size=MB", "/").split("MB")[0])

    base = everything(os.environ["IMAGES__BASE"])
    for name in names:
        torch, version = inside(name, "python3", "-c", SIZES).split()
        more = everything(name) - base - int(torch)
        print(f"{name}: torch {version} {torch} MB, {more} MB above it and the base image of {base} MB")
        if ":serving-" in name:
            assert more <= 500
            assert version.endswith("+cpu") is ("cannot be had here" not in done.stdout)
