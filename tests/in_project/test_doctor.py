"""`doctor`: every finding comes with its fix, and each check can be wrong."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from pipelines import project
from pipelines import terminal as console
from pipelines.cloud import doctor, limits, permissions, stack
from pipelines.cloud import images as cloud_images
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
    account = Account(SETTINGS, STACK)
    tags = [cloud_images.uri(account, target).rpartition(":")[2] for target in images.TARGETS]
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


@pytest.mark.parametrize(("store", "warned"), [("io.containerd.snapshotter.v1", True), ("overlay2", False)])
def test_a_docker_that_pushes_what_sagemaker_refuses_is_named_before_it_does(
    monkeypatch: pytest.MonkeyPatch, store: str, warned: bool
) -> None:
    monkeypatch.setattr(engine, "check", lambda: None)
    said = type("Done", (), {"stdout": f" driver-type: {store}", "returncode": 0, "stderr": ""})()
    monkeypatch.setattr(engine, "docker", lambda *_: said)
    found = [line for line in doctor.here() if "in a form that SageMaker refuses" in line.text]
    assert [(line.level, "make image-push" in line.fix) for line in found] == [("warn", True)] * warned


@pytest.mark.parametrize(
    "kind", ["application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json"]
)
def test_an_image_that_is_refused_is_named_with_the_command_that_removes_it(healthy: Recorder, kind: str) -> None:
    tag = cloud_images.uri(Account(SETTINGS, STACK), "serving").rpartition(":")[2]
    healthy.answers["DescribeImages"] = {"imageDetails": [{"imageTags": [tag], "imageManifestMediaType": kind}]}
    (found,) = [line for line in bad() if "that SageMaker refuses" in line.text]
    assert (found.level, tag in found.text) == ("fail", True)
    assert f"batch-delete-image --repository-name {NAME} --region us-east-1 --image-ids imageTag={tag}" in found.fix


@pytest.mark.parametrize(
    ("version", "system", "gpus", "warned"),
    [("2.14.1", "Linux", 0, True), ("2.14.1+cpu", "Linux", 0, False), ("2.14.1", "Linux", 1, False),
     ("2.14.1", "Darwin", 0, False)],
)  # fmt: skip
def test_an_index_of_builds_that_did_not_answer_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, system: str, gpus: int, warned: bool
) -> None:
    log = tmp_path / "image-build.log"
    monkeypatch.setattr(images, "BUILD_LOG", log)
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr(engine, "gpus", lambda: gpus)
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    assert [line.level for line in doctor.builds()] == ["warn"] * warned
    assert all("make setup" in line.fix for line in doctor.builds())
    log.write_text("torch's build cu128 cannot be had here, so it is PyPI's\n")
    assert [line.text for line in doctor.builds()][warned:] == [
        "of the last image: torch's build cu128 cannot be had here, so it is PyPI's"
    ]

    def gone(_: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr("importlib.metadata.version", gone)  # who only submits jobs
    log.unlink()
    assert list(doctor.builds()) == []


CPU = ["compute.instance_type=ml.m5.large"]
MADE: list[tuple[list[str], str, str]] = [  # settings, and the line that says what they come to
    ([], "ok", "AWS does not say which driver ml.g5.xlarge has in training; torch's build cu128 runs .* driver 525 on"),
    (["images.torch=cu130"], "ok", "torch's build cu130 runs from NVIDIA's driver 580 on"),
    ([*CPU, "endpoint.instance_type=ml.g5.xlarge"], "ok", "for the endpoint has NVIDIA's driver 580; .*525"),
    ([*CPU, "endpoint.instance_type=ml.g5.xlarge", "images.packages=[torch]"], "ok", "torch's build is your own"),
    ([*CPU, "endpoint.instance_type=ml.p3.2xlarge"], "fail", "whose GPUs or driver .470. are too old for torch"),
    (["compute.instance_type=ml.p2.xlarge"], "fail", "too old for torch"),
    (["compute.instance_type=ml.p3.2xlarge"], "fail", "for whose V100 torch's build cu128 has no code.*cu126"),
    (["compute.instance_type=ml.p3.2xlarge", "images.torch=cu126"], "ok", "torch's build cu126 runs .* 525 on"),
    (["images.torch=cpu"], "fail", "ml.g5.xlarge and images.torch is cpu, which uses no NVIDIA GPU"),
    ([*CPU, "endpoint.instance_type=ml.c7g.large"], "fail", "whose processors are ARM"),
    ([*CPU, "endpoint.instance_type=ml.m6gd.large"], "fail", "whose processors are ARM"),
    ([*CPU, "endpoint.instance_type=ml.p6e-gb200.36xlarge"], "fail", "whose processors are ARM"),
    ([*CPU, "endpoint.ttl_hours=0.1"], "fail", "endpoint.ttl_hours is 0.1, .*give 0.5 or more"),
    ([*CPU, "endpoint.type=serverless", "endpoint.capture_percent=5"], "fail", "have no endpoint.capture_percent"),
    ([*CPU, "endpoint.type=async", "endpoint.capture_percent=5"], "warn", "AWS describes endpoint.capture_percent for"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "level", "words"), MADE)
def test_what_the_settings_come_to_is_said_before_anything_is_made(
    overrides: list[str], level: str, words: str
) -> None:
    lines = list(doctor.chosen(load(["aws.region=us-east-1", *overrides], {})))
    assert [line.level for line in lines if re.search(words, line.text)] == [level]
    assert {line.level for line in lines} <= {"ok", level}
    assert all(line.fix for line in lines if line.level != "ok")


@pytest.mark.parametrize(
    "kind",
    ["ml.g4dn.xlarge", "ml.g6e.xlarge", "ml.g7e.2xlarge", "ml.p4d.24xlarge", "ml.p5en.48xlarge", "ml.p6-b200.48xlarge",
     "ml.m5.large", "ml.c6i.large", "ml.inf2.xlarge"],
)  # fmt: skip
def test_machines_that_serve_are_not_refused(kind: str) -> None:
    settings = load([f"endpoint.instance_type={kind}", *CPU], {})
    assert list(limits.endpoint(settings)) == []
    lines = list(doctor.chosen(settings))
    assert len(lines) == kind.startswith(("ml.g", "ml.p"))


@pytest.mark.parametrize(
    ("pinned", "build", "warned"),
    [("2.14.1", "cu128", True), ("2.11.0", "cu128", False), ("2.15.0", "cu126", True), ("2.14.1", "cu126", False),
     ("2.15.0", "cu130", False), ("3.0.0", "cu128", True)],
)  # fmt: skip
def test_a_lock_whose_torch_has_no_such_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pinned: str, build: str, warned: bool
) -> None:
    (tmp_path / "uv.lock").write_text(f'[[package]]\nname = "torch"\nversion = "{pinned}"\n')
    monkeypatch.setattr(images, "LOCK", tmp_path / "uv.lock")
    lines = [line for line in doctor.chosen(load([f"images.torch={build}"], {})) if "uv.lock" in line.text]
    assert [(line.level, f"torch {pinned[:-2]}," in line.text) for line in lines] == [("warn", True)] * warned
    assert not [line for line in doctor.chosen(load([f"images.torch={build}", *CPU], {})) if "uv.lock" in line.text]


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_engine() -> None:
        raise engine.EngineError("start it")

    monkeypatch.setattr(engine, "check", no_engine)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1e9})())
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr(doctor, "builds", lambda: iter(()))
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
