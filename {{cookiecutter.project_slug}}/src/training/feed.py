"""Bring the batches of a split to the device, so that it never waits for them.

On a CPU the batch is gathered in the training thread: a worker or a prefetching thread would only take its cores. On a
GPU a split that fits stays on the device as uint8; a larger one is copied, a few batches ahead, from pinned memory on a
stream of its own. What is said about GPUs here has not been run on one yet.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import imaging
from training.augment import Augmentation
from training.data import Split, send

AHEAD = 3  # batches that are copied before they are asked for
GATHERED = 100_000  # bytes: smaller batches are prepared together
RESIDENT_SHARE = 0.5  # of the device's free memory: what a split may take
Batch = tuple[torch.Tensor, torch.Tensor]
Rows = NDArray[np.int64]


class Feed:
    """The batches of a split on a device.

    Args:
        split: uint8 pixels and labels.
        device: where they go.
        mode: direct (gathered when asked for), resident (the whole split stays on the device) or stream (copied ahead);
            None: what suits the device and the size of the split.
    """

    def __init__(self, split: Split, device: torch.device, mode: str | None = None) -> None:
        self._split, self._device = split, device
        self.mode = mode or self._suitable()
        if self.mode == "resident":
            shards = [torch.from_numpy(np.array(shard)).to(device) for shard in split.images]
            self._images = torch.cat(shards)
            self._labels = torch.from_numpy(split.labels).to(device)

    def _suitable(self) -> str:
        if self._device.type != "cuda":
            return "direct"
        free, _ = torch.cuda.mem_get_info(self._device)
        size = sum(shard.nbytes for shard in self._split.images)
        return "resident" if size <= RESIDENT_SHARE * free else "stream"

    def batches(self, rows: Sequence[Rows], augmentation: Augmentation, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, augmented and normalised.

        Args:
            rows: of the split, an array a batch.
            augmentation: of the epoch.
            start: batches that a run did before it was resumed, and are left out.

        Returns:
            For each batch float32 (N, 3, size, size) in channels_last order and int64 (N,), on the device.
        """
        if self.mode == "direct":
            yield from self._gather(rows, augmentation, start)
            return
        rows = rows[start:]
        with contextlib.closing(self._stream(rows) if self.mode == "stream" else self._select(rows)) as batches:
            for chosen, (images, labels) in zip(rows, batches, strict=True):
                yield self._prepare(images, chosen, augmentation), labels

    def _prepare(self, images: torch.Tensor, rows: Rows, augmentation: Augmentation) -> torch.Tensor:
        return imaging.normalise(augmentation.apply(images, rows), self._split.info["mean"], self._split.info["std"])

    def _gather(self, rows: Sequence[Rows], augmentation: Augmentation, start: int) -> Iterator[Batch]:
        """Small batches several at a time: preparing some kilobytes costs hardly more than preparing none.

        The same ones are together whatever the start: a resumed run computes as one that was never stopped.
        """
        largest = max(map(len, rows)) * 3 * self._split.image_size**2
        together = max(GATHERED // largest, 1)
        for first in range(start - start % together, len(rows), together):
            some = rows[first : first + together]
            joined = np.concatenate(some)
            images, labels = self._split.batch(joined, self._device)
            images = self._prepare(images, joined, augmentation)
            sizes = [len(chosen) for chosen in some]
            batches = zip(images.split(sizes), labels.split(sizes), strict=True)
            yield from itertools.islice(batches, max(start - first, 0), None)

    def _select(self, rows: Sequence[Rows]) -> Generator[Batch]:
        for chosen in rows:
            index = self._send(torch.from_numpy(chosen))
            yield self._images.index_select(0, index), self._labels.index_select(0, index)

    def _send(self, values: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            values = values.pin_memory()
        return send(values, self._device)

    def _stream(self, rows: Sequence[Rows]) -> Generator[Batch]:
        """Gather and copy in a thread, on a side stream; hand over with an event, so that only the device waits."""
        ready: queue.Queue[Any] = queue.Queue(maxsize=AHEAD)
        given_up = threading.Event()
        gpu = self._device.type == "cuda"
        side = torch.cuda.Stream(self._device) if gpu else None

        def put(item: Any) -> None:
            while not given_up.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.1)
                    return

        def fill() -> None:
            try:
                for chosen in rows:
                    if given_up.is_set():
                        return
                    pixels = torch.from_numpy(self._split.pixels(chosen))
                    labels = torch.from_numpy(self._split.labels[chosen])
                    if side is None:
                        put((pixels, labels, None))
                        continue
                    with torch.cuda.stream(side):
                        batch = self._send(pixels), self._send(labels)
                        put((*batch, side.record_event()))
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=fill, daemon=True, name="feed")
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                images, labels, event = item
                if event is not None:
                    stream = torch.cuda.current_stream(self._device)
                    stream.wait_event(event)
                    images.record_stream(stream)
                    labels.record_stream(stream)
                yield images, labels
        finally:
            given_up.set()
            thread.join()
