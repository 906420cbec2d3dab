"""TensorBoard event files of a run, where TensorBoard is installed: add it to the group `container` in pyproject.toml.

    tensorboard --logdir artifacts      # all runs, one above the other

`train.py` adds a point a metric after every epoch, outside the steps. Whatever goes wrong here costs a line in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILES = "events.out.tfevents.*"
logger = logging.getLogger("training")


class Board:
    """Event files, begun anew by the first call: a run that is resumed tells all of its epochs again.

    Args:
        folders: each gets a file; several where a service takes it from one place and the run's files lie in another.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders, self._written = folders, 0
        self._writers: list[Any] | None = None

    def add(self, history: Sequence[dict[str, Any]]) -> None:
        """Write the epochs that are new in `history`."""
        try:
            if self._writers is None:
                self._writers = self._open()
            for writer in self._writers:
                for epoch in history[self._written :]:
                    for name in sorted(epoch.keys() - {"epoch", "step"}):
                        writer.add_scalar(name, epoch[name], epoch["epoch"])
                writer.flush()
            self._written = len(history)
        except Exception as error:  # of another package, after an epoch that has been trained
            self._writers = []
            logger.info("warning: no more TensorBoard events, %s", error)

    def _open(self) -> list[Any]:
        """A writer a folder; none where TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return []
        for old in (file for folder in self._folders for file in folder.glob(FILES)):
            old.unlink()
        return [SummaryWriter(str(folder)) for folder in self._folders]
