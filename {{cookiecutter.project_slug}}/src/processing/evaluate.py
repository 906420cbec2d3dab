"""Evaluate an artifact on a packed split, through the artifact's own handlers.

    python src/processing/evaluate.py --artifact artifacts/latest/model.tar.gz --data data/digits/test \
        --output evaluation.json

`evaluation.json` holds `{"metrics": {"accuracy": {"value": 0.98, "ci_low": 0.96, "ci_high": 0.99}, ...}}`, the
confusion matrix, reliability bins, the most confident mistakes with their pictures, and what was evaluated.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the source root, instead of this script's folder

from inference.artifact import Artifact, ArtifactError, open_artifact
from progress import plain, progress, several
from scores import advice, summary, wilson

BATCH = 64
BINS = 15  # of the reliability diagram, as in the paper
MISTAKES, PIXELS = 24, 96  # pictures that are kept, and their longest side: at most 0.6 MB in all
DESCRIBED = ("model.json", "baseline.json")


class EvaluationError(ValueError):
    """Artifact and data do not fit together; the message says how and what to do."""


def evaluate(artifact: Artifact, data: Path) -> dict[str, Any]:
    """Classify every image of a packed split.

    Args:
        artifact: opened by `open_artifact`.
        data: a split's folder.

    Returns:
        The content of `evaluation.json`. `confusion[i][j]` counts images of class i that were called j.

    Raises:
        EvaluationError: when there is no packed split, no image, or another set of classes.
    """
    try:  # not through training.data: `training` is the artifact's own package here
        info = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
        shards = [(np.load(path, mmap_mode="r"), np.load(data / path.name.replace("images", "labels")))
                  for path in sorted(data.glob("images-*.npy"))]  # fmt: skip
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{data} is no packed split ({error}); make one with `make data`") from error
    classes = artifact.facts["classes"]
    if info["classes"] != classes:
        raise EvaluationError(
            f"the model knows the classes {classes}, the data set has {info['classes']}; "
            "evaluate a run on the data set that it was trained on"
        )
    if not shards:
        raise EvaluationError(f"{data} holds no image; add images to the data set and pack it again")
    labels, probabilities = [], []
    with progress(sum(len(targets) for _, targets in shards), "evaluating") as tick:
        for images, targets in shards:
            for first in range(0, len(targets), BATCH):
                batch = list(np.asarray(images[first : first + BATCH]))
                probabilities += artifact.handlers.predict_fn(batch, artifact.model)["probabilities"]
                tick(len(batch))
            labels += targets.tolist()
    truth, scores = np.array(labels), np.array(probabilities)
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusion, (truth, scores.argmax(1)), 1)
    reliability = calibration(truth, scores)
    before = scores ** artifact.facts.get("temperature", 1.0)  # what they were without it, but for a factor
    plainly = calibration(truth, before / before.sum(1, keepdims=True))
    reliability["error_before"] = plainly["expected_calibration_error"]
    sources = info["rows"].get(data.resolve().name, [])  # none where somebody renamed the split's folder
    found = metrics(truth, scores, confusion)
    return {
        "warning": advice(found["accuracy"]["value"], found["majority"]["value"], len(truth)),
        "metrics": found | {"expected_calibration_error": {"value": reliability["expected_calibration_error"]}},
        "classes": classes,
        "per_class": per_class(classes, confusion),
        "confusion": confusion.tolist(),
        "calibration": reliability,
        "mistakes": mistakes(truth, scores, classes, sources, [images for images, _ in shards]),
        "images": len(truth),
        "dataset_fingerprint": info["fingerprint"],
        "model_dataset_fingerprint": artifact.facts["dataset_fingerprint"],
    }


def metrics(
    truth: NDArray[np.int64], scores: NDArray[np.float64], confusion: NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    """Accuracy with its 95 % interval, what `scores.summary` tells, cross-entropy, and means over the classes.

    Args:
        truth: labels, (N,).
        scores: probabilities, (N, classes).
        confusion: counts, true class by predicted class.
    """
    correct = int(np.trace(confusion))
    low, high = wilson(correct, len(truth))
    chosen = np.clip(scores[np.arange(len(truth)), truth], 1e-12, 1.0)
    rows = [row for row in per_class([""] * len(confusion), confusion) if row["images"]]
    hidden = summary(*(counts.tolist() for counts in (np.diag(confusion), confusion.sum(1), confusion.sum(0))))
    return {
        "accuracy": {"value": correct / len(truth), "ci_low": low, "ci_high": high},
        "majority": {"value": hidden["majority"]},
        "cross_entropy": {"value": float(-np.log(chosen).mean())},
        "macro_precision": {"value": float(np.mean([row["precision"] for row in rows]))},
        "macro_recall": {"value": float(np.mean([row["recall"] for row in rows]))},
        "macro_f1": {"value": hidden["f1"]},
        "worst_recall": {"value": hidden["worst_recall"]},
    }


def per_class(classes: Sequence[str], confusion: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Precision, recall and F1 of every class; 0 where a class was never predicted or has no image."""
    hits, actual, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    return [
        {
            "class": name,
            "images": int(actual[index]),
            "precision": float(hits[index] / max(predicted[index], 1)),
            "recall": float(hits[index] / max(actual[index], 1)),
            "f1": float(2 * hits[index] / max(predicted[index] + actual[index], 1)),
        }
        for index, name in enumerate(classes)
    ]


def calibration(truth: NDArray[np.int64], scores: NDArray[np.float64]) -> dict[str, Any]:
    """How far confidence is from accuracy: in bins of confidence, and weighted by their images over all of them.

    The second is the expected calibration error (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).
    """
    confidence, correct = scores.max(1), scores.argmax(1) == truth
    place = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    images = np.bincount(place, minlength=BINS)
    hits, sums = np.bincount(place, correct, BINS), np.bincount(place, confidence, BINS)
    return {
        "expected_calibration_error": float(np.abs(hits - sums).sum() / len(truth)),
        "bins": [
            {"low": at / BINS, "high": (at + 1) / BINS, "images": int(images[at]),
             "confidence": float(sums[at] / images[at]), "accuracy": float(hits[at] / images[at])}
            for at in np.flatnonzero(images).tolist()
        ],
    }  # fmt: skip


def mistakes(
    truth: NDArray[np.int64], scores: NDArray[np.float64], classes: Sequence[str], sources: Sequence[str],
    shards: Sequence[NDArray[np.uint8]],
) -> list[dict[str, Any]]:  # fmt: skip
    """The mistakes that the model was surest of, with the images as the model saw them."""
    predicted, confidence = scores.argmax(1), scores.max(1)
    wrong = np.flatnonzero(predicted != truth)
    starts = np.cumsum([0, *map(len, shards)])
    found = []
    for row in wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES].tolist():
        shard = int(np.searchsorted(starts, row, side="right")) - 1
        picture, file = Image.fromarray(np.asarray(shards[shard][row - starts[shard]])), io.BytesIO()
        picture.thumbnail((PIXELS, PIXELS))
        picture.save(file, "JPEG", quality=90, subsampling=0)
        found.append({
            "row": row, "source": sources[row] if len(sources) == len(truth) else None,
            "true": classes[truth[row]], "predicted": classes[predicted[row]],
            "probability": float(confidence[row]), "probability_of_true": float(scores[row, truth[row]]),
            "jpeg": base64.b64encode(file.getvalue()).decode("ascii"),
        })  # fmt: skip
    return found


def describe(artifact: Artifact, evaluation: Path) -> None:
    """Put what a model package says of an artifact beside its evaluation: files, and one-line facts, for JSON texts."""
    copies = [shutil.copyfile(artifact.folder / file, evaluation.with_name(file)) for file in DESCRIBED]
    said = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in (evaluation, *copies)}
    said |= {key: str(artifact.facts[key]) for key in ("architecture", "image_size", "torch_version")}
    said["classes"] = json.dumps(", ".join(artifact.facts["classes"])[:1000])[1:-1]
    evaluation.with_name("package.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Evaluate an artifact on a packed split.")
    parser.add_argument("--artifact", type=Path, required=True, help="model.tar.gz of a run")
    parser.add_argument("--data", type=Path, required=True, help="folder of a packed split")
    parser.add_argument("--output", type=Path, required=True, help="where evaluation.json is written")
    parser.add_argument("--describe", action="store_true", help="put what a model package says of it beside the output")
    options = parser.parse_args(arguments)
    try:
        with open_artifact(options.artifact) as artifact:
            result = evaluate(artifact, options.data)
            options.output.write_text(json.dumps(result, allow_nan=False) + "\n", encoding="utf-8")
            if options.describe:
                describe(artifact, options.output)
    except (ArtifactError, EvaluationError) as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    accuracy, majority = result["metrics"]["accuracy"], result["metrics"]["majority"]["value"]
    print(
        f"accuracy {accuracy['value']:.4f} (95 % interval {accuracy['ci_low']:.4f} to {accuracy['ci_high']:.4f}) "
        f"on {several(result['images'], 'image')}\nmajority class {majority:.4f}: the accuracy of always naming it"
    )
    names = [plain(name) for name in result["classes"]]
    width = max(map(len, ["class", *names]))
    print(f"{'class':{width}}  images  precision  recall     f1")
    for name, row in zip(names, result["per_class"], strict=True):
        scores = f"{row['precision']:9.3f}  {row['recall']:6.3f}  {row['f1']:5.3f}"
        print(f"{name:{width}}  {row['images']:6}  {scores}")
    if result["warning"]:
        print(textwrap.fill(f"warning: {result['warning']}", 79))
    return 0


if __name__ == "__main__":
    sys.exit(main())
