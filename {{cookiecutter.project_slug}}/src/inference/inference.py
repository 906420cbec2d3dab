"""The four handlers of SageMaker's PyTorch contract, without any framework of a server.

This file is `code/inference.py` in the artifact. A host calls `model_fn` once and then, for every request,
`output_fn(predict_fn(input_fn(body, content_type), model), accept)`. Each also takes the extra `context` argument of
the PyTorch toolkit: where that can set the status of the response, a request that cannot be answered gets its 4xx
through it; elsewhere `RequestError` is raised.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

import imaging
import payload
import spelling
from bounds import NoRoom
from model import best_device, build_model, load_tensors
from payload import JSON_TYPE, Batch, RequestError

SCHEMA_VERSION = 1
TAKES_FILES = True  # a host that keeps a large body in a file hands that on to `input_fn`
GOLDEN_TOLERANCE = 0.02  # of a probability: bf16 and other hardware stay within it


@dataclass(frozen=True)
class Classifier:
    """A loaded model with what is needed to ask it."""

    model: nn.Module
    device: torch.device
    classes: list[str]
    image_size: int
    mean: list[float]
    std: list[float]
    temperature: float = 1.0
    deep: Sequence[int] = imaging.DEEP
    bf16: bool = False


@dataclass(frozen=True)
class Refusal:
    """Takes the place of a request that cannot be answered, where its status is set already."""

    message: str


def model_fn(model_dir: str, context: Any = None) -> Classifier:
    """Load the artifact that was unpacked in `model_dir`, after checking it.

    The environment variables INFERENCE_PRECISION (fp32, bf16) and INFERENCE_COMPILE (no, yes: by torch.compile, which
    needs a C++ compiler and makes the start longer) say how it computes.

    Raises:
        ValueError: when a file is missing or does not match its checksum, the artifact's schema is another one,
            weights and classes do not fit, or the golden samples get other answers than when they were made.
    """
    folder = Path(model_dir)
    classifier = replace(load(folder, verify(folder)), bf16=_setting("INFERENCE_PRECISION", "fp32", "bf16"))
    payload.takes(classifier.image_size)
    if _setting("INFERENCE_COMPILE", "no", "yes"):
        classifier.model.compile()
    _check_golden(folder, classifier)
    return classifier


def _setting(name: str, default: str, other: str) -> bool:
    """Whether an environment variable has the other of its two values."""
    value = os.environ.get(name, default)
    if value not in (default, other):
        raise ValueError(f"the environment variable {name} is {value!r}; set it to {default} or {other}")
    return value == other


def verify(folder: Path) -> dict[str, Any]:
    """Compare every file with the checksums in `model.json` and return its content."""
    try:
        facts: dict[str, Any] = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        version, expected = facts["schema_version"], facts["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError("model.json is missing or broken") from error
    if version != SCHEMA_VERSION:
        raise ValueError(f"model.json has schema version {version}; this code reads {SCHEMA_VERSION}")
    for name, digest in expected.items():
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{name} is missing or does not match its checksum")
    return facts


def load(folder: Path, facts: Mapping[str, Any]) -> Classifier:
    """Build the model that `facts`, the content of `model.json`, describe, and load its weights."""
    device = best_device()
    options = facts.get("model_options")  # older artifacts have neither these nor a temperature
    model = build_model(facts["architecture"], len(facts["classes"]), facts["image_size"], options)
    try:
        load_tensors(model, load_file(folder / "model.safetensors"))
    except RuntimeError as error:
        raise ValueError(
            f"model.safetensors does not fit model.json, which names {facts['architecture']} for "
            f"{len(facts['classes'])} classes: {error}"
        ) from error
    model.to(device).to(memory_format=torch.channels_last)
    return Classifier(
        model=model.eval(),
        device=device,
        classes=facts["classes"],
        image_size=facts["image_size"],
        mean=facts["preprocessing"]["mean"],
        std=facts["preprocessing"]["std"],
        temperature=facts.get("temperature", 1.0),
        deep=facts["preprocessing"].get("deep", imaging.DEEP),
    )


def _check_golden(folder: Path, classifier: Classifier) -> None:
    """Ask the golden samples, each alone and then all at once, which also warms the model up for both."""
    samples = json.loads((folder / "golden.json").read_text(encoding="utf-8"))["samples"]
    images = [imaging.decode(base64.b64decode(sample["body"])) for sample in samples]
    alone = [classify([image], classifier) for image in images]
    together = classify(images, classifier)
    for number, sample in enumerate(samples):
        for answer, place in ((alone[number], 0), (together, number)):
            label, found = answer["labels"][place], answer["probabilities"][place]
            difference = max(abs(a - b) for a, b in zip(sample["probabilities"], found, strict=True))
            if label != sample["label"] or difference > GOLDEN_TOLERANCE:
                raise ValueError(
                    f"golden sample {number} was {sample['label']!r} and is {label!r} here, with a probability "
                    f"{difference:.3f} apart (allowed: {GOLDEN_TOLERANCE}); weights or libraries are not those that "
                    "the artifact was made with"
                )


def input_fn(
    body: bytes | bytearray | str | IO[bytes], content_type: str | None = JSON_TYPE, context: Any = None
) -> Any:
    """Turn a request body into decoded images, or into a batch that is normalised already.

    Args:
        body: one encoded image; or JSON `{"instances": [...]}` with either a list of `{"b64": "..."}` or numbers
            of shape (N, 3, size, size); or such numbers as a .npy file.
        content_type: of the body. Its first bytes count for more, so this is asked only where they say nothing.

    Raises:
        RequestError: for a type that is not supported (415), too much (413), or content that cannot be read (400).
    """
    try:
        return payload.read(body, content_type)
    except RequestError as error:
        return _refuse(error, context)
    except NoRoom as error:
        return _refuse(RequestError(503, str(error)), context)


def _refuse(error: RequestError, context: Any) -> Refusal:
    """Set the status where the host lets a handler do so; elsewhere raise."""
    if not hasattr(context, "set_response_status"):
        try:
            raise error
        finally:
            del error  # whose traceback holds this call: the body would stay until the garbage collector comes
    context.set_response_status(code=error.status, phrase=HTTPStatus(error.status).phrase, idx=0)
    return Refusal(str(error))


def predict_fn(batch: Batch | Refusal, classifier: Classifier, context: Any = None) -> Any:
    """Classify a batch.

    Args:
        batch: decoded images, of `imaging.decode`, of any size; or normalised float32 (N, 3, size, size).

    Returns:
        `predictions` (N class indices), `labels` (N names), `probabilities` (N rows, one number a class), and
        `classes`: the names of a row's numbers, in their order; a tuple, because it is said once for all images.

    Raises:
        RequestError: 400 when a normalised batch has another shape, or numbers that the model has no answer to.
    """
    if isinstance(batch, Refusal):
        return batch
    try:
        return classify(batch, classifier)
    except RequestError as error:
        return _refuse(error, context)


def fit(batch: Batch, classifier: Classifier) -> Batch:
    """Bring images to the model's size. A host may do so itself before requests wait: what waits is small then."""
    size, deep = classifier.image_size, classifier.deep
    return [imaging.fit(image, size, deep) for image in batch] if isinstance(batch, list) else batch


def logits(batch: Batch, classifier: Classifier) -> torch.Tensor:
    """What the model says of a batch: float32 (N, classes), on its device; arguments and errors are `predict_fn`'s."""
    size, batch = classifier.image_size, fit(batch, classifier)
    if isinstance(batch, list):
        pixels = np.stack(batch)
        inputs = imaging.normalise(torch.from_numpy(pixels).to(classifier.device), classifier.mean, classifier.std)
    else:
        if batch.shape[1:] != (3, size, size):
            raise RequestError(400, f"instances have shape {batch.shape}; the model takes (N, 3, {size}, {size})")
        white = max((1 - mean) / std for mean, std in zip(classifier.mean, classifier.std, strict=True))
        if batch.min() >= 0 and batch.max() > 10 * white:  # as of pixels from 0 to 255, whose answer would be wrong
            seen = f"instances have numbers up to {batch.max():g} where white is {white:.2f}"
            raise RequestError(400, f"{seen}; send the picture itself, or (pixel / 255 - mean) / std")
        inputs = torch.from_numpy(batch).to(classifier.device, memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast(classifier.device.type, torch.bfloat16, enabled=classifier.bf16):
        answers: torch.Tensor = classifier.model(inputs).float()
    return answers


def classify(batch: Batch, classifier: Classifier) -> dict[str, Any]:
    """What `predict_fn` does, without a context."""
    return answer(logits(batch, classifier), classifier)


def answer(found: torch.Tensor, classifier: Classifier) -> dict[str, Any]:
    """What follows from logits. The temperature makes of a model's confidence how often it is right.

    See Guo et al., "On Calibration of Modern Neural Networks", ICML 2017; `training/calibrate.py` finds it.
    """
    probabilities = (found / classifier.temperature).softmax(1).cpu()
    if not bool(probabilities.isfinite().all()):
        raise RequestError(400, "the model has no finite answer to these instances; are they normalised?")
    indices = probabilities.argmax(1).tolist()
    return {
        "predictions": indices,
        "labels": [classifier.classes[index] for index in indices],
        "probabilities": probabilities.tolist(),
        "classes": tuple(classifier.classes),
    }


def output_fn(
    prediction: dict[str, Any] | Refusal, accept: str | None = JSON_TYPE, context: Any = None
) -> tuple[str, str]:
    """Render a prediction.

    Args:
        prediction: of `predict_fn`.
        accept: the media ranges that the client accepts, by RFC 9110 (12.5.1); None or empty: any.

    Returns:
        The body, strict JSON, and its content type.

    Raises:
        RequestError: 406 when the client does not accept JSON.
    """
    if not isinstance(prediction, Refusal) and not spelling.accepts(accept):
        known = (accept or "")[:80]
        refusal = RequestError(406, f"the answer can only be {JSON_TYPE}, which Accept {known!r} does not allow")
        prediction = _refuse(refusal, context)
    if isinstance(prediction, Refusal):
        return json.dumps({"error": prediction.message}), JSON_TYPE
    return json.dumps(prediction, allow_nan=False), JSON_TYPE
