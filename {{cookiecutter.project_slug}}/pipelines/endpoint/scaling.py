"""How an endpoint's variants scale with their load: targets, policies and the alarm for the first instance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.cloud.account import Account, explained
from pipelines.endpoint import expiry

BACKLOG, INVOCATIONS = 5.0, 600.0  # requests for an instance: waiting (async), or a minute, that scaling aims at


def unscale(account: Account, endpoint: str, variants: Sequence[str]) -> None:
    """Stop scaling variants, where it was started; their policies and those policies' own alarms go with it."""
    scaling = account.client("application-autoscaling")
    with explained(f"ending the autoscaling of {endpoint}"):
        for target in targets(account, endpoint, variants):
            keys = ("ServiceNamespace", "ResourceId", "ScalableDimension")
            scaling.deregister_scalable_target(**{key: target[key] for key in keys})


def targets(account: Account, endpoint: str, variants: Sequence[str]) -> list[dict[str, Any]]:
    """What is there of the scaling of variants."""
    resources = [f"endpoint/{endpoint}/variant/{variant}" for variant in variants]
    if not resources:
        return []
    scaling = account.client("application-autoscaling")
    return list(
        scaling.describe_scalable_targets(ServiceNamespace="sagemaker", ResourceIds=resources)["ScalableTargets"]
    )


def scale(account: Account, endpoint: str, variants: Sequence[str]) -> None:
    """Scale variants between `endpoint.instances` and `endpoint.max_instances`; an async one down to none."""
    chosen = account.settings.endpoint
    waits = chosen.type == "async"
    lowest, highest = 0 if waits else chosen.instances, max(chosen.instances, chosen.max_instances)
    if chosen.type == "serverless" or lowest == highest:
        unscale(account, endpoint, variants)
        return
    scaling, metric = account.client("application-autoscaling"), "SageMakerVariantInvocationsPerInstance"
    own = {"Namespace": "AWS/SageMaker", "Dimensions": [{"Name": "EndpointName", "Value": endpoint}]}
    backlog = {"MetricName": "ApproximateBacklogSizePerInstance", "Statistic": "Average", **own}
    with explained(f"setting up the autoscaling of {endpoint}"):
        tags = {tag["Key"]: tag["Value"] for tag in account.tags()}
        there = {target["ResourceId"] for target in targets(account, endpoint, variants)}
        for variant in variants:
            target = {
                "ServiceNamespace": "sagemaker",
                "ResourceId": f"endpoint/{endpoint}/variant/{variant}",
                "ScalableDimension": "sagemaker:variant:DesiredInstanceCount",
            }
            # One that is there keeps its tags, and AWS takes new ones by another request only.
            more = {} if target["ResourceId"] in there else {"Tags": tags}
            scaling.register_scalable_target(**target, MinCapacity=lowest, MaxCapacity=highest, **more)
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
                name = f"{endpoint}-backlog"
                expiry.ends_with(account, endpoint, "backlog", "cloudwatch:deleteAlarms", {"AlarmNames": [name]})
                account.client("cloudwatch").put_metric_alarm(
                    AlarmName=name, AlarmDescription="requests wait and there is no instance",
                    MetricName="HasBacklogWithoutCapacity", **own, Statistic="Average", Period=60, EvaluationPeriods=2,
                    DatapointsToAlarm=2, Threshold=1.0, ComparisonOperator="GreaterThanOrEqualToThreshold",
                    TreatMissingData="missing", AlarmActions=[first["PolicyARN"]], Tags=account.tags(),
                )  # fmt: skip
