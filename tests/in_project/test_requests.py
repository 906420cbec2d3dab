"""Requests: content types, limits and everything that a client may get wrong, at the handlers."""

from __future__ import annotations

import base64
import io
import json
import math
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import payload
from inference import inference
from inference.export import checksums
from payload import JSON_TYPE, Limits, RequestError
from tests.helpers import CLASSES, draw
from tests.hosting import NPY, npy
from tests.test_inference import artifact, classifier, photo

__all__ = ["artifact", "classifier"]  # fixtures


def header(text: str, version: tuple[int, int] = (1, 0)) -> bytes:
    padded = text.encode().ljust(118) + b"\n"
    return b"\x93NUMPY" + bytes(version) + len(padded).to_bytes(2, "little") + padded


def deep(levels: int) -> bytes:
    return b'{"instances": ' + b"[" * (levels - 1) + b"1" + b"]" * (levels - 1) + b"}"


BAD: list[tuple[bytes | str, str | None, int]] = [
    (b"x", "text/csv", 415),
    (b"x", "image/gif", 415),
    (b"x", "", 400),
    (b"", "image/png", 400),
    ("text", "image/png", 400),
    ("text", NPY, 400),
    (b"{", JSON_TYPE, 400),
    (b"", None, 400),
    (b"\xff", JSON_TYPE, 400),
    (b"[" * 100_000, JSON_TYPE, 400),
    (b"[" * 100_000 + b"]" * 100_000, JSON_TYPE, 400),
    (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, JSON_TYPE, 400),
    (deep(9), JSON_TYPE, 400),
    (b"[]", JSON_TYPE, 400),
    (b'{"instances": []}', JSON_TYPE, 400),
    (b'{"instances": {"b64": "aGk="}}', JSON_TYPE, 400),
    (b'{"instances": [[1], [1, 2]]}', JSON_TYPE, 400),
    (b'{"instances": ["a"]}', JSON_TYPE, 400),
    (b'{"instances": [["a"]]}', JSON_TYPE, 400),
    (b'{"instances": [[null]]}', JSON_TYPE, 400),
    (b'{"instances": [[true]]}', JSON_TYPE, 400),
    (b'{"instances": [[1], {"b64": "aGk="}]}', JSON_TYPE, 400),
    (b'{"instances": [[NaN]]}', JSON_TYPE, 400),
    (b'{"instances": [[1e999]]}', JSON_TYPE, 400),
    (b'{"instances": [[1e300]]}', JSON_TYPE, 400),
    (b'{"instances": [[' + b"9" * 4000 + b"]]}", JSON_TYPE, 400),
    (b'{"instances": [[' + b"9" * 5000 + b"]]}", JSON_TYPE, 400),
    (b'{"instances": [{"b64": "%"}]}', JSON_TYPE, 400),
    ('{"instances": [{"b64": "\u00e9"}]}', JSON_TYPE, 400),
    (b'{"instances": [{"b64": "aGk="}]}', JSON_TYPE, 400),
    (b'{"instances": [{"url": "http://127.0.0.1/"}]}', JSON_TYPE, 400),
    (b'{"instances": [{"path": "/etc/passwd"}]}', JSON_TYPE, 400),
    (b'{"instances": [[[[1]]]]}', JSON_TYPE, 400),
    (json.dumps({"instances": np.full((1, 3, 12, 12), 3e38).tolist()}), JSON_TYPE, 400),
    (json.dumps({"instances": [[1]] * 257}), JSON_TYPE, 413),
    (b" " * (6 * 2**20 + 1), JSON_TYPE, 413),
    (b"x", NPY, 400),
    (b"\x93NUMPY", NPY, 400),
    (npy(np.zeros((1, 3, 12, 12)))[:-1], NPY, 400),
    (npy(np.zeros((1, 3, 12, 12))) + b"x", NPY, 400),
    (npy(np.zeros((0, 3, 12, 12))), NPY, 400),
    (npy(np.zeros((257, 1), np.uint8)), NPY, 413),
    (npy(np.float32(1)), NPY, 400),
    (npy(np.zeros((1, 3, 12, 12), complex)), NPY, 400),
    (npy(np.zeros(2, "U3")), NPY, 400),
    (npy(np.zeros(2, [("a", "f4")])), NPY, 400),
    (npy(np.full((1, 3, 12, 12), np.inf)), NPY, 400),
    (npy(np.array([{"a": 1}], dtype=object), allow_pickle=True), NPY, 400),
    (header("{'descr': '<f4', 'fortran_order': False, 'shape': (30000000000,)}") + b"1234", NPY, 400),
    (header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1)}") + b"1234", NPY, 400),
    (header("{'descr': '<f4', 'fortran_order': False, 'shape': (1.5,)}") + b"123456", NPY, 400),
    (header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}") + b"12345678", NPY, 400),
    (header("[" * 100), NPY, 400),
    (header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1," * 25 + ")}") + b"1234", NPY, 400),
    (npy(np.zeros((1, 3, 13, 13))), NPY, 400),
    (json.dumps({"instances": np.zeros((1, 3, 13, 13)).tolist()}), JSON_TYPE, 400),
    (json.dumps({"instances": [1] * 300}), JSON_TYPE, 413),
    (b'{"instances": [1, 2]}', JSON_TYPE, 400),
    (b'{"instances": [[1] [2]]}', JSON_TYPE, 400),
    (b'{"instances": [[1], ]}', JSON_TYPE, 400),
    (b'{"instances": [[1}]}', JSON_TYPE, 400),
    (b'{"instances": [[1]], "more": [[x]]}', JSON_TYPE, 400),
    (b'{"instances": [[1]], "b64": "open}', JSON_TYPE, 400),
    (b'{"instances": [[1]]', JSON_TYPE, 400),
    (b'{"instances": [[1', JSON_TYPE, 400),
    (b'\\"{"instances": [[1]]}\\"', JSON_TYPE, 400),
    ('{"instances": [{"b64": "\ud800"}]}', JSON_TYPE, 400),
    (header("", (9, 9)), NPY, 400),
]


@pytest.mark.parametrize(("body", "kind", "status"), BAD)
def test_bad_requests_have_a_status_and_a_sentence(
    classifier: inference.Classifier, body: bytes | str, kind: str | None, status: int
) -> None:
    with pytest.raises(RequestError) as error:
        inference.predict_fn(inference.input_fn(body, kind), classifier)
    assert error.value.status == status
    assert len(str(error.value)) < 300
    assert "Error" not in str(error.value)
    assert str(error.value).isprintable()
    if isinstance(body, bytes):  # as the PyTorch toolkit hands it over
        with pytest.raises(RequestError) as again:
            inference.predict_fn(inference.input_fn(bytearray(body), kind), classifier)
        assert again.value.status == status


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"instances": [[NaN]]}', "not finite in float32"),
        (b'{"instances": [[1e300]]}', "not finite in float32"),
        (b'{"instances": [[null]]}', "lists of numbers of one shape"),
        (b'{"instances": [[1], {"b64": "aGk="}]}', "lists of numbers of one shape"),
        (b'{"instances": [{"b64": "a%Gk="}]}', "instance 0: b64 is not base64"),
        (b'{"instances": [{"b64": "aGk="}]}', "instance 0: 2 bytes that are not a readable image"),
        (deep(9), "nested deeper than the limit of 8"),
        (b'{"instances": [[1]], "name": "' + b'\\"' * 100_000, "a string does not end"),
        (b"{", "not valid JSON: Expecting property name"),
    ],
)
def test_the_sentence_says_what_is_wrong(body: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        inference.input_fn(body, JSON_TYPE)


def whole_requests() -> list[tuple[bytes, str]]:
    """One of each kind, all of which are answered."""
    requests = []
    picture = Image.open(io.BytesIO(photo()))
    for kind, mode in (
        ("JPEG", "RGB"),
        ("PNG", "LA"),
        ("WEBP", "RGBA"),
        ("BMP", "P"),
        ("TIFF", "I;16"),
        ("JPEG", "CMYK"),
    ):
        buffer = io.BytesIO()
        picture.convert("L" if mode == "I;16" else mode).convert(mode).save(buffer, kind)
        requests.append((buffer.getvalue(), f"image/{kind.lower()}"))
    numbers = np.random.default_rng(0).normal(size=(2, 3, 12, 12)).astype(np.float32)
    encoded = [{"b64": base64.b64encode(body).decode()} for body, _ in requests]
    requests += [(npy(numbers), NPY), (json.dumps({"instances": numbers.tolist()}).encode(), JSON_TYPE)]
    return [*requests, (json.dumps({"instances": encoded}).encode(), JSON_TYPE)]


@pytest.mark.parametrize("index", range(9))
def test_a_damaged_request_is_answered_or_refused(classifier: inference.Classifier, index: int) -> None:
    """Bytes flipped, cut, repeated and inserted at random: a 4xx or finite numbers, and nothing else."""
    body, kind = whole_requests()[index]
    assert inference.predict_fn(inference.input_fn(body, kind), classifier)["labels"]
    random = np.random.default_rng(index)
    statuses = []
    for _ in range(300):
        data = bytearray(body)
        for _ in range(random.integers(1, 4)):
            start, length = int(random.integers(len(data))), int(random.integers(1, 12))
            noise = random.bytes(length)
            change = random.integers(4)
            data[start : start + length] = (noise, b"", noise + data[start : start + length], noise[:1] * 40)[change]
        try:
            prediction = inference.predict_fn(inference.input_fn(bytes(data), kind), classifier)
            assert inference.output_fn(prediction, "*/*")
        except RequestError as error:
            statuses.append(error.status)
    assert set(statuses) <= {400, 413}
    assert len(statuses) > 10


def test_an_image_gets_the_same_answer_alone_and_in_a_batch(classifier: inference.Classifier) -> None:
    images = [np.asarray(draw(CLASSES[number % 3], number)) for number in range(20)]
    together = inference.predict_fn(images, classifier)
    for index, image in enumerate(images):
        alone = inference.predict_fn([image], classifier)
        assert alone["labels"][0] == together["labels"][index]
        assert np.allclose(alone["probabilities"][0], together["probabilities"][index], atol=1e-5)


def test_nothing_in_a_request_is_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    with pytest.raises(RequestError):
        inference.input_fn(npy(np.array([Evil()], dtype=object), allow_pickle=True), NPY)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2", "<i8", "|u1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_and_json_numbers_get_the_same_answer(classifier: inference.Classifier, dtype: str, order: Any) -> None:
    numbers = np.random.default_rng(0).integers(0, 3, (2, 3, 12, 12)).astype(dtype)
    from_json = inference.input_fn(json.dumps({"instances": numbers.tolist()}), JSON_TYPE)
    from_npy = inference.input_fn(npy(np.asarray(numbers, order=order)), "Application/X-NPY; q=1")
    assert inference.predict_fn(from_npy, classifier) == inference.predict_fn(from_json, classifier)


def test_nesting_is_counted_outside_strings_only() -> None:
    documents: list[Any] = [{"instances": [{"b64": "[[[[[[[[[[[[\\" + '"{{{{{{{{{{{{{'}]}, [[], {}] * 100]
    for document in documents:
        payload._outline(json.dumps(document).encode())
    payload._outline(deep(8))
    for text in (deep(9), b"[{" * 5 + b"}]" * 5, b"{[" * 5 + b"]}" * 5, b'"\\\\"' + b"[" * 9):
        with pytest.raises(RequestError, match="nested deeper than the limit of 8"):
            payload._outline(text)


def test_only_what_stands_in_instances_counts(classifier: inference.Classifier) -> None:
    number = np.zeros((3, 12, 12)).tolist()
    documents: list[dict[str, Any]] = [
        {"more": [[[1]], {"a": {"b": 2}}], "instances": [number], "": {"": 1}},
        {"instances": [[[1]]], "name": 'a "quoted" \\ [[[[[[[[[[ name', "options": {"instances": [[1]]}},
    ]
    for document in documents:
        text = json.dumps(document).replace('[[[1]]], "name"', f'[{json.dumps(number)}], "name"')
        assert len(inference.predict_fn(inference.input_fn(text), classifier)["labels"]) == 1
    later = '{"instances": [[1]], "instances": ' + json.dumps([number] * 2) + "}"
    assert len(inference.input_fn(later)) == 2
    image = {"b64": base64.b64encode(photo()).decode(), "id": "7", "name": 'a "cat", [1]', "box": [1, 2, 3, 4]}
    beside = {"ids": list(range(256)), "names": ["x"] * 256, "meta": [{"id": 1, "tags": ["a", "b"]}] * 256}
    for indent in (None, 2, "\t"):
        assert len(inference.input_fn(json.dumps({**beside, "instances": [image] * 256}, indent=indent))) == 256
    unicode = "".join(f"\\u{ord(letter):04x}" for letter in str(image["b64"]))
    assert len(inference.input_fn('{"\\u0069nstances": [{"\\u00624": 1, "b64": "' + unicode + '"}]}')) == 1
    escaped = base64.b64encode(photo()).decode().replace("/", r"\/")
    assert len(inference.input_fn('{"instances": [{"b64": "' + escaped + '", "id": "a"}]}')) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"instances": [' + b"[]," * 1100 + b"[]]}", "the request has 1101 instances, more than the limit of 256"),
        (b'{"instances": [' + b"1," * 20_000 + b"1]}", "the JSON has 20000 values, more than 256 instances can need"),
    ],
)
def test_what_stands_beside_the_model_s_rows_is_counted_before_it_is_parsed(
    monkeypatch: pytest.MonkeyPatch, body: bytes, message: str
) -> None:
    monkeypatch.setattr(payload, "_parse", pytest.fail)
    with pytest.raises(RequestError, match=message) as caught:
        payload.read(body, JSON_TYPE)
    assert caught.value.status == 413


PIECES = (b'"', b'\\"', b"\\", b"\\\\", b"[", b"]", b"{", b"}", b"[]", b"[],", b"{},", b'"",', b"1,", b"1e9,", b"[1],",
          b'"a":', b"null,", b"\xff", b"\0", b" ", b"9" * 99, b'[["", 1],', b'{"instances":[', b'{"b64":"')  # fmt: skip


def looked_at(body: bytes) -> tuple[float, int]:
    """Seconds and bytes that a body costs until it is refused or decoded."""
    tracemalloc.start()
    begun = time.thread_time()
    try:
        payload.read(body, JSON_TYPE)
    except RequestError:
        pass
    finally:
        seconds, memory = time.thread_time() - begun, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return seconds, memory


@pytest.mark.usefixtures("classifier")  # so that it is known what the model takes
@pytest.mark.parametrize("seed", range(len(PIECES) + 6))
def test_time_and_memory_grow_with_the_length_of_a_body_at_most(seed: int) -> None:
    """One piece again and again behind each beginning, and mixtures, up to the limit of bytes."""
    random = np.random.default_rng(seed)
    chosen = [seed] if seed < len(PIECES) else random.integers(len(PIECES), size=random.integers(2, 5)).tolist()
    piece = b"".join(PIECES[index] for index in chosen)
    for start in (b"", b'{"instances":[[', b'{"instances":[["'):
        costs = [looked_at((start + piece * (size // len(piece)))[:size]) for size in (2**18, 6 * 2**20)]
        seconds, memory = zip(*costs, strict=True)
        assert seconds[1] < min(1.5, 24 * 4 * max(seconds[0], 0.002)), (start, piece[:20], costs)
        assert memory[1] < 20 * 6 * 2**20, (start, piece[:20], costs)


def test_many_pictures_that_are_each_just_within_the_limits_are_no_long_work() -> None:
    buffer = io.BytesIO()
    Image.new("L", (228, 228), 99).save(buffer, "JPEG", progressive=True)
    passes = buffer.getvalue()[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00" * 94 + b"\xff\xd9"
    body = json.dumps({"instances": [{"b64": base64.b64encode(passes).decode()}] * 256}).encode()
    begun = time.thread_time()
    assert len(inference.input_fn(body)) == 256
    assert time.thread_time() - begun < 4


def test_strings_among_numbers_never_reach_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numpy makes all of them as long as the longest: these 508 kB became 4.8 GB."""
    monkeypatch.setattr(payload, "side", 0)
    body = b'{"instances":[["' + b"x" * 500_000 + b'"' + b',""' * 2000 + b"]]}"
    seconds, memory = looked_at(body)
    assert seconds < 0.5
    assert memory < 10 * len(body)
    with pytest.raises(RequestError, match="lists of numbers of one shape"):
        inference.input_fn(body)


def test_numbers_are_limited_by_what_the_model_takes(
    classifier: inference.Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payload, "side", 12)
    whole = json.dumps({"instances": np.zeros((256, 3, 12, 12), int).tolist()}, separators=(",", ":"))
    assert len(inference.predict_fn(inference.input_fn(whole), classifier)["labels"]) == 256
    for numbers in (np.zeros((1, math.prod((3, 12, 12)) + 1), int), np.zeros((2, 3, 12, 13), int)):
        for body, kind in ((json.dumps({"instances": numbers.tolist()}), JSON_TYPE), (npy(numbers), NPY)):
            with pytest.raises(RequestError, match=r"numbers; the model takes shape \(3, 12, 12\)"):
                inference.input_fn(body, kind)
    monkeypatch.setattr(payload, "side", 0)  # no model was loaded here
    assert inference.input_fn(json.dumps({"instances": np.zeros((1, 3, 12, 13), int).tolist()})).shape[3] == 13


def test_a_request_for_which_there_is_no_memory_is_not_the_client_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(payload, "_rows", full)
    with pytest.raises(MemoryError):  # the server answers 503
        inference.input_fn(b'{"instances": [[1]]}')


def test_limits_of_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def picture(width: int, height: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (width, height)).save(buffer, "PNG")
        return buffer.getvalue()

    monkeypatch.setattr(payload, "LIMITS", Limits(max_pixels=5000, max_aspect=10))
    for width, height in ((50, 100), (100, 50), (10, 100)):
        assert inference.input_fn(picture(width, height), "image/png")[0].shape == (height, width, 3)
    several = {
        "instances": [{"b64": base64.b64encode(picture(*size)).decode()} for size in ((50, 50), (50, 49), (1, 51))]
    }
    with pytest.raises(RequestError, match="instance 2: the image has 1x51 pixels, more than the limit of 50"):
        inference.input_fn(json.dumps(several))
    for width, height, words in ((51, 100, "51x100 pixels, more than the limit of 5000"), (10, 101, "10 times as long"),
                                 (101, 10, "10 times as long"), (3000, 3000, "more than the limit")):  # fmt: skip
        with pytest.raises(RequestError, match=words) as error:
            inference.input_fn(picture(width, height), "image/png")
        assert error.value.status == 400


def test_limits_come_from_the_environment() -> None:
    assert Limits.read({}) == Limits()
    assert Limits.read({"INFERENCE_MAX_BATCH": "3"}) == Limits(max_batch=3)
    for text in ("0", "-1", "x", "1.5", "", " 1", "1e3", "9" * 19, "\u0663"):
        with pytest.raises(ValueError, match=r"INFERENCE_MAX_BYTES .* set it to a whole number from 1"):
            Limits.read({"INFERENCE_MAX_BYTES": text})


@pytest.mark.parametrize(
    ("accept", "allowed"),
    [
        (None, True),
        ("", True),
        ("*/*", True),
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("text/html, application/json;q=0.5", True),
        ("APPLICATION/*;Q=0.001", True),
        ("application/json;q=0, */*", False),
        ("application/*;q=0, application/json;q=1.000", True),
        ("*/*;q=0", False),
        ("application/json;q=nan", False),
        ("application/json;q=2", False),
        ("application/json;q=0.5x", False),
        ("application/json;q=0.1234", True),
        ("*", True),
        ("text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", True),
        ('application/json; q = "0.3"', True),
        ("text/html;q=1, *;q=1.", True),
        ("application/json;q=.0", False),
        ("application/json;q=.", False),
        ("text/csv", False),
        ("application/jsonx", False),
        (", ,", False),
        ("text/html;level=\u00e9", False),
    ],
)
def test_accept(accept: str | None, allowed: bool) -> None:
    prediction = {"predictions": [0], "labels": ["a"], "probabilities": [[1.0]]}
    if allowed:
        assert inference.output_fn(prediction, accept) == (json.dumps(prediction), JSON_TYPE)
    else:
        with pytest.raises(RequestError, match="the answer can only be application/json") as error:
            inference.output_fn(prediction, accept)
        assert error.value.status == 406


class Context:
    """What the PyTorch toolkit gives to handlers."""

    def __init__(self) -> None:
        self.statuses: list[dict[str, Any]] = []

    def set_response_status(self, **status: Any) -> None:
        self.statuses.append(status)


def test_a_context_that_can_set_the_status_gets_it(classifier: inference.Classifier) -> None:
    def answer(body: bytes, kind: str, accept: str) -> tuple[str, list[dict[str, Any]]]:
        context = Context()
        batch = inference.input_fn(body, kind, context)
        text, answered = inference.output_fn(inference.predict_fn(batch, classifier, context), accept, context)
        assert answered == JSON_TYPE
        return text, context.statuses

    text, statuses = answer(photo(), "image/png", "*/*")
    assert (json.loads(text)["labels"], statuses) == (["up"], [])
    text, statuses = answer(b"x", "text/csv", "text/csv")
    assert "content type 'text/csv' is not supported" in json.loads(text)["error"]
    assert statuses == [{"code": 415, "phrase": "Unsupported Media Type", "idx": 0}]
    text, statuses = answer(b'{"instances": [[1]]}', JSON_TYPE, "*/*")
    assert "instances have shape (1, 1)" in json.loads(text)["error"]
    assert [status["code"] for status in statuses] == [400]
    text, statuses = answer(photo(), "image/png", "text/html")
    assert "the answer can only be" in json.loads(text)["error"]
    assert [status["code"] for status in statuses] == [406]
    with pytest.raises(RequestError):  # a context that cannot
        inference.input_fn(b"x", "text/csv", object())


def test_golden_samples_must_get_the_answers_that_they_had(artifact: Path, tmp_path: Path) -> None:
    inference.model_fn(str(artifact), None)
    shutil.copytree(artifact, tmp_path / "other")
    golden = json.loads((artifact / "golden.json").read_text())
    golden["samples"][0]["probabilities"] = golden["samples"][0]["probabilities"][::-1]
    (tmp_path / "other" / "golden.json").write_text(json.dumps(golden))
    with pytest.raises(ValueError, match=r"golden\.json is missing or does not match its checksum"):
        inference.model_fn(str(tmp_path / "other"))
    facts = json.loads((artifact / "model.json").read_text())
    (tmp_path / "other" / "model.json").write_text(json.dumps(facts | {"files": checksums(tmp_path / "other")}))
    with pytest.raises(ValueError, match=r"golden sample 0 was .* weights or libraries are not those"):
        inference.model_fn(str(tmp_path / "other"))
