"""The HTML report of a run: one file, no script, nothing from elsewhere, rendered from the run's own files.

`make train-local` and `make evaluate` leave it beside the run; `make report` renders it again.
"""

from __future__ import annotations

import json
import math
import os
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import ROOT
from pipelines.report import charts
from pipelines.report.charts import number_text
from pipelines.report.markup import facts, save, table, text
from pipelines.terminal import UserError

NAME = "report.html"
TABLE_CLASSES = 20  # more: a heat map instead of a table
ROWS = 200  # of the table of classes
TINY = 48  # pixels a side of images that are shown with their pixels as squares
EVALUATION = {"metrics", "classes", "per_class", "confusion", "images", "calibration", "mistakes"}


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

    def curve(self, name: str) -> list[tuple[float, Any]]:
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
        except (OSError, ValueError) as error:
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
            except ValueError:
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
        with tarfile.open(folder / "model.tar.gz", "r|gz") as archive:  # in order of names: before the weights
            file = next((archive.extractfile(member) for member in archive if member.name == "model.json"), None)
            model = dictionary(file.read().decode("utf-8")) if file else {}
    except (OSError, ValueError, EOFError, tarfile.TarError) as error:
        notes.append(f"model.tar.gz cannot be read: {error}.")
    return Record(folder, run, metrics, epochs or [], evaluation, model, notes)


def attach(folder: Path) -> str:
    """Render a run's report, and say where it is. Whatever is wrong with a report, the run that it is of is good."""
    try:
        return f"report: {Path(os.path.relpath(write(folder), ROOT))}"
    except Exception as error:
        return f"no report: {error} (`make report` tries again)"


def write(folder: Path) -> Path:
    """Render `report.html` into a run's folder."""
    record = read(folder)
    sections = [*_summary(record), *_curves(record), *_evaluation(record), *_machine(record)]
    return save(folder / NAME, f"Run {record.run.get('run', folder.name)}", sections)


def _summary(record: Record) -> Iterable[str]:
    run, found, evaluation = record.run, record.evaluation.get("metrics", {}), record.evaluation
    cards = [
        ("validation accuracy", record.metrics.get("val_accuracy")),
        ("validation loss", record.metrics.get("val_loss")),
    ]
    interval = ""
    if evaluation:
        interval = f"<small>95 %: {found['accuracy']['ci_low']:.4f} to {found['accuracy']['ci_high']:.4f}</small>"
        shown = {"test accuracy": "accuracy", "mean F1": "macro_f1", "calibration error": "expected_calibration_error"}
        cards = [*((title, found[name]["value"]) for title, name in shown.items()), *cards]
    yield '<dl class="cards">' + "".join(
        f"<div><dt>{title}</dt><dd>{number_text(value)}{interval if title == 'test accuracy' else ''}</dd></div>"
        for title, value in cards
    ) + "</dl>"  # fmt: skip
    notes = list(record.notes)
    if not evaluation:
        notes.append("Not evaluated on the test split yet: `make evaluate` adds it to this page.")
    elif evaluation.get("dataset_fingerprint") != evaluation.get("model_dataset_fingerprint"):
        notes.append("The test split is of another data set than the one that the model was trained on.")
    yield "".join(f'<p class="note">{text(note)}</p>' for note in notes)
    commit = run.get("git_commit") or "none: the project is in no repository"
    yield facts([
        ("model", f"{record.model.get('architecture', 'unknown')}, {len(record.model.get('classes', []))} classes"),
        ("image size", record.model.get("image_size")),
        ("data set", run.get("data")),
        ("fingerprint", run.get("dataset_fingerprint")),
        ("commit", commit.replace("-dirty", ", with changes that are in no commit")),
        ("test images", evaluation.get("images")),
    ])  # fmt: skip


def _curves(record: Record) -> Iterable[str]:
    loss = charts.lines({"training": record.curve("train_loss"), "validation": record.curve("val_loss")}, "Loss")
    accuracy = charts.lines({"validation": record.curve("val_accuracy")}, "Accuracy")
    yield f'<h2>Learning curves</h2><div class="charts">{loss}{accuracy}</div>'


def _evaluation(record: Record) -> Iterable[str]:
    found = record.evaluation
    if not found:
        return
    classes, confusion, per_class = found["classes"], found["confusion"], found["per_class"]
    short = max(map(len, classes)) <= 5  # such names head the columns themselves; others go by number
    names = [text(name) if short else f"{number} {text(name)}" for number, name in enumerate(classes, 1)]
    yield "<h2>Confusion matrix</h2>"
    yield f'<p class="soft">True class down, predicted class across; {found["images"]:,} images.</p>'
    if len(classes) <= TABLE_CLASSES:
        heads = classes if short else [str(number) for number in range(1, len(classes) + 1)]
        rows = (
            f'<th scope="row">{name}</th>' + "".join(
                f'<td style="--v:{count / sum(counts):.3f}">{count}</td>' if count else "<td>·</td>" for count in counts
            ) for name, counts in zip(names, confusion, strict=True)
        )  # fmt: skip
        yield table(["", *heads], rows, "matrix")
    else:
        pairs = sorted(
            ((count, row, column) for row, counts in enumerate(confusion) for column, count in enumerate(counts)
             if count and row != column), key=lambda pair: (-pair[0], *pair[1:])
        )  # fmt: skip
        worst = (f'<th scope="row">{names[row]}</th><td>{names[column]}</td><td>{count} of {sum(confusion[row])}</td>'
                 for count, row, column in pairs[:10])  # fmt: skip
        yield f'<div class="charts">{charts.heat_map(confusion)}<div><p>Most often taken for another:</p>'
        yield table(["true class", "predicted class", "images"], worst, "pairs") + "</div></div>"
    ranked = sorted(range(len(classes)), key=lambda index: per_class[index]["f1"])[:ROWS]
    more = "" if len(ranked) == len(classes) else f"; the worst {ROWS} of {len(classes)}"
    yield f'<h2>Precision and recall</h2><p class="soft">By class, the lowest F1 first{more}.</p>'
    yield table(["class", "precision", "recall", "F1", "images"], (
        f'<th scope="row">{names[index]}</th>' + "".join(
            f'<td class="bar" style="--v:{row[key]:.3f}">{row[key]:.3f}</td>' for key in ("precision", "recall", "f1")
        ) + f"<td>{row['images']}</td>" for index in ranked for row in [per_class[index]]
    ), "" if short else "stack")  # fmt: skip
    error = found["calibration"]["expected_calibration_error"]
    yield f"<h2>Reliability</h2><p>Expected calibration error {error:.4f}: how far confidence is from accuracy, on the"
    yield f' average image.</p><div class="one">{charts.reliability(found["calibration"]["bins"])}</div>'
    yield "<h2>Most confident mistakes</h2>"
    tiny = " tiny" if record.model.get("image_size", math.inf) <= TINY else ""
    pictures = "".join(_picture(each) for each in found["mistakes"])
    yield f'<div class="pictures{tiny}">{pictures}</div>' if pictures else "<p>There are none.</p>"


def _picture(mistake: dict[str, Any]) -> str:
    true, predicted, source = (text(mistake[name]) for name in ("true", "predicted", "source"))
    source = source.removeprefix(f"{true}/") if mistake["source"] else f"row {mistake['row']}"
    return (
        f'<figure><img alt="An image of {true}" src="data:image/jpeg;base64,{text(mistake["jpeg"])}"><figcaption>'
        f"<bdi>{true}</bdi>, taken for <strong><bdi>{predicted}</bdi></strong> with {mistake['probability']:.3f}<br>"
        f"<small><bdi>{source}</bdi></small></figcaption></figure>"
    )


def _machine(record: Record) -> Iterable[str]:
    run, metrics = record.run, record.metrics
    speed = charts.lines({"": record.curve("images_per_second")}, "Images a second")
    yield "<h2>Throughput and time</h2>" + facts([
        ("images a second", number_text(metrics.get("train_images_per_second"))),
        ("epochs, steps", f"{number_text(metrics.get('epochs'))}, {number_text(metrics.get('steps'))}"),
        ("seconds in all", run.get("seconds")), ("to the first step", run.get("seconds_to_first_step")),
        ("of the script", round(metrics.get("seconds", 0), 2) or None), ("billed", run.get("billed_seconds")),
    ]) + f'<div class="one">{speed}</div>'  # fmt: skip
    yield "<h2>Environment</h2>" + facts([
        ("instances, ranks", f"{run.get('instances', 1)}, {metrics.get('world_size', 1)}"),
        *((name, run.get(name)) for name in ("mode", "image", "job", "device")), *run.get("versions", {}).items(),
    ])  # fmt: skip
    yield "<h2>Hyperparameters</h2>" + facts(run.get("hyperparameters", {}).items())
