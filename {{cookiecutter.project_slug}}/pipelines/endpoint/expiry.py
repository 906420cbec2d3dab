"""The end of an endpoint, or of a job: a schedule that fires once, deletes it, and then itself."""

from __future__ import annotations

import json
import time

from pipelines.cloud.account import Account, explained, unless_missing

ENDS = {  # operation, its parameter and the setting that limits
    "endpoint": ("deleteEndpoint", "EndpointName", "endpoint.ttl_hours"),
    "transform job": ("stopTransformJob", "TransformJobName", "compute.max_hours"),
}


def end(account: Account, endpoint: str) -> str | None:
    """When an endpoint deletes itself, as `at(2026-11-21T21:00:00)` in UTC; None: never."""
    with explained(f"looking up when {endpoint} ends"):
        found = unless_missing(account.client("scheduler").get_schedule, Name=f"{endpoint}-end")
        return found and str(found["ScheduleExpression"])


def end_after(hours: float) -> str:
    """When that is, as a schedule says it."""
    return time.strftime("at(%Y-%m-%dT%H:%M:%S)", time.gmtime(time.time() + hours * 3600))


def set_end(account: Account, endpoint: str, when: str | None, kind: str = "endpoint") -> None:
    """Schedule, move or (None) cancel the end of an endpoint, or of a job: a schedule fires once and deletes itself."""
    operation, parameter, limit = ENDS[kind]
    scheduler, scheduled = account.client("scheduler"), end(account, endpoint)
    with explained(f"scheduling the end of {endpoint}"):
        if when is None:
            if scheduled:
                scheduler.delete_schedule(Name=f"{endpoint}-end")
            return
        (scheduler.update_schedule if scheduled else scheduler.create_schedule)(
            Name=f"{endpoint}-end",
            Description=f"{limit} of {endpoint}",
            ScheduleExpression=when,
            ScheduleExpressionTimezone="UTC",
            FlexibleTimeWindow={"Mode": "OFF"},
            ActionAfterCompletion="DELETE",
            Target={
                "Arn": f"arn:{account.stack().partition}:scheduler:::aws-sdk:sagemaker:{operation}",
                "RoleArn": account.stack().scheduler_role,
                "Input": json.dumps({parameter: endpoint}),
            },
        )
