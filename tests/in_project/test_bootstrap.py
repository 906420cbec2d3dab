"""The stack: linted, its policies walked; `bootstrap` and `destroy ALL=1` in moto, and what can go wrong there."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from pipelines import ROOT, config
from pipelines.cloud import bootstrap, destroy, stack
from pipelines.cloud.account import Account
from pipelines.terminal import UserError
from tests.cloud import GOLDEN, Recorder, aws, check_golden, refused
from tests.test_costs import THEIRS, make_endpoint

__all__ = ["aws"]  # fixture
pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse AWS:UserWarning")  # kinds that moto does not make
ACCOUNT = "123456789012"
FULL = ["aws.github=octo/cats@release", "aws.email=me@example.com", "aws.kms_key=alias/cats",
        "aws.subnets=[subnet-1]", "aws.security_groups=[sg-1]", "compute.remote_debug=true",
        "images.serving=999999999999.dkr.ecr.us-east-1.amazonaws.com/other:1"]  # fmt: skip
NAME, BUCKET = "image-classifier", f"image-classifier-{ACCOUNT}-us-east-1"
ANYWHERE = {  # actions that AWS cannot scope to a resource, and why the verbs or the jobs need them
    "ecr:GetAuthorizationToken": "login to the registry",
    "cloudwatch:PutMetricData": "scoped by the condition on the namespace",
    **dict.fromkeys(
        ("ec2:CreateNetworkInterface", "ec2:CreateNetworkInterfacePermission", "ec2:DeleteNetworkInterface",
         "ec2:DeleteNetworkInterfacePermission", "ec2:DescribeDhcpOptions", "ec2:DescribeNetworkInterfaces",
         "ec2:DescribeSecurityGroups", "ec2:DescribeSubnets", "ec2:DescribeVpcs"),
        "SageMaker makes network interfaces in the VPC; only there",
    ),
    **dict.fromkeys(
        ("ssmmessages:CreateControlChannel", "ssmmessages:CreateDataChannel", "ssmmessages:OpenControlChannel",
         "ssmmessages:OpenDataChannel"),
        "a shell in a running container; only when asked for",
    ),
    **dict.fromkeys(
        ("sagemaker:ListEndpointConfigs", "sagemaker:ListEndpoints", "sagemaker:ListModels",
         "sagemaker:ListModelPackages", "sagemaker:ListPipelines",
         "sagemaker:ListHyperParameterTuningJobs", "sagemaker:ListTransformJobs",
         "sagemaker:ListProcessingJobs", "sagemaker:ListTrainingJobs", "scheduler:ListSchedules",
         "application-autoscaling:DescribeScalableTargets", "cloudwatch:DescribeAlarms", "cloudwatch:GetMetricData",
         "cloudwatch:ListDashboards", "pricing:GetProducts", "servicequotas:ListServiceQuotas"),
        "lists, metrics, prices and quotas; they read only",
    ),
}  # fmt: skip
OTHER_NAMES = {  # of a permission, where it is not that of the call
    "HeadObject": "GetObject", "ListObjectsV2": "ListBucket", "ListObjects": "ListBucket", "HeadBucket": "ListBucket",
    "CreateMultipartUpload": "PutObject", "UploadPart": "PutObject", "CompleteMultipartUpload": "PutObject",
    "DeleteObjects": "DeleteObject", "InvokeEndpointWithResponseStream": "InvokeEndpoint",
}  # fmt: skip
NO_PERMISSION = {"GetCallerIdentity"}
ROOMS_OF_FULL = {"tuning", "batch", "monitoring", "tracking", "shift_traffic"}  # rooms of `pipelines`, and a module
VERBS_OF_FULL = ("tune", "batch", "monitor", "shift")  # what the names of their golden files begin with


@pytest.fixture(autouse=True)
def _no_pauses_and_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moto carries out a change set, but forgets to work out the stack's outputs."""
    from moto.cloudformation.models import ChangeSet
    from moto.cloudformation.parsing import OutputMap

    apply = ChangeSet.apply

    def with_outputs(self: Any) -> None:
        apply(self)
        self.stack.output_map = OutputMap(self.stack.resource_map, self.template_dict, self.stack_id)

    monkeypatch.setattr(ChangeSet, "apply", with_outputs)
    monkeypatch.setattr(stack, "PAUSE", 0)
    logging.getLogger("moto").setLevel(logging.ERROR)


@pytest.fixture
def cloud_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a project of the scope `cloud`, which has no automation.yaml."""
    monkeypatch.setattr(stack, "AUTOMATION", tmp_path / "automation.yaml")


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of stack.yaml and automation.yaml, for tests that change them."""
    files = tuple(Path(shutil.copy(file, tmp_path)) for file in (stack.TEMPLATE, stack.AUTOMATION))
    monkeypatch.setattr(stack, "TEMPLATE", files[0])
    monkeypatch.setattr(stack, "AUTOMATION", files[1])
    return files[0], files[1]


def make(*overrides: str, yes: bool = True) -> None:
    bootstrap.bootstrap(Account(config.load(overrides)), yes)


def remove(everything: bool = False, confirmed: str = "", yes: bool = True) -> None:
    destroy.destroy_stack(Account(config.load()), everything, confirmed, yes)


def statements(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every policy statement of the template with its place, also those under a condition."""
    if isinstance(node, dict):
        if "Effect" in node:
            yield path, node
        for key, value in node.items():
            yield from statements(value, f"{path}/{key}")
    elif isinstance(node, list):
        for value in node:
            yield from statements(value, path)


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def problems(template: dict[str, Any]) -> list[str]:
    """What a reviewer would refuse in the template's policies."""
    found = []
    for path, statement in statements(template["Resources"]):
        if statement["Effect"] == "Deny":
            continue
        for action in listed(statement["Action"]):
            if "*" in action:
                found.append(f"{path}: action {action}")
            if "*" in listed(statement.get("Resource")) and action not in ANYWHERE:
                found.append(f"{path}: {action} on every resource")
        if "NotAction" in statement or "NotResource" in statement or "NotPrincipal" in statement:
            found.append(f"{path}: everything but")
        condition = statement.get("Condition", {})
        either = condition["Fn::If"][1:] if "Fn::If" in condition else [condition]
        conditions = {key for option in either for test in option.values() for key in test}
        if "cloudwatch:PutMetricData" in listed(statement["Action"]) and "cloudwatch:namespace" not in conditions:
            found.append(f"{path}: metrics without a namespace")
        if "iam:PassRole" in listed(statement["Action"]) and "iam:PassedToService" not in conditions:
            found.append(f"{path}: passes a role to any service")
        if "Principal" in statement:
            pins = {"aws:SourceAccount", "aws:SourceArn", "token.actions.githubusercontent.com:sub"}
            if statement["Principal"] == "*" or not conditions & pins:
                found.append(f"{path}: principal is not pinned")
        if "Principal" not in statement and "Resource" not in statement:
            found.append(f"{path}: no resource")
    return found


def test_policies_allow_no_more_than_needed() -> None:
    assert problems(stack.joined()) == []
    text = "".join(file.read_text(encoding="utf-8") for file in (stack.TEMPLATE, stack.AUTOMATION))
    assert len(list(statements(stack.joined()))) == 90 + ("Sid: Tracking" in text)
    assert "FullAccess" not in text
    assert not re.search(r"arn:aws[:-]|amazonaws\.com/|\d{12}", text), "a partition or an account is written out"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"s3:GetBucketLocation", "s3:ListBucket"', '"s3:*"', "action s3:"),
        ('"ecr:GetAuthorizationToken"\n', '"ecr:PutImage"\n', "ecr:PutImage on every resource"),
        ('"sagemaker:ListEndpoints"', '"sagemaker:DeleteModel"', "sagemaker:DeleteModel on every resource"),
        ('"cloudwatch:namespace": [', '"aws:RequestedRegion": [', "metrics without a namespace"),
        ('"aws:SourceAccount"', '"aws:CurrentTime"', "principal is not pinned"),
        ("aws:SourceArn", "aws:CurrentTime", "principal is not pinned"),
        ('"token.actions.githubusercontent.com:sub"', '"other"', "principal is not pinned"),
        ('"iam:PassedToService": sagemaker', '"other": sagemaker', "passes a role to any service"),
        ('Resource: {Ref: KmsKey}', 'Resource: "*"', "kms:Decrypt on every resource"),
    ],
)  # fmt: skip
def test_the_policy_test_can_fail(copies: tuple[Path, Path], old: str, new: str, words: str) -> None:
    assert sum(replace(file, old, new) for file in copies)
    assert words in "\n".join(problems(stack.joined()))


def replace(file: Path, old: str, new: str) -> int:
    """How often it was there."""
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(old, new), encoding="utf-8")
    return text.count(old)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("  HasGitHub:", "  HasKey:", "Conditions: HasKey is in infrastructure/stack.yaml and in automation.yaml"),
        ("\n  TriggerRole:\n", "\n  Topic:\n", "Resources: Topic is in infrastructure/stack.yaml and in"),
        ("    NotificationConfiguration:", "    OwnershipControls:", "Bucket.Properties: OwnershipControls is in"),
        ("  Bucket.Properties:", "  Bukket.Properties:", "adds to Bukket.Properties, which is not in stack.yaml"),
        (".delete-endpoints.", ".delete-everything.", ".delete-everything.PolicyDocument.Statement, which is not in"),
        ("Statement.0.Condition", "Statement.9.Condition", "which is not in stack.yaml; mend the path under Additions"),
        ("  KeyPolicy.Properties.Roles:", "  KeyPolicy.Type:", "cannot add to KeyPolicy.Type: the two are not"),
        ("  KeyPolicy.Properties.Roles:", "  KeyPolicy.Properties:", "add to KeyPolicy.Properties: the two are not"),
    ],
)  # fmt: skip
def test_what_automation_adds_must_fit(copies: tuple[Path, Path], old: str, new: str, words: str) -> None:
    """Nothing of the reviewed stack.yaml is replaced, and nothing lands elsewhere."""
    assert replace(copies[1], old, new) == 1
    with pytest.raises(UserError, match=re.escape(words)):
        stack.joined()


@pytest.mark.usefixtures("cloud_only")
def test_a_stack_without_automation(aws: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    """Scope `cloud`: no word of schedules, GitHub and delivery, and no permission for the verbs of `full`."""
    make()
    assert Account(config.load()).stack().bucket == BUCKET
    assert "GitHub" not in capsys.readouterr().out
    writing = ("CreateChangeSet", "ExecuteChangeSet")
    sent = [(name, {key: value for key, value in call.items() if key != "TemplateBody"}) for name, call in aws]
    check_golden("bootstrap_cloud", [call for call in sent if call[0] in writing])
    body = aws.named("CreateChangeSet")[0]["TemplateBody"]
    words = r"GitHub|Trigger|states:|codebuild|Connection|Watch|Approv|EventBridgeE|mlflow"
    of_full = re.findall(rf"{words}|\w*Tuning|\w*TransformJob|\w*Dashboards", body)
    assert sorted(of_full) == ["ListDashboards", "ListHyperParameterTuning", "ListTransformJob"]  # they read only
    template = json.loads(body)
    assert {"Parameters", "Conditions", "Resources", "Outputs"} < set(template)
    values = {item["ParameterKey"] for item in aws.named("CreateChangeSet")[0]["Parameters"]}
    assert values == set(template["Parameters"])


@pytest.mark.parametrize(
    "setting",
    ["aws.github=octo/cats", "aws.github=auto", "pipeline.schedule=rate(7 days)", "pipeline.watch=incoming",
     "pipeline.deploy_on_approval=true"],
)  # fmt: skip
@pytest.mark.usefixtures("cloud_only")
def test_a_setting_that_only_automation_can_serve_is_refused(aws: Recorder, setting: str) -> None:
    with pytest.raises(UserError, match=r"has no infrastructure/automation.yaml.* SCOPE=full` brings it") as error:
        make(setting)
    assert setting.partition("=")[0] in str(error.value)
    assert not aws.named("CreateChangeSet")


def test_growing_updates_the_stack(aws: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`make bootstrap` of `cloud`, then of `full`."""
    with monkeypatch.context() as patch:
        patch.setattr(stack, "AUTOMATION", tmp_path / "automation.yaml")
        make()
    make()
    first, second = aws.named("CreateChangeSet")
    assert (first["ChangeSetType"], second["ChangeSetType"]) == ("CREATE", "UPDATE")
    added = json.loads(second["TemplateBody"])["Resources"].keys() - json.loads(first["TemplateBody"])["Resources"]
    assert added == {"GitHubProvider", "GitHubRole", "GitHubDeployRole", "TriggerRole", "Schedule", "Uploaded",
                     "Watcher", "Approved", "DeployRole", "Deployed"}  # fmt: skip


def test_data_and_images_are_private_encrypted_and_outlive_the_stack() -> None:
    resources = stack.joined()["Resources"]
    for name in ("Bucket", "ImageRepository"):
        assert resources[name]["DeletionPolicy"] == resources[name]["UpdateReplacePolicy"] == "Retain"
    bucket = resources["Bucket"]["Properties"]
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    assert len(bucket["PublicAccessBlockConfiguration"]) == 4
    rules = {rule["Id"]: rule for rule in bucket["LifecycleConfiguration"]["Rules"]}
    expiring = {rule.get("Prefix"): rule.get("ExpirationInDays") for rule in rules.values()}
    assert expiring == {"checkpoints/": 30, "capture/": 30, None: None}  # nothing else ever expires
    assert bucket["VersioningConfiguration"] == {"Status": "Enabled"}
    old = {name: rule.get("NoncurrentVersionExpiration", {}).get("NoncurrentDays") for name, rule in rules.items()}
    assert old == {"checkpoints": 1, "capture": 1, "old-versions": 30, "interrupted-uploads": None}
    assert rules["old-versions"]["ExpiredObjectDeleteMarker"] is True
    deny = resources["BucketPolicy"]["Properties"]["PolicyDocument"]["Statement"][0]
    assert (deny["Effect"], deny["Condition"]) == ("Deny", {"Bool": {"aws:SecureTransport": "false"}})
    assert len(deny["Resource"]) == 2
    images = json.loads(resources["ImageRepository"]["Properties"]["LifecyclePolicy"]["LifecyclePolicyText"])["rules"]
    assert [(rule["selection"]["tagStatus"], rule["selection"].get("tagPrefixList")) for rule in images] == [
        ("untagged", None), ("tagged", ["training-"])
    ], "what serves never expires"  # fmt: skip
    assert resources["ImageRepository"]["Properties"]["ImageTagMutability"] == "IMMUTABLE"


def golden_files(scope: str) -> list[Path]:
    """Those of the verbs of a scope, but for this topic's: who makes the stack is its account's administrator.

    Pages of recipes name what they need beyond that.
    """
    others = ("bootstrap", "recipe", *(VERBS_OF_FULL if scope == "cloud" else ()))
    return [file for file in GOLDEN.glob("*.json") if not file.name.startswith(others)]


def allowed() -> set[str]:
    """The actions of the policy for who runs the verbs, without their services."""
    both = [stack.joined()["Resources"][name] for name in ("VerbsPolicy", "AroundPolicy")]
    return {action.split(":")[1] for _, statement in statements(both) for action in listed(statement["Action"])
            if not action.startswith("sagemaker-mlflow:")}  # fmt: skip


@pytest.fixture(params=["full", "cloud"])
def scope(request: pytest.FixtureRequest) -> str:
    """With automation.yaml and without."""
    if request.param == "cloud":
        request.getfixturevalue("cloud_only")
    return str(request.param)


def test_the_verbs_policy_allows_every_call_that_the_verbs_make(scope: str) -> None:
    """All calls in golden files."""
    calls = {call for file in golden_files(scope) for call, *_ in json.loads(file.read_text(encoding="utf-8"))}
    if scope == "cloud":  # `status` and `destroy` ask so only of jobs that `tune` and `batch` have made
        calls = {call for call in calls if not re.fullmatch("(Describe|Stop)(HyperParameterTuning|Transform)Job", call)}
    assert {OTHER_NAMES.get(call, call) for call in calls - NO_PERMISSION} <= allowed()


def test_the_verbs_policy_allows_nothing_that_no_verb_does(scope: str) -> None:
    files = [file for file in (ROOT / "pipelines").rglob("*.py")
             if scope == "full" or not {*file.relative_to(ROOT).parts, file.stem} & ROOMS_OF_FULL]  # fmt: skip
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    golden = "".join(file.read_text(encoding="utf-8") for file in golden_files(scope))
    implied = {  # by tags, roles, uploads, `docker push`, and what AWS does with a key for who asks
        "AddTags", "TagResource", "PassRole", "GetObjectVersion", "CreateServiceLinkedRole", "AbortMultipartUpload",
        "GetBucketLocation", "ListBucket", "InvokeEndpointAsync", "UpdatePipeline", "BatchCheckLayerAvailability",
        "BatchGetImage", "CompleteLayerUpload", "GetDownloadUrlForLayer", "InitiateLayerUpload", "PutImage",
        "UploadLayerPart", "CreateGrant", "Decrypt", "GenerateDataKey",
    }  # fmt: skip
    actions = allowed()
    called = {action for action in actions if re.sub(r"(?<!^)([A-Z])", r"_\1", action).lower() in source}
    asked = {action for action in actions if f'"{action}"' in golden}
    assert actions - called - asked - implied == set()


@pytest.mark.parametrize("budgets", [True, False])
def test_the_template_is_valid_in_every_region(scope: str, budgets: bool) -> None:
    """As it is sent. Each region is linted with the kinds of resources that it has."""
    lint, every = importlib.import_module("cfnlint.api").lint, importlib.import_module("cfnlint.helpers").REGIONS
    chosen = [name for name in sorted(every) if (name in stack.BUDGET_REGIONS) == budgets]
    assert len(chosen) >= 16
    settings = config.load([f"aws.region={chosen[0]}"])
    text = stack.template(settings, ACCOUNT)
    assert ("AWS::Budgets" in text) == budgets
    assert ("AWS::StepFunctions" in text) == (scope == "full")
    assert len(text) < 51_200  # CloudFormation's limit
    assert [str(match) for match in lint(text, regions=chosen)] == []
    if not budgets:  # and the lint can fail
        assert lint(stack.TEMPLATE.read_text(encoding="utf-8"), regions=chosen[:1])


def policy_size() -> int:
    """Characters of the largest managed policy without blanks, as AWS counts them."""
    iam = boto3.client("iam")
    versions = [
        iam.get_policy_version(PolicyArn=policy["Arn"], VersionId=policy["DefaultVersionId"])["PolicyVersion"]
        for policy in iam.list_policies(Scope="Local")["Policies"]
    ]
    return max(len(re.sub(r"\s", "", json.dumps(version["Document"]))) for version in versions)


def test_one_account_sees_a_stack_that_is_made_changed_and_removed(
    aws: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    account = Account(config.load())
    with pytest.raises(UserError, match="make it with `make bootstrap`"):
        account.stack()  # that there is none is not kept
    bootstrap.bootstrap(account, yes=True)
    assert account.stack().bucket == BUCKET
    bootstrap.bootstrap(account, yes=True)
    assert "is up to date" in capsys.readouterr().out
    destroy.destroy_stack(account, everything=True, confirmed=NAME, yes=True)
    destroy.destroy_stack(account, everything=False, confirmed="", yes=True)
    assert f"there is no stack {NAME}" in capsys.readouterr().out
    bootstrap.bootstrap(account, yes=True)
    assert len(aws.named("ExecuteChangeSet")) == 2


def test_make_again_update_and_destroy(aws: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    make()
    shown = capsys.readouterr().out
    assert f"stack {NAME} in us-east-1, account {ACCOUNT}, bucket {BUCKET}" in shown
    assert re.search(r"  Add +AWS::S3::Bucket +Bucket\n", shown)
    assert "by itself it costs nothing" in shown
    found = Account(config.load()).stack()
    assert found.bucket == BUCKET
    assert found.repository == f"{ACCOUNT}.dkr.ecr.us-east-1.amazonaws.com/{NAME}"
    assert all(value.startswith("arn:aws:iam::") for value in (found.role, found.scheduler_role))
    assert found.topic.startswith("arn:aws:sns:")
    assert policy_size() < 5750  # of 6144: the longest names of project, region and partition add less than 300
    assert not aws.named("ListOpenIDConnectProviders", "DescribeKey")  # nothing asked for
    writing = ("CreateChangeSet", "ExecuteChangeSet")
    sent = [(name, {key: value for key, value in call.items() if key != "TemplateBody"}) for name, call in aws]
    check_golden("bootstrap", [call for call in sent if call[0] in writing])
    template = json.loads(aws.named("CreateChangeSet")[0]["TemplateBody"])
    names = [resource.get("Properties", {}) for resource in template["Resources"].values()]
    assert {n.get("BucketName") or n.get("RepositoryName") for n in names} == {None, BUCKET, NAME}

    make()
    assert f"the stack {NAME} is up to date" in capsys.readouterr().out
    assert len(aws.named("ExecuteChangeSet")) == 1
    assert len(aws.named("DeleteChangeSet")) == 1

    make("compute.remote_debug=true")
    shown = capsys.readouterr().out
    assert "updating: update complete" in shown
    assert aws.named("CreateChangeSet")[-1]["ChangeSetType"] == "UPDATE"

    s3 = boto3.client("s3")
    s3.put_object(Bucket=BUCKET, Key="artifacts/a", Body=b"x")
    del aws[:]
    remove()
    shown = capsys.readouterr().out
    assert f"keeps the bucket {BUCKET} and repository {NAME}" in shown
    assert s3.list_objects_v2(Bucket=BUCKET)["KeyCount"] == 1
    assert boto3.client("ecr").describe_repositories(repositoryNames=[NAME])
    with pytest.raises(UserError, match="there is no stack image-classifier in us-east-1; make it with"):
        Account(config.load()).stack()
    remove()
    assert f"there is no stack {NAME}" in capsys.readouterr().out


def test_destroy_with_all(aws: Recorder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make()
    s3 = boto3.client("s3")
    s3.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})  # moto's stack leaves it out
    for number in range(1101):
        s3.put_object(Bucket=BUCKET, Key=f"artifacts/{number}", Body=b"")
    s3.put_object(Bucket=BUCKET, Key="artifacts/0", Body=b"again")
    s3.delete_object(Bucket=BUCKET, Key="artifacts/1")
    for confirmed in ("", "cats", "y"):
        with pytest.raises(UserError, match=f"nothing was deleted: .* say CONFIRM={NAME}"):
            remove(everything=True, confirmed=confirmed)
    assert Account(config.load()).stack()
    monkeypatch.setattr("sys.stdin", Terminal("yes\n"))
    with pytest.raises(UserError, match="'yes' is not the project's name"):
        remove(everything=True)
    assert f"DELETES the bucket {BUCKET} and repository {NAME}, with all that is in them" in capsys.readouterr().out
    del aws[:]
    monkeypatch.setattr("sys.stdin", Terminal(f"{NAME}\n"))
    remove(everything=True)
    assert [len(call["Delete"]["Objects"]) for call in aws.named("DeleteObjects")] == [1000, 103]
    assert s3.list_buckets()["Buckets"] == []
    assert boto3.client("ecr").describe_repositories()["repositories"] == []
    names = ("DeleteStack", "DeleteBucket", "DeleteRepository")
    check_golden("bootstrap_destroy", [call for call in aws if call[0] in names])
    remove(everything=True, confirmed=NAME)  # nothing is left, and that is no error


def test_data_that_outlived_the_stack_can_still_be_deleted(aws: Recorder) -> None:
    make()
    remove()
    remove(everything=True, confirmed=NAME)
    assert boto3.client("s3").list_buckets()["Buckets"] == []
    assert len(aws.named("DeleteStack")) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_objects_that_cannot_be_deleted_are_named(aws: Recorder) -> None:
    make()
    boto3.client("s3").put_object(Bucket=BUCKET, Key="a/b", Body=b"")
    aws.answers["DeleteObjects"] = {"Errors": [{"Key": "a/b", "Code": "AccessDenied", "Message": "Access Denied"}]}
    with pytest.raises(UserError, match=rf"a/b in {BUCKET} cannot be deleted: Access Denied \(AccessDenied\)"):
        remove(everything=True, confirmed=NAME)
    assert boto3.client("s3").list_buckets()["Buckets"]


def test_destroy_refuses_while_something_of_the_project_bills(aws: Recorder) -> None:
    make()
    make_endpoint("demo")
    make_endpoint(f"{NAME}-2", THEIRS)  # another project's, whose name begins with this one's
    for everything in (True, False):
        with pytest.raises(UserError, match="still there: endpoint demo; remove endpoints with `make destroy`"):
            remove(everything, NAME)
    assert not aws.named("DeleteStack")
    boto3.client("sagemaker").delete_endpoint(EndpointName="demo")
    remove()
    assert len(aws.named("DeleteStack")) == 1


def test_everything_that_can_be_asked_for(aws: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    kms = boto3.client("kms")
    key = kms.create_key()["KeyMetadata"]
    kms.create_alias(AliasName="alias/cats", TargetKeyId=key["KeyId"])
    make(*FULL)
    sent = aws.named("CreateChangeSet")[0]["Parameters"]
    values = {item["ParameterKey"]: item["ParameterValue"] for item in sent}
    assert values == {
        "Project": NAME, "ShortProject": NAME, "UseVpc": "true", "Subnets": "subnet-1", "SecurityGroups": "sg-1",
        "RemoteDebug": "true",
        "Email": "me@example.com", "MonthlyUsd": "100",
        "KmsKey": key["Arn"], "GitHubRepository": "octo/cats", "GitHubBranch": "release",
        "GitHubSubjects": "octo/cats,octo@*/cats@*", "CreateGitHubProvider": "true",
        "PipelineSchedule": "", "Watch": "", "DeployOnApproval": "false", "Connection": "",
        "MoreRepositories": "arn:aws:ecr:us-east-1:999999999999:repository/other",
    }  # fmt: skip
    assert {*values} == {*stack.joined()["Parameters"]}
    shown = capsys.readouterr().out
    assert "workflows of octo/cats, branch release, may run the verbs" in shown
    assert "AWS sends a mail to me@example.com" in shown
    roles = {role["RoleName"]: role for role in boto3.client("iam").list_roles()["Roles"]}
    role = next(role for name, role in roles.items() if "GitHubRole" in name)
    deploys = next(role for name, role in roles.items() if "GitHubDeployRole" in name)
    token = "token.actions.githubusercontent.com"
    names = ("repo:octo/cats", "repo:octo@*/cats@*")  # before and since GitHub's tokens have numbers in them
    for made, where in ((role, "ref:refs/heads/release"), (deploys, "environment:production")):
        assert made["AssumeRolePolicyDocument"]["Statement"][0]["Condition"] == {
            "StringEquals": {f"{token}:aud": "sts.amazonaws.com"},
            "StringEqualsIfExists": {f"{token}:ref": "refs/heads/release"},
            "StringLike": {f"{token}:sub": [f"{name}:{where}" for name in names]},
        }
    execution = Account(config.load()).stack().role.split("/")[1]
    text = boto3.client("iam").get_role_policy(RoleName=execution, PolicyName="job")["PolicyDocument"]
    policy = yaml.safe_load(text)  # moto gives a dictionary's text, not JSON
    granted = {action for statement in policy["Statement"] for action in listed(statement["Action"])}
    assert {"ec2:CreateNetworkInterface", "ssmmessages:OpenDataChannel"} <= granted


def neighbour(project: str, short: str = "", status: str = "CREATE_COMPLETE") -> dict[str, Any]:
    given = {"Project": project, "ShortProject": short or project[:19].rstrip("-")}
    parameters = [{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()]
    return {"StackName": project, "StackId": f"arn:{project}", "StackStatus": status, "Parameters": parameters}


NEAR = ["image-classifier-cards", "image", "image-classifiers", "i", "image-classifier-eu-west-and-more"]
FAR = ["prod-image-classifier", "imagine", "image-recogniser", "classifier"]


def test_names_that_begin_each_other_are_refused(
    aws: Recorder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when another page of the account's stacks has it; a stack that is there is still updated, with a warning."""
    other: dict[str, Any] = {"StackName": "network", "StackStatus": "CREATE_COMPLETE", "Parameters": [
        {"ParameterKey": "Project", "ParameterValue": "image"}]}  # fmt: skip
    there: list[dict[str, Any]] = []

    def describe(asked: dict[str, Any]) -> dict[str, Any]:
        if "StackName" in asked:
            raise refused("ValidationError", f"Stack with id {NAME} does not exist", "DescribeStacks")
        return {"Stacks": there} if "NextToken" in asked else {"Stacks": [other], "NextToken": "more"}

    aws.answers["DescribeStacks"] = describe
    for name in NEAR:
        there[:] = [neighbour(name)]
        with pytest.raises(UserError, match=rf"{NAME} begins like that of the project {name}, .*choose a name"):
            make()
    assert not aws.named("CreateChangeSet")
    cloud = Account(config.load()).client("cloudformation")
    there[:] = [neighbour(name) for name in FAR] + [neighbour("image", status="DELETE_COMPLETE"), neighbour(NAME)]
    assert bootstrap.neighbours(cloud, NAME, NAME) == []
    # of two long names the first 19 characters are those of their jobs
    there[:] = [neighbour("image-classifier-of-dogs")]
    found = bootstrap.neighbours(cloud, "image-classifier-of-cats", "image-classifier-of")
    assert found == ["image-classifier-of-dogs"]
    aws.answers.clear()
    make()
    monkeypatch.setattr(bootstrap, "neighbours", lambda *_: ["image"])
    make("compute.remote_debug=true")
    assert "WARNING: its name begins like that of image: docs/aws.md" in capsys.readouterr().out
    assert len(aws.named("ExecuteChangeSet")) == 2


def test_an_account_has_one_provider_for_github(aws: Recorder) -> None:
    def provider() -> str:
        sent = aws.named("CreateChangeSet")[-1]["Parameters"]
        return str(next(item["ParameterValue"] for item in sent if item["ParameterKey"] == "CreateGitHubProvider"))

    iam = boto3.client("iam")
    make("aws.github=octo/cats")
    assert provider() == "true"
    iam.create_open_id_connect_provider(Url="https://token.actions.githubusercontent.com")  # what AWS made by now
    make("aws.github=octo/dogs")
    assert provider() == "true"  # the stack's own must not be taken out of it
    remove(everything=True, confirmed=NAME)
    make("aws.github=octo/cats")
    assert provider() == "false"


@pytest.mark.parametrize(
    ("origin", "wanted"),
    [
        ("git@github.com:octo/cats.git", "octo/cats"),
        ("https://github.com/octo/big.cats/", "octo/big.cats"),
        ("https://github.com/octo/cats", "octo/cats"),
        ("https://example.com/octo/cats", None),
        ("", None),
    ],
)
def test_github_from_git(monkeypatch: pytest.MonkeyPatch, origin: str, wanted: str | None) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, f"{origin}\n", "")
    )
    settings = config.load(["aws.github=auto"])
    if wanted:
        assert stack._github(settings) == wanted
    else:
        with pytest.raises(UserError, match=r"not on github\.com; write owner/name, or none"):
            stack._github(settings)


@pytest.mark.parametrize("setting", ["github=cats", "github=octo/cats/x", "email=me", "monthly_usd=-1"])
def test_settings_are_checked(setting: str) -> None:
    with pytest.raises(UserError, match=f"aws.{setting.split('=')[0]} is "):
        config.load([f"aws.{setting}"])


def test_no_is_an_answer(aws: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="say YES=1"):
        make(yes=False)
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    with pytest.raises(UserError, match="nothing was done"):
        make(yes=False)
    assert not aws.named("ExecuteChangeSet")
    assert boto3.client("cloudformation").describe_stacks()["Stacks"] == []
    make()
    with pytest.raises(UserError, match="nothing was done"):  # Ctrl-D
        make("compute.remote_debug=true", yes=False)
    with pytest.raises(UserError, match="nothing was done"):
        remove(yes=False)
    assert Account(config.load()).stack()  # a plan taken back leaves the stack alone


@pytest.mark.parametrize(
    ("operation", "code", "words"),
    [
        ("GetCallerIdentity", "ExpiredToken", "the AWS credentials have expired"),
        ("DescribeStacks", "AccessDenied", "these credentials may not do that"),
        ("CreateChangeSet", "AccessDenied", "these credentials may not do that"),
        ("ExecuteChangeSet", "AccessDenied", "these credentials may not do that"),
        ("CreateChangeSet", "LimitExceededException", "a quota of the account is reached"),
        ("CreateChangeSet", "Throttling", "5 attempts were refused"),
    ],
)
def test_refused(aws: Recorder, operation: str, code: str, words: str) -> None:
    aws.answers[operation] = refused(code, operation=operation)
    with pytest.raises(UserError, match=rf"making the stack {NAME} failed: it says no \({code}\); .*{words}"):
        make()
    aws.answers.clear()
    assert boto3.client("cloudformation").describe_stacks()["Stacks"] == []


def test_no_credentials(aws: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match="there are no AWS credentials; run `aws configure`"):
        make()
    assert aws is not None


def event(resource: str, status: str, reason: str = "") -> dict[str, Any]:
    return {"LogicalResourceId": resource, "ResourceType": "AWS::S3::Bucket", "ResourceStatus": status,
            "StackId": "s", "EventId": "e", "ResourceStatusReason": reason}  # fmt: skip


TAKEN = "The requested bucket name is not available."
EVENTS = [  # newest first
    event(NAME, "ROLLBACK_COMPLETE"),
    event("Topic", "DELETE_COMPLETE"),
    event("ExecutionRole", "CREATE_FAILED", "Resource creation cancelled"),
    event("Later", "CREATE_FAILED", "another reason"),
    event("Bucket", "CREATE_FAILED", TAKEN),
    event("Topic", "CREATE_FAILED", "Resource creation cancelled"),
    event(NAME, "CREATE_IN_PROGRESS", "User Initiated"),
    event("Old", "CREATE_FAILED", "of an attempt before"),
]


def answer_statuses(aws: Recorder, *statuses: str) -> None:
    """`DescribeStacks` says these, one after the other; the last one for ever."""
    said = itertools.chain(statuses, itertools.repeat(statuses[-1]))

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        if "StackName" not in asked:  # whether another project's name is near
            return {"Stacks": []}
        status = next(said)
        if not status:
            raise refused("ValidationError", "Stack with id x does not exist", "DescribeStacks")
        return {"Stacks": [{"StackName": NAME, "StackId": "arn:s", "StackStatus": status}]}

    aws.answers |= {"DescribeStacks": answer, "DescribeStackResources": {"StackResources": []},
                    "DescribeStackEvents": {"StackEvents": EVENTS}, "ExecuteChangeSet": {},
                    "DeleteStack": {}}  # fmt: skip


def test_a_failed_creation_is_explained_and_removed(aws: Recorder) -> None:
    """As with a bucket's name that is taken; moto rolls nothing back, so its answers are given here."""
    answer_statuses(
        aws, "", "CREATE_IN_PROGRESS", "ROLLBACK_IN_PROGRESS", "ROLLBACK_COMPLETE", "DELETE_IN_PROGRESS",
        "DELETE_COMPLETE",
    )  # fmt: skip
    words = rf"could not be made: Bucket \(AWS::S3::Bucket\): {TAKEN[:-1]}; what there was of it is removed"
    with pytest.raises(UserError, match=words):
        make()
    assert len(aws.named("DeleteStack")) == 1


def test_a_failed_update_is_explained_and_left(aws: Recorder) -> None:
    make()
    answer_statuses(aws, "CREATE_COMPLETE", "UPDATE_ROLLBACK_IN_PROGRESS", "UPDATE_ROLLBACK_COMPLETE")
    with pytest.raises(UserError, match=r"was not changed \(UPDATE_ROLLBACK_COMPLETE\): Bucket .*not available; mend"):
        make("compute.remote_debug=true")
    assert not aws.named("DeleteStack")


def test_what_an_earlier_attempt_left_is_removed_first(aws: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    answer_statuses(aws, "ROLLBACK_COMPLETE", "DELETE_COMPLETE", "CREATE_COMPLETE")
    make()
    assert "removing what an earlier attempt left of the stack" in capsys.readouterr().out
    order = [operation for operation, _ in aws if operation in ("DeleteStack", "CreateChangeSet")]
    assert order == ["DeleteStack", "CreateChangeSet"]
    assert aws.named("CreateChangeSet")[0]["ChangeSetType"] == "CREATE"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("UPDATE_IN_PROGRESS", "is being changed just now .* try again"),
        ("UPDATE_ROLLBACK_FAILED", "is stuck .*: Bucket .*continue-update-rollback --stack-name image-classifier"),
    ],
)
def test_a_stack_that_cannot_be_changed(aws: Recorder, status: str, words: str) -> None:
    answer_statuses(aws, status)
    with pytest.raises(UserError, match=words):
        make()
    assert not aws.named("CreateChangeSet", "DeleteStack")


def test_a_stack_that_cannot_be_removed(aws: Recorder) -> None:
    answer_statuses(aws, "CREATE_COMPLETE", "DELETE_IN_PROGRESS", "DELETE_FAILED")
    with pytest.raises(UserError, match=r"cannot be removed: Bucket .*not available; mend that"):
        remove()


def test_a_plan_that_cloudformation_refuses(aws: Recorder) -> None:
    aws.answers["DescribeChangeSet"] = {"Status": "FAILED", "StatusReason": "no such thing", "Changes": []}
    with pytest.raises(UserError, match="CloudFormation cannot make this stack: no such thing"):
        make()
    assert boto3.client("cloudformation").describe_stacks()["Stacks"] == []


def test_ctrl_c_while_waiting_lets_aws_go_on(aws: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    answer_statuses(aws, "", "CREATE_IN_PROGRESS")
    monkeypatch.setattr("time.sleep", interrupt)
    with pytest.raises(UserError, match="interrupted, but AWS goes on; the same command later") as error:
        make()
    assert error.value.code == 130
    assert not aws.named("DeleteStack")


def test_importing_is_quick_and_needs_no_sdk() -> None:
    modules = "('boto3', 'botocore', 'sagemaker', 'torch')"
    code = f"import sys, pipelines.cloud.destroy; print([m for m in {modules} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert Path(stack.TEMPLATE).is_file()
