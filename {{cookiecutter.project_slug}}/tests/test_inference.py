"""The artifact and its handlers: complete, checked, and independent of everything but its own few packages."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import imaging
from inference import inference
from inference.export import checksums, write_artifact
from model import build_model
from pipelines import runs
from tests.helpers import CLASSES, draw
from training.config import Hyperparameters, resolve
from training.data import load_channels
from training.distributed import World
from training.loop import fit


@pytest.fixture(scope="module")
def artifact(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of a short training run."""
    folder = tmp_path_factory.mktemp("artifact") / "model"
    splits = load_channels(packed / "train", packed / "validation")
    settled = resolve(Hyperparameters(epochs=15, batch_size=16, precision="fp32"), 12, len(splits[0]))
    torch.manual_seed(0)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    model, _ = fit(build_model("cnn", 3, 12), *splits, settled, world)
    write_artifact(folder, model, settled, splits[1], {"val_accuracy": 1.0}, "abc")
    return folder


@pytest.fixture(scope="module")
def archive(artifact: Path) -> Path:
    """The same, packed."""
    runs.pack(artifact, artifact.parent / "model.tar.gz")
    return artifact.parent / "model.tar.gz"


@pytest.fixture(scope="module")
def classifier(artifact: Path) -> inference.Classifier:
    return inference.model_fn(str(artifact))


def photo(label: str = "up") -> bytes:
    return imaging.encode_png(np.asarray(draw(label, 1000)))


def test_artifact_holds_what_the_design_says(artifact: Path) -> None:
    files = sorted(path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if path.is_file())
    code = ["bounds", "imaging", "inference", "model", "payload", "spelling"]
    assert files == sorted(["baseline.json", "golden.json", "model.json", "model.safetensors", "code/requirements.txt",
                            *(f"code/{name}.py" for name in code)])  # fmt: skip
    facts = json.loads((artifact / "model.json").read_text())
    assert facts["classes"] == list(CLASSES)
    assert (facts["architecture"], facts["image_size"], facts["git_commit"]) == ("cnn", 12, "abc")
    assert facts["files"] == checksums(artifact)
    baseline = json.loads((artifact / "baseline.json").read_text())
    assert sum(baseline["predictions"].values()) == sum(baseline["confidence"]["counts"]) == 9


def test_handlers_answer_every_kind_of_request_alike(classifier: inference.Classifier) -> None:
    body = photo("left")
    pixels = torch.from_numpy(np.array(draw("left", 1000)))[None]
    numbers = imaging.normalise(pixels, classifier.mean, classifier.std).tolist()
    requests: list[tuple[Any, str | None]] = [
        (body, "application/x-image"),
        (bytearray(body), "image/png"),
        (body, "Image/PNG; charset=binary"),
        (json.dumps({"instances": [{"b64": base64.b64encode(body).decode()}]}), "application/json"),
        (json.dumps({"instances": numbers}).encode(), None),
    ]
    answers = []
    for data, kind in requests:
        batch = inference.input_fn(data, kind, None)
        text, answered = inference.output_fn(inference.predict_fn(batch, classifier, None), "*/*", None)
        assert answered == "application/json"
        answers.append(json.loads(text))
    for answer in answers:
        assert answer["labels"] == ["left"]
        assert answer["predictions"] == [1]
        assert answer["probabilities"][0] == pytest.approx(answers[0]["probabilities"][0], abs=1e-5)
        assert sum(answer["probabilities"][0]) == pytest.approx(1, abs=1e-5)


def test_a_batch_of_several_sizes_keeps_its_order(classifier: inference.Classifier) -> None:
    order = ["up", "down", "left", "down"]
    images = [np.asarray(draw(label, 7, size)) for label, size in zip(order, (12, 40, 64, 24), strict=True)]
    instances = [{"b64": base64.b64encode(imaging.encode_png(image)).decode()} for image in images]
    batch = inference.input_fn(json.dumps({"instances": instances}))
    assert inference.predict_fn(batch, classifier)["labels"] == order
