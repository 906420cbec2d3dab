"""Machines that no CI here has, as far as Linux can tell: Apple's GPUs, arm64 laptops; and the bounds of packages."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import imaging
import model
from pipelines import ROOT, SOURCE, config, environment, project
from pipelines.cloud import images as image_push
from pipelines.cloud.account import Account
from pipelines.local import engine
from pipelines.local import images as image
from tests.cloud import STACK
from tests.helpers import verb_environment
from tests.programs import put_first
from training import checkpoint, data, distributed, loop, optim, speed
from training.config import ConfigurationError, Hyperparameters
from training.distributed import World

APPLE = World(rank=0, size=1, device=torch.device("mps"))
ALONE = World(rank=0, size=1, device=torch.device("cpu"))
DIGEST = "registry.example/python:3.12-slim@sha256:" + "0123456789abcdef" * 4


class OnTheDevice(TorchFunctionMode):
    """Notes what makes float64 of tensors that `.cpu()` did not fetch: Apple's GPUs have none."""

    def __init__(self) -> None:
        super().__init__()
        self.doubles: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func == torch.Tensor.cpu:
            result = result.clone()
        given, made = (
            [leaf for leaf in tree_leaves(each) if isinstance(leaf, torch.Tensor)] for each in (args, result)
        )
        strange = [value for value in given if value.dtype != torch.float64 and not hasattr(value, "fetched")]
        if func == torch.Tensor.cpu or (given and not strange):  # and what is made of fetched ones
            for each in made:
                each.fetched = True  # type: ignore[attr-defined]
        if strange and any(each.dtype == torch.float64 for each in made):
            self.doubles.append(str(func))
        return result


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_makes_no_float64_on_the_device(packed: Path, optimizer: Literal["adamw", "sgd"]) -> None:
    splits = data.load_channels(*(packed / name for name in ("train", "validation")))
    chosen = Hyperparameters(
        model="cnn", image_size=splits[0].image_size, epochs=1, batch_size=4, learning_rate=0.01, optimizer=optimizer,
        horizontal_flip=True, crop_scale=0.5, colour_jitter=0.4, erase=0.5, mixup=0.2, cutmix=1.0, clip_gradients=1.0,
        precision="fp32", compile=False,
    )  # fmt: skip
    network = model.build_model("cnn", len(splits[0].classes), splits[0].image_size)
    with OnTheDevice() as seen:
        loop.fit(network, *splits, chosen, ALONE)
        assert not seen.doubles
        torch.ones(2).double()
        assert seen.doubles, "the check can fail"


def test_copies_wait_except_those_to_nvidias_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def to(values: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        asked.append(options.get("non_blocking", False))
        return values

    monkeypatch.setattr(torch.Tensor, "to", to)
    for kind in ("cpu", "mps", "cuda"):
        data.send(torch.zeros(1), torch.device(kind))
    assert asked == [False, False, True]
    unsafe = [path for path in (ROOT / "src").rglob("*.py") if "non_blocking=True" in path.read_text(encoding="utf-8")]
    assert not unsafe


def test_apples_gpus_get_the_usual_order_of_memory_and_no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_step_seconds", lambda *_: pytest.fail("the device is not waited for"))
    network = model.build_model("cnn", 2, 8)
    for asked in (Hyperparameters().compile, False):
        settings = Hyperparameters(compile=asked)
        chosen = speed.choose(network, torch.zeros(4, 3, 8, 8), settings, 10**9, APPLE, contextlib.nullcontext)
        assert chosen == {"channels_last": False, "compile": False}
    assert speed.has_fast_bf16(APPLE.device) is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert model.best_device().type == "mps"


def test_pixels_are_in_the_usual_order_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    assert not imaging.normalise(pixels, [0.5] * 3, [0.5] * 3).is_contiguous()
    monkeypatch.setattr(torch.Tensor, "device", APPLE.device)
    monkeypatch.setattr(torch.Tensor, "new_tensor", lambda _self, values: torch.tensor(values))
    assert imaging.normalise(pixels, [0.25] * 3, [0.5] * 3).is_contiguous()


def test_a_checkpoint_keeps_the_random_state_of_apples_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = torch.arange(4, dtype=torch.uint8)
    restored: list[torch.Tensor] = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.mps, "set_rng_state", restored.append)
    network = model.build_model("cnn", 2, 8)
    optimizer = optim.build_optimizer(network, Hyperparameters(optimizer="adamw"))
    kept = checkpoint.Checkpoints(tmp_path, "run", APPLE, {}, optimizer)
    saved = kept._rank_state(torch.zeros(()))
    monkeypatch.setattr(torch.Tensor, "to", lambda values, *_, **__: values)
    kept._load_rank(saved)
    assert [value.tolist() for value in restored] == [state.tolist()]


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called docker on a laptop with ARCH processors, where no image is yet."""
    script = (
        f'echo "$@" >> {tmp_path}/calls\ncase "$1 $2" in\n"info ") echo " Architecture: $ARCH";;\n'
        '"image inspect") [ -n "$FACTS" ] || exit 1; echo "$FACTS";;\nesac\n'
    )
    put_first("docker", script, tmp_path, monkeypatch)
    for name in [*(name for name in os.environ if name.startswith("IMAGES__")), "FACTS"]:
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "calls"


def builds(calls: Path) -> list[str]:
    return [line for line in calls.read_text().splitlines() if line.startswith("build ")]


@pytest.mark.parametrize(("machine", "foreign"), [("x86_64", False), ("aarch64", True)])
def test_the_cloud_gets_images_for_its_processors(
    docker: Path, monkeypatch: pytest.MonkeyPatch, machine: str, foreign: bool
) -> None:
    """A Mac builds two: its own to train with here, and one for SageMaker under another name."""
    monkeypatch.setenv("ARCH", machine)
    settings = config.load([])
    image.image(settings, "training")
    name = image.image_for(settings, "training", image_push.ARCHITECTURE, False)
    assert name == image.image_name(settings, "training") + ("-amd64" if foreign else "")
    here, there = builds(docker)[:2]
    assert "--platform" not in here
    assert ("--platform linux/amd64" in there) is foreign
    assert f"--tag {name} " in there


def test_an_image_for_other_processors_is_pushed_from_its_own_name(
    docker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCH", "aarch64")
    monkeypatch.setenv("FACTS", json.dumps([{"Architecture": "amd64"}]))
    token = {"authorizationData": [{"authorizationToken": "QVdTOng="}]}
    there = {"imageDetails": [{"imageManifestMediaType": image_push.TAKEN}]}
    answers = {"get_authorization_token": lambda _self: token, "describe_images": lambda _self, **_: there}
    client = type("Client", (), answers)()
    monkeypatch.setattr(Account, "client", lambda *_: client)
    monkeypatch.setattr(engine, "check", lambda: None)
    settings = config.load([])
    image_push.push(Account(settings, replace(STACK, repository="account.example/repository")), "serving")
    local = image.image_name(settings, "serving")
    remote = f"account.example/repository:{local.rpartition(':')[2]}"
    assert f"tag {local}-amd64 {remote}" in docker.read_text().splitlines()


def test_a_base_image_by_digest_reaches_the_build_and_is_another_image(
    docker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCH", "x86_64")
    plain, pinned = config.load([]), config.load([f"images.base={DIGEST}"])
    assert image.image_name(plain, "training") != image.image_name(pinned, "training")
    image.build(pinned, "training")
    assert f"--build-arg BASE_IMAGE={DIGEST} " in builds(docker)[0]


def test_a_stage_that_is_not_wanted_installs_nothing(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without BuildKit all stages before the wanted one are built, and their defaults are gigabytes."""
    monkeypatch.setenv("ARCH", "x86_64")
    for target, words in (("training", "--build-arg SERVING= "), ("serving", "--build-arg PACKAGES= ")):
        image.build(config.load([]), target)  # type: ignore[arg-type]
        assert words in builds(docker)[-1]


@pytest.mark.parametrize(("facts", "said"), [([{"RepoDigests": [DIGEST]}], True), ([{"RepoDigests": []}], False)])
def test_make_image_says_which_base_it_was(
    docker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], facts: Any, said: bool
) -> None:
    monkeypatch.setattr(engine, "check", lambda: None)
    monkeypatch.setenv("FACTS", json.dumps(facts))
    monkeypatch.setattr("sys.argv", ["image"])
    assert image.main() == 0
    assert (DIGEST in capsys.readouterr().out) is said
    assert docker.exists()


def test_every_dependency_has_a_floor_and_a_ceiling() -> None:
    groups = project._pyproject()["dependency-groups"]
    for words in (word for group in groups.values() for word in group):
        assert re.fullmatch(r"[A-Za-z0-9_.-]+(\[\w+\])?>=[\d.]+,<[\d.]+", words), words
    bounds = [re.split(r"(?=>=)", words) for group in groups.values() for words in group]
    assert len({name for name, _ in bounds}) == len({tuple(bound) for bound in bounds}), "two groups disagree"


def test_the_artifacts_requirements_and_the_image_follow_the_groups() -> None:
    container, serving = project.group("container"), project.group("serving")
    listed = (ROOT / "src" / "inference" / "requirements.txt").read_text(encoding="utf-8").split()
    assert listed
    assert {*listed} <= {*container, *serving}
    settings = config.load([])
    if settings.images.packages == "auto":
        assert image.packages(settings, "training") == container
    recipe = image.RECIPE[0].read_text(encoding="utf-8")
    for argument, group in (("PACKAGES", container), ("SERVING", container + serving)):
        found = re.search(rf'(?m)^ARG {argument}="(.*)"$', recipe)
        assert found is not None
        assert found[1].split() == [re.split("[>=<]", words)[0] for words in group], argument


LOCKED = {"numpy": "2.4.6", "torch": "2.14.1", "torchvision": "0.29.0", "torchmetrics": "1.0", "triton": "3.9.0",
          "nvidia-cublas": "13.4", "cuda-bindings": "13.5"}  # fmt: skip


@pytest.fixture
def uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called uv in a folder with an environment and a lock; `pip freeze` knows two packages."""
    script = (
        f'echo "$@" >> {tmp_path}/calls\ncase "$*" in *torch-backend*) [ ! -e {tmp_path}/offline ] || exit 2;; esac\n'
        '[ "$2" = freeze ] && printf "six==1.0\\ntorch==2.13.0+cpu\\n"\n'
        'if [ "$1" = tool ]; then exit 3; fi\n:\n'
    )
    put_first("uv", script, tmp_path, monkeypatch)
    (tmp_path / ".venv").mkdir()
    (tmp_path / "uv.lock").write_text("".join(f'[[package]]\nname = "{name}"\nversion = "{version}"\n\n'
                                              for name, version in LOCKED.items()))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize(
    ("options", "begins"), [([], "sync --locked"), (["--resolution", "lowest-direct", "--upgrade"], "pip install")]
)
def test_a_resolution_goes_past_the_lock(
    uv: Path, options: list[str], begins: str, offline: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if offline:
        (uv / "offline").touch()
    assert environment.main(options) == 0
    calls = [line for line in (uv / "calls").read_text().splitlines() if not line.startswith("venv")]
    assert all(line.startswith(begins) == (" torch==" not in line) for line in calls)
    assert " ".join(options) in calls[0]
    assert ("torch-backend" in calls[-1]) is not offline
    assert ("does not answer, so torch is PyPI's build" in capsys.readouterr().err) is offline


def test_torchs_build_is_chosen_and_its_version_locked(uv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but torch and what only PyPI's build of it needs comes from the lock."""
    monkeypatch.setenv("IMAGES__TORCH", "cpu")
    assert environment.main([]) == 0
    synced, installed = (uv / "calls").read_text().splitlines()
    left_out = re.findall(r"--no-install-package (\S+)", synced)
    assert {*left_out} == {"torch", "torchvision", "nvidia-cublas", "cuda-bindings", "triton"}
    assert installed.endswith(" torch==2.14.1 torchvision==0.29.0 --torch-backend cpu --quiet")
    (uv / "calls").unlink()
    assert environment.main(["--group", "laptop"]) == 0  # which holds no torch
    assert (uv / "calls").read_text() == "sync --locked --inexact --group laptop\n"


def test_an_audit_asks_about_every_version_and_fails_without_an_answer(uv: Path) -> None:
    assert environment.main(["--audit", "--desc"]) == 3
    frozen, asked = (uv / "calls").read_text().splitlines()
    assert frozen.startswith("pip freeze")
    assert "--strict" in asked.split()
    assert asked.endswith("--requirement .cache/audit-requirements.txt --desc")
    assert (uv / ".cache" / "audit-requirements.txt").read_text() == "six==1.0\ntorch==2.13.0\n"


@pytest.mark.parametrize(
    ("variables", "refused"),
    [
        ({}, False),
        ({"SM_NUM_GPUS": "0", "SM_CURRENT_INSTANCE_TYPE": "ml.m5.large"}, False),
        ({"SM_NUM_GPUS": "4", "SM_CURRENT_INSTANCE_TYPE": "ml.g5.12xlarge"}, True),
        ({"SM_NUM_GPUS": "0", "SM_CURRENT_INSTANCE_TYPE": "ml.p5.48xlarge"}, True),
        ({"SM_NUM_GPUS": "1", "SM_CURRENT_INSTANCE_TYPE": "local_gpu"}, True),
        ({"SM_NUM_GPUS": "1", "CUDA_VISIBLE_DEVICES": ""}, False),  # as it was asked for
    ],
)
def test_gpus_that_bill_and_cannot_be_used_are_named(
    variables: dict[str, str], refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 2024\n")
    for driver, words in (("none", "there is no NVIDIA driver"), ("version", "the driver is 535.183.01")):
        monkeypatch.setattr(distributed, "DRIVER", tmp_path / driver)
        with pytest.raises(ConfigurationError) if refused else contextlib.nullcontext() as error:
            distributed.check_gpus(variables)
        if error:
            assert "built for CUDA 13.2, cannot use them" in str(error.value)
            assert words in str(error.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    distributed.check_gpus(variables)


def test_the_job_ends_before_the_data_is_read(tmp_path: Path) -> None:
    folders = {f"SM_{name}": str(tmp_path / "none") for name in
               ("CHANNEL_TRAIN", "CHANNEL_VALIDATION", "MODEL_DIR", "OUTPUT_DATA_DIR")}  # fmt: skip
    environment = verb_environment() | folders | {"SM_CURRENT_INSTANCE_TYPE": "ml.g5.xlarge"}
    command = [sys.executable, str(SOURCE / "training" / "launch.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: ml.g5.xlarge has GPUs, and torch" in done.stderr
    assert str(tmp_path) not in done.stderr


@pytest.mark.parametrize(
    ("wanted", "gpu", "build"),
    [("auto", False, "cpu"), ("auto", True, "cu128"), ("cpu", True, "cpu"), ("cuda", False, "cu128"),
     ("cu126", False, "cu126")],
)  # fmt: skip
def test_torchs_build_follows_the_machine(wanted: str, gpu: bool, build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config.load([f"images.torch={wanted}"], {})
    assert image.torch_build(settings, gpu) == build
    assert image.torch_build(config.load([f"images.torch={wanted}", "images.packages=[torch]"], {}), gpu) == ""
    monkeypatch.setattr(image, "container_gpus", lambda: int(gpu))
    assert image.torch_build(settings, None) == build
    named = {other: image.image_name(config.load([f"images.torch={other}"], {}), "serving") for other in
             ("cpu", "cu126", "cu128")}  # fmt: skip
    assert image.image_name(settings, "serving", gpu) == named[build]
    assert len({*named.values()}) == 3


@pytest.mark.parametrize(
    ("more", "on_gpu"),
    [
        ({"compute.instance_type": "ml.g5.xlarge", "endpoint.instance_type": "ml.m5.large"}, (True, False)),
        ({"compute.instance_type": "ml.c5.xlarge", "endpoint.instance_type": "ml.g6.xlarge"}, (False, True)),
        ({"endpoint.type": "serverless", "endpoint.instance_type": "ml.g6.xlarge"}, (True, False)),
    ],
)
def test_the_cloud_gets_torchs_build_for_each_instance_type(more: dict[str, str], on_gpu: tuple[bool, bool]) -> None:
    account = Account(config.load([f"{name}={value}" for name, value in more.items()], {}), STACK)
    for target, gpu in zip(image.TARGETS, on_gpu, strict=True):
        assert image_push.on_gpu(account, target) == gpu
        tag = image.image_name(account.settings, target, gpu).partition(":")[2]
        assert image_push.uri(account, target) == f"{STACK.repository}:{tag}"
    kinds = [config.load([f"endpoint.instance_type={kind}"], {}) for kind in ("ml.g5.xlarge", "ml.m5.large")]
    first, second = (image_push.uri(Account(each, STACK), "serving") for each in kinds)
    assert first != second
