"""The four handlers of SageMaker's PyTorch contract, without any framework of a server.

This file is `code/inference.py` in the artifact. A host calls `model_fn` once and then, for every request,
`output_fn(predict_fn(input_fn(body, content_type), model), accept)`. Each also takes the extra `context` argument of
the PyTorch toolkit and ignores it.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

import imaging
from training.model import best_device, build_model

SCHEMA_VERSION = 1
IMAGE_TYPES = ("application/x-image", "image/jpeg", "image/png", "image/webp", "image/bmp", "image/tiff")
JSON_TYPE = "application/json"
Batch = list[NDArray[np.uint8]] | NDArray[np.float32]


class RequestError(ValueError):
    """The request cannot be answered.

    Attributes:
        status: the HTTP status that says so: 400 content, 406 accept, 413 size, 415 type.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Classifier:
    """A loaded model with what is needed to ask it."""

    model: nn.Module
    device: torch.device
    classes: list[str]
    image_size: int
    mean: list[float]
    std: list[float]


def model_fn(model_dir: str, context: Any = None) -> Classifier:
    """Load the artifact that was unpacked in `model_dir`.

    Raises:
        ValueError: when the artifact's schema is newer than this code, or weights and classes do not fit.
    """
    folder = Path(model_dir)
    facts = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    if facts["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"{folder / 'model.json'} has schema version {facts['schema_version']}; this code reads {SCHEMA_VERSION}"
        )
    device = best_device()
    model = build_model(facts["architecture"], len(facts["classes"]), facts["image_size"])
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except RuntimeError as error:
        raise ValueError(f"{folder / 'model.safetensors'} does not fit model.json: {error}") from error
    model.to(device).to(memory_format=torch.channels_last)
    return Classifier(
        model=model.eval(),
        device=device,
        classes=facts["classes"],
        image_size=facts["image_size"],
        mean=facts["preprocessing"]["mean"],
        std=facts["preprocessing"]["std"],
    )


def input_fn(body: bytes | bytearray | str, content_type: str | None = JSON_TYPE, context: Any = None) -> Batch:
    """Turn a request body into decoded images, or into a batch that is normalised already.

    Args:
        body: one encoded image, or JSON `{"instances": [...]}` with either a list of `{"b64": "..."}` or numbers
            of shape (N, 3, size, size).
        content_type: of the body.

    Raises:
        RequestError: for a type that is not supported (415) or content that cannot be read (400).
    """
    kind = (content_type or JSON_TYPE).split(";")[0].strip().lower()
    try:
        if kind in IMAGE_TYPES:
            if isinstance(body, str):
                raise RequestError(400, f"the body is text; {kind} needs the bytes of an image")
            return [imaging.decode(bytes(body))]
        if kind != JSON_TYPE:
            known = ", ".join((JSON_TYPE, *IMAGE_TYPES))
            raise RequestError(415, f"content type {content_type!r} is not supported; use one of {known}")
        return _from_json(body)
    except imaging.ImageError as error:
        raise RequestError(400, str(error)) from error


def _from_json(body: bytes | bytearray | str) -> Batch:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not valid JSON: {error}") from error
    instances = document.get("instances") if isinstance(document, dict) else None
    if not isinstance(instances, list) or not instances:
        raise RequestError(400, 'the JSON body must be {"instances": [...]} with at least one instance')
    if all(isinstance(instance, dict) and isinstance(instance.get("b64"), str) for instance in instances):
        try:
            return [imaging.decode(base64.b64decode(instance["b64"], validate=True)) for instance in instances]
        except binascii.Error as error:
            raise RequestError(400, f"an instance's b64 is not base64: {error}") from error
    try:
        batch = np.asarray(instances, dtype=np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise RequestError(400, 'instances must all be {"b64": "..."} or numbers of one shape') from error
    if not np.isfinite(batch).all():
        raise RequestError(400, "instances hold a number that is not finite in float32")
    return batch


def predict_fn(batch: Batch, classifier: Classifier, context: Any = None) -> dict[str, Any]:
    """Classify a batch.

    Args:
        batch: decoded images, uint8 (height, width, 3) each, of any size; or normalised float32 (N, 3, size, size).

    Returns:
        `predictions` (N class indices), `labels` (N names), `probabilities` (N rows, one number a class).

    Raises:
        RequestError: 400 when a normalised batch has another shape.
    """
    size = classifier.image_size
    if isinstance(batch, list):
        pixels = np.stack([imaging.fit(image, size) for image in batch])
        inputs = imaging.normalise(torch.from_numpy(pixels).to(classifier.device), classifier.mean, classifier.std)
    else:
        if batch.ndim != 4 or batch.shape[1:] != (3, size, size):
            raise RequestError(400, f"instances have shape {batch.shape}; the model takes (N, 3, {size}, {size})")
        inputs = torch.from_numpy(batch).to(classifier.device)
    with torch.inference_mode():
        probabilities = classifier.model(inputs).float().softmax(1).cpu()
    indices = probabilities.argmax(1).tolist()
    return {
        "predictions": indices,
        "labels": [classifier.classes[index] for index in indices],
        "probabilities": probabilities.tolist(),
    }


def output_fn(prediction: dict[str, Any], accept: str | None = JSON_TYPE, context: Any = None) -> tuple[str, str]:
    """Render a prediction.

    Returns:
        The body, strict JSON, and its content type.

    Raises:
        RequestError: 406 when the client does not accept JSON.
    """
    ranges = [part.split(";")[0].strip().lower() for part in (accept or "*/*").split(",")]
    if not {JSON_TYPE, "application/*", "*/*"} & set(ranges):
        raise RequestError(406, f"the answer can only be {JSON_TYPE}, which Accept {accept!r} does not name")
    return json.dumps(prediction, allow_nan=False), JSON_TYPE
