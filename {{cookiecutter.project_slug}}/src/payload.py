"""What a request holds and may hold: images, JSON or .npy, within limits that come before anything is unpacked.

This file travels inside the artifact (`code/payload.py`), so it imports nothing else of the project but `imaging`.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import imaging

IMAGE_TYPES = ("application/x-image", "image/jpeg", "image/png", "image/webp", "image/bmp", "image/tiff")
JSON_TYPE = "application/json"
NPY_TYPE = "application/x-npy"
NO_INSTANCES = 'instances must all be {"b64": "..."}, or lists of numbers of one shape'
STRINGS = 64  # of JSON for each instance; so many lists beside the model's rows; and so many values beside instances
Batch = list[NDArray[np.uint8]] | NDArray[np.float32]
_PARSING = threading.Lock()  # more than one at a time would gain nothing, and keep others from what lies between
UNKNOWN_SIDE = 1024  # where no model was loaded yet
side = 0  # pixels a side of what the loaded model takes, of several the largest; `takes` sets it


class RequestError(ValueError):
    """The request cannot be answered.

    Attributes:
        status: the HTTP status that says so: 400 content, 406 accept, 413 size, 415 type.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


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


def read(body: bytes | bytearray | str, content_type: str | None) -> Batch:
    """Turn a request body into a batch; arguments, results and errors are those of `inference.input_fn`."""
    kind = (content_type or JSON_TYPE).split(";")[0].strip().lower()
    if kind not in (JSON_TYPE, NPY_TYPE, *IMAGE_TYPES):
        known = ", ".join((JSON_TYPE, NPY_TYPE, *IMAGE_TYPES))
        raise RequestError(415, f"content type {kind[:80]!r} is not supported; use one of {known}")
    if len(body) > LIMITS.max_bytes:
        raise RequestError(413, f"the body has {len(body)} bytes, more than the limit of {LIMITS.max_bytes}")
    if kind == JSON_TYPE:
        return _from_json(body)
    if isinstance(body, str):
        raise RequestError(400, f"the body is text; {kind} needs bytes")
    return _from_npy(bytes(body)) if kind == NPY_TYPE else [_decode(bytes(body), LIMITS.max_pixels)]


def accepts(accept: str | None) -> bool:
    """Whether JSON is acceptable, by RFC 9110, 12.5.1: the most specific range that fits decides; q=0 forbids."""
    specificity = {JSON_TYPE: 2, "application/*": 1, "*/*": 0}
    fitting = [(-1, 0.0)]
    for part in (accept or "*/*").lower().split(","):
        name, *parameters = (word.strip() for word in part.split(";"))
        weights = [word[2:] for word in parameters if word.startswith("q=")] or ["1"]
        if name in specificity and re.fullmatch(r"[01](\.[0-9]{0,3})?", weights[0]):
            fitting.append((specificity[name], float(weights[0])))
    return max(fitting)[1] > 0


def _decode(body: bytes, max_pixels: int) -> NDArray[np.uint8]:
    try:
        return imaging.decode(body, max_pixels, LIMITS.max_aspect)
    except imaging.ImageError as error:
        raise RequestError(400, str(error)) from error


def _from_json(body: bytes | bytearray | str) -> Batch:
    """Parse one instance after the other: what is in the way of other threads for long is a single call in C."""
    data = body.encode(errors="surrogatepass") if isinstance(body, str) else bytes(body)
    outline, spans = _outline(data)
    rest, end = [], 0
    for number, span in enumerate(spans):
        rest += [data[end : span.start], b'{"": %d}' % number]
        end = span.stop
    document = _parse(b"".join([*rest, data[end:]]))
    instances = document.get("instances") if isinstance(document, dict) else None
    if not isinstance(instances, list) or not instances:
        raise RequestError(400, 'the JSON body must be {"instances": [...]} with at least one instance')
    _check_count(len(instances))
    chosen = [instance[""] for instance in instances if isinstance(instance, dict)]
    for number in {*range(len(spans))} - {*chosen}:  # what is no instance must be JSON all the same
        _parse(data[spans[number]])
    found = [spans[number] for number in chosen]
    texts, kinds = (data[span] for span in found), {outline[span.start] for span in found}
    if len(found) < len(instances) or len(kinds) > 1:
        raise RequestError(400, NO_INSTANCES)
    if kinds == {ord("{")}:
        return _images(_parse(text) for text in texts)
    if any(outline.find(b'"', span.start, span.stop) >= 0 for span in found):  # numpy would make all of it strings
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
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not valid JSON: {str(error)[:200]}") from error


def _outline(data: bytes) -> tuple[bytes, list[slice]]:
    """Look through JSON before anything is parsed: a fixed number of passes over the bytes, whatever they are.

    Returns:
        The text with blanks in its strings, and where the lists and objects are that may be instances.

    Raises:
        RequestError: for more strings, lists, levels or numbers than a request can need.
    """
    outline = data.replace(b"\\\\", b"  ").replace(b'\\"', b"  ")
    if (quotes := outline.count(b'"')) % 2:
        raise RequestError(400, "the body is not valid JSON: a string does not end")
    if quotes > 2 * STRINGS * (LIMITS.max_batch + 1):
        raise RequestError(400, f"the JSON has {quotes // 2} strings, more than {LIMITS.max_batch} instances can need")
    pieces = outline.split(b'"')
    pieces[1::2] = [b" " * len(piece) for piece in pieces[1::2]]
    outline = b'"'.join(pieces)
    text = np.frombuffer(outline, np.uint8)
    braces = text | 32  # "[" and "]" become "{" and "}"
    brackets = (braces == ord("{")) | (braces == ord("}"))
    lists = int(np.count_nonzero(brackets)) // 2
    if lists > (3 * (side or UNKNOWN_SIDE) + STRINGS) * (LIMITS.max_batch + 1):
        raise RequestError(400, f"the JSON has {lists} lists, more than {LIMITS.max_batch} instances can need")
    places = np.flatnonzero(brackets)
    opening = braces[places] == ord("{")
    depth = np.cumsum(np.where(opening, 1, -1))
    if depth.max(initial=0) > LIMITS.max_depth:
        raise RequestError(400, f"the JSON is nested deeper than the limit of {LIMITS.max_depth}")
    starts, ends = places[opening & (depth == 3)], places[~opening & (depth == 2)]  # inside {"instances": [ ... ]}
    if len(starts) != len(ends):
        raise RequestError(400, "the body is not valid JSON: a bracket has no partner")
    if len(starts) > 4 * LIMITS.max_batch:  # a request may say something of each instance beside them
        _check_count(len(starts))
    spans = [slice(start, end + 1) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    commas = text == ord(",")
    inside = [int(np.count_nonzero(commas[span])) for span in spans]
    for number, count in enumerate(inside):
        _check_size(number, count + 1)
    if (beside := int(np.count_nonzero(commas)) - sum(inside)) > STRINGS * LIMITS.max_batch:
        raise RequestError(413, f"the JSON has {beside} values, more than {LIMITS.max_batch} instances can need")
    return outline, spans


def _check_size(instance: int, numbers: int) -> None:
    shape = (3, side or UNKNOWN_SIDE, side or UNKNOWN_SIDE)
    if numbers > math.prod(shape):
        raise RequestError(400, f"instance {instance} has {numbers} numbers; the model takes shape {shape}")


def _images(instances: Iterator[Any]) -> list[NDArray[np.uint8]]:
    """Decode them one after the other; all together may have as many pixels as one alone."""
    images: list[NDArray[np.uint8]] = []
    room = LIMITS.max_pixels
    for index, instance in enumerate(instances):
        if not isinstance(instance.get("b64"), str):
            raise RequestError(400, NO_INSTANCES)
        try:
            images.append(_decode(base64.b64decode(instance["b64"], validate=True), room))
        except RequestError as error:
            raise RequestError(error.status, f"instance {index}: {error}") from error
        except ValueError as error:
            raise RequestError(400, f"instance {index}: b64 is not base64: {error}") from error
        room -= images[-1].shape[0] * images[-1].shape[1]
    return images


def _check_count(instances: int) -> None:
    if instances > LIMITS.max_batch:
        raise RequestError(413, f"the request has {instances} instances, more than the limit of {LIMITS.max_batch}")


def _from_npy(body: bytes) -> NDArray[np.float32]:
    """Read the header, compare it with the body's size, and only then look at the numbers; nothing is unpickled."""
    stream = io.BytesIO(body)
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
