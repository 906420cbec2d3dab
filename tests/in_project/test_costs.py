"""Prices, PLAN=1, `status` and `destroy`: what costs is known before, seen, and gone when it should be."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError

from pipelines import project, runs
from pipelines.batch import transform
from pipelines.cloud import destroy, inventory, prices, processing, status, train
from pipelines.cloud.account import Account, Stack
from pipelines.cloud.inventory import Item
from pipelines.config import load
from pipelines.endpoint import deploy
from pipelines.monitoring import monitor
from pipelines.pipeline import cloud as pipeline
from pipelines.terminal import Finished, UserError
from pipelines.tuning import cloud as tuning
from tests.cloud import NETWORK, STACK, Recorder, aws, check_golden, refused

__all__ = ["aws"]  # a fixture
NAME = project.name()
TAGS = [{"Key": "project", "Value": NAME}]
THEIRS = [{"Key": "project", "Value": f"{NAME}-2"}]
ROLE = "arn:aws:iam::123456789012:role/execution"
USD = {
    "Train:ml.p3.2xlarge": 3.825, "Train:ml.g5.xlarge": 1.408, "Host:ml.m5.large": 0.115, "AsyncInf:ml.m5.large": 0.1,
    "Processing:ml.m5.large": 0.115, "Tsform:ml.m5.large": 0.115, "ServerlessInf:Mem-4GB": 0.00008,
}  # fmt: skip


def offer(usage: str, *usd: float) -> str:
    steps = {
        str(number): {"unit": "seconds" if "Inf:Mem" in usage else "Hrs", "pricePerUnit": {"USD": str(price)}}
        for number, price in enumerate(usd)
    }
    return json.dumps(
        {"product": {"attributes": {"usagetype": usage}}, "terms": {"OnDemand": {"a": {"priceDimensions": steps}}}}
    )


def list_prices(parameters: dict[str, Any]) -> dict[str, Any]:
    """The API's answer in two pages: near misses first."""
    usage = next(f["Value"] for f in parameters["Filters"] if f["Field"] == "usagetype")
    if "NextToken" not in parameters:
        return {"PriceList": [offer(f"USE1-{usage}-more", 99), offer(f"USE1-Studio{usage}", 99)], "NextToken": "2"}
    return {"PriceList": [offer(f"USE1-{usage}", 0, USD[usage])] if usage in USD else []}


@pytest.fixture
def account(aws: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Account:
    monkeypatch.setattr(prices, "CACHE", tmp_path / "cache" / "prices.json")
    monkeypatch.setattr(destroy, "PAUSE", 0.0)
    aws.answers["GetProducts"] = list_prices
    return Account(load(["aws.region=us-east-1"], {}))


def test_a_price_is_found_on_any_page_and_asked_once_a_day(
    aws: Recorder, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prices.hourly(account, "training", "ml.g5.xlarge") == 1.408
    assert prices.hourly(account, "training", "ml.g5.xlarge") == 1.408
    assert prices.hourly(account, "hosting", "ml.m5.large") == 0.115
    assert len(aws.named("GetProducts")) == 4
    later = time.time() + prices.DAY
    monkeypatch.setattr(time, "time", lambda: later)
    aws.answers["GetProducts"] = {"PriceList": [offer("Train:ml.g5.xlarge", 2)]}
    assert prices.hourly(account, "training", "ml.g5.xlarge") == 2.0
    prices.CACHE.write_text("half a fi")
    assert prices.hourly(account, "training", "ml.g5.xlarge") == 2.0
    check_golden("prices", aws[:1])


def test_what_a_stand_in_for_aws_says_is_not_kept(
    aws: Recorder, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prices.hourly(account, "training", "ml.g5.xlarge") == 1.408
    aws.answers["GetProducts"] = {"PriceList": [offer("Train:ml.g5.xlarge", 2), offer("Host:ml.m5.large", 2)]}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:5000")
    assert prices.hourly(account, "training", "ml.g5.xlarge") == 2.0
    assert prices.hourly(account, "hosting", "ml.m5.large") == 2.0
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    aws.answers["GetProducts"] = list_prices
    assert prices.hourly(account, "training", "ml.g5.xlarge") == 1.408
    assert prices.hourly(account, "hosting", "ml.m5.large") == 0.115


@pytest.mark.parametrize(
    "answer",
    [
        {"PriceList": []},
        {"PriceList": [offer("USE1-Train:ml.g5.xlarge", 0)]},
        {"PriceList": ['{"product": {"attributes": {"usagetype": "Train:ml.g5.xlarge"}}}']},
        {"PriceList": [offer("Train:ml.g5.xlarge", 7).replace("USD", "CNY")]},
        refused("AccessDeniedException"),
        EndpointConnectionError(endpoint_url="x"),
    ],
)
def test_a_price_that_cannot_be_known_is_none_and_asked_again(aws: Recorder, account: Account, answer: Any) -> None:
    aws.answers["GetProducts"] = answer
    assert prices.hourly(account, "training", "ml.g5.xlarge") is None
    aws.answers["GetProducts"] = list_prices
    assert prices.hourly(account, "training", "ml.g5.xlarge") == 1.408


def test_china_has_no_price_in_dollars(aws: Recorder) -> None:
    assert prices.hourly(Account(load(["aws.region=cn-north-1"], {})), "training", "ml.g5.xlarge") is None
    assert not aws


@pytest.mark.parametrize(("cost", "allowed"), [(20.0, True), (20.01, False), (None, False)])
def test_an_unknown_price_is_over_budget(account: Account, cost: float | None, allowed: bool) -> None:
    prices.check_budget(account.settings, cost, yes=True)
    if allowed:
        prices.check_budget(account.settings, cost, yes=False)
    else:
        with pytest.raises(UserError, match=r"over aws.budget_usd \(20 USD\).*YES=1"):
            prices.check_budget(account.settings, cost, yes=False)


READS = ("Describe", "Get", "List", "Head")
BILLING = {
    "process": processing, "train": train, "tune": tuning, "pipeline": pipeline, "deploy": deploy, "batch": transform,
    "monitor": monitor,
}  # fmt: skip
Planned = Callable[..., str]


@pytest.fixture
def planned(aws: Recorder, account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Planned:
    """What a verb prints with --plan, where there is neither a stack nor a run; only reading requests may be sent."""
    monkeypatch.setattr(runs, "ARTIFACTS", tmp_path / "artifacts")
    monkeypatch.setattr(subprocess, "run", lambda *words, **_: pytest.fail(f"started {words}"))
    for variable in ("COMPUTE__INSTANCE_TYPE", "MONITORING__INSTANCE_TYPE", "COMPUTE__PROCESS_INSTANCE_TYPE"):
        monkeypatch.setenv(variable, "ml.g5.xlarge" if variable == "COMPUTE__INSTANCE_TYPE" else "ml.m5.large")
    assert account

    def run(verb: str, *words: str, over: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", [verb, "--plan", "--yes", "--set", "aws.region=us-east-1", *words])
        aws.clear()
        with pytest.raises(UserError if over else Finished) as ended:
            BILLING[verb].main()
        assert not over or "over aws.budget_usd" in str(ended.value)
        assert [operation for operation, _ in aws if not operation.startswith(READS)] == []
        assert not (tmp_path / "artifacts").exists()
        out = str(capsys.readouterr().out)
        assert ("PLAN=1: nothing was created" in out) != over
        return out

    return run


@pytest.mark.parametrize("verb", BILLING)
def test_plan_of_every_verb_that_bills_says_the_most_and_creates_nothing(verb: str, planned: Planned) -> None:
    """Before there is a stack, data or a run; --yes and all the rest change nothing."""
    text = planned(verb, "--set", "tuning.max_jobs=2")
    assert text.partition("note: ")[2].partition("\n")[2].count(" in us-east-1")
    assert re.search(r"\d\.\d\d USD", text)
    assert f"there is no stack {NAME}" in text
    assert "USD" in planned(verb, "--set", "aws.budget_usd=0.01", over=True)


@pytest.mark.parametrize("verb", BILLING)
def test_plan_of_an_unknown_price_is_over_budget(verb: str, planned: Planned, aws: Recorder) -> None:
    aws.answers["GetProducts"] = refused("AccessDeniedException")
    text = planned(verb, over=True)
    assert "a price that is not known" in text or "an unknown price" in text


def test_plan_with_the_stack_looks_and_touches_nothing(
    planned: Planned, aws: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Account, "stack", lambda _: STACK)
    make_endpoint(NAME)
    for verb in BILLING:
        assert STACK.repository in planned(verb, "--set", "tuning.max_jobs=2") or verb in ("pipeline", "monitor")
    assert aws


def test_plan_says_what_the_settings_make_of_it(planned: Planned) -> None:
    text = planned("train", "--set", "compute.instances=2")
    assert "2 x ml.g5.xlarge spot, cheaper than the price below, 8 hours with waiting, 50 GB each, 4 hours" in text
    assert "costs at most 11.26 USD (1.408 USD an hour each)" in text
    warm = ("compute.instances=4", "compute.spot=false", "compute.keep_alive_minutes=30", *NETWORK)
    text = planned("train", *(word for setting in warm for word in ("--set", setting)), over=True)
    assert "spot" not in text
    assert "inside the VPC of aws.subnets on 4 x" in text
    assert "4.5 hours at most with 30 minutes of warm pool" in text
    assert "at most 25.34 USD" in text
    text = planned("deploy")
    assert "0.12 USD an hour at most, 0.92 USD until it deletes itself after 8 hours, 83.95 USD a month" in text
    assert "never deletes itself" in planned("deploy", "--set", "endpoint.ttl_hours=0", over=True)
    text = planned("deploy", "--type", "async", "--set", "endpoint.max_instances=3")
    assert "at most 3 x ml.m5.large" in text
    assert "0.30 USD an hour" in text
    words = ("endpoint.memory_mb=4096", "endpoint.max_concurrency=5")
    text = planned("deploy", "--type", "serverless", *(word for setting in words for word in ("--set", setting)))
    assert "1.44 USD an hour" in text
    assert "bills while it answers" in text
    assert "costs at most 11.26 USD" in planned("tune", "--set", "tuning.max_jobs=2")


def make_endpoint(name: str, tags: list[dict[str, str]] = TAGS, count: int = 1) -> None:
    sagemaker = Account(load(["aws.region=us-east-1"], {})).client("sagemaker")
    unique = f"{name}-v1"
    sagemaker.create_model(
        ModelName=unique, ExecutionRoleArn=ROLE, Tags=tags,
        PrimaryContainer={"Image": "i:1", "ModelDataUrl": "s3://b/model.tar.gz"},
    )  # fmt: skip
    variant = {"VariantName": "AllTraffic", "ModelName": unique, "InitialInstanceCount": count}
    sagemaker.create_endpoint_config(
        EndpointConfigName=unique, Tags=tags, ProductionVariants=[{**variant, "InstanceType": "ml.m5.large"}]
    )
    sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=unique, Tags=tags)


def attach(account: Account, name: str) -> None:
    """The end schedule, an alarm and autoscaling of an endpoint."""
    account.client("scheduler").create_schedule(
        Name=f"{name}-end", ScheduleExpression="at(2030-01-02T03:04:05)", FlexibleTimeWindow={"Mode": "OFF"},
        Target={"Arn": "arn:aws:scheduler:::aws-sdk:sagemaker:deleteEndpoint", "RoleArn": ROLE,
                "Input": json.dumps({"EndpointName": name})},
    )  # fmt: skip
    account.client("cloudwatch").put_metric_alarm(
        AlarmName=f"{name}-backlog", MetricName="HasBacklogWithoutCapacity", Namespace="AWS/SageMaker",
        Statistic="Average", Dimensions=[{"Name": "EndpointName", "Value": name}], Period=60, EvaluationPeriods=2,
        Threshold=1, ComparisonOperator="GreaterThanOrEqualToThreshold",
    )  # fmt: skip
    account.client("application-autoscaling").register_scalable_target(
        ServiceNamespace="sagemaker", ResourceId=f"endpoint/{name}/variant/AllTraffic", MinCapacity=1, MaxCapacity=4,
        ScalableDimension="sagemaker:variant:DesiredInstanceCount",
    )  # fmt: skip


class Jobs:
    """Jobs as AWS would list them; moto can start none that runs and stop hardly any."""

    KINDS = ("TrainingJob", "ProcessingJob", "TransformJob", "HyperParameterTuningJob")

    def __init__(self, aws: Recorder) -> None:
        self.running: dict[str, dict[str, str]] = {kind: {} for kind in self.KINDS}
        self.pools: set[str] = set()
        self.theirs: set[str] = set()
        for kind in self.KINDS:
            aws.answers[f"List{kind}s"] = lambda p, kind=kind: self.listed(kind, p)
            aws.answers[f"Stop{kind}"] = lambda p, kind=kind: self.stop(kind, p[f"{kind}Name"])
        machines = {"InstanceType": "ml.m5.large", "InstanceCount": 2, "VolumeSizeInGB": 1}
        aws.answers["DescribeTrainingJob"] = {
            "ResourceConfig": machines | {"InstanceType": "ml.p3.2xlarge"}, "EnableManagedSpotTraining": True
        }  # fmt: skip
        aws.answers["DescribeProcessingJob"] = {"ProcessingResources": {"ClusterConfig": machines}}
        aws.answers["DescribeTransformJob"] = {"TransformResources": machines}
        aws.answers["DescribeHyperParameterTuningJob"] = {}
        aws.answers["UpdateTrainingJob"] = self.release
        tags = {"Tags": TAGS}
        aws.answers["ListTags"] = lambda p: {"Tags": THEIRS} if p["ResourceArn"].split("/")[-1] in self.theirs else tags

    def listed(self, kind: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """A page for each job."""
        wanted = parameters.get("StatusEquals")
        names = [name for name, status in self.running[kind].items() if status == wanted]
        if "WarmPoolStatusEquals" in parameters:
            names = sorted(self.pools)
        first = int(parameters.get("NextToken", 0))
        summaries = [
            {f"{kind}Name": name, f"{kind}Arn": f"arn:aws:sagemaker:us-east-1:123456789012:job/{name}",
             "CreationTime": datetime(2026, 1, 1, tzinfo=UTC), f"{kind}Status": wanted or "Completed",
             "WarmPoolStatus": {"Status": parameters.get("WarmPoolStatusEquals", "InUse")}}
            for name in names[first : first + 1]
        ]  # fmt: skip
        more = {"NextToken": str(first + 1)} if first + 1 < len(names) else {}
        kind = "HyperParameterTuningJob" if kind.startswith("Hyper") else kind
        return {f"{kind}Summaries": summaries, **more}

    def release(self, parameters: dict[str, Any]) -> dict[str, Any]:
        self.pools.discard(parameters["TrainingJobName"])
        return {}

    def stop(self, kind: str, name: str) -> dict[str, Any]:
        """It takes one more look until it is gone."""
        if self.running[kind].pop(name) == "InProgress":
            self.running[kind][name] = "Stopping"
        return {}


def furnish(account: Account, aws: Recorder) -> Jobs:
    """One of everything that bills, in this project and in another one whose name begins with this one's."""
    make_endpoint(NAME, count=2)
    make_endpoint("by-another-name")
    make_endpoint(f"{NAME}-2", THEIRS)
    for name in (NAME, f"{NAME}-2", f"{NAME}-gone"):
        attach(account, name)
    jobs = Jobs(aws)
    for kind in Jobs.KINDS:
        jobs.running[kind] = {f"{NAME}-{letter}": "InProgress" for letter in "abc"} | {f"{NAME}-2-job": "InProgress"}
    jobs.pools = {f"{NAME}-idle", f"{NAME}-2-job"}
    jobs.theirs = {f"{NAME}-2", f"{NAME}-2-v1", f"{NAME}-2-job"}
    return jobs


def test_status_shows_everything_of_the_project_with_its_price(aws: Recorder, account: Account) -> None:
    furnish(account, aws)
    items = inventory.everything(account)
    lines = inventory.table(items)
    counts: dict[str, int] = {}
    for item in items:
        counts[item.kind] = counts.get(item.kind, 0) + 1
    assert counts == {"tuning job": 3, "training job": 3, "processing job": 3, "transform job": 3, "warm pool": 1,
                      "endpoint": 2, "endpoint config": 2, "model": 2, "end schedule": 1, "alarm": 2,
                      "autoscaling": 2}  # fmt: skip
    assert not [item for item in items if item.name in (f"{NAME}-2", f"{NAME}-2-job", f"{NAME}-2-v1")]
    text = "\n".join(lines)
    assert re.search(rf"endpoint +{NAME} .*0\.230 USD/h  2 x ml\.m5\.large, InService  until 2030-01-02", text)
    assert re.search(r"endpoint +by-another-name .* 0\.115 USD/h .*NO END: nothing deletes it", text)
    assert re.search(r"training job .*2026-01-01 00:00 +\d+ d +7\.650 USD/h  2 x ml\.p3\.2xlarge, spot", text)
    assert re.search(rf"warm pool +{NAME}-idle .*7\.650 USD/h", text)
    total = 4 * 7.65 + 6 * 0.23 + 0.345
    assert lines[-1] == f"in all at most {total:.3f} USD an hour, storage and requests apart"
    reading: dict[str, dict[str, Any]] = {}
    for operation, parameters in aws:
        if operation.startswith(("List", "Describe", "Get")):
            reading.setdefault(operation, parameters)
    check_golden("status", list(reading.items()))


def test_status_counts_what_has_no_price(aws: Recorder, account: Account) -> None:
    make_endpoint(NAME)
    aws.answers["GetProducts"] = refused("AccessDeniedException")
    lines = inventory.table(inventory.everything(account))
    assert "price unknown" in lines[0]
    assert lines[-1].startswith("in all at most 0.000 USD an hour and 1 of unknown price")


def test_what_belongs_to_an_endpoint_of_another_name(account: Account) -> None:
    make_endpoint("by-another-name")
    attach(account, "by-another-name")
    lines = inventory.table(inventory.everything(account))
    assert [line.split()[0] for line in lines] == ["endpoint", "endpoint", "model", "end", "alarm", "autoscaling", "in"]
    assert "until 2030-01-02T03:04:05 UTC" in lines[0]


def test_serverless_and_async_endpoints(aws: Recorder, account: Account) -> None:
    make_endpoint(NAME)
    variant = {"VariantName": "AllTraffic", "ModelName": "m"}
    serverless = {"ServerlessConfig": {"MemorySizeInMB": 2048, "MaxConcurrency": 5}}
    aws.answers["DescribeEndpointConfig"] = {"ProductionVariants": [variant | serverless]}
    (item,) = (item for item in inventory.everything(account) if item.kind == "endpoint")
    assert (item.usd, item.bills) == (0, True)
    aws.answers["DescribeEndpointConfig"] = {
        "ProductionVariants": [variant | {"InitialInstanceCount": 1, "InstanceType": "ml.m5.large"}],
        "ShadowProductionVariants": [variant | {"VariantName": "s", "InitialInstanceCount": 2, "InstanceType": "x"}],
        "AsyncInferenceConfig": {"OutputConfig": {}},
    }
    (item,) = (item for item in inventory.everything(account) if item.kind == "endpoint")
    assert (item.usd, item.detail) == (None, "1 x ml.m5.large, 2 x x, InService")
    del aws.answers["DescribeEndpointConfig"]["ShadowProductionVariants"]
    (item,) = (item for item in inventory.everything(account) if item.kind == "endpoint")
    assert item.usd == 0.1  # not the price of a real-time endpoint
    del aws.answers["DescribeEndpointConfig"]
    facts = {"EndpointConfigName": f"{NAME}-v1", "EndpointStatus": "InService", "CreationTime": datetime.now(UTC)}
    zero = [{"VariantName": "AllTraffic", "CurrentInstanceCount": 0, "DesiredInstanceCount": 0}]
    aws.answers["DescribeEndpoint"] = facts | {"ProductionVariants": zero}
    (item,) = (item for item in inventory.everything(account) if item.kind == "endpoint")
    assert (item.usd, item.detail) == (0.0, "0 x ml.m5.large, InService")


def test_status_of_stack_bucket_and_images(aws: Recorder, account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "make bootstrap" in status.stored(account)[0]
    repository = "123456789012.dkr.ecr.us-east-1.amazonaws.com/repo"
    made = Stack(
        bucket="b", role=ROLE, repository=repository, topic="t", scheduler_role="s", pipeline_role="p", serving_role="v"
    )
    monkeypatch.setattr(Account, "stack", lambda _: made)
    assert "RepositoryNotFoundException" in status.stored(account)[2]
    aws.answers["DescribeImages"] = lambda p: (
        {"imageDetails": [{"imageSizeInBytes": 10**9}]} | ({} if p.get("nextToken") else {"nextToken": "2"})
    )
    result = {"Id": "size", "Values": [25e8, 1e9]}
    aws.answers["GetMetricData"] = {"MetricDataResults": [result]}
    assert status.stored(account)[1:] == [
        "bucket b: 2.5 GB yesterday", f"repository {repository}: 2 images, 2.0 GB",
        f"registry {NAME}: 0 packages, the champion is none yet", f"pipeline {NAME}: started by `make pipeline` only",
    ]  # fmt: skip


def test_more_than_one_page_of_endpoints_and_tags(
    aws: Recorder, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moto.sagemaker.models import PAGINATION_MODEL

    for number in range(5):
        make_endpoint(f"{NAME}-{number}", [{"Key": f"k{key}", "Value": "v"} for key in range(3)] + TAGS)
    for operation in ("list_endpoints", "list_endpoint_configs", "list_tags"):
        monkeypatch.setitem(PAGINATION_MODEL[operation], "limit_default", 2)
    kinds = [item.kind for item in inventory.everything(account)]
    assert (kinds.count("endpoint"), kinds.count("endpoint config"), kinds.count("model")) == (5, 5, 5)
    assert len(aws.named("ListEndpoints")) == 3
    assert {"NextToken"} <= {key for call in aws.named("ListTags") for key in call}


def test_tags_that_may_not_be_read(aws: Recorder, account: Account) -> None:
    make_endpoint("quite-another")
    aws.answers["ListTags"] = refused("AccessDeniedException")
    assert inventory.everything(account) == []
    make_endpoint(NAME)
    with pytest.raises(UserError, match=r"listing what the project has in AWS failed.*make doctor"):
        inventory.everything(account)


CHANGES = ("Delete", "Stop", "Update", "Deregister")


def changes(calls: Recorder) -> list[tuple[str, dict[str, Any]]]:
    return [call for call in calls if call[0].startswith(CHANGES)]


def test_after_destroy_nothing_of_the_project_bills_and_nothing_of_others_is_touched(
    aws: Recorder, account: Account, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = furnish(account, aws)
    busy = [refused("ValidationException", message="Cannot update in-progress endpoint")]
    original = account.client("sagemaker")
    assert original.list_endpoints()["Endpoints"]
    aws.clear()

    def still_creating(_: dict[str, Any]) -> Any:
        """The first time an endpoint cannot be deleted, the second time moto does it."""
        del aws.answers["DeleteEndpoint"]
        raise busy.pop()

    def stop_and_end(kind: str) -> None:
        """What is stopping has ended by the next look but one."""
        listed = jobs.listed

        def later(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
            answer = listed(name, parameters)
            if parameters.get("StatusEquals") == "Stopping" and "NextToken" not in answer:
                stopping = [job for job, status in jobs.running[name].items() if status == "Stopping"]
                for job in stopping[1:]:
                    del jobs.running[name][job]
                if len(stopping) == 1:
                    del jobs.running[name][stopping[0]]
            return answer

        aws.answers[f"List{kind}s"] = lambda p: later(kind, p)

    for kind in Jobs.KINDS:
        stop_and_end(kind)
    aws.answers["DeleteEndpoint"] = still_creating
    destroy.destroy(account, None, yes=True)
    printed = capsys.readouterr().out
    assert printed.index("in all at most") < printed.index("removing ")
    assert f"waiting for tuning job {NAME}-a" in printed
    assert inventory.everything(account) == []
    assert jobs.pools == {f"{NAME}-2-job"}
    assert all(running == {f"{NAME}-2-job": "InProgress"} for running in jobs.running.values())
    for listed, name in (
        ("list_endpoints", "Endpoint"),
        ("list_endpoint_configs", "EndpointConfig"),
        ("list_models", "Model"),
    ):
        (left,) = getattr(original, listed)()[f"{name}s"]
        assert left[f"{name}Name"].startswith(f"{NAME}-2")
    schedules = account.client("scheduler").list_schedules()["Schedules"]
    (alarm,) = account.client("cloudwatch").describe_alarms()["MetricAlarms"]
    assert {schedule["Name"] for schedule in schedules} == {f"{NAME}-2-end", f"{NAME}-gone-end"}
    assert alarm["AlarmName"] == f"{NAME}-2-backlog"
    check_golden("destroy", changes(aws))
    aws.clear()
    destroy.destroy(account, None, yes=True)
    assert not changes(aws)


def test_destroy_of_one_endpoint_leaves_the_others(aws: Recorder, account: Account) -> None:
    furnish(account, aws)
    aws.clear()
    with pytest.raises(UserError, match=rf"no endpoint {NAME}-2; it has: {NAME}, by-another-name"):
        destroy.destroy(account, f"{NAME}-2", yes=True)
    destroy.destroy(account, NAME, yes=True)
    removed = changes(aws)
    assert [operation for operation, _ in removed] == [
        "DeregisterScalableTarget", "DeleteEndpoint", "DeleteEndpointConfig", "DeleteModel", "DeleteSchedule",
        "DeleteAlarms",
    ]  # fmt: skip
    check_golden("destroy-endpoint", removed)
    assert {item.name for item in inventory.everything(account) if item.kind == "endpoint"} == {"by-another-name"}


def test_destroy_of_one_endpoint_leaves_a_model_that_another_may_use() -> None:
    now = datetime.now(UTC)
    nothing: tuple[str, str, dict[str, Any]] = ("sagemaker", "delete_model", {})
    one = Item("endpoint", "one", now, "", nothing, bills=True, uses=("one-v1", "shared", "one-model"))
    models = [Item("model", name, now, "", nothing) for name in ("shared", "one-model", "one-old")]
    assert destroy.chosen([one, *models], "one") == [one, models[1]]


def test_destroy_asks_first(aws: Recorder, account: Account) -> None:
    make_endpoint(NAME)
    with pytest.raises(UserError, match=r"nobody is there to answer; say YES=1"):
        destroy.destroy(account, None, yes=False)
    assert not changes(aws)


def test_destroy_names_what_it_may_not_remove_and_removes_the_rest(
    aws: Recorder, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(destroy, "PATIENCE", 5.0)
    make_endpoint(NAME)
    make_endpoint(f"{NAME}-b")
    original, denied = aws.answers, refused("AccessDeniedException", message="not authorized")
    seen: list[str] = []

    def only_the_other(parameters: dict[str, Any]) -> Any:
        seen.append(parameters["EndpointName"])
        if parameters["EndpointName"] == NAME:
            raise denied
        del original["DeleteEndpoint"]
        try:
            return account.client("sagemaker").delete_endpoint(**parameters)
        finally:
            original["DeleteEndpoint"] = only_the_other

    original["DeleteEndpoint"] = only_the_other
    with pytest.raises(UserError, match=rf"still there: endpoint {NAME} \(not authorized, not allowed: `make doctor`"):
        destroy.destroy(account, None, yes=True)
    assert sorted(seen) == [NAME, f"{NAME}-b"]
    assert {item.name for item in inventory.everything(account) if item.kind == "endpoint"} == {NAME}


def test_destroy_gives_up_in_the_end(aws: Recorder, account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    make_endpoint(NAME)
    attach(account, NAME)
    aws.answers["DeleteEndpoint"] = {}
    monkeypatch.setattr(destroy, "PATIENCE", 0.3)
    with pytest.raises(UserError, match=rf"still there: endpoint {NAME}\. Do it again"):
        destroy.destroy(account, None, yes=True)
    assert not aws.named("DeleteSchedule", "DeleteModel", "DeleteEndpointConfig")  # it still has to end


@pytest.mark.parametrize("operation", ["DeleteModel", "DeleteAlarms", "DeleteSchedule"])
def test_destroy_names_what_is_left_although_it_bills_nothing(aws: Recorder, account: Account, operation: str) -> None:
    make_endpoint(NAME)
    attach(account, NAME)
    aws.answers[operation] = refused("ThrottlingException", message="slow down")
    with pytest.raises(UserError, match=r"still there: .*\(slow down\)"):
        destroy.destroy(account, None, yes=True)


def test_destroy_with_expired_credentials_says_so(aws: Recorder, account: Account) -> None:
    aws.answers["ListTrainingJobs"] = refused("ExpiredTokenException")
    with pytest.raises(UserError, match="the AWS credentials have expired"):
        destroy.destroy(account, None, yes=True)
