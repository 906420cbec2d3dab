"""Training jobs that fail or are started again: one sentence, nothing published, and a resumed run ends the same."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.local import engine
from tests.helpers import Verb, verb_environment
from tests.programs import put_first
from tests.test_training_local import SHORT, owners, read


def test_evaluation_refuses_a_test_split_that_may_have_been_trained_on(verb: Verb, project: Path, raw: Path) -> None:
    (project / "data").mkdir()
    shutil.copytree(raw, project / "data" / "edges")  # raw images where packed ones go
    words = ("--mode", "process", "--data", "data/edges", "--set", "training.epochs=1")
    assert verb("train-local", *words).returncode == 0
    assert sorted(path.name for path in (project / "data" / "edges").iterdir()) == ["down", "left", "up"]
    assert verb("evaluate").returncode == 0
    packed_again = verb("data", "--data", "data/edges", "--set", "data.seed=1")
    assert packed_again.returncode == 0, packed_again.stderr
    refused = verb("evaluate")
    assert refused.returncode == 1
    assert "its test split may hold images that the model has seen" in refused.stderr


@pytest.mark.parametrize("mode", ["process", pytest.param("container", marks=pytest.mark.container)])
def test_a_failing_script_is_one_sentence_and_publishes_nothing(
    verb: Verb, project: Path, mode: str, request: pytest.FixtureRequest
) -> None:
    if mode == "container":
        request.getfixturevalue("nothing_left")
    loop = project / "src" / "training" / "loop.py"
    loop.write_text(
        loop.read_text().replace("        train_mode(model)\n", "        raise RuntimeError('out of luck')\n")
    )
    failed = verb("train-local", "--mode", mode, *SHORT)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[0] == "error: training failed: RuntimeError: out of luck"
    log = project / failed.stderr.splitlines()[1].rpartition(" ")[2]
    assert "Traceback" in log.read_text()
    assert not (project / "artifacts").exists()
    wrong = verb("train-local", "--mode", mode, "--set", "training.model=resnet19", *SHORT)
    assert wrong.returncode == 1
    assert "resnet19" in wrong.stderr.splitlines()[0]
    assert "Traceback" not in wrong.stderr


def test_the_host_that_failed_first_gives_the_reason(verb: Verb, project: Path) -> None:
    loop = project / "src" / "training" / "loop.py"
    bad = "        if world.rank == 1:\n            raise RuntimeError('out of luck')\n        train_mode(model)\n"
    loop.write_text(loop.read_text().replace("        train_mode(model)\n", bad))
    failed = verb("train-local", "--mode", "process", "--instances", "2", *SHORT)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[0] == "error: training failed: RuntimeError: out of luck"
    assert not children_in(project)


@pytest.mark.container
def test_a_crash_before_the_script_starts_is_named(verb: Verb, project: Path, nothing_left: str) -> None:
    (project / "src" / "training" / "train.py").write_text("import nonexistent\n")
    failed = verb("train-local", "--mode", "container", *SHORT)
    assert failed.returncode == 1
    assert "No module named 'nonexistent'" in failed.stdout + failed.stderr
    assert nothing_left


@pytest.mark.container
@pytest.mark.parametrize("early", [False, True])
def test_a_failure_counts_though_compose_ends_with_0(
    verb: Verb, project: Path, early: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_left: str
) -> None:
    """As docker-compose 1.29 does when it hears of a container's end before it has waited for it."""
    name = (engine.compose() or [""])[0]
    script = f'{shutil.which(name)} "$@"\ncode=$?\ncase " $* " in *" up "*) exit 0;; esac\nexit $code\n'
    put_first(name, script, tmp_path, monkeypatch)
    if early:
        (project / "src" / "training" / "train.py").write_text("import nonexistent\n")
    failed = verb("train-local", "--mode", "container", "--set", "training.model=resnet19", *SHORT)
    assert failed.returncode == 1
    reason = "No module named 'nonexistent'" if early else "resnet19"
    assert failed.stderr.startswith("error: training failed: ")
    assert reason in failed.stderr.splitlines()[0]
    assert not (project / "artifacts").exists()
    assert nothing_left


def test_resuming_ends_as_an_uninterrupted_run(verb: Verb, project: Path) -> None:
    exact = (*SHORT, "--set", "training.deterministic=true")  # or the memory order of tensors is chosen by timing
    assert verb("train-local", "--mode", "process", *exact).returncode == 0
    whole = read(project / "artifacts" / "latest" / "metrics.json")
    loop = project / "src" / "training" / "loop.py"
    text = loop.read_text()
    loop.write_text(
        text.replace("        train_mode(model)\n", "        assert progress.epoch < 2\n        train_mode(model)\n")
    )
    failed = verb("train-local", "--mode", "process", *exact)
    assert failed.returncode == 1
    loop.write_text(text)
    name = next((project / ".cache" / "checkpoints").iterdir()).name
    resumed = verb("train-local", "--mode", "process", "--run", name)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after epoch 2 of 3 and 0 steps" in resumed.stdout
    metrics = read(project / "artifacts" / name / "metrics.json")
    for key in ("val_loss", "val_accuracy", "train_loss", "epochs"):
        assert metrics[key] == whole[key]
    again = verb("train-local", "--run", name)
    assert (again.returncode, again.stderr) == (1, f"error: run {name} is finished; start a fresh one without RUN\n")
    unknown = verb("train-local", "--run", "nothing")
    assert unknown.stderr == "error: there is no interrupted run 'nothing'; there is none at all\n"


def start_long_run(project: Path, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """Start a run that would go on for hours and wait for its third epoch; gives the process and the run's name."""
    command = [sys.executable, "-m", "pipelines", "train-local", "--set", "training.epochs=100000"]
    command += ["--set", "training.compile=false", *arguments]  # which such a long run would wait for first
    started = subprocess.Popen(
        command, cwd=project, env=verb_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    name, text = "", ""
    assert started.stdout is not None
    for line in started.stdout:
        text += line
        name = line.split()[1] if line.startswith("run ") else name
        if line.startswith("epoch=3 "):
            return started, name
    raise AssertionError(f"the run ended by itself:\n{text}")


@pytest.mark.parametrize("mode", ["process", pytest.param("container", marks=pytest.mark.container)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything_and_the_run_can_be_resumed(
    verb: Verb, project: Path, mode: str, number: signal.Signals, request: pytest.FixtureRequest
) -> None:
    if mode == "container":
        request.getfixturevalue("nothing_left")
    started, name = start_long_run(project, "--mode", mode)
    if number == signal.SIGINT:  # a terminal sends it to the whole group, compose included
        os.killpg(started.pid, number)
    else:
        started.send_signal(number)
    text, _ = started.communicate(timeout=60)
    assert started.returncode == 130
    assert f"stopped by {number.name}; nothing was published. Resume with RUN={name}" in text
    assert not (project / "artifacts").exists()
    assert not children_in(project)
    assert owners(project) == {os.getuid()}
    assert list((project / ".cache" / "checkpoints" / name).glob("step-*"))
    resumed = verb("train-local", "--mode", mode, "--run", name, "--set", "training.epochs=3")
    assert resumed.returncode == 1  # what the run was started with counts: it would train for hours
    assert f"run {name} resumes with what it was started with" in resumed.stderr


def children_in(project: Path) -> list[str]:
    """Processes that still work in the copy."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").resolve().is_relative_to(project):
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue
    return found
