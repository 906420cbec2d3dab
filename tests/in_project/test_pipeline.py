"""`pipeline`, `pipeline-local`: the definition, each request in it, its gate, whole runs of it."""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError
from botocore.validate import ParamValidator

from pipelines import ROOT, config, project, training_pipeline
from pipelines.cloud import destroy, inventory, packages, prices
from pipelines.cloud.account import Account, Stack
from pipelines.endpoint import deploy
from pipelines.pipeline import cloud as pipeline
from pipelines.pipeline.local import Execution
from pipelines.registry import package as registry
from pipelines.terminal import UserError
from pipelines.training_pipeline import LOCAL, Inputs
from tests.cloud import KEY, STACK, Recorder, aws, check_golden
from tests.graph import mermaid
from tests.helpers import Verb, verb_environment
from tests.test_training_local import NO_ENGINE

__all__ = ["aws"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the SDK's temporary folder
NAME = project.name()
ACCOUNT = "arn:aws:iam::123456789012:role"
EVERYTHING = [
    "aws.subnets=[subnet-0a, subnet-0b]", "aws.security_groups=[sg-0a]", f"aws.kms_key={KEY}",
    "aws.tags={team: vision}", "compute.isolation=true", "compute.encrypt_traffic=true", "compute.spot=false",
    "compute.keep_alive_minutes=10", "compute.input_mode=FastFile", "compute.instance_type=ml.c5.xlarge",
    "training.epochs=3", "pipeline.cache_days=0",
]  # fmt: skip
CREATES = {
    "Processing": "CreateProcessingJob", "Training": "CreateTrainingJob", "RegisterModel": "CreateModelPackage",
}  # fmt: skip
CACHED = {  # what SageMaker compares before it takes an earlier result, by its documentation
    "Processing": ("AppSpecification", "Environment", "ProcessingInputs"),
    "Training": ("AlgorithmSpecification", "CheckpointConfig", "Environment", "HyperParameters", "InputDataConfig"),
}
SHORT = ("--set", "training.epochs=3")


def settings(*overrides: str) -> config.Settings:
    return config.load(["aws.region=us-east-1", *overrides], {})


def compiled(folder: Path, *overrides: str, stack: Stack = STACK, **inputs: Any) -> dict[str, Any]:
    staged = folder / "staged"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    given = {"data": "s3://the-bucket/raw/"} | inputs
    return training_pipeline.definition(Account(settings(*overrides), stack), Inputs(**given), staged)


def steps(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = {step["Name"]: step for step in document["Steps"]}
    for key in ("IfSteps", "ElseSteps"):
        found |= {step["Name"]: step for step in found["Gate"]["Arguments"][key]}
    return found


@pytest.fixture(autouse=True)
def _commit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(training_pipeline, "source_commit", lambda: "abc")
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the folders that the SDK's trainer leaves to the garbage collector
        gc.collect()


def evaluated(folder: Path, document: dict[str, Any], value: float, bound: float, **parameters: Any) -> Execution:
    """An execution in which all steps before the gate have run."""
    execution = Execution(document, parameters, {}, None, "20261121-093000-a1b2", folder)
    accuracy = {"value": value, "ci_low": value, "ci_high": bound}
    others = ("cross_entropy", "macro_precision", "macro_recall", "macro_f1")
    metrics = {"accuracy": accuracy} | {name: {"value": 0.5} for name in others}
    said = ("model", "baseline", "evaluation", "architecture", "image_size", "torch_version", "classes")
    contents = {
        "Evaluation": {"metrics": metrics, "images": 9, "dataset_fingerprint": "f"},
        "Package": {name: f"the {name}" for name in said} | dict.fromkeys(said[:3], "0" * 64),
    }
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
        execution.values[f"Steps.Evaluate.PropertyFiles.{name}"] = folder / f"{name}.json"
    for name in ("Preprocess", "Evaluate"):
        for kept in ("packed", "evaluation"):
            execution.values[f"Steps.{name}.ProcessingOutputConfig.Outputs['{kept}'].S3Output.S3Uri"] = f"s3://b/{kept}"
    execution.values["Steps.Train.ModelArtifacts.S3ModelArtifacts"] = "s3://b/model.tar.gz"
    return execution


@pytest.mark.parametrize(("name", "overrides"), [("pipeline_default", []), ("pipeline_everything", EVERYTHING)])
def test_the_definition_is_golden_and_building_it_asks_aws_for_nothing(
    aws: Recorder, tmp_path: Path, name: str, overrides: list[str]
) -> None:
    document = compiled(tmp_path, *overrides, weights="s3://the-bucket/weights/", champion=0.5)
    assert not aws
    check_golden(name, [("CreatePipeline", document)])


def test_it_has_these_steps_and_no_hidden_one(tmp_path: Path) -> None:
    kinds = {name: step["Type"] for name, step in steps(compiled(tmp_path)).items()}
    assert kinds == {
        "Preprocess": "Processing", "Train": "Training", "Evaluate": "Processing", "Gate": "Condition",
        "Register": "RegisterModel", "Refuse": "Fail",
    }  # fmt: skip


@pytest.mark.parametrize("overrides", [[], EVERYTHING])
def test_every_request_is_valid(tmp_path: Path, overrides: list[str]) -> None:
    document = compiled(tmp_path, *overrides)
    execution = evaluated(tmp_path, document, 0.9, 0.95)
    model = boto3.client("sagemaker", region_name="us-east-1").meta.service_model
    asked = {name: step for name, step in steps(document).items() if step["Type"] in CREATES}
    assert len(asked) == 4
    for step in asked.values():
        shape = model.operation_model(CREATES[step["Type"]]).input_shape
        report = ParamValidator().validate(execution.resolved(step["Arguments"]), shape)
        assert not report.has_errors(), report.generate_report()
        own = [value for key, value in step["Arguments"].items() if key.endswith("JobName")]
        assert all(name.startswith(f"{NAME}-") for name in own), "the stack's policies allow no other names"
    tagged = [step["Arguments"]["Tags"] for step in asked.values() if "Tags" in step["Arguments"]]
    assert len(tagged) == 3
    assert all({"Key": "project", "Value": NAME} in tags for tags in tagged)


def test_the_pipeline_s_role_may_start_its_steps_and_gives_them_the_other_role() -> None:
    template = yaml.safe_load((ROOT / "infrastructure" / "stack.yaml").read_text(encoding="utf-8"))
    policy = template["Resources"]["PipelineRole"]["Properties"]["Policies"][0]["PolicyDocument"]["Statement"]
    allowed = {statement["Sid"]: statement for statement in policy}
    wanted = {
        f"sagemaker:{call.replace('Create', verb)}" for call in CREATES.values() for verb in ("Create", "Describe")
    }
    wanted |= {"sagemaker:StopTrainingJob", "sagemaker:StopProcessingJob", "sagemaker:AddTags"}
    given = (allowed[name]["Action"] for name in ("Jobs", "Registry", "Steps", "Tag"))
    assert wanted <= {action for actions in given for action in ([actions] if isinstance(actions, str) else actions)}
    assert allowed["GiveToSageMaker"]["Resource"] == {"Fn::GetAtt": ["ExecutionRole", "Arn"]}


PRINTED = """
import json, pathlib, tempfile
from pipelines.cloud.account import Account
from pipelines.config import load
from pipelines.training_pipeline import LOCAL, Inputs, definition
with tempfile.TemporaryDirectory() as staged:
    print(json.dumps(definition(Account(load(), LOCAL), Inputs("s3://local/raw/"), pathlib.Path(staged))))
"""


def test_the_same_sources_give_the_same_bytes_wherever_they_lie(project: Path, tmp_path: Path) -> None:
    def printed(folder: Path) -> str:
        command = [sys.executable, "-c", PRINTED]
        done = subprocess.run(command, cwd=folder, env=verb_environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    other = tmp_path / "elsewhere"
    shutil.copytree(project, other)
    first = printed(project)
    assert printed(other) == first
    (other / "src" / "imaging.py").write_text((other / "src" / "imaging.py").read_text() + "# changed\n")
    assert printed(other) != first


def test_nothing_that_a_cache_compares_names_the_execution_or_the_time(tmp_path: Path) -> None:
    document = steps(compiled(tmp_path))
    for name in ("Preprocess", "Train", "Evaluate"):
        step = document[name]
        assert step["CacheConfig"] == {"Enabled": True, "ExpireAfter": "P30D"}
        compared = json.dumps({key: step["Arguments"].get(key) for key in CACHED[step["Type"]]})
        assert "Execution." not in compared
        assert {policy["ExceptionType"][0] for policy in step["RetryPolicies"]} == {
            "Step.THROTTLING", "SageMaker.CAPACITY_ERROR",
        }  # fmt: skip
    outputs = json.dumps([document[name]["Arguments"]["ProcessingOutputConfig"] for name in ("Preprocess", "Evaluate")])
    assert outputs.count("Execution.PipelineExecutionId") == 2, "executions must not write over each other"


def test_checkpoints_are_shared_only_by_trainings_that_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def place(*overrides: str) -> str:
        return json.dumps(steps(compiled(tmp_path, *overrides))["Train"]["Arguments"]["CheckpointConfig"])

    first = place()
    assert place("pipeline.min_accuracy=0.5", "compute.instances=2") == first
    assert "Parameters.Epochs" in first
    assert "Steps.Preprocess" in first
    assert place("training.batch_size=32") != first
    monkeypatch.setattr(project, "source_hash", lambda: "0" * 64)
    assert place() != first


@pytest.mark.parametrize(
    ("value", "bound", "least", "champion", "passes"),
    [
        (0.9, 0.95, 0.9, 0.95, True),
        (0.9, 0.95, 0.91, 0.0, False),
        (0.9, 0.95, 0.9, 0.951, False),
        (0.9, 0.95, 1.01, 0.99, False),
    ],
)
def test_the_gate(
    tmp_path: Path, value: float, bound: float, least: float, champion: float, passes: bool, capsys: Any
) -> None:
    document = compiled(tmp_path)
    document["Steps"] = [steps(document)["Gate"]]
    execution = evaluated(tmp_path, document, value, bound, MinAccuracy=least, ChampionAccuracy=champion)
    if passes:
        execution.run(document["Steps"])
        assert execution.package is not None
        assert execution.package["CustomerMetadataProperties"]["accuracy"] == str(value)
        assert "step Register" in capsys.readouterr().out
    else:
        numbers = rf"^accuracy {value} \(up to {bound} .* at least {least} .* at least {champion} "
        with pytest.raises(UserError, match=numbers):
            execution.run(document["Steps"])
        assert execution.package is None


def test_the_package_says_what_register_would_say(tmp_path: Path) -> None:
    document = compiled(tmp_path)
    execution = evaluated(tmp_path, document, 0.9, 0.95)
    said = execution.resolved(steps(document)["Register"]["Arguments"])
    assert "<<" not in json.dumps(said)
    card = json.loads(said["ModelCard"]["ModelCardContent"])
    measured = card["evaluation_details"][0]["metric_groups"][0]["metric_data"]
    assert measured[0] == {
        "name": "accuracy", "type": "number", "value": 0.9, "notes": "95 % interval 0.9 to 0.95",
    }  # fmt: skip
    tested = json.loads((tmp_path / "Evaluation.json").read_text())
    facts = dict.fromkeys(("architecture", "image_size", "torch_version", "dataset_fingerprint"), "x")
    evidence = registry.Evidence(
        "0" * 64, "r", facts | {"classes": ["a"], "metrics": {}, "git_commit": "abc"},
        {"hyperparameters": settings().training.as_dict(), "data": "d", "image": "i"}, tested,
        dict.fromkeys(("evaluation.json", "baseline.json", "model.json"), "0" * 64),
    )  # fmt: skip
    sent = registry.description(evidence, "i", "s3://b/model.tar.gz", "s3://b/evaluation")

    def keys(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: keys(item) for key, item in value.items()}
        return [keys(item) for item in value] if isinstance(value, list) else type(value)

    assert keys(said) == keys(sent)
    assert keys(card) == keys(json.loads(sent["ModelCard"]["ModelCardContent"]))


@pytest.fixture
def account(aws: Recorder, monkeypatch: pytest.MonkeyPatch, raw: Path) -> Recorder:
    """An account with the stack and the images, and a folder of raw images on this machine."""
    assert raw
    boto3.client("s3").create_bucket(Bucket=STACK.bucket)
    monkeypatch.setattr(Account, "stack", lambda _settings: STACK)
    monkeypatch.setattr(prices, "hourly", lambda *_: 1.0)
    monkeypatch.setattr(pipeline, "POLL", 0.01)
    aws.answers["DescribeImages"] = {"imageDetails": []}
    return aws


WRITES = ("CreatePipeline", "UpdatePipeline", "StartPipelineExecution")


def test_the_pipeline_is_made_started_and_updated_where_it_differs(
    account: Recorder, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arn = pipeline.start(Account(settings()), str(raw), yes=False)
    shown = capsys.readouterr().out
    assert f"pipeline {NAME} in us-east-1" in shown
    assert "costs at most 12.00 USD" in shown
    assert shown.index("costs at most") < shown.index("uploading")
    made = account.named("CreatePipeline")[0]
    document = json.loads(made["PipelineDefinition"])
    assert made["RoleArn"] == STACK.pipeline_role
    assert {"Key": "project", "Value": NAME} in made["Tags"]
    bucket = [item["Key"] for item in boto3.client("s3").list_objects_v2(Bucket=STACK.bucket)["Contents"]]
    channels = {
        channel["ChannelName"]: channel["DataSource"]["S3DataSource"]["S3Uri"]
        for channel in steps(document)["Train"]["Arguments"]["InputDataConfig"]
    }
    for channel, file in (("code", "training/launch.py"), ("sm_drivers", "sm_train.sh")):
        assert f"{channels[channel].removeprefix('s3://the-bucket/').rstrip('/')}/{file}" in bucket
    check_golden(
        "pipeline_start", [call for call in account if call[0] in ("DescribePipeline", "StartPipelineExecution")]
    )
    assert boto3.client("sagemaker").describe_pipeline_execution(PipelineExecutionArn=arn)
    account.clear()
    pipeline.start(Account(settings()), str(raw), yes=False)
    assert "is up to date" in capsys.readouterr().out
    assert [call for call, _ in account if call in WRITES] == ["StartPipelineExecution"]
    assert not account.named("PutObject"), "what is there is not uploaded again"
    account.clear()
    pipeline.start(Account(settings("pipeline.min_accuracy=0.75")), str(raw), yes=False)
    shown = capsys.readouterr().out
    assert '-   "DefaultValue": 0.9,' in shown
    assert '+   "DefaultValue": 0.75,' in shown
    assert [call for call, _ in account if call in WRITES] == ["UpdatePipeline", "StartPipelineExecution"]


def test_what_is_over_budget_is_not_started(account: Recorder, raw: Path) -> None:
    with pytest.raises(UserError, match=r"12.00 USD is over aws.budget_usd"):
        pipeline.start(Account(settings("aws.budget_usd=11")), str(raw), yes=False)
    assert not account.named(*WRITES, "PutObject")
    pipeline.start(Account(settings("aws.budget_usd=11")), "s3://the-bucket/photos", yes=True)
    assert account.named("StartPipelineExecution")[0]["PipelineParameters"][0] == {
        "Name": "InputData", "Value": "s3://the-bucket/photos/",
    }  # fmt: skip


def test_the_champion_s_accuracy_is_looked_up(account: Recorder, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = packages.Package("arn", 3, "Approved", "s3://b/model.tar.gz", {"accuracy": "0.987654"})
    monkeypatch.setattr(packages, "champion", lambda _settings: best)
    pipeline.start(Account(settings()), str(raw), yes=False)
    given = {item["Name"]: item["Value"] for item in account.named("StartPipelineExecution")[0]["PipelineParameters"]}
    assert given["ChampionAccuracy"] == "0.987654"


def test_refusals_of_aws_are_one_sentence(account: Recorder, raw: Path) -> None:
    refusal = {"Error": {"Code": "AccessDeniedException", "Message": "no"}}
    account.answers["CreatePipeline"] = ClientError(refusal, "CreatePipeline")
    with pytest.raises(UserError, match=rf"^updating the pipeline {NAME} failed: no .*make doctor"):
        pipeline.start(Account(settings()), str(raw), yes=False)


ARN = f"arn:aws:sagemaker:us-east-1:123456789012:pipeline/{NAME}/execution/abc123"
JOB = {"TrainingJob": {"Arn": f"arn:aws:sagemaker:us-east-1:123456789012:training-job/{NAME}-train-abc"}}


def test_an_execution_is_followed_to_its_end(account: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    cached = {"SourcePipelineExecutionArn": ARN}
    looks = [
        ("Executing", [{"StepName": "Preprocess", "StepStatus": "Succeeded", "CacheHitResult": cached},
                       {"StepName": "Train", "StepStatus": "Executing", "Metadata": JOB}]),
        ("Succeeded", [{"StepName": "Train", "StepStatus": "Succeeded", "Metadata": JOB}]),
    ]  # fmt: skip
    account.answers["DescribePipelineExecution"] = lambda _: {"PipelineExecutionStatus": looks[0][0]}
    account.answers["ListPipelineExecutionSteps"] = lambda _: {"PipelineExecutionSteps": looks.pop(0)[1]}
    account.clear()
    pipeline.follow(Account(settings()), ARN)
    check_golden("pipeline_follow", list(account))
    assert capsys.readouterr().out.splitlines() == [
        "[Preprocess] Succeeded (result of an earlier execution)",
        f"[Train] Executing; make logs JOB={NAME}-train-abc",
        f"[Train] Succeeded; make logs JOB={NAME}-train-abc",
    ]


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ({"StepName": "Refuse", "Metadata": {"Fail": {"ErrorMessage": "accuracy 0.5 ..."}}}, r"^accuracy 0\.5 \.\.\.$"),
        ({"StepName": "Train", "Metadata": JOB, "FailureReason": "no room"}, r"^step Train failed: no room$"),
    ],
)
def test_a_failed_execution_says_why(account: Recorder, step: dict[str, Any], sentence: str) -> None:
    account.answers["DescribePipelineExecution"] = {"PipelineExecutionStatus": "Failed"}
    account.answers["ListPipelineExecutionSteps"] = {"PipelineExecutionSteps": [step | {"StepStatus": "Failed"}]}
    with pytest.raises(UserError, match=sentence):
        pipeline.follow(Account(settings()), ARN)


def test_ctrl_c_ends_only_the_looking(account: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    account.answers["DescribePipelineExecution"] = {"PipelineExecutionStatus": "Executing"}
    account.answers["ListPipelineExecutionSteps"] = {"PipelineExecutionSteps": []}
    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(UserError, match=r"^abc123 runs on; .*stop-pipeline-execution") as stopped:
        pipeline.follow(Account(settings()), ARN)
    assert stopped.value.code == 130
    assert not account.named("StopPipelineExecution")


def test_status_shows_what_executes_and_destroy_stops_it(
    account: Recorder, raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(destroy, "PAUSE", 0)
    pipeline.start(Account(settings()), str(raw), yes=False)
    state, began = "Executing", datetime.now(UTC)

    def stop(_: dict[str, Any]) -> dict[str, Any]:
        nonlocal state
        state = "Stopped"
        return {"PipelineExecutionArn": ARN}

    account.answers["DeleteModelPackageGroup"] = {}  # not in moto
    account.answers["StopPipelineExecution"] = stop
    account.answers["ListPipelineExecutions"] = lambda _: {"PipelineExecutionSummaries": [
        {"PipelineExecutionArn": ARN, "PipelineExecutionStatus": state, "StartTime": began},
        {"PipelineExecutionArn": f"{ARN}x", "PipelineExecutionStatus": "Succeeded", "StartTime": began},
    ]}  # fmt: skip
    shown = "\n".join(inventory.table(inventory.everything(Account(settings()))))
    assert shown.count("pipeline run") == 1
    assert f"{NAME}/abc123" in shown
    account.clear()
    with pytest.raises(UserError, match=rf"still there: pipeline run {NAME}/"):
        destroy.destroy_stack(Account(settings()), everything=True, confirmed=NAME, yes=True)
    destroy.destroy(Account(settings()), None, yes=True)
    assert "nothing is left that costs by the hour" in capsys.readouterr().out
    check_golden("pipeline_stop", [call for call in account if "Pipeline" in call[0]])
    assert not account.named("DeletePipeline")
    destroy.destroy_stack(Account(settings()), everything=True, confirmed=NAME, yes=True)
    assert account.named("DeletePipeline")[0]["PipelineName"] == NAME


def test_the_graph_in_the_docs_is_of_this_pipeline(tmp_path: Path) -> None:
    """One page shows it, for GitHub to draw."""
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    (shown,) = [block for page in pages for block in re.findall(r"(?ms)^```mermaid\n(.*?)^```$", page)]
    document = compiled(tmp_path, stack=LOCAL)
    assert shown == mermaid(document), f"a page in docs/ must show this graph:\n{mermaid(document)}"
    assert {"Preprocess", "Train", "Evaluate", "Gate", "Register", "Refuse"} == set(steps(document))


def only_run(project: Path) -> Path:
    folder = (project / "artifacts" / "latest").resolve()
    assert {path.name for path in (project / "artifacts").iterdir()} == {folder.name, "latest", "registry"}
    assert list((project / ".cache" / "local").iterdir()) == []
    return folder


def registered(verb: Verb, project: Path, mode: str, target: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `pipeline-local`: the run, the package, and that `serve-local` and `deploy` take them."""
    folder = only_run(project)
    facts = json.loads((folder / "run.json").read_text())
    assert facts["mode"] == mode
    accuracy = json.loads((folder / "evaluation.json").read_text())["metrics"]["accuracy"]["value"]
    assert accuracy > 0.9
    package = json.loads((project / "artifacts" / "registry" / NAME / "1" / "package.json").read_text())
    assert package["CustomerMetadataProperties"]["accuracy"] == f"{accuracy:.6f}"
    assert package["CustomerMetadataProperties"]["run"] == folder.name
    assert (project / "artifacts" / "registry" / NAME / "1" / "report.html").is_file()
    assert package["ModelApprovalStatus"] == "PendingManualApproval"
    assert target is None or package["InferenceSpecification"]["Containers"][0]["Image"] == target
    artifact = project / "artifacts" / "registry" / NAME / "1" / "model.tar.gz"
    assert artifact.read_bytes() == (folder / "model.tar.gz").read_bytes()
    photo = next((project / "data" / "raw" / "digits").rglob("*.png"))
    asked = verb("serve-local", "--mode", mode, "--image", str(photo), "--port", "18231")
    assert asked.returncode == 0, asked.stderr
    assert "probability" in asked.stdout
    again = verb("evaluate", "--run", folder.name)
    assert again.returncode == 0, again.stderr
    assert json.loads((folder / "evaluation.json").read_text())["metrics"]["accuracy"]["value"] == accuracy
    seen: list[int] = []

    def see(_settings: Any, _plan: Any, samples: list[Any], *_: Any) -> float:
        seen.append(len(samples))
        return 0.0

    monkeypatch.setattr(deploy, "_see", see)
    given = dict.fromkeys(("run", "job", "package", "endpoint", "type", "weight"), None)
    deploy.deploy(Account(settings()), Namespace(**given, artifact=artifact, yes=True, plan=False, rollback=False))
    assert seen == [4]


def test_the_whole_pipeline_as_processes(
    account: Recorder, verb: Verb, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = verb("pipeline-local", *SHORT, **NO_ENGINE)
    assert ran.returncode == 0, ran.stderr
    assert "training as a process on this machine: no Docker engine answers" in ran.stdout
    registered(verb, project, "process", None, monkeypatch)
    assert account.named("CreateEndpoint")


@pytest.mark.container
def test_the_whole_pipeline_in_containers(
    account: Recorder, verb: Verb, project: Path, nothing_left: str, serving_image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = verb("pipeline-local", "--mode", "container", *SHORT)
    assert ran.returncode == 0, ran.stderr
    assert f"in image {nothing_left}" in ran.stdout
    registered(verb, project, "container", serving_image, monkeypatch)
    assert account.named("CreateEndpoint")
    owned = {path.lstat().st_uid for path in (project / "artifacts").rglob("*")}
    assert owned == {project.stat().st_uid}


def test_a_step_as_a_process_knows_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation runs the artifact's code."""
    for name, value in {"AWS_SECRET_ACCESS_KEY": "s3cret", "HF_TOKEN": "s3cret", "OMP_NUM_THREADS": "7"}.items():
        monkeypatch.setenv(name, value)
    code = "import os, sys; sys.exit('s3cret' in os.environ.values() or os.environ['OMP_NUM_THREADS'] != '7')"
    application = {"ContainerEntrypoint": ["python3"], "ContainerArguments": ["-c", code]}
    execution = Execution({"Parameters": []}, {}, {}, None, "20261121-093000-a1b2", tmp_path)
    assert execution._call("Evaluate", {"AppSpecification": application}, {}) == 0


def test_a_gate_that_is_not_passed_fails_the_command(verb: Verb, project: Path) -> None:
    ran = verb("pipeline-local", "--mode", "process", *SHORT, "--set", "pipeline.min_accuracy=1.01")
    assert ran.returncode == 1
    sentence, place = ran.stderr.strip().splitlines()[-2:]
    assert sentence.startswith("error: accuracy 0.9")
    assert "it must be at least 1.01 (pipeline.min_accuracy)" in sentence
    assert not (project / "artifacts").exists()
    left = project / place.removeprefix("what it left is in ")
    assert list(left.glob("s3/local/pipeline/*/evaluation/evaluation.json"))
    assert "step Refuse" in ran.stdout
    assert "Register" not in ran.stdout


def test_a_step_that_fails_fails_the_command(verb: Verb, project: Path, tmp_path: Path) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "1.png").write_bytes(b"no image")
    ran = verb("pipeline-local", "--mode", "process", "--data", str(tmp_path / "photos"))
    assert ran.returncode == 1
    assert "error: step Preprocess ended with exit code 2; its messages are above" in ran.stderr
    assert "step Train" not in ran.stdout
    ran = verb("pipeline-local", "--mode", "process", *SHORT, "--set", "training.frozen_stages=99")
    assert ran.returncode == 1
    assert "error: training failed" in ran.stderr
    assert not (project / "artifacts").exists()


def test_importing_is_quick_and_needs_no_sdk() -> None:
    code = "import sys; from pipelines.pipeline import cloud, local; assert not {'boto3', 'torch'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
