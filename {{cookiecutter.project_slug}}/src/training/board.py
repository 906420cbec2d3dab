"""TensorBoard event files of a run, without TensorBoard: the format is a few lines, so no image has to hold it.

    tensorboard --logdir artifacts      # on any machine that has it: all runs, one above the other

`train.py` adds a point a metric after every epoch. A file that cannot be written costs a line in the log, no more.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAME = "events.out.tfevents.0.main"  # the same when a run is resumed elsewhere: the whole file replaces the half one
logger = logging.getLogger("training")


class Board:
    """Event files, written anew by the first call and appended to by the others.

    Args:
        folders: each gets a file; several where a service takes it from one place and the run's files lie in another.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders, self._written = folders, 0

    def add(self, history: Sequence[dict[str, Any]]) -> None:
        """Write the epochs that are new in `history`."""
        now = struct.pack("<Bd", 0x09, time.time())
        events = [] if self._written else [now + _bytes(0x1A, b"brain.Event:2")]
        for epoch in history[self._written :]:
            values = [
                _bytes(0x0A, _bytes(0x0A, name.encode()) + struct.pack("<Bf", 0x15, value))
                for name, value in epoch.items()
                if name not in ("epoch", "step")
            ]
            events.append(now + b"\x10" + _varint(epoch["epoch"]) + _bytes(0x2A, b"".join(values)))
        try:
            for folder in self._folders:
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / NAME).open("ab" if self._written else "wb") as file:
                    file.write(b"".join(map(_record, events)))
        except OSError as error:
            self._folders = []
            logger.info("warning: no more TensorBoard events, %s", error)
        self._written = len(history)


def _varint(number: int) -> bytes:
    """A number as protocol buffers have it: seven bits a byte, the lowest first."""
    more = number >> 7
    return bytes([number & 0x7F | 0x80]) + _varint(more) if more else bytes([number])


def _bytes(key: int, content: bytes) -> bytes:
    """A field of a protocol buffer that has a length: its key (number and kind), its length, its content."""
    return bytes([key]) + _varint(len(content)) + content


def _record(data: bytes) -> bytes:
    """A record of a TFRecord file: length, checksum, data, checksum."""
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    """CRC-32C, rotated and shifted as TFRecord wants it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
