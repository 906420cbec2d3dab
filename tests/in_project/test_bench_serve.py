"""The bench of the server runs from one end to the other and leaves numbers; no speed is asserted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from tests.helpers import verb_environment

from benchmarks import process as outside
from benchmarks import serve

WANTED = {
    *(f"serve.{name}_c{clients}" for clients in (1, 8) for name in ("cpu_over_bare", "cpu_ms", "p50_ms", "p99_ms")),
    *("serve.requests_per_second_c1", "serve.requests_per_second_c8", "serve.cold_start_seconds", "serve.bare_cpu_ms"),
    *("serve.small.cpu_over_bare_c1", "serve.small.cpu_over_bare_c8", "serve.memory_mb"),
}


def bench(project: Path, *arguments: str) -> tuple[str, dict[str, float | str]]:
    command = [sys.executable, "-m", "benchmarks.serve", "--quick", *arguments]
    environment = verb_environment() | {"OMP_NUM_THREADS": "1", "INFERENCE_QUEUE": "8"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((project / "benchmarks" / "results.json").read_text(encoding="utf-8"))


def test_every_number_is_there_and_other_benchmarks_keep_theirs(project: Path) -> None:
    (project / "benchmarks" / "results.json").write_text('{"date": "before", "train.x": 1, "serve.old": 1}')
    printed, results = bench(project, "--small")
    assert results.keys() >= WANTED | {"serve.date", "serve.hardware.cpu", "serve.versions.uvicorn"}
    assert (results["date"], results["train.x"], "serve.old" in results) == ("before", 1, False)
    for key in WANTED:
        value = results[key]
        assert isinstance(value, float)
        assert math.isfinite(value)
        assert value > 0
        assert f"| {key} | " in printed
    _, results = bench(project, "--soak", "0.05")
    assert results["serve.soak.answered"]
    assert results["serve.soak.refused"]
    assert results.keys() >= WANTED | {"train.x"}


def test_the_photo_is_always_the_same_and_as_large_as_said() -> None:
    assert outside.photo() == outside.photo()
    assert 90_000 < len(outside.photo()) < 110_000


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
        while outside.cpu_seconds([process.pid]) < 0.5 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert outside.cpu_seconds([process.pid]) >= 0.5
        assert outside.memory_mb([process.pid]) > 1
        assert process.pid in outside.children()
    finally:
        process.communicate()


def test_a_soak_fails_for_another_answer_or_growing_memory() -> None:
    flat = [500.0] * 8
    assert serve.judge(Counter({200: 5, 503: 9}), flat) == 1
    for statuses in (Counter({200: 5, 500: 1}), Counter({503: 5}), Counter({200: 1, "reset": 1})):
        with pytest.raises(SystemExit, match="every answer"):
            serve.judge(statuses, flat)
    with pytest.raises(SystemExit, match="memory grew"):
        serve.judge(Counter({200: 5}), [500.0 + 10 * number for number in range(8)])


def test_a_median_above_its_limit_fails() -> None:
    good = {"serve.cpu_over_bare_c1": [1.0, 1.1, 9.0], "serve.cpu_over_bare_c8": [0.9]}
    assert serve.above_limits(good) == []
    (wrong,) = serve.above_limits(good | {"serve.cpu_over_bare_c8": [1.2]})
    assert "c8 is 1.200; the limit is 1.10" in wrong
