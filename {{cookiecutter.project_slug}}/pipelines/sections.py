"""What `configs/infrastructure.yaml` has for AWS, in a scope larger than `local`.

What a smaller scope's file does not have has a default here: a key the value that a larger scope's file begins with, a
section nothing at all, for there is no code that reads it.
"""

from __future__ import annotations

import math
import typing
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from pipelines import schema
from pipelines.schema import Section
from pipelines.terminal import UserError
from training.config import ConfigurationError, Hyperparameters, parse, shown

INSTANCE = r"^ml\.[a-z0-9-]+\.[a-z0-9]+$"
OURS = ["artifacts", "async", "batch", "capture", "checkpoints", "data", "jobs", "models", "monitoring", "pipeline",
        "pretrained", "raw", "registry", "source"]  # prefixes that verbs write to  # fmt: skip


class Aws(Section):
    """Where in AWS, and the account's own rules for everything that is created there."""

    region: str = Field(pattern=r"^[a-z]{2,3}(-[a-z]+)+-[0-9]$")
    tags: dict[str, str]
    kms_key: str = Field(pattern=r"^(none|alias/[A-Za-z0-9/_-]+|arn:aws[a-z-]*:kms:[a-z0-9-]+:\d{12}:(key|alias)/\S+)$")
    subnets: list[Annotated[str, Field(pattern=r"^subnet-[0-9a-f]+$")]]
    security_groups: list[Annotated[str, Field(pattern=r"^sg-[0-9a-f]+$")]]
    budget_usd: float = Field(gt=0, le=1_000_000)
    github: str = Field("none", pattern=r"^(none|auto|[\w.-]+(@\d+/[\w.-]+@\d+|/[\w.-]+)(@[\w./-]+)?)$")
    email: str = Field(pattern=r"^(none|[^@\s]+@[^@\s]+)$")
    monthly_usd: float = Field(ge=0, le=1_000_000)

    @field_validator("security_groups")
    @classmethod
    def _both_or_none(cls, value: list[str], info: ValidationInfo) -> list[str]:
        if bool(value) != bool(info.data.get("subnets", value)):
            raise ValueError("subnets and security_groups belong together: give both, or none")
        return value


class Compute(schema.Compute):
    """What jobs run on, here and in AWS."""

    instance_type: str = Field("ml.g5.xlarge", pattern=INSTANCE)
    instances: int = Field(1, ge=1, le=64)
    process_instance_type: str = Field("ml.m5.2xlarge", pattern=INSTANCE)
    volume_gb: int = Field(50, ge=1, le=16384)
    max_hours: float = Field(4, gt=0, le=672)
    spot: bool = True
    max_wait_hours: float = Field(8, gt=0, le=672)
    keep_alive_minutes: int = Field(0, ge=0, le=60)
    input_mode: Literal["File", "FastFile"] = "File"
    isolation: bool = False
    encrypt_traffic: bool = False
    remote_debug: bool = False

    @field_validator("remote_debug")
    @classmethod
    def _a_shell_needs_a_network(cls, value: bool, info: ValidationInfo) -> bool:
        # Its agent runs in the container: https://docs.aws.amazon.com/sagemaker/latest/dg/train-remote-debugging.html
        if value and info.data.get("isolation"):
            raise ValueError("a container without a network has no shell: set compute.isolation to false, or this")
        return value

    @field_validator("max_wait_hours")
    @classmethod
    def _waits_at_least_as_long_as_it_runs(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("spot") and value < info.data.get("max_hours", 0):
            raise ValueError("with spot it includes the time that a job runs: make it at least max_hours")
        return value

    @field_validator("keep_alive_minutes")
    @classmethod
    def _warm_pools_are_not_spot(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("spot") and value:
            raise ValueError("AWS keeps no spot instances warm: set spot to false, or this to 0")
        return value


class Range(Section):
    """Where a number is searched."""

    min: float
    max: float
    scale: Literal["linear", "log"] = "linear"

    @field_validator("max")
    @classmethod
    def _above_the_least(cls, value: float, info: ValidationInfo) -> float:
        if value <= info.data.get("min", -math.inf):
            raise ValueError("it must be above min")
        return value

    @field_validator("scale")
    @classmethod
    def _logarithms_are_of_what_is_positive(cls, value: str, info: ValidationInfo) -> str:
        if value == "log" and info.data.get("min", 1) <= 0:
            raise ValueError("on a log scale min must be above 0")
        return value


Choice = Annotated[  # told apart by their look, so that a mistake in one is not explained as one in the other
    Annotated[Range, Tag("range")] | Annotated[list[bool | int | float | str], Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list) else "range"),
]


class Tuning(Section):
    """What `tune` and `tune-local` search, and for what."""

    ranges: dict[str, Choice] = Field(min_length=1, max_length=30)
    objective: Literal["validation:accuracy", "validation:f1", "validation:worst_recall", "validation:loss",
                       "train:loss", "train:images_per_second"]  # fmt: skip
    goal: Literal["Maximize", "Minimize"]
    strategy: Literal["Bayesian", "Random"]
    max_jobs: int = Field(ge=1, le=750)
    max_parallel_jobs: int = Field(ge=1, le=100)
    early_stopping: bool


class Endpoint(Section):
    """What `deploy` makes."""

    name: str = Field(pattern=r"^(auto|[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62})$")
    type: Literal["realtime", "serverless", "async"]
    instance_type: str = Field(pattern=INSTANCE)
    instances: int = Field(ge=1, le=64)
    max_instances: int = Field(ge=1, le=64)
    memory_mb: Literal[1024, 2048, 3072, 4096, 5120, 6144]
    max_concurrency: int = Field(ge=1, le=200)
    ttl_hours: float = Field(ge=0, le=8760)
    capture_percent: int = Field(ge=0, le=100)
    rollout: Literal["all_at_once", "canary", "linear"]
    alarms: list[str]


class Pipeline(Section):
    """When `pipeline` registers a model, and how long its steps' results are taken again."""

    min_accuracy: float = Field(ge=0, le=2)
    approval: Literal["PendingManualApproval", "Approved"]
    cache_days: int = Field(ge=0, le=365)
    schedule: str = Field("none", pattern=r"^(none|(cron|rate)\(.+\))$")
    watch: str = Field("none", pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?$")
    deploy_on_approval: bool = False
    connection: str = Field("none", pattern=r"^(none|arn:aws[a-z-]*:codeconnections:[a-z0-9-]+:\d{12}:connection/\S+)$")

    @field_validator("watch")
    @classmethod
    def _is_not_written_by_verbs(cls, value: str) -> str:
        if value.split("/")[0] in OURS:
            raise ValueError(f"the verbs write there and would start it; choose a prefix outside {', '.join(OURS)}")
        return value


class Monitoring(Section):
    """How `monitor` watches an endpoint."""

    schedule: Literal["hourly", "daily"]
    instance_type: str = Field(pattern=INSTANCE)
    limit: float = Field(gt=0, le=100)
    minimum: int = Field(ge=1, le=1_000_000)
    latency_ms: float = Field(gt=0, le=60_000)


class Tracking(Section):
    """Where finished runs are logged."""

    uri: str = Field(pattern=r"^(local|[a-z][a-z0-9+]*://\S+|arn:aws[a-z-]*:sagemaker:[a-z0-9-]+:\d{12}:mlflow-\S+)$")


class Settings(schema.Settings):
    """All of `configs/`, with what AWS needs."""

    compute: Compute
    aws: Aws = Aws.model_construct()
    tuning: Tuning = Tuning.model_construct()
    endpoint: Endpoint = Endpoint.model_construct()
    pipeline: Pipeline = Pipeline.model_construct()
    monitoring: Monitoring = Monitoring.model_construct()
    tracking: Tracking = Tracking.model_construct()

    @model_validator(mode="after")
    def _trains_with_every_value_of_a_range(self) -> Self:
        for name, choice in getattr(self.tuning, "ranges", {}).items():
            _check_range(name, choice, self.training.as_dict())
        return self


def number(name: str) -> type | None:
    """The type of a hyperparameter that is a number, int or float; None for text and switches."""
    kind = typing.get_type_hints(Hyperparameters)[name]
    return next((choice for choice in (int, float) if choice in (kind, *typing.get_args(kind))), None)


def _check_range(name: str, choice: Range | list[Any], training: dict[str, Any]) -> None:
    """Make sure that training takes every value of a range, by the container's own checks."""
    try:
        for value in choice if isinstance(choice, list) else (choice.min, choice.max):
            parse(training | {name: value})
    except ConfigurationError as error:
        raise UserError(f"configs: tuning.ranges: {error}") from None
    if isinstance(choice, list) and not 1 < len(set(map(str, choice))) == len(choice) <= 30:
        raise UserError(f"configs: tuning.ranges: {name} is {shown(choice)}; give 2 to 30 different values")
    if not isinstance(choice, list) and number(name) is None:
        raise UserError(f"configs: tuning.ranges: {name} is no number, so it has no min and max; give a list of values")
