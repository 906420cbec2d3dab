"""Tuning jobs: several training jobs, whose values are drawn at random from the ranges.

https://docs.aws.amazon.com/sagemaker/latest/dg/automatic-model-tuning-how-it-works.html; no strategy but Grid is played
as such, and none stops a job early.
"""

from __future__ import annotations

import itertools
import math
import random
import secrets
from collections.abc import Iterator
from typing import Any

from rehearsal import jobs, wire
from rehearsal.jobs import Ended, Job
from rehearsal.operations import Account, Answer, Refused, Request, now, operation, page
from rehearsal.s3 import Failed

WORD = "HyperParameterTuningJob"
STATUSES = {"Completed": "Completed", "Failed": "NonRetryableError", "Stopped": "Stopped"}


def draws(ranges: dict[str, Any], grid: bool, seed: int) -> Iterator[dict[str, str]]:
    """Values of the hyperparameters that are searched, for one job after the other."""
    chance, lists = random.Random(seed), ranges.get("CategoricalParameterRanges", [])  # noqa: S311
    if grid:
        names = [entry["Name"] for entry in lists]
        yield from (dict(zip(names, row, strict=True)) for row in itertools.product(*(e["Values"] for e in lists)))
        return

    def between(entry: dict[str, str]) -> float:
        low, high, scale = float(entry["MinValue"]), float(entry["MaxValue"]), entry.get("ScalingType", "Auto")
        if scale == "Logarithmic":
            return math.exp(chance.uniform(math.log(low), math.log(high)))
        if scale == "ReverseLogarithmic":
            return 1 - math.exp(chance.uniform(math.log(1 - high), math.log(1 - low)))
        return chance.uniform(low, high)

    while True:
        picked = {entry["Name"]: chance.choice(entry["Values"]) for entry in lists}
        picked |= {entry["Name"]: repr(between(entry)) for entry in ranges.get("ContinuousParameterRanges", [])}
        for entry in ranges.get("IntegerParameterRanges", []):
            picked[entry["Name"]] = str(min(max(round(between(entry)), int(entry["MinValue"])), int(entry["MaxValue"])))
        yield picked


def tune(job: Job) -> None:
    """Run the training jobs, as many at a time as the request says."""
    config = job.request["HyperParameterTuningJobConfig"]
    limits = config["ResourceLimits"]
    objective = (
        config.get("HyperParameterTuningJobObjective") or job.request["TrainingJobDefinition"]["TuningObjective"]
    )
    rows = draws(config.get("ParameterRanges", {}), config.get("Strategy") == "Grid", config.get("RandomSeed", 0))
    left, running, trials = int(limits.get("MaxNumberOfTrainingJobs", 500)), list[Job](), job.facts["_trials"]
    while True:
        while left and len(running) < limits["MaxParallelTrainingJobs"] and not job.stop.is_set():
            values = next(rows, None)
            left = left - 1 if values is not None else 0
            if values is not None:
                running.append(_start(job, values, objective["MetricName"]))
        for child in [child for child in running if child.over.is_set()]:
            running.remove(child)
            _note(job, child, objective)
        if not running and (not left or job.stop.is_set()):
            break
        if job.stop.is_set():
            for child in running:
                child.stop.set()
        job.over.wait(jobs.PULSE)
    _count(job)
    if job.stop.is_set():
        raise Ended("Stopped")
    if not any(trial["TrainingJobStatus"] == "Completed" for trial in trials):
        raise Failed(f"No training job succeeded after {len(trials)} attempts; see the failures of its training jobs.")


def _start(job: Job, values: dict[str, str], metric: str) -> Job:
    definition, account = job.request["TrainingJobDefinition"], job.account
    number = len(job.facts["_trials"]) + 1
    members = wire.model("sagemaker").operation_model("CreateTrainingJob").input_shape.members
    hyperparameters = definition.get("StaticHyperParameters", {}) | values | {"_tuning_objective_metric": metric}
    request = {name: value for name, value in definition.items() if name in members} | {
        "TrainingJobName": f"{job.name}-{number:03d}-{secrets.token_hex(4)}",
        "HyperParameters": hyperparameters,
        "Tags": job.request.get("Tags", []),
    }
    arn = job.facts[f"{WORD}Arn"]
    child = jobs.create(account, "TrainingJob", request, jobs.train, SecondaryStatus="Starting", TuningJobArn=arn)
    job.facts["_trials"].append({
        "TrainingJobName": child.name, "TrainingJobArn": child.facts["TrainingJobArn"], "CreationTime": now(),
        "TrainingJobStatus": "InProgress", "TunedHyperParameters": values,
    })  # fmt: skip
    _count(job)
    return child


def _note(job: Job, child: Job, objective: dict[str, str]) -> None:
    """What became of a training job, and whether it is the best."""
    trial = next(trial for trial in job.facts["_trials"] if trial["TrainingJobName"] == child.name)
    trial["TrainingJobStatus"] = child.facts["TrainingJobStatus"]
    trial |= {
        key: child.facts[key] for key in ("FailureReason", "TrainingStartTime", "TrainingEndTime") if key in child.facts
    }
    if objective["MetricName"] in child.metrics and trial["TrainingJobStatus"] == "Completed":
        trial["FinalHyperParameterTuningJobObjectiveMetric"] = objective | {
            "Value": child.metrics[objective["MetricName"]]
        }
        trial["ObjectiveStatus"] = "Succeeded"
    elif trial["TrainingJobStatus"] == "Completed":
        trial["ObjectiveStatus"] = "Failed"
    judged = [trial for trial in job.facts["_trials"] if trial.get("ObjectiveStatus") == "Succeeded"]
    if judged:
        pick = max if objective["Type"] == "Maximize" else min
        job.facts["BestTrainingJob"] = pick(
            judged, key=lambda trial: trial["FinalHyperParameterTuningJobObjectiveMetric"]["Value"]
        )
    _count(job)


def _count(job: Job) -> None:
    trials = job.facts["_trials"]
    words = [STATUSES.get(trial["TrainingJobStatus"], "InProgress") for trial in trials]
    names = ("Completed", "InProgress", "RetryableError", "NonRetryableError", "Stopped")
    job.facts["TrainingJobStatusCounters"] = {name: words.count(name) for name in names}
    judged = [trial.get("ObjectiveStatus", "Pending") for trial in trials]
    job.facts["ObjectiveStatusCounters"] = {name: judged.count(name) for name in ("Succeeded", "Pending", "Failed")}


@operation("sagemaker", f"Create{WORD}")
def create(account: Account, request: Request) -> Answer:
    """Start a tuning job."""
    if "TrainingJobDefinition" not in request:
        raise Refused("ValidationException", "the rehearsal plays tuning jobs of one TrainingJobDefinition")
    none = {"Completed": 0, "InProgress": 0, "RetryableError": 0, "NonRetryableError": 0, "Stopped": 0}
    config = request["HyperParameterTuningJobConfig"]
    shown = {"Strategy": config["Strategy"], "ResourceLimits": config["ResourceLimits"]}  # of summaries
    job = jobs.create(account, WORD, request, tune, **shown, _trials=[], TrainingJobStatusCounters=none,
                      ObjectiveStatusCounters={"Succeeded": 0, "Pending": 0, "Failed": 0})  # fmt: skip
    return {f"{WORD}Arn": job.facts[f"{WORD}Arn"]}


@operation("sagemaker", f"ListTrainingJobsFor{WORD}")
def trials(account: Account, request: Request) -> Answer:
    """The training jobs of one."""
    listed = [trial for trial in jobs.found(account, WORD, request)["_trials"]
              if request.get("StatusEquals", trial["TrainingJobStatus"]) == trial["TrainingJobStatus"]]  # fmt: skip
    if request.get("SortBy") == "FinalObjectiveMetricValue":
        key = "FinalHyperParameterTuningJobObjectiveMetric"
        listed = sorted((trial for trial in listed if key in trial), key=lambda trial: trial[key]["Value"])
    return page(listed[::-1] if request.get("SortOrder") == "Descending" else listed, request, "TrainingJobSummaries")
