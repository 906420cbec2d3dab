"""Decode images, see which of them show the same, and divide them into training, validation and test."""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import imaging
from bounds import ImageError, opened
from processing.scan import SPLITS, Item, PackingError
from training.config import SMALL_IMAGE, TORCHVISION_SIZE

SHARES = {"train": 0.70, "validation": 0.15, "test": 0.15}
HEADER_WITHIN = 64 * 2**20  # bytes of a file
BYTES_PER_PIXEL = 8  # of the largest file that is looked at: four channels of 16 bits, not compressed
GROUPS, SHOWN, FEW = 50, 8, 5  # of equal pictures that dataset.json names, how many of each, and of each class


class Look(NamedTuple):
    """What decoding shows of a picture: hash of its pixels, size, and the least and largest value of one of 16 bits."""

    pixels: bytes
    width: int
    height: int
    deep: tuple[int, int] | None


@dataclass
class Decoder:
    """One way through the pictures; `looks` and `unreadable` hold what it shows, `before` what one before packed."""

    folder: Path
    size: int
    megapixels: float
    shard_bytes: int
    pool: ThreadPoolExecutor
    deep: tuple[int, int]
    looks: dict[str, Look]
    unreadable: list[str]
    before: Mapping[str, tuple[Path, int]]

    def shards(
        self, items: Sequence[Item], tick: Callable[[int], object]
    ) -> Iterator[tuple[NDArray[np.uint8], list[Item]]]:
        """Decode a split shard by shard; rows of unreadable files are left out."""
        step = max(1, self.shard_bytes // (self.size * self.size * 3))
        for first in range(0, len(items), step):
            chunk = items[first : first + step]
            images = np.empty((len(chunk), self.size, self.size, 3), dtype=np.uint8)
            readable = []
            for index, found in enumerate(self.pool.map(self._load, images, chunk)):
                if isinstance(found, str):
                    self.unreadable.append(f"unreadable: {chunk[index].path}: {found}")
                else:
                    self.looks[chunk[index].path] = found
                    readable.append(index)
                tick(1)
            if readable:
                kept = images if len(readable) == len(chunk) else images[readable]
                yield kept, [chunk[index] for index in readable]

    def _load(self, target: NDArray[np.uint8], item: Item) -> Look | str:
        if place := self.before.get(item.path):
            target[:] = np.load(place[0], mmap_mode="r")[place[1]]
            return self.looks[item.path]
        path, pixels = self.folder / item.path, round(self.megapixels * 1e6)
        try:
            size_in_bytes = path.stat().st_size
            if size_in_bytes > BYTES_PER_PIXEL * pixels:
                return f"{size_in_bytes:,} bytes, more than an image of {self.megapixels} megapixels has"
            image = imaging.decode(path.read_bytes(), pixels)
            target[:] = imaging.fit(image, self.size, self.deep)
            inner = image[(image > 0) & (image < imaging.DEEP[1])] if image.dtype == np.uint16 else image[:0]
            deep = (int(inner.min()), int(inner.max())) if inner.size else None  # the ends are often no measurement
            return Look(hashlib.sha256(target.data).digest(), image.shape[1], image.shape[0], deep)
        except (ImageError, OSError) as error:
            return str(error.strerror if isinstance(error, OSError) else error)


def assign(items: Sequence[Item], seed: int, copies: Mapping[str, str] | None = None) -> dict[str, list[Item]]:
    """Split 70/15/15 within each class by the hash of (seed, path): at least one image of a class for training.

    From three images on, each split has at least one. Ready-made splits are kept; one that is missing is cut out of
    train. Rows of a split come in the order of their hash, so that classes are mixed. Copies of a picture go where the
    picture goes.

    Args:
        items: the images.
        seed: of the hash.
        copies: the path of each copy, and that of the picture that it is one of.

    Raises:
        PackingError: when a class has no training image, or nothing is left for validation.
    """
    ready_made = {item.split for item in items}
    rank = {item.path: _rank(seed, item.path) for item in items}
    members: dict[str, list[Item]] = {}
    for item in sorted(items, key=lambda item: rank[item.path]):
        if item.path not in (copies or {}):
            members.setdefault(item.label, []).append(item)
    splits: dict[str, list[Item]] = {name: [] for name in SPLITS}
    for label, own in sorted(members.items()):
        train = [item for item in own if item.split in (None, "train")]
        if not train:
            raise PackingError(f"class {label!r} has images for validation or test, but none in the training folder")
        total = len(train)
        for name in ("test", "validation"):
            if name in ready_made:
                splits[name] += [item for item in own if item.split == name]
            elif total > 2:
                keep = len(train) - max(round(SHARES[name] * total), 1)
                splits[name] += train[keep:]
                train = train[:keep]
        splits["train"] += train
    if copies:
        place = {item.path: name for name, rows in splits.items() for item in rows}
        for item in items:
            if item.path in copies:
                splits[place[copies[item.path]]].append(item)
    for name in SPLITS:
        if not splits[name] and name in ready_made | {"validation"}:
            fix = ("its pictures are copies of others or in several classes" if copies else
                   "give at least one class three images, or add a val folder")  # fmt: skip
            raise PackingError(f"no image is left for {name}: {fix}")
    return {name: sorted(rows, key=lambda item: rank[item.path]) for name, rows in splits.items()}


def _rank(seed: int, path: str) -> bytes:
    return hashlib.sha256(f"{seed}:{path}".encode("utf-8", "surrogateescape")).digest()


def deep_range(looks: Iterable[Look]) -> tuple[int, int]:
    """What becomes black and white of 16-bit pictures: the bits that they use, or less where they use a small part."""
    used = [look.deep for look in looks if look.deep] or [imaging.DEEP]
    low, high = min(least for least, _ in used), max(most for _, most in used)
    whole = max(1 << high.bit_length(), 256) - 1
    return (low, high) if high > 255 and 4 * (high - low) < whole else (0, whole)


def equal(items: Sequence[Item], looks: Mapping[str, Look]) -> list[list[Item]]:
    """Groups of items that show the same picture. The first one says where the others go: training comes first."""
    groups: dict[Look, list[Item]] = {}
    for item in items:
        if item.path in looks:
            groups.setdefault(looks[item.path], []).append(item)
    return [sorted(group, key=lambda item: (SPLITS.index(item.split or "train"), item.path))
            for group in groups.values() if len(group) > 1]  # fmt: skip


def contradicting(group: Sequence[Item]) -> bool:
    """Whether equal pictures are in several classes."""
    return len({item.label for item in group}) > 1


def survey(
    items: Sequence[Item], looks: Mapping[str, Look], groups: Sequence[Sequence[Item]], rows: Mapping[str, list[str]]
) -> dict[str, Any]:
    """What `make data` says: of each class, the largest first, images by split, sizes, copies, left out; and copies."""
    split = {path: name for name, paths in rows.items() for path in paths}
    copies = {item.path for group in groups for item in group[1:]} & split.keys()
    table, few = [], {}
    for label, members in itertools.groupby(sorted(items, key=lambda item: item.label), key=lambda item: item.label):
        own = [*members]
        train = [item.path for item in own if split.get(item.path) == "train"]
        few[label] = train[:: -(-len(train) // FEW) or 1]
        counts = Counter(split.get(item.path, "left out") for item in own)
        seen = sorted({looks[item.path][1:3] for item in own if item.path in looks}, key=math.prod)
        sizes = " to ".join(dict.fromkeys(f"{width}x{height}" for width, height in (*seen[:1], *seen[-1:])))
        table.append([label, *(counts[name] for name in SPLITS), sizes, sum(item.path in copies for item in own),
                      counts["left out"]])  # fmt: skip
    shown = [(contradicting(group), [item.path for item in group[:SHOWN]]) for group in groups]
    return {"table": sorted(table, key=lambda row: -sum(row[1:4])), "few": few,
            "copies": [paths for several, paths in shown if not several][:GROUPS],
            "contradicting": [paths for several, paths in shown if several][:GROUPS]}  # fmt: skip


def automatic_size(folder: Path, items: Sequence[Item]) -> int:
    """The median shorter side up to 64 pixels, else 224 (what torchvision's classifiers were made for)."""
    sides = []
    for item in items[:: max(1, len(items) // 500)]:
        try:
            with (folder / item.path).open("rb") as file, opened(file.read(HEADER_WITHIN)) as image:
                sides.append(min(image.size))
        except Exception:  # noqa: S112  unreadable files are reported when they are decoded
            continue
    median = round(statistics.median(sides)) if sides else TORCHVISION_SIZE
    return median if median <= SMALL_IMAGE else TORCHVISION_SIZE
