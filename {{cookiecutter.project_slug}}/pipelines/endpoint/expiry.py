"""The end of an endpoint, or of a job: a schedule that fires once, deletes it, and then itself."""

from __future__ import annotations

import json
import time

from pipelines.cloud import account as aws
from pipelines.config import Settings

ENDS = {  # operation, its parameter and the setting that limits
    "endpoint": ("deleteEndpoint", "EndpointName", "endpoint.ttl_hours"),
    "transform job": ("stopTransformJob", "TransformJobName", "compute.max_hours"),
}


def end(settings: Settings, endpoint: str) -> str | None:
    """When an endpoint deletes itself, as `at(2026-11-21T21:00:00)` in UTC; None: never."""
    with aws.explained(f"looking up when {endpoint} ends"):
        found = aws.unless_missing(aws.client(settings, "scheduler").get_schedule, Name=f"{endpoint}-end")
        return found and str(found["ScheduleExpression"])


def end_after(hours: float) -> str:
    """When that is, as a schedule says it."""
    return time.strftime("at(%Y-%m-%dT%H:%M:%S)", time.gmtime(time.time() + hours * 3600))


def set_end(settings: Settings, stack: aws.Stack, endpoint: str, when: str | None, kind: str = "endpoint") -> None:
    """Schedule, move or (None) cancel the end of an endpoint, or of a job: a schedule fires once and deletes itself."""
    operation, parameter, limit = ENDS[kind]
    scheduler, scheduled = aws.client(settings, "scheduler"), end(settings, endpoint)
    with aws.explained(f"scheduling the end of {endpoint}"):
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
                "Arn": f"arn:{stack.partition}:scheduler:::aws-sdk:sagemaker:{operation}",
                "RoleArn": stack.scheduler_role,
                "Input": json.dumps({parameter: endpoint}),
            },
        )
