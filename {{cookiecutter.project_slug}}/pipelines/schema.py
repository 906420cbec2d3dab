"""The sections and keys of `configs/infrastructure.yaml`, and what their values may be.

What a smaller scope's file does not have has a default here: a key the value that a larger scope's file begins with, a
section nothing at all, for there is no code that reads it.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator

from training.config import Hyperparameters

INSTANCE = r"^ml\.[a-z0-9-]+\.[a-z0-9]+$"
OURS = ["artifacts", "async", "batch", "capture", "checkpoints", "data", "jobs", "models", "monitoring", "pipeline",
        "pretrained", "raw", "registry", "source"]  # prefixes that verbs write to  # fmt: skip
IMAGE = r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$"


class Section(BaseModel):
    """Settings that cannot change and refuse unknown keys and values of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


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


class Images(Section):
    """Which image trains and serves, and how it is built."""

    training: str = Field(pattern=IMAGE)
    serving: str = Field(pattern=IMAGE)
    base: str = Field(pattern=IMAGE)
    packages: Literal["auto"] | list[str]
    build_options: list[str]


class Compute(Section):
    """What jobs run on."""

    local_mode: Literal["auto", "container", "process"]
    local_instances: int = Field(ge=1, le=8)
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


class Data(Section):
    """What is trained on."""

    source: str = Field(min_length=1)
    seed: int = Field(ge=0)
    unreadable: float = Field(ge=0, le=1)
    megapixels: float = Field(gt=0, le=10_000)
    pretrained: str = Field(min_length=1)


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
    objective: Literal["validation:accuracy", "validation:loss", "train:loss", "train:images_per_second"]
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


class Settings(Section):
    """All of `configs/`: `training` is training.yaml, the other sections are those of infrastructure.yaml."""

    training: Hyperparameters
    images: Images
    compute: Compute
    data: Data
    aws: Aws = Aws.model_construct()
    tuning: Tuning = Tuning.model_construct()
    endpoint: Endpoint = Endpoint.model_construct()
    pipeline: Pipeline = Pipeline.model_construct()
    monitoring: Monitoring = Monitoring.model_construct()
    tracking: Tracking = Tracking.model_construct()


# These sections are for a part of `pipelines/`: a project that has the part has the section.
PARTS = {"aws": "cloud", "tuning": "tuning", "endpoint": "endpoint", "pipeline": "pipeline", "monitoring": "monitoring",
         "tracking": "tracking"}  # fmt: skip
