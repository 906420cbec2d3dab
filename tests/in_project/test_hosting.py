"""The same artifact answers alike on every host: the peers' cases, asked over HTTP.

python -m pytest tests/test_hosting.py
RAY_PYTHON=... TORCHSERVE_PYTHON=... python -m pytest tests/test_hosting.py     # environments of these hosts, see there
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import imaging
from inference import inference
from pipelines import runs
from pipelines.local import engine
from pipelines.local import serve as serve_local
from tests.conftest import project_image
from tests.helpers import CLASSES, draw, free_port
from tests.hosting import CASES, EXCLUDED, NOT_APPLICABLE, NOT_HTTP, Facts, serving
from tests.test_inference import archive, artifact, classifier, photo
from tests.test_serving import check, expected

__all__ = ["archive", "artifact", "classifier"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore")  # the SDK's own


@contextmanager
def process(facts: Facts) -> Iterator[str]:
    with serving(facts.model_dir, facts.canary.parent / "server.log") as server:
        yield server.url


def other(name: str, variable: str) -> Callable[[Facts], AbstractContextManager[str]]:
    """A host of an environment of its own, whose Python the variable names."""

    def host(facts: Facts) -> AbstractContextManager[str]:
        start = getattr(import_module(f"tests.host_{name}"), f"{name}_host")
        running: AbstractContextManager[str] = start(Path(os.environ[variable]), facts.model_dir, free_port())
        return running

    return host


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


@contextmanager
def session(facts: Facts) -> Iterator[str]:
    """The same image behind the local endpoint of the SDK, which is always on port 8080."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")  # asked for, never called
        archive = Path(folder) / "model.tar.gz"
        runs.pack(facts.model_dir, archive)
        with endpoint(archive, project_image("serving"), Path(folder)):
            yield "http://127.0.0.1:8080"


def has_engine() -> bool:
    try:
        engine.check()
    except engine.EngineError:
        return bool(os.environ.get("REQUIRE_CONTAINERS"))
    return True


HOSTS: dict[str, Callable[[Facts], AbstractContextManager[str]]] = {"process": process}
if has_engine():
    HOSTS["session"] = session
for name, variable in (("ray", "RAY_PYTHON"), ("torchserve", "TORCHSERVE_PYTHON")):
    if os.environ.get(variable):
        HOSTS[name] = other(name, variable)


@pytest.fixture(scope="module")
def facts(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    classifier = inference.model_fn(str(artifact))
    images = []
    for number in range(12):
        label = CLASSES[number % 3]
        images.append((label, imaging.encode_png(np.asarray(draw(label, 2000 + number, (12, 17, 40)[number % 3])))))
    answers = [inference.predict_fn(inference.input_fn(body, "image/png"), classifier) for _, body in images]
    return Facts(
        model_dir=artifact,
        classes=list(CLASSES),
        image_size=12,
        images=images,
        probabilities=[answer["probabilities"][0] for answer in answers],
        canary=tmp_path_factory.mktemp("hosting") / "canary",
    )


@pytest.fixture(scope="module")
def host(request: pytest.FixtureRequest, facts: Facts) -> Iterator[tuple[str, str]]:
    """Name and URL; it runs for all its cases."""
    with HOSTS[request.param](facts) as url:
        yield request.param, url


@pytest.mark.parametrize("number", sorted(CASES))
@pytest.mark.parametrize("host", HOSTS, indirect=True)
def test_case(host: tuple[str, str], facts: Facts, number: int) -> None:
    name, url = host
    if number not in EXCLUDED[name]:
        CASES[number](url, facts)
        return
    with pytest.raises(AssertionError):  # an exclusion that is none any more is to go
        CASES[number](url, facts)


def test_every_case_of_the_peers_is_somewhere() -> None:
    assert sorted([*CASES, *NOT_HTTP, *NOT_APPLICABLE]) == list(range(1, 38))
    assert all(set(cases) <= set(CASES) for cases in EXCLUDED.values())
    for place in NOT_HTTP.values():
        file, name = place.split("::")
        assert f"\ndef {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8"), place


def test_there_are_exactly_the_four_handlers() -> None:
    known = ("model_fn", "input_fn", "predict_fn", "output_fn", "transform_fn", "pre_model_fn", "model_warmup_fn")
    assert [name for name in known if hasattr(inference, name)] == list(known[:4])


def test_weights_are_saved_for_any_device(artifact: Path) -> None:
    """As numbers, without the device that they were trained on."""
    with safe_open(artifact / "model.safetensors", "np") as weights:
        assert all(isinstance(weights.get_tensor(key), np.ndarray) for key in weights.keys())  # noqa: SIM118
    assert "cuda" not in json.dumps(json.loads((artifact / "model.json").read_text())["preprocessing"])


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
