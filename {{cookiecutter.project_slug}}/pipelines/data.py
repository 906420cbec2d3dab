"""Pack images into the data set that training reads: `make data`, `make data DATA=photos`.

    python -m pipelines.data --data photos

A folder that is packed already, with the same files and settings, is left as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from pipelines import ROOT, SOURCE, console
from pipelines.config import Settings, load
from pipelines.console import UserError
from pipelines.runs import STAMPS
from pipelines.sample_data import write_digits

DATA = ROOT / "data"
SAMPLE = DATA / "raw" / "digits"


def prepare(settings: Settings, source: str | None = None) -> Path:
    """Make sure that the images are packed.

    Args:
        settings: image size, seed and the source when none is given.
        source: folder of raw images, or None for `data.source`.

    Returns:
        The folder of the packed data set, with a folder a split.

    Raises:
        UserError: when there is no such folder or it cannot be packed.
    """
    source = source or settings.data.source
    if source == "sample":
        folder = SAMPLE
        if not folder.is_dir():
            write_digits(folder)
    else:
        folder = Path(source).expanduser().resolve()
        if not folder.is_dir():
            raise UserError(f"there is no folder {source}; DATA must name one with a sub-folder of images a class")
    target = DATA / _name(folder)
    size = str(settings.training.image_size)
    options = ["--size", size, "--seed", str(settings.data.seed), "--unreadable", str(settings.data.unreadable)]
    stamp, state = STAMPS / f"{target.name}.json", {"source": str(folder), "state": _state(folder, options)}
    if target.is_dir() and stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == state:
        return target
    stamp.unlink(missing_ok=True)
    script = SOURCE / "processing" / "preprocess.py"
    command = [sys.executable, str(script), "--input", str(folder), "--output", str(target), *options]
    if subprocess.run(command).returncode:
        raise UserError(f"{folder} was not packed (see above)")
    STAMPS.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps(state), encoding="utf-8")
    return target


def _name(folder: Path) -> str:
    """A folder name for the packed data: never the source itself, and never shared by two sources of one name."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name).strip("-.") or "images"
    stamp = STAMPS / f"{name}.json"
    taken = stamp.exists() and json.loads(stamp.read_text(encoding="utf-8"))["source"] != str(folder)
    if taken or name == "raw" or folder.is_relative_to(DATA / name) or (DATA / name).is_relative_to(folder):
        name += "-" + hashlib.sha256(str(folder).encode()).hexdigest()[:6]
    return name


def _state(folder: Path, options: list[str]) -> str:
    """A hash of every file's path, size and time of change, and of the options."""
    digest = hashlib.sha256(json.dumps(options).encode())
    for root, directories, files in os.walk(folder):
        directories.sort()
        for name in sorted(files):
            path = os.path.join(root, name)  # noqa: PTH118  millions of files: no Path each
            facts = os.lstat(path)
            digest.update(f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def main() -> int:
    """Command line; see the module's docstring."""
    parser = console.parser("Pack images into the data set that training reads.", settings=True)
    parser.add_argument("--data", help="folder with one sub-folder of images a class (default: data.source)")
    options = parser.parse_args()
    target = prepare(load(options.set), options.data)
    info = json.loads((target / "train" / "dataset.json").read_text(encoding="utf-8"))
    counts = ", ".join(f"{count} {name}" for name, count in info["counts"].items())
    print(f"{target.relative_to(ROOT)}: {len(info['classes'])} classes at {info['size']} pixels, {counts}")
    return 0


if __name__ == "__main__":
    console.run_verb(main)
