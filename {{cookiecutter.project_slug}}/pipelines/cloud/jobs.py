"""The log of a job on SageMaker, followed as long as it runs: `make logs JOB=<name>`.

    python -m pipelines logs --job image-classifier-20261121-093000-a1b2-20261121093007

Without a name it takes the project's newest training job. `ARGS=--once` prints what there is and ends. Ctrl-C stops
looking; the job runs on.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from pipelines import project, terminal
from pipelines.cloud import account as aws
from pipelines.config import Settings, load
from pipelines.local.job import Interrupted, interruptible
from pipelines.terminal import UserError
from progress import waiting

KINDS = ("Training", "Processing", "Transform")
ENDED = ("Completed", "Failed", "Stopped")
POLL = 10.0  # seconds
TUNING = "HyperParameterTuning"  # a kind without a log of its own
PAGES = {
    "Training": "jobs",
    "Processing": "processing-jobs",
    "Transform": "transform-jobs",
    TUNING: "hyper-tuning-jobs",
}


def newest(settings: Settings, part: str) -> str | None:
    """The newest training job whose name contains `part`."""
    sagemaker = aws.client(settings, "sagemaker")
    order = {"SortBy": "CreationTime", "SortOrder": "Descending", "MaxResults": 1}
    with aws.explained("looking for training jobs"):
        found = sagemaker.list_training_jobs(NameContains=part, **order)["TrainingJobSummaries"]
    return str(found[0]["TrainingJobName"]) if found else None


def find(settings: Settings, name: str | None, kinds: tuple[str, ...] = KINDS) -> tuple[str, dict[str, Any]]:
    """Kind and description of a job; the project's newest training job without a name.

    Raises:
        UserError: when there is none.
    """
    name = name or newest(settings, project.job_prefix())
    if name is None:
        raise UserError(f"this project has no training job in {settings.aws.region} yet; start one with `make train`")
    for kind in kinds:
        facts = describe(settings, kind, name)
        if facts:
            return kind, facts
    other = newest(settings, project.job_prefix())
    raise UserError(
        f"there is no job {name!r} in {settings.aws.region}" + (f"; the newest is {other}" if other else "")
    )


def describe(settings: Settings, kind: str, name: str) -> dict[str, Any]:
    """What SageMaker knows of a job, its status as `Status`; empty when there is none."""
    call = getattr(aws.client(settings, "sagemaker"), f"describe_{words(kind, '_')}_job")
    with aws.explained(f"looking up the job {name}"):
        facts: dict[str, Any] | None = aws.unless_missing(call, **{f"{kind}JobName": name})
    return facts | {"Name": name, "Status": facts[f"{kind}JobStatus"]} if facts else {}


def follow(settings: Settings, kind: str, name: str, once: bool = False) -> dict[str, Any]:
    """Print a job's log lines, until it ends unless `once`; returns its last description.

    Raises:
        UserError: when Ctrl-C ends the looking, with how to stop the job.
    """
    tokens: dict[str, str] = {}
    status = watched = ""
    try:
        with waiting(f"the job {name}") as say:
            while True:
                facts = describe(settings, kind, name)
                _print_new_lines(settings, kind, name, tokens, say)
                ended = facts["Status"] in ENDED
                if status != (status := facts.get("SecondaryStatus", facts["Status"])):
                    say(f"[{status}]")
                if once or (ended and watched in ("", facts["Status"])):
                    return facts
                watched = facts["Status"]  # once more after its end: CloudWatch lags
                time.sleep(POLL)
    except KeyboardInterrupt:
        raise UserError(f"{name} runs on. {after(settings, kind, name)}", code=130) from None


@contextlib.contextmanager
def starting(settings: Settings, kind: str, name: str) -> Iterator[None]:
    """Create a job inside; the SDK swallows KeyboardInterrupt, so a signal that comes meanwhile is another exception.

    Args:
        settings: of the project.
        kind: of job.
        name: of the job; of a training job, whose name the SDK makes, a part.

    Raises:
        UserError: when AWS refuses, or a signal came: with whether a job runs.
    """
    word = words(kind, " ").rpartition(" ")[2]
    with aws.explained(f"starting the {word} job"):
        try:
            with interruptible():
                yield
        except Interrupted as error:
            job = newest(settings, name) if kind == "Training" else describe(settings, kind, name).get("Name")
            end = f"{job} runs. {after(settings, kind, job)}" if job else f"no {word} job was started"
            raise UserError(f"stopped by {error}; {end}", code=130) from error


def _print_new_lines(
    settings: Settings, kind: str, name: str, tokens: dict[str, str], say: Callable[[str], None]
) -> None:
    """Print what came since the last time; `tokens` remembers where each stream stood."""
    from botocore.exceptions import ClientError

    group, cloudwatch = f"/aws/sagemaker/{kind}Jobs", aws.client(settings, "logs")
    lines = []
    with aws.explained(f"reading the log of {name}"):
        try:
            pages = cloudwatch.get_paginator("describe_log_streams")
            streams = pages.paginate(logGroupName=group, logStreamNamePrefix=f"{name}/").search("logStreams[]")
            for stream in [found["logStreamName"] for found in streams]:
                host = stream.removeprefix(f"{name}/").rpartition("-")[0]  # algo-1-1700000000
                while True:
                    token = {"nextToken": tokens[stream]} if stream in tokens else {}
                    place = {"logGroupName": group, "logStreamName": stream, "startFromHead": True}
                    page = cloudwatch.get_log_events(**place, **token)
                    lines += [(event["timestamp"], host, event["message"]) for event in page["events"]]
                    if tokens.get(stream) == page["nextForwardToken"]:
                        break
                    tokens[stream] = page["nextForwardToken"]
        except ClientError as error:
            if not aws.missing(error):
                raise
    for _, host, message in sorted(lines, key=lambda line: line[0]):
        say(message.rstrip("\n") if host in ("", "algo-1") else f"{host}: {message}")


def succeeded(kind: str, facts: dict[str, Any]) -> None:
    """Return when a job that has ended did what it should.

    Raises:
        UserError: when it failed or was stopped, with the reason and what to do.
    """
    name, resume = facts["Name"], "; resume it with `make train RUN=<run>`" if kind == "Training" else ""
    if facts["Status"] == "Failed":
        raise UserError(f"{name} failed: {aws.failure(facts)}")
    if facts["Status"] != "Completed":
        reason = facts.get("SecondaryStatus", facts["Status"])
        raise UserError(f"{name} ended without a result ({reason}){resume}")


def after(settings: Settings, kind: str, name: str) -> str:
    """How to look at a job that runs, and how to stop it."""
    word = words(kind, "-")
    region, verb = settings.aws.region, f"stop-{word}-job --{word}-job-name"
    look = terminal.command("tune" if kind == TUNING else "logs", JOB=name)
    return (
        f"Follow it with `{look}`, stop it with `aws sagemaker {verb} {name} --region {region}`, see it at "
        f"{aws.console(settings, f'{PAGES[kind]}/{name}')}"
    )


def words(kind: str, between: str) -> str:
    """A name of AWS's in small letters: `HyperParameterTuning` is hyper-parameter-tuning."""
    return re.sub(r"(?<!^)(?=[A-Z])", between, kind).lower()


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Print the log of a job, and follow it as long as it runs.", settings=True)
    parser.add_argument(
        "--job", variable="JOB", help="name of a training, processing or transform job (default: the newest training)"
    )
    parser.add_argument("--once", action="store_true", help="do not follow it")
    options = parser.parse_args()
    settings = load(options.set)
    kind, facts = find(settings, options.job)
    facts = follow(settings, kind, facts["Name"], options.once)
    if facts["Status"] == "Failed":
        print(f"failed: {aws.failure(facts)}")
    return 0
