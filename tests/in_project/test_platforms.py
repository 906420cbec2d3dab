"""Machines that no CI here has, as far as Linux can tell: Apple's GPUs, arm64 laptops; and the bounds of packages."""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.overrides import TorchFunctionMode

import imaging
import model
from pipelines import ROOT, config, environment, project
from pipelines.cloud import images as image_push
from pipelines.cloud.account import Account
from pipelines.local import engine
from pipelines.local import images as image
from tests.cloud import STACK
from tests.programs import put_first
from training import checkpoint, data, loop, optim, speed
from training.config import Hyperparameters
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
        if not isinstance(result, torch.Tensor):
            return result
        if func == torch.Tensor.cpu:
            result = result.clone()
            result.fetched = True  # type: ignore[attr-defined]
        strange = [value for value in args if isinstance(value, torch.Tensor) and value.dtype != torch.float64
                   and not hasattr(value, "fetched")]  # fmt: skip
        if result.dtype == torch.float64 and strange:
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
    assert loop.has_fast_bf16(APPLE.device) is False
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
    name = image.image_for(settings, "training", image_push.ARCHITECTURE)
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
    client = type("Client", (), {"get_authorization_token": lambda _self: token})()
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
        assert image.packages(settings) == container
    recipe = image.DOCKERFILE.read_text(encoding="utf-8")
    for argument, group in (("PACKAGES", container), ("SERVING", serving)):
        found = re.search(rf'(?m)^ARG {argument}="(.*)"$', recipe)
        assert found is not None
        assert found[1].split() == [re.split("[>=<]", words)[0] for words in group], argument


@pytest.fixture
def uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called uv in a folder with an environment and a lock; `pip freeze` knows two packages."""
    script = (
        f'echo "$@" >> {tmp_path}/calls\n[ "$2" = freeze ] && printf "six==1.0\\ntorch==2.13.0+cpu\\n"\n'
        'if [ "$1" = tool ]; then exit 3; fi\n:\n'
    )
    put_first("uv", script, tmp_path, monkeypatch)
    (tmp_path / ".venv").mkdir()
    (tmp_path / "uv.lock").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "begins"), [([], "sync --locked"), (["--resolution", "lowest-direct", "--upgrade"], "pip install")]
)
def test_a_resolution_goes_past_the_lock(uv: Path, options: list[str], begins: str) -> None:
    assert environment.main(options) == 0
    last = (uv / "calls").read_text().splitlines()[-1]
    assert last.startswith(begins)
    assert last.endswith(" ".join(options))


def test_an_audit_asks_about_every_version_and_fails_without_an_answer(uv: Path) -> None:
    assert environment.main(["--audit", "--desc"]) == 3
    frozen, asked = (uv / "calls").read_text().splitlines()
    assert frozen.startswith("pip freeze")
    assert "--strict" in asked.split()
    assert asked.endswith("--requirement .cache/audit-requirements.txt --desc")
    assert (uv / ".cache" / "audit-requirements.txt").read_text() == "six==1.0\ntorch==2.13.0\n"
