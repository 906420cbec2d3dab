"""The ways in which clients spell a request: what its first bytes, its form and its header `Accept` say.

This file travels inside the artifact (`code/spelling.py`), so it imports nothing else of the project but `bounds`.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from codecs import iterdecode, iterencode
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from urllib.parse import unquote

from bounds import PIECE, Data, pieces, stored

JSON_TYPE = "application/json"
NPY_START = b"\x93NUMPY"
IMAGE_START = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF.{4}WEBP|BM.{4}\0{4}|II\*\0|MM\0\*|II\+\0|MM\0\+", re.DOTALL
)
FORM_START = re.compile(rb"--[^\r\n]{1,70}\r\nContent-Disposition: *form-data", re.IGNORECASE)
OTHERS = {b"ftyphe": "HEIC", b"ftypmif1": "HEIC", b"ftypavif": "AVIF", b"GIF8": "GIF", b"%PDF": "PDF"}
PACKED = (b"\x1f\x8b", b"x\x01", b"x^", b"x\x9c", b"x\xda")  # gzip, and four levels of what HTTP calls deflate


class RequestError(ValueError):
    """The request cannot be answered.

    Attributes:
        status: the HTTP status that says so: 400 content, 406 accept, 413 size, 415 type; 503 no memory for it now.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def accepts(accept: str | None) -> bool:
    """Whether JSON is acceptable, by RFC 9110, 12.5.1: the most specific range that fits decides; q=0 forbids."""
    specificity = {JSON_TYPE: 2, "application/*": 1, "*/*": 0, "*": 0}  # the last, and q=.2, come from Java
    fitting = [(-1, 0.0)]
    for part in "".join((accept or "*/*").lower().split()).split(","):
        name, *parameters = part.split(";")
        weights = [word[2:].strip('"') for word in parameters if word.startswith("q=")] or ["1"]
        if name in specificity and re.fullmatch(r"[01](\.[0-9]*)?|\.[0-9]+", weights[0]):
            fitting.append((specificity[name], float(weights[0])))
    return max(fitting)[1] > 0


def cut(data: Data) -> bool:
    """Whether this was a picture until `curl -d` took out its zeros and line ends: each has a zero at its beginning."""
    return data.startswith((b"\x89PNG\x1a", b"\xff\xd8\xff")) and b"\0" not in data[:PIECE]


def seen(data: Data) -> str:
    """What to say of a body that nobody understands."""
    known = next((f", as {name} does" for mark, name in OTHERS.items() if mark in data[:16]), "")
    known = ", as a picture does that `curl -d` has cut; use --data-binary" if cut(data) else known
    return f"what was sent begins with {data[:16]!r}{known}" if data else "nothing was sent"


def one_file(form: Data) -> Data:
    """The file in a browser's form, where it is the only one."""
    edge = b"\r\n" + form[: max(form.find(b"\r\n", 0, 200), 0)]
    ends = [found.start() for found in islice(re.compile(re.escape(edge)).finditer(form), 64)]
    files, fields = list[tuple[int, int]](), list[tuple[int, int]]()
    for start, end in zip([len(edge) - 2, *(end + len(edge) for end in ends)], [*ends, len(form)], strict=True):
        head = form.find(b"\r\n\r\n", start, end)
        if 0 <= head < end - 4:  # one that nobody filled is empty
            named = re.search(rb"filename\*?=", form[start:head], re.IGNORECASE)
            (files if named or IMAGE_START.match(form, head + 4) else fields).append((head + 4, end))
    files = files or fields
    if len(files) != 1:
        raise RequestError(400, f"the form holds {len(files)} files; send one, or better its bytes alone as the body")
    return stored(pieces(form, *files[0]))


def unpacked(data: Data, max_bytes: int) -> Data:
    """What gzip or deflate packed; some hosts hand no Content-Encoding on, so the first bytes say whether it did."""
    return stored(_unpacked(data, max_bytes)) if data.startswith(PACKED) else data


def _unpacked(data: Data, room: int) -> Iterator[bytes]:
    packed, left = zlib.decompressobj(zlib.MAX_WBITS | 32), room
    with suppress(zlib.error):
        for piece in pieces(data):
            if packed.eof:
                break
            part = packed.decompress(piece, PIECE)
            while part:
                if (left := left - len(part)) < 0:
                    raise RequestError(413, f"the body unpacks to more bytes than the limit of {room}")
                yield part
                part = packed.decompress(packed.unconsumed_tail, PIECE)
        else:
            if packed.eof and not packed.unused_data:
                return
    raise RequestError(400, "the body begins as gzip or deflate does, and is not one whole stream of it")


def utf8(data: Data) -> Data:
    """Text without a byte order mark and blanks around it, from whatever of Unicode; what is no text as it is."""
    encoding = json.detect_encoding(data[:4])
    if encoding != "utf-8":
        with suppress(UnicodeError):
            data = stored(iterencode(iterdecode(pieces(data), encoding), "utf-8"))
    return data.strip() if isinstance(data, bytes) else data


def is_image(text: Data) -> bool:
    """Whether a text begins as an image does that is base64, or a data: URL, or either in quotes."""
    head = "".join(text[:80].decode("latin-1").strip('" \t\r\n').split())[:24]
    found = head[:5].lower() == "data:"
    with suppress(RequestError):
        found = found or bool(IMAGE_START.match(from_base64(head)))
    return found


def encoded_image(text: Data) -> bytes | None:
    """The image that such a text is; None where it is none."""
    return from_base64(bytes(text).decode("latin-1").strip('" \t\r\n')) if is_image(text) else None


def from_base64(text: str) -> bytes:
    """Decode base64, or a data: URL of it: of either alphabet, wrapped or not, padded or not."""
    if text[:5].lower() == "data:":
        head, _, text = text.partition(",")
        if not head.lower().rstrip().endswith(";base64"):
            raise RequestError(400, "the data: URL does not say ;base64")
        text = unquote(text)
    text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise RequestError(400, f"b64 is not base64: {error}") from error
