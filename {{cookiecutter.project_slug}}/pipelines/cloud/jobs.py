"""The log of a job on SageMaker, followed as long as it runs: `make logs JOB=<name>`.

    python -m pipelines logs --job image-classifier-20261121-093000-a1b2-20261121093007

Without a name it takes the project's newest training job. `ARGS=--once` prints what there is and ends. Ctrl-C stops
looking; the job runs on.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from pipelines import project, terminal
from pipelines.cloud.account import Account, explained, failure, pages, unless_missing, until
from pipelines.cloud.errors import missing
from pipelines.config import load
from pipelines.local.job import Interrupted, interruptible
from pipelines.terminal import UserError
from progress import plain

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


def newest(account: Account, part: str) -> str | None:
    """The newest training job whose name contains `part`."""
    order = {"SortBy": "CreationTime", "SortOrder": "Descending"}
    with explained("looking for training jobs"):  # a page may be empty, and a later one not
        listed = pages(
            account.client("sagemaker"), "list_training_jobs", "TrainingJobSummaries", NameContains=part, **order
        )
        found = next(listed, None)
    return str(found["TrainingJobName"]) if found else None


def find(account: Account, name: str | None, kinds: tuple[str, ...] = KINDS) -> tuple[str, dict[str, Any]]:
    """Kind and description of a job; the project's newest training job without a name.

    Raises:
        UserError: when there is none.
    """
    name = name or newest(account, project.job_prefix())
    if name is None:
        raise UserError(f"this project has no training job in {account.region} yet; start one with `make train`")
    for kind in kinds:
        facts = describe(account, kind, name)
        if facts:
            return kind, facts
    other = newest(account, project.job_prefix())
    raise UserError(f"there is no job {name!r} in {account.region}" + (f"; the newest is {other}" if other else ""))


def describe(account: Account, kind: str, name: str) -> dict[str, Any]:
    """What SageMaker knows of a job, its status as `Status`; empty when there is none."""
    call = getattr(account.client("sagemaker"), f"describe_{words(kind, '_')}_job")
    with explained(f"looking up the job {name}"):
        facts: dict[str, Any] | None = unless_missing(call, **{f"{kind}JobName": name})
    return facts | {"Name": name, "Status": facts[f"{kind}JobStatus"]} if facts else {}


def follow(account: Account, kind: str, name: str, once: bool = False) -> dict[str, Any]:
    """Print a job's log lines, until it ends unless `once`; returns its last description.

    Raises:
        UserError: when Ctrl-C ends the looking, with how to stop the job.
    """
    tokens: dict[str, str] = {}
    watched = ""

    def look(say: Callable[[str], None]) -> tuple[dict[str, Any] | None, str]:
        nonlocal watched
        facts = describe(account, kind, name)
        _print_new_lines(account, kind, name, tokens, say)
        over = once or (facts["Status"] in ENDED and watched in ("", facts["Status"]))
        watched = facts["Status"]  # once more after its end: CloudWatch lags
        return facts if over else None, f"[{facts.get('SecondaryStatus', facts['Status'])}]"

    return until(f"the job {name}", POLL, look, stopped=f"{name} runs on. {after(account, kind, name)}")


@contextlib.contextmanager
def starting(account: Account, kind: str, name: str) -> Iterator[None]:
    """Create a job inside; the SDK swallows KeyboardInterrupt, so a signal that comes meanwhile is another exception.

    Args:
        account: to work in.
        kind: of job.
        name: of the job; of a training job, whose name the SDK makes, a part.

    Raises:
        UserError: when AWS refuses, gives no answer, or a signal came: with whether a job runs.
    """
    from botocore.exceptions import BotoCoreError

    word = words(kind, " ").rpartition(" ")[2]
    try:
        with explained(f"starting the {word} job"), interruptible():
            yield
    except Interrupted as error:
        end = _runs(account, kind, name) or f"no {word} job was started"
        raise UserError(f"stopped by {error}; {end}", code=130) from error
    except UserError as error:
        end = ""
        if isinstance(error.__cause__, BotoCoreError):  # no answer came, not even a refusal
            with contextlib.suppress(UserError):
                end = _runs(account, kind, name)
        if not end:
            raise
        raise UserError(f"{error}; but {end}") from error


def _runs(account: Account, kind: str, name: str) -> str:
    """That a job runs, and what to do with it; nothing when none does."""
    job = newest(account, name) if kind == "Training" else name
    facts = describe(account, kind, job) if job else {}
    return f"{job} runs. {after(account, kind, job)}" if job and facts and facts["Status"] not in ENDED else ""


def _print_new_lines(
    account: Account, kind: str, name: str, tokens: dict[str, str], say: Callable[[str], None]
) -> None:
    """Print what came since the last time; `tokens` remembers where each stream stood."""
    from botocore.exceptions import ClientError

    group, cloudwatch = f"/aws/sagemaker/{kind}Jobs", account.client("logs")
    lines = []
    with explained(f"reading the log of {name}"):
        try:
            paginator = cloudwatch.get_paginator("describe_log_streams")
            streams = paginator.paginate(logGroupName=group, logStreamNamePrefix=f"{name}/").search("logStreams[]")
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
            if not missing(error):
                raise
    for _, host, message in sorted(lines, key=lambda line: line[0]):
        for line in message.rstrip("\n").split("\n"):
            text = plain(line.rstrip("\r").expandtabs())
            say(text if host in ("", "algo-1") else f"{host}: {text}")


def succeeded(kind: str, facts: dict[str, Any]) -> None:
    """Return when a job that has ended did what it should.

    Raises:
        UserError: when it failed or was stopped, with the reason and what to do.
    """
    name, resume = facts["Name"], "; resume it with `make train RUN=<run>`" if kind == "Training" else ""
    if facts["Status"] == "Failed":
        raise UserError(f"{name} failed: {failure(facts)}")
    if facts["Status"] != "Completed":
        reason = facts.get("SecondaryStatus", facts["Status"])
        raise UserError(f"{name} ended without a result ({reason}){resume}")


def after(account: Account, kind: str, name: str) -> str:
    """How to look at a job that runs, and how to stop it."""
    word = words(kind, "-")
    region, verb = account.region, f"stop-{word}-job --{word}-job-name"
    look = terminal.command("tune" if kind == TUNING else "logs", JOB=name)
    return (
        f"Follow it with `{look}`, stop it with `aws sagemaker {verb} {name} --region {region}`, see it at "
        f"{account.console(f'{PAGES[kind]}/{name}')}"
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
    account = Account(load(options.set))
    kind, facts = find(account, options.job)
    facts = follow(account, kind, facts["Name"], options.once)
    if facts["Status"] == "Failed":
        print(f"failed: {failure(facts)}")
    return 0
