"""The benchmark runs from one end to the other and leaves numbers; no speed is asserted."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers import verb_environment

WANTED = {
    "startup.seconds_to_first_step",
    "time_to_accuracy.seconds",
    "time_to_accuracy.val_accuracy",
    "cifar10.val_accuracy",
    "memory.peak_mb",
    "train.fed_over_limit",
    "train.images_per_second",
    "train.limit_images_per_second",
    "train.cnn.32.fed_over_limit",
    "train.cnn.32.fp32.fed_over_limit",
    "train.cnn.32.augmented.fed_over_limit",
    "train.resnet18.64.fed_over_limit",
    "train.overhead_us_per_step",
    "hardware.cpu",
    "hardware.device",
    "versions.torch",
    "date",
}


def test_every_number_is_there(project: Path, raw: Path, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):  # as CIFAR-10 would be given
        shutil.copytree(raw, tmp_path / "edges" / split)
    command = [sys.executable, "-m", "benchmarks.train", "--quick", "--cifar10", str(tmp_path / "edges")]
    environment = verb_environment() | {"OMP_NUM_THREADS": "1"}  # on a busy machine threads wait for each other
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((project / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    assert results.keys() >= WANTED
    numbers = {key: value for key, value in results.items() if not isinstance(value, str)}
    assert all(math.isfinite(value) for value in numbers.values())
    # A difference of two times may be anything on a busy machine, and the load of an idle one is 0.
    free = ("train.overhead_us_per_step", "hardware.load_before")
    assert not {key: value for key, value in numbers.items() if value <= 0 and not key.startswith(free)}
    for key in WANTED & numbers.keys():
        assert f"| {key} | " in done.stdout


def test_it_needs_only_what_the_container_has(project: Path) -> None:
    absent = ("sagemaker", "boto3", "pydantic", "yaml", "tqdm", "sklearn", "torchvision", "pipelines")
    code = f"import sys; sys.modules |= dict.fromkeys({absent}); import benchmarks.train"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=project, env=verb_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
