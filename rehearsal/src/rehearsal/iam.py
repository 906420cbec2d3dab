"""Who may do what: every request is held against the policies of who asks, as IAM evaluates them.

The owner may do all. So may the user `person`, until policies are attached to it: then it may do what these allow. A
role may do what its policies allow, and whoever hands one on needs iam:PassRole; SageMaker takes only one that trusts
it. For the resources of each action:
https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazonsagemaker.html
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
from typing import Any
from urllib.parse import unquote

from botocore.exceptions import BotoCoreError, ClientError
from moto.core.common_models import CloudFormationModel
from moto.iam.access_control import PermissionResult
from moto.s3.models import FakeBucket, s3_backends

from rehearsal.operations import Account, Answer, Call, after, before, refuse
from rehearsal.policies import Context, UnknownError, allowed, listed

Need = tuple[str, str, Context]  # action, resource, what conditions know
PREFIX = {"service-quotas": "servicequotas", "resourcegroupstaggingapi": "tag", "sagemaker-runtime": "sagemaker",
          "sagemaker-metrics": "sagemaker"}  # fmt: skip
S3_ACTIONS = {
    "HeadObject": "GetObject", "CreateMultipartUpload": "PutObject", "UploadPart": "PutObject",
    "CopyObject": "PutObject", "CompleteMultipartUpload": "PutObject", "HeadBucket": "ListBucket",
    "ListObjects": "ListBucket", "ListObjectsV2": "ListBucket", "ListObjectVersions": "ListBucketVersions",
    "ListBuckets": "ListAllMyBuckets",
    "DeleteObjects": "DeleteObject", "GetBucketLifecycleConfiguration": "GetLifecycleConfiguration",
}  # fmt: skip
KIND = re.compile(r"(?:Create|Delete|Describe|Stop|Start|Update|Invoke|List)(.+?)(?:Async|WeightsAndCapacities)?")
ROLES = ("RoleArn", "ExecutionRoleArn")
MOTOS = re.compile(r":pipeline/")  # whose tags moto keeps
NAMED = ("StackName", "TopicArn", "KeyId", "PolicySourceArn", "PolicyArn")  # members that name a resource
ANYBODY = ("sts:GetCallerIdentity",)
ALL = {"Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
XML = ("s3", "iam", "sns", "cloudwatch", "cloudformation", "sts")
# Moto 5.2.5 holds requests against a bucket's policy as well, without its conditions; here `check` does that.
FakeBucket.get_permission = lambda *_: PermissionResult.PERMITTED  # type: ignore[method-assign]


class BucketPolicy(CloudFormationModel):
    """A bucket's policy in a stack, which moto's CloudFormation leaves out."""

    physical_resource_id = ""

    @staticmethod
    def cloudformation_name_type() -> str:
        """It has no name."""
        return ""

    @staticmethod
    def cloudformation_type() -> str:
        """What a template calls it."""
        return "AWS::S3::BucketPolicy"

    @classmethod
    def create_from_cloudformation_json(cls, *given: Any, **_: Any) -> BucketPolicy:
        """Put it onto its bucket; `given` is a name, the resource and the account."""
        made, properties = cls(), given[1]["Properties"]
        made.physical_resource_id = properties["Bucket"]
        policy = json.dumps(properties["PolicyDocument"]).encode()
        s3_backends[given[2]]["aws"].put_bucket_policy(made.physical_resource_id, policy)
        return made

    @classmethod
    def update_from_cloudformation_json(cls, *_: Any, **given: Any) -> BucketPolicy:
        """Another one takes its place."""
        return cls.create_from_cloudformation_json("", given["cloudformation_json"], given["account_id"])

    @classmethod
    def delete_from_cloudformation_json(cls, *given: Any, **_: Any) -> None:
        """The bucket has none any more, where it is there."""
        with contextlib.suppress(Exception):
            s3_backends[given[2]]["aws"].delete_bucket_policy(given[0])


@before
def check(account: Account, call: Call) -> None:
    """Refuse what the principal may not do, as the service says it."""
    if not call.operation or not call.principal or call.principal.endswith(":root"):
        return
    if not call.principal.startswith("arn:"):
        raise refuse("UnrecognizedClientException", "The security token included in the request is invalid.", 403)
    try:
        found = policies(account, call.principal)
        known = [ALL] if found is None else found
        for action, resource, context in needs(account, call) if known != [ALL] or call.service == "s3" else []:
            own = [*known, *_of_bucket(account, resource)] if action.startswith("s3:") else known
            if action not in ANYBODY and not allowed(own, action, resource, context, call.principal):
                code, status = ("AccessDenied", 403) if call.service in XML else ("AccessDeniedException", 400)
                said = f"User: {call.principal} is not authorized to perform: {action} on resource: {resource}"
                raise refuse(code, f"{said} because no identity-based policy allows the {action} action", status)
        if call.service == "sagemaker" and call.operation.startswith(("Create", "Update")):
            for role in _roles(call.request):
                _trusted(account, role)
    except UnknownError as error:
        raise refuse("InternalFailure", f"the rehearsal's IAM does not know {error}", 500) from error


@after
def changed(account: Account, call: Call, _: Answer) -> None:
    """What was said before may not hold any more."""
    if call.service in ("iam", "cloudformation") or "BucketPolicy" in call.operation:
        _kept(account).clear()


def _kept(account: Account) -> dict[str, Any]:
    """What IAM and S3 have said, until somebody changes it."""
    if "iam" not in account.things:
        account.things["iam"] = {}
        with contextlib.suppress(ClientError):
            account.client("iam").create_user(UserName="person")
    return account.things["iam"]


def policies(account: Account, principal: str) -> list[dict[str, Any]] | None:
    """Those of a user or role; None of a user that has none, and may do all."""
    kept, iam = _kept(account), account.client("iam")
    if principal in kept:
        found: list[dict[str, Any]] | None = kept[principal]
        return found
    kind, name = principal.split(":")[5].split("/")[0], principal.rpartition("/")[2]
    key = {f"{kind.capitalize()}Name": name}
    try:
        made = []
        for policy in getattr(iam, f"list_{kind}_policies")(**key)["PolicyNames"]:
            made.append(getattr(iam, f"get_{kind}_policy")(**key, PolicyName=policy)["PolicyDocument"])
        for policy in getattr(iam, f"list_attached_{kind}_policies")(**key)["AttachedPolicies"]:
            version = iam.get_policy(PolicyArn=policy["PolicyArn"])["Policy"]["DefaultVersionId"]
            document = iam.get_policy_version(PolicyArn=policy["PolicyArn"], VersionId=version)
            made.append(document["PolicyVersion"]["Document"])
    except ClientError:  # there is no such role
        return []
    kept[principal] = found = None if kind == "user" and not made else [_read(document) for document in made]
    return found


def _read(document: Any) -> dict[str, Any]:
    if isinstance(document, str):
        text = unquote(document) if document.startswith("%") else document
        # Of roles that a stack makes, moto 5.2.5 answers with Python's way to write a policy.
        document = ast.literal_eval(text) if text.startswith("{'") else json.loads(text)
    # Where a stack's condition leaves a statement out, moto 5.2.5 keeps an empty one.
    return dict(document) | {"Statement": [part for part in listed(document["Statement"]) if part]}


def _of_bucket(account: Account, resource: str) -> list[dict[str, Any]]:
    bucket, kept = resource.partition(":::")[2].partition("/")[0], _kept(account)
    if f"s3:{bucket}" not in kept:
        kept[f"s3:{bucket}"] = []
        with contextlib.suppress(ClientError):
            policy = account.client("s3").get_bucket_policy(Bucket=bucket)["Policy"]
            kept[f"s3:{bucket}"] = [json.loads(policy)]
    return list(kept[f"s3:{bucket}"])


def _roles(value: Any) -> list[str]:
    """The roles that a request hands on, however deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    here = [value[key] for key in ROLES if isinstance(value, dict) and isinstance(value.get(key), str)]
    return here + [item for part in inner for item in _roles(part)]


def _trusted(account: Account, role: str, service: str = "sagemaker.amazonaws.com") -> None:
    document: dict[str, Any] = {"Statement": []}
    with contextlib.suppress(ClientError):
        found = account.client("iam").get_role(RoleName=role.rpartition("/")[2])["Role"]
        document = _read(found["AssumeRolePolicyDocument"])
    context = {"aws:SourceAccount": account.number, "aws:SourceArn": account.arn("job", "any")}
    if not allowed([document], "sts:AssumeRole", role, context, service):
        raise refuse("ValidationException", f"Could not assume role {role}. Please ensure that the role exists and "
                     f"allows principal '{service}' to assume the role.")  # fmt: skip


def needs(account: Account, call: Call) -> list[Need]:
    """What IAM is asked for one request: permission, resource and context."""
    service, name, asked = PREFIX.get(call.service, call.service), call.operation, call.request
    tags = _tags(asked.get("Tags"))
    context: Context = {f"aws:RequestTag/{key}": value for key, value in tags.items()}

    def arn(rest: str, of: str = service, region: str = account.region) -> str:
        return f"arn:aws:{of}:{region}:{account.number}:{rest}"

    if service == "s3":
        return _of_s3(call)
    if service == "sagemaker":
        return _of_sagemaker(account, name, asked, context)
    if service == "logs" and "logGroupName" in asked:
        stream = asked.get("logStreamName", "") if name.endswith(("LogEvents", "LogStream")) else ""
        return [(f"logs:{name}", arn(f"log-group:{asked['logGroupName']}:log-stream:{stream}"), context)]
    if service == "ecr" and asked.get("repositoryName"):
        return [(f"ecr:{name}", arn(f"repository/{asked['repositoryName']}"), context)]
    if service == "scheduler" and "Name" in asked:
        where = arn(f"schedule/{asked.get('GroupName', 'default')}/{asked['Name']}")
        passed = [("iam:PassRole", role, {"iam:PassedToService": "scheduler.amazonaws.com"}) for role in _roles(asked)]
        return [(f"scheduler:{name}", where, context), *passed]
    if service == "application-autoscaling" and not name.startswith("Describe"):
        known = context | {"application-autoscaling:service-namespace": asked.get("ServiceNamespace", "")}
        where = arn("scalable-target/0a1b")
        return [(f"{service}:{name}", where, known)] + ([(f"{service}:TagResource", where, context)] if tags else [])
    if service == "cloudwatch":
        if name == "PutMetricData":
            return [("cloudwatch:PutMetricData", "*", {"cloudwatch:namespace": asked.get("Namespace", "")})]
        plain = listed(asked.get("AlarmNames") or asked.get("AlarmName") or [])
        boards = listed(asked.get("DashboardNames") or asked.get("DashboardName") or [])
        flat = [value for key, value in asked.items() if re.fullmatch(r"AlarmNames\.member\.\d+", key)]
        boards += [value for key, value in asked.items() if re.fullmatch(r"DashboardNames\.member\.\d+", key)]
        places = [arn(f"alarm:{alarm}") for alarm in [*plain, *flat]] + [
            arn(f"dashboard/{board}", region="") for board in boards
        ]
        if places and name.startswith(("Put", "Delete")):
            found = [(f"cloudwatch:{name}", place, context) for place in places]
            return found + [("cloudwatch:TagResource", place, context) for place in places if tags]
    where = next((str(asked[key]) for key in NAMED if asked.get(key)), "*")
    if service == "cloudformation" and "StackName" in asked and not where.startswith("arn:"):
        where = arn(f"stack/{where}/0a1b")
    if service == "iam" and "RoleName" in asked:
        where = arn(f"role/{asked['RoleName']}", region="")
    return [(f"{service}:{name}", where if where.startswith("arn:") else "*", context)]


def _tags(tags: Any) -> dict[str, str]:
    if isinstance(tags, dict):
        return dict(tags)
    return {tag.get("Key", tag.get("key")): tag.get("Value", tag.get("value")) for tag in tags or []}


def _of_s3(call: Call) -> list[Need]:
    asked, name = call.request, call.operation
    bucket = f"arn:aws:s3:::{asked.get('Bucket', '')}"
    action = f"s3:{S3_ACTIONS.get(name, name)}"
    context: Context = {"aws:SecureTransport": "true"}  # which on the way to AWS it would be
    if action == "s3:PutObject":
        context["s3:ObjectCreationOperation"] = str(name not in ("UploadPart", "CreateMultipartUpload")).lower()
        if "if-none-match" in call.headers:
            context["s3:if-none-match"] = call.headers["if-none-match"]
    if name == "DeleteObjects":
        keys = re.findall(rb"<Key>(.*?)</Key>", call.raw)
        word = "s3:DeleteObjectVersion" if b"<VersionId>" in call.raw else "s3:DeleteObject"
        return [(word, f"{bucket}/{key.decode()}", context) for key in keys]
    if asked.get("VersionId") and action in ("s3:GetObject", "s3:DeleteObject"):
        action += "Version"
    found = [(action, f"{bucket}/{asked['Key']}" if asked.get("Key") else bucket, context)]
    if source := asked.get("CopySource"):
        found.append(("s3:GetObject", f"arn:aws:s3:::{unquote(str(source)).lstrip('/').partition('?')[0]}", context))
    return found if asked.get("Bucket") else [(action, "*", context)]


def _of_sagemaker(account: Account, name: str, asked: dict[str, Any], context: Context) -> list[Need]:
    match = KIND.fullmatch(name)
    word = match[1] if match else ""
    kind = re.sub("(?<=.)(?=[A-Z])", "-", word).lower()
    given = asked.get(f"{word}Name") or asked.get(f"{word}Arn") or asked.get("ResourceArn")
    special = {
        "StartPipelineExecution": f"pipeline/{asked.get('PipelineName')}",
        "ListPipelineExecutions": f"pipeline/{asked.get('PipelineName')}",
        "ListPipelineExecutionSteps": asked.get("PipelineExecutionArn"),
        "ListTrainingJobsForHyperParameterTuningJob":
            f"hyper-parameter-tuning-job/{asked.get('HyperParameterTuningJobName')}",
        "CreateModelPackage": f"model-package/{asked.get('ModelPackageGroupName')}/1",
        "PutModelPackageGroupPolicy": f"model-package-group/{asked.get('ModelPackageGroupName')}",
    }.get(name)  # fmt: skip
    place = str(special or (given if str(given).startswith("arn:") else f"{kind}/{given}" if given else "*"))
    resource = place if place == "*" or place.startswith("arn:") else account.arn(*place.split("/", 1))
    if not name.startswith("Create"):
        context = context | {f"{prefix}:ResourceTag/{key}": value for prefix in ("aws", "sagemaker")
                             for key, value in _known_tags(account, resource).items()}  # fmt: skip
    network = asked.get("VpcConfig") or (asked.get("NetworkConfig") or {}).get("VpcConfig") or {}
    if network:
        context = context | {"sagemaker:VpcSubnets": network["Subnets"],
                             "sagemaker:VpcSecurityGroupIds": network["SecurityGroupIds"]}  # fmt: skip
    if status := asked.get("ModelApprovalStatus"):
        context = context | {"sagemaker:ModelApprovalStatus": status}
    found: list[Need] = [(f"sagemaker:{name}", resource, context)]
    if name in ("CreateEndpoint", "UpdateEndpoint"):
        config = account.arn("endpoint-config", asked.get("EndpointConfigName", ""))
        tags = {f"aws:ResourceTag/{key}": value for key, value in _known_tags(account, config).items()}
        found.append((f"sagemaker:{name}", config, context | tags))
    if name.startswith("Create") and asked.get("Tags"):
        found.append(("sagemaker:AddTags", resource, context | {"sagemaker:TaggingAction": name}))
    passed = {"iam:PassedToService": "sagemaker.amazonaws.com"}
    return found + [("iam:PassRole", role, passed) for role in _roles(asked)]


def _known_tags(account: Account, arn: str) -> dict[str, str]:
    """The tags of a thing; of what is not there AWS knows none."""
    if arn in account.tags or not MOTOS.search(arn):
        return _tags(account.tags.get(arn))
    with contextlib.suppress(ClientError, BotoCoreError):
        return _tags(account.client("sagemaker").list_tags(ResourceArn=arn)["Tags"])
    return {}
