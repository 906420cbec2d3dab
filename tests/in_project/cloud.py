"""AWS for tests: moto in process, every request captured, validated by botocore and compared with a golden file.

`golden/<name>.json` holds the requests of one flow. After a wanted change: UPDATE_GOLDEN=<folder> writes them there.
Where moto has no such call, `answers` gives the reply; the request is validated all the same: no more is claimed.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import botocore.client
import pytest
from botocore.exceptions import ClientError
from botocore.validate import ParamValidator

from pipelines.cloud.account import Stack

Call = tuple[str, dict[str, Any]]
GOLDEN = Path(__file__).with_name("golden")
VOLATILE = [  # in this order: a checksum may hold fourteen digits in a row
    (re.compile(r"\b[0-9a-f]{64}\b"), "<sha256>"),
    (re.compile(r"\b[0-9a-f]{32}\b"), "<etag>"),
    (re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "<uuid>"),
    (re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}"), "<run>"),
    (re.compile(r"\d{14}"), "<time>"),
    (re.compile(r"(training|serving)-[0-9a-f]{12}"), r"\1-<hash>"),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(\+00:00|Z)?"), "<date>"),
]
STACK = Stack(
    bucket="the-bucket", role="arn:aws:iam::123456789012:role/the-role",
    repository="123456789012.dkr.ecr.us-east-1.amazonaws.com/the-repository",
    topic="arn:aws:sns:us-east-1:123456789012:topic", scheduler_role="arn:aws:iam::123456789012:role/scheduler",
    pipeline_role="arn:aws:iam::123456789012:role/pipeline", serving_role="arn:aws:iam::123456789012:role/serving",
)  # fmt: skip
KEY = "arn:aws:kms:us-east-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"
NETWORK = ["aws.subnets=[subnet-0a, subnet-0b]", "aws.security_groups=[sg-0a]"]


def described(stack: Stack, parameters: Sequence[dict[str, str]] = ()) -> dict[str, Any]:
    """What CloudFormation says of a stack."""
    names = {"Bucket": stack.bucket, "ExecutionRole": stack.role, "Repository": stack.repository, "Topic": stack.topic,
             "SchedulerRole": stack.scheduler_role, "PipelineRole": stack.pipeline_role,
             "ServingRole": stack.serving_role}  # fmt: skip
    outputs = [{"OutputKey": key, "OutputValue": value} for key, value in names.items()]
    return {"Stacks": [{"StackStatus": "UPDATE_COMPLETE", "Parameters": [*parameters], "Outputs": outputs}]}


def refused(code: str, message: str = "it says no", operation: str = "Operation") -> ClientError:
    """What boto3 raises when AWS refuses."""
    return ClientError({"Error": {"Code": code, "Message": message}}, operation)


class Recorder(list[Call]):
    """All requests of a test, in order; `answers` replies for calls that moto lacks."""

    answers: dict[str, Any]

    def named(self, *operations: str) -> list[dict[str, Any]]:
        """The parameters of the requests with these names."""
        return [parameters for operation, parameters in self if operation in operations]


def stripped(document: Any) -> Any:
    """Without the empty structures that moto returns for what is absent, and AWS does not."""
    if isinstance(document, dict):
        return {key: stripped(value) for key, value in document.items() if value is not None and value != {}}
    return [stripped(value) for value in document] if isinstance(document, list) else document


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """An empty account in us-east-1."""
    from moto import mock_aws

    ours = ("AWS_", "INFERENCE_")  # the second is handed to endpoints, and `batch-local` sets one for its process
    for name in [name for name in os.environ if name.startswith(ours) and name != "AWS_CA_BUNDLE"]:
        monkeypatch.delenv(name)
    variables = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    calls, original = Recorder(), botocore.client.BaseClient._make_api_call
    calls.answers = {}

    def call(self: Any, operation: str, parameters: dict[str, Any]) -> Any:
        calls.append((operation, parameters))
        if operation in calls.answers:
            model = self.meta.service_model.operation_model(operation)
            tokens = dict.fromkeys(model.idempotent_members, "0" * 36)  # which botocore adds later
            report = ParamValidator().validate(tokens | parameters, model.input_shape)
            assert not report.has_errors(), report.generate_report()
            answer = calls.answers[operation]
            if isinstance(answer, Exception):
                raise answer
            return answer(parameters) if callable(answer) else answer
        reply = original(self, operation, parameters)
        return stripped(reply) if self.meta.service_model.service_name == "sagemaker" else reply

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore Ctrl-C
    with mock_aws():
        monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", call)
        yield calls
    signal.signal(signal.SIGINT, before)


def readable(value: Any) -> Any:
    """JSON without what differs from one run to the next."""
    if isinstance(value, dict):
        return {readable(key): readable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [readable(item) for item in value]
    if isinstance(value, bool | int | float) or value is None:
        return value
    if isinstance(value, bytes) or hasattr(value, "read"):
        return "<body>"
    text = str(value)
    for pattern, name in VOLATILE:
        text = pattern.sub(name, text)
    return text


def check_golden(name: str, calls: list[Call], ignore: Callable[[str], bool] | None = None) -> None:
    """Compare requests with `golden/<name>.json`; reading calls can be left out with `ignore`."""
    kept = [call for call in calls if not ignore or not ignore(call[0])]
    found = [[operation, readable(parameters)] for operation, parameters in kept]
    text = json.dumps(found, indent=2, sort_keys=True) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        Path(os.environ["UPDATE_GOLDEN"], f"{name}.json").write_text(text, encoding="utf-8")
    assert text == (GOLDEN / f"{name}.json").read_text(encoding="utf-8")
