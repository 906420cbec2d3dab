"""The SageMaker Pipeline, built from `configs/`: preprocess, train, evaluate, gate, register.

`make pipeline` runs it on SageMaker, `make pipeline-local` on this machine. Building it sends nothing to AWS, and the
same sources and settings give the same bytes wherever they lie: only so do SageMaker's caches hit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from pipelines import ROOT, SOURCE, project, terminal
from pipelines.cloud import images, train
from pipelines.cloud import processing as cloud_processing
from pipelines.cloud.account import Account, Stack
from pipelines.cloud.processing import CODE, INPUT, OUTPUT
from pipelines.registry import package

MODEL, TEST = (f"/opt/ml/processing/input/{part}" for part in ("model", "test"))
MARKER = re.compile(r'"<<(metrics\.[\w.]+)>>"|<<([\w.]+)>>')
NAMES = {"Training": "TrainingJobName", "Processing": "ProcessingJobName"}
LOCAL = Stack("local", "arn:aws:iam::000000000000:role/local", project.name(), "", "", "", "")  # needs no account


@dataclass(frozen=True)
class Inputs:
    """What goes in: S3 prefixes of raw images, and of weights to start from, if any; the accuracy to keep up with."""

    data: str
    weights: str | None = None
    champion: float = 0.0


def definition(account: Account, inputs: Inputs, staged: Path) -> dict[str, Any]:
    """The pipeline's definition.

    Args:
        account: to work in.
        inputs: of its executions, unless they are given others.
        staged: an empty folder. What it holds afterwards belongs under `source/` in the stack's bucket.
    """
    os.environ.setdefault("AWS_DEFAULT_REGION", account.region)  # sagemaker.mlops makes a client when imported
    log = ROOT / ".cache" / "pipeline.log"
    log.parent.mkdir(exist_ok=True)
    terminal.log_to(log)
    from sagemaker.core.config.config_manager import SageMakerConfig

    once = mock.patch.object(SageMakerConfig, "validate_sagemaker_config")  # fifty times take seconds
    with once, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "No Job being started"
        document: dict[str, Any] = json.loads(_pipeline(account, inputs, staged).definition())
    for step in document["Steps"]:  # jobs are called `pipelines-...` otherwise, which no policy of the stack allows
        if step["Type"] in NAMES:
            step["Arguments"][NAMES[step["Type"]]] = f"{project.name()}-{step['Name'].lower()}"
    return {key: value for key, value in document.items() if value is not None}


def _session(account: Account, staged: Path) -> Any:
    """The SDK's session for pipelines, offline: what it would upload is copied to a folder named by its content."""
    import boto3
    from sagemaker.core.workflow.pipeline_context import PipelineSession

    bucket = account.stack().bucket

    class Offline(boto3.Session):  # type: ignore[misc]
        def client(self, service: str, *words: Any, **more: Any) -> Any:
            return None if service == "iam" else super().client(service, *words, **more)  # it would simulate policies

    class Staging(PipelineSession):  # type: ignore[misc]
        def default_bucket(self) -> str:
            return bucket

        def upload_data(self, path: str, *_words: Any, **_more: Any) -> str:
            files = sorted(file for file in Path(path).rglob("*") if file.is_file() and file.suffix != ".pyc")
            facts = [(str(file.relative_to(path)), hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
            name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
            shutil.copytree(path, staged / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
            return f"s3://{bucket}/source/{name}"

    return Staging(Offline(region_name=account.region))


def _pipeline(account: Account, inputs: Inputs, staged: Path) -> Any:
    session = _session(account, staged)
    from sagemaker.core.workflow.conditions import ConditionGreaterThanOrEqualTo
    from sagemaker.core.workflow.execution_variables import ExecutionVariables
    from sagemaker.core.workflow.functions import Join, JsonGet
    from sagemaker.core.workflow.parameters import ParameterFloat, ParameterInteger, ParameterString
    from sagemaker.core.workflow.properties import PropertyFile
    from sagemaker.mlops import workflow as flow

    settings, stack, image = account.settings, account.stack(), images.uri(account, "training")
    compute = settings.compute
    source = f"s3://{stack.bucket}/source/{project.source_hash()}/"
    data = ParameterString("InputData", default_value=inputs.data)
    accuracy = ParameterFloat("MinAccuracy", default_value=settings.pipeline.min_accuracy)
    champion = ParameterFloat("ChampionAccuracy", default_value=inputs.champion)
    epochs = ParameterString("Epochs", default_value=str(settings.training.epochs))
    kind = ParameterString("TrainingInstanceType", default_value=compute.instance_type)
    count = ParameterInteger("TrainingInstanceCount", default_value=compute.instances)
    packs = ParameterString("ProcessingInstanceType", default_value=compute.process_instance_type)
    approval = ParameterString("ModelApprovalStatus", default_value=settings.pipeline.approval)
    days, steps, jobs = settings.pipeline.cache_days, flow.StepExceptionTypeEnum, flow.SageMakerJobExceptionTypeEnum
    retries = [  # growth of the pause, first pause in seconds, attempts
        flow.StepRetryPolicy([steps.THROTTLING, steps.SERVICE_FAULT], 2.0, 30, 5),
        flow.SageMakerJobStepRetryPolicy(None, [jobs.CAPACITY_ERROR, jobs.INTERNAL_ERROR], 2.0, 60, 5),
    ]
    cache = flow.CacheConfig(enable_caching=True, expire_after=f"P{days}D") if days else None
    common: dict[str, Any] = {"cache_config": cache, "retry_policies": retries}

    def place(*parts: Any) -> Any:
        return Join(on="/", values=list(parts))

    def processing(name: str, script: str, words: list[str], given: dict[str, Any], kept: str, **more: Any) -> Any:
        processor = cloud_processing.processor(account, image, script, session, packs)
        target = place(f"s3://{stack.bucket}/pipeline", ExecutionVariables.PIPELINE_EXECUTION_ID, kept)
        inputs, outputs = (
            cloud_processing.inputs(given | {"code": (source, CODE)}),
            cloud_processing.outputs(kept, target),
        )
        asked = processor.run(inputs=inputs, outputs=outputs, arguments=words)
        step = flow.ProcessingStep(name=name, step_args=asked, **common, **more)
        return step, step.properties.ProcessingOutputConfig.Outputs[kept].S3Output.S3Uri

    words, given = cloud_processing.packing(settings), {"raw": (data, INPUT)}
    preprocess, packed = processing("Preprocess", "preprocess.py", words, given, "packed")

    chosen = settings.training.as_dict()
    identity = json.dumps([project.source_hash(), {name: value for name, value in chosen.items() if name != "epochs"}])
    channels = {split: place(packed, "images", split, "") for split in ("train", "validation")}
    request = train.Request(
        run="pipeline",
        hyperparameters=chosen | {"epochs": epochs},
        channels=channels | ({"pretrained": inputs.weights} if inputs.weights else {}),
        source=source,
        # Part of what a cache compares, so it must not name the execution, but all that a checkpoint depends on.
        checkpoints=place(packed, "checkpoints", hashlib.sha256(identity.encode()).hexdigest(), epochs),
    )
    trainer = train.trainer(account, request, image, session)
    trainer.compute.instance_type, trainer.compute.instance_count = kind, count
    trainer.environment = trainer.environment | {"GIT_COMMIT": source_commit()}
    asked = trainer.train(input_data_config=train.inputs(settings, request))
    training = flow.TrainingStep(name="Train", step_args=asked, **common)
    artifact = training.properties.ModelArtifacts.S3ModelArtifacts

    files = {part: PropertyFile(part.title(), "evaluation", f"{part}.json") for part in ("evaluation", "package")}
    words = ["--artifact", f"{MODEL}/model.tar.gz", "--data", TEST]
    words += ["--output", f"{OUTPUT}/evaluation.json", "--describe"]
    given = {"model": (artifact, MODEL), "test": (place(packed, "images", "test", ""), TEST)}
    read = [*files.values()]
    evaluate, evaluated = processing("Evaluate", "evaluate.py", words, given, "evaluation", property_files=read)

    def later(name: str) -> Any:
        """What a marker of `_package` stands for."""
        known = {"uri": artifact, "place": evaluated, "approval": approval, "epochs": epochs, "data": data,
                 "run": ExecutionVariables.PIPELINE_EXECUTION_ID}  # fmt: skip
        part, _, path = name.partition(".") if name.startswith("package.") else ("evaluation", "", name)
        return known.get(name) or JsonGet(step_name="Evaluate", property_file=files[part], json_path=path)

    value, bound = later("metrics.accuracy.value"), later("metrics.accuracy.ci_high")
    message = Join(values=[
        "accuracy ", value, " (up to ", bound, " with 95 % confidence) on the test split: it must be at least ",
        accuracy, " (pipeline.min_accuracy), and that bound at least ", champion,
        " (the champion's accuracy); nothing was registered",
    ])  # fmt: skip
    conditions = [ConditionGreaterThanOrEqualTo(*pair) for pair in ((value, accuracy), (bound, champion))]
    register = _register(_filled(_package(account), later))
    gate = flow.ConditionStep(
        "Gate", conditions=conditions, if_steps=[register], else_steps=[flow.FailStep("Refuse", message)]
    )
    parameters = [data, accuracy, champion, epochs, kind, count, packs, approval]
    chain = [preprocess, training, evaluate, gate]
    return flow.Pipeline(project.name(), parameters, None, steps=chain, sagemaker_session=session)


class _Later(str):
    """A marker for what only an execution knows; `_filled` puts the expression for it in its place."""

    def __format__(self, _: str) -> str:
        return str(self)


def _package(account: Account) -> dict[str, Any]:
    """The request that `make register` would send for the trained model, with markers."""

    def later(name: str) -> Any:
        return _Later(f"<<{name}>>")

    chosen = account.settings.training.as_dict()
    measures = ("cross_entropy", "macro_precision", "macro_recall", "macro_f1")
    tested = {name: {"value": later(f"metrics.{name}.value")} for name in measures}
    accuracy = {part: later(f"metrics.accuracy.{part}") for part in ("value", "ci_low", "ci_high")}
    facts = ("architecture", "image_size", "torch_version")
    evidence = package.Evidence(
        identity=later("package.model"),
        run=later("run"),
        model={name: later(f"package.{name}") for name in facts}
        | {"classes": [later("package.classes")], "dataset_fingerprint": later("dataset_fingerprint"), "metrics": {}}
        | {"git_commit": source_commit()},
        facts={"hyperparameters": chosen | {"epochs": later("epochs")}, "data": later("data")}
        | {"image": images.uri(account, "training")},
        evaluation={"metrics": {"accuracy": accuracy} | tested, "images": later("images")},
        files={f"{name}.json": later(f"package.{name}") for name in ("evaluation", "baseline", "model")},
    )
    image = images.uri(account, "serving")
    said = package.description(evidence, image, later("uri"), later("place"))
    return said | {"ModelApprovalStatus": later("approval")}


def _filled(value: Any, later: Callable[[str], Any]) -> Any:
    """A request with expressions for its markers; numbers inside JSON texts lose the quotes of their markers."""
    from sagemaker.core.workflow.functions import Join, JsonGet

    if isinstance(value, dict):
        return {key: _filled(item, later) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, later) for item in value]
    parts = MARKER.split(value) if isinstance(value, str) else []
    if len(parts) < 2:
        return value
    texts = [later(part) if index % 3 else part for index, part in enumerate(parts) if part]
    # JsonGet gives a number where a text is due. A Join around it makes that a text: so does the SDK's own `to_string`,
    # https://github.com/aws/sagemaker-python-sdk/blob/master/sagemaker-core/src/sagemaker/core/helper/pipeline_variable.py
    whole = len(texts) == 1 and not isinstance(texts[0], JsonGet)
    return texts[0] if whole else Join(on="", values=texts)


def _register(request: dict[str, Any]) -> Any:
    """The step that registers the model; the SDK's own can register only what its `ModelBuilder` describes."""
    from sagemaker.mlops.workflow.steps import Step, StepTypeEnum

    class Register(Step):  # type: ignore[misc]
        @property
        def arguments(self) -> dict[str, Any]:
            return request

        @property
        def properties(self) -> Any:
            raise NotImplementedError

    return Register("Register", step_type=StepTypeEnum.REGISTER_MODEL)


def source_commit() -> str:
    """The commit that last changed `src/`, with `-dirty` when files there differ from it; empty without any."""
    try:
        words = (("log", "-1", "--format=%H"), ("status", "--porcelain"))
        last, changed = (
            subprocess.run(["git", *part, "--", SOURCE], cwd=ROOT, capture_output=True, text=True).stdout.strip()
            for part in words
        )
    except OSError:
        return ""
    return f"{last}-dirty" if last and changed else last
