"""Run the project's pipeline on this machine: `make pipeline-local`, `make pipeline-local DATA=photos`.

    python -m pipelines pipeline-local --set pipeline.min_accuracy=0.95

What runs is the definition that `make pipeline` would send, each step in a container of the project's image with the
folders that SageMaker would give it, or as a process where no Docker engine answers. A model that passes the gate
becomes the run `artifacts/<run>` and a package in the local registry. It needs no AWS account, credentials or network.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import ROOT, SOURCE, project, runs, terminal
from pipelines.cloud import images as cloud_images
from pipelines.cloud import packages
from pipelines.cloud.account import Account
from pipelines.config import Settings, load
from pipelines.local import container, data, engine, process, sandbox
from pipelines.local import images as local_images
from pipelines.local.job import Interrupted, Job, JobFailed, Outputs, interruptible, threads
from pipelines.local.view import TrainingView
from pipelines.registry import package as registry_package
from pipelines.registry import register
from pipelines.report import page
from pipelines.terminal import UserError
from pipelines.training_pipeline import LOCAL, Inputs, definition

CHECKS: dict[str, Callable[[Any, Any], bool]] = {
    "GreaterThanOrEqualTo": lambda left, right: float(left) >= float(right)
}


@dataclass
class Execution:
    """One execution of a definition.

    Attributes:
        document: the definition.
        parameters: those that do not have their defaults.
        folders: what lies where in S3, by prefix; all else is kept below `root`.
        image: to run steps in; None for processes.
        name: of the run.
        root: a fresh folder with a unique base name.
        package: what was to be registered.
        trained: what training left.
        values: what expressions stand for.
    """

    document: dict[str, Any]
    parameters: dict[str, Any]
    folders: dict[str, Path]
    image: str | None
    name: str
    root: Path
    package: dict[str, Any] | None = None
    trained: Outputs | None = None
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        defaults = {item["Name"]: item["DefaultValue"] for item in self.document["Parameters"]}
        self.values |= {f"Parameters.{key}": value for key, value in (defaults | self.parameters).items()}
        self.values["Execution.PipelineExecutionId"] = self.name

    def path(self, uri: str) -> Path:
        """Where something of S3 is on this machine."""
        for prefix, folder in self.folders.items():
            if uri.startswith(prefix):
                return folder / uri.removeprefix(prefix).strip("/")
        return self.root / "s3" / uri.removeprefix("s3://")

    def resolved(self, value: Any) -> Any:
        """A value with what its expressions stand for now."""
        if isinstance(value, list):
            return [self.resolved(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "Get" in value:
            return self.values[value["Get"]]
        if "Std:Join" in value:
            return value["Std:Join"]["On"].join(str(self.resolved(item)) for item in value["Std:Join"]["Values"])
        if "Std:JsonGet" in value:
            asked = value["Std:JsonGet"]
            found: Any = json.loads(self.values[asked["PropertyFile"]["Get"]].read_text(encoding="utf-8"))
            for key in asked["Path"].split("."):
                found = found[key]
            return found
        return {key: self.resolved(item) for key, item in value.items()}

    def run(self, steps: list[dict[str, Any]]) -> None:
        """Run steps, in order.

        Raises:
            UserError: when a step fails, or the gate is not passed.
            Interrupted: when a signal came.
        """
        for step in steps:
            print(f"step {step['Name']}", flush=True)
            if step["Type"] == "Condition":
                self._condition(step["Arguments"])
            else:
                getattr(self, f"_{step['Type'].lower()}")(step, self.resolved(step["Arguments"]))

    def _condition(self, arguments: dict[str, Any]) -> None:
        passed = all(
            CHECKS[check["Type"]](self.resolved(check["LeftValue"]), self.resolved(check["RightValue"]))
            for check in arguments["Conditions"]
        )
        self.run(arguments["IfSteps" if passed else "ElseSteps"])

    def _fail(self, _: dict[str, Any], arguments: dict[str, Any]) -> None:
        raise UserError(arguments["ErrorMessage"])

    def _registermodel(self, _: dict[str, Any], arguments: dict[str, Any]) -> None:
        self.package = arguments

    def _processing(self, step: dict[str, Any], arguments: dict[str, Any]) -> None:
        mounts, step_name = dict[str, tuple[Path, str]](), f"Steps.{step['Name']}"
        for item in arguments["ProcessingInputs"]:
            found = self.path(item["S3Input"]["S3Uri"])
            mounts[item["S3Input"]["LocalPath"]] = (found.parent if found.is_file() else found, "ro")
        outputs = {item["OutputName"]: item["S3Output"] for item in arguments["ProcessingOutputConfig"]["Outputs"]}
        for name, output in outputs.items():
            folder = self.path(output["S3Uri"])
            folder.mkdir(parents=True)
            mounts[output["LocalPath"]] = (folder, "rw")
            self.values[f"{step_name}.ProcessingOutputConfig.Outputs['{name}'].S3Output.S3Uri"] = output["S3Uri"]
        for file in step.get("PropertyFiles", []):
            place = self.path(outputs[file["OutputName"]]["S3Uri"]) / file["FilePath"]
            self.values[f"{step_name}.PropertyFiles.{file['PropertyFileName']}"] = place
        code = self._call(step["Name"], arguments, mounts)
        if code:
            raise UserError(f"step {step['Name']} ended with exit code {code}; its messages are above")

    def _call(self, step: str, arguments: dict[str, Any], mounts: dict[str, tuple[Path, str]]) -> int:
        """Run a processing step's script to its end; gives its exit code."""
        application, given = arguments["AppSpecification"], arguments.get("Environment", {})
        words = [*application["ContainerEntrypoint"], *application["ContainerArguments"]]
        if self.image is None:
            for inside, (folder, _) in mounts.items():
                words = [
                    f"{folder}{word.removeprefix(inside)}" if f"{word}/".startswith(f"{inside}/") else word
                    for word in words
                ]
            environment = sandbox.environment() | given
            return subprocess.run([sys.executable, *words[1:]], env=environment, start_new_session=True).returncode
        label = f"{self.name}-{step.lower()}"
        command = ["docker", "run", "--rm", "--init", "--name", label, "--entrypoint", words[0]]
        command += ["--gpus", "all"] if engine.container_gpus() else []
        command += [f"--env={key}={value}" for key, value in given.items()]
        command += [f"--volume={folder}:{inside}:{how}" for inside, (folder, how) in mounts.items()]
        try:
            return subprocess.run([*command, self.image, *words[1:]], start_new_session=True).returncode
        finally:  # when a signal came it is still there
            subprocess.run(["docker", "rm", "--force", label], capture_output=True)
            engine.give_back(self.image, self.root)

    def _training(self, step: dict[str, Any], arguments: dict[str, Any]) -> None:
        channels = {
            channel["ChannelName"]: self.path(channel["DataSource"]["S3DataSource"]["S3Uri"])
            for channel in arguments["InputDataConfig"]
            if channel["ChannelName"] not in ("code", "sm_drivers")
        }
        channels["checkpoints"] = self.path(arguments["CheckpointConfig"]["S3Uri"])
        channels["checkpoints"].mkdir(parents=True)
        hosts = int(arguments["ResourceConfig"]["InstanceCount"])
        environment = arguments["Environment"] | threads(hosts)
        job = Job(self.name, self.root, arguments["HyperParameters"], channels, hosts, environment)
        with contextlib.closing(TrainingView(self.root / "job.log", self.image is not None)) as view:
            try:
                self.trained = container.run(job, self.image, view) if self.image else process.run(job, view)
            except JobFailed as error:
                raise UserError(str(error)) from error
        uri = f"{arguments['OutputDataConfig']['S3OutputPath']}/{self.name}/output/model.tar.gz"
        self.path(uri).parent.mkdir(parents=True)
        runs.pack(self.trained.model, self.path(uri))
        self.values[f"Steps.{step['Name']}.ModelArtifacts.S3ModelArtifacts"] = uri


def run(settings: Settings, source: str | None) -> Path:
    """Run the pipeline once.

    Args:
        settings: of the project.
        source: folder of raw images; None: the configured one.

    Returns:
        The folder of the published run.

    Raises:
        UserError: when nothing was registered.
    """
    began, hosts = time.monotonic(), settings.compute.local_instances
    settings = settings.model_copy(update={"aws": settings.aws.model_copy(update={"kms_key": "none"})})  # needs no AWS
    account = Account(settings, LOCAL)
    raw = data.raw(source or settings.data.source)
    image = local_images.choose(settings, "training")
    name, tried = runs.new_name(), project.source_hash()
    root = runs.WORK / name
    (root / "staged").mkdir(parents=True)
    weights = data.weights(settings, root / "weights")
    approved = [package.accuracy for package in registry_package.local() if package.status == packages.APPROVED]
    inputs = Inputs("s3://local/raw/", "s3://local/weights/" if weights else None, (approved or [0.0])[-1])
    document = definition(account, inputs, root / "staged")
    folders = {"s3://local/raw/": raw, "s3://local/weights/": root / "weights", f"s3://local/source/{tried}": SOURCE}
    execution = Execution(document, {"TrainingInstanceCount": hosts}, folders, image, name, root)
    print(f"run {name} on {raw}, {f'in image {image}' if image else 'as processes'}", flush=True)
    left = f"what it left is in {root.relative_to(ROOT)}"
    try:
        with interruptible():
            execution.run(document["Steps"])
    except Interrupted as error:
        raise UserError(f"stopped by {error}; nothing was registered; {left}", code=130) from error
    except UserError as error:
        raise UserError(f"{error}\n{left}") from error
    facts: dict[str, Any] = {"mode": "container" if image else "process", "image": image, "instances": hosts}
    facts |= {"source": tried, "data": f"artifacts/{name}/data", "seconds": round(time.monotonic() - began, 2)}
    assert execution.trained is not None
    folder = runs.publish(name, execution.trained.model, execution.trained.data, facts)
    bucket = execution.path(f"s3://local/pipeline/{name}")
    shutil.move(bucket / "packed" / "images", folder / "data")
    shutil.copyfile(bucket / "evaluation" / "evaluation.json", folder / "evaluation.json")
    print(page.attach(folder))
    with tempfile.TemporaryDirectory(prefix="register-") as temporary:
        evidence = register.evidence(folder / "model.tar.gz", Path(temporary))
        serving, approval = cloud_images.uri(account, "serving"), settings.pipeline.approval
        package = registry_package.register_local(evidence, serving, folder / "model.tar.gz", Path(temporary), approval)
    print(f"registered as {package.relative_to(ROOT)}, {approval}")
    shutil.rmtree(root, ignore_errors=True)
    return folder


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Run the project's pipeline on this machine.", settings=True)
    parser.add_data()
    parser.add_mode()
    options = parser.parse_args()
    settings = load(options.set, options={"compute.local_mode": options.mode})
    print(runs.describe(run(settings, options.data)))
    return 0
