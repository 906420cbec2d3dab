"""The artifact behind HTTP: as a process, in a container under hosting's rules, and as the SDK's local endpoint."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from inference import inference
from pipelines.local import serve as serve_local
from tests.helpers import CLASSES, free_port
from tests.test_inference import archive, artifact, classifier, photo

__all__ = ["archive", "artifact", "classifier"]  # fixtures

ASK = """
import sys, time, urllib.error, urllib.request
headers = {"Content-Type": "image/png"}
request = urllib.request.Request("http://127.0.0.1:8080/invocations", sys.stdin.buffer.read(), headers)
for _ in range(600):
    try:
        print(urllib.request.urlopen(request).read().decode())
        break
    except (urllib.error.URLError, ConnectionError):
        time.sleep(0.1)
"""


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


@pytest.mark.container
@pytest.mark.parametrize("user", ["0:0", "1000:1000"])
def test_the_container_needs_no_network_and_no_root(artifact: Path, serving_image: str, user: str) -> None:
    """As SageMaker starts it (`docker run <image> serve`, as root), and as user 1000; cut off from everything."""
    command = ["docker", "run", "--detach", "--rm", "--network", "none", "--read-only", "--user", user]
    command += ["--volume", f"{artifact}:/opt/ml/model:ro", serving_image, "serve"]
    container = subprocess.check_output(command, text=True).strip()
    try:
        inside = ["docker", "exec", "--interactive", container, "python3", "-c", ASK]
        answer = subprocess.run(inside, input=photo("left"), capture_output=True, timeout=120)
        assert json.loads(answer.stdout)["labels"] == ["left"], answer.stderr
        started = time.monotonic()
        subprocess.run(["docker", "kill", "--signal", "TERM", container], check=True, capture_output=True)
        code = subprocess.check_output(["docker", "wait", container], text=True).strip()
        assert (code, time.monotonic() - started < 25) == ("0", True)
    finally:
        subprocess.run(["docker", "rm", "--force", container], capture_output=True, check=False)


@contextmanager
def endpoint(archive: Path, image: str, folder: Path) -> Iterator[Any]:
    """An endpoint of SDK V3's local mode, which publishes it on port 8080; gives the client to invoke it with."""
    from sagemaker.core.local.local_session import LocalSession

    session = LocalSession()
    session.config = {"local": {"local_code": False, "container_root": str(folder)}}
    client = session.sagemaker_client
    own = folder / "model"  # the SDK unpacks the archive beside itself
    own.mkdir()
    shutil.copy(archive, own)
    container = {"Image": image, "ModelDataUrl": f"file://{own / archive.name}", "Environment": {}}
    client.create_model(ModelName="model", PrimaryContainer=container)
    variant = {"VariantName": "AllTraffic", "ModelName": "model", "InitialInstanceCount": 1, "InstanceType": "local"}
    client.create_endpoint_config(EndpointConfigName="config", ProductionVariants=[variant])
    try:
        client.create_endpoint(EndpointName="endpoint", EndpointConfigName="config")
        yield session.sagemaker_runtime_client
    finally:
        with suppress(Exception):
            client.delete_endpoint("endpoint")  # it only stops the container
        left = ["docker", "ps", "--all", "--quiet", "--filter", f"ancestor={image}"]
        left += ["--filter", "network=sagemaker-local"]
        for name in subprocess.check_output(left, text=True).split():
            subprocess.run(["docker", "rm", "--force", name], check=True, capture_output=True)
        subprocess.run(["docker", "network", "rm", "sagemaker-local"], capture_output=True, check=False)


@pytest.mark.container
@pytest.mark.filterwarnings("ignore")  # the SDK's own
def test_the_sdks_local_endpoint(
    archive: Path,
    classifier: inference.Classifier,
    serving_image: str,
    tmp_path: Path,
    nothing_left: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")  # asked for, never called
    with endpoint(archive, serving_image, tmp_path) as runtime:
        answer = runtime.invoke_endpoint(Body=photo("up"), EndpointName="endpoint", ContentType="image/png")
        found = json.loads(answer["Body"].read())
        assert found["probabilities"][0] == pytest.approx(expected(classifier, "up"), abs=1e-5)
        answer = runtime.invoke_endpoint(Body=b"up", EndpointName="endpoint", ContentType="text/csv")
        assert answer["ResponseMetadata"]["HTTPStatusCode"] == 415  # returned, where the cloud's client raises
        check(8080, classifier)
    with pytest.raises((OSError, http.client.HTTPException)):
        serve_local.ask(8080, "GET", "/ping")
    assert nothing_left
