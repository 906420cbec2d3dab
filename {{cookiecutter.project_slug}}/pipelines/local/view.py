"""A live view of a training log: a bar on a terminal, plain lines elsewhere, and all of it in a file."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from progress import bar, plain, regularly, waiting

ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
CONTAINER = re.compile(r"^(?:\S*?[-_])?(algo-\d+)(?:[-_]\d+)?\s*\| ?")  # compose v1: `algo-1_1  | `, v2: `algo-1  | `
PLAN = re.compile(r"^training for (\d+) epochs? of (\d+) steps?")
RESUMED = re.compile(r"^resumed after epoch (\d+) of \d+ and (\d+) steps?")
EPOCH = re.compile(r"^epoch=\d+ step=(\d+) .*val_accuracy=([0-9.eE+-]+)")
EXTRA = ("step", "images_per_second", "val_worst_recall", "val_f1", "train_loss")  # that a terminal has no room for
PROGRESS = re.compile(r"^progress epoch \d+/\d+ step (\d+)/\d+")
DRIVER = ("++ ", "+++ ", "Executing command:", "Training Container Execution Completed",
          "An error occurred with exit code", "Command failed with exit code")  # fmt: skip
KILLED = re.compile(r"algo-\S+ exited with code (129|1[3-9]\d|2\d\d)")  # by a signal, so it said nothing itself


class TrainingView:
    """Shows a training log as it grows: a progress bar on a terminal, plain lines elsewhere; keeps all of it in a file.

    A file-like object, so that it can stand in for `sys.stdout`, which is where the SDK writes container output.

    Args:
        log: the file that takes everything.
        containers: whether lines come from compose; only what the training script prints is shown then.
        verbose: show every line.
        output: where lines are shown.
    """

    def __init__(self, log: Path, containers: bool, verbose: bool = False, output: TextIO | None = None) -> None:
        self.on_first_step: Callable[[], None] = lambda: None
        self.last_line = ""  # that may be the reason of an end
        self._heard = False
        self._output = output or sys.stdout
        self._log = log.open("a", encoding="utf-8")
        self._containers = containers
        self._verbose = verbose
        self._rest = ""
        self._started: set[str] = set()  # hosts whose driver has started the script
        self._bar: Any = None  # of tqdm; after the script has said how much there is to do
        self._resumed = (0, 0)  # epochs and steps
        self._lock = threading.Lock()
        self._open = contextlib.ExitStack()
        self._say = self._open.enter_context(waiting("the first step of training", self._output))

    def write(self, text: str) -> int:
        """Take any piece of text; complete lines are shown."""
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._take(line)
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    def isatty(self) -> bool:
        """Never a terminal to the program whose output this takes."""
        return False

    def close(self) -> None:
        """Show the last line and leave the bar standing."""
        if self._rest:
            self.write("\n")
        self._open.close()
        self._bar = None
        with contextlib.suppress(OSError):
            self._log.close()

    def _take(self, line: str) -> None:
        line = plain(ESCAPES.sub("", line).rstrip("\r").expandtabs())
        with contextlib.suppress(OSError):  # a full disk costs the log, and must not block the one who writes it
            self._log.write(line + "\n")
            self._log.flush()
        host = CONTAINER.match(line) if self._containers else None
        text = line[host.end() :] if host else line
        if text.strip() and not text.startswith(DRIVER) and (host or not self._heard):
            self.last_line = text.strip()  # once a container spoke, what compose says of it is no reason
        elif KILLED.match(text):
            self.last_line += f" ({text.strip()})"
        self._heard |= bool(host)
        if self._verbose:
            self._show(line)
        elif text.startswith("stopped by SIGTERM"):  # the verb says it, with what to do next
            pass
        elif not self._containers or (host is None and text.lower().startswith("error")):
            self._show(text)
        elif host and text.startswith("Executing command:"):
            self._started.add(host[1])
        elif host and host[1] in self._started and not text.startswith(DRIVER):
            self._show(text if host[1] == "algo-1" else f"{host[1]}: {text}")
        self._advance(text)

    def _show(self, text: str) -> None:
        if self._output.isatty():
            text = self._fitted(text)
        if self._bar is None:
            self._say(text)
        elif not PROGRESS.match(text):
            self._bar.write(text, file=self._output)

    def _fitted(self, text: str) -> str:
        """A line as a terminal shows it best: that of an epoch in a width of 80, others broken between words."""
        columns = shutil.get_terminal_size().columns
        for name in EXTRA if EPOCH.match(text.removeprefix("exported: ")) else ():
            text = re.sub(rf" {name}=\S+", "", text, count=1) if len(text) >= columns else text
        if len(text) < columns:
            return text
        return textwrap.fill(text, columns - 1, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)

    def _advance(self, text: str) -> None:
        if resumed := RESUMED.match(text):
            self._resumed = (int(resumed[1]), int(resumed[2]))
        elif plan := PLAN.match(text):
            if self._output.isatty() and self._bar is None:
                done = self._resumed[0] * int(plan[2]) + self._resumed[1]
                self._open.close()
                made = bar(int(plan[1]) * int(plan[2]), "training", "steps", self._output, done)
                self._bar = self._open.enter_context(made)
                self._open.enter_context(regularly(made.refresh))
        elif text.startswith("first step done"):
            self.on_first_step()
            if self._bar is None:
                self._open.close()
                self._say = lambda line: print(line, file=self._output, flush=True)
        elif (step := EPOCH.match(text) or PROGRESS.match(text)) and self._bar is not None:
            self._bar.update(int(step[1]) - self._bar.n)
            if step.re is EPOCH:
                self._bar.set_postfix_str(f"val_accuracy={step[2]}")
