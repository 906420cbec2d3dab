"""Pack a folder of images into the data set that training reads: uint8 shards, decoded once.

    python src/processing/preprocess.py --input photos --output data/photos

The input has one sub-folder per class, or such ones in ready-made splits, or is a CSV file with the columns `path` and
`label`. The output has one folder a split, written whole or not at all. The same input, size and seed give equal bytes.
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
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the source root, instead of this script's folder

import imaging
from inference.batcher import processors
from processing.divide import Decoder, Look, assign, automatic_size, contradicting, deep_range, equal, survey
from processing.scan import SPLITS, Item, PackingError, is_table, read_table, scan
from progress import plain, progress, waiting

SCHEMA_VERSION = 1
SHARD_BYTES = 128 * 2**20
FEW = 5  # files that may be unreadable, of at least so many times as many


@dataclass(frozen=True)
class Limits:
    """What is still packed.

    Attributes:
        unreadable: share of all files; more unreadable ones fail the packing, fewer are left out and reported. Of few
            files some may be, unless it is 0.
        megapixels: width times height of one image; a larger one counts as unreadable.
        keep_contradicting: whether a picture stays that is in several classes.
    """

    unreadable: float = 0.01
    megapixels: float = imaging.MAX_PIXELS / 1e6
    keep_contradicting: bool = False


def pack(
    folder: Path, output: Path, size: int | None = None, seed: int = 0, limits: Limits | None = None,
    shard_bytes: int = SHARD_BYTES, workers: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Pack `folder` into `output`, which is replaced as a whole at the end.

    `<output>.report.txt` names every file that was left out and says why; it is written also when packing fails.

    Args:
        folder: raw images, or a table of them; nothing is written there.
        output: of the data set.
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
    left_out, wrong = list[str](), list[str]()  # wrong rows count as files that cannot be read
    with waiting(f"the list of images in {folder}"):
        if is_table(folder):
            (items, wrong), folder = read_table(folder), folder.parent
        else:
            items, left_out = scan(folder)
            left_out = [f"left out: {line}" for line in left_out]
        size = size or automatic_size(folder, items)
    splits = assign(items, seed)
    classes = sorted({item.label for item in items})
    output.parent.mkdir(parents=True, exist_ok=True)
    _check_room(output.parent, len(items) * (size * size * 3 + 300))
    temporary = output.parent / f".{output.name}.{os.getpid()}.tmp"
    looks: dict[str, Look] = {}
    deep, dropped = imaging.DEEP, dict[str, str]()
    before: dict[str, tuple[Path, int]] = {}  # the shard and row of what need not be decoded again
    try:
        with ThreadPoolExecutor(workers or processors()) as pool:
            while True:  # again, where the pictures show that they need another scale or another division
                unreadable = [f"unreadable: {line}" for line in wrong]
                decoder = Decoder(folder, size, limits.megapixels, shard_bytes, pool, deep, looks, unreadable, before)
                place = temporary / ("again" if before else "first")
                packed, sha256, moments = _write(place, splits, classes, decoder)
                if deep != (deep := deep_range(looks.values())):
                    continue
                rows = {name: [*places] for name, places in packed.items()}
                spread = _spread(moments, len(rows["train"]) * size * size)
                groups = equal(items, looks)
                copies = {item.path: group[0].path for group in groups for item in group[1:]}
                if not limits.keep_contradicting:
                    dropped = {item.path: f"in several classes: {item.path}, as {other.path}"
                               for group in groups if contradicting(group)
                               for item, other in zip(group, [*group[1:], group[0]], strict=True)}  # fmt: skip
                twice = [f"twice: {path}, as {first}" for path, first in sorted(copies.items()) if path not in dropped]
                report = _report(output, [*sorted(unreadable), *left_out, *dropped.values(), *twice])
                if splits == (splits := assign([each for each in items if each.path not in dropped], seed, copies)):
                    break
                before = packed["train"] | packed["validation"] | packed["test"]
        _check_rows(items, len(items) + len(wrong), rows, unreadable, limits, report)
        info = _describe(classes, size, seed, spread, rows, sha256)
        info |= {"deep": [*deep], "survey": survey(items, looks, groups, rows)}
        for name in SPLITS:
            (place / name / "dataset.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
        _replace(place, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return info


def _write(
    folder: Path, splits: dict[str, list[Item]], classes: list[str], decoder: Decoder
) -> tuple[dict[str, dict[str, tuple[Path, int]]], dict[str, str], NDArray[np.float64]]:
    """Write the shards of every split, and say where each image is, their hashes, and the moments of training."""
    shutil.rmtree(folder, ignore_errors=True)
    packed: dict[str, dict[str, tuple[Path, int]]] = {name: {} for name in SPLITS}
    sha256: dict[str, str] = {}
    moments, places = np.zeros((2, 3)), {label: place for place, label in enumerate(classes)}
    with progress(sum(map(len, splits.values())), "packing") as tick:
        for name in SPLITS:
            (folder / name).mkdir(parents=True)
            for number, (images, kept) in enumerate(decoder.shards(splits[name], tick)):
                labels = np.array([places[item.label] for item in kept], dtype=np.int64)
                for kind, array in (("labels", labels), ("images", images)):
                    path = folder / name / f"{kind}-{number:05d}.npy"
                    np.save(path, array)
                    sha256[f"{name}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
                packed[name] |= {item.path: (path, row) for row, item in enumerate(kept)}
                if name == "train":
                    moments += _moments(images)
    return packed, sha256, moments


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
    items: Sequence[Item], files: int, rows: dict[str, list[str]], unreadable: list[str], limits: Limits, report: Path
) -> None:
    """Refuse a data set that lost too much, or the last training image of a class, to unreadable files."""
    few = min(FEW, files // FEW) if limits.unreadable else 0
    if len(unreadable) > max(limits.unreadable * files, few):
        raise PackingError(
            f"{len(unreadable)} of {files} files cannot be read, more than {limits.unreadable:.1%}; the first: "
            f"{unreadable[0].partition(': ')[2]!r}; {report} names all (repair or remove them, or set data.unreadable)"
        )
    kept = set(rows["train"])
    lost = {item.label for item in items} - {item.label for item in items if item.path in kept}
    if lost:
        raise PackingError(f"class {min(lost)!r} has no image left for training; {report} says what was left out")
    if not rows["validation"]:
        raise PackingError(f"no readable image is left for validation; {report} names those that are not")


def _report(output: Path, lines: list[str]) -> Path:
    """Write down what is not in the data set and what is twice, or remove an older report when there is none of it."""
    path = output.with_name(f"{output.name}.report.txt")
    path.write_text("".join(f"{plain(line)}\n" for line in lines), encoding="utf-8")
    if not lines:
        path.unlink()
    return path


def _moments(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Sums over all pixels of a shard: per channel, of the values and of their squares, exactly, image by image."""
    total = np.zeros((2, 3))
    for image in images:
        flat = image.reshape(-1, 3).astype(np.uint64)
        total += [flat.sum(0), (flat * flat).sum(0)]
    return total


def _spread(moments: NDArray[np.float64], pixels: int) -> NDArray[np.float64]:
    """Mean and deviation of each channel in training."""
    mean, squares = moments / max(pixels, 1)
    deviation = np.sqrt(np.maximum(squares - mean**2, 0.0))
    if pixels and (deviation < 1 / 2).all():
        raise PackingError(f"all pictures for training are of one colour, {np.round(mean).astype(int).tolist()}: "
                           "there is nothing to learn from; look at what the files hold")  # fmt: skip
    return np.array([mean, np.maximum(deviation, 1.0)])  # 1: a channel of one value


def _describe(
    classes: list[str], size: int, seed: int, spread: NDArray[np.float64], rows: dict[str, list[str]],
    sha256: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    info: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "classes": classes,
        "size": size,
        "mean": [round(value / 255, 6) for value in spread[0].tolist()],
        "std": [round(value / 255, 6) for value in spread[1].tolist()],
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
    parser.add_argument("--input", type=Path, required=True, help="folder with one sub-folder per class, or a CSV file")
    parser.add_argument("--output", type=Path, required=True, help="folder of the packed data set")
    parser.add_argument("--size", default="auto", help="pixels a side (default: by the images)")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--unreadable", type=float, default=Limits.unreadable, help="share that may be unreadable")
    parser.add_argument("--megapixels", type=float, default=Limits.megapixels, help="of the largest image")
    parser.add_argument("--keep-contradicting", action="store_true", help="keep what is in several classes")
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name may be no valid text
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half done is removed
    try:
        size = None if options.size == "auto" else int(options.size)
        limits = Limits(options.unreadable, options.megapixels, options.keep_contradicting)
        info = pack(options.input, options.output, size, options.seed, limits)
    except (PackingError, OSError) as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    counts = ", ".join(f"{count} {name}" for name, count in info["counts"].items())
    print(f"packed {len(info['classes'])} classes at {info['size']} pixels: {counts} -> {plain(options.output)}")
    report = options.output.with_name(f"{options.output.name}.report.txt")
    lines = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
    kinds = Counter(line.partition(": ")[0] for line in lines)
    print("".join(f"{line}\n" for line in lines[: min(kinds["unreadable"], FEW)]), end="")
    if kinds["in several classes"]:
        print("a picture in several classes is left out, as its class is unsure; data.keep_contradicting=true keeps it")
    if lines:
        print(f"files: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}; {plain(report)} names them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
