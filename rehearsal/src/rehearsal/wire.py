"""Requests and answers of AWS's protocols, read and written by botocore's models of the services."""

from __future__ import annotations

import base64
import functools
import html
import json
import re
import struct
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import botocore.parsers
import botocore.session
from botocore.model import ListShape, OperationModel, ServiceModel, Shape, StructureShape

from rehearsal.operations import Answer, Refused, Request

SIGNED_AS = {"monitoring": "cloudwatch", "servicequotas": "service-quotas", "tagging": "resourcegroupstaggingapi"}
SCOPE = re.compile(r"Credential=([^/,]+)/\d+/[^/]+/([^/]+)/aws4_request")
Reply = tuple[int, dict[str, str], bytes]


@functools.cache
def model(service: str) -> ServiceModel:
    """Botocore's model of a service, as boto3 names it."""
    return botocore.session.get_session().get_service_model(service)


@functools.cache
def _routes(service: str) -> list[tuple[str, re.Pattern[str], dict[str, str], OperationModel]]:
    """Of a service with addresses that mean something: method, path, words of the query, operation."""
    routes = []
    for name in model(service).operation_names:
        found = model(service).operation_model(name)
        path, _, query = found.http["requestUri"].partition("?")
        pattern = re.sub(r"\\\{(\w+)(\\\+)?\\\}", lambda m: f"(?P<{m[1]}>{'.+' if m[2] else '[^/]+'})", re.escape(path))
        routes.append((found.http["method"], re.compile(pattern + "/?"), dict(parse_qsl(query, True)), found))
    return routes


def asked(method: str, address: str, headers: Mapping[str, str], body: bytes) -> tuple[str, str, str, Request]:
    """Access key, service, operation and members of a request; what is not understood is empty."""
    parts = urlsplit(address)
    query, target = dict(parse_qsl(parts.query, True)), headers.get("x-amz-target", "")
    scope = SCOPE.search(headers.get("authorization", "")) or SCOPE.search(
        f"Credential={query.get('X-Amz-Credential', '')}"
    )
    key, signed = (scope[1], scope[2]) if scope else ("", "s3")
    service = SIGNED_AS.get(signed, signed)
    if signed == "sagemaker" and not target:
        service = "sagemaker-runtime" if parts.path.startswith("/endpoints/") else "sagemaker-metrics"
    if target:
        operation = target.rpartition(".")[2]
        return key, service, operation, _members(service, operation, botocore.parsers.JSONParser(), body)
    if found := re.fullmatch(r"/service/[^/]+/operation/(\w+)", parts.path):
        return key, service, found[1], _members(service, found[1], botocore.parsers.RpcV2CBORParser(), body)
    if headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        form = dict(parse_qsl(body.decode(), True))
        operation = form.pop("Action", "")
        shape = model(service).operation_model(operation).input_shape
        return key, service, operation, _unfolded(shape, form, "") if shape else {}
    try:
        return key, service, *_rest(service, method, parts.path, query, headers, body)
    except botocore.exceptions.UnknownServiceError:
        return key, service, "", {}


def _unfolded(shape: Shape, form: Mapping[str, str], path: str) -> Any:
    """A member of a request in the query protocol, whose parts are keys such as `Names.member.1`."""
    if isinstance(shape, StructureShape):
        names = {name: f"{path}{member.serialization.get('name', name)}" for name, member in shape.members.items()}
        return {name: _unfolded(shape.members[name], form, f"{key}.") for name, key in names.items()
                if any(given == key or given.startswith(f"{key}.") for given in form)}  # fmt: skip
    if isinstance(shape, ListShape):
        numbers = sorted(
            {int(n) for given in form if (n := given.removeprefix(f"{path}member.").split(".")[0]).isdigit()}
        )
        return [_unfolded(shape.member, form, f"{path}member.{number}.") for number in numbers]
    return form.get(path.removesuffix("."), "")


def _element(name: str, value: Any, shape: Shape) -> str:
    """A member of an answer in the query protocol."""
    if isinstance(shape, StructureShape):
        parts = [
            _element(key, value[key], member) for key, member in shape.members.items() if value.get(key) is not None
        ]
        content = "".join(parts)
    elif isinstance(shape, ListShape):
        content = "".join(_element("member", item, shape.member) for item in value)
    else:
        content = html.escape(str(value).lower() if isinstance(value, bool) else str(value), quote=False)
    return f"<{name}>{content}</{name}>"


def token(service: str, operation: str, request: Request) -> str:
    """By what AWS knows the repetition of a request; empty where it does not."""
    if operation not in model(service).operation_names:
        return ""
    names = model(service).operation_model(operation).idempotent_members
    given = next((str(request[name]) for name in names if request.get(name)), "")
    return given and f"{service}:{operation}:{given}"


def _members(service: str, operation: str, parser: Any, body: bytes) -> Request:
    """A request is read as an answer with the members of the input would be."""
    shape = model(service).operation_model(operation).input_shape
    read = parser.parse({"status_code": 200, "headers": {}, "body": body}, shape) if shape and body else {}
    return {name: value for name, value in read.items() if name != "ResponseMetadata"}


def _rest(
    service: str, method: str, path: str, query: dict[str, str], headers: Mapping[str, str], body: bytes
) -> tuple[str, Request]:
    best: tuple[int, str, Request] = (-1, "", {})
    for verb, pattern, words, found in _routes(service):
        place = pattern.fullmatch(path) if verb == method else None
        if place is None or any(query.get(word) != value for word, value in words.items()):
            continue
        members: Request = {name: unquote(value) for name, value in place.groupdict().items()}
        shape, rank = found.input_shape, len(words) * 10
        for name, member in (shape.members if shape else {}).items():
            wire, where = member.serialization.get("name", name), member.serialization.get("location")
            given = {"querystring": query.get(wire), "header": headers.get(wire.lower())}
            value = given.get(where or "")
            if value is not None:
                members[name] = value
                rank += 10 if name in shape.required_members else 1
        needed = set(shape.required_members if shape else ())
        placed = {name for name in needed if shape.members[name].serialization.get("location")}
        if not placed <= {*members} or rank <= best[0]:
            continue
        best = rank, found.name, members | _body(service, shape, body)
    return best[1:]


def _body(service: str, shape: StructureShape | None, body: bytes) -> Request:
    payload = shape.serialization.get("payload") if shape else None
    if payload and shape and shape.members[payload].type_name in ("blob", "string"):
        return {payload: body}
    if service in ("s3", "s3control") or not body or not shape:
        return {}
    read = botocore.parsers.RestJSONParser().parse({"status_code": 200, "headers": {}, "body": body}, shape)
    return {name: value for name, value in read.items() if name != "ResponseMetadata"}


def answered(service: str, operation: str, answer: Answer) -> Reply:
    """An answer of a service that speaks JSON."""
    found = model(service).operation_model(operation)
    shape, headers, content = found.output_shape, dict[str, str](), dict(answer)
    if model(service).protocol == "json":
        return 200, {"Content-Type": "application/x-amz-json-1.1"}, json.dumps(answer, default=_plain).encode()
    if model(service).protocol == "query" and shape:
        inner = _element(shape.serialization.get("resultWrapper", f"{operation}Result"), answer, shape)
        return 200, {"Content-Type": "text/xml"}, f"<{operation}Response>{inner}</{operation}Response>".encode()
    for name, member in (shape.members if shape else {}).items():
        if member.serialization.get("location") == "header" and content.get(name) is not None:
            headers[member.serialization["name"]] = str(content.pop(name))
    payload = shape.serialization.get("payload") if shape else None
    body = content.get(payload, b"") if payload else json.dumps(content, default=_plain).encode()
    return found.http.get("responseCode", 200), {"Content-Type": "application/json"} | headers, body


def refused(service: str, error: Refused, path: str = "") -> Reply:
    """A refusal in the protocol of its service."""
    protocol, text = "rest-xml" if service == "s3" else model(service).protocol, str(error)
    headers = {"x-amzn-ErrorType": error.code}
    if path.startswith("/service/"):
        fields = {"__type": error.code, "message": text}
        body = bytes([0xA0 + len(fields)]) + b"".join(_cbor(word) for pair in fields.items() for word in pair)
        return error.status, headers | {"Content-Type": "application/cbor", "smithy-protocol": "rpc-v2-cbor"}, body
    if protocol in ("rest-xml", "query", "ec2"):
        escaped = html.escape(text, quote=False)
        inner = f"<Error><Type>Sender</Type><Code>{error.code}</Code><Message>{escaped}</Message></Error>"
        said = inner if service == "s3" else f"<ErrorResponse>{inner}<RequestId>1</RequestId></ErrorResponse>"
        return error.status, {"Content-Type": "text/xml"}, said.encode()
    content = {"__type": error.code, "message": text, "Message": text} | error.members
    return error.status, headers | {"Content-Type": "application/json"}, json.dumps(content, default=_plain).encode()


def _cbor(text: str) -> bytes:
    content = text.encode()
    return b"\x79" + struct.pack(">H", len(content)) + content


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.timestamp()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(f"{value!r} is in no answer of AWS's")


def only(shape_of: tuple[str, str], facts: Mapping[str, Any]) -> Answer:
    """Of facts, the members that an operation's answer has."""
    shape = model(shape_of[0]).operation_model(shape_of[1]).output_shape
    return {name: value for name, value in facts.items() if name in shape.members and value is not None}


def filled(value: Any) -> Any:
    """Without the empty structures and nulls that moto returns for what is absent, and AWS does not."""
    if isinstance(value, dict):
        return {key: filled(item) for key, item in value.items() if item is not None and item != {}}
    return [filled(item) for item in value] if isinstance(value, list) else value
