"""A stop that somebody asked for: SIGTERM from a spot interruption, `docker stop` or StopTrainingJob.

The handler only takes a note; the loop looks at it between steps, saves a checkpoint and leaves with exit code 143.
Before the first step there is nothing to save, but there may be minutes of compiling, which nothing else can end: then
the handler leaves at once. Standard library only: it must be there before torch is imported, which takes seconds.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

EXIT_CODE = 128 + signal.SIGTERM
MARK = "TRAINING_STOPPED_FILE"  # names the file by which ranks tell launch.py that they stopped and were not killed
_signals: list[int] = []
_steps_done: list[bool] = []


class Stopped(Exception):
    """Training was asked to stop and has saved its state."""


def listen() -> None:
    """From now on SIGTERM asks for a stop, or makes one when no step has been done."""

    def stop(number: int, _: object) -> None:
        _signals.append(number)
        if not _steps_done:
            os.write(1, b"stopped by SIGTERM before the first step; nothing is written\n")
            mark()
            os._exit(EXIT_CODE)

    signal.signal(signal.SIGTERM, stop)


def stepped() -> None:
    """There is something to save from now on."""
    _steps_done.append(True)


def mark() -> None:
    """Tell launch.py that this rank stopped and was not killed."""
    if os.environ.get(MARK):
        Path(os.environ[MARK]).touch()


def asked() -> bool:
    """Whether a stop was asked for."""
    return bool(_signals)
