"""The training loop against its limit: `training.loop.fit`, and the same step on one batch that lies ready.

For the part that runs inside a project (`page.enter`). Files are in the page cache; the first epoch, evaluation and
checkpoints do not count.
"""

from __future__ import annotations

import copy
import itertools
import shutil
import time
from pathlib import Path
from typing import Any

import imaging
import numpy as np
import torch
from material import CLASSES, write_patterns
from model import ModelError, best_device, build_model
from page import Measured
from torch import nn
from torch.nn import functional
from training import speed
from training.config import Hyperparameters, resolve
from training.data import Split, load_channels
from training.distributed import World
from training.loop import fit
from training.optim import WeightAverage, build_optimizer
from training.watch import Guard

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

    def __init__(
        self, model: nn.Module, train: Split, hyperparameters: Hyperparameters, world: World, compiled: bool | str
    ) -> None:
        self._model = copy.deepcopy(model).train()
        if compiled:  # a copy is not
            self._model.compile(mode=speed.mode(compiled))
        self._optimizer = build_optimizer(self._model, hyperparameters)
        self._average = WeightAverage(self._model, hyperparameters.ema_decay)
        fp16 = speed.format_of(hyperparameters.precision, world.device) == "fp16"
        self._guard = Guard(self._model, self._optimizer, world.device, fp16)
        self._cast = speed.autocast(hyperparameters.precision, world.device)
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
            self._guard.unscale()
            self._guard.allows_step()
            self._guard.step()
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
    chosen: dict[str, Any] = {}

    def between_epochs(_: list[dict[str, Any]]) -> None:
        if not limit:
            limit.append(Limit(model, train, settled, world, chosen["compile"]))
            limit[0].seconds(3)  # warms up
        bare.append(limit[0].seconds(steps) / steps)

    _, history = fit(model.to(world.device), train, validation, settled, world, None, between_epochs, chosen)
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
