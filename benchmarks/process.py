"""The training process as a whole: seconds to its first step and to its end, accuracy and peak memory."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from material import write_digits, write_patterns
from page import Measured
from processing.preprocess import pack

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


def run_job(data: Path, root: Path, program: list[str]) -> tuple[dict[str, float], str]:
    """Run a training job and return its seconds, its accuracy and its peak memory, and what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SM_", "WORLD_SIZE"))}
    environment |= {f"SM_CHANNEL_{name.upper()}": str(data / name) for name in ("train", "validation")}
    for name in ("SM_CHANNEL_CHECKPOINTS", "SM_MODEL_DIR", "SM_OUTPUT_DATA_DIR"):
        (root / name).mkdir(parents=True)
        environment[name] = str(root / name)
    command = [sys.executable, "-S", "-c", STARTER, sys.executable, *program]
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert job.stdout is not None
    started, first_step, good_enough, text = float(job.stdout.readline()), math.nan, math.inf, ""
    stamps: list[float] = []  # when training began, and when each epoch had ended, with its evaluation
    for line in job.stdout:
        seconds = time.monotonic() - started
        if line.startswith("first step done"):
            first_step = seconds
        if line.startswith(("training for ", "epoch=")):
            stamps.append(seconds)
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
        "cifar10.training_seconds": stamps[-1] - stamps[0],
        "cifar10.epoch_seconds": statistics.median(after - before for before, after in itertools.pairwise(stamps)),
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
        "cifar10.process_seconds": [job["time_to_accuracy.seconds"] for job in jobs],
        **{name: [job[name] for job in jobs] for name in ("cifar10.training_seconds", "cifar10.epoch_seconds")},
    }
    if math.inf in measured["cifar10.seconds_to_94_percent"]:
        print("left out: time to 94 %, as some round did not reach it", flush=True)
        del measured["cifar10.seconds_to_94_percent"]
    return measured
