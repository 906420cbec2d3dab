"""Requests that AWS carried out and whose answers never came: a repetition is no refusal, and nothing starts twice."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore import xform_name
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ClientError, ConnectionClosedError
from moto.core.botocore_stubber import BotocoreStubber, MockRawResponse

from pipelines.cloud import storage
from pipelines.cloud.account import Account, place
from pipelines.config import load
from pipelines.terminal import UserError
from tests.cloud import STACK, Recorder, aws, refused
from tests.test_cloud_training import account as training
from tests.test_cloud_training import started

__all__ = ["aws", "training"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore")  # the SDK's own
ROLE, ARN = STACK.role, "arn:aws:sagemaker:us-east-1:123456789012:endpoint/e-1"
VARIANT = {"VariantName": "AllTraffic", "ModelName": "m-0", "InstanceType": "ml.m5.large", "InitialInstanceCount": 1}
S3 = {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "s3://the-bucket/x"}}
RESOURCES = {"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 1}
CREATES: dict[str, dict[str, Any]] = {
    "Model": {"ModelName": "m-1", "ExecutionRoleArn": ROLE,
              "PrimaryContainer": {"Image": "i", "ModelDataUrl": "s3://b/m"}},
    "EndpointConfig": {"EndpointConfigName": "c-1", "ProductionVariants": [VARIANT]},
    "Endpoint": {"EndpointName": "e-1", "EndpointConfigName": "c-0"},
    "TransformJob": {"TransformJobName": "t-1", "ModelName": "m-1", "TransformInput": {"DataSource": S3},
                     "TransformOutput": {"S3OutputPath": "s3://b/o"},
                     "TransformResources": {"InstanceType": "ml.m5.large", "InstanceCount": 1}},
    "ProcessingJob": {"ProcessingJobName": "p-1", "RoleArn": ROLE, "AppSpecification": {"ImageUri": "i"},
                      "ProcessingResources": {"ClusterConfig": RESOURCES}},
    "ModelPackageGroup": {"ModelPackageGroupName": "g-1"},
}  # fmt: skip
Lose = Callable[..., Counter[str]]


@pytest.fixture
def account(aws: Recorder) -> Account:  # noqa: ARG001
    """With a model and a configuration that others can refer to."""
    made = Account(load(["aws.region=us-east-1"], {}), STACK)
    sagemaker = made.client("sagemaker")
    sagemaker.create_model(**CREATES["Model"] | {"ModelName": "m-0"})
    sagemaker.create_endpoint_config(EndpointConfigName="c-0", ProductionVariants=[VARIANT])
    return made


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lose]:
    """Cut the line before some answers of an operation, and refuse its repetition as AWS does; counts the attempts."""
    real, done = BotocoreStubber.__call__, Counter[str]()

    def begin(operation: str, answers: int = 1) -> Counter[str]:
        said = {"__type": "ValidationException", "message": f"Cannot create already existing {operation[6:]}"}
        if operation.startswith("Update"):
            said["message"] = "Cannot update in-progress endpoint"
        elif operation.endswith("Job"):
            said = {"__type": "ResourceInUse", "message": "Job name must be unique within an account and region"}

        def call(self: Any, event_name: str, request: Any, **more: Any) -> Any:
            if event_name.rpartition(".")[2] != operation:
                return real(self, event_name, request, **more)
            done[operation] += 1
            if done[operation] == 1 and operation.startswith("Create"):
                real(self, event_name, request, **more)
            if done[operation] <= answers:
                raise ConnectionClosedError(endpoint_url=request.url)
            return AWSResponse(request.url, 400, {}, MockRawResponse(json.dumps(said)))

        monkeypatch.setattr(BotocoreStubber, "__call__", call)
        monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
        return done

    yield begin
    gc.collect()  # or the SDK's temporary folders would be found by another test


@pytest.mark.parametrize("kind", CREATES)
def test_what_was_made_counts_as_made(account: Account, lose: Lose, kind: str) -> None:
    done, request = lose(f"Create{kind}"), CREATES[kind]
    made = getattr(account.client("sagemaker"), f"create_{xform_name(kind)}")(**request)
    assert made[f"{kind}Arn"].endswith(f"/{request[f'{kind}Name']}")
    assert made["ResponseMetadata"]["RetryAttempts"] == 1
    assert done[f"Create{kind}"] == 2


def test_a_refusal_without_a_lost_answer_stands(account: Account, lose: Lose) -> None:
    lose("CreateModel", answers=0)
    with pytest.raises(ClientError, match="already exist"):
        account.client("sagemaker").create_model(**CREATES["Model"])


def test_what_somebody_else_made_is_not_ours(account: Account, lose: Lose, aws: Recorder) -> None:
    lose("CreateEndpoint")
    aws.answers["DescribeEndpoint"] = {"EndpointArn": ARN, "EndpointConfigName": "c-9"}
    with pytest.raises(ClientError, match="already exist"):
        account.client("sagemaker").create_endpoint(**CREATES["Endpoint"])


@pytest.mark.parametrize(("config", "weight"), [("c-1", 50.0), ("c-9", 20.0)])
def test_an_update_that_goes_on_is_ours_where_it_is_what_was_asked(
    aws: Recorder, account: Account, lose: Lose, config: str, weight: float
) -> None:
    aws.answers["DescribeEndpoint"] = {
        "EndpointArn": ARN, "EndpointConfigName": "c-0", "PendingDeploymentSummary": {"EndpointConfigName": "c-1"},
        "ProductionVariants": [{"VariantName": "AllTraffic", "DesiredWeight": 50.0}],
    }  # fmt: skip
    asked: dict[str, dict[str, Any]] = {
        "UpdateEndpoint": {"EndpointConfigName": config},
        "UpdateEndpointWeightsAndCapacities": {
            "DesiredWeightsAndCapacities": [{"VariantName": "AllTraffic", "DesiredWeight": weight}]
        },
    }
    for operation, request in asked.items():
        call = getattr(account.client("sagemaker"), xform_name(operation))
        lose(operation)
        if config == "c-1":
            assert call(EndpointName="e-1", **request)["EndpointArn"] == ARN
        else:
            with pytest.raises(ClientError, match="in-progress"):
                call(EndpointName="e-1", **request)


def test_a_training_job_starts_once(training: Recorder, lose: Lose) -> None:
    done = lose("CreateTrainingJob")
    job = started(training)
    assert done["CreateTrainingJob"] == 2
    listed = Account(load(["aws.region=us-east-1"], {}), STACK).client("sagemaker").list_training_jobs()
    assert [found["TrainingJobName"] for found in listed["TrainingJobSummaries"]] == [job]


def test_a_job_that_runs_without_any_answer_is_named(training: Recorder, lose: Lose) -> None:
    lose("CreateTrainingJob", answers=9)
    training.answers["DescribeTrainingJob"] = {"TrainingJobStatus": "InProgress"}
    with pytest.raises(UserError, match=r"AWS gave no answer; .*; but \S+ runs\. Follow it with `make logs JOB="):
        started(training)


def test_an_artifact_whose_upload_got_no_answer_is_there(aws: Recorder, account: Account, tmp_path: Path) -> None:
    s3, archive = account.client("s3"), tmp_path / "model.tar.gz"
    s3.create_bucket(Bucket=STACK.bucket)
    archive.write_bytes(b"a model")

    def put(request: dict[str, Any]) -> Any:  # what botocore makes of a lost answer
        del aws.answers["PutObject"]
        s3.put_object(**request | {"Body": content})
        raise refused("PreconditionFailed", "At least one of the pre-conditions you specified did not hold")

    for content in (b"a model", b"another"):
        aws.answers["PutObject"] = put
        if content == b"a model":
            uri = storage.artifact(account, archive)
            s3.delete_object(**place(uri))
        else:
            with pytest.raises(UserError, match="is not the artifact that its name says"):
                storage.artifact(account, archive)
