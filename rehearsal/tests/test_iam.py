"""Who may do what, through the account's address: people, roles, what they hand on, and what a bucket forbids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from rehearsal import modules, server  # noqa: F401  the first takes over operations
from rehearsal.operations import OWNER, PERSON, Account
from rehearsal.policies import UnknownError, allowed, holds

TRUST = {"Statement": [{"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"},
                        "Action": "sts:AssumeRole"}]}  # fmt: skip
As = Callable[..., Any]


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    """Without containers: here nothing is carried out that needs one."""
    made = Account(tmp_path_factory.mktemp("account"))
    server.start(made)
    made.client("iam").create_role(RoleName="job", AssumeRolePolicyDocument=json.dumps(TRUST))
    made.client("iam").create_role(RoleName="other", AssumeRolePolicyDocument=json.dumps({"Statement": []}))
    made.client("s3").create_bucket(Bucket="mine")
    yield made
    made.close()


@pytest.fixture
def client(account: Account) -> As:
    """Clients with a key of the account's."""

    def made(service: str, key: str = PERSON) -> Any:
        return boto3.session.Session().client(
            service, region_name=account.region, endpoint_url=account.front, aws_access_key_id=key,
            aws_secret_access_key="x", config=Config(retries={"total_max_attempts": 1}),
        )  # fmt: skip

    return made


def statement(*actions: str, resource: str = "*", **more: Any) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": list(actions), "Resource": resource} | more


@pytest.fixture
def may(account: Account, client: As) -> Iterator[Callable[..., None]]:
    """Gives the person exactly some rights, until the test ends."""
    client("sts").get_caller_identity()  # makes the user

    def give(*statements: dict[str, Any]) -> None:
        policy = json.dumps({"Version": "2012-10-17", "Statement": list(statements)})
        client("iam", OWNER).put_user_policy(UserName="person", PolicyName="rights", PolicyDocument=policy)

    yield give
    account.client("iam").delete_user_policy(UserName="person", PolicyName="rights")
    account.things["iam"].clear()


def test_without_policies_a_person_may_do_all_and_a_stranger_nothing(client: As) -> None:
    assert client("sagemaker").list_models()["Models"] == []
    with pytest.raises(ClientError, match="UnrecognizedClientException"):
        client("sagemaker", "AKIASOMEBODYELSES000").list_models()


def test_a_person_may_do_what_the_policies_say(client: As, may: Callable[..., None]) -> None:
    may(statement("sagemaker:DescribeModel", resource="arn:aws:sagemaker:us-east-1:123456789012:model/cats-*"),
        statement("sagemaker:ListModels"))  # fmt: skip
    assert client("sagemaker").list_models()["Models"] == []
    with pytest.raises(ClientError, match="Could not find model"):
        client("sagemaker").describe_model(ModelName="cats-1")
    for call in (lambda: client("sagemaker").describe_model(ModelName="dogs-1"),
                 lambda: client("sagemaker").list_endpoints(), lambda: client("scheduler").get_schedule(Name="x"),
                 lambda: client("logs").create_log_group(logGroupName="x"),
                 lambda: client("ecr").describe_images(repositoryName="xx")):  # fmt: skip
        with pytest.raises(ClientError) as error:
            call()
        assert error.value.response["Error"]["Code"] == "AccessDeniedException"
        assert "is not authorized to perform: " in str(error.value)
    for call in (lambda: client("s3").put_object(Bucket="mine", Key="k", Body=b""),
                 lambda: client("cloudwatch").delete_alarms(AlarmNames=["a"]),
                 lambda: client("sns").publish(TopicArn="arn:aws:sns:us-east-1:1:t", Message="m")):  # fmt: skip
        with pytest.raises(ClientError, match="AccessDenied"):
            call()
    assert client("sts").get_caller_identity()["Account"] == "123456789012"


def test_tags_of_requests_and_of_things_count(client: As, may: Callable[..., None]) -> None:
    mine = {"StringEquals": {"aws:RequestTag/project": "cats"}}
    known = {"StringEqualsIfExists": {"aws:ResourceTag/project": "cats"}}
    may(statement("sagemaker:CreateModel", "sagemaker:AddTags", Condition=mine), statement("iam:PassRole"),
        statement("sagemaker:DeleteModel", Condition=known))  # fmt: skip
    model = {"ExecutionRoleArn": "arn:aws:iam::123456789012:role/job", "PrimaryContainer": {"Image": "i"}}
    tags = [{"Key": "project", "Value": "cats"}]
    client("sagemaker").create_model(ModelName="m", **model, Tags=tags)
    with pytest.raises(ClientError, match="not authorized to perform: sagemaker:CreateModel"):
        client("sagemaker").create_model(ModelName="n", **model)
    client("sagemaker", OWNER).create_model(ModelName="n", **model, Tags=[{"Key": "project", "Value": "dogs"}])
    with pytest.raises(ClientError, match="not authorized to perform: sagemaker:DeleteModel"):
        client("sagemaker").delete_model(ModelName="n")
    client("sagemaker").delete_model(ModelName="m")
    client("sagemaker", OWNER).delete_model(ModelName="n")


def test_a_role_is_handed_on_and_trusts(client: As, may: Callable[..., None]) -> None:
    passed = {"StringEquals": {"iam:PassedToService": "sagemaker.amazonaws.com"}}
    may(statement("sagemaker:CreateModel"))
    model = {"ModelName": "m", "PrimaryContainer": {"Image": "i"}}
    with pytest.raises(ClientError, match=r"not authorized to perform: iam:PassRole on resource: .*role/job"):
        client("sagemaker").create_model(**model, ExecutionRoleArn="arn:aws:iam::123456789012:role/job")
    may(statement("sagemaker:CreateModel"), statement("iam:PassRole", Condition=passed))
    for name in ("other", "nobody"):
        with pytest.raises(ClientError, match=f"Could not assume role arn:aws:iam::123456789012:role/{name}"):
            client("sagemaker").create_model(**model, ExecutionRoleArn=f"arn:aws:iam::123456789012:role/{name}")


def test_a_role_does_what_its_policies_say(account: Account, client: As) -> None:
    arn = "arn:aws:iam::123456789012:role/job"
    s3 = account.client("s3", arn)
    with pytest.raises(ClientError, match="AccessDenied"):
        s3.list_objects_v2(Bucket="mine")
    policy = {"Version": "2012-10-17", "Statement": [statement("s3:ListBucket", resource="arn:aws:s3:::mine")]}
    client("iam", OWNER).put_role_policy(RoleName="job", PolicyName="p", PolicyDocument=json.dumps(policy))
    assert s3.list_objects_v2(Bucket="mine")["KeyCount"] == 0
    with pytest.raises(ClientError, match="403"):
        s3.head_object(Bucket="mine", Key="k")


def test_a_bucket_forbids_also_who_may_do_all(client: As, may: Callable[..., None]) -> None:
    once = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:PutObject",
        "Resource": "arn:aws:s3:::mine/models/*",
        "Condition": {"Null": {"s3:if-none-match": "true"}, "Bool": {"s3:ObjectCreationOperation": "true"}},
    }
    tls = {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": "arn:aws:s3:::mine/*",
           "Condition": {"Bool": {"aws:SecureTransport": "false"}}}  # fmt: skip
    client("s3", OWNER).put_bucket_policy(
        Bucket="mine", Policy=json.dumps({"Version": "2012-10-17", "Statement": [once, tls]})
    )
    for key in ("models/a", "models/b"):  # the second time with nothing but the rights on S3
        client("s3").put_object(Bucket="mine", Key="data/a", Body=b"x")
        with pytest.raises(ClientError, match="AccessDenied"):
            client("s3").put_object(Bucket="mine", Key=key, Body=b"x")
        client("s3").put_object(Bucket="mine", Key=key, Body=b"x", IfNoneMatch="*")
        may(statement("s3:*"))


def test_a_stack_gives_a_bucket_its_policy(client: As) -> None:
    def template(prefix: str) -> str:
        deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject",
                "Resource": {"Fn::Sub": f"${{B.Arn}}/{prefix}/*"}}  # fmt: skip
        policy = {"Bucket": {"Ref": "B"}, "PolicyDocument": {"Version": "2012-10-17", "Statement": [deny]}}
        bucket = {"Type": "AWS::S3::Bucket", "Properties": {"BucketName": "stacks"}}
        return json.dumps({"Resources": {"B": bucket, "P": {"Type": "AWS::S3::BucketPolicy", "Properties": policy}}})

    cloud = client("cloudformation")
    cloud.create_stack(StackName="s", TemplateBody=template("a"))
    cloud.update_stack(StackName="s", TemplateBody=template("b"))
    client("s3").put_object(Bucket="stacks", Key="a/x", Body=b"")
    with pytest.raises(ClientError, match="AccessDenied"):
        client("s3").put_object(Bucket="stacks", Key="b/x", Body=b"")


@pytest.mark.parametrize(
    "wrong",
    [
        {"Condition": {"NumericLessThan": {"a": "1"}}},
        {"Condition": {"ForSomeValue:StringEquals": {"a": "1"}}},
        {"Resource": "arn:aws:s3:::b/${aws:username}"},
        {"Else": "x"},
        {"Effect": "Perhaps"},
    ],
)
def test_what_the_evaluator_does_not_know_is_a_fault(wrong: dict[str, Any]) -> None:
    with pytest.raises(UnknownError):
        allowed([{"Statement": [statement("*") | wrong]}], "s3:GetObject", "arn:aws:s3:::b/k", {})


def test_the_rules_of_iam() -> None:
    def answer(*statements: dict[str, Any]) -> bool:
        return allowed([{"Statement": list(statements)}], "s3:GetObject", "arn:aws:s3:::b/k", {})

    allow = statement("s3:get*", resource="arn:aws:s3:::b/?")
    assert answer(allow)
    assert not answer()
    assert not answer(allow, {"Effect": "Deny", "NotAction": "s3:PutObject", "Resource": "*"})
    assert answer(allow, {"Effect": "Deny", "Action": "*", "NotResource": "arn:aws:s3:::b/*"})
    assert not answer({**allow, "Resource": "arn:aws:s3:::b"})
    several = {"a": ["1", "2"]}
    cases: list[tuple[str, Any, dict[str, Any], bool]] = [
        ("StringEquals", "1", {"A": "1"}, True), ("StringEquals", "1", {}, False), ("StringNotEquals", "1", {}, True),
        ("StringEqualsIfExists", "1", {}, True), ("StringEqualsIfExists", "1", {"a": "2"}, False),
        ("Null", "true", {}, True), ("Null", True, {"a": "1"}, False), ("Null", "false", {"a": "1"}, True),
        ("ForAllValues:StringEquals", ["1", "2"], several, True), ("ForAllValues:StringEquals", ["1"], several, False),
        ("ForAllValues:StringEquals", ["1"], {}, True), ("ForAnyValue:StringEquals", ["1"], several, True),
        ("ForAnyValue:StringEquals", ["1"], {}, False), ("StringLike", "a*c", {"a": "a/b:c"}, True),
        ("Bool", "false", {"a": "False"}, True), ("Bool", "false", {}, False),
        ("StringNotEquals", "1", {"a": "1"}, False), ("StringEqualsIgnoreCase", "Cat", {"a": "cAT"}, True),
        ("StringNotEqualsIgnoreCase", "Cat", {"a": "cAT"}, False), ("StringNotLike", "a*", {"a": "b"}, True),
        ("ArnNotLike", ["a*", "b"], {"a": "b"}, False), ("StringLikeIfExists", "a*", {}, True),
    ]  # fmt: skip
    for operator, wanted, context, right in cases:
        assert holds({operator: {"a": wanted}}, context) == right, (operator, wanted, context)
    studio = {**allow, "Resource": "arn:aws:s3:::b/${sagemaker:DomainId}"}  # which no request has here
    assert not answer(studio)
    assert answer(allow, studio)
    with pytest.raises(UnknownError, match="several values"):
        holds({"StringEquals": {"a": "1"}}, several)
