"""Runs: their names, their folder in `artifacts/`, and what a person wants to know of one."""

from __future__ import annotations

import gzip
import json
import os
import re
import secrets
import shutil
import tarfile
import textwrap
import time
from pathlib import Path
from typing import Any

from inference.artifact import ArtifactError, digest_of, verify
from pipelines import ROOT, project, terminal
from pipelines.terminal import UserError
from progress import duration, plain, several
from training import board
from training.config import shown

ARTIFACTS = ROOT / "artifacts"
WORK = ROOT / ".cache" / "local"
CHECKPOINTS = ROOT / ".cache" / "checkpoints"
STAMPS = ROOT / ".cache" / "data"  # what was packed from where, by data set
TRUSTED = ROOT / ".cache" / "trusted"  # a line an artifact whose code may run as the user: its SHA-256, and its run
LATEST = "latest"
NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")
WIDTH = 79  # columns of what is shown
FILES = ("metrics.json", "metrics.jsonl", "train.log", "run.json")  # beside model.tar.gz


def new_name() -> str:
    """A name that sorts by time: `YYYYMMDD-HHMMSS-` and four random hexadecimal digits."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def find(name: str | None) -> Path:
    """The folder of a finished run; the newest one without a name.

    Raises:
        UserError: when there is no such run, with those that exist.
    """
    folder = ARTIFACTS / (name or LATEST)
    if (folder / "model.tar.gz").is_file():
        return folder.resolve()
    finished = sorted(path.name for path in ARTIFACTS.glob("*") if NAME.fullmatch(path.name))
    if not finished:
        raise UserError("there is no finished run yet; train one with `make train-local`")
    raise UserError(f"there is no finished run {name or LATEST!r}; finished runs: {', '.join(finished[-5:])}")


def tried() -> bool:
    """Whether a run on this machine was trained with the source as it is now."""
    now = project.source_hash()
    return any(read(file).get("source") == now for file in ARTIFACTS.glob("*/run.json"))


def publish(name: str, model: Path, output: Path, facts: dict[str, Any], trust: bool = True) -> Path:
    """Check what training wrote and move it into `artifacts/<name>` as a whole.

    Args:
        name: of the run.
        model: the folder that was SM_MODEL_DIR.
        output: the folder that was SM_OUTPUT_DATA_DIR.
        facts: added to run.json.
        trust: whether its code may run as the user: it was made here, or is what a job of this project left.

    Returns:
        The run's folder.

    Raises:
        UserError: when a file is missing or does not match its checksum.
    """
    missing = [file for file in FILES if not (output / file).is_file()]
    if missing or not (model / "model.json").is_file():
        raise UserError(
            f"training ended, but {', '.join(missing) or 'model.json'} is missing, so nothing was published; "
            f"what it left is in {output.parent}"
        )
    try:
        verify(model)
    except ArtifactError as error:
        raise UserError(f"{model}: {error}, so nothing was published; train again") from error
    temporary = ARTIFACTS / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for file in (*FILES, *(path.name for path in output.glob(board.FILES))):
        shutil.copyfile(output / file, temporary / file)
    run = read(output / "run.json")
    (temporary / "run.json").write_text(json.dumps({"run": name} | run | facts, indent=2) + "\n", encoding="utf-8")
    pack(model, temporary / "model.tar.gz")
    temporary.rename(ARTIFACTS / name)
    point(name)
    if trust:
        _trust(ARTIFACTS / name)
    return ARTIFACTS / name


def point(name: str) -> None:
    """Let `artifacts/latest` lead to a run."""
    link = ARTIFACTS / f".{LATEST}.{name}.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    link.replace(ARTIFACTS / LATEST)


def trusted(archive: Path) -> bool:
    """Whether an artifact was made by a run here, or fetched from a job of this project: whatever it is called now."""
    if TRUSTED.is_symlink() or not TRUSTED.is_file() or not archive.is_file():
        return False
    lines = TRUSTED.read_text(encoding="utf-8", errors="replace").splitlines()
    return digest_of(archive) in {line.partition(" ")[0] for line in lines}


def _trust(folder: Path) -> None:
    """Note that the artifact of a run is trusted; when that cannot be done, the run is good all the same."""
    try:
        if TRUSTED.is_symlink() or (TRUSTED.exists() and not TRUSTED.is_file()):
            raise OSError("it is no file")
        TRUSTED.parent.mkdir(parents=True, exist_ok=True)
        with TRUSTED.open("a", encoding="utf-8") as file:
            file.write(f"{digest_of(folder / 'model.tar.gz')} {folder.name}\n")
    except OSError as error:
        print(f"{folder.name} is not noted as trusted, so its code runs in a container only: {TRUSTED}: {error}")


def pack(folder: Path, archive: Path) -> None:
    """Write a folder as a .tar.gz whose bytes depend on names and contents only."""
    with (
        archive.open("wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
                entry.size, entry.mode = path.stat().st_size, 0o644
                with path.open("rb") as content:
                    tar.addfile(entry, content)


def read(file: Path) -> dict[str, Any]:
    """What a file of a run holds, which may be a stranger's.

    Raises:
        UserError: when that is no JSON object, or one that Python does not read.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {plain(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} cannot be read: it holds no JSON object")
    return found


def describe(folder: Path) -> str:
    """What a person wants to know of a finished run: its numbers, its files, and three commands that come next.

    Raises:
        UserError: when its files do not say it.
    """
    try:
        return _described(folder)
    except terminal.DAMAGED as error:
        raise UserError(f"{folder}: its files do not hold what a run writes ({shown(error)})") from error


def _described(folder: Path) -> str:
    facts, metrics = read(folder / "run.json"), read(folder / "metrics.json")
    first = facts.get("seconds_to_first_step")
    rows = [
        ("run", f"{facts['run']} ({facts['mode']})"),
        *([("image", facts["image"])] if facts.get("image") else []),
        ("data set", f"{facts['data']}"),
        ("validation accuracy", f"{metrics['val_accuracy']:.4f}"),
        *([("majority class", f"{metrics['majority']:.4f}, by always naming it")] if "majority" in metrics else []),
        ("validation loss", f"{metrics['val_loss']:.4f}"),
        ("training", f"{several(metrics['epochs'], 'epoch')}, {metrics['train_images_per_second']:,.0f} images/s, "
                     f"{several(metrics['world_size'], 'process')}"
                     + (f", {facts['device']}" if "device" in facts else "")),
        ("time", duration(facts["seconds"]) + ("" if first is None else f", {duration(first)} to the first step")),
    ]  # fmt: skip
    evaluation = folder / "evaluation.json"
    if evaluation.exists():
        accuracy = read(evaluation)["metrics"]["accuracy"]
        text = f"{accuracy['value']:.4f} (95 % interval {accuracy['ci_low']:.4f} to {accuracy['ci_high']:.4f})"
        rows.append(("test accuracy", text))
    lines = [f"  {name:20} {plain(value)}" for name, value in rows]
    lines.append(f"  {'files':20} {Path(os.path.relpath(folder, ROOT))}/")
    names = " ".join(sorted(plain(path.name) for path in folder.iterdir()))
    lines += textwrap.wrap(names, WIDTH, initial_indent=23 * " ", subsequent_indent=23 * " ", break_on_hyphens=False)
    return "\n".join([*lines, after(folder)])


def after(folder: Path) -> str:
    """What to do next with a finished run: at most three commands."""
    run = {} if (ARTIFACTS / LATEST).resolve() == folder.resolve() else {"RUN": folder.name}
    commands = [
        *([] if (folder / "evaluation.json").exists() else [terminal.command("report", **run)]),
        terminal.command("predict", IMAGE=example_image(folder), **run),
        terminal.command("serve-local", **run),
        terminal.command("train-local", DATA="folder/of/images"),
    ]
    return "\n".join(["next:", *(f"  {command}" for command in commands[:3])])


def example_image(folder: Path) -> str:
    """The raw file of one test image of a run's data set, to try a prediction on."""
    try:
        data = ROOT / read(folder / "run.json")["data"]
        source = Path(json.loads((STAMPS / f"{data.name}.json").read_text(encoding="utf-8"))["source"])
        rows = json.loads((data / "test" / "dataset.json").read_text(encoding="utf-8"))["rows"]
        path = source / (rows["test"] or rows["train"])[0]
        return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    except (OSError, UserError, *terminal.DAMAGED):
        return "path/to/an/image"
