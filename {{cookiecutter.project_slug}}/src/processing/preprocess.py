"""Pack a folder of images into the data set that training reads: uint8 shards, decoded once.

    python src/processing/preprocess.py --input photos --output data/photos

The input has one sub-folder a class, or ready-made `train`, `validation` (or `val`) and `test` folders with such
sub-folders inside. The output has one folder a split, written whole or not at all. The same input, size and seed give
the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the source root, instead of this script's folder

import imaging
from processing.scan import SPLITS, Item, PackingError, assign, automatic_size, scan
from progress import plain, progress, waiting

SCHEMA_VERSION = 1
SHARD_BYTES = 128 * 2**20
BYTES_PER_PIXEL = 8  # of the largest file that is looked at: four channels of 16 bits, not compressed


@dataclass(frozen=True)
class Limits:
    """What is still packed.

    Attributes:
        unreadable: share of all files; more unreadable ones fail the packing, fewer are left out and reported.
        megapixels: width times height of one image; a larger one counts as unreadable.
    """

    unreadable: float = 0.01
    megapixels: float = imaging.MAX_PIXELS / 1e6


def pack(
    folder: Path, output: Path, size: int | None = None, seed: int = 0, limits: Limits | None = None,
    shard_bytes: int = SHARD_BYTES, workers: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Pack `folder` into `output`, which is replaced as a whole at the end.

    `<output>.report.txt` names every file that was left out and says why; it is written also when packing fails.

    Args:
        folder: raw images; nothing is written there.
        output: the data set's folder.
        size: pixels a side; None chooses by `automatic_size`.
        seed: of the split and the order of rows.
        limits: what is still packed.
        shard_bytes: pixels of a shard, and so of memory, at most.
        workers: decoding threads; None: one a processor.

    Returns:
        The content of `dataset.json`.

    Raises:
        PackingError: when there is nothing to pack, too much of it cannot be read, or there is no room.
    """
    limits = limits or Limits()
    _check_output(folder, output)
    with waiting(f"the list of images in {folder}"):
        items, left_out = scan(folder)
        size = size or automatic_size(folder, items)
    splits = assign(items, seed)
    classes = sorted({item.label for item in items})
    output.parent.mkdir(parents=True, exist_ok=True)
    _check_room(output.parent, len(items) * (size * size * 3 + 300))
    temporary = output.parent / f".{output.name}.{os.getpid()}.tmp"
    unreadable: list[str] = []
    rows: dict[str, list[str]] = {}
    sha256: dict[str, str] = {}
    moments = np.zeros((2, 3))
    try:
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool, progress(len(items), "packing") as tick:
            for name in SPLITS:
                (temporary / name).mkdir(parents=True)
                rows[name] = []
                shards = _shards(folder, splits[name], size, limits, shard_bytes, pool, tick, unreadable)
                for number, (images, kept) in enumerate(shards):
                    labels = np.array([classes.index(item.label) for item in kept], dtype=np.int64)
                    for kind, array in (("images", images), ("labels", labels)):
                        path = temporary / name / f"{kind}-{number:05d}.npy"
                        np.save(path, array)
                        sha256[f"{name}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
                    rows[name] += [item.path for item in kept]
                    if name == "train":
                        moments += _moments(images)
        report = _report(output, unreadable, left_out)
        _check_rows(items, rows, unreadable, limits, report)
        info = _describe(classes, size, seed, moments, rows, sha256)
        for name in SPLITS:
            (temporary / name / "dataset.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
        _replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return info


def _check_output(folder: Path, output: Path) -> None:
    """Refuse to write over anything but a packed data set, and clear what a killed packing left beside it."""
    inside = output.resolve().is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(output.resolve())
    if inside or (output.exists() and not (output / "train" / "dataset.json").is_file()):
        raise PackingError(f"{output} is, or holds, something else than a packed data set; name another output folder")
    for litter in output.parent.glob("*"):
        if litter.name.startswith(f".{output.name}.") and litter.suffix in (".tmp", ".old") and not _alive(litter):
            shutil.rmtree(litter, ignore_errors=True)


def _alive(litter: Path) -> bool:
    """Whether the process that is named in `.<data set>.<process>.tmp` still runs."""
    try:
        os.kill(int(litter.stem.rpartition(".")[2]), 0)
        return True
    except PermissionError:
        return True
    except (ProcessLookupError, ValueError):
        return False


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise PackingError(
            f"packing needs about {needed / 1e6:,.0f} MB in {folder}, where {free / 1e6:,.0f} MB are free"
        )


def _check_rows(
    items: Sequence[Item], rows: dict[str, list[str]], unreadable: list[str], limits: Limits, report: Path
) -> None:
    """Refuse a data set that lost too much, or the last training image of a class, to unreadable files."""
    if len(unreadable) > limits.unreadable * len(items):
        raise PackingError(
            f"{len(unreadable)} of {len(items)} files cannot be read, more than {limits.unreadable:.1%}; the first: "
            f"{unreadable[0]!r}; all are in {report} (repair or remove them, or allow more with data.unreadable)"
        )
    kept = set(rows["train"])
    lost = {item.label for item in items} - {item.label for item in items if item.path in kept}
    if lost:
        raise PackingError(f"class {min(lost)!r} has no readable image for training; {report} names the others")
    if not rows["validation"]:
        raise PackingError(f"no readable image is left for validation; {report} names those that are not")


def _report(output: Path, unreadable: list[str], left_out: list[str]) -> Path:
    """Write down what is not in the data set, or remove an older report when all of it is."""
    path = output.with_name(f"{output.name}.report.txt")
    lines = [f"unreadable: {plain(line)}" for line in sorted(unreadable)]
    lines += [f"left out: {plain(line)}" for line in left_out]
    if lines:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    else:
        path.unlink(missing_ok=True)
    return path


def _shards(
    folder: Path, items: Sequence[Item], size: int, limits: Limits, shard_bytes: int, pool: ThreadPoolExecutor,
    tick: Callable[[int], object], unreadable: list[str],
) -> Iterator[tuple[NDArray[np.uint8], list[Item]]]:  # fmt: skip
    """Decode a split shard by shard; rows of unreadable files are left out."""
    step = max(1, shard_bytes // (size * size * 3))
    pixels = round(limits.megapixels * 1e6)

    def load(target: NDArray[np.uint8], item: Item) -> str | None:
        path = folder / item.path
        try:
            size_in_bytes = path.stat().st_size
            if size_in_bytes > BYTES_PER_PIXEL * pixels:
                return f"{item.path}: {size_in_bytes:,} bytes, more than an image of {limits.megapixels} megapixels has"
            target[:] = imaging.fit(imaging.decode(path.read_bytes(), pixels), size)
            return None
        except (imaging.ImageError, OSError) as error:
            return f"{item.path}: {error.strerror if isinstance(error, OSError) else error}"

    for first in range(0, len(items), step):
        chunk = items[first : first + step]
        images = np.empty((len(chunk), size, size, 3), dtype=np.uint8)
        problems = []
        for problem in pool.map(load, images, chunk):
            problems.append(problem)
            tick(1)
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
    sha256: dict[str, str],
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
    return info | {"rows": rows}


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
    parser.add_argument("--unreadable", type=float, default=Limits.unreadable, help="share that may be unreadable")
    parser.add_argument("--megapixels", type=float, default=Limits.megapixels, help="of the largest image")
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name may be no valid text
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half done is removed
    try:
        size = None if options.size == "auto" else int(options.size)
        limits = Limits(options.unreadable, options.megapixels)
        info = pack(options.input, options.output, size, options.seed, limits)
    except (PackingError, OSError) as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    counts = ", ".join(f"{count} {name}" for name, count in info["counts"].items())
    print(f"packed {len(info['classes'])} classes at {info['size']} pixels: {counts} -> {plain(options.output)}")
    report = options.output.with_name(f"{options.output.name}.report.txt")
    if report.exists():
        print(f"left out {len(report.read_text(encoding='utf-8').splitlines())} files; {plain(report)} names them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
