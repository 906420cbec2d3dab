"""Find the images of a raw folder, and divide them into training, validation and test."""

from __future__ import annotations

import hashlib
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import imaging
from training.config import SMALL_IMAGE, TORCHVISION_SIZE

SPLITS = ("train", "validation", "test")
SHARES = {"train": 0.70, "validation": 0.15, "test": 0.15}
READY_MADE = {"train": "train", "training": "train", "val": "validation", "valid": "validation",
              "validation": "validation", "test": "test"}  # fmt: skip
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class PackingError(ValueError):
    """The folder cannot be packed; the message names the offender and the fix."""


@dataclass(frozen=True)
class Item:
    """One image file: its place in the input and the class and ready-made split that the place gives it."""

    path: str  # relative to the input, with forward slashes
    label: str
    split: str | None


def scan(folder: Path) -> list[Item]:
    """Find every image below `folder`, in a fixed order. Hidden files and other suffixes do not count.

    Raises:
        PackingError: when there is no folder, no class or no image.
    """
    if not folder.is_dir():
        raise PackingError(
            f"{folder} is no folder; DATA must name one that holds a sub-folder of images for each class"
        )
    top = _folders(folder)
    ready_made = {name: READY_MADE[name.lower()] for name in top if name.lower() in READY_MADE}
    if "train" not in ready_made.values() or len(ready_made) != len(top):
        ready_made = {}
    items = []
    for base, split in ready_made.items() or [(".", None)]:
        for label in _folders(folder / base):
            for root, directories, files in os.walk(folder / base / label):
                directories[:] = sorted(name for name in directories if not name.startswith("."))
                for name in sorted(files):
                    if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                        path = (Path(root) / name).relative_to(folder).as_posix()
                        items.append(Item(path, label, split))
    if not items:
        raise PackingError(
            f"{folder} holds no image in class folders; expected {folder}/<class>/<image> with {', '.join(SUFFIXES)}"
        )
    return items


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def assign(items: Sequence[Item], seed: int) -> dict[str, list[Item]]:
    """Split 70/15/15 within each class by the hash of (seed, path); at least one image of a class in train.

    Ready-made splits are kept; one that is missing is cut out of train. Rows of a split come in the order of their
    hash, so that classes are mixed.

    Raises:
        PackingError: when a class of a ready-made split has no training image.
    """
    ready_made = {item.split for item in items}
    rank = {item.path: hashlib.sha256(f"{seed}:{item.path}".encode()).digest() for item in items}
    members: dict[str, list[Item]] = {}
    for item in sorted(items, key=lambda item: rank[item.path]):
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
            else:
                keep = max(len(train) - round(SHARES[name] * total), 1)
                splits[name] += train[keep:]
                train = train[:keep]
        splits["train"] += train
    return {name: sorted(rows, key=lambda item: rank[item.path]) for name, rows in splits.items()}


def automatic_size(folder: Path, items: Sequence[Item]) -> int:
    """The median shorter side up to 64 pixels, else 224 (what torchvision's classifiers were made for)."""
    sides = []
    for item in items[:: max(1, len(items) // 500)]:
        try:
            with Image.open(folder / item.path, formats=imaging.FORMATS) as image:
                sides.append(min(image.size))
        except Exception:  # noqa: S112  unreadable files are reported when they are decoded
            continue
    median = round(statistics.median(sides)) if sides else TORCHVISION_SIZE
    return median if median <= SMALL_IMAGE else TORCHVISION_SIZE
