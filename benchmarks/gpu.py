#!/usr/bin/env python3
"""One pass over the GPU path of a generated project: first whether it works, then how fast it is and why.

    python3 benchmarks/gpu.py /path/to/generated/project [--budget 470] [--only NAME,NAME] [--out FOLDER]

Needs torch, torchvision, safetensors, numpy, pillow; no uv, no network, one GPU. Without a GPU the same checks run tiny
on the CPU, which shows that the script itself works. Prints one JSON line a check as it goes, then a table; the lines
are also in FOLDER/gpu_check.jsonl (default: $OUT, else the working directory). Exit code: number of failed checks.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import faulthandler
import gc
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("project", type=Path)
parser.add_argument("--budget", type=float, default=470.0, help="seconds in all")
parser.add_argument("--only", default="", help="comma-separated names of checks")
parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "."))
options = parser.parse_args()
PROJECT = options.project.resolve()
SRC = PROJECT / "src"
sys.path[:0] = [str(SRC), str(PROJECT)]
faulthandler.enable()
faulthandler.dump_traceback_later(options.budget + 60, exit=True)  # a hang in a kernel: say where, and end

import imaging
import numpy as np
import torch
from model import best_device, build_model
from torch import nn
from torch.nn import functional
from training import augment, feed, interruption, loop, speed, watch
from training.config import Hyperparameters, resolve
from training.data import Split
from training.distributed import World
from training.optim import WeightAverage, build_optimizer

logging.getLogger("training").setLevel(logging.WARNING)
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
if not GPU:  # only to show that the script works: threads that spin for one another on a busy machine take minutes
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
WORLD = World(rank=0, size=1, device=best_device() if GPU else DEVICE)
PEAK = next(
    (p for n, p in {"H200": 989, "H100": 989, "A100": 312}.items() if GPU and n in torch.cuda.get_device_name()), None
)
GFLOP = 24.3  # an image of ResNet-50 at 224 pixels, forward and backward
MEASURED: list[float] = []  # TFLOP/s of a matrix product here
TMP = Path(tempfile.mkdtemp(prefix="gpu-check-"))
RESULTS: list[dict] = []
CHECKS: list[tuple] = []
options.out.mkdir(parents=True, exist_ok=True)
LOG = (options.out / "gpu_check.jsonl").open("w", encoding="utf-8")


def check(cost: float, gpu_only: bool = False):
    """Register a check: `cost` is the seconds that must be left to begin it."""

    def register(function):
        CHECKS.append((function.__name__, function, cost, gpu_only))
        return function

    return register


def emit(result: dict) -> None:
    RESULTS.append(result)
    line = json.dumps(result, default=str)
    print(line, flush=True)
    LOG.write(line + "\n")
    LOG.flush()


def left() -> float:
    return float(options.budget - (time.monotonic() - BEGAN))


def sync() -> None:
    if GPU:
        torch.cuda.synchronize()


def size_of(gpu_value, cpu_value):
    return gpu_value if GPU else cpu_value


# ---------------------------------------------------------------- material


def make_split(n: int, size: int, classes: int = 10, shards: int = 1, seed: int = 0, learnable: bool = True) -> Split:
    random = np.random.default_rng(seed)
    labels = (np.arange(n) % classes).astype(np.int64)
    pixels: Any
    if learnable:  # digits-like: a coarse picture a class, under noise and shifts
        shapes = np.random.default_rng(7).integers(0, 2, (classes, 4, 4, 3)) * 150
        coarse = shapes[labels] + random.integers(0, 80, (n, 4, 4, 3))
        pixels = np.kron(coarse.astype(np.uint8), np.ones((1, math.ceil(size / 4), math.ceil(size / 4), 1), np.uint8))[
            :, :size, :size
        ]
    else:
        pixels = np.frombuffer(bytearray(random.bytes(n * size * size * 3)), np.uint8).reshape(n, size, size, 3)
    rows = [f"r{i}" for i in range(n)]
    info = {
        "schema_version": 1,
        "classes": [f"c{i}" for i in range(classes)],
        "size": size,
        "mean": [0.4] * 3,
        "std": [0.25] * 3,
        "fingerprint": f"{seed}",
        "rows": {"train": rows, "validation": rows, "test": rows},
    }
    return Split([np.ascontiguousarray(part) for part in np.array_split(pixels, shards)], labels, info)


def pack_to(folder: Path, split: Split) -> None:
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(split.info))
    first = 0
    for number, shard in enumerate(split.images):
        np.save(folder / f"images-{number:05d}.npy", shard)
        np.save(folder / f"labels-{number:05d}.npy", split.labels[first : first + len(shard)])
        first += len(shard)


@contextlib.contextmanager
def feeding(mode: str | None):
    """Force the feed's mode."""
    kept = feed.Feed._suitable
    if mode:
        feed.Feed._suitable = lambda _: mode
    try:
        yield
    finally:
        feed.Feed._suitable = kept


def train(
    name: str,
    data: Split,
    validation: Split,
    mode: str | None = None,
    checkpoints: Path | None = None,
    world=None,
    on_epoch=lambda _: None,
    **given,
):
    """`fit` of a new model. Returns the model that it returns, its history, and seconds."""
    world = world or WORLD
    settings = resolve(
        Hyperparameters(model=name, **({"epochs": 2, "batch_size": 32, "compile": False} | given)),
        data.image_size,
        len(data),
    )
    torch.manual_seed(0)
    model = build_model(name, len(data.classes), data.image_size).to(world.device)
    started = time.perf_counter()
    with feeding(mode):
        trained, history = loop.fit(model, data, validation, settings, world, checkpoints, on_epoch)
    sync()
    return trained, history, time.perf_counter() - started


def state(model: nn.Module) -> dict:
    return {key: value.detach().float().cpu().clone() for key, value in model.state_dict().items()}


def apart(a: dict, b: dict) -> float:
    return max(float((a[key] - b[key]).abs().max()) for key in a)


SMALL, SMALL_VAL = make_split(640, 16, shards=3), make_split(100, 16, seed=1)


class One(int):
    """1 that says it is more than 1: collectives, DDP and sync BN run, on one rank."""

    __hash__ = int.__hash__

    def __gt__(self, other):
        return True

    def __eq__(self, other):
        return False


# ---------------------------------------------------------------- does it work


@check(5)
def environment():
    facts: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cores": os.cpu_count(),
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("gcc"),
        "uvicorn": importlib.util.find_spec("uvicorn") is not None,
        "starlette": importlib.util.find_spec("starlette") is not None,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "best_device": str(best_device()),
    }
    if GPU:
        p = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": p.name,
            "memory_gb": round(p.total_memory / 1e9, 1),
            "sms": p.multi_processor_count,
            "nccl": str(torch.cuda.nccl.version()),
            "precision": speed.format_of("auto", DEVICE),
        }
    try:
        from pipelines.local import engine

        facts["engine.gpus()"] = engine.gpus()
    except ImportError as error:  # of yaml
        facts["engine.gpus()"] = str(error)
    return facts


@check(10, gpu_only=True)
def ceilings():
    """What this card gives: matrix product, copies on it and to it, launches."""

    def rate(function, repeats):
        for _ in range(3):
            function()
        sync()
        started = time.perf_counter()
        for _ in range(repeats):
            function()
        sync()
        return (time.perf_counter() - started) / repeats

    a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    facts: dict[str, Any] = {"bf16_tflops": round(2 * 8192**3 / rate(lambda: a @ a, 10) / 1e12)}
    MEASURED.append(facts["bf16_tflops"])
    big = torch.empty(2 << 30, dtype=torch.uint8, device=DEVICE)
    other = torch.empty_like(big)
    facts["d2d_read_plus_write_TB_s"] = round(2 * big.numel() / rate(lambda: other.copy_(big), 10) / 1e12, 2)
    batch = np.random.default_rng(0).integers(0, 255, (256, 224, 224, 3), dtype=np.uint8)
    host = torch.from_numpy(batch)
    pinned = host.pin_memory()
    target = torch.empty_like(host, device=DEVICE)
    facts["h2d_pinned_GB_s"] = round(host.numel() / rate(lambda: target.copy_(pinned, non_blocking=True), 20) / 1e9, 1)
    facts["h2d_pageable_GB_s"] = round(host.numel() / rate(lambda: target.copy_(host), 10) / 1e9, 1)
    facts["pin_memory_GB_s"] = round(host.numel() / rate(lambda: host.pin_memory(), 10) / 1e9, 1)
    index = np.random.default_rng(0).permutation(256)
    facts["numpy_gather_GB_s"] = round(host.numel() / rate(lambda: batch[index], 10) / 1e9, 1)
    one = torch.zeros(1, device=DEVICE)
    facts["launch_us"] = round(1e6 * rate(lambda: one.add_(1), 2000), 2)
    return facts


@check(15)
def augmentation_matches_cpu():
    """The kernels for accelerators against those for CPUs, on the same choices."""
    size, n = 32, 64
    data = make_split(n, size, seed=3)
    settings = Hyperparameters(horizontal_flip=True, crop_scale=0.4, erase=0.5, translate=0.2)
    chosen = augment.draw(n, size, settings, 0)
    host, images = torch.from_numpy(data.images[0]), torch.from_numpy(data.images[0]).to(DEVICE)
    facts: dict[str, Any] = {}
    pairs = {
        "shift": (augment.shift_by_copy(host, chosen.shifts), augment.warp(images, augment.motion(*-chosen.shifts.T))),
        "crop": (augment.crop_by_resize(host, chosen.crops), augment.crop_by_gather(images, chosen.crops)),
        "erase": (
            augment.erase_by_copy(host, chosen.holes, chosen.fills),
            augment.erase_by_mask(images, chosen.holes, chosen.fills),
        ),
    }
    for name, (a, b) in pairs.items():
        facts[name] = int((a.int() - b.cpu().int()).abs().max())
    everything = Hyperparameters(
        **{k: v for k, v in FEATURES["every_augmentation"].items() if k not in ("mixup", "cutmix")}
    )
    drawn, rows = augment.draw(n, size, everything, 0), np.arange(n)
    given = {name: torch.from_numpy(values).to(DEVICE) for name, values in feed.chosen(drawn, rows).items()}
    plain = imaging.normalise(drawn.apply(images, rows), [0.4] * 3, [0.2] * 3) if GPU else None
    for label, function in (
        ("finish", feed.finish),
        *([("compiled", torch.compile(feed.finish, dynamic=False))] if GPU else []),
    ):
        found = function(images, given, [0.4] * 3, [0.2] * 3)
        facts[label] = float((found - (found if plain is None else plain)).abs().mean())
        assert facts[label] < 0.01, facts
    facts["order"] = imaging.normalise(images, [0.4] * 3, [0.2] * 3).is_contiguous(memory_format=torch.channels_last)
    assert facts["shift"] == 0 and facts["erase"] == 0 and facts["crop"] <= 1 and facts["order"], facts
    return facts


def smoke(name: str, precision: str, mode: str | None, **more):
    data, validation = (
        (SMALL, SMALL_VAL) if name == "cnn" else (make_split(320, 32, shards=2), make_split(60, 32, seed=1))
    )
    _, history, seconds = train(
        name, data, validation, mode, precision=precision, epochs=size_of(4, 2) if name == "cnn" else 2, **more
    )
    assert math.isfinite(history[-1]["train_loss"]), history
    assert history[-1]["train_loss"] < history[0]["train_loss"] * 1.05, history
    return {
        "train_loss": [round(e["train_loss"], 3) for e in history],
        "val_accuracy": history[-1]["val_accuracy"],
        "fit_seconds": round(seconds, 2),
    }


MODES = ("resident", "stream") if GPU else ("direct", "stream")
for _name, _precision, _mode in [
    ("cnn", "fp32", MODES[0]),
    ("cnn", "bf16", MODES[0]),
    ("cnn", "bf16", MODES[1]),
    ("resnet18", "fp32", MODES[0]),
    ("resnet18", "bf16", MODES[0]),
    ("resnet18", "bf16", MODES[1]),
]:

    def _smoke(name=_name, precision=_precision, mode=_mode):
        return smoke(name, precision, mode)

    _smoke.__name__ = f"smoke_{_name}_{_precision}_{_mode}"
    check(10)(_smoke)


@check(10)
def feed_modes_equal():
    """The feed must not change what is learned: same seed, both modes."""
    torch.backends.cudnn.deterministic = True
    try:
        a, b = (train("cnn", SMALL, SMALL_VAL, mode, precision="fp32")[0] for mode in MODES)
    finally:
        torch.backends.cudnn.deterministic = False
    return {"largest_difference": apart(state(a), state(b))}


FEATURES: dict[str, dict[str, Any]] = {
    "every_augmentation": {
        "horizontal_flip": True,
        "crop_scale": 0.5,
        "colour_jitter": 0.2,
        "erase": 0.5,
        "mixup": 0.2,
        "cutmix": 0.5,
    },
    "accumulate_clip": {"accumulate": 3, "clip_gradients": 1.0},
    "sgd": {"optimizer": "sgd"},
    "sgd_no_momentum": {"optimizer": "sgd", "momentum": 0.0},
    "no_ema": {"ema_decay": 0.0},
    "sync_bn_one_rank": {"sync_batch_norm": True},
    **({"fp16": {"precision": "fp16"}} if GPU else {}),  # CPUs take minutes
    "evaluate_every": {"evaluate_every": 2},
    "compile_auto_short": {"compile": "auto"},
}


@check(25)
def features():
    """Each option once, in both modes of feeding."""
    facts, failed = {}, []
    for name, given in FEATURES.items():
        for mode in MODES:
            try:
                history = train("cnn", SMALL, SMALL_VAL, mode, epochs=1, **given)[1]
                facts[f"{name}.{mode}"] = round(history[-1]["train_loss"], 3)
            except Exception as error:
                failed.append(f"{name}.{mode}: {type(error).__name__}: {error}"[:300])
    assert not failed, failed
    return facts


@check(15)
def guard_non_finite():
    """A loss that is NaN at step 5 of 20: reported as step 5, weights finite."""
    real, calls = functional.cross_entropy, [0]
    models = []
    kept = loop.WeightAverage

    def spoiled(*args, **given):
        calls[0] += 1
        return real(*args, **given) * (float("nan") if calls[0] == 5 else 1.0)

    def noted(model, decay):
        models.append(model)
        return kept(model, decay)

    loop.WeightAverage = noted
    loop.functional.cross_entropy = spoiled
    try:
        train("cnn", SMALL, SMALL_VAL, MODES[0])
        raise AssertionError("it went on")
    except watch.NonFiniteLoss as error:
        text = str(error)
    finally:
        loop.functional.cross_entropy, loop.WeightAverage = real, kept
    finite = all(bool(p.isfinite().all()) for p in models[0].parameters())
    assert "at step 5," in text and finite, (text, finite)
    return {"message": text[:120], "weights_finite": finite}


@check(25)
def resume_in_process():
    """Drift between equal runs, and between a run and one that was stopped and resumed (not deterministic mode)."""
    kept, asked, calls = watch.MEETING_SECONDS, interruption.asked, [0]
    watch.MEETING_SECONDS = 0.0  # meet after every step
    facts: dict[str, Any] = {}
    try:
        for precision in ("fp32", "bf16"):
            given: dict[str, Any] = {"mode": MODES[0], "precision": precision, "epochs": 3}
            a, b = state(train("cnn", SMALL, SMALL_VAL, **given)[0]), state(train("cnn", SMALL, SMALL_VAL, **given)[0])
            folder = Path(tempfile.mkdtemp(dir=TMP))
            calls[0] = 0

            def counted():
                calls[0] += 1
                return calls[0] == 27

            interruption.asked = counted
            try:
                train("cnn", SMALL, SMALL_VAL, checkpoints=folder, **given)
                raise AssertionError("it was not stopped")
            except interruption.Stopped:
                pass
            interruption.asked = asked
            c = state(train("cnn", SMALL, SMALL_VAL, checkpoints=folder, **given)[0])
            facts |= {f"{precision}.two_runs_apart": apart(a, b), f"{precision}.resumed_apart": apart(a, c)}
    finally:
        watch.MEETING_SECONDS, interruption.asked = kept, asked
    return facts


@check(20)
def ddp_nccl_one_rank():
    """DDP, the collectives, sync BN, accumulation and a checkpoint through NCCL (gloo on a CPU), in a group of one."""
    import torch.distributed as dist

    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    from training import distributed

    world = distributed.start(120.0)
    facts: dict[str, Any] = {"backend": dist.get_backend(), "device": str(world.device)}
    world = World(rank=0, size=One(1), device=world.device)
    try:
        plain = train("cnn", SMALL, SMALL_VAL, MODES[0], precision="fp32")[1]
        through = train("cnn", SMALL, SMALL_VAL, MODES[0], precision="fp32", world=world)[1]
        facts["loss_plain_and_ddp"] = [plain[-1]["train_loss"], through[-1]["train_loss"]]
        train(
            "cnn",
            SMALL,
            SMALL_VAL,
            MODES[1],
            world=world,
            accumulate=2,
            clip_gradients=1.0,
            sync_batch_norm=True,
            epochs=1,
            checkpoint_minutes=0.0,
            checkpoints=Path(tempfile.mkdtemp(dir=TMP)),
        )
        folder = Path(tempfile.mkdtemp(dir=TMP))
        train("cnn", SMALL, SMALL_VAL, MODES[0], world=world, checkpoints=folder, epochs=1)
        resumed = train("cnn", SMALL, SMALL_VAL, MODES[0], world=world, checkpoints=folder, epochs=1)[1]
        facts["resumed_epochs"] = len(resumed)
    finally:
        distributed.stop()
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    assert abs(facts["loss_plain_and_ddp"][0] - facts["loss_plain_and_ddp"][1]) < 0.05, facts
    return facts


# ---------------------------------------------------------------- the real entry, as jobs start it


class Job:
    """`launch.py` or `train.py` as a process."""

    def __init__(self, name: str, arguments: dict, script: str = "train.py", **environment):
        self.root = TMP / f"job-{name}"
        for part in ("model", "output", "checkpoints"):
            (self.root / part).mkdir(parents=True, exist_ok=True)
        base = {k: v for k, v in os.environ.items() if not k.startswith(("SM_", "WORLD_SIZE"))}
        base |= {
            "SM_CHANNEL_TRAIN": str(TMP / "packed/train"),
            "SM_CHANNEL_VALIDATION": str(TMP / "packed/validation"),
            "SM_MODEL_DIR": str(self.root / "model"),
            "SM_OUTPUT_DATA_DIR": str(self.root / "output"),
            "SM_CHANNEL_CHECKPOINTS": str(self.root / "checkpoints"),
            "SM_HPS": json.dumps(arguments),
            "SM_OUTPUT_FAILURE": str(self.root / "failure"),
            "PYTHONUNBUFFERED": "1",
        } | environment
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, str(SRC / "training" / script)],
            env=base,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout or []:
            self.lines.append(line.rstrip())

    def wait_for(self, pattern: str, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if any(re.search(pattern, line) for line in list(self.lines)):
                return True
            time.sleep(0.02)
        return any(re.search(pattern, line) for line in self.lines)

    def wait(self, seconds: float = size_of(120, 400)) -> int:
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s: {self.lines[-5:]}") from None
        self.reader.join(5)
        return code

    def digest(self) -> str:
        return hashlib.sha256((self.root / "model" / "model.safetensors").read_bytes()).hexdigest()[:16]


ARGUMENTS = {
    "model": "cnn",
    "epochs": size_of(30, 3),
    "batch_size": 32,
    "deterministic": True,
    "compile": False,
    "checkpoint_minutes": 100,
}
JOBS: dict[str, Job] = {}


@check(60)
def jobs_deterministic_and_resumed():
    """train.py twice with `deterministic`, and once stopped by SIGTERM (through launch.py) and resumed: same bytes?"""
    if not (TMP / "packed").exists():
        pack_to(TMP / "packed/train", make_split(size_of(2560, 320), size_of(32, 16), shards=2))
        pack_to(
            TMP / "packed/validation", make_split(200, size_of(32, 16), seed=1) if GPU else make_split(40, 16, seed=1)
        )
        for part in ("train", "validation"):  # of one data set
            place = TMP / "packed" / part / "dataset.json"
            place.write_text(json.dumps(json.loads(place.read_text()) | {"fingerprint": "both"}))
    JOBS["a"], JOBS["b"] = Job("a", ARGUMENTS), Job("b", ARGUMENTS)
    stopped = Job("c", ARGUMENTS, "launch.py")
    assert stopped.wait_for(r"^epoch=1 ", size_of(90, 300)), stopped.lines[-8:]
    time.sleep(0.3)
    asked = time.monotonic()
    stopped.process.terminate()
    code = stopped.wait(size_of(60, 200))
    facts: dict[str, Any] = {
        "sigterm_code": code,
        "sigterm_to_exit_s": round(time.monotonic() - asked, 2),
        "checkpoints": sorted(p.name for p in (stopped.root / "checkpoints").iterdir()),
    }
    resumed = Job("c", ARGUMENTS)
    codes = [JOBS["a"].wait(), JOBS["b"].wait(), resumed.wait()]
    facts |= {
        "codes": codes,
        "tail": [] if codes == [0, 0, 0] else [j.lines[-6:] for j in (JOBS["a"], JOBS["b"], resumed)],
    }
    assert codes == [0, 0, 0], facts
    facts |= {
        "same_bytes_twice": JOBS["a"].digest() == JOBS["b"].digest(),
        "same_bytes_resumed": JOBS["a"].digest() == resumed.digest(),
        "first_step_s": next((line for line in JOBS["a"].lines if "images_per_second" in line), "")[-40:],
        "process_seconds": json.loads((JOBS["a"].root / "output/metrics.json").read_text())["seconds"],
        "device": json.loads((JOBS["a"].root / "output/run.json").read_text())["device"],
        "val_accuracy": json.loads((JOBS["a"].root / "output/metrics.json").read_text())["val_accuracy"],
    }
    assert code == 143 and facts["same_bytes_twice"] and facts["same_bytes_resumed"], facts
    return facts


@check(45)
def job_torchrun_sigterm():
    """launch.py through torchrun (one rank) with restarts: SIGTERM ends in 143; how too many ranks are refused."""
    given = ARGUMENTS | {"deterministic": False, "max_restarts": 1, "epochs": 4000}
    job = Job("torchrun", given, "launch.py", SM_NUM_GPUS="1")
    assert job.wait_for(r"^epoch=1 ", size_of(90, 300)), job.lines[-8:]
    asked = time.monotonic()
    job.process.terminate()
    facts: dict[str, Any] = {"code": job.wait(100), "seconds": round(time.monotonic() - asked, 2)}
    if GPU:  # SM_NUM_GPUS above what CUDA_VISIBLE_DEVICES shows, as LOCAL_MODE=process gives it
        many = Job("many", ARGUMENTS | {"epochs": 1}, "launch.py", SM_NUM_GPUS=str(torch.cuda.device_count() + 1))
        try:
            facts["one_rank_too_many_code"] = many.wait(60)
        except AssertionError as error:
            facts["one_rank_too_many_code"] = str(error)[:200]
        place = many.root / "failure"
        facts["one_rank_too_many_reason"] = (
            place.read_text()[-200:] if place.exists() else (many.lines or [""])[-1][:200]
        )
        blind = Job(
            "blind", ARGUMENTS | {"epochs": 1}, "launch.py", SM_NUM_GPUS="1", CUDA_VISIBLE_DEVICES="-1"
        )  # as with a driver that is too old: refused
        facts["gpu_promised_but_invisible"] = [
            blind.wait(90),
            next((line for line in blind.lines if "has GPUs" in line), ""),
        ]
    assert facts["code"] == 143, facts
    return facts


@check(45)
def artifact_gpu_against_cpu():
    """One artifact, made on this device: golden samples hold on GPU and CPU, in fp32 and bf16, and answers agree."""
    folder = JOBS["a"].root / "model"
    archive = TMP / "model.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=".")
    from PIL import Image

    pictures = []
    for number, pixels in enumerate(make_split(32, 48, seed=5).images[0]):
        pictures.append(str(TMP / f"picture{number}.png"))
        Image.fromarray(pixels).save(pictures[-1])
    places = {
        "device.fp32": {},
        "device.bf16": {"INFERENCE_PRECISION": "bf16"},
        "cpu.fp32": {"CUDA_VISIBLE_DEVICES": ""},
        "cpu.bf16": {"CUDA_VISIBLE_DEVICES": "", "INFERENCE_PRECISION": "bf16"},
    }
    running = {
        place: subprocess.Popen(
            [sys.executable, str(SRC / "inference/predict.py"), "--artifact", str(archive), "--json", *pictures],
            env=os.environ | given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place, given in places.items()
    }
    answers, facts = {}, {}
    for place, process in running.items():
        out, err = process.communicate(timeout=size_of(120, 400))
        facts[f"{place}.code"] = process.returncode
        if process.returncode:
            facts[f"{place}.error"] = err[-300:]
        else:
            answers[place] = np.array([json.loads(line)["probabilities"][0] for line in out.splitlines()])
    for place, found in answers.items():
        facts[f"{place}.apart_from_cpu.fp32"] = float(np.abs(found - answers["cpu.fp32"]).max())
        facts[f"{place}.labels_that_differ"] = int((found.argmax(1) != answers["cpu.fp32"].argmax(1)).sum())
    assert len(answers) == 4, facts
    return facts


class Context:
    def get_request_header(self, *_):
        return None

    def set_response_header(self, *_):
        pass


def photo() -> bytes:
    from material import photo as made

    return made()


@check(50)
def serving():
    """The batcher, the server without HTTP: latency alone, images/s with 64 callers; resnet50 at 224 on a GPU."""
    from inference import batcher as b
    from inference.export import write_artifact

    name, side = size_of(("resnet50", 224), ("cnn", 32))
    facts: dict[str, Any] = {}
    body = photo()
    folder = TMP / "served"
    torch.manual_seed(0)
    validation = make_split(64, side, seed=2)
    started = time.perf_counter()
    write_artifact(folder, build_model(name, 10, side).to(DEVICE), Hyperparameters(model=name), validation, {}, None)
    facts["write_artifact_s"] = round(time.perf_counter() - started, 2)

    async def load(precision: str, threads: int):
        os.environ["INFERENCE_PRECISION"] = precision
        made = b.Batcher(folder, 32, threads, threads, 100)
        started = time.perf_counter()
        await made.load()
        facts[f"{precision}.load_s"] = round(time.perf_counter() - started, 2)
        one = []
        for _ in range(size_of(60, 8)):
            started = time.perf_counter()
            await made.answer(body, "image/jpeg", None, Context())
            one.append(1000 * (time.perf_counter() - started))
        facts[f"{precision}.alone_ms_p50_p99"] = [round(statistics.median(one[3:]), 2), round(sorted(one[3:])[-1], 2)]
        total, batches = size_of(3000, 64), made.computed
        gate = asyncio.Semaphore(64)

        async def ask():
            async with gate:
                await made.answer(body, "image/jpeg", None, Context())

        started = time.perf_counter()
        await asyncio.gather(*[ask() for _ in range(total)])
        seconds = time.perf_counter() - started
        facts[f"{precision}.images_per_second_64_callers"] = round(total / seconds)
        facts[f"{precision}.images_a_batch"] = round(total / (made.computed - batches), 1)
        for task in made._working:
            task.cancel()

    for precision in ("fp32", "bf16"):
        try:
            asyncio.run(load(precision, max((os.cpu_count() or 2) // 2, 1)))
        except Exception as error:
            facts[f"{precision}.error"] = f"{type(error).__name__}: {error}"[:300]
    os.environ.pop("INFERENCE_PRECISION", None)
    # the ceiling: the model alone, batch 32 and 256, on the device
    model = build_model(name, 10, side).to(DEVICE).to(memory_format=torch.channels_last).eval()
    for batch in (32, 256) if GPU else (8,):
        images = torch.randn(batch, 3, side, side, device=DEVICE).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16):
            for _ in range(3):
                model(images)
            sync()
            started = time.perf_counter()
            for _ in range(size_of(20, 2)):
                model(images)
            sync()
        facts[f"model_alone_bf16_batch{batch}_images_per_second"] = round(
            batch * size_of(20, 2) / (time.perf_counter() - started)
        )
    assert not any(key.endswith(".error") for key in facts), facts
    return facts


@check(25)
def server_over_http():
    """serve.py on the artifact of job a: ready, one answer, SIGTERM ends in 0. Needs starlette and uvicorn."""
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("starlette") is None:
        return {"left_out": "no starlette or uvicorn here"}
    import urllib.request

    port = 18080
    process = subprocess.Popen(
        [
            sys.executable,
            str(SRC / "inference/serve.py"),
            "--model-dir",
            str(JOBS["a"].root / "model"),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    started = time.monotonic()
    try:
        while time.monotonic() - started < 60:
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2).status == 200:
                    break
            time.sleep(0.1)
        facts: dict[str, Any] = {"ready_s": round(time.monotonic() - started, 1)}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", photo(), {"Content-Type": "image/jpeg"}
        )
        facts["answer"] = urllib.request.urlopen(request, timeout=20).read()[:80].decode()
    finally:
        process.terminate()
    facts["code_after_sigterm"] = process.wait(30)
    assert facts["code_after_sigterm"] == 0, facts
    return facts


# ---------------------------------------------------------------- how fast, and why


@check(15, gpu_only=True)
def host_syncs_per_step():
    """Synchronising calls, by place, in a run of 2 epochs of 100 steps (resident and stream)."""
    data, validation = make_split(6400, 32), make_split(512, 32, seed=1)
    facts: dict[str, Any] = {}
    for mode in MODES:
        places: collections.Counter[str] = collections.Counter()

        def show(message, *_, places=places, **__):
            if "synchronizing CUDA operation" in str(message):
                own = [f for f in traceback.extract_stack() if str(SRC) in f.filename]
                places[f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "elsewhere"] += 1

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show
            torch.cuda.set_sync_debug_mode(1)
            try:
                train("cnn", data, validation, mode, batch_size=64, horizontal_flip=True)
            finally:
                torch.cuda.set_sync_debug_mode(0)
        facts[mode] = {"steps": 200, "all": sum(places.values()), "places": dict(places.most_common(10))}
    return facts


class Bare:
    """The training step on one batch that lies ready, with parts that can be left out."""

    def __init__(
        self, name_or_model, size, batch, precision="bf16", compiled=False, channels_last=True, optimizer="sgd"
    ):
        torch.manual_seed(0)
        model = (
            build_model(name_or_model, 1000 if size > 100 else 10, size)
            if isinstance(name_or_model, str)
            else name_or_model
        )
        self.model = (
            model.to(DEVICE).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format).train()
        )
        settings = Hyperparameters(optimizer=optimizer, learning_rate=1e-4)
        self.average = WeightAverage(self.model, 0.9)
        self.optimizer = build_optimizer(self.model, settings)
        self.guard = watch.Guard(self.model, self.optimizer, DEVICE)
        self.cast = speed.autocast(precision, DEVICE)
        self.images = torch.randn(batch, size, size, 3, device=DEVICE).permute(0, 3, 1, 2)
        if not channels_last:
            self.images = self.images.contiguous()
        self.labels = torch.randint(0, 10, (batch,), device=DEVICE)
        self.batch = batch
        self.call = self.model
        if compiled:
            self.model.compile() if compiled is True else self.model.compile(mode=compiled)

    def step(self, guard=True, optimizer=True, ema=True, backward=True):
        with self.cast:
            logits = self.call(self.images)
        loss = functional.cross_entropy(logits.float(), self.labels, reduction="sum", label_smoothing=0.1)
        if not backward:
            return
        (self.guard.scale(loss, 1 / self.batch) if guard else loss / self.batch).backward()
        if guard:
            self.guard.allows_step()
        if optimizer:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if ema:
            self.average.update()

    def rate(self, steps, **parts):
        """Images a second, and milliseconds a step."""
        for _ in range(3):
            self.step(**parts)
        sync()
        started = time.perf_counter()
        for _ in range(steps):
            self.step(**parts)
        sync()
        seconds = (time.perf_counter() - started) / steps
        return {"images_per_second": round(self.batch / seconds), "ms": round(1000 * seconds, 3)}


def free():
    gc.collect()
    torch._dynamo.reset() if "torch._dynamo" in sys.modules else None
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def race(name, size, batch, steps, mode, rounds=3, **given):
    """Images a second of the real loop and of the bare step of the product's benchmark, in one process, in turns."""
    from step import Limit

    free()
    classes = 1000 if size > 100 else 10
    data, validation = make_split(batch * steps, size, classes, learnable=False), make_split(64, size, classes, seed=1)
    settings = resolve(
        Hyperparameters(
            **(
                {"model": name, "batch_size": batch, "epochs": rounds + 1, "compile": False, "precision": "bf16"}
                | given
            )
        ),
        size,
        len(data),
    )
    torch.manual_seed(0)
    model = build_model(name, classes, size).to(DEVICE)
    limit: list[Any] = []
    bare: list[float] = []
    stamps: list[float] = []
    chosen: dict[str, Any] = {}

    def between(_):
        stamps.append(time.perf_counter())
        if not limit:
            limit.append(Limit(model, data, settings, WORLD, chosen["compile"]))
            limit[0].seconds(5)
        bare.append(limit[0].seconds(steps) / steps)

    started = time.perf_counter()
    with feeding(mode):
        _, history = loop.fit(model, data, validation, settings, WORLD, None, between, chosen)
    real = [batch / e["images_per_second"] for e in history[1:]]
    facts: dict[str, Any] = {
        "images_per_second": round(batch / statistics.median(real)),
        "limit": round(batch / statistics.median(bare)),
        "fed_over_limit": round(statistics.median(bare) / statistics.median(real), 3),
        "ms": round(1000 * statistics.median(real), 2),
        "first_epoch_s": round(stamps[0] - started, 1),
        "compile": chosen["compile"],
        "precision": chosen["precision"],
    }
    if GPU:
        facts["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    if name == "resnet50" and PEAK:
        facts["mfu"] = round(facts["images_per_second"] * GFLOP / (1000 * PEAK), 3)
    if name == "resnet50" and MEASURED:  # a card that is not in the table has this one
        facts["share_of_its_matrix_products"] = round(facts["images_per_second"] * GFLOP / (1000 * MEASURED[0]), 3)
    return facts


def in_turn(cases: dict) -> dict:
    facts: dict[str, Any] = {}
    for key, call in cases.items():
        if left() < 25:
            facts[key] = "left out: no time"
            continue
        try:
            facts[key] = call()
        except Exception as error:
            facts[key] = f"{type(error).__name__}: {error}"[:300]
        free()
    return facts


@check(40)
def loop_cnn32():
    """The loop at 32 pixels: fed ÷ limit in both modes, batch 64, 128 and 1024, with and without augmentation."""
    s = size_of(300, 3)
    b = size_of(1024, 16)
    return in_turn(
        {
            "b64.resident": lambda: race("cnn", 32, size_of(64, 8), s, MODES[0], horizontal_flip=True, erase=0.5),
            "b128.resident": lambda: race("cnn", 32, size_of(128, 8), s, MODES[0]),
            "b128.resident.no_augmentation": lambda: race("cnn", 32, size_of(128, 8), s, MODES[0], translate=0.0),
            "b128.stream": lambda: race("cnn", 32, size_of(128, 8), s, MODES[1]),
            "b1024.resident": lambda: race("cnn", 32, b, size_of(100, 2), MODES[0], horizontal_flip=True, erase=0.5),
        }
    )


@check(60)
def loop_resnet50():
    """The loop at 224 pixels, eager: both modes, and a larger batch on the device."""
    name, side = size_of(("resnet50", 224), ("resnet18", 32))
    s = size_of(24, 2)
    return in_turn(
        {
            "b256.resident": lambda: race(name, side, size_of(256, 8), s, MODES[0], optimizer="sgd"),
            "b256.stream": lambda: race(
                name, side, size_of(256, 8), s, MODES[1], optimizer="sgd", horizontal_flip=True, crop_scale=0.25
            ),
            "b512.resident": lambda: race(name, side, size_of(512, 8), size_of(12, 2), MODES[0], optimizer="sgd"),
        }
    )


@check(110)
def resnet50_compiled_by_batch():
    """Compiled, batch 256 to 1,024 on the device: where images/s stop to grow; what does not fit is said."""
    name, side = size_of(("resnet50", 224), ("resnet18", 32))
    given = {"mode": MODES[0], "optimizer": "sgd", "compile": GPU}
    return in_turn(
        {
            f"b{batch}": lambda batch=batch: race(name, side, size_of(batch, 8), size_of(4096 // batch, 2), **given)
            for batch in (256, 512, 1024)
        }
    )


@check(40)
def epoch_wall_time():
    """Seconds from epoch to epoch with evaluation and a checkpoint each, and what they add; evaluated every 2nd too."""
    name, side, batch, steps = size_of(("resnet50", 224, 256, 24), ("cnn", 32, 8, 2))
    data = make_split(batch * steps, side, learnable=False)
    validation = make_split(batch * steps // 8, side, seed=1, learnable=False)
    facts: dict[str, Any] = {}
    for every in (1, 2):
        stamps: list[float] = []
        folder = Path(tempfile.mkdtemp(dir=TMP))
        _, history, _ = train(
            name, data, validation, MODES[0], folder, None, lambda _, to=stamps: to.append(time.perf_counter()),
            epochs=6, batch_size=batch, optimizer="sgd", precision="auto", evaluate_every=every,
        )  # fmt: skip
        walls = [(b - a) / every for a, b in itertools.pairwise(stamps)]
        trained = [len(data) / epoch["images_per_second"] for epoch in history[1:]]
        facts[f"evaluate_every_{every}"] = {
            "epoch_s": round(statistics.median(walls), 3),
            "training_s": round(statistics.median(trained), 3),
            "images_per_second_of_wall": round(len(data) / statistics.median(walls)),
        }
        shutil.rmtree(folder)
        free()
    return facts


@check(40)
def step_parts():
    """What each part of the step costs, left out one by one; memory order; cuDNN's search; a CUDA graph."""
    facts: dict[str, Any] = {}
    name, side, batch = size_of(("resnet50", 224, 256), ("resnet18", 32, 4))
    n = size_of(20, 1)
    for label, (model, px, size, steps) in {
        "big": (name, side, batch, n),
        "cnn32_b128": ("cnn", 32, size_of(128, 8), size_of(200, 2)),
    }.items():
        bare = Bare(model, px, size)
        facts[f"{label}.all"] = bare.rate(steps)
        facts[f"{label}.no_ema_ms"] = bare.rate(steps, ema=False)["ms"]
        facts[f"{label}.no_guard_ms"] = bare.rate(steps, guard=False)["ms"]
        facts[f"{label}.no_optimizer_ms"] = bare.rate(steps, optimizer=False)["ms"]
        facts[f"{label}.forward_only_ms"] = bare.rate(steps, backward=False)["ms"]
        if GPU:
            torch.backends.cudnn.benchmark = True
            facts[f"{label}.cudnn_benchmark"] = bare.rate(steps)
            torch.backends.cudnn.benchmark = False
            from torch.profiler import ProfilerActivity, profile

            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
                started = time.perf_counter()
                for _ in range(5):
                    bare.step()
                sync()
                wall = 1e6 * (time.perf_counter() - started)

            def device_time(event):
                return getattr(event, "self_device_time_total", 0) or getattr(event, "self_cuda_time_total", 0)

            rows = sorted(profiled.key_averages(), key=device_time, reverse=True)
            kernels = [
                r
                for r in rows
                if device_time(r)
                and not str(r.key).startswith(("aten::", "autograd::", "Optimizer", "cuda", "ProfilerStep"))
            ]
            facts[f"{label}.gpu_busy_share_while_profiled"] = round(sum(map(device_time, kernels)) / wall, 3)
            facts[f"{label}.kernels_a_step"] = sum(r.count for r in kernels) // 5
            facts[f"{label}.top_kernels_ms"] = {r.key[:60]: round(device_time(r) / 5000, 3) for r in kernels[:8]}
            facts[f"{label}.fp32"] = Bare(model, px, size, precision="fp32").rate(max(steps // 2, 1))
            facts[f"{label}.nchw"] = Bare(model, px, size, channels_last=False).rate(max(steps // 2, 1))
        del bare
        free()
    if GPU:
        try:
            bare = Bare("cnn", 32, 128)
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                bare.call = torch.cuda.make_graphed_callables(bare.model, (bare.images.clone(),))
            bare.cast = contextlib.nullcontext()
            facts["cnn32_b128.model_as_cuda_graph"] = bare.rate(200)
        except Exception as error:
            facts["cnn32_b128.model_as_cuda_graph"] = f"{type(error).__name__}: {error}"[:300]
        free()
    return facts


@check(20)
def feed_alone():
    """The feed without a model: images a second, with augmentation and without."""
    facts: dict[str, Any] = {}
    for side, batch, count in (
        (32, size_of(1024, 16), size_of(50, 3)),
        (size_of(224, 32), size_of(256, 8), size_of(20, 2)),
    ):
        data = make_split(batch * count, side, learnable=False)
        rows = list(np.random.default_rng(0).permutation(len(data)).reshape(count, batch))
        augmentations: dict[str, dict[str, Any]] = {
            "plain": {"translate": 0.0},
            "shift_flip": {"horizontal_flip": True},
            "crop_flip_colour_erase": FEATURES["every_augmentation"],
        }
        for mode in MODES:
            made = feed.Feed(data, DEVICE, mode, compiled=True)  # on a GPU only
            for label, given in augmentations.items():
                chosen = augment.draw(len(data), side, Hyperparameters(**given), 0)
                for _ in made.batches(rows[:2], chosen):
                    pass
                sync()
                started = time.perf_counter()
                for _ in made.batches(rows, chosen):
                    pass
                sync()
                facts[f"{side}px.{mode}.{label}"] = round(len(data) / (time.perf_counter() - started))
            del made
            free()
    started = time.perf_counter()
    augment.draw(size_of(1_281_167, 10_000), 224, Hyperparameters(horizontal_flip=True, crop_scale=0.08, erase=0.25), 0)
    facts["draw_of_an_epoch_s_imagenet"] = round(time.perf_counter() - started, 2)
    return facts


@check(20)
def evaluation():
    """evaluate() against one that stays on the device and computes in bf16."""
    facts: dict[str, Any] = {}
    for name, side, n in (("cnn", 32, size_of(10_000, 256)), size_of(("resnet50", 224, 2048), ("resnet18", 32, 64))):
        data = make_split(n, side, learnable=False)
        model = build_model(name, 10, side).to(DEVICE).to(memory_format=torch.channels_last)
        for mode in MODES:
            made = feed.Feed(data, DEVICE, mode)
            loop.evaluate(model, data, WORLD, made)
            sync()
            started = time.perf_counter()
            found = loop.evaluate(model, data, WORLD, made)
            facts[f"{name}.{side}.{mode}.evaluate_images_per_second"] = round(n / (time.perf_counter() - started))
            del made
        images, labels = torch.from_numpy(data.images[0]).to(DEVICE), torch.from_numpy(data.labels).to(DEVICE)
        for precision in ("fp32", "bf16"):

            def other():
                total = torch.zeros(2, device=DEVICE, dtype=torch.float64)
                with torch.no_grad(), speed.autocast(precision, DEVICE):
                    for first in range(0, n, 512):
                        logits = model(imaging.normalise(images[first : first + 512], [0.4] * 3, [0.25] * 3)).float()
                        total[0] += functional.cross_entropy(logits, labels[first : first + 512], reduction="sum")
                        total[1] += (logits.argmax(1) == labels[first : first + 512]).sum()
                return total.tolist()

            other()
            started = time.perf_counter()
            got = other()
            facts[f"{name}.{side}.resident_{precision}_images_per_second"] = round(n / (time.perf_counter() - started))
            facts[f"{name}.{side}.resident_{precision}_loss_difference"] = round(abs(got[0] / n - found.loss), 6)
        images = labels = model = None
        free()
    return facts


@check(20)
def checkpoint_stall():
    """How long the training thread waits when a checkpoint of ResNet-50 (AdamW, EMA) is taken."""
    from training.checkpoint import Checkpoints, Progress

    bare = Bare(size_of("resnet50", "cnn"), size_of(224, 32), 8, optimizer="adamw")
    bare.step()
    sync()
    folder = Path(tempfile.mkdtemp(dir=TMP))
    keeper = Checkpoints(folder, "run", WORLD, {"model": bare.model, "average": bare.average.model}, bare.optimizer)
    stalls = []
    for number in range(3):
        started = time.perf_counter()
        keeper.save(Progress(step=number + 1, position=1), torch.zeros((), device=DEVICE))
        stalls.append(round(time.perf_counter() - started, 3))
        keeper.close()
    size = sum(p.stat().st_size for p in folder.rglob("*.safetensors")) / 2e6
    started = time.perf_counter()
    progress, _ = keeper.restore()
    assert progress.step == 3
    return {"stall_s": stalls, "megabytes": round(size), "restore_s": round(time.perf_counter() - started, 2)}


class ResNet9(nn.Module):  # type: ignore[misc]  # torch is not here, where this is checked
    """David Page's network for CIFAR-10 (DAWNBench), 6.6 M parameters: what a recipe for 94 % would train."""

    def __init__(self, width=64):
        super().__init__()

        def conv(i, o, pool=False):
            return nn.Sequential(
                nn.Conv2d(i, o, 3, padding=1, bias=False),
                nn.BatchNorm2d(o),
                nn.ReLU(True),
                *([nn.MaxPool2d(2)] if pool else []),
            )

        w = width
        self.a, self.b, self.r1 = (
            conv(3, w),
            conv(w, 2 * w, True),
            nn.Sequential(conv(2 * w, 2 * w), conv(2 * w, 2 * w)),
        )
        self.c, self.d, self.r2 = (
            conv(2 * w, 4 * w, True),
            conv(4 * w, 8 * w, True),
            nn.Sequential(conv(8 * w, 8 * w), conv(8 * w, 8 * w)),
        )
        self.head = nn.Linear(8 * w, 10)

    def forward(self, x):
        x = self.b(self.a(x))
        x = self.d(self.c(x + self.r1(x)))
        return self.head((x + self.r2(x)).amax((2, 3)))


@check(25)
def cifar_shaped_clock():
    """Seconds an epoch of 50,000 images at 32 pixels would take: the product's cnn and a ResNet-9, bare step, eager."""
    facts: dict[str, Any] = {}
    for label, model, batch in (
        ("cnn_b64", "cnn", 64),
        ("cnn_b1024", "cnn", 1024),
        ("resnet9_b512", ResNet9(), 512),
        ("resnet9_b1024", ResNet9(), 1024),
    ):
        batch = size_of(batch, 8)
        got = Bare(model, 32, batch).rate(size_of(40, 1))
        facts[label] = got | {"epoch_s": round(50_000 / got["images_per_second"], 3)}
        free()
    return facts


def compilations() -> dict:
    """Of this process so far, the limit's among them (so 2 for one model)."""
    with contextlib.suppress(Exception):
        from torch._dynamo.utils import get_compilation_metrics

        return {"compilations": len(get_compilation_metrics())}
    return {}


@check(60)
def compiled_cnn():
    """torch.compile through the loop: time to the first step, then fed ÷ limit; recompilations counted."""
    facts = race("cnn", 32, size_of(128, 8), size_of(300, 2), MODES[0], compile=True)
    return facts | compilations()


@check(110)
def compiled_resnet50():
    """The same at 224 pixels."""
    name, side = size_of(("resnet50", 224), ("resnet18", 32))
    facts = race(name, side, size_of(256, 8), size_of(24, 2), MODES[0], compile=True, optimizer="sgd")
    return facts | compilations()


@check(70)
def compiled_resnet9():
    """What the 94 % recipe would run at: a compiled ResNet-9 at batch 1024; and, on a GPU, in CUDA graphs."""
    facts: dict[str, Any] = {}
    for mode in (True, *(["reduce-overhead"] if GPU else [])):
        bare = Bare(ResNet9(), 32, size_of(1024, 8), compiled=mode)
        started = time.perf_counter()
        bare.step()
        sync()
        first = round(time.perf_counter() - started, 1)
        facts[f"compile={mode}"] = bare.rate(size_of(60, 1)) | {"first_step_s": first}
        del bare
        free()
    return facts


@check(60)
def compile_auto_choice():
    """What speed.choose decides for resnet18 at 224, batch 256, and how long it takes (a run of 2,000 steps)."""
    side, batch = size_of((224, 256), (32, 8))
    model = build_model("resnet18", 10, side).to(DEVICE)
    images = torch.randn(batch, side, side, 3, device=DEVICE).permute(0, 3, 1, 2)
    settings = Hyperparameters(model="resnet18", batch_size=batch, compile="auto")
    cast = speed.autocast("auto", DEVICE)
    started = time.perf_counter()
    chosen = speed.choose(model, images, settings, 2000 if GPU else 1, WORLD, lambda: cast)
    facts: dict[str, Any] = {"chosen": chosen, "seconds": round(time.perf_counter() - started, 1)}
    eager = speed._step_seconds(model, images[:32], True, False, DEVICE, lambda: cast)
    facts |= {
        "ms_at_32": round(1000 * eager, 2),
        "expected_ms": round(1000 * eager * batch / 32, 1),
        "true_ms": round(1000 * speed._step_seconds(model, images, True, False, DEVICE, lambda: cast), 1),
    }
    return facts


# ---------------------------------------------------------------- run them


def on_alarm(*_):
    raise TimeoutError("the check took too long")


def main() -> int:
    signal.signal(signal.SIGALRM, on_alarm)
    chosen = set(filter(None, options.only.split(",")))
    for name, function, cost, gpu_only in CHECKS:
        if chosen and name not in chosen:
            continue
        if gpu_only and not GPU:
            emit({"check": name, "ok": None, "left_out": "no GPU"})
            continue
        if left() < cost:
            emit({"check": name, "ok": None, "left_out": f"{left():.0f} s left, {cost} needed"})
            continue
        free()
        started, result = time.monotonic(), {"check": name}
        signal.alarm(int(min(max(3 * cost, 60) * size_of(1, 3), left() + 20)))
        try:
            result |= {"ok": True} | (function() or {})
        except BaseException as error:
            signal.alarm(0)
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            own = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)][-4:]
            result |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:1500], "where": own}
        signal.alarm(0)
        emit(result | {"seconds": round(time.monotonic() - started, 1)})
    print(f"\n{'check':36} {'ok':5} {'seconds':>8}  what it says")
    for result in RESULTS:
        facts: dict[str, Any] = {k: v for k, v in result.items() if k not in ("check", "ok", "seconds")}
        mark = {True: "yes", False: "NO", None: "-"}[result["ok"]]
        print(f"{result['check']:36} {mark:5} {result.get('seconds', 0):>8}  {json.dumps(facts, default=str)[:250]}")
    print(f"{time.monotonic() - BEGAN:.0f} s in all", flush=True)
    shutil.rmtree(TMP, ignore_errors=True)
    return sum(result["ok"] is False for result in RESULTS)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(min(code, 100))  # threads that still compute would hold it
