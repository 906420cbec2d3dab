"""What starts the pipeline and the deployment by itself, and what GitHub's workflows may do, as the stack says it."""

from __future__ import annotations

import importlib
import json
import re
from fnmatch import fnmatchcase
from typing import Any

import boto3
import pytest
import yaml

from pipelines import ROOT, config
from pipelines.cloud import stack, status
from pipelines.cloud.account import Account
from pipelines.terminal import UserError
from tests.cloud import GOLDEN, Recorder, aws
from tests.test_bootstrap import (
    ACCOUNT,
    BUCKET,
    NAME,
    NO_PERMISSION,
    OTHER_NAMES,
    _no_pauses_and_outputs,
    listed,
    make,
    statements,
)

__all__ = ["_no_pauses_and_outputs", "aws"]
pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse:UserWarning")  # moto has not every resource
CONNECTION = f"arn:aws:codeconnections:us-east-1:{ACCOUNT}:connection/0a1b2c3d-0000-4000-8000-000000000000"
ALL = ["pipeline.schedule=rate(7 days)", "pipeline.watch=incoming", "pipeline.deploy_on_approval=true",
       f"pipeline.connection={CONNECTION}", "aws.github=octo/cats"]  # fmt: skip
TRIGGERS = {"TriggerRole", "Schedule", "Uploaded", "Watcher", "DeployRole", "Deployment", "Deployed"}
CALLS = {"deploy": "deploy_*.json", "approve": "approve.json", "pipeline": "pipeline*.json"}  # golden files of verbs


def resolved(value: Any, values: dict[str, str]) -> Any:
    """A part of the template with its parameters in place."""
    if isinstance(value, list):
        return [resolved(item, values) for item in value]
    if not isinstance(value, dict):
        return value
    if "Ref" in value:
        return values.get(value["Ref"], value["Ref"])
    if "Fn::GetAtt" in value:
        return ".".join(value["Fn::GetAtt"])
    if "Fn::Select" in value:
        number, names = value["Fn::Select"]
        return resolved(names, values).split(",")[number]
    if "Fn::Sub" in value:
        given = value["Fn::Sub"]
        text, own = given if isinstance(given, list) else (given, {})
        own = values | {name: resolved(item, values) for name, item in own.items()}
        return re.sub(r"\$\{(.+?)\}", lambda name: str(own.get(name[1], name[1])), text)
    return {key: resolved(item, values) for key, item in value.items()}


def parameters(*overrides: str) -> dict[str, str]:
    return stack.parameters(Account(config.load(overrides)), f"arn:aws:iam::{ACCOUNT}:user/me", {})


def test_nothing_starts_by_itself_unless_asked_for(aws: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    make()
    shown = capsys.readouterr().out
    assert "starts the pipeline" not in shown
    sent = {item["ParameterKey"]: item["ParameterValue"] for item in aws.named("CreateChangeSet")[0]["Parameters"]}
    assert (sent["PipelineSchedule"], sent["Watch"], sent["Connection"]) == ("", "", "")
    assert sent["DeployOnApproval"] == "false"
    resources = stack.joined()["Resources"]
    assert {name for name, resource in resources.items() if resource.get("Condition") in
            ("HasTrigger", "HasSchedule", "Watches", "Deploys")} == TRIGGERS  # fmt: skip
    body = json.loads(aws.named("CreateChangeSet")[0]["TemplateBody"])
    assert "Deployment" not in body["Resources"], "some regions have no CodeBuild"
    assert boto3.client("stepfunctions").list_state_machines()["stateMachines"] == []
    assert {rule["State"] for rule in boto3.client("events").list_rules()["Rules"]} == {"ENABLED"}
    assert len(boto3.client("events").list_rules()["Rules"]) == 2  # they tell, and start nothing


def test_all_triggers(aws: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    make(*ALL)
    shown = capsys.readouterr().out
    assert "rate(7 days) starts the pipeline, at the price that `make pipeline` says" in shown
    assert "new data under incoming starts the pipeline" in shown
    assert "an approved model package is deployed without a question" in shown
    machine = boto3.client("stepfunctions").list_state_machines()["stateMachines"][0]
    assert machine["name"] == f"{NAME}-watch"
    events = boto3.client("events")
    rules = {rule["Description"]: rule for rule in events.list_rules()["Rules"]}
    uploaded = rules["Start the pipeline on new data"]
    pattern = json.loads(uploaded["EventPattern"])
    assert pattern["detail"] == {"bucket": {"name": [BUCKET]}, "object": {"key": [{"wildcard": "incoming/*.complete"}]}}
    keys = {"incoming/cats.complete": True, "incoming/cats/1.png": False, "raw/cats.complete": False}
    assert {key: fnmatchcase(key, pattern["detail"]["object"]["key"][0]["wildcard"]) for key in keys} == keys
    target = events.list_targets_by_rule(Rule=uploaded["Name"])["Targets"][0]
    assert target["Arn"] == machine["stateMachineArn"]
    assert Account(config.load()).stack().bucket == BUCKET
    assert (
        status.stored(Account(config.load()))[-1]
        == f"pipeline {NAME}: started by rate(7 days) and by new data under incoming"
    )
    assert len(aws.named("ExecuteChangeSet")) == 1


def test_the_requests_of_the_triggers_are_valid(aws: Recorder) -> None:
    """What the services will send, checked with the model of the service that gets it."""
    values = parameters(*ALL) | {"AWS::Partition": "aws", "AWS::Region": "us-east-1", "AWS::AccountId": ACCOUNT}
    made = {name: resolved(stack.joined()["Resources"][name]["Properties"], values) for name in TRIGGERS | {"Approved"}}
    arn = f"arn:aws:sagemaker:us-east-1:{ACCOUNT}:pipeline/{NAME}"
    assert made["Schedule"]["ScheduleExpression"] == "rate(7 days)"
    target = made["Schedule"]["Target"]
    asked = {"Name": "x", "ScheduleExpression": "rate(7 days)", "FlexibleTimeWindow": {"Mode": "OFF"}}
    assert invalid("scheduler", "CreateSchedule", asked | {"Target": target}) == ""
    assert target["Arn"] == arn

    assert made["Watcher"]["StateMachineName"] == f"{NAME}-watch"
    step = made["Watcher"]["Definition"]["States"]["Start"]
    assert step["Resource"] == "arn:aws:states:::aws-sdk:sagemaker:startPipelineExecution"
    assert invalid("sagemaker", "StartPipelineExecution", step["Arguments"] | {"ClientRequestToken": "x" * 36}) == ""
    assert step["Arguments"]["PipelineName"] == NAME
    uri = step["Arguments"]["PipelineParameters"][0]
    made_pipeline = json.loads((GOLDEN / "pipeline_default.json").read_text(encoding="utf-8"))
    assert f'"{uri["Name"]}"' in json.dumps(made_pipeline).replace("\\", "")
    assert r"/\.complete$/, '/'" in uri["Value"]

    deploy = made["Approved"]["Targets"][0]["Fn::If"][1]
    event = {"package": f"arn:aws:sagemaker:us-east-1:{ACCOUNT}:model-package/{NAME}/3"}
    given = json.loads(deploy["InputTransformer"]["InputTemplate"].replace("<package>", event["package"]))
    assert invalid("codebuild", "StartBuild", {"projectName": made["Deployment"]["Name"], **given}) == ""
    assert given["environmentVariablesOverride"] == [{"name": "PACKAGE", "value": event["package"]}]
    commands = yaml.safe_load(made["Deployment"]["Source"]["BuildSpec"])["phases"]["build"]["commands"]
    assert commands == ['make deploy YES=1 ARGS="--rollback"']
    assert made["Deployment"]["SourceVersion"] == "main"
    assert made["Deployment"]["Source"]["Location"] == "https://github.com/octo/cats.git"

    allowed = {(s["Action"], s["Resource"]) for s in made["TriggerRole"]["Policies"][0]["PolicyDocument"]["Statement"]}
    assert allowed == {
        ("sagemaker:StartPipelineExecution", arn),
        ("states:StartExecution", f"arn:aws:states:us-east-1:{ACCOUNT}:stateMachine:{NAME}-watch"),
        ("codebuild:StartBuild", deploy["Arn"]),
    }
    assert deploy["Arn"].endswith(f":project/{made['Deployment']['Name']}")
    assert not [call for call in aws if not call[0].startswith("List")]


def invalid(service: str, operation: str, asked: dict[str, Any]) -> str:
    from botocore.validate import ParamValidator

    client = boto3.client(service, region_name="us-east-1")
    shape = client.meta.service_model.operation_model(operation).input_shape
    return str(ParamValidator().validate(asked, shape).generate_report())


def test_the_template_with_all_triggers_is_valid(aws: Recorder) -> None:
    lint, every = importlib.import_module("cfnlint.api").lint, importlib.import_module("cfnlint.helpers").REGIONS
    without = {"ap-east-2", "ca-west-1", "mx-central-1"}  # CodeBuild
    text = stack.template(config.load([*ALL, "aws.region=us-east-1"]), ACCOUNT)
    assert len(text) < 51_200
    assert [str(match) for match in lint(text, regions=sorted(set(stack.BUDGET_REGIONS) - without))] == []
    assert lint(text, regions=["ca-west-1"]), "and the lint can fail"
    assert every
    assert aws is not None


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("schedule=daily", "pipeline.schedule is 'daily'"),
        ("watch=incoming/", "pipeline.watch is 'incoming/'"),
        ("watch=raw", "the verbs write there and would start it"),
        ("watch=data/mine", "the verbs write there"),
        ("watch='in*'", "pipeline.watch is "),
        ("connection=mine", "pipeline.connection is 'mine'"),
    ],
)
def test_settings_are_checked(setting: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        config.load([f"pipeline.{setting}"])


def test_deployment_needs_a_repository(aws: Recorder) -> None:
    with pytest.raises(UserError, match=r"deploy_on_approval needs the repository .* set aws\.github"):
        make("pipeline.deploy_on_approval=true")
    assert not aws.named("CreateChangeSet")


OURS = "repo:octo/cats"
THEIRS = [  # what other people's workflows can be called
    "repo:octo/cats:ref:refs/heads/other",
    "repo:octo/cats:ref:refs/heads/main2",
    "repo:octo/cats:pull_request",
    "repo:octo/cats:environment:staging",
    "repo:octo/dogs:ref:refs/heads/main",
    "repo:octopus/cats:ref:refs/heads/main",
    "repo:evil/octo@1/cats@2:ref:refs/heads/main",
    "repo:octo@1/dogs@2:ref:refs/heads/main",
    "repo:octo@1/dogs@2:ref:refs/heads/x/cats@2",
    "repo:octo@1/dogs@2:environment:production",
    "repo:evil@1/cats@2:environment:production",
    "repo:octo@1/cats@2:pull_request",
    "repo:octo@1/cats@2:ref:refs/heads/other",
]


def trusted(github: str, subject: str, branch: str | None = "main") -> bool:
    """Whether the role's trust policy lets a token in, by IAM's rules; no branch: the partition has no `ref`."""
    repository, subjects, own = stack._parsed(github)
    values = {"GitHubRepository": repository, "GitHubSubjects": subjects, "GitHubBranch": own}
    role = "GitHubDeployRole" if ":environment:" in subject else "GitHubRole"  # test_iam.py: never both
    policy = stack.joined()["Resources"][role]["Properties"]["AssumeRolePolicyDocument"]["Statement"][0]
    tests = resolved(policy["Condition"], values)
    assert set(tests) == {"StringEquals", "StringEqualsIfExists", "StringLike"}
    named = [re.escape(like).replace(r"\*", ".*") for like in tests["StringLike"][f"{stack.GITHUB}:sub"]]
    right = branch is None or f"refs/heads/{branch}" == tests["StringEqualsIfExists"][f"{stack.GITHUB}:ref"]
    return right and any(re.fullmatch(like, subject) for like in named)


@pytest.mark.parametrize("github", ["octo/cats", "octo@1/cats@2"])
def test_only_workflows_of_the_repository_and_its_branch_get_the_role(github: str) -> None:
    """With and without the numbers that GitHub's tokens have since July 2026; in the environment and outside it."""
    ours = ["repo:octo@1/cats@2:ref:refs/heads/main", "repo:octo@1/cats@2:environment:production"]
    old = ["repo:octo/cats:ref:refs/heads/main", "repo:octo/cats:environment:production"]
    assert all(trusted(github, subject) for subject in ours)
    assert not any(trusted(github, subject) for subject in THEIRS)
    assert not any(trusted(github, subject, "other") for subject in ours + old), "another branch in the environment"
    assert all(trusted(github, subject, None) for subject in ours)
    numbered = "@" in github  # then whoever takes the names later does not get in
    assert [trusted(github, subject) for subject in old] == [not numbered] * 2
    assert trusted(github, "repo:octo@9/cats@9:environment:production") != numbered


@pytest.mark.parametrize(
    ("github", "parsed"),
    [
        ("", ("", ",", "main")),
        ("octo/cats", ("octo/cats", "octo/cats,octo@*/cats@*", "main")),
        ("octo/cats@1", ("octo/cats", "octo/cats,octo@*/cats@*", "1")),
        ("octo/cats@a/b", ("octo/cats", "octo/cats,octo@*/cats@*", "a/b")),
        ("octo@1/cats@2", ("octo/cats", "octo@1/cats@2,octo@1/cats@2", "main")),
        ("octo@1/cats@2@a/b", ("octo/cats", "octo@1/cats@2,octo@1/cats@2", "a/b")),
    ],
)
def test_the_name_of_the_repository(github: str, parsed: tuple[str, str, str]) -> None:
    assert stack._parsed(github) == parsed
    if github:
        assert config.load([f"aws.github={github}"]).aws.github == github


def test_a_number_alone_is_refused() -> None:
    with pytest.raises(UserError, match=r"aws\.github is 'octo@1/cats'"):
        config.load(["aws.github=octo@1/cats"])


def test_roles_of_workflows_and_deployment_allow_the_calls_of_their_verbs() -> None:
    """The verbs that they run, the requests that these make, and the policies that the roles have."""
    resources = stack.joined()["Resources"]
    workflows = sorted((ROOT / ".github" / "workflows").glob("deliver.yml"))
    texts = [path.read_text(encoding="utf-8") for path in workflows]
    texts.append(resources["Deployment"]["Properties"]["Source"]["BuildSpec"])
    verbs = {verb for text in texts for verb in re.findall(r"- (?:run: )?make ([a-z-]+)", text)} - {"setup"}
    assert verbs == {*CALLS} if workflows else {"deploy"}
    policy = {
        action.split(":")[1]
        for _, statement in statements([resources["VerbsPolicy"], resources["AroundPolicy"]])
        for action in listed(statement["Action"])
    }
    for role in ("GitHubRole", "GitHubDeployRole", "DeployRole"):
        attached = resources[role]["Properties"]["ManagedPolicyArns"]
        assert attached[:2] == [{"Ref": "AroundPolicy"}, {"Ref": "VerbsPolicy"}]
    for verb in verbs:
        files = sorted(GOLDEN.glob(CALLS[verb]))
        assert files, f"no golden file has the requests of {verb}"
        calls = {call for file in files for call, *_ in json.loads(file.read_text(encoding="utf-8"))}
        assert {OTHER_NAMES.get(call, call) for call in calls - NO_PERMISSION} <= policy, verb
