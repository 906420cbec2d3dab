"""The artifact under TorchServe with SageMaker's PyTorch toolkit; skipped without TORCHSERVE_PYTHON.

`tests/host_torchserve.py` says how to run them. What the handlers cannot make clean there, because the toolkit or
TorchServe answers in their place, is in `test_what_the_toolkit_answers_itself`.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pytest

from inference import inference
from payload import JSON_TYPE
from tests.host_torchserve import HostError, Reply, ask, free_ports, started, torchserve_host
from tests.test_inference import artifact, classifier, photo
from tests.test_requests import BAD, whole_requests

__all__ = ["artifact", "classifier"]  # fixtures
PATIENCE = 60
PNG = {"Content-Type": "image/png"}
INVALID_UTF8 = (b"\xff", JSON_TYPE, 400)


@pytest.fixture(scope="module")
def python() -> Path:
    if "TORCHSERVE_PYTHON" not in os.environ:
        pytest.skip("TORCHSERVE_PYTHON names no interpreter of an environment as tests/host_torchserve.py wants it")
    return Path(os.environ["TORCHSERVE_PYTHON"])


@pytest.fixture(scope="module")
def url(python: Path, artifact: Path) -> Iterator[str]:
    """Two workers; when it has stopped, none of its processes is left."""
    (port,) = free_ports(1)
    variables = {"SAGEMAKER_MODEL_SERVER_WORKERS": "2", "OMP_NUM_THREADS": "1"}
    with torchserve_host(python, artifact, port, **variables) as address:
        until(lambda: len(workers(address)) == 2)
        group = os.getpgid(workers(address)[0])
        yield address
    until(lambda: not is_alive(group))
    with pytest.raises(ConnectionRefusedError):
        ask(address, "/ping")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not so after {PATIENCE} s"
        time.sleep(0.2)


def is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def workers(url: str) -> list[int]:
    """Process ids of the workers that have loaded the model."""
    (model,) = json.loads(ask(url, "/models/model").body)
    return [worker["pid"] for worker in model["workers"] if worker["status"] == "READY"]


def check_refusal(reply: Reply, status: int) -> None:
    assert (reply.status, reply.kind) == (status, JSON_TYPE), reply
    assert re.fullmatch(r"[A-Za-z ]+", reply.reason), reply
    assert re.fullmatch(r'\{"error": ".{5,300}"\}', reply.body.decode()), reply
    assert isinstance(json.loads(reply.body)["error"], str)
    assert not re.search(r"Traceback|\.py|/(tmp|usr|opt|home|root)\b|site-packages|Error", reply.body.decode()), reply


def check_answer(reply: Reply, expected: dict[str, Any], tolerance: float) -> None:
    assert (reply.status, reply.kind) == (200, JSON_TYPE), reply
    answer = json.loads(reply.body)
    assert answer["labels"] == expected["labels"]
    for found, wanted in zip(answer["probabilities"], expected["probabilities"], strict=True):
        assert found == pytest.approx(wanted, abs=tolerance)


@pytest.mark.parametrize("index", range(9))
def test_a_request_is_answered_as_in_process(url: str, classifier: inference.Classifier, index: int) -> None:
    """Images, .npy, numbers in JSON, images in JSON."""
    body, kind = whole_requests()[index]
    expected = inference.predict_fn(inference.input_fn(body, kind), classifier)
    for spelling in (kind, f"{kind.upper()}; charset=utf-8"):
        check_answer(ask(url, "/invocations", body, {"Content-Type": spelling}), expected, 1e-5)


def test_golden_samples_get_their_answers(url: str, artifact: Path) -> None:
    samples = json.loads((artifact / "golden.json").read_text())["samples"]
    assert len(samples) == 4
    for sample in samples:
        reply = ask(url, "/invocations", base64.b64decode(sample["body"]), {"Content-Type": sample["content_type"]})
        expected = {"labels": [sample["label"]], "probabilities": [sample["probabilities"]]}
        check_answer(reply, expected, inference.GOLDEN_TOLERANCE)


def test_bad_requests_are_refused_and_no_worker_dies_of_them(url: str) -> None:
    before = workers(url)
    for body, kind, status in BAD:
        sent = body.encode(errors="surrogatepass") if isinstance(body, str) else body
        if (body, kind, status) != INVALID_UTF8 and b"\xed\xa0\x80" not in sent:  # nor can half a pair be UTF-8
            headers = {} if kind is None else {"Content-Type": kind}
            check_refusal(ask(url, "/invocations", sent, headers), status)
    assert {status for _, _, status in BAD} == {400, 413, 415}
    check_refusal(ask(url, "/invocations", b"a=b", {"Content-Type": "application/x-www-form-urlencoded"}), 415)
    check_refusal(ask(url, "/invocations", b"--b--", {"Content-Type": "multipart/form-data; boundary=b"}), 400)
    check_refusal(ask(url, "/invocations"), 400)
    assert ask(url, "/ping").status == ask(url, "/invocations", photo(), PNG).status == 200
    assert workers(url) == before


@pytest.mark.parametrize(
    ("accept", "allowed"),
    [
        ("", True),
        ("*/*", True),
        ("application/*", True),
        ("text/csv, Application/JSON;q=0.5", True),
        ("application/json;q=0.9,*/*;q=0.8", True),
        ("application/pdf", False),
        ("text/csv, text/html", False),
        ("application/json;q=0, */*", False),
        ("caf\u00e9", False),
    ],
)
def test_accept(url: str, accept: str, allowed: bool) -> None:
    """And the content type of the answer is that of the answer, where the toolkit would repeat what was asked for."""
    reply = ask(url, "/invocations", photo(), PNG | {"Accept": accept})
    if allowed:
        assert (reply.status, reply.kind, json.loads(reply.body)["labels"]) == (200, JSON_TYPE, ["up"])
    else:
        check_refusal(reply, 406)


def test_what_the_toolkit_answers_itself(url: str) -> None:
    """None of it reaches the handlers as a client sent it."""
    assert INVALID_UTF8 in BAD
    reply = ask(url, "/invocations", b"\xff", {"Content-Type": JSON_TYPE})  # decoded by the toolkit
    assert (reply.status, reply.kind) == (500, None)
    assert b"Traceback" in reply.body
    check_refusal(
        ask(url, "/invocations", b"\xff", {"Content-Type": f"{JSON_TYPE}; charset=utf-8"}), 400
    )  # not decoded
    reply = ask(url, "/invocations", b" " * 6_553_501, {"Content-Type": JSON_TYPE})  # above TS_MAX_REQUEST_SIZE
    assert (reply.status, reply.body) == (413, b"")
    reply = ask(url, "/invocations", photo(), {"CONTENT-TYPE": "image/png"})  # which the toolkit does not find
    assert (reply.status, json.loads(reply.body)["labels"]) == (200, ["up"])  # the first bytes say what it is


def test_each_worker_answers_while_the_other_stands_still(url: str) -> None:
    labels = ["up", "down", "left", "up"]
    for worker in workers(url):
        with ThreadPoolExecutor(len(labels)) as pool:
            os.kill(worker, signal.SIGSTOP)
            try:
                replies = [pool.submit(ask, url, "/invocations", photo(label), PNG) for label in labels]
                done = as_completed(replies, timeout=PATIENCE / 2)
                for _ in labels[1:]:  # one may wait in the worker that stands
                    assert next(done).result().status == 200
            finally:
                os.kill(worker, signal.SIGCONT)
            assert [json.loads(reply.result().body)["labels"] for reply in replies] == [[label] for label in labels]


def test_a_killed_worker_is_replaced(url: str) -> None:
    killed, other = workers(url)
    os.kill(killed, signal.SIGKILL)
    until(lambda: workers(url) == [other])
    assert ask(url, "/invocations", photo(), PNG).status == 200
    until(lambda: len(workers(url)) == 2)
    assert killed not in workers(url)
    assert ask(url, "/invocations", photo(), PNG).status == 200


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("model.safetensors", "model.safetensors is missing or does not match its checksum"),
        ("code/payload.py", "No module named 'payload'"),
        ("code/inference.py", "Exactly one .pth or .pt file is required"),  # the toolkit's own handlers, then
    ],
)
def test_a_broken_artifact_is_never_asked(python: Path, artifact: Path, tmp_path: Path, file: str, reason: str) -> None:
    """Though `/ping` says 200 all the time: TorchServe goes on to start workers, for minutes."""
    shutil.copytree(artifact, tmp_path / "model")
    (tmp_path / "model" / file).unlink()
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    logs = {"LOG_LOCATION": str(tmp_path), "SAGEMAKER_MODEL_SERVER_WORKERS": "1"}
    with ThreadPoolExecutor(1) as pool, started(python, tmp_path / "model", port, **logs):
        log = tmp_path / "model_log.log"
        until(lambda: log.exists() and reason in log.read_text())
        until(lambda: ask(address, "/ping").status == 200)
        reply = pool.submit(ask, address, "/invocations", photo(), PNG)
        until(lambda: log.read_text().count(reason) > 1)
        assert not reply.done() or reply.result().status >= 500
        assert workers(address) == []


def test_java_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(HostError, match="needs java, which is not on PATH: apt-get install"),
        torchserve_host(tmp_path / "python", tmp_path, 1),
    ):
        pass
