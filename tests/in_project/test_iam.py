"""Who may do what: the policies of the stack against a table of two projects, and against all requests of the verbs."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import pytest

from pipelines.cloud import stack
from tests.cloud import GOLDEN, STACK
from tests.iam import Template
from tests.policies import Context, allowed, listed

ACCOUNT, REGION = "123456789012", "us-east-1"
KEY = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/1"
PERSON, PEOPLE = "person", ("VerbsPolicy", "AroundPolicy")
OWN, NEIGHBOUR, LATER = "fraud", "fraud-cards", "prod-antifraud"
ROLES = ("ExecutionRole", "ServingRole", "PipelineRole", "SchedulerRole", "TriggerRole", "DeployRole", "GitHubRole",
         "GitHubDeployRole")  # fmt: skip
Row = tuple[str, str, str, Context]
EVERY = {
    "RemoteDebug": "true", "KmsKey": KEY, "GitHubRepository": "octo/cats", "GitHubSubjects": "octo/cats,octo@*/cats@*",
    "DeployOnApproval": "true", "PipelineSchedule": "rate(7 days)", "Watch": "incoming",
    "Connection": "arn:aws:codeconnections:x", "Email": "me@example.com",
    "MoreRepositories": f"arn:aws:ecr:{REGION}:999999999999:repository/other",
}  # fmt: skip
VPC = {"UseVpc": "true", "Subnets": "subnet-0a,subnet-0b", "SecurityGroups": "sg-0a"}
full = pytest.mark.skipif(not stack.AUTOMATION.exists(), reason="the scope `cloud` has no automation.yaml")


def arn(service: str, rest: str, region: str = REGION) -> str:
    return f"arn:aws:{service}:{region}:{ACCOUNT}:{rest}"


def template(project: str, short: str = "", **more: str) -> Template:
    """The stack of a project."""
    values = {"Project": project, "ShortProject": short or project[:19].rstrip("-"), "AWS::Partition": "aws",
              "AWS::Region": REGION, "AWS::AccountId": ACCOUNT, "AWS::URLSuffix": "amazonaws.com",
              "AWS::StackName": project}  # fmt: skip
    arns = {role: arn("iam", f"role/{project}-{role}-1A2B", "") for role in ROLES}
    arns |= {policy: arn("iam", f"policy/{project}-{policy}-1A2B", "") for policy in (*PEOPLE, "KeyPolicy")}
    arns |= {"Bucket": f"arn:aws:s3:::{bucket(project)}", "ImageRepository": arn("ecr", f"repository/{project}"),
             "GitHubProvider": arn("iam", "oidc-provider/token.actions.githubusercontent.com", ""),
             "Topic": arn("sns", f"{project}-topic")}  # fmt: skip
    if not stack.AUTOMATION.exists():
        more = {key: value for key, value in more.items() if key in stack.joined()["Parameters"]}
    return Template(values | more, arns)


def bucket(project: str) -> str:
    return f"{project}-{ACCOUNT}-{REGION}"


def tagged(project: str) -> dict[str, Any]:
    """What a request on something of a project knows."""
    return {"aws:ResourceTag/project": project, "sagemaker:ResourceTag/project": project}


def new(project: str, action: str = "") -> dict[str, Any]:
    """What a request that makes something knows."""
    return {"aws:RequestTag/project": project} | ({"sagemaker:TaggingAction": action} if action else {})


def sm(rest: str) -> str:
    return arn("sagemaker", rest)


def log(rest: str) -> str:
    return arn("logs", f"log-group:{rest}")


def s3(project: str, key: str = "") -> str:
    return f"arn:aws:s3:::{bucket(project)}{f'/{key}' if key else ''}"


def role(project: str, name: str) -> str:
    return arn("iam", f"role/{project}-{name}-1A2B", "")


def passed(service: str = "sagemaker") -> dict[str, Any]:
    return {"iam:PassedToService": f"{service}.amazonaws.com"}


IN_VPC: dict[str, Any] = {"sagemaker:VpcSubnets": ["subnet-0a"], "sagemaker:VpcSecurityGroupIds": ["sg-0a"]}
THROUGH = {"kms:ViaService": f"s3.{REGION}.amazonaws.com"}
SCALABLE = arn("application-autoscaling", "scalable-target/0a1b")
OF_SAGEMAKER = {"application-autoscaling:service-namespace": "sagemaker"}
TARGET_ALARM = "alarm:TargetTracking-endpoint/{}/variant/AllTraffic-AlarmHigh-1"
STRANGERS: list[Row] = [  # principal, action, resource, context: of another project, or more than the principal needs
    # whose name begins with this one's: AWS knows the tag
    *[(PERSON, f"sagemaker:{action}", sm(f"{kind}/{NEIGHBOUR}{rest}"), tagged(NEIGHBOUR))
      for action, kind, rest in [
          ("DeleteEndpoint", "endpoint", ""), ("UpdateEndpoint", "endpoint", ""), ("InvokeEndpoint", "endpoint", ""),
          ("InvokeEndpointAsync", "endpoint", "-eu"), ("DescribeEndpoint", "endpoint", ""),
          ("DeleteEndpointConfig", "endpoint-config", "-1"), ("DescribeModel", "model", "-1"),
          ("DeleteModel", "model", "-1"), ("StopTrainingJob", "training-job", "-1"),
          ("UpdateTrainingJob", "training-job", "-1"), ("DescribeTrainingJob", "training-job", "-1"),
          ("StopProcessingJob", "processing-job", "-1"), ("DescribeProcessingJob", "processing-job", "-1")]],
    *[(PERSON, f"sagemaker:{action}", sm(rest), tagged(NEIGHBOUR)) for action, rest in [
        ("UpdatePipeline", f"pipeline/{NEIGHBOUR}"), ("StartPipelineExecution", f"pipeline/{NEIGHBOUR}"),
        ("StopPipelineExecution", f"pipeline/{NEIGHBOUR}/execution/1"), ("CreatePipeline", f"pipeline/{NEIGHBOUR}"),
        ("UpdateModelPackage", f"model-package/{NEIGHBOUR}/1"), ("CreateModelPackage", f"model-package/{NEIGHBOUR}/1"),
        ("DescribeModelPackage", f"model-package/{NEIGHBOUR}/1"), ("ListTags", f"endpoint/{LATER}"),
        ("CreateModelPackageGroup", f"model-package-group/{NEIGHBOUR}")]],
    *[(PERSON, f"sagemaker:{action}", sm(f"endpoint/{name}"), tagged(name))
      for action in ("DeleteEndpoint", "InvokeEndpoint", "DescribeEndpoint") for name in (LATER, "fraudster")],
    (PERSON, "sagemaker:CreateEndpoint", sm(f"endpoint/{NEIGHBOUR}-2"), new(NEIGHBOUR)),
    (PERSON, "sagemaker:CreateEndpoint", sm(f"endpoint/{OWN}-2"), {}),
    (PERSON, "sagemaker:CreateTrainingJob", sm(f"training-job/{OWN}-2"), IN_VPC),
    (PERSON, "sagemaker:CreateTrainingJob", sm(f"training-job/{LATER}-2"), new(OWN) | IN_VPC),
    # a tag would make it the project's
    (PERSON, "sagemaker:AddTags", sm(f"endpoint/{NEIGHBOUR}"), new(OWN) | tagged(NEIGHBOUR)),
    ("PipelineRole", "sagemaker:AddTags", sm(f"training-job/{NEIGHBOUR}-1"), new(OWN) | tagged(NEIGHBOUR)),
    # alarms, dashboards, schedules, logs, scaling, tracking
    *[(PERSON, f"cloudwatch:{action}", arn("cloudwatch", alarm), {})
      for action in ("DeleteAlarms", "PutMetricAlarm", "TagResource")
      for alarm in (f"alarm:{LATER}-drift", "alarm:my-fraud-alarm", "alarm:fraudster-drift", "alarm:antifraud",
                    TARGET_ALARM.format(LATER), TARGET_ALARM.format("fraudster"))],
    (PERSON, "cloudwatch:DeleteAlarms", arn("cloudwatch", f"alarm:{NEIGHBOUR}-drift"), tagged(NEIGHBOUR)),
    (PERSON, "cloudwatch:PutMetricAlarm", arn("cloudwatch", f"alarm:{NEIGHBOUR}-drift"),
     new(OWN) | tagged(NEIGHBOUR)),
    (PERSON, "scheduler:DeleteSchedule", arn("scheduler", "schedule/default/fraudster-end"), {}),
    (PERSON, "scheduler:UpdateSchedule", arn("scheduler", f"schedule/default/{LATER}-end"), {}),
    (PERSON, "scheduler:CreateSchedule", arn("scheduler", f"schedule/other/{OWN}-end"), {}),
    *[(PERSON, "logs:GetLogEvents", log(f"/aws/sagemaker/{place}"), {}) for place in
      (f"TrainingJobs:log-stream:{LATER}-1/algo-1", "ProcessingJobs:log-stream:fraudster-1/algo-1",
       f"Endpoints/{NEIGHBOUR}:log-stream:AllTraffic/i-1", "NotebookInstances:log-stream:fraud-1/jupyter.log")],
    (PERSON, "logs:DescribeLogStreams", log("/aws/lambda/fraud"), {}),
    *[(PERSON, f"application-autoscaling:{action}", SCALABLE, OF_SAGEMAKER | tagged(NEIGHBOUR))
      for action in ("DeregisterScalableTarget", "PutScalingPolicy", "RegisterScalableTarget")],
    (PERSON, "application-autoscaling:DeregisterScalableTarget", SCALABLE,
     {"application-autoscaling:service-namespace": "ecs"}),
    (PERSON, "application-autoscaling:TagResource", SCALABLE, new(OWN) | tagged(NEIGHBOUR)),
    # bucket, images, roles
    *[(PERSON, f"s3:{action}", s3(other, "models/a/model.tar.gz"), {})
      for action in ("GetObject", "PutObject", "DeleteObject") for other in (NEIGHBOUR, LATER)],
    (PERSON, "s3:DeleteObjectVersion", s3(OWN, "models/a/model.tar.gz"), {}),
    (PERSON, "s3:PutBucketVersioning", s3(OWN), {}),
    (PERSON, "ecr:PutImage", arn("ecr", f"repository/{NEIGHBOUR}"), {}),
    *[(PERSON, "iam:PassRole", role(NEIGHBOUR, name), passed()) for name in ("ExecutionRole", "ServingRole")],
    (PERSON, "iam:PassRole", role(OWN, "ExecutionRole"), passed("ec2")),
    (PERSON, "iam:PassRole", role(OWN, "SchedulerRole"), passed()),
    # jobs
    *[("ExecutionRole", f"s3:{action}", s3(OWN, key), {}) for action in ("PutObject", "DeleteObject")
      for key in ("models/a/model.tar.gz", "registry/a/evaluation.json", "source/a/train.py", "raw/a/1.png")],
    ("ExecutionRole", "s3:GetObject", s3(NEIGHBOUR, "data/a"), {}),
    *[(name, action, resource, context) for name in ("ExecutionRole", "ServingRole") for action, resource, context in [
        ("logs:PutLogEvents", log(f"/aws/sagemaker/TrainingJobs:log-stream:{LATER}-1/algo-1"), {}),
        ("logs:PutLogEvents", log(f"/aws/sagemaker/Endpoints/{LATER}:log-stream:AllTraffic/i-1"), {}),
        ("logs:DescribeLogStreams", log(f"/aws/sagemaker/Endpoints/{LATER}:log-stream:"), {}),
        ("cloudwatch:PutMetricData", "*", {"cloudwatch:namespace": "AWS/SageMaker"}),
        ("ec2:CreateNetworkInterface", arn("ec2", "subnet/subnet-1"), {"ec2:SubnetID": "subnet-1"}),
        ("ec2:CreateNetworkInterface", arn("ec2", "security-group/sg-1"), {"ec2:SecurityGroupID": "sg-1"})]],
    # serving
    *[("ServingRole", f"s3:{action}", s3(OWN, key), {}) for action in ("PutObject", "DeleteObject")
      for key in ("models/a/model.tar.gz", "jobs/a/output/model.tar.gz", "pipeline/1/packed/a", "source/a/inference.py",
                  "registry/a/evaluation.json", "data/a/train/labels.npy", "checkpoints/a/1")],
    *[("ServingRole", action, "*", {}) for action in ("sagemaker:CreateModel", "iam:PassRole", "s3:PutObject",
                                                      "s3:DeleteObject", "ssmmessages:CreateControlChannel")],
    # keys: only through a service
    *[(name, f"kms:{action}", KEY, {}) for name in (PERSON, "ExecutionRole", "ServingRole", "PipelineRole")
      for action in ("Decrypt", "GenerateDataKey", "Encrypt")],
    ("ExecutionRole", "kms:Decrypt", KEY, {"kms:ViaService": f"secretsmanager.{REGION}.amazonaws.com"}),
    ("ExecutionRole", "kms:CreateGrant", KEY, THROUGH),
    ("ExecutionRole", "kms:CreateGrant", KEY, {"kms:GrantIsForAWSResource": "true"}),
    # the pipeline
    ("PipelineRole", "sagemaker:StopTrainingJob", sm(f"training-job/{NEIGHBOUR}-1"), tagged(NEIGHBOUR)),
    ("PipelineRole", "sagemaker:CreateModelPackage", sm(f"model-package/{NEIGHBOUR}/1"), {}),
    ("PipelineRole", "sagemaker:CreateTrainingJob", sm(f"training-job/{OWN}-1"), IN_VPC),
    ("PipelineRole", "sagemaker:CreateEndpoint", sm(f"endpoint/{OWN}"), new(OWN)),
    ("PipelineRole", "s3:PutObject", s3(OWN, "models/a/model.tar.gz"), {}),
    ("PipelineRole", "iam:PassRole", role(OWN, "ServingRole"), passed()),
    # the end of endpoints
    ("SchedulerRole", "sagemaker:DeleteEndpoint", sm(f"endpoint/{NEIGHBOUR}"), tagged(NEIGHBOUR)),
    ("SchedulerRole", "sagemaker:DeleteEndpoint", sm("endpoint/fraudster"), tagged(OWN)),
    ("SchedulerRole", "sagemaker:DeleteModel", sm(f"model/{OWN}-1"), tagged(OWN)),
    ("SchedulerRole", "application-autoscaling:DeregisterScalableTarget", SCALABLE, OF_SAGEMAKER | tagged(NEIGHBOUR)),
    ("SchedulerRole", "application-autoscaling:DeregisterScalableTarget", SCALABLE,
     {"application-autoscaling:service-namespace": "ecs"}),
    ("SchedulerRole", "application-autoscaling:RegisterScalableTarget", SCALABLE, OF_SAGEMAKER | tagged(OWN)),
    ("SchedulerRole", "cloudwatch:DeleteAlarms", arn("cloudwatch", f"alarm:{NEIGHBOUR}-drift"), tagged(NEIGHBOUR)),
    ("SchedulerRole", "cloudwatch:DeleteAlarms", arn("cloudwatch", f"alarm:{LATER}-drift"), {}),
    ("SchedulerRole", "cloudwatch:PutMetricAlarm", arn("cloudwatch", f"alarm:{OWN}-drift"), tagged(OWN)),
    ("SchedulerRole", "cloudwatch:DeleteDashboards", arn("cloudwatch", f"dashboard/{LATER}-monitor", ""), {}),
]  # fmt: skip
OURS: list[Row] = [
    *[(PERSON, f"sagemaker:{action}", sm(f"{kind}/{OWN}-1"), {}) for action, kind in [
        ("DescribeEndpoint", "endpoint"), ("DescribeTrainingJob", "training-job"), ("DeleteModel", "model"),
        ("DeleteEndpointConfig", "endpoint-config")]],  # of what is not there AWS knows no tag
    *[(PERSON, f"sagemaker:{action}", sm(f"{kind}/{OWN}"), tagged(OWN)) for action, kind in [
        ("DeleteEndpoint", "endpoint"), ("InvokeEndpoint", "endpoint"), ("UpdateEndpoint", "endpoint")]],
    (PERSON, "sagemaker:ListTags", sm(f"endpoint/{NEIGHBOUR}"), tagged(NEIGHBOUR)),  # to tell it apart
    (PERSON, "sagemaker:CreateEndpoint", sm(f"endpoint/{OWN}"), new(OWN)),
    (PERSON, "sagemaker:AddTags", sm(f"endpoint/{OWN}"), new(OWN, "CreateEndpoint")),
    *[(PERSON, f"cloudwatch:{action}", arn("cloudwatch", f"alarm:{OWN}-drift"), new(OWN))
      for action in ("PutMetricAlarm", "TagResource")],
    (PERSON, "cloudwatch:PutMetricAlarm", arn("cloudwatch", TARGET_ALARM.format(OWN)), {}),
    (PERSON, "cloudwatch:DeleteAlarms", arn("cloudwatch", TARGET_ALARM.format(f"{OWN}-eu")), {}),
    (PERSON, "logs:GetLogEvents", log(f"/aws/sagemaker/TrainingJobs:log-stream:{OWN}-1/algo-1"), {}),
    (PERSON, "logs:DescribeLogStreams", log("/aws/sagemaker/TransformJobs:log-stream:"), {}),
    (PERSON, "application-autoscaling:PutScalingPolicy", SCALABLE, OF_SAGEMAKER | tagged(OWN)),
    (PERSON, "application-autoscaling:PutScalingPolicy", SCALABLE, OF_SAGEMAKER),  # made before they had tags
    (PERSON, "s3:PutObject", s3(OWN, "models/a/model.tar.gz"), {}),
    *[(name, "s3:GetObjectVersion", s3(OWN, "models/a/model.tar.gz"), {})
      for name in (PERSON, "ExecutionRole", "ServingRole")],
    *[("ExecutionRole", "s3:PutObject", s3(OWN, key), {}) for key in
      ("jobs/a/output/model.tar.gz", "checkpoints/a/1", "data/a/train/labels.npy", "pipeline/1/packed/a")],
    *[("ServingRole", "s3:PutObject", s3(OWN, key), {}) for key in
      ("capture/fraud/AllTraffic/a.jsonl", "async/fraud/output/a", "batch/a/output/1.out", "monitoring/fraud/r.json")],
    *[(name, "logs:PutLogEvents", log(f"/aws/sagemaker/{place}"), {}) for name in ("ExecutionRole", "ServingRole")
      for place in (f"TransformJobs:log-stream:{OWN}-1/i-1", f"Endpoints/{OWN}:log-stream:AllTraffic/i-1",
                    f"Endpoints/{OWN}-eu:log-stream:AllTraffic/i-1")],
    *[(name, "logs:CreateLogGroup", log(f"/aws/sagemaker/{place}"), {}) for name in ("ExecutionRole", "ServingRole")
      for place in ("TrainingJobs", f"Endpoints/{OWN}:log-stream:")],
    *[(name, "ecr:BatchGetImage", arn("ecr", f"repository/{OWN}"), {}) for name in ("ExecutionRole", "ServingRole")],
    *[(name, "ec2:CreateNetworkInterface", place, context) for name in ("ExecutionRole", "ServingRole")
      for place, context in [(arn("ec2", "network-interface/*"), {}),
                             (arn("ec2", "subnet/subnet-0b"), {"ec2:SubnetID": "subnet-0b"}),
                             (arn("ec2", "security-group/sg-0a"), {"ec2:SecurityGroupID": "sg-0a"})]],
    *[(name, "kms:Decrypt", KEY, THROUGH) for name in (PERSON, "ExecutionRole", "ServingRole", "PipelineRole")],
    (PERSON, "kms:GenerateDataKey", KEY, THROUGH), (PERSON, "kms:DescribeKey", KEY, {}),
    ("ServingRole", "kms:CreateGrant", KEY,
     {"kms:GrantIsForAWSResource": "true", "kms:ViaService": f"sagemaker.{REGION}.amazonaws.com"}),
    *[("PipelineRole", f"sagemaker:Create{kind}Job", sm(f"{kind.lower()}-job/{OWN}-1"), new(OWN) | IN_VPC)
      for kind in ("Training", "Processing")],
    ("PipelineRole", "sagemaker:AddTags", sm(f"training-job/{OWN}-1"), new(OWN, "CreateTrainingJob")),
    ("PipelineRole", "sagemaker:StopTrainingJob", sm(f"training-job/{OWN}-1"), tagged(OWN)),
    ("PipelineRole", "sagemaker:CreateModelPackage", sm(f"model-package/{OWN}/1"), {}),
    ("PipelineRole", "sagemaker:CreateModelPackage", sm(f"model-package-group/{OWN}"), {}),
    ("PipelineRole", "iam:PassRole", role(OWN, "ExecutionRole"), passed()),
    *[("SchedulerRole", "sagemaker:DeleteEndpoint", sm(f"endpoint/{OWN}{rest}"), tagged(OWN)) for rest in ("", "-eu")],
    *[("SchedulerRole", "application-autoscaling:DeregisterScalableTarget", SCALABLE, OF_SAGEMAKER | tags)
      for tags in (tagged(OWN), {})],
    ("SchedulerRole", "cloudwatch:DeleteAlarms", arn("cloudwatch", f"alarm:{OWN}-backlog"), tagged(OWN)),
]  # fmt: skip
OF_FULL: list[tuple[bool, Row]] = [
    (True, ("SchedulerRole", "sagemaker:CreateProcessingJob", sm(f"processing-job/{OWN}-monitor-1"),
            new(OWN) | IN_VPC)),
    (True, ("SchedulerRole", "sagemaker:AddTags", sm(f"processing-job/{OWN}-1"), new(OWN, "CreateProcessingJob"))),
    (True, ("SchedulerRole", "iam:PassRole", role(OWN, "ServingRole"), passed())),
    (True, ("SchedulerRole", "cloudwatch:DeleteDashboards", arn("cloudwatch", f"dashboard/{OWN}-monitor", ""), {})),
    (True, ("SchedulerRole", "sagemaker:StopTransformJob", sm(f"transform-job/{OWN}-1"), tagged(OWN))),
    (False, ("SchedulerRole", "sagemaker:StopTransformJob", sm(f"transform-job/{NEIGHBOUR}-1"), tagged(NEIGHBOUR))),
    *[(False, ("SchedulerRole", "sagemaker:CreateProcessingJob", sm(f"processing-job/{OWN}-1"), context))
      for context in (new(OWN), IN_VPC, new(NEIGHBOUR) | IN_VPC)],
    (False, ("SchedulerRole", "sagemaker:AddTags", sm(f"processing-job/{OWN}-1"), new(OWN))),
    (False, ("SchedulerRole", "iam:PassRole", role(OWN, "PipelineRole"), passed())),
    *[(False, (PERSON, f"sagemaker-mlflow:{action}", sm("mlflow-tracking-server/theirs"), tagged(NEIGHBOUR)))
      for action in ("CreateRun", "LogBatch", "SearchRuns")],
    (False, (PERSON, "sagemaker-mlflow:CreateRun", sm("mlflow-tracking-server/fraud"), {})),
    *[(False, (PERSON, "cloudwatch:DeleteDashboards", arn("cloudwatch", f"dashboard/{name}-monitor", ""), {}))
      for name in (LATER, "fraudster")],
    *[(False, (PERSON, f"sagemaker:{action}", sm(f"{kind}/{NEIGHBOUR}-1"), tagged(NEIGHBOUR)))
      for action, kind in [("StopTransformJob", "transform-job"), ("UpdateEndpointWeightsAndCapacities", "endpoint"),
                           ("StopHyperParameterTuningJob", "hyper-parameter-tuning-job")]],
    (False, ("TriggerRole", "sagemaker:StartPipelineExecution", sm(f"pipeline/{NEIGHBOUR}"), {})),
    (False, ("TriggerRole", "codebuild:StartBuild", arn("codebuild", f"project/{NEIGHBOUR}-deploy"), {})),
    (True, ("TriggerRole", "codebuild:StartBuild", arn("codebuild", f"project/{OWN}-deploy"), {})),
    (True, ("DeployRole", "logs:PutLogEvents", log(f"/aws/codebuild/{OWN}-deploy:log-stream:1"), {})),
    (False, ("DeployRole", "logs:PutLogEvents", log(f"/aws/codebuild/{OWN}-deploy-2:log-stream:1"), {})),
    # The job that nobody has approved trains; it puts nothing into service.
    *[(right, (name, f"sagemaker:{action}", sm(f"{kind}/{OWN}-1"), new(OWN) | tagged(OWN) | IN_VPC))
      for name, right in [("GitHubRole", False), ("GitHubDeployRole", True), ("DeployRole", True)]
      for action, kind in [("CreateEndpoint", "endpoint"), ("UpdateEndpoint", "endpoint"), ("CreateModel", "model"),
                           ("CreateEndpointConfig", "endpoint-config"), ("DeleteEndpoint", "endpoint"),
                           ("CreateTransformJob", "transform-job"), ("DeleteModel", "model"),
                           ("UpdateEndpointWeightsAndCapacities", "endpoint")]],
    *[(right, (name, "sagemaker:UpdateModelPackage", sm(f"model-package/{OWN}/1"), {}))
      for name, right in [("GitHubRole", False), ("GitHubDeployRole", True)]],
    (False, ("GitHubRole", "sagemaker:CreateModelPackage", sm(f"model-package/{OWN}/1"),
             {"sagemaker:ModelApprovalStatus": "Approved"})),
    *[(False, ("GitHubRole", "iam:PassRole", role(OWN, name), passed(service)))
      for name, service in [("ServingRole", "sagemaker"), ("SchedulerRole", "scheduler")]],
    *[(False, ("GitHubRole", f"scheduler:{action}", arn("scheduler", f"schedule/default/{OWN}-end"), {}))
      for action in ("CreateSchedule", "UpdateSchedule", "DeleteSchedule")],
    *[(True, ("GitHubRole", f"sagemaker:{action}", sm(f"pipeline/{OWN}"), {}))
      for action in ("CreatePipeline", "UpdatePipeline", "StartPipelineExecution")],
    (True, ("GitHubRole", "iam:PassRole", role(OWN, "PipelineRole"), passed())),
    (True, ("GitHubRole", "s3:PutObject", s3(OWN, "source/a/train.py"), {})),
    *[(True, (name, "kms:GenerateDataKey", KEY, THROUGH)) for name in ("GitHubRole", "GitHubDeployRole", "DeployRole")],
]  # fmt: skip


@functools.cache
def policies(name: str, project: str, values: tuple[tuple[str, str], ...] = ()) -> list[dict[str, Any]]:
    return of_principal(template(project, **dict(values)), name)


def of_principal(made: Template, name: str) -> list[dict[str, Any]]:
    """A role's policies; of a person both that the stack has for people."""
    names = PEOPLE if name == PERSON else (name,)
    return [policy for part in names for policy in made.policies(part)]


def may(row: Row, **more: str) -> bool:
    name, action, resource, context = row
    return allowed(policies(name, OWN, tuple((EVERY | VPC | more).items())), action, resource, context)


def test_nobody_reaches_another_project_or_more_than_he_needs() -> None:
    assert [row for row in STRANGERS if may(row)] == []


def test_everybody_may_do_what_he_needs() -> None:
    assert [row for row in OURS if not may(row)] == []


@full
def test_the_roles_of_the_largest_scope() -> None:
    tracking = any(item.get("Sid") == "Tracking" for item in verbs())
    assert [(right, row) for right, row in OF_FULL if may(row) != right] == []
    of_own = (PERSON, "sagemaker-mlflow:CreateRun", sm("mlflow-tracking-server/any"), tagged(OWN))
    assert may(of_own) == tracking


def verbs() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = stack.joined()["Resources"]["AroundPolicy"]["Properties"]["PolicyDocument"][
        "Statement"
    ]
    return found


NETWORKS = [
    (IN_VPC, True), ({"sagemaker:VpcSubnets": ["subnet-0a", "subnet-0b"],
                      "sagemaker:VpcSecurityGroupIds": ["sg-0a"]}, True),
    ({"sagemaker:VpcSubnets": ["subnet-0a", "subnet-1"], "sagemaker:VpcSecurityGroupIds": ["sg-0a"]}, False),
    (IN_VPC | {"sagemaker:VpcSecurityGroupIds": ["sg-1"]}, False), ({"sagemaker:VpcSubnets": ["subnet-0a"]}, False),
    ({"sagemaker:VpcSecurityGroupIds": ["sg-0a"]}, False), ({}, False),
]  # fmt: skip


@pytest.mark.parametrize(("network", "right"), NETWORKS)
def test_jobs_in_a_vpc_use_its_subnets_only(network: dict[str, list[str]], right: bool) -> None:
    principals = [PERSON, "PipelineRole"] + ["SchedulerRole"] * stack.AUTOMATION.exists()
    for name in principals:
        kinds = {PERSON: ["TrainingJob", "ProcessingJob", "Model"], "SchedulerRole": ["ProcessingJob"]}
        for kind in kinds.get(name, ["TrainingJob", "ProcessingJob"]):
            resource = sm(f"{re.sub('(?<=.)(?=[A-Z])', '-', kind).lower()}/{OWN}-1")
            asked = (name, f"sagemaker:Create{kind}", resource, new(OWN) | network)
            assert may(asked) == right, asked
            assert may(asked, UseVpc="false", Subnets="", SecurityGroups="")


@full
@pytest.mark.parametrize(
    ("subject", "roles"),
    [
        ("repo:octo/cats:ref:refs/heads/main", ["GitHubRole"]),
        ("repo:octo@1/cats@2:ref:refs/heads/main", ["GitHubRole"]),
        ("repo:octo/cats:environment:production", ["GitHubDeployRole"]),
        ("repo:octo@1/cats@2:environment:production", ["GitHubDeployRole"]),
        ("repo:octo/cats:environment:staging", []),
        ("repo:octo/cats:environment:production2", []),
        ("repo:octo/cats:pull_request", []),
        ("repo:octo/cats:ref:refs/heads/main2", []),
        ("repo:octo/cats2:environment:production", []),
        ("repo:evil/cats:environment:production", []),
    ],
)
def test_github_gives_each_job_one_role(subject: str, roles: list[str]) -> None:
    token = "token.actions.githubusercontent.com"
    context = {f"{token}:sub": subject, f"{token}:aud": "sts.amazonaws.com", f"{token}:ref": "refs/heads/main"}
    made, action, names = template(OWN, **EVERY), "sts:AssumeRoleWithWebIdentity", ("GitHubRole", "GitHubDeployRole")
    provider = arn("iam", f"oidc-provider/{token}", "")
    assert [name for name in names if made.trusts(name, provider, action, context)] == roles
    assert not any(made.trusts(name, f"{provider}.example.com", action, context) for name in names)
    for wrong in ({f"{token}:aud": "other"}, {f"{token}:ref": "refs/heads/other"}):
        assert not any(made.trusts(name, provider, action, context | wrong) for name in names)


def test_what_is_served_is_written_once_by_whoever() -> None:
    """The bucket's own policy, which holds for administrators too."""
    made = template(OWN)
    document = made.resolve(made.document["Resources"]["BucketPolicy"]["Properties"]["PolicyDocument"])
    anything = {"Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}

    def put(key: str, **context: str) -> bool:
        known = {"aws:SecureTransport": "true"} | {name.replace("_", ":", 1).replace("_", "-"): value
                                                   for name, value in context.items()}  # fmt: skip
        known = {"s3:ObjectCreationOperation" if "Creation" in name else name: value for name, value in known.items()}
        return allowed([document, anything], "s3:PutObject", s3(OWN, key), known)

    whole = {"s3_ObjectCreationOperation": "true"}
    assert not put("models/a/model.tar.gz", **whole)
    assert put("models/a/model.tar.gz", **whole, s3_if_none_match="*")
    assert put("models/a/model.tar.gz", s3_ObjectCreationOperation="false")  # a part, which makes no object
    assert put("jobs/a/output/model.tar.gz", **whole)


def test_long_names_have_their_short_one() -> None:
    """Jobs of a project of 28 characters or more are called by its first 19."""
    made = template("a" * 19 + "-and-more-of-it")
    resource = sm(f"training-job/{'a' * 19}-20261121")
    own = made.values["Project"]
    assert allowed(of_principal(made, PERSON), "sagemaker:CreateTrainingJob", resource, new(own))
    assert not allowed(of_principal(made, PERSON), "sagemaker:CreateTrainingJob", resource, new("a" * 19))


NAME = "image-classifier"  # of the project in golden files
KIND = re.compile("(Create|Delete|Describe|Stop|Update|Invoke)(.+?)(Async|WeightsAndCapacities)?")
JOB = ("TrainingJob", "ProcessingJob", "TransformJob", "HyperParameterTuningJob")
AS_IS = {  # of calls on the bucket and others: the permission and what it is on
    "HeadObject": "s3:GetObject", "GetObject": "s3:GetObject", "PutObject": "s3:PutObject",
    "DeleteObject": "s3:DeleteObject", "ListObjectsV2": "s3:ListBucket", "GetBucketLocation": "s3:GetBucketLocation",
    "DescribeImages": "ecr:DescribeImages", "GetMetricData": "cloudwatch:GetMetricData",
    "DescribeStacks": "cloudformation:DescribeStacks", "GetTemplate": "cloudformation:GetTemplate",
    "SimulatePrincipalPolicy": "iam:SimulatePrincipalPolicy", "GetRole": "iam:GetRole",
    "GetProducts": "pricing:GetProducts", "ListServiceQuotas": "servicequotas:ListServiceQuotas",
    "DescribeAlarms": "cloudwatch:DescribeAlarms", "ListDashboards": "cloudwatch:ListDashboards",
    "ListSchedules": "scheduler:ListSchedules", "DescribeScalableTargets":
    "application-autoscaling:DescribeScalableTargets", "GetAuthorizationToken": "ecr:GetAuthorizationToken",
}  # fmt: skip
PASSES = ("RoleArn", "ExecutionRoleArn")


def own(name: str) -> str:
    """Tests have things that are called otherwise; which one it is does not matter to who looks or removes."""
    return name if name.startswith(NAME) else f"{NAME}-{name.replace('/', '-')}"


def found(value: Any, *keys: str) -> list[Any]:
    """The values of keys, however deep in a request."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    here = [value[key] for key in keys if isinstance(value, dict) and key in value]
    return here + [item for part in inner for item in found(part, *keys)]


def needs(operation: str, asked: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """What IAM is asked for one request: permission, resource and context."""
    if operation in AS_IS:
        action = AS_IS[operation]
        where = {"s3": f"arn:aws:s3:::{STACK.bucket}{'/' + asked['Key'] if 'Key' in asked else ''}",
                 "ecr": arn("ecr", "repository/the-repository"),
                 "cloudformation": arn("cloudformation", f"stack/{NAME}/0a1b"), "iam": STACK.role}  # fmt: skip
        anywhere = action.split(":")[1].startswith("GetAuth") or action.split(":")[0] not in where
        return [(action, "*" if anywhere else where[action.split(":")[0]], {})]
    if "Tags" in asked and isinstance(asked["Tags"], list):
        tags = {tag["Key"]: tag["Value"] for tag in asked["Tags"]}
    else:
        tags = asked.get("Tags", {})
    context: dict[str, Any] = {f"aws:RequestTag/{key}": value for key, value in tags.items()}
    if operation.endswith(("Schedule", "Dashboard", "Dashboards", "Alarm", "Alarms")):
        return other(operation, asked, context)
    if operation in ("RegisterScalableTarget", "DeregisterScalableTarget", "PutScalingPolicy"):
        prefix = "application-autoscaling"
        asks = [(f"{prefix}:{operation}", SCALABLE, context | OF_SAGEMAKER)]
        return asks + ([(f"{prefix}:TagResource", SCALABLE, context)] if tags else [])
    if operation.startswith("List"):
        place = {"ListTags": sm(f"endpoint/{NAME}"), "ListPipelineExecutions": sm(f"pipeline/{NAME}"),
                 "ListPipelineExecutionSteps": sm(f"pipeline/{NAME}/execution/1"),
                 "ListTrainingJobsForHyperParameterTuningJob": sm(f"hyper-parameter-tuning-job/{NAME}-1")}  # fmt: skip
        return [(f"sagemaker:{operation}", place.get(operation, "*"), tagged(NAME) if operation in place else {})]
    return of_sagemaker(operation, asked, context)


def other(operation: str, asked: dict[str, Any], context: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Schedules, alarms and dashboards."""
    if operation.endswith("Schedule"):
        target = asked.get("Target", {}).get("RoleArn")
        asks = [(f"scheduler:{operation}", arn("scheduler", f"schedule/default/{own(asked['Name'])}"), context)]
        return asks + ([("iam:PassRole", target, passed("scheduler"))] if target else [])
    names = listed(asked.get("AlarmNames") or asked.get("DashboardNames") or
                   asked.get("AlarmName") or asked["DashboardName"])  # fmt: skip
    board = "Dashboard" in operation
    kind = "dashboard/" if board else "alarm:"
    asks = [(f"cloudwatch:{operation}", arn("cloudwatch", f"{kind}{own(name)}", "" if board else REGION), context)
            for name in names]  # fmt: skip
    return asks + [("cloudwatch:TagResource", where, context) for _, where, _ in asks if context]


def of_sagemaker(
    operation: str, asked: dict[str, Any], context: dict[str, Any]
) -> list[tuple[str, str, dict[str, Any]]]:
    """A request on one thing, with the roles that it hands on and the network that it asks for."""
    verb, kind, _ = (KIND.fullmatch(operation) or re.fullmatch("(Start)(PipelineExecution)()", operation) or
                     pytest.fail(f"{operation} is not in the table")).groups()  # fmt: skip
    word = re.sub("(?<=.)(?=[A-Z])", "-", kind).lower()
    name = str(asked.get(f"{kind}Name") or next(iter(asked.values())))
    if kind == "PipelineExecution":
        places = [sm(f"pipeline/{NAME}{'' if verb == 'Start' else '/execution/1'}")]
    elif kind == "Pipeline":  # a golden file of one has its definition only
        places = [sm(f"pipeline/{NAME}")]
    elif kind == "ModelPackage":
        places = [sm(f"model-package/{NAME}/1")] + [sm(f"model-package-group/{NAME}")] * (verb == "Create")
    elif verb == "Create":
        places = [sm(f"{word}/{name.replace('the-search', NAME)}")]
    else:
        places = [sm(f"{word}/{own(name)}")]
    if operation in ("CreateEndpoint", "UpdateEndpoint"):
        places.append(sm(f"endpoint-config/{own(asked['EndpointConfigName'])}"))
    for network in found(asked, "VpcConfig"):
        context |= {"sagemaker:VpcSubnets": network["Subnets"],
                    "sagemaker:VpcSecurityGroupIds": network["SecurityGroupIds"]}  # fmt: skip
    if verb != "Create":
        context = context | tagged(NAME)
    asks = [(f"sagemaker:{operation}", place, context) for place in places]
    if any(key.startswith("aws:RequestTag") for key in context):
        asks.append(("sagemaker:AddTags", places[0], context | {"sagemaker:TaggingAction": operation}))
    handed = [STACK.pipeline_role] if kind == "Pipeline" else found(asked, *PASSES)
    return asks + [("iam:PassRole", given, passed()) for given in handed]


def as_made(in_vpc: bool) -> Template:
    """The stack that golden files are of."""
    made = template(NAME, **(EVERY | (VPC if in_vpc else {})))
    made.arns = {**made.arns, "Bucket": f"arn:aws:s3:::{STACK.bucket}", "ExecutionRole": STACK.role,
                 "ServingRole": STACK.serving_role, "PipelineRole": STACK.pipeline_role,
                 "SchedulerRole": STACK.scheduler_role,
                 "ImageRepository": arn("ecr", "repository/the-repository")}  # fmt: skip
    return made


def asked_of(file: str) -> list[tuple[str, dict[str, Any]]]:
    calls = json.loads((GOLDEN / file).read_text(encoding="utf-8"))
    return [(operation, asked) for operation, asked in calls if operation != "GetCallerIdentity"]


BY_OTHERS = ("bootstrap", "recipe")  # an administrator; pages that name what they need
OF_A_PIPELINE = {"Processing": "CreateProcessingJob", "Training": "CreateTrainingJob",
                 "RegisterModel": "CreateModelPackage"}  # fmt: skip
VERBS = sorted(file.name for file in GOLDEN.glob("*.json") if not file.name.startswith(BY_OTHERS))


def refused_of(made: Template, name: str, asks: list[tuple[str, str, dict[str, Any]]]) -> list[Any]:
    policies = of_principal(made, name)
    return [ask for ask in asks if not allowed(policies, *ask)]


@full
@pytest.mark.parametrize("file", VERBS)
def test_every_request_of_the_verbs_is_allowed_to_who_makes_it(file: str) -> None:
    calls = asked_of(file)
    made = as_made(bool(found(calls, "VpcConfig")))
    for operation, asked in calls:
        assert refused_of(made, PERSON, needs(operation, dict(asked))) == [], operation
    if file.startswith(("deploy", "approve")):
        for operation, asked in calls:
            for name in ("GitHubDeployRole", "DeployRole"):
                assert refused_of(made, name, needs(operation, dict(asked))) == [], operation
    if file.startswith("pipeline"):
        for operation, asked in calls:
            if not operation.startswith("StopPipeline"):
                assert refused_of(made, "GitHubRole", needs(operation, dict(asked))) == [], operation


@full
@pytest.mark.parametrize("file", ["pipeline_default.json", "pipeline_everything.json"])
def test_the_steps_of_the_pipeline_are_allowed_to_its_role(file: str) -> None:
    calls = asked_of(file)
    made = as_made(bool(found(calls, "VpcConfig")))
    steps = [step for found_steps in found(calls, "Steps", "IfSteps", "ElseSteps") for step in found_steps]
    kinds = [step["Type"] for step in steps if step["Type"] in OF_A_PIPELINE]
    assert {*kinds} == {*OF_A_PIPELINE}
    for step in (step for step in steps if step["Type"] in OF_A_PIPELINE):
        operation, asked = OF_A_PIPELINE[step["Type"]], dict(step["Arguments"])
        named = [value for key, value in asked.items() if key in ("ProcessingJobName", "TrainingJobName")]
        assert all(name.startswith(NAME) for name in named)
        asked = {key: f"{value}-1" if value in named else value for key, value in asked.items() if value is not None}
        assert refused_of(made, "PipelineRole", needs(operation, asked)) == [], step["Name"]


@full
def test_what_schedules_do_is_allowed_to_their_role() -> None:
    done = 0
    for file in VERBS:
        scales = any(operation == "RegisterScalableTarget" for operation, _ in asked_of(file))
        for operation, asked in asked_of(file):
            if operation in ("CreateSchedule", "UpdateSchedule"):
                word = asked["Target"]["Arn"].rpartition(":")[2]
                given = asked["Target"]["Input"]
                given = json.loads(given) if isinstance(given, str) else dict(given)
                made = as_made(bool(found(given, "VpcConfig")))
                asks = needs(f"{word[0].upper()}{word[1:]}", given)
                if word == "deleteEndpoint" and scales:  # AWS deregisters in the name of who deletes
                    asks += needs("DeregisterScalableTarget", {})
                assert refused_of(made, "SchedulerRole", asks) == [], word
                done += 1
    assert done > 5


def test_every_upload_of_what_is_served_replaces_nothing() -> None:
    """Or the bucket's policy would refuse it, as the table above says."""
    puts = [asked for file in VERBS for operation, asked in asked_of(file) if operation == "PutObject"]
    models = [asked for asked in puts if asked["Key"].startswith("models/")]
    assert models
    assert {asked.get("IfNoneMatch") for asked in models} == {"*"}


def test_policies_fit() -> None:
    """A managed policy has at most 6,144 characters without blanks, all of a role's own together 10,240."""
    longest = {"AWS::Region": "ap-southeast-1", "AWS::Partition": "aws-us-gov", "AWS::URLSuffix": "amazonaws.com.cn"}
    subnets = ",".join(f"subnet-0123456789abcdef{number}" for number in range(4))
    network = {"UseVpc": "true", "Subnets": subnets, "SecurityGroups": "sg-0123456789abcdef0"}
    made = template("p" * 30, **(EVERY | network | longest))
    sizes = {name: len(re.sub(r"\s", "", json.dumps(made.policies(name)[0]))) for name in (*PEOPLE, "KeyPolicy")}
    assert max(sizes.values()) < 6144, sizes
    for name in ROLES:
        own = made.document["Resources"].get(name, {"Properties": {}})["Properties"].get("Policies", [])
        assert sum(len(re.sub(r"\s", "", json.dumps(made.resolve(policy)))) for policy in own) < 10_240
