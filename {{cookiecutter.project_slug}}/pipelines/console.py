"""What the verbs share at the terminal: errors as one sentence, logging, and a live view of a training log."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
CONTAINER = re.compile(r"^(?:\S*?[-_])?(algo-\d+)(?:[-_]\d+)?\s*\| ?")  # compose v1: `algo-1_1  | `, v2: `algo-1  | `
PLAN = re.compile(r"^training for (\d+) epochs of (\d+) steps")
EPOCH = re.compile(r"^epoch=\d+ step=(\d+) .*val_accuracy=([0-9.eE+-]+)")
PROGRESS = re.compile(r"^progress epoch \d+/\d+ step (\d+)/\d+")
DRIVER = ("++ ", "+++ ", "Executing command:", "Training Container Execution Completed",
          "An error occurred with exit code", "Command failed with exit code")  # fmt: skip


class UserError(Exception):
    """Something that the user can mend: one sentence with what is wrong, the value seen and the fix.

    Attributes:
        code: the exit code of the verb.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def run_verb(main: Callable[[], int]) -> NoReturn:
    """Run a verb and exit with its code; a `UserError` is printed as one sentence."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        print(f"error: {error.filename or 'a file'} cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def parser(description: str, settings: bool = False) -> argparse.ArgumentParser:
    """A parser for a verb, with the option `--set` when the verb reads the settings."""
    made = argparse.ArgumentParser(description=description, allow_abbrev=False)
    if settings:
        made.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting")
    return made


def log_to(path: Path) -> None:
    """Send the SDK's messages, which it hides by default, to a file."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("botocore").setLevel(logging.WARNING)


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
        self.last_line = ""
        self._output = output or sys.stdout
        self._log = log.open("a", encoding="utf-8")
        self._containers = containers
        self._verbose = verbose
        self._rest = ""
        self._started: set[str] = set()  # hosts whose driver has started the script
        self._bar: tqdm[Any] | None = None
        self._lock = threading.Lock()

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
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        with contextlib.suppress(OSError):
            self._log.close()

    def _take(self, line: str) -> None:
        line = ESCAPES.sub("", line).rstrip("\r")
        with contextlib.suppress(OSError):  # a full disk costs the log, and must not block the one who writes it
            self._log.write(line + "\n")
            self._log.flush()
        host = CONTAINER.match(line) if self._containers else None
        text = line[host.end() :] if host else line
        if text.strip():
            self.last_line = text.strip()
        if self._verbose:
            self._show(line)
        elif not self._containers or (host is None and text.lower().startswith("error")):
            self._show(text)
        elif host and text.startswith("Executing command:"):
            self._started.add(host[1])
        elif host and host[1] in self._started and not text.startswith(DRIVER):
            self._show(text if host[1] == "algo-1" else f"{host[1]}: {text}")
        self._advance(text)

    def _show(self, text: str) -> None:
        if self._bar is None:
            print(text, file=self._output, flush=True)
        elif not PROGRESS.match(text):
            self._bar.write(text, file=self._output)

    def _advance(self, text: str) -> None:
        if plan := PLAN.match(text):
            if self._output.isatty() and self._bar is None:
                steps, columns = int(plan[1]) * int(plan[2]), shutil.get_terminal_size().columns
                self._bar = tqdm(total=steps, unit="step", desc="training", file=self._output, ncols=min(columns, 120))
        elif text.startswith("first step done"):
            self.on_first_step()
        elif (step := EPOCH.match(text) or PROGRESS.match(text)) and self._bar is not None:
            self._bar.update(int(step[1]) - self._bar.n)
            if step.re is EPOCH:
                self._bar.set_postfix_str(f"val_accuracy={step[2]}")
