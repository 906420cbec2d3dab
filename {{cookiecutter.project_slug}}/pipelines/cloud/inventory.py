"""What the project has in AWS, since when, at what hourly price, and the request that removes each.

It is the tag `project` that makes a thing the project's: another project's name may begin with this one's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipelines import project
from pipelines.cloud import prices
from pipelines.cloud.account import Account, explained, pages, unless_missing
from pipelines.cloud.errors import REASONS, missing

THREADS = 8
ACTIVE = ("InProgress", "Stopping")
JOBS = {  # kind: what of SageMaker's names it has, whose price, where its instances are described
    "tuning job": ("HyperParameterTuningJob", "", ()),
    "training job": ("TrainingJob", "training", ("ResourceConfig",)),
    "processing job": ("ProcessingJob", "processing", ("ProcessingResources", "ClusterConfig")),
    "transform job": ("TransformJob", "transform", ("TransformResources",)),
}
SCALING = "application-autoscaling"


@dataclass(frozen=True)
class Item:
    """One thing in AWS.

    Attributes:
        kind: what it is, for people.
        name: its own.
        since: when it was made.
        detail: instances, or what else a person wants to know.
        usd: the most that it costs an hour; None when no price is known.
        bills: whether it costs something as long as it is there.
        removal: service, operation and parameters.
        uses: names of the configs and models of an endpoint.
        of: the endpoint that it belongs to.
    """

    kind: str
    name: str
    since: datetime
    detail: str
    removal: tuple[str, str, dict[str, Any]]
    usd: float | None = 0.0
    bills: bool = False
    uses: tuple[str, ...] = ()
    of: str = ""


def everything(account: Account) -> list[Item]:
    """All that the project has, but for the stack and what is in it.

    Raises:
        UserError: when AWS does not say.
    """
    with explained("listing what the project has in AWS"):
        sagemaker = account.client("sagemaker")
        found = [item for kind in JOBS for item in _jobs(account, sagemaker, kind)]
        listed = list(pages(sagemaker, "list_endpoints", "Endpoints"))
        endpoints = [
            item for summary in _ours(sagemaker, listed, "Endpoint") for item in _endpoint(account, sagemaker, summary)
        ]
        for kind, word in (("endpoint config", "EndpointConfig"), ("model", "Model")):
            for summary in _ours(sagemaker, pages(sagemaker, f"list_{_snake(word)}s", f"{word}s"), word):
                removal = ("sagemaker", f"delete_{_snake(word)}", {f"{word}Name": summary[f"{word}Name"]})
                endpoints.append(Item(kind, summary[f"{word}Name"], summary["CreationTime"], "", removal))
        ours, all_names = {item.name for item in endpoints if item.bills}, {item["EndpointName"] for item in listed}
        found += _executions(sagemaker)
        running = {item.name for item in found if item.kind == "transform job"}
        return found + endpoints + _attached(account, ours, all_names, running)


def _snake(word: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in word).strip("_")


def _ours(sagemaker: Any, found: Iterable[dict[str, Any]], word: str) -> list[dict[str, Any]]:
    """Those that have the project's tag."""
    from botocore.exceptions import ClientError

    own, listed = project.name(), list(found)
    allowed = tuple(f"{part}-" for part in (own, project.tuning_prefix()))

    def tagged(summary: dict[str, Any]) -> bool:
        try:
            return {"Key": "project", "Value": own} in pages(
                sagemaker, "list_tags", "Tags", ResourceArn=summary[f"{word}Arn"]
            )
        except ClientError as error:
            denied = error.response["Error"]["Code"] in REASONS["denied"]
            if missing(error) or (denied and not f"{summary[f'{word}Name']}-".startswith(allowed)):
                return False  # gone since; or another's, whose tags are not for these credentials
            raise

    with ThreadPoolExecutor(THREADS) as pool:
        return [summary for summary, mine in zip(listed, pool.map(tagged, listed), strict=True) if mine]


def _described(sagemaker: Any, word: str, name: str) -> dict[str, Any] | None:
    """What AWS says of it; None when it is gone since it was listed."""
    call = getattr(sagemaker, f"describe_{_snake(word)}")
    found: dict[str, Any] | None = unless_missing(call, **{f"{word}Name": name})
    return found


def _jobs(account: Account, sagemaker: Any, kind: str) -> list[Item]:
    """Jobs that run, and the warm pools of those that ended."""
    word, use, path = JOBS[kind]
    operation, key = f"list_{_snake(word)}s", f"{word}Summaries"
    listed = [job for status in ACTIVE for job in pages(sagemaker, operation, key, StatusEquals=status)]
    if kind == "training job":
        idle = pages(sagemaker, operation, key, WarmPoolStatusEquals="Available")
        listed += [job for job in idle if job.get("WarmPoolStatus", {}).get("Status") == "Available"]
    items = []
    for job in _ours(sagemaker, listed, word):
        name, status = job[f"{word}Name"], job[f"{word}Status"]
        place = _described(sagemaker, word, name) or {}
        spot = ", spot" if place.get("EnableManagedSpotTraining") else ""
        for step in path:
            place = place.get(step, {})
        count, instance = place.get("InstanceCount", 1), place.get("InstanceType", "")
        usd = _price(account, use, instance, count) if use else 0.0  # of tuning: its training jobs are listed too
        detail = f"{count} x {instance}{spot}, {status}" if use else status
        removal = ("sagemaker", f"stop_{_snake(word)}", {f"{word}Name": name})
        if status not in ACTIVE:
            detail = f"{count} x {instance}"
            removal = ("sagemaker", "update_training_job",
                       {"TrainingJobName": name, "ResourceConfig": {"KeepAlivePeriodInSeconds": 0}})  # fmt: skip
        what = kind if status in ACTIVE else "warm pool"
        items.append(Item(what, name, job["CreationTime"], detail, removal, usd, bills=True))
    return items


def _executions(sagemaker: Any) -> list[Item]:
    """Executions of the project's pipeline that run; what they cost are their jobs, which are listed too."""
    items = []
    for pipeline in _ours(sagemaker, pages(sagemaker, "list_pipelines", "PipelineSummaries"), "Pipeline"):
        name = pipeline["PipelineName"]
        for found in pages(sagemaker, "list_pipeline_executions", "PipelineExecutionSummaries", PipelineName=name):
            arn, status = found["PipelineExecutionArn"], found["PipelineExecutionStatus"]
            if status in ("Executing", "Stopping"):
                removal = ("sagemaker", "stop_pipeline_execution", {"PipelineExecutionArn": arn})
                label = f"{name}/{arn.rpartition('/')[2]}"
                items.append(Item("pipeline run", label, found["StartTime"], status, removal, bills=True))
    return items


def _endpoint(account: Account, sagemaker: Any, summary: dict[str, Any]) -> list[Item]:
    name = summary["EndpointName"]
    facts = _described(sagemaker, "Endpoint", name)
    config = _described(sagemaker, "EndpointConfig", facts["EndpointConfigName"]) if facts else None
    if facts is None:
        return []
    both = ("ProductionVariants", "ShadowProductionVariants")
    now = {variant["VariantName"]: variant for key in both for variant in facts.get(key, [])}
    details, costs, models = [], [], [facts["EndpointConfigName"]]
    for variant in (variant for key in both for variant in (config or {}).get(key, [])):
        models += [variant["ModelName"]] if "ModelName" in variant else []
        if "ServerlessConfig" in variant:
            details.append(f"serverless, {variant['ServerlessConfig']['MemorySizeInMB']} MB, bills what it answers")
            continue
        current = now.get(variant["VariantName"], {})
        count = max(current.get("CurrentInstanceCount", 0), current.get("DesiredInstanceCount", 0))
        count = count if current else variant.get("InitialInstanceCount", 1)
        instance = variant.get("InstanceType", "")
        use = "async" if (config or {}).get("AsyncInferenceConfig") else "hosting"
        details.append(f"{count} x {instance}")
        costs.append(_price(account, use, instance, count))
    known = [cost for cost in costs if cost is not None]
    usd = sum(known) if config and len(known) == len(costs) else None
    removal = ("sagemaker", "delete_endpoint", {"EndpointName": name})
    detail = ", ".join([*details, facts["EndpointStatus"]])
    return [Item("endpoint", name, facts["CreationTime"], detail, removal, usd, bills=True, uses=tuple(models))]


def _price(account: Account, use: str, instance: str, count: int) -> float | None:
    return prices.cost(prices.hourly(account, use, instance), count) if instance else None


def _attached(account: Account, ours: set[str], all_names: set[str], running: set[str]) -> list[Item]:
    """What belongs to an endpoint, and the end of a transform job; monitoring, alarms, dashboard, scaling also alone.

    An end without an endpoint fires and deletes itself; it may as well be of one that is about to be made.
    """
    own, items = project.name(), list[Item]()

    def belongs(name: str) -> bool:
        gone = name not in all_names and (name == own or name.startswith(f"{own}-"))
        return name in ours or gone

    scheduler, cloudwatch = account.client("scheduler"), account.client("cloudwatch")
    for prefix in sorted({own, *(name for name in ours if not name.startswith(own))}):
        for schedule in pages(scheduler, "list_schedules", "Schedules", NamePrefix=prefix):
            starts = schedule["Target"]["Arn"].rpartition(":")[2]
            ended = {"deleteEndpoint": ours, "stopTransformJob": running}.get(starts, set())
            beside = schedule["Name"].rpartition("-end-")[0] if starts in ("deleteAlarms", "deleteDashboards") else ""
            ended = ended or ({beside} if belongs(beside) else set())
            if not ended and starts != "createProcessingJob":
                continue
            where = {"Name": schedule["Name"], "GroupName": schedule["GroupName"]}
            facts = scheduler.get_schedule(**where)
            request, removal = json.loads(facts["Target"]["Input"]), ("scheduler", "delete_schedule", where)
            when = facts["ScheduleExpression"].removeprefix("at(").removesuffix(")")
            if starts == "createProcessingJob" and {"Key": "project", "Value": own} in request.get("Tags", []):
                items.append(_monitoring(account, facts, request, removal))
            elif ended and (endpoint := beside or next(iter(request.values()))) in ended:
                kind = "end of alarms" if beside else "end schedule"
                items.append(Item(kind, schedule["Name"], facts["CreationDate"], when, removal, of=endpoint))
        for alarm in pages(cloudwatch, "describe_alarms", "MetricAlarms", AlarmNamePrefix=prefix):
            names = [entry["Value"] for entry in alarm.get("Dimensions", []) if entry["Name"] == "EndpointName"]
            if names and belongs(names[0]):
                removal = ("cloudwatch", "delete_alarms", {"AlarmNames": [alarm["AlarmName"]]})
                since, state = alarm["AlarmConfigurationUpdatedTimestamp"], alarm["StateValue"]
                items.append(Item("alarm", alarm["AlarmName"], since, state, removal, of=names[0]))
        for board in pages(cloudwatch, "list_dashboards", "DashboardEntries", DashboardNamePrefix=prefix):
            name, endpoint = board["DashboardName"], board["DashboardName"].removesuffix("-monitor")
            if name != endpoint and belongs(endpoint):
                removal = ("cloudwatch", "delete_dashboards", {"DashboardNames": [name]})
                items.append(Item("dashboard", name, board["LastModified"], "", removal, of=endpoint))
    scaling = account.client(SCALING)
    for target in pages(scaling, "describe_scalable_targets", "ScalableTargets", ServiceNamespace="sagemaker"):
        endpoint = target["ResourceId"].split("/")[1]
        if target["ResourceId"].startswith("endpoint/") and belongs(endpoint):
            keys = ("ServiceNamespace", "ResourceId", "ScalableDimension")
            removal = (SCALING, "deregister_scalable_target", {key: target[key] for key in keys})
            detail = f"{target['MinCapacity']} to {target['MaxCapacity']} instances"
            items.append(
                Item("autoscaling", target["ResourceId"], target["CreationTime"], detail, removal, of=endpoint)
            )
    return items


def _monitoring(account: Account, facts: dict[str, Any], job: dict[str, Any], removal: Any) -> Item:
    """The schedule that compares an endpoint with its baseline, and the most that its jobs cost an hour."""
    machine, hours = job["ProcessingResources"]["ClusterConfig"], job["StoppingCondition"]["MaxRuntimeInSeconds"] / 3600
    every = 1 if facts["ScheduleExpression"].split()[1] == "*" else 24
    price = _price(account, "processing", machine["InstanceType"], machine["InstanceCount"])
    detail = f"{'hourly' if every == 1 else 'daily'} 1 x {machine['InstanceType']}, {hours * 60:.0f} min at most"
    usd, endpoint = prices.cost(price, hours / every), facts["Name"].removesuffix("-monitor")
    return Item("monitoring", facts["Name"], facts["CreationDate"], detail, removal, usd, bills=True, of=endpoint)


def table(items: Sequence[Item]) -> list[str]:
    """A line for each, and what all cost together."""
    ends = {item.of: item for item in items if item.kind == "end schedule"}
    lines = []
    for item in items:
        cost = "price unknown" if item.usd is None else f"{item.usd:.3f} USD/h" if item.bills else ""
        note = ""
        if item.kind == "endpoint":
            end = ends.get(item.name)
            note = f"until {end.detail} UTC" if end else "NO END: nothing deletes it; `make destroy`"
        lines.append("  ".join(
            [f"{item.kind:15}", f"{item.name:40}", f"{item.since.astimezone(UTC):%Y-%m-%d %H:%M}",
             f"{_age(item.since):>7}", f"{cost:>13}", item.detail, note]
        ).rstrip())  # fmt: skip
    return [*lines, _total(items)]


def _total(items: Iterable[Item]) -> str:
    """What all cost together."""
    costs = [item.usd for item in items if item.bills]
    unknown = costs.count(None)
    known = sum(cost for cost in costs if cost is not None)
    more = f" and {unknown} of unknown price" if unknown else ""
    return f"in all at most {known:.3f} USD an hour{more}, storage and requests apart"


def _age(since: datetime) -> str:
    hours = (datetime.now(UTC) - since.astimezone(UTC)).total_seconds() / 3600
    return f"{hours * 60:.0f} min" if hours < 1 else f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} d"
