"""Write the artifact: everything that serving needs, in one folder that the platform packs into `model.tar.gz`."""

from __future__ import annotations

import ast
import base64
import copy
import hashlib
import json
import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import imaging
from inference import inference
from model import TIMM, ModelError, own_file
from training.calibrate import BATCH, answers, temperature
from training.config import Hyperparameters
from training.data import Split
from training.distributed import World

GOLDEN_SAMPLES = 4
BASELINE_IMAGES = 2048  # at most, of the validation split
BINS = 20
SOURCE = Path(__file__).resolve().parent.parent
# From the source tree to `code/`. No folder there may be called `inference`: it would hide inference.py.
CODE = {
    "inference/inference.py": "inference.py",
    "inference/requirements.txt": "requirements.txt",
    "bounds.py": "bounds.py",
    "imaging.py": "imaging.py",
    "payload.py": "payload.py",
    "spelling.py": "spelling.py",
    "model.py": "model.py",
}


def write_artifact(
    folder: Path,
    model: nn.Module,
    hyperparameters: Hyperparameters,
    validation: Split,
    metrics: dict[str, Any],
    git_commit: str | None,
    logits: torch.Tensor | None = None,
) -> None:
    """Write `model.safetensors`, `code/`, `golden.json`, `baseline.json` and last `model.json` with their checksums.

    The golden samples are answers of the written files through the handlers that will serve them, so an artifact that
    cannot be loaded never leaves this function. `logits` are what all ranks found for the validation split, None means
    that they are found here.
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
    for own in modules(own_file(hyperparameters.model) or SOURCE / "model.py"):
        shutil.copyfile(own, folder / "code" / own.name)
    if hyperparameters.model.startswith(TIMM):
        with (folder / "code" / "requirements.txt").open("a", encoding="utf-8") as file:
            file.write("timm>=1,<2\n")
    facts: dict[str, Any] = {
        "schema_version": inference.SCHEMA_VERSION,
        "architecture": hyperparameters.model,
        "model_options": hyperparameters.model_options,
        "classes": validation.classes,
        "image_size": validation.image_size,
        "preprocessing": {
            "mean": validation.info["mean"],
            "std": validation.info["std"],
            "colour": "RGB",
            "fit": "largest centred square, bilinear with antialiasing",
            "background": list(imaging.BACKGROUND),
            "deep": validation.info.get("deep", imaging.DEEP),
        },
        "torch_version": torch.__version__,
        "metrics": metrics,
        "git_commit": git_commit,
        "dataset_fingerprint": validation.info["fingerprint"],
    }
    classifier = inference.load(folder, facts)
    if logits is None:
        logits = answers(classifier.model, validation, World(0, 1, classifier.device))
    shape, wanted = tuple(logits.shape[1:]), len(validation.classes)
    if shape != (wanted,):
        raise ValueError(f"it answers with shape {shape}, and there are {wanted} classes")
    facts["temperature"] = temperature(logits, torch.from_numpy(validation.labels))
    classifier = replace(classifier, temperature=facts["temperature"])
    write_json(folder / "golden.json", golden(classifier, validation))
    write_json(folder / "baseline.json", baseline(classifier, validation, logits[:BASELINE_IMAGES]))
    write_json(folder / "model.json", facts | {"files": checksums(folder)})
    inference.model_fn(str(folder))


def modules(first: Path) -> list[Path]:
    """A file of `src/`, and those beside it that it imports, wherever in it, and that these import."""
    found = [first]
    for file in found:  # which grows
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
        beside = [SOURCE / f"{name}.py" for name in names]
        found += [path for path in dict.fromkeys(beside) if path.is_file() and path not in found]
    return found


def rehearse(model: nn.Module, hyperparameters: Hyperparameters, validation: Split, alone: bool) -> None:
    """Write, load and ask an artifact of a model that is not trained, and show it a batch: what fails, fails now.

    Args:
        model: is left as it is.
        hyperparameters: with every `auto` resolved.
        validation: of which a few images are used.
        alone: whether a batch may have one image only.

    Raises:
        ModelError: the model cannot be trained on such images, or its artifact cannot be served.
    """
    size = validation.image_size
    try:
        with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
            few = replace(validation, labels=validation.labels[:GOLDEN_SAMPLES])
            write_artifact(Path(folder), model, hyperparameters, few, {}, None)
        rows = torch.zeros(1 if alone else 2, 3, size, size)
        nn.functional.cross_entropy(copy.deepcopy(model).train()(rows), torch.zeros(len(rows), dtype=torch.long))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if "more than 1 value per channel" in str(error):
            reason = "its batch normalisation needs more than one image a process at a time; set a larger batch_size"
        else:
            reason = f"cannot be trained and served with {size}x{size} images: {str(error)[:300]}"
        raise ModelError(f"model {hyperparameters.model!r}: {reason}") from error


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


def baseline(classifier: inference.Classifier, split: Split, logits: torch.Tensor) -> dict[str, Any]:
    """How predictions and images are distributed on the first rows of a split, for monitoring to compare with."""
    prediction = inference.answer(logits, classifier)
    looks: dict[str, list[float]] = {"brightness": [], "contrast": []}
    for first in range(0, len(logits), BATCH):
        images = split.pixels(np.arange(first, min(first + BATCH, len(logits))))
        for name, values in imaging.image_statistics(images).items():
            looks[name] += values
    labels = Counter(prediction["labels"])
    return {
        "schema_version": 1,
        "images": len(logits),
        "predictions": {name: labels[name] for name in classifier.classes},
        "confidence": _histogram([max(row) for row in prediction["probabilities"]], 1.0),
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
