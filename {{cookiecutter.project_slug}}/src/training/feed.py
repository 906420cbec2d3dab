"""Bring the batches of a split to the device, so that it never waits for them.

On a CPU the batch is gathered in the training thread: a worker or a prefetching thread would only take its cores. On a
GPU a split that fits stays on the device as uint8; a larger one is copied, a few batches ahead, from pinned memory on a
stream of its own: of several ranks each copies its own rows. What is said about GPUs here has not been run on one yet.
`mix` is for batches that are there.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

import imaging
from training import augment
from training.augment import Augmentation
from training.config import Hyperparameters
from training.data import Split, send

AHEAD = 3  # batches that are copied before they are asked for
GATHERED = 100_000  # bytes: smaller batches are prepared together
RESIDENT_SHARE = 0.5  # of the device's free memory: what the copies of a split on all GPUs of this host may take
STAGED = 1 << 26  # bytes of pinned memory that a split is copied to the device through
Batch = tuple[torch.Tensor, torch.Tensor]
Rows = NDArray[np.int64]


class Feed:
    """The batches of a split on a device.

    WORDS says each mode as the log does.

    Args:
        split: uint8 pixels and labels.
        device: where they go.
        mode: direct (gathered when asked for), resident (the whole split stays on the device) or stream (copied ahead);
            None: what suits the device and the size of the split.
        compiled: augment and normalise as one compiled function, where that can be.
    """

    WORDS: ClassVar = {"direct": "are read when a step needs them", "resident": "stay on the GPU",
                       "stream": "are copied to the GPU ahead of the steps"}  # fmt: skip

    def __init__(self, split: Split, device: torch.device, mode: str | None = None, compiled: bool = False) -> None:
        self._split, self._device = split, device
        self._finish = torch.compile(finish, dynamic=False) if compiled and device.type == "cuda" else None
        self.mode = mode or self._suitable()
        if self.mode == "resident":
            self._images = torch.empty((len(split), *split.images[0].shape[1:]), dtype=torch.uint8, device=device)
            self._labels, first = torch.from_numpy(split.labels).to(device), 0
            rows = max(STAGED // (3 * split.image_size**2), 1)
            for part in (shard[at : at + rows] for shard in split.images for at in range(0, len(shard), rows)):
                self._images[first : first + len(part)] = self._send(torch.from_numpy(np.array(part)))
                first += len(part)

    def _suitable(self) -> str:
        if self._device.type != "cuda":
            return "direct"
        free, _ = torch.cuda.mem_get_info(self._device)
        size = sum(shard.nbytes for shard in self._split.images) * int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        return "resident" if size <= RESIDENT_SHARE * free else "stream"

    def batches(
        self, rows: Sequence[Rows], augmentation: Augmentation | None = None, start: int = 0
    ) -> Iterator[Batch]:
        """The batches of an epoch, augmented and normalised.

        Args:
            rows: of the split, an array a batch; a row that comes again in an epoch is larger by the split's length.
            augmentation: of the epoch, if it has one.
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

    def _prepare(self, images: torch.Tensor, rows: Rows, augmentation: Augmentation | None) -> torch.Tensor:
        choices = (rows + rows // len(self._split)) % len(self._split)  # a row that comes again takes its neighbour's
        mean, std = self._split.info["mean"], self._split.info["std"]
        if self._finish and augmentation and not len(augmentation.operations):  # those need different code each time
            given = chosen(augmentation, choices)
            sent = {name: self._send(torch.from_numpy(values)) for name, values in given.items()}
            finished: torch.Tensor = self._finish(images, sent, mean, std)
            return finished
        return imaging.normalise(augmentation.apply(images, choices) if augmentation else images, mean, std)

    def _gather(self, rows: Sequence[Rows], augmentation: Augmentation | None, start: int) -> Iterator[Batch]:
        """Small batches several at a time: preparing some kilobytes costs hardly more than preparing none.

        The same ones are together whatever the start: a resumed run computes as one that was never stopped.
        """
        largest = max(map(len, rows)) * 3 * self._split.image_size**2
        together = max(GATHERED // largest, 1)
        for first in range(start - start % together, len(rows), together):
            some = rows[first : first + together]
            joined = np.concatenate(some)
            images, labels = self._split.batch(joined % len(self._split), self._device)
            images = self._prepare(images, joined, augmentation)
            sizes = [len(chosen) for chosen in some]
            batches = zip(images.split(sizes), labels.split(sizes), strict=True)
            yield from itertools.islice(batches, max(start - first, 0), None)

    def _select(self, rows: Sequence[Rows]) -> Generator[Batch]:
        for chosen in rows:
            index = self._send(torch.from_numpy(chosen % len(self._split)))
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
                if gpu:  # or the first copy of this thread would take memory of GPU 0 for its own context there
                    torch.cuda.set_device(self._device)
                for chosen in rows:
                    if given_up.is_set():
                        return
                    pixels = torch.from_numpy(self._split.pixels(chosen % len(self._split)))
                    labels = torch.from_numpy(self._split.labels[chosen % len(self._split)])
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


def chosen(augmentation: Augmentation, rows: Rows) -> dict[str, NDArray[Any]]:
    """What `finish` needs of the choices for some rows."""
    given = {name: values[rows] for name, values in vars(augmentation).items() if len(values)}
    if "shifts" in given:
        given["shifts"] = augment.motion(*-given["shifts"].T)
    if "turns" in given:
        given["turns"] = augment.motion(turn=given["turns"])
    return given


def finish(images: torch.Tensor, given: dict[str, Any], mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Augment as `Augmentation.apply` does on a GPU, and normalise: nothing but tensors, for torch's compiler."""
    if "flips" in given:
        images = torch.where(given["flips"][:, None, None, None], images.flip(2), images)
    if "shifts" in given:
        images = augment.warp(images, given["shifts"])
    if "crops" in given:
        images = augment.crop_by_gather(images, given["crops"])
    if "turns" in given:
        images = augment.warp(images, given["turns"])
    if "colours" in given:
        images = augment.change_colours(images, given["colours"])
    if "holes" in given:
        images = augment.erase_by_mask(images, given["holes"], given["fills"])
    return imaging.normalise(images, mean, std)


def mix(
    images: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    hyperparameters: Hyperparameters,
    epoch: int,
    step: int,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each image of a normalised batch with the one before it, all of them by the same share.

    Mixup (Zhang et al. 2018, "mixup: beyond empirical risk minimization") blends the two, CutMix (Yun et al. 2019)
    pastes a rectangle of the image's proportions, here always a whole one; with both on, each step picks one.

    Args:
        images: float (N, 3, height, width), in random order; may be overwritten.
        labels: int64 (N,).
        classes: number of classes.
        hyperparameters: `mixup`, `cutmix` (alpha of a symmetric Beta distribution, 0 = off) and `seed`.
        epoch, step, rank: with the seed they fix all choices.

    Returns:
        The images, and as targets the shares of the classes, float32 (N, classes), in every image; both arguments as
        they came when both are off.
    """
    if not hyperparameters.mixup and not hyperparameters.cutmix:
        return images, labels
    random = np.random.default_rng([hyperparameters.seed, epoch, 5, step, rank])
    cut = random.random() < 0.5 if hyperparameters.mixup and hyperparameters.cutmix else bool(hyperparameters.cutmix)
    alpha = hyperparameters.cutmix if cut else hyperparameters.mixup
    other = float(random.beta(alpha, alpha))  # share of the image before
    if cut:
        size = np.array(images.shape[2:])
        extent = np.rint(size * math.sqrt(other)).astype(np.int64)
        top, left = random.integers(0, size - extent, endpoint=True).tolist()
        height, width = extent.tolist()
        patch = images[:, :, top : top + height, left : left + width]
        patch.copy_(_before(patch))
        other = height * width / math.prod(images.shape[2:])
    else:
        images = images.lerp(_before(images), other)
    targets = (labels[:, None] == torch.arange(classes, device=labels.device)).float()
    return images, targets.lerp(_before(targets), other)


def _before(batch: torch.Tensor) -> torch.Tensor:
    """For each sample the one before it, for the first one the last; in the same memory order."""
    return torch.cat([batch[-1:], batch[:-1]])
