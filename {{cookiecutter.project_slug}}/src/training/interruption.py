"""A stop that somebody asked for: SIGTERM from a spot interruption, `docker stop` or StopTrainingJob.

The handler only takes a note; the loop looks at it between steps, saves a checkpoint and leaves with exit code 143.
Standard library only: the note must be taken before torch is imported, which takes seconds.
"""

from __future__ import annotations

import signal

EXIT_CODE = 128 + signal.SIGTERM
MARK = "TRAINING_STOPPED_FILE"  # names the file by which ranks tell launch.py that they stopped and were not killed
_signals: list[int] = []


class Stopped(Exception):
    """Training was asked to stop and has saved its state."""


def listen() -> None:
    """From now on SIGTERM asks for a stop instead of ending the process."""
    signal.signal(signal.SIGTERM, lambda number, _: _signals.append(number))


def asked() -> bool:
    """Whether a stop was asked for."""
    return bool(_signals)
