"""What `deploy`, `invoke` and `shift-traffic` share: an endpoint's name, state, end, scaling and answers."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines import aws, engine
from pipelines.config import Settings
from pipelines.console import UserError
from processing.progress import waiting

LONGEST = 42  # characters of a name: those of its models and configurations are 21 longer, and AWS takes 63
POLL = 10.0  # seconds between two looks at an endpoint
PATIENCE = 2 * 3600  # seconds for a change of an endpoint; a linear rollout takes an hour
ASYNC_POLL, ASYNC_PATIENCE = 2.0, 20 * 60  # seconds; the first instance after none takes minutes to come
MOST_BYTES = 6 * 2**20  # of a request that is answered at once
ENDS = {  # operation, its parameter and the setting that limits
    "endpoint": ("deleteEndpoint", "EndpointName", "endpoint.ttl_hours"),
    "transform job": ("stopTransformJob", "TransformJobName", "compute.max_hours"),
}
BACKLOG, INVOCATIONS = 5.0, 600.0  # requests for an instance: waiting (async), or a minute, that scaling aims at


def name(settings: Settings, given: str | None) -> str:
    """The endpoint that `ENDPOINT=` or the settings name.

    Raises:
        UserError: when the roles of the stack, which go by the project's name, would not let it be deleted.
    """
    project = engine.project_name()
    found = given or (project if settings.endpoint.name == "auto" else settings.endpoint.name)
    if not re.fullmatch(rf"{re.escape(project)}(-[a-zA-Z0-9]+)*", found) or len(found) > LONGEST:
        raise UserError(
            f"the endpoint's name is {found!r}; the project's roles allow {project} and {project}-..., and a name has "
            f"at most {LONGEST} letters, digits and hyphens"
        )
    return found


def describe(settings: Settings, endpoint: str) -> dict[str, Any] | None:
    """What AWS knows of an endpoint; None when there is none."""
    with aws.explained(f"looking up the endpoint {endpoint}"):
        describe_endpoint = aws.client(settings, "sagemaker").describe_endpoint
        found: dict[str, Any] | None = aws.unless_missing(describe_endpoint, EndpointName=endpoint)
        return found


def running(settings: Settings, endpoint: str) -> dict[str, Any]:
    """The same of an endpoint that answers.

    Raises:
        UserError: when it does not.
    """
    facts = describe(settings, endpoint)
    if facts is None:
        raise UserError(f"there is no endpoint {endpoint} in {settings.aws.region}; make one with `make deploy`")
    if facts["EndpointStatus"] not in ("InService", "Updating", "SystemUpdating", "RollingBack"):
        raise UserError(f"{endpoint} is {facts['EndpointStatus']} and answers nothing; see {link(settings, endpoint)}")
    return facts


def wait(settings: Settings, endpoint: str) -> dict[str, Any]:
    """Wait, and say so, until an endpoint does not change any more."""
    started, said = time.monotonic(), (-1, "")
    while time.monotonic() - started < PATIENCE:
        facts = describe(settings, endpoint)
        if facts is None:
            raise UserError(f"{endpoint} was deleted meanwhile")
        status, minutes = facts["EndpointStatus"], int(time.monotonic() - started) // 60
        if status in ("InService", "Failed", "OutOfService", "UpdateRollbackFailed"):
            return facts
        if said != (minutes, status):
            said = (minutes, status)
            print(f"{endpoint}: {status}, {minutes} min", flush=True)
        time.sleep(POLL)
    raise UserError(f"{endpoint} is still {status} after {PATIENCE // 60} minutes; see {link(settings, endpoint)}")


def link(settings: Settings, endpoint: str) -> str:
    """Its page in the console."""
    return aws.console(settings, f"endpoints/{endpoint}")


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


def unscale(settings: Settings, endpoint: str, variants: Sequence[str]) -> None:
    """Stop scaling variants, where it was started; their policies and those policies' own alarms go with it."""
    scaling = aws.client(settings, "application-autoscaling")
    resources = [f"endpoint/{endpoint}/variant/{variant}" for variant in variants]
    with aws.explained(f"ending the autoscaling of {endpoint}"):
        if resources:
            found = scaling.describe_scalable_targets(ServiceNamespace="sagemaker", ResourceIds=resources)
            for target in found["ScalableTargets"]:
                keys = ("ServiceNamespace", "ResourceId", "ScalableDimension")
                scaling.deregister_scalable_target(**{key: target[key] for key in keys})


def scale(settings: Settings, endpoint: str, variants: Sequence[str]) -> None:
    """Scale variants between `endpoint.instances` and `endpoint.max_instances`; an async one down to none."""
    chosen = settings.endpoint
    waits = chosen.type == "async"
    lowest, highest = 0 if waits else chosen.instances, max(chosen.instances, chosen.max_instances)
    if chosen.type == "serverless" or lowest == highest:
        unscale(settings, endpoint, variants)
        return
    scaling, metric = aws.client(settings, "application-autoscaling"), "SageMakerVariantInvocationsPerInstance"
    own = {"Namespace": "AWS/SageMaker", "Dimensions": [{"Name": "EndpointName", "Value": endpoint}]}
    backlog = {"MetricName": "ApproximateBacklogSizePerInstance", "Statistic": "Average", **own}
    with aws.explained(f"setting up the autoscaling of {endpoint}"):
        for variant in variants:
            target = {
                "ServiceNamespace": "sagemaker",
                "ResourceId": f"endpoint/{endpoint}/variant/{variant}",
                "ScalableDimension": "sagemaker:variant:DesiredInstanceCount",
            }
            scaling.register_scalable_target(**target, MinCapacity=lowest, MaxCapacity=highest)
            tracking = {
                "TargetValue": BACKLOG if waits else INVOCATIONS,
                "ScaleInCooldown": 300,
                "ScaleOutCooldown": 60,
            }
            kind = {"CustomizedMetricSpecification": backlog} if waits else {
                "PredefinedMetricSpecification": {"PredefinedMetricType": metric}
            }  # fmt: skip
            scaling.put_scaling_policy(
                **target, PolicyName=f"{endpoint}-{variant}-load", PolicyType="TargetTrackingScaling",
                TargetTrackingScalingPolicyConfiguration=tracking | kind,
            )  # fmt: skip
            if waits:  # per instance there is no backlog when there is no instance: the first one comes by an alarm
                steps = [{"MetricIntervalLowerBound": 0.0, "ScalingAdjustment": 1}]
                first = scaling.put_scaling_policy(
                    **target, PolicyName=f"{endpoint}-{variant}-first", PolicyType="StepScaling",
                    StepScalingPolicyConfiguration={
                        "AdjustmentType": "ChangeInCapacity", "MetricAggregationType": "Average", "Cooldown": 300,
                        "StepAdjustments": steps,
                    },
                )  # fmt: skip
                aws.client(settings, "cloudwatch").put_metric_alarm(
                    AlarmName=f"{endpoint}-backlog", AlarmDescription="requests wait and there is no instance",
                    MetricName="HasBacklogWithoutCapacity", **own, Statistic="Average", Period=60, EvaluationPeriods=2,
                    DatapointsToAlarm=2, Threshold=1.0, ComparisonOperator="GreaterThanOrEqualToThreshold",
                    TreatMissingData="missing", AlarmActions=[first["PolicyARN"]], Tags=aws.tags(settings),
                )  # fmt: skip


def ask(settings: Settings, facts: dict[str, Any], body: bytes, kind: str, variant: str | None = None) -> Any:
    """The model's answer to one request.

    Args:
        settings: with the region.
        facts: of a running endpoint.
        body: of the request.
        kind: its content type.
        variant: that is to answer; None: whichever the weights choose.

    Raises:
        UserError: with what the model has against the request, or why there is no answer.
    """
    from botocore.exceptions import ClientError
    from sagemaker.core.resources import Endpoint

    endpoint, waits = Endpoint(endpoint_name=facts["EndpointName"]), "AsyncInferenceConfig" in facts
    if not waits and len(body) > MOST_BYTES:
        raise UserError(
            f"the request has {len(body):,} bytes, this endpoint takes {MOST_BYTES:,}; TYPE=async takes more"
        )
    with aws.explained(f"asking {endpoint.endpoint_name}"):
        if waits:
            return json.loads(_ask_async(settings, endpoint, facts, body, kind))
        options = {"target_variant": variant} if variant else {}
        try:
            answer = endpoint.invoke(
                body=body, content_type=kind, accept="application/json", region=settings.aws.region, **options
            )
        except ClientError as error:
            if error.response["Error"]["Code"] != "ModelError":
                raise
            status, text = error.response.get("OriginalStatusCode", 500), error.response.get("OriginalMessage", "")
            raise UserError(f"{endpoint.endpoint_name} answered {status}: {sentence(text)}") from error
        return json.loads(answer.body.read())


def _ask_async(settings: Settings, endpoint: Any, facts: dict[str, Any], body: bytes, kind: str) -> bytes:
    """Put the request into the bucket, wait for the answer or the failure there, and clean up."""
    s3 = aws.client(settings, "s3")
    folder = facts["AsyncInferenceConfig"]["OutputConfig"]["S3OutputPath"].rpartition("/")[0]
    uri = f"{folder}/input/{uuid.uuid4().hex}"
    s3.put_object(**aws.place(uri), Body=body, **aws.encryption(settings))
    try:
        made = endpoint.invoke_async(input_location=uri, content_type=kind, region=settings.aws.region)
        if not any(variant.get("CurrentInstanceCount") for variant in facts["ProductionVariants"]):
            print(
                f"{endpoint.endpoint_name} has no instance right now; the first one comes in some minutes", flush=True
            )
        deadline = time.monotonic() + ASYNC_PATIENCE
        with waiting(f"the answer of {endpoint.endpoint_name}"):
            while time.monotonic() < deadline:
                answer = _taken(s3, made.output_location)
                if answer is not None:
                    return answer
                failure = _taken(s3, made.failure_location)
                if failure is not None:
                    raise UserError(f"{endpoint.endpoint_name} failed: {sentence(failure.decode(errors='replace'))}")
                time.sleep(ASYNC_POLL)
    finally:
        s3.delete_object(**aws.place(uri))
    raise UserError(f"no answer in {ASYNC_PATIENCE // 60} minutes; it would come to {made.output_location}")


def _taken(s3: Any, uri: str) -> bytes | None:
    """The content of an object, which is deleted then; None when it is not there."""
    place = aws.place(uri)
    found = aws.unless_missing(s3.get_object, **place)
    content = found and bytes(found["Body"].read())
    if found:
        s3.delete_object(**place)
    return content


def sentence(text: str) -> str:
    """What the model says in a refusal, `{"error": "..."}`, also where AWS wraps it into words of its own."""
    found = re.search(r'\{"error": ("(?:[^"\\]|\\.)*")\}', text)
    return str(json.loads(found[1])) if found else " ".join(text.split())[:300] or "no message"


def show(file: Path, answer: dict[str, Any]) -> None:
    """Print an answer about one image as `make predict` does; names of other classes than the first are not in it."""
    label, probability = answer["labels"][0], max(answer["probabilities"][0])
    print(f"{file}: {label}\n  {label}  {probability:6.1%}  {'#' * round(40 * probability)}", flush=True)
