"""The same artifact answers alike on every host: the peers' cases, asked over HTTP.

python -m pytest tests/test_hosting.py
RAY_PYTHON=... TORCHSERVE_PYTHON=... python -m pytest tests/test_hosting.py     # environments of these hosts, see there
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import imaging
from inference import inference
from pipelines import runs
from pipelines.local import engine
from tests.conftest import project_image
from tests.helpers import CLASSES, draw, free_port
from tests.hosting import CASES, EXCLUDED, NOT_APPLICABLE, NOT_HTTP, Facts, serving
from tests.test_inference import artifact
from tests.test_serving import endpoint

__all__ = ["artifact"]  # a fixture
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
