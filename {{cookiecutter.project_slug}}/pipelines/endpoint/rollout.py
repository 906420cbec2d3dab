"""The requests that make an endpoint or update it, and those that take a failed attempt back; for `deploy.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pipelines import terminal
from pipelines.cloud import limits
from pipelines.cloud.account import Account, explained, failure, unless_missing
from pipelines.config import Settings
from pipelines.endpoint import expiry, model, scaling
from pipelines.endpoint import state as endpoint_state
from pipelines.sections import Endpoint
from pipelines.terminal import UserError
from training.config import GPU_INSTANCE

BAKE = 300  # seconds between two steps of an update, in which an alarm takes it back
UPDATE_HOURS = 1  # at most, in which old and new machines bill
FIRST, SECOND = "AllTraffic", "challenger"


@dataclass(frozen=True)
class Plan:
    """What is to run.

    Attributes:
        name: of the endpoint.
        config: of its new configuration, and of the new model.
        image: that serves.
        uri: of the artifact.
        package: a model package that takes the place of both.
        old: the configuration that an update replaces; without variants for a new endpoint.
        weight: percent of the requests for a second variant, which is the new model then.
    """

    name: str
    config: str
    image: str
    uri: str
    package: str | None
    old: dict[str, Any]
    weight: int | None

    @property
    def beside(self) -> list[dict[str, Any]]:
        """The variants that stay as they are."""
        return [old for old in self.old["ProductionVariants"] if self.weight and old["VariantName"] != SECOND]

    @property
    def variant(self) -> str:
        """The one that the new model is."""
        return SECOND if self.weight else FIRST

    def instances(self, settings: Settings) -> int:
        """Of the new model: as many as run, where load has made them more than were asked for."""
        chosen = settings.endpoint
        running = sum(old.get("InitialInstanceCount", 0) for old in self.replaced)
        return max(chosen.instances, min(running, chosen.max_instances))

    @property
    def replaced(self) -> list[dict[str, Any]]:
        """The variants whose place the new model takes."""
        return [old for old in self.old["ProductionVariants"] if old not in self.beside]


def create(account: Account, plan: Plan) -> None:
    """Create the model and the endpoint's configuration."""
    from sagemaker.core import resources, shapes

    settings, stack = account.settings, account.stack()
    model.create(account, plan.config, plan.image, plan.uri, plan.package, settings.endpoint.type)
    key = account.kms_arn()
    options: dict[str, Any] = {"tags": model.tags(account), "session": account.session, "region": account.region}
    # A serverless endpoint takes a key too, for the copy of its image:
    # https://docs.aws.amazon.com/sagemaker/latest/dg/serverless-endpoints-create-config.html
    encryption = {"kms_key_id": key} if key else {}
    if settings.endpoint.type == "async":
        place = f"s3://{stack.bucket}/async/{plan.name}"
        output = shapes.AsyncInferenceOutputConfig(
            s3_output_path=f"{place}/output", s3_failure_path=f"{place}/failure", **encryption
        )
        options["async_inference_config"] = shapes.AsyncInferenceConfig(output_config=output)
    if settings.endpoint.capture_percent:
        options["data_capture_config"] = shapes.DataCaptureConfig(
            enable_capture=True,
            initial_sampling_percentage=settings.endpoint.capture_percent,
            destination_s3_uri=f"s3://{stack.bucket}/capture",
            capture_content_type_header=shapes.CaptureContentTypeHeader(json_content_types=["application/json"]),
            capture_options=[shapes.CaptureOption(capture_mode=mode) for mode in ("Input", "Output")],
            **encryption,
        )
    resources.EndpointConfig.create(
        endpoint_config_name=plan.config, production_variants=_variants(settings, plan), **options, **encryption
    )


def _variants(settings: Settings, plan: Plan) -> list[Any]:
    from sagemaker.core.shapes import ProductionVariant, ProductionVariantServerlessConfig
    from sagemaker.core.utils import utils

    utils.SPECIAL_SNAKE_TO_PASCAL_MAPPINGS["memory_size_in_mb"] = "MemorySizeInMB"  # the SDK would send InMb
    chosen = settings.endpoint
    count = plan.instances(settings)
    machine: dict[str, Any] = {"instance_type": chosen.instance_type, "initial_instance_count": count}
    if chosen.type == "serverless":
        serverless = {"memory_size_in_mb": chosen.memory_mb, "max_concurrency": chosen.max_concurrency}
        machine = {"serverless_config": ProductionVariantServerlessConfig(**serverless)}
    elif GPU_INSTANCE.match(chosen.instance_type):
        machine["inference_ami_version"] = limits.GPU_MACHINE
    weight = float(plan.weight or 100)
    new = ProductionVariant(variant_name=plan.variant, model_name=plan.config, initial_variant_weight=weight, **machine)
    total = sum(old["InitialVariantWeight"] for old in plan.beside) or 1.0
    return [
        *(
            ProductionVariant(
                variant_name=old["VariantName"],
                model_name=old["ModelName"],
                instance_type=old["InstanceType"],
                initial_instance_count=old["InitialInstanceCount"],
                initial_variant_weight=(100 - weight) * old["InitialVariantWeight"] / total,
                **({"inference_ami_version": old["InferenceAmiVersion"]} if "InferenceAmiVersion" in old else {}),
            )
            for old in plan.beside
        ),
        new,
    ]


def start(account: Account, plan: Plan) -> None:
    """Create the endpoint, or update it to the new configuration."""
    from sagemaker.core import resources

    chosen, own = account.settings.endpoint, {"session": account.session, "region": account.region}
    before = {variant["VariantName"] for variant in plan.old["ProductionVariants"]}
    if not before:
        resources.Endpoint.create(
            endpoint_name=plan.name, endpoint_config_name=plan.config, tags=model.tags(account), **own
        )
        return
    after = {plan.variant, *(variant["VariantName"] for variant in plan.beside)}
    # AWS updates none that scales to another type of instance; `deploy` lets it scale again:
    # https://docs.aws.amazon.com/sagemaker/latest/dg/endpoint-scaling-update.html
    moved = {old["VariantName"] for old in plan.replaced if old.get("InstanceType") != chosen.instance_type} & after
    scaling.unscale(account, plan.name, sorted(before - after | moved))
    endpoint = resources.Endpoint.get(endpoint_name=plan.name, **own)
    endpoint.endpoint_config_name = plan.config
    options = {}
    if chosen.rollout != "all_at_once" or chosen.alarms:
        if chosen.type != "serverless" and before == after:
            options["deployment_config"] = _steps(chosen, plan.instances(account.settings))
        else:
            print("endpoint.rollout and endpoint.alarms do not apply: AWS makes such an update all at once", flush=True)
    try:
        endpoint.update(**options)
    except BaseException:
        scaling.scale(account, plan.name, sorted(moved))
        raise


def back(account: Account, plan: Plan) -> None:
    """Put an updated endpoint back on the configuration that it had, and wait for it.

    Raises:
        UserError: when it does not come into service.
    """
    config = plan.old["EndpointConfigName"]
    print(f"the golden samples disagree: going back to {config}", flush=True)
    with explained(f"putting {plan.name} back on {config}"):
        account.client("sagemaker").update_endpoint(EndpointName=plan.name, EndpointConfigName=config)
    facts = endpoint_state.wait(account, plan.name)
    if facts["EndpointStatus"] != "InService" or facts["EndpointConfigName"] != config:
        raise UserError(f"{plan.name} is {facts['EndpointStatus']} and not back on {config}: "
                        f"{failure(facts)}; `make status` shows it")  # fmt: skip
    scaling.scale(account, plan.name, [variant["VariantName"] for variant in facts["ProductionVariants"]])


def _steps(chosen: Endpoint, instances: int) -> Any:
    """Blue/green: in steps of whole instances, taken back when an alarm rings."""
    from sagemaker.core import shapes

    steps: dict[str, Any] = {}
    if chosen.rollout == "canary":
        steps["canary_size"] = shapes.CapacitySize(type="INSTANCE_COUNT", value=max(instances // 10, 1))
    elif chosen.rollout == "linear":
        steps["linear_step_size"] = shapes.CapacitySize(type="INSTANCE_COUNT", value=math.ceil(instances / 4))
    routing = shapes.TrafficRoutingConfig(type=chosen.rollout.upper(), wait_interval_in_seconds=BAKE, **steps)
    policy = shapes.BlueGreenUpdatePolicy(
        traffic_routing_configuration=routing,
        termination_wait_in_seconds=BAKE,
        maximum_execution_timeout_in_seconds=UPDATE_HOURS * 3600,
    )
    alarms = shapes.AutoRollbackConfig(alarms=[shapes.Alarm(alarm_name=alarm) for alarm in chosen.alarms])
    rollback = {"auto_rollback_configuration": alarms} if chosen.alarms else {}
    return shapes.DeploymentConfig(blue_green_update_policy=policy, **rollback)


def undo(account: Account, plan: Plan, end: str | None) -> None:
    """After a failure: remove what was made, unless the endpoint uses it; what could not be removed is listed.

    Args:
        account: to work in.
        plan: that failed.
        end: when the endpoint was to be deleted before.
    """
    sagemaker = account.client("sagemaker")
    try:
        facts = endpoint_state.describe(account, plan.name) or {}
        states = (facts, facts.get("PendingDeploymentSummary", {}))
        if plan.config in [state.get("EndpointConfigName") for state in states]:
            remove = terminal.command("destroy", ENDPOINT=plan.name)
            print(f"the endpoint {plan.name} goes on; `{remove}` removes it", flush=True)
            return
        expiry.set_end(account, plan.name, end)
        deletions = {"EndpointConfigName": sagemaker.delete_endpoint_config, "ModelName": sagemaker.delete_model}
        for argument, delete in deletions.items():
            with explained(f"removing {plan.config}"):
                unless_missing(delete, **{argument: plan.config})
    except UserError as error:
        print(f"{error}; what may be left, and costs nothing: a model and a configuration {plan.config}", flush=True)
