"""`deploy`, `invoke` and `shift-traffic`: requests, order, answers of the real handlers, and everything that fails."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from moto.sagemaker.models import sagemaker_backends

from inference import inference
from payload import RequestError
from pipelines import config, project, runs
from pipelines.cloud import prices
from pipelines.cloud.account import Account
from pipelines.endpoint import deploy, expiry, invoke, rollout, shift_traffic
from pipelines.endpoint import state as endpoints
from pipelines.local import engine
from pipelines.terminal import Finished, UserError
from tests.cloud import KEY, NETWORK, STACK, Recorder, aws, check_golden, refused
from tests.test_inference import archive, artifact, classifier, photo

__all__ = ["archive", "artifact", "aws", "classifier"]  # fixtures
NAME = project.name()
READS = ("Describe", "List", "Get", "Head")
MAKES = ("CreateSchedule", "UpdateSchedule", "CreateModel", "CreateEndpointConfig", "CreateEndpoint", "UpdateEndpoint")


class Hosting:
    """What moto lacks of hosting: updates, asynchronous endpoints, states, and a model that answers."""

    def __init__(self, calls: Recorder, classifier: inference.Classifier) -> None:
        self.calls, self.classifier = calls, classifier
        self.state: dict[str, Any] = {}  # what DescribeEndpoint says instead
        self.apart = 0.0  # how far the answers are from the model's
        self.variants: list[str | None] = []  # that were asked
        answers = {"InvokeEndpoint": self.invoke, "InvokeEndpointAsync": self.invoke_async}
        calls.answers |= answers | {"UpdateEndpoint": self.update, "DescribeEndpoint": self.describe}

    def config(self, name: str) -> dict[str, Any]:
        return next(made for made in self.calls.named("CreateEndpointConfig") if made["EndpointConfigName"] == name)

    def describe(self, asked: dict[str, Any]) -> dict[str, Any]:
        backend = sagemaker_backends["123456789012"]["us-east-1"]
        if asked["EndpointName"] not in backend.endpoints:
            error = {"Code": "ValidationException", "Message": f'Could not find endpoint "{asked["EndpointName"]}".'}
            raise ClientError({"Error": error}, "DescribeEndpoint")
        endpoint = backend.endpoints[asked["EndpointName"]]
        facts = endpoint.summary() | {
            "EndpointConfigName": endpoint.endpoint_config_name, "ProductionVariants": endpoint.production_variants,
        }  # fmt: skip
        own = self.config(endpoint.endpoint_config_name).get("AsyncInferenceConfig")
        return facts | ({"AsyncInferenceConfig": own} if own else {}) | self.state

    def update(self, asked: dict[str, Any]) -> dict[str, Any]:
        endpoint = sagemaker_backends["123456789012"]["us-east-1"].endpoints[asked["EndpointName"]]
        endpoint.endpoint_config_name = asked["EndpointConfigName"]
        new = self.config(asked["EndpointConfigName"])["ProductionVariants"]
        endpoint.production_variants = endpoint._process_production_variants(new)
        return {"EndpointArn": endpoint.arn}

    def go_back(self, asked: dict[str, Any]) -> dict[str, Any]:
        """An update that AWS takes back, for an alarm rings."""
        old = self.describe(asked)["EndpointConfigName"]
        answer = self.update(asked)
        self.state = {"EndpointConfigName": old, "FailureReason": "alarm cv-5xx"}
        return answer

    def answer(self, body: bytes, kind: str) -> str:
        text, _ = inference.output_fn(
            inference.predict_fn(inference.input_fn(body, kind), self.classifier), "application/json"
        )
        found = json.loads(text)
        found["probabilities"] = [[value + self.apart for value in row] for row in found["probabilities"]]
        return json.dumps(found)

    def invoke(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.variants.append(asked.get("TargetVariant"))
        try:
            text = self.answer(asked["Body"], asked["ContentType"])
        except RequestError as error:
            model = {"OriginalStatusCode": error.status, "OriginalMessage": json.dumps({"error": str(error)})}
            what = {"Error": {"Code": "ModelError", "Message": "Received client error (400) from primary"}, **model}
            raise ClientError(what, "InvokeEndpoint") from error
        return {"Body": io.BytesIO(text.encode()), "ContentType": "application/json"}

    def invoke_async(self, asked: dict[str, Any]) -> dict[str, Any]:
        bucket, _, key = asked["InputLocation"].removeprefix("s3://").partition("/")
        s3 = boto3.client("s3")
        body = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
        places = {
            "OutputLocation": f"s3://{bucket}/async/out/1.out",
            "FailureLocation": f"s3://{bucket}/async/bad/1.out",
        }
        try:
            s3.put_object(Bucket=bucket, Key="async/out/1.out", Body=self.answer(body, asked["ContentType"]).encode())
        except RequestError as error:
            text = f'Received client error (400) from primary with message "{json.dumps({"error": str(error)})}".'
            s3.put_object(Bucket=bucket, Key="async/bad/1.out", Body=text.encode())
        return {"InferenceId": "1", **places}


@pytest.fixture
def hosting(
    aws: Recorder, classifier: inference.Classifier, archive: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Hosting:
    """An account with the stack and the image, and two runs on this machine."""
    boto3.client("s3").create_bucket(Bucket=STACK.bucket)
    monkeypatch.setattr(Account, "stack", lambda _settings: STACK)
    monkeypatch.setattr(prices, "hourly", lambda *_: 0.5)
    monkeypatch.setattr(runs, "ARTIFACTS", tmp_path / "artifacts")
    monkeypatch.setattr(endpoints, "POLL", 0.001)
    monkeypatch.setattr(invoke, "ASYNC_POLL", 0.001)
    for run in ("20261121-093000-a1b2", "20261121-103000-a1b2"):
        (tmp_path / "artifacts" / run).mkdir(parents=True)
        shutil.copy(archive, tmp_path / "artifacts" / run / "model.tar.gz")
    (tmp_path / "artifacts" / "latest").symlink_to("20261121-103000-a1b2")
    aws.answers["DescribeImages"] = {"imageDetails": []}
    aws.clear()
    return Hosting(aws, classifier)


def settings(*overrides: str) -> config.Settings:
    return config.load(["aws.region=us-east-1", *overrides], {})


def run(*overrides: str, **options: Any) -> None:
    names = ("run", "job", "package", "artifact", "endpoint", "weight", "rollback")
    given = dict.fromkeys(names) | {"yes": True, "plan": False} | options
    deploy.deploy(Account(settings(*overrides)), Namespace(**given))


def written(calls: Recorder) -> Recorder:
    """The requests that change something."""
    return Recorder(call for call in calls if not call[0].startswith(READS))


def left() -> list[Any]:
    """Everything that could bill, or lie around."""
    sagemaker, scheduler = boto3.client("sagemaker"), boto3.client("scheduler")
    return [
        *sagemaker.list_endpoints()["Endpoints"], *sagemaker.list_endpoint_configs()["EndpointConfigs"],
        *sagemaker.list_models()["Models"], *scheduler.list_schedules()["Schedules"],
    ]  # fmt: skip


def test_a_realtime_endpoint_in_moto_alone(hosting: Hosting, capsys: pytest.CaptureFixture[str]) -> None:
    del hosting.calls.answers["DescribeEndpoint"]
    run("aws.tags={team: vision}", run="20261121-093000-a1b2")
    check_golden("deploy_realtime", written(hosting.calls))
    order = [name for name, _ in hosting.calls if name in MAKES]
    assert order == ["CreateSchedule", "CreateModel", "CreateEndpointConfig", "CreateEndpoint"]
    printed = capsys.readouterr().out
    for words in (
        "create the realtime endpoint",
        "run 20261121-093000-a1b2",
        "0.50 USD an hour",
        "4.00 USD until",
        "its 4 golden samples agree",
        f"#/endpoints/{NAME}",
        "make invoke IMAGE=",
        "deletes itself on 20",
    ):
        assert words in printed  # fmt: skip
    model = boto3.client("sagemaker").describe_model(ModelName=hosting.calls.named("CreateModel")[0]["ModelName"])
    bucket, _, key = model["PrimaryContainer"]["ModelDataUrl"].removeprefix("s3://").partition("/")
    assert boto3.client("s3").head_object(Bucket=bucket, Key=key)["ContentLength"]
    schedule = boto3.client("scheduler").get_schedule(Name=f"{NAME}-end")
    assert json.loads(schedule["Target"]["Input"]) == {"EndpointName": NAME}


def test_an_update_in_steps_with_alarms(hosting: Hosting) -> None:
    run("endpoint.instances=20")
    puts = len(hosting.calls.named("PutObject"))
    start = len(hosting.calls)
    run("endpoint.instances=20", "endpoint.rollout=canary", "endpoint.alarms=[cv-5xx, cv-slow]", "aws.budget_usd=500")
    check_golden("deploy_canary", written(Recorder(hosting.calls[start:])))
    assert len(hosting.calls.named("PutObject")) == puts, "the same artifact is uploaded once"
    run("endpoint.instances=20", "endpoint.rollout=linear")
    steps = hosting.calls.named("UpdateEndpoint")[1]["DeploymentConfig"]["BlueGreenUpdatePolicy"]
    assert steps["TrafficRoutingConfiguration"]["LinearStepSize"] == {"Type": "INSTANCE_COUNT", "Value": 5}
    run("endpoint.instances=20")
    assert "DeploymentConfig" not in hosting.calls.named("UpdateEndpoint")[2]
    run("endpoint.instances=20", "endpoint.alarms=[cv-5xx]")
    steps = hosting.calls.named("UpdateEndpoint")[3]["DeploymentConfig"]["BlueGreenUpdatePolicy"]
    assert steps["TrafficRoutingConfiguration"] == {"Type": "ALL_AT_ONCE", "WaitIntervalInSeconds": 300}
    assert len(hosting.calls.named("CreateSchedule")) == 1
    with pytest.raises(UserError, match="at least 2"):
        run("endpoint.rollout=canary")


def test_serverless(hosting: Hosting, capsys: pytest.CaptureFixture[str]) -> None:
    run("endpoint.type=serverless", "endpoint.memory_mb=2048", "endpoint.max_concurrency=7")
    check_golden("deploy_serverless", written(hosting.calls))
    assert "at most 7 x Mem-2GB" in capsys.readouterr().out
    run("endpoint.type=serverless", "endpoint.rollout=canary")
    assert "DeploymentConfig" not in hosting.calls.named("UpdateEndpoint")[0]
    for kind in ("realtime", "async"):
        with pytest.raises(UserError, match=f"is serverless and would become {kind}"):
            run(f"endpoint.type={kind}")
    for more in (["endpoint.capture_percent=1"], NETWORK, ["compute.isolation=true"]):
        with pytest.raises(UserError, match="serverless endpoints have no"):
            run("endpoint.type=serverless", *more)


def test_async_scales_to_zero(
    hosting: Hosting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("endpoint.type=async", "endpoint.max_instances=3", f"aws.kms_key={KEY}")
    calls = [(name, p) for name, p in written(hosting.calls) if name not in ("PutObject", "DeleteObject")]
    check_golden("deploy_async", Recorder(call for call in calls if call[0] != "InvokeEndpointAsync"))
    targets = boto3.client("application-autoscaling").describe_scalable_targets(ServiceNamespace="sagemaker")
    assert [(t["MinCapacity"], t["MaxCapacity"]) for t in targets["ScalableTargets"]] == [(0, 3)]
    alarm = boto3.client("cloudwatch").describe_alarms()["MetricAlarms"]
    assert {item["MetricName"] for item in alarm} >= {"HasBacklogWithoutCapacity"}
    image = tmp_path / "up.png"
    image.write_bytes(photo("up"))
    monkeypatch.setattr(sys, "argv", ["invoke", "--image", str(image), "--set", "aws.region=us-east-1"])
    capsys.readouterr()
    assert invoke.main() == 0
    assert f"{image}: up\n  up  " in capsys.readouterr().out
    image.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"failed: .*image"):
        invoke.main()
    rest = boto3.client("s3").list_objects_v2(Bucket=STACK.bucket, Prefix="async/")
    assert rest["KeyCount"] == 0, "questions and answers do not stay"
    for kind in ("realtime", "serverless"):
        with pytest.raises(UserError, match=f"is async and would become {kind}: .*clients could not ask"):
            run(f"endpoint.type={kind}")
    hosting.state = {"ProductionVariants": [{"VariantName": "AllTraffic", "CurrentInstanceCount": 0}]}
    image.write_bytes(photo("left"))
    assert invoke.main() == 0
    assert "has no instance right now" in capsys.readouterr().out


def test_everything_that_a_realtime_endpoint_can_have(hosting: Hosting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERENCE_QUEUE", "9")
    run(*NETWORK, f"aws.kms_key={KEY}", "endpoint.capture_percent=20", "compute.isolation=true",
        "endpoint.instance_type=ml.g4dn.xlarge", "endpoint.max_instances=4", "endpoint.ttl_hours=0.5",
        endpoint=f"{NAME}-eu")  # fmt: skip
    check_golden("deploy_everything", written(hosting.calls))
    targets = boto3.client("application-autoscaling").describe_scalable_targets(ServiceNamespace="sagemaker")
    assert [(t["MinCapacity"], t["MaxCapacity"]) for t in targets["ScalableTargets"]] == [(1, 4)]
    run(endpoint=f"{NAME}-eu")
    targets = boto3.client("application-autoscaling").describe_scalable_targets(ServiceNamespace="sagemaker")
    assert not targets["ScalableTargets"], "max_instances=1 ends the scaling"


def test_two_variants_and_moving_requests(
    hosting: Hosting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("endpoint.max_instances=2")
    start = len(hosting.calls)
    hosting.variants.clear()
    run("endpoint.max_instances=2", "endpoint.alarms=[cv-5xx]", run="20261121-093000-a1b2", weight=10)
    assert "do not apply" in capsys.readouterr().out
    check_golden("deploy_second_variant", written(Recorder(hosting.calls[start:])))
    assert set(hosting.variants) == {rollout.SECOND}, "the golden samples ask the new variant"
    monkeypatch.setattr(sys, "argv", ["shift-traffic", "--variant", rollout.SECOND, "--weight", "25",
                                      "--set", "aws.region=us-east-1"])  # fmt: skip
    start = len(hosting.calls)
    assert shift_traffic.main() == 0
    check_golden("shift_traffic", written(Recorder(hosting.calls[start:])))
    with pytest.raises(UserError, match=f"has {rollout.FIRST}, {rollout.SECOND}"):
        shift_traffic.shift(Account(settings()), NAME, "other", 5)
    with pytest.raises(UserError, match="WEIGHT is 101"):
        shift_traffic.shift(Account(settings()), NAME, rollout.SECOND, 101)
    assert shift_traffic.shift(Account(settings()), NAME, rollout.SECOND, 100) == {
        rollout.FIRST: 0,
        rollout.SECOND: 100,
    }
    sent = hosting.calls.named("UpdateEndpointWeightsAndCapacities")[-1]["DesiredWeightsAndCapacities"]
    assert sent[0] == {"VariantName": rollout.FIRST, "DesiredWeight": 0.0}
    assert shift_traffic.shift(Account(settings()), NAME, rollout.SECOND, 40) == {rollout.FIRST: 60, rollout.SECOND: 40}
    run("endpoint.max_instances=2")  # and back to one
    found = boto3.client("application-autoscaling").describe_scalable_targets(ServiceNamespace="sagemaker")
    assert [t["ResourceId"] for t in found["ScalableTargets"]] == [f"endpoint/{NAME}/variant/{rollout.FIRST}"]
    with pytest.raises(UserError, match="makes a second one"):
        shift_traffic.shift(Account(settings()), NAME, rollout.FIRST, 5)


def running(hosting: Hosting, **counts: int) -> None:
    """From now on so many instances of the variants run."""
    found = [{"VariantName": name, "DesiredInstanceCount": count, "CurrentInstanceCount": count}
             for name, count in counts.items()]  # fmt: skip
    hosting.state = {"ProductionVariants": found}


def asked_for(hosting: Hosting) -> dict[str, Any]:
    """How many instances the last configuration has of each variant."""
    variants = hosting.calls.named("CreateEndpointConfig")[-1]["ProductionVariants"]
    return {variant["VariantName"]: variant["InitialInstanceCount"] for variant in variants}


def test_an_update_keeps_the_instances_that_load_has_brought(hosting: Hosting) -> None:
    run("endpoint.max_instances=4")
    running(hosting, AllTraffic=3)
    run("endpoint.max_instances=4")
    assert asked_for(hosting) == {rollout.FIRST: 3}
    run("endpoint.max_instances=2")
    assert asked_for(hosting) == {rollout.FIRST: 2}
    run()
    assert asked_for(hosting) == {rollout.FIRST: 1}, "it does not scale any more"
    run("endpoint.max_instances=4", weight=10)
    assert asked_for(hosting) == {rollout.FIRST: 3, rollout.SECOND: 1}
    running(hosting, AllTraffic=2, challenger=5)
    run("endpoint.max_instances=6", "endpoint.instances=2", weight=10)
    assert asked_for(hosting) == {rollout.FIRST: 2, rollout.SECOND: 5}
    running(hosting, AllTraffic=2, challenger=3)
    run("endpoint.max_instances=6")
    assert asked_for(hosting) == {rollout.FIRST: 5}, "the one that stays gets the requests of both"
    running(hosting, AllTraffic=40)
    run("endpoint.max_instances=60", "endpoint.instances=2", "endpoint.rollout=linear", "aws.budget_usd=900")
    steps = hosting.calls.named("UpdateEndpoint")[-1]["DeploymentConfig"]["BlueGreenUpdatePolicy"]
    assert steps["TrafficRoutingConfiguration"]["LinearStepSize"]["Value"] == 10, "AWS takes 10 to 50 % of those"


def test_an_async_endpoint_keeps_its_instances_too(hosting: Hosting) -> None:
    run("endpoint.type=async", "endpoint.max_instances=3")
    for count, wanted in ((3, 3), (0, 1)):
        running(hosting, AllTraffic=count)
        run("endpoint.type=async", "endpoint.max_instances=3")
        assert asked_for(hosting) == {rollout.FIRST: wanted}


SCALES = ("RegisterScalableTarget", "DeregisterScalableTarget", "UpdateEndpoint")


def test_another_type_of_instance_ends_the_scaling_and_begins_it_again(hosting: Hosting) -> None:
    def order(*overrides: str) -> list[str]:
        start = len(hosting.calls)
        run("endpoint.max_instances=4", *overrides)
        return [name for name, _ in hosting.calls[start:] if name in SCALES]

    assert order() == ["RegisterScalableTarget"]
    other = "endpoint.instance_type=ml.c5.xlarge"
    assert order(other) == ["DeregisterScalableTarget", "UpdateEndpoint", "RegisterScalableTarget"]
    assert order(other) == ["UpdateEndpoint", "RegisterScalableTarget"]


def test_an_update_that_fails_does_not_leave_an_endpoint_without_scaling(hosting: Hosting) -> None:
    run("endpoint.max_instances=4")
    hosting.calls.answers["UpdateEndpoint"] = quota("UpdateEndpoint")
    with pytest.raises(UserError, match="quota"):
        run("endpoint.max_instances=4", "endpoint.instance_type=ml.c5.xlarge")

    def scaled() -> list[tuple[int, int]]:
        found = boto3.client("application-autoscaling").describe_scalable_targets(ServiceNamespace="sagemaker")
        return [(target["MinCapacity"], target["MaxCapacity"]) for target in found["ScalableTargets"]]

    assert scaled() == [(1, 4)]
    hosting.calls.answers["UpdateEndpoint"] = hosting.go_back
    with pytest.raises(UserError, match="went back to what it was"):
        run("endpoint.max_instances=4", "endpoint.instance_type=ml.c5.xlarge")
    assert scaled() == [(1, 4)]


@pytest.mark.usefixtures("hosting")
def test_a_second_variant_needs_a_first() -> None:
    for overrides, weight, reason in (([], 10, "no endpoint yet"), ([], 0, "from 1 to 99"), ([], 100, "from 1 to 99"),
                                      (["endpoint.type=serverless"], 10, "only a realtime endpoint")):  # fmt: skip
        with pytest.raises(UserError, match=reason):
            run(*overrides, weight=weight)
    assert not left()


def test_the_end_is_moved_and_can_be_cancelled(hosting: Hosting, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    first = expiry.end(Account(settings()), NAME)
    run("endpoint.ttl_hours=80", "aws.budget_usd=100")
    later = expiry.end(Account(settings()), NAME)
    assert first is not None
    assert later is not None
    assert later > first
    order = [name for name, _ in hosting.calls if name in MAKES]
    assert order.index("UpdateSchedule") < order.index("UpdateEndpoint")
    with pytest.raises(UserError, match=r"endpoint.ttl_hours is 0.1, .*give 0.5 or more, or 0: never"):
        run("endpoint.ttl_hours=0.1")
    for kind, words in (("ml.p3.2xlarge", "too old for torch"), ("ml.c7g.large", "whose processors are ARM")):
        with pytest.raises(UserError, match=words):
            run(f"endpoint.instance_type={kind}")
    run("endpoint.ttl_hours=0")
    assert expiry.end(Account(settings()), NAME) is None
    printed = capsys.readouterr().out
    assert "WARNING: endpoint.ttl_hours is 0: it never deletes itself and costs 12.00 USD a day" in printed
    with pytest.raises(Finished):
        run("endpoint.type=async", "endpoint.capture_percent=5", plan=True, endpoint=f"{NAME}-b")
    assert "note: AWS describes endpoint.capture_percent for real-time endpoints only" in capsys.readouterr().out


def test_an_endpoint_is_asked_as_predict_asks(
    hosting: Hosting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["invoke", "--set", "aws.region=us-east-1"])
    with pytest.raises(UserError, match="IMAGE is missing"):
        invoke.main()
    image = tmp_path / "left.png"
    words = ["invoke", "--image", str(image), "--set", "aws.region=us-east-1"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError, match=f"no endpoint {NAME} in us-east-1; make one with `make deploy`"):
        invoke.main()
    run()
    with pytest.raises(UserError, match="cannot be read"):
        invoke.main()
    image.write_bytes(photo("left"))
    monkeypatch.setattr(sys, "argv", [*words, "--json"])
    capsys.readouterr()
    assert invoke.main() == 0
    assert json.loads(capsys.readouterr().out)["labels"] == ["left"]
    image.write_bytes(b"no image")
    with pytest.raises(UserError, match=f"^{NAME} answered 400: [^{{]*$"):
        invoke.main()
    image.write_bytes(bytes(4 * 2**20 + 1))
    with pytest.raises(UserError, match="answered 4"):
        invoke.main()
    hosting.state = {
        "ProductionVariants": [{"VariantName": "AllTraffic", "CurrentServerlessConfig": {"MemorySizeInMB": 1}}]
    }
    with pytest.raises(UserError, match=r"has 4,194,305 bytes, this endpoint takes 4,194,304; TYPE=async takes more"):
        invoke.main()
    hosting.state = {}
    image.write_bytes(bytes(6 * 2**20 + 1))
    with pytest.raises(UserError, match="this endpoint takes 6,291,456; TYPE=async takes more"):
        invoke.main()
    hosting.state = {"EndpointStatus": "Creating"}
    with pytest.raises(UserError, match="is Creating and answers nothing"):
        invoke.main()


def test_jobs_packages_and_files(hosting: Hosting, archive: Path) -> None:
    boto3.client("s3").upload_file(str(archive), STACK.bucket, "jobs/j/output/model.tar.gz")
    uri = f"s3://{STACK.bucket}/jobs/j/output/model.tar.gz"
    job = {"TrainingJobName": "j", "TrainingJobStatus": "Stopped", "ModelArtifacts": {"S3ModelArtifacts": uri}}
    hosting.calls.answers["DescribeTrainingJob"] = job
    with pytest.raises(UserError, match="j is Stopped"):
        run(job="j")
    job["TrainingJobStatus"] = "Completed"
    run(job="j")
    assert hosting.calls.named("CreateModel")[-1]["PrimaryContainer"]["ModelDataUrl"] == uri
    arn = "arn:aws:sagemaker:us-east-1:123456789012:model-package/group/1"
    package = {"ModelPackageArn": arn, "ModelApprovalStatus": "PendingManualApproval",
               "InferenceSpecification": {"Containers": [{"Image": "i", "ModelDataUrl": uri}]}}  # fmt: skip
    hosting.calls.answers["DescribeModelPackage"] = package
    with pytest.raises(UserError, match="make approve"):
        run(package=arn)
    package["ModelApprovalStatus"] = "Approved"
    run(package=arn)
    made = hosting.calls.named("CreateModel")[-1]
    assert [container["ModelPackageName"] for container in made["Containers"]] == [arn]
    run(artifact=archive)
    assert "/models/" in hosting.calls.named("CreateModel")[-1]["PrimaryContainer"]["ModelDataUrl"]
    with pytest.raises(UserError, match="RUN and JOB name an artifact each"):
        run(run="r", job="j")


@pytest.mark.usefixtures("hosting")
def test_a_damaged_artifact_goes_nowhere(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no artifact at"):
        run(artifact=tmp_path / "none.tar.gz")
    with pytest.raises(UserError, match="no finished run 'other'"):
        run(run="other")
    folder = tmp_path / "damaged"
    shutil.copytree(artifact, folder)
    (folder / "model.safetensors").write_bytes(b"other")
    runs.pack(folder, tmp_path / "damaged.tar.gz")
    with pytest.raises(UserError, match=r"model.safetensors in .* does not match its checksum"):
        run(artifact=tmp_path / "damaged.tar.gz")
    with tarfile.open(tmp_path / "strange.tar.gz", "w:gz"):
        pass
    with pytest.raises(UserError, match="is no artifact of this project"):
        run(artifact=tmp_path / "strange.tar.gz")
    shutil.rmtree(runs.ARTIFACTS)
    with pytest.raises(UserError, match="no finished run yet"):
        run()
    assert not left()


def test_money(hosting: Hosting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(UserError, match="YES=1"):
        run(yes=False)
    with pytest.raises(UserError, match=r"4\.00 USD is over aws.budget_usd \(3 USD\)"):
        run("aws.budget_usd=3", yes=False)
    assert "create the realtime endpoint" in capsys.readouterr().out, "the plan comes before the refusal"
    monkeypatch.setattr(prices, "hourly", lambda *_: None)
    with pytest.raises(UserError, match="a price that is not known counts as over"):
        run(yes=False)
    assert not left()
    assert not written(hosting.calls), "nothing was even uploaded"


def quota(operation: str) -> ClientError:
    return refused("ResourceLimitExceeded", "The limit is 0.", operation)


@pytest.mark.parametrize("operation", ["CreateSchedule", "CreateModel", "CreateEndpointConfig", "CreateEndpoint"])
def test_what_fails_leaves_nothing(hosting: Hosting, operation: str) -> None:
    hosting.calls.answers[operation] = quota(operation)
    with pytest.raises(UserError, match="a quota of the account is reached"):
        run()
    assert not left()


def test_an_interruption_leaves_nothing_either(hosting: Hosting) -> None:
    hosting.calls.answers["CreateEndpointConfig"] = lambda _: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not left()


def test_a_failed_update_leaves_the_endpoint_as_it_was(hosting: Hosting) -> None:
    run()
    before, end = left()[:-1], expiry.end(Account(settings()), NAME)
    hosting.calls.answers["UpdateEndpoint"] = quota("UpdateEndpoint")
    with pytest.raises(UserError, match="quota"):
        run("endpoint.ttl_hours=5")
    assert left()[:-1] == before
    assert expiry.end(Account(settings()), NAME) == end


def test_an_update_that_got_through_is_not_taken_back(hosting: Hosting, capsys: pytest.CaptureFixture[str]) -> None:
    run()

    def lost(asked: dict[str, Any]) -> None:
        hosting.state = {"PendingDeploymentSummary": {"EndpointConfigName": asked["EndpointConfigName"]}}
        raise refused("InternalFailure", "lost", "UpdateEndpoint")

    hosting.calls.answers["UpdateEndpoint"] = lost
    with pytest.raises(UserError, match="lost"):
        run()
    assert len(boto3.client("sagemaker").list_endpoint_configs()["EndpointConfigs"]) == 2
    assert f"the endpoint {NAME} goes on" in capsys.readouterr().out


def test_an_image_that_is_not_in_the_repository(hosting: Hosting, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = refused("ImageNotFoundException", "none", "DescribeImages")
    hosting.calls.answers["DescribeImages"] = gone

    def no_engine() -> None:
        raise engine.EngineError("no Docker engine answers")

    monkeypatch.setattr(engine, "check", no_engine)
    with pytest.raises(UserError, match="make image-push"):
        run()
    assert not left()


def test_names(hosting: Hosting) -> None:
    for name in ("other", f"{NAME}_x", f"{NAME}-" + "x" * 42):
        with pytest.raises(UserError, match="the endpoint's name is"):
            run(endpoint=name)
    run()
    endpoint = sagemaker_backends["123456789012"]["us-east-1"].endpoints[NAME]
    endpoint.tags = [{"Key": "project", "Value": "another"}]
    with pytest.raises(UserError, match="is taken by an endpoint of something else"):
        run()
    endpoint.tags = Account(settings()).tags()
    for status, step in (("Failed", f"make destroy ENDPOINT={NAME}"), ("Updating", "wait until")):
        hosting.state = {"EndpointStatus": status}
        with pytest.raises(UserError, match=f"is {status}.*{step}"):
            run()


def test_an_endpoint_that_fails_or_goes_back(hosting: Hosting) -> None:
    states = iter(["Creating", "Creating", "Failed"])
    describe = hosting.describe

    def slow(asked: dict[str, Any]) -> dict[str, Any]:
        facts = describe(asked)
        return facts | {"EndpointStatus": next(states, "Failed"), "FailureReason": "no ping"}

    hosting.calls.answers["DescribeEndpoint"] = slow
    with pytest.raises(UserError, match=f"{NAME} is Failed: no ping; `make destroy ENDPOINT={NAME}` removes it"):
        run()
    hosting.calls.answers["DescribeEndpoint"] = describe
    hosting.calls.answers["UpdateEndpoint"] = hosting.go_back
    with pytest.raises(UserError, match="went back to what it was: alarm cv-5xx"):
        run()


def test_golden_samples_that_disagree(hosting: Hosting) -> None:
    hosting.apart = 0.021
    with pytest.raises(UserError, match=rf"golden sample 0 .* 0\.021 apart.*make destroy ENDPOINT={NAME}"):
        run()
    hosting.apart = 0.019
    run()
    old = hosting.calls.named("UpdateEndpoint")[-1]["EndpointConfigName"]
    hosting.apart = 0.5
    with pytest.raises(UserError, match=f"go back with `aws sagemaker update-endpoint .* {old} --region us-east-1`"):
        run()
    hosting.calls.answers["InvokeEndpoint"] = quota("InvokeEndpoint")
    with pytest.raises(UserError, match="golden sample 0 got no answer"):
        run()


def test_a_rollback_puts_the_endpoint_back(hosting: Hosting) -> None:
    run()
    good = hosting.calls.named("CreateEndpointConfig")[-1]["EndpointConfigName"]
    hosting.apart = 0.5
    with pytest.raises(UserError, match=rf"golden sample 0 .* apart \(allowed: 0.02\); {NAME} is back on what it was$"):
        run(rollback=True)
    assert hosting.calls.named("UpdateEndpoint")[-1] == {"EndpointName": NAME, "EndpointConfigName": good}
    asked = len(hosting.calls.named("UpdateEndpoint"))

    def update(wanted: dict[str, Any]) -> dict[str, Any]:
        hosting.update(wanted)
        hosting.state = {"EndpointConfigName": good}
        return {"EndpointArn": "arn"}

    hosting.calls.answers["UpdateEndpoint"] = update
    with pytest.raises(UserError, match="went back to what it was"):  # AWS did it: nothing more to do
        run(rollback=True)
    assert len(hosting.calls.named("UpdateEndpoint")) == asked + 1
    hosting.state, hosting.calls.answers["UpdateEndpoint"] = {}, hosting.update
    with pytest.raises(UserError, match="go back with `aws sagemaker update-endpoint"):
        run()


def test_ctrl_c_while_waiting_leaves_the_endpoint(hosting: Hosting, monkeypatch: pytest.MonkeyPatch) -> None:
    hosting.state = {"EndpointStatus": "Creating"}

    def interrupted(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupted)
    with pytest.raises(
        UserError, match=rf"goes on and bills, and deletes itself on .*`make destroy ENDPOINT={NAME}`"
    ) as e:
        run()
    assert e.value.code == 130
    assert len(boto3.client("sagemaker").list_endpoints()["Endpoints"]) == 1
    assert expiry.end(Account(settings()), NAME)


def test_the_tolerance_is_the_models_own() -> None:
    assert deploy.TOLERANCE == inference.GOLDEN_TOLERANCE


def test_an_answer_that_the_sdk_does_not_take_is_one_sentence(hosting: Hosting) -> None:
    """SDK V3 checks answers too, after the endpoint is there."""
    run()
    hosting.state = {"ProductionVariants": [{"VariantName": "AllTraffic", "DesiredWeight": "much"}]}
    with pytest.raises(UserError, match=r"updating the endpoint .* the SageMaker SDK does not take .*'much'"):
        run()
