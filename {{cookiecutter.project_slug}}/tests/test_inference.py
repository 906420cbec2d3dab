"""The artifact and its handlers: complete, checked, and independent of everything but its own few packages."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import imaging
from inference import inference
from inference.artifact import ArtifactError, open_artifact
from pipelines import SOURCE, runs
from processing.evaluate import evaluate, metrics, wilson
from tests.helpers import CLASSES, draw
from training.config import Hyperparameters, resolve
from training.data import load_channels
from training.distributed import World
from training.export import checksums, write_artifact
from training.loop import fit
from training.model import build_model

ALLOWED = {"torch", "numpy", "PIL", "safetensors"}


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
    assert files == [
        "baseline.json",
        "code/imaging.py",
        "code/inference.py",
        "code/requirements.txt",
        "code/training/model.py",
        "golden.json",
        "model.json",
        "model.safetensors",
    ]
    facts = json.loads((artifact / "model.json").read_text())
    assert facts["classes"] == list(CLASSES)
    assert (facts["architecture"], facts["image_size"], facts["git_commit"]) == ("cnn", 12, "abc")
    assert facts["files"] == checksums(artifact)
    baseline = json.loads((artifact / "baseline.json").read_text())
    assert sum(baseline["predictions"].values()) == sum(baseline["confidence"]["counts"]) == 9


def test_packing_gives_the_same_bytes(artifact: Path, archive: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    (tmp_path / "copy" / "model.json").touch()
    runs.pack(tmp_path / "copy", tmp_path / "again.tar.gz")
    assert (tmp_path / "again.tar.gz").read_bytes() == archive.read_bytes()


def test_artifact_predicts_alone_with_its_few_packages(archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    script = """
import base64, json, sys
before = set(sys.modules)
sys.path.insert(0, "code")
import inference
model = inference.model_fn(".")
for sample in json.load(open("golden.json"))["samples"]:
    batch = inference.input_fn(base64.b64decode(sample["body"]), sample["content_type"])
    body, kind = inference.output_fn(inference.predict_fn(batch, model), "application/json")
    answer = json.loads(body)
    assert kind == "application/json" and answer["labels"] == [sample["label"]]
    assert max(abs(a - b) for a, b in zip(answer["probabilities"][0], sample["probabilities"])) < 0.02
tops = {name.split(".")[0] for name in set(sys.modules) - before if "." not in name}
found = [n for n in tops if "site-packages" in str(getattr(sys.modules[n], "__file__", ""))]
print(json.dumps(sorted(found)))
"""
    answer = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    own = {"torch", "numpy", "PIL", "safetensors"}
    assert own <= set(json.loads(answer.stdout))
    assert not {"torchvision", "sagemaker", "boto3", "pydantic", "yaml"} & set(json.loads(answer.stdout))


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


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"x", "text/csv", 415),
        (b"x", "application/x-npy", 415),
        (b"", "image/png", 400),
        ("text", "image/png", 400),
        (b"{", "application/json", 400),
        (b"\xff", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"instances": []}', "application/json", 400),
        (b'{"instances": [[1], [1, 2]]}', "application/json", 400),
        (b'{"instances": ["a"]}', "application/json", 400),
        (b'{"instances": [NaN]}', "application/json", 400),
        (b'{"instances": [{"b64": "%"}]}', "application/json", 400),
        (b'{"instances": [{"b64": "aGk="}]}', "application/json", 400),
        (b'{"instances": [[[[1]]]]}', "application/json", 400),
    ],
)
def test_bad_requests_have_a_status_and_a_sentence(
    classifier: inference.Classifier, body: bytes | str, kind: str, status: int
) -> None:
    with pytest.raises(inference.RequestError) as error:
        inference.predict_fn(inference.input_fn(body, kind), classifier)
    assert error.value.status == status
    assert "Traceback" not in str(error.value)
    assert len(str(error.value)) < 300


def test_accept(classifier: inference.Classifier) -> None:
    prediction = inference.predict_fn(inference.input_fn(photo(), "image/png"), classifier)
    for accept in (None, "", "application/json", "text/html, application/json;q=0.5", "APPLICATION/*"):
        assert inference.output_fn(prediction, accept)[1] == "application/json"
    with pytest.raises(inference.RequestError) as error:
        inference.output_fn(prediction, "text/csv")
    assert error.value.status == 406


def test_damaged_artifacts_are_refused(artifact: Path, tmp_path: Path) -> None:
    def broken(name: str, change: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(artifact, folder)
        change(folder)
        runs.pack(folder, tmp_path / f"{name}.tar.gz")
        return tmp_path / f"{name}.tar.gz"

    def rewrite(folder: Path, **changes: Any) -> None:
        facts = json.loads((folder / "model.json").read_text()) | changes
        (folder / "model.json").write_text(json.dumps(facts))

    cases = {
        broken("bits", lambda f: (f / "golden.json").write_text("{}")): "golden.json is missing or does not match",
        broken("gone", lambda f: (f / "model.safetensors").unlink()): "model.safetensors is missing",
        broken("facts", lambda f: (f / "model.json").unlink()): "model.json is missing or broken",
        broken("schema", lambda f: rewrite(f, schema_version=9)): "schema version 9; this code reads 1",
        broken("classes", lambda f: rewrite(f, classes=["a", "b"])): "does not fit model.json",
        tmp_path / "nowhere.tar.gz": "there is no artifact at",
    }
    (tmp_path / "text.tar.gz").write_text("text")
    cases[tmp_path / "text.tar.gz"] = "cannot be unpacked"
    with tarfile.open(tmp_path / "escape.tar.gz", "w:gz") as tar:
        tar.add(artifact / "model.json", arcname="../escape.json")
    cases[tmp_path / "escape.tar.gz"] = "not a plain file inside the archive"
    for path, message in cases.items():
        with pytest.raises(ArtifactError) as error, open_artifact(path):
            pass
        assert message in str(error.value)
    assert not (tmp_path.parent / "escape.json").exists()


def test_evaluation_counts_and_intervals(archive: Path, packed: Path) -> None:
    with open_artifact(archive) as opened:
        result = evaluate(opened, packed / "test")
    accuracy = result["metrics"]["accuracy"]
    assert result["images"] == sum(map(sum, result["confusion"])) == 9
    assert accuracy["value"] >= 8 / 9
    assert accuracy["ci_low"] < accuracy["value"] <= accuracy["ci_high"] <= 1
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    truth, scores = np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    found = metrics(truth, scores, np.array([[1, 1], [0, 1]]))
    assert found["accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["macro_precision"]["value"] == pytest.approx(0.75)
    assert found["cross_entropy"]["value"] == pytest.approx(-np.log([0.9, 0.4, 0.8]).mean())


def test_command_lines(archive: Path, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(photo("down"))
    (tmp_path / "text.png").write_text("text")
    script = [sys.executable, str(SOURCE / "inference" / "predict.py"), "--artifact", str(archive)]
    good = subprocess.run([*script, "--json", str(tmp_path / "photo.png")], capture_output=True, text=True)
    assert (good.returncode, json.loads(good.stdout)["labels"]) == (0, ["down"])
    mixed = [*script, str(tmp_path / "text.png"), str(tmp_path / "gone.png"), str(tmp_path / "photo.png")]
    bad = subprocess.run(mixed, capture_output=True, text=True)
    assert bad.returncode == 1
    assert "photo.png: down" in bad.stdout
    assert [line[:7] for line in bad.stderr.splitlines()] == ["error: ", "error: "]
    script = [sys.executable, str(SOURCE / "processing" / "evaluate.py"), "--artifact", str(archive)]
    done = subprocess.run(
        [*script, "--data", str(packed / "test"), "--output", str(tmp_path / "e.json")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy" in json.loads((tmp_path / "e.json").read_text())["metrics"]
