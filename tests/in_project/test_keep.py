"""What is exported, when training ends, rare classes, and what stays frozen: exact on any number of ranks."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import scores
from model import build_model
from pipelines import runs
from tests.test_faults import KILL, STEP, WHOLE, Job, make
from tests.test_loop import ranks, run_ranks, same, train
from training import pretrained, speed
from training.checkpoint import Progress
from training.config import ConfigurationError, Hyperparameters
from training.data import balanced_order, class_weights
from training.distributed import SyncedBatchNorm, World, synchronise_batch_norm
from training.watch import Guard, exported, over

EVERYTHING: dict[str, Any] = {"keep": "best", "keep_by": "f1", "patience": 3, "sampling": "balanced",
                              "augment": "trivial", "rotate": 20.0, "epochs": 6}  # fmt: skip


def epoch(number: int, accuracy: float, loss: float, f1: float = 0.5) -> dict[str, Any]:
    return {"epoch": number, "val_accuracy": accuracy, "val_loss": loss, "val_f1": f1}


HISTORY = [epoch(1, 0.5, 1.0, 0.9), epoch(2, 0.8, 0.7), epoch(3, 0.8, 0.6), epoch(4, 0.8, 0.6), epoch(5, 0.7, 0.5)]


@pytest.mark.parametrize(
    ("options", "kept"), [({}, 3), ({"keep_by": "loss"}, 5), ({"keep_by": "f1"}, 1), ({"keep": "last"}, 5)]
)
def test_the_best_epoch_is_kept_and_ties_go_to_the_lower_loss_then_to_the_earlier(
    options: dict[str, Any], kept: int
) -> None:
    assert exported(HISTORY, Hyperparameters(**options))["epoch"] == kept


def test_an_epoch_without_a_finite_loss_is_never_the_best() -> None:
    for loss in (math.nan, math.inf):
        for history in ([epoch(1, 0.9, loss), epoch(2, 0.1, 3.0)], [epoch(1, 0.1, 3.0), epoch(2, 0.9, loss)]):
            assert exported(history, Hyperparameters())["val_loss"] == 3.0


def test_patience_counts_evaluations_without_a_better_one() -> None:
    def at(count: int, **options: Any) -> bool:
        settings = Hyperparameters(epochs=10, **options)
        return over(Progress(epoch=count, history=HISTORY[:count]), settings)

    assert [at(count, patience=2) for count in range(6)] == [False, False, False, False, False, True]
    assert [at(count, patience=1) for count in range(6)] == [False, False, False, False, True, True]
    assert not any(at(count) for count in range(6))
    assert not at(5, patience=1, keep_by="loss")
    assert at(5, patience=2, keep="last")  # it may end training whatever is exported
    assert over(Progress(epoch=10, history=HISTORY), Hyperparameters(epochs=10))


def test_the_exported_weights_are_those_of_the_best_epoch(packed: Path) -> None:
    """A learning rate that is far too high: it gets worse after a good epoch."""
    options: dict[str, Any] = {"epochs": 6, "learning_rate": 0.5, "ema_decay": 0.0, "warmup_fraction": 0.9}
    kept, history = train(packed, keep_by="loss", **options)
    best = exported(history, Hyperparameters(keep_by="loss"))
    assert best["epoch"] < 6, "this history tests nothing"
    last, same_history = train(packed, keep="last", **options)
    assert [each["val_loss"] for each in same_history] == [each["val_loss"] for each in history]
    assert not same(kept, last)


def test_resumed_inside_an_epoch_everything_ends_with_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    """On one rank and on two."""
    options = EVERYTHING | {"class_weights": "none", "learning_rate": 0.05}
    for count in (1, 2):
        whole, killed = (make(tmp_path, packed, count, f"{name}{count}") for name in ("whole", "killed"))
        code, text = whole.run(**options)
        assert code == 0, text
        killed.inject("loop.py", STEP, f"{WHOLE}\n{KILL}")
        code, text = killed.run(**options, max_restarts=1)
        assert code == 0, text
        assert "resumed after epoch 2 of 6 and " in text
        assert killed.weights() == whole.weights()
        found = [json.loads((job.root / "output" / "metrics.json").read_text()) for job in (whole, killed)]
        assert found[0]["epoch"] == found[1]["epoch"]
        last = [line for line in text.splitlines() if "val_accuracy=" in line][-1]
        assert last.startswith(f"exported: epoch={found[1]['epoch']} ")
        assert f"val_accuracy={found[1]['val_accuracy']:.4f} majority=0.3333 val_f1={found[1]['val_f1']:.4f}" in last


def test_a_run_that_patience_ended_trains_no_more(packed: Path, tmp_path: Path) -> None:
    first, history = train(packed, checkpoints=tmp_path, epochs=30, patience=1, keep_by="loss", learning_rate=0.3)
    assert len(history) < 30
    again, same_history = train(packed, checkpoints=tmp_path, epochs=30, patience=1, keep_by="loss", learning_rate=0.3)
    assert same(first, again)
    assert len(same_history) == len(history)


def test_balanced_epochs_have_as_many_of_each_class() -> None:
    labels = np.array([0] * 90 + [1] * 7 + [3] * 3)  # nothing of class 2
    orders = [balanced_order(labels, 0, epoch) for epoch in range(30)]
    seen = set[int]()
    for order in orders:
        assert len(order) == 100
        assert len(set(order)) == 100  # a row that comes again is told apart
        counts = np.bincount(labels[order % 100], minlength=4)
        assert counts[2] == 0
        assert sorted(counts[[0, 1, 3]]) == [33, 33, 34]
        for row in (*range(90, 97), *range(97, 100)):  # all of a small class, as often as each other
            assert abs((order % 100 == row).sum() - counts[labels[row]] / (labels == labels[row]).sum()) < 1
        seen |= set((order % 100).tolist())
    assert seen == set(range(100))
    assert np.array_equal(orders[3], balanced_order(labels, 0, 3))
    assert not np.array_equal(orders[3], orders[4])
    assert not np.array_equal(orders[3], balanced_order(labels, 1, 3))


def test_class_weights_make_classes_count_alike() -> None:
    labels = np.array([0] * 90 + [1] * 10)
    weights = class_weights(labels, 3)
    assert weights.tolist() == pytest.approx([100 / 180, 5, 0])
    assert weights[labels].mean() == pytest.approx(1)
    with pytest.raises(ConfigurationError, match="both balanced, which counts rare classes twice"):
        Hyperparameters(sampling="balanced", class_weights="balanced")


@pytest.fixture
def rare(packed: Path, tmp_path: Path) -> Path:
    """The packed data with one class that has two training images."""
    folder = tmp_path / "rare"
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        info = json.loads((packed / split / "dataset.json").read_text())
        (folder / split / "dataset.json").write_text(json.dumps(info))
        images, labels = (np.load(packed / split / f"{name}-00000.npy") for name in ("images", "labels"))
        keep = np.ones(len(labels), dtype=bool)
        if split == "train":
            keep[np.flatnonzero(labels == 0)[2:]] = False
        np.save(folder / split / "images-00000.npy", images[keep])
        np.save(folder / split / "labels-00000.npy", labels[keep])
    return folder


@pytest.mark.parametrize("options", [{"class_weights": "balanced"}, {"sampling": "balanced"}])
def test_both_ways_help_a_rare_class_and_are_the_same_on_two_ranks(
    rare: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    common: dict[str, Any] = {"epochs": 3, "optimizer": "sgd", "learning_rate": 0.01, "sync_batch_norm": True}
    _, alone = train(rare, **common, **options)
    facts, _ = ranks(2, rare, tmp_path / "two", **common, **options)
    assert [each["val_loss"] for each in facts[0]["history"]] == pytest.approx(
        [each["val_loss"] for each in alone], rel=1e-4
    )
    long: dict[str, Any] = {"epochs": 15, "batch_size": 8}
    helped, plain = (train(rare, **long, **more)[1][-1]["val_worst_recall"] for more in (options, {}))
    assert helped >= plain


def test_what_accuracy_hides() -> None:
    found = scores.summary([95, 0], [95, 5], [100, 0])
    assert found == {"majority": 0.95, "f1": pytest.approx(2 * 95 / 195 / 2), "worst_recall": 0.0}
    assert scores.summary([3, 0, 2], [4, 0, 2], [3, 1, 2])["worst_recall"] == 0.75  # a class without images
    for accuracy, majority, images in ((0.536, 0.5425, 208), (0.6, 0.5425, 60), (0.95, 0.95, 200), (1.0, 1.0, 9)):
        assert f"is not clearly above {majority:.4f}" in scores.advice(accuracy, majority, images)
    for accuracy, majority, images in ((0.7, 0.5425, 208), (0.99, 0.95, 1000), (0.8, 0.1045, 270), (8 / 9, 1 / 3, 9)):
        assert scores.advice(accuracy, majority, images) == ""


FROZEN = {"cnn": 3, "resnet18": 4, "vit_b_16": 2}


class Tiny(nn.Module):
    """Batch norm of several kinds and parameters of its own, in two stages and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 3, 1, 1))
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.BatchNorm2d(4, affine=False))
        self.two = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU())
        self.three = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.three(self.two(self.one(images * self.token)))
        return found


def _frozen_rank(rank: int, size: int, folder: str, packed: str, options: dict[str, Any]) -> None:
    from training.data import load_channels
    from training.loop import fit

    torch.set_num_threads(1)
    world = World(rank=rank, size=size, device=torch.device("cpu"))
    if size > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.manual_seed(0)
    model = Tiny()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.1, 1)
    pretrained.freeze(model, 2)
    names = [name for name in model.state_dict() if not name.startswith("three") and "tracked" not in name]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    splits = load_channels(Path(packed, "train"), Path(packed, "validation"))
    settings = Hyperparameters(model="cnn", image_size=12, epochs=3, batch_size=16, learning_rate=0.1, **options)
    kept, _ = fit(model, *splits, settings, world)
    for trained in (kept, model):
        moved = [name for name in names if not torch.equal(trained.state_dict()[name], before[name])]
        assert not moved, moved
    assert not torch.equal(kept.state_dict()["three.2.weight"], before["three.2.weight"])
    if size > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{"sync_batch_norm": True}, {"sync_batch_norm": True, "ema_decay": 0.0, "keep": "last"},
     {"optimizer": "sgd", "clip_gradients": 1.0, "accumulate": 2}],
)  # fmt: skip
def test_what_is_frozen_stays_so_in_every_combination(
    packed: Path, tmp_path: Path, size: int, options: dict[str, Any]
) -> None:
    if size == 1:
        _frozen_rank(0, 1, str(tmp_path), str(packed), options)
        return
    run_ranks(_frozen_rank, size, str(tmp_path), str(packed), options)


@pytest.mark.parametrize(("name", "stages"), FROZEN.items())
def test_only_later_stages_train(name: str, stages: int) -> None:
    if name != "cnn":
        pytest.importorskip("torchvision")
    model = build_model(name, 2, 32)
    pretrained.freeze(model, stages)
    left = {key for key, value in model.named_parameters() if value.requires_grad}
    assert left
    assert not left & {"class_token", "encoder.pos_embedding", "conv_proj.weight"}
    synced = synchronise_batch_norm(model)
    assert {key for key, value in synced.named_parameters() if value.requires_grad} == left
    assert all(isinstance(module, SyncedBatchNorm) for module in synced.modules() if isinstance(module, nn.BatchNorm2d))


def test_a_batch_norm_that_does_more_is_left_as_it_is() -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return super().forward(input).relu()

    model = synchronise_batch_norm(nn.Sequential(Activated(3)))
    assert type(model[0]) is Activated  # type: ignore[index]


@pytest.mark.parametrize("place", ["0.weight", "0.bias", "2.weight", "2.bias"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_the_guard_looks_at_all_gradients(place: str, garbage: float) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    guard = Guard(model, torch.optim.SGD(model.parameters()), torch.device("cpu"))
    model(torch.ones(2, 4)).sum().backward()
    assert guard.allows_step()
    gradient = model.get_parameter(place).grad
    assert gradient is not None
    gradient.view(-1)[0] = garbage
    assert not guard.allows_step()


@pytest.mark.parametrize("wanted", [True, "auto"])
def test_compiling_that_cannot_work_means_eager_and_a_line(
    wanted: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    measured = speed._step_seconds

    def trial(model: Any, images: Any, order: bool, compiled: bool, *rest: Any) -> float:
        if compiled:
            raise RuntimeError("fatal error: Python.h: No such file\nand a page of more")
        return measured(model, images, order, compiled, *rest)

    monkeypatch.setattr(speed, "_step_seconds", trial)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/c++")
    world = World(rank=0, size=1, device=torch.device("cpu"))
    settings = Hyperparameters(compile=wanted)
    chosen = speed.choose(
        build_model("cnn", 2, 8), torch.randn(4, 3, 8, 8), settings, 10**9, world, contextlib.nullcontext
    )
    assert chosen["compile"] is False
    lines = [line for line in caplog.messages if line.startswith("not compiled")]
    assert lines == ["not compiled, as that does not work here: RuntimeError: fatal error: Python.h: No such file"]
    chosen = speed.choose(build_model("cnn", 2, 8), torch.randn(4, 3, 8, 8),
                          replace(settings, deterministic=True), 10**9, world, contextlib.nullcontext)  # fmt: skip
    assert chosen["compile"] is False


def test_a_broken_compiler_does_not_break_a_run(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cold"))
    job = make(tmp_path, packed, 1)
    code, text = job.run(epochs=1, compile=True)
    assert code == 0, text
    assert len([line for line in text.splitlines() if line.startswith("not compiled, as")]) == 1
    assert "not compiled; images" in text
    assert "Traceback" not in text


def cold(tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cold"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "2")  # or this many processors decide
    return make(tmp_path, packed, 1)


def test_a_stop_during_a_cold_compile_ends_within_seconds(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = cold(tmp_path, packed, monkeypatch)
    job.inject("speed.py", "    trial = math.inf\n", "print('compiling now', flush=True)")
    running = job.start(compile=True)
    assert running.stdout is not None
    assert any("compiling now" in line for line in running.stdout)
    time.sleep(3)
    begun = time.monotonic()
    running.send_signal(signal.SIGTERM)
    text = running.communicate(timeout=100)[0]
    assert running.returncode == 143, text
    assert "stopped by SIGTERM before the first step; nothing is written" in text
    assert time.monotonic() - begun < 15
    assert not (job.root / "failure").exists()


@pytest.mark.parametrize("how", ["fails", "stops"])
def test_a_run_that_has_just_compiled_ends_within_seconds(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    job = cold(tmp_path, packed, monkeypatch)
    words = {"fails": "raise RuntimeError('out of luck')", "stops": "import os; os.kill(os.getpid(), 15)"}
    ending = "print('ending now', flush=True)\n"
    job.inject("loop.py", STEP, f"if progress.step == 7:\n    {ending}    {words[how]}")
    running = job.start(compile=True, epochs=2)
    assert running.stdout is not None
    assert any("ending now" in line for line in running.stdout)
    begun = time.monotonic()
    text = running.communicate(timeout=100)[0]
    assert running.returncode == {"fails": 1, "stops": 143}[how], text
    assert time.monotonic() - begun < 15


def test_threads_that_never_end_do_not_hold_a_job(tmp_path: Path, packed: Path) -> None:
    """As those of an interrupted compiler do; the writer of checkpoints is waited for all the same."""
    job = make(tmp_path, packed, 1)
    hang = "import threading\nthreading.Thread(target=time.sleep, args=(1000,)).start()"
    job.inject("loop.py", "    average = WeightAverage", hang)
    job.inject("checkpoint.py", "        digest = hashlib", "import time; time.sleep(2)")
    job.inject("loop.py", STEP, "if progress.step == 7: raise RuntimeError('out of luck')")
    begun = time.monotonic()
    code, text = job.run()
    assert code == 1, text
    assert time.monotonic() - begun < 60
    assert not any(name.endswith(".tmp") for name in job.checkpoints())


def test_a_stop_before_the_first_step_is_one(tmp_path: Path, packed: Path) -> None:
    for count in (1, 2):
        job = make(tmp_path, packed, count, f"job{count}")
        job.inject("train.py", "    settled = config.resolve(", "print('here', flush=True); time.sleep(30)")
        running = job.start()
        assert running.stdout is not None
        assert any("here" in line for line in running.stdout)
        running.send_signal(signal.SIGTERM)
        text = running.communicate(timeout=60)[0]
        assert running.returncode == 143, text
        assert not job.checkpoints()


def test_evaluation_says_when_a_model_is_no_better_than_a_guess(tmp_path: Path, packed: Path) -> None:
    job = make(tmp_path, packed, 1)
    code, text = job.run(epochs=1, learning_rate=1e-9)
    assert code == 0, text
    said = [line for line in text.splitlines() if line.startswith("warning: The accuracy of ")]
    assert len(said) == 1
    assert "is not clearly above 0.3333" in said[0]
    assert json.loads((job.root / "output" / "run.json").read_text())["warning"] in said[0]
    archive, output = tmp_path / "model.tar.gz", tmp_path / "evaluation.json"
    runs.pack(job.root / "model", archive)
    words = ["--artifact", str(archive), "--data", str(packed / "test"), "--output", str(output)]
    done = subprocess.run([sys.executable, "src/processing/evaluate.py", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "majority class 0.3333: the accuracy of always naming it" in done.stdout
    assert "warning: The accuracy of " in done.stdout
