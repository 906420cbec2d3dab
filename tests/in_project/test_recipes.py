"""The pages of the template's `docs/recipes/`, and `docs/own-loop.md`: every block of Python in them runs.

And what it asks of AWS is valid and as stored. A block whose first line names a file is written there first. What no
stub can show is said on the page.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.sagemaker.models import sagemaker_backends

from inference import inference
from pipelines import ROOT, SOURCE, project
from pipelines.cloud import images as image_push
from pipelines.cloud import prices
from pipelines.cloud.account import Account
from pipelines.local import data
from tests.cloud import STACK, Call, Recorder, aws, check_golden
from tests.helpers import verb_environment
from training import train as script
from training.config import Hyperparameters
from training.data import load_channels
from training.distributed import World

__all__ = ["aws"]  # a fixture
PAGES = Path(__file__).with_name("recipes")  # docs/recipes/ of the template
OWN_LOOP = ROOT / "docs" / "own-loop.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\S+\.py)\n")
pytestmark = pytest.mark.filterwarnings("ignore")  # the SDK's own
HUB = {  # of the fields that the SDK needs, what a document of JumpStart has
    "Url": "https://pytorch.org/hub", "ModelTypes": ["OPEN_WEIGHTS"], "TrainingSupported": True, "Capabilities": [],
    "IncrementalTrainingSupported": False, "ResourceNameBase": "pt-ic-resnet50",
    "DefaultTrainingInstanceType": "ml.g5.xlarge", "SupportedTrainingInstanceTypes": ["ml.g5.xlarge"],
    "TrainingEcrUri": "763104351884.dkr.ecr.us-east-1.amazonaws.com/pt",
    "TrainingScriptUri": "s3://jumpstart-cache-prod-us-east-1/source-directory/train.tar.gz",
    "TrainingArtifactUri": "s3://jumpstart-cache-prod-us-east-1/pytorch-training/train-resnet50.tar.gz",
    "DynamicContainerDeploymentSupported": False, "HostingEcrUri": "763104351884.dkr.ecr.us-east-1.amazonaws.com/pt",
    "TrainingInstanceTypeVariants": {"Variants": {}},
    "Hyperparameters": [{"Name": "epochs", "Type": "int", "Default": 3, "Scope": "algorithm"}],
}  # fmt: skip


@pytest.fixture
def page(
    aws: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, packed: Path
) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Run the blocks of a page in a folder of their own, in an account with the project's stack."""
    boto3.client("s3").create_bucket(Bucket=STACK.bucket)
    monkeypatch.setattr(Account, "stack", lambda _account: STACK)
    monkeypatch.setattr(prices, "hourly", lambda *_: 1.5)
    monkeypatch.setattr(project, "git_commit", lambda: "abc")
    monkeypatch.setattr(data, "prepare", lambda *_: packed)
    monkeypatch.setattr(image_push, "push", lambda *_: pytest.fail("the image is in the repository"))
    aws.answers["DescribeImages"] = {"imageDetails": []}
    monkeypatch.chdir(tmp_path)

    def execute(name: str) -> dict[str, Any]:
        names: dict[str, Any] = {"__name__": "recipe"}
        path = OWN_LOOP if name == OWN_LOOP.stem else PAGES / f"{name}.md"
        for block in BLOCK.findall(path.read_text(encoding="utf-8")):
            if file := FILE.match(block):
                Path(file[1]).parent.mkdir(parents=True, exist_ok=True)
                Path(file[1]).write_text(block, encoding="utf-8")
            else:
                exec(compile(block, path.name, "exec"), names)
        return names

    handlers = logging.getLogger().handlers[:]
    yield execute
    logging.getLogger().handlers[:] = handlers  # importing some parts of the SDK adds one


def wanted(calls: list[Call], *names: str) -> list[Call]:
    return [call for call in calls if call[0] in names]


def test_every_page_is_tested() -> None:
    """And says what was tried, what it needs, and nothing that this test does not run."""
    text = Path(__file__).read_text(encoding="utf-8")
    pages = sorted(PAGES.glob("*.md"))
    assert len(pages) == 8
    assert "test_ray.py" in (PAGES / "ray-serve.md").read_text(encoding="utf-8")
    for path in (OWN_LOOP, *(page for page in pages if page.stem != "ray-serve")):
        content = path.read_text(encoding="utf-8")
        assert f'page("{path.stem}")' in text
        assert BLOCK.search(content)
        assert "\nTested: " in content or path == OWN_LOOP
        assert len(content.splitlines()) <= 80


def test_batch_queue(aws: Recorder, page: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    aws.answers["SubmitServiceJob"] = lambda asked: {
        "jobArn": "arn:aws:batch:us-east-1:1:service-job/1", "jobName": asked["jobName"], "jobId": "1"}  # fmt: skip
    page("batch-queue")
    (request,) = aws.named("SubmitServiceJob")
    job = json.loads(request["serviceRequestPayload"])
    assert capsys.readouterr().out.endswith(f"queued {job['TrainingJobName']}\n")
    validate("sagemaker", "CreateTrainingJob", job)
    assert not aws.named("CreateTrainingJob")
    check_golden("recipe_batch_queue", [("SubmitServiceJob", request | {"serviceRequestPayload": job})])


def validate(service: str, operation: str, parameters: dict[str, Any]) -> None:
    from botocore.validate import ParamValidator

    shape = boto3.client(service).meta.service_model.operation_model(operation).input_shape
    report = ParamValidator().validate(parameters, shape)
    assert not report.has_errors(), report.generate_report()


def test_jumpstart(aws: Recorder, page: Callable[[str], dict[str, Any]]) -> None:
    aws.answers["DescribeHubContent"] = {
        "HubContentName": "pytorch-ic-resnet50", "HubContentType": "Model", "HubContentVersion": "1.0.0",
        "HubName": "x", "HubContentArn": "arn:aws:sagemaker:us-east-1:aws:hub-content/x/pytorch-ic-resnet50/1.0.0",
        "HubArn": "arn:aws:sagemaker:us-east-1:aws:hub/SageMakerPublicHub", "DocumentSchemaVersion": "2.3.0",
        "HubContentDocument": json.dumps(HUB), "HubContentStatus": "Available", "CreationTime": 1,
    }  # fmt: skip
    page("jumpstart")
    check_golden("recipe_jumpstart", wanted(aws, "DescribeHubContent", "CreateTrainingJob"))


def test_remote_function(aws: Recorder, page: Callable[[str], dict[str, Any]]) -> None:
    names = page("remote-function")
    (request,) = aws.named("CreateTrainingJob")
    assert names["future"].wait(timeout=30) is None
    assert names["future"]._exception is None
    request["Environment"]["REMOTE_FUNCTION_SECRET_KEY"] = "<key>"  # one a call
    words = request["AlgorithmSpecification"]["ContainerArguments"]
    for option in ("--client_python_version", "--client_sagemaker_pysdk_version"):
        words[words.index(option) + 1] = "<version>"
    request = json.loads(json.dumps(request).replace(request["TrainingJobName"], "<job>"))
    check_golden("recipe_remote_function", [("CreateTrainingJob", request)])


def test_custom_driver(aws: Recorder, page: Callable[[str], dict[str, Any]], packed: Path, tmp_path: Path) -> None:
    names = page("custom-driver")
    check_golden("recipe_custom_driver", wanted(aws, "CreateTrainingJob"))
    uploaded = [request["Key"] for request in aws.named("PutObject")]
    assert [key for key in uploaded if key.endswith("distributed_drivers/drive.py")]
    folders = {"SM_CHANNEL_TRAIN": packed / "train", "SM_CHANNEL_VALIDATION": packed / "validation",
               "SM_MODEL_DIR": tmp_path / "model", "SM_OUTPUT_DATA_DIR": tmp_path / "output"}  # fmt: skip
    environment = verb_environment() | {name: str(path) for name, path in folders.items()} | {
        "SM_ENTRY_SCRIPT": names["trainer"].source_code.entry_script, "SM_HPS": '{"epochs": 1, "batch_size": 16}',
        "SM_DISTRIBUTED_CONFIG": json.dumps({"before": ["env", "GIT_COMMIT=driven"]}),
    }  # fmt: skip
    command = [sys.executable, "-u", str(tmp_path / "driver" / "drive.py")]
    subprocess.run(command, cwd=SOURCE, env=environment, check=True)
    facts = json.loads((tmp_path / "output" / "run.json").read_text())
    assert facts["git_commit"] == "driven"
    assert facts["hyperparameters"]["epochs"] == 1


def test_the_check_of_a_gpu_is_one_short_job(aws: Recorder, page: Callable[[str], dict[str, Any]]) -> None:
    Path("template", "benchmarks").mkdir(parents=True)
    Path("template", "benchmarks", "gpu.py").touch()
    page("gpu-check")
    check_golden("recipe_gpu_check", wanted(aws, "CreateTrainingJob"))
    uploaded = [request["Key"] for request in aws.named("PutObject")]
    assert any("benchmarks" in key or key.endswith((".tar.gz", "gpu.py")) for key in uploaded), uploaded


def test_shadow_variant(aws: Recorder, page: Callable[[str], dict[str, Any]]) -> None:
    """Moto stores no shadow: what it is asked for is validated, and the endpoint then says that it is done."""
    sagemaker = boto3.client("sagemaker")
    sagemaker.create_model(ModelName="live", ExecutionRoleArn=STACK.role, PrimaryContainer={"Image": "an-image"})
    variant = {"VariantName": "AllTraffic", "ModelName": "live", "InstanceType": "ml.m5.large",
               "InitialInstanceCount": 2, "InitialVariantWeight": 100.0}  # fmt: skip
    sagemaker.create_endpoint_config(EndpointConfigName="live", ProductionVariants=[variant])
    sagemaker.create_endpoint(EndpointName="image-classifier", EndpointConfigName="live")
    backend = sagemaker_backends["123456789012"]["us-east-1"]
    aws.clear()
    aws.answers["UpdateEndpoint"] = {"EndpointArn": backend.endpoints["image-classifier"].arn}
    page("shadow-variant")
    check_golden("recipe_shadow_variant", wanted(aws, "CreateModel", "CreateEndpointConfig", "UpdateEndpoint"))


def test_multi_model(aws: Recorder, page: Callable[[str], dict[str, Any]]) -> None:
    page("multi-model")
    made = wanted(aws, "CreateModel", "CreateEndpointConfig", "CreateSchedule", "CreateEndpoint")
    assert [name for name, _ in made][-2:] == ["CreateSchedule", "CreateEndpoint"]  # its end before its beginning
    check_golden("recipe_multi_model", made)


def test_own_loop(
    page: Callable[[str], dict[str, Any]], packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    import torch

    monkeypatch.setattr(script, "fit", page("own-loop")["fit"])
    folders = script.Folders(
        packed / "train", packed / "validation", tmp_path / "model", tmp_path / "output", None, None
    )
    with caplog.at_level("INFO"):
        hyperparameters = Hyperparameters(epochs=8, batch_size=8, ema_decay=0.0)
        splits = load_channels(folders.train, folders.validation)
        script.train(hyperparameters, folders, *splits, World(0, 1, torch.device("cpu")))
    lines = [line for line in caplog.messages if re.match(r"epoch=\d+ step=\d+ .*val_accuracy=[0-9.]+ ", line)]
    assert len(lines) == 8
    assert json.loads((tmp_path / "output" / "metrics.json").read_text())["val_accuracy"] > 0.8
    assert len((tmp_path / "output" / "metrics.jsonl").read_text().splitlines()) == 8
    inference.model_fn(str(tmp_path / "model"))  # checks sums and golden samples
    assert os.environ.get("AWS_DEFAULT_REGION") == "us-east-1"
