"""Watch an endpoint: compare what it is asked and says with its artifact's baseline, by a schedule: `make monitor`.

    python -m pipelines monitor --set monitoring.schedule=daily
    make monitor DATA=<folder of captured requests> RUN=<name>          # the same comparison here, without AWS
    aws s3 sync s3://<bucket>/capture/<endpoint> <folder>               # fetches such a folder

A schedule of EventBridge starts a Processing job, src/processing/monitor.py in the project's image (SageMaker's own
monitoring schedules are closed to new customers since 2026-07-30). Its reports lie in the bucket, its metrics in
CloudWatch, with alarms for drift, errors and latency that go to the stack's topic, and a dashboard. Run again, it
updates all of that in place: do so after `make deploy`, for the new model's baseline and the endpoint's new end. The
schedule deletes itself with the endpoint's end; `make destroy` removes everything. Each job downloads all that the
bucket keeps of the variant's captured requests, 30 days: with much traffic capture few percent.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines import ROOT, SOURCE, project, runs, terminal
from pipelines.cloud import images, prices, storage
from pipelines.cloud.account import Account, explained, unless_missing, volume_key
from pipelines.cloud.processing import CODE
from pipelines.config import Settings, load
from pipelines.endpoint import expiry, state
from pipelines.terminal import UserError

EVERY = {"hourly": 1, "daily": 24}  # hours
CRON = {"hourly": "cron(20 * * * ? *)", "daily": "cron(20 0 * * ? *)"}  # captured requests may come minutes late
HOURS = 0.5  # of a job, at most
CLOUDWATCH = 5.7  # USD a month at most: 3 alarms, 6 metrics, 1 dashboard, beyond the free ones
NAMESPACE = "ModelDrift"  # as in src/processing/monitor.py
MEASURES = ("Drift", "Predictions", "Confidence", "Brightness", "Contrast")  # the first is their maximum
FOLDERS = {name: f"/opt/ml/processing/{name}" for name in ("artifact", "captured", "report")}


@dataclass(frozen=True)
class Watched:
    """A variant of an endpoint, where its captured requests go, and the artifact that it serves."""

    endpoint: str
    variant: str
    captured: str
    artifact: str


def find(account: Account, name: str) -> Watched:
    """The variant of a running endpoint that gets most requests.

    Raises:
        UserError: when requests and answers are not captured.
    """
    facts, sagemaker = state.running(account, name), account.client("sagemaker")
    with explained(f"looking up what {name} serves"):
        config = sagemaker.describe_endpoint_config(EndpointConfigName=facts["EndpointConfigName"])
        capture = config.get("DataCaptureConfig", {})
        modes = {option["CaptureMode"] for option in capture.get("CaptureOptions", [])}
        both = "InputAndOutput" in modes or {"Input", "Output"} <= modes
        if not (both and capture.get("EnableCapture") and capture["InitialSamplingPercentage"]):
            again = terminal.command("deploy", ENDPOINT=name, ARGS="--set endpoint.capture_percent=100")
            raise UserError(
                f"{name} does not capture its requests and answers, so there is nothing to compare; deploy it again "
                f"with capture: {again}"
            )
        variant = max(config["ProductionVariants"], key=lambda item: item.get("InitialVariantWeight", 1.0))
        model = sagemaker.describe_model(ModelName=variant["ModelName"])
        container = model.get("PrimaryContainer") or model["Containers"][0]
        if "ModelPackageName" in container:
            package = sagemaker.describe_model_package(ModelPackageName=container["ModelPackageName"])
            container = package["InferenceSpecification"]["Containers"][0]
    captured = f"{capture['DestinationS3Uri'].rstrip('/')}/{name}/{variant['VariantName']}"
    return Watched(name, variant["VariantName"], captured, container["ModelDataUrl"])


def monitor(account: Account, name: str, yes: bool, plan: bool = False) -> None:
    """Make or update schedule, alarms and dashboard.

    Raises:
        UserError: when the endpoint cannot be watched, or somebody says no.
    """
    settings = account.settings
    stack = prices.stack(account, plan)
    watched = prices.look(lambda: find(account, name), Watched(name, "<variant>", "", ""), plan)
    until = prices.look(lambda: expiry.end(account, name), None, plan)
    if not watched.artifact and settings.endpoint.ttl_hours:  # not there yet: as the next `make deploy` would have it
        until = expiry.end_after(settings.endpoint.ttl_hours)
    end = datetime.fromisoformat(until[3:-1]).replace(tzinfo=UTC) if until else None
    _agree(account, watched, end, yes, plan)
    image = images.ensure(account, "training")
    code = storage.upload(account, SOURCE, f"source/{project.source_hash()}")
    storage.put(account, f"{watched.captured}/.monitored", b"")
    with explained(f"monitoring {name}"):
        request = job(account, watched, image, code, account.kms_arn())
        _schedule(account, name, json.dumps(request), end)
        cloudwatch, board, wanted = account.client("cloudwatch"), f"{name}-monitor", alarms(settings, watched)
        alarm_names = [alarm["AlarmName"] for alarm in wanted]
        expiry.ends_with(account, name, "alarms", "cloudwatch:deleteAlarms", {"AlarmNames": alarm_names})
        expiry.ends_with(account, name, "dashboard", "cloudwatch:deleteDashboards", {"DashboardNames": [board]})
        for alarm in wanted:
            cloudwatch.put_metric_alarm(**alarm, AlarmActions=[stack.topic], Tags=account.tags())
        body = json.dumps({"widgets": widgets(settings, watched)})
        cloudwatch.put_dashboard(DashboardName=board, DashboardBody=body)
    print(f"{name} is compared {settings.monitoring.schedule} with the baseline of {watched.artifact}")
    print(f"  reports: s3://{stack.bucket}/monitoring/{name}/; alarms and dashboard: {name}-... in CloudWatch")
    remove = terminal.command("destroy", ENDPOINT=name)
    print(f"  after the next `make deploy` do this again; `{remove}` removes all of it", flush=True)


def _agree(account: Account, watched: Watched, end: datetime | None, yes: bool, plan: bool) -> None:
    """Say what will be made, where, and what it can cost; go on only inside the budget, and when told to."""
    chosen = account.settings.monitoring
    hours = (end - datetime.now(UTC)).total_seconds() / 3600 if end else prices.MONTH
    price, jobs = prices.hourly(account, "processing", chosen.instance_type), int(hours / EVERY[chosen.schedule]) + 1
    cost = None if price is None else price * HOURS * jobs + CLOUDWATCH * hours / prices.MONTH
    hourly = prices.cost(price, HOURS / EVERY[chosen.schedule])
    where = prices.where(account.settings)
    lines = [
        f"monitor the variant {watched.variant} of {watched.endpoint} in {where}: {chosen.schedule} a processing job "
        f"on 1 x {chosen.instance_type} of {HOURS * 60:.0f} minutes at most, 3 alarms, a dashboard",
        f"  {prices.usd(hourly)} an hour, {prices.usd(hourly, 24)} a day at most; with CloudWatch {prices.usd(cost)} "
        + (f"until the endpoint ends in {hours:.1f} hours" if end else "a month"),
    ]
    if hours < EVERY[chosen.schedule]:
        lines.append("  WARNING: it may end before the first comparison; set monitoring.schedule to hourly, or deploy "
                     "again with a later end (endpoint.ttl_hours)")  # fmt: skip
    prices.agree(account.settings, "\n".join(lines), cost, yes, plan)


def job(account: Account, watched: Watched, image: str, code: str, key: str | None) -> Any:
    """The request of each comparison; EventBridge puts in what is in angle brackets."""
    settings, stack, name = account.settings, account.stack(), watched.endpoint
    chosen = settings.monitoring
    sources = {"code": (f"{code}/", CODE), "artifact": (watched.artifact, FOLDERS["artifact"]),
               "captured": (f"{watched.captured}/", FOLDERS["captured"])}  # fmt: skip
    machine = dict[str, Any](
        InstanceCount=1, InstanceType=chosen.instance_type, VolumeSizeInGB=settings.compute.volume_gb
    )
    if disk_key := volume_key(key, chosen.instance_type):
        machine["VolumeKmsKeyId"] = disk_key
    network: dict[str, Any] = {"EnableNetworkIsolation": settings.compute.isolation}
    if settings.aws.subnets:
        network["VpcConfig"] = {"Subnets": settings.aws.subnets, "SecurityGroupIds": settings.aws.security_groups}
    place = {"S3Uri": f"s3://{stack.bucket}/monitoring/{name}", "LocalPath": FOLDERS["report"]}
    report = {"OutputName": "report", "S3Output": place | {"S3UploadMode": "EndOfJob"}}
    return {
        "ProcessingJobName": f"{project.job_prefix()}-monitor-<aws.scheduler.execution-id>",
        "RoleArn": stack.serving_role,
        "AppSpecification": {
            "ImageUri": image,
            "ContainerEntrypoint": ["python3", f"{CODE}/processing/monitor.py"],
            "ContainerArguments": [
                "--artifact", f"{FOLDERS['artifact']}/{watched.artifact.rpartition('/')[2]}",
                "--data", FOLDERS["captured"], "--output", FOLDERS["report"], "--endpoint", name,
                "--limit", str(chosen.limit), "--minimum", str(chosen.minimum),
                "--end", "<aws.scheduler.scheduled-time>", "--hours", str(EVERY[chosen.schedule]),
            ],
        },
        "ProcessingInputs": [
            {"InputName": part, "S3Input": {"S3Uri": where, "LocalPath": path, "S3DataType": "S3Prefix",
                                            "S3InputMode": "File"}}
            for part, (where, path) in sources.items()
        ],
        "ProcessingOutputConfig": {"Outputs": [report], **({"KmsKeyId": key} if key else {})},
        "ProcessingResources": {"ClusterConfig": machine},
        "StoppingCondition": {"MaxRuntimeInSeconds": round(HOURS * 3600)},
        "NetworkConfig": network,
        "Tags": account.tags(),
    }  # fmt: skip


def _schedule(account: Account, name: str, request: str, end: datetime | None) -> None:
    scheduler, stack = account.client("scheduler"), account.stack()
    wanted: dict[str, Any] = {
        "Name": f"{name}-monitor",
        "Description": f"compares what {name} is asked with its baseline",
        "ScheduleExpression": CRON[account.settings.monitoring.schedule],
        "ScheduleExpressionTimezone": "UTC",
        "FlexibleTimeWindow": {"Mode": "OFF"},
        "ActionAfterCompletion": "DELETE",
        "Target": {
            "Arn": f"arn:{stack.partition}:scheduler:::aws-sdk:sagemaker:createProcessingJob",
            "RoleArn": stack.scheduler_role,
            "Input": request,
            "RetryPolicy": {"MaximumRetryAttempts": 2, "MaximumEventAgeInSeconds": 1800},
        },
        **({"EndDate": end} if end else {}),
    }
    if unless_missing(scheduler.update_schedule, **wanted) is None:
        scheduler.create_schedule(**wanted)


def alarms(settings: Settings, watched: Watched) -> list[dict[str, Any]]:
    """Drift, errors, latency; that nobody asks is none."""
    endpoint = {"Name": "EndpointName", "Value": watched.endpoint}
    asked = {"Namespace": "AWS/SageMaker", "Period": 300, "TreatMissingData": "notBreaching",
             "Dimensions": [endpoint, {"Name": "VariantName", "Value": watched.variant}]}  # fmt: skip
    different = {"Namespace": NAMESPACE, "Period": 3600, "TreatMissingData": "ignore", "Dimensions": [endpoint]}
    rows: list[tuple[str, str, float, int, dict[str, Any]]] = [
        ("drift", "Drift", 1.0, 1, {"Statistic": "Maximum", **different}),
        ("errors", "Invocation5XXErrors", 0.05, 2, {"Statistic": "Average", **asked}),  # a share of the requests
        ("latency", "ModelLatency", 1000.0 * settings.monitoring.latency_ms, 3, {"ExtendedStatistic": "p99", **asked}),
    ]
    return [
        {"AlarmName": f"{watched.endpoint}-{what}", "AlarmDescription": f"{what} of {watched.endpoint}: make monitor",
         "MetricName": metric, "Threshold": above, "ComparisonOperator": "GreaterThanThreshold",
         "EvaluationPeriods": periods, **options}
        for what, metric, above, periods, options in rows
    ]  # fmt: skip


def widgets(settings: Settings, watched: Watched) -> list[dict[str, Any]]:
    """The dashboard: requests, errors, latency, drift, and how many instances bill."""
    asked, own = "AWS/SageMaker", ["EndpointName", watched.endpoint]
    both = [*own, "VariantName", watched.variant]
    drift = {"stat": "Maximum", "period": 3600}
    graphs = {
        "requests": [[asked, "Invocations", *both]],
        "errors": [[asked, f"Invocation{kind}XXErrors", *both] for kind in (4, 5)],
        "latency in microseconds": [[asked, "ModelLatency", *both, {"stat": stat}] for stat in ("p50", "p99")],
        "drift, by its limit: more than 1 is too much": [[NAMESPACE, name, *own, drift] for name in MEASURES],
        "images compared": [[NAMESPACE, "Images", *own, {"period": 3600}]],
        # each gives one sample a minute
        "instances": [["/aws/sagemaker/Endpoints", "CPUUtilization", *both, {"stat": "SampleCount", "period": 60}]],
    }
    return [
        {"type": "metric", "x": 12 * (number % 2), "y": 6 * (number // 2), "width": 12, "height": 6,
         "properties": {"title": title, "metrics": metrics, "region": settings.aws.region, "stat": "Sum",
                        "period": 300, "view": "timeSeries"}}
        for number, (title, metrics) in enumerate(graphs.items())
    ]  # fmt: skip


def here(settings: Settings, data: str, run: str | None) -> None:
    """Compare a folder on this machine; takes this process's place."""
    folder, chosen = runs.find(run), settings.monitoring
    words = [sys.executable, str(SOURCE / "processing" / "monitor.py"), "--artifact", str(folder / "model.tar.gz")]
    words += ["--data", str(Path(data).expanduser()), "--output", str(folder / "monitoring")]
    print(f"-> {Path(os.path.relpath(folder / 'monitoring', ROOT))}/report.json", flush=True)
    os.execv(sys.executable, [*words, "--limit", str(chosen.limit), "--minimum", str(chosen.minimum)])  # noqa: S606


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Compare what an endpoint is asked and says with its artifact's baseline.", settings=True)
    parser.add_argument("--endpoint", variable="ENDPOINT", help="its name (default: endpoint.name)")
    parser.add_argument(
        "--data", variable="DATA", help="folder of captured requests on this machine, to compare without AWS"
    )
    parser.add_argument(
        "--run", variable="RUN", help="with --data: the run whose baseline counts (default: the newest)"
    )
    parser.add_argument(
        "--yes", variable="YES", action="store_true", help="do not ask, and go on although it is over budget"
    )
    prices.add_plan(parser)
    options = parser.parse_args()
    settings = load(options.set)
    if options.data:
        here(settings, options.data, options.run)
    if options.run:
        raise UserError("RUN goes with DATA; an endpoint is compared with the artifact that it serves")
    monitor(Account(settings), state.name(settings, options.endpoint), options.yes, options.plan)
    return 0
