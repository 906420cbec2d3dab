"""The artifact: deterministic, refused when damaged, and what reads it from a command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inference.artifact import ArtifactError, open_artifact
from pipelines import SOURCE, runs
from processing.evaluate import evaluate, metrics
from scores import wilson
from tests.test_inference import archive, artifact, photo

__all__ = ["archive", "artifact"]  # fixtures


def test_packing_gives_the_same_bytes(artifact: Path, archive: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    (tmp_path / "copy" / "model.json").touch()
    runs.pack(tmp_path / "copy", tmp_path / "again.tar.gz")
    assert (tmp_path / "again.tar.gz").read_bytes() == archive.read_bytes()


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
