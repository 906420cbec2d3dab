"""Write the artifact: everything that serving needs, in one folder that the platform packs into `model.tar.gz`."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import imaging
from inference import inference
from training.config import Hyperparameters
from training.data import Split

GOLDEN_SAMPLES = 4
BASELINE_IMAGES = 2048  # at most, of the validation split
BINS = 20
SOURCE = Path(__file__).resolve().parent.parent
# From the source tree to `code/`. No folder there may be called `inference`: it would hide inference.py.
CODE = {
    "inference/inference.py": "inference.py",
    "inference/requirements.txt": "requirements.txt",
    "imaging.py": "imaging.py",
    "payload.py": "payload.py",
    "model.py": "model.py",
}


def write_artifact(
    folder: Path,
    model: nn.Module,
    hyperparameters: Hyperparameters,
    validation: Split,
    metrics: dict[str, Any],
    git_commit: str | None,
) -> None:
    """Write `model.safetensors`, `code/`, `golden.json`, `baseline.json` and last `model.json` with their checksums.

    The golden samples and the baseline are answers of the written files through the handlers that will serve them, so
    an artifact that cannot be loaded never leaves this function.
    """
    shutil.rmtree(folder / "code", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)  # it is the owner's alone, and a local container's owner is root
    for source, target in CODE.items():
        path = folder / "code" / target
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SOURCE / source, path)
    facts = {
        "schema_version": inference.SCHEMA_VERSION,
        "architecture": hyperparameters.model,
        "classes": validation.classes,
        "image_size": validation.image_size,
        "preprocessing": {
            "mean": validation.info["mean"],
            "std": validation.info["std"],
            "colour": "RGB",
            "fit": "largest centred square, bilinear with antialiasing",
            "background": list(imaging.BACKGROUND),
        },
        "torch_version": torch.__version__,
        "metrics": metrics,
        "git_commit": git_commit,
        "dataset_fingerprint": validation.info["fingerprint"],
    }
    classifier = inference.load(folder, facts)
    write_json(folder / "golden.json", golden(classifier, validation))
    write_json(folder / "baseline.json", baseline(classifier, validation))
    write_json(folder / "model.json", facts | {"files": checksums(folder)})
    inference.model_fn(str(folder))


def golden(classifier: inference.Classifier, split: Split) -> dict[str, Any]:
    """A few encoded images, of different classes where possible, with the probabilities that they must give."""
    _, firsts = np.unique(split.labels, return_index=True)
    rows = np.concatenate([firsts, np.setdiff1d(np.arange(len(split)), firsts)])[:GOLDEN_SAMPLES]
    samples = []
    for image in split.pixels(rows):
        body = imaging.encode_png(image)
        prediction = inference.classify([imaging.decode(body)], classifier)
        samples.append(
            {
                "content_type": "image/png",
                "body": base64.b64encode(body).decode("ascii"),
                "label": prediction["labels"][0],
                "probabilities": prediction["probabilities"][0],
            }
        )
    return {"schema_version": 1, "samples": samples}


def baseline(classifier: inference.Classifier, split: Split) -> dict[str, Any]:
    """How predictions and images are distributed on the validation split, for monitoring to compare with."""
    rows = np.arange(min(len(split), BASELINE_IMAGES))
    labels: Counter[str] = Counter()
    confidence: list[float] = []
    looks: dict[str, list[float]] = {"brightness": [], "contrast": []}
    for first in range(0, len(rows), 64):
        images = split.pixels(rows[first : first + 64])
        prediction = inference.classify(list(images), classifier)
        labels.update(prediction["labels"])
        confidence += [max(row) for row in prediction["probabilities"]]
        for name, values in imaging.image_statistics(images).items():
            looks[name] += values
    return {
        "schema_version": 1,
        "images": len(rows),
        "predictions": {name: labels[name] for name in classifier.classes},
        "confidence": _histogram(confidence, 1.0),
        "brightness": _histogram(looks["brightness"], 1.0),
        "contrast": _histogram(looks["contrast"], 0.5),
    }


def _histogram(values: list[float], high: float) -> dict[str, Any]:
    edges = np.linspace(0.0, high, BINS + 1).tolist()
    return {"edges": edges, "counts": imaging.counted(values, edges)}


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an unpacked artifact except `model.json`, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / "model.json")
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write strict JSON, for people too.

    Raises:
        ValueError: when a number in it is not finite.
    """
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
