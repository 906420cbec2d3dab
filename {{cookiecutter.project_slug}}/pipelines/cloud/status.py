"""What the project has in AWS, since when, and what it costs an hour: `make status`.

python -m pipelines status
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from pipelines import project, terminal
from pipelines.cloud import inventory, packages
from pipelines.cloud.account import Account, explained, pages
from pipelines.config import load
from pipelines.terminal import UserError
from progress import several

GB = 1e9


def stored(account: Account) -> list[str]:
    """The stack, and how much is in its bucket and its repository."""
    try:
        made = account.stack()
    except UserError as error:
        return [str(error)]
    lines = [f"stack {project.name()}: there"]
    parts: list[tuple[str, Callable[[], str]]] = [
        (f"bucket {made.bucket}", lambda: _bucket(account, made.bucket)),
        (f"repository {made.repository}", lambda: _images(account, made.repository)),
        (f"registry {packages.group()}", lambda: _packages(account)),
        (f"pipeline {project.name()}", lambda: _triggers(account)),
    ]
    for name, measure in parts:
        try:
            with explained("looking"):
                lines.append(f"{name}: {measure()}")
        except UserError as error:
            lines.append(f"{name}: {error}")
    return lines


def _bucket(account: Account, bucket: str) -> str:
    """S3 measures once a day; listing everything would take long and cost requests."""
    dimensions = [{"Name": "BucketName", "Value": bucket}, {"Name": "StorageType", "Value": "StandardStorage"}]
    metric = {"Namespace": "AWS/S3", "MetricName": "BucketSizeBytes", "Dimensions": dimensions}
    query: list[dict[str, Any]] = [{"Id": "size", "MetricStat": {"Metric": metric, "Period": 86400, "Stat": "Average"}}]
    now = datetime.now(UTC)
    results = pages(
        account.client("cloudwatch"), "get_metric_data", "MetricDataResults", MetricDataQueries=query,
        StartTime=now - timedelta(days=3), EndTime=now, ScanBy="TimestampDescending",
    )  # fmt: skip
    values = [value for result in results for value in result["Values"]]
    return f"{values[0] / GB:.1f} GB yesterday" if values else "S3 has not measured its size yet"


def _images(account: Account, repository: str) -> str:
    ecr, name = account.client("ecr"), repository.partition("/")[2]
    sizes = [image["imageSizeInBytes"] for image in pages(ecr, "describe_images", "imageDetails", repositoryName=name)]
    return f"{several(len(sizes), 'image')}, {sum(sizes) / GB:.1f} GB"


def _packages(account: Account) -> str:
    best = packages.champion(account)
    return f"{len(packages.summaries(account))} packages, the champion is {best or 'none yet'}"


def _triggers(account: Account) -> str:
    """What the stack, as it was made last, lets start the pipeline."""
    given = account.stack().parameters
    named = (given.get("PipelineSchedule"), given.get("Watch") and f"new data under {given['Watch']}")
    return f"started by {' and by '.join(filter(None, named)) or '`make pipeline` only'}"


def main() -> int:
    """Command line; see the module's docstring."""
    settings = load(terminal.parser("What the project has in AWS and what it costs.", settings=True).parse_args().set)
    account = Account(settings)
    print(f"{project.name()} in {settings.aws.region}, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC")
    print("\n".join([*inventory.table(inventory.everything(account)), *stored(account)]))
    return 0
