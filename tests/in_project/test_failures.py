"""Training jobs that fail or are started again: one sentence, nothing published, and a resumed run ends the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers import Verb
from tests.test_training_local import SHORT, children_in, read


def test_evaluation_refuses_a_test_split_that_may_have_been_trained_on(verb: Verb, project: Path, raw: Path) -> None:
    (project / "data").mkdir()
    shutil.copytree(raw, project / "data" / "edges")  # raw images where packed ones go
    words = ("--mode", "process", "--data", "data/edges", "--set", "training.epochs=1")
    assert verb("train_local", *words).returncode == 0
    assert sorted(path.name for path in (project / "data" / "edges").iterdir()) == ["down", "left", "up"]
    assert verb("evaluate").returncode == 0
    packed_again = verb("data", "--data", "data/edges", "--set", "data.seed=1")
    assert packed_again.returncode == 0, packed_again.stderr
    refused = verb("evaluate")
    assert refused.returncode == 1
    assert "its test split may hold images that the model has seen" in refused.stderr


@pytest.mark.parametrize("mode", ["container", "process"])
def test_a_failing_script_is_one_sentence_and_publishes_nothing(
    verb: Verb, project: Path, mode: str, request: pytest.FixtureRequest
) -> None:
    if mode == "container":
        request.getfixturevalue("nothing_left")
    loop = project / "src" / "training" / "loop.py"
    loop.write_text(
        loop.read_text().replace("        train_mode(model)\n", "        raise RuntimeError('out of luck')\n")
    )
    failed = verb("train_local", "--mode", mode, *SHORT)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[0] == "error: training failed: RuntimeError: out of luck"
    log = project / failed.stderr.splitlines()[1].rpartition(" ")[2]
    assert "Traceback" in log.read_text()
    assert not (project / "artifacts").exists()
    wrong = verb("train_local", "--mode", mode, "--set", "training.model=resnet19", *SHORT)
    assert wrong.returncode == 1
    assert "resnet19" in wrong.stderr.splitlines()[0]
    assert "Traceback" not in wrong.stderr


def test_the_host_that_failed_first_gives_the_reason(verb: Verb, project: Path) -> None:
    loop = project / "src" / "training" / "loop.py"
    bad = "        if world.rank == 1:\n            raise RuntimeError('out of luck')\n        train_mode(model)\n"
    loop.write_text(loop.read_text().replace("        train_mode(model)\n", bad))
    failed = verb("train_local", "--mode", "process", "--instances", "2", *SHORT)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[0] == "error: training failed: RuntimeError: out of luck"
    assert not children_in(project)


def test_a_crash_before_the_script_starts_is_named(verb: Verb, project: Path, nothing_left: str) -> None:
    (project / "src" / "training" / "train.py").write_text("import nonexistent\n")
    failed = verb("train_local", "--mode", "container", *SHORT)
    assert failed.returncode == 1
    assert "No module named 'nonexistent'" in failed.stdout + failed.stderr
    assert nothing_left


def test_resuming_ends_as_an_uninterrupted_run(verb: Verb, project: Path) -> None:
    exact = (*SHORT, "--set", "training.deterministic=true")  # or the memory order of tensors is chosen by timing
    assert verb("train_local", "--mode", "process", *exact).returncode == 0
    whole = read(project / "artifacts" / "latest" / "metrics.json")
    loop = project / "src" / "training" / "loop.py"
    text = loop.read_text()
    loop.write_text(
        text.replace("        train_mode(model)\n", "        assert progress.epoch < 2\n        train_mode(model)\n")
    )
    failed = verb("train_local", "--mode", "process", *exact)
    assert failed.returncode == 1
    loop.write_text(text)
    name = next((project / ".cache" / "checkpoints").iterdir()).name
    resumed = verb("train_local", "--mode", "process", "--run", name)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after epoch 2 of 3 and 0 steps" in resumed.stdout
    metrics = read(project / "artifacts" / name / "metrics.json")
    for key in ("val_loss", "val_accuracy", "train_loss", "epochs"):
        assert metrics[key] == whole[key]
    again = verb("train_local", "--run", name)
    assert (again.returncode, again.stderr) == (1, f"error: run {name} is finished; start a fresh one without RUN\n")
    unknown = verb("train_local", "--run", "nothing")
    assert unknown.stderr == "error: there is no interrupted run 'nothing'; there is none at all\n"
