"""Searches and batch transform, in a stub's containers."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Callable
from typing import Any

import pytest

from conftest import ROLE, STUB, until
from rehearsal import jobs, tuning
from rehearsal.operations import Account
from test_jobs import MACHINES, content, put

Clients = Callable[[str], Any]
RANGES = {
    "ContinuousParameterRanges": [
        {"Name": "rate", "MinValue": "0.001", "MaxValue": "0.1", "ScalingType": "Logarithmic"}
    ],
    "IntegerParameterRanges": [{"Name": "layers", "MinValue": "1", "MaxValue": "3"}],
    "CategoricalParameterRanges": [{"Name": "size", "Values": ["64", "128"]}],
}


def test_values_are_drawn_within_their_ranges() -> None:
    drawn = list(itertools.islice(tuning.draws(RANGES, False, 0), 200))
    assert {row["size"] for row in drawn} == {"64", "128"}
    assert {row["layers"] for row in drawn} == {"1", "2", "3"}
    rates = [float(row["rate"]) for row in drawn]
    assert 0.001 <= min(rates) < 0.01 < max(rates) <= 0.1
    assert 60 < sum(rate < 0.01 for rate in rates) < 140  # even on the logarithmic scale
    grid = {"CategoricalParameterRanges": [{"Name": "a", "Values": ["1", "2"]}, {"Name": "b", "Values": ["x"]}]}
    assert [*tuning.draws(grid, True, 0)] == [{"a": "1", "b": "x"}, {"a": "2", "b": "x"}]


def test_a_search_trains_and_finds_the_best(account: Account, client: Clients) -> None:
    code = """
import json
given = json.load(open("/opt/ml/input/config/hyperparameters.json"))
print("accuracy=" + given["layers"], given["_tuning_objective_metric"])
if given["layers"] == "2": raise SystemExit(1)
"""
    sagemaker, name = client("sagemaker"), "a-search"
    ranges = {"CategoricalParameterRanges": [{"Name": "layers", "Values": ["1", "2", "3"]}]}
    made = sagemaker.create_hyper_parameter_tuning_job(
        HyperParameterTuningJobName=name,
        HyperParameterTuningJobConfig={
            "Strategy": "Grid", "ResourceLimits": {"MaxNumberOfTrainingJobs": 3, "MaxParallelTrainingJobs": 2},
            "HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": "accuracy"},
            "ParameterRanges": ranges,
        },
        TrainingJobDefinition={
            "StaticHyperParameters": {"code": code}, "RoleArn": ROLE, "ResourceConfig": MACHINES,
            "AlgorithmSpecification": {"TrainingImage": STUB, "TrainingInputMode": "File", "MetricDefinitions": [
                {"Name": "accuracy", "Regex": "accuracy=([0-9.]+)"}]},
            "OutputDataConfig": {"S3OutputPath": "s3://the-bucket/jobs"},
            "StoppingCondition": {"MaxRuntimeInSeconds": 60},
        },
        Tags=[{"Key": "project", "Value": "p"}],
    )  # fmt: skip

    def look() -> Any:
        found = sagemaker.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName=name)
        return found if found["HyperParameterTuningJobStatus"] in jobs.ENDED else None

    facts = until(look)
    assert facts["HyperParameterTuningJobStatus"] == "Completed", facts.get("FailureReason")
    assert facts["TrainingJobStatusCounters"] | {"InProgress": 0} == {
        "Completed": 2, "InProgress": 0, "RetryableError": 0, "NonRetryableError": 1, "Stopped": 0
    }  # fmt: skip
    best = facts["BestTrainingJob"]
    assert best["TunedHyperParameters"] == {"layers": "3"}
    assert best["FinalHyperParameterTuningJobObjectiveMetric"]["Value"] == 3.0
    listed = sagemaker.list_training_jobs_for_hyper_parameter_tuning_job(HyperParameterTuningJobName=name)
    assert len(listed["TrainingJobSummaries"]) == 3
    job = sagemaker.describe_training_job(TrainingJobName=best["TrainingJobName"])
    assert job["TuningJobArn"] == made["HyperParameterTuningJobArn"]
    assert sagemaker.list_tags(ResourceArn=job["TrainingJobArn"])["Tags"] == [{"Key": "project", "Value": "p"}]


def model(client: Clients, handler: str) -> str:
    """A model whose container answers by some Python."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo("handler.py")
        member.size = len(handler)
        tar.addfile(member, io.BytesIO(handler.encode()))
    client("s3").put_object(Bucket="the-bucket", Key="model.tar.gz", Body=packed.getvalue())
    container = {"Image": STUB, "ModelDataUrl": "s3://the-bucket/model.tar.gz"}
    client("sagemaker").create_model(ModelName="m", ExecutionRoleArn=ROLE, PrimaryContainer=container)
    return "m"


@pytest.mark.parametrize("kind", ["S3Prefix", "ManifestFile"])
def test_each_object_is_asked_and_what_failed_is_said(kind: str, account: Account, client: Clients) -> None:
    put(client, raw__a="one", raw__deep__b="two", raw__bad="bad",
        manifest=json.dumps([{"prefix": "s3://the-bucket/raw/"}, "a", "deep/b"]))  # fmt: skip
    handler = 'def answer(body, headers): return (400 if body == b"bad" else 200), "text/plain", body.upper()'
    sagemaker, prefix = client("sagemaker"), kind == "S3Prefix"
    sagemaker.create_transform_job(
        TransformJobName="t", ModelName=model(client, handler), MaxConcurrentTransforms=2,
        TransformInput={"ContentType": "text/plain", "DataSource": {"S3DataSource": {
            "S3DataType": kind, "S3Uri": f"s3://the-bucket/{'raw/' if prefix else 'manifest'}"}}},
        TransformOutput={"S3OutputPath": "s3://the-bucket/out"},
        TransformResources={"InstanceType": "ml.m5.large", "InstanceCount": 1},
    )  # fmt: skip

    def look() -> Any:
        found = sagemaker.describe_transform_job(TransformJobName="t")
        return found if found["TransformJobStatus"] in jobs.ENDED else None

    facts = until(look)
    assert facts["TransformJobStatus"] == ("Failed" if prefix else "Completed"), facts.get("FailureReason")
    assert content(client, "out/a.out") == b"ONE"
    assert content(client, "out/deep/b.out") == b"TWO"
    if prefix:
        assert "1 of 3 objects: bad: the model answered 400" in facts["FailureReason"]
