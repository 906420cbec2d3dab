"""The Docker engines that people have: rootless, Podman, from snap, on another machine; and what they say of a failure.

The answers of `docker info` and the logs are recorded; rootless Docker 28.5 and Podman 4.3 ran as an ordinary user.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import ROOT, config, project
from pipelines.cloud import doctor
from pipelines.cloud import images as image_push
from pipelines.cloud.account import Account
from pipelines.environment import find_uv
from pipelines.local import container, engine, images, sandbox
from pipelines.local.view import TrainingView
from pipelines.terminal import UserError
from tests import registry
from tests.cloud import STACK
from tests.helpers import verb_environment
from tests.programs import put_first

DOCKER = """ Security Options:
  seccomp
   Profile: builtin
%s Kernel Version: 6.18.44
 Operating System: %s
 Architecture: x86_64
 Name: gpu-box
 Docker Root Dir: %s
"""
INFO = {
    "docker": DOCKER % ("", "Debian GNU/Linux 12 (bookworm)", "/var/lib/docker"),
    "rootless": DOCKER % ("  rootless\n", "Debian GNU/Linux 12 (bookworm)", "/home/me/.local/share/docker"),
    "snap": DOCKER % ("", "Ubuntu Core 24", "/var/snap/docker/common/var-lib-docker"),
    "desktop": DOCKER % ("  cgroupns\n", "Docker Desktop", "/var/lib/docker"),
    "podman": "host:\n  arch: amd64\n  hostname: vm\n  security:\n    apparmorEnabled: false\n"
    "    capabilities: CAP_CHOWN,CAP_FOWNER\n    rootless: true\n    seccompEnabled: true\n",
    "podman as root": "host:\n  arch: amd64\n  security:\n    rootless: false\n",
    "nothing": "",
}
UNSEEN = 'Error response from daemon: invalid mount config for type "bind": bind source path does not exist: /home/me/x'


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called docker that notes its arguments, with INFO, and UNSEEN where it cannot mount."""
    script = (
        f'echo "$@" >> {tmp_path}/calls\ncase "$1 $2" in\n"info "*) echo "$INFO";;\n"import "*) echo sha256:0123;;\n'
        '"image inspect") exit 1;;\n'
        '"create "*) [ -z "$UNSEEN" ] || { echo "$UNSEEN" >&2; echo See --help >&2; exit 1; }; echo 4567;;\nesac\n'
    )
    put_first("docker", script, tmp_path, monkeypatch)
    for name in [*(name for name in os.environ if name.startswith("IMAGES__")), "INFO", "UNSEEN"]:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "calls").touch()
    return tmp_path / "calls"


@pytest.mark.parametrize(
    ("kind", "system", "owner"),
    [("docker", "linux", "1000:1000"), ("snap", "linux", "1000:1000"), ("podman as root", "linux", "1000:1000"),
     ("nothing", "linux", "1000:1000"), ("rootless", "linux", "0:0"), ("podman", "linux", "0:0"),
     ("desktop", "linux", "0:0"), ("desktop", "darwin", "1000:1000")],
)  # fmt: skip
def test_files_are_the_callers_whatever_the_engine_calls_them(
    docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, system: str, owner: str
) -> None:
    """In a rootless engine root is the caller, and user 1000 is somebody whose files the caller cannot remove."""
    monkeypatch.setenv("INFO", INFO[kind])
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setattr(os, "getgid", lambda: 1000)
    monkeypatch.setattr(sys, "platform", system)
    assert sandbox.container("serve")[-2:] == ["--user", owner]
    engine.give_back("image", tmp_path / "bin", tmp_path / "nowhere")
    given = [line for line in docker.read_text().splitlines() if line.startswith("run ")]
    volume = f"run --rm --volume {tmp_path}/bin:/given-back --entrypoint chown image -R {owner} /given-back"
    assert given == ([volume] if system == "linux" else [])


@pytest.mark.parametrize("hidden", [False, True])
def test_docker_from_snap_sees_no_hidden_folder_in_the_home(
    docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: bool
) -> None:
    monkeypatch.setenv("INFO", INFO["snap" if hidden else "docker"])
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(container, "ROOT", tmp_path / "project")
    place = tmp_path / "project" / ".cache" if hidden else tmp_path / ".cache"
    assert container.cache() == place / "torch" / "hub" / "checkpoints"
    assert docker.exists()


def test_the_context_of_a_build_is_in_the_project(docker: Path) -> None:
    """Docker from snap has a folder /tmp of its own."""
    images.build(config.load([]), "serving")
    context = docker.read_text().split()[-1]
    assert context.startswith(f"{ROOT}/.cache/tmp")
    assert not Path(context).exists()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine answers, and there is compose."""
    monkeypatch.setattr(engine, "check", lambda: None)
    monkeypatch.setattr(images, "check", lambda: None)
    monkeypatch.setattr(images, "build", lambda *_, **__: pytest.fail("an image is built that cannot be used"))


@pytest.mark.usefixtures("asked")
def test_an_engine_that_does_not_see_the_project_is_one_sentence(
    docker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("INFO", INFO["docker"])
    monkeypatch.setenv("UNSEEN", UNSEEN)
    words = "the Docker engine gpu-box does not see this project's files"
    assert images.choose(config.load(["compute.local_mode=auto"]), "training") is None
    assert f"training as a process on this machine: {words} ({UNSEEN}): use one of" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"{words} .*; or go without containers: LOCAL_MODE=process"):
        images.choose(config.load(["compute.local_mode=container"]), "serving")
    with pytest.raises(UserError, match=f"an artifact is code: .* but {words}"):
        sandbox.image(tmp_path / "model.tar.gz", False, config.load(["compute.local_mode=auto"]))
    told = [line for line in doctor.here() if words in line.fix]
    assert [(line.level, line.text) for line in told] == [("warn", "no containers: local verbs run as processes")]
    asked = [line for line in docker.read_text().splitlines() if line.startswith("create ")]
    folder = asked[0].partition("source=")[2].partition('"')[0]
    assert asked[0] == f'create --mount type=bind,"source={folder}","target=/seen" sha256:0123 true'
    assert Path(folder).parent == ROOT / ".cache"
    assert not Path(folder).exists()


def test_an_engine_that_sees_it_keeps_nothing_of_the_question(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.check_sees()
    assert [line.split()[0] for line in docker.read_text().splitlines()] == ["import", "create", "rm", "image"]
    assert docker.read_text().endswith("rm 4567\nimage rm sha256:0123\n")
    monkeypatch.setenv("PATH", f"{docker.parent}/nowhere:/bin")
    (docker.parent / "nowhere").mkdir()
    (docker.parent / "nowhere" / "docker").write_text("#!/bin/sh\necho no image can be made >&2; exit 1\n")
    (docker.parent / "nowhere" / "docker").chmod(0o755)
    engine.check_sees()  # that has other reasons, which are said where they matter


@pytest.mark.container
def test_a_real_engine_that_does_not_see_the_project(image: str, tmp_path: Path) -> None:
    """In a mount namespace of its own the project has files that the engine, outside of it, has not."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("this user cannot make a mount namespace")
    engine.check_sees()
    hide = 'mount -t tmpfs none "$0" && exec "$@"'
    program = "import sys; from pathlib import Path; from pipelines.local import engine; "
    program += "engine.ROOT = Path(sys.argv[1]); engine.check_sees()"
    command = ["unshare", "--mount", "sh", "-c", hide, str(tmp_path), sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=verb_environment(), capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "does not see this project's files (" in last
    assert f"bind source path does not exist: {tmp_path}/.cache/engine-" in last
    assert image


PIP = """Looking in links: /wheels
ERROR: Could not find a version that satisfies the requirement numpy==99 (from versions: 2.3.0, 2.4.6)
ERROR: No matching distribution found for numpy==99
"""
TLS = """WARNING: Retrying (Retry(total=0, connect=None, read=None, redirect=None)) after connection broken by \
'SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed \
certificate in certificate chain (_ssl.c:992)'))': /simple/numpy/
Could not fetch URL /simple/numpy/: There was a problem confirming the ssl certificate: HTTPSConnectionPool - skipping
ERROR: Could not find a version that satisfies the requirement numpy (from versions: none)
ERROR: No matching distribution found for numpy
"""
UV = """error: No solution found when resolving dependencies:
  ╰─▶ Because only numpy<=2.5.5 is available and you require numpy==99, we can conclude that your requirements fail.
"""
OLD = "\x1b[91m{}\x1b[0mThe command '/bin/sh -c sh /opt/build/install.sh cpu numpy==99' returned a non-zero code: 1\n"
BUILDKIT = """#7 [training 1/2] RUN sh /opt/build/install.sh cpu numpy==99
{}#7 ERROR: process "/bin/sh -c sh /opt/build/install.sh cpu numpy==99" did not complete successfully: exit code: 1
------
 > [training 1/2] RUN sh /opt/build/install.sh cpu numpy==99:
------
Dockerfile:25
--------------------
  25 | >>> RUN sh /opt/build/install.sh "${{TORCH}}" ${{PACKAGES}}
--------------------
ERROR: failed to build: failed to solve: process "/bin/sh -c sh /opt/build/install.sh cpu numpy==99" did not complete \
successfully: exit code: 1
"""


@pytest.mark.parametrize("builder", [OLD, BUILDKIT])
@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (PIP, "ERROR: No matching distribution found for numpy==99"),
        (TLS, "ERROR: No matching distribution found for numpy; SSLError(SSLCertVerificationError(1, '[SSL: "
              "CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate in certificate chain "
              "(_ssl.c:992)'))"),
        (UV, "╰─▶ Because only numpy<=2.5.5 is available and you require numpy==99, we can conclude that your "
             "requirements fail."),
        ("error: Failed to fetch: `/simple/numpy/`\n", "error: Failed to fetch: `/simple/numpy/`"),
        ("E: Unable to locate package libgl1\n", "E: Unable to locate package libgl1"),
        ("/opt/build/install.sh: 9: python3: not found\n", "/opt/build/install.sh: 9: python3: not found"),
        ("Downloading torch (530 MB)\nKilled\n", "Killed"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n\n",
         "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n",
         "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE."),
    ],
)  # fmt: skip
def test_a_build_that_failed_says_why(builder: str, said: str, reason: str) -> None:
    """With what pip or uv said, not that docker saw an exit code."""
    number = "#7 12.34 " if builder is BUILDKIT else ""
    assert images.why(builder.format("".join(f"{number}{line}\n" for line in said.splitlines()))) == reason


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", "no message"),
        ("Sending build context\npull access denied for nowhere.invalid/none, repository does not exist\n",
         "pull access denied for nowhere.invalid/none, repository does not exist"),
        ("#2 ERROR: failed to do request: Head: dial tcp: lookup nowhere.invalid: no such host\n------\n"
         "ERROR: failed to build: failed to solve: nowhere.invalid/none: failed to resolve source metadata\n",
         "ERROR: failed to do request: Head: dial tcp: lookup nowhere.invalid: no such host"),
    ],
)  # fmt: skip
def test_where_no_program_spoke_the_builder_does(log: str, reason: str) -> None:
    assert images.why(log) == reason


STARTED = " Network sagemaker-local  Created\n Container x-algo-1-1  Created\nAttaching to algo-1\n"
ENDED = "algo-1 exited with code {}\nAborting on container exit...\n Container x-algo-1-1  Stopping\n"
ENDED += " Container x-algo-1-1  Stopped\n"


@pytest.mark.parametrize(
    ("lines", "code", "reason"),
    [
        ("algo-1  | ModuleNotFoundError: No module named 'nonexistent'\nalgo-1  | Command failed with exit code 1\n", 1,
         "ModuleNotFoundError: No module named 'nonexistent'"),
        ("algo-1-1  | epoch=1 step=7 val_loss=0.1\n", 137,
         "epoch=1 step=7 val_loss=0.1 (algo-1 exited with code 137)"),
        ("algo-1_1  | exec: python3: not found\n", 127, "exec: python3: not found"),
        ('Error response from daemon: could not select device driver "nvidia"\n', None,
         'Error response from daemon: could not select device driver "nvidia"'),
    ],
)  # fmt: skip
def test_the_reason_is_the_containers_own_last_word(tmp_path: Path, lines: str, code: int | None, reason: str) -> None:
    """Not compose's that it is stopped."""
    with closing(TrainingView(tmp_path / "log", True, output=io.StringIO())) as view:
        view.write(STARTED + lines + (ENDED.format(code) if code else ""))
        assert view.last_line == reason


PACKAGES = {"torch": "2.13.0", "torchvision": "0.28.0", "numpy": "2.4.0", "pillow": "13.0", "safetensors": "0.6.0",
            "nvidia-cublas": "13.4", "starlette": "1.0", "uvicorn": "0.35.0"}  # fmt: skip
NEEDS = {"torch": ["nvidia-cublas"], "torchvision": ["torch", "numpy", "pillow"]}


def wheel(folder: Path, name: str, version: str) -> None:
    """A package of one module, which says its version."""
    plain = name.replace("-", "_")
    about = f"{plain}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {other}\n" for other in NEEDS.get(name, []))
    files = {
        f"{plain}.py": f"__version__ = {version!r}\n",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{about}/RECORD"] = "".join(f"{each},,\n" for each in files) + f"{about}/RECORD,,\n"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{plain}-{version}-py3-none-any.whl", "w") as archive:
        for each, text in files.items():
            archive.writestr(each, text)


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose `uv.lock` knows the packages of `PACKAGES`; gives the folder of their wheels."""
    for name in [name for name in os.environ if name.startswith("IMAGES__PACKAGES")]:
        monkeypatch.delenv(name)
    root, wheels = tmp_path / "locked", tmp_path / "wheels"
    root.mkdir()
    for name, version in PACKAGES.items():
        wheel(wheels, name, version)
    groups = {name: project.group(name) for name in ("container", "serving")}
    lines = "".join(f"{name} = {words}\n" for name, words in groups.items())
    (root / "pyproject.toml").write_text(
        f'[project]\nname = "x"\nversion = "0"\nrequires-python = ">=3.11"\n[dependency-groups]\n{lines}'
        f"[tool.uv]\npackage = false\nno-index = true\nfind-links = [{str(wheels)!r}]\n"
    )
    monkeypatch.setattr(images, "ROOT", root)
    monkeypatch.setattr(images, "LOCK", root / "uv.lock")
    monkeypatch.setattr(images, "BUILD_LOG", root / ".cache" / "build.log")
    uv = find_uv(ROOT / ".venv")
    subprocess.run([uv, "lock", "--quiet", "--offline", "--python", sys.executable], cwd=root, check=True)
    text = images.LOCK.read_text()  # in which an index of the machine's own has no hashes
    for file in wheels.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        text = text.replace(f'{file.name}" }}', f'{file.name}", hash = "sha256:{digest}" }}')
    images.LOCK.write_text(text)
    wheel(wheels, "numpy", "2.9.0")  # newer than the lock
    return wheels


def test_all_but_torch_comes_from_the_lock_with_hashes(
    locked: Path, docker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert locked.exists()
    settings = config.load(["images.torch=cpu"])
    contexts: list[str] = []
    run = subprocess.run

    def noted(command: list[str], *words: object, **more: object) -> object:
        if command[:2] == ["docker", "build"]:
            contexts.append(Path(command[-1], "locked.txt").read_text())
        return run(command, *words, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", noted)
    for target, argument, more in (("training", "PACKAGES", {}), ("serving", "SERVING", {"starlette", "uvicorn"})):
        images.build(settings, target)  # type: ignore[arg-type]
        built = [line for line in docker.read_text().splitlines() if line.startswith("build ")][-1]
        assert "--build-arg TORCH=cpu " in built
        assert f" --build-arg {argument}=torch==2.13.0" in built
        assert "numpy" not in built
        entries = contexts[-1].replace("\\\n", "").splitlines()
        names = {line.partition("==")[0] for line in entries}
        assert names == {"numpy", "pillow", "safetensors", *more}  # nothing that only one build of torch needs
        assert all("--hash=sha256:" in line for line in entries)
        assert "numpy==2.4.0 " in contexts[-1]
    names = {images.image_name(settings, "training")}
    lock = images.LOCK.read_text()
    digest = lock.partition('hash = "sha256:')[2][:64]
    images.LOCK.write_text(lock.replace(digest, "0" * 64))
    names.add(images.image_name(settings, "training"))
    images.LOCK.unlink()
    names.add(images.image_name(settings, "training"))
    assert len(names) == 3, "the name has a hash of all that goes in"
    assert images.locked(settings, "training") == ""
    assert images.packages(settings, "training") == project.group("container")


def test_a_list_of_packages_is_as_it_is_beside_a_lock(locked: Path) -> None:
    listed = config.load(["images.packages=[torch, numpy]"])
    assert images.packages(listed, "training") == ["torch", "numpy"]
    assert images.locked(listed, "training") == ""
    assert locked.exists()


def test_a_lock_that_does_not_fit_is_one_sentence(locked: Path) -> None:
    file = images.LOCK.with_name("pyproject.toml")
    file.write_text(file.read_text().replace("serving = [", 'serving = ["httptools", '))
    with pytest.raises(UserError, match=r"uv.lock does not fit pyproject.toml \(.*httptools.*\); `uv lock` renews it"):
        images.image_name(config.load([]), "serving")
    assert locked.exists()


@pytest.mark.container
def test_an_image_holds_what_the_lock_says(image: str, locked: Path, tmp_path: Path) -> None:
    """Built for real: with wheels in the base image, and no index."""
    base = f"{project.name()}:test-base-{os.getpid()}"
    context = tmp_path / "base"
    shutil.copytree(locked, context / "wheels")
    (context / "Dockerfile").write_text(
        f"FROM {config.load().images.base}\nCOPY wheels /locked/\n"
        "RUN printf '[global]\\nno-index = true\\nfind-links = /locked\\n' > /etc/pip.conf\n"
    )
    settings = config.load([f"images.base={base}"])
    made: list[str] = [base]
    try:
        words = ["docker", "build", *settings.images.build_options, "--tag", base, str(context)]
        subprocess.run(words, check=True, capture_output=True)
        made.append(images.build(settings, "training"))
        show = "import numpy, torch, torchvision, sys; print(*(sys.modules[n].__version__ for n in sys.argv[1:]))"
        words = ["docker", "run", "--rm", made[-1], "python3", "-c", show, "numpy", "torch", "torchvision"]
        said = subprocess.run(words, capture_output=True, text=True)
        assert said.stdout.split() == ["2.4.0", "2.13.0", "0.28.0"], said.stderr
        lock = images.LOCK.read_text()
        entry = lock[lock.index('name = "numpy"') :]
        digest = entry.partition('hash = "sha256:')[2][:64]
        images.LOCK.write_text(lock.replace(digest, "0" * 64))
        with pytest.raises(engine.EngineError, match=r"could not be built \(.*(HASH|numpy)"):
            images.build(settings, "training")
    finally:
        for name in reversed(made):
            subprocess.run(["docker", "image", "rm", name], capture_output=True)
    assert image


@pytest.mark.container
@pytest.mark.parametrize("attested", [False, True])
def test_what_this_docker_pushes_is_what_sagemaker_takes(
    image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attested: bool
) -> None:
    """Whatever Docker it is, an image that another one built included: Docker's own manifest of one image."""
    recipe = tmp_path / "Dockerfile"
    recipe.write_text('FROM scratch AS training\nARG BASE_IMAGE\nCOPY Dockerfile /\nCMD ["train"]\n')
    monkeypatch.setattr(images, "RECIPE", [recipe])
    settings = config.load([])
    if attested:
        monkeypatch.setattr(images, "PLAIN", {"BUILDX_NO_DEFAULT_ATTESTATIONS": "0"})
    name = images.build(settings, "training", name=f"{project.name()}:test-push-{os.getpid()}")
    monkeypatch.setattr(images, "image_for", lambda *_: name)
    remote = ""
    try:
        with registry.running() as (address, there):
            monkeypatch.setattr(Account, "client", lambda *_: there)
            account = Account(settings, replace(STACK, repository=f"{address}/repository"))
            remote = image_push.uri(account, "training")
            image_push.push(account, "training")
            kind = there.manifests[there.tags[remote.rpartition(":")[2]]][0]
            kinds = {each for each, _ in there.manifests.values()}
            containerd = "containerd.snapshotter" in engine.docker("info").stdout
            assert image_push.present(account, remote)
    finally:
        listed = engine.docker("images", "--format", "{{.Repository}}:{{.Tag}}").stdout.split()
        for each in (name, *(tag for tag in listed if remote and tag.startswith(remote))):
            engine.docker("image", "rm", each)
    assert kind == image_push.TAKEN
    assert ("application/vnd.oci.image.index.v1+json" in kinds) == (containerd and attested)
    assert image
