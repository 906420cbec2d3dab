"""What a local training job is given and leaves, in a container as in a process; signals as exceptions."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import SOURCE
from progress import plain

LAUNCHER = "training/launch.py"  # starts the training script and passes signals on, which SDK V3's drivers do not
MASTER_PORT = 7777
GRACE = 120  # seconds between SIGTERM and SIGKILL, as for a training job that SageMaker stops


class JobFailed(Exception):
    """The training script or its container failed; the message gives the script's own reason when there is one."""


class Interrupted(Exception):
    """A signal asked the verb to stop; a plain exception, which the SDK passes on."""


@dataclass(frozen=True)
class Job:
    """One training job.

    Attributes:
        name: of the run.
        root: a fresh folder with a unique base name, for everything that the job writes.
        hyperparameters: by name.
        channels: input folders by channel name.
        instances: hosts that train together.
        environment: variables for the script.
        source: the source root.
    """

    name: str
    root: Path
    hyperparameters: dict[str, Any]
    channels: dict[str, Path]
    instances: int
    environment: dict[str, str]
    source: Path = SOURCE


@dataclass(frozen=True)
class Outputs:
    """Where a finished job left the content of SM_MODEL_DIR and SM_OUTPUT_DATA_DIR."""

    model: Path
    data: Path


def threads(instances: int) -> dict[str, str]:
    """Hosts that share this machine share its cores; each would otherwise start a thread for every core."""
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // instances))} if instances > 1 else {}


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a plain exception: `ModelTrainer.train` swallows KeyboardInterrupt."""

    def interrupt(number: int, _frame: object) -> None:
        for other in previous:  # once is enough: what follows is the clean-up
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(signal.Signals(number).name)

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def failure_reason(root: Path, fallback: str) -> str:
    """Why training failed: the last line that the script wrote to SM_OUTPUT_FAILURE, else the fallback.

    Of several hosts the one that failed first counts; the others only lost their connection to it. Where the SDK has
    removed their folders, `artifacts/` holds what they left.
    """
    for file in sorted(root.glob("a*/output/failure"), key=lambda path: path.stat().st_mtime_ns):
        lines = [line for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        if lines and "CalledProcessError" not in lines[-1] and "CloudWatch" not in lines[0]:  # the driver's own words
            return f"training failed: {plain(lines[-1].strip().removeprefix('error: '))}"
    return f"training failed: {plain(fallback)}"
