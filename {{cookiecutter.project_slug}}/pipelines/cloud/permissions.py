"""Whether IAM allows what the stack in `infrastructure/` says that jobs and verbs need."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines import project
from pipelines.cloud.account import Account, pages
from pipelines.cloud.stack import joined

KINDS = re.compile(
    r"TrainingJob|ProcessingJob|TransformJob|HyperParameterTuningJob|EndpointConfig|Endpoint|Model(?:PackageGroup|Package)?|Pipeline"
)


@dataclass(frozen=True)
class Need:
    """Actions on one thing, with the context that a policy may ask for."""

    actions: list[str]
    resource: str
    context: list[dict[str, Any]]


def refused(account: Account, principal: str, needs: Iterator[Need]) -> list[str]:
    """Actions that IAM's simulator does not allow a user or role."""
    iam, found = account.client("iam"), list[str]()
    for need in needs:
        results = pages(
            iam, "simulate_principal_policy", "EvaluationResults", PolicySourceArn=principal, ActionNames=need.actions,
            ResourceArns=[need.resource], ContextEntries=need.context,
        )  # fmt: skip
        found += [result["EvalActionName"] for result in results if result["EvalDecision"] != "allowed"]
    return found


def needs(account: Account, number: str, owner: str) -> Iterator[Need]:
    """What the template gives an owner: `ExecutionRole` to jobs, `VerbsPolicy` and `AroundPolicy` to people.

    Statements that depend on another setting than `aws.kms_key` are left out.
    """
    stack, region, own = account.stack(), account.region, project.name()
    partition = stack.partition
    values = {
        "AWS::Partition": partition, "AWS::Region": region, "AWS::AccountId": number, "AWS::StackName": own,
        "AWS::URLSuffix": "amazonaws.com.cn" if partition == "aws-cn" else "amazonaws.com", "Project": own,
        "Bucket.Arn": f"arn:{partition}:s3:::{stack.bucket}", "ExecutionRole.Arn": stack.role,
        "SchedulerRole.Arn": stack.scheduler_role, "PipelineRole.Arn": stack.pipeline_role,
        "ServingRole.Arn": stack.serving_role, "ShortProject": project.tuning_prefix(),
        "KmsKey": account.kms_arn() or "",
        "Subnets": next(iter(account.settings.aws.subnets), ""),
        "SecurityGroups": next(iter(account.settings.aws.security_groups), ""),
        "ImageRepository.Arn": f"arn:{partition}:ecr:{region}:{number}:repository/{stack.repository.split('/')[-1]}",
    }  # fmt: skip

    def concrete(value: Any) -> str:
        """One example of what a pattern stands for; of two, the first."""
        if isinstance(value, dict) and "Fn::If" in value:
            value = value["Fn::If"][1]
        if isinstance(value, dict) and "Fn::GetAtt" in value:
            return values[".".join(value["Fn::GetAtt"])]
        if isinstance(value, dict) and "Ref" in value:
            return values[value["Ref"]]
        text = value["Fn::Sub"] if isinstance(value, dict) else value
        text = re.sub(r"\$\{(.+?)\}", lambda name: values[name[1]], text)
        return str(text) if text == "*" else str(text.replace("*", "x"))

    document = joined()["Resources"][owner]["Properties"]
    policies = document.get("Policies", [document])
    for statement in (entry for policy in policies for entry in policy["PolicyDocument"]["Statement"]):
        if "Action" not in statement or ("Fn::If" in statement["Resource"] and not values["KmsKey"]):
            continue
        actions, resources = _list(statement["Action"]), _list(statement["Resource"])
        condition = statement.get("Condition", {})
        if "Fn::If" in condition:
            condition = condition["Fn::If"][1 if account.settings.aws.subnets else 2]
        wanted = {key: concrete(_list(value)[0]) for test in condition.values() for key, value in test.items()}
        context = [
            {"ContextKeyName": key, "ContextKeyType": f"string{'List' * key.startswith('sagemaker:Vpc')}",
             "ContextKeyValues": [value]}
            for key, value in wanted.items()
        ]  # fmt: skip
        named = [concrete(resource) for resource in resources]
        if ":sagemaker:" in named[0] and not named[0].endswith("server/x"):
            for kind in sorted({_kind(action) for action in actions}):  # each action has a kind of thing of its own
                resource = next(name for name in named if f":{kind}/" in name or ":x/" in name)
                yield Need([a for a in actions if _kind(a) == kind], resource.replace(":x/", f":{kind}/"), context)
        else:
            yield Need(actions, named[0], context)


def _kind(action: str) -> str:
    """CreateTrainingJob acts on a training-job."""
    found = KINDS.search(action)
    return re.sub(r"(?<=.)([A-Z])", r"-\1", found[0] if found else "TrainingJob").lower()


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
