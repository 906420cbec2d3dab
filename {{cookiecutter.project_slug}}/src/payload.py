"""What a request holds and may hold: images, JSON or .npy, within limits that come before anything is unpacked.

This file travels inside the artifact (`code/payload.py`), so it imports nothing of the project but what is there.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import IO, Any, Self
from urllib.parse import unquote_to_bytes

import numpy as np
from numpy.typing import NDArray

import imaging
import spelling
from bounds import IN_MEMORY, PIECE, Data, ImageError, NoRoom, Stored
from spelling import FORM_START, IMAGE_START, JSON_TYPE, NPY_START, RequestError

__all__ = ["JSON_TYPE", "RequestError"]  # which others take from here

IMAGE_TYPES = ("application/x-image", "image/jpeg", "image/png", "image/webp", "image/bmp", "image/tiff")
NPY_TYPE = "application/x-npy"
FORM = '{"instances": [...]}'
NO_INSTANCES = 'instances must all be {"b64": "..."}, or lists of numbers of one shape'
FIELD = re.compile(rb"[\w.\[\]-]{1,40}=(?=[^&=]+=*$)")  # of a form with this one alone, not the padding of base64
STRINGS = 64  # of JSON for each instance; so many lists beside the model's rows; and so many values beside instances
Batch = list[NDArray[Any]] | NDArray[np.float32]
_PARSING = threading.Lock()  # more than one at a time would gain nothing, and keep others from what lies between
PATIENCE = 20.0  # seconds that an image waits for memory
UNKNOWN_SIDE = 1024  # where no model was loaded yet
side = 0  # pixels a side of what the loaded model takes, of several the largest; `takes` sets it


@dataclass(frozen=True)
class Limits:
    """What one request may hold; each is set by an environment variable, as `INFERENCE_MAX_BYTES`.

    Attributes:
        max_bytes: of the body; 6 MiB is what a real-time endpoint lets through.
        max_pixels: width times height, summed over the images of a request; looked up before one is decoded.
        max_aspect: longer side by shorter side of one image.
        max_batch: instances.
        max_depth: lists and objects of JSON inside one another.
    """

    max_bytes: int = 6 * 2**20
    max_pixels: int = 50_000_000
    max_aspect: int = 100
    max_batch: int = 256
    max_depth: int = 8

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Self:
        """Take them from the environment.

        Raises:
            ValueError: when one is no whole number of at least 1.
        """
        values = {}
        for field in fields(cls):
            name = f"INFERENCE_{field.name.upper()}"
            text = environment.get(name, str(field.default))
            if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < 1:
                raise ValueError(f"the environment variable {name} is {text!r}; set it to a whole number from 1")
            values[field.name] = int(text)
        return cls(**values)


LIMITS = Limits.read(os.environ)


def takes(size: int) -> None:
    """Tell what the model takes, in pixels a side: a request with more numbers than that is not looked at further."""
    global side
    side = max(side, size)


def read(body: bytes | bytearray | str | IO[bytes], content_type: str | None) -> Batch:
    """Turn a request body into a batch; arguments, results and errors are those of `inference.input_fn`."""
    body = body or b""  # of a form TorchServe hands on nothing
    data: Data = b""
    if isinstance(body, str):
        data = body.encode(errors="surrogatepass")
    else:
        data = bytes(body) if isinstance(body, bytes | bytearray) else Stored(body)
    kind = (content_type or JSON_TYPE).split(";")[0].strip().lower()
    if len(data) > LIMITS.max_bytes:
        raise RequestError(413, f"the body has {len(data)} bytes, more than the limit of {LIMITS.max_bytes}")
    data = spelling.unpacked(data, LIMITS.max_bytes)
    if kind == "multipart/form-data" or FORM_START.match(data):
        data = spelling.unpacked(spelling.one_file(data), LIMITS.max_bytes)
    if IMAGE_START.match(data):
        return [_decode(data, LIMITS.max_pixels)]
    if data.startswith(NPY_START):
        return _from_npy(data)
    text = spelling.utf8(data)
    if kind == "application/x-www-form-urlencoded" and (field := FIELD.match(text)):
        text = unquote_to_bytes(text[field.end() :])
    if text[:PIECE].lstrip().startswith((b"{", b"[")):
        return _from_json(text)
    if (image := spelling.encoded_image(text)) is not None or kind in IMAGE_TYPES:
        return [_decode(data if image is None else image, LIMITS.max_pixels)]
    if kind == NPY_TYPE:
        return _from_npy(data)
    if kind == JSON_TYPE:
        raise RequestError(400, f"the body is not valid JSON of the form {FORM}; {spelling.seen(data)}")
    known = ", ".join((JSON_TYPE, NPY_TYPE, *IMAGE_TYPES))
    seen = f"content type {kind[:80]!r} is not supported, and {spelling.seen(data)}"
    raise RequestError(415, f"{seen}; use one of {known}")


def _decode(body: Data, max_pixels: int) -> NDArray[Any]:
    try:
        return imaging.decode(body, max_pixels, LIMITS.max_aspect, PATIENCE)
    except NoRoom as error:
        raise RequestError(503, str(error)) from error
    except ImageError as error:
        seen = "" if not body or (IMAGE_START.match(body) and not spelling.cut(body)) else f"; {spelling.seen(body)}"
        raise RequestError(400, f"{error}{seen}") from error


def _from_json(data: Data) -> Batch:
    """Parse one instance after the other: what is in the way of other threads for long is a single call in C."""
    spans = _outline(data)
    if (beside := len(data) - sum(span.stop - span.start for span in spans)) > IN_MEMORY:
        raise RequestError(413, f"the JSON has {beside} bytes beside its instances, more than the limit of {IN_MEMORY}")
    rest, end = [], 0
    for number, span in enumerate(spans):
        rest += [data[end : span.start], b'{"": %d}' % number]
        end = span.stop
    document = _parse(b"".join([*rest, data[end:]]))
    instances = document.get("instances") if isinstance(document, dict) else None
    if not isinstance(instances, list) or not instances:
        seen = f"it has the keys {str(list(document))[:80]}" if isinstance(document, dict) else "it is no object"
        raise RequestError(400, f"the JSON body must be {FORM} with at least one instance; {seen}")
    _check_count(len(instances))
    if all(isinstance(text, str) and spelling.is_image(text[:80].encode(errors="replace")) for text in instances):
        return _images({"b64": text} for text in instances)
    chosen = [instance[""] for instance in instances if isinstance(instance, dict)]
    for number in {*range(len(spans))} - {*chosen}:  # what is no instance must be JSON all the same
        _parse(data[spans[number]])
    found = [spans[number] for number in chosen]
    texts, kinds = (data[span] for span in found), {data[span.start] for span in found}
    if len(found) < len(instances) or len(kinds) > 1:
        raise RequestError(400, NO_INSTANCES)
    if kinds == {ord("{")}:
        return _images(_parse(text) for text in texts)
    if any(data.find(b'"', span.start, span.stop) >= 0 for span in found):  # numpy would make all of it strings
        raise RequestError(400, NO_INSTANCES)
    try:
        return np.stack([_rows(text) for text in texts])
    except RequestError:
        raise
    except (ValueError, OverflowError) as error:
        raise RequestError(400, NO_INSTANCES) from error


def _rows(text: bytes) -> NDArray[np.float32]:
    with _PARSING:
        return _numbers(np.array(_parse(text)))


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"), strict=False)  # a shell puts wrapped base64 in as it is
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not valid JSON: {str(error)[:200]}") from error


def _outline(data: Data) -> list[slice]:
    """Look through JSON before anything is parsed: a fixed number of passes over the bytes, whatever they are.

    Returns:
        Where the lists and objects are that may be instances.

    Raises:
        RequestError: for more strings, lists, levels or numbers than a request can need.
    """
    quotes = lists = commas = start = 0
    found = [(np.empty(0, np.int64), np.empty(0, np.bool_), np.empty(0, np.int64))]
    while start < len(data):
        piece = data[start : start + PIECE]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2 and start + PIECE < len(data):  # what it escapes comes next
            piece = piece[:-1]
        texts = piece.replace(b"\\\\", b"  ").replace(b'\\"', b"  ").split(b'"')
        blank = slice(1 - quotes % 2, None, 2)
        texts[blank] = [b" " * len(text) for text in texts[blank]]
        text = np.frombuffer(b'"'.join(texts), np.uint8)
        braces = text | 32  # "[" and "]" become "{" and "}"
        places = np.flatnonzero((braces == ord("{")) | (braces == ord("}")))
        between = np.flatnonzero(text == ord(","))
        found.append((places + start, braces[places] == ord("{"), np.searchsorted(between, places) + commas))
        quotes, lists, commas = quotes + len(texts) - 1, lists + len(places), commas + len(between)
        start += len(piece)
        for count, name, each in (quotes, "strings", STRINGS), (lists, "lists", 3 * (side or UNKNOWN_SIDE) + STRINGS):
            if count > 2 * each * (LIMITS.max_batch + 1):
                many = f"{count // 2} {name}, more than {LIMITS.max_batch} instances can need"
                raise RequestError(400, f"the JSON has {many}")
    if quotes % 2:
        raise RequestError(400, "the body is not valid JSON: a string does not end")
    places, opening, before = map(np.concatenate, zip(*found, strict=True))
    depth = np.cumsum(np.where(opening, 1, -1))
    if depth.max(initial=0) > LIMITS.max_depth:
        raise RequestError(400, f"the JSON is nested deeper than the limit of {LIMITS.max_depth}")
    starts, ends = places[opening & (depth == 3)], places[~opening & (depth == 2)]  # inside {"instances": [ ... ]}
    if len(starts) != len(ends):
        raise RequestError(400, "the body is not valid JSON: a bracket has no partner")
    if len(starts) > 4 * LIMITS.max_batch:  # a request may say something of each instance beside them
        _check_count(len(starts))
    spans = [slice(start, end + 1) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    inside = (before[~opening & (depth == 2)] - before[opening & (depth == 3)]).tolist()
    for number, count in enumerate(inside):
        _check_size(number, count + 1)
    if (beside := commas - sum(inside)) > STRINGS * LIMITS.max_batch:
        raise RequestError(413, f"the JSON has {beside} values, more than {LIMITS.max_batch} instances can need")
    return spans


def _check_size(instance: int, numbers: int) -> None:
    shape = (3, side or UNKNOWN_SIDE, side or UNKNOWN_SIDE)
    if numbers > math.prod(shape):
        raise RequestError(400, f"instance {instance} has {numbers} numbers; the model takes shape {shape}")


def _images(instances: Iterator[Any]) -> list[NDArray[Any]]:
    """Decode them one after the other; all together may have as many pixels as one alone."""
    images: list[NDArray[Any]] = []
    room = LIMITS.max_pixels
    for index, instance in enumerate(instances):
        if not isinstance(instance.get("b64"), str):
            raise RequestError(400, NO_INSTANCES)
        try:
            images.append(_decode(spelling.from_base64(instance["b64"]), room))
        except RequestError as error:
            raise RequestError(error.status, f"instance {index}: {error}") from error
        room -= images[-1].shape[0] * images[-1].shape[1]
    return images


def _check_count(instances: int) -> None:
    if instances > LIMITS.max_batch:
        raise RequestError(413, f"the request has {instances} instances, more than the limit of {LIMITS.max_batch}")


def _from_npy(body: Data) -> NDArray[np.float32]:
    """Read the header, compare it with the body's size, and only then look at the numbers; nothing is unpickled."""
    stream = io.BytesIO(body[: 2**17])
    try:
        version = np.lib.format.read_magic(stream)
        known = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran_order, dtype = known[version](stream)
    except Exception as error:  # the header is a Python literal: whatever its reader meets
        raise RequestError(400, "the body is no .npy file of format 1.0 or 2.0") from error
    start = stream.tell()
    if dtype.kind not in "iuf" or not 1 <= len(shape) <= LIMITS.max_depth or min(shape) < 1:
        raise RequestError(
            400, f"the .npy file holds {dtype.name[:40]} of shape {str(shape)[:80]}; it must hold numbers"
        )
    if math.prod(shape) * dtype.itemsize != len(body) - start:
        raise RequestError(400, f"the .npy file's header promises shape {str(shape)[:80]}, which is not what follows")
    _check_count(shape[0])
    _check_size(0, math.prod(shape[1:]))
    order: Any = "F" if fortran_order else "C"
    return _numbers(np.frombuffer(body, dtype, offset=start).reshape(shape, order=order))


def _numbers(batch: NDArray[Any]) -> NDArray[np.float32]:
    if batch.dtype.kind not in "iuf":
        raise RequestError(400, NO_INSTANCES)
    with np.errstate(over="ignore"):
        numbers = batch.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise RequestError(400, "instances hold a number that is not finite in float32")
    return numbers
