"""The training process as a whole: seconds to its first step and to its end, accuracy and peak memory.

And what the benchmark of serving needs: an artifact, a photo, CPU and memory of a process tree.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from processing.preprocess import pack
from training.config import Hyperparameters
from training.data import load_split
from inference.export import write_artifact
from model import build_model

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 10
CIFAR10_ACCURACY = 0.94
CIFAR10_ARGUMENTS = ("--epochs", "40", "--horizontal_flip", "true", "--translate", "0.125", "--erase", "0.5")
# Starts a program; says when it began, when it ended, and its peak memory. Linux counts what the starting process holds
# towards the peak of the program that it starts, so a process that holds nothing does it.
STARTER = """
import os, sys, time
print(time.monotonic(), flush=True)
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
print(time.monotonic(), usage.ru_maxrss)
sys.exit(status != 0)
"""
CUDA_PEAK = (
    "import sys; sys.path.insert(0, 'src'); from training.train import main, torch; code = main(sys.argv[1:]);"
    "print('cuda peak', torch.cuda.max_memory_allocated()); sys.exit(code)"
)
Measured = dict[str, list[float]]


def write_patterns(folder: Path, size: int, images: int) -> None:
    """Pack random low-frequency patterns, tinted by class: pixels that a network can learn from, from no download."""
    random = np.random.default_rng(size)
    raw = folder.with_name(f"{folder.name}-raw")
    for split, count in {"train": images, "validation": 5 * CLASSES, "test": CLASSES}.items():
        for label in range(CLASSES):
            (raw / split / f"class{label}").mkdir(parents=True)
        for number in range(count):
            label = number % CLASSES
            grid = random.integers(0, 156, size=(5, 5, 3)) + np.array([label, 5, CLASSES - label]) * (100 // CLASSES)
            picture = Image.fromarray(grid.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
            picture.save(raw / split / f"class{label}" / f"{number:06d}.bmp")  # the format that is written fastest
    pack(raw, folder, size)
    shutil.rmtree(raw)


def write_digits(folder: Path) -> bool:
    """Pack the sample digits as `make data` does. False: they are not here, because scikit-learn is not."""
    try:
        from pipelines.local import sample_data

        sample_data.write_digits(folder.with_name("digits-raw"))
    except ImportError as error:
        print(f"left out: time to accuracy, as the sample digits need scikit-learn ({error})", flush=True)
        return False
    pack(folder.with_name("digits-raw"), folder)
    return True


def run_job(data: Path, root: Path, program: list[str]) -> tuple[dict[str, float], str]:
    """Run a training job and return its seconds, its accuracy and its peak memory, and what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SM_", "WORLD_SIZE"))}
    environment |= {f"SM_CHANNEL_{name.upper()}": str(data / name) for name in ("train", "validation")}
    for name in ("SM_CHANNEL_CHECKPOINTS", "SM_MODEL_DIR", "SM_OUTPUT_DATA_DIR"):
        (root / name).mkdir(parents=True)
        environment[name] = str(root / name)
    command = [sys.executable, "-S", "-c", STARTER, sys.executable, *program]
    job = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert job.stdout is not None
    started, first_step, good_enough, text = float(job.stdout.readline()), math.nan, math.inf, ""
    for line in job.stdout:
        seconds = time.monotonic() - started
        if line.startswith("first step done"):
            first_step = seconds
        accuracy = re.search(r"val_accuracy=([\d.]+)", line)
        if accuracy and float(accuracy[1]) >= CIFAR10_ACCURACY:
            good_enough = min(good_enough, seconds)
        text += line
    if job.wait():
        sys.exit(f"error: {program} failed:\n{text}")
    ended, peak = text.split()[-2:]
    metrics = json.loads((root / "SM_OUTPUT_DATA_DIR" / "metrics.json").read_text(encoding="utf-8"))
    shutil.rmtree(root)
    return {
        "startup.seconds_to_first_step": first_step,
        "time_to_accuracy.seconds": float(ended) - started,
        "time_to_accuracy.val_accuracy": metrics["val_accuracy"],
        "cifar10.seconds_to_94_percent": good_enough,
        "memory.peak_mb": float(peak) * (1 if sys.platform == "darwin" else 1024) / 1e6,
    }, text


def process(folder: Path, rounds: int, quick: bool) -> Measured:
    """The training process as a whole: the default recipe on the sample digits, or a few epochs on patterns."""
    digits = write_digits(folder / "digits")
    data = folder / ("digits" if digits else "patterns")
    if not digits:
        write_patterns(data, 32, 1280)
    arguments = ["--epochs", "1"] if quick or not digits else []
    print(f"the process: train.py on {data.name}, {' '.join(arguments) or 'default recipe'}", flush=True)
    jobs = [run_job(data, folder / "job", ["src/training/train.py", *arguments])[0] for _ in range(rounds)]
    measured = {key: [job[key] for job in jobs] for key in jobs[0]}
    if torch.cuda.is_available():
        text = run_job(data, folder / "job", ["-c", CUDA_PEAK, *arguments])[1]
        measured["memory.cuda_peak_mb"] = [float(text.rpartition("cuda peak ")[2].split()[0]) / 1e6]
    left_out = "cifar10" if digits else ("cifar10", "time_to_accuracy")
    return {key: values for key, values in measured.items() if not key.startswith(left_out)}


def cifar10(raw: Path, folder: Path, rounds: int, quick: bool) -> Measured:
    """Seconds from the start of the process to 94 % on the validation images, which are CIFAR-10's test images."""
    pack(raw, folder / "cifar10")
    arguments = [*CIFAR10_ARGUMENTS, *(["--epochs", "1"] if quick else [])]
    print(f"time to 94 % on CIFAR-10: train.py {' '.join(arguments)}", flush=True)
    jobs = [
        run_job(folder / "cifar10", folder / "job", ["src/training/train.py", *arguments])[0] for _ in range(rounds)
    ]
    measured = {
        "cifar10.seconds_to_94_percent": [job["cifar10.seconds_to_94_percent"] for job in jobs],
        "cifar10.val_accuracy": [job["time_to_accuracy.val_accuracy"] for job in jobs],
    }
    if math.inf in measured["cifar10.seconds_to_94_percent"]:
        print("left out: time to 94 %, as some round did not reach it", flush=True)
        del measured["cifar10.seconds_to_94_percent"]
    return measured


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


def children() -> set[int]:
    """The processes that this one has started and that have not ended."""
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def family(roots: Iterable[int]) -> dict[int, list[str]]:
    """Processes and all their descendants: what /proc/<pid>/stat says after the name, from the state on."""
    fields: dict[int, list[str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields[int(path.parent.name)] = path.read_text(errors="replace").rpartition(")")[2].split()
    tree, size = set(roots), 0
    while size != len(tree):
        size = len(tree)
        tree |= {pid for pid, values in fields.items() if int(values[1]) in tree}
    return {pid: fields[pid] for pid in tree & fields.keys()}


def cpu_seconds(roots: Iterable[int]) -> float:
    """User and system time that processes and all their descendants have used, those that have ended included."""
    return sum(int(value) for values in family(roots).values() for value in values[11:15]) / os.sysconf("SC_CLK_TCK")


def memory_mb(roots: Iterable[int]) -> float:
    """What processes and all their descendants hold: all of their own memory, and the largest mapping of files.

    Processes of one server map the same libraries, which the machine holds once.
    """
    held: dict[str, list[int]] = {"RssAnon": [0], "RssFile": [0], "RssShmem": [0]}  # in KiB
    for pid in family(roots):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
                name, _, value = line.partition(":")
                if name in held:
                    held[name].append(int(value.split()[0]))
    return (sum(held["RssAnon"]) + max(held["RssFile"]) + max(held["RssShmem"])) * 1024 / 1e6
