"""The server as a process: its start and end, limits, merged batches, failing handlers, headers and log.

python -m pytest tests/test_server.py
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import imaging
from inference import inference
from inference.batcher import Batcher, processors, split
from tests.helpers import CLASSES, draw
from tests.hosting import ANY_IMAGE, JSON, NPY, Running, ask, edited, instances, near, npy, probed, serving, started
from tests.test_inference import artifact, classifier, photo

__all__ = ["artifact", "classifier"]  # fixtures
ERRORS = ("memory", "stop", "exit", "time", "value", "forbidden", "strange")  # by number, as in hosting.PROBE
NUMBERS = np.random.default_rng(0).integers(-2, 3, (3, 3, 12, 12)).astype(np.float32)


class Probe:
    """A server whose handlers are hosting.PROBE."""

    def __init__(self, running: Running, folder: Path) -> None:
        self.running, self.url, self.folder = running, running.url, folder

    def notes(self, name: str) -> list[str]:
        return (self.folder / name).read_text().split() if (self.folder / name).exists() else []

    def until(self, name: str, count: int) -> None:
        end = time.monotonic() + 60
        while len(self.notes(name)) < count:
            assert time.monotonic() < end, (name, count, self.notes(name))
            time.sleep(0.01)

    def together(self, *calls: Callable[[], Any]) -> list[Any]:
        """Replies of calls that wait in front of the model together, behind a request that is inside it."""
        sizes, inputs = len(self.notes("sizes")), len(self.notes("inputs"))
        (self.folder / "gate").touch()
        with ThreadPoolExecutor(len(calls) + 1) as pool:
            first = pool.submit(ask, self.url, photo("up"), ANY_IMAGE)
            self.until("sizes", sizes + 1)
            others = [pool.submit(call) for call in calls]
            self.until("inputs", inputs + 1 + len(calls))
            time.sleep(0.2)
            (self.folder / "gate").unlink()
            assert first.result().status == 200
            return [other.result() for other in others]

    def sizes_after(self, before: int) -> list[int]:
        return [int(text) for text in self.notes("sizes")[before:]]


def coded(name: str) -> bytes:
    """An image at which the handlers fail."""
    pixels = np.array(draw("up", 1))
    pixels[0, 0] = (255, 0, ERRORS.index(name))
    return imaging.encode_png(pixels)


@pytest.fixture(scope="module")
def handlers(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return probed(artifact, tmp_path_factory.mktemp("handlers") / "model")


@pytest.fixture(scope="module")
def probe(handlers: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    folder = tmp_path_factory.mktemp("probe")
    settings = {"MERGED": "8", "THREADS": "1", "WORKERS": "1"}
    named = {f"INFERENCE_{name}": value for name, value in settings.items()}
    with serving(handlers, folder / "log", PROBE=str(folder), **named) as running:
        yield Probe(running, folder)


@pytest.fixture(scope="module")
def small(handlers: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    """The same with narrow limits, and in bfloat16."""
    folder = tmp_path_factory.mktemp("small")
    settings = {"QUEUE": "3", "TIMEOUT": "2", "MAX_BYTES": "200000", "PRECISION": "bf16", "WORKERS": "1"}
    named: dict[str, Any] = {f"INFERENCE_{name}": value for name, value in settings.items()}
    with serving(handlers, folder / "log", 0, PROBE=str(folder), **named) as running:
        yield Probe(running, folder)


@pytest.fixture(scope="module", autouse=True)
def leaving(handlers: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server that got SIGTERM with half a body sent to it: it takes a while, so it does so beside the tests."""
    folder = tmp_path_factory.mktemp("leaving")
    half = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf"
    with (
        serving(handlers, folder / "log", PROBE=str(folder)) as running,
        ThreadPoolExecutor(1) as pool,
        running.connect(half),
    ):
        time.sleep(0.2)
        running.process.terminate()
        begun = time.monotonic()
        yield pool.submit(lambda: (running.process.wait(60), time.monotonic() - begun))


def test_paths_and_methods(probe: Probe) -> None:
    answer = ask(probe.url, method="GET", path="/ping")
    assert (answer.status, answer.body) == (200, b"")
    answer = ask(probe.url, method="GET", path="/execution-parameters")
    assert answer.json() == {"MaxConcurrentTransforms": 16, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": 6}
    assert "server" not in answer.headers
    for method, path, status in (("GET", "/models", 404), ("POST", "/invocations/", 404), ("GET", "/invocations", 405),
                                 ("PUT", "/invocations", 405), ("POST", "/ping", 405),
                                 ("POST", "/execution-parameters", 405)):  # fmt: skip
        ask(probe.url, method=method, path=path).refused(status)


def test_the_model_is_loaded_once(probe: Probe) -> None:
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(lambda _: ask(probe.url, photo("up"), ANY_IMAGE).labels(), range(6))
    assert list(answers) == [["up"]] * 6
    assert probe.notes("loads") == ["once"]


def test_nothing_is_imported_or_installed_without_need(probe: Probe) -> None:
    answer = ask(probe.url, b"", X_Amzn_SageMaker_Custom_Attributes="input:modules")
    modules = set(json.loads(answer.body)["error"].split())
    assert {"torch", "numpy", "uvicorn"} <= modules
    assert not {"torchvision", "sagemaker", "boto3", "botocore", "pip", "pandas", "pipelines", "pydantic"} & modules


def test_requests_that_wait_are_merged_and_not_mixed(probe: Probe, classifier: inference.Classifier) -> None:
    labels = [CLASSES[number % 3] for number in range(12)]
    images = [np.asarray(draw(label, number, 12 + number)) for number, label in enumerate(labels)]
    calls = [lambda image=image: ask(probe.url, imaging.encode_png(image), ANY_IMAGE) for image in images]
    before = len(probe.notes("sizes"))
    answers = probe.together(*calls)
    assert sorted(probe.sizes_after(before)) == [1, 4, 8]
    for answer, image, label in zip(answers, images, labels, strict=True):
        assert answer.labels() == [label]
        assert answer.json()["classes"] == list(CLASSES)
        near(answer.json()["probabilities"], inference.predict_fn([image], classifier)["probabilities"])


ALONE = """
import threading
calls, gate = [], threading.Event()
gate.set()
loaded = None
def model_fn(folder):
    global loaded
    loaded = threading.get_ident()
def input_fn(body, *_):
    calls.append(("input", threading.get_ident()))
    return [body]
def predict_fn(batch, model):
    calls.append((len(batch), threading.get_ident()))
    assert gate.wait(30)
    return {"got": batch}
def output_fn(answer, *_): return answer["got"]
"""


def test_a_request_that_is_alone_stays_in_its_thread_and_others_wait_for_it(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "inference.py").write_text(ALONE)

    async def told() -> list[tuple[str | int, int]]:
        batcher = Batcher(tmp_path, 8, 1, 2, 50)
        await batcher.load()
        code = sys.modules["artifact_inference"]

        async def until(count: int) -> None:
            while len(code.calls) < count:
                await asyncio.sleep(0.001)

        def ask_for(body: bytes) -> asyncio.Task[tuple[Any, str]]:
            return asyncio.create_task(batcher.answer(body, None, None, None))

        async with asyncio.timeout(20):
            assert (await ask_for(b"alone"))[0] == [b"alone"]
            code.gate.clear()
            first = ask_for(b"first")
            await until(4)
            others = ask_for(b"second"), ask_for(b"third")
            await until(6)
            await asyncio.sleep(0.1)
            assert len(code.calls) == 6
            code.gate.set()
            assert [(await each)[0] for each in (first, *others)] == [[b"first"], [b"second"], [b"third"]]
        return list(code.calls)

    calls = asyncio.run(told())
    assert [name for name, _ in calls] == ["input", 1, "input", 1, "input", "input", 1, 1]
    assert calls[0][1] == calls[1][1]
    assert calls[2][1] == calls[3][1]


def test_one_worker_is_one_thread(tmp_path: Path) -> None:
    """Handlers may keep what only the thread that made it can use, where INFERENCE_WORKERS is 1."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "inference.py").write_text(ALONE)

    async def told() -> tuple[int, set[int]]:
        batcher = Batcher(tmp_path, 8, 1, 1, 50)
        await batcher.load()
        code = sys.modules["artifact_inference"]
        for count in (1, 1, 2, 1):
            await asyncio.gather(*(batcher.answer(b"x", None, None, None) for _ in range(count)))
        return code.loaded, {thread for name, thread in code.calls if name != "input"}

    loaded, computed = asyncio.run(told())
    assert computed == {loaded}


def test_only_one_decoder_is_in_the_worker_s_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when two find it idle at once."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "inference.py").write_text(ALONE)

    async def placed() -> list[int]:
        batcher, inside, most = Batcher(tmp_path, 8, 1, 2, 50), list[int](), list[int]()
        await batcher.load()
        compute = batcher._compute

        def later(batches: list[Any], worker: int) -> list[Any]:
            inside.append(worker)
            time.sleep(0.1)
            most.append(inside.count(-1))
            inside.remove(worker)
            return compute(batches, worker)

        monkeypatch.setattr(batcher, "_compute", later)
        async with asyncio.timeout(20):
            await asyncio.gather(*(batcher.answer(b"x", None, None, None) for _ in range(2)))
        return most

    assert max(asyncio.run(placed())) == 1


def test_batches_are_computed_side_by_side(handlers: Path, tmp_path: Path) -> None:
    """Each with its share of the threads and of what waits: nothing waits for a batch while a worker is free."""
    settings = {"MERGED": "16", "THREADS": "2", "WORKERS": "2"}
    named = {f"INFERENCE_{name}": value for name, value in settings.items()}
    with (
        serving(handlers, tmp_path / "log", PROBE=str(tmp_path), **named) as running,
        ThreadPoolExecutor(8) as pool,
    ):
        probe, gate = Probe(running, tmp_path), tmp_path / "gate"
        gate.touch()  # a quick network would have one worker
        first = pool.submit(ask, running.url, photo("up"), ANY_IMAGE)
        probe.until("sizes", 1)
        time.sleep(0.1)
        gate.unlink()
        assert first.result().labels() == ["up"]
        gate.touch()
        calls = []
        for number in range(2):
            calls.append(pool.submit(ask, running.url, photo("up"), ANY_IMAGE))
            probe.until("sizes", number + 2)
        assert probe.notes("threads") == ["2", "2", "1"]
        calls += [pool.submit(ask, running.url, photo(label), ANY_IMAGE) for label in ("left", "down") * 3]
        probe.until("inputs", 9)
        time.sleep(0.2)
        assert probe.notes("sizes") == ["1", "1", "1"]
        gate.unlink()
        assert [call.result().labels()[0] for call in calls] == ["up", "up", *["left", "down"] * 3]
        assert max(probe.sizes_after(3)) <= 3
        assert sum(probe.sizes_after(3)) == 6


def test_kinds_and_sizes_of_batches_are_kept_apart(probe: Probe, classifier: inference.Classifier) -> None:
    pair = [{"b64": base64.b64encode(photo(label)).decode()} for label in ("left", "up")]
    calls = {
        "npy": lambda: ask(probe.url, npy(NUMBERS), NPY),
        "json": lambda: ask(probe.url, instances(NUMBERS[:1].tolist()), JSON),
        "pair": lambda: ask(probe.url, instances(pair), JSON),
        "many": lambda: ask(probe.url, instances(pair * 5), JSON),
        "shape": lambda: ask(probe.url, npy(NUMBERS[:, :, 1:]), NPY),
        "image": lambda: ask(probe.url, photo("down"), ANY_IMAGE),
    }
    before = len(probe.notes("sizes"))
    answers = dict(zip(calls, probe.together(*calls.values()), strict=True))
    assert max(probe.sizes_after(before)) == 10
    expected = inference.predict_fn(NUMBERS, classifier)["probabilities"]
    near(answers["npy"].json()["probabilities"], expected)
    near(answers["json"].json()["probabilities"], expected[:1])
    assert answers["pair"].labels() == ["left", "up"]
    assert answers["many"].labels() == ["left", "up"] * 5
    assert answers["image"].labels() == ["down"]
    assert "instances have shape (3, 3, 11, 12)" in answers["shape"].refused(400)


def test_a_request_that_fails_in_a_merged_batch_fails_alone(probe: Probe) -> None:
    def call(body: bytes) -> Callable[[], Any]:
        return lambda: ask(probe.url, body, ANY_IMAGE)

    calls = [call(photo(label)) for label in ("up", "left", "down")]
    for name, status in (("memory", 503), ("stop", 500), ("exit", 500), ("time", 500), ("forbidden", 403)):
        bad, *good = probe.together(call(coded(name)), *calls)
        assert "secret" not in bad.refused(status)
        assert [answer.labels() for answer in good] == [["up"], ["left"], ["down"]]
    assert probe.running.ping() == 200


def test_handlers_that_fail_cost_only_their_request(probe: Probe) -> None:
    for place in ("input", "output"):
        for name in ERRORS:
            answer = ask(probe.url, photo(), ANY_IMAGE, X_Amzn_SageMaker_Custom_Attributes=f"{place}:{name}")
            message = answer.refused({"forbidden": 403, "memory": 503}.get(name, 500))
            expected = {"forbidden": "not you", "memory": "not enough memory for this request now"}
            assert expected.get(name, f"({answer.headers['x-request-id']})") in message
            logged = [
                line for line in probe.running.lines() if line.get("request_id") == answer.headers["x-request-id"]
            ]
            assert [line["level"] for line in logged] == (["info"] if name == "forbidden" else ["error", "info"])
            assert name == "forbidden" or "Traceback" in logged[0]["message"]
    for wish in ("object", "type"):  # neither can be sent
        ask(probe.url, photo(), ANY_IMAGE, X_Amzn_SageMaker_Custom_Attributes=f"output:{wish}").refused(500)
    answer = ask(probe.url, photo(), ANY_IMAGE, X_Amzn_SageMaker_Custom_Attributes="output:bytes")
    assert (answer.status, answer.json()) == (200, {})
    assert ask(probe.url, photo(), ANY_IMAGE).labels() == ["up"]


def test_batches_of_kinds_that_cannot_be_merged_are_answered(probe: Probe) -> None:
    wishes = {"scalar": "float32", "frame": "Frame", "text": "list"}
    (probe.folder / "gate").touch()
    with ThreadPoolExecutor(9) as pool:
        calls = [
            pool.submit(ask, probe.url, b"", X_Amzn_SageMaker_Custom_Attributes=f"return:{wish}")
            for wish in [*wishes] * 3
        ]
        time.sleep(0.3)
        (probe.folder / "gate").unlink()
        assert [call.result().json() for call in calls] == [{"type": kind} for kind in wishes.values()] * 3
    assert probe.running.ping() == 200


def test_headers_between_client_and_handlers(probe: Probe) -> None:
    def answer(name: str, value: str) -> Any:
        return ask(probe.url, photo(), ANY_IMAGE, X_Amzn_SageMaker_Custom_Attributes=f"set:{json.dumps([name, value])}")

    good = answer("X-Amzn-SageMaker-Custom-Attributes", "trace=1; b c")
    assert good.labels() == ["up"]
    assert good.headers["x-amzn-sagemaker-custom-attributes"] == "trace=1; b c"
    for name, value in (("X-Amzn-SageMaker-A", "a\r\nEvil: 1"), ("X-Amzn-SageMaker-A", "\u20ac"), ("Set-Cookie", "a"),
                        ("X-Amzn-SageMaker-A\r\nEvil", "1"), ("X-Amzn-SageMaker-\u20ac", "1"),
                        ("X-Amzn-SageMaker-A", "a" * 1025), ("Content-Length", "1")):  # fmt: skip
        bad = answer(name, value)
        bad.refused(500)
        assert not {"evil", "set-cookie"} & set(bad.headers)
        assert "x-amzn-sagemaker-a" not in bad.headers


def test_every_answer_has_the_id_of_its_request(probe: Probe) -> None:
    given = ask(probe.url, photo(), ANY_IMAGE, X_Amzn_SageMaker_Inference_Id="order-66.a")
    assert given.headers["x-request-id"] == "order-66.a"
    for strange in ("", "a b", "a" * 65, "\u00e9", '"}'):
        made = ask(probe.url, b"", ANY_IMAGE, X_Amzn_SageMaker_Inference_Id=strange).headers["x-request-id"]
        assert len(made) == 32
        assert made.isalnum()


def test_the_log_is_json_without_payloads(probe: Probe) -> None:
    mark = "canary4711"
    ask(probe.url, instances([mark]), JSON).refused(400)
    ask(probe.url, mark.encode(), ANY_IMAGE).refused(400)
    lines = probe.running.lines()
    assert {"ready on"} <= {line.get("message", "")[:8] for line in lines}
    facts = [line for line in lines if "status" in line]
    assert set(facts[0]) == {"time", "level", "request_id", "status", "bytes", "milliseconds"}
    assert {"status": 400, "bytes": 10}.items() <= facts[-1].items()
    assert mark not in probe.running.text()


def test_bodies_beyond_the_limit_are_not_read(small: Probe) -> None:
    with small.running.connect(
        b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 200001\r\n\r\n"
    ) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    chunks = iter([b" " * 50_000] * 5)
    answer = ask(small.url, chunks, JSON)
    assert answer.refused(413) == "the body has more bytes than the limit of 200000"
    ask(small.url, b" " * 200_000, JSON).refused(400)
    answer = ask(small.url, method="GET", path="/execution-parameters")
    assert answer.json() == {"MaxConcurrentTransforms": 3, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": 1}


def test_bfloat16_answers_nearly_alike(small: Probe, classifier: inference.Classifier) -> None:
    found = ask(small.url, npy(NUMBERS), NPY).json()["probabilities"]
    exact = inference.predict_fn(NUMBERS, classifier)["probabilities"]
    near(found, exact, 0.02)
    assert found != exact


def test_a_full_queue_refuses_and_asks_to_come_again(small: Probe) -> None:
    (small.folder / "gate").touch()
    with ThreadPoolExecutor(7) as pool:
        calls = [pool.submit(ask, small.url, photo(), ANY_IMAGE) for _ in range(7)]
        end = time.monotonic() + 30
        while sum(call.done() for call in calls) < 4:
            assert time.monotonic() < end
            time.sleep(0.01)
        (small.folder / "gate").unlink()
        answers = [call.result() for call in calls]
    refused = [answer for answer in answers if answer.status != 200]
    assert len(refused) == 4
    for answer in refused:
        assert "3 requests are being answered, which is the limit" in answer.refused(503)
        assert answer.headers["retry-after"] == "1"
    assert ask(small.url, photo(), ANY_IMAGE).labels() == ["up"]


def test_an_answer_that_cannot_be_split_is_asked_for_again_alone(small: Probe) -> None:
    (small.folder / "whole").touch()
    answers = small.together(*[lambda: ask(small.url, photo("left"), ANY_IMAGE)] * 2)
    (small.folder / "whole").unlink()
    assert [answer.json()["images"] for answer in answers] == [1, 1]
    assert split({"a": [1, 2, 3], "b": [4, 5, 6]}, [1, 2]) == [{"a": [1], "b": [4]}, {"a": [2, 3], "b": [5, 6]}]
    names = ("x", "y", "z")  # as many as images
    assert split({"a": [1, 2, 3], "classes": names}, [1, 2]) == [
        {"a": [1], "classes": names}, {"a": [2, 3], "classes": names}
    ]  # fmt: skip
    for prediction in ([1, 2, 3], {"a": [1, 2, 3], "b": [1, 2]}, {"a": [1, 2, 3], "b": "one"}):
        assert split(prediction, [1, 2]) is None


def test_a_model_that_is_stuck(small: Probe) -> None:
    """Its requests end by timeout, and after two of these the server counts as broken, until it is not."""
    (small.folder / "gate").touch()
    before, begun = len(small.notes("sizes")), time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        inside = pool.submit(ask, small.url, photo("up"), ANY_IMAGE)
        small.until("sizes", before + 1)
        waits = pool.submit(ask, small.url, photo("left"), ANY_IMAGE)
        for call in (inside, waits):
            assert call.result().refused(504) == "no answer within 2 s"
    assert small.running.ping() == 200
    small.running.wait_until(503)
    assert 3.9 < time.monotonic() - begun < 30
    answer = ask(small.url, photo(), ANY_IMAGE)
    assert answer.refused(503) == "the model is not ready"
    (small.folder / "gate").unlink()
    small.running.wait_until(200)
    assert ask(small.url, photo(), ANY_IMAGE).labels() == ["up"]
    assert small.sizes_after(before) == [1, 1]  # nobody waits for the other answer any more


def test_decoders_that_are_stuck(small: Probe) -> None:
    """One of two costs nothing but itself; a server without any is broken, and is not when they are done after all."""

    def held() -> Any:
        return ask(small.url, photo(), ANY_IMAGE, X_Amzn_SageMaker_Custom_Attributes="hold:decoder")

    (small.folder / "decoder").touch()
    assert held().refused(504) == "no answer within 2 s"
    assert small.running.ping() == 200
    assert ask(small.url, photo(), ANY_IMAGE).labels() == ["up"]
    assert held().refused(504)
    small.running.wait_until(503)
    assert "not ready" in ask(small.url, photo(), ANY_IMAGE).refused(503)
    (small.folder / "decoder").unlink()
    small.running.wait_until(200)
    assert ask(small.url, photo(), ANY_IMAGE).labels() == ["up"]


def test_from_loading_to_leaving(handlers: Path, tmp_path: Path) -> None:
    (tmp_path / "loading").touch()
    with started(handlers, tmp_path / "log", PROBE=str(tmp_path)) as running, ThreadPoolExecutor(3) as pool:
        running.wait_until(503)
        answer = ask(running.url, method="GET", path="/ping")
        assert (answer.status, answer.body) == (503, b"")
        early = ask(running.url, photo(), ANY_IMAGE)
        assert early.refused(503) == "the model is not ready"
        assert early.headers["retry-after"] == "1"
        (tmp_path / "loading").unlink()
        running.wait_until(200)
        (tmp_path / "gate").touch()
        calls = [pool.submit(ask, running.url, photo(label), ANY_IMAGE) for label in CLASSES]
        Probe(running, tmp_path).until("inputs", 3)
        running.process.terminate()
        while running.ping():  # no new connections
            time.sleep(0.05)
        time.sleep(1)
        (tmp_path / "gate").unlink()
        assert [call.result().labels() for call in calls] == [[label] for label in CLASSES]
        assert running.process.wait(10) == 0


def test_leaving_does_not_wait_for_a_model_that_loads(handlers: Path, tmp_path: Path) -> None:
    (tmp_path / "loading").touch()
    with started(handlers, tmp_path / "log", PROBE=str(tmp_path)) as running:
        running.wait_until(503)
        Probe(running, tmp_path).until("loads", 1)
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(10) == 0


def ended(model_dir: Path, log: Path, **environment: Any) -> tuple[int, str]:
    """Exit code and output of a server that cannot start."""
    with started(model_dir, log, 0, **environment) as running:
        return running.process.wait(60), running.text()


def test_what_cannot_be_served_ends_the_server_with_a_sentence(artifact: Path, tmp_path: Path) -> None:
    def rewrite(name: str, old: str, new: str) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            text = (folder / name).read_text(encoding="utf-8")
            assert old in text
            (folder / name).write_text(text.replace(old, new, 1), encoding="utf-8")

        return change

    def damage(folder: Path) -> None:
        weights = bytearray((folder / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (folder / "model.safetensors").write_bytes(weights)

    handlers, golden = "code/inference.py", json.loads((artifact / "golden.json").read_text())
    golden["samples"][0]["probabilities"].reverse()
    changes: dict[str, tuple[Callable[[Path], object], str]] = {
        "labels": (rewrite("model.json", '"down",', ""), "does not fit model.json, which names cnn for 2 classes"),
        "gone": (lambda folder: (folder / handlers).unlink(), f"there is no {tmp_path}/gone/{handlers}; mount"),
        "import": (rewrite(handlers, "import base64", "import no_such"), "No module named 'no_such'"),
        "exit": (rewrite(handlers, "import base64", "raise SystemExit(0)"), "a handler raised SystemExit(0)"),
        "stop": (rewrite(handlers, "import base64", "raise StopIteration"), "a handler raised StopIteration()"),
        "missing": (rewrite(handlers, "def output_fn", "def other"), "has no function output_fn; it needs model_fn,"),
        "golden": (lambda folder: (folder / "golden.json").write_text(json.dumps(golden)), "golden sample 0 was"),
    }
    folders = {edited(artifact, tmp_path / name, change): message for name, (change, message) in changes.items()}
    folders[tmp_path / "nowhere"] = "there is no "
    shutil.copytree(artifact, tmp_path / "weights")
    damage(tmp_path / "weights")
    folders[tmp_path / "weights"] = "model.safetensors is missing or does not match its checksum"
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda folder: ended(folder, tmp_path / f"{folder.name}.log"), folders)
    for (folder, message), (code, text) in zip(folders.items(), results, strict=True):
        assert code == 3, text
        last = json.loads(text.splitlines()[-1])
        assert last["level"] == "error"
        assert last["message"].startswith(f"{folder} cannot be served: ")
        assert message in last["message"]


def test_settings_that_are_no_numbers_end_the_server(artifact: Path, tmp_path: Path) -> None:
    server = {"QUEUE": "0", "MERGED": "-1", "THREADS": "x", "WORKERS": "-0", "TIMEOUT": "1.5", "MAX_BYTES": ""}
    settings = {f"INFERENCE_{name}": value for name, value in server.items()}
    settings |= {"SAGEMAKER_BIND_TO_PORT": "9" * 19}
    for name, value in settings.items():
        code, text = ended(artifact, tmp_path / name, **{name: value})
        expected = f"error: the environment variable {name} is {value!r}; set it to a whole number from 1\n"
        assert (code, text) == (1, expected)
    for name, value in (("INFERENCE_MAX_BATCH", "0"), ("INFERENCE_PRECISION", "fp64")):  # of the handlers
        code, text = ended(artifact, tmp_path / name, **{name: value})
        assert code == 3
        assert (
            f"the environment variable {name} is {value!r}; set it to " in json.loads(text.splitlines()[-1])["message"]
        )


def test_ports_that_cannot_be_had_end_the_server(artifact: Path, tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        started(artifact, tmp_path / "taken", taken.getsockname()[1]) as running,
    ):
        assert running.process.wait(30) == 1
        assert "address already in use" in running.text()
    with started(artifact, tmp_path / "wrong", 65536) as running:
        assert running.process.wait(30) == 2
        assert "port 65536 is not between 0 and 65535" in running.text()


def test_leaving_waits_for_half_a_body_but_not_for_ever(leaving: Any) -> None:
    code, seconds = leaving.result()
    assert code == 0
    assert seconds < 25


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),  # a container
        ("0::/\n", {"cpu.max": "max 100000"}, 64),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),  # a service of systemd
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "200000 100000"}, 2),
        ("3:cpu,cpuacct:/x\n0::/\n", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ("3:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, 64),
        ("0::/\n", {"cpu.max": "strange"}, 64),
        ("0::/\n", {}, 64),
        (None, {}, 64),
    ],
)
def test_a_quota_of_processors_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str | None, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    found = {f"sys/fs/cgroup/{name}": text for name, text in files.items()} | ({"proc/self/cgroup": own} if own else {})
    for name, text in found.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert processors(tmp_path) == expected


def test_threads_follow_what_may_be_used() -> None:
    """In a process that may use one processor of this machine's."""
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import sys; sys.path.insert(0, 'src');"
    code += "from inference.serve import Settings; from inference.batcher import processors;"
    done = subprocess.run(
        [sys.executable, "-c", f"{code} print(processors(), Settings().threads)"], capture_output=True, text=True
    )
    assert done.stdout.split() == ["1", "1"], done.stderr
