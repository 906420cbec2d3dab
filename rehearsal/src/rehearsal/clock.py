"""Time, on demand: schedules and rules fire when they are told to, and notices are there to be read.

    python -m rehearsal --call fire '{"schedule": "cats-end"}'      # as if its hour had come, by the rights of its role
    python -m rehearsal --call fire '{"rule": "nightly"}'           # a rule of EventBridge that has a schedule
    python -m rehearsal --call notices                              # what topics were told

A schedule's universal target is carried out through the account's address, so that hooks look at it as at any request.
https://docs.aws.amazon.com/scheduler/latest/UserGuide/managing-targets-universal.html
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

from botocore import xform_name
from botocore.exceptions import ClientError

from rehearsal.operations import Account, Answer, Call, Request, after, control, now

PATIENCE, PAUSE = 60.0, 2.0  # seconds in which a target that is refused is tried again, and between two attempts
SERVICES = {"sagemaker": "sagemaker", "cloudwatch": "cloudwatch", "applicationautoscaling": "application-autoscaling"}
JOBS = {"training-job": "Training", "processing-job": "Processing", "transform-job": "Transform"}


@control("fire")
def fire(account: Account, request: Request) -> Answer:
    """Let a schedule, every schedule whose name begins so (`prefix`), or a rule take place now."""
    if name := request.get("rule"):
        targets = account.client("events").list_targets_by_rule(Rule=name)["Targets"]
        return {"fired": [_target(account, target) for target in targets]}
    scheduler, prefix = account.client("scheduler"), request.get("prefix")
    names = [request["schedule"]] if "schedule" in request else [
        item["Name"] for item in scheduler.list_schedules()["Schedules"] if item["Name"].startswith(prefix or "")
    ]  # fmt: skip
    return {"fired": [_fire(account, scheduler, name) for name in names]}


def _fire(account: Account, scheduler: Any, name: str) -> dict[str, Any]:
    schedule = scheduler.get_schedule(Name=name)
    done = {"schedule": name} | _target(account, schedule["Target"])
    once = schedule["ScheduleExpression"].startswith("at(")
    if once and schedule.get("ActionAfterCompletion") == "DELETE":
        scheduler.delete_schedule(Name=name)
    account.note("fired" if not done.get("error") else "failed", f"schedule/{name}", done.get("error", ""))
    return done


def _target(account: Account, target: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out what a target asks for, again and again while it is refused and may be tried again."""
    service, _, operation = target["Arn"].partition(":aws-sdk:")[2].partition(":")
    asked = target.get("Input") or "{}"
    words = {"execution-id": secrets.token_hex(8), "scheduled-time": f"{now():%Y-%m-%dT%H:%M:%SZ}",
             "schedule-arn": target["Arn"], "attempt-number": "1"}  # fmt: skip
    for word, value in words.items():
        asked = asked.replace(f"<aws.scheduler.{word}>", value)
    if not service:  # a target of a kind of its own
        service, operation, asked = _templated(target, asked)
        if not service:
            return {"error": f"the clock knows no target {target['Arn']}"}
    client = account.client(SERVICES.get(service.lower(), service.lower()), target.get("RoleArn", ""))
    attempts = target.get("RetryPolicy", {}).get("MaximumRetryAttempts", 185)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            answer = getattr(client, xform_name(f"{operation[:1].upper()}{operation[1:]}"))(**json.loads(asked))
            answer.pop("ResponseMetadata", None)
            return {"operation": f"{service}:{operation}", "answer": answer}
        except ClientError as error:
            attempts -= 1
            if attempts < 0 or time.monotonic() > deadline or "AccessDenied" in error.response["Error"]["Code"]:
                return {"operation": f"{service}:{operation}", "error": str(error)}
            time.sleep(PAUSE)


def _templated(target: Mapping[str, Any], asked: str) -> tuple[str, str, str]:
    """Targets that EventBridge knows by their ARN: a pipeline, a topic."""
    kind = target["Arn"].split(":")[2]
    if kind == "sagemaker":
        given = target.get("SageMakerPipelineParameters", {}).get("PipelineParameterList", [])
        name = target["Arn"].rpartition("/")[2]
        return kind, "startPipelineExecution", json.dumps({"PipelineName": name, "PipelineParameters": given})
    if kind == "sns":
        return kind, "publish", json.dumps({"TopicArn": target["Arn"], "Message": asked})
    return "", "", ""


@control("notices")
def notices(account: Account, _: Request) -> Answer:
    """What topics were told, by programs and by rules of EventBridge about jobs that have ended."""
    kept = _kept(account)
    with account.lock:
        new, kept["seen"] = account.events[kept["seen"] :], len(account.events)
    for event in new:
        kind, _, name = event["what"].partition("/")
        if kind in JOBS and event["kind"] in ("completed", "failed", "stopped"):
            detail = {f"{JOBS[kind]}JobName": name, f"{JOBS[kind]}JobStatus": event["kind"].capitalize()}
            told(account, "aws.sagemaker", f"SageMaker {JOBS[kind]} Job State Change", detail)
    return {"notices": kept["messages"]}


def _kept(account: Account) -> dict[str, Any]:
    return account.things.setdefault("notices", {}).setdefault("all", {"messages": [], "seen": 0})


@after
def published(account: Account, call: Call, _: Answer) -> None:
    """Remember what somebody publishes."""
    if (call.service, call.operation) == ("sns", "Publish"):
        _remember(account, call.request.get("TopicArn", ""), call.request.get("Message", ""))


def _remember(account: Account, topic: str, message: str) -> None:
    _kept(account)["messages"].append({"topic": topic, "message": message})
    account.note("notice", topic, message)


def told(account: Account, source: str, kind: str, detail: Mapping[str, Any]) -> None:
    """Hand an event to the rules of EventBridge whose pattern it has, and so to their targets."""
    event = {"source": source, "detail-type": kind, "detail": detail, "account": account.number}
    events = account.client("events")
    for rule in events.list_rules()["Rules"]:
        if rule.get("State") == "ENABLED" and matches(json.loads(rule.get("EventPattern") or "null"), event):
            for target in events.list_targets_by_rule(Rule=rule["Name"])["Targets"]:
                if ":sns:" in target["Arn"]:
                    _remember(account, target["Arn"], _text(target, event))


def matches(pattern: Any, event: Any) -> bool:
    """Whether an event has a pattern: equal values, `prefix`, `suffix`, `anything-but` and `exists`.

    https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-create-pattern-operators.html
    """
    if isinstance(pattern, dict):
        return isinstance(event, dict) and all(matches(part, event.get(key)) for key, part in pattern.items())
    if not isinstance(pattern, list):
        return False
    return any(_one(wanted, event) for wanted in pattern)


def _one(wanted: Any, value: Any) -> bool:
    if not isinstance(wanted, dict):
        return bool(wanted == value)
    ((operator, given),) = wanted.items()
    text = str(value or "")
    if operator == "anything-but":
        return value not in (given if isinstance(given, list) else [given])
    if operator == "exists":
        return bool((value is not None) == given)
    if operator not in ("prefix", "suffix"):
        raise ValueError(f"the clock knows no {operator} in a pattern")
    return text.startswith(str(given)) if operator == "prefix" else text.endswith(str(given))


def _text(target: Mapping[str, Any], event: Mapping[str, Any]) -> str:
    """What a target is told: the event, or its template with parts of that."""
    change = target.get("InputTransformer")
    if not change:
        return str(target.get("Input") or json.dumps(event, default=str))
    text = change["InputTemplate"]
    for name, path in change.get("InputPathsMap", {}).items():
        value: Any = event
        for part in re.findall(r"[\w-]+", path.removeprefix("$")):
            value = value.get(part, "") if isinstance(value, dict) else ""
        text = text.replace(f"<{name}>", str(value))
    return str(json.loads(text)) if text.startswith('"') else text
