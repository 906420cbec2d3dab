"""Pack images into the data set that training reads: `make data`, `make data DATA=photos`.

    python -m pipelines data --data photos

A folder that is packed already, with the same files and settings, is left as it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from pipelines import ROOT, SOURCE, terminal
from pipelines.config import Settings, load
from pipelines.runs import STAMPS
from pipelines.terminal import UserError
from processing.scan import PackingError, is_table, read_table
from progress import plain, waiting
from training.config import shown

DATA = ROOT / "data"
SAMPLE = DATA / "raw" / "digits"
HEADS = ["class", "train", "val", "test", "sizes", "copies", "left out"]
MOST, WIDTH = 30, 80  # rows and columns of the table that is printed
NO_NAME = re.compile(r"(.*[^a-z])?(train(ing)?|val(id(ation)?)?|test(ing)?|labels?)|images?|imgs?|data(set)?|raw")


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
    folder = raw(settings.data.source if source is None else source, table=True)
    with _alone(folder.name):
        return _pack(settings, folder)


def raw(source: str, table: bool = False) -> Path:
    """The folder of raw images that a source names; the sample set is written first when it is missing.

    Args:
        source: of images.
        table: whether a CSV file will do.

    Raises:
        UserError: when there is no such folder.
    """
    if source != "sample":
        return _folder(source, table)
    with _alone(SAMPLE.name):
        if not SAMPLE.is_dir():
            write_digits(SAMPLE)
    return SAMPLE


def look(source: str) -> None:
    """Make sure that a source names something, where a price is all that is asked for.

    Raises:
        UserError: when there is no such folder.
    """
    if source != "sample" and not source.startswith("s3://"):
        _folder(source, table=True)


def options(settings: Settings) -> list[str]:
    """What the packing script is told, here and on SageMaker."""
    training, data = settings.training, settings.data
    words = ["--size", str(training.image_size), "--seed", str(data.seed)]
    words += ["--unreadable", str(data.unreadable), "--megapixels", str(data.megapixels)]
    return words + ["--keep-contradicting"] * data.keep_contradicting


def weights(settings: Settings, folder: Path) -> Path | None:
    """Put the weights of `data.pretrained`, and nothing else, into a folder; None when there are none to start from.

    Raises:
        UserError: when there is no such file.
    """
    if settings.data.pretrained == "none":
        return None
    file = Path(settings.data.pretrained).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"data.pretrained is {shown(settings.data.pretrained)}, which is no file; name one, or none")
    folder.mkdir(parents=True)
    try:
        (folder / file.name).hardlink_to(file)
    except OSError:  # another file system
        shutil.copyfile(file, folder / file.name)
    return folder


def _folder(source: str, table: bool) -> Path:
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # names that are too long, a NUL, no home folder
        folder = Path(source).expanduser().resolve()
        if DATA.resolve().is_relative_to(folder):
            raise UserError(f"{folder} holds this project's own packed data; DATA must name a folder of images only")
        if source and (folder.is_dir() or (table and is_table(folder))):
            return folder
    raise UserError(f"there is no folder {shown(source)}; DATA must name one with a sub-folder of images per class")


def _pack(settings: Settings, folder: Path) -> Path:
    """Pack a folder of raw images, unless the same files were packed with the same settings before."""
    target = DATA / _name(folder)
    words = options(settings)
    with waiting(f"the list of files in {folder}"):
        now = state(folder, [*words, "survey"])  # which data that an older version packed lack
    stamp, packed = STAMPS / f"{target.name}.json", {"source": str(folder), "state": now}
    if (target / "train" / "dataset.json").is_file() and _read(stamp) == packed:
        return target
    stamp.unlink(missing_ok=True)
    script = SOURCE / "processing" / "preprocess.py"
    command = [sys.executable, str(script), "--input", str(folder), "--output", os.path.relpath(target), *words]
    if subprocess.run(command).returncode:
        raise UserError(f"{folder} was not packed (see above)")
    stamp.write_text(json.dumps(packed), encoding="utf-8")
    return target


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """Let one process at a time pack data of this name; others wait, and say so."""
    STAMPS.mkdir(parents=True, exist_ok=True)
    with (STAMPS / f"{_plain(name)}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that packs {name}", flush=True)
            with waiting(f"another process that packs {name}"):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(stamp: Path) -> dict[str, str] | None:
    try:
        facts: dict[str, str] = json.loads(stamp.read_text(encoding="utf-8"))
        return facts
    except (OSError, ValueError):
        return None


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "images"


def _name(folder: Path) -> str:
    """A folder name for the packed data: never the source itself, and never shared by two sources of one name."""
    own = folder.with_suffix("") if folder.is_file() else folder
    names = [place.name for place in (own, *own.parents[:2]) if place.name and place not in (ROOT, Path.home())]
    name = _plain(next((each for each in names if not NO_NAME.fullmatch(each.lower())), own.name))
    taken = (_read(STAMPS / f"{name}.json") or {"source": str(folder)})["source"] != str(folder)
    if taken or name == "raw" or folder.is_relative_to(DATA / name) or (DATA / name).is_relative_to(folder):
        name += "-" + hashlib.sha256(str(folder).encode()).hexdigest()[:6]
    return name


def state(folder: Path, options: list[str]) -> str:
    """A hash of every file's path, size and time of change, and of the options."""
    digest = hashlib.sha256(json.dumps(options).encode())
    for path in _files(folder):
        facts = os.lstat(path)
        digest.update(f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[str]:
    """All of a folder, or a table and what it names."""
    if folder.is_file():
        yield str(folder)
        with contextlib.suppress(PackingError):  # for the packing to say
            yield from (str(folder.parent / item.path) for item in read_table(folder)[0])
    for root, directories, files in os.walk(folder):
        directories.sort()
        for name in sorted(files):
            yield os.path.join(root, name)  # noqa: PTH118  millions of files: no Path each


def write_digits(folder: Path) -> None:
    """Write scikit-learn's handwritten digits as `<folder>/<digit>/<number>.png`: a real data set without a download.

    1,797 grey pictures of 8x8 pixels in ten classes (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998).
    The folder appears when it is complete.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = temporary / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary.rename(folder)


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Pack images into the data set that training reads.", settings=True)
    parser.add_data("folder with one sub-folder of images per class, or a CSV")
    options = parser.parse_args()
    from pipelines.report import dataset

    target = prepare(load(options.set), options.data)
    info = json.loads((target / "train" / "dataset.json").read_text(encoding="utf-8"))
    rows = [[name, *map(str, cells)] for name, *cells in info["survey"]["table"]]
    shown = rows if len(rows) <= MOST else [*rows[: MOST // 2], ["…"] + [""] * 6, *rows[-MOST // 2 :]]
    widths = [max(map(columns, column)) for column in zip(HEADS, *shown, strict=True)]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(widths[1:]))
    for name, *cells in [HEADS, *shown]:
        text = plain(name)
        while columns(text) > widths[0]:
            text = text[:-2] + "…"
        print(text + " " * (widths[0] - columns(text)), *map(str.rjust, cells, widths[1:]), sep="  ")
    folder = Path((_read(STAMPS / f"{target.name}.json") or {"source": ""})["source"])
    written = dataset.write(target, folder if folder.is_dir() else folder.parent, info, HEADS, rows)
    print(f"pictures, copies and what was left out: {written.relative_to(ROOT)}")
    return 0


def columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)
