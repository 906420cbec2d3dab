"""The pipeline definition's language, and what executions make of it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from botocore.exceptions import ClientError

from conftest import ROLE, STUB, until
from rehearsal.operations import CONTROLS, Account
from rehearsal.pipelines import duration, needs
from test_jobs import MACHINES, content

Clients = Callable[[str], Any]
SLEEPS = "import time; time.sleep(600)"
DONE = ("Succeeded", "Failed", "Stopped")


def processing(name: str, code: str, **more: Any) -> dict[str, Any]:
    """A step that runs some Python."""
    place = {"S3Uri": f"s3://the-bucket/{name}", "LocalPath": "/opt/ml/processing/out", "S3UploadMode": "EndOfJob"}
    output = {"OutputName": "out", "S3Output": place}
    return {"Name": name, "Type": "Processing", "Arguments": {
        "AppSpecification": {"ImageUri": STUB, "ContainerEntrypoint": ["python3", "-c", code]}, "RoleArn": ROLE,
        "ProcessingResources": {"ClusterConfig": MACHINES}, "ProcessingOutputConfig": {"Outputs": [output]},
    }, **more}  # fmt: skip


def condition(name: str, left: Any, then: list[Any], otherwise: list[Any], kind: str = "GreaterThanOrEqualTo") -> Any:
    """A step that compares something with 0.9."""
    test = {"Type": kind, "LeftValue": left, "RightValue": 0.9}
    return {
        "Name": name,
        "Type": "Condition",
        "Arguments": {"Conditions": [test], "IfSteps": then, "ElseSteps": otherwise},
    }


def failing(name: str, message: Any) -> dict[str, Any]:
    """A step that fails."""
    return {"Name": name, "Type": "Fail", "Arguments": {"ErrorMessage": message}}


def reasons(facts: dict[str, Any]) -> list[str]:
    """Why steps failed."""
    return [step["FailureReason"] for step in facts["steps"].values() if "FailureReason" in step]


def executed(client: Clients, steps: list[Any], parameters: list[Any] | None = None, **given: str) -> dict[str, Any]:
    """The execution of a pipeline, and its steps by name."""
    sagemaker = client("sagemaker")
    document = {"Version": "2020-12-01", "Parameters": parameters or [], "Steps": steps}
    try:
        sagemaker.create_pipeline(PipelineName="p", PipelineDefinition=json.dumps(document), RoleArn=ROLE,
                                  ClientRequestToken=secrets.token_hex(16))  # fmt: skip
    except ClientError:
        sagemaker.update_pipeline(PipelineName="p", PipelineDefinition=json.dumps(document))
    arn = sagemaker.start_pipeline_execution(
        PipelineName="p", PipelineParameters=[{"Name": key, "Value": value} for key, value in given.items()]
    )["PipelineExecutionArn"]  # fmt: skip

    def look() -> Any:
        found = sagemaker.describe_pipeline_execution(PipelineExecutionArn=arn)
        return found if found["PipelineExecutionStatus"] in DONE else None

    facts: dict[str, Any] = until(look)
    listed = sagemaker.list_pipeline_execution_steps(PipelineExecutionArn=arn)["PipelineExecutionSteps"]
    return facts | {"steps": {step["StepName"]: step for step in listed}}


def test_a_condition_chooses_by_a_property_file_and_what_fails_says_why(account: Account, client: Clients) -> None:
    code = 'open("/opt/ml/processing/out/m.json", "w").write(\'{"metrics": {"accuracy": {"value": 0.8}}}\')'
    files = [{"PropertyFileName": "Metrics", "OutputName": "out", "FilePath": "m.json"}]
    accuracy = {"Std:JsonGet": {"PropertyFile": {"Get": "Steps.Measure.PropertyFiles.Metrics"},
                                "Path": "metrics.accuracy.value"}}  # fmt: skip
    told = {"Std:Join": {"On": " ", "Values": ["only", accuracy, "of", {"Get": "Parameters.Wanted"}, "in", {
        "Get": "Steps.Measure.ProcessingOutputConfig.Outputs['out'].S3Output.S3Uri"}]}}  # fmt: skip
    steps = [condition("Gate", accuracy, [processing("Never", "")], [failing("Bad", told)]),
             processing("Measure", code, PropertyFiles=files)]  # fmt: skip
    facts = executed(client, steps, [{"Name": "Wanted", "Type": "Float", "DefaultValue": 0.9}])
    assert facts["PipelineExecutionStatus"] == "Failed"
    assert {name: step["StepStatus"] for name, step in facts["steps"].items()} == {
        "Measure": "Succeeded", "Gate": "Succeeded", "Bad": "Failed"
    }  # fmt: skip
    assert facts["steps"]["Bad"]["FailureReason"] == "only 0.8 of 0.9 in s3://the-bucket/Measure"
    assert facts["steps"]["Gate"]["Metadata"] == {"Condition": {"Outcome": "False"}}


def test_steps_follow_those_that_they_need_and_results_are_taken_again(account: Account, client: Clients) -> None:
    cached = {"CacheConfig": {"Enabled": True, "ExpireAfter": "P30D"}}
    steps = [processing("Second", 'open("/opt/ml/processing/out/x", "w").write("2")', DependsOn=["First"]),
             processing("First", 'open("/opt/ml/processing/out/x", "w").write("1")', **cached)]  # fmt: skip
    facts = executed(client, steps)
    assert facts["PipelineExecutionStatus"] == "Succeeded", reasons(facts)
    assert facts["steps"]["First"]["EndTime"] <= facts["steps"]["Second"]["StartTime"]
    assert content(client, "Second/x") == b"2"
    again = executed(client, steps)["steps"]
    assert again["First"]["CacheHitResult"] == {"SourcePipelineExecutionArn": facts["PipelineExecutionArn"]}
    assert again["First"]["Metadata"] == facts["steps"]["First"]["Metadata"]
    assert "CacheHitResult" not in again["Second"]


@pytest.mark.parametrize(
    ("policies", "status"), [([], "Succeeded"), ([{"ExceptionType": ["Step.THROTTLING"], "MaxAttempts": 1}], "Failed")]
)
def test_a_throttled_step_is_tried_again_by_itself_or_as_its_policy_says(
    account: Account, client: Clients, policies: list[Any], status: str
) -> None:
    CONTROLS["faults"](account, {"faults": ["throttle=2"]})  # of the role; the owner of the account is left alone
    facts = executed(client, [processing("Pack", "", RetryPolicies=policies)])
    assert facts["PipelineExecutionStatus"] == status, reasons(facts)
    assert facts["steps"]["Pack"]["AttemptCount"] == (3 if status == "Succeeded" else 2)


def test_a_package_is_registered_and_a_failed_job_fails_the_pipeline(account: Account, client: Clients) -> None:
    archive = {"Std:Join": {"On": "/", "Values": ["s3://the-bucket", "m"]}}
    register = {"Name": "Register", "Type": "RegisterModel", "Arguments": {
        "ModelPackageGroupName": "group", "ModelApprovalStatus": "PendingManualApproval", "InferenceSpecification": {
            "Containers": [{"Image": STUB, "ModelDataUrl": archive}],
            "SupportedContentTypes": ["image/png"], "SupportedResponseMIMETypes": ["application/json"]}}}  # fmt: skip
    facts = executed(client, [register])
    assert facts["PipelineExecutionStatus"] == "Succeeded", reasons(facts)
    arn = facts["steps"]["Register"]["Metadata"]["RegisterModel"]["Arn"]
    package = client("sagemaker").describe_model_package(ModelPackageName=arn)
    assert package["InferenceSpecification"]["Containers"][0]["ModelDataUrl"] == "s3://the-bucket/m"
    steps = executed(client, [processing("Broken", "raise SystemExit(5)"),
                              processing("Later", "pass", DependsOn=["Broken"])])["steps"]  # fmt: skip
    assert "exit code: 5" in steps["Broken"]["FailureReason"]
    assert "Later" not in steps


def test_an_execution_is_stopped_with_its_jobs(account: Account, client: Clients) -> None:
    sagemaker = client("sagemaker")
    document = {
        "Version": "2020-12-01",
        "Parameters": [],
        "Steps": [
            processing(
                "Long", "import signal, time; signal.signal(15, lambda *_: exit()); print('up'); time.sleep(600)"
            )
        ],
    }
    sagemaker.create_pipeline(PipelineName="p", PipelineDefinition=json.dumps(document), RoleArn=ROLE,
                              ClientRequestToken="0" * 32)  # fmt: skip
    same = {"PipelineName": "p", "ClientRequestToken": "1" * 32}
    arn = sagemaker.start_pipeline_execution(**same)["PipelineExecutionArn"]
    assert sagemaker.start_pipeline_execution(**same)["PipelineExecutionArn"] == arn

    def up() -> bool:
        """Whether it can hear a signal: what is not caught means nothing to a container's first process."""
        logs, group = client("logs"), "/aws/sagemaker/ProcessingJobs"
        if not logs.describe_log_groups(logGroupNamePrefix=group)["logGroups"]:
            return False
        names = [stream["logStreamName"] for stream in logs.describe_log_streams(logGroupName=group)["logStreams"]]
        return any(logs.get_log_events(logGroupName=group, logStreamName=name)["events"] for name in names)

    until(up)
    sagemaker.stop_pipeline_execution(PipelineExecutionArn=arn, ClientRequestToken="2" * 32)

    def status() -> str:
        return str(sagemaker.describe_pipeline_execution(PipelineExecutionArn=arn)["PipelineExecutionStatus"])

    until(lambda: status() == "Stopped")
    assert [job["ProcessingJobStatus"] for job in sagemaker.list_processing_jobs()["ProcessingJobSummaries"]] == [
        "Stopped"
    ]
    listed = sagemaker.list_pipeline_executions(PipelineName="p")["PipelineExecutionSummaries"]
    assert [execution["PipelineExecutionStatus"] for execution in listed] == ["Stopped"]


def test_an_unknown_parameter_is_refused(client: Clients) -> None:
    with pytest.raises(ClientError, match="the pipeline parameter Other"):
        executed(client, [failing("Bad", "x")], Other="1")


def test_what_a_step_waits_for() -> None:
    refers = {"Name": "a", "DependsOn": ["b"], "Arguments": {"x": [{"Get": "Steps.c.Y"}, {"Get": "Parameters.d"}]}}
    assert needs(refers) == {"b", "c"}
    assert needs(condition("a", {"Get": "Steps.b.X"}, [refers], [])) == {"b"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("P30D", timedelta(days=30)), ("PT1H30M", timedelta(hours=1.5)), ("30d", timedelta(days=30)), ("", timedelta())],
)
def test_durations(text: str, wanted: timedelta) -> None:
    assert duration(text) == wanted
