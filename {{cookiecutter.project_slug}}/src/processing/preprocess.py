"""Pack a folder of images into the data set that training reads: uint8 shards, decoded once.

    python src/processing/preprocess.py --input photos --output data/photos

The input has one sub-folder a class, or ready-made `train`, `validation` (or `val`) and `test` folders with such
sub-folders inside. The output has one folder a split, written whole or not at all. The same input, size and seed give
the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the source root, instead of this script's folder

import imaging
from processing.progress import progress
from processing.scan import SPLITS, Item, PackingError, assign, automatic_size, scan

SCHEMA_VERSION = 1
SHARD_BYTES = 128 * 2**20
UNREADABLE_SHARE = 0.01


def pack(
    folder: Path, output: Path, size: int | None = None, seed: int = 0, shard_bytes: int = SHARD_BYTES,
    unreadable_share: float = UNREADABLE_SHARE, workers: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Pack `folder` into `output`, which is replaced as a whole at the end.

    Args:
        folder: raw images; nothing is written there.
        output: the data set's folder.
        size: pixels a side; None chooses by `automatic_size`.
        seed: of the split and the order of rows.
        shard_bytes: pixels of a shard, and so of memory, at most.
        unreadable_share: of all files; more unreadable ones fail the packing, fewer are left out and listed.
        workers: decoding threads; None: one a processor.

    Returns:
        The content of `dataset.json`.

    Raises:
        PackingError: when there is nothing to pack or too much of it cannot be read.
    """
    inside = output.resolve().is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(output.resolve())
    if inside or (output.exists() and not (output / "train" / "dataset.json").is_file()):
        raise PackingError(f"{output} is, or holds, something else than a packed data set; name another output folder")
    items = scan(folder)
    size = size or automatic_size(folder, items)
    splits = assign(items, seed)
    classes = sorted({item.label for item in items})
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f".{output.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    unreadable: list[str] = []
    rows: dict[str, list[str]] = {}
    sha256: dict[str, str] = {}
    moments = np.zeros((2, 3))
    try:
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool, progress(len(items), "packing") as tick:
            for name in SPLITS:
                (temporary / name).mkdir(parents=True)
                rows[name] = []
                for number, (images, kept) in enumerate(
                    _shards(folder, splits[name], size, shard_bytes, pool, tick, unreadable)
                ):
                    if len(unreadable) > unreadable_share * len(items):
                        raise PackingError(_too_many(unreadable, len(items), unreadable_share))
                    labels = np.array([classes.index(item.label) for item in kept], dtype=np.int64)
                    for kind, array in (("images", images), ("labels", labels)):
                        path = temporary / name / f"{kind}-{number:05d}.npy"
                        np.save(path, array)
                        sha256[f"{name}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
                    rows[name] += [item.path for item in kept]
                    if name == "train":
                        moments += _moments(images)
        if not rows["train"]:
            raise PackingError(
                f"{folder} leaves no image for training; {len(items)} found, {len(unreadable)} unreadable"
            )
        info = _describe(classes, size, seed, moments, rows, sha256, unreadable)
        for name in SPLITS:
            (temporary / name / "dataset.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
        _replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return info


def _shards(
    folder: Path, items: Sequence[Item], size: int, shard_bytes: int, pool: ThreadPoolExecutor,
    tick: Callable[[], object],
    unreadable: list[str],
) -> Iterator[tuple[NDArray[np.uint8], list[Item]]]:  # fmt: skip
    """Decode a split shard by shard; rows of unreadable files are left out."""
    step = max(1, shard_bytes // (size * size * 3))

    def load(target: NDArray[np.uint8], item: Item) -> str | None:
        try:
            target[:] = imaging.fit(imaging.decode((folder / item.path).read_bytes()), size)
            return None
        except (imaging.ImageError, OSError) as error:
            return f"{item.path}: {error}"

    for first in range(0, len(items), step):
        chunk = items[first : first + step]
        images = np.empty((len(chunk), size, size, 3), dtype=np.uint8)
        problems = []
        for problem in pool.map(load, images, chunk):
            problems.append(problem)
            tick()
        readable = [index for index, problem in enumerate(problems) if problem is None]
        unreadable += [problem for problem in problems if problem is not None]
        if readable:
            kept = images if len(readable) == len(chunk) else images[readable]
            yield kept, [chunk[index] for index in readable]


def _moments(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Sums over all pixels of a shard: per channel, of the values and of their squares, exactly, image by image."""
    total = np.zeros((2, 3))
    for image in images:
        flat = image.reshape(-1, 3).astype(np.uint64)
        total += [flat.sum(0), (flat * flat).sum(0)]
    return total


def _describe(
    classes: list[str], size: int, seed: int, moments: NDArray[np.float64], rows: dict[str, list[str]],
    sha256: dict[str, str], unreadable: list[str],
) -> dict[str, Any]:  # fmt: skip
    pixels = len(rows["train"]) * size * size
    mean = moments[0] / pixels
    deviation = np.sqrt(np.maximum(moments[1] / pixels - mean**2, 1.0))  # 1: images of a single colour
    info: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "classes": classes,
        "size": size,
        "mean": [round(value / 255, 6) for value in mean.tolist()],
        "std": [round(value / 255, 6) for value in deviation.tolist()],
        "counts": {name: len(paths) for name, paths in rows.items()},
        "seed": seed,
        "sha256": sha256,
    }
    info["fingerprint"] = hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()
    return info | {"unreadable": sorted(unreadable), "rows": rows}


def _too_many(unreadable: list[str], total: int, share: float) -> str:
    return (
        f"{len(unreadable)} of {total} files cannot be read, more than {share:.1%}; the first: {unreadable[0]} "
        f"(repair or remove them, or allow more with --unreadable)"
    )


def _replace(temporary: Path, output: Path) -> None:
    """Put the finished data set in place; an older one disappears only once the new one is complete."""
    old = output.parent / f".{output.name}.{os.getpid()}.old"
    if output.exists():
        output.rename(old)
    temporary.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Pack a folder of images into the data set that training reads.")
    parser.add_argument("--input", type=Path, required=True, help="folder with one sub-folder a class")
    parser.add_argument("--output", type=Path, required=True, help="folder of the packed data set")
    parser.add_argument("--size", default="auto", help="pixels a side (default: by the images)")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument(
        "--unreadable", type=float, default=UNREADABLE_SHARE, help="share of files that may be unreadable"
    )
    options = parser.parse_args(arguments)
    try:
        size = None if options.size == "auto" else int(options.size)
        info = pack(options.input, options.output, size, options.seed, unreadable_share=options.unreadable)
    except (PackingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = ", ".join(f"{count} {name}" for name, count in info["counts"].items())
    print(f"packed {len(info['classes'])} classes at {info['size']} pixels: {counts} -> {options.output}")
    if info["unreadable"]:
        listed = "\n  ".join(info["unreadable"][:10])
        print(f"left out {len(info['unreadable'])} unreadable files (all in dataset.json):\n  {listed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
