"""Classify a folder of images with an artifact: one JSON line an image, in the order of their paths.

    python src/inference/batch.py --artifact artifacts/latest/model.tar.gz --output photos.jsonl photos

A line holds `file`, `label`, `prediction` and `probabilities`; that of a bad image `file` and `error`. Stopped or
killed, the same command goes on after the last whole batch of `<output>.partial` (`<output>.partial.json` says of what)
and ends with the same bytes. Exit codes: 0, 1: images were bad, 2: it cannot be done, 130 and 143: stopped.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shlex
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the source root, instead of this script's folder

from inference.artifact import Artifact, digest_of, open_artifact
from inference.batcher import processors
from progress import plain, progress, several, waiting

BATCH = 64  # images a question; counted from the first image, so that they are the same wherever a run resumes
AHEAD = 2 * BATCH  # images that are decoded, or wait for it, while a batch is asked


def run(artifact: Artifact, digest: str, folder: Path, output: Path, signals: Sequence[int]) -> int:
    """Write the lines of all images below `folder`, or the rest of them; gives the exit code."""
    with waiting(f"the list of images in {folder}"):
        files, facts = _list(folder, output)
    partial, place = output.with_name(f"{output.name}.partial"), folder.stat()
    output.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a+b") as lines:
        labels = _resume(lines, partial, {"artifact": digest, **facts, "batch size": BATCH}, files)
        todo, started = len(files) - len(labels), time.monotonic()
        images = ahead(lambda name: _read(artifact, folder / name), files[len(labels) :])
        with closing(images), progress(todo, "classifying") as tick:
            while len(labels) < len(files) and not signals:
                names = files[len(labels) : len(labels) + BATCH]
                entries = _ask(artifact, names, list(islice(images, BATCH)))
                if any("error" in entry for entry in entries) and not os.path.samestat(place, folder.stat()):
                    raise ValueError(f"{folder} is another folder than at the start; is a disk gone?")
                lines.write("".join(f"{json.dumps(entry)}\n" for entry in entries).encode())
                lines.flush()
                labels += [entry.get("label") for entry in entries]
                tick(len(entries))
        if len(labels) < len(files):
            name, so_far = signal.Signals(signals[0]).name, f"{len(labels)} of {several(len(files), 'image')}"
            print(f"stopped by {name} after {so_far}; give the same command to go on", file=sys.stderr)
            return 128 + signals[0]
        os.fsync(lines.fileno())
        partial.replace(output)
        partial.with_name(f"{partial.name}.json").unlink()
    bad = [repr(name) for name, label in zip(files, labels, strict=True) if label is None]
    speed = todo / (time.monotonic() - started)
    print(f"{several(len(files), 'image')}, {len(bad)} of them bad, {speed:,.0f}/s -> {plain(output)}")
    print("  images  class")
    for label, count in sorted(Counter(filter(None, labels)).items()):
        print(f"{count:8}  {plain(label)}")
    print(f"next:\n  head -n 3 {shlex.quote(str(output))}", flush=True)
    if bad:
        first = ", ".join(bad[:3]) + ", ..." * (len(bad) > 3)
        print(f"error: {len(bad)} of {len(files)} images are bad, {plain(output)} says why: {first}", file=sys.stderr)
    return 1 if bad else 0


def _list(folder: Path, output: Path) -> tuple[list[str], dict[str, str]]:
    """Relative paths of all images, sorted, and what tells these files from others."""
    from processing.scan import SUFFIXES, images  # late: the `imaging` of the artifact must come first

    if output.is_dir() or output.name.lower().endswith(SUFFIXES):
        raise ValueError(f"{output} cannot be the output; name a file such as {output.with_suffix('.jsonl')}")
    others: list[str] = []
    files = sorted(images(folder, "", others))
    if others:
        print(f"{len(others)} other files are left out, the first: {others[0]!r}")
    if not files:
        raise ValueError(f"{folder} holds no image; name a folder that does, with {' '.join(SUFFIXES)}")
    digest = hashlib.sha256()
    for name in files:
        digest.update(name.encode("utf-8", "surrogateescape"))
        with suppress(OSError):  # it will be a bad image
            facts = (folder / name).stat()
            digest.update(f"\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    return files, {"folder": str(folder.resolve()), "list of files": digest.hexdigest()}


def _resume(lines: BinaryIO, partial: Path, state: dict[str, Any], files: Sequence[str]) -> list[str | None]:
    """Cut the file behind the whole batches that an earlier run with the same state wrote; gives their labels."""
    try:
        fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another process writes {partial}; wait for it, or name another output") from error
    side, origin = partial.with_name(f"{partial.name}.json"), json.dumps(state).encode()
    same, size = side.is_file() and side.read_bytes() == origin, lines.seek(0, os.SEEK_END)
    labels: list[str | None] = []
    end = lines.seek(0)
    with suppress(ValueError, TypeError, KeyError):  # a line that is torn
        while same and len(labels) < len(files):
            names = files[len(labels) : len(labels) + BATCH]
            texts = [lines.readline() for _ in names]
            entries = [json.loads(text) for text in texts]
            if [entry["file"] for entry in entries] != names or not texts[-1].endswith(b"\n"):
                break
            labels += [entry.get("label") for entry in entries]
            end = lines.tell()
    if size:
        afresh = f"starting afresh: {partial} is of another artifact, folder or list of files"
        print(f"going on after {len(labels)} of {several(len(files), 'image')}" if same else afresh, flush=True)
    lines.truncate(end)
    if not same:
        side.write_bytes(origin)
    return labels


def ahead(load: Callable[[str], Any], names: Sequence[str]) -> Generator[Any]:
    """Give `load(name)` of every name in order; at most `AHEAD` are loaded before somebody asks for them."""
    pool, rest = ThreadPoolExecutor(min(8, processors())), iter(names)
    waiting = deque(pool.submit(load, name) for name in islice(rest, AHEAD))
    try:
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(load, name) for name in islice(rest, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def _read(artifact: Artifact, path: Path) -> Any:
    """An image, cut to the model's size already (`predict_fn` leaves it so), or a sentence why there is none."""
    try:
        size, limit = path.stat().st_size, artifact.handlers.payload.LIMITS.max_bytes
        if size > limit:
            return f"the file has {size} bytes, more than the limit of {limit}"
        batch = artifact.handlers.input_fn(path.read_bytes(), "application/x-image")
        (image,) = artifact.handlers.fit(batch, artifact.model)
        return image
    except Exception as error:  # handlers may be the user's: whatever they raise concerns this image only
        return str(getattr(error, "strerror", None) or error) or repr(error)


def _ask(artifact: Artifact, names: Sequence[str], images: Sequence[Any]) -> list[dict[str, Any]]:
    """The content of a batch's lines. Where the model has no answer to all together, each image is asked alone."""
    entries = [{"file": name, "error": image} for name, image in zip(names, images, strict=True)]
    good = [index for index, image in enumerate(images) if not isinstance(image, str)]
    try:
        answer = artifact.handlers.predict_fn([images[index] for index in good], artifact.model)
        columns = (answer[key] for key in ("labels", "predictions", "probabilities"))
        for index, label, number, row in zip(good, *columns, strict=True):
            entries[index] = {"file": names[index], "label": label, "prediction": number, "probabilities": row}
        json.dumps(entries, allow_nan=False)
    except Exception as error:  # also where no image is good
        if len(names) == 1:
            return [{"file": names[0], "error": f"the model has no answer: {error}" if good else images[0]}]
        return [_ask(artifact, [name], [image])[0] for name, image in zip(names, images, strict=True)]
    return entries


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Classify a folder of images into one JSON line an image.")
    parser.add_argument("--artifact", type=Path, required=True, help="model.tar.gz of a run")
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines that is written")
    parser.add_argument("folder", type=Path, help="folder of images, with folders in it or not")
    options = parser.parse_args(arguments)
    os.environ.setdefault("INFERENCE_MAX_BYTES", str(2**30))  # a file here may be larger than what an endpoint takes
    signals: list[int] = []  # a stop that was asked for: the batch in hand is finished
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda caught, _: signals.append(caught))
    try:
        with open_artifact(options.artifact) as artifact:
            return run(artifact, digest_of(options.artifact), options.folder, options.output, signals)
    except ValueError as error:  # an ArtifactError, a PackingError, or of this file
        sentence = str(error)
    except OSError as error:
        place = error.filename or f"{options.output}.partial"
        sentence = f"{place}: {error.strerror}; mend that and give the same command to go on"
    print(f"error: {plain(sentence)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
