"""Requests as AWS's protocols write them, and answers as its clients read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError

from conftest import ROLE
from rehearsal import operations, wire
from rehearsal.operations import Account, Call, refuse

Clients = Callable[[str], Any]


@pytest.fixture
def calls(account: Account, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What comes to the account from now on."""
    seen = list[Call]()
    monkeypatch.setattr(operations, "BEFORE", [*operations.BEFORE, lambda _, call: seen.append(call)])
    return seen


def test_what_a_request_says_is_understood_in_every_protocol(calls: list[Call], client: Clients) -> None:
    s3 = client("s3")
    s3.put_object(Bucket="the-bucket", Key="a b/c+d.txt", Body=b"text")
    assert s3.get_object(Bucket="the-bucket", Key="a b/c+d.txt")["Body"].read() == b"text"
    s3.copy_object(Bucket="the-bucket", Key="other", CopySource="the-bucket/a b/c+d.txt")
    assert {item["Key"] for item in s3.list_objects_v2(Bucket="the-bucket", Prefix="")["Contents"]} == {
        "a b/c+d.txt",
        "other",
    }
    s3.list_object_versions(Bucket="the-bucket")
    client("cloudwatch").put_metric_data(Namespace="mine", MetricData=[{"MetricName": "m", "Value": 1.0}])
    client("iam").list_role_policies(RoleName="job")
    client("sagemaker").list_training_jobs(NameContains="none")
    client("ecr").create_repository(repositoryName="images")
    seen = [(call.service, call.operation, call.request) for call in calls]
    assert seen[0][:2] == ("s3", "PutObject")
    assert {key: seen[0][2][key] for key in ("Bucket", "Key")} == {"Bucket": "the-bucket", "Key": "a b/c+d.txt"}
    assert [row[1] for row in seen[1:5]] == ["GetObject", "CopyObject", "ListObjectsV2", "ListObjectVersions"]
    assert seen[5] == ("cloudwatch", "PutMetricData",
                       {"Namespace": "mine", "MetricData": [{"MetricName": "m", "Value": 1.0}]})  # fmt: skip
    assert seen[6] == ("iam", "ListRolePolicies", {"RoleName": "job"})
    assert seen[7] == ("sagemaker", "ListTrainingJobs", {"NameContains": "none"})
    assert seen[8][:2] == ("ecr", "CreateRepository")
    assert {call.principal for call in calls} == {"arn:aws:iam::123456789012:root"}


@pytest.mark.parametrize(
    ("service", "operation", "request_"),
    [("s3", "list_objects_v2", {"Bucket": "the-bucket"}), ("iam", "list_roles", {}), ("cloudwatch", "list_metrics", {}),
     ("sagemaker", "list_models", {}), ("sagemaker-runtime", "invoke_endpoint", {"EndpointName": "e", "Body": b"x"})],
)  # fmt: skip
def test_a_refusal_reads_as_aws_says_it(
    service: str, operation: str, request_: dict[str, Any], account: Account, client: Clients,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def no(_: Account, __: Call) -> None:
        raise refuse("AccessDenied", "you <may> not & will not", 403)

    monkeypatch.setattr(operations, "BEFORE", [no])
    with pytest.raises(ClientError) as error:
        getattr(client(service), operation)(**request_)
    assert error.value.response["Error"]["Code"] == "AccessDenied"
    assert error.value.response["Error"]["Message"] == "you <may> not & will not"
    assert error.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_who_asks_and_what_a_role_may_do(account: Account, client: Clients) -> None:
    assert client("sts").get_caller_identity()["Arn"] == "arn:aws:iam::123456789012:root"
    asked = {"PolicySourceArn": ROLE, "ActionNames": ["s3:GetObject"], "ResourceArns": ["arn:aws:s3:::the-bucket/x"]}
    results = client("iam").simulate_principal_policy(**asked)["EvaluationResults"]
    assert [result["EvalDecision"] for result in results] == ["allowed"]
    account.client("iam").create_role(RoleName="none", AssumeRolePolicyDocument="{}")
    results = client("iam").simulate_principal_policy(**asked | {"PolicySourceArn": ROLE.replace("job", "none")})
    assert [result["EvalDecision"] for result in results["EvaluationResults"]] == ["implicitDeny"]


def test_what_moto_lacks_is_named(client: Clients) -> None:
    with pytest.raises(ClientError, match="plays no ListServiceQuotas of service-quotas"):
        client("service-quotas").list_service_quotas(ServiceCode="sagemaker")


def test_only_what_an_answer_has_is_answered() -> None:
    facts = {"TrainingJobName": "a", "_inner": 1, "Tags": [], "SecondaryStatus": None}
    assert wire.only(("sagemaker", "DescribeTrainingJob"), facts) == {"TrainingJobName": "a"}
    assert wire.filled({"a": None, "b": {}, "c": [{"d": None, "e": 0}]}) == {"c": [{"e": 0}]}
