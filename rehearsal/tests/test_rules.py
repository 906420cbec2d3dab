"""Each documented refusal, provoked by a request, and answered with AWS's shape of an error."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore import xform_name
from botocore.config import Config
from botocore.exceptions import ClientError

from rehearsal import modules, server  # noqa: F401  the first takes over operations
from rehearsal.operations import OWNER, Account, now
from rehearsal.rules import RULES

ROLE, IMAGE = "arn:aws:iam::123456789012:role/job", "i"
MACHINES = {"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 1}
VARIANT = {"VariantName": "a", "ModelName": "m", "InstanceType": "ml.m5.large", "InitialInstanceCount": 1}
LESS = {"VariantName": "a", "ModelName": "m", "ServerlessConfig": {"MemorySizeInMB": 1024, "MaxConcurrency": 1}}
CONFIG = {"EndpointConfigName": "c-2", "ProductionVariants": [VARIANT]}
SERVERLESS = {"EndpointConfigName": "c-2", "ProductionVariants": [LESS]}
TRAIN: dict[str, Any] = {
    "TrainingJobName": "t", "RoleArn": ROLE, "ResourceConfig": MACHINES,
    "StoppingCondition": {"MaxRuntimeInSeconds": 9},
    "AlgorithmSpecification": {"TrainingImage": IMAGE, "TrainingInputMode": "File"},
    "OutputDataConfig": {"S3OutputPath": "s3://b/o"},
}  # fmt: skip
PROCESS = {"ProcessingJobName": "p", "RoleArn": ROLE, "AppSpecification": {"ImageUri": IMAGE},
           "ProcessingResources": {"ClusterConfig": MACHINES}}  # fmt: skip
TRANSFORM = {
    "TransformJobName": "t", "ModelName": "m", "TransformOutput": {"S3OutputPath": "s3://b/o"},
    "TransformInput": {"DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "s3://b/i"}}},
    "TransformResources": {"InstanceType": "ml.m5.large", "InstanceCount": 1},
}  # fmt: skip
RANGE = {"Name": "r", "MinValue": "0.1", "MaxValue": "1", "ScalingType": "Linear"}
TUNE: dict[str, Any] = {
    "HyperParameterTuningJobName": "t",
    "HyperParameterTuningJobConfig": {
        "Strategy": "Random", "HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": "m"},
        "ResourceLimits": {"MaxNumberOfTrainingJobs": 2, "MaxParallelTrainingJobs": 1},
        "ParameterRanges": {"ContinuousParameterRanges": [RANGE]},
    },
    "TrainingJobDefinition": {
        "AlgorithmSpecification": {"TrainingImage": IMAGE, "TrainingInputMode": "File",
                                   "MetricDefinitions": [{"Name": "m", "Regex": "m"}]},
        "RoleArn": ROLE, "ResourceConfig": MACHINES, "StoppingCondition": {"MaxRuntimeInSeconds": 9},
        "OutputDataConfig": {"S3OutputPath": "s3://b/o"},
    },
}  # fmt: skip
UPDATE = {"EndpointName": "e", "EndpointConfigName": "c"}
ROUTING = "DeploymentConfig.BlueGreenUpdatePolicy"
CANARY = {"Type": "CANARY", "WaitIntervalInSeconds": 9, "CanarySize": {"Type": "CAPACITY_PERCENT", "Value": 50}}
SCALE = {"ServiceNamespace": "sagemaker", "ResourceId": "endpoint/e/variant/a", "MinCapacity": 1, "MaxCapacity": 2,
         "ScalableDimension": "sagemaker:variant:DesiredInstanceCount"}  # fmt: skip
SCHEDULE: dict[str, Any] = {
    "Name": "s", "ScheduleExpression": "rate(1 day)", "FlexibleTimeWindow": {"Mode": "OFF"},
    "Target": {"Arn": "arn:aws:scheduler:::aws-sdk:sagemaker:deleteEndpoint", "RoleArn": ROLE, "Input": "{}"},
}  # fmt: skip
# Operation, request, where it is changed and to what, what the refusal says. The first of each is the constraints'.
WRONG: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("CreateTrainingJob", TRAIN, {"ResourceConfig.InstanceType": "ml.m5.tiny"}, "enum value set: [ml.m4.xlarge"),
    ("CreateTrainingJob", TRAIN, {"TrainingJobName": "a_b"}, "satisfy regular expression pattern: "),
    ("CreateTrainingJob", TRAIN, {"Environment": {f"k{n}": "v" for n in range(101)}}, "less than or equal to 100"),
    ("CreateModel", {"ModelName": "x" * 64, "ExecutionRoleArn": ROLE, "PrimaryContainer": {"Image": IMAGE}}, {},
     "less than or equal to 63"),
    ("CreateTrainingJob", TRAIN, {"EnableManagedSpotTraining": True}, "Invalid MaxWaitTimeInSeconds"),
    ("CreateTrainingJob", TRAIN, {"EnableManagedSpotTraining": True, "StoppingCondition.MaxWaitTimeInSeconds": 9,
                                  "ResourceConfig.KeepAlivePeriodInSeconds": 60}, "with EnableManagedSpot"),
    ("CreateTrainingJob", TRAIN, {"ResourceConfig.VolumeKmsKeyId": "k", "ResourceConfig.InstanceType": "ml.g5.xlarge"},
     "VolumeKmsKeyId is not supported"),
    ("CreateProcessingJob", PROCESS, {"ProcessingResources.ClusterConfig.VolumeKmsKeyId": "k",
                                      "ProcessingResources.ClusterConfig.InstanceType": "ml.m5d.large"},
     "satisfy enum value set"),
    ("CreateProcessingJob", PROCESS, {"ProcessingResources.ClusterConfig.VolumeKmsKeyId": "k",
                                      "ProcessingResources.ClusterConfig.InstanceType": "ml.g5.xlarge"},
     "VolumeKmsKeyId is not supported"),
    ("CreateTrainingJob", TRAIN, {"AlgorithmSpecification.AlgorithmName": "x"}, "Either TrainingImage or"),
    ("CreateModelPackage", {"ModelPackageGroupName": "group", "Tags": [{"Key": "k", "Value": "v"}]}, {}, "Tags are"),
    ("CreateTransformJob", TRANSFORM, {"ModelName": "loose"}, "ModelDataSource of loose cannot be used"),
    ("CreateEndpointConfig", SERVERLESS, {"DataCaptureConfig": {
        "InitialSamplingPercentage": 1, "DestinationS3Uri": "s3://b/c", "CaptureOptions": [{"CaptureMode": "Input"}]}},
     "DataCaptureConfig is not supported for serverless"),
    ("CreateEndpointConfig", SERVERLESS, {"ProductionVariants": [LESS, LESS | {"VariantName": "b"}]},
     "one production variant only"),
    ("CreateEndpointConfig", SERVERLESS, {"ProductionVariants": [LESS | {"ModelName": "alone"}]}, "network isolation"),
    ("CreateEndpointConfig", SERVERLESS, {"ProductionVariants": [LESS | {"ServerlessConfig": {
        "MemorySizeInMB": 1500, "MaxConcurrency": 1}}]}, "MemorySizeInMB is 1500"),
    ("CreateEndpointConfig", CONFIG, {"ProductionVariants": [VARIANT, VARIANT]}, "must have unique names"),
    ("CreateEndpointConfig", CONFIG, {"ProductionVariants": [{"VariantName": "a", "ModelName": "m"}]},
     "has no InstanceType"),
    ("CreateEndpointConfig", CONFIG, {"ProductionVariants": [VARIANT | {"ModelName": "gone"}]}, "Could not find model"),
    ("CreateModel", {"ModelName": "x", "ExecutionRoleArn": ROLE}, {}, "Either PrimaryContainer or Containers"),
    ("CreateModel", {"ModelName": "m", "ExecutionRoleArn": ROLE, "PrimaryContainer": {"Image": IMAGE}}, {},
     "Cannot create already existing model"),
    ("CreateModel", {"ModelName": "x", "ExecutionRoleArn": ROLE, "PrimaryContainer": {
        "Image": "123456789012.dkr.ecr.us-east-1.amazonaws.com/repo:index"}}, {}, "Unsupported manifest media type"),
    ("CreateTrainingJob", TRAIN, {"AlgorithmSpecification.TrainingImage":
                                  "123456789012.dkr.ecr.us-east-1.amazonaws.com/repo:none"}, "not found"),
    ("UpdateEndpoint", UPDATE, {"EndpointConfigName": "less"}, "to a serverless endpoint is not supported"),
    ("UpdateEndpoint", UPDATE, {"EndpointConfigName": "larger"}, "must be deregistered as scalable targets"),
    ("UpdateEndpoint", UPDATE, {f"{ROUTING}.TrafficRoutingConfiguration": CANARY | {"CanarySize": {
        "Type": "CAPACITY_PERCENT", "Value": 60}}}, "CanarySize must be between 0 and 50 percent"),
    ("UpdateEndpoint", UPDATE, {f"{ROUTING}.TrafficRoutingConfiguration": CANARY | {"Type": "LINEAR"}},
     "CanarySize must be given when"),
    ("UpdateEndpoint", UPDATE, {f"{ROUTING}.TrafficRoutingConfiguration": {
        "Type": "LINEAR", "WaitIntervalInSeconds": 9, "LinearStepSize": {"Type": "CAPACITY_PERCENT", "Value": 5}}},
     "LinearStepSize must be between 10 and 50"),
    ("UpdateEndpoint", UPDATE, {ROUTING: {"TrafficRoutingConfiguration": CANARY | {"WaitIntervalInSeconds": 900},
                                          "MaximumExecutionTimeoutInSeconds": 600}}, "must be larger than the 900"),
    ("CreateTransformJob", TRANSFORM, {"MaxPayloadInMB": 51, "MaxConcurrentTransforms": 2}, "at most 100 MB"),
    ("CreateTransformJob", TRANSFORM, {"BatchStrategy": "MultiRecord"}, "needs a SplitType"),
    ("CreateHyperParameterTuningJob", TUNE, {
        "HyperParameterTuningJobConfig.ResourceLimits.MaxParallelTrainingJobs": 3}, "at most MaxNumberOfTrainingJobs"),
    ("CreateHyperParameterTuningJob", TUNE, {"HyperParameterTuningJobName": "x" * 33}, "less than or equal to 32"),
    ("CreateHyperParameterTuningJob", TUNE, {"HyperParameterTuningJobConfig.Strategy": "Hyperband",
                                             "HyperParameterTuningJobConfig.TrainingJobEarlyStoppingType": "Auto"},
     "must be Off with the strategy Hyperband"),
    ("CreateHyperParameterTuningJob", TUNE, {
        "HyperParameterTuningJobConfig.HyperParameterTuningJobObjective.MetricName": "x"}, "not among the metric"),
    ("CreateHyperParameterTuningJob", TUNE, {"HyperParameterTuningJobConfig.ParameterRanges.ContinuousParameterRanges":
                                             [RANGE | {"MinValue": "2"}]}, "is above its MaxValue"),
    ("CreateHyperParameterTuningJob", TUNE, {"HyperParameterTuningJobConfig.ParameterRanges.ContinuousParameterRanges":
                                             [RANGE | {"MinValue": "0", "ScalingType": "Logarithmic"}]}, "above 0"),
    ("CreatePipeline", {"PipelineName": "p", "RoleArn": ROLE, "PipelineDefinition": "{"}, {}, "Unable to parse"),
    ("CreatePipeline", {"PipelineName": "p", "RoleArn": ROLE, "PipelineDefinition": json.dumps(
        {"Steps": [{"Name": "a"}, {"Name": "a"}]})}, {}, "unique names"),
    ("DeleteModelPackageGroup", {"ModelPackageGroupName": "group"}, {}, "still contains Model Packages"),
    ("RegisterScalableTarget", SCALE, {"ResourceId": "endpoint/x/variant/a"}, "No endpoint in service"),
    ("RegisterScalableTarget", SCALE, {"MinCapacity": 0}, "MinCapacity 0 is for asynchronous"),
    ("RegisterScalableTarget", SCALE, {"ResourceId": "endpoint/small/variant/a"}, "ml.t2.medium is burstable"),
    ("CreateSchedule", SCHEDULE, {"Target.Arn": "arn:aws:scheduler:::aws-sdk:sagemaker:listModels"}, "reads"),
    ("CreateSchedule", SCHEDULE, {"Target.Arn": "arn:aws:scheduler:::aws-sdk:sagemaker:endEndpoint"}, "no operation"),
    ("CreateSchedule", SCHEDULE, {"Target.RetryPolicy": {"MaximumRetryAttempts": 186}}, "less than or equal to 185"),
]  # fmt: skip
PROVOKED = set[str]()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """Clients that check nothing themselves, in an account with what the requests refer to."""
    account = Account(tmp_path_factory.mktemp("account"))
    server.start(account)

    def made(service: str) -> Any:
        return boto3.session.Session().client(
            service, region_name=account.region, endpoint_url=account.front, aws_access_key_id=OWNER,
            aws_secret_access_key="x", config=Config(retries={"total_max_attempts": 1}, parameter_validation=False),
        )  # fmt: skip

    sagemaker = made("sagemaker")
    model = {"ExecutionRoleArn": ROLE, "PrimaryContainer": {"Image": IMAGE}}
    sagemaker.create_model(ModelName="m", **model)
    sagemaker.create_model(ModelName="alone", **model, EnableNetworkIsolation=True)
    source = {"S3Uri": "s3://b/m/", "S3DataType": "S3Prefix", "CompressionType": "None"}
    loose = {"Image": IMAGE, "ModelDataSource": {"S3DataSource": source}}
    sagemaker.create_model(ModelName="loose", ExecutionRoleArn=ROLE, PrimaryContainer=loose)
    configs = {"c": VARIANT, "less": LESS, "larger": VARIANT | {"InstanceType": "ml.m5.xlarge"},
               "small": VARIANT | {"InstanceType": "ml.t2.medium"}}  # fmt: skip
    for name, variant in configs.items():
        sagemaker.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant])
    account.things["Endpoint"] = {
        name: {"EndpointName": name, "EndpointArn": account.arn("endpoint", name), "EndpointStatus": "InService",
               "EndpointConfigName": config, "CreationTime": now(), "LastModifiedTime": now()}
        for name, config in (("e", "c"), ("small", "small"))
    }  # fmt: skip
    made("application-autoscaling").register_scalable_target(**SCALE)
    sagemaker.create_model_package_group(ModelPackageGroupName="group")
    container = {"Image": IMAGE, "ModelDataUrl": "s3://b/m"}
    sagemaker.create_model_package(ModelPackageGroupName="group", InferenceSpecification={
        "Containers": [container], "SupportedContentTypes": ["a/b"], "SupportedResponseMIMETypes": ["a/b"],
    })  # fmt: skip
    made("ecr").create_repository(repositoryName="repo")
    kind = "application/vnd.oci.image.index.v1+json"
    made("ecr").put_image(
        repositoryName="repo", imageTag="index", imageManifestMediaType=kind,
        imageManifest=json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": []}),
    )  # fmt: skip
    made.account = account  # type: ignore[attr-defined]
    yield made
    account.close()


def changed(request: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(request)
    for path, value in changes.items():
        *way, last = path.split(".")
        place = made
        for part in way:
            place = place.setdefault(part, {})
        place[last] = value
    return made


@pytest.mark.parametrize(("operation", "request_", "changes", "said"), WRONG)
def test_what_aws_refuses_is_refused(
    client: Any, operation: str, request_: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    services = {"RegisterScalableTarget": "application-autoscaling", "CreateSchedule": "scheduler"}
    call = getattr(client(services.get(operation, "sagemaker")), xform_name(operation))
    with pytest.raises(ClientError) as error:
        call(**changed(request_, changes))
    details = error.value.response["Error"]
    assert said in details["Message"]
    assert details["Code"] == ("ConflictException" if operation.startswith("DeleteModelP") else "ValidationException")
    assert error.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400
    PROVOKED.update(event["text"] for event in client.account.events if event["kind"] == "rule")


def test_every_rule_was_provoked_and_names_its_page() -> None:
    pages = {page for page, *_ in RULES}
    assert all(page.startswith("https://") for page in pages)
    assert pages == PROVOKED
