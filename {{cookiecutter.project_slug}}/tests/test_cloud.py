"""The way to SageMaker and back, in moto: bootstrap, train, deploy, invoke, status, destroy. No AWS account is asked.

Moto answers as AWS would for most of it. What it lacks (images, prices, a model that answers) is answered here, so this
test says that the verbs ask for the right things in the right order, and not that AWS would do them.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.client
import pytest
from moto import mock_aws
from moto.cloudformation.models import ChangeSet
from moto.cloudformation.parsing import OutputMap

from inference import inference
from pipelines import project, runs, terminal
from pipelines.__main__ import run
from pipelines.cloud import prices
from tests.test_inference import archive, artifact, classifier, photo

__all__ = ["archive", "artifact", "classifier"]  # fixtures
pytestmark = [
    pytest.mark.filterwarnings("ignore:Tried to parse AWS:UserWarning"),  # kinds of resources that moto does not make
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # the SDK's temporary folder
]
PLAIN = [  # whatever the files say: the journey needs no key, no network and no machine of yours
    "aws.region=us-east-1", "aws.kms_key=none", "aws.subnets=[]", "aws.security_groups=[]", "aws.budget_usd=20",
    "images.training=project", "images.serving=project", "data.pretrained=none", "endpoint.name=auto",
    "endpoint.type=realtime", "endpoint.instances=1", "endpoint.max_instances=1", "endpoint.ttl_hours=8",
]  # fmt: skip
NAME = project.name()
Request = dict[str, Any]


class Cloud:
    """An empty account that remembers what it was asked.

    Attributes:
        asked: operations with their parameters, in order.
        answers: to those that moto lacks.
    """

    def __init__(self, classifier: inference.Classifier) -> None:
        self.classifier, self.asked = classifier, list[tuple[str, Request]]()
        self.answers: dict[str, Callable[[Request], Any]] = {
            "DescribeImages": lambda _: {"imageDetails": []}, "GetProducts": self.price, "InvokeEndpoint": self.invoke,
        }  # fmt: skip

    def price(self, request: Request) -> Any:
        """One dollar an hour for anything."""
        usage = next(item["Value"] for item in request["Filters"] if item["Field"] == "usagetype")
        terms = {"OnDemand": {"a": {"priceDimensions": {"b": {"unit": "Hrs", "pricePerUnit": {"USD": "1"}}}}}}
        return {"PriceList": [json.dumps({"product": {"attributes": {"usagetype": usage}}, "terms": terms})]}

    def invoke(self, request: Request) -> Any:
        """What the model's own handlers answer."""
        batch = inference.input_fn(request["Body"], request["ContentType"])
        text, kind = inference.output_fn(inference.predict_fn(batch, self.classifier), "application/json")
        return {"Body": io.BytesIO(text.encode()), "ContentType": kind}

    def named(self, *operations: str) -> list[Request]:
        """The parameters of the requests with these names."""
        return [request for operation, request in self.asked if operation in operations]


def there(answer: Any) -> Any:
    """Without the empty fields that moto returns and AWS does not."""
    if isinstance(answer, dict):
        return {key: there(value) for key, value in answer.items() if value is not None and value != {}}
    return [there(item) for item in answer] if isinstance(answer, list) else answer


@pytest.fixture
def cloud(classifier: inference.Classifier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cloud]:
    for name in [name for name in os.environ if name.startswith("AWS_") or "__" in name]:
        monkeypatch.delenv(name)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(runs, "ARTIFACTS", tmp_path / "artifacts")
    monkeypatch.setattr(prices, "CACHE", tmp_path / "prices.json")
    monkeypatch.setattr(terminal, "given", {})
    pause = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: pause(min(seconds, 0.01)))
    logging.getLogger("moto").setLevel(logging.ERROR)
    made, apply, ask = Cloud(classifier), ChangeSet.apply, botocore.client.BaseClient._make_api_call

    def with_outputs(self: Any) -> None:  # which moto forgets
        apply(self)
        self.stack.output_map = OutputMap(self.stack.resource_map, self.template_dict, self.stack_id)

    def call(self: Any, operation: str, request: Request) -> Any:
        made.asked.append((operation, request))
        known = made.answers.get(operation)
        return known(request) if known else there(ask(self, operation, request))

    monkeypatch.setattr(ChangeSet, "apply", with_outputs)
    with mock_aws():
        monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", call)
        yield made


def make(monkeypatch: pytest.MonkeyPatch, verb: str, *words: str) -> None:
    """A verb, in this process."""
    monkeypatch.setattr(sys, "argv", [])
    assert run(verb, [*words, *(f"--set={setting}" for setting in PLAIN)]) == 0


def test_there_and_back(
    cloud: Cloud, packed: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    make(monkeypatch, "bootstrap", "--yes")
    said = capsys.readouterr().out
    bucket = next(line.split()[1] for line in said.splitlines() if line.split()[:1] == ["Bucket"])
    assert bucket == f"{NAME}-123456789012-us-east-1"
    for file in packed.rglob("*.*"):
        boto3.client("s3").upload_file(str(file), bucket, f"data/edges/{file.relative_to(packed).as_posix()}")

    make(monkeypatch, "train", "--data", f"s3://{bucket}/data/edges")
    (job,) = cloud.named("CreateTrainingJob")
    assert {"Key": "project", "Value": NAME} in job["Tags"]
    assert job["RoleArn"].rpartition("/")[2].startswith(NAME)
    assert "at most" in capsys.readouterr().out

    make(monkeypatch, "deploy", "--artifact", str(archive), "--yes")
    order = [name for name, _ in cloud.asked if name in ("CreateSchedule", "CreateModel", "CreateEndpoint")]
    assert order == ["CreateSchedule", "CreateModel", "CreateEndpoint"]  # its end is certain before it begins
    assert "golden samples agree within 0.0" in capsys.readouterr().out
    (tmp_path / "up.png").write_bytes(photo("up"))
    make(monkeypatch, "invoke", "--image", str(tmp_path / "up.png"))
    assert "up" in capsys.readouterr().out

    make(monkeypatch, "status")
    seen = capsys.readouterr().out
    assert f"endpoint         {NAME} " in seen
    assert "in all at most 1.000 USD an hour" in seen

    make(monkeypatch, "destroy", "--yes", "--all", "--confirm", NAME)
    assert boto3.client("sagemaker").list_endpoints()["Endpoints"] == []
    assert boto3.client("s3").list_buckets()["Buckets"] == []
    assert boto3.client("cloudformation").list_stacks(StackStatusFilter=["CREATE_COMPLETE"])["StackSummaries"] == []
