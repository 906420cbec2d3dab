"""The artifact under Ray Serve, asked over HTTP; skipped without RAY_PYTHON (`tests/host_ray.py` says how to run)."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

import imaging
from inference import inference
from inference.export import checksums
from pipelines import SOURCE, runs
from tests.helpers import CLASSES, draw, free_port
from tests.host_ray import BRIDGE, READY_SECONDS, HostError, answers, end, processes, ray_host, variables_of
from tests.hosting import npy
from tests.test_house import MODULES, imported
from tests.test_inference import artifact, classifier, photo
from tests.test_requests import BAD

__all__ = ["artifact", "classifier"]  # fixtures
# Appended to the handlers of the artifact that is served: notes who answers how many at once, can fail and be slow.
OBSERVED = """
_predict_fn = predict_fn
def predict_fn(batch, classifier, context=None):
    import os
    with open(os.environ["SEEN"], "a") as file:
        file.write(f"{os.getpid()} {len(batch)}\\n")
    if isinstance(batch, list) and any(len(image) == 7 for image in batch):
        raise RuntimeError("the secret of " + __file__)
    if isinstance(batch, list) and any(len(image) == 9 for image in batch):
        import time
        end = time.monotonic() + 40
        while not os.path.exists(os.environ["SEEN"] + ".refused") and time.monotonic() < end:
            time.sleep(0.05)
    return _predict_fn(batch, classifier, context)
"""
PNG = {"Content-Type": "image/png"}
Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture(scope="module")
def python() -> Path:
    if "RAY_PYTHON" not in os.environ:
        pytest.skip("RAY_PYTHON names no interpreter of an environment with Ray; see tests/host_ray.py")
    return Path(os.environ["RAY_PYTHON"])


class Host:
    """A running host."""

    def __init__(self, url: str, seen: Path) -> None:
        self.address, self.seen = urlsplit(url), seen

    def ask(
        self, body: bytes = b"", headers: dict[str, str] = PNG, path: str = "/invocations", method: str = "POST"
    ) -> Answer:
        connection = http.client.HTTPConnection(str(self.address.hostname), self.address.port, timeout=120)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    def ask_together(
        self, requests: Sequence[tuple[bytes, dict[str, str]]]
    ) -> tuple[list[Answer], set[int], list[int]]:
        """Send requests at once. Gives the answers, who gave them, and the sizes of the batches that they became."""
        self.seen.write_text("")
        with ThreadPoolExecutor(len(requests)) as pool:
            answers = list(pool.map(lambda request: self.ask(*request), requests))
        lines = [line.split() for line in self.seen.read_text().splitlines()]
        return answers, {int(pid) for pid, _ in lines}, [int(size) for _, size in lines]


@pytest.fixture(scope="module")
def host(python: Path, artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("ray")
    shutil.copytree(artifact, folder / "model")
    with (folder / "model" / "code" / "inference.py").open("a") as file:
        file.write(OBSERVED)
    facts = json.loads((artifact / "model.json").read_text()) | {"files": checksums(folder / "model")}
    (folder / "model" / "model.json").write_text(json.dumps(facts))
    settings = {"SEEN": str(folder / "seen"), "INFERENCE_BATCH_WAIT_MS": "300"}
    with ray_host(python, folder / "model", free_port(), **settings) as url:
        yield Host(url, folder / "seen")


def test_answers_are_those_of_the_handlers_from_two_replicas_in_batches(
    host: Host, classifier: inference.Classifier
) -> None:
    pictures = [(CLASSES[number % 3], draw(CLASSES[number % 3], number)) for number in range(48)]
    requests = [(imaging.encode_png(np.asarray(picture)), PNG) for _, picture in pictures]
    answers, pids, sizes = host.ask_together(requests)
    assert len(pids) == 2
    assert sum(sizes) == len(requests)
    assert 1 < max(sizes) <= 8
    right = 0
    for (label, picture), (status, headers, body) in zip(pictures, answers, strict=True):
        assert (status, headers["content-type"]) == (200, "application/json")
        answer, expected = json.loads(body), inference.predict_fn([np.asarray(picture)], classifier)
        assert answer["labels"] == expected["labels"]
        assert np.allclose(answer["probabilities"], expected["probabilities"], atol=1e-4)
        right += answer["labels"] == [label]
    assert right >= 46


def test_golden_samples(host: Host, artifact: Path) -> None:
    for sample in json.loads((artifact / "golden.json").read_text())["samples"]:
        status, _, body = host.ask(base64.b64decode(sample["body"]), {"Content-Type": sample["content_type"]})
        assert (status, json.loads(body)["labels"]) == (200, [sample["label"]])
        assert np.allclose(json.loads(body)["probabilities"][0], sample["probabilities"], atol=0.02)


def test_requests_of_every_kind_wait_together_and_spoil_no_other(host: Host) -> None:
    numbers = np.random.default_rng(0).normal(size=(3, 3, 12, 12)).astype(np.float32)
    kinds: dict[int, Any] = {
        200: [(photo("left"), PNG), (npy(numbers), {"Content-Type": "application/x-npy"})],
        400: [(npy(array), {"Content-Type": "application/x-npy"}) for array in (numbers[..., 1:], numbers * 0 + 3e38)],
        500: [(imaging.encode_png(np.zeros((7, 7, 3), np.uint8)), PNG)],
    }
    _, _, sizes = host.ask_together(kinds[200] * 6)
    assert sum(sizes) == 6 * (1 + 3)  # each was asked once
    wanted = [(status, request) for _ in range(4) for status, requests in kinds.items() for request in requests]
    answers, _, sizes = host.ask_together([request for _, request in wanted])
    assert [status for status, _, _ in answers] == [status for status, _ in wanted]
    assert max(sizes) > 3  # more than any of them alone
    for (status, (sent, _)), (_, headers, body) in zip(wanted, answers, strict=True):
        answer = json.loads(body)
        if status == 200:
            assert answer["labels"] == ["left"] if sent == photo("left") else len(answer["labels"]) == 3
        elif status == 500:
            assert headers["content-type"] == "application/json"
            assert answer == {"error": "the server failed on this request; its log says why"}
        else:
            assert list(answer) == ["error"]


def test_no_batch_outgrows_what_one_request_may_hold(host: Host) -> None:
    instances = [{"b64": base64.b64encode(photo(label)).decode()} for label in CLASSES] * 50
    body = json.dumps({"instances": instances}).encode()
    answers, _, sizes = host.ask_together([(body, {})] * 4)
    assert [json.loads(answer)["labels"] for _, _, answer in answers] == [list(CLASSES) * 50] * 4
    assert set(sizes) == {150}


def test_more_requests_than_may_wait_are_refused(host: Host) -> None:
    slow = imaging.encode_png(np.zeros((9, 9, 3), np.uint8))

    def ask(_: int) -> int:
        status = host.ask(slow)[0]
        if status == 503:  # the others are held until then, however slowly these requests come
            host.seen.with_name("seen.refused").touch()
        return status

    with ThreadPoolExecutor(150) as pool:
        statuses = list(pool.map(ask, range(150)))
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 64
    assert host.ask(photo())[0] == 200


def test_bad_requests(host: Host) -> None:
    for body, kind, wanted in BAD:
        if isinstance(body, bytes):
            status, headers, answer = host.ask(body, {} if kind is None else {"Content-Type": kind})
            assert (status, headers["content-type"]) == (wanted, "application/json")
            assert list(json.loads(answer)) == ["error"]
    assert b"more bytes than the limit" in host.ask(b" " * (6 * 2**20 + 1), {})[2]  # said while it is read
    assert host.ask(photo(), PNG | {"Accept": "text/csv"})[0] == 406
    for method, path in (("GET", "/models"), ("POST", "/ping"), ("GET", "/invocations"), ("POST", "/invocations/")):
        status, _, answer = host.ask(method=method, path=path)
        assert (status, list(json.loads(answer))) == (404, ["error"])


def test_paths_of_the_platform_and_of_its_adapter(host: Host) -> None:
    status, _, body = host.ask(method="GET", path="/ping")
    assert (status, body) == (200, b"")
    assert host.ask(method="GET", path="/-/healthz")[0] == 200
    assert host.ask(photo("up"), PNG, "/")[2] == host.ask(photo("up"), PNG, "/invocations")[2]


def test_a_killed_replica_is_replaced(host: Host) -> None:
    requests = [(photo(), PNG)] * 32
    _, before, _ = host.ask_together(requests)
    os.kill(min(before), signal.SIGKILL)
    deadline = time.monotonic() + 90
    answered: list[int] = []
    pids: set[int] = set()
    while time.monotonic() < deadline and len(pids - {min(before)}) < 2:
        answers, pids, _ = host.ask_together(requests)
        answered += [status for status, _, _ in answers]
    assert len(pids - {min(before)}) == 2
    assert min(before) not in pids
    assert answered[-32:] == [200] * 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "golden.json is missing or does not match its checksum"),
        ({"INFERENCE_REPLICAS": "0"}, "INFERENCE_REPLICAS"),
    ],
)
def test_what_is_broken_never_serves(
    python: Path, artifact: Path, tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    shutil.copytree(artifact, tmp_path / "model")
    if not settings:
        (tmp_path / "model" / "golden.json").write_text("{}")
    with (
        pytest.raises(HostError, match=message) as error,
        ray_host(python, tmp_path / "model", free_port(), **settings),
    ):
        pass
    assert "ServeReplica" not in str(error.value)  # none was started


def test_nothing_is_left(python: Path, artifact: Path) -> None:
    before = set(Path("/tmp").glob("ray-*"))
    with ray_host(python, artifact, free_port()):
        (folder,) = set(Path("/tmp").glob("ray-*")) - before
        assert len(processes(folder)) > 3
    assert not processes(folder)
    assert not folder.exists()


def test_the_commands_of_the_page_serve_a_run(python: Path, artifact: Path, tmp_path: Path) -> None:
    """As a person types them, in one shell; only the bridge needs ray, so the artifact has no trace of it before."""
    page = (Path(__file__).parent / "recipes" / "ray-serve.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"(?ms)^```\n(.*?)^```$", page)
    (tmp_path / "artifacts" / "latest").mkdir(parents=True)
    (tmp_path / "template" / "tests").mkdir(parents=True)
    (tmp_path / "template" / "tests" / "in_project").symlink_to(BRIDGE.parent)
    runs.pack(artifact, tmp_path / "artifacts" / "latest" / "model.tar.gz")
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    variables = variables_of(folder) | {"TEMPLATE": str(tmp_path / "template")}
    variables |= {"PATH": f"{python.parent}{os.pathsep}{variables['PATH']}"}
    with (folder / "log").open("wb") as log:
        shell = ["bash", "-euc", commands.replace("serve run", "exec serve run")]
        process = subprocess.Popen(shell, env=variables, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not answers(8000):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.5)
        status, _, body = Host("http://127.0.0.1:8000", folder / "seen").ask(photo("left"), PNG)
        assert (status, json.loads(body)["labels"]) == (200, ["left"])
    finally:
        end(process, folder)


def test_nothing_of_the_project_needs_ray() -> None:
    assert not [path.name for path in MODULES if "ray" in imported(path)]
    assert "ray" not in (SOURCE / "inference" / "requirements.txt").read_text()
