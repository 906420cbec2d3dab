"""What training costs on this machine: start-up, time to accuracy, memory, and throughput against its limit.

    make bench                        # or, with nothing but the container's packages: python3 benchmarks/train.py

Prints a table (median, lowest and highest of all rounds) and writes it, flat, to `benchmarks/results.json`. Needs no
network; leaves out, with a line, what needs a package that is missing. Two things are measured:

- The process: `src/training/train.py` with the default recipe on the sample digits, from its start to its end.
- The loop: `training.loop.fit` on packed images, against the same step on one batch that lies ready on the device.
  Files are in the page cache; the first epoch, evaluation and checkpoints do not count.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

import imaging  # noqa: E402
from benchmarks.process import CLASSES, Measured, cifar10, process, write_patterns  # noqa: E402
from training.config import Hyperparameters, resolve  # noqa: E402
from training.data import Split, load_channels  # noqa: E402
from training.distributed import World  # noqa: E402
from training.loop import autocast, fit, has_fast_bf16  # noqa: E402
from model import ModelError, best_device, build_model  # noqa: E402
from training.optim import WeightAverage, build_optimizer  # noqa: E402
from training.watch import Guard  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results.json"
OWNERS = ("serve.soak.", "serve.", "")  # of its keys, by how they begin: whoever writes anew replaces its own
# Model, pixels a side, batch, steps a round on a CPU and on a GPU (0: not there): a second or a few.
CASES = (("cnn", 32, 128, 30, 300), ("resnet18", 64, 32, 20, 300), ("resnet50", 224, 256, 0, 20))
# Of the first case: what is otherwise chosen, spelled out, and what costs extra.
MODES: dict[str, dict[str, Any]] = {
    "": {},
    ".fp32": {"precision": "fp32"},
    ".compiled": {"compile": True},
    ".augmented": {"horizontal_flip": True, "crop_scale": 0.5, "colour_jitter": 0.2, "erase": 0.25, "mixup": 0.2},
}
RESNET50_GFLOP = 24.3  # an image at 224 pixels, forward and backward
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989}  # dense bf16


class Limit:
    """The training step alone: as in the loop, on one batch that lies ready on the device, normalised.

    It has a copy of the model as the loop prepared it, in memory format too. The learning rate stays 0: as slow as any.
    """

    def __init__(self, model: nn.Module, train: Split, hyperparameters: Hyperparameters, world: World) -> None:
        self._model = copy.deepcopy(model).train()
        if model._compiled_call_impl:  # a copy is not
            self._model.compile()
        self._optimizer = build_optimizer(self._model, hyperparameters)
        self._average = WeightAverage(self._model, hyperparameters.ema_decay)
        self._guard = Guard(self._model, self._optimizer, world.device)
        self._cast = autocast(hyperparameters.precision, world.device)
        self._smooth = hyperparameters.label_smoothing
        images, self._labels = train.batch(np.arange(hyperparameters.batch_size), world.device)
        self._images = imaging.normalise(images, train.info["mean"], train.info["std"])

    def seconds(self, steps: int) -> float:
        """How long so many steps take."""
        started = time.perf_counter()
        for _ in range(steps):
            with self._cast:
                logits = self._model(self._images)
            loss = functional.cross_entropy(logits.float(), self._labels, reduction="sum", label_smoothing=self._smooth)
            self._guard.scale(loss, 1 / len(self._labels)).backward()
            self._guard.allows_step()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._average.update()
        loss.item()  # an accelerator has finished its work
        return time.perf_counter() - started


def race(model: nn.Module, data: Path, hyperparameters: Hyperparameters) -> list[tuple[float, float]]:
    """Seconds a step of the real loop and of its limit, a pair a round; a round is an epoch after the first.

    The limit runs between the epochs of one and the same training. Each epoch is compared with the mean of the limits
    before and after it, so a machine that gets slower meanwhile does not change the ratio.
    """
    world = World(rank=0, size=1, device=best_device())
    train, validation = load_channels(data / "train", data / "validation")
    settled = resolve(hyperparameters, train.image_size, len(train))
    steps = len(train) // settled.batch_size
    limit: list[Limit] = []
    bare: list[float] = []

    def between_epochs(_: list[dict[str, Any]]) -> None:
        if not limit:
            limit.append(Limit(model, train, settled, world))
            limit[0].seconds(3)  # warms up
        bare.append(limit[0].seconds(steps) / steps)

    _, history = fit(model.to(world.device), train, validation, settled, world, on_epoch=between_epochs)
    real = [settled.batch_size / epoch["images_per_second"] for epoch in history[1:]]
    return [(own, (before + after) / 2) for own, (before, after) in zip(real, itertools.pairwise(bare), strict=True)]


def throughput(folder: Path, rounds: int, quick: bool) -> Measured:
    """Images a second of the real loop and of its limit, for each model that this machine can train in time."""
    measured, gpu = Measured(), best_device().type == "cuda"
    for name, size, batch, on_cpu, on_gpu in CASES:
        if not (steps := on_gpu if gpu else on_cpu):
            continue
        batch, steps = (8, 2) if quick else (batch, steps)
        write_patterns(folder / name, size, batch * steps)
        for mode, options in MODES.items() if name == "cnn" else [("", {})]:
            key = f"train.{name}.{size}{mode}"
            if "compile" in options and not any(map(shutil.which, ("c++", "g++", "clang++"))):
                print(f"left out: {key} (there is no C++ compiler)", flush=True)
                continue
            try:
                model = build_model(name, CLASSES, size)
            except ModelError as error:
                print(f"left out: {key} (error: {error})", flush=True)
                continue
            print(f"throughput: {key}, batch {batch}, {steps} steps a round", flush=True)
            settings = Hyperparameters(model=name, batch_size=batch, epochs=rounds + 1, **options)
            pairs = race(model, folder / name, settings)
            measured[f"{key}.fed_over_limit"] = [bare / real for real, bare in pairs]
            measured[f"{key}.images_per_second"] = [batch / real for real, _ in pairs]
            measured[f"{key}.limit_images_per_second"] = [batch / bare for _, bare in pairs]
            peaks = [peak for chip, peak in PEAK_TFLOPS.items() if gpu and chip in torch.cuda.get_device_name()]
            if name == "resnet50" and peaks:
                measured[f"{key}.mfu"] = [batch / real * RESNET50_GFLOP / (1000 * peaks[0]) for real, _ in pairs]
        shutil.rmtree(folder / name)
    names = ("fed_over_limit", "images_per_second", "limit_images_per_second")
    return measured | {f"train.{name}": measured[f"train.cnn.32.{name}"] for name in names}


def overhead(folder: Path, rounds: int, quick: bool) -> Measured:
    """Microseconds that the real loop adds to a bare step: gather, normalise, schedule and watch; no augmentation."""
    size, batch, steps = 4, 16, 200 if quick else 1000  # so little to compute that the loop itself shows
    rounds = rounds if quick else 4 * rounds  # short ones, which anything else on the machine disturbs
    print(f"overhead of the loop: one linear layer, batch {batch}, {rounds} rounds of {steps} steps", flush=True)
    write_patterns(folder / "tiny", size, batch * steps)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, CLASSES))
    pairs = race(model, folder / "tiny", Hyperparameters(batch_size=batch, epochs=rounds + 1, translate=0.0))
    return {
        "train.overhead_us_per_step": [1e6 * (real - bare) for real, bare in pairs],
        "train.bare_us_per_step": [1e6 * bare for _, bare in pairs],
    }


def machine() -> dict[str, str | float]:
    """What the numbers depend on."""
    cpuinfo, device = Path("/proc/cpuinfo"), best_device()
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    facts: dict[str, str | float] = {
        "hardware.cpu": names[0] if names else platform.processor() or platform.machine(),
        "hardware.cores": os.cpu_count() or 1,
        "hardware.threads": torch.get_num_threads(),
        "hardware.memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "hardware.device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "hardware.precision": "bf16" if has_fast_bf16(device) else "fp32",
        "hardware.load_before": round(os.getloadavg()[0], 2),  # above 0: somebody else is at work, numbers are noisy
        "versions.python": platform.python_version(),
    }
    for package in ("torch", "torchvision", "numpy", "pillow", "safetensors"):
        found = list(importlib.metadata.distributions(name=package))
        facts[f"versions.{package}"] = found[0].version if found else "missing"
    return facts


def shown(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def publish(facts: dict[str, Any], measured: Measured, quick: bool, owner: str = OWNERS[-1]) -> None:
    """Print a Markdown table and write the results; those of other benchmarks stay."""
    print("\n" + "".join(f"{name}: {value}\n" for name, value in facts.items()))
    print("| | median | lowest to highest |\n|---|---:|---:|")
    results = {f"{owner}{name}": value for name, value in facts.items()}
    for key, values in measured.items():
        median, lowest, highest = statistics.median(values), min(values), max(values)
        results |= {key: median, f"{key}.lowest": lowest, f"{key}.highest": highest}
        print(f"| {key} | {shown(median)} | {shown(lowest)} to {shown(highest)} |")
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    kept = {key: value for key, value in before.items() if next(filter(key.startswith, OWNERS)) != owner}
    RESULTS.write_text(json.dumps(kept | results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"\n{'--quick: these numbers mean nothing; ' if quick else ''}written to {RESULTS.relative_to(ROOT)}")


def main() -> None:
    """Measure, print a Markdown table, write the results."""
    parser = argparse.ArgumentParser(description="What training costs on this machine.")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement (default: 5)")
    parser.add_argument("--quick", action="store_true", help="one round of almost nothing: shows only that it works")
    parser.add_argument("--cifar10", type=Path, metavar="FOLDER", help="also time to 94 %%: folders train, val (the "
                        "10,000 test images) and test, each with a folder of images a class")  # fmt: skip
    options = parser.parse_args()
    rounds = 1 if options.quick else max(options.rounds, 1)
    facts = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "rounds": rounds} | machine()
    measured: Measured = {}
    for phase in (process, throughput, overhead):  # the process first, while this one does nothing yet
        with tempfile.TemporaryDirectory() as folder:
            measured |= phase(Path(folder), rounds, options.quick)
    if options.cifar10:
        with tempfile.TemporaryDirectory() as folder:
            measured |= cifar10(options.cifar10, Path(folder), rounds, options.quick)
    publish(facts, measured, options.quick)


if __name__ == "__main__":
    main()
