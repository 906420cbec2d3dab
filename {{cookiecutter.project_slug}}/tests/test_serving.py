"""The artifact behind HTTP: as a process, and in a container under hosting's rules."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from inference import inference
from pipelines.local import serve as serve_local
from tests.helpers import CLASSES, free_port
from tests.test_inference import archive, artifact, classifier, photo

__all__ = ["archive", "artifact", "classifier"]  # fixtures


def expected(classifier: inference.Classifier, label: str) -> Any:
    batch = inference.input_fn(photo(label), "image/png")
    return inference.predict_fn(batch, classifier)["probabilities"][0]


def check(port: int, classifier: inference.Classifier) -> None:
    """Right answers to all classes, a clean refusal, and nothing else to be found on the port."""
    for label in CLASSES:
        status, body = serve_local.ask(port, "POST", "/invocations", photo(label))
        answer = json.loads(body)
        assert (status, answer["labels"]) == (200, [label])
        assert answer["probabilities"][0] == pytest.approx(expected(classifier, label), abs=1e-5)
    status, body = serve_local.ask(port, "POST", "/invocations", b"no image")
    assert status == 400
    assert set(json.loads(body)) == {"error"}
    assert serve_local.ask(port, "GET", "/ping") == (200, b"")
    assert serve_local.ask(port, "GET", "/models")[0] == 404


def test_the_server_as_a_process(archive: Path, classifier: inference.Classifier) -> None:
    port = free_port()
    with serve_local.server(archive, None, port) as process:
        check(port, classifier)
    assert process.returncode == 0


@pytest.mark.container
def test_the_server_in_its_container(archive: Path, classifier: inference.Classifier, serving_image: str) -> None:
    """Read-only, without any capability, for the user who called."""
    port = free_port()
    with serve_local.server(archive, serving_image, port) as process:
        check(port, classifier)
    assert process.returncode == 0
    assert not subprocess.check_output(["docker", "ps", "--all", "--quiet", "--filter", "name=-serve-"], text=True)
