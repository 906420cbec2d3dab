"""`tune` and `tune-local`: requests, the container of a tuner's job, searches on this machine, and what goes wrong."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest

from pipelines import aws as cloud
from pipelines import config, destroy, engine, inventory, logs, plan, pull, status, train, train_local, tune
from pipelines import tune_local, tuning
from pipelines.console import UserError
from tests.cloud import Recorder, aws, check_golden
from tests.helpers import Verb, verb_environment
from tests.test_cloud_training import KEY, NETWORK, STACK, account, refused, settings

__all__ = ["account", "aws"]  # fixtures
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"  # the SDK's temporary folders
)
CREATE = "CreateHyperParameterTuningJob"
FINAL = "FinalHyperParameterTuningJobObjectiveMetric"


@pytest.fixture
def search(account: Recorder, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """An account, at a fixed time."""
    monkeypatch.setattr(tune, "new_name", lambda: "the-search-261121093000")
    return account


def started(*overrides: str, source: str | None = None, yes: bool = True) -> str:
    return tune.tune(settings(*overrides), source, yes)


EVERYTHING = [
    *NETWORK, f"aws.kms_key={KEY}", "aws.tags={team: vision}", "compute.isolation=true", "compute.spot=false",
    "compute.instance_type=ml.c5.xlarge", "compute.instances=2", "compute.encrypt_traffic=true",
    "compute.input_mode=FastFile", "tuning.objective=validation:loss", "tuning.goal=Minimize",
    "tuning.strategy=Random", "tuning.early_stopping=false", "tuning.max_parallel_jobs=3",
    "tuning.ranges={epochs: {min: 2, max: 20, scale: log}, optimizer: [adamw, sgd], horizontal_flip: [true, false]}",
]  # fmt: skip


@pytest.mark.parametrize(("name", "overrides"), [("tune_default", []), ("tune_everything", EVERYTHING)])
def test_tuning_requests(search: Recorder, name: str, overrides: list[str]) -> None:
    started(*overrides)
    request = search.named(CREATE)[0]
    hyperparameters = request["TrainingJobDefinition"]["StaticHyperParameters"]
    hyperparameters["sagemaker_submit_directory"] = re.sub(r"\d{10}", "<s>", hyperparameters["sagemaker_submit_directory"])
    for channel in request["TrainingJobDefinition"]["InputDataConfig"]:
        place = channel["DataSource"]["S3DataSource"]
        place["S3Uri"] = re.sub(r"tuning-\d{10}", "tuning-<s>", place["S3Uri"])
    check_golden(name, [call for call in search if call[0] == CREATE])
    assert len(request["HyperParameterTuningJobName"]) <= 32


@pytest.mark.parametrize("project", ["cats", "a-classifier-of-many-big-cats", "a-classifier-of-ca-and-of-dogs"])
def test_names_fit_into_the_limit(monkeypatch: pytest.MonkeyPatch, project: str) -> None:
    monkeypatch.setattr(engine, "project_name", lambda: project)
    name = tune.new_name()
    assert len(name) <= 32
    assert re.fullmatch(r"[a-z](-?[a-z0-9])+-\d{12}", name)
    assert name.startswith(f"{logs.short()}-")
    assert project.startswith(logs.short())
