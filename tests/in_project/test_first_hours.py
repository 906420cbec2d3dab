"""What a newcomer meets in the first hours: what is printed, how mistakes are answered, tables that fit a terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest

from pipelines import runs, terminal
from pipelines.__main__ import refuse, verbs
from pipelines.config import load, meant
from pipelines.local import compare, sandbox, serve, train, view
from pipelines.report import page
from pipelines.report.page import Record
from pipelines.terminal import UserError
from progress import several
from training.feed import Feed

SETTINGS = {  # what people typed: the setting that they meant
    "epochs=3": "training.epochs=3",
    "EPOCHS=3": "training.epochs=3",
    "--epochs 3": "training.epochs=3",
    "--epochs=3": "training.epochs=3",
    "--batch-size 8 --verbose": "training.batch_size=8",
    "training.epochs=3": "training.epochs=3",
    "epoch=3": "training.epochs=3",
    "learning-rate=1e-3": "training.learning_rate=1e-3",
    "learningrate=0.1": "training.learning_rate=0.1",
    "model=resnet18": "training.model=resnet18",
    "local_mode=process": "compute.local_mode=process",
    "megapixels 200": "data.megapixels=200",
    "--deterministic": "training.deterministic=...",
    "epochs=$(rm -rf /)": "training.epochs=...",
    "--foo": "",
    "": "",
    "DTAA=x": "",
}


@pytest.mark.parametrize("typed", SETTINGS)
def test_a_setting_without_set_is_understood(typed: str) -> None:
    assert meant(typed) == SETTINGS[typed]


@pytest.mark.parametrize("given", [{}, {"DATA": ""}])
def test_a_setting_as_an_option_is_explained(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "given", given)
    monkeypatch.setattr("sys.argv", ["train-local", "--epochs", "3"])
    words = 'ARGS="--set training.epochs=3"' if given else "--set training.epochs=3"
    with pytest.raises(UserError, match=rf"^unrecognized arguments: --epochs 3; a setting is given with {words}$"):
        train.main()
    monkeypatch.setattr("sys.argv", ["compare", "--epochs", "3"])  # which reads no settings
    with pytest.raises(UserError, match=r"shows the options$"):
        compare.main()


def test_a_setting_as_a_variable_or_without_its_section_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"train-local", "help"} <= {verb for rows in verbs().values() for verb in rows}
    monkeypatch.setattr(terminal, "given", {"epochs": "3"})
    with pytest.raises(UserError, match=r'takes no epochs; a setting is given with ARGS="--set training.epochs=3"$'):
        refuse(["epochs"], ["train-local"])
    with pytest.raises(UserError, match=r"takes no epochs; it takes ARGS;"):
        refuse(["epochs"], ["help"])
    with pytest.raises(UserError, match="takes no DTAA; did you mean DATA"):
        refuse(["DTAA"], ["train-local"])
    with pytest.raises(UserError, match=r"unknown section 'epochs'; did you mean training.epochs=3\?"):
        load(["epochs=3"], environment={})
    with pytest.raises(UserError, match=r"unknown section 'trainin'; did you mean training"):
        load(["trainin.epochs=3"], environment={})


def record(name: str, hyperparameters: dict[str, Any], commit: str | None, score: float) -> Record:
    found = {"value": score, "ci_low": score - 0.05, "ci_high": score + 0.05}
    names = ("accuracy", "expected_calibration_error", "recall_of_the_worst_of_all_classes_there_are")
    run = {"run": name, "git_commit": commit, "dataset_fingerprint": name[:1] * 64, "hyperparameters": hyperparameters,
           "data": f"data/{name}", "image": f"registry.example/a-long-path/of-an-image-{name}:0123456789abcdef",
           "device": "NVIDIA H100 80GB HBM3 with a name that goes on" if commit else "CPU (x86_64)"}  # fmt: skip
    evaluation = {"metrics": dict.fromkeys(names, found), "dataset_fingerprint": "f"}
    return Record(Path(name), run, {"val_loss": score, "seconds": 1.0, "world_size": 1}, [], evaluation, {}, [])


def test_compare_fits_a_terminal_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    long = "a-name-without-any-blank-that-is-longer-than-half-of-a-terminal-" + "x" * 30
    pair = [record("one", {"model": long}, "0123456789abcdef" * 2 + "01234567-dirty", 0.5),
            record("two", {"model": "cnn", "more": [1, 2, 3] * 20}, None, 0.9)]  # fmt: skip
    monkeypatch.setattr(compare, "names", lambda *_: (tmp_path / "one", tmp_path / "two"))
    monkeypatch.setattr(page, "read", lambda folder: pair[folder.name == "two"])
    monkeypatch.setattr("sys.argv", ["compare"])
    assert compare.main() == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 79
    squeezed = re.sub(r"\s+", "", printed)
    assert "None" not in printed
    assert "git_commit" not in printed
    assert re.search(r"(?m)^  commit +0123456789ab-dirty +none$", printed)
    assert long[:20] in squeezed
    assert squeezed.count("x") >= 30
    assert "seconds of the" in printed
    assert re.search(r"test accuracy .*0\.5000 .*0\.9000 .*\+0\.4000", printed)


def test_commands_in_a_verdict_stay_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one = record("20261121-093000-a1b2", {}, None, 0.5)
    one.evaluation.clear()
    monkeypatch.setattr(compare, "names", lambda *_: (tmp_path, tmp_path))
    monkeypatch.setattr(page, "read", lambda _: one)
    monkeypatch.setattr("sys.argv", ["compare"])
    assert compare.main() == 0
    printed = capsys.readouterr().out
    assert "`make evaluate RUN=<name>`" in printed
    assert max(map(len, printed.splitlines())) <= 79


def test_serve_local_looks_at_the_picture_before_it_starts_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "find", lambda _: tmp_path)
    monkeypatch.setattr(sandbox, "image", lambda *_, **__: pytest.fail("too late"))
    for name, reason in (("nope", "No such file"), (str(tmp_path), "Is a directory")):
        monkeypatch.setattr("sys.argv", ["serve-local", "--image", name])
        with pytest.raises(UserError, match=f"cannot be read: {reason}"):
            serve.main()


def test_a_stop_is_one_sentence_on_the_screen_and_stays_in_the_log(tmp_path: Path) -> None:
    for containers, host in ((False, ""), (True, "algo-1  | ")):
        output = io.StringIO()
        shown = view.TrainingView(tmp_path / "log", containers=containers, output=output)
        shown.write(f"{host}Executing command: x\n{host}training for 1 epoch of 1 step\n")
        shown.write(f"{host}stopped by SIGTERM; a checkpoint is written, nothing else is\n")
        shown.close()
        assert "training for 1 epoch of 1 step" in output.getvalue()
        assert "stopped by" not in output.getvalue()
        assert "stopped by SIGTERM" in (tmp_path / "log").read_text()


def test_a_bar_counts_one_epoch_of_one_step() -> None:
    assert view.PLAN.match("training for 1 epoch of 1 step")
    assert view.PLAN.match("training for 2 epochs of 19 steps")
    assert view.RESUMED.match("resumed after epoch 1 of 4 and 1 step")


def test_counts_have_their_plural() -> None:
    assert [several(1, what) for what in ("epoch", "class", "process")] == ["1 epoch", "1 class", "1 process"]
    assert [several(2, what) for what in ("epoch", "class", "process")] == ["2 epochs", "2 classes", "2 processes"]
    assert several(0, "file") == "0 files"


def test_every_way_that_images_come_has_words() -> None:
    assert {"direct", "resident", "stream"} == set(Feed.WORDS)
