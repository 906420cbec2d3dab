"""Faults that are asked for, and time that comes when it is told to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError

from rehearsal import modules, server  # noqa: F401  the first takes over operations
from rehearsal.clock import matches
from rehearsal.faults import accident, seconds
from rehearsal.operations import CONTROLS, PERSON, Account

ROLE = "arn:aws:iam::123456789012:role/end"
MODEL = {"ExecutionRoleArn": ROLE, "PrimaryContainer": {"Image": "i"}}
TRUST = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "sts:AssumeRole",
         "Principal": {"Service": ["scheduler.amazonaws.com", "sagemaker.amazonaws.com"]}}]}  # fmt: skip
Client = Callable[..., Any]


@pytest.fixture
def account(tmp_path: Any) -> Iterator[Account]:
    """Without containers: here nothing is carried out that needs one."""
    made = Account(tmp_path)
    server.start(made)
    made.client("iam").create_role(RoleName="end", AssumeRolePolicyDocument=json.dumps(TRUST))
    yield made
    made.close()


@pytest.fixture
def client(account: Account) -> Client:
    """A person's clients."""

    def made(service: str, attempts: int = 1) -> Any:
        return boto3.session.Session().client(
            service, region_name=account.region, endpoint_url=account.front, aws_access_key_id=PERSON,
            aws_secret_access_key="x", config=Config(retries={"total_max_attempts": attempts, "mode": "standard"}),
        )  # fmt: skip

    return made


def test_throttled_requests_come_through_at_last(account: Account, client: Client) -> None:
    CONTROLS["faults"](account, {"faults": ["throttle=2"]})
    with pytest.raises(ClientError, match="ThrottlingException"):
        client("sagemaker").list_models()
    assert client("sagemaker", attempts=5).list_models()["Models"] == []
    assert [event["what"] for event in account.events if event["kind"] == "fault"] == ["throttle"] * 2


def test_a_lost_answer_is_of_a_request_that_was_carried_out(account: Account, client: Client) -> None:
    CONTROLS["faults"](account, {"faults": ["lost-answer=CreateModel"]})
    with pytest.raises(ConnectionClosedError):
        client("sagemaker").create_model(ModelName="m", **MODEL)
    assert [*account.things["Model"]] == ["m"]
    client("sagemaker").create_model(ModelName="n", **MODEL)
    account.faults[:] = ["lost-answer=CreateModel"]
    CONTROLS["faults"](account, {"faults": account.faults})
    with pytest.raises(ClientError, match="Cannot create already existing model"):  # botocore's second attempt
        client("sagemaker", attempts=5).create_model(ModelName="o", **MODEL)


def test_a_repetition_that_has_a_token_gets_the_first_answer(account: Account, client: Client) -> None:
    CONTROLS["faults"](account, {"faults": ["lost-answer=CreateSchedule"]})
    schedule(lambda service: client(service, attempts=3), "deleteModel", ModelName="m")
    assert len(client("scheduler").list_schedules()["Schedules"]) == 1
    with pytest.raises(ClientError, match="ConflictException"):
        schedule(client, "deleteModel", ModelName="m")


def test_no_attempt_gets_an_answer(account: Account, client: Client) -> None:
    CONTROLS["faults"](account, {"faults": ["never-an-answer=CreateModel"]})
    with pytest.raises(ConnectionClosedError):  # and no refusal of the second one
        client("sagemaker", attempts=3).create_model(ModelName="m", **MODEL)
    assert [*account.things["Model"]] == ["m"]


def test_an_accident_happens_once_and_to_its_kind(account: Account) -> None:
    account.faults[:] = ["spot-after=0s", "container-dies=0.1s"]
    CONTROLS["faults"](account, {"faults": [*account.faults]})
    played = list[str]()
    for kind in ("processing-job", "training-job", "training-job"):
        accident(account, kind, "j", lambda what, kind=kind: played.append(f"{kind} {what}"))
    from conftest import until

    until(lambda: len(played) == 2)
    assert sorted(played) == ["processing-job die", "training-job reclaim"]
    assert (seconds("20s"), seconds("2m"), seconds("1.5")) == (20, 120, 1.5)
    with pytest.raises(ValueError, match="write it as 20s or 2m"):
        seconds("soon")


def schedule(client: Client, operation: str, name: str = "end", **more: str) -> None:
    client("scheduler").create_schedule(
        Name=name, ScheduleExpression="at(2030-01-01T00:00:00)", FlexibleTimeWindow={"Mode": "OFF"},
        ActionAfterCompletion="DELETE",
        Target={
            "Arn": f"arn:aws:scheduler:::aws-sdk:sagemaker:{operation}", "RoleArn": ROLE, "Input": json.dumps(more),
        },
    )  # fmt: skip


def test_a_schedule_fires_with_the_rights_of_its_role(account: Account, client: Client) -> None:
    client("sagemaker").create_model(ModelName="m", **MODEL)
    schedule(client, "deleteModel", ModelName="m")
    (fired,) = CONTROLS["fire"](account, {"schedule": "end"})["fired"]
    assert "not authorized to perform: sagemaker:DeleteModel" in fired["error"]
    policy = {"Version": "2012-10-17",
              "Statement": [{"Effect": "Allow", "Action": "sagemaker:DeleteModel", "Resource": "*"}]}  # fmt: skip
    client("iam").put_role_policy(RoleName="end", PolicyName="p", PolicyDocument=json.dumps(policy))
    schedule(client, "deleteModel", "end-2", ModelName="m")
    (fired,) = CONTROLS["fire"](account, {"prefix": "end-"})["fired"]
    assert fired == {"schedule": "end-2", "operation": "sagemaker:deleteModel", "answer": {}}
    assert client("sagemaker").list_models()["Models"] == []
    assert client("scheduler").list_schedules()["Schedules"] == []  # they delete themselves


def test_the_end_of_an_endpoint_ends_its_scaling_by_the_rights_of_its_role(account: Account, client: Client) -> None:
    arn = account.arn("endpoint", "e")
    account.things["Endpoint"] = {"e": {"EndpointName": "e", "EndpointArn": arn, "EndpointStatus": "InService"}}
    scaling = account.client("application-autoscaling")
    scaling.register_scalable_target(
        ServiceNamespace="sagemaker", ResourceId="endpoint/e/variant/a", MinCapacity=0, MaxCapacity=1,
        ScalableDimension="sagemaker:variant:DesiredInstanceCount",
    )  # fmt: skip
    rights = ["sagemaker:DeleteEndpoint", "application-autoscaling:DeregisterScalableTarget"]
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": rights, "Resource": "*"}]}
    client("iam").put_role_policy(RoleName="end", PolicyName="p", PolicyDocument=json.dumps(policy))
    schedule(client, "deleteEndpoint", EndpointName="e")
    (fired,) = CONTROLS["fire"](account, {"schedule": "end"})["fired"]
    assert "error" not in fired
    assert scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"] == []


def test_a_rule_tells_its_topic_of_a_job_that_ended(account: Account, client: Client) -> None:
    topic = client("sns").create_topic(Name="t")["TopicArn"]
    pattern = {"source": ["aws.sagemaker"], "detail-type": ["SageMaker Training Job State Change"],
               "detail": {"TrainingJobName": [{"prefix": "cats-"}], "TrainingJobStatus": ["Completed"]}}  # fmt: skip
    client("events").put_rule(Name="r", EventPattern=json.dumps(pattern))
    told = {"InputPathsMap": {"job": "$.detail.TrainingJobName"}, "InputTemplate": '"<job> is done"'}
    client("events").put_targets(Rule="r", Targets=[{"Id": "t", "Arn": topic, "InputTransformer": told}])
    for name, kind in (("cats-1", "completed"), ("cats-2", "failed"), ("dogs-1", "completed")):
        account.note(kind, f"training-job/{name}")
    expected = [{"topic": topic, "message": "cats-1 is done"}]
    assert CONTROLS["notices"](account, {})["notices"] == expected
    assert CONTROLS["notices"](account, {})["notices"] == expected


@pytest.mark.parametrize(
    ("pattern", "event", "right"),
    [
        ({"a": ["x", "y"]}, {"a": "y", "b": 1}, True), ({"a": ["x"]}, {}, False),
        ({"a": [{"prefix": "x"}]}, {"a": "xy"}, True), ({"a": [{"suffix": "x"}]}, {"a": "xy"}, False),
        ({"a": [{"exists": False}]}, {}, True), ({"a": [{"anything-but": ["x"]}]}, {"a": "x"}, False),
        ({"a": {"b": ["x"]}}, {"a": {"b": "x"}}, True), (None, {}, False),
    ],
)  # fmt: skip
def test_patterns_of_events(pattern: Any, event: Any, right: bool) -> None:
    assert matches(pattern, event) == right
