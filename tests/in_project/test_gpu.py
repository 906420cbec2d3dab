"""What happens on GPUs, as far as a CPU can show it: pretended devices, and gloo ranks in place of NCCL's."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

import imaging
from model import build_model
from pipelines.local import engine
from tests.test_loop import ALONE, run_ranks, same, train
from training import augment, distributed, interruption, launch, loop, speed, watch
from training import feed as feed_module
from training import train as script
from training.checkpoint import Progress
from training.config import ConfigurationError, Hyperparameters
from training.data import Split, load_split
from training.distributed import World
from training.feed import Feed
from training.optim import WeightAverage, build_optimizer
from training.watch import Guard, NonFiniteLoss

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# Of torchrun in torch 2.10, the oldest that the project takes.
KNOWN = {"--nnodes", "--nproc-per-node", "--node-rank", "--master-addr", "--master-port", "--standalone",
         "--max-restarts"}  # fmt: skip
FAST: dict[str, Any] = {"epochs": 3, "batch_size": 8, "model": "cnn", "checkpoint_minutes": 0.0}


@pytest.mark.parametrize("hosts", ["1", "2"])
@pytest.mark.parametrize("gpus", ["0", "4"])
def test_torchrun_gets_no_option_that_an_older_one_refuses(hosts: str, gpus: str) -> None:
    environment = {"SM_HOST_COUNT": hosts, "SM_NUM_GPUS": gpus}
    words, variables = launch.command(environment | {"SM_HPS": '{"max_restarts": 1}'})
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    assert set(options) <= KNOWN
    assert variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "110"
    assert "--nproc-per-node" in options
    assert launch.network({})["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"
    assert launch.network({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"})["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file for a reason; signals and variables are as before afterwards."""
    monkeypatch.setenv("SM_OUTPUT_FAILURE", str(tmp_path / "failure"))
    for name in (interruption.MARK, "TORCH_NCCL_ASYNC_ERROR_HANDLING"):
        monkeypatch.setenv(name, "")
    kept = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    yield tmp_path / "failure"
    for number, handler in kept:
        signal.signal(number, handler)


TORCHRUN = "E1127 failed (exitcode: {}) local_rank: 1 (pid: 7) of binary: python\n"


@pytest.mark.parametrize(
    ("code", "said", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "", "was ended by SIGKILL, mostly because memory ran out"),
        ("import os; os.abort()", "", "was ended by SIGABRT, as NCCL does when a rank does not answer"),
        (f"import sys; sys.stderr.write({TORCHRUN.format(-9)!r}); sys.exit(1)", "", "was ended by SIGKILL"),
        (f"import sys; sys.stderr.write({TORCHRUN.format(-6)!r}); sys.exit(1)", "Traceback: reset", "by SIGABRT"),
        (f"import sys; sys.stderr.write({TORCHRUN.format(-11)!r}); sys.exit(1)", "error: no image", "error: no image"),
        (f"import sys; sys.stderr.write({TORCHRUN.format(1)!r}); sys.exit(1)", "Traceback: why", "Traceback: why"),
        ("import sys; sys.exit(7)", "", "ended with exit code 7 and gave no reason"),
        ("", "", None),
    ],
)
def test_the_launcher_says_why_a_rank_died_that_could_not(
    code: str, said: str, reason: str | None, job: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(launch, "command", lambda _: ([sys.executable, "-c", code], {"MASTER_PORT": "1"}))
    if said:
        job.write_text(said)
    assert (launch.main() == 0) == (reason is None)
    if reason is None:
        assert not job.exists()
    else:
        assert reason in job.read_text()
    if "exitcode" in code:
        assert "local_rank: 1 (pid: 7)" in capfd.readouterr().err  # the log has it as well


def test_one_rank_a_host_of_several_has_a_parent_too() -> None:
    assert launch.command({})[1] == {}  # the script takes this process's place
    words, variables = launch.command({"SM_HOST_COUNT": "2"})
    assert words == [sys.executable, str(launch.SCRIPT)]
    assert variables["WORLD_SIZE"] == "2"


LISTED = "".join(f"GPU {n}: NVIDIA A10G (UUID: GPU-{n}{n}{n}4fe0c-1)\n" for n in range(4))


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 4), ("", 0), ("-1", 0), ("0", 1), ("2,3", 2), (" 1 , 0", 2), ("0,7,1", 1), ("9", 0), ("0,-1,1", 1),
     ("0,0", 0), ("GPU-1114fe0c,GPU-333", 2), ("GPU-zzz,0", 0), ("none", 0), ("MIG-4", 0)],
)  # fmt: skip
def test_only_visible_gpus_count(
    visible: str | None, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTED}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert engine.gpus(visible) == count
    monkeypatch.setattr(engine, "docker", lambda *_: type("Answer", (), {"stdout": "Runtimes: nvidia runc"}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    assert engine.container_gpus() == 4  # a container does not hear of it


def test_a_rank_without_a_gpu_of_its_own_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": 6, "WORLD_SIZE": 8, "LOCAL_RANK": 2, "CUDA_VISIBLE_DEVICES": "0,1"}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigurationError, match=r"process 3 of this host has no GPU .* sees 2, with .* '0,1'; start"):
        distributed.start(1.0)


@pytest.fixture
def split(packed: Path) -> Split:
    return load_split(packed / "train")


@pytest.mark.parametrize(("ranks", "mode"), [("", "resident"), ("1", "resident"), ("2", "stream"), ("8", "stream")])
def test_a_split_stays_on_gpus_where_the_copies_of_all_ranks_of_a_host_have_room(
    split: Split, ranks: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 3 * sum(shard.nbytes for shard in split.images)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 10**12))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    feed = Feed(split, CPU, "direct")
    feed._device = GPU
    assert feed._suitable() == mode


def test_a_split_is_loaded_in_pieces_into_memory_of_its_own_size(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    send = Feed._send

    def noted(self: Feed, values: torch.Tensor) -> torch.Tensor:
        sent.append(values.nbytes)
        return send(self, values)

    monkeypatch.setattr(feed_module, "STAGED", 5 * 3 * 12 * 12)
    monkeypatch.setattr(torch, "cat", lambda *_: pytest.fail("a second copy"))
    monkeypatch.setattr(Feed, "_send", noted)
    feed = Feed(split, CPU, "resident")
    assert max(sent) == 5 * 3 * 12 * 12
    assert sum(sent) == sum(shard.nbytes for shard in split.images)
    assert np.array_equal(feed._images.numpy(), split.pixels(np.arange(len(split))))


def test_the_thread_that_copies_names_its_gpu_before_anything_else(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or each rank would open a context on the first GPU."""
    done: list[tuple[str, Any]] = []

    class Side:
        def record_event(self) -> None:
            return None

    def send(_self: Feed, values: torch.Tensor) -> torch.Tensor:
        done.append(("send", threading.current_thread().name))
        return values

    def named(device: torch.device) -> None:
        done.append((str(device), threading.current_thread().name))

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Side())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "set_device", named)
    monkeypatch.setattr(Feed, "_send", send)
    feed = Feed(split, CPU, "stream")
    feed._device = torch.device("cuda", 3)
    assert len(list(feed.batches([np.arange(4)]))) == 1
    assert done == [("cuda:3", "feed"), ("send", "feed"), ("send", "feed")]


def test_gpus_synchronise_batch_norm_by_torchs_own_layer() -> None:
    network = build_model("cnn", 3, 12)
    before = network.state_dict()
    synced = distributed.synchronise_batch_norm(network, GPU)
    kinds = [type(module) for module in synced.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert kinds
    assert set(kinds) == {nn.SyncBatchNorm}
    assert same(before, synced.state_dict())
    assert synced.train()(torch.randn(4, 3, 12, 12)).shape == (4, 3)  # alone, it is as any other


class Timed:
    """In place of a timed step: notes what is asked for, and answers from a table."""

    def __init__(self, eager: float, compiled: float, recorded: float) -> None:
        self.asked: list[tuple[int, Any]] = []
        self._seconds = {False: eager, True: compiled, speed.GRAPHS: recorded}

    def __call__(self, _model: Any, images: torch.Tensor, _order: bool, compiled: Any, *_: Any) -> float:
        self.asked.append((len(images), compiled))
        return self._seconds[compiled]


@pytest.mark.parametrize(
    ("seconds", "options", "chosen"),
    [
        ((0.0015, 0.0012, 0.0004), {}, speed.GRAPHS),  # launch-bound
        ((0.0015, 0.0012, 0.0012), {}, True),
        ((0.0015, 0.0015, 0.0001), {}, False),  # what does not compile to advantage is not recorded either
        ((0.2, 0.1, 0.01), {}, True),  # so long a step hides its launches: not even tried
        ((0.0015, 0.0012, 0.0004), {"accumulate": 2}, True),
        ((0.0015, 0.0012, 0.0004), {"compile": True}, speed.GRAPHS),
        ((0.0015, 0.0012, 0.0004), {"compile": False}, False),
        ((0.0015, 0.0012, 0.0004), {"deterministic": True}, False),
    ],
)
def test_on_a_gpu_compiling_is_decided_at_the_true_shape(
    seconds: tuple[float, float, float], options: dict[str, Any], chosen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = Timed(*seconds)
    monkeypatch.setattr(speed, "_step_seconds", timed)
    world = World(rank=0, size=1, device=GPU)
    images, settings = torch.zeros(300, 3, 8, 8), Hyperparameters(**options)
    found = speed.choose(nn.Identity(), images, settings, 10**7, world, contextlib.nullcontext)
    assert found == {"channels_last": True, "compile": chosen}
    assert {count for count, _ in timed.asked} <= {300}
    assert len(timed.asked) == len(set(timed.asked)), "each once"
    assert (speed.GRAPHS in [kind for _, kind in timed.asked]) == (chosen == speed.GRAPHS or seconds[2] == seconds[1])


def test_several_ranks_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_step_seconds", Timed(0.0015, 0.0012, 0.0001))
    monkeypatch.setattr(World, "send", lambda _self, value: value)
    monkeypatch.setattr(World, "largest", lambda _self, values: values)
    world, images = World(rank=0, size=2, device=GPU), torch.zeros(4, 3, 8, 8)
    found = speed.choose(nn.Identity(), images, Hyperparameters(), 10**9, world, contextlib.nullcontext)
    assert found["compile"] is True
    assert [speed.mode(each) for each in (True, False, speed.GRAPHS)] == [None, None, "reduce-overhead"]


@pytest.mark.parametrize(
    ("asked", "device", "native", "capability", "found"),
    [("auto", GPU, True, (9, 0), "bf16"), ("auto", GPU, False, (7, 5), "fp16"), ("auto", GPU, False, (7, 0), "fp16"),
     ("auto", GPU, False, (6, 1), "fp32"), ("fp32", GPU, True, (9, 0), "fp32"), ("fp16", CPU, False, (0, 0), "fp16"),
     ("auto", torch.device("mps"), False, (0, 0), "fp32")],
)  # fmt: skip
def test_the_precision_follows_the_hardware(
    asked: Any, device: torch.device, native: bool, capability: tuple[int, int], found: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: native)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert speed.format_of(asked, device) == found


def test_cudnn_searches_on_gpus_unless_the_run_must_be_the_same_each_time() -> None:
    before = torch.backends.cudnn.benchmark
    try:
        for device, deterministic, wanted in ((GPU, False, True), (GPU, True, False), (CPU, False, False)):
            settings = Hyperparameters(deterministic=deterministic, precision="fp32")
            assert speed.settle(settings, device, 64, 32)["cudnn_benchmark"] is wanted
            assert torch.backends.cudnn.benchmark is wanted
    finally:
        torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize(
    ("share", "size", "images"), [(64, 8, 256), (64, 64, 256), (64, 224, 64), (8, 384, 8), (1, 384, 7), (512, 32, 256)]
)
def test_an_evaluation_takes_no_more_memory_than_a_step(share: int, size: int, images: int) -> None:
    settings = Hyperparameters(precision="fp32")
    assert speed.settle(settings, CPU, share, size)["evaluation_batch"] == images


def test_an_evaluation_waits_once_for_the_device(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, network = load_split(packed / "validation"), build_model("cnn", 3, 12)
    whole = loop.evaluate(network, data, ALONE)
    waits: list[str] = []

    def counted(name: str) -> Any:
        real = getattr(torch.Tensor, name)

        def wait(self: torch.Tensor) -> Any:
            waits.append(name)
            return real(self)

        return wait

    for name in ("cpu", "item", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    between: list[int] = []
    parts = loop.evaluate(network, data, ALONE, Feed(data, CPU, "stream"), 2, lambda: between.append(len(waits)))
    assert between == [0] * math.ceil(len(data) / 2)
    assert waits == ["cpu", "cpu", "tolist"]  # the answers, the losses, and the sums over ranks, at the end
    assert (parts.images, parts.accuracy, parts.f1) == (whole.images, whole.accuracy, whole.f1)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)


def test_evaluations_may_be_rare_and_the_last_epoch_always_has_one(
    packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    options = FAST | {"epochs": 5, "keep_by": "loss"}
    every, (_, history) = train(packed, **options)[1], train(packed, evaluate_every=2, **options)
    assert [epoch["epoch"] for epoch in history] == [2, 4, 5]
    for epoch in history:
        assert epoch["val_loss"] == every[epoch["epoch"] - 1]["val_loss"]
    assert len([line for line in caplog.messages if line.startswith("epoch=3 step=") and "val" not in line]) == 1
    short = train(packed, checkpoints=tmp_path, evaluate_every=2, stop_after=1, **options)
    assert short == ({}, [])
    again = train(packed, checkpoints=tmp_path, evaluate_every=2, **options)
    assert [epoch["val_loss"] for epoch in again[1]] == [epoch["val_loss"] for epoch in history]
    with pytest.raises(ConfigurationError, match="evaluate_every is 0; it must be at least 1"):
        Hyperparameters(evaluate_every=0)


def test_patience_counts_evaluations_and_not_epochs() -> None:
    history = [{"epoch": number, "val_accuracy": 1 / number, "val_loss": 1.0} for number in (5, 10, 15)]
    settings = Hyperparameters(epochs=100, evaluate_every=5, patience=3)
    assert not watch.over(Progress(epoch=18, history=history), settings)
    history.append({"epoch": 20, "val_accuracy": 0.01, "val_loss": 1.0})
    assert watch.over(Progress(epoch=20, history=history), settings)


def _stopped(asks: int, monkeypatch: Any) -> None:
    """A signal comes when the ranks meet for the n-th time; they meet after every batch of two."""
    calls = [0]

    def asked() -> bool:
        calls[0] += 1
        return calls[0] == asks

    monkeypatch.setattr(interruption, "asked", asked)


def small_evaluations(monkeypatch: Any) -> None:
    monkeypatch.setattr(watch, "MEETING_SECONDS", 0.0)
    monkeypatch.setattr(speed, "EVALUATED_PIXELS", 0)
    monkeypatch.setattr(speed, "EVALUATION_BATCH", 2)


@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}])
def test_a_stop_is_heard_during_an_evaluation_and_the_run_ends_with_the_same_bytes(
    packed: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_evaluations(monkeypatch)
    whole, history = train(packed, **FAST, **options)
    steps = history[0]["step"]
    _stopped(2 * (steps + 5) - 2, monkeypatch)  # 5 batches an epoch of 9 images: the third of the second evaluation
    with pytest.raises(interruption.Stopped):
        train(packed, checkpoints=tmp_path, **FAST, **options)
    facts = json.loads((sorted(tmp_path.iterdir())[-1] / "checkpoint.json").read_text())
    assert (facts["epoch"], facts["position"], facts["step"]) == (1, steps, 2 * steps)
    resumed, again = train(packed, checkpoints=tmp_path, **FAST, **options)
    assert same(whole, resumed)
    assert [epoch["val_loss"] for epoch in again] == [epoch["val_loss"] for epoch in history]
    assert [epoch["train_loss"] for epoch in again] == [epoch["train_loss"] for epoch in history]


def _rank(rank: int, size: int, packed: str, results: str, cases: list[tuple[str, int]]) -> None:
    """One of several gloo ranks, with feeds as GPUs have them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{results}/store", rank=rank, world_size=size)
    for mode, stop in cases:
        _train(World(rank=rank, size=size, device=CPU), packed, Path(results), mode, stop)
    distributed.stop()


def _train(world: World, packed: str, results: Path, mode: str, stop: int) -> None:
    """Train, and note which rows of the training split this rank read."""
    with pytest.MonkeyPatch.context() as patch:
        small_evaluations(patch)
        read: list[int] = []
        pixels = Split.pixels

        def noted(self: Split, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
            read.extend(rows.tolist() if self.info["rows"] and len(self) > 10 else [])
            return pixels(self, rows)

        patch.setattr(Split, "pixels", noted)
        patch.setattr(Feed, "_suitable", lambda _: mode)
        folder = results / "checkpoints" if stop else None
        if stop:
            if world.rank == world.size - 1:
                _stopped(stop, patch)
            with pytest.raises(interruption.Stopped):
                train(Path(packed), world, folder, **FAST)
            patch.setattr(interruption, "asked", lambda: False)
        weights, _ = train(Path(packed), world, folder, **FAST)
    torch.save(weights, results / f"{mode}{stop}-{world.rank}.pt")
    (results / f"{mode}{stop}-{world.rank}.json").write_text(json.dumps(read))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_stream_read_their_own_rows_only_and_stop_together(packed: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "checkpoints").mkdir()
    cases = [("direct", 0), ("stream", 0), ("stream", 7)] if size == 2 else [("direct", 0), ("stream", 0)]
    run_ranks(_rank, size, str(packed), str(tmp_path), cases)
    weights = [torch.load(tmp_path / f"{mode}{stop}-{rank}.pt", weights_only=True)
               for mode, stop in cases for rank in range(size)]  # fmt: skip
    assert all(same(weights[0], each) for each in weights)
    read = [json.loads((tmp_path / f"stream0-{rank}.json").read_text()) for rank in range(size)]
    total = 40 // 8 * 8  # images of an epoch's whole batches
    for rank in range(size):
        assert len(read[rank]) <= 3 * total / size + total  # three epochs, and the one batch that chooses


def test_fp16_learns_and_its_checkpoint_has_the_scale(packed: Path, tmp_path: Path) -> None:
    weights, history = train(packed, checkpoints=tmp_path, **FAST | {"epochs": 8, "precision": "fp16"})
    assert history[-1]["train_loss"] < 0.9 * history[0]["train_loss"]
    assert all(bool(value.isfinite().all()) for value in weights.values())
    facts = json.loads((sorted(tmp_path.iterdir())[-1] / "checkpoint.json").read_text())
    assert facts["scaler"]["scale"] == 2.0**16
    assert facts["scaler"]["_growth_tracker"] == history[-1]["step"]


def test_a_gradient_that_overflows_in_fp16_costs_one_step_and_halves_the_scale() -> None:
    network = nn.Linear(4, 2)
    optimizer = build_optimizer(network, Hyperparameters(optimizer="sgd"))
    guard = Guard(network, optimizer, CPU, fp16=True)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    before = network.weight.detach().clone()
    for overflow in (True, False):
        guard.scale(network(torch.ones(3, 4)).sum(), 1.0).backward()
        if overflow:
            assert network.weight.grad is not None
            network.weight.grad[0, 0] = math.inf
        guard.unscale()
        if not overflow:
            assert network.weight.grad is not None
            assert network.weight.grad.unique().tolist() == [3.0]  # what is clipped is the true gradient
        assert guard.allows_step()
        guard.step()
        optimizer.zero_grad(set_to_none=True)
        assert torch.equal(before, network.weight) == overflow
        assert guard.scaler.get_scale() == 2.0**15
        assert guard.skipped() is None


def test_a_loss_that_stays_broken_in_fp16_ends_the_run_with_whole_weights(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "MEETING_SECONDS", 0.0)
    models: list[nn.Module] = []
    real = functional.cross_entropy

    def noted(network: nn.Module, decay: float) -> Any:
        models.append(network)
        return WeightAverage(network, decay)

    monkeypatch.setattr(loop, "WeightAverage", noted)
    monkeypatch.setattr(functional, "cross_entropy", lambda *args, **given: real(*args, **given) * math.nan)
    with pytest.raises(NonFiniteLoss, match=r"the loss is not finite at step 17, on 8 images"):
        train(packed, **FAST | {"precision": "fp16", "epochs": 9})
    assert all(bool(value.isfinite().all()) for value in models[0].parameters())


def test_an_operation_that_is_never_deterministic_is_named(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the pooling of AlexNet and VGG on GPUs."""
    said = "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set 'torch.use_"

    def fail(*_: Any) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(script, "train", fail)
    folders = {"SM_CHANNEL_TRAIN": packed / "train", "SM_CHANNEL_VALIDATION": packed / "validation",
               "SM_MODEL_DIR": tmp_path, "SM_OUTPUT_DATA_DIR": tmp_path,
               "SM_OUTPUT_FAILURE": tmp_path / "failure"}  # fmt: skip
    for name, value in folders.items():
        monkeypatch.setenv(name, str(value))
    assert script.main(["--epochs", "1"]) == 2
    assert (tmp_path / "failure").read_text() == (
        "error: deterministic is true, and adaptive_avg_pool2d_backward_cuda does not have a deterministic "
        "implementation; set it to false, or take a model without this operation"
    )


EVERYTHING: dict[str, Any] = {"horizontal_flip": True, "crop_scale": 0.4, "erase": 0.5, "rotate": 20.0,
                              "colour_jitter": 0.3, "translate": 0.2}  # fmt: skip


def test_what_is_compiled_for_a_gpu_does_what_its_kernels_do(split: Split) -> None:
    choices = augment.draw(len(split), 12, Hyperparameters(**EVERYTHING), 0)
    rows = np.arange(9)
    images, _ = split.batch(rows, CPU)
    given = {name: torch.from_numpy(values) for name, values in feed_module.chosen(choices, rows).items()}
    assert given.keys() == {"flips", "shifts", "crops", "turns", "colours", "holes", "fills"}
    found = feed_module.finish(images, given, [0.4] * 3, [0.2] * 3)
    with pytest.MonkeyPatch.context() as patch:  # `apply` on a GPU, with its kernels on the CPU
        patch.setattr(augment, "shift_by_copy", lambda some, shifts: augment.warp(some, augment.motion(*-shifts.T)))
        patch.setattr(augment, "crop_by_resize", augment.crop_by_gather)
        patch.setattr(augment, "erase_by_copy", augment.erase_by_mask)
        applied = choices.apply(images, rows)
    assert torch.equal(found, imaging.normalise(applied, [0.4] * 3, [0.2] * 3))
    plain = augment.draw(len(split), 12, Hyperparameters(translate=0.0), 0)
    assert feed_module.chosen(plain, rows) == {}


def test_a_feed_compiles_where_the_run_does_and_the_choices_allow(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []

    def compiled(function: Any, dynamic: bool) -> Any:
        assert not dynamic

        def run(*given: Any) -> Any:
            called.append(len(given[0]))
            return function(*given)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    assert Feed(split, CPU, "resident", compiled=True)._finish is None
    feed = Feed(split, CPU, "resident")
    monkeypatch.setattr(Feed, "_suitable", lambda _: "direct")
    feed._finish = Feed(split, GPU, compiled=True)._finish
    drawn = augment.draw(len(split), 12, Hyperparameters(), 0)
    (compiled_batch,) = [images for images, _ in feed.batches([np.arange(5)], drawn)]
    feed._finish = None
    (plain_batch,) = [images for images, _ in feed.batches([np.arange(5)], drawn)]
    assert torch.equal(compiled_batch, plain_batch)
    assert called == [5]
    feed._finish = compiled(feed_module.finish, dynamic=False)
    assert len(list(feed.batches([np.arange(5)]))) == 1
    trivial = augment.draw(len(split), 12, Hyperparameters(augment="trivial"), 0)
    assert len(list(feed.batches([np.arange(5)], trivial))) == 1
    assert called == [5]


def test_every_choice_is_told_once_and_kept(packed: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    facts: dict[str, Any] = {"pretrained": None}
    splits = load_split(packed / "train"), load_split(packed / "validation")
    settings = Hyperparameters(model="cnn", image_size=12, epochs=1, learning_rate=0.01, precision="fp32")
    loop.fit(build_model("cnn", 3, 12), *splits, settings, ALONE, None, lambda _: None, facts)
    assert facts.keys() == {"pretrained", "channels_last", "compile", "precision", "cudnn_benchmark",
                            "evaluation_batch", "images", "evaluated_images"}  # fmt: skip
    assert facts["precision"] == "fp32"
    assert facts["images"] == facts["evaluated_images"] == "direct"
    assert len([line for line in caplog.messages if line.startswith("memory layout ")]) == 1
    assert caplog.messages.count("precision fp32; 256 images are evaluated at a time") == 1
