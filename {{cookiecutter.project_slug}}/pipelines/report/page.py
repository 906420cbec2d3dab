"""The HTML report of a run: one file, no script, nothing from elsewhere, rendered from the run's own files.

`make train-local` and `make evaluate` leave it beside the run; `make report` renders it again. What it looks like is in
page.html. Class names and paths are whatever somebody called a folder, and a run may come from a stranger: page.html
escapes every value, and its policy forbids the browser to run or fetch anything.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.artifact import peek
from pipelines import ROOT
from pipelines.report import charts
from pipelines.report.charts import number_text
from pipelines.terminal import DAMAGED, UserError
from progress import several
from training.config import shown

NAME = "report.html"
TABLE_CLASSES = 20  # more: a heat map instead of a table
ROWS = 200  # of the table of classes
TINY = 48  # pixels a side of images that are shown with their pixels as squares
HARDER = ("label_smoothing", "mixup", "cutmix", "augment", "class_weights")  # what training's loss has and no other
EVALUATION = {"metrics", "classes", "per_class", "confusion", "images", "calibration", "mistakes"}
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")  # what HTML does not allow as text


@dataclass(frozen=True)
class Record:
    """What the files of a run say; what is missing or damaged is empty, and said in `notes`."""

    folder: Path
    run: dict[str, Any]
    metrics: dict[str, Any]
    epochs: list[dict[str, Any]]
    evaluation: dict[str, Any]
    model: dict[str, Any]
    notes: list[str]

    def curve(self, name: str) -> list[tuple[Any, Any]]:
        """A metric by epoch."""
        return [(epoch.get("epoch", 0), epoch.get(name)) for epoch in self.epochs]


def read(folder: Path) -> Record:
    """Read a run's files.

    Raises:
        UserError: when there is no run.json that can be read.
    """
    notes: list[str] = []

    def load(name: str, parse: Callable[[str], Any]) -> Any:
        try:
            return parse((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            gone = isinstance(error, FileNotFoundError)
            notes.append(f"{name} is missing." if gone else f"{name} cannot be read: {error}.")
            return {}

    def dictionary(content: str) -> dict[str, Any]:
        parsed = json.loads(content)
        if not isinstance(parsed, dict):
            raise ValueError("it holds no JSON object")
        return parsed

    def logged(content: str) -> list[dict[str, Any]]:
        rows = []
        for line in content.splitlines():
            try:
                rows.append(dictionary(line))
            except (ValueError, RecursionError):
                notes.append(f"metrics.jsonl holds a damaged line: {line[:40]!r}.")
        return rows

    run, metrics = load("run.json", dictionary), load("metrics.json", dictionary)
    if not run:
        raise UserError(f"{folder}: {notes[0]} Without it there is nothing to report; train again")
    epochs = load("metrics.jsonl", logged)
    evaluation = load("evaluation.json", dictionary) if (folder / "evaluation.json").exists() else {}
    if evaluation and not evaluation.keys() >= EVALUATION:
        notes.append("evaluation.json is of another version of this project: evaluate again.")
        evaluation = {}
    model: dict[str, Any] = {}
    try:
        model = dictionary(peek(folder / "model.tar.gz", "model.json").decode("utf-8") or "{}")
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"model.tar.gz cannot be read: {error}.")
    return Record(folder, run, metrics, epochs or [], evaluation, model, notes)


def attach(folder: Path) -> str:
    """Render a run's report, and say where it is. Whatever is wrong with a report, the run that it is of is good."""
    try:
        return f"report: {Path(os.path.relpath(write(folder), ROOT))}"
    except Exception as error:
        return f"no report: {error} (`make report` tries again)"


def write(folder: Path) -> Path:
    """Render `report.html` into a run's folder, as a whole.

    Raises:
        UserError: when its files do not hold what a run writes.
    """
    record, tested = read(folder), None
    if not record.evaluation:
        record.notes.append("Not evaluated on the test split yet: `make evaluate` adds it to this page.")
    elif record.evaluation.get("dataset_fingerprint") != record.evaluation.get("model_dataset_fingerprint"):
        record.notes.append("The test split is of another data set than the one that the model was trained on.")
    warned = (("Validation", record.run), ("Test", record.evaluation))
    record.notes.extend(f"{split}: {found['warning']}" for split, found in warned if found.get("warning"))
    try:
        tested = _tested(record) if record.evaluation else None
    except DAMAGED as error:
        record.notes.append(f"evaluation.json does not hold what an evaluation writes ({shown(error)}): "
                            "evaluate again.")  # fmt: skip
    try:
        return render("page.html", _values(record, tested), folder / NAME)
    except DAMAGED as error:
        raise UserError(f"{folder}: its files do not hold what a run writes ({shown(error)}); train again") from error


def render(template: str, values: dict[str, Any], file: Path) -> Path:
    """Fill a template of this folder, and put the page in place as a whole."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                        finalize=clean, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    temporary.write_text(pages.get_template(template).render(values), encoding="utf-8")
    return temporary.replace(file)


def clean(value: Any) -> Any:
    """Anything as text without what HTML does not allow; what is HTML already stays as it is."""
    if hasattr(value, "__html__"):
        return value
    return CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", str(value))


def _values(record: Record, tested: dict[str, Any] | None) -> dict[str, Any]:
    """All that page.html shows."""
    run, metrics, model = record.run, record.metrics, record.model
    commit = str(run.get("git_commit") or "none: the project had no commit when this run began")
    processes, instances = metrics.get("world_size", 1), run.get("instances", 1)
    where = [several(instances, "instance")] * (instances != 1) + [several(processes, "process")]
    classes = several(len(model.get("classes", [])), "class")
    settings = run.get("hyperparameters", {})
    harder = [f"{name} {settings[name]}" for name in HARDER if settings.get(name, 0) not in (0, "none")]
    loss = charts.lines({"training": record.curve("train_loss"), "validation": record.curve("val_loss")}, "Loss")
    return {
        "title": f"Run {run.get('run', record.folder.name)}",
        "notes": record.notes,
        "cards": [
            *(tested["cards"] if tested else []),
            ("validation accuracy", number_text(metrics.get("val_accuracy")), _majority(metrics)),
            ("validation loss", number_text(metrics.get("val_loss")), ""),
        ],
        "summary": [
            ("model", f"{model.get('architecture', 'unknown')}, {classes}"),
            ("image size", model.get("image_size")),
            ("data set", run.get("data")),
            ("fingerprint", run.get("dataset_fingerprint")),
            ("commit", commit.replace("-dirty", ", with changes that are in no commit")),
            ("exported epoch", metrics.get("epoch")),
            ("test images", record.evaluation.get("images") if tested else None),
        ],
        "harder": ", ".join(harder),
        "curves": [loss, charts.lines({"validation": record.curve("val_accuracy")}, "Accuracy")],
        "tested": tested,
        "time": [
            ("images a second", number_text(metrics.get("train_images_per_second"))),
            ("epochs, steps", f"{number_text(metrics.get('epochs'))}, {number_text(metrics.get('steps'))}"),
            ("seconds in all", run.get("seconds")),
            ("seconds to the first step", run.get("seconds_to_first_step")),
            ("seconds in the script", round(metrics.get("seconds", 0), 2) or None),
            ("seconds billed", run.get("billed_seconds")),
        ],
        "speed": charts.lines({"": record.curve("images_per_second")}, "Images a second"),
        "environment": [
            ("trained on", ", ".join([*where, str(run.get("device", "an unknown device"))])),
            *((name, run.get(name)) for name in ("mode", "image", "job")),
            *run.get("versions", {}).items(),
        ],
        "hyperparameters": list(settings.items()),
    }


def _tested(record: Record) -> dict[str, Any]:
    """What page.html shows of the evaluation."""
    found, metrics = record.evaluation, record.evaluation["metrics"]
    classes, confusion, per_class = [str(name) for name in found["classes"]], found["confusion"], found["per_class"]
    short = max(map(len, classes)) <= 5  # such names head the columns themselves; others go by number
    names = classes if short else [f"{number} {name}" for number, name in enumerate(classes, 1)]
    small = len(classes) <= TABLE_CLASSES
    pairs = sorted(
        ((count, row, column) for row, counts in enumerate(confusion) for column, count in enumerate(counts)
         if count and row != column), key=lambda pair: (-pair[0], *pair[1:])
    )  # fmt: skip
    ranked = sorted(range(len(classes)), key=lambda index: per_class[index]["f1"])[:ROWS]
    size = record.model.get("image_size")
    interval = f"95 %: {metrics['accuracy']['ci_low']:.4f} to {metrics['accuracy']['ci_high']:.4f}"
    return {
        "cards": [
            ("test accuracy", number_text(metrics["accuracy"]["value"]), interval + _majority(metrics, "; ")),
            ("mean F1", number_text(metrics["macro_f1"]["value"]), ""),
            ("calibration error", number_text(metrics["expected_calibration_error"]["value"]), ""),
        ],
        "images": number_text(found["images"]) if isinstance(found["images"], int) else found["images"],
        "heads": ["", *(classes if short else range(1, len(classes) + 1))],
        "matrix": small and [
            (name, [(count, f"{count / sum(counts):.3f}" if count else "") for count in counts])
            for name, counts in zip(names, confusion, strict=True)
        ],
        "map": "" if small else charts.heat_map(confusion),
        "pairs": [(names[row], names[column], f"{count} of {sum(confusion[row])}")
                  for count, row, column in pairs[:10]],
        "more": "" if len(ranked) == len(classes) else f"; the worst {ROWS} of {len(classes)}",
        "long": not short,
        "classes": [
            (names[index], [f"{row[key]:.3f}" for key in ("precision", "recall", "f1")], row["images"])
            for index in ranked for row in [per_class[index]]
        ],
        "error": f"{found['calibration']['expected_calibration_error']:.4f}",
        "error_before": "error_before" in found["calibration"] and f"{found['calibration']['error_before']:.4f}",
        "reliability": charts.reliability(found["calibration"]["bins"]),
        "tiny": isinstance(size, int) and size <= TINY,
        "mistakes": [_mistake(each) for each in found["mistakes"]],
    }  # fmt: skip


def _mistake(each: dict[str, Any]) -> dict[str, Any]:
    source = str(each["source"] or f"row {each['row']}").removeprefix(f"{each['true']}/")
    shown = {name: each[name] for name in ("true", "predicted", "jpeg")}
    return shown | {"source": source, "probability": f"{each['probability']:.3f}"}


def _majority(metrics: dict[str, Any], before: str = "") -> str:
    """What stands beside an accuracy, which says little without it; nothing where older versions did not count it."""
    share = metrics.get("majority", {})
    share = share.get("value") if isinstance(share, dict) else share
    return f"{before}majority class: {number_text(share)}" if share is not None else ""
