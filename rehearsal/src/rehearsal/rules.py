"""What AWS's documents say that it refuses: each rule with the page that says so.

Besides these, every request is held against the constraints of the API reference (values, lengths, patterns, ranges),
as botocore's models of the services have them: clients check few of them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from botocore.model import Shape

from rehearsal import wire
from rehearsal.operations import Account, Call, Request, before, refuse

DOCS = "https://docs.aws.amazon.com/sagemaker/latest"
GUIDE, API = f"{DOCS}/dg", f"{DOCS}/APIReference"
OWN_DISK = re.compile(r"ml\.(g[4-9]|p[4-9]|p3dn|trn|inf2|[a-z]+\d+[a-z]*d)")  # hardware encrypts these disks, no key
HELD = ("sagemaker", "sagemaker-runtime", "scheduler")  # services whose constraints are looked at
Check = Callable[[Account, Request], Iterator[str]]
Taken = Callable[[Check], Check]
RULES: list[tuple[str, tuple[tuple[str, str], ...], str, Check]] = []


def rule(page: str, *operations: str, service: str = "sagemaker", code: str = "ValidationException") -> Taken:
    """A rule of some operations; the function yields why it refuses a request."""

    def take(check: Check) -> Check:
        RULES.append((page, tuple((service, name) for name in operations), code, check))
        return check

    return take


@before
def check(account: Account, call: Call) -> None:
    """Refuse what AWS would refuse."""
    if call.service in HELD and call.operation in wire.model(call.service).operation_names:
        shape = wire.model(call.service).operation_model(call.operation).input_shape
        if wrong := [*constraints(shape, call.request, "")]:
            number = f"{len(wrong)} validation error{'s' if len(wrong) > 1 else ''} detected: "
            code = "ValidationError" if call.service == "sagemaker-runtime" else "ValidationException"
            raise refuse(code, number + "; ".join(wrong))
    for page, operations, code, look in RULES:
        if (call.service, call.operation) in operations and (reason := next(look(account, call.request), "")):
            account.note("rule", f"{call.service}:{call.operation}", page)
            raise refuse(code, reason)


def constraints(shape: Shape | None, value: Any, path: str) -> Iterator[str]:
    """What a value does not satisfy, in AWS's words: https://docs.aws.amazon.com/sagemaker/latest/APIReference/."""
    if shape is None or value is None:
        return
    if shape.type_name == "structure" and isinstance(value, dict):
        for name, member in shape.members.items():
            yield from constraints(member, value.get(name), f"{path}.{_small(name)}" if path else _small(name))
        return
    size: Any = None
    facts = shape.metadata
    if shape.type_name == "list":
        for number, item in enumerate(value, 1):
            yield from constraints(shape.member, item, f"{path}.{number}.member")
        size = len(value)
    elif shape.type_name == "map":
        for key, item in value.items():
            yield from constraints(shape.key, key, f"{path}.key")
            yield from constraints(shape.value, item, f"{path}.{key}.member")
        size = len(value)
    elif shape.type_name in ("string", "blob"):
        size = len(value)
    elif shape.type_name in ("integer", "long", "float", "double"):
        size = float(value)
    said = f"Value '{str(value)[:100]}' at '{path}' failed to satisfy constraint: Member must "
    if shape.type_name == "string" and facts.get("enum") and value not in facts["enum"]:
        yield f"{said}satisfy enum value set: [{', '.join(facts['enum'][:20])}]"
    if shape.type_name == "string" and (form := _pattern(facts.get("pattern", ""))) and not form.fullmatch(value):
        yield f"{said}satisfy regular expression pattern: {facts['pattern']}"
    numeric = "have value" if isinstance(size, float) else "have length"
    if size is not None and "max" in facts and size > facts["max"]:
        yield f"{said}{numeric} less than or equal to {facts['max']}"
    if size is not None and "min" in facts and size < facts["min"]:
        yield f"{said}{numeric} greater than or equal to {facts['min']}"


def _small(name: str) -> str:
    return name[:1].lower() + name[1:]


@functools.cache
def _pattern(text: str) -> re.Pattern[str] | None:
    """A pattern of Java's; None where Python knows it not."""
    try:
        return re.compile(text, re.DOTALL) if text else None
    except re.error:
        return None


def _config(account: Account, name: str) -> dict[str, Any]:
    return account.things.get("EndpointConfig", {}).get(name, {"ProductionVariants": []})


def _serverless(config: Request) -> bool:
    return any("ServerlessConfig" in variant for variant in config.get("ProductionVariants", []))


@rule(f"{API}/API_StoppingCondition.html", "CreateTrainingJob")
def spot_waits(_: Account, asked: Request) -> Iterator[str]:
    """A spot job says how long it waits, the time that it runs included."""
    limit = asked.get("StoppingCondition", {})
    wait = limit.get("MaxWaitTimeInSeconds")
    if asked.get("EnableManagedSpotTraining") and (wait is None or wait < limit.get("MaxRuntimeInSeconds", 86400)):
        yield "Invalid MaxWaitTimeInSeconds. It must be present and be greater than or equal to MaxRuntimeInSeconds"


@rule(f"{GUIDE}/train-warm-pools.html", "CreateTrainingJob")
def warm_pools_are_not_spot(_: Account, asked: Request) -> Iterator[str]:
    """Nor does a warm pool keep more than one type of instance."""
    machines = asked.get("ResourceConfig", {})
    if machines.get("KeepAlivePeriodInSeconds") and asked.get("EnableManagedSpotTraining"):
        yield "KeepAlivePeriodInSeconds is not supported with EnableManagedSpotTraining"
    if machines.get("KeepAlivePeriodInSeconds") and machines.get("InstanceGroups"):
        yield "KeepAlivePeriodInSeconds is not supported for heterogeneous clusters"


@rule(f"{API}/API_ResourceConfig.html#sagemaker-Type-ResourceConfig-VolumeKmsKeyId", "CreateTrainingJob",
      "CreateProcessingJob", "CreateTransformJob", "CreateHyperParameterTuningJob")  # fmt: skip
def disks_of_hardware_take_no_key(_: Account, asked: Request) -> Iterator[str]:
    """The machine encrypts its own disks."""
    places = (
        asked.get("ResourceConfig"),
        (asked.get("ProcessingResources") or {}).get("ClusterConfig"),
        asked.get("TransformResources"),
        (asked.get("TrainingJobDefinition") or {}).get("ResourceConfig"),
    )
    for place in filter(None, places):
        if place.get("VolumeKmsKeyId") and OWN_DISK.match(place.get("InstanceType", "")):
            yield f"VolumeKmsKeyId is not supported for the instance type {place['InstanceType']}"


@rule(f"{API}/API_AlgorithmSpecification.html", "CreateTrainingJob")
def an_algorithm_has_one_name(_: Account, asked: Request) -> Iterator[str]:
    """An image, or an algorithm of SageMaker's."""
    spec = asked["AlgorithmSpecification"]
    if bool(spec.get("TrainingImage")) == bool(spec.get("AlgorithmName")):
        yield "Either TrainingImage or AlgorithmName must be given, and not both"


@rule(f"{API}/API_CreateModelPackage.html", "CreateModelPackage")
def a_version_has_the_tags_of_its_group(_: Account, asked: Request) -> Iterator[str]:
    """And none of its own."""
    if asked.get("ModelPackageGroupName") and asked.get("Tags"):
        yield "Tags are not allowed for a version of a model package group"


@rule(f"{API}/API_ContainerDefinition.html", "CreateTransformJob", "CreateEndpointConfig")
def a_data_source_is_for_instances_that_stay(account: Account, asked: Request) -> Iterator[str]:
    """Not for batch transform, nor for serverless endpoints."""
    names = [asked["ModelName"]] if "ModelName" in asked else [
        variant["ModelName"] for variant in asked["ProductionVariants"] if "ServerlessConfig" in variant
    ]  # fmt: skip
    for name in names:
        model = account.things.get("Model", {}).get(name, {})
        if any(
            "ModelDataSource" in held for held in [model.get("PrimaryContainer") or {}, *model.get("Containers", [])]
        ):
            yield f"ModelDataSource of {name} cannot be used with batch transform or serverless endpoints"


@rule(f"{GUIDE}/serverless-endpoints.html", "CreateEndpointConfig")
def serverless_leaves_out(account: Account, asked: Request) -> Iterator[str]:
    """The section "Feature exclusions"."""
    if not _serverless(asked):
        return
    if len(asked["ProductionVariants"]) > 1:
        yield "Serverless endpoints support one production variant only"
    for member in ("DataCaptureConfig", "AsyncInferenceConfig"):
        if asked.get(member):
            yield f"{member} is not supported for serverless endpoints"
    for variant in asked["ProductionVariants"]:
        model = account.things.get("Model", {}).get(variant.get("ModelName"), {})
        if model.get("VpcConfig") or model.get("EnableNetworkIsolation"):
            yield f"Serverless endpoints support no VPC and no network isolation: {variant['ModelName']}"
        if variant.get("InstanceType"):
            yield "A variant has either ServerlessConfig or InstanceType"


@rule(f"{GUIDE}/serverless-endpoints-how-it-works.html", "CreateEndpointConfig")
def serverless_memory(_: Account, asked: Request) -> Iterator[str]:
    """Whole gigabytes."""
    for variant in asked["ProductionVariants"]:
        memory = variant.get("ServerlessConfig", {}).get("MemorySizeInMB", 1024)
        if memory not in range(1024, 6145, 1024):
            yield f"MemorySizeInMB is {memory}; it is one of 1024, 2048, 3072, 4096, 5120 and 6144"


@rule(f"{API}/API_ProductionVariant.html", "CreateEndpointConfig")
def a_variant_has_machines(_: Account, asked: Request) -> Iterator[str]:
    """And a name of its own."""
    names = [variant["VariantName"] for variant in asked["ProductionVariants"]]
    if len({*names}) < len(names):
        yield "Production variants must have unique names"
    for variant in asked["ProductionVariants"]:
        pools = variant.get("InstancePools") or variant.get("ManagedInstanceScaling")
        if not variant.get("ServerlessConfig") and not pools and not variant.get("InstanceType"):
            yield f"Variant {variant['VariantName']} has no InstanceType"
        if variant.get("InstanceType") and not variant.get("InitialInstanceCount") and not pools:
            yield f"Variant {variant['VariantName']} has no InitialInstanceCount"


@rule(f"{API}/API_CreateModel.html", "CreateModel")
def a_model_has_one_kind_of_container(_: Account, asked: Request) -> Iterator[str]:
    """One, or a list of them."""
    if bool(asked.get("PrimaryContainer")) == bool(asked.get("Containers")):
        yield "Either PrimaryContainer or Containers must be given, and not both"


@rule(f"{GUIDE}/serverless-endpoints.html", "UpdateEndpoint")
def no_way_to_serverless(account: Account, asked: Request) -> Iterator[str]:
    """An endpoint on instances stays on instances."""
    facts = account.things.get("Endpoint", {}).get(asked["EndpointName"], {})
    now = _config(account, facts.get("EndpointConfigName", ""))
    if (
        now["ProductionVariants"]
        and not _serverless(now)
        and _serverless(_config(account, asked["EndpointConfigName"]))
    ):
        yield "Updating a real-time inference endpoint to a serverless endpoint is not supported"


@rule(f"{GUIDE}/endpoint-scaling-update.html", "UpdateEndpoint")
def what_scales_keeps_its_machines(account: Account, asked: Request) -> Iterator[str]:
    """Deregister a variant before it gets another type of instance, or goes."""
    from rehearsal.endpoints import targets

    facts = account.things.get("Endpoint", {}).get(asked["EndpointName"], {})
    old, new = ({item["VariantName"]: item.get("InstanceType") for item in _config(account, name)["ProductionVariants"]}
                for name in (facts.get("EndpointConfigName", ""), asked["EndpointConfigName"]))  # fmt: skip
    scaled = (
        {item["ResourceId"].rpartition("/")[2] for item in targets(account, asked["EndpointName"])} if new else set()
    )
    if moved := sorted(name for name in scaled & {*old} if old[name] != new.get(name)):
        yield (f"The variant(s) {moved} must be deregistered as scalable targets with AWS Auto Scaling before they can "
               "be removed or have their instance type updated.")  # fmt: skip


@rule(f"{API}/API_TrafficRoutingConfig.html", "UpdateEndpoint", "CreateEndpoint")
def steps_are_half_of_the_fleet_at_most(account: Account, asked: Request) -> Iterator[str]:
    """And those of a linear update at least a tenth; each kind has its own size."""
    policy = (asked.get("DeploymentConfig") or {}).get("BlueGreenUpdatePolicy", {})
    routing = policy.get("TrafficRoutingConfiguration", {})
    counts = [item.get("InitialInstanceCount", 1)
              for item in _config(account, asked["EndpointConfigName"])["ProductionVariants"]]  # fmt: skip
    for kind, member, least in (("CANARY", "CanarySize", 0), ("LINEAR", "LinearStepSize", 10)):
        size = routing.get(member)
        if (routing.get("Type") == kind) != (size is not None):
            yield f"{member} must be given when the traffic routing is {kind}, and only then"
        if size:
            value = size["Value"] * (100 / max(sum(counts), 1) if size["Type"] == "INSTANCE_COUNT" else 1)
            if not least <= value <= 50:
                yield f"{member} must be between {least} and 50 percent of the fleet, and is {value:g}"


@rule(f"{API}/API_BlueGreenUpdatePolicy.html", "UpdateEndpoint", "CreateEndpoint")
def an_update_has_time_for_its_waits(_: Account, asked: Request) -> Iterator[str]:
    """The limit includes them."""
    policy = (asked.get("DeploymentConfig") or {}).get("BlueGreenUpdatePolicy", {})
    waits = policy.get("TerminationWaitInSeconds", 0)
    waits += policy.get("TrafficRoutingConfiguration", {}).get("WaitIntervalInSeconds", 0)
    if policy.get("MaximumExecutionTimeoutInSeconds", waits + 1) <= waits:
        yield f"MaximumExecutionTimeoutInSeconds must be larger than the {waits} seconds of the waits"


@rule(f"{API}/API_CreateTransformJob.html", "CreateTransformJob")
def transform_fits_into_memory(_: Account, asked: Request) -> Iterator[str]:
    """Requests at a time times their size; several records in one need a way to split them."""
    product = asked.get("MaxConcurrentTransforms", 1) * asked.get("MaxPayloadInMB", 6)
    if product > 100:
        yield f"MaxConcurrentTransforms * MaxPayloadInMB must be at most 100 MB, and is {product}"
    if asked.get("BatchStrategy") == "MultiRecord" and asked["TransformInput"].get("SplitType", "None") == "None":
        yield "BatchStrategy MultiRecord needs a SplitType"


@rule(f"{API}/API_ResourceLimits.html", "CreateHyperParameterTuningJob")
def jobs_at_a_time(_: Account, asked: Request) -> Iterator[str]:
    """No more than there are."""
    limits = asked["HyperParameterTuningJobConfig"]["ResourceLimits"]
    if limits["MaxParallelTrainingJobs"] > limits.get("MaxNumberOfTrainingJobs", 750):
        yield "MaxParallelTrainingJobs must be at most MaxNumberOfTrainingJobs"


@rule(f"{GUIDE}/automatic-model-tuning-early-stopping.html", "CreateHyperParameterTuningJob")
def hyperband_stops_by_itself(_: Account, asked: Request) -> Iterator[str]:
    """It has a way of its own."""
    config = asked["HyperParameterTuningJobConfig"]
    if config["Strategy"] == "Hyperband" and config.get("TrainingJobEarlyStoppingType", "Off") != "Off":
        yield "TrainingJobEarlyStoppingType must be Off with the strategy Hyperband"


@rule(f"{GUIDE}/automatic-model-tuning-define-metrics-variables.html", "CreateHyperParameterTuningJob")
def the_objective_is_a_metric(_: Account, asked: Request) -> Iterator[str]:
    """Of an algorithm of one's own it has to be defined."""
    objective = asked["HyperParameterTuningJobConfig"].get("HyperParameterTuningJobObjective", {}).get("MetricName")
    spec = (asked.get("TrainingJobDefinition") or {}).get("AlgorithmSpecification", {})
    if spec.get("TrainingImage") and objective not in [metric["Name"] for metric in spec.get("MetricDefinitions", [])]:
        yield f"The objective metric {objective} is not among the metric definitions"


@rule(f"{GUIDE}/automatic-model-tuning-define-ranges.html", "CreateHyperParameterTuningJob")
def ranges_are_ranges(_: Account, asked: Request) -> Iterator[str]:
    """From below to above, and no logarithm of nothing."""
    ranges = asked["HyperParameterTuningJobConfig"].get("ParameterRanges", {})
    for kind in ("IntegerParameterRanges", "ContinuousParameterRanges"):
        for item in ranges.get(kind, []):
            if float(item["MinValue"]) > float(item["MaxValue"]):
                yield f"MinValue of {item['Name']} is above its MaxValue"
            if item.get("ScalingType") == "Logarithmic" and float(item["MinValue"]) <= 0:
                yield f"{item['Name']} has the scaling Logarithmic, so its MinValue must be above 0"


@rule(f"{API}/API_CreatePipeline.html", "CreatePipeline", "UpdatePipeline")
def a_definition_is_json(_: Account, asked: Request) -> Iterator[str]:
    """With steps whose names differ."""
    if (text := asked.get("PipelineDefinition")) is None:
        return
    try:
        names = [step["Name"] for step in json.loads(text)["Steps"]]
    except (ValueError, KeyError, TypeError) as error:
        yield f"Unable to parse pipeline definition: {error!r}"
        return
    if len({*names}) < len(names):
        yield "Pipeline steps must have unique names"


@rule(f"{GUIDE}/model-registry-delete-model-group.html", "DeleteModelPackageGroup", code="ConflictException")
def a_group_is_empty_before_it_goes(account: Account, asked: Request) -> Iterator[str]:
    """Its versions first."""
    from rehearsal.hosting import ask

    name = asked["ModelPackageGroupName"]
    if ask(account, "ListModelPackages", ModelPackageGroupName=name)["ModelPackageSummaryList"]:
        yield f"Model Package Group {name} cannot be deleted because it still contains Model Packages."


@rule(f"{GUIDE}/endpoint-auto-scaling-prerequisites.html", "RegisterScalableTarget", service="application-autoscaling")
def what_can_scale(account: Account, asked: Request) -> Iterator[str]:
    """A variant that is there, of machines that are not burstable; none at all only where requests wait."""
    if asked.get("ServiceNamespace") != "sagemaker":
        return
    _, name, _, variant = [*asked["ResourceId"].split("/"), "", "", ""][:4]
    facts = account.things.get("Endpoint", {}).get(name, {})
    config = _config(account, facts.get("EndpointConfigName", ""))
    found = next((item for item in config["ProductionVariants"] if item["VariantName"] == variant), None)
    if found is None or facts.get("EndpointStatus") != "InService":
        yield f"No endpoint in service with the variant {variant}: {asked['ResourceId']}"
    elif found.get("InstanceType", "").startswith("ml.t2."):
        yield f"{found['InstanceType']} is burstable and cannot be scaled"
    elif asked.get("MinCapacity") == 0 and not config.get("AsyncInferenceConfig"):
        yield "MinCapacity 0 is for asynchronous endpoints and inference components"  # …/async-inference-autoscale.html


@rule("https://docs.aws.amazon.com/scheduler/latest/UserGuide/managing-targets-universal.html", "CreateSchedule",
      "UpdateSchedule", service="scheduler")  # fmt: skip
def universal_targets_change_something(_: Account, asked: Request) -> Iterator[str]:
    """A target of any service is `…:aws-sdk:service:operation`, its name in camel case, and does not only read."""
    service, operation = str(asked["Target"]["Arn"]).partition(":aws-sdk:")[2].partition(":")[::2]
    if not service:
        return
    if re.match(r"(get|describe|list|poll|receive|search|scan|query|select|read|batchGet)[A-Z]", operation):
        yield f"{operation} only reads, which is no target of a schedule"
    elif (
        service == "sagemaker" and f"{operation[:1].upper()}{operation[1:]}" not in wire.model(service).operation_names
    ):
        yield f"{operation} is no operation of {service}"
    try:
        json.loads(asked["Target"].get("Input", "{}"))
    except ValueError:
        yield "Input must be JSON"
