"""What is served is what was trained: original files over HTTP, the packed split in process, the training network."""

from __future__ import annotations

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imaging import normalise
from inference.artifact import open_artifact
from inference.export import write_artifact
from model import build_model
from pipelines import runs
from pipelines.local import serve as serve_local
from processing.evaluate import evaluate
from processing.preprocess import pack
from tests.helpers import CLASSES, free_port
from training.config import Hyperparameters, resolve
from training.data import load_channels
from training.distributed import World
from training.loop import fit

SIZE = 16


def hard(label: int, number: int) -> bytes:
    """A picture of some size, colour mode and format, noisy enough for a model to be wrong now and then."""
    random = np.random.default_rng([label, number])
    height, width = random.integers(20, 60, 2)
    pixels = random.normal(110, 70, (height, width, 3))
    pixels[: height // 2] += 8 * label
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    kind = ("JPEG", "PNG", "WEBP")[number % 3]
    if number % 3 == 1:
        picture = picture.convert(("L", "RGBA", "P")[number % 5 % 3])
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def centred(probabilities: Any) -> Any:
    """Logits up to a constant an image."""
    logs = np.log(np.asarray(probabilities, np.float64))
    return logs - logs.mean(1, keepdims=True)


def test_original_files_over_http_score_like_the_packed_split(tmp_path: Path) -> None:
    raw, data, model_folder = tmp_path / "raw", tmp_path / "data", tmp_path / "model"
    for index, label in enumerate(CLASSES):
        (raw / label).mkdir(parents=True)
        for number in range(100):
            (raw / label / f"{number}.{('jpg', 'png', 'webp')[number % 3]}").write_bytes(hard(index, number))
    pack(raw, data, size=SIZE)
    splits = load_channels(data / "train", data / "validation")
    settled = resolve(Hyperparameters(epochs=6, batch_size=32, precision="fp32"), SIZE, len(splits[0]))
    torch.manual_seed(0)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    model, _ = fit(build_model("cnn", 3, SIZE), *splits, settled, world)
    write_artifact(model_folder, model, settled, splits[1], {}, None)
    runs.pack(model_folder, tmp_path / "model.tar.gz")

    info = json.loads((data / "test" / "dataset.json").read_text())
    files = [raw / name for name in info["rows"]["test"]]
    pixels = np.concatenate([np.load(path) for path in sorted((data / "test").glob("images-*.npy"))])
    truth = [info["classes"].index(path.parent.name) for path in files]
    with torch.inference_mode():
        model.eval().to(memory_format=torch.channels_last)
        logits = model(normalise(torch.from_numpy(pixels), info["mean"], info["std"])).double().numpy()
    with open_artifact(tmp_path / "model.tar.gz") as artifact:
        accuracy = evaluate(artifact, data / "test")["metrics"]["accuracy"]["value"]
        logits /= artifact.facts["temperature"]  # of what is served
    assert 0.4 < accuracy < 1.0, "a test that no model fails says nothing"

    port = free_port()
    with serve_local.server(tmp_path / "model.tar.gz", None, port):

        def ask(path: Path) -> Any:
            status, body = serve_local.ask(port, "POST", "/invocations", path.read_bytes())
            assert status == 200, body
            return json.loads(body)

        alone = [ask(path) for path in files]
        with ThreadPoolExecutor(8) as pool:  # merged by the server
            merged = list(pool.map(ask, files))
        instances = [{"b64": base64.b64encode(path.read_bytes()).decode()} for path in files]
        body = json.dumps({"instances": instances}).encode()
        status, answer = serve_local.ask(port, "POST", "/invocations", body, "application/json")
        together = json.loads(answer)
    assert status == 200
    assert float(np.mean([one["predictions"][0] == label for one, label in zip(alone, truth, strict=True)])) == accuracy
    served = [one["probabilities"][0] for one in alone]
    assert np.abs(centred(served) - (logits - logits.mean(1, keepdims=True))).max() < 1e-5
    for other in ([one["probabilities"][0] for one in merged], together["probabilities"]):
        assert np.abs(np.asarray(served) - np.asarray(other)).max() < 1e-5
    assert together["predictions"] == [one["predictions"][0] for one in alone]


def test_the_measure_of_parity_can_fail() -> None:
    one = np.array([[0.2, 0.3, 0.5]])
    assert np.abs(centred(one) - centred(one * 7)).max() < 1e-12
    assert np.abs(centred(one) - centred(one + np.array([[1e-4, 0, 0]]))).max() > 1e-5
    assert pytest.approx(0, abs=1e-12) == centred(one).sum()
