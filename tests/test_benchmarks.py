"""The benchmarks run from one end to the other on a baked project and leave numbers; no speed is asserted."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import page
import pytest
import serve
import tree
from PIL import Image

from tests.conftest import TEMPLATE, Project, fresh_shell

PUBLISHED = TEMPLATE / "docs" / "benchmarks.md"
TRAINING = {
    *("startup.seconds_to_first_step", "time_to_accuracy.seconds", "time_to_accuracy.val_accuracy"),
    *("cifar10.training_seconds", "cifar10.epoch_seconds", "cifar10.process_seconds"),
    *("cifar10.val_accuracy", "memory.peak_mb", "train.overhead_us_per_step"),
    *("train.fed_over_limit", "train.images_per_second", "train.limit_images_per_second"),
    *("train.cnn.32.fed_over_limit", "train.cnn.32.fp32.fed_over_limit", "train.cnn.32.augmented.fed_over_limit"),
    "train.resnet18.64.fed_over_limit",
}
SERVING = {
    *(f"serve.{name}_c{clients}" for clients in (1, 8) for name in ("cpu_over_bare", "cpu_ms", "p50_ms", "p99_ms")),
    *("serve.requests_per_second_c1", "serve.requests_per_second_c8", "serve.cold_start_seconds", "serve.bare_cpu_ms"),
    *("serve.small.cpu_over_bare_c1", "serve.small.cpu_over_bare_c8", "serve.memory_mb"),
}
ABSENT = ("sagemaker", "boto3", "pydantic", "yaml", "tqdm", "sklearn", "torchvision", "starlette", "uvicorn")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # on a busy machine threads wait for each other


def measured(project: Project, folder: Path, name: str, *words: str, **environment: str) -> tuple[dict[str, Any], str]:
    """Run a benchmark in its quickest form, as `make bench-...` does once it has baked; its numbers, and its page."""
    before = PUBLISHED.read_bytes()
    command = [project.program("python"), f"benchmarks/{name}.py", "--project", str(project.path)]
    done = subprocess.run(
        [*command, "--quick", "--into", str(folder), *words],
        cwd=TEMPLATE, env=fresh_shell() | ONE_THREAD | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert PUBLISHED.read_bytes() == before, "numbers that mean nothing were published"
    results: dict[str, Any] = json.loads((folder / "benchmarks.json").read_text(encoding="utf-8"))
    return results, (folder / "benchmarks.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_training(ready: Project, tmp_path: Path) -> None:
    for seed, split in enumerate(("train", "val", "test")):  # as CIFAR-10 would be given
        for label, colour in (("dark", 40), ("light", 200)):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for number in range(40):
                noise = np.random.default_rng((seed, number)).integers(0, 50, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(noise + np.uint8(colour)).save(folder / f"{number}.png")
    (tmp_path / "benchmarks.json").write_text('{"serve.x": 1, "train.old": 1}')
    results, text = measured(ready, tmp_path, "train", "--cifar10", str(tmp_path / "photos"))
    assert results.keys() >= TRAINING | {"date", "rounds", "hardware.cpu", "hardware.device", "versions.torch"}
    assert (results["serve.x"], "train.old" in results) == (1, False)
    numbers = {key: value for key, value in results.items() if not isinstance(value, str)}
    assert all(math.isfinite(value) for value in numbers.values())
    # A difference of two times may be anything on a busy machine, and the load of an idle one is 0.
    free = ("train.overhead_us_per_step", "hardware.load_before")
    assert not {key: value for key, value in numbers.items() if value <= 0 and not key.startswith(free)}
    section = text.partition("## What training costs: `make bench-train`\n")[2].partition("\n## ")[0]
    assert not [key for key in TRAINING if f"| {key} | " not in section]
    assert text.count("\n## ") == PUBLISHED.read_text(encoding="utf-8").count("\n## ")  # it took the old one's place


@pytest.mark.slow
def test_training_needs_only_what_the_container_has(ready: Project) -> None:
    code = (
        f"import sys; sys.modules |= dict.fromkeys({(*ABSENT, 'pipelines')}); sys.path.insert(0, 'benchmarks')\n"
        f"import pathlib, page; page.enter(pathlib.Path({str(ready.path)!r})); import train, process, step, material\n"
        "assert material.photo() == material.photo()\n"
        "assert 90_000 < len(material.photo()) < 110_000"
    )
    done = subprocess.run([ready.program("python"), "-c", code], cwd=TEMPLATE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_serving(ready: Project, tmp_path: Path) -> None:
    (tmp_path / "benchmarks.json").write_text('{"date": "before", "train.x": 1, "serve.old": 1}')
    results, text = measured(ready, tmp_path, "serve", "--small", "--runs", "0", INFERENCE_QUEUE="8")
    assert results.keys() >= SERVING | {"serve.date", "serve.hardware.cpu", "serve.versions.uvicorn"}
    assert (results["date"], results["train.x"], "serve.old" in results) == ("before", 1, False)
    for key in SERVING:
        assert math.isfinite(results[key])
        assert results[key] > 0
        assert f"| {key} | " in text
    results, _ = measured(ready, tmp_path, "serve", "--soak", "0.05", INFERENCE_QUEUE="8")
    assert results["serve.soak.answered"]
    assert results["serve.soak.refused"]
    assert results.keys() >= SERVING | {"train.x"}


@pytest.mark.slow
def test_serving_beside_other_servers(ready: Project, tmp_path: Path) -> None:
    others = serve.hosts()
    _, text = measured(ready, tmp_path, "serve", "--runs", "1", **others)
    (row,) = re.findall(r"(?m)^\| requests/s, 8 clients \|(.*)\|$", text)
    assert len(row.split("|")) == 3
    assert all(float(cell.replace(",", "")) > 0 for cell in row.split("|"))


def test_the_comparison_takes_the_place_of_the_last_one(tmp_path: Path) -> None:
    """Its row of requests/s is what others read."""
    (tmp_path / "benchmarks.md").write_text(PUBLISHED.read_text(encoding="utf-8"))
    book = page.Book(tmp_path / "benchmarks.md", tmp_path / "benchmarks.json")
    found = {key: float(number) for number, (key, _) in enumerate(serve.ROWS.values(), 1)}
    names = ("this template", "TorchServe, PyTorch toolkit", "Ray Serve, our bridge")
    book.keep(serve.OTHERS_TITLE, serve.table({name: [found] for name in names}))
    text = book.page.read_text(encoding="utf-8")
    assert text.count("\n| requests/s, 8 clients | 4.0 | 4.0 | 4.0 |\n") == text.count("| requests/s, 8 clients |") == 1
    assert text.count("\n## ") == PUBLISHED.read_text(encoding="utf-8").count("\n## ")


def test_without_java_or_environments_the_comparison_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"needs java, which is not on PATH: install it .* --runs 0"):
        serve.hosts()
    monkeypatch.delenv("TORCHSERVE_PYTHON", raising=False)
    with pytest.raises(SystemExit, match=r"TORCHSERVE_PYTHON names no interpreter .* `make bench-serve`"):
        serve.comparison("serve", 1, 1.0, tmp_path)


def test_a_soak_fails_for_another_answer_or_growing_memory() -> None:
    flat = [500.0] * 8
    assert serve.judge(Counter({200: 5, 503: 9}), flat) == 1
    for statuses in (Counter[Any]({200: 5, 500: 1}), Counter[Any]({503: 5}), Counter[Any]({200: 1, "reset": 1})):
        with pytest.raises(SystemExit, match="every answer"):
            serve.judge(statuses, flat)
    with pytest.raises(SystemExit, match="memory grew"):
        serve.judge(Counter({200: 5}), [500.0 + 10 * number for number in range(8)])


def test_a_median_above_its_limit_fails() -> None:
    good = {"serve.cpu_over_bare_c1": [1.0, 1.1, 9.0], "serve.cpu_over_bare_c8": [0.9]}
    assert serve.above_limits(good) == []
    (wrong,) = serve.above_limits(good | {"serve.cpu_over_bare_c8": [1.2]})
    assert "c8 is 1.200; the limit is 0.95" in wrong


def test_a_server_behind_the_others_is_named() -> None:
    other = [{"requests_per_second_c8": 20.0, "p99_ms_c8": 300.0, "memory_mb": 900.0}]
    own = [{"requests_per_second_c8": 24.0, "p99_ms_c8": 290.0, "memory_mb": 900.0}]
    assert serve.behind({"ours": own, "a": other, "b": other}) == []
    less = [{"requests_per_second_c8": 22.0, "p99_ms_c8": 310.0, "memory_mb": 950.0}]
    p99, memory, rate = serve.behind({"ours": less, "a": other, "b": other})
    assert p99 == "p99_ms_c8 of ours is 310; the limit is 300"
    assert memory.startswith("memory_mb of ours is 950")
    assert rate == "requests_per_second_c8 of ours is 22.0; it must be 23.0 at least"


@pytest.mark.parametrize("ending", ["wait()", "communicate(b''); input()"])
def test_the_cpu_of_a_whole_process_tree_counts(ending: str) -> None:
    """Of a child that lives, and of one that has ended."""
    child = "import time\nwhile time.process_time() < 0.6: pass\ninput()"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).{ending}"
    if "communicate" in ending:
        code = code.replace("])", "], stdin=subprocess.PIPE)")
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while tree.cpu_seconds([process.pid]) < 0.5 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert tree.cpu_seconds([process.pid]) >= 0.5
        assert tree.memory_mb([process.pid]) > 1
        assert process.pid in tree.children()
    finally:
        process.communicate()


def test_a_benchmark_bakes_away_from_the_demo_and_starts_itself_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(command)
        return subprocess.CompletedProcess(command, 3)

    assert page.BUILD == TEMPLATE / "build"
    monkeypatch.setattr(page, "BUILD", tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    (tmp_path / "benchmarks" / "project").mkdir(parents=True)
    (tmp_path / "benchmarks" / "project" / "left").touch()  # by an earlier one
    project, python = page.bake()
    assert project == tmp_path / "benchmarks" / "project"
    assert (project / "src" / "model.py").exists()
    assert not (project / "left").exists()
    assert started[-1] == ["make", "setup"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/train.py", "--rounds", "2"])
    assert page.again(python, project) == 3  # whatever it ends with is handed on
    assert started[-1] == [python, "benchmarks/train.py", "--project", str(project), "--rounds", "2"]


def test_make_hands_the_same_options_to_each_benchmark() -> None:
    said = {
        verb: subprocess.run(
            ["make", "-n", verb, "ARGS=--rounds 1 --runs 1"], cwd=TEMPLATE, capture_output=True, text=True, check=True
        ).stdout
        for verb in ("bench", "bench-train", "bench-serve")
    }
    programs = {
        verb: re.findall(r"benchmarks/(\w+)\.py --rounds 1 --runs 1$", text, re.M) for verb, text in said.items()
    }
    assert programs["bench-train"] == ["train"]
    assert programs["bench-serve"] == ["serve"]
    assert programs["bench"] == ["startup", "train", "loaders", "scaling", "serve"]
    for name in programs["bench"]:
        done = subprocess.run(
            [sys.executable, f"benchmarks/{name}.py", "--help"], cwd=TEMPLATE, capture_output=True, text=True
        )
        assert "--rounds" in done.stdout, done.stderr
        assert "--runs" in done.stdout


@pytest.mark.slow
def test_the_check_of_a_gpu_starts_with_the_few_packages_of_a_device_machine(ready: Project, tmp_path: Path) -> None:
    """Tiny, on a CPU: that its imports follow the project's modules, and that a check can fail."""
    names = ("environment", "augmentation_matches_cpu", "smoke_cnn_fp32_direct", "artifact_gpu_against_cpu", "serving",
             "epoch_wall_time", "resnet50_compiled_by_batch")  # fmt: skip
    words = ["gpu.py", str(ready.path), "--only", ",".join(names), "--out", str(tmp_path)]
    code = (
        f"import runpy, sys; sys.modules |= dict.fromkeys({ABSENT}); sys.path.insert(0, 'benchmarks')\n"
        f"sys.argv = {words}; runpy.run_path('benchmarks/gpu.py', run_name='__main__')"
    )
    done = subprocess.run([ready.program("python"), "-c", code], cwd=TEMPLATE, env=fresh_shell(), capture_output=True,
                          text=True)  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {line["check"]: line["ok"] for line in lines}
    assert found == dict.fromkeys(names, True) | {"artifact_gpu_against_cpu": False}, done.stdout + done.stderr
    assert done.returncode == 1  # the artifact is that of a job, which was not chosen
