"""What a container run needs, what it says when that is missing, and the contract that both modes keep."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest

from pipelines import config
from pipelines import project as project_names
from pipelines.local import container, images, process
from pipelines.local.job import Job
from pipelines.local.view import TrainingView
from tests.helpers import Verb
from tests.test_inference import artifact, photo
from tests.test_training_local import NO_ENGINE, SHORT, published, read

__all__ = ["artifact"]  # a fixture


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("docker", "the docker command is not installed"),
        pytest.param("compose", "Docker Compose is not installed", marks=pytest.mark.container),
        ("engine", "no Docker engine answers"),
        pytest.param(
            "image", "image nowhere.invalid/none:1 is not here and cannot be pulled", marks=pytest.mark.container
        ),
    ],
)
def test_what_a_container_lacks_is_one_sentence(
    verb: Verb, tmp_path: Path, missing: str, sentence: str, request: pytest.FixtureRequest
) -> None:
    environment: dict[str, str] = {}
    arguments = ["--mode", "container", *SHORT]
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("git", "env"):
        (programs / name).symlink_to(shutil.which(name) or name)
    if missing in ("docker", "compose"):
        environment["PATH"] = str(programs)
    if missing == "engine":
        environment |= NO_ENGINE
    if missing in ("compose", "image"):
        request.getfixturevalue("image")
    if missing == "compose":  # the real client, but for its plugin
        text = f'#!/bin/sh\n[ "$1" = compose ] && exit 1\nexec {shutil.which("docker")} "$@"\n'
        (programs / "docker").write_text(text)
        (programs / "docker").chmod(0o755)
        (programs / "sh").symlink_to("/bin/sh")
    if missing == "image":
        arguments += ["--set", "images.training=nowhere.invalid/none:1"]
    failed = verb("train-local", *arguments, **environment)
    assert failed.returncode == 1
    assert sentence in failed.stderr.splitlines()[-1]
    assert "LOCAL_MODE=process" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.container
def test_an_image_that_cannot_be_built_falls_back_to_a_process(verb: Verb, project: Path, nothing_left: str) -> None:
    (project / "docker" / "Dockerfile").write_text("FROM scratch\nRUN nothing\n")
    trained = verb("train-local", *SHORT)
    assert trained.returncode == 0, trained.stderr
    assert "training as a process on this machine: the image could not be built" in trained.stdout
    assert read(published(project) / "run.json")["mode"] == "process"
    assert nothing_left


PROBE = """
import json, os, sys
names = sorted(name for name in os.environ if name.startswith("SM_"))
facts = {"names": names, "arguments": sys.argv[1:], "hps": os.environ["SM_HPS"], "cwd": sorted(os.listdir("."))}
for name in ("SM_MODEL_DIR", "SM_OUTPUT_DATA_DIR"):
    os.makedirs(os.environ[name], exist_ok=True)
    with open(os.path.join(os.environ[name], "facts.json"), "w") as file:
        json.dump(facts, file)
for channel in ("TRAIN", "VALIDATION", "CHECKPOINTS"):
    assert os.path.isdir(os.environ["SM_CHANNEL_" + channel])
"""


@pytest.mark.container
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the SDK leaves a pipe open
def test_both_modes_keep_the_same_contract(tmp_path: Path, packed: Path, nothing_left: str) -> None:
    source = tmp_path / "src"
    (source / "training").mkdir(parents=True)
    (source / "training" / "launch.py").write_text(PROBE)
    (tmp_path / "checkpoints").mkdir()
    channels = {"train": packed / "train", "validation": packed / "validation", "checkpoints": tmp_path / "checkpoints"}
    hyperparameters = {"model": "auto", "epochs": 3, "learning_rate": 1e-05, "flag": True, "text": "1.10", "none": None}
    facts, files = [], []
    for mode in ("container", "process"):
        root = tmp_path / f"contract-{mode}-{time.time_ns()}"
        root.mkdir()
        job = Job("20260101-000000-abcd", root, hyperparameters, channels, 1, {"GIT_COMMIT": "abc"}, source)
        with closing(TrainingView(root / "job.log", mode == "container", output=io.StringIO())) as view:
            outputs = container.run(job, nothing_left, view) if mode == "container" else process.run(job, view)
        assert read(outputs.model / "facts.json") == read(outputs.data / "facts.json")
        facts.append(read(outputs.model / "facts.json"))
        files.append([sorted(path.name for path in folder.iterdir()) for folder in (outputs.model, outputs.data)])
    assert set(facts[0]["names"]) - set(facts[1]["names"]) == {"SM_CHANNEL_SM_DRIVERS"}  # the driver's own files
    assert set(facts[1]["names"]) <= set(facts[0]["names"])
    for key in ("arguments", "hps", "cwd"):
        assert facts[0][key] == facts[1][key]
    assert files[0] == files[1]


RIGHTS = """
import json, os
status = dict(line.rstrip().split(":", 1) for line in open("/proc/self/status"))
facts = {name: status[name].strip() for name in ("CapEff", "CapBnd", "NoNewPrivs")}
for name in ("SM_SOURCE_DIR", "SM_CHANNEL_CODE", "SM_CHANNEL_TRAIN", "SM_CHANNEL_VALIDATION", "SM_CHANNEL_CHECKPOINTS"):
    try:
        open(os.path.join(os.environ[name], "written"), "w").close()
        facts[name] = "written"
    except OSError as error:
        facts[name] = error.strerror
import torch
with open(os.path.join(torch.hub.get_dir(), "checkpoints", "fetched"), "w") as file:
    file.write("weights")
for name in ("SM_MODEL_DIR", "SM_OUTPUT_DATA_DIR"):
    os.makedirs(os.environ[name], exist_ok=True)
    with open(os.path.join(os.environ[name], "facts.json"), "w") as file:
        json.dump(facts, file)
"""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as above
@pytest.mark.container
def test_a_container_has_the_rights_it_needs_and_no_more(
    tmp_path: Path, packed: Path, nothing_left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    source, root = tmp_path / "src", tmp_path / f"rights-{time.time_ns()}"
    (source / "training").mkdir(parents=True)
    (source / "training" / "launch.py").write_text(RIGHTS)
    for folder in (root, tmp_path / "checkpoints"):
        folder.mkdir()
    channels = {"train": packed / "train", "validation": packed / "validation", "checkpoints": tmp_path / "checkpoints"}
    job = Job("20260101-000000-abcd", root, {}, channels, 1, {}, source)
    with closing(TrainingView(root / "job.log", True, output=io.StringIO())) as view:
        facts = read(container.run(job, nothing_left, view).model / "facts.json")
    assert facts.pop("CapEff") == facts.pop("CapBnd") == f"{1 << 1 | 1 << 3:016x}"  # DAC_OVERRIDE and FOWNER
    assert facts.pop("NoNewPrivs") == "1"
    assert facts.pop("SM_CHANNEL_CHECKPOINTS") == "written"
    assert set(facts.values()) == {"Read-only file system"}
    assert not list(packed.rglob("written"))
    # Published weights are fetched once a machine, not once a run.
    assert (tmp_path / "torch" / "hub" / "checkpoints" / "fetched").read_text() == "weights"


@pytest.mark.parametrize(
    ("volume", "shown"),
    [
        ("/a:/opt/ml/input/data/train", "/a:/opt/ml/input/data/train:ro"),
        ("/a:/opt/ml/input/data/code:z", "/a:/opt/ml/input/data/code:z,ro"),  # with SELinux
        ("/a:/opt/ml/input/data/checkpoints", "/a:/opt/ml/input/data/checkpoints"),
        ("/a:/opt/ml/input/data/sm_drivers:z", "/a:/opt/ml/input/data/sm_drivers:z"),
        ("/a:/opt/ml/model", "/a:/opt/ml/model"),
    ],
)
def test_channels_are_read_only(volume: str, shown: str) -> None:
    assert container.read_only(volume) == shown


def test_stale_images_have_another_name(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config.load((), {})
    changed = [config.load([override], {}) for override in ("images.base=other", "images.packages=[torch]")]
    names = [images.image_name(each, target) for each in (settings, *changed) for target in ("training", "serving")]
    assert len({*names}) == 6
    assert all(name.startswith(f"{project_names.name()}:") for name in names)
    assert images.image_name(config.load((), {}), "serving") == names[1]
    other = tmp_path / "serve.py"
    other.write_text(images.SERVER[0].read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    monkeypatch.setattr(images, "SERVER", [other, *images.SERVER[1:]])
    assert images.image_name(settings, "serving") != names[1]
    assert images.image_name(settings, "training") == names[0]
    assert project


ASK = """
import sys, time, urllib.error, urllib.request
headers = {"Content-Type": "image/png"}
request = urllib.request.Request("http://127.0.0.1:8080/invocations", sys.stdin.buffer.read(), headers)
for _ in range(600):
    try:
        print(urllib.request.urlopen(request).read().decode())
        break
    except (urllib.error.URLError, ConnectionError):
        time.sleep(0.1)
"""


@pytest.mark.container
@pytest.mark.parametrize("user", ["0:0", "1000:1000"])
def test_the_container_needs_no_network_and_no_root(artifact: Path, serving_image: str, user: str) -> None:
    """As SageMaker starts it (`docker run <image> serve`, as root), and as user 1000; cut off from everything."""
    command = ["docker", "run", "--detach", "--network", "none", "--read-only", "--user", user]
    command += ["--volume", f"{artifact}:/opt/ml/model:ro", serving_image, "serve"]
    container = subprocess.check_output(command, text=True).strip()
    try:
        inside = ["docker", "exec", "--interactive", container, "python3", "-c", ASK]
        answer = subprocess.run(inside, input=photo("left"), capture_output=True, timeout=120)
        assert json.loads(answer.stdout)["labels"] == ["left"], answer.stderr
        started = time.monotonic()
        subprocess.run(["docker", "kill", "--signal", "TERM", container], check=True, capture_output=True)
        code = subprocess.check_output(["docker", "wait", container], text=True).strip()
        assert (code, time.monotonic() - started < 25) == ("0", True)
    finally:
        subprocess.run(["docker", "rm", "--force", container], capture_output=True, check=False)
