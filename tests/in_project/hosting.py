"""The peers' 37 cases as checks of any host over HTTP, and the project's own server as a process.

`CASES` ask a running host, given by its URL. `NOT_HTTP` names the test that proves a case that HTTP cannot, `EXCLUDED`
what a host other than the project's own answers differently, and why.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from inference.export import checksums
from pipelines.local.serve import command
from tests.helpers import free_port, verb_environment

JSON, NPY, ANY_IMAGE = "application/json", "application/x-npy", "application/x-image"
READY_SECONDS = 120


@dataclass(frozen=True)
class Facts:
    """What the checks compare answers with."""

    model_dir: Path  # the unpacked artifact
    classes: list[str]
    image_size: int
    images: list[tuple[str, bytes]]  # class and PNG file
    probabilities: list[list[float]]  # the handlers' own answers for these, in-process
    canary: Path  # must never come to exist

    def numbers(self, count: int = 2) -> Any:
        shape = (count, 3, self.image_size, self.image_size)
        return np.random.default_rng(count).integers(-2, 3, shape).astype(np.float32)


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    def json(self) -> Any:
        """Strict JSON, and called so."""
        assert self.headers["content-type"] == JSON, self.headers
        return json.loads(self.body, parse_constant=no_json)

    def refused(self, *statuses: int) -> str:
        """The sentence of a refusal, which tells nothing about the inside."""
        assert self.status in statuses, (self.status, self.body[:500])
        content = self.json()
        assert list(content) == ["error"]
        assert not any(word in self.body for word in (b"Traceback", b"site-packages", b".py", b"object at 0x"))
        return str(content["error"])

    def labels(self) -> list[str]:
        assert self.status == 200, (self.status, self.body[:500])
        return list(self.json()["labels"])


def no_json(word: str) -> Any:
    raise AssertionError(f"{word} is no JSON")


def ask(
    url: str, body: bytes | str | Iterator[bytes] | None = None, /, kind: str | None = None,
    path: str = "/invocations", method: str = "POST", timeout: float = 60, **headers: str,
) -> Reply:  # fmt: skip
    """One request on a connection of its own; `Some_Header="x"` becomes `Some-Header: x`."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=timeout)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, body, named | ({} if kind is None else {"Content-Type": kind}))
        response = connection.getresponse()
        return Reply(response.status, {name.lower(): text for name, text in response.getheaders()}, response.read())
    finally:
        connection.close()


def npy(array: Any, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def instances(values: Any) -> str:
    return json.dumps({"instances": values})


def encoded(images: list[tuple[str, bytes]]) -> str:
    return instances([{"b64": base64.b64encode(body).decode()} for _, body in images])


def near(answers: list[list[float]], expected: list[list[float]], tolerance: float = 1e-5) -> None:
    assert np.allclose(answers, expected, atol=tolerance), np.abs(np.subtract(answers, expected)).max()


CASES: dict[int, Callable[[str, Facts], None]] = {}


def case(*numbers: int) -> Callable[[Callable[[str, Facts], None]], Callable[[str, Facts], None]]:
    def register(check: Callable[[str, Facts], None]) -> Callable[[str, Facts], None]:
        CASES.update(dict.fromkeys(numbers, check))
        return check

    return register


@case(1)
def json_numbers(url: str, facts: Facts) -> None:
    numbers = facts.numbers()
    whole = ask(url, instances(numbers.astype(int).tolist()), JSON)
    assert whole.json() == ask(url, instances(numbers.tolist()), JSON).json()
    assert whole.status == 200
    ask(url, instances(numbers.astype(str).tolist()), JSON).refused(400)


@case(2, 3, 5, 6)
def types_that_no_one_decodes(url: str, _: Facts) -> None:
    archive = io.BytesIO()
    np.savez(archive, a=np.eye(3))
    for body, kind in ((b"42\n6\n9", "text/csv"), (b"1,2\n3\n", "text/csv"), (archive.getvalue(), "application/x-npz"),
                       (b"\0\1", "application/octet-stream")):  # fmt: skip
        assert kind in ask(url, body, kind).refused(415)


@case(4)
def pickles_are_not_loaded(url: str, facts: Facts) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (facts.canary,)

    for content in ({"a": 1}, Evil()):
        ask(url, npy(np.array([content], dtype=object), allow_pickle=True), NPY).refused(400)
    assert not facts.canary.exists()


@case(7)
def npy_and_json_are_alike(url: str, facts: Facts) -> None:
    numbers = facts.numbers(3)
    answers = [ask(url, npy(numbers), NPY), ask(url, instances(numbers.tolist()), JSON)]
    assert [answer.status for answer in answers] == [200, 200]
    near(answers[0].json()["probabilities"], answers[1].json()["probabilities"])


@case(8, 12)
def what_is_not_json_is_not_acceptable(url: str, facts: Facts) -> None:
    for accept in ("text/csv", NPY, "application/pdf", "nonsense", "application/json;q=0"):
        assert accept in ask(url, facts.images[0][1], ANY_IMAGE, Accept=accept).refused(406)


@case(10, 11, 13, 16)
def accepted_types(url: str, facts: Facts) -> None:
    for accept in ("application/unsupported, application/json, text/csv", "text/csv, application/json", "*/*",
                   "application/json;q=0.9,*/*;q=0.8", "APPLICATION/JSON", None):  # fmt: skip
        headers: dict[str, Any] = {} if accept is None else {"Accept": accept}
        assert ask(url, facts.images[0][1], ANY_IMAGE, **headers).labels() == [facts.images[0][0]]


@case(14)
def names_of_headers_in_any_case(url: str, facts: Facts) -> None:
    for name in ("Content-Type", "content-type", "CONTENT-TYPE"):
        header: dict[str, Any] = {name: "image/png"}
        assert ask(url, facts.images[0][1], **header).labels() == [facts.images[0][0]]


@case(15)
def text_and_its_parameters(url: str, facts: Facts) -> None:
    for kind in (JSON, "application/json; charset=utf-8", "Application/JSON", None):
        assert ask(url, encoded(facts.images[:1]), kind).labels() == [facts.images[0][0]]
    ask(url, b'{"instances": "\xff"}', JSON).refused(400)


@case(25, 29)
def a_batch_keeps_its_order(url: str, facts: Facts) -> None:
    together = ask(url, encoded(facts.images), JSON)
    assert together.labels() == [label for label, _ in facts.images]
    near(together.json()["probabilities"], facts.probabilities)
    numbers = facts.numbers(30)
    for body, kind in ((npy(numbers), NPY), (instances(numbers.tolist()), JSON)):
        found = ask(url, body, kind).json()["probabilities"]
        assert np.shape(found) == (30, len(facts.classes))
        alone = [ask(url, npy(row[None]), NPY).json()["probabilities"][0] for row in numbers[::10]]
        near(found[::10], alone)


@case(30)
def nothing_to_answer(url: str, _: Facts) -> None:
    for body, kind in ((b"", JSON), (b"", ANY_IMAGE), (b"{}", JSON), (b"null", JSON), (b'{"instances": []}', JSON),
                       (npy(np.zeros((0, 3, 4, 4), np.float32)), NPY)):  # fmt: skip
        ask(url, body, kind).refused(400)


@case(33)
def nothing_but_the_three_paths(url: str, _: Facts) -> None:
    for method, path in (("GET", "/models"), ("POST", "/models?url=x"), ("GET", "/"), ("GET", "/docs"),
                         ("GET", "/metrics"), ("GET", "/ping/../models")):  # fmt: skip
        ask(url, method=method, path=path).refused(404)
    ask(url, method="GET").refused(404, 405)


@case(36)
def photos_get_their_class(url: str, facts: Facts) -> None:
    found = []
    for (label, body), expected in zip(facts.images, facts.probabilities, strict=True):
        answer = ask(url, body, "image/png").json()
        near(answer["probabilities"], [expected])
        assert answer["classes"] == facts.classes
        assert answer["classes"][int(np.argmax(answer["probabilities"][0]))] == answer["labels"][0]
        assert answer["predictions"] == [facts.classes.index(answer["labels"][0])]
        jpeg = io.BytesIO()
        Image.open(io.BytesIO(body)).save(jpeg, "JPEG", quality=95)
        found += [answer["labels"] == [label], ask(url, jpeg.getvalue(), "image/jpeg").labels() == [label]]
    assert np.mean(found) >= 0.9
    for sample in json.loads((facts.model_dir / "golden.json").read_text())["samples"]:
        answer = ask(url, base64.b64decode(sample["body"]), sample["content_type"])
        assert answer.labels() == [sample["label"]]
        near(answer.json()["probabilities"], [sample["probabilities"]], 0.02)


@case(37)
def ping(url: str, _: Facts) -> None:
    answer = ask(url, method="GET", path="/ping")
    assert (answer.status, answer.body) == (200, b"")


NOT_HTTP = {
    9: "test_server.py::test_handlers_that_fail_cost_only_their_request",
    17: "test_requests.py::test_a_context_that_can_set_the_status_gets_it",
    18: "test_hosting.py::test_there_are_exactly_the_four_handlers",
    19: "test_server.py::test_what_cannot_be_served_ends_the_server_with_a_sentence",
    20: "test_server.py::test_handlers_that_fail_cost_only_their_request",
    21: "test_server.py::test_what_cannot_be_served_ends_the_server_with_a_sentence",
    22: "test_server.py::test_headers_between_client_and_handlers",
    23: "test_server.py::test_what_cannot_be_served_ends_the_server_with_a_sentence",
    24: "test_server.py::test_the_model_is_loaded_once",
    26: "test_hosting.py::test_weights_are_saved_for_any_device",
    28: "test_server.py::test_nothing_is_imported_or_installed_without_need",
    31: "test_server.py::test_handlers_that_fail_cost_only_their_request",
    32: "test_server_faults.py::test_a_killed_server_starts_again_on_its_port",
    34: "test_server.py::test_headers_between_client_and_handlers",
    35: "test_server.py::test_settings_that_are_no_numbers_end_the_server",
}
NOT_APPLICABLE = {27: "one process and no context with an id of a device: handlers ask torch for the device"}
EXCLUDED: dict[str, dict[int, str]] = {
    "process": {},
    "session": {},
    "ray": {},
    "torchserve": {
        15: "the toolkit decodes text itself; what is not UTF-8 is a 500 with a traceback",
        33: "its management API answers on the same port",
        37: "its body is a status",
    },
}


@dataclass
class Running:
    """A server of the project as a process."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    url: str = field(init=False)

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{self.port}"

    def ping(self) -> int:
        """Status of `/ping`; 0 while nothing listens."""
        try:
            return ask(self.url, method="GET", path="/ping", timeout=10).status
        except (OSError, http.client.HTTPException):
            return 0

    def wait_until(self, status: int) -> None:
        end = time.monotonic() + READY_SECONDS
        while self.ping() != status:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.05)

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.is_file() else ""

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().splitlines()]

    def stat(self, name: str) -> int:
        """A number of /proc, as `VmRSS` (kB) or `Threads`."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{name}:")))

    def connect(self, request: bytes = b"") -> socket.socket:
        """A connection on which this much was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(request)
        return connection


@contextmanager
def started(
    model_dir: Path, log: Path, port: int = 0, /, local: Sequence[str] = (), **environment: Any
) -> Iterator[Running]:
    """Start the server; it need not be ready, nor ever become so."""
    port = port or free_port()
    variables = verb_environment() | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | environment
    with log.open("ab") as file:
        process = subprocess.Popen(
            command(None, model_dir, port, local=local), env=variables,
            stdin=subprocess.DEVNULL, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        yield Running(process, port, log)
    finally:
        process.kill()
        process.wait()


@contextmanager
def serving(
    model_dir: Path, log: Path, port: int = 0, /, local: Sequence[str] = (), **environment: Any
) -> Iterator[Running]:
    """The same, once it is ready."""
    with started(model_dir, log, port, local=local, **environment) as running:
        running.wait_until(200)
        yield running


PROBE = """

import sys
import time

_model, _input, _predict, _output = model_fn, input_fn, predict_fn, output_fn
_folder = Path(os.environ["PROBE"])
_errors = {"memory": MemoryError("secret"), "stop": StopIteration("secret"), "exit": SystemExit(7),
           "time": TimeoutError("secret"), "value": ValueError("secret"), "forbidden": RequestError(403, "not you"),
           "strange": RequestError(200, "secret"), "modules": RequestError(400, "")}
_codes = dict(enumerate(_errors))
_fit = fit


def fit(batch, model):  # some batches below are lists of something else
    return _fit(batch, model) if isinstance(batch, list) and all(hasattr(one, "shape") for one in batch) else batch


def _note(name, text):
    with (_folder / name).open("a") as file:
        file.write(text + "\\n")


def _hold(name):
    while (_folder / name).exists():
        time.sleep(0.01)


class Frame:
    shape = (3, 4)


def model_fn(model_dir):
    _note("loads", "once")
    _hold("loading")
    return _model(model_dir)


def input_fn(body, content_type, context):
    verb, _, wish = (context.get_request_header(0, "X-Amzn-SageMaker-Custom-Attributes") or "").partition(":")
    if verb == "input":
        if wish == "modules":
            raise RequestError(400, " ".join(sys.modules))
        raise _errors[wish]
    if verb == "hold":
        _hold(wish)
    if verb == "set":
        context.set_response_header(0, *json.loads(wish))
    if verb == "return":
        return {"scalar": np.float32(1), "frame": Frame(), "text": ["a", "b"]}[wish]
    batch = _input(body, content_type, context)
    _note("inputs", "one")
    return batch


def predict_fn(batch, model):
    if not isinstance(batch, (list, np.ndarray)) or isinstance(batch[0], str):
        _hold("gate")
        return {"type": type(batch).__name__}
    _note("threads", str(torch.get_num_threads()))
    _note("sizes", str(len(batch)))
    _hold("gate")
    if isinstance(batch, list):
        for image in batch:
            if tuple(image[0, 0, :2]) == (255, 0):
                raise _errors[_codes[int(image[0, 0, 2])]]
    if (_folder / "whole").exists():
        return {"probabilities": _predict(batch, model)["probabilities"], "images": len(batch)}
    return _predict(batch, model)


def output_fn(prediction, accept, context):
    verb, _, wish = (context.get_request_header(0, "X-Amzn-SageMaker-Custom-Attributes") or "").partition(":")
    if verb == "output":
        if wish in _errors:
            raise _errors[wish]
        return {"object": {"secret": 1}, "bytes": b"{}", "type": ("{}", "text/plain\\r\\nEvil: \u20ac")}[wish]
    return _output(prediction, accept, context)
"""


def edited(artifact: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    """A copy of an artifact after a change, with right checksums."""
    shutil.copytree(artifact, folder)
    change(folder)
    facts = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(facts | {"files": checksums(folder)}))
    return folder


def probed(artifact: Path, folder: Path) -> Path:
    """A copy whose handlers fail, wait and tell as a test wishes; files of the folder PROBE are its signals."""

    def change(copy: Path) -> None:
        with (copy / "code" / "inference.py").open("a", encoding="utf-8") as file:
            file.write(PROBE)
        (copy / "code" / "requirements.txt").write_text("a-package-that-does-not-exist==1\n")

    return edited(artifact, folder, change)
