"""What the benchmarks measure with: images, data sets, an artifact, a photo; and what their numbers depend on.

For the part that runs inside a project (`page.enter`), with the packages of its container group.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import platform
import shutil
from pathlib import Path

import numpy as np
import torch
from inference.export import write_artifact
from model import best_device, build_model
from PIL import Image
from processing.preprocess import pack
from training.config import Hyperparameters
from training.data import load_split
from training.speed import format_of

CLASSES = 10


def write_images(folder: Path, size: int, counts: dict[str, int], cells: int, suffix: str) -> None:
    """Random low-frequency patterns, tinted by class: pixels that a network can learn from, from no download.

    Args:
        folder: where a folder for each split and class is made.
        size: pixels a side.
        counts: how many images a split has.
        cells: a side; more make a picture less smooth.
        suffix: of the files, which names their format.
    """
    random = np.random.default_rng(size)
    for split, count in counts.items():
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True)
        for number in range(count):
            label = number % CLASSES
            tint = np.array([label, 5, CLASSES - label]) * (100 // CLASSES)
            grid = random.integers(0, 156, size=(cells, cells, 3)) + tint
            picture = Image.fromarray(grid.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
            picture.save(folder / split / f"class{label}" / f"{number:06d}{suffix}", quality=90)


def write_patterns(folder: Path, size: int, images: int) -> None:
    """Pack such images: so many to train on, and a few to validate and test."""
    raw = folder.with_name(f"{folder.name}-raw")
    counts = {"train": images, "validation": 5 * CLASSES, "test": CLASSES}
    write_images(raw, size, counts, 5, ".bmp")  # the format that is written fastest
    pack(raw, folder, size)
    shutil.rmtree(raw)


def write_digits(folder: Path) -> bool:
    """Pack the sample digits as `make data` does. False: they are not here, because scikit-learn is not."""
    try:
        from pipelines.local import data

        data.write_digits(folder.with_name("digits-raw"))
    except ImportError as error:
        print(f"left out: time to accuracy, as the sample digits need scikit-learn ({error})", flush=True)
        return False
    pack(folder.with_name("digits-raw"), folder)
    return True


def make_artifact(folder: Path, name: str, size: int) -> Path:
    """An unpacked artifact with fixed random weights, written as training does it; beside it `photo.jpg`."""
    write_patterns(folder / "data", size, CLASSES)
    torch.manual_seed(0)
    settings, validation = Hyperparameters(model=name), load_split(folder / "data" / "validation")
    write_artifact(folder / "model", build_model(name, CLASSES, size), settings, validation, {}, None)
    (folder / "photo.jpg").write_bytes(photo())
    return folder / "model"


def photo() -> bytes:
    """A JPEG file of 640x480 pixels and about 99 kB, always the same: coarse colours under noise."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (16, 21, 3), dtype=np.uint8)).resize((640, 480))
    noisy = np.asarray(coarse) + random.normal(0, 9, (480, 640, 1))
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


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
        "hardware.precision": format_of("auto", device),
        "hardware.load_before": round(os.getloadavg()[0], 2),  # above 0: somebody else is at work, numbers are noisy
        "versions.python": platform.python_version(),
    }
    for package in ("torch", "torchvision", "numpy", "pillow", "safetensors"):
        found = list(importlib.metadata.distributions(name=package))
        facts[f"versions.{package}"] = found[0].version if found else "missing"
    return facts
