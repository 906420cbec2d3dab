"""The end of an endpoint, or of a job: a schedule that fires once, deletes it, and then itself."""

from __future__ import annotations

import json
import time
from typing import Any

from pipelines.cloud.account import Account, explained, pages, unless_missing

ENDS = {  # operation, its parameter and the setting that limits
    "endpoint": ("sagemaker:deleteEndpoint", "EndpointName", "endpoint.ttl_hours"),
    "transform job": ("sagemaker:stopTransformJob", "TransformJobName", "compute.max_hours"),
}
WITH = ("backlog", "alarms", "dashboard")  # what bills on beside an endpoint that has ended; each has its own schedule


def end(account: Account, endpoint: str) -> str | None:
    """When an endpoint deletes itself, as `at(2026-11-21T21:00:00)` in UTC; None: never."""
    with explained(f"looking up when {endpoint} ends"):
        found = unless_missing(account.client("scheduler").get_schedule, Name=f"{endpoint}-end")
        return found and str(found["ScheduleExpression"])


def end_after(hours: float) -> str:
    """When that is, as a schedule says it."""
    return time.strftime("at(%Y-%m-%dT%H:%M:%S)", time.gmtime(time.time() + hours * 3600))


def set_end(account: Account, endpoint: str, when: str | None, kind: str = "endpoint") -> None:
    """Schedule, move or (None) cancel the end of an endpoint and of what is beside it, or of a job."""
    operation, parameter, limit = ENDS[kind]
    with explained(f"scheduling the end of {endpoint}"):
        _put(account, f"{endpoint}-end", when, operation, {parameter: endpoint}, f"{limit} of {endpoint}")
        listed = pages(account.client("scheduler"), "list_schedules", "Schedules", NamePrefix=f"{endpoint}-end-")
        there = {schedule["Name"] for schedule in listed}
        for name in sorted(there & {f"{endpoint}-end-{what}" for what in WITH}):
            target = account.client("scheduler").get_schedule(Name=name)["Target"]
            _put(account, name, when, target["Arn"].partition(":aws-sdk:")[2], json.loads(target["Input"]), name)


def ends_with(account: Account, endpoint: str, what: str, operation: str, request: dict[str, list[str]]) -> None:
    """Let something that is beside an endpoint (one of `WITH`) end when it does; CloudWatch bills it alone too.

    Args:
        account: to work in.
        endpoint: its name.
        what: ends with it.
        operation: that removes it, as in `cloudwatch:deleteAlarms`.
        request: of that operation.
    """
    with explained(f"scheduling the end of what is beside {endpoint}"):
        _put(account, f"{endpoint}-end-{what}", end(account, endpoint), operation, request, f"{what} of {endpoint}")


def _put(
    account: Account, name: str, when: str | None, operation: str, request: dict[str, Any], description: str
) -> None:
    scheduler = account.client("scheduler")
    scheduled = unless_missing(scheduler.get_schedule, Name=name)
    if when is None:
        if scheduled:
            scheduler.delete_schedule(Name=name)
        return
    (scheduler.update_schedule if scheduled else scheduler.create_schedule)(
        Name=name,
        Description=description,
        ScheduleExpression=when,
        ScheduleExpressionTimezone="UTC",
        FlexibleTimeWindow={"Mode": "OFF"},
        ActionAfterCompletion="DELETE",
        Target={
            "Arn": f"arn:{account.stack().partition}:scheduler:::aws-sdk:{operation}",
            "RoleArn": account.stack().scheduler_role,
            "Input": json.dumps(request),
            # AWS deletes no endpoint that is being updated: try for a day.
            "RetryPolicy": {"MaximumRetryAttempts": 185, "MaximumEventAgeInSeconds": 86400},
        },
    )
