"""Search hyperparameters with SageMaker's tuner: `make tune`, `make tune DATA=s3://bucket/packed WAIT=1`.

    python -m pipelines tune --data photos --wait --set tuning.max_jobs=4

Ranges, objective and limits are the section `tuning` of configs/infrastructure.yaml. A tuner can give its jobs no
command: the image's own `train` starts the script that the SDK uploads, and it the same command as `make train`. AWS's
PyTorch images have a `train` of their own, which finds the source by hyperparameters. `JOB=` looks at a search again.
"""

from __future__ import annotations

import contextlib
import re
import time
from typing import Any

from pipelines import ROOT, SOURCE, project, terminal
from pipelines.cloud import images, jobs, prices, train
from pipelines.cloud.account import Account, explained, failure, pages, until
from pipelines.config import load
from pipelines.local import data
from pipelines.local.job import LAUNCHER
from pipelines.sections import Range, number
from pipelines.terminal import UserError
from pipelines.tuning import results

KIND = jobs.TUNING
TOOLKIT = re.compile(r"/[\w.-]*pytorch[\w.-]*training[\w.-]*[:@]")  # images that bring AWS's sagemaker-training


def most(account: Account) -> float | None:
    """USD that a tuning job can cost at most; the tuner keeps no warm pools."""
    settings = account.settings
    compute = settings.compute
    price = prices.hourly(account, "training", compute.instance_type)
    return prices.cost(price, compute.instances * compute.max_hours * settings.tuning.max_jobs)


def new_name() -> str:
    """A name for a tuning job: at most 32 characters, and its jobs' names begin with it."""
    return f"{project.tuning_prefix()}-{time.strftime('%y%m%d%H%M%S')}"


def tune(account: Account, source: str | None, yes: bool, plan: bool = False) -> str:
    """Start a tuning job.

    Args:
        account: to work in.
        source: folder of raw images, or the S3 prefix of a packed data set; None: the configured one.
        yes: go on although it is over budget.
        plan: only say what would be created, and end.

    Returns:
        The tuning job's name.

    Raises:
        UserError: when none was started.
    """
    settings = account.settings
    compute, search, source = settings.compute, settings.tuning, source or settings.data.source
    if TOOLKIT.search(settings.images.training) and (compute.isolation or compute.instances > 1):
        raise UserError(
            f"under a tuner {settings.images.training} takes its source from S3 and trains on one instance: set "
            "compute.isolation to false and compute.instances to 1, or images.training to project"
        )
    data.look(source)
    prices.stack(account, plan)
    local = None if plan or source.startswith("s3://") else data.prepare(settings, source)
    image = images.uri(account, "training")
    name = new_name()
    prices.afford(
        settings,
        f"search {name}: {search.max_jobs} training jobs at most, {search.max_parallel_jobs} at a time, in "
        f"{prices.where(settings)} on {train.machines(settings)}, {compute.max_hours:g} hours at most each, in "
        f"{image}, on {local.relative_to(ROOT) if local else source}; it searches {', '.join(search.ranges)} for "
        f"{search.objective}",
        most(account),
        yes,
        plan,
        prices.hourly(account, "training", compute.instance_type),
    )
    train.stage_image(account)
    channels = train.stage_data(account, source, local)
    request = train.Request(name, settings.training.as_dict(), channels)
    with jobs.starting(account, KIND, name):
        _submit(account, request, image)
    return name


def _submit(account: Account, request: train.Request, image: str) -> None:
    from sagemaker.train.tuner import HyperparameterTuner

    settings, folder = account.settings, f"jobs/{request.run}"
    made, search = train.trainer(account, request, image), settings.tuning
    made.source_code.entry_script = LAUNCHER  # of AWS's toolkit; and without one the tuner uploads nothing
    made.base_job_name = folder  # of no job: where the tuner uploads
    del made.environment["TENSORBOARD_FOLDER"]  # a tuner's jobs have no output of that kind
    made.environment["CHECKPOINTS_PER_JOB"] = "1"
    ignored = made.source_code.ignore_patterns
    code = made.create_input_data_channel("code", str(SOURCE), key_prefix=f"{folder}/input", ignore_patterns=ignored)
    tuner = HyperparameterTuner(
        made,
        search.objective,
        {name: _range(name, choice) for name, choice in search.ranges.items()},
        metric_definitions=[{"Name": name, "Regex": key + train.NUMBER} for name, key in train.METRICS.items()],
        strategy=search.strategy,
        objective_type=search.goal,
        max_jobs=search.max_jobs,
        max_parallel_jobs=search.max_parallel_jobs,
        early_stopping_type="Auto" if search.early_stopping else "Off",
    )
    build = tuner._build_training_job_definition

    def completed(inputs: list[Any]) -> Any:
        """With what the SDK leaves out of the trainer's settings."""
        definition = build(inputs)
        definition.enable_network_isolation = settings.compute.isolation
        definition.enable_inter_container_traffic_encryption = settings.compute.encrypt_traffic
        definition.resource_config.volume_kms_key_id = made.compute.volume_kms_key_id
        return definition

    tuner._build_training_job_definition = completed
    tuner.tune([*train.inputs(settings, request), code], job_name=request.run, wait=False)


def _range(name: str, choice: Range | list[Any]) -> Any:
    from sagemaker.core.parameter import CategoricalParameter, ContinuousParameter, IntegerParameter

    if isinstance(choice, list):
        return CategoricalParameter(choice)
    scale = "Logarithmic" if choice.scale == "log" else "Linear"
    if number(name) is int:
        return IntegerParameter(int(choice.min), int(choice.max), scaling_type=scale)
    return ContinuousParameter(choice.min, choice.max, scaling_type=scale)


def follow(account: Account, name: str, once: bool) -> dict[str, Any]:
    """Show how far a search is, until it ends unless `once`; returns its last description.

    Raises:
        UserError: when there is none, or when Ctrl-C ends the looking, with how to stop it.
    """

    def look(_: object) -> tuple[dict[str, Any] | None, str]:
        facts = jobs.describe(account, KIND, name)
        if not facts:
            raise UserError(f"there is no tuning job {name!r} in {account.region}")
        counts = facts.get("TrainingJobStatusCounters", {})
        line = ", ".join(f"{count} {jobs.words(word, ' ')}" for word, count in counts.items() if count)
        over = once or facts["Status"] in jobs.ENDED
        return facts if over else None, f"[{facts['Status']}] {line}".rstrip()

    stopped = f"{name} runs on. {jobs.after(account, KIND, name)}"
    return until(f"the search {name}", jobs.POLL, look, stopped=stopped)


def report(account: Account, facts: dict[str, Any]) -> None:
    """Show the jobs of a search, and what to do with the best.

    Raises:
        UserError: when the search ended without success, after the table.
    """
    name, config = facts["Name"], facts["HyperParameterTuningJobConfig"]
    with explained(f"listing the jobs of {name}"):
        listed = list(pages(
            account.client("sagemaker"), "list_training_jobs_for_hyper_parameter_tuning_job",
            "TrainingJobSummaries", HyperParameterTuningJobName=name, SortBy="CreationTime", SortOrder="Ascending",
        ))  # fmt: skip
    trials = [
        results.Trial(
            job["TrainingJobName"], {key: _read(value) for key, value in job["TunedHyperParameters"].items()},
            job.get("FinalHyperParameterTuningJobObjectiveMetric", {}).get("Value"), job["TrainingJobStatus"],
        )
        for job in listed
    ]  # fmt: skip
    ranges = [entry["Name"] for kind in config["ParameterRanges"].values() for entry in kind]
    objective = config["HyperParameterTuningJobObjective"]
    searched = account.settings.tuning.model_copy(
        update={"ranges": dict.fromkeys(ranges), "objective": objective["MetricName"], "goal": objective["Type"]}
    )
    print(results.table(searched, trials, terminal.width()))
    if facts["Status"] == "Failed":
        raise UserError(f"{name} failed: {failure(facts)}")
    best = results.best(searched, trials)
    if best:
        pull = terminal.command("pull", JOB=best.name)
        print(f"best: {best.name}; fetch it with `{pull}`, or train longer with its values:")
        print(f"  {terminal.command('train', ARGS=results.options(best))}")
    if facts["Status"] in ("Stopped", "Stopping"):
        raise UserError(f"{name} was stopped before its end")
    if facts["Status"] == "Completed" and best is None:
        raise UserError(f"no job of {name} succeeded; see why with `make logs JOB=<job>`")


def _read(value: str) -> Any:
    """A number as such, for the table."""
    with contextlib.suppress(ValueError):
        return int(value) if value.lstrip("-").isdigit() else float(value)
    return value


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Search hyperparameters with SageMaker's tuner.", settings=True)
    parser.add_data("folder of raw images, or s3://... of a packed data set")
    parser.add_argument("--job", variable="JOB", help="name of a tuning job to look at, instead of starting one")
    parser.add_argument(
        "--wait", variable="WAIT", action="store_true", help="follow it to its end; fails when the search does"
    )
    parser.add_argument("--yes", variable="YES", action="store_true", help="go on although it is over budget")
    prices.add_plan(parser)
    options = parser.parse_args()
    account = Account(load(options.set))
    name = options.job or tune(account, options.data, options.yes, options.plan)
    if not options.job:
        print(f"started {name}. {jobs.after(account, KIND, name)}", flush=True)
    if options.job or options.wait:
        report(account, follow(account, name, once=not options.wait))
    return 0
