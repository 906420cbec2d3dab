"""What people see: bars on a terminal, plain lines elsewhere, what a wait is for; never a colour."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import progress
from pipelines import config
from pipelines.cloud import storage
from pipelines.cloud.account import Account
from pipelines.local import view as local_view
from processing.preprocess import pack
from tests.cloud import STACK, Recorder, aws
from tests.helpers import verb_environment
from tests.programs import put_first
from tests.test_training_local import NO_ENGINE, SHORT

__all__ = ["aws"]
COLUMNS = 80
TIME = r"\d\d:\d\d"


class Terminal(io.StringIO):
    """Takes text as a terminal does."""

    def isatty(self) -> bool:
        return True


def screen(written: str) -> list[str]:
    """The lines that stay, after all that was written over others."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        seen: list[str] = []
        for part in line.split("\r"):
            seen[: len(part)] = part
        lines.append("".join(seen).rstrip())
    return [line for line in lines if line]


def on_a_terminal(project: Path, verb: str, *arguments: str, **environment: str) -> tuple[str, list[str]]:
    """Run a verb on a terminal of 80 columns; what it wrote, and what is to be seen in the end."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    variables = {**verb_environment(), "TERM": "xterm-256color", "NO_COLOR": "1", "PYTHONUTF8": "1", **environment}
    for name in ("COLUMNS", "LINES"):
        variables.pop(name, None)
    command = [sys.executable, "-m", "pipelines", verb, *arguments]
    with subprocess.Popen(command, cwd=project, env=variables, stdin=side, stdout=side, stderr=side) as process:
        os.close(side)
        written = b""
        while True:
            try:
                part = os.read(main, 65536)
            except OSError:  # Linux says so that nobody writes any more
                break
            if not part:
                break
            written += part
    os.close(main)
    text = written.decode()
    assert process.returncode == 0, text
    assert "\x1b" not in text
    return text, screen(text)


def bar(verb: str, total: int, unit: str, lines: list[str], more: str = "") -> str:
    """The one line of a bar that reached its end."""
    (found,) = [line for line in lines if line.startswith(f"{verb}:")]
    pattern = rf"{verb}: 100%\|█+\| {total}/{total} \[{TIME}<00:00, +[\d.]+ {unit}/s{more}\]"
    assert re.fullmatch(pattern, found), found
    assert len(found) <= COLUMNS
    return found


def test_bars_and_tables_on_a_terminal(project: Path, raw: Path) -> None:
    _, lines = on_a_terminal(project, "data", "--data", str(raw))
    bar("packing", 60, "images", lines)
    words = ["--data", str(raw), "--mode", "process", *SHORT]
    written, lines = on_a_terminal(project, "train-local", *words, **NO_ENGINE)
    epochs = [line for line in lines if "epoch=" in line]
    assert epochs, lines
    assert all(re.fullmatch(r"(exported: )?epoch=\d+( \w+=[\d.]+){3,4}", line) for line in epochs), epochs
    assert all(len(line) <= COLUMNS for line in lines if str(raw) not in line), lines
    steps = int(re.findall(r"(\d+)/\1 \[", written)[-1])
    shown = bar("training", steps, "steps", lines, r", val_accuracy=[\d.]+")
    assert lines.index(shown) > lines.index(epochs[-1])
    assert lines.index("next:") == len(lines) - 4
    assert lines[-3] == "  make report"
    assert "waiting for the first step of training, 2 s" in written or "3 s" in written  # importing torch takes longer
    assert not [line for line in lines if line.startswith("waiting")]  # and is gone when the wait is over
    _, lines = on_a_terminal(project, "evaluate")
    bar("evaluating", 9, "images", lines)
    assert lines[-4] == "next:"
    _, lines = on_a_terminal(project, "batch-local", "--data", str(raw))
    bar("classifying", 60, "images", lines)
    assert lines[-2] == "next:"


def test_plain_lines_without_a_terminal(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    pack(raw, tmp_path / "packed")
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("packing ")]
    assert re.fullmatch(r"packing 1/60 images, \d+\.\d/s, \d+ s left", lines[0])
    assert re.fullmatch(r"packing 60/60 images, \d+\.\d/s, 0 s left", lines[-1])
    assert err == ""


def test_uploads_count_bytes(
    aws: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import boto3

    boto3.client("s3").create_bucket(Bucket=STACK.bucket)
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    for number in range(3):
        (tmp_path / f"{number}.npy").write_bytes(bytes(500_000))
    account = Account(config.load((), {}), STACK)
    storage.upload(account, tmp_path, "data/x")
    printed = capsys.readouterr().out
    assert re.search(r"^uploading 1\.5/1\.5 MB, [\d.]+ MB/s, 0 s left$", printed, re.MULTILINE), printed
    storage.download(account, f"s3://{STACK.bucket}/data/x/0.npy", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == bytes(500_000)
    assert re.search(r"^downloading back 0\.5/0\.5 MB, ", capsys.readouterr().out, re.MULTILINE)
    assert aws


def test_a_wait_says_what_for_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LONG", 0.5)
    monkeypatch.setattr(progress, "SOON", 0.5)
    plain, terminal = io.StringIO(), Terminal()
    with progress.waiting("Godot", plain) as say, progress.waiting("Godot", terminal) as say_there:
        time.sleep(1.6)
        say("he comes")
        say_there("he comes")
    assert plain.getvalue() == "waiting for Godot, 1 s\nhe comes\n"
    assert "\rwaiting for Godot, 1 s" in terminal.getvalue()
    assert screen(terminal.getvalue()) == ["he comes"]
    assert [progress.duration(seconds) for seconds in (8.4, 200, 7500)] == ["8 s", "3 min 20 s", "2 h 5 min"]


def test_building_an_image_says_so(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_first("docker", '[ "$1" = build ] && sleep 2.4\nexit 0\n', tmp_path, monkeypatch)
    written, lines = on_a_terminal(project, "image")
    assert "waiting for `docker build`, whose log is .cache/image-build.log, 2 s" in written
    assert [line for line in lines if line.startswith("waiting")] == []


def test_a_resumed_training_counts_what_was_done_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    terminal = Terminal()
    view = local_view.TrainingView(tmp_path / "log", containers=False, output=terminal)
    view.write("resumed after epoch 1 of 4 and 5 steps\ntraining for 4 epochs of 10 steps\n")
    view.write("progress epoch 2/4 step 18/40, 3.0 steps/s, 7 s left\n")
    view.close()
    assert "15/40 [00:00<?" in terminal.getvalue()
    assert re.search(r"training: +45%\|.*\| 18/40 \[", screen(terminal.getvalue())[-1])
    assert "18/40" in (tmp_path / "log").read_text()
