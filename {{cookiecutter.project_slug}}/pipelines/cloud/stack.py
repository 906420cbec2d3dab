"""The project's CloudFormation stack: what it is made of, plan a change, wait for it, say why it failed, remove it."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
from typing import Any

import yaml

from pipelines import ROOT, project
from pipelines.cloud.account import Account, pages, unless_missing, until
from pipelines.config import Settings
from pipelines.terminal import UserError

TEMPLATE = ROOT / "infrastructure" / "stack.yaml"
GITHUB = "token.actions.githubusercontent.com"
REGISTRY = re.compile(r"(\d{12})\.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?/([^:@]+)")
BUDGET_REGIONS = ["ap-northeast-1", "ap-northeast-2", "ap-south-1", "ap-southeast-1", "ap-southeast-2", "ca-central-1",
                  "eu-central-1", "eu-west-1", "eu-west-2", "eu-west-3", "me-south-1", "sa-east-1", "us-east-1",
                  "us-east-2", "us-west-1", "us-west-2"]  # where CloudFormation has budgets in dollars  # fmt: skip
PAUSE = 5.0  # seconds between looks at a stack that changes
LEFTOVER = ("REVIEW_IN_PROGRESS", "CREATE_FAILED", "ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "DELETE_FAILED")


def bucket_name(settings: Settings, number: str) -> str:
    """The project's bucket; its name is unique because an account's number is."""
    return f"{project.name()}-{number}-{settings.aws.region}"


def template(settings: Settings, number: str) -> str:
    """The template as it is sent, with literal names for what survives the stack."""
    document = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    resources = document["Resources"]
    resources["Bucket"]["Properties"]["BucketName"] = bucket_name(settings, number)
    resources["ImageRepository"]["Properties"]["RepositoryName"] = project.name()
    if settings.aws.region not in BUDGET_REGIONS:  # an unknown type is refused even when its condition is false
        del resources["Budget"], document["Conditions"]["HasBudget"], document["Parameters"]["MonthlyUsd"]
    if not settings.pipeline.deploy_on_approval:
        del resources["Deployment"]
    return json.dumps(document)


def parameters(account: Account, identity: str, current: dict[str, str]) -> dict[str, str]:
    """Values of the template's parameters.

    Args:
        account: to work in.
        identity: ARN of the caller, for the partition.
        current: those of the stack as it is.
    """
    settings = account.settings
    found = {
        "Project": project.name(),
        "ShortProject": project.tuning_prefix(),
        "UseVpc": str(bool(settings.aws.subnets)).lower(),
    }
    found["RemoteDebug"] = str(settings.compute.remote_debug).lower()
    found["Email"] = "" if settings.aws.email == "none" else settings.aws.email
    if settings.aws.region in BUDGET_REGIONS:
        found["MonthlyUsd"] = f"{settings.aws.monthly_usd:g}"
    found["KmsKey"] = ""
    if settings.aws.kms_key != "none":  # a policy needs the key itself, not an alias
        described = account.client("kms").describe_key(KeyId=settings.aws.kms_key)
        found["KmsKey"] = described["KeyMetadata"]["Arn"]
    images = filter(None, map(REGISTRY.match, (settings.images.training, settings.images.serving)))
    repositories = {f"arn:{identity.split(':')[1]}:ecr:{i[2]}:{i[1]}:repository/{i[3]}" for i in images}
    found["MoreRepositories"] = ",".join(sorted(repositories))
    repository, subjects, branch = _parsed(_github(settings))
    found |= {"GitHubRepository": repository, "GitHubSubjects": subjects, "GitHubBranch": branch}
    found["CreateGitHubProvider"] = "false"
    chosen = settings.pipeline
    if chosen.deploy_on_approval and not repository:
        raise UserError("pipeline.deploy_on_approval needs the repository to deploy from; set aws.github to owner/name")
    found["DeployOnApproval"] = str(chosen.deploy_on_approval).lower()
    asked = {"PipelineSchedule": chosen.schedule, "Watch": chosen.watch, "Connection": chosen.connection}
    found |= {name: "" if value == "none" else value for name, value in asked.items()}
    if repository:
        owned = current.get("GitHubRepository") and current.get("CreateGitHubProvider") == "true"
        listed = account.client("iam").list_open_id_connect_providers()["OpenIDConnectProviderList"]
        taken = any(provider["Arn"].endswith(f"/{GITHUB}") for provider in listed)
        found["CreateGitHubProvider"] = "true" if owned or not taken else "false"
    return found


def _github(settings: Settings) -> str:
    if settings.aws.github != "auto":
        return settings.aws.github.removeprefix("none")
    command = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
    origin = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    match = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(\.git)?/?$", origin)
    if match is None:
        raise UserError(f"aws.github is auto, but git's origin is {origin or 'not set'!r}, not on github.com; "
                        "write owner/name, or none")  # fmt: skip
    return match[1]


def _parsed(github: str) -> tuple[str, str, str]:
    """Repository, the two names that GitHub's tokens may give it, and branch.

    In tokens of repositories made after July 2026 the numbers of owner and repository follow their names. Where they
    are not known any will do: owner and name still have to agree.
    """
    owner, _, rest = github.partition("/")
    owner, _, number = owner.partition("@")
    name, *more = rest.split("@")
    repository, branch = f"{owner}/{name}" if owner else "", more[-1] if len(more) > bool(number) else "main"
    numbered = f"{owner}@{number}/{name}@{more[0]}" if number else f"{owner}@*/{name}@*"
    names = [numbered if number else repository, numbered] if owner else ["", ""]
    return repository, ",".join(names), branch


def find(cloud: Any, name: str) -> dict[str, Any] | None:
    """The stack as CloudFormation describes it, or None."""
    found = unless_missing(cloud.describe_stacks, StackName=name)
    return found and dict(found["Stacks"][0])


def usable(cloud: Any, name: str) -> dict[str, Any] | None:
    """The stack to update, or None when it is to be made; what an interrupted attempt left is removed."""
    found = find(cloud, name)
    if found is None:
        return None
    status = found["StackStatus"]
    if status in LEFTOVER:
        print(f"removing what an earlier attempt left of the stack {name} ({status})", flush=True)
        remove(cloud, found["StackId"])
        return None
    if status.endswith("IN_PROGRESS"):
        raise UserError(f"the stack {name} is being changed just now ({status}); try again in a few minutes")
    if status.endswith("FAILED"):
        raise UserError(f"the stack {name} is stuck ({status}): {first_failure(cloud, found['StackId'])}; mend that "
                        f"and run `aws cloudformation continue-update-rollback --stack-name {name}`")  # fmt: skip
    return found


def settle(cloud: Any, stack: str, doing: str) -> str:
    """Wait until nothing changes any more, with a line whenever something has; gives the stack's status."""

    def look(_: object) -> tuple[str | None, str]:
        status: str = cloud.describe_stacks(StackName=stack)["Stacks"][0]["StackStatus"]
        resources = cloud.describe_stack_resources(StackName=stack)["StackResources"]
        done = sum(not resource["ResourceStatus"].endswith("IN_PROGRESS") for resource in resources)
        line = f"{doing}: {status.lower().replace('_', ' ')}, {done} of {len(resources)} resources"
        return None if status.endswith("IN_PROGRESS") else status, line

    stopped = "interrupted, but AWS goes on; the same command later shows how it went"
    return until("CloudFormation", PAUSE, look, stopped=stopped)


def first_failure(cloud: Any, stack: str) -> str:
    """Why the last operation failed: the resource that failed first, not those that were cancelled because of it."""
    events = pages(cloud, "describe_stack_events", "StackEvents", StackName=stack)  # newest first
    last = itertools.takewhile(lambda event: event.get("ResourceStatusReason") != "User Initiated", events)
    failed = [event for event in last if event["ResourceStatus"].endswith("_FAILED")]
    reasons = [event for event in failed if "cancelled" not in event.get("ResourceStatusReason", "").lower()]
    if not reasons:
        return "CloudFormation gives no reason"
    event = reasons[-1]
    reason = " ".join(event.get("ResourceStatusReason", "no reason given").split()).rstrip(".")
    return f"{event['LogicalResourceId']} ({event['ResourceType']}): {reason}"


def remove(cloud: Any, stack: str) -> None:
    """Delete a stack and wait for it.

    Raises:
        UserError: with the resource that cannot be deleted.
    """
    cloud.delete_stack(StackName=stack)
    if settle(cloud, stack, "removing") != "DELETE_COMPLETE":
        raise UserError(f"the stack {stack} cannot be removed: {first_failure(cloud, stack)}; mend that and run the "
                        "same command again")  # fmt: skip


def changes(cloud: Any, change_set: str) -> list[str]:
    """CloudFormation's plan, a line a resource; none when there is nothing to do."""

    def look(_: object) -> tuple[dict[str, Any] | None, str]:
        plan = cloud.describe_change_set(ChangeSetName=change_set)
        return None if plan["Status"] in ("CREATE_PENDING", "CREATE_IN_PROGRESS") else plan, ""

    plan = until("CloudFormation's plan", PAUSE, look)
    reason = plan.get("StatusReason", "")
    if plan["Status"] == "FAILED" and ("didn't contain changes" in reason or "No updates" in reason):
        return []
    if plan["Status"] != "CREATE_COMPLETE":
        raise UserError(f"CloudFormation cannot make this stack: {reason or plan['Status']}")
    lines = []
    for change in (item["ResourceChange"] for item in plan["Changes"]):
        replaced = change.get("Replacement") == "True"
        lines.append(f"  {'Replace' if replaced else change['Action']:8}{change['ResourceType']:28}"
                     f"{change['LogicalResourceId']}")  # fmt: skip
    return lines or ["  settings of the stack only"]


def discard(cloud: Any, change_set: str, stack: str | None) -> None:
    """Take back a plan, and the empty stack that CloudFormation made to hold it (if it cannot, `usable` will)."""
    from botocore.exceptions import ClientError

    with contextlib.suppress(ClientError):
        cloud.delete_change_set(ChangeSetName=change_set)
        if stack:
            cloud.delete_stack(StackName=stack)


def finish(cloud: Any, stack: str, name: str, new: bool) -> None:
    """Wait for a stack that is made or updated.

    Raises:
        UserError: with the first failure; nothing half-made is left.
    """
    status = settle(cloud, stack, "making" if new else "updating")
    if status in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
        return
    reason = first_failure(cloud, stack)
    if not new:
        raise UserError(f"the stack {name} was not changed ({status}): {reason}; mend that and run it again")
    remove(cloud, stack)
    raise UserError(f"the stack {name} could not be made: {reason}; what there was of it is removed (an empty bucket "
                    "or repository stays for the next attempt); mend that and run it again")  # fmt: skip
