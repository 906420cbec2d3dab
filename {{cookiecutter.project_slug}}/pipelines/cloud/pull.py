"""Fetch what a training job on SageMaker made into `artifacts/`: `make pull JOB=<name>`.

    python -m pipelines pull --job image-classifier-20261121-093000-a1b2-20261121093007

The run's folder has the same files as after `make train-local`. Without a name it takes the project's newest training
job. An interrupted download is continued by the next one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

from inference.artifact import unpack
from pipelines import ROOT, runs, terminal
from pipelines.cloud import jobs, storage
from pipelines.cloud.account import Account
from pipelines.config import load
from pipelines.report import page
from pipelines.terminal import UserError

WORK = ROOT / ".cache" / "pull"
ARCHIVES = ("model.tar.gz", "output.tar.gz")
LATE = timedelta(minutes=5)  # that clocks may differ: a job writes its artifact before it ends


def pull(account: Account, job: str | None) -> Path:
    """Download, check and publish the run of a finished training job.

    Raises:
        UserError: when the job has not succeeded, or what it left is damaged; nothing was published then.
    """
    _, facts = jobs.find(account, job, ("Training",))
    name, run = facts["Name"], run_name(facts)
    if facts["Status"] not in jobs.ENDED:
        raise UserError(f"{name} is {facts['Status']}; wait for it with `{terminal.command('logs', JOB=name)}`")
    jobs.succeeded("Training", facts)
    if (runs.ARTIFACTS / run).is_dir():
        print(f"{name} is here already")
        return runs.ARTIFACTS / run
    work = WORK / name
    work.mkdir(parents=True, exist_ok=True)
    place = facts["ModelArtifacts"]["S3ModelArtifacts"].rpartition("/")[0]
    for archive in ARCHIVES:
        if not (work / archive).exists():
            storage.download(account, f"{place}/{archive}", work / archive)
    strange = _strange(account, facts)
    try:
        model, output = (_unpacked(work / archive) for archive in ARCHIVES)
        folder = runs.publish(run, model, output, _facts(facts, output), trust=not strange)
    except (UserError, FileNotFoundError, ValueError, LookupError, TypeError, RecursionError) as error:
        shutil.rmtree(work)
        reason = error if isinstance(error, UserError) else f"an archive is damaged ({error}); pull again"
        raise UserError(f"{name} was not published: {reason}") from error
    shutil.rmtree(work)
    if strange:
        print(f"{run} is not trusted, so its code runs in a container only: {strange}")
    return folder


def _strange(account: Account, facts: dict[str, Any]) -> str:
    """Why an artifact is not for certain what a job of this project made; empty when it is."""
    stack, name, uri = account.stack(), facts["Name"], facts["ModelArtifacts"]["S3ModelArtifacts"]
    if facts.get("RoleArn") != stack.role:
        return f"{name} ran with the role {facts.get('RoleArn')}, which is not this project's"
    own = f"{facts['OutputDataConfig']['S3OutputPath'].rstrip('/')}/{name}/output/model.tar.gz"
    if uri != own or not uri.startswith(f"s3://{stack.bucket}/"):
        return f"{uri} is not where a job of this project leaves its artifact"
    written = storage.written(account, uri)
    if written > facts["TrainingEndTime"] + LATE:
        return f"{uri} was written on {written:%Y-%m-%d at %H:%M} UTC, after {name} had ended"
    return ""


def run_name(facts: dict[str, Any]) -> str:
    """The run of a job is the last part of its checkpoints' address; jobs of a tuner or a pipeline get one by time."""
    last = facts.get("CheckpointConfig", {}).get("S3Uri", "").rstrip("/").rpartition("/")[2]
    made = f"{facts['CreationTime']:%Y%m%d-%H%M%S}-{hashlib.sha256(facts['Name'].encode()).hexdigest()[:4]}"
    return last if runs.NAME.fullmatch(last) else made


def _unpacked(archive: Path) -> Path:
    """The archive's content; of the output, the folder inside that holds the run's files."""
    folder = archive.with_name(archive.name.partition(".")[0])
    shutil.rmtree(folder, ignore_errors=True)
    unpack(archive, folder)
    return next((path.parent for path in folder.rglob("metrics.json")), folder)


def _facts(job: dict[str, Any], output: Path) -> dict[str, Any]:
    """What run.json says of the job, beside what the script wrote."""
    fingerprint = runs.read(output / "run.json")["dataset_fingerprint"]
    channels = {channel["ChannelName"]: channel for channel in job["InputDataConfig"]}
    uri = channels["train"]["DataSource"]["S3DataSource"]["S3Uri"].removesuffix("/").removesuffix("/train")
    here = [
        str(file.parent.parent.relative_to(ROOT))
        for file in (ROOT / "data").glob("*/test/dataset.json")
        if json.loads(file.read_text(encoding="utf-8"))["fingerprint"] == fingerprint
    ]
    return {
        "mode": "sagemaker",
        "image": job["AlgorithmSpecification"]["TrainingImage"],
        "instances": job["ResourceConfig"]["InstanceCount"],
        "data": here[0] if here else uri,
        "seconds": (job["TrainingEndTime"] - job["CreationTime"]).total_seconds(),
        "billed_seconds": job.get("BillableTimeInSeconds"),
        "job": job["Name"],
        "model_uri": job["ModelArtifacts"]["S3ModelArtifacts"],
    }


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Fetch what a training job made into artifacts/.", settings=True)
    parser.add_argument("--job", variable="JOB", help="name of a training job (default: the project's newest)")
    options = parser.parse_args()
    folder = pull(Account(load(options.set)), options.job)
    print(page.attach(folder))
    print(runs.describe(folder))
    return 0
