"""The project's CloudFormation stack: what it is made of, plan a change, wait for it, say why it failed, remove it."""

from __future__ import annotations

import contextlib
import functools
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
from progress import plain

TEMPLATE = ROOT / "infrastructure" / "stack.yaml"
AUTOMATION = TEMPLATE.with_name("automation.yaml")  # what is joined to it; a project of a smaller scope has none
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


def joined() -> dict[str, Any]:
    """stack.yaml as it is meant: with what automation.yaml, where that is there, adds to it.

    Raises:
        UserError: when both hold something of one name, or one adds to what the other lacks.
    """
    whole: dict[str, Any] = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    if AUTOMATION.exists():
        more = yaml.safe_load(AUTOMATION.read_text(encoding="utf-8"))
        additions = more.pop("Additions", {})
        for section, entries in more.items():
            _add(whole.setdefault(section, {}), entries, section)
        for path, added in additions.items():
            try:
                place = functools.reduce(_step, path.split("."), whole["Resources"])
            except (LookupError, StopIteration, TypeError):
                raise UserError(f"infrastructure/automation.yaml adds to {path}, which is not in stack.yaml; mend "
                                "the path under Additions") from None  # fmt: skip
            _add(place, added, path)
    return whole


def _step(place: Any, name: str) -> Any:
    """What is called that in a mapping, or in a list: by its number, or by the name of a statement or policy."""
    if not isinstance(place, list):
        return place[name]
    if name.isdigit():
        return place[int(name)]
    return next(entry for entry in place if name in (entry.get("Sid"), entry.get("PolicyName")))


def _add(place: Any, added: Any, path: str) -> None:
    """Continue a mapping with other keys, or a list; a list of actions stays in alphabetical order."""
    if type(place) is not type(added) or not isinstance(place, dict | list):
        raise UserError(f"infrastructure/automation.yaml cannot add to {path}: the two are not both lists or mappings")
    if isinstance(place, list):
        place += added
        if all(isinstance(entry, str) for entry in place):
            place.sort(key=str.lower)
        return
    if both := place.keys() & added.keys():
        raise UserError(f"{path}: {', '.join(sorted(both))} is in infrastructure/stack.yaml and in automation.yaml; "
                        "rename or remove one of the two")  # fmt: skip
    place |= added


def template(settings: Settings, number: str) -> str:
    """The template as it is sent, with literal names for what survives the stack."""
    document = joined()
    resources = document["Resources"]
    resources["Bucket"]["Properties"]["BucketName"] = bucket_name(settings, number)
    resources["ImageRepository"]["Properties"]["RepositoryName"] = project.name()
    if settings.aws.region not in BUDGET_REGIONS:  # an unknown type is refused even when its condition is false
        del resources["Budget"], document["Conditions"]["HasBudget"], document["Parameters"]["MonthlyUsd"]
    if not settings.pipeline.deploy_on_approval:
        resources.pop("Deployment", None)
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
        "Subnets": ",".join(settings.aws.subnets),
        "SecurityGroups": ",".join(settings.aws.security_groups),
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
    return found | _of_automation(account, current)


def _of_automation(account: Account, current: dict[str, str]) -> dict[str, str]:
    """Those of automation.yaml; without that file there are none, and no setting may ask for any."""
    settings = account.settings
    chosen = settings.pipeline
    asked = {"PipelineSchedule": chosen.schedule, "Watch": chosen.watch, "Connection": chosen.connection}
    if not AUTOMATION.exists():
        wanted = {"aws.github": settings.aws.github, "pipeline.schedule": chosen.schedule,
                  "pipeline.watch": chosen.watch, "pipeline.connection": chosen.connection,
                  "pipeline.deploy_on_approval": chosen.deploy_on_approval or "none"}  # fmt: skip
        for name, value in wanted.items():
            if value != "none":
                raise UserError(f"{name} is {value}, but this project has no infrastructure/automation.yaml, which "
                                "does that; `make update-template SCOPE=full` brings it")  # fmt: skip
        return {}
    repository, subjects, branch = _parsed(_github(settings))
    found = {"GitHubRepository": repository, "GitHubSubjects": subjects, "GitHubBranch": branch}
    found["CreateGitHubProvider"] = "false"
    if chosen.deploy_on_approval and not repository:
        raise UserError("pipeline.deploy_on_approval needs the repository to deploy from; set aws.github to owner/name")
    found["DeployOnApproval"] = str(chosen.deploy_on_approval).lower()
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
    reason = plain(" ".join(event.get("ResourceStatusReason", "no reason given").split())).rstrip(".")
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
    reason = plain(plan.get("StatusReason", ""))
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
