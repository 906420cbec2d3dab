"""Endpoints on a stub container: what serves, how it changes, what it leaves, and when it is refused."""

from __future__ import annotations

import io
import json
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError

from conftest import ROLE, until
from rehearsal import docker, endpoints
from rehearsal.operations import CONTROLS, Account

Client = Callable[[str], Any]


@pytest.fixture
def model(account: Account, client: Client, image: str) -> Callable[..., str]:
    """Makes a model whose handler is some code, and a configuration of it; gives the name of both."""

    def made(name: str, code: str = "", config: dict[str, Any] | None = None, **more: Any) -> str:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            file = tarfile.TarInfo("handler.py")
            file.size = len(code)
            tar.addfile(file, io.BytesIO(code.encode()))
        client("s3").put_object(Bucket="the-bucket", Key=f"{name}.tar.gz", Body=packed.getvalue())
        container = {"Image": image, "ModelDataUrl": f"s3://the-bucket/{name}.tar.gz"}
        client("sagemaker").create_model(ModelName=name, ExecutionRoleArn=ROLE, PrimaryContainer=container, **more)
        client("sagemaker").create_endpoint_config(**{
            "EndpointConfigName": name, "ProductionVariants": [variant(name)],
        } | (config or {}))  # fmt: skip
        return name

    return made


def variant(model: str, name: str = "AllTraffic", weight: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"VariantName": name, "ModelName": model, "InitialVariantWeight": weight} | (
        more or {"InstanceType": "ml.m5.large", "InitialInstanceCount": 2}
    )


def says(word: str) -> str:
    """A handler that answers with one word."""
    return f"def answer(body, headers): return 200, 'text/plain', b'{word}'"


def settled(client: Client, name: str = "e") -> dict[str, Any]:
    """An endpoint that does not change any more."""

    def look() -> Any:
        facts = client("sagemaker").describe_endpoint(EndpointName=name)
        return facts if facts["EndpointStatus"] in ("InService", "Failed") else None

    return dict(until(look))


def serve(client: Client, config: str, name: str = "e") -> dict[str, Any]:
    client("sagemaker").create_endpoint(EndpointName=name, EndpointConfigName=config)
    return settled(client, name)


def ask(client: Client, body: bytes = b"x", **more: Any) -> tuple[bytes, str]:
    answer = client("sagemaker-runtime").invoke_endpoint(EndpointName="e", Body=body, ContentType="text/plain", **more)
    return answer["Body"].read(), answer["InvokedProductionVariant"]


def objects(client: Client, prefix: str) -> list[dict[str, Any]]:
    return list(client("s3").list_objects_v2(Bucket="the-bucket", Prefix=prefix).get("Contents", []))


@pytest.fixture
def go_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, an endpoint that changes stays at its first step."""
    event = threading.Event()

    def sleep(seconds: float) -> None:
        time.sleep(seconds) if seconds < endpoints.STEP / 2 else event.wait(60)

    monkeypatch.setattr(endpoints, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    yield event
    event.set()


def test_two_variants_by_weight_and_by_name(
    account: Account, client: Client, model: Callable[..., str], go_on: threading.Event
) -> None:
    for word in ("one", "two"):
        model(word, says(word))
    both = [variant("one", "first", 3.0), variant("two", "second", 1.0)]
    client("sagemaker").create_endpoint_config(EndpointConfigName="both", ProductionVariants=both)
    facts = serve(client, "both")
    assert [item["CurrentInstanceCount"] for item in facts["ProductionVariants"]] == [2, 2]
    found = Counter(ask(client) for _ in range(60))
    assert set(found) == {(b"one", "first"), (b"two", "second")}
    assert found[b"one", "first"] > found[b"two", "second"]
    assert ask(client, TargetVariant="second") == (b"two", "second")
    with pytest.raises(ClientError, match="Variant third not found"):
        ask(client, TargetVariant="third")
    weights = [{"VariantName": "first", "DesiredWeight": 0.0}, {"VariantName": "second", "DesiredWeight": 1.0}]
    change = {"EndpointName": "e", "DesiredWeightsAndCapacities": weights}
    client("sagemaker").update_endpoint_weights_and_capacities(**change)
    with pytest.raises(ClientError, match="Cannot update in-progress endpoint"):
        client("sagemaker").update_endpoint_weights_and_capacities(**change)
    go_on.set()
    settled(client)
    assert {ask(client) for _ in range(10)} == {(b"two", "second")}
    client("sagemaker").delete_endpoint(EndpointName="e")
    until(lambda: not client("sagemaker").list_endpoints()["Endpoints"])
    with pytest.raises(ClientError, match="Could not find endpoint"):
        client("sagemaker").describe_endpoint(EndpointName="e")
    assert not docker.run("ps", "--quiet", "--filter", f"label=rehearsal={account.name}").stdout


@pytest.mark.parametrize(("kind", "size"), [("CANARY", "CanarySize"), ("LINEAR", "LinearStepSize")])
def test_an_update_in_steps(
    account: Account, client: Client, model: Callable[..., str], kind: str, size: str, go_on: threading.Event
) -> None:
    serve(client, model("one", says("one")))
    model("two", says("two"))
    routing = {"Type": kind, "WaitIntervalInSeconds": 300, size: {"Type": "CAPACITY_PERCENT", "Value": 50}}
    policy = {"BlueGreenUpdatePolicy": {"TrafficRoutingConfiguration": routing}}
    client("sagemaker").update_endpoint(EndpointName="e", EndpointConfigName="two", DeploymentConfig=policy)
    with pytest.raises(ClientError, match="Cannot update in-progress endpoint"):
        client("sagemaker").update_endpoint(EndpointName="e", EndpointConfigName="two")
    with pytest.raises(ClientError, match="Cannot delete in-progress endpoint"):
        client("sagemaker").delete_endpoint(EndpointName="e")
    until(lambda: [event for event in account.events if event["kind"] == "step"])
    facts = client("sagemaker").describe_endpoint(EndpointName="e")
    assert (facts["EndpointConfigName"], facts["PendingDeploymentSummary"]["EndpointConfigName"]) == ("one", "two")
    assert {ask(client)[0] for _ in range(20)} == {b"one", b"two"}
    go_on.set()
    assert settled(client)["EndpointConfigName"] == "two"
    assert [event["text"].partition(" ")[0] for event in account.events if event["kind"] == "step"] == ["50%", "100%"]
    assert {ask(client)[0] for _ in range(10)} == {b"two"}


def test_a_container_that_does_not_come_up(client: Client, model: Callable[..., str]) -> None:
    facts = serve(client, model("bad", "raise SystemExit(3)"), "e")
    assert facts["EndpointStatus"] == "Failed"
    assert facts["FailureReason"].startswith(
        "The primary container for production variant AllTraffic did not pass the ping health check"
    )
    client("sagemaker").delete_endpoint(EndpointName="e")
    until(lambda: not client("sagemaker").list_endpoints()["Endpoints"])
    serve(client, model("good", says("good")))
    client("sagemaker").update_endpoint(EndpointName="e", EndpointConfigName="bad")
    facts = settled(client)
    assert (facts["EndpointConfigName"], facts["EndpointStatus"]) == ("good", "InService")
    assert "did not pass the ping health check" in facts["FailureReason"]
    assert ask(client)[0] == b"good"
    logs = client("logs")
    until(lambda: logs.describe_log_streams(logGroupName="/aws/sagemaker/Endpoints/e")["logStreams"])


def test_a_gpu_is_accepted_and_not_played(client: Client, model: Callable[..., str]) -> None:
    machine = variant("m", InstanceType="ml.g5.xlarge", InitialInstanceCount=1)
    facts = serve(client, model("m", config={"ProductionVariants": [machine]}))
    assert facts["EndpointStatus"] == "Failed"
    assert "plays no GPU" in facts["FailureReason"]


def test_an_alarm_takes_an_update_back(client: Client, model: Callable[..., str]) -> None:
    serve(client, model("one", says("one")))
    client("cloudwatch").put_metric_alarm(
        AlarmName="bad", MetricName="m", Namespace="n", Period=60, EvaluationPeriods=1, Threshold=1.0, Statistic="Sum",
        ComparisonOperator="GreaterThanThreshold",
    )  # fmt: skip
    client("cloudwatch").set_alarm_state(AlarmName="bad", StateValue="ALARM", StateReason="now")
    rollback = {"AutoRollbackConfiguration": {"Alarms": [{"AlarmName": "bad"}]}}
    client("sagemaker").update_endpoint(
        EndpointName="e", EndpointConfigName=model("two", says("two")), DeploymentConfig=rollback
    )
    facts = settled(client)
    assert (facts["EndpointConfigName"], facts["FailureReason"]) == ("one", "Alarm(s) bad in state ALARM")
    assert ask(client)[0] == b"one"


def test_answers_that_are_none(
    account: Account, client: Client, model: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import os, time
def answer(body, headers):
    if body == b"die": os._exit(1)
    if body == b"sleep": time.sleep(9)
    return 415, "application/json", b'{"error": "no"}'
"""
    serve(client, model("m", code))
    with pytest.raises(ClientError) as error:
        ask(client)
    assert error.value.response["Error"]["Code"] == "ModelError"
    assert (error.value.response["OriginalStatusCode"], error.value.response["OriginalMessage"]) == (
        415, '{"error": "no"}',
    )  # fmt: skip
    assert 'Received client error (415) from primary with message "{"error": "no"}"' in str(error.value)
    with pytest.raises(ClientError, match="Member must have length less than or equal to 6291456"):
        ask(client, b"x" * (6 * 2**20 + 1))
    with monkeypatch.context() as patched:
        patched.setattr(endpoints, "REALTIME_SECONDS", 1)
        with pytest.raises(ClientError, match="Your invocation timed out"):
            ask(client, b"sleep")
    with pytest.raises(ClientError) as gone:
        ask(client, b"die")
    assert gone.value.response["ResponseMetadata"]["HTTPStatusCode"] in (424, 503)

    def again() -> bool:
        with pytest.raises(ClientError) as error:
            ask(client)
        return bool(error.value.response["Error"]["Code"] == "ModelError")

    until(again)
    assert [event for event in account.events if event["kind"] == "died"]


def test_an_isolated_model_reaches_nothing_and_is_reached(client: Client, model: Callable[..., str]) -> None:
    code = """
import socket
def answer(body, headers):
    try: socket.create_connection(("1.1.1.1", 53), 2); return 200, "text/plain", b"out"
    except OSError: return 200, "text/plain", b"kept in"
    """
    serve(client, model("m", code, EnableNetworkIsolation=True))
    assert ask(client)[0] == b"kept in"


def test_serverless_has_its_own_limit(client: Client, model: Callable[..., str]) -> None:
    machine = variant("m", ServerlessConfig={"MemorySizeInMB": 1024, "MaxConcurrency": 5})
    facts = serve(client, model("m", config={"ProductionVariants": [machine]}))
    assert facts["ProductionVariants"][0]["CurrentServerlessConfig"]["MemorySizeInMB"] == 1024
    assert ask(client)[0] == b"x"
    with pytest.raises(ClientError, match="less than or equal to 4194304"):
        ask(client, b"x" * (4 * 2**20 + 1))


def test_what_is_captured(client: Client, model: Callable[..., str]) -> None:
    capture = {
        "EnableCapture": True, "InitialSamplingPercentage": 100, "DestinationS3Uri": "s3://the-bucket/capture",
        "CaptureOptions": [{"CaptureMode": "Input"}, {"CaptureMode": "Output"}],
        "CaptureContentTypeHeader": {"JsonContentTypes": ["application/json"]},
    }  # fmt: skip
    code = "def answer(body, headers): return 200, 'application/json', b'[1]'"
    serve(client, model("m", code, {"DataCaptureConfig": capture}))
    ask(client, b"\x00photo")
    (found,) = until(lambda: objects(client, "capture/e/AllTraffic/"))
    line = json.loads(client("s3").get_object(Bucket="the-bucket", Key=found["Key"])["Body"].read())
    assert line["captureData"]["endpointInput"]["encoding"] == "BASE64"
    assert line["captureData"]["endpointOutput"] == {
        "observedContentType": "application/json", "mode": "OUTPUT", "data": "[1]", "encoding": "JSON",
    }  # fmt: skip


def test_requests_that_wait(account: Account, client: Client, model: Callable[..., str]) -> None:
    topics = {word: client("sns").create_topic(Name=word)["TopicArn"] for word in ("good", "bad")}
    output = {
        "S3OutputPath": "s3://the-bucket/out", "S3FailurePath": "s3://the-bucket/failed",
        "NotificationConfig": {"SuccessTopic": topics["good"], "ErrorTopic": topics["bad"]},
    }  # fmt: skip
    code = "def answer(body, headers): return (500 if b'bad' in body else 200), 'text/plain', body * 2"
    serve(client, model("m", code, {"AsyncInferenceConfig": {"OutputConfig": output}}))
    with pytest.raises(ClientError, match="use InvokeEndpointAsync"):
        ask(client)
    CONTROLS["scale"](account, {"endpoint": "e", "count": 0})
    runtime, places = client("sagemaker-runtime"), {}
    for word in ("good", "bad"):
        client("s3").put_object(Bucket="the-bucket", Key=f"in/{word}", Body=word.encode())
        places[word] = runtime.invoke_endpoint_async(EndpointName="e", InputLocation=f"s3://the-bucket/in/{word}")
    key = places["good"]["OutputLocation"].removeprefix("s3://the-bucket/")
    until(lambda: objects(client, key))
    assert client("s3").get_object(Bucket="the-bucket", Key=key)["Body"].read() == b"goodgood"
    key = places["bad"]["FailureLocation"].removeprefix("s3://the-bucket/")
    until(lambda: objects(client, key))
    assert b"Received server error (500)" in client("s3").get_object(Bucket="the-bucket", Key=key)["Body"].read()
    told = until(lambda: len(found := CONTROLS["notices"](account, {})["notices"]) == 2 and found)
    assert {item["topic"] for item in told} == set(topics.values())


def test_a_package_serves_its_container(client: Client, model: Callable[..., str], image: str) -> None:
    model("m", says("packed"))
    container = {"Image": image, "ModelDataUrl": "s3://the-bucket/m.tar.gz"}
    package = client("sagemaker").create_model_package(
        ModelPackageName="p", InferenceSpecification={
            "Containers": [container], "SupportedContentTypes": ["text/plain"],
            "SupportedResponseMIMETypes": ["text/plain"],
        },
    )["ModelPackageArn"]  # fmt: skip
    client("sagemaker").create_model(
        ModelName="of", ExecutionRoleArn=ROLE, PrimaryContainer={"ModelPackageName": package}
    )
    client("sagemaker").create_endpoint_config(EndpointConfigName="of", ProductionVariants=[variant("of")])
    serve(client, "of")
    assert ask(client)[0] == b"packed"
