"""Find the images of a raw folder, and divide them into training, validation and test."""

from __future__ import annotations

import hashlib
import os
import statistics
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import imaging
from progress import plain
from training.config import SMALL_IMAGE, TORCHVISION_SIZE

SPLITS = ("train", "validation", "test")
SHARES = {"train": 0.70, "validation": 0.15, "test": 0.15}
READY_MADE = {"train": "train", "training": "train", "val": "validation", "valid": "validation",
              "validation": "validation", "test": "test"}  # fmt: skip
HEADER_WITHIN = 64 * 2**20  # bytes of a file
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


LEAVES = "a link that leads out of the folder"


class PackingError(ValueError):
    """The folder cannot be packed; the message names the offender and the fix."""


@dataclass(frozen=True)
class Item:
    """One image file: its place in the input and the class and ready-made split that the place gives it."""

    path: str  # relative to the input, with forward slashes
    label: str
    split: str | None


def scan(folder: Path) -> tuple[list[Item], list[str]]:
    """Find every image below `folder`, in a fixed order. Hidden files do not count; links inside it are followed.

    Returns:
        The images, and a line for every other file: its path and why it was left out.

    Raises:
        PackingError: when there is no folder, no image, a class without one, or fewer than two classes.
    """
    if not folder.is_dir():
        raise PackingError(
            f"{folder} is no folder; DATA must name one that holds a sub-folder of images for each class"
        )
    home = folder.resolve()
    top, *_ = _entries(folder, home)
    ready_made = {name: READY_MADE[name.lower()] for name in top if name.lower() in READY_MADE}
    if "train" not in ready_made.values() or len(ready_made) != len(top):
        ready_made = {}
    items: list[Item] = []
    left_out: list[str] = []
    empty: list[str] = []
    for base, split in ready_made.items() or [("", None)]:
        labels, files, others, leaving = _entries(folder / base, home)
        left_out += [f"{_join(base, name)}: {LEAVES}" for name in leaving]
        left_out += [f"{_join(base, name)}: lies outside of the class folders" for name in files + others]
        for name in labels:
            found = list(images(folder, _join(base, name), left_out))
            items += [Item(path, _label(name), split) for path in found]
            if not found and split in (None, "train"):
                empty.append(_join(base, name))
    wanted = f"expected {folder}/<class>/<image>, with {' '.join(SUFFIXES)}"
    if not items:
        raise PackingError(f"{folder} holds no image in class folders; {wanted}{_first(left_out)}")
    if empty:
        raise PackingError(f"class folder {empty[0]!r} holds no image; add some, or remove it{_first(left_out)}")
    classes = {item.label for item in items}
    if len(classes) < 2:
        raise PackingError(f"{folder} holds one class, {classes.pop()!r}; a classifier needs two or more; {wanted}")
    return items, left_out


def _entries(folder: Path, home: Path) -> tuple[list[str], list[str], list[str], list[str]]:
    """Names of a folder's folders, files (dangling links too), other things, and links that lead out of `home`.

    They are sorted, without hidden ones.
    """
    listed: tuple[list[str], list[str], list[str], list[str]] = ([], [], [], [])
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    listed[_kind(entry, home)].append(entry.name)
    except OSError as error:
        raise PackingError(f"{folder} cannot be listed: {error.strerror}") from error
    for names in listed:
        names.sort()
    return listed


def _kind(entry: os.DirEntry[str], home: Path) -> int:
    try:
        if entry.is_symlink() and leaves(Path(entry.path), home):
            return 3
        if entry.is_dir():
            return 0
        return 1 if entry.is_file() or not Path(entry.path).exists() else 2
    except OSError:  # a link to itself
        return 1


def leaves(link: Path, home: Path) -> bool:
    """Whether a link leads out of a folder, whose own path holds none: what it leads to was not meant to be shared."""
    try:
        return not link.resolve().is_relative_to(home)
    except (OSError, RuntimeError):  # a link to itself
        return False


def images(root: Path, start: str, left_out: list[str]) -> Iterator[str]:
    """Paths of the images below a class folder. A folder that links lead to twice, or into itself, counts once."""
    waiting, seen, home = [start], set(), root.resolve()
    while waiting:
        place = waiting.pop()
        facts = (root / place).stat()
        if (facts.st_dev, facts.st_ino) in seen:
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders, files, others, leaving = _entries(root / place, home)
        left_out += [f"{_join(place, name)}: {LEAVES}" for name in leaving]
        waiting += [_join(place, name) for name in reversed(folders)]
        left_out += [f"{_join(place, name)}: not a regular file" for name in others]
        for name in files:
            if name.lower().endswith(SUFFIXES):
                yield _join(place, name)
            else:
                left_out.append(f"{_join(place, name)}: not one of {' '.join(SUFFIXES)}")


def _join(base: str, name: str) -> str:
    return f"{base}/{name}" if base else name


def _first(left_out: list[str]) -> str:
    return f" (left out: {left_out[0]!r}{' and more' if len(left_out) > 1 else ''})" if left_out else ""


def _label(name: str) -> str:
    """The class name: composed Unicode, so that macOS and Linux agree on it."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PackingError(f"class folder {name!r} has a name that is not valid UTF-8; rename it") from error
    if plain(name) != name:
        raise PackingError(f"class folder {name!r} has characters in its name that nobody sees or that change how text "
                           "runs; rename it")  # fmt: skip
    return unicodedata.normalize("NFC", name)


def assign(items: Sequence[Item], seed: int) -> dict[str, list[Item]]:
    """Split 70/15/15 within each class by the hash of (seed, path): at least one image of a class for training.

    From three images on, each split has at least one. Ready-made splits are kept; one that is missing is cut out of
    train. Rows of a split come in the order of their hash, so that classes are mixed.

    Raises:
        PackingError: when a class has no training image, or nothing is left for validation.
    """
    ready_made = {item.split for item in items}
    rank = {item.path: _rank(seed, item.path) for item in items}
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
            elif total > 2:
                keep = len(train) - max(round(SHARES[name] * total), 1)
                splits[name] += train[keep:]
                train = train[:keep]
        splits["train"] += train
    if not splits["validation"]:
        raise PackingError("no image is left for validation: give at least one class three images, or add a val folder")
    return {name: sorted(rows, key=lambda item: rank[item.path]) for name, rows in splits.items()}


def _rank(seed: int, path: str) -> bytes:
    return hashlib.sha256(f"{seed}:{path}".encode("utf-8", "surrogateescape")).digest()


def automatic_size(folder: Path, items: Sequence[Item]) -> int:
    """The median shorter side up to 64 pixels, else 224 (what torchvision's classifiers were made for)."""
    sides = []
    for item in items[:: max(1, len(items) // 500)]:
        try:
            with (folder / item.path).open("rb") as file, imaging.opened(file.read(HEADER_WITHIN)) as image:
                sides.append(min(image.size))
        except Exception:  # noqa: S112  unreadable files are reported when they are decoded
            continue
    median = round(statistics.median(sides)) if sides else TORCHVISION_SIZE
    return median if median <= SMALL_IMAGE else TORCHVISION_SIZE
