"""Bring the project's SageMaker Pipeline up to date and run it: `make pipeline`, `make pipeline DATA=s3://bucket/photos`.

    python -m pipelines pipeline --data photos --wait --set pipeline.min_accuracy=0.95

It shows what it can cost and how its definition differs from the deployed one, which it replaces. A local folder is
uploaded first, once as long as its files stay the same. Steps whose inputs did not change are not run again.
"""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines import SOURCE, project, terminal
from pipelines.cloud import images as cloud_images
from pipelines.cloud import packages, prices, processing, storage, train
from pipelines.cloud.account import Account, explained, pages, unless_missing, until
from pipelines.config import Settings, load
from pipelines.local import data
from pipelines.local import images as local_images
from pipelines.registry import package
from pipelines.terminal import UserError
from pipelines.training_pipeline import Inputs, definition
from progress import plain

POLL = 15.0  # seconds
ENDED = ("Succeeded", "Failed", "Stopped")


def start(account: Account, source: str | None, yes: bool, plan: bool = False) -> str:
    """Bring the pipeline up to date and start it.

    Args:
        account: to work in.
        source: folder of raw images or an S3 prefix of one; None: the configured one.
        yes: go on although it is over budget.
        plan: only say what would be created, and end.

    Returns:
        The execution's ARN.

    Raises:
        UserError: when nothing was started.
    """
    source = source or account.settings.data.source
    data.look(source)
    prices.stack(account, plan)
    local = None if plan or source.startswith("s3://") else data.raw(source)
    prices.afford(account.settings, *_plan(account, source), yes, plan)
    targets: tuple[local_images.Target, ...] = ("training", "serving")
    for target in targets:
        cloud_images.ensure(account, target)
    uri = storage.raw(account, source, local)
    champion = packages.champion(account)
    inputs = Inputs(f"{uri}/", storage.pretrained(account), champion.accuracy if champion else 0.0)
    with tempfile.TemporaryDirectory() as staged:
        document = definition(account, inputs, Path(staged))
        storage.upload(account, SOURCE, f"source/{project.source_hash()}")
        for folder in Path(staged).iterdir():
            storage.upload(account, folder, f"source/{folder.name}")
    _upsert(account, document)
    given = {"InputData": inputs.data, "ChampionAccuracy": str(inputs.champion)}
    package.make_group(account)
    with explained("starting the pipeline"):
        started = account.client("sagemaker").start_pipeline_execution(
            PipelineName=project.name(),
            PipelineParameters=[{"Name": name, "Value": value} for name, value in given.items()],
        )
    return str(started["PipelineExecutionArn"])


def _plan(account: Account, source: str) -> tuple[str, float | None]:
    """What an execution is, and the most that it can cost."""
    settings = account.settings
    compute, longest = settings.compute, processing.hours(settings)
    packs = prices.hourly(account, "processing", compute.process_instance_type)
    trains = prices.hourly(account, "training", compute.instance_type)
    hours = train.longest(settings)
    costs = prices.cost(packs, 2 * longest), prices.cost(trains, hours * compute.instances)
    return (
        f"pipeline {project.name()} in {prices.where(account.settings)}, on {source}: two processing jobs on 1 x "
        f"{compute.process_instance_type}, {longest:g} hours at most each, and a training job on "
        f"{train.machines(settings)}, {hours:g} hours at most",
        None if None in costs else sum(cost or 0.0 for cost in costs),
    )


def _upsert(account: Account, document: dict[str, Any]) -> None:
    """Create the pipeline, or update it where it differs, and show how."""
    sagemaker, name, role = account.client("sagemaker"), project.name(), account.stack().pipeline_role
    said = {"PipelineName": name, "PipelineDefinition": json.dumps(document), "RoleArn": role}
    with explained(f"updating the pipeline {name}"):
        deployed = unless_missing(sagemaker.describe_pipeline, PipelineName=name)
        if deployed is None:
            sagemaker.create_pipeline(**said, Tags=account.tags())
            print(f"created the pipeline {name}", flush=True)
            return
        changes = difference(json.loads(deployed["PipelineDefinition"]), document)
        if changes or deployed["RoleArn"] != role:
            print("\n".join([f"the deployed pipeline {name} differs, and is replaced:", *changes]), flush=True)
            sagemaker.update_pipeline(**said)
        else:
            print(f"the pipeline {name} is up to date", flush=True)


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The lines in which two definitions differ, with a little of what is around them."""
    before, after = (json.dumps(document, indent=1, sort_keys=True).splitlines() for document in (old, new))
    return [plain(line) for line in difflib.unified_diff(before, after, "deployed", "new", lineterm="", n=2)]


def follow(account: Account, arn: str) -> None:
    """Print what the steps of an execution do, until it ends.

    Raises:
        UserError: when it did not succeed, or Ctrl-C ends the looking.
    """
    sagemaker, shown = account.client("sagemaker"), dict[str, str]()
    name = arn.rpartition("/")[2]

    def look(say: Callable[[str], None]) -> tuple[tuple[str, list[dict[str, Any]]] | None, str]:
        with explained(f"looking at {arn}"):
            status = sagemaker.describe_pipeline_execution(PipelineExecutionArn=arn)["PipelineExecutionStatus"]
            asked = {"PipelineExecutionArn": arn, "SortOrder": "Ascending"}
            steps = list(pages(sagemaker, "list_pipeline_execution_steps", "PipelineExecutionSteps", **asked))
        for step in steps:
            line = _line(step)
            if shown.get(step["StepName"]) != line:
                say(line)
            shown[step["StepName"]] = line
        return (status, steps) if status in ENDED else None, ""

    stopped = f"{name} runs on; {hints(account.settings, arn)}"
    status, steps = until(f"the execution {name}", POLL, look, stopped=stopped)
    if status != "Succeeded":
        reasons = [_reason(step) for step in steps if step["StepStatus"] == "Failed"]
        raise UserError("; ".join(reasons) or f"the execution ended as {status}")


def _line(step: dict[str, Any]) -> str:
    """What a step does, and where its log is."""
    metadata = step.get("Metadata", {})
    jobs = [metadata[kind]["Arn"].rpartition("/")[2] for kind in ("ProcessingJob", "TrainingJob") if kind in metadata]
    logs = [terminal.command("logs", JOB=job) for job in jobs]
    cached = " (result of an earlier execution)" if "CacheHitResult" in step else ""
    return f"[{step['StepName']}] {step['StepStatus']}{cached}{''.join(f'; {log}' for log in logs)}"


def _reason(step: dict[str, Any]) -> str:
    said = step.get("Metadata", {}).get("Fail", {}).get("ErrorMessage") or step.get("FailureReason", "no reason given")
    said = plain(" ".join(said.split()))
    return said if "Fail" in step.get("Metadata", {}) else f"step {step['StepName']} failed: {said}"


def hints(settings: Settings, arn: str) -> str:
    """How to look at an execution that runs, and how to stop it."""
    stop = f"aws sagemaker stop-pipeline-execution --pipeline-execution-arn {arn} --region {settings.aws.region}"
    return f"`make status` shows it, stop it with `{stop}`"


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Bring the project's SageMaker Pipeline up to date and run it.", settings=True)
    parser.add_data("folder of raw images, here or s3://...")
    parser.add_argument("--wait", variable="WAIT", action="store_true", help="follow its steps; fails when one does")
    parser.add_argument("--yes", variable="YES", action="store_true", help="go on although it is over budget")
    prices.add_plan(parser)
    options = parser.parse_args()
    account = Account(load(options.set))
    arn = start(account, options.data, options.yes, options.plan)
    print(f"started {arn.rpartition('/')[2]}; {hints(account.settings, arn)}", flush=True)
    if options.wait:
        follow(account, arn)
        print("done; the model is registered")
    return 0
