"""Fine-tuning: weights from a file, a new head, frozen stages; and choices by measuring."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model import ModelError, build_model
from pipelines import ROOT, config, runs
from pipelines.local import data, process
from pipelines.local import train as train_local
from pipelines.local.job import Interrupted, Job
from pipelines.terminal import UserError
from tests.helpers import Verb
from training import checkpoint, speed
from training.config import Hyperparameters
from training.distributed import World
from training.pretrained import find_weights, freeze, initialise, load_weights, read_weights, train_mode

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], names: list[str]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in names)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "lightning", "folder"])
def test_weights_come_from_files_of_every_usual_kind(tmp_path: Path, kind: str) -> None:
    state = build_model("cnn", 3, 12).state_dict()
    place = tmp_path / ("weights.safetensors" if kind in ("safetensors", "folder") else "weights.pth")
    if kind in ("safetensors", "folder"):
        save_file(state, place)
    elif kind == "lightning":
        torch.save({"state_dict": state, "epoch": 3}, place)
    else:
        torch.save(state, place)
    read = read_weights(find_weights(tmp_path if kind == "folder" else place))
    assert set(read) == set(state)
    assert same(read, state, list(state))


@pytest.mark.parametrize(("name", "keys"), [
    ("checkpoint.pth.tar", ["state_dict"]), ("weights", []), ("a.pkl", ["encoder"]), ("dino.pth", ["student"]),
    ("a.pt", ["checkpoint", "params"]), ("a.ckpt", ["ema", "module"]),
])  # fmt: skip
def test_weights_are_found_under_other_names_too(tmp_path: Path, name: str, keys: list[str]) -> None:
    state = build_model("cnn", 3, 12).state_dict()
    inside: Any = state
    for key in reversed(keys):
        inside = {key: inside, "best": torch.tensor(0.9), "optimizer": {0: {"step": torch.ones(1)}}}
        inside |= {"mean": np.mean([0.5, 0.9]), "epoch": np.int64(3), "lr": np.float32(0.1), "ok": np.bool_(True)}
    torch.save(inside, tmp_path / name)
    assert same(read_weights(find_weights(tmp_path)), state, list(state))


def test_a_file_that_holds_itself_holds_no_weights(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"epoch": 3}
    endless |= {"model": endless, "net": endless}
    torch.save(endless, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="holds no tensors by name"):
        read_weights(tmp_path / "a.pt")


class Evil:
    """What a pickle may do."""

    def __reduce__(self) -> Any:
        return (print, ("gotcha",))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (Path.exists, "must hold one file of weights (.safetensors .pth .pt .ckpt .bin); found: none"),
        (lambda folder: [(folder / name).touch() for name in ("a.pt", "b.pth")], "found: a.pt, b.pth"),
        (lambda folder: (folder / "a.pt").write_bytes(b"junk"), "holds no weights that can be read"),
        (lambda folder: (folder / "a.safetensors").write_bytes(b"junk"), "holds no weights that can be read"),
        (lambda folder: torch.save({"x": Evil()}, folder / "a.pt"), "holds no weights that can be read"),
        (lambda folder: torch.save({"epoch": 3}, folder / "a.pt"), "holds no tensors by name"),
    ],
    ids=["none", "two", "junk", "junk safetensors", "pickle", "no tensors"],
)
def test_what_is_no_weights_is_one_sentence(tmp_path: Path, make: Any, sentence: str, capsys: Any) -> None:
    make(tmp_path)
    with pytest.raises(ModelError) as error:
        read_weights(find_weights(tmp_path))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert "gotcha" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cnn", "resnet18", "mobilenet_v3_small"])
def test_other_classes_get_a_new_head_and_keep_the_rest(name: str, caplog: pytest.LogCaptureFixture) -> None:
    source, target = build_model(name, 7, 32), build_model(name, 3, 32)
    untouched = {key: value.clone() for key, value in target.state_dict().items()}
    with caplog.at_level("INFO"):
        load_weights(target, source.state_dict())
    head = [key for key, value in untouched.items() if value.shape != source.state_dict()[key].shape]
    assert len(head) == 2
    assert f"a new head for 3 classes ({', '.join(head)})" in caplog.text
    assert same(target.state_dict(), untouched, head)
    assert same(target.state_dict(), source.state_dict(), [key for key in untouched if key not in head])
    caplog.clear()
    with caplog.at_level("INFO"):
        load_weights(source, source.state_dict())
    assert "pretrained weights" in caplog.text
    assert "a new head" not in caplog.text


def test_weights_of_another_model_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"the weights do not fit the model: .* set model to the one"):
        load_weights(build_model("resnet18", 3, 32), build_model("cnn", 3, 32).state_dict())
    with pytest.raises(ModelError, match=r"the published weights of cnn cannot be had \(there are none\)"):
        initialise(build_model("cnn", 3, 32), "cnn", "default", None)


def test_published_weights_that_cannot_be_had_are_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"the published weights of resnet18 cannot be had .*data.pretrained"):
        initialise(build_model("resnet18", 3, 32), "resnet18", "default", None)


def test_frozen_stages_do_not_move_and_keep_their_statistics() -> None:
    model = build_model("resnet18", 3, 32)
    freeze(model, 4)  # conv1, bn1, layer1, layer2
    train_mode(model)
    assert not model.get_submodule("layer2.0.bn1").training
    assert model.get_submodule("layer3.0.bn1").training
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    moved = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"layer3", "layer4", "fc"}
    with pytest.raises(ModelError, match=r"frozen_stages is 7, but the model has 7 stages; freeze fewer"):
        freeze(build_model("resnet18", 3, 32), 7)


def test_a_run_starts_from_a_file(verb: Verb, project: Path) -> None:
    """Without a step that moves them, the weights that come out are those that went in, but for the head."""
    source = build_model("cnn", 4, 8)
    save_file(source.state_dict(), project.parent / "my weights.safetensors")
    words = ["--mode", "process", "--set", "training.epochs=1", "--set", "training.learning_rate=1e-12"]
    words += ["--set", "training.ema_decay=0", "--set", f"data.pretrained={project.parent / 'my weights.safetensors'}"]
    done = verb("train-local", *words)
    assert done.returncode == 0, done.stderr
    assert "a new head for 10 classes" in done.stdout
    folder = project / "artifacts" / "latest"
    digest = hashlib.sha256((project.parent / "my weights.safetensors").read_bytes()).hexdigest()
    assert json.loads((folder / "run.json").read_text())["pretrained_sha256"] == digest
    with tarfile.open(folder / "model.tar.gz") as archive:
        archive.extract("model.safetensors", project.parent, filter="data")
    weights = load_file(project.parent / "model.safetensors")
    assert torch.allclose(weights["0.weight"], source.state_dict()["0.weight"], atol=1e-6)
    failed = verb("train-local", "--mode", "process", "--set", "data.pretrained=nowhere.pth")
    assert failed.stderr == "error: data.pretrained is 'nowhere.pth', which is no file; name one, or none\n"


def choose(
    seconds: dict[bool, float], monkeypatch: pytest.MonkeyPatch, steps: int = 10, compiled: float = 0.5, **options: Any
) -> dict[str, bool]:
    def measured(_model: Any, _images: Any, channels_last: bool, compiled_too: bool, *_: Any) -> float:
        return compiled if compiled_too else seconds[channels_last]

    monkeypatch.setattr(speed, "_step_seconds", measured)
    model, images = build_model("cnn", 3, 12), torch.zeros(8, 3, 12, 12)
    return speed.choose(model, images, Hyperparameters(**options), steps, ALONE, contextlib.nullcontext)


def test_the_faster_memory_order_is_chosen_and_a_long_run_is_compiled_when_that_is_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert choose({True: 1.0, False: 0.9}, monkeypatch) == {"channels_last": False, "compile": False}
    assert choose({True: 1.0, False: 0.99}, monkeypatch)["channels_last"]
    assert choose({True: 1.0, False: 2.0}, monkeypatch, steps=601)["compile"]
    assert not choose({True: 1.0, False: 2.0}, monkeypatch, steps=601, compiled=0.98)["compile"]
    assert not choose({True: 1.0, False: 2.0}, monkeypatch, steps=599)["compile"]
    assert choose({True: 1.0, False: 2.0}, monkeypatch, compile=True)["compile"]
    assert not choose({True: 1.0, False: 2.0}, monkeypatch, steps=10**6, compile=False)["compile"]
    assert choose({True: 9.0, False: 1.0}, monkeypatch, deterministic=True) == {"channels_last": True, "compile": False}
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert not choose({True: 1.0, False: 2.0}, monkeypatch, steps=10**6)["compile"]


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
@pytest.mark.parametrize("compile_seconds", [speed.COMPILE_SECONDS, 0.0])  # 0: a compiled step is timed too
def test_measuring_leaves_the_model_as_it_was(compile_seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "COMPILE_SECONDS", compile_seconds)
    model = build_model("cnn", 3, 12)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    speed.choose(model, torch.randn(8, 3, 12, 12), Hyperparameters(), 10, ALONE, contextlib.nullcontext)
    assert same(before, model.state_dict(), list(before))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_choices_outlive_a_run(tmp_path: Path) -> None:
    assert checkpoint.choices(tmp_path, ALONE) == {}
    for step, chosen in ((5, False), (9, True)):
        folder = tmp_path / f"step-{step:09d}"
        folder.mkdir()
        (folder / "checkpoint.json").write_text(json.dumps({"choices": {"channels_last": chosen}}))
    assert checkpoint.choices(tmp_path, ALONE) == {"channels_last": True}
    (folder / "checkpoint.json").write_text("{")
    assert checkpoint.choices(tmp_path, ALONE) == {"channels_last": False}


def test_a_resumed_run_gets_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been interrupted before its first checkpoint."""
    monkeypatch.setattr(runs, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(runs, "WORK", ROOT / ".cache" / "local")
    monkeypatch.setattr(data, "prepare", lambda *_: ROOT / "data" / "none")
    jobs: list[Job] = []

    def interrupted(job: Job, _: object) -> None:
        jobs.append(job)
        raise Interrupted("SIGTERM")

    monkeypatch.setattr(process, "run", interrupted)
    (tmp_path / "own.pth").write_bytes(b"weights")
    for override in (f"data.pretrained={tmp_path / 'own.pth'}", "data.pretrained=none"):
        name = None
        for _ in range(2):
            settings = config.load([override, "compute.local_mode=process", "compute.local_instances=1"], {})
            with pytest.raises(UserError, match="stopped by SIGTERM"):
                train_local.train(settings, None, name, False)
            name = jobs[-1].name
    for job in jobs:
        shutil.rmtree(job.root)
    first, resumed, *others = jobs
    assert first.name == resumed.name
    assert first.channels == resumed.channels
    assert [path.read_bytes() for path in first.channels["pretrained"].iterdir()] == [b"weights"]
    assert not any("pretrained" in job.channels for job in others)
