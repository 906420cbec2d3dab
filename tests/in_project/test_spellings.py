"""One request in the many ways in which clients spell it: content types, base64, byte order marks, gzip, forms."""

from __future__ import annotations

import base64
import gzip
import io
import json
import urllib.parse
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import payload
from inference import inference
from payload import JSON_TYPE, Limits, RequestError
from tests.hosting import NPY, Running, ask, npy, serving
from tests.test_inference import artifact, classifier, photo

__all__ = ["artifact", "classifier"]  # fixtures
PHOTO = photo("left")
B64 = base64.b64encode(PHOTO).decode()
WRAPPED = base64.encodebytes(PHOTO).decode()
URL_SAFE = base64.urlsafe_b64encode(PHOTO).decode()
DATA_URL = f"data:image/png;base64,{B64}"
JSON = json.dumps({"instances": [{"b64": B64}]}).encode()
UNKNOWN = ("application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded", "text/plain", "*/*")


def saved(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(PHOTO)).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def form(*parts: tuple[str, bytes], end: bytes = b"--\r\n") -> bytes:
    """A browser's form; of each part the rest of its header, and the content."""
    texts = [b"--edge\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + body for head, body in parts]
    return b"\r\n".join([*texts, b"--edge" + end])


FILE = ('name="image"; filename="a.png"\r\nContent-Type: image/png', PHOTO)
FORM = "multipart/form-data; boundary=edge"


def said(text: str, indent: str = "") -> bytes:
    """JSON with one image, as a shell puts it together: line feeds as they are."""
    return f'{{"instances": [{{{indent}"b64": "{text}"}}]}}'.encode()


SPELLINGS: list[tuple[str, bytes | str, str | None]] = [
    *[("image", PHOTO, kind) for kind in ("image/jpg", "image/pjpeg", "image/x-png", "IMAGE/PNG", "image/*", "image")],
    *[("image", PHOTO, kind) for kind in (*UNKNOWN, None, "", JSON_TYPE, NPY, "image/gif", "text/csv")],
    *[("json", JSON, kind) for kind in (*UNKNOWN, None, "", "text/json", "image/png", NPY, "application/x-json")],
    *[(kind, saved(kind), "application/octet-stream") for kind in ("PNG", "BMP", "TIFF")],
    ("lossless", saved("WEBP", lossless=True), "binary/octet-stream"),
    ("progressive", saved("JPEG", quality=95, progressive=True), None),
    *[(name, said(text), JSON_TYPE) for name, text in {
        "wrapped": WRAPPED, "windows": WRAPPED.replace("\n", "\r\n"), "escaped": WRAPPED.replace("\n", "\\n"),
        "url-safe": URL_SAFE, "unpadded": B64.rstrip("="), "both": URL_SAFE.rstrip("="), "too much": B64 + "==",
        "data": DATA_URL, "data of another type": f"data:;base64,{B64}", "capital": DATA_URL.replace("data", "DATA", 1),
        "parameters": DATA_URL.replace(";", ";charset=utf-8;"), "blank": f"data:image/png;base64, {B64}",
        "percent": f"data:image/png;base64,{urllib.parse.quote(B64, safe='')}", "around": f" {B64}\t",
    }.items()],
    *[(name, text, "text/plain") for name, text in {
        "body": B64, "body wrapped": WRAPPED, "body url-safe": URL_SAFE, "body data": DATA_URL,
        "body quoted": f'"{B64}"', "body data quoted": f'"{DATA_URL}"', "body blank": f"\r\n {B64}\n",
    }.items()],
    ("body as an image", B64, "image/png"),
    ("body as JSON", json.dumps(DATA_URL), JSON_TYPE),
    ("utf-8 mark", b"\xef\xbb\xbf" + JSON, JSON_TYPE),
    ("text mark", "\ufeff" + JSON.decode(), JSON_TYPE),
    *[(f"mark of {name}", JSON.decode().encode(name), JSON_TYPE) for name in ("utf-16", "utf-32", "utf-16-le")],
    ("utf-16 base64", B64.encode("utf-16"), None),
    ("blanks", b"\r\n\t " + JSON + b"\n\n", None),
    ("gzip", gzip.compress(JSON), JSON_TYPE),
    ("gzip image", gzip.compress(PHOTO), "image/png"),
    ("gzip of an unknown type", gzip.compress(PHOTO), "application/gzip"),
    *[(f"deflate {level}", zlib.compress(JSON, level), JSON_TYPE) for level in (0, 1, 3, 6, 9)],
    ("form", form(FILE), FORM),
    ("quoted edge", form(FILE), 'Multipart/Form-Data; charset=utf-8; Boundary="edge"'),
    ("unnamed edge", form(FILE), "multipart/form-data"),
    *[("form by its start", form(FILE), kind) for kind in (None, "text/plain", "image/jpeg")],
    ("form with fields", form(('name="a"', b"1"), FILE, ('name="b"', b"2")), FORM),
    ("form without an end", form(FILE, end=b""), FORM),
    ("form of base64", form((f"{FILE[0]}\r\nContent-Transfer-Encoding: base64", B64.encode())), FORM),
    ("form of JSON", form(('name="image"; filename="a.json"', JSON)), FORM),
    ("form without a file's name", form(('name="a"', b"1"), ('name="image"', PHOTO)), FORM),
    ("form with a data: URL", form(('name="image"', DATA_URL.encode())), FORM),
    ("form with a second file that is left empty", form(FILE, ('name="b"; filename=""', b"")), FORM),
    ("form with a field for the name", form(('name="filename"', b"a.png"), FILE), FORM),
    ("form that gzip packed", gzip.compress(form(FILE)), FORM),
    ("form of what gzip packed", form((FILE[0], gzip.compress(PHOTO))), FORM),
    *[(f"field {name}", f"{name}={urllib.parse.quote(text, safe='')}".encode(), "application/x-www-form-urlencoded")
      for name, text in {"image": B64, "file[0]": DATA_URL, "data": JSON.decode()}.items()],
    ("field as it is", f"image={DATA_URL}".encode(), "application/x-www-form-urlencoded; charset=UTF-8"),
    *[(f"string of {name}", json.dumps({"instances": [text]}).encode(), JSON_TYPE)
      for name, text in {"base64": B64, "a data: URL": DATA_URL, "wrapped base64": WRAPPED}.items()],
]  # fmt: skip


@pytest.mark.parametrize(("name", "body", "kind"), SPELLINGS)
def test_what_is_clear_is_taken(
    classifier: inference.Classifier, name: str, body: bytes | str, kind: str | None
) -> None:
    bodies: list[bytes | bytearray | str] = [body] if isinstance(body, str) else [body, bytearray(body)]
    for each in bodies:
        assert inference.predict_fn(inference.input_fn(each, kind), classifier)["labels"] == ["left"], name


def test_pixels_from_0_to_255_are_not_taken_for_normalised_ones(classifier: inference.Classifier) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(PHOTO)).convert("RGB").resize((12, 12))).transpose(2, 0, 1)[None]
    for body, kind in ((npy(pixels), NPY), (json.dumps({"instances": pixels.tolist()}).encode(), JSON_TYPE)):
        with pytest.raises(RequestError, match=r"up to 2\d\d where white is .*; send the picture itself") as error:
            inference.predict_fn(inference.input_fn(body, kind), classifier)
        assert error.value.status == 400


def test_numbers_are_known_by_their_first_bytes_too(classifier: inference.Classifier) -> None:
    numbers = np.random.default_rng(0).normal(size=(2, 3, 12, 12)).astype(np.float32)
    for kind in (*UNKNOWN, None, JSON_TYPE, "image/png", "application/npy"):
        for body in (npy(numbers), gzip.compress(npy(numbers))):
            assert len(inference.predict_fn(inference.input_fn(body, kind), classifier)["labels"]) == 2


CUT = saved("JPEG").translate(None, b"\0\r\n")
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
REFUSED: list[tuple[bytes, str | None, int, str]] = [
    (b"GIF89a\1\0", "image/gif", 415, "'image/gif' is not supported, and what was sent begins with b'GIF89a"),
    (b"GIF89a\1\0", "image/png", 400, "not a readable image .* begins with b'GIF89a"),
    (b"GIF89a\1\0", None, 400, "not valid JSON .* begins with b'GIF89a"),
    (HEIC, "image/heic", 415, "'image/heic' is not supported, and .*ftypheic"),
    (HEIC, "image/jpeg", 400, "ftypheic.*, as HEIC does"),
    (b"", "text/plain", 415, "'text/plain' is not supported, and nothing was sent"),
    (b"", "image/png", 400, "0 bytes that are not a readable image"),
    (b"BMW,1,2,3,4\n", "text/csv", 415, "'text/csv' .*BMW"),
    (b"<svg/>", "image/svg+xml", 415, "<svg/>"),
    (b"(\xb5/\xfd\4", "image/png", 400, "begins with"),
    (PHOTO[:40], "application/octet-stream", 400, "40 bytes that are not a readable image"),
    (b'{"image": "x"}', JSON_TYPE, 400, r"it has the keys \['image'\]"),
    (b"[[1]]", JSON_TYPE, 400, "it is no object"),
    (said("data:image/png,abc"), JSON_TYPE, 400, "instance 0: the data: URL does not say ;base64"),
    (said("R0lGODlh"), JSON_TYPE, 400, "instance 0: 6 bytes that are not a readable image .* b'GIF89a'"),
    (said(B64[:-4] + "%%"), JSON_TYPE, 400, "instance 0: b64 is not base64"),
    (said(B64.replace("A", "\u00e9", 1)), JSON_TYPE, 400, "instance 0: b64 is not base64"),
    (B64.encode() + b"!", "text/plain", 400, "b64 is not base64"),
    (gzip.compress(b"GIF89a"), "image/png", 400, "begins with b'GIF89a'"),
    (gzip.compress(PHOTO)[:-9], "image/png", 400, "not one whole stream"),
    (gzip.compress(PHOTO) + b"x", "image/png", 400, "not one whole stream"),
    (gzip.compress(PHOTO)[:12] + b"damage" * 9, "image/png", 400, "not one whole stream"),
    (form(FILE, FILE), FORM, 400, "the form holds 2 files; send one"),
    (form(('name="a"', b"1"), ('name="b"', b"2")), FORM, 400, "the form holds 2 files"),
    (form(('name="a"', b"hello")), FORM, 415, "begins with b'hello'"),
    (f"a={B64}&b=1".encode(), "application/x-www-form-urlencoded", 415, "begins with b'a=iVBOR"),
    (CUT, "image/jpeg", 400, "as a picture does that `curl -d` has cut; use --data-binary"),
    (CUT, "application/x-www-form-urlencoded", 400, "as a picture does that `curl -d` has cut"),
    (PHOTO.translate(None, b"\0\r\n"), "application/x-www-form-urlencoded", 415, "that `curl -d` has cut"),
    (json.dumps({"instances": [B64, "x"]}).encode(), JSON_TYPE, 400, 'instances must all be {"b64"'),
    (json.dumps({"instances": [B64, "\ud800"]}).encode(), JSON_TYPE, 400, 'instances must all be {"b64"'),
    (json.dumps({"instances": [B64[:-4] + "%%"]}).encode(), JSON_TYPE, 400, "b64 is not base64"),
    (b"--edge--" * 9999, FORM, 400, "the form holds 0 files"),
    (b"\xff\xfeb", JSON_TYPE, 400, "begins with"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "kind", "status", "words"), REFUSED)
def test_what_is_not_is_refused_with_what_was_seen(body: bytes, kind: str | None, status: int, words: str) -> None:
    with pytest.raises(RequestError, match=words) as error:
        inference.input_fn(body, kind)
    assert error.value.status == status
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_what_unpacks_has_the_limit_of_a_body(monkeypatch: pytest.MonkeyPatch, pack: object) -> None:
    monkeypatch.setattr(payload, "LIMITS", Limits(max_bytes=len(JSON) + 10))
    assert callable(pack)
    assert len(inference.input_fn(pack(JSON + b" " * 10))) == 1
    with pytest.raises(RequestError, match=f"unpacks to more bytes than the limit of {len(JSON) + 10}") as error:
        inference.input_fn(pack(JSON + b" " * 11))
    assert error.value.status == 413


def test_a_bomb_costs_no_more_than_a_body_of_its_limit() -> None:
    import tracemalloc

    bomb = gzip.compress(b" " * 2**28)
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="unpacks to more"):
            inference.input_fn(bomb)
        assert tracemalloc.get_traced_memory()[1] < 4 * Limits().max_bytes
    finally:
        tracemalloc.stop()


def test_a_form_of_very_many_parts_costs_no_more_than_its_body() -> None:
    import tracemalloc

    body = b"--e\r\nContent-Disposition: form-data\r\n" + b"--e\r\n" * 10**6
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="the form holds 0 files"):
            inference.input_fn(body)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(body)
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def server(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(artifact, tmp_path_factory.mktemp("spellings") / "log") as running:
        yield running


def test_the_server_takes_them_as_they_come(server: Running) -> None:
    for name, body, kind in SPELLINGS[::5]:
        assert ask(server.url, body, kind).labels() == ["left"], name
    assert ask(server.url, gzip.compress(JSON), JSON_TYPE, Content_Encoding="gzip").labels() == ["left"]
    assert "GIF89a" in ask(server.url, b"GIF89a", "image/gif").refused(415)


def test_two_lines_of_accept_are_one_list(server: Running) -> None:
    head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n" % len(PHOTO)
    for first, second in ((b"text/html", b"application/json"), (b"application/json", b"text/html")):
        with server.connect(head + b"Accept: %s\r\nAccept: %s\r\n\r\n" % (first, second) + PHOTO) as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
