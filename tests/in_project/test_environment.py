"""The machines that people have: proxies, old programs, busy ports, full disks, two runs at once."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import ROOT, config
from pipelines.local import engine, images
from tests.helpers import Verb, verb_environment

SHORT = ("--set", "training.epochs=2")
QUICK = ["images.packages=[--help]"]  # an image that takes a second and no network


@pytest.mark.container
@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", None])
def test_the_proxys_certificates_reach_the_image_build(
    image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    bundle = tmp_path / "company.pem"
    bundle.write_text("-----BEGIN CERTIFICATE-----\n")
    if variable:
        monkeypatch.setenv(variable, str(bundle))
    name = images.build(config.load(QUICK), "training")
    try:
        shown = subprocess.run(
            ["docker", "run", "--rm", name, "sh", "-c", "cat /opt/build/ca.crt"], capture_output=True, text=True
        )
        assert shown.stdout == (bundle.read_text() if variable else "")
    finally:
        subprocess.run(["docker", "image", "rm", name], capture_output=True, check=True)
    assert image


@pytest.mark.container
def test_proxies_are_handed_to_the_build(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:3128")
    name = images.build(config.load(QUICK), "training", ["--no-cache"])
    subprocess.run(["docker", "image", "rm", name], capture_output=True, check=True)
    history = subprocess.run(["docker", "history", "--no-trunc", image], capture_output=True, text=True).stdout
    assert "proxy.invalid" not in history  # not kept in an image
    recipe = images.BUILD_LOG.parent / "Dockerfile"
    monkeypatch.setattr(images, "RECIPE", [recipe])
    recipe.write_text("ARG BASE_IMAGE\nFROM ${BASE_IMAGE} AS training\nRUN echo proxy=$HTTPS_PROXY; false\n")
    try:
        with pytest.raises(engine.EngineError, match="could not be built"):
            images.build(config.load(QUICK), "training")
    finally:
        recipe.unlink()
    assert "proxy=http://proxy.invalid:3128" in images.BUILD_LOG.read_text()


@pytest.mark.container
@pytest.mark.parametrize(("version", "works"), [("1.29.2", True), ("1.27.0", True), ("1.25.5", False), ("", False)])
def test_an_old_compose_is_one_sentence(
    image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, works: bool
) -> None:
    docker = f'#!/bin/sh\n[ "$1" = compose ] && exit 1\nexec {shutil.which("docker")} "$@"\n'
    for name, text in (("docker", docker), ("docker-compose", f"#!/bin/sh\necho {version}\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if works:
        engine.check()
    else:
        with pytest.raises(engine.EngineError, match=r"is too old for the SDK's files; install 1.27 or newer"):
            engine.check()
    assert image


@pytest.mark.container
@pytest.mark.parametrize("sign", [":", "$"])
def test_a_path_that_compose_cannot_mount_is_one_sentence(
    image: str, monkeypatch: pytest.MonkeyPatch, sign: str
) -> None:
    monkeypatch.setattr(engine, "ROOT", Path(f"/home/me/a{sign}b"))
    with pytest.raises(engine.EngineError, match=r"which compose cannot mount; move the project"):
        engine.check()
    assert image


def test_a_busy_port_is_passed_over(verb: Verb, project: Path) -> None:
    with socket.socket() as busy:
        busy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        busy.bind(("127.0.0.1", 7777))
        busy.listen()
        trained = verb("train-local", "--mode", "process", "--instances", "2", *SHORT)
    assert trained.returncode == 0, trained.stderr
    assert json.loads((project / "artifacts" / "latest" / "metrics.json").read_text())["world_size"] == 2


def start(project: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines", "train-local", *arguments]
    environment = {**verb_environment(), "OMP_NUM_THREADS": "1"}  # two runs share the processor
    return subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("mode", ["process", pytest.param("container", marks=pytest.mark.container)])
def test_two_runs_at_the_same_time(project: Path, mode: str, request: pytest.FixtureRequest) -> None:
    """Both start with nothing: one packs the data set while the other waits for it."""
    if mode == "container":
        request.getfixturevalue("nothing_left")
    runs = [start(project, "--mode", mode, *SHORT) for _ in range(2)]
    for run in runs:
        text, _ = run.communicate(timeout=300)
        assert run.returncode == 0, text
    names = {path.name for path in (project / "artifacts").iterdir()} - {"latest"}
    assert len(names) == 2
    assert (project / "artifacts" / "latest").readlink().name in names
    assert not list((project / "data").glob(".*"))


@pytest.mark.container
def test_a_run_on_two_hosts_does_not_mix_with_another(verb: Verb, project: Path, nothing_left: str) -> None:
    other = start(project, "--mode", "container", "--set", "training.epochs=100000")
    assert other.stdout is not None
    for line in other.stdout:
        if line.startswith("epoch=1 "):
            break
    refused = verb("train-local", "--mode", "container", "--instances", "2", *SHORT)
    fallen_back = verb("train-local", "--instances", "2", *SHORT)
    other.terminate()
    other.communicate(timeout=60)
    assert refused.returncode == 1
    assert "another run trains in containers" in refused.stderr
    assert fallen_back.returncode == 0, fallen_back.stderr
    assert "training as a process on this machine: another run trains in containers" in fallen_back.stdout
    assert nothing_left


@pytest.mark.parametrize("mode", ["process", pytest.param("container", marks=pytest.mark.container)])
def test_a_nearly_full_disk(project: Path, mode: str, request: pytest.FixtureRequest) -> None:
    """With 100 MB left a run works; with none it says so in one sentence and publishes nothing."""
    if mode == "container":
        request.getfixturevalue("nothing_left")
    place = project.parent / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("this user cannot mount a file system")
    try:
        shutil.copytree(project, place / "project")
        command = [sys.executable, "-m", "pipelines", "train-local", "--mode", mode, *SHORT]
        words = {"cwd": place / "project", "env": verb_environment(), "capture_output": True, "text": True}
        trained = subprocess.run(command, timeout=300, **words)  # type: ignore[call-overload]
        assert trained.returncode == 0, trained.stdout + trained.stderr
        for room in (60_000, 0):
            ballast = place / "ballast"
            ballast.unlink(missing_ok=True)
            ballast.write_bytes(bytes(shutil.disk_usage(place).free - room))
            failed = subprocess.run(command, timeout=300, **words)  # type: ignore[call-overload]
            assert failed.returncode == 1, failed.stdout
            assert failed.stderr.startswith("error: ")
            assert "No space left on device" in failed.stderr.splitlines()[0]
            assert "Traceback" not in failed.stderr
            assert len(list((place / "project" / "artifacts").iterdir())) == 2
    finally:
        for _ in range(20):
            if subprocess.run(["umount", str(place)], capture_output=True).returncode == 0:
                break
            time.sleep(0.5)


TELEMETRY = """
import os, sys, tempfile
import pipelines
if sys.argv[1] == "on":
    os.environ["SAGEMAKER_USER_CONFIG_OVERRIDE"] = "/etc/xdg/sagemaker/config.yaml"
from sagemaker.core.telemetry import telemetry_logging
from sagemaker.core.training.configs import SourceCode
from sagemaker.train.model_trainer import Mode, ModelTrainer
sent = []
telemetry_logging._send_telemetry_request = lambda *request: sent.append(request)
with tempfile.TemporaryDirectory() as root:
    source = SourceCode(source_dir=str(pipelines.SOURCE), entry_script="training/train.py")
    trainer = ModelTrainer(
        training_mode=Mode.LOCAL_CONTAINER, training_image="none", source_code=source, local_container_root=root
    )
    trainer.train(dry_run=True)
print(len(sent))
"""


@pytest.mark.parametrize(("telemetry", "requests"), [("off", "0"), ("on", "1")])
def test_the_sdk_sends_no_telemetry(telemetry: str, requests: str) -> None:
    command = [sys.executable, "-c", TELEMETRY, telemetry]
    answer = subprocess.run(command, cwd=ROOT, env=verb_environment(), capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == requests
