"""Read a packed data set: memory-mapped uint8 shards, gathered into batches without a worker or a decoder.

`src/processing/preprocess.py` writes the format: one folder a split, each with the same `dataset.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

SCHEMA_VERSION = 1
BLOCKS = 64  # that a shuffle window is made of


class DataError(ValueError):
    """A data set is missing, damaged or too small; the message names the folder and the fix."""


@dataclass(frozen=True)
class Split:
    """One split of a packed data set.

    Attributes:
        images: memory-mapped uint8 arrays (rows, size, size, 3), one a shard.
        labels: int64, (rows of all shards,).
        info: the content of `dataset.json`.
    """

    images: list[NDArray[np.uint8]]
    labels: NDArray[np.int64]
    info: dict[str, Any]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> list[str]:
        """Class names; a label is a position in this list."""
        return list(self.info["classes"])

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return int(self.info["size"])

    def pixels(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Copy rows, in the order given, to a uint8 array (len(rows), size, size, 3)."""
        if len(self.images) == 1:
            return self.images[0][rows]
        starts = np.cumsum([0, *(len(shard) for shard in self.images)])
        shards = np.searchsorted(starts, rows, side="right") - 1
        out = np.empty((len(rows), *self.images[0].shape[1:]), dtype=np.uint8)
        for shard in np.unique(shards):
            chosen = shards == shard
            out[chosen] = self.images[shard][rows[chosen] - starts[shard]]
        return out

    def batch(self, rows: NDArray[np.int64], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows as tensors on `device`: uint8 (N, size, size, 3) and int64 (N,)."""
        return send(torch.from_numpy(self.pixels(rows)), device), send(torch.from_numpy(self.labels[rows]), device)


def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To a device, without waiting where that is safe: copies to Apple's GPUs may read memory that is free again."""
    return values.to(device, non_blocking=device.type == "cuda")


def load_split(folder: Path) -> Split:
    """Open one split folder without reading its pixels.

    Raises:
        DataError: when files are missing or do not fit together.
    """
    try:
        info = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        if info["schema_version"] != SCHEMA_VERSION:
            raise DataError(
                f"{folder} has data-set schema version {info['schema_version']}, this code reads "
                f"{SCHEMA_VERSION}; pack the data again (`make data`)"
            )
        images = [np.load(path, mmap_mode="r").view(np.ndarray) for path in sorted(folder.glob("images-*.npy"))]
        labels = [np.load(path) for path in sorted(folder.glob("labels-*.npy"))]
        size, classes = info["size"], len(info["classes"])
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder} is no packed data set ({error}); make one with `make data`") from error
    joined = np.concatenate(labels) if labels else np.empty(0, dtype=np.int64)
    shapes = {shard.shape[1:] for shard in images} | {(size, size, 3)}
    if [len(shard) for shard in images] != [len(part) for part in labels] or len(shapes) > 1:
        raise DataError(f"the shards in {folder} do not fit together; pack the data again (`make data`)")
    if len(joined) and not 0 <= joined.min() <= joined.max() < classes:
        raise DataError(f"{folder} has labels outside its {classes} classes; pack the data again (`make data`)")
    return Split(images=images, labels=joined, info=info)


def load_channels(train: Path, validation: Path) -> tuple[Split, Split]:
    """Open the two channels of a training job and check that they belong together.

    Raises:
        DataError: when one is missing or empty, or when they come from different data sets.
    """
    splits = load_split(train), load_split(validation)
    if splits[0].info["fingerprint"] != splits[1].info["fingerprint"]:
        raise DataError(f"{train} and {validation} are splits of different data sets; pack them together")
    for folder, split in zip((train, validation), splits, strict=True):
        if not len(split):
            raise DataError(f"{folder} holds no image; add images to the data set and pack it again")
    if len(splits[0].classes) < 2:
        raise DataError(f"the data set has one class, {splits[0].classes[0]!r}; a classifier needs two or more")
    return splits


def epoch_order(images: int, seed: int, epoch: int, window: int | None = None) -> NDArray[np.int64]:
    """The order in which an epoch visits `images` rows: a pure function, equal on every rank and after a resume.

    Args:
        images: rows of the split.
        seed, epoch: of the shuffle.
        window: rows that memory has room for, when that is not all of them: blocks of neighbouring rows are shuffled,
            and rows within each window of some blocks, so that a window is read from a few places of the disk.
    """
    random = np.random.default_rng([seed, epoch, 0])
    if window is None or window >= images:
        return random.permutation(images)
    block = max(window // BLOCKS, 1)
    starts = random.permutation(np.arange(0, images, block))
    order = np.concatenate([np.arange(start, min(start + block, images)) for start in starts])
    for first in range(0, images, window):
        random.shuffle(order[first : first + window])
    return order


def balanced_order(labels: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """An epoch with as many images of each class as of any other, and as long as one that visits each row once.

    Of a large class it visits some rows, others in each epoch; a row of a small one comes again as row + len(labels),
    row + 2 * len(labels) and so on: the same image, augmented in another way.
    """
    random = np.random.default_rng([seed, epoch, 6])
    counts = np.bincount(labels)
    rows = [own for own in np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1]) if len(own)]
    quotas = (len(labels) + random.permutation(len(rows))) // len(rows)  # the odd ones go to other classes each time
    visits = [np.arange(quota) for quota in quotas]
    chosen = [random.permutation(own)[visit % len(own)] + visit // len(own) * len(labels)
              for own, visit in zip(rows, visits, strict=True)]  # fmt: skip
    return random.permutation(np.concatenate(chosen))


def class_weights(labels: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """What an image of each class counts, so that all classes count alike and the average image counts 1."""
    counts = np.bincount(labels, minlength=classes)
    share = len(labels) / np.count_nonzero(counts)
    return np.divide(share, counts, out=np.zeros(classes), where=counts > 0).astype(np.float32)


def window_rows(split: Split, gigabytes: float) -> int:
    """Rows of a shuffle window of that size."""
    return max(int(gigabytes * 1e9) // (3 * split.image_size**2), 1)
