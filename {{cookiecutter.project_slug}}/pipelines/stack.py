"""The project's CloudFormation stack: find it, plan a change, wait for it, say why it failed, remove it."""

from __future__ import annotations

import contextlib
import itertools
import time
from typing import Any

from pipelines import aws
from pipelines.console import UserError
from processing.progress import waiting

PAUSE = 5.0  # seconds between looks at a stack that changes
LEFTOVER = ("REVIEW_IN_PROGRESS", "CREATE_FAILED", "ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "DELETE_FAILED")


def find(cloud: Any, name: str) -> dict[str, Any] | None:
    """The stack as CloudFormation describes it, or None."""
    from botocore.exceptions import ClientError

    try:
        found: dict[str, Any] = cloud.describe_stacks(StackName=name)["Stacks"][0]
    except ClientError as error:
        if aws.missing(error):
            return None
        raise
    return found


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
    shown = ""
    try:
        with waiting("CloudFormation") as say:
            while True:
                status: str = cloud.describe_stacks(StackName=stack)["Stacks"][0]["StackStatus"]
                resources = cloud.describe_stack_resources(StackName=stack)["StackResources"]
                done = sum(not resource["ResourceStatus"].endswith("IN_PROGRESS") for resource in resources)
                line = f"{doing}: {status.lower().replace('_', ' ')}, {done} of {len(resources)} resources"
                if line != shown:
                    say(line)
                shown = line
                if not status.endswith("IN_PROGRESS"):
                    return status
                time.sleep(PAUSE)
    except KeyboardInterrupt:
        raise UserError("interrupted, but AWS goes on; the same command later shows how it went", 130) from None


def first_failure(cloud: Any, stack: str) -> str:
    """Why the last operation failed: the resource that failed first, not those that were cancelled because of it."""
    pages = cloud.get_paginator("describe_stack_events").paginate(StackName=stack)
    events = (event for page in pages for event in page["StackEvents"])  # newest first
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
    with waiting("CloudFormation's plan"):
        while True:
            plan = cloud.describe_change_set(ChangeSetName=change_set)
            if plan["Status"] not in ("CREATE_PENDING", "CREATE_IN_PROGRESS"):
                break
            time.sleep(PAUSE)
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
