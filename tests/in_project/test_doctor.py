"""`doctor`: every finding comes with its fix, and each check can be wrong."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from botocore.exceptions import ClientError

from pipelines import project
from pipelines import terminal as console
from pipelines.cloud import doctor, permissions, stack
from pipelines.cloud.account import Account, Stack
from pipelines.cloud.doctor import Line
from pipelines.config import Settings, load
from pipelines.local import engine, images
from tests.cloud import Recorder, aws, check_golden, described, refused

__all__ = ["aws"]  # a fixture
NAME, ACCOUNT = project.name(), "123456789012"
SETTINGS = load(["aws.region=us-east-1"], {})
STACK = Stack(
    bucket=f"{NAME}-{ACCOUNT}-us-east-1",
    role=f"arn:aws:iam::{ACCOUNT}:role/{NAME}-execution",
    repository=f"{ACCOUNT}.dkr.ecr.us-east-1.amazonaws.com/{NAME}",
    topic="t",
    scheduler_role=f"arn:aws:iam::{ACCOUNT}:role/{NAME}-scheduler",
    pipeline_role=f"arn:aws:iam::{ACCOUNT}:role/{NAME}-pipeline",
    serving_role=f"arn:aws:iam::{ACCOUNT}:role/{NAME}-serving",
)


def refusal(code: str) -> ClientError:
    metadata = {"HTTPHeaders": {"date": format_datetime(datetime.now(UTC))}}
    return ClientError({"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": metadata}, "x")


def caller(arn: str = f"arn:aws:sts::{ACCOUNT}:assumed-role/dev/me", seconds: float = 0) -> dict[str, Any]:
    said = format_datetime(datetime.now(UTC) - timedelta(seconds=seconds))
    return {"Arn": arn, "Account": ACCOUNT, "ResponseMetadata": {"HTTPHeaders": {"date": said}}}


def simulated(*denied: str) -> Any:
    def answer(parameters: dict[str, Any]) -> dict[str, Any]:
        names = parameters["ActionNames"]
        page = [names[:1], names[1:]]["Marker" in parameters]
        results = [
            {"EvalActionName": name, "EvalDecision": "implicitDeny" if name in denied else "allowed"} for name in page
        ]
        more = {"IsTruncated": True, "Marker": "2"} if "Marker" not in parameters else {"IsTruncated": False}
        return {"EvaluationResults": results, **more}

    return answer


def quota(name: str, value: float, code: str = "L-1") -> dict[str, Any]:
    return {"QuotaName": name, "Value": value, "QuotaCode": code}


@pytest.fixture
def healthy(aws: Recorder) -> Recorder:
    """An account where nothing is wrong."""
    found = stack.parameters(Account(SETTINGS), caller()["Arn"], {})
    parameters = [{"ParameterKey": key, "ParameterValue": value} for key, value in found.items()]
    trust = {"Statement": [{"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}}]}
    tags = [images.image_name(SETTINGS, target).partition(":")[2] for target in ("training", "serving")]
    usage = ("ml.g5.xlarge for spot training job usage", "ml.m5.large for endpoint usage")
    aws.answers |= {
        "GetCallerIdentity": caller(),
        "DescribeStacks": described(STACK, parameters),
        "GetTemplate": {"TemplateBody": json.loads(stack.template(SETTINGS, ACCOUNT))},
        "GetRole": lambda p: {
            "Role": {"Arn": f"arn:aws:iam::{ACCOUNT}:role/path/{p['RoleName']}", "AssumeRolePolicyDocument": trust}
        },
        "SimulatePrincipalPolicy": simulated(),
        "ListServiceQuotas": lambda p: (
            {"Quotas": [quota(usage[1], 2)]}
            if p.get("NextToken")
            else {"Quotas": [quota(usage[0], 1)], "NextToken": "2"}
        ),
        "DescribeImages": lambda p: (
            {"imageDetails": [{"imageTags": tags[1:]}]}
            if p.get("nextToken")
            else {"imageDetails": [{"imageTags": tags[:1]}, {}], "nextToken": "2"}
        ),
    }
    return aws


def bad(settings: Settings = SETTINGS) -> list[Line]:
    return [line for line in doctor.there(Account(settings)) if line.level != "ok"]


def test_nothing_is_wrong(healthy: Recorder) -> None:
    lines = list(doctor.there(Account(SETTINGS)))
    assert [line for line in lines if line.level != "ok"] == []
    assert len(lines) == 9
    calls: dict[str, dict[str, Any]] = {}
    for operation, parameters in healthy:
        calls.setdefault(operation, parameters)
    check_golden("doctor", list(calls.items()))
    principals = {call["PolicySourceArn"] for call in healthy.named("SimulatePrincipalPolicy")}
    assert principals == {STACK.role, f"arn:aws:iam::{ACCOUNT}:role/path/dev"}


TRUST = {"Role": {"Arn": STACK.role, "AssumeRolePolicyDocument": {"Statement": [
    {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}}]}}}  # fmt: skip
WRONG: list[tuple[str, Any, str, str, str]] = [
    ("GetCallerIdentity", lambda _: caller(seconds=-600), "fail", "clock is -", "NTP"),
    ("GetCallerIdentity", lambda _: caller(f"arn:aws:iam::{ACCOUNT}:root"), "warn", "account itself", "role"),
    ("DescribeStacks", described(STACK), "warn", "differs in Project", "bootstrap"),
    ("GetTemplate", {"TemplateBody": "{}"}, "warn", "differs in what infrastructure/ says", "make bootstrap"),
    ("GetTemplate", refusal("AccessDenied"), "warn", "stack: not checked", "may not do that"),
    ("GetRole", TRUST, "fail", "does not trust SageMaker", "make bootstrap"),
    ("SimulatePrincipalPolicy", simulated("s3:ListBucket"), "fail", "role may not s3:ListBucket", "bootstrap"),
    ("SimulatePrincipalPolicy", simulated("iam:PassRole"), "fail", "credentials may not iam:PassRole", "VerbsPolicy"),
    ("SimulatePrincipalPolicy", refusal("AccessDenied"), "warn", "own permissions: not checked", "may not do that"),
    ("ListServiceQuotas", {"Quotas": []}, "warn", "no quota 'ml.m5.large for endpoint usage'", "instance type"),
    ("ListServiceQuotas", {"Quotas": [quota("ml.g5.xlarge for spot training job usage", 0, "L-7")]}, "fail",
     "ml.g5.xlarge for spot training job usage: 0 allowed, 1 wanted", "--quota-code L-7 --desired-value 1"),
    ("DescribeImages", {"imageDetails": []}, "warn", "training image in ECR is missing", "make image-push"),
    ("DescribeImages", {"imageDetails": [{"imageTags": ["serving-0"]}]}, "warn", "serving image in ECR is stale", ""),
]  # fmt: skip


@pytest.mark.parametrize(("operation", "answer", "level", "words", "fix"), WRONG)
def test_what_is_wrong_comes_with_its_fix(
    healthy: Recorder, operation: str, answer: Any, level: str, words: str, fix: str
) -> None:
    healthy.answers[operation] = answer
    found = [line for line in bad() if words in line.text]
    assert [(line.level, fix in line.fix) for line in found] == [(level, True)]


def test_quotas_are_those_of_the_settings(healthy: Recorder) -> None:
    settings = load(
        ["aws.region=us-east-1", "compute.spot=false", "compute.keep_alive_minutes=5", "endpoint.type=serverless"], {}
    )
    healthy.answers["ListServiceQuotas"] = {"Quotas": []}
    names = [line.text for line in doctor.quotas(Account(settings))]
    assert [name.split("'")[1].partition(" for ")[2] for name in names] == [
        "training job usage", "training warm pool usage"
    ]  # fmt: skip


def test_a_region_that_other_programs_take(healthy: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert healthy is not None
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    assert [line.text for line in bad()] == ["the shell's region is eu-west-1, aws.region is us-east-1"]


def test_no_stack(healthy: Recorder) -> None:
    healthy.answers["DescribeStacks"] = refused("ValidationError", "Stack with id x does not exist")
    assert [(line.level, line.fix) for line in bad()] == [("fail", "`make bootstrap`")]
    assert not healthy.named("SimulatePrincipalPolicy")


def test_without_credentials_only_this_machine_is_checked(
    aws: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setattr("sys.argv", ["doctor"])
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    assert "no AWS credentials: nothing in AWS was checked" in printed
    assert "aws configure" in printed
    assert not aws


def test_expired_credentials_fail(
    healthy: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy.answers["GetCallerIdentity"] = refusal("ExpiredToken")
    monkeypatch.setattr("sys.argv", ["doctor"])
    with pytest.raises(SystemExit, match="1"):
        console.run_verb(doctor.main)
    assert "the AWS credentials have expired" in capsys.readouterr().out


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_engine() -> None:
        raise engine.EngineError("start it")

    monkeypatch.setattr(engine, "check", no_engine)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1e9})())
    monkeypatch.setattr("shutil.which", lambda _: None)
    lines = list(doctor.here())
    assert [line.level for line in lines] == ["ok", "warn", "warn", "fail"]
    assert all(line.fix for line in lines if line.level != "ok")


def test_every_statement_of_the_template_is_asked_with_real_names() -> None:
    needs = [*permissions.needs(Account(SETTINGS, STACK), ACCOUNT, "ExecutionRole")]
    needs += permissions.needs(Account(SETTINGS, STACK), ACCOUNT, "VerbsPolicy")
    assert len(needs) >= 20
    assert not [need.resource for need in needs if "$" in need.resource or ":x/" in need.resource]
    assert f"arn:aws:sagemaker:us-east-1:{ACCOUNT}:endpoint-config/{NAME}" in {need.resource for need in needs}
    asked = {action: need for need in needs for action in need.actions}
    assert asked["sagemaker:CreateTrainingJob"].resource.endswith(f":training-job/{NAME}")
    assert asked["sagemaker:InvokeEndpointAsync"].resource.endswith(f":endpoint/{NAME}")
    assert asked["cloudwatch:PutMetricData"].context[0]["ContextKeyValues"] == ["/aws/sagemaker/x"]
    passed = [need for need in needs if "iam:PassRole" in need.actions]
    assert [(need.resource, need.context[0]["ContextKeyValues"]) for need in passed] == [
        (STACK.role, ["sagemaker.amazonaws.com"]),
        (STACK.scheduler_role, ["scheduler.amazonaws.com"]),
    ]
