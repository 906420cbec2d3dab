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
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import imaging

IMAGE_TYPES = ("application/x-image", "image/jpeg", "image/png", "image/webp", "image/bmp", "image/tiff")
JSON_TYPE = "application/json"
NPY_TYPE = "application/x-npy"
_STRINGS = re.compile(r'(?s)"[^"\\]*(?:\\.[^"\\]*)*"')
_NO_BRACKETS = re.compile(r"[^\[\]{}]+")
_PAIRS = re.compile(r"\[\]|\{\}")
Batch = list[NDArray[np.uint8]] | NDArray[np.float32]


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
    try:
        text = body if isinstance(body, str) else bytes(body).decode("utf-8")
        _check_depth(text)
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(400, f"the body is not valid JSON: {str(error)[:200]}") from error
    instances = document.get("instances") if isinstance(document, dict) else None
    if not isinstance(instances, list) or not instances:
        raise RequestError(400, 'the JSON body must be {"instances": [...]} with at least one instance')
    _check_count(len(instances))
    if all(isinstance(instance, dict) and isinstance(instance.get("b64"), str) for instance in instances):
        return _images([instance["b64"] for instance in instances])
    try:
        batch = np.array(instances)
    except (ValueError, OverflowError) as error:
        raise RequestError(400, 'instances must all be {"b64": "..."}, or lists of numbers of one shape') from error
    return _numbers(batch)


def _images(encoded: list[str]) -> list[NDArray[np.uint8]]:
    """Decode them one after the other; all together may have as many pixels as one alone."""
    images: list[NDArray[np.uint8]] = []
    room = LIMITS.max_pixels
    for index, text in enumerate(encoded):
        try:
            images.append(_decode(base64.b64decode(text, validate=True), room))
        except RequestError as error:
            raise RequestError(error.status, f"instance {index}: {error}") from error
        except ValueError as error:
            raise RequestError(400, f"instance {index}: b64 is not base64: {error}") from error
        room -= images[-1].shape[0] * images[-1].shape[1]
    return images


def _check_depth(text: str) -> None:
    """Refuse deep nesting before the parser, and what walks its result, meet it."""
    brackets = _NO_BRACKETS.sub("", _STRINGS.sub("", text))
    for _ in range(LIMITS.max_depth):
        brackets = _PAIRS.sub("", brackets)
    if _PAIRS.search(brackets):  # brackets without a partner are the parser's to name
        raise RequestError(400, f"the JSON is nested deeper than the limit of {LIMITS.max_depth}")


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
    if dtype.kind not in "iuf" or not shape or min(shape) < 1:
        raise RequestError(
            400, f"the .npy file holds {dtype.name[:40]} of shape {str(shape)[:80]}; it must hold numbers"
        )
    if math.prod(shape) * dtype.itemsize != len(body) - start:
        raise RequestError(400, f"the .npy file's header promises shape {str(shape)[:80]}, which is not what follows")
    _check_count(shape[0])
    order: Any = "F" if fortran_order else "C"
    return _numbers(np.frombuffer(body, dtype, offset=start).reshape(shape, order=order))


def _numbers(batch: NDArray[Any]) -> NDArray[np.float32]:
    if batch.dtype.kind not in "iuf":
        raise RequestError(400, 'instances must all be {"b64": "..."}, or lists of numbers of one shape')
    with np.errstate(over="ignore"):
        numbers = batch.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise RequestError(400, "instances hold a number that is not finite in float32")
    return numbers
